"""What lives here: one VM's two logs, rendered from its journals and raw files, and the note of how far they are.

What is written depends on journal and raw files alone, record by record. So after any end both logs are cut back
to the sizes in the note, and rendering goes on: each line is there exactly once.
It must not know: processes, other VMs, how anything came to be stored.

It is over 400 lines because what the note holds is the state of all of it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections import OrderedDict
from typing import Any, NamedTuple, Optional

from vmr_agent.host import firewheel_log
from vmr_agent.host.firewheel_log import LINE_LIMIT, Origin
from vmr_agent.host.held import from_hex, to_hex
from vmr_agent.host.journal import (
    FLUSH,
    LIFE,
    MARK,
    NO_LINK,
    OUTPUT,
    TIME,
    Kind,
    commit_temporary,
    lives,
    open_read,
    read_file,
    read_life,
    records,
    vm_segment,
    write_temporary,
)
from vmr_agent.runs import Ending, Stream, run_path
from vmr_agent.wire import messages

SLICE = 1 << 20
"""Bytes of text after which the next VM has its turn."""
OPEN_FILES = 256
_CHUNK = 1 << 18
_NEWLINE, _RETURN = b"\n", b"\r"


class _Line:
    """One stream's line in the making: its bytes are in the raw file, from ``start`` to ``seen``."""

    __slots__ = ("after_return", "cut", "ns", "seen", "start")

    def __init__(
        self, start: int = 0, seen: int = 0, after_return: bool = False, cut: bool = False, ns: int = 0
    ) -> None:
        self.start = start
        self.seen = seen
        self.after_return = after_return
        """The last byte was a CR: whether the line ends there or with a LF to come isn't known yet."""
        self.cut = cut
        """Its beginning has been shown, and that it is too long; the rest is not."""
        self.ns = ns
        """When the last bytes were read."""

    def to_json(self) -> list[Any]:
        return [self.start, self.seen, self.after_return, self.cut, self.ns]


class _Run:
    """A run that isn't closed yet."""

    def __init__(self, message: messages.Run) -> None:
        self.message = message
        self.origin = Origin(message.vmr, message.attempt, message.pid)
        self.path = run_path(message.vmr, message.attempt)
        self.lines = {stream: _Line() for stream in Stream}
        self.exit: Optional[messages.Exit] = None
        """Its exit, until it is shown: the bytes it counts come first."""
        self.lost = False

    def to_json(self) -> dict[str, Any]:
        return {
            "run": to_hex(self.message),
            "exit": to_hex(self.exit) if self.exit else None,
            "lost": self.lost,
            "lines": [line.to_json() for line in self.lines.values()],
        }

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> _Run:
        run = cls(from_hex(row["run"]))
        run.exit = from_hex(row["exit"]) if row["exit"] else None
        run.lost = row["lost"]
        run.lines = {stream: _Line(*values) for stream, values in zip(Stream, row["lines"])}
        return run


