"""A world whose daemon and collector are started again whenever they end, as systemd does. Knows no test."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Callable, Optional

from tests.e2e.world import World
from tests.faults.once import WITNESS
from tests.faults.steps import Plan

TALKER = """\
import os, sys, time
name, lines, every, pause = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
first = 0
while first < lines and not os.path.exists("enough"):
    for fd in (1, 2):
        text = b"".join(
            b"%s %d %07d and so on and on until the line is as long as lines are\\n" % (name.encode(), fd, number)
            for number in range(first, min(first + every, lines))
        )
        while text:
            text = text[os.write(fd, text):]
    first += every
    time.sleep(pause)
print(min(first, lines), file=open("lines", "w"))
"""
ENDLESS = 10**7


class Supervisor:
    """Starts one service again whenever it has ended."""

    def __init__(
        self,
        current: Callable[[], Optional[subprocess.Popen[bytes]]],
        start: Callable[[], object],
        delay: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._current, self._start, self._delay = current, start, delay
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.01):
            process = self._current()
            if process is None or process.poll() is not None:
                if self._stopped.wait(self._delay()):
                    return
                self._start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


class Supervised(World):
    """Two services, each with its supervisor."""

    def __init__(self, path: Path, *, collector_options: Sequence[str] = (), **options: object) -> None:
        super().__init__(path, **options)  # type: ignore[arg-type]
        self.printed: dict[str, Callable[[str], bytes]] = {}
        self.killed: set[str] = set()
        """VMRs whose shim was killed."""
        self.history: list[str] = []
        self.delays: Callable[[], float] = lambda: 0.0
        """Seconds until a service that ended is started again."""
        self.steps: Optional[Plan] = None
        """At which steps who is killed."""
        self._collector_options = tuple(collector_options)
        self._supervisors: list[Supervisor] = []

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, **(self.steps.environment if self.steps is not None else {})}

    def start(self) -> None:
        self.start_host()
        self.start_guest()

    def start_host(self) -> None:
        self.start_collector(*self._collector_options)
        self._keep(lambda: self.collector, lambda: self.start_collector(*self._collector_options))

    def start_guest(self) -> None:
        self.start_daemon()
        self._keep(lambda: self.daemon, self.start_daemon)

    def _keep(
        self, current: Callable[[], Optional[subprocess.Popen[bytes]]], start: Callable[[], object]
    ) -> None:
        self._supervisors.append(Supervisor(current, start, lambda: self.delays()))

    def close(self) -> None:
        for supervisor in self._supervisors:
            supervisor.stop()
        super().close()

    # --- scripts whose every byte is known

    def stage_talker(
        self, vmr: str, lines: int = ENDLESS, *, every: int = 100, pause: float = 0.0, end: str = ""
    ) -> None:
        """One that prints numbered lines on both streams, ``every`` lines of each in turn, until :meth:`enough`."""
        name = vmr.rpartition("/")[2]
        command = f"echo once >> {WITNESS}\n{sys.executable} talker.py {name} {lines} {every} {pause}\n{end}"
        where = self.stage(vmr, command, files={"talker.py": TALKER})

        def text(stream: str) -> bytes:
            fd = 1 if stream == "stdout" else 2
            told = where / "lines"
            if told.exists():
                return text_of(name, fd, int(told.read_text()))
            # A killed shim's talker dies of its pipe, and leaves no count: it had more to say than was captured.
            raw = self.logs / "Server" / vmr / "1" / stream
            captured = raw.stat().st_size // len(text_of(name, fd, 1)) if raw.exists() else 0
            return text_of(name, fd, min(lines, captured + 1))

        self.printed[vmr] = text

    def enough(self) -> None:
        """Talkers end."""
        for vmr in self.printed:
            (self.launch / vmr / "enough").touch()

    # --- kills

    def pid_of(self, victim: str) -> Optional[int]:
        """A process of ours, by what it is; of the shims any one."""
        assert self.daemon is not None and self.collector is not None
        if victim == "daemon":
            return self.daemon.pid
        if victim == "collector":
            return self.collector.pid
        if victim == "renderer":
            return child(self.collector.pid, b"vmr_agent.host.renderer")
        if victim == "forkserver":
            return child(self.daemon.pid, b"forkserver")
        return next(iter(self.shims()), None)

    def kill(self, victim: str, rng: random.Random) -> bool:
        """SIGKILL to one of what runs; False when there is none of it just now."""
        if victim == "shim":
            shims = self.shims()
            if not shims:
                return False
            pid = rng.choice(sorted(shims))
            self.killed.add(shims[pid])
            self.history.append(f"shim of {shims[pid]}")
        else:
            found = self.pid_of(victim)
            if found is None:
                return False
            pid = found
            self.history.append(victim)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True


def text_of(name: str, fd: int, lines: int) -> bytes:
    line = b"%s %d %07d and so on and on until the line is as long as lines are\n"
    return b"".join(line % (name.encode(), fd, number) for number in range(lines))


def child(parent: int, word: bytes) -> Optional[int]:
    """The child process whose command line holds a word; no shim, which falls to the daemon as an orphan."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) != parent or (process / "comm").read_text() == "vmr-shim\n":
                continue
            if word in (process / "cmdline").read_bytes():
                return int(process.name)
        except OSError:
            continue
    return None
