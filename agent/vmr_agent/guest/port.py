"""What lives here: the guest's end of the channel: found, opened, read and written without ever blocking.

It must not know: frames, sessions. Three kinds: a virtio-serial port by name, a character device by path, and
`unix:PATH`, a socket that stands in for the port.
"""

from __future__ import annotations

import enum
import errno
import os
import select
import socket
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Optional, Union

RETRY_FIRST, RETRY_LAST = 0.1, 1.0  # s between attempts to open
ASK_AGAIN = 10.0  # s; who holds a busy port is looked up in all of /proc: 4 to 7 % of a core, each second

# The most that a virtio port gives at a read(2). By readv(2) it fills one buffer after the other, as if asked for each
# by itself, until one is not filled: a slow VM takes two thirds of the time of so many calls for it.
_PIECE, _PIECES = 4_096, 16
_READ = 256 * 1024  # bytes; what a socket is asked for at once
_CLOSED = "the host closed the socket"
_EDGES = select.EPOLLIN | select.EPOLLHUP | select.EPOLLET
_PORTS = Path("/dev/virtio-ports")
_CLASS = Path("/sys/class/virtio-ports")


class PortState(enum.Enum):
    MISSING = "missing"
    """Not there, or it can't be opened; tried again."""
    AWAY = "away"
    """Open, and no host at its other end."""
    UP = "up"


