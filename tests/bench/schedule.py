"""Many VMRs: a hundred start times, two hundred at one, ten thousand; against bare starts of the same scripts."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

from tests.bench.rig import Bench, Rig, Row, interleaved
from tests.e2e.world import until


def rows(bench: Bench) -> Iterator[Row]:
    rounds = min(bench.rounds, 3)
    found = interleaved(
        rounds,
        bare=lambda: bare(100, at_once=False),
        ours=lambda: run(bench, [f"-{n + 1}" for n in range(100)]),
    )
    yield Row("100 VMRs at 100 negative times → all results on the host", found["ours"], "s", goal="≤ 2")
    yield Row("  bare starts, one after the other", found["bare"], "s")
    found = interleaved(rounds, bare=lambda: bare(200, at_once=True), ours=lambda: run(bench, ["-1"] * 200))
    yield Row("200 VMRs at one time → all results on the host", found["ours"], "s", goal="≤ 2")
    yield Row("  bare starts, all at once", found["bare"], "s")
    sizes = [bench.size(1_000, 250), bench.size(10_000, 1_000)]
    each = {size: run(bench, ["-1"] * size) / size * 1000 for size in sizes}
    small, large = sizes
    yield Row(
        f"{large:,} VMRs at one time, each", each[large], "ms", f"each of {small:,}", each[small], "≤ 1.2"
    )


def run(bench: Bench, times: list[str]) -> float:
    """Seconds from the removal of `.hold` until the host has each result."""
    with bench.place() as path:
        rig = Rig(path)
        try:
            (rig.launch / ".hold").touch()
            names = [f"{start_time}/true{number}" for number, start_time in enumerate(times)]
            for name in names:
                rig.stage(name, "exec /bin/true")
            rig.start_collector()
            rig.start_daemon()
            until(lambda: rig.row(names[-1]) and rig.ask("status")["session"], "they are seen", 600.0)
            time.sleep(1.0)
            return begin(rig, names)
        finally:
            rig.close()


def begin(rig: Rig, names: list[str]) -> float:
    began = time.monotonic()
    (rig.launch / ".hold").unlink()
    waiting = set(names)
    while waiting:
        waiting = {name for name in waiting if rig.host_row(name).get("ended") is None}
        assert time.monotonic() < began + 1800, f"{len(waiting)} of {len(names)} left\n{rig.tail()}"
        time.sleep(0.02 if len(waiting) < 300 else 0.5)
    return time.monotonic() - began


def bare(count: int, *, at_once: bool) -> float:
    began = time.monotonic()
    if at_once:
        for process in [subprocess.Popen(["/bin/sh", "-c", "exec /bin/true"]) for _ in range(count)]:
            process.wait()
    else:
        for _ in range(count):
            subprocess.run(["/bin/sh", "-c", "exec /bin/true"], check=True)
    return time.monotonic() - began
