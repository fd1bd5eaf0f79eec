"""What lives here: the state directory: every run's own directory, and the few facts that outlive the daemon.

The only place that renames, syncs and prunes; shims write a run's files, and what they write is read here.
It must not know: processes (but for who holds a lock), the wire, the schedule.

    <state>/lock  spool.json  zero.json  configured  full
    <state>/open/<run id>                         a link to each run that the host has not whole
    <state>/runs/<start time>/<name>/gone         "seen gone after attempt N"
    <state>/runs/<start time>/<name>/<attempt>/   run.json lock started stdout stderr index exit.json closed
                                                  notes and, from a shim in trouble, blocked or failed;
                                                  files.json files/: see keepsakes

`started`, `exit.json` and `closed` get these names when they are durable, see Run.recover().

It is one module, over the usual length: the rules of what is synced before what hold across all of it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import heapq
import json
import os
import shutil
import stat
import struct
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

from vmr_agent.errors import Problem, show
from vmr_agent.guest import keepsakes
from vmr_agent.runs import (
    Ending,
    RunId,
    RunInfo,
    RunResult,
    Started,
    Stream,
    Trigger,
    result_from_json,
    result_to_json,
    run_path,
)

RECORD = struct.Struct("<QQIB3x")  # one read in `index`: offset, wall clock ns, length, stream
_RECORDS_AT_ONCE = 170  # just under one page

KEPT_TAIL = 64 * 1024  # pruned last: the host compares the CRC of its last 64 KiB with ours
_PUNCH_UNIT = 4096
_SMALL_FILES = 5 * 4096  # the blocks of run.json, started, exit.json and two directories, near enough
_DEFAULT_LIMIT = 1 << 30
_SURVEY_STEP = 200  # runs looked at in one call: 10,000 at once would hold a slow VM's daemon for seconds
_PRUNE_STEP = 32


class Lengths(NamedTuple):
    """Bytes of the two streams of a run."""

    stdout: int
    stderr: int

    def of(self, stream: Stream) -> int:
        return self.stdout if stream is Stream.STDOUT else self.stderr


class Capture(NamedTuple):
    """One read of a run's output, or several within 10 ms, as noted in its index."""

    place: int
    """Where in the index it is noted."""
    stream: Stream
    offset: int
    length: int
    wall_ns: int


class TimeZero(NamedTuple):
    """When positive times begin to count. Within the boot it was set in only ``boottime_ns`` counts."""

    boot_id: str
    boottime_ns: int
    wall_ns: int
    source: str
    """``host`` or ``guest``: who set it."""


# -- small files --


def _read_row(path: Path) -> Optional[dict[str, Any]]:
    """A file holding one JSON object; None when it is absent or torn, which means it was never synced."""
    try:
        row = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return row if isinstance(row, dict) else None


