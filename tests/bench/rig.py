"""What lives here: a guest and a host as real processes on a real disk, ready to be measured, and how to look at them.

It must not know: what is measured. What it sees it sees from outside: files, sockets, /proc.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

from tests.e2e.world import World, until
from tests.faults import leaks

HERE = Path(__file__).resolve().parent
MIB = 1 << 20


class Row(NamedTuple):
    """One line of the table. ``goal`` is about the ratio to the limit where there is one, else about ours."""

    what: str
    ours: float
    unit: str
    against: str = ""
    limit: Optional[float] = None
    goal: str = ""
    """As `≥ 0.8` or `≤ 10`; empty: none was set."""

    @property
    def ratio(self) -> Optional[float]:
        return self.ours / self.limit if self.limit else None

    @property
    def reached(self) -> Optional[bool]:
        if not self.goal:
            return None
        sense, value = self.goal.split()
        measured = self.ratio if self.ratio is not None else self.ours
        return measured >= float(value) if sense == "≥" else measured <= float(value)


@dataclass
class Bench:
    """How much of it there is to do, and where."""

    work: Path
    rounds: int = 5
    quick: bool = False
    vm: bool = False

    def size(self, whole: int, quick: int) -> int:
        """A size or a count, much smaller where only the benchmark itself is tried."""
        return quick if self.quick else whole

    def say(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def place(self) -> Iterator[Path]:
        """A directory of its own on the disk that is measured."""
        path = Path(tempfile.mkdtemp(prefix="bench-", dir=self.work))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def rig(self, **options: Any) -> Iterator[Rig]:
        """A guest and a host: configured, in session, with nothing to do."""
        with self.place() as path:
            rig = Rig(path, **options)
            try:
                rig.ready()
                yield rig
            finally:
                rig.close()

    def payload(self, size: int) -> Path:
        """A file of lines, each another, 100 bytes long; made once, and in the page cache."""
        path = self.work / f"lines-{size}"
        if not path.exists():
            with path.open("wb") as file:
                number = 0
                while file.tell() < size:
                    block = b"".join(
                        b"%015d and so on, as lines of a program that does its work and says so do, to their end.\n"
                        % (number + each)
                        for each in range(10_000)
                    )
                    file.write(block[: size - file.tell()])
                    number += 10_000
        with path.open("rb") as file:
            while file.read(MIB):
                pass
        return path


class Rig(World):
    """A world to be measured."""

    def __init__(
        self, path: Path, *, unsynced: bool = False, settings: Optional[Mapping[str, str]] = None
    ) -> None:
        self.unsynced = unsynced
        # No limit: a flood is to be limited by what it goes through.
        super().__init__(path, settings={"spool_limit": "1T", **(settings or {})})

    @property
    def environment(self) -> dict[str, str]:
        environment = super().environment
        if self.unsynced:
            environment["PYTHONPATH"] = f"{HERE / 'unsynced'}:{environment['PYTHONPATH']}"
        return environment

    def ready(self) -> None:
        self.stage("-9/first", ":")  # a VM with nothing staged is never configured
        # As service managers have them: what shares a session shares one share of the processor (sched(7), autogroup).
        self.start_collector(before=in_session(0))
        self.start_daemon(before=in_session(_nice_of_the_unit()))
        self.wait_ready()

    def wait_ready(self) -> None:
        def ready() -> bool:
            try:
                status = self.ask("status")
            except Exception:
                return False
            return bool(status["session"] and status["configured"])

        until(ready, f"it is ready\n{self.tail()}")

    # --- runs that wait for their start ---

    def gated(self, vmr: str, command: str, files: Optional[Mapping[str, Any]] = None) -> Gate:
        """A VMR whose script has begun and waits until it is let go, so that no start is measured with it."""
        directory = self.stage(vmr, f"read -r word <gate\n{command}", files=files, commit=False)
        os.mkfifo(directory / "gate")
        (directory / "call_arguments.sh").chmod(0o777)
        until(lambda: self.row(vmr).get("state") == "running", f"{vmr} runs")
        return Gate(directory / "gate")

    def delivered(self, vmr: str, attempt: int = 1, limit: float = 600.0) -> None:
        """Until the guest has heard that all of a run is durable on the host, which is when its link is gone."""
        end = f"/runs/{vmr}/{attempt}"
        deadline = time.monotonic() + limit
        while any(link.endswith(end) for link in self._links()):
            if time.monotonic() > deadline:
                raise AssertionError(f"{vmr} is not delivered\n{self.tail()}")
            time.sleep(0.002)

    def _links(self) -> Iterator[str]:
        for name in os.listdir(self.spool / "open"):
            with contextlib.suppress(FileNotFoundError):
                yield os.readlink(self.spool / "open" / name)

    def host_row(self, vmr: str, attempt: int = 1) -> Mapping[str, Any]:
        return self.result(vmr, attempt) or {}

    # --- processes ---

    def pids(self) -> dict[str, int]:
        """Of what lives long: daemon, fork server, collector, renderer."""
        every = leaks.processes()
        assert self.daemon is not None and self.collector is not None

        def child(parent: int, word: bytes) -> int:
            return next(
                p.pid
                for p in every.values()
                if p.ppid == parent and word in p.command and p.comm != "vmr-shim"
            )

        return {
            "daemon": self.daemon.pid,
            "fork server": child(self.daemon.pid, b"forkserver"),
            "collector": self.collector.pid,
            "renderer": child(self.collector.pid, b"host.renderer"),
        }

    def shims(self) -> list[int]:
        runs = os.fsencode(self.spool / "runs")
        found = []
        for process in leaks.processes().values():
            if process.comm == "vmr-shim":
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{process.pid}/cwd".encode()).startswith(runs):
                        found.append(process.pid)
        return found


class Gate(NamedTuple):
    """Where a script waits."""

    path: Path

    def open(self) -> float:
        """Let it go. The time of it, on the monotonic clock."""
        fd = os.open(self.path, os.O_WRONLY)
        began = time.monotonic()
        os.write(fd, b"go\n")
        os.close(fd)
        return began


# --- looking at processes ---


def cpu_s(*pids: int) -> float:
    """Seconds on a CPU so far, of all threads."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def wakeups(*pids: int) -> int:
    """How often they have gone to sleep so far, which is how often they were woken."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                for line in (task / "status").read_text().splitlines():
                    if line.startswith("voluntary_ctxt_switches"):
                        total += int(line.split()[1])
    return total


def pss(*pids: int) -> int:
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += leaks.memory(pid)[0]
    return total


# --- figures ---


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def interleaved(rounds: int, **measures: Callable[[], float]) -> dict[str, float]:
    """The median of each, measured in turns, so that what else the machine does hits all of them alike."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            found[name].append(measure())
    return {name: statistics.median(values) for name, values in found.items()}


