"""What lives here: looking for what grows or stays behind: memory, descriptors, processes, zombies, files.

Of our processes it knows only how to tell one from another; nothing of what they do.
"""

from __future__ import annotations

import ctypes
import os
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Optional

_PR_SET_CHILD_SUBREAPER = 36

# In a run's directory once it is over.
RUN_FILES = {
    *("run.json", "lock", "started", "stdout", "stderr", "index", "exit.json"),
    *("closed", "notes", "pruned", "gaps", "files.json", "files"),
}
STATE_FILES = {"lock", "spool.json", "zero.json", "configured", "open", "runs"}
RUNTIME_FILES = {"lock", "kick", "control"}


class Process(NamedTuple):
    pid: int
    ppid: int
    state: str
    ticks: int
    comm: str
    command: bytes


def processes() -> dict[int, Process]:
    """Every process of this machine."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            head, _, rest = (entry / "stat").read_text(errors="replace").rpartition(")")
            fields = rest.split()
            found[int(entry.name)] = Process(
                int(entry.name),
                int(fields[1]),
                fields[0],
                int(fields[19]),
                head.partition("(")[2],
                (entry / "cmdline").read_bytes(),
            )
    return found


def below(pid: int, every: Mapping[int, Process]) -> list[Process]:
    """All that descends from a process, which must be a subreaper to be sure of it."""
    children: dict[int, list[Process]] = {}
    for process in every.values():
        children.setdefault(process.ppid, []).append(process)
    found, look = [], [pid]
    while look:
        for process in children.get(look.pop(), ()):
            found.append(process)
            look.append(process.pid)
    return found


def become_subreaper() -> None:
    """Whatever loses its parent below us becomes our child: nothing can hide, and it is ours to reap, as init's."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class Init:
    """Reaps orphans as init does; those of our own children that somebody waits for are left to him."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, int]] = set()

    def reap(self) -> None:
        """To be called now and then: what is dead at two calls on end nobody waits for."""
        dead = {(p.pid, p.ticks) for p in processes().values() if p.ppid == os.getpid() and p.state == "Z"}
        for pid, _ in dead & self._seen:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        self._seen = dead


def memory(pid: int) -> tuple[int, int]:
    """(PSS, RSS) in bytes. OSError when there is no such process."""
    pss = rss = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            pss = int(line.split()[1]) * 1024
        elif line.startswith("Rss:"):
            rss = int(line.split()[1]) * 1024
    return pss, rss


def descriptors(pid: int) -> list[str]:
    """What each descriptor of a process is, by kind."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


class Sample(NamedTuple):
    at: float
    pss: int
    rss: int
    fds: int


@dataclass
class Life:
    """One process from its first sample to its last."""

    role: str
    pid: int
    samples: list[Sample] = field(default_factory=list)

    @property
    def minutes(self) -> float:
        return (self.samples[-1].at - self.samples[0].at) / 60

    def fifths(self) -> tuple[Sample, Sample]:
        """Medians of the second and the last fifth."""
        size = len(self.samples) // 5
        parts = self.samples[size : 2 * size], self.samples[-size:]
        first, last = (Sample(*(statistics.median(column) for column in zip(*part))) for part in parts)
        return first, last


class Sampler:
    """Keeps what was seen of each process."""

    def __init__(self) -> None:
        self.lives: dict[tuple[str, int, int], Life] = {}
        self.shims: list[int] = []
        self.zombies: dict[tuple[int, int], tuple[float, str]] = {}
        self.stale: set[str] = set()

    def take(self, roles: Mapping[str, Optional[int]]) -> None:
        now = time.monotonic()
        every = processes()
        for role, pid in roles.items():
            process = every.get(pid or 0)
            if process is None or process.state == "Z":
                continue
            with suppress(OSError):
                pss, rss = memory(process.pid)
                life = self.lives.setdefault((role, process.pid, process.ticks), Life(role, process.pid))
                life.samples.append(Sample(now, pss, rss, len(os.listdir(f"/proc/{process.pid}/fd"))))
        ours = below(os.getpid(), every)
        self.shims.append(sum(process.comm == "vmr-shim" for process in ours))
        self.note_zombies(ours, now)

    def note_zombies(self, ours: Iterable[Process], now: float) -> None:
        """What stays dead for long is said: a parent that is stopped may take its time to come to it."""
        # Our own are orphans that Init has yet to reap.
        dead = {(p.pid, p.ticks): p for p in ours if p.state == "Z" and p.ppid != os.getpid()}
        for key in set(self.zombies) - set(dead):
            del self.zombies[key]
        for key, process in dead.items():
            since, _ = self.zombies.setdefault(key, (now, process.comm))
            if now - since > 25:
                self.stale.add(f"zombie {process.comm} ({process.pid}) below {process.ppid}")

    def longest(self, role: str) -> Optional[Life]:
        lives = [life for life in self.lives.values() if life.role == role]
        return max(lives, key=lambda life: len(life.samples), default=None)


def strays(state: Path, runtime: Path) -> Iterator[str]:
    """Files that nobody needs any more when every run is over and the host has all of it."""
    for name in sorted(os.listdir(state)):
        if name not in STATE_FILES and name != "lost+found":
            yield f"{state / name}"
    yield from (f"{state / 'open' / name}" for name in sorted(os.listdir(state / "open")))
    for run in state.glob("runs/*/*/*"):
        if run.name.isdecimal():
            yield from (f"{run / name}" for name in os.listdir(run) if name not in RUN_FILES)
        elif run.name != "gone":
            yield f"{run}"
    yield from (f"{runtime / name}" for name in os.listdir(runtime) if name not in RUNTIME_FILES)


_LOG_FILES = re.compile(r"\.[^/]+\.(?:lock|rendered)|\.start")


def log_strays(logs: Path, vms: Iterable[str]) -> Iterator[str]:
    """The same in the log directory."""
    known = {name for vm in vms for name in (vm, f"{vm}.log", f"{vm}.json")}
    for name in sorted(os.listdir(logs)):
        if name not in known and not _LOG_FILES.fullmatch(name):
            yield f"{logs / name}"
    for vm in vms:
        for name in os.listdir(logs / vm):
            if name.startswith(".") and name not in {".journal", ".checkpoint"}:
                yield f"{logs / vm / name}"
        for run in (logs / vm).glob("*/*/*"):
            names = set(os.listdir(run))
            yield from (f"{run / name}" for name in sorted(names - {"stdout", "stderr", "result.json"}))
