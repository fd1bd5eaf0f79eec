"""The price of syncing: the same with every sync as promised, and with none at all."""

from __future__ import annotations

from collections.abc import Iterator

from tests.bench import latency, throughput, turnaround
from tests.bench.rig import MIB, Bench, Rig, Row, interleaved, quantile


def rows(bench: Bench) -> Iterator[Row]:
    size = bench.size(1 << 30, 64 << 20)
    data = bench.payload(size)
    found = interleaved(
        bench.rounds,
        none=lambda: size / MIB / throughput.printed(bench, data, unsynced=True),
        all=lambda: size / MIB / throughput.printed(bench, data),
    )
    yield Row(
        f"output, {size // MIB} MiB → the guest knows it kept",
        found["all"],
        "MiB/s",
        "no syncs",
        found["none"],
    )

    delays: dict[bool, tuple[list[float], list[float]]] = {False: ([], []), True: ([], [])}
    for _ in range(min(bench.rounds, 3)):
        for unsynced, (raw, log) in delays.items():
            one, other = latency.measure(bench, 0, bench.size(400, 150), unsynced=unsynced)
            raw += one
            log += other
    for place, which in (("raw file", 0), ("<VM>.log", 1)):
        for share, name in ((0.5, "p50"), (0.99, "p99")):
            yield Row(
                f"a line → {place}, {name}",
                quantile(delays[False][which], share),
                "ms",
                "no syncs",
                quantile(delays[True][which], share),
            )

    count = bench.size(100, 25)
    with bench.rig() as synced, bench.rig(unsynced=True) as unsynced:
        shown: dict[str, list[tuple[float, float]]] = {"all": [], "none": []}
        numbers = iter(range(1_000_000))

        def once(rig: Rig, name: str) -> float:
            shown[name].append(turnaround.turnaround(rig, next(numbers)))
            return 0.0

        interleaved(3, all=lambda: once(synced, "all"), none=lambda: once(unsynced, "none"))
        shown = {"all": [], "none": []}
        interleaved(count, all=lambda: once(synced, "all"), none=lambda: once(unsynced, "none"))
    for place, which in (("result on the host", 0), ("the guest knows it kept", 1)):
        for share, quantity in ((0.5, "p50"), (0.99, "p99")):
            yield Row(
                f"x bit → {place}, /bin/true, {quantity}",
                quantile([each[which] for each in shown["all"]], share) * 1000,
                "ms",
                "no syncs",
                quantile([each[which] for each in shown["none"]], share) * 1000,
            )
