"""The collector with 10, 100, 1,000 VMs: CPU, memory, how late a line is in its file, what it takes at most."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from tests.bench.rig import HERE, MIB, Bench, Row, cpu_s, helper, pss, quantile, ready, said
from tests.e2e.world import AGENT, until
from tests.faults import leaks

SAMPLED = 40  # VMs whose files are watched: to watch all of them would be measured too


def rows(bench: Bench) -> Iterator[Row]:
    seconds = bench.size(30, 6)
    per_vm: dict[float, dict[int, float]] = {}
    for rate in (10.0, 40.0):
        for count in (10, 100, 1_000):
            found = measure(bench, count, rate, seconds)
            per_vm.setdefault(rate, {})[count] = found["cpu"] / count
            strict = count == 1_000 and rate == 10.0
            name = f"{count:,} VMs at {rate:.0f} lines/s each"
            yield Row(f"{name}: collector's CPU", found["cpu"], "% of a core", goal="≤ 50" if strict else "")
            yield Row("  its renderer's", found["renderer_cpu"], "% of a core")
            yield Row(
                "  PSS, collector and renderer", found["pss"] / MIB, "MiB", goal="≤ 64" if strict else ""
            )
            yield Row("  a line → raw file, p50", found["p50"], "ms")
            yield Row("  a line → raw file, p99", found["p99"], "ms", goal="≤ 25" if strict else "")
            yield Row("  a line → Ack, p99", found["ack_p99"] * 1000, "ms")
            yield Row("  lines lost", found["lost"], "", goal="≤ 0")
            if found["sessions"]:
                yield Row("  sessions that ended, and began again", found["sessions"], "")
            if found["late_p99"] > 0.01:
                bench.say(f"  the guests themselves were late by {found['late_p99'] * 1000:.0f} ms (p99)")
    for rate, costs in per_vm.items():
        yield Row(
            f"CPU for each of 1,000 VMs at {rate:.0f} lines/s",
            costs[1_000],
            "% of a core",
            "each of 100",
            costs[100],
            "≤ 1.2",
        )
    for count in (10, 100, 1_000):
        found = measure(bench, count, 0.0, seconds, "--flat")
        yield Row(f"{count:,} VMs, all they can send → acknowledged", found["rate"], "MiB/s")
        yield Row("  collector's CPU", found["cpu"], "% of a core")
    count = bench.size(1_000, 200)
    found = measure(bench, count, 10.0, seconds, "--flood")
    yield Row(f"{count - 1} VMs at 10 lines/s beside one that floods: raw file, p99", found["p99"], "ms")
    yield Row("  the flood", found["rate"], "MiB/s")


class Host:
    """A collector that listens for many VMs."""

    def __init__(self, path: Path, count: int) -> None:
        self.logs = path / "logs"
        self.log = path / "collector.log"
        self.sockets = Path(tempfile.mkdtemp(prefix="vmr-"))
        self.count = count
        self.process: Optional[subprocess.Popen[bytes]] = None

    def start(self) -> None:
        sources = [
            part for n in range(self.count) for part in ("--listen", f"vm{n}={self.sockets / f'vm{n}'}")
        ]
        command = ["collect", "--log-dir", str(self.logs), "--control", str(self.sockets / "control")]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vmr_agent.cli.host", *command, *sources],
                env={**os.environ, "PYTHONPATH": str(AGENT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        last = self.sockets / f"vm{self.count - 1}"
        until(last.exists, f"it listens\n{self.log.read_text()}", 120.0)
        until(lambda: self.renderer, "its renderer is there")

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def renderer(self) -> int:
        return next((p.pid for p in leaks.processes().values() if p.ppid == self.pid), 0)

    def guests(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, str(HERE / "guests.py"), str(self.sockets), *arguments],
            env={**os.environ, "PYTHONPATH": str(AGENT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    def close(self) -> None:
        """End both by force: what they have left to do is not measured, and with 1,000 VMs it is much."""
        if self.process is not None and self.process.poll() is None:
            renderer = self.renderer
            self.process.kill()
            self.process.wait()
            if renderer:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(renderer, signal.SIGKILL)
        shutil.rmtree(self.sockets)


def measure(bench: Bench, count: int, rate: float, seconds: float, *mode: str) -> dict[str, Any]:
    with bench.place() as path:
        host = Host(path, count)
        try:
            host.start()
            return _measure(host, count, rate, seconds, *mode)
        except BaseException:
            bench.say(host.log.read_text()[-500:])
            raise
        finally:
            host.close()


def _measure(host: Host, count: int, rate: float, seconds: float, *mode: str) -> dict[str, Any]:
    guests = host.guests(str(count), str(rate), str(seconds), *mode)
    assert guests.stdin is not None and guests.stdout is not None
    assert ready(guests) == b"ready\n", host.log.read_text()[-500:]
    names = [f"vm{n}" for n in range(1, count, max(1, count // SAMPLED))]
    files = [host.logs / name / "1/prints/1/stdout" for name in names] if rate else []
    until(lambda: all(file.exists() for file in files), "their files are there")
    watch = helper("watch.py", *map(str, files), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert ready(watch) == b"ready\n"
    pids = host.pid, host.renderer
    time.sleep(1.0)
    before = [cpu_s(pid) for pid in pids]
    began = time.monotonic()
    guests.stdin.write(b"go\n")
    # CPU and memory over the time of the printing alone: what comes after it is no longer at that rate.
    time.sleep(seconds)
    took = time.monotonic() - began
    after = [cpu_s(pid) for pid in pids]
    memory = pss(*pids)
    found: dict[str, Any] = json.loads(_line(guests))
    delays = [delay / 1000 for each in said(watch).values() for delay in each]
    guests.stdin.write(b"end\n")
    assert guests.wait(60) == 0
    stored = [(host.logs / f"vm{n}" / "1/prints/1/stdout").stat().st_size for n in range(count)]
    missing = sum(sent - held for sent, held in zip(found["sizes"], stored))
    return {
        **found,
        "cpu": 100 * (after[0] - before[0]) / took,
        "renderer_cpu": 100 * (after[1] - before[1]) / took,
        "pss": memory,
        "p50": quantile(delays, 0.5) if delays else 0.0,
        "p99": quantile(delays, 0.99) if delays else 0.0,
        "lost": missing,
        "rate": found["bytes"] / MIB / found["acked"],
    }


def _line(process: subprocess.Popen[bytes]) -> bytes:
    """The JSON that it says, which is all it says; it goes on living."""
    assert process.stdout is not None
    data = b""
    while not data.endswith(b"}"):
        piece = os.read(process.stdout.fileno(), 1 << 20)
        assert piece, f"the guests ended with {process.wait()}"
        data += piece
    return data
