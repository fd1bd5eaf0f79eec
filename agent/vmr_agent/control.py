"""What lives here: the local socket between the daemon and the verbs: one JSON object a line, so `socat` works too.

It must not know: what a verb does. Output bytes never cross it: `logs` and `rerun` read the spool. Names are JSON
strings made with `os.fsdecode`, so bytes that are not UTF-8 pass as lone surrogates. A piece of a file follows a line
raw, its length in the line as `bytes`.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import selectors
import socket
import struct
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, Union

from vmr_agent.errors import Problem

SOCKET = "control"
_MAX_LINE = 64 * 1024
MAX_DATA = 1 << 19  # bytes that follow a request's line
MAX_CLIENTS = 64
_MAX_UNREAD = 1 << 20  # bytes; a client that left more than this unread is told nothing else, but let go
_FIRST = 16 * 1024  # bytes of room for what comes; more where it is needed
_JOINED = 16  # things said, in one write
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def listen(path: Path) -> socket.socket:
    """The listening socket, 0600. An old one there was left by a daemon that died: the caller has made sure.

    Raises OSError where there can be none.
    """
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    old = os.umask(0o177)
    try:
        sock.bind(os.fspath(path))
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(old)
    sock.listen(MAX_CLIENTS)
    return sock


def may_ask(sock: socket.socket) -> bool:
    """Whether the peer is root or this process's own user."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    return uid in (0, os.geteuid())


class _Incoming:
    """What came through a socket and isn't taken yet."""

    def __init__(self) -> None:
        self._store = bytearray(_FIRST)
        self._begin = self._end = 0

    def __len__(self) -> int:
        return self._end - self._begin

    def receive(self, sock: socket.socket) -> int:
        """As much as there is and there is room for; 0 at its end."""
        left = len(self)
        if not left:
            self._begin = self._end = 0
        elif self._begin and self._end == len(self._store):
            self._store[:left] = self._store[self._begin :]
            self._begin, self._end = 0, left
        if self._end == len(self._store):
            # Another one: what :meth:`take` gave of this one may be looked at.
            self._store = self._store + bytes(len(self._store))
        with memoryview(self._store) as store, store[self._end :] as room:
            count = sock.recv_into(room)
        self._end += count
        return count

    def line(self) -> Optional[bytes]:
        """The next line, without its end; None: it isn't whole."""
        end = self._store.find(b"\n", self._begin, self._end)
        if end < 0:
            return None
        line = bytes(self._store[self._begin : end])
        self._begin = end + 1
        return line

    def take(self, size: int) -> Optional[memoryview]:
        """The next ``size`` bytes, there until more is received; None: not all of them have come."""
        if len(self) < size:
            return None
        self._begin += size
        return memoryview(self._store)[self._begin - size : self._begin]


class Client:
    """One verb at the daemon's end: lines in, lines out, never blocking.

    Whoever has it watches its socket as :attr:`events` says, which any call may change, and lets it go when
    that is 0: it has heard all there is to say, or says and hears nothing.
    """

    def __init__(self, sock: socket.socket, unread: int = _MAX_UNREAD) -> None:
        """``unread``: the bytes that it may leave unread."""
        self.sock = sock
        self.sock.setblocking(False)
        self.watching: Optional[bytes] = None
        """The run whose events it wants."""
        self.observing: Optional[bytes] = None
        """The VMR in whose directory it wants to hear of changes."""
        self.attended = 0
        """Which of :attr:`events` whoever has it waits for."""
        self.owed = 0
        """Answers that are still to come from elsewhere."""
        self._in = _Incoming()
        self._row: Optional[dict[str, Any]] = None
        """A request whose data are still to come."""
        self._out: deque[Union[bytes, memoryview]] = deque()
        self._unsent, self._most = 0, unread
        self._listening, self._gave_up = True, False

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def events(self) -> int:
        """What to wait for, in the words of `selectors`; 0: it can be let go."""
        reading = selectors.EVENT_READ if self._listening else 0
        return reading | (selectors.EVENT_WRITE if self._out else 0)

    @property
    def over(self) -> bool:
        """Whether it can be let go, where answers may come later."""
        return self._gave_up or not (self.events or self.owed)

    def read(self) -> list[Mapping[str, Any]]:
        """The requests that came."""
        if not self._listening:
            return []
        try:
            more = self._in.receive(self.sock)
        except BlockingIOError:
            return []
        except OSError:
            self._give_up()
            return []
        if not more:
            # It has said all it wanted, as `socat` does at the end of its input; what it asked for it gets.
            self._listening, self.watching = False, None
            return []
        requests: list[Mapping[str, Any]] = []
        while self._listening:
            if self._row is None:
                line = self._in.line()
                if line is None:
                    if len(self._in) > _MAX_LINE:
                        self._give_up()
                    break
                self._row = self._parse(line)
                continue
            data = self._in.take(self._row.get("bytes", 0))
            if data is None:
                break
            requests.append({**self._row, "data": bytes(data)})
            self._row = None
        return requests if self._listening else []

    def _parse(self, line: bytes) -> Optional[dict[str, Any]]:
        """The request in a line; None, and it is told so, where there is none."""
        try:
            request = json.loads(line)
            # Halves of surrogate pairs are good JSON, and no name: only those of `os.fsdecode` pass.
            json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogateescape")
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict) or not isinstance(request.get("verb"), str):
            self.say({"ok": False, "error": 'cannot read the request: one JSON object a line, with a "verb"'})
            return None
        size = request.get("bytes", 0)
        if type(size) is not int or not 0 <= size <= MAX_DATA:
            self._give_up()
        return request

    def say(self, row: Mapping[str, Any], *data: bytes) -> None:
        """Tell it something, however long; not all of it need be gone when this returns."""
        if self._unsent > self._most:
            self._give_up()  # a shell that was stopped must cost nothing
            return
        if self._gave_up:
            return
        size = sum(map(len, data))
        if size:
            row = {**row, "bytes": size}
        line = json.dumps(row).encode("ascii") + b"\n"
        self._out.append(line)
        self._out.extend(data)
        self._unsent += len(line) + size
        self.flush()

    def nudge(self, row: Mapping[str, Any]) -> None:
        """Tell it that there is something to look at; needless while it has yet to hear something else."""
        if not self._out:
            self.say(row)

    def flush(self) -> None:
        """Send on what it had no room for."""
        try:
            while self._out:
                sent = self.sock.sendmsg(itertools.islice(self._out, _JOINED))
                self._unsent -= sent
                while self._out and sent >= len(self._out[0]):
                    sent -= len(self._out.popleft())
                if sent:
                    self._out[0] = memoryview(self._out[0])[sent:]
        except BlockingIOError:
            pass
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        self._listening, self.watching, self._gave_up = False, None, True
        self._out.clear()
        self._unsent = 0


