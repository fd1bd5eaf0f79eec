"""A line printed → in the host's raw file, and in `<VM>.log`; alone, and beside runs that print all they can."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

from tests.bench.rig import HERE, Bench, Row, helper, in_session, quantile, ready, said
from tests.e2e.world import until

GOALS = {0: ("≤ 1", "≤ 3"), 1: ("", ""), 10: ("≤ 2", "≤ 10")}
PAUSE = 0.013  # s; in step with none of our own periods


def rows(bench: Bench) -> Iterator[Row]:
    for floods in (0, 1, 10):
        raw: list[float] = []
        log: list[float] = []
        for _ in range(min(bench.rounds, 3)):
            one, other = measure(bench, floods, bench.size(400, 150))
            raw += one
            log += other
        beside = f", {floods} flooding beside it" if floods else ""
        p50, p99 = GOALS[floods]
        yield Row(f"a line → raw file, p50{beside}", quantile(raw, 0.5), "ms", goal=p50)
        yield Row(f"a line → raw file, p99{beside}", quantile(raw, 0.99), "ms", goal=p99)
        yield Row(f"a line → <VM>.log, p50{beside}", quantile(log, 0.5), "ms", goal="" if floods else "≤ 50")
        yield Row(f"a line → <VM>.log, p99{beside}", quantile(log, 0.99), "ms")


def measure(
    bench: Bench, floods: int, count: int, *, unsynced: bool = False
) -> tuple[list[float], list[float]]:
    """Milliseconds of each line, to both places."""
    with bench.rig(unsynced=unsynced) as rig:
        printer = f"exec {sys.executable} -S -E {HERE / 'printer.py'} {count} {PAUSE}"
        gate = rig.gated("-1/prints", printer)
        gates = [
            rig.gated(f"-1/flood{number}", "exec yes 'as much of this as there can be, and no end of it'")
            for number in range(floods)
        ]
        raw, log = rig.logs / "Server/-1/prints/1/stdout", rig.logs / "Server.log"
        until(lambda: raw.exists() and log.exists(), "the files are there")
        watch = helper(
            *("watch.py", str(raw), str(log)),
            before=in_session(-10),  # what measures is not to be late itself
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert ready(watch) == b"ready\n"
        for each in gates:
            each.open()
        if floods:
            time.sleep(0.3)
        gate.open()
        until(lambda: rig.row("-1/prints").get("state") == "exited", "it has printed", 120.0)
        time.sleep(1.0)
        for number in range(floods):
            rig.ask("kill", vmr=f"-1/flood{number}", signal=9)
        if floods:
            bench.say(f"{floods} floods printed {flooded(rig):,} MiB meanwhile")
        found = said(watch)
        delays = [[each / 1000 for each in found[os.fspath(path)]] for path in (raw, log)]
        if len(delays[0]) < count or len(delays[1]) < count:
            bench.say(
                f"of {count} lines {len(delays[0])} were seen in the raw file, {len(delays[1])} in the log"
            )
        return delays[0], delays[1] or [float("inf")]


def flooded(rig: object) -> int:
    paths = rig.spool.glob("runs/-1/flood*/1/stdout")  # type: ignore[attr-defined]
    return sum(path.stat().st_size for path in paths) >> 20
