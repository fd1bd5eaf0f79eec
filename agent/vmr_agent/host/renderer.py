"""What lives here: the renderer, a process of its own beside each collector, in which all VMs' logs are written.

Its own, since in the collector the interpreter's lock would delay Acks. It ends when its collector has ended and
all is rendered; killed and started again, it goes on where the logs' notes say.
It must not know: sockets, sessions, what a journal or a log holds.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Optional

from vmr_agent.host.journal import SYNCFS_FROM, find_syncfs
from vmr_agent.host.vmlogs import RawFiles, VmLogs

NOTE_EVERY = 1.0
"""Seconds between notes of how far the logs are, and between tries of what failed; where a note takes longer than
NOTE_SHARE of it, as with a thousand VMs, so much longer, up to MOST_NOTE: what was not noted is rendered again."""
NOTE_SHARE = 0.05
MOST_NOTE = 10.0
GIVE_UP = 60.0
"""Seconds the logs may stay unwritable once the collector has gone; the next renderer goes on from the note."""
REST = 3.0
"""Where more came while a turn was rendered, or many VMs had something, the pause before the next, by what that one
took: the collector, on which the guests wait, needs the core, and much rendered together costs less."""
MOST_REST = 0.25
"""Seconds; the longest such pause."""
MANY = 50
"""VMs in a turn. Of so many some have always more to show, and one turn for all of it costs less than many."""
PIPE_FULL = 2_048
"""So much unread means that the pipe may have been full: the smallest holds a page."""


class Renderer:
    """All VMs of one collector, each in its turn."""

    def __init__(self, log_dir: Path, vms: Sequence[str]) -> None:
        self._root = os.open(log_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._vms = list(vms)
        raw = RawFiles()
        self._logs = {vm: VmLogs(self._root, vm, raw) for vm in vms}
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
            began, many = time.monotonic(), len(turn) >= MANY
            turn = {vm for vm in sorted(turn) if self._step(self._logs[vm])}
            now = time.monotonic()
            if give_up is None and (many or select.select([wakes], [], [], 0)[0]):
                time.sleep(min(REST * (now - began), MOST_REST))
                now = time.monotonic()
            if now >= due and (self._changed or self._waiting):
                self._note()
                took = time.monotonic() - now
                due = now + (
                    NOTE_EVERY if self._waiting else min(max(NOTE_EVERY, took / NOTE_SHARE), MOST_NOTE)
                )
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
        for logs in self._logs.values():
            logs.reset()
        os.close(self._root)

    def _named(self, data: bytes) -> set[str]:
        """The VMs that a wake names; all for an empty line, the end, and so much that some may have been lost."""
        words = data.split(b"\n")
        if len(data) >= PIPE_FULL or b"" in words[:-1] or words[-1] or not data:
            return set(self._vms)
        return {self._vms[int(word)] for word in words[:-1]}

    def _step(self, logs: VmLogs) -> bool:
        more = False
        try:
            more = logs.step()
            self._report(logs.vm, logs.trouble)
        except Exception as error:  # whatever one VM's files hold, the others' logs go on
            self._report(logs.vm, error)
            logs.reset()
        for names, holds in ((self._changed, logs.changed), (self._waiting, logs.waiting)):
            if holds:
                names.add(logs.vm)
            else:
                names.discard(logs.vm)
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
        due = [self._logs[vm] for vm in sorted(self._changed - self._waiting)]
        syncfs = self._syncfs if len(due) >= SYNCFS_FROM else None
        try:
            if syncfs is not None:
                syncfs(self._root)
            else:
                for logs in due:
                    logs.sync_logs()
        except (
            OSError
        ) as error:  # whichever: file systems that take space late say only here that there is none
            self._doubt(due, error)
            return
        try:
            for logs in due:
                logs.write_note(sync=syncfs is None)
            if syncfs is not None:
                syncfs(self._root)
            for logs in due:
                logs.commit_note()
                self._changed.discard(logs.vm)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # for the note, which will be another file
                self._report("all VMs", error)
            else:
                self._doubt(due, error)
        else:
            self._report("all VMs", None)

    def _doubt(self, due: Iterable[VmLogs], error: OSError) -> None:
        """The kernel calls clean what it failed to write: from the last note on it is to be written anew."""
        self._report("all VMs", error)
        for logs in due:
            logs.reset()
            self._waiting.add(logs.vm)


class RendererProcess:
    """The collector's end of it."""

    def __init__(self, log_dir: Path, vms: Iterable[str]) -> None:
        self._log_dir = log_dir.absolute()
        self._numbers = {vm: number for number, vm in enumerate(vms)}
        self._start()

    def _start(self) -> None:
        # Where this package lies is not always on the path of a new interpreter.
        package = os.fspath(Path(__file__).resolve().parent.parent.parent)
        path = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, os.fspath(self._log_dir), *self._numbers],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(each) for each in path)},
            # With -m the first place that modules come from is the working directory, and whoever can write to ours
            # would write our code; it also may be what somebody wants to unmount.
            cwd="/",
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def restart(self) -> None:
        """Begin again where the last note says; for one that has died. OSError where that can't be; until it can,
        there is none."""
        self._let_go()
        self._process.wait()
        self._start()

    def wake(self, vms: Iterable[str] = ()) -> None:
        """There are new marks in the journals of these VMs, or of any. Never blocks.

        A full pipe takes nothing more; its reader then looks at every VM, which makes up for what was lost. So does
        a process that is started where there is none now.
        """
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            return
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
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()


def main(arguments: Sequence[str]) -> None:
    # It ends when its collector does, after the last line: a signal sent to both must not come before that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    Renderer(Path(arguments[0]), arguments[1:]).serve(sys.stdin.fileno())


if __name__ == "__main__":
    main(sys.argv[1:])
