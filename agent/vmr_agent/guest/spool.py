"""What lives here: the state directory: every run's own directory, and the few facts that outlive the daemon.

The only place that renames, syncs and prunes; shims write a run's files, and what they write is read here.
It must not know: processes (but for who holds a lock), the wire, the schedule.

    <state>/lock  spool.json  zero.json  configured
    <state>/full  drop                            tell shims that the limit is reached; that they are to drop then
    <state>/open/<run id>                         a link to each run that the host has not whole
    <state>/runs/<start time>/<name>/gone         "seen gone after attempt N"
    <state>/runs/<start time>/<name>/<attempt>/   run.json lock started stdout stderr index exit.json closed
                                                  notes, pruned, gaps (see there) and, from a shim in
                                                  trouble, blocked or failed; files.json files/: see keepsakes

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
from typing import Any, NamedTuple, Optional, Union

from vmr_agent.errors import Problem, show
from vmr_agent.guest import keepsakes
from vmr_agent.guest.gaps import Gap, Gaps
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
    started_from_json,
    whole,
    word,
)
from vmr_agent.schedule import parse_vmr

# One read in `index`: offset, wall clock ns, length, stream. Stream 0: what is synced of stdout, of stderr; length 0.
RECORD = struct.Struct("<QQIB3x")
_RECORDS_AT_ONCE = 170  # just under one page

STOPPING, LET_GO = "stopping", "let go"  # notes: all of a run's processes stand still between the two
KEPT_TAIL = 64 * 1024  # pruned last: the host compares the CRC of its last 64 KiB with ours
_PUNCH_UNIT = 4096
_SMALL_FILES = 5 * 4096  # the blocks of run.json, started, exit.json and two directories, near enough
_DEFAULT_LIMIT = 1 << 30
_RESERVE = 32 * 1024 * 1024  # the shims': with less that is free they wait, or drop
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


def _read_row(path: Union[Path, str]) -> Optional[dict[str, Any]]:
    """A file holding one JSON object; None when it is absent or torn, which means it was never synced."""
    try:
        fd = os.open(
            path, os.O_RDONLY | os.O_CLOEXEC
        )  # mostly absent: io.open() takes three times as long to say so
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        row = json.loads(b"".join(iter(lambda: os.read(fd, 65_536), b"")))
    except (ValueError, RecursionError):
        return None
    finally:
        os.close(fd)
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


def _write_once(path: Path, row: Mapping[str, Any]) -> None:
    """The same, for what is acted on as soon as it is there: where it could not be made durable it is not there."""
    try:
        _write_durably(path, row)
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def _sync(path: Path) -> None:
    """A file, or the names in a directory."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_note(path: str) -> str:
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
        "scheduled": info.scheduled,
        "reboots": info.reboots,
    }


def _info_from_row(row: Mapping[str, Any]) -> RunInfo:
    device, inode, ctime_ns = row["script"]
    if not all(type(each) is int for each in (device, inode, ctime_ns)):
        raise ValueError("no signature of a script")
    run, vmr, request = bytes.fromhex(row["run"]), os.fsencode(row["vmr"]), bytes.fromhex(row["request"])
    if len(run) != 16 or parse_vmr(vmr) != vmr or len(request) > 16:
        raise ValueError("no run")
    return RunInfo(
        run=run,
        vmr=vmr,
        attempt=whole(row["attempt"]),
        trigger=Trigger(row["trigger"]),
        boot_id=word(row["boot_id"], most=256),
        created_ns=whole(row["created_ns"]),
        request=request,
        script=(device, inode, ctime_ns),
        holds=bool(row["holds"]),
        number=whole(row["number"]),
        scheduled=whole(row["scheduled"]) if row.get("scheduled") is not None else None,
        reboots=whole(row.get("reboots", 0)),
    )


