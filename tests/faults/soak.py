"""Hours of ordinary work while something is killed, cut, stopped or full every few seconds; then: is all of it there,
and has anything grown or stayed behind?

python -m tests.faults.soak --minutes 60 --runs 10000 --seed 1

Two VM-shaped guests, each with its own directories and a file system of its own for the spool (as root), and one
host. VMRs of a dozen kinds are staged, run again by each of the verbs, removed, staged anew. The first part of the
time everything of ours is killed now and then; in the rest daemons, fork servers, collector and renderer live, so
that their growth can be seen. The seed decides what is staged, run and broken next; when, the machine has its say.

One module, over the usual length: the load, the faults and what is checked share one world.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import heapq
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional

from tests.e2e.relay import Relay
from tests.e2e.world import AGENT, World, until
from tests.faults import leaks
from tests.faults.soak_load import VERB_KINDS, Expected, Program, program

VMS = ("Alpha", "Beta")
START_TIMES = ("-100000", "-7", "-1", "1", "2.5")
NAMES = 120  # VMRs of one VM at a time: the runs grow in number, what is staged does not
AT_ONCE = 8  # runs of one VM
SAMPLE = 30.0  # s
STUCK = 240.0  # s; a run that is not whole on the host by then is given up, and said
DISK = 4 << 30
LATE = 45.0  # s; what was asked of a host that didn't answer has been done by then, or won't be
GROWTH = 0.10, 1 << 20  # of a process's memory: more than both is growth
ENOUGH, GROWN_UP = 15, 5.0  # samples, minutes of a life; with less nothing is said of its growth
PER_RUN = 512  # bytes; the collector keeps each run's name to answer for it, and may grow by that
END = re.compile(rb"(?:exited after [0-9.]+ seconds with|could not start:|lost:) ")
LINE = re.compile(rb"^\[.{23} INFO\] (\S+ \(\d+\)) (stdout|stderr): (b['\"].*)$")


def ask(path: Path, verb: str, limit: float = 20.0, **args: Any) -> Optional[dict[str, Any]]:
    """Ask a daemon or a collector, by its socket. None when nobody answers."""
    with contextlib.suppress(OSError, ValueError), socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(limit)
        sock.connect(os.fspath(path))
        sock.sendall(json.dumps({"verb": verb, **args}).encode() + b"\n")
        said = b""
        while True:
            line, newline, said = said.partition(b"\n")
            row: dict[str, Any] = json.loads(line) if newline else {}
            if "ok" in row:  # else it is something said unasked
                return row
            if not newline:
                data = sock.recv(1 << 20)
                if not data:
                    return None
                said = line + data
    return None


@dataclass
class Attempt:
    """One run that must be, and what became of it."""

    number: int
    program: Program
    how: str
    since: float
    pid: int = 0
    state: str = ""
    gaps: Counter[str] = field(default_factory=Counter)
    """Bytes of each stream that are missing."""


@dataclass
class Slot:
    """One VMR name: absent, or staged, and its attempts so far."""

    vmr: str
    state: str = "absent"  # absent running done going limbo stuck
    program: Optional[Program] = None
    attempts: dict[int, Attempt] = field(default_factory=dict)
    since: float = 0.0
    edited: bool = False
    """Its removal was seen by nobody: staged anew it counts as edited, and doesn't start by itself."""

    @property
    def latest(self) -> int:
        return max(self.attempts, default=0)


class Vm:
    """One guest: its world, its channel, its disk."""

    def __init__(self, site: Site, name: str, path: Path) -> None:
        path.mkdir()
        self.name = name
        self.world = World(path)
        self.listening = self.world.sockets / "host"
        self.relay = Relay(self.world.port, self.listening)
        self.witness = path / "witness"
        self.witness.mkdir()
        self.disk: Optional[Path] = None
        self._site = site
        if site.own_disks and os.geteuid() == 0:
            self._make_disk(path)

    def _make_disk(self, path: Path) -> None:
        image, mount = path / "disk.img", path / "disk"
        with image.open("wb") as file:
            file.truncate(DISK)
        mount.mkdir()
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        if subprocess.run(["mount", "-o", "loop", image, mount], capture_output=True).returncode == 0:
            self.disk = mount
            self.world.spool = mount / "state"

    def start(self) -> None:
        self.world.start_daemon()

    def ask(self, verb: str, **args: Any) -> Optional[dict[str, Any]]:
        return ask(self.world.runtime / "control", verb, **args)

    @property
    def pid(self) -> Optional[int]:
        daemon = self.world.daemon
        return daemon.pid if daemon is not None and daemon.poll() is None else None

    def stage(self, slot: Slot) -> None:
        assert slot.program is not None
        command = f'echo "$VMR_ATTEMPT" >>{self.witness}/{slot.vmr.replace("/", "_")}\n'
        command += f'TAG="$VMR_NAME.$VMR_ATTEMPT"\n{slot.program.command}'
        directory = self.world.stage(slot.vmr, command, commit=False)
        script = directory / "call_arguments.sh"
        if slot.program.interpreter != "/bin/bash":
            script.write_text(script.read_text().replace("/bin/bash", slot.program.interpreter, 1))
        script.chmod(0o777)

    def remove(self, slot: Slot) -> None:
        shutil.rmtree(self.world.launch / slot.vmr)

    def seen_gone(self, slot: Slot) -> bool:
        path = self.world.spool / "runs" / slot.vmr / "gone"
        with contextlib.suppress(OSError, ValueError):
            return bool(json.loads(path.read_bytes())["after_attempt"] == slot.latest)
        return False

    def begun(self, slot: Slot, number: int) -> bool:
        return (self.world.spool / "runs" / slot.vmr / str(number)).is_dir()

    def close(self) -> None:
        self.world.close()
        self.relay.close()
        if self.disk is not None:
            subprocess.run(["umount", "--lazy", self.disk], check=False)


