"""Many short lines: durable how much later because they are rendered, and how fast the renderer is."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Iterator

from tests.bench.rig import Bench, Rig, Row, cpu_s
from tests.e2e.world import until


def rows(bench: Bench) -> Iterator[Row]:
    count = bench.size(10_000_000, 400_000)
    data = bench.work / f"lines-short-{count}"
    with data.open("w") as file:
        file.writelines(f"line {100_000_000 + number}\n" for number in range(count))
    for name, command in (
        ("bulk", f"exec cat {data}"),
        ("one write each", f"exec sed -u '' {data}"),
        # Each is a JSON value, and keeps its type.
        ("numbers, bulk", f"exec cut -c 6- {data}"),
    ):
        with_renderer, without, lag, rate, cpu = [], [], [], [], []
        for _ in range(min(bench.rounds, 3)):
            took, behind = durable_and_shown(bench, command, count)
            with_renderer.append(took)
            lag.append(behind)
            took, alone, spent = durable_then_shown(bench, command, count)
            without.append(took)
            rate.append(count / alone / 1e6)
            cpu.append(count / spent / 1e6)
        yield Row(
            f"{count:,} lines, {name} → durable",
            statistics.median(with_renderer),
            "s",
            "renderer stopped",
            statistics.median(without),
            "≤ 1.2",
        )
        yield Row("  then until both logs have them", statistics.median(lag), "s")
        yield Row("  the renderer, alone", statistics.median(rate), "M lines/s", goal="≥ 1")
        yield Row("  the renderer, by its own CPU time", statistics.median(cpu), "M lines/s")


def durable_and_shown(bench: Bench, command: str, count: int) -> tuple[float, float]:
    """Seconds until all is durable, and from then until it is in the logs."""
    with bench.rig() as rig:
        gate = rig.gated("-1/prints", command)
        began = gate.open()
        rig.delivered("-1/prints")
        durable = time.monotonic()
        shown(rig, count)
        return durable - began, time.monotonic() - durable


def durable_then_shown(bench: Bench, command: str, count: int) -> tuple[float, float, float]:
    """The same with the renderer stopped until all is durable; and its CPU time."""
    with bench.rig() as rig:
        gate = rig.gated("-1/prints", command)
        time.sleep(1.5)
        renderer = rig.pids()["renderer"]
        before = cpu_s(renderer)
        os.kill(renderer, signal.SIGSTOP)
        began = gate.open()
        rig.delivered("-1/prints")
        durable = time.monotonic()
        os.kill(renderer, signal.SIGCONT)
        shown(rig, count)
        return durable - began, time.monotonic() - durable, cpu_s(renderer) - before


def shown(rig: Rig, count: int) -> None:
    """Until the end of the run is in the one log, and a row for each line in the other."""
    log, json = rig.logs / "Server.log", rig.logs / "Server.json"

    def ended() -> bool:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            return b"exited after" in file.read()

    until(ended, "it is shown", 600.0)
    until(lambda: last_row(json).find(b"%d" % (100_000_000 + count - 1)) >= 0, "all rows", 600.0)


def last_row(path: os.PathLike[str]) -> bytes:
    with open(path, "rb") as file:  # noqa: PTH123
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        return file.read()
