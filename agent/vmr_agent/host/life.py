"""What lives here: one life of one VM: its directory, what is held of each run, and the recovery of both.

Every change is made in the same order: raw bytes, a journal record, what is known in memory. Recovery reads
the journal and makes the same changes in memory, by the same functions.
It must not know: sessions, other lives, what happens when a write fails.

It is over 400 lines because writing the journal and replaying it must agree change by change.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Callable, Optional

from vmr_agent.errors import show
from vmr_agent.host.finished import Finished, digest_of
from vmr_agent.host.held import STATES, HeldRun, HeldStream, from_hex, pack, to_hex
from vmr_agent.host.journal import (
    FLUSH,
    FRAME,
    JOURNAL,
    LIFE,
    MARK,
    NO_LINK,
    OUTPUT,
    TIME,
    Kind,
    open_read,
    pack_output,
    pack_record,
    read_file,
    read_records,
    replace_file,
    write_all,
)
from vmr_agent.host.quota import BLOCK, RUN, SAMPLE, Quota
from vmr_agent.runs import Ending, RunState, Stream, run_path
from vmr_agent.schedule import parse_vmr
from vmr_agent.wire import messages

TAIL = 65_536
"""Bytes at a stream's end that an Ack's ``tails`` cover: PROTOCOL.md."""
_RECKONED = 1 << 20  # bytes of which one sample is taken
MAX_OFFSET = 2**53
"""8 PiB, the last count that every reader of JSON takes exactly. Only a gap can get there."""
MAX_OPEN_RUNS = 10_000
MAX_RUNS = 200_000
MAX_HELD = 16 << 20
"""Bytes of what open runs have said of themselves: 50,000 times what one says."""
MAX_GAPS_LISTED = 1_000
OPEN_FILES = 32
"""Raw files one VM keeps open: enough for the runs of a start time, and 1,000 VMs stay within ``nofile``."""
CHECKPOINT_RECORDS = 4_096

_CHECKPOINT = ".checkpoint"
_FORMAT = 2
"""Of the checkpoint, begun with in its checksum: no version takes another's for its own."""
_LENGTH = struct.Struct("<I")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | NO_LINK
_SECOND = 1_000_000_000


class BadGuest(Exception):
    """The guest said what no guest says: the caller ends the session."""


class OverQuota(Exception):
    """There is no room for it within the VM's quota: it is not stored, and not to be acknowledged."""


class Diverged(Exception):
    """The guest contradicts what is held: it went back in time. The caller sends the request ``diverged``."""


_Snapshot = tuple[HeldRun, RunState, int, int]
"""What an Ack will say of a run: its state, the bytes of stdout and of stderr."""