def _write_durably(path: Path, row: Mapping[str, Any], *, temporary: Optional[Path] = None) -> None:
    # Cut after writing, not before: exit.json.new has its block since the run's start, for the time when none
    # is to be had.
    temporary = temporary or path.with_name(path.name + ".new")
    data = json.dumps(row).encode() + b"\n"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.write(fd, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(fd, len(data))
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """A file, or the names in a directory."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_note(path: Path) -> str:
    """A word that a shim left, as the target of a link."""
    try:
        return os.readlink(os.fsencode(path)).decode("utf-8", "replace")
    except OSError:
        return ""


def _info_to_row(info: RunInfo) -> dict[str, Any]:
    return {
        "run": info.run.hex(),
        "vmr": os.fsdecode(info.vmr),  # bytes that are not UTF-8 become lone surrogates, which JSON escapes
        "attempt": info.attempt,
        "trigger": info.trigger.value,
        "boot_id": info.boot_id,
        "created_ns": info.created_ns,
        "request": info.request.hex(),
        "script": list(info.script),
        "holds": info.holds,
        "number": info.number,
    }


def _info_from_row(row: Mapping[str, Any]) -> RunInfo:
    device, inode, ctime_ns = row["script"]
    return RunInfo(
        run=bytes.fromhex(row["run"]),
        vmr=os.fsencode(row["vmr"]),
        attempt=int(row["attempt"]),
        trigger=Trigger(row["trigger"]),
        boot_id=str(row["boot_id"]),
        created_ns=int(row["created_ns"]),
        request=bytes.fromhex(row["request"]),
        script=(int(device), int(inode), int(ctime_ns)),
        holds=bool(row["holds"]),
        number=int(row["number"]),
    )


def _make_state_dir(path: Path) -> None:
    """Make the state directory, or make sure that no other user can look into the one there is."""
    try:
        path.mkdir(mode=0o700, parents=True)
        return
    except FileExistsError:
        info = path.stat()
    if not stat.S_ISDIR(info.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    hint = "--state-dir names another directory"
    if info.st_uid not in (0, os.geteuid()):
        raise Problem(f"cannot use {path}: it belongs to user {info.st_uid}", hint=hint)
    if info.st_mode & 0o077:
        # Somebody who wrote /var/lib for /var/lib/vmr-agent must not find it closed to everybody.
        if not (path / "lock").exists() and any(path.iterdir()):
            raise Problem(f"cannot use {path}: it holds other files and is open to other users", hint=hint)
        path.chmod(0o700)


# -- one run --


class Run:
    """One run directory. What is asked is read from disk, and kept once it can't change any more."""

    def __init__(self, path: Path, info: RunInfo) -> None:
        self.path = path
        self.info = info
        self._fds: dict[Stream, int] = {}
        self._cursors: dict[Stream, int] = {}
        self._punched: dict[Stream, int] = {}
        self._started: Optional[Started] = None
        self._exit: Optional[tuple[RunResult, bool]] = None
        self._closed: Optional[tuple[Lengths, str]] = None
        self._settled_usage: Optional[int] = None
        self._kept: Optional[int] = None

    @classmethod
    def load(cls, path: Path) -> Optional[Run]:
        """The run in a directory; None when nothing whole says what it is: then it never started."""
        row = _read_row(path / "run.json")
        if row is None:
            # Only what the shim wrote was synced; it holds the content of run.json.
            row = (_read_row(path / "started") or _read_row(path / "starting") or {}).get("run")
        try:
            return cls(path, _info_from_row(row)) if row is not None else None
        except (KeyError, TypeError, ValueError):
            return None

    def __repr__(self) -> str:
        return f"<Run {show(self.info.vmr)} attempt {self.info.attempt}>"

    def started(self) -> Optional[Started]:
        """The script's process, once it is durable that it may run."""
        if self._started is None:
            row = _read_row(self.path / "started")
            try:
                self._started = Started(**row["process"]) if row is not None else None
            except (KeyError, TypeError):
                pass  # torn
        return self._started

    def result(self) -> Optional[RunResult]:
        """How it ended, once that is durable."""
        self._read_exit()
        return self._exit[0] if self._exit else None

    def closed(self) -> Optional[Lengths]:
        """The final lengths, once no more bytes can come."""
        self._read_closed()
        return self._closed[0] if self._closed else None

    def close_reason(self) -> str:
        """Why it counts as closed although nobody saw the end of its pipes; empty when they ended."""
        self._read_closed()
        return self._closed[1] if self._closed else ""

    def _read_exit(self) -> None:
        if self._exit is None:
            row = _read_row(self.path / "exit.json")
            try:
                self._exit = (result_from_json(row), bool(row.get("closed"))) if row is not None else None
            except (KeyError, TypeError, ValueError):
                pass  # torn

    def _read_closed(self) -> None:
        if self._closed is not None:
            return
        # Three cases: the pipes ended with the process, or the run is lost (exit.json says "closed"); they
        # ended later (`closed`, by the shim); the shim died first (`closed`, by the daemon, with a reason).
        self._read_exit()
        if self._exit is not None and self._exit[1]:
            result = self._exit[0]
            reason = result.text if result.ending is Ending.LOST else ""
            self._closed = (Lengths(result.stdout, result.stderr), reason)
            return
        row = _read_row(self.path / "closed")
        try:
            if row is not None:
                self._closed = (Lengths(int(row["stdout"]), int(row["stderr"])), str(row["reason"]))
        except (KeyError, TypeError, ValueError):
            pass

    # -- the bytes --

    def fd(self, stream: Stream) -> int:
        """A descriptor for reading, kept open for a while. OSError when there is no such file."""
        fd = self._fds.get(stream)
        if fd is None:
            fd = self._fds[stream] = os.open(self.path / stream.filename, os.O_RDONLY | os.O_CLOEXEC)
        _with_fds[self] = None
        _with_fds.move_to_end(self)
        while len(_with_fds) > _MAX_WITH_FDS:
            next(iter(_with_fds)).close_fds()
        return fd

    def close_fds(self) -> None:
        _with_fds.pop(self, None)
        while self._fds:
            os.close(self._fds.popitem()[1])
        self._cursors.clear()

    def lengths(self) -> Lengths:
        """Bytes spooled so far. Pruned bytes count: an offset never changes."""
        return Lengths(self._length(Stream.STDOUT), self._length(Stream.STDERR))

    def _length(self, stream: Stream) -> int:
        try:
            fd = self._fds.get(stream)
            return os.stat(f"{self.path}/{stream.filename}" if fd is None else fd).st_size
        except FileNotFoundError:
            final = self.closed()  # the file was pruned whole, or was never made
            return final.of(stream) if final else 0

    def read(self, stream: Stream, offset: int, size: int) -> bytes:
        """Up to `size` bytes from an offset, fewer at the end. What is :meth:`pruned` reads as zeros."""
        try:
            return os.pread(self.fd(stream), size, offset)
        except FileNotFoundError:
            return b""

    def pruned(self, stream: Stream) -> int:
        """The offset before which the bytes are gone for want of space: to be sent as a gap."""
        try:
            fd = self.fd(stream)
        except FileNotFoundError:
            return self._length(stream)
        try:
            return os.lseek(fd, 0, os.SEEK_DATA)
        except OSError as error:
            # ENXIO: no data at all. Otherwise the file system knows no holes.
            return os.fstat(fd).st_size if error.errno == errno.ENXIO else 0

    def marks(
        self, stream: Stream, offset: int, size: int, *, most: Optional[int] = None
    ) -> list[tuple[int, int]]:
        """(length, wall clock ns) of the reads that brought [offset, offset + size), in order; the first ``most``.

        Stream files are the truth: what the index says beyond the asked range is cut, what it does not cover
        gets one piece with the file's time. Reading on from where the last call ended costs one small read.
        """
        end = offset + size
        marks: list[tuple[int, int]] = []
        try:
            fd = os.open(self.path / "index", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            fd = -1
        try:
            if fd >= 0:
                for start, length, wall_ns in self._records(fd, stream, offset):
                    if start >= end:
                        break
                    if start > offset:
                        marks.append((start - offset, self._file_time(stream)))
                        offset = start
                    piece = min(start + length, end) - offset
                    if piece > 0:
                        marks.append((piece, wall_ns))
                        offset += piece
                    if offset >= end:
                        break
                    if len(marks) == most:
                        return marks
        finally:
            if fd >= 0:
                os.close(fd)
        if offset < end:
            marks.append((end - offset, self._file_time(stream)))
        return marks

    def _records(self, fd: int, stream: Stream, offset: int) -> Iterator[tuple[int, int, int]]:
        """The stream's index records from the one that holds `offset` on, as (offset, length, wall ns).

        The cursor is the place of the last record yielded, not the one behind it: the shim may lengthen the
        last record in place.
        """
        place = self._cursors.get(stream, -1)
        if place >= 0:
            found = os.pread(fd, RECORD.size, place)
            if len(found) < RECORD.size or RECORD.unpack(found)[0] > offset:
                place = -1
        if place < 0:
            place = self._seek(fd, stream, offset)
        while True:
            block = os.pread(fd, RECORD.size * _RECORDS_AT_ONCE, place)
            whole = len(block) - len(block) % RECORD.size
            for at in range(0, whole, RECORD.size):
                start, wall_ns, length, number = RECORD.unpack_from(block, at)
                if number != stream or start + length <= offset:
                    continue
                self._cursors[stream] = place + at
                yield start, length, wall_ns
            if whole < RECORD.size * _RECORDS_AT_ONCE:
                return
            place += whole

    def captured(self, place: int) -> list[Capture]:
        """Some of what was read of both streams, in the order in which it came, from a place in the index on.

        The shim may lengthen the last record in place: who comes back asks for that one again.
        """
        try:
            fd = os.open(self.path / "index", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return []
        try:
            block = os.pread(fd, RECORD.size * _RECORDS_AT_ONCE, place)
        finally:
            os.close(fd)
        found = []
        for at in range(0, len(block) - len(block) % RECORD.size, RECORD.size):
            offset, wall_ns, length, number = RECORD.unpack_from(block, at)
            # A hole, made where the index was pruned or could not be written, reads as length 0.
            stream = Stream.STDERR if number == Stream.STDERR else Stream.STDOUT
            found.append(Capture(place + at, stream, offset, length, wall_ns))
        return found

    @staticmethod
    def _seek(fd: int, stream: Stream, offset: int) -> int:
        """A place in the index at or before the record that holds `offset`, and near it."""
        low, high = 0, os.fstat(fd).st_size // RECORD.size
        while high - low > _RECORDS_AT_ONCE:
            middle = (low + high) // 2
            block = os.pread(fd, RECORD.size * _RECORDS_AT_ONCE, middle * RECORD.size)
            found = RECORD.iter_unpack(block[: len(block) - len(block) % RECORD.size])
            start = next((start for start, _, _, number in found if number == stream), None)
            if start is None:
                break  # a stretch of the other stream: from here on it is read through
            if start > offset:
                high = middle
            else:
                low = middle
        return low * RECORD.size

    def _file_time(self, stream: Stream) -> int:
        try:
            return os.fstat(self.fd(stream)).st_mtime_ns
        except OSError:
            return self.info.created_ns

    # -- who has it --

    def holder(self) -> Optional[int]:
        """The pid of the shim that holds the run.

        F_GETLK asks and takes nothing, so asking can't make a shim that is just starting believe that there
        is another one; and the kernel's answer can't be stale, as a pid in a file can.
        """
        try:
            fd = os.open(self.path / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            layout = "hhqqi4x"  # struct flock: type, whence, start, length, pid
            question = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, pid = struct.unpack(layout, fcntl.fcntl(fd, fcntl.F_GETLK, question))
        finally:
            os.close(fd)
        return None if kind == fcntl.F_UNLCK else int(pid)

    def locked(self) -> bool:
        return self.holder() is not None

    def blocked(self) -> str:
        """Why the run stands still, or can't begin, for want of space; empty when it doesn't."""
        return _read_note(self.path / "blocked")

    def failure(self) -> str:
        """What a shim that failed by itself left as its last word."""
        return _read_note(self.path / "failed")

    # -- what the daemon writes --

    def recover(self) -> None:
        """Name what a shim wrote before it, or the power, went; for when nobody has the lock.

        Its renames are not synced, so a power cut may undo them; a torn record is none, since a shim goes on
        only after the sync. A whole one may lack that sync, or the sync have failed: it is written once more.
        """
        for temporary, name in (("starting", "started"), ("exit.json.new", "exit.json")):
            path = self.path / temporary
            row = None if (self.path / name).exists() else _read_row(path)
            if row is None:
                continue
            if name == "started":
                names = self.path.parent
                runs = names.parent.parent
                for directory in (names, names.parent, runs, runs.parent / "open"):
                    _sync(directory)
            _write_durably(self.path / name, row, temporary=path)

    def write_lost(self, reason: str, *, stdout: int, stderr: int, asks_reboot: bool = False) -> RunResult:
        """End a run that nobody saw ending; its end is the last sign of life that its files give."""
        started = self.started()
        assert started is not None, "a run that was not started is not lost: it starts"
        seen = [started.wall_ns]
        for stream in Stream:
            with contextlib.suppress(OSError):
                seen.append(os.fstat(self.fd(stream)).st_mtime_ns)
        result = RunResult(
            ending=Ending.LOST,
            value=0,
            text=reason,
            started_ns=started.wall_ns,
            ended_ns=max(seen),
            started_boottime_ns=started.boottime_ns,
            ended_boottime_ns=started.boottime_ns + max(seen) - started.wall_ns,
            boot_id=started.boot_id,
            stdout=stdout,
            stderr=stderr,
            asks_reboot=asks_reboot,
        )
        _write_durably(self.path / "exit.json", {**result_to_json(result), "closed": True})
        return result

    def write_closed(self, reason: str) -> None:
        stdout, stderr = self.lengths()
        _write_durably(self.path / "closed", {"stdout": stdout, "stderr": stderr, "reason": reason})

    def remember(self, key: str) -> None:
        """Keep a small note with the run, such as the id of a kill request that was carried out."""
        line = json.dumps(key).encode() + b"\n"
        fd = os.open(self.path / "notes", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, line)
            os.fsync(fd)
        finally:
            os.close(fd)
        _sync(self.path)

    def remembered(self, key: str) -> bool:
        try:
            return json.dumps(key).encode() in (self.path / "notes").read_bytes().split(b"\n")
        except FileNotFoundError:
            return False

    # -- space --

    def usage(self) -> int:
        """Bytes of disk it takes; counted once only when no more can come."""
        if self._settled_usage is not None:
            return self._settled_usage
        total = _SMALL_FILES + self.kept_bytes()
        for name in ("stdout", "stderr", "index"):
            with contextlib.suppress(OSError):
                total += (self.path / name).stat().st_blocks * 512
        if self.closed() is not None:
            self._settled_usage = total
        return total

    def kept_bytes(self) -> int:
        """What the VMR's files that were kept with this attempt take; those that others have too, in part."""
        if self._kept is None:
            self._kept = 0
            with contextlib.suppress(OSError), os.scandir(self.path / "files") as copies:
                infos = [copy.stat() for copy in copies]
                self._kept = sum(info.st_blocks * 512 // max(1, info.st_nlink) for info in infos)
        return self._kept

    def prune(self, acked: Lengths, *, whole: bool, tail: int = KEPT_TAIL) -> None:
        """Give back the blocks of acked bytes, all but each stream's tail; offsets stay what they are.

        `whole`: the host has all of it, so the index may go too, and where the file system can't punch holes
        the files themselves. The VMR's own files, if kept, go as well.
        """
        self._settled_usage = None
        if whole:
            shutil.rmtree(self.path / "files", ignore_errors=True)
            self._kept = None
        try:
            for stream in Stream:
                with contextlib.suppress(FileNotFoundError):
                    upto = min(acked.of(stream), os.fstat(self.fd(stream)).st_size - tail)
                    if upto - self._punched.get(stream, 0) >= _PUNCH_UNIT:
                        _punch(self.path / stream.filename, upto)
                        self._punched[stream] = upto
            if whole:
                with contextlib.suppress(FileNotFoundError):
                    _punch(self.path / "index", (self.path / "index").stat().st_size - _PUNCH_UNIT)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            if whole:
                self.close_fds()
                for name in ("stdout", "stderr", "index"):
                    with contextlib.suppress(FileNotFoundError):
                        (self.path / name).unlink()


def _punch(path: Path, upto: int) -> None:
    upto -= upto % _PUNCH_UNIT
    if upto <= 0:
        return
    import ctypes  # only a spool over its limit pays for it

    libc = ctypes.CDLL(None, use_errno=True)
    fallocate = getattr(libc, "fallocate64", None) or libc.fallocate  # musl has one name, with 64 bits
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    keep_size, punch_hole = 1, 2
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        if fallocate(fd, keep_size | punch_hole, 0, upto) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), os.fspath(path))
    finally:
        os.close(fd)


# Of the runs that have descriptors, the longest unused first. With a thousand runs delivered to no host yet, each
# keeping two, a daemon would soon have none left.
_with_fds: OrderedDict[Run, None] = OrderedDict()
_MAX_WITH_FDS = 64


# -- all runs --


class History:
    """The runs in a state directory, for reading: what the verbs use beside a running daemon."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir
        self._known: weakref.WeakValueDictionary[str, Run] = weakref.WeakValueDictionary()

    def _load(self, path: Path) -> Optional[Run]:
        """The one Run object of a directory, so that its descriptors and its cursors are shared."""
        key = os.fspath(path)
        run = self._known.get(key)
        if run is None:
            run = Run.load(path)
            if run is not None:
                self._known[key] = run
        return run

    def _attempts(self, vmr: bytes) -> list[int]:
        try:
            names = os.listdir((self.path / "runs" / run_path(vmr, 1)).parent)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(name) for name in names if name.isdecimal())

    def run(self, vmr: bytes, attempt: int) -> Optional[Run]:
        return self._load(self.path / "runs" / run_path(vmr, attempt))

    def runs_of(self, vmr: bytes) -> list[Run]:
        """Every run of a VMR, oldest first."""
        runs = (self.run(vmr, attempt) for attempt in self._attempts(vmr))
        return [run for run in runs if run is not None]

    def names(self) -> list[bytes]:
        """The VMRs that have runs."""
        found = set()
        for first in self.path.glob("runs/*/*/*/run.json"):
            row = _read_row(first)
            if row is not None and first.parent.name.isdecimal():
                found.add(os.fsencode(str(row.get("vmr", ""))))
        return sorted(found)

    def staged_as(self, vmr: bytes) -> Optional[Run]:
        """The first attempt of a VMR since it was staged, the last time that it was seen to be."""
        after = self._gone_after(vmr)
        attempts = (self.run(vmr, attempt) for attempt in self._attempts(vmr) if attempt > after)
        return next((run for run in attempts if run is not None), None)

    def edited(self, vmr: bytes, directory: bytes) -> list[bytes]:
        """The files in a VMR's directory that were staged and are not what they were; none where nobody knows."""
        run = self.staged_as(vmr)
        staged = keepsakes.kept(run.path) if run is not None else None
        if staged is not None:
            with contextlib.suppress(OSError):
                return keepsakes.edited(staged, keepsakes.now(directory))
        return []

    def _gone_after(self, vmr: bytes) -> int:
        row = _read_row((self.path / "runs" / run_path(vmr, 1)).parent / "gone")
        return int(row.get("after_attempt", 0)) if row is not None else 0

    def latest(self, vmr: bytes) -> Optional[Run]:
        for attempt in reversed(self._attempts(vmr)):
            run = self.run(vmr, attempt)
            if run is not None:
                return run
        return None


class Spool(History):
    """The state directory, held by one daemon."""

    def __init__(self, state_dir: Path, *, limit: Optional[int] = None) -> None:
        super().__init__(state_dir)
        try:
            _make_state_dir(state_dir)
            self._lock = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Problem(f"cannot use {state_dir}: another vmr-agent has it") from None
            (state_dir / "open").mkdir(mode=0o700, exist_ok=True)
            (state_dir / "runs").mkdir(mode=0o700, exist_ok=True)
            # A shim syncs what is below these two. Whoever made them may have been killed before this.
            for directory in (state_dir, state_dir.parent):
                _sync(directory)
            fs = os.statvfs(state_dir)
            self._open = self._repair_open()
        except OSError as error:
            raise Problem(
                f"cannot use {state_dir}: {error.strerror}", hint="--state-dir names another directory"
            ) from error
        self.limit = limit or min(_DEFAULT_LIMIT, fs.f_blocks * fs.f_frsize // 10)
        self._id = b""
        self._zero: Optional[TimeZero] = None
        self._latest: dict[bytes, Optional[Run]] = {}
        self._gone: dict[bytes, int] = {}
        self._used = 0  # at the last enforce()
        self._full = (state_dir / "full").exists()
        # The survey counts what was whole before this daemon; release() counts what was open or came later.
        self._settled = 0
        # (whether only tails are left to prune, when it was made, where it is), the next to prune first.
        self._prunable: list[tuple[bool, int, str]] = []
        self._not_surveyed = {os.fspath(run.path) for run in self._open.values()}
        self._survey: Optional[Iterator[Path]] = self._every_directory()

    def close(self) -> None:
        for run in self._open.values():
            run.close_fds()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # -- identity and the facts that outlive the daemon --

    @property
    def id(self) -> bytes:
        """16 random bytes that name this spool; made, durable, by whoever asks first."""
        if not self._id:
            row = _read_row(self.path / "spool.json")
            try:
                self._id = bytes.fromhex(row["id"]) if row is not None else b""
            except (KeyError, TypeError, ValueError):
                pass
        if not self._id:
            self._new_id()
        return self._id

    def _new_id(self) -> None:
        fresh = os.urandom(16)
        _write_durably(self.path / "spool.json", {"id": fresh.hex()})
        self._id = fresh

    def new_life(self) -> None:
        """Take a new id, and let every run go to the host once more.

        Links first: a crash in between sends runs again that the host has, which it says; the other way round
        a part of them would never be sent.
        """
        for path in self._every_directory():
            run = self._load(path)
            if run is not None and run.info.run not in self._open:
                self._link(run.info)
                self._open[run.info.run] = run
        _sync(self.path / "open")
        self._new_id()
        self._settled, self._prunable, self._survey = 0, [], None

    def zero(self) -> Optional[TimeZero]:
        if self._zero is None:
            row = _read_row(self.path / "zero.json")
            try:
                self._zero = TimeZero(**row) if row is not None else None
            except TypeError:
                pass
        return self._zero

    def set_zero(self, zero: TimeZero) -> TimeZero:
        """Set time zero, durable; once: the one that stands is returned."""
        standing = self.zero()
        if standing is None:
            _write_durably(self.path / "zero.json", zero._asdict())
            standing = self._zero = zero
        return standing

    def configured(self) -> bool:
        return (self.path / "configured").exists()

    def set_configured(self) -> None:
        if not self.configured():
            _write_durably(self.path / "configured", {})

    def forget(self) -> None:
        """Forget history and id, as before the first start. The caller sees to it that nothing runs."""
        for name in ("spool.json", "zero.json", "configured", "full"):
            with contextlib.suppress(FileNotFoundError):
                (self.path / name).unlink()
        for name in ("open", "runs"):
            shutil.rmtree(self.path / name)
            (self.path / name).mkdir(mode=0o700)
        _sync(self.path)
        for run in self._open.values():
            run.close_fds()
        self._id, self._zero, self._full = b"", None, False
        self._known.clear()
        self._latest.clear()
        self._gone.clear()
        self._open.clear()
        self._settled, self._prunable, self._survey = 0, [], None

    # -- runs --

    def latest(self, vmr: bytes) -> Optional[Run]:
        if vmr not in self._latest:
            run = super().latest(vmr)
            if run is not None and run.closed() is None and run.info.run not in self._open:
                # Its link was lost with the power: only what is closed may be without.
                self._link(run.info)
                self._open[run.info.run] = run
            self._latest[vmr] = run
        return self._latest[vmr]

    def open_runs(self) -> list[Run]:
        """The runs that the host has not whole, oldest first."""
        return sorted(self._open.values(), key=lambda run: (run.info.created_ns, run.info.attempt))

    def create(
        self,
        vmr: bytes,
        trigger: Trigger,
        *,
        boot_id: str,
        now_ns: int,
        request: bytes = b"",
        script: tuple[int, int, int] = (0, 0, 0),
        holds: bool = False,
        number: int = 0,
    ) -> Run:
        """Make the next run of a VMR: link, directory, run.json, in this order.

        Nothing is synced: the shim syncs all of it at once before the script may run, and what a power cut
        leaves without a whole run.json never started. Problem, and nothing left, where it can't be made.
        """
        attempts = self._attempts(vmr) if vmr not in self._latest else []
        latest = self.latest(vmr)
        attempt = max([latest.info.attempt if latest else 0, *attempts]) + 1
        info = RunInfo(os.urandom(16), vmr, attempt, trigger, boot_id, now_ns, request, script, holds, number)
        path = self.path / "runs" / run_path(vmr, attempt)
        try:
            self._link(info)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.mkdir(mode=0o700)
            fd = os.open(path / "run.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                row = json.dumps(_info_to_row(info)).encode() + b"\n"
                if os.write(fd, row) != len(row):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(fd)
        except OSError as error:
            shutil.rmtree(path, ignore_errors=True)
            self._unlink(info.run)
            raise Problem(f"cannot begin a run of {show(vmr)}: {error.strerror}") from error
        run = Run(path, info)
        self._known[os.fspath(path)] = run
        self._open[info.run] = run
        self._latest[vmr] = run
        if self._survey is not None:
            self._not_surveyed.add(os.fspath(path))
        return run

    def keep_files(self, run: Run, directory: bytes, *, each: int) -> None:
        """Keep the files of a run's VMR, those up to ``each`` bytes with their content. OSError where it can't.

        A quarter of the limit, and of what is free, is not for this: what nobody needs never blocks a script.
        """
        fs = os.statvfs(self.path)
        room = min(self.limit // 4 * 3 - self._used, fs.f_bavail * fs.f_frsize // 4 * 3)
        number = run.info.attempt
        previous = run.path.with_name(str(number - 1)) if number > 1 else None
        trusted = frozenset({0, os.geteuid()})
        keepsakes.keep(run.path, directory, previous=previous, each=each, room=room, trusted=trusted)
        self._used += run.kept_bytes()

    def release(self, run: Run) -> None:
        """The host has the run whole; nothing about it is asked at the next start.

        Not synced: should the link come back after a power cut, the host is asked once more and says so.
        """
        run.close_fds()
        self._unlink(run.info.run)
        if self._open.pop(run.info.run, None) is not None:
            self._count_settled(run)

    def mark_gone(self, vmr: bytes, after_attempt: int) -> None:
        """Record that the VMR was seen gone: one that appears under its name later is a new one."""
        if after_attempt and self._gone_after(vmr) != after_attempt:
            path = (self.path / "runs" / run_path(vmr, 1)).parent / "gone"
            _write_durably(path, {"after_attempt": after_attempt})
            self._gone[vmr] = after_attempt

    def mark_back(self, vmr: bytes) -> None:
        """Record that the same VMR is there again: what is edited in it from now on makes no new one."""
        if self._gone_after(vmr):
            path = (self.path / "runs" / run_path(vmr, 1)).parent / "gone"
            _write_durably(path, {"after_attempt": 0})
            self._gone[vmr] = 0

    def gone(self, vmr: bytes) -> bool:
        """Whether it was seen gone since its latest attempt."""
        latest = self.latest(vmr)
        return latest is not None and self._gone_after(vmr) == latest.info.attempt

    def _gone_after(self, vmr: bytes) -> int:
        if vmr not in self._gone:
            self._gone[vmr] = super()._gone_after(vmr)
        return self._gone[vmr]

    def _link(self, info: RunInfo) -> None:
        target = f"../runs/{run_path(info.vmr, info.attempt)}"
        with contextlib.suppress(FileExistsError):
            (self.path / "open" / info.run.hex()).symlink_to(target)

    def _unlink(self, run: RunId) -> None:
        with contextlib.suppress(OSError):  # where it can't be removed it is harmless, as after a power cut
            (self.path / "open" / run.hex()).unlink()

    def _repair_open(self) -> dict[RunId, Run]:
        found: dict[RunId, Run] = {}
        for link in (self.path / "open").iterdir():
            # Four cases: a whole run; a directory whose run.json never came to the disk, which never started;
            # no directory at all; somebody else's run, because the number was given again.
            path = Path(os.path.normpath(self.path / "open" / os.readlink(link)))
            run = self._load(path)
            if run is not None and run.info.run.hex() == link.name:
                found[run.info.run] = run
                continue
            if run is None and path.is_dir() and not (path / "started").exists():
                shutil.rmtree(path)
            link.unlink()
        return found

    def _every_directory(self) -> Iterator[Path]:
        for start_time in os.scandir(self.path / "runs"):
            for name in os.scandir(start_time.path):
                with os.scandir(name.path) as attempts:
                    yield from (Path(attempt.path) for attempt in attempts if attempt.name.isdecimal())

    # -- space --

    def usage(self) -> int:
        """Bytes of disk that runs take; what was there before this daemon is counted over the first calls."""
        return self._settled + sum(run.usage() for run in self._open.values())

    def enforce(self, acked: Mapping[RunId, Lengths]) -> bool:
        """Keep the spool under its limit; whether it is full all the same, so that shims stop reading.

        `acked` are the bytes the host holds durably of the runs in open/. To be called now and then; under
        the limit it costs three stat calls a live run.
        """
        self._continue_survey()
        used = self.usage()
        bound = self.limit // 20 * 19 if self._full else self.limit
        if used > bound:
            # Down to nine tenths, so that it is not done again for each megabyte.
            self._prune(acked, used - self.limit // 10 * 9)
            used = self.usage()
        self._used = used
        full = used > bound
        if full and not self._full:
            with contextlib.suppress(OSError):
                (self.path / "full").touch(0o600)
        elif self._full and not full:
            (self.path / "full").unlink(missing_ok=True)
        self._full = full
        return full

    def _continue_survey(self) -> None:
        if self._survey is None:
            return
        for _ in range(_SURVEY_STEP):
            path = next(self._survey, None)
            if path is None:
                self._survey = None
                self._not_surveyed.clear()
                return
            if os.fspath(path) not in self._not_surveyed:
                run = self._load(path)
                if run is not None:
                    self._count_settled(run)

    def _count_settled(self, run: Run) -> None:
        self._settled += run.usage()
        longest = max(run.lengths())
        if longest >= _PUNCH_UNIT or run.kept_bytes():
            only_tails = longest <= KEPT_TAIL and not run.kept_bytes()
            heapq.heappush(self._prunable, (only_tails, run.info.created_ns, os.fspath(run.path)))
        run.close_fds()

    def _prune(self, acked: Mapping[RunId, Lengths], excess: int) -> None:
        excess = self._prune_settled(excess, tails=False)
        for run in self.open_runs():
            if excess <= 0:
                break
            if run.info.run in acked:
                before = run.usage()
                with contextlib.suppress(OSError):
                    run.prune(acked[run.info.run], whole=False, tail=KEPT_TAIL)
                excess -= before - run.usage()
        # Before scripts wait for ever. After time travel these are gaps.
        self._prune_settled(excess, tails=True)

    def _prune_settled(self, excess: int, *, tails: bool) -> int:
        """Prune what the host has whole, oldest first; returns how much is still too much."""
        for _ in range(_PRUNE_STEP):
            if excess <= 0 or not self._prunable or self._prunable[0][0] > tails:
                break
            only_tails, created_ns, path = heapq.heappop(self._prunable)
            run = self._load(Path(path))
            final = run.closed() if run is not None else None
            if run is not None and final is not None:
                before = run.usage()
                with contextlib.suppress(OSError):
                    run.prune(final, whole=True, tail=0 if only_tails else KEPT_TAIL)
                if not only_tails and max(final) >= _PUNCH_UNIT:
                    heapq.heappush(self._prunable, (True, created_ns, path))
                freed = before - run.usage()
                self._settled -= freed
                excess -= freed
                run.close_fds()
        return excess