def _zero_from_row(row: Mapping[str, Any]) -> TimeZero:
    boottime_ns, wall_ns = row["boottime_ns"], row["wall_ns"]  # it may lie before this boot
    if not all(type(each) is int and abs(each) < 2**63 for each in (boottime_ns, wall_ns)):
        raise ValueError("no time")
    return TimeZero(word(row["boot_id"], most=256), boottime_ns, wall_ns, word(row["source"]))


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
        self._in = (
            f"{path}/"  # joined by hand: these names are looked up at each turn, and Path takes its time
        )
        self._fds: dict[str, int] = {}
        self._cursors: dict[Stream, int] = {}
        self._covered: dict[Stream, tuple[int, int, int]] = {}
        """The index's last used record: from, to, wall ns. A read fills several frames."""
        self._punched = Lengths(0, 0)
        self._noted = Lengths(0, 0)
        """What is pruned, as is durably noted."""
        self._holes = True
        """Whether this file system can make them, as far as we know."""
        self.sole = False
        """Whether nobody but us prunes it, so that what is noted need be read but once."""
        self._gone: Optional[Lengths] = None
        self._gaps: Optional[Gaps] = None
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
            row = _read_row(self._in + "started")
            try:
                self._started = started_from_json(row["process"]) if row is not None else None
            except (KeyError, TypeError, ValueError):
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

    def ends(self) -> tuple[Optional[RunResult], Optional[Lengths]]:
        """:meth:`result` and :meth:`closed`, by one look at a run that is not over."""
        self._read_closed()
        return self._exit[0] if self._exit else None, self._closed[0] if self._closed else None

    def close_reason(self) -> str:
        """Why it counts as closed although nobody saw the end of its pipes; empty when they ended."""
        self._read_closed()
        return self._closed[1] if self._closed else ""

    def _read_exit(self) -> None:
        if self._exit is None:
            row = _read_row(self._in + "exit.json")
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
        if self._exit is None:
            return  # `closed` comes after it
        if self._exit[1]:
            result = self._exit[0]
            reason = result.text if result.ending is Ending.LOST else ""
            self._closed = (Lengths(result.stdout, result.stderr), reason)
            return
        row = _read_row(self._in + "closed")
        try:
            if row is not None:
                self._closed = (Lengths(whole(row["stdout"]), whole(row["stderr"])), word(row["reason"]))
        except (KeyError, TypeError, ValueError):
            pass

    # -- the bytes --

    def fd(self, stream: Stream) -> int:
        """A descriptor for pread() alone, for its offset is nobody's; kept open for a while. OSError when there is no
        such file."""
        return self._open(stream.filename)

    def _open(self, name: str) -> int:
        fd = self._fds.get(name)
        if fd is not None and next(reversed(_with_fds)) is self:
            return fd
        if fd is None:
            fd = self._fds[name] = os.open(self._in + name, os.O_RDONLY | os.O_CLOEXEC)
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
        self._covered.clear()

    def lengths(self) -> Lengths:
        """Bytes spooled so far. Pruned bytes count: an offset never changes."""
        return Lengths(self._length(Stream.STDOUT), self._length(Stream.STDERR))

    def _length(self, stream: Stream) -> int:
        try:
            fd = self._fds.get(stream.filename)
            if fd is not None:
                return os.lseek(fd, 0, os.SEEK_END)  # as fstat(), at a third of the price
            return os.stat(self._in + stream.filename).st_size
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
        if self._gone is not None and stream.filename in self._fds:
            return self._gone.of(stream)
        try:
            self.fd(stream)
        except FileNotFoundError:
            return self._length(stream)
        return self._pruned().of(stream)

    def _pruned(self) -> Lengths:
        # A fact of its own. The file's holes would not do: some file systems make one of zeros that were printed,
        # and dropped bytes leave one too.
        if self._gone is not None:
            return self._gone
        try:
            noted = [int(word) for word in _read_note(self._in + "pruned").split()]
            stdout, stderr = (min(max(0, each), there) for each, there in zip(noted, self.lengths()))
            found = Lengths(stdout, stderr)
        except ValueError:
            found = Lengths(0, 0)
        if self.sole:
            self._gone = found
        return found

    def has_gaps(self) -> bool:
        """Whether any of the bytes spooled so far may have been dropped."""
        return self._noted_gaps() is not None

    def gap(self, stream: Stream, offset: int, end: int) -> Optional[Gap]:
        """The first stretch of dropped bytes in [offset, end); ``end`` is a length that was seen before this call."""
        gaps = self._noted_gaps()
        gap = gaps.first(stream, offset, end) if gaps is not None else None
        if gap is None or (gap.growing and self.closed() is None):
            return gap
        # One that grew when its shim was killed, or the power failed, ends with the file.
        return gap._replace(end=min(gap.end, self._length(stream)))

    def gaps(self, stream: Stream) -> list[Gap]:
        """Each stretch of dropped bytes; the end of one that grows is where it is now."""
        gaps, length = self._noted_gaps(), self._length(stream)
        found = gaps.of(stream) if gaps is not None else []
        return [gap._replace(end=min(gap.end, length)) for gap in found if gap.begin < length]

    def dropped(self) -> int:
        """Bytes dropped so far, of both streams."""
        return sum(gap.end - gap.begin for stream in Stream for gap in self.gaps(stream))

    def dropping(self) -> str:
        """Why output is being dropped; empty when none is."""
        gaps = self._noted_gaps()
        return gaps.growing() if gaps is not None and self.closed() is None else ""

    def _noted_gaps(self) -> Optional[Gaps]:
        # Asked for each line, so by what raises no exception.
        if self._gaps is None and os.access(self._in + "gaps", os.F_OK):
            self._gaps = Gaps(self.path / "gaps")
        return self._gaps

    def marks(
        self, stream: Stream, offset: int, size: int, *, most: Optional[int] = None
    ) -> list[tuple[int, int]]:
        """(length, wall clock ns) of the reads that brought [offset, offset + size), in order; the first ``most``.

        Stream files are the truth: what the index says beyond the asked range is cut, what it does not cover
        gets one piece with the file's time. Reading on from where the last call ended costs one small read.
        """
        end = offset + size
        begun, over, wall_ns = self._covered.get(stream, (0, 0, 0))
        if begun <= offset and end <= over:
            return [(size, wall_ns)]
        marks: list[tuple[int, int]] = []
        try:
            fd = self._open("index")
        except FileNotFoundError:
            fd = -1
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
        if offset < end:
            marks.append((end - offset, self._file_time(stream)))
        return marks

    def _records(self, fd: int, stream: Stream, offset: int) -> Iterator[tuple[int, int, int]]:
        """The stream's index records from the one that holds `offset` on, as (offset, length, wall ns).

        The cursor is the place of the last record yielded, not the one behind it: the shim may lengthen the
        last record in place.
        """
        place = self._cursors.get(stream, -1)
        block = os.pread(fd, RECORD.size * _RECORDS_AT_ONCE, place) if place >= 0 else b""
        if len(block) < RECORD.size or RECORD.unpack_from(block)[0] > offset:
            place = self._seek(fd, stream, offset)
            block = os.pread(fd, RECORD.size * _RECORDS_AT_ONCE, place)
        while True:
            whole = len(block) - len(block) % RECORD.size
            for at in range(0, whole, RECORD.size):
                start, wall_ns, length, number = RECORD.unpack_from(block, at)
                if number != stream or start + length <= offset:
                    continue
                self._cursors[stream] = place + at
                self._covered[stream] = (start, start + length, wall_ns)
                yield start, length, wall_ns
            if whole < RECORD.size * _RECORDS_AT_ONCE:
                return
            place += whole
            block = os.pread(fd, RECORD.size * _RECORDS_AT_ONCE, place)

    def captured(self, place: int) -> list[Capture]:
        """Some of what was read of both streams, in the order in which it came, from a place in the index on.

        The shim may lengthen the last record in place: who comes back asks for that one again.
        """
        try:
            fd = os.open(self._in + "index", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return []
        try:
            block = os.pread(fd, RECORD.size * _RECORDS_AT_ONCE, place)
            if block and not any(block):  # pruned, perhaps by the gigabyte
                with contextlib.suppress(OSError):
                    place = os.lseek(fd, place, os.SEEK_DATA)
                    place -= place % RECORD.size
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
            if start is None and not any(block):
                start = -1  # pruned
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

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """Its shim lets the script go when this is over, or whoever is in it has died. OSError before it begins."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def holder(self) -> Optional[int]:
        """The pid of the shim that holds the run.

        F_GETLK asks and takes nothing, so asking can't make a shim that is just starting believe that there
        is another one; and the kernel's answer can't be stale, as a pid in a file can.
        """
        try:
            fd = os.open(self._in + "lock", os.O_RDONLY | os.O_CLOEXEC)
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
        note = _read_note(self._in + "blocked")
        if note:
            return note
        # Where not even a note can be left.
        with contextlib.suppress(OSError):
            fs = os.statvfs(self._in)
            if fs.f_flag & os.ST_RDONLY:
                return "the spool's file system is read-only"
            if fs.f_files and not fs.f_favail and self.started() is None:
                return "cannot begin: the spool's file system has no inode left"
        return ""

    def failure(self) -> str:
        """What a shim that failed by itself left as its last word."""
        return _read_note(self._in + "failed")

    # -- what the daemon writes --

    def recover(self) -> None:
        """Name what a shim wrote before it, or the power, went; for when nobody has the lock.

        Its renames are not synced, so a power cut may undo them; a torn record is none, since a shim goes on
        only after the sync. A whole one may lack that sync, or the sync have failed: it is written once more.
        """
        for temporary, name in (
            ("starting", "started"),
            ("exit.json.new", "exit.json"),
            ("closed.new", "closed"),
        ):
            path = self.path / temporary
            row = _read_row(path)
            # In this order: the shim that wrote it had the lock, and may have begun after somebody saw it free.
            if row is None or self.locked() or (self.path / name).exists():
                continue
            if name == "started":
                names = self.path.parent
                runs = names.parent.parent
                for directory in (names, names.parent, runs, runs.parent / "open"):
                    _sync(directory)
            _write_durably(self.path / name, row, temporary=path)

    def cut_unsynced(self, acked: Lengths) -> None:
        """After a power cut, take off what nobody printed; ``acked``: what the host has, as far as that is known.

        A file that is lengthened within a block has its new size at once (ext4), and the sync of any other file can
        make that durable before the bytes: it ends in NULs then. What was synced or acknowledged, and what an exit
        record counts, is beyond doubt; behind that NULs at the end go. Raises OSError.
        """
        result, synced = self.result(), self._synced()
        for stream in Stream:
            if any(gap.growing for gap in self.gaps(stream)):
                continue  # they are the count of what was dropped
            counted = 0 if result is None else result.stdout if stream is Stream.STDOUT else result.stderr
            sure = max(synced.of(stream), acked.of(stream), counted)
            try:
                fd = os.open(self.path / stream.filename, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                size = end = os.fstat(fd).st_size
                while end > sure:
                    begin = max(sure, end - 65_536)
                    left = len(os.pread(fd, end - begin, begin).rstrip(b"\0"))
                    end = begin + left
                    if left:
                        break
                if end < size:
                    os.ftruncate(fd, end)
                    os.fdatasync(fd)
            finally:
                os.close(fd)

    def _synced(self) -> Lengths:
        """What the shim noted to be synced, the last time that this note was."""
        try:
            fd = os.open(self._in + "index", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return Lengths(0, 0)
        try:
            place = os.fstat(fd).st_size // RECORD.size * RECORD.size
            while place > 0:
                begin = max(0, place - RECORD.size * _RECORDS_AT_ONCE)
                block = os.pread(fd, place - begin, begin)
                found = [row for row in RECORD.iter_unpack(block) if row[3] == 0 and row[2] == 0 and any(row)]
                if found:  # one that is torn says less, never more
                    return Lengths(max(row[0] for row in found), max(row[1] for row in found))
                if not any(block):
                    break  # pruned from here on
                place = begin
        finally:
            os.close(fd)
        return Lengths(0, 0)

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
        self._sync_streams()
        _write_durably(self.path / "exit.json", {**result_to_json(result), "closed": True})
        self._remove_note()
        return result

    def write_closed(self, reason: str) -> None:
        self._sync_streams()
        stdout, stderr = self.lengths()
        _write_durably(self.path / "closed", {"stdout": stdout, "stderr": stderr, "reason": reason})
        self._remove_note()

    def _sync_streams(self) -> None:
        """What a record counts is durable before the record is: here what a shim that was killed had no time for.

        Behind what it noted as synced it is written once more: a sync may have failed, which only the shim was told,
        and its pages count as clean since.
        """
        for stream, at in zip(Stream, self._synced()):
            try:
                fd = os.open(self._in + stream.filename, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                at = min(at, os.fstat(fd).st_size)  # a damaged index notes anything
                while True:
                    try:
                        at = os.lseek(fd, at, os.SEEK_DATA)  # a hole stays one
                    except OSError:
                        break  # no more data
                    data = os.pread(fd, 65_536, at)
                    if not data:
                        break
                    at += os.pwrite(fd, data, at)
                os.fdatasync(fd)
            finally:
                os.close(fd)

    def _remove_note(self) -> None:
        """That a shim waited for space, which it would have removed itself."""
        with contextlib.suppress(OSError):
            (self.path / "blocked").unlink()

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
        return json.dumps(key).encode() in self._notes()

    def interrupted(self) -> bool:
        """Whether a daemon died while the run's processes stood still for a signal."""
        found = [
            note
            for note in self._notes()
            if note in (json.dumps(STOPPING).encode(), json.dumps(LET_GO).encode())
        ]
        return found[-1:] == [json.dumps(STOPPING).encode()]

    def _notes(self) -> list[bytes]:
        try:
            return (self.path / "notes").read_bytes().split(b"\n")
        except FileNotFoundError:
            return []

    # -- space --

    def usage(self) -> int:
        """Bytes of disk it takes; counted once only when no more can come."""
        if self._settled_usage is not None:
            return self._settled_usage
        total = _SMALL_FILES + self.kept_bytes()
        for name in ("stdout", "stderr", "index", "gaps"):
            with contextlib.suppress(OSError):
                total += (self.path / name).stat().st_blocks * 512
        with contextlib.suppress(OSError):  # that one can't be read keeps no other from being pruned
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
        """Give back the blocks of acked bytes, all but the last ``tail`` of them; offsets stay what they are.

        `whole`: the host has all of it, so the index may go too, and where the file system can't punch holes
        the files themselves. The VMR's own files, if kept, go as well.
        """
        self._settled_usage = None
        if whole:
            shutil.rmtree(self.path / "files", ignore_errors=True)
            self._kept = None
        before = self._pruned()
        upto = Lengths(
            *(max(gone, (held - tail) // _PUNCH_UNIT * _PUNCH_UNIT) for gone, held in zip(before, acked))
        )
        try:
            if self._holes and any(new - old >= _PUNCH_UNIT for new, old in zip(upto, self._punched)):
                self._note_pruned(upto)
                for stream in Stream:
                    with contextlib.suppress(FileNotFoundError):
                        _punch(self.path / stream.filename, upto.of(stream))
                self._punched = upto
            if whole:
                with contextlib.suppress(FileNotFoundError):
                    _punch(self.path / "index", (self.path / "index").stat().st_size - _PUNCH_UNIT)
            elif self._holes:
                self._prune_index(acked, tail)
            return
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
                self._holes = False
                self._note_pruned(before)
            elif not whole or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        if whole:  # no holes are to be had here, or not even an inode for the note
            self.close_fds()
            for name in ("stdout", "stderr", "index"):
                with contextlib.suppress(FileNotFoundError):
                    (self.path / name).unlink()

    def _prune_index(self, acked: Lengths, tail: int) -> None:
        """A script that says a line now and then for days would have its index fill the spool.

        What the host has it has with its times; here the file's time does. Whole records go, so none is torn.
        """
        try:
            fd = os.open(self._in + "index", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            upto = os.fstat(fd).st_size - tail
            for stream in Stream:
                if acked.of(stream) < self._length(stream):
                    upto = min(upto, self._seek(fd, stream, acked.of(stream)))
        finally:
            os.close(fd)
        _punch(self.path / "index", upto - upto % (3 * _PUNCH_UNIT))

    def _note_pruned(self, upto: Lengths) -> None:
        """Durable before the first byte goes. The target of a link takes no block: there may be none."""
        if upto == self._noted:
            return
        if upto != self._pruned():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path / "pruned.new")
            os.symlink(f"{upto.stdout} {upto.stderr}", self.path / "pruned.new")
            os.rename(self.path / "pruned.new", self.path / "pruned")
        _sync(self.path)  # also if it is there: its own sync may have failed, or its daemon died before it
        self._noted = upto
        self._gone = upto if self.sole else None


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


def _over(run: Run) -> bool:
    """Whether nothing can come of it any more; also where nobody can read whether it is."""
    try:
        return run.closed() is not None
    except OSError:
        return True


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
        return list(self.newest_first(vmr))[::-1]

    def newest_first(self, vmr: bytes) -> Iterator[Run]:
        """The same, for those who need the last few alone."""
        runs = (self.run(vmr, attempt) for attempt in reversed(self._attempts(vmr)))
        return (run for run in runs if run is not None)

    def standing(self, vmr: bytes) -> list[Run]:
        """The runs that say how a VMR stands, oldest first: the latest, the one that the schedule started last, and
        those without an end. All of them where the latest doesn't know which."""
        latest = next(self.newest_first(vmr), None)
        if latest is None or latest.info.scheduled is None:
            return self.runs_of(vmr)
        there = os.fspath((self.path / "runs" / run_path(vmr, 1)).parent)
        telling = {latest.info.attempt, latest.info.scheduled} - {0}
        # A look at a name for each, not at what is in the file: there may be thousands.
        attempts = self._attempts(vmr)
        telling |= {each for each in attempts if not os.path.lexists(f"{there}/{each}/exit.json")}
        found = {attempt: self.run(vmr, attempt) for attempt in sorted(telling)}
        if latest.info.scheduled and found[latest.info.scheduled] is None:
            return self.runs_of(vmr)
        return [run for run in found.values() if run is not None]

    def names(self) -> list[bytes]:
        """The VMRs that have runs."""
        found = set()
        for first in self.path.glob("runs/*/*/*/run.json"):
            run = Run.load(first.parent)
            if run is not None and first.parent.name.isdecimal():
                found.add(run.info.vmr)
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
        try:
            return whole(row["after_attempt"]) if row is not None else 0
        except (KeyError, ValueError):
            return 0

    def latest(self, vmr: bytes) -> Optional[Run]:
        for attempt in reversed(self._attempts(vmr)):
            run = self.run(vmr, attempt)
            if run is not None:
                return run
        return None


class Spool(History):
    """The state directory, held by one daemon."""

    def __init__(self, state_dir: Path, *, limit: Optional[int] = None, drop: bool = False) -> None:
        """``drop``: over the limit shims drop output instead of waiting. Raises Problem where it can't be used."""
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
        self._zero_read = self._configured = False  # whether zero.json was; nobody else writes it
        self._latest: dict[bytes, Optional[Run]] = {}
        self._gone: dict[bytes, int] = {}
        self._used = 0  # at the last enforce()
        self._full = (state_dir / "full").exists()
        self._drop = drop
        self._mark("drop", drop)
        # The survey counts what was whole before this daemon; release() counts what was open or came later.
        self._settled = 0  # bytes: the sum over _prunable
        # (whether only tails are left to prune, when it was made, where it is, bytes), the next to prune first.
        self._prunable: list[tuple[bool, int, str, int]] = []
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
                found = bytes.fromhex(row["id"]) if row is not None else b""
                self._id = found if len(found) == 16 else b""
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
        if not self._zero_read:
            row = _read_row(self.path / "zero.json")
            self._zero_read = True
            try:
                self._zero = _zero_from_row(row) if row is not None else None
            except (KeyError, TypeError, ValueError):
                pass
        return self._zero

    def set_zero(self, zero: TimeZero) -> TimeZero:
        """Set time zero, durable; once: the one that stands is returned."""
        standing = self.zero()
        if standing is None:
            _write_once(self.path / "zero.json", zero._asdict())
            standing = self._zero = zero
        return standing

    def configured(self) -> bool:
        self._configured = self._configured or (self.path / "configured").exists()
        return self._configured

    def set_configured(self) -> None:
        if not self.configured():
            _write_once(self.path / "configured", {})

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
        self._id, self._zero, self._configured, self._full = b"", None, False, False
        self._known.clear()
        self._latest.clear()
        self._gone.clear()
        self._open.clear()
        self._settled, self._prunable, self._survey = 0, [], None

    # -- runs --

    def _load(self, path: Path) -> Optional[Run]:
        run = super()._load(path)
        if run is not None:
            run.sole = True
        return run

    def latest(self, vmr: bytes) -> Optional[Run]:
        if vmr not in self._latest:
            run = super().latest(vmr)
            if run is not None and run.info.run not in self._open and not _over(run):
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
        info = info.after(latest.info if latest is not None else None)
        path = self.path / "runs" / run_path(vmr, attempt)
        made = False
        try:
            self.id  # noqa: B018 - made now: once output has filled the disk no session could be opened without
            self._link(info)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.mkdir(mode=0o700)
            made = True
            fd = os.open(path / "run.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                row = json.dumps(_info_to_row(info)).encode() + b"\n"
                if os.write(fd, row) != len(row):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(fd)
        except OSError as error:
            if made:
                shutil.rmtree(path, ignore_errors=True)
            else:
                self._latest.pop(
                    vmr, None
                )  # there is an attempt that can't be read: they are listed the next time
            self._unlink(info.run)
            raise Problem(f"cannot begin a run of {show(vmr)}: {error.strerror}") from error
        run = Run(path, info)
        run.sole = True
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
        runs = Path(os.path.normpath(self.path / "runs"))
        for link in (self.path / "open").iterdir():
            # Five cases: a whole run; a directory whose run.json never came to the disk, which never started;
            # no directory at all; somebody else's run, because the number was given again; damage.
            path = Path(os.path.normpath(self.path / "open" / os.readlink(link)))
            ours = path.parent.parent.parent == runs
            try:
                run = self._load(path) if ours else None
            except OSError:
                continue  # it can't be read now; the others can
            if run is not None and run.info.run.hex() == link.name:
                found[run.info.run] = run
                continue
            if ours and run is None and path.is_dir() and not (path / "started").exists():
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
        """Bytes of disk that are in use and can be had back once the host has them.

        What was there before this daemon is counted over the first calls.
        """
        return self._settled + sum(run.usage() for run in self._open.values())

    def enforce(self, acked: Mapping[RunId, Lengths]) -> bool:
        """Keep the spool under its limit; whether it is full all the same, so that shims stop reading.

        `acked` are the bytes the host holds durably of the runs in open/. To be called now and then; under
        the limit it costs a few system calls a live run.
        """
        self._continue_survey()
        used = self._used_up(acked)
        bound = self.limit // 20 * 19 if self._full else self.limit
        # Down to nine tenths, so that it is not done again for each megabyte.
        excess = used - self.limit // 10 * 9 if used > bound else 0
        fs = os.statvfs(self.path)
        free, reserve = fs.f_bavail * fs.f_frsize, min(_RESERVE, fs.f_blocks * fs.f_frsize // 50)
        excess = max(excess, 2 * reserve - free)  # others may have filled the file system
        if excess > 0:
            self._prune(acked, excess, tails=used > bound or free < reserve)
            used = self._used_up(acked)
        self._used = used
        self._full = used > bound
        self._mark("full", self._full)
        self._mark("drop", self._drop)
        return self._full

    def _used_up(self, acked: Mapping[RunId, Lengths]) -> int:
        """What counts against the limit: without the tails of open runs, which are there for the host to compare."""
        tails = sum(min(held, KEPT_TAIL + _PUNCH_UNIT) for lengths in acked.values() for held in lengths)
        return max(0, self.usage() - tails)

    def _mark(self, name: str, there: bool) -> None:
        """Make or remove a file that tells shims something. Where it can't be done now, the next look does it."""
        with contextlib.suppress(OSError):
            if os.path.exists(f"{self.path}/{name}") != there:
                path = self.path / name
                path.touch(0o600) if there else path.unlink()

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
        only_tails = max(run.lengths()) <= KEPT_TAIL and not run.kept_bytes()
        self._push(run, only_tails=only_tails)
        run.close_fds()

    def _push(self, run: Run, *, only_tails: bool) -> None:
        """Count what can be pruned. The rest is history, and must not make scripts wait however long it grows."""
        size = run.usage() - _SMALL_FILES
        if size > 3 * _PUNCH_UNIT:  # the last block of each stream and of the index is not pruned
            self._settled += size
            heapq.heappush(self._prunable, (only_tails, run.info.created_ns, os.fspath(run.path), size))

    def _prune(self, acked: Mapping[RunId, Lengths], excess: int, *, tails: bool) -> None:
        excess = self._prune_settled(excess, tails=False)
        excess = self._prune_open(acked, excess)
        if tails:  # before scripts wait for ever; after time travel these are gaps
            self._prune_settled(excess, tails=True)

    def _prune_open(self, acked: Mapping[RunId, Lengths], excess: int) -> int:
        """Prune what the host has of the others, oldest first; returns how much is still too much.

        Never their tails: with nothing to compare, a VM set back in time would go on in the middle of what the host
        has of another future.
        """
        for run in self.open_runs():
            if excess <= 0:
                break
            if run.info.run in acked:
                before = run.usage()
                with contextlib.suppress(OSError):
                    run.prune(acked[run.info.run], whole=False)
                excess -= before - run.usage()
        return excess

    def _prune_settled(self, excess: int, *, tails: bool) -> int:
        """Prune what the host has whole, oldest first; returns how much is still too much."""
        for _ in range(_PRUNE_STEP):
            if excess <= 0 or not self._prunable or self._prunable[0][0] > tails:
                break
            only_tails, _, path, size = heapq.heappop(self._prunable)
            before = self._settled
            self._settled -= size
            run = self._load(Path(path))
            final = run.closed() if run is not None else None
            if run is not None and final is not None:
                try:
                    run.prune(final, whole=True, tail=0 if only_tails else KEPT_TAIL)
                except OSError:
                    self._push(run, only_tails=only_tails)
                    return excess
                if not only_tails:
                    self._push(run, only_tails=True)
                run.close_fds()
            excess -= before - self._settled
        return excess