class Site:
    """Both guests and the host, and what is found out about them."""

    def __init__(self, work: Path, *, own_disks: bool = True) -> None:
        self.work = work
        self.own_disks = own_disks
        self.logs = work / "logs"
        self.tmp = work / "tmp"
        self.tmp.mkdir()
        self.vms = [Vm(self, name, work / name) for name in VMS]
        self.control = self.vms[0].world.sockets / "control"
        self.collector: Optional[subprocess.Popen[bytes]] = None
        self.findings: list[str] = []
        self.lost_shims: set[tuple[str, str, int]] = set()
        """Runs whose shim was killed: (VM, VMR, attempt)."""
        os.environ["TMPDIR"] = str(self.tmp)

    def find(self, what: str) -> None:
        self.findings.append(what)
        print(f"FOUND {what}", flush=True)

    def start_collector(self) -> None:
        sources = [part for vm in self.vms for part in ("--listen", f"{vm.name}={vm.listening}")]
        with (self.work / "collector.log").open("ab") as log:
            self.collector = subprocess.Popen(
                [
                    *(sys.executable, "-m", "vmr_agent.cli.host", "collect", "--log-dir", str(self.logs)),
                    *("--control", str(self.control), "--expect", "2", "--start-buffer", "0", *sources),
                ],
                env={**os.environ, "PYTHONPATH": str(AGENT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def roles(self) -> dict[str, Optional[int]]:
        """The pids of what of ours lives long."""
        every = leaks.processes()

        def child(parent: Optional[int], word: bytes) -> Optional[int]:
            for process in every.values():
                if process.ppid == parent and word in process.command and process.comm != "vmr-shim":
                    return process.pid
            return None

        collector = self.collector.pid if self.collector and self.collector.poll() is None else None
        found: dict[str, Optional[int]] = {"collector": collector}
        found["renderer"] = child(collector, b"vmr_agent.host.renderer")
        for vm in self.vms:
            found[f"daemon {vm.name}"] = vm.pid
            found[f"fork server {vm.name}"] = child(vm.pid, b"forkserver")
        return found

    def row(self, vm: str, vmr: str, attempt: int) -> Optional[dict[str, Any]]:
        try:
            row: dict[str, Any] = json.loads(
                (self.logs / vm / vmr / str(attempt) / "result.json").read_bytes()
            )
        except FileNotFoundError:
            return None
        return row

    def raw(self, vm: str, vmr: str, attempt: int, stream: str) -> bytes:
        try:
            return (self.logs / vm / vmr / str(attempt) / stream).read_bytes()
        except FileNotFoundError:
            return b""

    def shown(self, vm: str, vmr: str, attempt: Attempt, stream: str) -> bytes:
        """What the logs have to show of it: all but a gap, which is at the end."""
        data = self.raw(vm, vmr, attempt.number, stream)
        return data[: len(data) - attempt.gaps.get(stream, 0)]

    def close(self) -> None:
        if self.collector is not None and self.collector.poll() is None:
            self.collector.terminate()
            try:
                self.collector.wait(60)
            except subprocess.TimeoutExpired:
                self.collector.kill()
                self.collector.wait()
        for vm in self.vms:
            vm.close()


class Driver(threading.Thread):
    """Stages, runs and removes the VMRs of one VM, and looks at each run as soon as the host has it whole."""

    def __init__(self, site: Site, vm: Vm, rng: random.Random, allowed: Callable[[], int]) -> None:
        super().__init__(name=f"driver of {vm.name}", daemon=True)
        self.site, self.vm, self.rng, self.allowed = site, vm, rng, allowed
        self.slots = [Slot(f"{rng.choice(START_TIMES)}/q{number:03}") for number in range(NAMES)]
        self.issued = 0
        self.whole = 0
        self.bytes = 0
        self.kinds: Counter[str] = Counter()
        self.ways: Counter[str] = Counter()
        self.states: Counter[str] = Counter()
        self.draining = threading.Event()
        self._going_due = 0.0

    # --- the loop ---

    def run(self) -> None:
        try:
            while not (self.draining.is_set() and self.idle()):
                self._turn()
                time.sleep(0.05)
        except BaseException:
            self.site.find(f"the driver of {self.vm.name} failed:\n{traceback.format_exc()}")

    def idle(self) -> bool:
        return not any(slot.state in ("running", "going", "limbo") for slot in self.slots)

    def _in(self, *states: str) -> list[Slot]:
        return [slot for slot in self.slots if slot.state in states]

    def _turn(self) -> None:
        for slot in self._in("running"):
            self._look(slot)
        for slot in self._in("limbo"):
            self._resolve(slot)
        self._look_for_gone()
        while (
            not self.draining.is_set()
            and self.issued < self.allowed()
            and len(self._in("running", "limbo")) < AT_ONCE
        ):
            self._issue()

    def _issue(self) -> None:
        """Stage a VMR, or run one again, or remove one."""
        absent, done = self._in("absent"), self._in("done")
        draw = self.rng.random()
        if absent and (draw < 0.4 or not done):
            slot = self.rng.choice(absent)
            self._stage(slot)
        elif done and draw < 0.5:
            slot = self.rng.choice(done)
            self.vm.remove(slot)
            slot.state, slot.since = "going", time.monotonic()
        elif done:
            self._rerun(self.rng.choice(done))
        else:
            self.draining.wait(0.1)

    def _begin(self, slot: Slot, how: str) -> None:
        assert slot.program is not None
        number = slot.latest + 1
        slot.attempts[number] = Attempt(number, slot.program, how, time.monotonic())
        slot.state, slot.since = "running", time.monotonic()
        self.issued += 1
        self.kinds[slot.program.kind] += 1
        self.ways[how] += 1

    def _stage(self, slot: Slot) -> None:
        slot.program = program(slot.vmr, self.rng)
        again = bool(slot.attempts)
        self.vm.stage(slot)
        if slot.edited:
            slot.edited = False
            self._rerun_by_guest(slot)
        else:
            self._begin(slot, "staged anew" if again else "staged")

    def _rerun(self, slot: Slot) -> None:
        assert slot.program is not None
        draw = self.rng.random()
        if draw < 0.06 and slot.program.kind in VERB_KINDS:
            self._rerun_by_command(slot)
        elif draw < 0.26:
            self._rerun_by_host(slot)
        else:
            self._rerun_by_guest(slot)

    def _rerun_by_guest(self, slot: Slot) -> None:
        """By the daemon's socket, with the same request until it answers: done once, however often it is asked."""
        request = self.rng.getrandbits(128).to_bytes(16, "big").hex()
        deadline = time.monotonic() + STUCK
        said = ""
        while time.monotonic() < deadline:
            answer = self.vm.ask("rerun", vmr=slot.vmr, request=request)
            if answer is not None and answer["ok"]:
                if answer["attempt"] <= slot.latest:
                    self.site.find(
                        f"{self.vm.name} {slot.vmr}: a rerun was attempt {answer['attempt']} again"
                    )
                for number in range(slot.latest + 1, answer["attempt"]):
                    # The host's, of which nobody heard: it came after all.
                    slot.attempts[number] = Attempt(number, slot.program, "host", time.monotonic())
                    self.ways["host, late"] += 1
                self._begin(slot, "verb in the guest")
                return
            said = answer["error"] if answer is not None else "nobody answers"
            time.sleep(0.1)
        slot.state = "stuck"
        self.site.find(f"{self.vm.name} {slot.vmr}: no rerun in {STUCK:.0f} s: {said}")

    def _rerun_by_host(self, slot: Slot) -> None:
        answer = ask(self.site.control, "rerun", 5.0, vm=self.vm.name, vmr=slot.vmr)
        if answer is not None and answer["ok"]:
            self._begin(slot, "verb of the host")
        elif answer is not None and "it may be done all the same" not in answer["error"]:
            pass  # offline; or no space, or held up otherwise: it stays as it is
        else:
            slot.state, slot.since = "limbo", time.monotonic()

    def _rerun_by_command(self, slot: Slot) -> None:
        try:
            done = self.vm.world.agent("rerun", slot.vmr, limit=STUCK)
        except subprocess.TimeoutExpired:
            self.site.find(f"{self.vm.name}: vmr-agent rerun {slot.vmr} doesn't end")
            slot.state = "stuck"
            return
        assert slot.program is not None
        expected = slot.program.expect(slot.latest + 1)
        if (done.returncode, done.stdout, done.stderr) == (0, expected.stdout, expected.stderr):
            self._begin(slot, "command")
        else:
            slot.state, slot.since = "limbo", time.monotonic()

    def _resolve(self, slot: Slot) -> None:
        """Asked for, and not heard whether it was done."""
        if self.vm.begun(slot, slot.latest + 1):
            self._begin(slot, "not heard of")
        elif time.monotonic() > slot.since + LATE:
            slot.state = "done"

    def _look_for_gone(self) -> None:
        going = self._in("going")
        if not going or time.monotonic() < self._going_due:
            return
        self._going_due = time.monotonic() + 0.5
        answer = self.vm.ask("status")
        rows = {row["vmr"]: row for row in answer["vmrs"]} if answer is not None else None

        def unseen(slot: Slot, row: dict[str, Any]) -> bool:
            """Known for a run whose delivery this daemon has yet to hear of, and gone before it was started."""
            return not row["staged"] and time.monotonic() > slot.since + LATE

        for slot in going:
            if self.vm.seen_gone(slot):
                slot.state = "absent"
            elif rows is not None and (slot.vmr not in rows or unseen(slot, rows[slot.vmr])):
                slot.state, slot.edited = "absent", True
            elif time.monotonic() > slot.since + STUCK:
                slot.state = "stuck"
                self.site.find(f"{self.vm.name} {slot.vmr}: not seen gone in {STUCK:.0f} s")

    # --- one run that is over ---

    def _look(self, slot: Slot) -> None:
        for number in sorted(slot.attempts):
            attempt = slot.attempts[number]
            if attempt.state:
                continue
            row = self.site.row(self.vm.name, slot.vmr, number)
            if row is not None and row["closed"]:
                self._check(slot, attempt, row)
            elif time.monotonic() > attempt.since + STUCK:
                attempt.state = slot.state = "stuck"
                guest = next(
                    (
                        each
                        for each in (self.vm.ask("status") or {"vmrs": []})["vmrs"]
                        if each["vmr"] == slot.vmr
                    ),
                    None,
                )
                self.site.find(
                    f"{self.vm.name} {slot.vmr} attempt {number} ({attempt.program.kind}, {attempt.how}) is not "
                    f"whole after {STUCK:.0f} s: host {row}, guest {guest}"
                )
                return
        if all(attempt.state for attempt in slot.attempts.values()):
            slot.state = "done"

    def _check(self, slot: Slot, attempt: Attempt, row: dict[str, Any]) -> None:
        vm, vmr, number = self.vm.name, slot.vmr, attempt.number
        expected = attempt.program.expect(number)
        wounded = (vm, vmr, number) in self.site.lost_shims
        stdout = self.site.raw(vm, vmr, number, "stdout")
        stderr = self.site.raw(vm, vmr, number, "stderr")
        attempt.state, attempt.pid = row["state"], row["pid"]
        for gap in row["gaps"]:
            attempt.gaps[gap["stream"]] += gap["length"]
        self.whole += 1
        self.bytes += len(stdout) + len(stderr)
        self.states[row["state"]] += 1
        wrong = list(_wrong(expected, row, stdout, stderr, wounded))
        if wrong:
            self.site.find(
                f"{vm} {vmr} attempt {number} ({attempt.program.kind}, {attempt.how}"
                f"{', its shim was killed' if wounded else ''}): {'; '.join(wrong)}; {row}"
            )


def _wrong(
    expected: Expected, row: dict[str, Any], stdout: bytes, stderr: bytes, wounded: bool
) -> Iterator[str]:
    """What a run should be and isn't. One whose shim was killed may be lost, and end anywhere; what was killed may
    also have been the script's process, before it was let go."""
    ended = row["state"], row["exit_code"], row["signal"]
    allowed = [(expected.state, expected.exit_code, expected.signal)]
    if wounded:
        allowed += [("lost", None, None), ("killed", None, "SIGKILL")]
    if ended not in allowed:
        yield f"it ended {ended}, not {allowed[0]}"
    if row["state"] == "lost" and row["error"] != "its shim was killed":
        yield f"lost: {row['error']!r}"
    if row["gaps"] and not wounded:
        yield f"gaps: {row['gaps']}"
    for name, data, whole in (("stdout", stdout, expected.stdout), ("stderr", stderr, expected.stderr)):
        if len(data) != row[f"{name}_bytes"]:
            yield f"{name}_bytes is {row[f'{name}_bytes']}, the file has {len(data)}"
        held = len(data) - sum(gap["length"] for gap in row["gaps"] if gap["stream"] == name)
        # What a killed shim held for want of space is a gap, at the end.
        if not (data == whole or (wounded and whole.startswith(data[:held]) and not any(data[held:]))):
            yield f"{name} is {len(data)} bytes {data[:200]!r}, not {len(whole)} bytes {whole[:200]!r}"


class Faults:
    """Breaks something every few seconds, and mends it some seconds later."""

    def __init__(self, site: Site, rng: random.Random) -> None:
        self.site, self.rng = site, rng
        self.counts: Counter[str] = Counter()
        self._mends: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.down: set[str] = set()

    STORM = {
        "daemon": 4,
        "collector": 4,
        "renderer": 3,
        "fork server": 3,
        "shims": 2,
        "cut": 4,
        "stop collector": 2,
        "stop daemon": 2,
        "fill": 2,
        "all of it": 1,
    }
    LULL = {"shims": 2, "cut": 4, "stop collector": 2, "stop daemon": 2, "stop renderer": 1, "fill": 2}

    def strike(self, *, storm: bool) -> None:
        weights = self.STORM if storm else self.LULL
        (kind,) = self.rng.choices(list(weights), list(weights.values()))
        vm = self.rng.choice(self.site.vms)
        done = getattr(self, "_" + kind.replace(" ", "_"))(vm)
        if done is not False:
            self.counts[kind] += 1

    def mend(self, *, all_of_it: bool = False) -> None:
        """Put right what is due to be."""
        while self._mends and (all_of_it or self._mends[0][0] <= time.monotonic()):
            heapq.heappop(self._mends)[2]()

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._mends, (time.monotonic() + seconds, next(self._order), act))

    # --- kills ---

    def _daemon(self, vm: Vm) -> Optional[bool]:
        if vm.name in self.down or vm.pid is None:
            return False
        assert vm.world.daemon is not None
        vm.world.kill9(vm.world.daemon)
        self.down.add(vm.name)

        def again() -> None:
            vm.start()
            self.down.discard(vm.name)

        self._later(self.rng.choice((0.0, 0.1, 1.0, 3.0)), again)
        return None

    def _collector(self, vm: Vm) -> Optional[bool]:
        if "host" in self.down:
            return False
        assert self.site.collector is not None
        self.site.collector.kill()
        self.site.collector.wait()
        self.down.add("host")

        def again() -> None:
            self.site.start_collector()
            self.down.discard("host")

        self._later(self.rng.choice((0.0, 0.1, 1.0, 3.0)), again)
        return None

    def _kill(self, role: str) -> Optional[bool]:
        pid = self.site.roles().get(role)
        if pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return None

    def _renderer(self, vm: Vm) -> Optional[bool]:
        return self._kill("renderer")

    def _fork_server(self, vm: Vm) -> Optional[bool]:
        return self._kill(f"fork server {vm.name}")

    def _shims(self, vm: Vm) -> Optional[bool]:
        """One to three of them; their runs end with them, and this is known before it happens."""
        runs = os.fsencode(vm.world.spool / "runs") + b"/"
        found = []
        for process in leaks.processes().values():
            if process.comm == "vmr-shim":
                with contextlib.suppress(OSError):
                    directory = os.readlink(f"/proc/{process.pid}/cwd".encode())
                    if directory.startswith(runs):
                        start_time, name, attempt = os.fsdecode(directory[len(runs) :]).split("/")
                        found.append((process.pid, f"{start_time}/{name}", int(attempt)))
        found.sort(key=lambda each: each[1:])
        if not found:
            return False
        for pid, vmr, attempt in self.rng.sample(found, min(len(found), self.rng.choice((1, 1, 2, 3)))):
            self.site.lost_shims.add((vm.name, vmr, attempt))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return None

    def _all_of_it(self, vm: Vm) -> None:
        for each in self.site.vms:
            self._daemon(each)
        self._collector(vm)

    # --- the channel, the processes stopped, the disk ---

    def _cut(self, vm: Vm) -> None:
        for number in range(self.rng.choice((1, 1, 1, 3, 8))):
            self._later(number * self.rng.choice((0.05, 0.3)), vm.relay.cut)

    def _stop(self, role: str, seconds: float) -> Optional[bool]:
        pid = self.site.roles().get(role)
        if pid is None or f"stopped {pid}" in self.down:
            return False
        mark = f"stopped {pid}"
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        self.down.add(mark)

        def go_on() -> None:
            self.down.discard(mark)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

        self._later(seconds, go_on)
        return None

    def _stop_collector(self, vm: Vm) -> Optional[bool]:
        # The last is longer than a session lives in silence.
        return self._stop("collector", self.rng.choice((1.0, 3.0, 8.0, 18.0)))

    def _stop_renderer(self, vm: Vm) -> Optional[bool]:
        return self._stop("renderer", self.rng.choice((1.0, 5.0)))

    def _stop_daemon(self, vm: Vm) -> Optional[bool]:
        return self._stop(f"daemon {vm.name}", self.rng.choice((1.0, 3.0, 8.0, 18.0)))

    def _fill(self, vm: Vm) -> Optional[bool]:
        """The spool's file system is nearly full, or has nothing left at all, and is freed again."""
        if vm.disk is None or f"full {vm.name}" in self.down:
            return False
        ballast = vm.disk / "ballast"
        left = self.rng.choice((0, 256 << 10, 20 << 20))
        there = os.statvfs(vm.disk)
        fd = os.open(ballast, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            with contextlib.suppress(OSError):
                os.posix_fallocate(fd, 0, max(4096, there.f_bfree * there.f_frsize - left))
        finally:
            os.close(fd)
        self.down.add(f"full {vm.name}")

        def free() -> None:
            ballast.unlink(missing_ok=True)
            self.down.discard(f"full {vm.name}")

        self._later(self.rng.choice((2.0, 5.0, 10.0)), free)
        return None


class Soak:
    """One soak, from the first VMR staged to the last look."""

    def __init__(
        self, work: Path, *, seed: int, minutes: float, runs: int, storm: float = 0.4, own_disks: bool = True
    ) -> None:
        self.seed, self.minutes, self.runs, self.storm = seed, minutes, runs, storm
        self.site = Site(work, own_disks=own_disks)
        self.began = time.monotonic()
        self.drivers = [
            Driver(self.site, vm, random.Random(f"{seed} {vm.name}"), self._allowed) for vm in self.site.vms
        ]
        self.faults = Faults(self.site, random.Random(f"{seed} faults"))
        self.sampler = leaks.Sampler()
        self.init = leaks.Init()
        self.said: list[str] = []

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def _allowed(self) -> int:
        """How many runs of one VM may have been issued by now."""
        share = self.seconds / (self.minutes * 60 * 0.97)
        return int(min(1.0, share) * self.runs / len(VMS)) + AT_ONCE

    def run(self, pause: tuple[float, float] = (2.0, 6.0)) -> bool:
        """True when nothing was found."""
        leaks.become_subreaper()
        try:
            self._work(pause)
            self._end()
        finally:
            with contextlib.suppress(Exception):
                self.faults.mend(all_of_it=True)
            self.site.close()
        return not self.site.findings

    def _work(self, pause: tuple[float, float]) -> None:
        rng = random.Random(f"{self.seed} times")
        self.site.start_collector()
        for vm in self.site.vms:
            vm.start()
        self._wait_for_sessions()
        self.began = time.monotonic()
        for driver in self.drivers:
            driver.start()
        end = self.minutes * 60
        strike, sample, say, reap = rng.uniform(*pause), 0.0, 60.0, 0.0
        while self.seconds < end or (
            self.seconds < 1.5 * end and sum(driver.issued for driver in self.drivers) < self.runs
        ):
            if self.seconds >= strike:
                self.faults.strike(storm=self.seconds < self.storm * end)
                strike = self.seconds + rng.uniform(*pause)
            self.faults.mend()
            self._alive()
            if self.seconds >= sample:
                sample += min(SAMPLE, end / 20)
                self.sampler.take(self.site.roles())
            if self.seconds >= reap:
                reap = self.seconds + 2.0
                self.init.reap()
            if self.seconds >= say:
                say += 60
                self._say_state()
            time.sleep(0.05)

    def _alive(self) -> None:
        """What ended by itself is said, and started again, as systemd does."""
        for vm in self.site.vms:
            if vm.pid is None and not self._is_down(vm.name):
                assert vm.world.daemon is not None
                last = "\n".join(vm.world.daemon_log().splitlines()[-20:])
                self.site.find(f"the daemon of {vm.name} ended with {vm.world.daemon.returncode}:\n{last}")
                vm.start()
        collector = self.site.collector
        if collector is not None and collector.poll() is not None and not self._is_down("host"):
            last = "\n".join((self.site.work / "collector.log").read_text().splitlines()[-20:])
            self.site.find(f"the collector ended with {collector.returncode}:\n{last}")
            self.site.start_collector()

    def _is_down(self, name: str) -> bool:
        return name in self.faults.down

    def _say_state(self) -> None:
        issued = sum(driver.issued for driver in self.drivers)
        whole = sum(driver.whole for driver in self.drivers)
        memory = []
        for role, pid in self.site.roles().items():
            with contextlib.suppress(OSError):
                memory.append(f"{role} {leaks.memory(pid or 0)[0] >> 10:,} KiB")
        print(
            f"{self.seconds / 60:5.1f} min: {issued} runs begun, {whole} whole and checked, "
            f"{self.faults.counts.total()} faults, {len(self.site.findings)} findings; {', '.join(memory)}",
            flush=True,
        )

    # --- the end ---

    def _end(self) -> None:
        print("mended; waiting for what is under way", flush=True)
        self.faults.mend(all_of_it=True)
        for driver in self.drivers:
            driver.draining.set()
        deadline = time.monotonic() + STUCK + LATE
        while any(driver.is_alive() for driver in self.drivers) and time.monotonic() < deadline:
            if any(not (driver.is_alive() or driver.idle()) for driver in self.drivers):
                break  # it failed, and has said so
            self.init.reap()
            time.sleep(0.2)
        if not all(driver.idle() for driver in self.drivers):
            self.site.find("the drivers don't come to their end")
        self._check_attempts()
        self._check_logs()
        self._check_what_is_left()
        self._check_growth()
        self._check_fresh()

    def _check_attempts(self) -> None:
        """No run that nobody asked for, none that ran twice."""
        for driver in self.drivers:
            vm, known = driver.vm, 0
            for slot in driver.slots:
                known += len(slot.attempts)
                there = {path.name for path in (self.site.logs / vm.name / slot.vmr).glob("*")}
                if there != {str(number) for number in slot.attempts}:
                    self.site.find(
                        f"{vm.name} {slot.vmr}: attempts {sorted(there)}, not {sorted(slot.attempts)}"
                    )
                witness = vm.witness / slot.vmr.replace("/", "_")
                ran = Counter(witness.read_text().split()) if witness.exists() else Counter()
                for number, attempt in slot.attempts.items():
                    times = ran.pop(str(number), 0)
                    wounded = (vm.name, slot.vmr, number) in self.site.lost_shims
                    never = wounded or attempt.state in ("failed to start", "stuck")
                    if times > 1 or (times == 0 and not never):
                        self.site.find(f"{vm.name} {slot.vmr} attempt {number} ran {times} times")
                if ran:
                    self.site.find(f"{vm.name} {slot.vmr}: attempts {sorted(ran)} ran, of which nobody knows")
            results = sum(1 for _ in (self.site.logs / vm.name).glob("*/*/*/result.json"))
            if results != known:
                self.site.find(f"{vm.name}: {results} results of {known} runs")

    def _check_logs(self) -> None:
        for driver in self.drivers:
            self._check_log(driver)
            self._check_json(driver)

    def _check_log(self, driver: Driver) -> None:
        """<VM>.log: each byte of output once and in order, one beginning and one end for each run."""
        vm, path = driver.vm.name, self.site.logs / f"{driver.vm.name}.log"
        runs = [(slot.vmr, each) for slot in driver.slots for each in slot.attempts.values()]

        def rendered() -> bool:
            with path.open("rb") as file:
                return sum(1 for line in file if END.search(line) and b" INFO] b" not in line) >= len(runs)

        with contextlib.suppress(AssertionError):
            until(rendered, "all ends in the log", 120.0)
        shown: dict[bytes, Any] = {}
        counts: Counter[str] = Counter()
        with path.open("rb") as file:
            for line in file:
                found = LINE.match(line.rstrip(b"\n"))
                if found:
                    counts["output"] += 1
                    shown.setdefault(found[1] + b" " + found[2], hashlib.sha1()).update(
                        ast.literal_eval(found[3].decode())
                    )
                elif b"] CALL ARGS: " in line:
                    counts["begun"] += 1
                elif END.search(line):
                    counts["ended"] += 1
        if not counts["begun"] == counts["ended"] == len(runs):
            self.site.find(
                f"{vm}.log: {len(runs)} runs, {counts['begun']} beginnings, {counts['ended']} ends"
            )
        # Two attempts of one VMR may have had the same pid, in an hour of them: the later one's output comes later.
        there: dict[bytes, Any] = {}
        whose: dict[bytes, list[str]] = {}
        for vmr, attempt in sorted(runs, key=lambda run: run[1].number):
            for stream in ("stdout", "stderr"):
                data = self.site.shown(vm, vmr, attempt, stream)
                if data:
                    key = f"{vmr.partition('/')[2]} ({attempt.pid}) {stream}".encode()
                    there.setdefault(key, hashlib.sha1()).update(data)
                    whose.setdefault(key, []).append(f"{vmr} attempt {attempt.number} {stream}")
        wrong = [key for key in there if key not in shown or shown[key].digest() != there[key].digest()]
        for key in wrong[:5]:
            self.site.find(f"{vm}.log: {' and '.join(whose[key])} is not what it was")
        for key in there:
            shown.pop(key, None)
        if shown:
            self.site.find(f"{vm}.log: output of nobody: {list(shown)[:5]}")
        self.said.append(f"{path.name}: {path.stat().st_size:,} bytes, {counts['output']:,} pieces of output")

    def _check_json(self, driver: Driver) -> None:
        """<VM>.json: a row for each line. One that stood still in its middle for a second has two."""
        vm, path = driver.vm.name, self.site.logs / f"{driver.vm.name}.json"
        shown: dict[tuple[str, int, str], Any] = {}
        counts: Counter[tuple[str, int, str]] = Counter()
        with path.open("rb") as file:
            for line in file:
                row = json.loads(line)
                key = row["vmr"], row["attempt"], row["stream"]
                counts[key] += 1
                shown.setdefault(key, hashlib.sha1()).update(row["msg"].encode("utf-8", "surrogatepass"))
        rows, cut, wrong = counts.total(), 0, 0
        for slot in driver.slots:
            for attempt in slot.attempts.values():
                for stream in ("stdout", "stderr"):
                    data = self.site.shown(vm, slot.vmr, attempt, stream)
                    lines = [
                        line.decode("utf-8", "backslashreplace").strip()
                        for line in data.splitlines()
                        if line.strip()
                    ]
                    digest = shown.pop((slot.vmr, attempt.number, stream), None)
                    there = digest.digest() if digest else hashlib.sha1().digest()
                    count = counts[slot.vmr, attempt.number, stream]
                    cut += count - len(lines)
                    whole = "".join(lines).encode("utf-8", "surrogatepass")
                    if there != hashlib.sha1(whole).digest() or count < len(lines):
                        wrong += 1
                        if wrong <= 5:
                            self.site.find(
                                f"{vm}.json: {slot.vmr} attempt {attempt.number} {stream}: {count} rows of "
                                f"{len(lines)} lines, or other ones"
                            )
        if shown:
            self.site.find(f"{vm}.json: rows of nobody: {list(shown)[:5]}")
        self.said.append(f"{path.name}: {rows:,} rows, {cut} of them the second piece of a line")

    def _check_what_is_left(self) -> None:
        for vm in self.site.vms:

            def clean(vm: Vm = vm) -> bool:
                return not list(leaks.strays(vm.world.spool, vm.world.runtime))

            with contextlib.suppress(AssertionError):
                until(clean, "nothing is left behind", 30.0)
            for stray in itertools.islice(leaks.strays(vm.world.spool, vm.world.runtime), 10):
                self.site.find(f"left behind: {stray}")
        for stray in itertools.islice(leaks.log_strays(self.site.logs, VMS), 10):
            self.site.find(f"left behind: {stray}")
        for path in self.site.tmp.iterdir():
            self.site.find(f"left behind: {path}")
        for role, pid in self.site.roles().items():
            if pid is None:
                self.site.find(f"there is no {role}")
                continue
            for name in leaks.descriptors(pid):
                if name.endswith(" (deleted)"):
                    self.site.find(f"{role} holds {name}")
        roles = set(self.site.roles().values())
        self.init.reap()
        time.sleep(1.0)
        self.init.reap()
        every = leaks.processes()
        for process in leaks.below(os.getpid(), every):
            if process.pid not in roles:
                self.site.find(f"a process is left: {process}")
        self.sampler.note_zombies(leaks.below(os.getpid(), every), time.monotonic())
        self.site.findings += sorted(self.sampler.stale)

    def _check_growth(self) -> None:
        issued = sum(driver.issued for driver in self.drivers)
        self.said.append(
            f"{'process':22} {'lives':>5} {'longest':>9} {'samples':>7}   PSS of the second → last fifth    RSS"
            "                  descriptors"
        )
        for role in self.site.roles():
            life = self.sampler.longest(role)
            lives = sum(each.role == role for each in self.sampler.lives.values())
            if life is None or len(life.samples) < 5:
                continue
            first, last = life.fifths()
            self.said.append(
                f"{role:22} {lives:5} {life.minutes:5.1f} min {len(life.samples):7}   "
                f"{first.pss / 2**20:8.2f} → {last.pss / 2**20:6.2f} MiB        "
                f"{first.rss / 2**20:6.2f} → {last.rss / 2**20:6.2f} MiB    {first.fds:.0f} → {last.fds:.0f}"
            )
            if len(life.samples) < ENOUGH or life.minutes < GROWN_UP:
                continue
            share, least = GROWTH
            runs = issued * (last.at - first.at) / self.seconds
            allowed = max(least, share * first.pss) + (PER_RUN * runs if role == "collector" else 0)
            # PSS alone also grows when fewer shims share a fork server's pages.
            grown = min(last.pss - first.pss, last.rss - first.rss)
            if grown > allowed:
                self.site.find(f"{role} grew by {grown:,.0f} bytes within about {runs:,.0f} runs")

    def _check_fresh(self) -> None:
        """What has gone through all this, next to one that was just started on the same directories."""
        old = self._measure()
        assert self.site.collector is not None
        self.site.collector.terminate()
        self.site.collector.wait(60)
        for vm in self.site.vms:
            vm.world.stop(vm.world.daemon)
        left = [p for p in leaks.below(os.getpid(), leaks.processes()) if p.state != "Z"]
        for process in left:
            self.site.find(f"it goes on when all is told to end: {process}")
        self.site.start_collector()
        for vm in self.site.vms:
            vm.start()
        self._wait_for_sessions()
        time.sleep(3.0)
        new = self._measure()
        self.said.append(f"{'at rest':22} {'PSS, old / fresh':>26} {'descriptors, old / fresh':>26}")
        for role, (pss, fds) in old.items():
            if role not in new:
                self.site.find(f"no fresh {role}")
                continue
            self.said.append(
                f"{role:22} {pss / 2**20:11.2f} / {new[role][0] / 2**20:6.2f} MiB "
                f"{len(fds):20} / {len(new[role][1]):3}"
            )
            # The renderer keeps raw files open, the last 256 it read.
            most = len(new[role][1]) + (256 if role == "renderer" else 0)
            if len(fds) > most:
                extra = Counter(fds) - Counter(new[role][1])
                self.site.find(f"{role} has {len(fds)} descriptors, {most} when fresh: {dict(extra)}")

    def _wait_for_sessions(self) -> None:
        for vm in self.site.vms:
            until(lambda vm=vm: (vm.ask("status") or {}).get("session"), f"{vm.name} is heard", 120.0)

    def _measure(self) -> dict[str, tuple[int, list[str]]]:
        found = {}
        for role, pid in self.site.roles().items():
            with contextlib.suppress(OSError):
                found[role] = leaks.memory(pid or 0)[0], leaks.descriptors(pid or 0)
        return found

    def table(self) -> str:
        total = lambda name: sum((getattr(d, name) for d in self.drivers), Counter())  # noqa: E731
        begun = sum(driver.issued for driver in self.drivers)
        whole = sum(driver.whole for driver in self.drivers)
        size = sum(driver.bytes for driver in self.drivers)
        shims = self.sampler.shims or [0]

        def counted(counts: Counter[str]) -> str:
            return ", ".join(f"{name} {count}" for name, count in counts.most_common())

        return "\n".join(
            [
                "",
                f"soak of {self.seconds / 60:.1f} minutes, seed {self.seed}: {begun} runs begun, {whole} whole and "
                f"checked, {size:,} bytes of output, {self.faults.counts.total()} faults",
                f"kinds:  {counted(total('kinds'))}",
                f"ways:   {counted(total('ways'))}",
                f"ends:   {counted(total('states'))}",
                f"faults: {counted(self.faults.counts)}; shims killed: {len(self.site.lost_shims)}",
                f"shims at a sample: {min(shims)} to {max(shims)}",
                *self.said,
                f"findings: {len(self.site.findings) or 'none'}",
                *self.site.findings,
            ]
        )


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="tests/faults/soak.py", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--every",
        type=float,
        nargs=2,
        default=(2.0, 6.0),
        metavar="S",
        help="seconds from one fault to the next",
    )
    parser.add_argument("--storm", type=float, default=0.4, metavar="SHARE", help="of the time all is killed")
    parser.add_argument("--no-disks", action="store_true", help="mount nothing; then no disk is filled")
    parser.add_argument("--keep", action="store_true", help="leave the directories for you to look at")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and so leave nothing behind
    # Short: a socket's path has room for 107 characters.
    work = Path(tempfile.mkdtemp(prefix="vmr-soak-"))
    disks = not args.no_disks
    soak = Soak(work, seed=args.seed, minutes=args.minutes, runs=args.runs, storm=args.storm, own_disks=disks)
    try:
        good = soak.run(tuple(args.every))
        print(soak.table(), flush=True)
    finally:
        if args.keep:
            print(f"left: {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
