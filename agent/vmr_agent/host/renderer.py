"""What lives here: the process that renders journals and raw files into ``<VM>.log`` and ``<VM>.json``.

A process of its own, since in the collector the interpreter's lock would delay Acks. What it writes depends on
journal and raw files alone, record by record, so after any end it cuts both logs back to the sizes it noted
and renders on: each line is there exactly once.
It must not know: sockets, sessions, how anything came to be stored.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
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
    SYNCFS_FROM,
    TIME,
    Kind,
    commit_temporary,
    find_syncfs,
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

CHECKPOINT_EVERY = 1.0
"""Seconds between notes of how far the logs are, and between tries of what failed."""
SLICE = 1 << 20
"""Bytes of text after which the next VM has its turn."""
OPEN_FILES = 256
GIVE_UP = 60.0
"""Seconds the logs may stay unwritable once the collector has gone; the next renderer goes on from the note."""
PIPE_FULL = 2_048
"""So much unread means that the pipe may have been full: the smallest holds a page."""
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
            "lost": self.lost,
            "exit": to_hex(self.exit) if self.exit else None,
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


class VmRenderer:
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
            note = self._read_note()
        except FileNotFoundError:
            # Logs that were there before stay, whatever happens from now on.
            self.sync_logs()
            self.write_note(sync=True)
            self.commit_note()
            return True
        except ValueError:
            raise self._bad_note() from None
        try:
            self._take_note(note)
        except (ValueError, KeyError, TypeError):
            raise self._bad_note() from None
        return True

    def _read_note(self) -> Any:
        return json.loads(read_file(self._root, self._note))

    def _bad_note(self) -> OSError:
        return OSError(errno.EINVAL, f"{self._note} is damaged; without it all is rendered once more")

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
        if self._render():
            return True
        if not self._superseded():
            return False
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
        if life is not None and life.number != self._life:
            # Perhaps the one we look for was renamed between listing and opening: it has its name by now.
            life.close()
            life = self._find_life()
        if life is None:
            return False
        self._open = life
        if life.number != self._life:
            self._life, self._at, self._durable = life.number, 0, 0
        return True

    def _find_life(self) -> Optional[_OpenLife]:
        best: Optional[_OpenLife] = None
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
            self._say(firewheel_log.gap_line(line.ns or run.message.started + self._skew, run.origin, message))
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


class Renderer:
    """All VMs of one collector, each in its turn."""

    def __init__(self, log_dir: Path, vms: Sequence[str]) -> None:
        self._root = os.open(log_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._vms = list(vms)
        raw = RawFiles()
        self._renderers = {vm: VmRenderer(self._root, vm, raw) for vm in vms}
        self._syncfs = find_syncfs()
        self._troubles: dict[str, str] = {}
        self._changed: set[str] = set()
        self._waiting: set[str] = set()

    def serve(self, wakes: int) -> None:
        """Until ``wakes`` is at its end and all is rendered. Sleeps while there is nothing to do."""
        turn = set(self._vms)
        due = time.monotonic()
        give_up: Optional[float] = None
        while True:
            turn = {vm for vm in sorted(turn) if self._step(self._renderers[vm])}
            now = time.monotonic()
            if now >= due and (self._changed or self._waiting):
                due = now + CHECKPOINT_EVERY
                self._note()
                turn |= self._waiting
            if give_up is not None:
                if not turn and (not self._waiting or now >= give_up):
                    self._note()
                    return
                time.sleep(0 if turn else max(0.0, due - now))
                turn |= self._waiting
                continue
            timeout: Optional[float] = None
            if turn:
                timeout = 0
            elif self._changed or self._waiting:
                timeout = max(0.0, due - now)
            if select.select([wakes], [], [], timeout)[0]:
                data = os.read(wakes, 1 << 16)
                if not data:
                    give_up = time.monotonic() + GIVE_UP
                turn |= self._named(data)

    def close(self) -> None:
        for renderer in self._renderers.values():
            renderer.reset()
        os.close(self._root)

    def _named(self, data: bytes) -> set[str]:
        """The VMs that a wake names; all for an empty line, the end, and so much that some may have been lost."""
        words = data.split(b"\n")
        if len(data) >= PIPE_FULL or b"" in words[:-1] or words[-1] or not data:
            return set(self._vms)
        return {self._vms[int(word)] for word in words[:-1]}

    def _step(self, renderer: VmRenderer) -> bool:
        more = False
        try:
            more = renderer.step()
            self._report(renderer.vm, renderer.trouble)
        except Exception as error:  # whatever one VM's files hold, the others' logs go on
            self._report(renderer.vm, error)
            renderer.reset()
        for names, holds in ((self._changed, renderer.changed), (self._waiting, renderer.waiting)):
            if holds:
                names.add(renderer.vm)
            else:
                names.discard(renderer.vm)
        return more

    def _report(self, vm: str, error: Optional[Exception]) -> None:
        """Once, not each second."""
        text = "" if error is None else f"cannot render the logs of {vm}: {error}; trying on"
        if text and self._troubles.get(vm) != text:
            with contextlib.suppress(OSError):
                print(f"vmr-host: {text}", file=sys.stderr, flush=True)
                if not isinstance(error, OSError):
                    traceback.print_exc()
        self._troubles[vm] = text

    def _note(self) -> None:
        """Write down how far the logs are, with few syncs for many VMs."""
        due = [self._renderers[vm] for vm in sorted(self._changed - self._waiting)]
        syncfs = self._syncfs if len(due) >= SYNCFS_FROM else None
        try:
            if syncfs is not None:
                syncfs(self._root)
            else:
                for renderer in due:
                    renderer.sync_logs()
            for renderer in due:
                renderer.write_note(sync=syncfs is None)
            if syncfs is not None:
                syncfs(self._root)
            for renderer in due:
                renderer.commit_note()
                self._changed.discard(renderer.vm)
        except OSError as error:
            self._report("all VMs", error)
        else:
            self._report("all VMs", None)


class RendererProcess:
    """The collector's end of it."""

    def __init__(self, log_dir: Path, vms: Iterable[str]) -> None:
        self._log_dir = log_dir
        self._numbers = {vm: number for number, vm in enumerate(vms)}
        self._start()

    def _start(self) -> None:
        # Where this package lies is not always on the path of a new interpreter.
        package = Path(__file__).resolve().parent.parent.parent
        path = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, os.fspath(self._log_dir), *self._numbers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        """Readable when the process has ended: it writes nothing to this pipe, but holds it."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def alive(self) -> bool:
        return self._process.poll() is None

    def restart(self) -> None:
        """Begin again where the last note says; for one that has died."""
        self._let_go()
        self._process.wait()
        self._start()

    def wake(self, vms: Iterable[str] = ()) -> None:
        """There are new marks in the journals of these VMs, or of any. Never blocks.

        A full pipe takes nothing more; its reader then looks at every VM, which makes up for what was lost.
        """
        assert self._process.stdin is not None
        words = b"".join(b"%d\n" % self._numbers[vm] for vm in vms) or b"\n"
        if len(words) > select.PIPE_BUF:
            words = b"\n"
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._process.stdin.fileno(), words)

    def close(self, timeout: float = 30.0) -> bool:
        """Let it render what is left and end. False when it needs longer than that; it goes on by itself."""
        self._let_go()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _let_go(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def main(arguments: Sequence[str]) -> None:
    # It ends when its collector does, after the last line: a signal sent to both must not come before that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    Renderer(Path(arguments[0]), arguments[1:]).serve(sys.stdin.fileno())


if __name__ == "__main__":
    main(sys.argv[1:])