class Port:
    """The port, whatever becomes of it. Only ever in the daemon's one thread.

    A second thread that polls while one writes can hang for ever in the kernel's driver.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.state = PortState.MISSING
        self.reason = "not tried yet"
        self._fd = -1
        self._socket: Optional[socket.socket] = None
        self._wants_room = False
        self._retry = RETRY_FIRST
        self._next = self._looked = 0.0
        self._ask_again = 0.0
        # With the host away the port polls IN and HUP for ever: a level-triggered loop would spin. So the port is
        # watched edge-triggered in an epoll of its own, whose descriptor the daemon's loop watches.
        self._edges = select.epoll()
        size, step = (_PIECES * _PIECE, _PIECE) if self.virtio else (_READ, _READ)
        self._room = memoryview(bytearray(size))
        self._rooms = [self._room[at : at + step] for at in range(0, size, step)]

    @property
    def virtio(self) -> bool:
        """Whether this is a VM's port, not a stand-in for one."""
        return not self.spec.startswith("unix:")

    def fileno(self) -> int:
        """A descriptor that is readable when :meth:`look` may find something new."""
        return self._edges.fileno()

    def close(self) -> None:
        self._drop("closed")
        self._edges.close()

    def next_try(self) -> Optional[float]:
        """When :meth:`look` should be called if nothing happens; None when an edge will tell."""
        return self._next if self.state is PortState.MISSING else None

    def look(self, now: float) -> PortState:
        """Open the port if it is due, and see whether the host is there."""
        self._looked = now
        if self.state is PortState.MISSING:
            if now < self._next:
                return self.state
            try:
                self._open()
                self._ask_again = now
            except OSError as error:
                busy = error.errno == errno.EBUSY
                if not busy or now >= self._ask_again:
                    self.reason = self._explain(error)
                    self._ask_again = now + ASK_AGAIN if busy else now
                self._drop(self.reason)
                return self.state
        else:
            self._edges.poll(0)
        self._judge()
        return self.state

    def read(self) -> bytes:
        """The bytes there are; empty when there are none now, or :attr:`state` is no longer ``UP``."""
        try:
            count = os.readv(self._fd, self._rooms)
        except BlockingIOError:
            return b""
        except OSError as error:
            self._drop(self._explain(error))
            return b""
        if count:
            self._retry = RETRY_FIRST  # not already when it opens: a host may hang up at once, each time
        elif self._socket is not None:
            self._drop(_CLOSED)
        else:
            self._judge()  # not an end of file: the host is away, until it comes back
        return bytes(self._room[:count])

    def write(self, frames: Sequence[Union[bytes, memoryview]]) -> int:
        """How many bytes were taken; 0 when there is no room, or :attr:`state` is no longer ``UP``.

        A virtio port takes each frame as by a write of its own, up to one that it takes in part or not at all.

        Taken is not delivered: a host that leaves drops up to 4 MiB that the guest saw accepted.
        """
        try:
            return os.writev(self._fd, frames)  # can return 0, which means what EAGAIN means
        except BlockingIOError:
            if self._socket is None:
                self._judge()
            return 0
        except OSError as error:
            self._drop(self._explain(error))
            return 0

    def want_room(self, wanted: bool) -> None:
        """Whether there is more to write than was taken: only then an edge tells of room, else each write would."""
        if self._fd >= 0 and wanted != self._wants_room:
            self._wants_room = wanted
            # Changing what is waited for also looks afresh, so room that came meanwhile isn't missed.
            self._edges.modify(self._fd, _EDGES | (select.EPOLLOUT if wanted else 0))

    # --- inside ---

    def _open(self) -> None:
        if self.spec.startswith("unix:"):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            sock.setblocking(False)
            try:
                sock.connect(self.spec[len("unix:") :])
            except OSError:
                sock.close()
                raise
            self._socket, self._fd = sock, sock.fileno()
        else:
            path = device(self.spec)
            if not stat.S_ISCHR(path.stat().st_mode):
                raise OSError(errno.ENOTTY, "is no character device")
            # A script that inherited the descriptor would keep the port busy for its whole life: O_CLOEXEC.
            self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        self._wants_room = False
        self._edges.register(self._fd, _EDGES)

    def _judge(self) -> None:
        if self._socket is not None:
            self.state, self.reason = PortState.UP, ""
            return
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        events = dict(poll.poll(0)).get(self._fd, 0)
        if events & select.POLLNVAL:
            self._drop("gone")
        elif events & select.POLLHUP:
            if not self.present():
                self._drop("unplugged")
            else:
                self.state, self.reason = PortState.AWAY, "no host at the other end"
        else:
            self.state, self.reason = PortState.UP, ""

    def present(self) -> bool:
        """Whether the device still exists; an unplugged port polls like one whose host is away."""
        if self._socket is not None:
            return True
        try:
            number = os.fstat(self._fd).st_rdev
            return Path(f"/sys/dev/char/{os.major(number)}:{os.minor(number)}").exists()
        except OSError:
            return False

    def _drop(self, reason: str) -> None:
        self.state, self.reason = PortState.MISSING, reason
        self._next = self._looked + self._retry
        self._retry = min(self._retry * 2, RETRY_LAST)
        if self._fd < 0:
            return
        try:
            self._edges.unregister(self._fd)
        except OSError:
            pass
        if self._socket is not None:
            self._socket.close()
        else:
            os.close(self._fd)
        self._fd, self._socket = -1, None

    def _explain(self, error: OSError) -> str:
        if error.errno == errno.EBUSY:
            return "busy: " + (", ".join(users_of(device(self.spec))) or "another process") + " has it open"
        if error.errno == errno.ENODEV:
            return "unplugged"
        if error.errno in (errno.ECONNRESET, errno.EPIPE):
            return _CLOSED
        if error.errno == errno.EAGAIN:
            return "the host's socket takes no more connections now"
        return error.strerror or str(error)


def device(spec: str) -> Path:
    """The device of a port given by name or path.

    udev's link may be missing; the kernel's own list never is. Raises FileNotFoundError when there is none.
    """
    if "/" in spec:
        return Path(spec)
    link = _PORTS / spec
    if link.exists():
        return link
    for entry in sorted(_CLASS.glob("*/name")):
        try:
            if entry.read_text().strip() == spec:
                return Path("/dev") / entry.parent.name
        except OSError:
            continue  # unplugged while we looked
    raise FileNotFoundError(errno.ENOENT, "there is no port of that name")


def users_of(path: Path) -> list[str]:
    """The processes that have a device open, as ``name (pid)``; those that we may see."""
    users: list[str] = []
    try:
        number = path.stat().st_rdev
    except OSError:
        return users
    for process in Path("/proc").glob("[0-9]*"):
        try:
            for fd in (process / "fd").iterdir():
                there = fd.stat()
                if stat.S_ISCHR(there.st_mode) and there.st_rdev == number:
                    users.append(f"{(process / 'comm').read_text().strip()} ({process.name})")
                    break
        except OSError:
            continue  # ended, or not ours to see
    return users