def helper(name: str, *arguments: str, before: Sequence[str] = (), **options: Any) -> subprocess.Popen[bytes]:
    """One of the small programs here, as a process of its own; -S -E: nothing but the interpreter."""
    return subprocess.Popen([*before, sys.executable, "-S", "-E", str(HERE / name), *arguments], **options)


def in_session(nice: int) -> list[str]:
    """A command that executes what follows it in a session of its own, with this priority where it may have it."""
    script = f'echo {nice} 2>/dev/null >/proc/self/autogroup; exec "$@"'
    return ["setsid", "sh", "-c", script, "sh"]


def _nice_of_the_unit() -> int:
    unit = (HERE.parents[1] / "systemd" / "vmr-agent.service").read_text()
    return int(unit.partition("\nNice=")[2].split()[0])


def ready(process: subprocess.Popen[bytes]) -> bytes:
    """The one line such a program says when it is ready; its pipe must be unbuffered."""
    assert process.stdout is not None
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(process.stdout.fileno(), 1)
        if not piece:
            break
        line += piece
    return line


def said(process: subprocess.Popen[bytes]) -> Any:
    """What such a program says at its end: one JSON value."""
    out, _ = process.communicate(timeout=600)
    if process.returncode:
        raise AssertionError(f"{process.args} ended with {process.returncode}")
    return json.loads(out)