class Connection:
    """A daemon, or a collector, as a verb sees it: ask, and read what it says."""

    def __init__(self, path: Path, *, program: str, hint: str, patience: Optional[float] = None) -> None:
        """Connect to the socket at ``path``. Raises Problem when nobody is there or it may not be asked.

        ``patience``: seconds after which whoever is silent counts as gone.
        """
        self._program = program
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._sock.settimeout(patience)
        try:
            self._sock.connect(os.fspath(path))
        except OSError as error:
            self._sock.close()
            if error.errno in (errno.EACCES, errno.EPERM):
                raise Problem(
                    f"cannot ask the {program} at {path}: permission denied", hint="try as root"
                ) from None
            if error.errno not in (errno.ENOENT, errno.ECONNREFUSED):
                raise Problem(f"cannot reach the {program} at {path}: {error.strerror or error}") from None
            raise Problem(f"cannot reach the {program} at {path}: it isn't running", hint=hint) from None
        self._in = _Incoming()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._sock.close()

    def fileno(self) -> int:
        return self._sock.fileno()

    def ask(self, verb: str, **args: Any) -> dict[str, Any]:
        """Do a verb and return its answer. Raises Problem when it could not be done."""
        try:
            self._sock.sendall(json.dumps({"verb": verb, **args}).encode("ascii") + b"\n")
            answer = self._line()
            while answer is not None and "event" in answer:  # said unasked, before it heard us
                answer = self._line()
        except socket.timeout:  # TimeoutError only since Python 3.10
            raise Problem(f"cannot hear the {self._program}: it doesn't answer") from None
        except OSError:
            answer = None
        except ValueError:
            raise Problem(f"cannot understand what answers as the {self._program}: no JSON object") from None
        if answer is None:
            raise Problem(f"cannot hear the {self._program}: it went away before it answered")
        if not answer.pop("ok", False):
            raise Problem(str(answer.get("error", "cannot do that")), hint=answer.get("hint"))
        return answer

    def say(self, row: Mapping[str, Any], data: Union[bytes, memoryview] = b"") -> None:
        """Send a request whose answer :meth:`hear` gives. Raises OSError when nobody is there."""
        if data:
            row = {**row, "bytes": len(data)}
        line = json.dumps(row).encode("ascii") + b"\n"
        sent = self._sock.sendmsg([line, data])
        if sent < len(line) + len(data):
            self._sock.sendall((line + data)[sent:])

    def hear(self) -> tuple[dict[str, Any], memoryview]:
        """The next answer and the bytes that follow it, which are there until the next call.

        Raises OSError when nobody is there.
        """
        try:
            row = self._line()
        except ValueError:
            row = None
        if row is None:
            raise ConnectionError("it went away")
        size = row.get("bytes", 0)
        while True:
            data = self._in.take(size)
            if data is not None:
                return row, data
            if not self._in.receive(self._sock):
                raise ConnectionError("it went away")

    def drain(self) -> bool:
        """Take what it said unasked, which only means that there is something to look at; False: it is gone."""
        try:
            more = self._in.receive(self._sock)
        except OSError:
            return False
        while self._in.line() is not None:  # the beginning of a line is kept for its end
            pass
        return bool(more)

    def _line(self) -> Optional[dict[str, Any]]:
        while True:
            line = self._in.line()
            if line is not None:
                break
            if not self._in.receive(self._sock):
                return None
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise ValueError("no object")
        return answer