class Directory:
    """A life's, open until the last who holds it lets it go: a sync may be longer at it than its life."""

    __slots__ = ("_holders", "device", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.device = os.fstat(fd).st_dev
        self._holders = 1

    def hold(self) -> Directory:
        self._holders += 1
        return self

    def let_go(self) -> None:
        self._holders -= 1
        if not self._holders:
            os.close(self.fd)


class Sync:
    """What ``begin_sync`` found to do.

    A thread may work on it while the loop goes on: it opens every file anew by its name below the life's directory,
    which it holds, so no closing or renaming in the loop can mix them up.
    """

    def __init__(
        self, log_dir: int, life: Directory, files: set[str], directories: set[str], covers: int
    ) -> None:
        self.log_dir = os.dup(log_dir) if ".." in directories else -1
        self.life = life.hold()
        self.files = files
        self.directories = directories
        self.covers = covers
        """The journal's length when it was made."""
        self.held: list[_Snapshot] = []
        self.checkpoint: Optional[bytes] = None
        self.error: Optional[OSError] = None
        self.busy = threading.Lock()
        """Held while it is worked on: an error that one sync was told of is told no other that begins later."""

    def sync(self) -> None:
        """Sync each file, then each directory that names new ones."""
        with self.busy:
            self._sync()

    def _sync(self) -> None:
        try:
            for name in sorted(self.files):
                self._sync_one(name, os.O_RDONLY, os.fdatasync)
            for name in sorted(self.directories, reverse=True):
                self._sync_one(name, os.O_RDONLY | os.O_DIRECTORY, os.fsync)
        except OSError as error:
            self.error = error

    def _sync_one(self, name: str, flags: int, sync: Callable[[int], None]) -> None:
        if name == "..":
            sync(self.log_dir)
            return
        fd = os.open(name, flags | NO_LINK, dir_fd=self.life.fd)
        try:
            sync(fd)
        finally:
            os.close(fd)

    def __len__(self) -> int:
        return len(self.files) + len(self.directories)

    def close(self) -> None:
        if self.log_dir >= 0:
            os.close(self.log_dir)
        self.life.let_go()


class Life:
    """The directory of one life and what is held in it."""

    def __init__(
        self, directory: int, number: int, spool: bytes, log: Callable[[str], None], quota: Quota
    ) -> None:
        self.number = number
        self.spool = spool
        self.hello: Optional[messages.Hello] = None
        self.files: set[str] = set()
        self.directories: set[str] = set()
        self.unsynced = 0
        self.unfinished: set[tuple[bytes, int]] = set()
        self._directory = directory
        self._held_directory = Directory(directory)
        self._log = log
        self._quota = quota
        self._journal = -1
        self._size = 0
        self._waiting = bytearray()
        """Records not yet written: nobody may read beyond the last mark, so they can wait for the next."""
        self._since_checkpoint = 0
        self._skew = 0
        self._runs: dict[bytes, HeldRun] = {}
        self._held = 0
        """Bytes that these keep in memory, about."""
        self._finished = Finished()
        """With when each was executed, see :func:`_when`."""
        self._labels: dict[tuple[bytes, int], bytes] = {}
        """Of the others."""
        self._touched: dict[bytes, HeldRun] = {}
        self._open: OrderedDict[str, int] = OrderedDict()
        self._named: set[str] = set()
        """Directories whose names are durable, or will be with the next sync."""

    def create(self, wall_ns: int) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | NO_LINK
        self._journal = os.open(JOURNAL, flags, 0o644, dir_fd=self._directory)
        self.append(Kind.LIFE, LIFE.pack(self.number, self.spool, wall_ns))
        self._write_waiting()
        self.directories |= {".", ".."}
        self._quota.add(3 * BLOCK)

    def close(self) -> None:
        if self._directory < 0:
            return
        for fd in (*self._open.values(), self._journal):
            if fd >= 0:
                os.close(fd)
        self._held_directory.let_go()
        self._open.clear()
        self._journal = self._directory = -1

    # --- the journal

    def append(self, kind: int, content: bytes) -> None:
        self._append(pack_record(kind, content))

    def _append(self, record: bytes) -> None:
        self._waiting += record
        self._quota.add(len(record))
        self._since_checkpoint += 1
        self.files.add(JOURNAL)
        if len(self._waiting) > 1 << 16:
            self._write_waiting()

    def _write_waiting(self) -> None:
        write_all(self._journal, self._waiting)
        self._size += len(self._waiting)
        self._waiting.clear()

    def dirty(self) -> bool:
        return bool(self.files or self._touched)

    def latest(self, vmr: bytes) -> Optional[bytes]:
        """The run of a VMR's latest attempt."""
        attempts = {attempt for name, attempt in self._labels if name == vmr}
        with contextlib.suppress(OSError):
            fd = os.open(os.path.dirname(run_path(vmr, 1)), _DIRECTORY, dir_fd=self._directory)
            try:
                attempts.update(int(name) for name in os.listdir(fd) if name.isdecimal())
            finally:
                os.close(fd)
        runs = (self._run_of((vmr, attempt)) for attempt in sorted(attempts, reverse=True))
        return next((run for run in runs if run is not None), None)

    def _run_of(self, label: tuple[bytes, int]) -> Optional[bytes]:
        return self._labels.get(label) or self._finished.run_of(label)

    def begin_sync(self, log_dir: int, *, checkpoint: bool = False) -> Sync:
        self._write_waiting()
        sync = Sync(log_dir, self._held_directory, self.files, self.directories, self._size)
        sync.held = [(run, run.state, run.stdout.held, run.stderr.held) for run in self._touched.values()]
        # The more rarely the longer it is; but what comes behind it is what a start reads.
        if checkpoint or self._since_checkpoint >= max(CHECKPOINT_RECORDS, len(self._finished) // 8):
            self._since_checkpoint = 0
            sync.checkpoint = self._checkpoint()
        self.files, self.directories, self._touched, self.unsynced = set(), set(), {}, 0
        return sync

    def take_back(self, sync: Sync) -> None:
        """What it was to do is to be done by the next."""
        self.files |= sync.files
        self.directories |= sync.directories
        self._touched.update((run.message.run, run) for run, _, _, _ in sync.held)

    def finish_sync(self, sync: Sync) -> list[messages.Ack]:
        self._waiting += pack_record(Kind.MARK, MARK.pack(sync.covers))
        self._write_waiting()
        if sync.checkpoint is not None:
            replace_file(self._directory, _CHECKPOINT, sync.checkpoint)
        acks = []
        for run, state, stdout, stderr in sync.held:
            run.durable = state
            run.stdout.durable, run.stderr.durable = stdout, stderr
            if state is RunState.CLOSED:
                self._finish(run)
            acks.append(messages.Ack(run.message.run, int(state), stdout, stderr))
        return acks

    def seal(self) -> None:
        """Make the last mark durable: no recovery will ever set another, and what is behind it is never shown."""
        os.fdatasync(self._journal)

    def _finish(self, run: HeldRun) -> None:
        """Forget all of a run but its label."""
        if self._runs.pop(run.message.run, None) is not None:
            self._held -= run.size
        assert run.exit is not None
        self._finished.add(run.message.run, run.label, _when(run.message.started, run.exit.ended))
        self._labels.pop(run.label, None)
        for held in run.streams.values():
            self._close_raw(held.name)

    # --- the checkpoint: what is held at some mark, so that a start needn't read a day's journal. It is
    # written without a sync: where it can't be read whole the journal is read from its beginning.
    # It is `<II` (length and checksum of what follows), `<I` (length of the JSON), the JSON, the tables of the runs
    # that are over.

    def _checkpoint(self) -> bytes:
        state = {
            "life": self.number,
            "journal": self._size,
            "hello": to_hex(self.hello) if self.hello else None,
            "skew": self._skew,
            "runs": [run.to_json() for run in self._runs.values() if run.durable is not RunState.CLOSED],
        }
        head = json.dumps(state).encode()
        body = b"".join((_LENGTH.pack(len(head)), head, self._finished.pack()))
        return FRAME.pack(len(body), zlib.crc32(body, _FORMAT)) + body

    def _load_checkpoint(self, size: int) -> int:
        try:
            data = read_file(self._directory, _CHECKPOINT)
        except FileNotFoundError:
            return 0
        length, crc = FRAME.unpack(data[: FRAME.size].ljust(FRAME.size, b"\0"))
        body = data[FRAME.size :]
        if len(body) < _LENGTH.size or len(body) != length or zlib.crc32(body, _FORMAT) != crc:
            return 0
        behind = _LENGTH.size + _LENGTH.unpack_from(body)[0]
        state = json.loads(body[_LENGTH.size : behind])
        if state["life"] != self.number or state["journal"] > size:
            return 0
        self.hello = from_hex(state["hello"]) if state["hello"] else None
        self._skew = state["skew"]
        self._finished = Finished(body[behind:])
        for row in state["runs"]:
            run = HeldRun.from_json(row)
            self._add(run)
        return int(state["journal"])

    # --- recovery

    def recover(self, *, trust: bool, known: int = 0) -> bool:
        """Read what is held. What stands behind the last mark is checked against the raw files and kept up to
        the first record that fails; without ``trust`` (a sync failed: the page cache may hold what the disk
        does not) all of it is dropped. ``known`` is as good as a mark. True when anything behind it was kept."""
        self._journal = os.open(JOURNAL, os.O_RDWR | os.O_APPEND | NO_LINK, dir_fd=self._directory)
        size = os.fstat(self._journal).st_size
        begin = marked = self._load_checkpoint(size)
        for _, kind, content in read_records(self._journal, begin):
            if kind == Kind.MARK:
                marked = MARK.unpack(content)[0]
        marked = max(marked, known)
        self._size = begin
        crossed = cut = False
        forgotten: set[str] = set()
        beginning = b""
        for behind, kind, content in read_records(self._journal, begin):
            if kind == Kind.LIFE:
                beginning = content
            if behind > marked and kind != Kind.MARK:
                if not crossed:
                    self._all_durable()
                    crossed = True
                cut = cut or not trust or not self._stands(kind, content)
            if cut:
                self._forget(kind, content, forgotten)
                continue
            self._replay(kind, content)
            self._size = behind
            self._since_checkpoint += (
                kind != Kind.MARK
            )  # of whoever is killed again and again it grew for ever
        if not crossed:
            self._all_durable()
        self._write_again(marked)
        if self._size < size:
            self._log(f"the journal's last {size - self._size} bytes did not become durable and are cut off")
            for path in sorted(forgotten):  # before the record goes that would have it done again
                self._sync_directory(path)
            os.ftruncate(self._journal, self._size)
            if not self._size:  # a life without its first record would be none
                self.append(Kind.LIFE, beginning)
            # The last mark may have stood behind what was cut, and what it covers must never be doubted.
            self.append(Kind.MARK, MARK.pack(marked))
            self._write_waiting()
        if not marked:
            self.directories |= {".", ".."}  # as create() did, for whoever never came to sync them
        for run in list(self._runs.values()):
            if run.durable is RunState.CLOSED:
                self._finish(run)  # the mark behind its end says that its files are whole
            else:
                self._mend(run)
        return crossed and self._size > marked

    def reckon(self, begin: int, rendering: Sequence[str]) -> None:
        """Count what the logs will take of what is held and not rendered: behind this place in the journal. Earlier
        lives, of which something may be unrendered too, are not counted. ``rendering``: the runs under way there."""
        labels: dict[bytes, tuple[bytes, int]] = {}
        announced: Any
        with contextlib.suppress(ValueError, AttributeError):  # the renderer says that its note is damaged
            for announced in map(from_hex, rendering):
                labels[announced.run] = (announced.vmr, announced.attempt)
        # One read of a script may stand in many records, which are taken together.
        run, stream, start, end, place = b"", 0, 0, 0, 0
        for behind, kind, content in read_records(self._journal, begin):
            if behind > self._size:
                break
            if kind == Kind.RUN:
                announced = messages.unpack(content).message
                labels[announced.run] = (announced.vmr, announced.attempt)
            if kind != Kind.OUTPUT:
                continue
            run_id, number, offset, length, _, _ = OUTPUT.unpack(content)
            if (run, stream, end) != (run_id, number, offset) or end - start >= _RECKONED:
                self._reckon(labels.get(run), stream, start, end, place)
                run, stream, start = run_id, number, offset
            end, place = offset + length, behind
        self._reckon(labels.get(run), stream, start, end, place)

    def _reckon(
        self, label: Optional[tuple[bytes, int]], number: int, begin: int, end: int, behind: int
    ) -> None:
        if begin == end or label is None:
            return
        vmr, attempt = label
        size = min(end - begin, SAMPLE)
        sample = b""
        with contextlib.suppress(OSError):  # removed by somebody: it will be said, and no more
            fd = open_read(self._directory, f"{run_path(vmr, attempt)}/{Stream(number).filename}")
            try:
                sample = os.pread(fd, size, begin + (end - begin - size) // 2)
            finally:
                os.close(fd)
        self._quota.reckon(sample, end - begin, len(vmr), (self.number, behind))

    def _forget(self, kind: int, content: bytes, forgotten: set[str]) -> None:
        """What the journal doesn't say has no row, should its guest, set back in time, never say it again."""
        message = messages.unpack(content).message if kind == Kind.RUN else None
        if isinstance(message, messages.Run) and self._run_of((message.vmr, message.attempt)) is None:
            path = run_path(message.vmr, message.attempt)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{path}/result.json", dir_fd=self._directory)
            forgotten.add(path)

    def _sync_directory(self, path: str) -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | NO_LINK, dir_fd=self._directory)
        except FileNotFoundError:
            return
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _stands(self, kind: int, content: bytes) -> bool:
        if kind == Kind.GAP:
            gap = messages.unpack(content).message
            assert isinstance(gap, messages.Gap)
            run_id, stream, offset, length, crc = gap.run, gap.stream, gap.offset, gap.length, 0
        elif kind == Kind.OUTPUT:
            run_id, stream, offset, length, _, crc = OUTPUT.unpack(content)
        else:
            return True
        try:
            fd = self._raw(self._runs[run_id].streams[Stream(stream)], os.O_RDWR)
        except (OSError, KeyError):
            return False
        if kind == Kind.GAP:
            # A power cut may have kept the record and not the file's new size.
            os.ftruncate(fd, max(offset + length, os.fstat(fd).st_size))
            return True
        data = os.pread(fd, length, offset)
        if zlib.crc32(data) != crc:
            return False
        write_all(fd, data, offset)  # as in _write_again()
        return True

    def _write_again(self, begin: int) -> None:
        """Write the journal from the last mark's reach on in its own place.

        Where a sync failed the page cache may have what the disk never will, in pages called clean: a mark like
        that would stand between what is durable and what comes.
        """
        data = os.pread(self._journal, self._size - begin, begin)
        if data:
            fd = os.open(JOURNAL, os.O_WRONLY | NO_LINK, dir_fd=self._directory)
            try:
                write_all(fd, data, begin)
            finally:
                os.close(fd)
            self.files.add(JOURNAL)

    def _replay(self, kind: int, content: bytes) -> None:
        if kind == Kind.OUTPUT:
            run_id, number, offset, length, _, _ = OUTPUT.unpack(content)
            run = self._runs[run_id]
            self._apply_output(run, number, run.streams[number], offset + length, unfinished=True)
        elif kind == Kind.FLUSH:
            run_id, number = FLUSH.unpack(content)
            self._apply_flush(self._runs[run_id], Stream(number))
        elif kind == Kind.HELLO:
            hello = messages.unpack(content[TIME.size :]).message
            assert isinstance(hello, messages.Hello)
            self.apply_hello(hello, TIME.unpack_from(content)[0])
        elif kind in (Kind.RUN, Kind.GAP, Kind.EXIT, Kind.CLOSED):
            message = messages.unpack(content).message
            if isinstance(message, messages.Run):
                self._add(HeldRun(message, message.started + self._skew))
            elif isinstance(message, messages.Gap):
                self._apply_gap(self._runs[message.run], message)
            elif isinstance(message, messages.Exit):
                self._apply_exit(self._runs[message.run], message)
            elif isinstance(message, messages.Closed):
                self._apply_closed(self._runs[message.run], message)

    def _all_durable(self) -> None:
        for run in self._runs.values():
            run.durable = run.state
            for held in run.streams.values():
                held.durable = held.held
        self._touched.clear()
        self.files.clear()
        self.directories.clear()

    def _mend(self, run: HeldRun) -> None:
        """Make the run's files say what the journal says."""
        self._make_directory(run.path)
        for stream, held in run.streams.items():
            fd = self._raw(held)
            size = os.fstat(fd).st_size
            if size > held.held:
                os.ftruncate(fd, held.held)
            elif size < held.held:
                self._log(f"{held.name} has lost {held.held - size} bytes since")
            if held.unfinished and os.pread(fd, 1, held.held - 1) == b"\n":
                held.unfinished = False
            self._note_unfinished(run, stream, held)
            # Cut now, or by one who was killed before its sync: the disk may still have the old size without the bytes,
            # and in a life that is over nobody would cut it.
            self.files.add(held.name)
        self._write_result(run)

    # --- what the guest says

    def run(self, message: messages.Run) -> messages.Ack:
        label = (message.vmr, message.attempt)
        known = self._runs.get(message.run)
        over = self._finished.get(message.run)
        if known is not None or over is not None:
            named = same = True
            if known is not None:
                named, same = known.label == label, message.started == known.message.started
                if known.exit is not None and message.ended is not None:
                    same = same and message.ended == known.exit.ended
            elif over is not None:
                named = over.digest == digest_of(label)
                same = over.when == _when(message.started, message.ended, over.when % (1 << 32))
            if not named:
                raise Diverged(f"what was another run now says it is {_label(label)}")
            if not same:
                raise Diverged(f"{_label(label)} was executed at another time before")
            return self._ack(known) if known is not None else self._ack_finished(message)
        if self._run_of(label) is not None:
            raise Diverged(f"{_label(label)} is another run than before")
        if parse_vmr(message.vmr) != message.vmr or message.attempt < 1:
            raise BadGuest(f"no VMR has the name {show(message.vmr)}, attempt {message.attempt}")
        if len(self._runs) >= MAX_OPEN_RUNS:
            raise BadGuest(f"more than {MAX_OPEN_RUNS:,} runs at once")
        if self._held > MAX_HELD:
            raise BadGuest(f"{self._held:,} bytes said of its open runs")
        if len(self._runs) + len(self._finished) >= MAX_RUNS:
            raise BadGuest(f"more than {MAX_RUNS:,} runs")
        self._admit()
        self._quota.add(RUN)
        run = HeldRun(message, message.started + self._skew)
        self._make_directory(run.path)
        for held in run.streams.values():
            # Of another future, whose record the journal lost. That this is cut must last, too.
            if os.fstat(self._raw(held)).st_size:
                os.ftruncate(self._raw(held), 0)
                self.files.add(held.name)
        self.append(Kind.RUN, pack(message))
        self._write_waiting()  # before a row says so
        self._add(run)
        self._write_result(run)
        return messages.Ack(message.run, int(RunState.NONE), 0, 0, ((0, 0), (0, 0)))

    def output(self, message: messages.Output) -> None:
        run_id, stream, offset, more, marks, data = message
        run = self._runs.get(run_id) or self._known(run_id)
        if run is None:
            return
        held = _stream(run, stream)
        end = offset + len(data)
        if offset > held.held:
            raise BadGuest(f"a hole in {held.name}: byte {offset} where {held.held} was due")
        if sum([length for length, _ in marks]) != len(data):
            raise BadGuest("marks that do not add up to the data")
        if held.held > offset:  # sent again; only what is new counts
            known = min(held.held, end) - offset
            self._compare(held, offset, data[:known])
            data, marks, offset = data[known:], _behind(marks, known), offset + known
        held.more = more
        if not data:
            self._note_unfinished(run, stream, held)
            # It may have become durable after this session's first Ack of the run, before the guest had sent it:
            # unless it is acknowledged again now it stays in flight there, and in the end fills the window.
            self._touched[run_id] = run
            return
        self._allow(run, end)
        if self._quota.over:
            raise OverQuota
        write_all(self._raw(held), data, offset)
        begin = at = 0
        begun = marks[0][1]
        for length, wall in marks if len(marks) > 1 else ():
            # The renderer stamps each record once, so a record stays within one second of the logs' clock.
            if at > begin and (wall + self._skew) // _SECOND != (begun + self._skew) // _SECOND:
                self._append_output(run_id, stream, offset + begin, data[begin:at], begun)
                begin, begun = at, wall
            at += length
        self._append_output(run_id, stream, offset + begin, data[begin:], begun)
        where = (self.number, self._size + len(self._waiting))
        self._quota.add_output(data, len(run.message.vmr), where)
        self.unsynced += len(data)
        self._apply_output(run, stream, held, end, unfinished=data[-1] != 0x0A)

    def _append_output(self, run: bytes, stream: int, offset: int, data: bytes, wall: int) -> None:
        self._append(pack_output(run, stream, offset, len(data), wall, zlib.crc32(data)))

    def gap(self, message: messages.Gap) -> None:
        run = self._known(message.run)
        if run is None:
            return
        held, end = _stream(run, message.stream), message.offset + message.length
        if message.offset > held.held:
            raise BadGuest(f"a hole in {held.name}: a gap at {message.offset}, not {held.held}")
        if end <= held.held:
            self._touched[message.run] = run  # as for output
            return
        self._allow(run, end)
        if self._quota.over:
            raise OverQuota
        self._quota.add(BLOCK)  # of what comes behind it
        message = message._replace(offset=held.held, length=end - held.held)
        # First, or who reads along takes the hole for output; should it stay alone, recovery writes it anew.
        self._write_result(run, run.gap_row(message, self._skew))
        try:
            os.ftruncate(self._raw(held), end)
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise BadGuest(f"a gap up to byte {end}, more than a file can have") from None
            raise
        self.append(Kind.GAP, pack(message))
        self._apply_gap(run, message)
        self._write_result(run)

    def exit(self, message: messages.Exit) -> None:
        run = self._known(message.run)
        if run is None:
            return
        if message.ending not in STATES:
            raise BadGuest(f"no way to end: {message.ending!r}")
        if self._held > MAX_HELD:
            raise BadGuest(f"{self._held:,} bytes said of its open runs")
        if run.exit is None:
            self._admit()
            self.append(Kind.EXIT, pack(message))
            self._apply_exit(run, message)
            self._write_result(run)
        elif run.exit != message:
            raise Diverged(f"{_label(run.label)} ended in another way than before")
        self._touched[message.run] = run

    def end(self, message: messages.Closed) -> Optional[messages.Ack]:
        """Returns the Ack of a run that is finished: it became durable in an earlier session's sync, after this
        one's first Ack of it, and nothing else would say so."""
        run = self._known(message.run)
        if run is None:
            return messages.Ack(message.run, int(RunState.CLOSED), message.stdout, message.stderr)
        lengths = tuple(held.held for held in run.streams.values())
        if run.exit is None or message.stdout > lengths[0] or message.stderr > lengths[1]:
            raise BadGuest(f"{run.path} closed before all of it was sent")
        if message.reason or run.exit.ending == Ending.LOST.value:
            # Nobody saw its end: the VM may have lost with its power what came here, and was not durable when it asked.
            message = message._replace(stdout=lengths[0], stderr=lengths[1])
        if (message.stdout, message.stderr) != lengths or (run.closed is not None and run.closed != message):
            raise Diverged(f"{_label(run.label)} was longer before")
        if run.closed is None:
            self._admit()
            self.append(Kind.CLOSED, pack(message))
            self._apply_closed(run, message)
            self._write_result(run)
        self._touched[message.run] = run
        return None

    def flush_line(self, run_id: bytes, stream: Stream) -> None:
        run = self._runs.get(run_id)
        if run is not None and run.streams[stream].unfinished:
            self.append(Kind.FLUSH, FLUSH.pack(run_id, stream))
            self._apply_flush(run, stream)

    def _known(self, run_id: bytes) -> Optional[HeldRun]:
        """The run, or None for one that is finished: what is said of it is said again."""
        run = self._runs.get(run_id)
        if run is None and run_id not in self._finished:
            raise BadGuest(f"run {run_id.hex()} was never announced")
        return run

    def _allow(self, run: HeldRun, end: int) -> None:
        """Refuses output or a gap up to byte ``end`` that no file could have, or of a run that is over."""
        if end > MAX_OFFSET:
            raise BadGuest(f"an offset of {end}")
        if run.state is RunState.CLOSED:
            raise BadGuest(f"{run.path} goes on after it was closed")

    def _admit(self) -> None:
        """What is said of a run goes over the quota, by a little."""
        if self._quota.exhausted:
            raise OverQuota

    # --- what changes in memory, when said and when replayed

    def apply_hello(self, hello: messages.Hello, host_wall_ns: int) -> None:
        self.hello = hello
        self._skew = host_wall_ns - hello.wall

    def _add(self, run: HeldRun) -> None:
        self._runs[run.message.run] = run
        self._held += run.size
        self._labels[run.label] = run.message.run
        self._touched[run.message.run] = run

    def _apply_output(
        self, run: HeldRun, stream: int, held: HeldStream, end: int, *, unfinished: bool
    ) -> None:
        held.held = end
        held.unfinished = unfinished
        self._note_unfinished(run, stream, held)
        self.files.add(held.name)
        self._touched[run.message.run] = run

    def _apply_flush(self, run: HeldRun, stream: Stream) -> None:
        held = run.streams[stream]
        held.unfinished = False
        self._note_unfinished(run, stream, held)

    def _apply_gap(self, run: HeldRun, message: messages.Gap) -> None:
        held = run.streams[message.stream]
        held.held = held.gap_end = message.offset + message.length
        run.missing += message.length
        if len(run.gaps) < MAX_GAPS_LISTED and self._held < MAX_HELD // 2:
            self._held += run.list_gap(run.gap_row(message, self._skew))
        self._apply_output(run, message.stream, held, held.held, unfinished=False)

    def _apply_exit(self, run: HeldRun, message: messages.Exit) -> None:
        self._held += run.take_exit(message)
        run.ended_ns = message.ended + self._skew
        run.state = RunState.EXITED
        self._touched[message.run] = run
        for stream, count in ((Stream.STDOUT, message.stdout), (Stream.STDERR, message.stderr)):
            if count <= run.streams[stream].held:
                self._apply_flush(run, stream)  # the exit shows it

    def _apply_closed(self, run: HeldRun, message: messages.Closed) -> None:
        run.closed = message
        run.state = RunState.CLOSED
        self._touched[message.run] = run
        for stream in Stream:
            self._apply_flush(run, stream)

    def _note_unfinished(self, run: HeldRun, stream: int, held: HeldStream) -> None:
        if held.unfinished and not held.more:
            self.unfinished.add((run.message.run, int(stream)))
        elif self.unfinished:
            self.unfinished.discard((run.message.run, int(stream)))

    # --- Acks in answer to Run

    def _ack(self, run: HeldRun) -> messages.Ack:
        out, err = run.stdout, run.stderr
        tails = tuple(
            self._tail(held.name, held.durable, min(held.gap_end, held.durable))
            for held in run.streams.values()
        )
        return messages.Ack(run.message.run, int(run.durable), out.durable, err.durable, tails)

    def _ack_finished(self, message: messages.Run) -> messages.Ack:
        path = run_path(message.vmr, message.attempt)
        lengths = []
        tails = []
        try:
            row = json.loads(read_file(self._directory, f"{path}/result.json"))
            for stream in Stream:
                lengths.append(int(row[f"{stream.filename}_bytes"]))
                gaps = [gap for gap in row["gaps"] if gap["stream"] == stream.filename]
                ends = [gap["offset"] + gap["length"] for gap in gaps]
                tails.append(self._tail(f"{path}/{stream.filename}", lengths[-1], max(ends, default=0)))
        except (OSError, ValueError, KeyError, TypeError):  # somebody tidied up; the guest needs not know
            lengths, tails = [0, 0], [(0, 0), (0, 0)]
        return messages.Ack(message.run, int(RunState.CLOSED), lengths[0], lengths[1], tuple(tails))

    def _tail(self, name: str, length: int, gap_end: int) -> tuple[int, int]:
        """CRC and length of the last bytes, as far back as they are the guest's own."""
        begin = max(gap_end, length - TAIL)
        try:
            fd = open_read(self._directory, name)
        except OSError:
            return 0, 0
        try:
            data = os.pread(fd, length - begin, begin)
        finally:
            os.close(fd)
        return (zlib.crc32(data), len(data)) if len(data) == length - begin else (0, 0)

    # --- files

    def _compare(self, held: HeldStream, offset: int, data: bytes) -> None:
        begin = min(max(offset, held.gap_end), offset + len(data))
        there = os.pread(self._raw(held), offset + len(data) - begin, begin)
        if there != data[begin - offset : begin - offset + len(there)]:
            raise Diverged(f"{held.name} had other bytes before from {begin} on")

    def _raw(self, held: HeldStream, flags: int = os.O_RDWR | os.O_CREAT) -> int:
        name = held.name
        fd = self._open.get(name)
        if fd is not None:
            self._open.move_to_end(name)
            return fd
        if len(self._open) >= OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        fd = self._open[name] = os.open(name, flags | NO_LINK, 0o644, dir_fd=self._directory)
        return fd

    def _close_raw(self, name: str) -> None:
        fd = self._open.pop(name, None)
        if fd is not None:
            os.close(fd)

    def _make_directory(self, path: str) -> None:
        parts = path.split("/")
        for depth in range(1, len(parts) + 1):
            name = "/".join(parts[:depth])
            try:
                os.mkdir(name, 0o755, dir_fd=self._directory)
            except FileExistsError:
                os.close(os.open(name, os.O_RDONLY | os.O_DIRECTORY | NO_LINK, dir_fd=self._directory))
                if name in self._named:
                    continue
                # Whoever made it may have ended before it was synced.
            if depth < len(parts):
                self._named.add(name)
            self.directories.add("/".join(parts[: depth - 1]) or ".")
        self.directories.add(path)

    def _write_result(self, run: HeldRun, *coming: dict[str, Any]) -> None:
        """``coming``: gaps that are about to be."""
        row = run.row()
        row["gaps"] = [*row["gaps"], *coming]
        content = json.dumps(row, indent=1) + "\n"
        replace_file(self._directory, f"{run.path}/result.json", content.encode())
        self.files.add(f"{run.path}/result.json")
        self.directories.add(run.path)


def _when(started: int, ended: Optional[int], otherwise: int = 0) -> int:
    """Tells two executions of one run from each other, as a VM set back in time makes them, in few bytes.

    ``otherwise``: in the place of an end that isn't known."""
    return zlib.crc32(b"%d" % started) << 32 | (otherwise if ended is None else zlib.crc32(b"%d" % ended))


def _label(label: tuple[bytes, int]) -> str:
    return f"{show(label[0])} attempt {label[1]}"


def _stream(run: HeldRun, number: int) -> HeldStream:
    held = run.streams.get(number)
    if held is None:
        raise BadGuest(f"no stream {number}")
    return held


def _behind(marks: messages.Pairs, known: int) -> messages.Pairs:
    """The marks without those for the first ``known`` bytes."""
    rest = []
    for length, wall in marks:
        dropped = min(known, length)
        known -= dropped
        if length > dropped:
            rest.append((length - dropped, wall))
    return tuple(rest)
