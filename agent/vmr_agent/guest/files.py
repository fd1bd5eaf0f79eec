"""What lives here: the VM's files read, written and put in place at the host's word, piece by piece.

It must not know: the port, sessions, runs, when anything starts. There is no table of transfers either: each
request says which state of which file it presumes, so a request that is repeated changes nothing, and what
continues after a lost session is known to the host alone. `PROTOCOL.md` has the verbs and their fields.
Over 400 lines: twelve short verbs read as one list.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import queue
import shutil
import stat
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Callable, NamedTuple, Optional, Union

from vmr_agent.contents import (
    DIGESTS,
    Written,
    digest_of,
    fastest,
    mtime_of,
    next_data,
    read_data,
    write_all,
)
from vmr_agent.errors import Problem, show
from vmr_agent.schedule import is_vmr_directory, parse_start_time, sort_key
from vmr_agent.wire.messages import MAX_WRITE, PIECE, Piece, Reply, Request, Scalar, text

Args = Mapping[str, Scalar]
Result = dict[str, Scalar]
_AT_ONCE = 8 * PIECE  # bytes of a file read at once
_READERS = 8  # threads; the host's window asks for more, and under emulation each is slow
_WRITTEN = 8  # files that are being written, of which the digest is kept; of others it is made at the end
_LINGER = 5.0  # s that a thread waits for more to do
_PART = b".part"


class _Job(NamedTuple):
    """What a thread has to do."""

    request: Request
    pieces: list[bytes]
    """What is to be written."""


class Files:
    """Does what the host asks about files.

    Three kinds of verbs, by what they may cost the daemon's loop. `read` is done when the port has room for its
    answer. What reads little is done at once. What writes, or reads much, is done in threads: a slow disk makes
    whoever writes to it wait, up to 0.2 s a write. :meth:`take` gives the threads' answers once :meth:`fileno` is
    readable.
    """

    def __init__(self, launch_dir: bytes) -> None:
        self._launch = launch_dir
        self._at_once: Mapping[str, Callable[[Args], Result]] = {"stage": self._stage}
        self._in_order: Mapping[str, Callable[[Args], Result]] = {
            "place": self._place,
            "mkdir": self._mkdir,
            "link": self._link,
            "rename": self._rename,
            "remove": self._remove,
        }
        self._in_any_order: Mapping[str, Callable[[Args], Result]] = {
            "stat": self._stat,  # in a thread, for the file system may hang
            "list": self._list,
            "digest": self._digest,
            "sync": self._sync,
        }
        self._writer = _Workers(1, self._work)
        self._readers = _Workers(_READERS, self._work)
        self._lookers = _Workers(1, self._work)  # a transfer begins by `stat`, which is to wait for no digest
        self._to_write: list[_Job] = []
        self._coming: Optional[_Coming] = None
        self._written: dict[bytes, tuple[bytes, Written]] = {}
        """Files that were empty and have been written in order since; only for the thread that writes."""
        self._fastest = ""
        self._under_way: set[bytes] = set()
        self._done: deque[Reply] = deque()
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        return self._woken

    def knows(self, verb: str) -> bool:
        return verb in ("read", "write") or any(
            verb in verbs for verbs in (self._at_once, self._in_order, self._in_any_order)
        )

    def do(self, request: Request) -> Optional[Reply]:
        """The answer to any verb but `read`; None when a thread will give it, which :meth:`go` lets begin, or when
        Pieces come first."""
        at_once = self._at_once.get(request.verb)
        if at_once is not None:
            return _answer(request, at_once)
        if request.request in self._under_way:
            return None  # repeated after a lost session: its answer comes
        if request.verb == "write":
            try:
                self._coming = _Coming(request)
            except Problem as problem:
                return _refusal(request, problem)
            self._write_if_whole()
            return None
        self._under_way.add(request.request)
        if request.verb in self._in_order:
            self._to_write.append(_Job(request, []))
        else:
            workers = self._lookers if request.verb == "stat" else self._readers
            self._hand(workers, [_Job(request, [])])
        return None

    def piece(self, piece: Piece) -> Optional[Reply]:
        """Take a part of what is to be written; the answer where it is none."""
        coming = self._coming
        if coming is None or coming.request.request != piece.request:
            return None  # of one that was refused, or is repeated and under way
        try:
            coming.take(piece)
        except Problem as problem:
            self._coming = None
            return _refusal(coming.request, problem)
        self._write_if_whole()
        return None

    def forget(self) -> None:
        """The session is over: what has not come whole comes again."""
        self._coming = None

    def _write_if_whole(self) -> None:
        coming = self._coming
        if coming is not None and not coming.missing:
            self._coming = None
            self._under_way.add(coming.request.request)
            self._to_write.append(_Job(coming.request, coming.pieces))

    def go(self) -> None:
        """What came together is written together: a thread that wakes for each piece of a file, beside a loop that
        takes the next, costs a slow VM twice what writing does."""
        if self._to_write:
            self._hand(self._writer, self._to_write)
            self._to_write = []

    def _hand(self, workers: _Workers, jobs: list[_Job]) -> None:
        try:
            workers.add(jobs)
        except OSError as failed:
            self._done.extend(_refusal(request, failed) for request, _ in jobs)
            self._tell()

    def read(self, request: Request) -> Iterator[Union[Piece, Reply]]:
        """The answer to `read`, each part of it made when it is asked for; the file stays open until the last.

        A Piece here is a stretch of the file: more than one frame has.
        """
        try:
            yield from self._read(request)
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

    def _work(self, jobs: list[_Job]) -> None:
        for request, pieces in jobs:
            if request.verb == "write":
                act: Callable[[Args], Result] = functools.partial(self._write, pieces=pieces)
            else:
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
            return {"path": path, "kind": "nothing", "digest": self._preferred()}
        return {"path": os.path.realpath(path), **_facts(status), "digest": self._preferred()}

    def _preferred(self) -> bytes:
        self._fastest = self._fastest or fastest()
        return self._fastest.encode()

    def _read(self, request: Request) -> Iterator[Union[Piece, Reply]]:
        args = request.args
        at, end = _number(args, "offset"), _number(args, "end")
        with _Opened(self._path(args), args.get("id")) as file:
            while True:
                at = next_data(file.fd, at, file.status.st_size)
                data = read_data(file.fd, at, min(end - at, _AT_ONCE)) if at < end else b""
                file.check()
                if not data:
                    yield Reply(request.request, True, "", {"at": at})
                    return
                yield Piece(request.request, at, data)
                at += len(data)

    def _digest(self, args: Args) -> Result:
        with _Opened(self._path(args), args.get("id")) as file:
            digest = digest_of(file.fd, _digest_kind(args))
            file.check()
            return {"digest": digest}

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

    def _write(self, args: Args, pieces: list[bytes]) -> Result:
        path, offset = self._path(args), _number(args, "offset")
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
            data = memoryview(b"".join(pieces))
            written = self._written_so_far(path, status)
            if make and not status.st_size:
                written = Written(_digest_kind(args))
            # Cases: what follows; what was written before and is repeated; what fills a hole, or follows what somebody
            # else has written: then `place` reads the file.
            if written is None or (offset < written.at and not written.whole):
                write_all(fd, data, offset)
                return {}
            done = max(0, written.at - offset)
            if done < len(data):
                written.write(fd, data[done:], offset + done)
            if len(self._written) == _WRITTEN:
                del self._written[next(iter(self._written))]
            self._written[path] = (_identity(os.fstat(fd)), written)
        finally:
            os.close(fd)
        return {}

    def _written_so_far(self, path: bytes, status: os.stat_result) -> Optional[Written]:
        """What is known of a file that nobody else has written to since, as far as its times tell; not kept."""
        identity, written = self._written.pop(path, (None, None))
        return written if written and (identity, written.at) == (_identity(status), status.st_size) else None

    def _place(self, args: Args) -> Result:
        """A written file gets its length, mode and time, and its name once its digest is right."""
        part, path = self._path(args, "part"), self._path(args)
        size, digest, kind = _number(args, "size"), _bytes(args, "digest"), _digest_kind(args)
        try:
            fd = os.open(part, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            if _holds(path, digest, kind):
                return {}  # placed already, and the host didn't hear of it
            raise
        try:
            written = self._written_so_far(part, os.fstat(fd))
            os.ftruncate(fd, size)
            if written is not None and written.kind == kind and written.at <= size:
                found = written.digest(size)
            else:
                found = digest_of(fd, kind)
            if found != digest:
                os.unlink(part)
                if part != path and _holds(path, digest, kind):
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
        return {"id": _same_file(os.lstat(path))}

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
            if not os.path.isdir(path) or _same_file(os.lstat(path)) != args.get("id"):
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

    def __init__(self, most: int, work: Callable[[list[_Job]], None]) -> None:
        self._most, self._work = most, work
        self._jobs: queue.SimpleQueue[list[_Job]] = queue.SimpleQueue()
        self._threads = self._idle = 0
        self._lock = threading.Lock()

    def add(self, jobs: list[_Job]) -> None:
        """OSError where there is no thread and none can be had."""
        with self._lock:
            if self._threads < self._most and self._idle <= self._jobs.qsize():
                try:
                    # A daemon thread: a disk that doesn't sync must not hold up the daemon's end.
                    threading.Thread(target=self._run, name="files", daemon=True).start()
                    self._threads += 1
                except RuntimeError as error:
                    if not self._threads:
                        raise OSError(errno.EAGAIN, str(error)) from None
            self._jobs.put(jobs)

    def _run(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            try:
                jobs = self._jobs.get(timeout=_LINGER)
            except queue.Empty:
                jobs = []
            with self._lock:
                self._idle -= 1
                if not jobs and self._jobs.empty():
                    self._threads -= 1
                    return
            if jobs:
                self._work(jobs)


class _Coming:
    """A `write` whose bytes are still to come. Raises Problem for one that can't be."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.pieces: list[bytes] = []
        self._at = _number(request.args, "offset")
        self.missing = _number(request.args, "size")
        if self.missing > MAX_WRITE:
            raise Problem(f"cannot read the request: {self.missing:,} bytes at once")

    def take(self, piece: Piece) -> None:
        if piece.at != self._at or len(piece.data) > self.missing:
            raise Problem("cannot read the request: other bytes come than it says")
        self.pieces.append(piece.data)
        self._at += len(piece.data)
        self.missing -= len(piece.data)


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


def _digest_kind(args: Args) -> str:
    kind = _bytes(args, "kind")
    for known in DIGESTS:
        if kind == known.encode():
            return known
    raise Problem(f"cannot read the request: {show(kind)} is no kind of digest")


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
        "mtime": mtime_of(status),
        "id": _identity(status),
    }


def _identity(status: os.stat_result) -> bytes:
    """What a file is, as far as its inode tells; a change of its contents is another identity."""
    return b"%d:%d:%d:%d" % (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _same_file(status: os.stat_result) -> bytes:
    return b"%d:%d" % (status.st_dev, status.st_ino)


def _holds(path: bytes, digest: bytes, kind: str) -> bool:
    """Whether the file at ``path`` is the one of this digest."""
    try:
        with _Opened(path, None) as file:
            return digest_of(file.fd, kind) == digest
    except (OSError, Problem):
        return False


def _sync_directory(path: bytes) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