class RawFiles:
    """Raw files open for reading, over all VMs, the least lately used closed first."""

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[int, str], int] = OrderedDict()

    def read(self, directory: int, name: str, offset: int, length: int) -> bytes:
        key = (directory, name)
        fd = self._open.get(key)
        if fd is None:
            while len(self._open) >= OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            try:
                fd = self._open[key] = open_read(directory, name)
            except FileNotFoundError:
                return b""  # somebody tidied up; there is nothing to show
        else:
            self._open.move_to_end(key)
        data = os.pread(fd, length, offset)
        while len(data) < length:
            more = os.pread(fd, length - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def forget(self, directory: int) -> None:
        for key in [key for key in self._open if key[0] == directory]:
            os.close(self._open.pop(key))


class _OpenLife(NamedTuple):
    number: int
    directory: int
    journal: int

    def close(self) -> None:
        os.close(self.directory)
        os.close(self.journal)


class VmLogs:
    """One VM's two logs. When anything but a write fails: :meth:`reset`, and begin again from the note."""

    def __init__(self, root: int, vm: str, raw: RawFiles) -> None:
        self.vm = vm
        self.trouble: Optional[OSError] = None
        """Why text could not be written, while it can't."""
        self._segment = vm_segment(vm)
        self._note = f".{self._segment}.rendered"
        self._raw = raw
        self._root = root
        self._log = self._json = -1
        self._open: Optional[_OpenLife] = None
        self._clear()

    def _clear(self) -> None:
        self._life = 0
        self._at = 0
        """How far the journal is rendered."""
        self._durable = 0
        self._skew = 0
        self._boot: Optional[str] = None
        self._runs: dict[bytes, _Run] = {}
        self._log_text: list[bytes] = []
        self._json_text: list[bytes] = []
        self._text_size = 0
        self.changed = False
        """Since the last note."""

    def reset(self) -> None:
        self._leave_life()
        for fd in (self._log, self._json):
            if fd >= 0:
                os.close(fd)
        self._log = self._json = -1
        self._clear()

    # --- where it stands

    def _begin(self) -> bool:
        """Open both logs, cut back to where the last note says they were whole. False while another renderer,
        of a collector that has ended, is not done with them."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | NO_LINK
        self._log = os.open(f"{self._segment}.log", flags, 0o644, dir_fd=self._root)
        self._json = os.open(f"{self._segment}.json", flags, 0o644, dir_fd=self._root)
        try:
            fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.reset()
            return False
        try:
            self._take_note(self._read_note())
        except FileNotFoundError:
            # Logs that were there before stay, whatever happens from now on.
            self.sync_logs()
            self.write_note(sync=True)
            self.commit_note()
        except (ValueError, KeyError, TypeError):
            raise OSError(
                errno.EINVAL, f"{self._note} is damaged; without it all is rendered once more"
            ) from None
        # A log that outlives its first note would be rendered twice. Not only where the note is ours: who made it may
        # have been killed before this.
        os.fsync(self._root)
        return True

    def _read_note(self) -> Any:
        return json.loads(read_file(self._root, self._note))

    def _take_note(self, note: Any) -> None:
        self._life = note["life"]
        self._at = self._durable = note["journal"]
        self._skew = note["skew"]
        self._boot = note["boot"]
        for row in note["runs"]:
            run = _Run.from_json(row)
            self._runs[run.message.run] = run
        for fd, size in ((self._log, note["log"]), (self._json, note["json"])):
            if os.fstat(fd).st_size > size:
                os.ftruncate(fd, size)

    # A note is written in three steps, so that many VMs can share the syncs between them.

    def sync_logs(self) -> None:
        os.fdatasync(self._log)
        os.fdatasync(self._json)

    def write_note(self, *, sync: bool) -> None:
        row = {
            "life": self._life,
            "journal": self._at,
            "log": os.fstat(self._log).st_size,
            "json": os.fstat(self._json).st_size,
            "skew": self._skew,
            "boot": self._boot,
            "runs": [run.to_json() for run in self._runs.values()],
        }
        write_temporary(self._root, self._note, json.dumps(row).encode(), sync=sync)

    def commit_note(self) -> None:
        commit_temporary(self._root, self._note)
        self.changed = False

    # --- one turn

    def step(self) -> bool:
        """Render some of what is durable. True when there may be more.

        Cases: no logs open yet; text that a full disk didn't take; no life yet; more of this life; a later life.
        """
        if self._log < 0 and not self._begin():
            return False
        if not self._write():
            return False
        if self._open is None and not self._enter_life():
            return False
        if self._render() and self._at < self._durable:
            return True
        if not self._superseded():
            return False  # of a mark that was written since, its writer will tell
        if self._render():  # written between the last look and the renaming
            return True
        self._end_life()
        self._write()
        return True

    @property
    def waiting(self) -> bool:
        """Whether its logs can't be opened or written for now."""
        return self._log < 0 or self._text_size > 0

    def _render(self) -> bool:
        assert self._open is not None
        self._look_for_mark(self._open.journal)
        if self._at >= self._durable:
            return False
        while self._at < self._durable and self._text_size < SLICE:
            begin = self._at
            chunk = os.pread(self._open.journal, min(_CHUNK, self._durable - begin), begin)
            for behind, kind, content in records(chunk):
                self._record(kind, content)
                self._at = begin + behind
                if self._text_size >= SLICE:
                    break
            if self._at == begin:
                raise OSError(errno.EIO, f"the journal can't be read at byte {begin}")
        self.changed = True
        self._write()
        return True

    def _look_for_mark(self, journal: int) -> None:
        """Find the last mark. Always from the last one on: what was beyond it may have been cut and replaced."""
        offset = self._durable
        while True:
            last = offset
            for behind, kind, content in records(os.pread(journal, _CHUNK, offset)):
                last = offset + behind
                if kind == Kind.MARK:
                    self._durable = max(self._durable, MARK.unpack(content)[0])
            if last == offset:
                return
            offset = last

    def _write(self) -> bool:
        """Append the text. False when a full disk, say, didn't take all of it: the rest is kept."""
        self.trouble = None
        for fd, text in ((self._log, self._log_text), (self._json, self._json_text)):
            data = memoryview(b"".join(text))
            try:
                while data:
                    data = data[os.write(fd, data) :]
            except OSError as error:
                self.trouble = error
            text[:] = [bytes(data)] if data else []
        self._text_size = sum(map(len, self._log_text)) + sum(map(len, self._json_text))
        return self._text_size == 0

    # --- lives

    def _enter_life(self) -> bool:
        """Open the life that the note names, or else the next one there is."""
        life = self._find_life()
        while life is not None and life.number != self._life:
            # Perhaps an earlier one was renamed between listing and opening. Who looks twice and finds the same has
            # listed its new name.
            first, life = life, self._find_life()
            first.close()
            if life is not None and life.number == first.number:
                break
        if life is None:
            return False
        self._open = life
        if life.number != self._life:
            self._life, self._at, self._durable = life.number, 0, 0
        return True

    def _find_life(self) -> Optional[_OpenLife]:
        best = self._open_life(self._segment)
        if best is not None and best.number == max(self._life, 1):
            return best  # there is none before it that is wanted
        if best is not None:
            best.close()
            best = None
        for name in lives(self._root, self._segment):
            life = self._open_life(name)
            if life is None:
                continue
            if life.number < self._life or (best is not None and best.number < life.number):
                life.close()
                continue
            if best is not None:
                best.close()
            best = life
        return best

    def _open_life(self, name: str) -> Optional[_OpenLife]:
        try:
            directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | NO_LINK, dir_fd=self._root)
        except OSError:
            return None
        begun = read_life(directory)
        if begun is None:
            os.close(directory)
            return None
        return _OpenLife(begun[1], directory, begun[0])

    def _superseded(self) -> bool:
        """Whether the VM's directory is another one by now, with a life in it."""
        try:
            there = os.stat(self._segment, dir_fd=self._root, follow_symlinks=False)
        except FileNotFoundError:
            return False
        assert self._open is not None
        here = os.fstat(self._open.directory)
        if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
            return False
        life = self._open_life(self._segment)
        if life is None:
            return False
        life.close()
        return life.number > self._life

    def _end_life(self) -> None:
        for run in self._runs.values():
            for stream in Stream:
                self._show_rest(run, stream)
        self._leave_life()
        self._runs.clear()
        self._life += 1
        self._at = self._durable = self._skew = 0
        self._boot = None
        self.changed = True

    def _leave_life(self) -> None:
        if self._open is not None:
            self._raw.forget(self._open.directory)
            self._open.close()
            self._open = None

    # --- records

    def _record(self, kind: int, content: bytes) -> None:
        if kind == Kind.OUTPUT:
            run_id, number, offset, length, wall, _ = OUTPUT.unpack(content)
            run = self._runs.get(run_id)
            if run is not None:
                self._output(run, Stream(number), offset, length, wall + self._skew)
                self._show_exit(run)
        elif kind == Kind.FLUSH:
            run_id, number = FLUSH.unpack(content)
            run = self._runs.get(run_id)
            if run is not None:
                self._show_rest(run, Stream(number))
        elif kind == Kind.LIFE:
            number, spool, wall = LIFE.unpack(content)
            if number > 1:
                self._say(firewheel_log.life_line(wall, spool))
        elif kind == Kind.HELLO:
            self._hello(TIME.unpack_from(content)[0], messages.unpack(content[TIME.size :]).message)
        elif kind in (Kind.RUN, Kind.GAP, Kind.EXIT, Kind.CLOSED):
            self._message(messages.unpack(content).message)

    def _hello(self, wall: int, message: messages.Message) -> None:
        assert isinstance(message, messages.Hello)
        self._skew = wall - message.wall
        if self._boot is not None and message.boot != self._boot:
            self._say(firewheel_log.reboot_line(wall))
        self._boot = message.boot

    def _message(self, message: messages.Message) -> None:
        if isinstance(message, messages.Run):
            run = self._runs[message.run] = _Run(message)
            self._say(firewheel_log.start_lines(message.started + self._skew, message.script, message.pid))
            return
        assert isinstance(message, (messages.Gap, messages.Exit, messages.Closed))
        known = self._runs.get(message.run)
        if known is None:
            return
        run = known
        if isinstance(message, messages.Gap):
            stream = Stream(message.stream)
            line = run.lines[stream]
            self._show_rest(run, stream)
            ns = line.ns or run.message.started + self._skew
            if message.wall is not None:
                ns = max(ns, message.wall + self._skew)
            self._say(firewheel_log.gap_line(ns, run.origin, message))
            line.start = line.seen = message.offset + message.length
            line.after_return = line.cut = False
            self._show_exit(run)
        elif isinstance(message, messages.Exit):
            run.exit = message
            run.lost = message.ending == Ending.LOST.value
            self._show_exit(run)
        else:
            self._show_exit(run, all_came=True)
            for stream in Stream:
                self._show_rest(run, stream)
            if message.reason and not run.lost:  # else the exit line has said it
                ns = max(line.ns for line in run.lines.values()) or run.message.started + self._skew
                self._say(firewheel_log.capture_ended_line(ns, run.origin, message.reason))
            del self._runs[message.run]

    def _show_exit(self, run: _Run, *, all_came: bool = False) -> None:
        message = run.exit
        if message is None:
            return
        out, err = run.lines[Stream.STDOUT], run.lines[Stream.STDERR]
        if not all_came and (out.seen < message.stdout or err.seen < message.stderr):
            return
        for stream in Stream:
            self._show_rest(run, stream)
        self._say(firewheel_log.exit_line(message.ended + self._skew, run.origin, message))
        run.exit = None

    # --- lines

    def _output(self, run: _Run, stream: Stream, offset: int, length: int, ns: int) -> None:
        """Bytes came. Whole lines are shown; the beginning of one waits in the raw file."""
        line = run.lines[stream]
        data = self._read(run, stream, offset, length)
        # A CR at the very end may be half of a CRLF, so it ends no line yet.
        whole = max(data.rfind(_NEWLINE), data.rfind(_RETURN, 0, len(data) - 1)) + 1
        held = offset - line.start
        if held and (whole or line.after_return):
            first = self._end_of_first(data, line.after_return)
            self._finish_line(run, stream, data[:first], ns)
            self._show(run, stream, data[first:whole], ns)
            line.start = offset + max(first, whole)
        elif whole:
            self._show(run, stream, data[:whole], ns)
            line.start = offset + whole
        line.seen = offset + length
        line.after_return = data[-1:] == _RETURN
        line.ns = ns
        if line.seen - line.start > LINE_LIMIT and not line.cut:
            self._cut(run, stream, self._read(run, stream, line.start, LINE_LIMIT))

    @staticmethod
    def _end_of_first(data: bytes, after_return: bool) -> int:
        """Where in ``data`` the line ends that began before it."""
        if after_return:
            return 1 if data[:1] == _NEWLINE else 0
        newline, ret = data.find(_NEWLINE), data.find(_RETURN)
        if 0 <= ret < newline or newline < 0:
            return ret + 2 if data[ret + 1 : ret + 2] == _NEWLINE else ret + 1
        return newline + 1

    def _finish_line(self, run: _Run, stream: Stream, end: bytes, ns: int) -> None:
        """Show the line that began earlier, of which ``end`` is the rest."""
        line = run.lines[stream]
        if line.cut:
            line.cut = False
            return
        held = self._read(run, stream, line.start, min(line.seen - line.start, LINE_LIMIT + 1))
        data = held + end
        if len(data) > LINE_LIMIT:
            line.ns = ns
            self._cut(run, stream, data[:LINE_LIMIT])
            line.cut = False
        else:
            self._show(run, stream, data, ns)

    def _show_rest(self, run: _Run, stream: Stream) -> None:
        """Show what is held back of a line, since nothing may follow for long, or ever."""
        line = run.lines[stream]
        if line.seen > line.start:
            self._finish_line(run, stream, b"", line.ns)
        line.start = line.seen
        line.after_return = line.cut = False

    def _cut(self, run: _Run, stream: Stream, data: bytes) -> None:
        line = run.lines[stream]
        path = f"{self._segment}/{self._path(run, stream)}"
        self._add(firewheel_log.output_lines(line.ns, run.origin, stream, data), self._log_text)
        self._say(firewheel_log.cut_line(line.ns, run.origin, stream, line.start, path))
        self._add(firewheel_log.cut_row(line.ns, run.origin, stream, data, path), self._json_text)
        line.cut = True

    def _show(self, run: _Run, stream: Stream, data: bytes, ns: int) -> None:
        if data:
            self._add(firewheel_log.output_lines(ns, run.origin, stream, data), self._log_text)
            self._add(firewheel_log.json_rows(ns, run.origin, stream, data), self._json_text)

    def _say(self, lines: bytes) -> None:
        self._add(lines, self._log_text)

    def _add(self, text: bytes, to: list[bytes]) -> None:
        to.append(text)
        self._text_size += len(text)

    def _path(self, run: _Run, stream: Stream) -> str:
        return f"{run.path}/{stream.filename}"

    def _read(self, run: _Run, stream: Stream, offset: int, length: int) -> bytes:
        assert self._open is not None
        return self._raw.read(self._open.directory, self._path(run, stream), offset, length)
