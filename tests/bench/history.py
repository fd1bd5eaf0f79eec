"""What start, status and rerun cost as the history grows, in the guest; and the collector's start.

The guest's histories are made from one that the product made: a run's directory, copied, with another name and id
in its records. The host's is delivered to it, run by run.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.rig import MIB, Bench, Rig, Row, pss
from tests.bench.scale import Host
from tests.e2e.world import until

VMRS = 100


def rows(bench: Bench) -> Iterator[Row]:
    sizes = (bench.size(500, 200), bench.size(5_000, 1_000), bench.size(50_000, 3_000))
    found = {size: guest(bench, size) for size in sizes}
    for what, unit, goal in (
        ("start → status is answered", "ms", "≤ 2"),
        ("status of 100 VMRs", "ms", "≤ 1.5"),
        ("rerun → exited", "ms", "≤ 1.5"),
        ("PSS of the daemon", "MiB", "≤ 1.2"),
    ):
        for size in sizes[1:]:
            yield Row(
                f"{what}, {size:,} runs",
                found[size][what],
                unit,
                f"{sizes[0]:,} runs",
                found[sizes[0]][what],
                goal,
            )
    small, large = bench.size(500, 100), bench.size(50_000, 1_000)
    ours = {size: host(bench, size) for size in (small, large)}
    for what, unit in (("collector's start", "ms"), ("PSS of the collector", "MiB")):
        yield Row(
            f"{what}, {large:,} runs", ours[large][what], unit, f"{small:,} runs", ours[small][what], "≤ 2"
        )


def guest(bench: Bench, size: int) -> dict[str, float]:
    with bench.place() as path:
        rig = Rig(path)
        try:
            for number in range(VMRS):
                rig.stage(f"-1/vmr{number:03}", "echo a line")
            rig.ready()
            until(lambda: not os.listdir(rig.spool / "open"), "all of it is delivered", 300.0)
            rig.stop(rig.daemon)
            grow(rig.spool / "runs", size)
            return measure(rig)
        finally:
            rig.close()


def grow(runs: Path, size: int) -> None:
    """Give each VMR so many attempts that there are `size` runs."""
    for number in range(VMRS):
        first = runs / "-1" / f"vmr{number:03}" / "1"
        for attempt in range(2, size // VMRS + 1):
            run = os.urandom(16).hex()
            copy = first.with_name(str(attempt))
            shutil.copytree(first, copy)
            for name in ("run.json", "started"):
                row = json.loads((copy / name).read_bytes())
                about = row if name == "run.json" else row["run"]
                about.update(run=run, attempt=attempt, trigger="rerun", holds=False)
                (copy / name).write_text(json.dumps(row) + "\n")


def measure(rig: Rig) -> dict[str, float]:
    began = time.monotonic()
    rig.start_daemon()
    until(lambda: rig.row("-1/vmr000"), "it answers", 120.0)
    start = time.monotonic() - began
    rig.wait_ready()
    time.sleep(8.0)
    statuses, reruns = [], []
    for number in range(20):
        began = time.monotonic()
        rig.ask("status")
        statuses.append(time.monotonic() - began)
        name = f"-1/vmr{number + 10:03}"
        began = time.monotonic()
        attempt = rig.ask("rerun", vmr=name)["attempt"]
        over = rig.spool / "runs" / name / str(attempt) / "exit.json"
        until_there(over)
        reruns.append(time.monotonic() - began)
        time.sleep(0.05)
    return {
        "start → status is answered": start * 1000,
        "status of 100 VMRs": statistics.median(statuses) * 1000,
        "rerun → exited": statistics.median(reruns) * 1000,
        "PSS of the daemon": pss(rig.pids()["daemon"]) / MIB,
    }


def until_there(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} doesn't come"
        time.sleep(0.0005)


def host(bench: Bench, size: int) -> dict[str, float]:
    with bench.place() as path:
        collector = Host(path, 1)
        try:
            collector.start()
            guests = collector.guests("1", "0", "0", "--runs", str(size))
            assert guests.wait(3600) == 0, collector.log.read_text()[-500:]
            # Killed, so that it starts from what its journal and checkpoint say.
            assert collector.process is not None
            collector.process.kill()
            collector.process.wait()
            (collector.sockets / "vm0").unlink()
            began = time.monotonic()
            collector.start()
            took = time.monotonic() - began
            time.sleep(2.0)
            return {"collector's start": took * 1000, "PSS of the collector": pss(collector.pid) / MIB}
        finally:
            collector.close()
