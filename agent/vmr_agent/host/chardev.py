"""What lives here: the host's end of each VM's channel: connected and connected again, or listened for.

It must not know: frames, sessions, logs. QEMU's chardev socket serves one client and queues the rest in silence
(`server=on`), or dials us (`server=off,reconnect=1`).
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import select
import socket
import stat
import time
from collections import deque
from pathlib import Path
from typing import Callable, Optional, Union

from vmr_agent.errors import Problem

RETRY_FIRST, RETRY_LAST = 0.1, 1.0  # s between attempts to connect
UNREAD = 1 << 21  # bytes the guest may leave unread: all is said again
ROOM = UNREAD // 4  # bytes; beyond so much unread requests about files wait: two who push ask for all of it
# What is taken at once, of one VM after the other. More of what is made to look like frames would hold up the others.
_TAKEN = memoryview(bytearray(1 << 16))
_JOINED = 16  # frames, in one write
SOCKETS = 256  # read in one turn, before the loop's other work has its turn
MANY = 50  # VMs; with fewer a line waits for nothing
REST = 0.001  # s, to which the loop adds up to as much
_CLOSED = "the other end closed the socket"


class Poll:
    """All VMs' sockets, for reading: one descriptor to the loop.

    The loop would take three times as long for each socket that has something, and with many VMs it would have a turn
    for each line: so after a turn those that come next are waited for, a moment, to be taken together.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._readers: dict[int, Callable[[], bool]] = {}
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self._last = 0.0

    def add(self, sock: socket.socket, reader: Callable[[], bool]) -> None:
        """``reader``: takes what there is; whether that was as much as can be taken at once."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._epoll, self._turn)
        if sock.fileno() not in self._readers:
            self._epoll.register(sock, select.EPOLLIN)
        self._readers[sock.fileno()] = reader

    def remove(self, sock: socket.socket) -> None:
        if self._readers.pop(sock.fileno(), None) is not None:
            self._epoll.unregister(sock)

    def _turn(self) -> None:
        assert self._loop is not None
        began = time.monotonic()
        flood = False
        ready = self._epoll.poll(0, SOCKETS)
        for fd, _ in ready:
            reader = self._readers.get(fd)  # one that was taken before may have ended it
            if reader is not None and reader():
                flood = True
        many = len(self._readers) >= MANY and (len(ready) > 1 or began - self._last < REST)
        if many and not flood and len(ready) < SOCKETS:
            self._loop.remove_reader(self._epoll)
            self._loop.call_later(REST, self._go_on)
        self._last = began

    def _go_on(self) -> None:
        assert self._loop is not None
        self._loop.add_reader(self._epoll, self._turn)


class Chardev:
    """One VM's socket. Calls back from the loop: ``opened()``, ``received(bytes)``, ``closed(reason)``, ``roomy()``
    each time that :attr:`full` may have ended."""

    def __init__(
        self,
        path: Path,
        *,
        poll: Poll,
        listen: bool,
        opened: Callable[[], None],
        received: Callable[[bytes], None],
        closed: Callable[[str], None],
        roomy: Callable[[], None],
    ) -> None:
        self.path = path
        self.listen = listen
        self._poll = poll
        self._opened, self._received, self._closed, self._roomy = opened, received, closed, roomy
        self._loop = asyncio.get_running_loop()
        self._sock: Optional[socket.socket] = None
        self._listener: Optional[socket.socket] = None
        self._out: deque[Union[bytes, memoryview]] = deque()
        self._unsent = 0
        self._waits = False
        """For the guest to read."""
        self._retry = RETRY_FIRST
        self._timer: Optional[asyncio.TimerHandle] = None
        self.reason = "not tried yet"

    def bind(self) -> None:
        """Be there for who connects, where we are to listen; raises Problem when that can't be."""
        if self.listen and self._listener is None:
            self._listener = _listen(self.path)

    def start(self) -> None:
        """Begin to connect, or to take who connects. Raises Problem as :meth:`bind` does."""
        self.bind()
        if self._listener is not None:
            self._wait()
            self.reason = "nobody has connected"
        else:
            self._connect()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._sock is not None:
            self._let_go()
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self.path.unlink(missing_ok=True)

    @property
    def full(self) -> bool:
        """Whether the guest has left so much unread that what can wait should."""
        return self._unsent > ROOM

    def write(self, *frames: bytes) -> None:
        """Send frames; kept while the guest doesn't read. Nothing happens while there is no connection."""
        if self._sock is None:
            return
        waits = bool(self._out)
        self._out.extend(frames)
        self._unsent += sum(map(len, frames))
        if self._unsent > UNREAD:
            self.drop("the guest doesn't read")
        elif not waits:
            self._send()

    def pause(self) -> None:
        """Take nothing in until :meth:`resume`; what waits, waits in the guest."""
        if self._sock is not None:
            self._poll.remove(self._sock)

    def resume(self) -> None:
        if self._sock is not None:
            self._poll.add(self._sock, self._read)

    def drop(self, reason: str) -> None:
        """End this connection; the next one is tried in a second."""
        if self._sock is not None:
            self._retry = RETRY_LAST
            self._lost(reason)
            if self._listener is not None:  # else whoever connects again at once would have us do so for ever
                self._loop.remove_reader(self._listener)
                self._timer = self._loop.call_later(RETRY_LAST, self._wait)

    # --- inside ---

    def _wait(self) -> None:
        self._timer = None
        assert self._listener is not None
        self._loop.add_reader(self._listener, self._accept)

    def _connect(self) -> None:
        self._timer = None
        flags = socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        sock: Optional[socket.socket] = None
        try:
            sock = socket.socket(socket.AF_UNIX, flags)  # there may be no descriptor left
            sock.connect(os.fspath(self.path))
        except OSError as error:
            if sock is not None:
                sock.close()
            self.reason = error.strerror or str(error)
            self._try_again()
            return
        self._retry = RETRY_FIRST
        self._take(sock)

    def _try_again(self) -> None:
        self._timer = self._loop.call_later(self._retry, self._connect)
        self._retry = min(2 * self._retry, RETRY_LAST)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Without a descriptor left the listener stays readable: looked at again at once it would be for ever.
            if self._sock is None:
                self.reason = error.strerror or str(error)
            self._loop.remove_reader(self._listener)
            self._timer = self._loop.call_later(RETRY_LAST, self._wait)
            return
        if self._sock is not None:
            sock.close()  # one client, as QEMU has it: two would mix their frames
            return
        sock.setblocking(False)
        self._take(sock)

    def _take(self, sock: socket.socket) -> None:
        self._sock, self.reason = sock, ""
        self._out.clear()
        self._unsent = 0
        self._poll.add(sock, self._read)
        self._opened()

    def _read(self) -> bool:
        assert self._sock is not None
        try:
            count = self._sock.recv_into(_TAKEN)
        except BlockingIOError:
            return False
        except OSError as error:
            self._lost(_why(error))
            return False
        if count:
            self._received(bytes(_TAKEN[:count]))
        else:
            self._lost(_CLOSED)
        return count == len(_TAKEN)

    def _send(self) -> None:
        while self._out and self._sock is not None:
            try:
                sent = self._sock.sendmsg(itertools.islice(self._out, _JOINED))
            except BlockingIOError:
                self._waits = True
                self._loop.add_writer(self._sock, self._go_on)
                return
            except OSError as error:
                self._lost(_why(error))
                return
            self._unsent -= sent
            while self._out and sent >= len(self._out[0]):
                sent -= len(self._out.popleft())
            if sent:
                self._out[0] = memoryview(self._out[0])[sent:]
        if self._waits and self._sock is not None:
            self._waits = False
            self._loop.remove_writer(self._sock)

    def _go_on(self) -> None:
        self._send()
        if self._sock is not None and not self.full:
            self._roomy()

    def _let_go(self) -> None:
        assert self._sock is not None
        self._poll.remove(self._sock)
        self._loop.remove_writer(self._sock)
        self._waits = False
        self._sock.close()
        self._sock = None
        self._out.clear()
        self._unsent = 0

    def _lost(self, reason: str) -> None:
        self._let_go()
        self.reason = reason
        self._closed(reason)
        if self._listener is None:
            self._try_again()


def _why(error: OSError) -> str:
    """Whether a write or what lay unread comes first decides how a socket tells that it was closed."""
    return _CLOSED if error.errno in (errno.ECONNRESET, errno.EPIPE) else error.strerror or str(error)


def _listen(path: Path) -> socket.socket:
    """A listening socket at ``path``, mode 0600; one left there by a collector that died is replaced."""
    try:
        there: Optional[os.stat_result] = path.lstat()
    except OSError:
        there = None
    if there is not None and not stat.S_ISSOCK(there.st_mode):
        raise Problem(f"cannot listen at {path}: something else is there")
    if there is not None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
            try:
                probe.connect(os.fspath(path))
            except OSError:
                path.unlink(missing_ok=True)
            else:
                raise Problem(f"cannot listen at {path}: another process does")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    old = os.umask(0o177)
    try:
        sock.bind(os.fspath(path))
    except OSError as error:
        sock.close()
        raise Problem(f"cannot listen at {path}: {error.strerror or error}") from None
    finally:
        os.umask(old)
    sock.listen(8)
    return sock
