"""x bit set → result on the host, for a VMR that is `/bin/true`, against a bare start of the same script."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

from tests.bench.rig import Bench, Rig, Row, interleaved, quantile

SETTLE = 0.02  # s; the setting's default: for so long nothing in a VMR may change


def rows(bench: Bench) -> Iterator[Row]:
    count = bench.size(100, 25)
    with bench.rig() as rig:
        numbers = iter(range(1_000_000))
        ours: list[float] = []
        durable: list[float] = []
        bare: list[float] = []

        def one() -> float:
            shown, kept = turnaround(rig, next(numbers))
            ours.append(shown)
            durable.append(kept)
            return shown

        def popen() -> float:
            bare.append(start_bare(rig))
            return bare[-1]

        for _ in range(3):
            one()
        ours.clear()
        durable.clear()
        interleaved(count, bare=popen, ours=one)
    yield Row(
        "x bit → result on the host, /bin/true, less settle, p50",
        quantile(ours, 0.5) * 1000 - SETTLE * 1000,
        "ms",
        goal="≤ 10",
    )
    yield Row("  p99", quantile(ours, 0.99) * 1000 - SETTLE * 1000, "ms")
    yield Row("  and until the guest knows it durable, p50", quantile(durable, 0.5) * 1000 - 20, "ms")
    yield Row("  a bare start of the same script, p50", quantile(bare, 0.5) * 1000, "ms")


def turnaround(rig: Rig, number: int) -> tuple[float, float]:
    """Seconds from the chmod until result.json says that it has ended, and until nothing is left to deliver."""
    vmr = f"-1/true{number}"
    directory = rig.stage(vmr, "exec /bin/true", commit=False)
    time.sleep(0.1)
    (directory / "call_arguments.sh").chmod(0o777)
    began = time.monotonic()
    deadline = began + 60
    while rig.host_row(vmr).get("ended") is None:
        assert time.monotonic() < deadline, rig.tail()
        time.sleep(0.0003)
    shown = time.monotonic() - began
    rig.delivered(vmr)
    return shown, time.monotonic() - began


def start_bare(rig: Rig) -> float:
    script = next(rig.launch.glob("-1/true*/call_arguments.sh"))
    began = time.monotonic()
    subprocess.run([script], check=True)
    return time.monotonic() - began
