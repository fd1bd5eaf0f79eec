"""What lives here: the VM's files read, written and put in place at the host's word, piece by piece.

It must not know: the port, sessions, runs, when anything starts. There is no table of transfers either: each
request says which state of which file it presumes, so a request that is repeated changes nothing, and what
continues after a lost session is known to the host alone. `PROTOCOL.md` has the verbs and their fields.
Over 400 lines: twelve short verbs read as one list.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import stat
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Callable, Optional

from vmr_agent.contents import next_data, sha256
from vmr_agent.errors import Problem, show
from vmr_agent.schedule import is_vmr_directory, parse_start_time, sort_key
from vmr_agent.wire.messages import PIECE, Reply, Request, Scalar, text

Args = Mapping[str, Scalar]
Result = dict[str, Scalar]
_READERS = 8  # threads; the host's window asks for more, and under emulation each is slow
_LINGER = 5.0  # s that a thread waits for more to do
_PART = b".part"


class Files:
    """Does what the host asks about files.

    Three kinds of verbs, by what they may cost the daemon's loop. `read` is done when the port has room for its
    answer. What reads little is done at once. What writes, or reads much, is done in threads: a slow disk makes
    whoever writes to it wait, up to 0.2 s a write. :meth:`take` gives the threads' answers once :meth:`fileno` is
    readable.
    """

    def __init__(self, launch_dir: bytes) -> None:
        self._launch = launch_dir
        self._at_once: Mapping[str, Callable[[Args], Result]] = {"stat": self._stat, "stage": self._stage}
        self._in_order: Mapping[str, Callable[[Args], Result]] = {
            "write": self._write,
            "place": self._place,
            "mkdir": self._mkdir,
            "link": self._link,
            "rename": self._rename,
            "remove": self._remove,
        }
        self._in_any_order: Mapping[str, Callable[[Args], Result]] = {
            "list": self._list,
            "digest": self._digest,
            "sync": self._sync,
        }
        self._writer = _Workers(1, self._work)
        self._readers = _Workers(_READERS, self._work)
        self._to_write: list[Request] = []
        self._under_way: set[bytes] = set()
        self._done: deque[Reply] = deque()
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        return self._woken

    def knows(self, verb: str) -> bool:
        return verb == "read" or any(
            verb in verbs for verbs in (self._at_once, self._in_order, self._in_any_order)
        )

    def do(self, request: Request) -> Optional[Reply]:
        """The answer to any verb but `read`; None when a thread will give it, which :meth:`go` lets begin."""
        at_once = self._at_once.get(request.verb)
        if at_once is not None:
            return _answer(request, at_once)
        if request.request not in self._under_way:  # else repeated after a lost session: its answer comes
            self._under_way.add(request.request)
            if request.verb in self._in_order:
                self._to_write.append(request)
            else:
                self._readers.add([request])
        return None

    def go(self) -> None:
        """What came together is written together: a thread that wakes for each piece of a file, beside a loop that
        takes the next, costs a slow VM twice what writing does."""
        if self._to_write:
            self._writer.add(self._to_write)
            self._to_write = []

    def read(self, request: Request) -> Iterator[Reply]:
        """The answers to `read`, each made when it is asked for; the file stays open until the last."""
        try:
            for result in self._read(request.args):
                yield Reply(request.request, True, "", result)
        except _FAILURES as failure:
            yield _refusal(request, failure)

    def take(self) -> list[Reply]:
        """What the threads have done."""
        with suppress(BlockingIOError):
            os.read(self._woken, 4096)
        found = []
        while self._done:
            found.append(self._done.popleft())
            self._under_way.discard(found[-1].request)
        return found

    def _work(self, requests: list[Request]) -> None:
        for request in requests:
            if request.verb != "write":
                self._tell()  # what was written needs not wait for a digest
            act = self._in_order.get(request.verb) or self._in_any_order[request.verb]
            self._done.append(_answer(request, act))
        self._tell()

    def _tell(self) -> None:
        with suppress(BlockingIOError):  # full: the loop is woken already
            os.write(self._wake, b".")

    # --- out of the VM ---

    def _stat(self, args: Args) -> Result:
        path = self._path(args)
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return {"path": path, "kind": "nothing"}
        return {"path": os.path.realpath(path), **_facts(status)}

    def _read(self, args: Args) -> Iterator[Result]:
        path = self._path(args)
        offset, end = _number(args, "offset"), _number(args, "end")
        with _Opened(path, args.get("id")) as file:
            follows = True
            while follows:
                start = next_data(file.fd, offset, file.status.st_size)
                data = os.pread(file.fd, min(end - start, PIECE), start) if start < end else b""
                offset = start + len(data)
                follows = args.get("all") is True and bool(data) and offset < end
                file.check()
                yield {"at": start, "data": data, **({"follows": True} if follows else {})}

    def _digest(self, args: Args) -> Result:
        with _Opened(self._path(args), args.get("id")) as file:
            digest = sha256(file.fd)
            file.check()
            return {"sha256": digest}

    def _list(self, args: Args) -> Result:
        """A page of a directory, after a name: JSON objects, one a line, names by `os.fsdecode`."""
        path, after = self._path(args), _bytes(args, "after")
        lines: list[bytes] = []
        size = 0
        names = sorted(name for name in os.listdir(path) if name > after)
        for name in names:
            inside = os.path.join(path, name)
            status = os.lstat(inside)
            facts = {"name": os.fsdecode(name), **_facts(status), "id": os.fsdecode(_identity(status))}
            if stat.S_ISLNK(status.st_mode):
                facts["target"] = os.fsdecode(os.readlink(inside))
            line = json.dumps(facts).encode() + b"\n"
            size += len(line)
            if size > PIECE:
                break
            lines.append(line)
        return {"data": b"".join(lines), "more": len(lines) < len(names)}

    # --- into the VM ---

    def _write(self, args: Args) -> Result:
        path, offset, data = self._path(args), _number(args, "offset"), _bytes(args, "data")
        # Never through a link, nor into what another user put there: in /tmp anybody can guess the name.
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        make = args.get("make") is True
        try:
            fd = os.open(path, flags | os.O_CREAT if make else flags, 0o600)
        except FileNotFoundError:
            if make:
                raise
            return {}  # placed already, or given up: `place` knows
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                raise Problem(f"{show(path)}: something else is there")
            while data:
                taken = os.pwrite(fd, data, offset)
                data, offset = data[taken:], offset + taken
        finally:
            os.close(fd)
        return {}

    def _place(self, args: Args) -> Result:
        """A written file gets its length, mode and time, and its name once its digest is right."""
        part, path = self._path(args, "part"), self._path(args)
        size, digest = _number(args, "size"), _bytes(args, "sha256")
        try:
            fd = os.open(part, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            if _holds(path, digest):
                return {}  # placed already, and the host didn't hear of it
            raise
        try:
            os.ftruncate(fd, size)
            if sha256(fd) != digest:
                os.unlink(part)
                if part != path and _holds(path, digest):
                    return {}  # likewise; repeated, the first write had made the part anew
                raise Problem(f"{show(path)}: what arrived is not what was sent: the digests differ")
            os.fchmod(fd, _number(args, "mode"))
            os.utime(fd, ns=(_int(args, "mtime"),) * 2)
            if part != path:
                os.fsync(fd)
                os.rename(part, path)
                _sync_directory(os.path.dirname(path))
        finally:
            os.close(fd)
        return {}

    def _mkdir(self, args: Args) -> Result:
        path = self._path(args)
        if path == self._launch:
            os.makedirs(path, 0o755, exist_ok=True)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise
        if args.get("mode") is not None:
            os.chmod(path, _number(args, "mode"))
            os.utime(path, ns=(_int(args, "mtime"),) * 2)
        return {"id": _same_directory(os.lstat(path))}

    def _link(self, args: Args) -> Result:
        path, target = self._path(args), _bytes(args, "target")
        try:
            os.symlink(target, path)
        except FileExistsError:
            if not os.path.islink(path) or os.readlink(path) != target:
                raise
        return {}

    def _rename(self, args: Args) -> Result:
        """A tree that was pushed gets its name; only where nothing is, or an empty directory."""
        part, path = self._path(args, "part"), self._path(args)
        try:
            os.rename(part, path)
        except FileNotFoundError:
            if not os.path.isdir(path) or _same_directory(os.lstat(path)) != args.get("id"):
                raise
        return {}

    def _remove(self, args: Args) -> Result:
        path = self._path(args)
        if not os.path.basename(path).startswith(b".") or not path.endswith(_PART):
            raise Problem(f"{show(path)}: isn't half of a transfer")
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            with suppress(FileNotFoundError):
                os.unlink(path)
        return {}

    def _sync(self, args: Args) -> Result:
        os.sync()
        return {}

    def _stage(self, args: Args) -> Result:
        """The VMRs of a tree that was pushed into the launch directory go where they belong.

        It is done within one turn of the daemon's loop, so the schedule finds all of them or none: a lower
        start time is never overtaken. Lowest first all the same, should the power fail in between.
        """
        part = self._path(args)
        try:
            times = os.listdir(part)
        except FileNotFoundError:
            return {"staged": 0}  # done already, and the host didn't hear of it
        vmrs = [time + b"/" + name for time in times for name in os.listdir(os.path.join(part, time))]
        for vmr in vmrs:
            time, _, name = vmr.partition(b"/")
            if parse_start_time(time) is None or not is_vmr_directory(name):
                raise Problem(f"{show(vmr)}: is no VMR's name")
            if os.path.lexists(os.path.join(self._launch, vmr)):
                raise Problem(f"{show(vmr)}: is staged already")
        for vmr in sorted(vmrs, key=sort_key):
            target = os.path.join(self._launch, vmr)
            with suppress(FileExistsError):
                os.mkdir(os.path.dirname(target), 0o755)
            os.rename(os.path.join(part, vmr), target)
        for time in times:
            os.rmdir(os.path.join(part, time))
        os.rmdir(part)
        return {"staged": len(vmrs)}

    # --- inside ---

    def _path(self, args: Args, key: str = "path") -> bytes:
        """A path as the host says it; relative: to the launch directory."""
        path = _bytes(args, key)
        if b"\0" in path:
            raise Problem(f"{show(path)}: is no path")
        return os.path.normpath(os.path.join(self._launch, path)) if path[:1] != b"/" else path


class _Workers:
    """Up to so many threads that take what is added, in turn; they end when there has been nothing for a while."""

    def __init__(self, most: int, work: Callable[[list[Request]], None]) -> None:
        self._most, self._work = most, work
        self._jobs: queue.SimpleQueue[list[Request]] = queue.SimpleQueue()
        self._threads = self._idle = 0
        self._lock = threading.Lock()

    def add(self, requests: list[Request]) -> None:
        with self._lock:
            self._jobs.put(requests)
            if self._threads == self._most or self._idle >= self._jobs.qsize():
                return
            self._threads += 1
        # A daemon thread: a disk that doesn't sync must not hold up the daemon's end.
        threading.Thread(target=self._run, name="files", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            try:
                requests = self._jobs.get(timeout=_LINGER)
            except queue.Empty:
                requests = []
            with self._lock:
                self._idle -= 1
                if not requests and self._jobs.empty():
                    self._threads -= 1
                    return
            if requests:
                self._work(requests)


class _Opened:
    """A regular file, open for reading, and held to be the same throughout."""

    def __init__(self, path: bytes, presumed: Scalar) -> None:
        self._path, self._presumed = path, presumed
        # O_NONBLOCK: the open of a named pipe would wait for its writer.
        self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        self.status = os.fstat(self.fd)
        try:
            if not stat.S_ISREG(self.status.st_mode):
                raise Problem(f"{show(path)}: is a {_kind(self.status)}, not a file")
            self.check()
        except Problem:
            os.close(self.fd)
            raise

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def check(self) -> None:
        if self._presumed is not None and _identity(os.fstat(self.fd)) != self._presumed:
            raise Problem(f"{show(self._path)}: has changed meanwhile")


# The last two: numbers that the system calls don't take.
_FAILURES = (Problem, OSError, ValueError, OverflowError)


def _answer(request: Request, act: Callable[[Args], Result]) -> Reply:
    try:
        return Reply(request.request, True, "", act(request.args))
    except _FAILURES as failure:
        return _refusal(request, failure)


def _refusal(request: Request, failure: Exception) -> Reply:
    if isinstance(failure, OSError):
        named: object = failure.filename2 or failure.filename or request.args.get("path")
        reason = failure.strerror or str(failure)
        error = f"{show(named)}: {reason}" if isinstance(named, bytes) else reason
    else:
        error = str(failure) if isinstance(failure, Problem) else f"cannot read the request: {failure}"
    return Reply(request.request, False, text(error), {})


def _bytes(args: Args, key: str) -> bytes:
    value = args.get(key)
    if not isinstance(value, bytes):
        raise Problem(f"cannot read the request: {key} must be bytes")
    return value


def _int(args: Args, key: str) -> int:
    value = args.get(key)
    if type(value) is not int:
        raise Problem(f"cannot read the request: {key} must be a number")
    return value


def _number(args: Args, key: str) -> int:
    value = _int(args, key)
    if value < 0:
        raise Problem(f"cannot read the request: {key} is negative")
    return value


_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
}


def _kind(status: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(status.st_mode), "device")


def _facts(status: os.stat_result) -> Result:
    return {
        "kind": _kind(status),
        "size": status.st_size,
        "mode": stat.S_IMODE(status.st_mode),
        "mtime": status.st_mtime_ns,
        "id": _identity(status),
    }


def _identity(status: os.stat_result) -> bytes:
    """What a file is, as far as its inode tells; a change of its contents is another identity."""
    return b"%d:%d:%d:%d" % (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _same_directory(status: os.stat_result) -> bytes:
    return b"%d:%d" % (status.st_dev, status.st_ino)


def _holds(path: bytes, digest: bytes) -> bool:
    """Whether the file at ``path`` is the one of this digest."""
    try:
        with _Opened(path, None) as file:
            return sha256(file.fd) == digest
    except (OSError, Problem):
        return False


def _sync_directory(path: bytes) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
