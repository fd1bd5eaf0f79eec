"""Memory of the guest's processes, of each run, and what it costs while nothing happens."""

from __future__ import annotations

import time
from collections.abc import Iterator

from tests.bench.rig import MIB, Bench, Rig, Row, cpu_s, pss, wakeups
from tests.e2e.world import until


def rows(bench: Bench) -> Iterator[Row]:
    with bench.rig() as rig:
        pids = rig.pids()
        guest = (pids["daemon"], pids["fork server"])
        host = (pids["collector"], pids["renderer"])
        time.sleep(8.0)
        yield Row("PSS, daemon and fork server", pss(*guest) / MIB, "MiB", goal="≤ 16")
        yield Row("PSS, collector and renderer, one VM", pss(*host) / MIB, "MiB")
        yield from idle(bench, guest, host)
        for count in (10, 100):
            yield from with_runs(rig, count)
        yield from after_runs(bench, rig, guest)


def idle(bench: Bench, guest: tuple[int, ...], host: tuple[int, ...]) -> Iterator[Row]:
    seconds = bench.size(600, 20)
    before = [(cpu_s(*pids), wakeups(*pids)) for pids in (guest, host)]
    time.sleep(seconds)
    after = [(cpu_s(*pids), wakeups(*pids)) for pids in (guest, host)]
    for name, (cpu, woken), (cpu_then, woken_then), goals in (
        ("guest", before[0], after[0], ("≤ 0.2", "≤ 1")),
        ("host, one VM", before[1], after[1], ("", "")),
    ):
        share = 100 * (cpu_then - cpu) / seconds
        yield Row(f"idle for {seconds} s, {name}: CPU", share, "% of a core", goal=goals[0])
        yield Row("  wake-ups", (woken_then - woken) / seconds, "a second", goal=goals[1])


def with_runs(rig: Rig, count: int) -> Iterator[Row]:
    names = [f"-1/sleeps{count}-{number}" for number in range(count)]
    for name in names:
        rig.stage(name, "exec sleep 100000")

    def running() -> bool:
        return sum(row["state"] == "running" for row in rig.ask("status")["vmrs"]) == count

    until(running, f"{count} run", 120.0)
    until(lambda: len(rig.shims()) == count, "each has its shim")
    time.sleep(2.0)
    pids = rig.pids()
    shims = rig.shims()
    yield Row(f"PSS, each of {count} runs", pss(*shims) / MIB / count, "MiB", goal="≤ 2")
    whole = pss(pids["daemon"], pids["fork server"], *shims)
    yield Row(f"PSS, the whole guest with {count} runs", whole / MIB, "MiB")
    for name in names:
        rig.ask("kill", vmr=name, signal=9)
    until(lambda: not rig.shims(), "all have ended", 120.0)


def after_runs(bench: Bench, rig: Rig, guest: tuple[int, ...]) -> Iterator[Row]:
    count = bench.size(5_000, 150)
    rig.stage("-1/again", "echo out; echo err >&2")
    until(lambda: rig.row("-1/again").get("state") == "exited", "it has run")

    def again(times: int) -> None:
        for _ in range(times):
            attempt = rig.ask("rerun", vmr="-1/again")["attempt"]
            until(
                lambda attempt=attempt: (
                    rig.row("-1/again")["attempt"] == attempt and rig.row("-1/again")["state"] == "exited"
                ),
                "it has run again",
            )

    again(count // 10)
    time.sleep(2.0)
    before = pss(*guest)
    again(count)
    time.sleep(2.0)
    yield Row(f"PSS, grown by in {count:,} reruns", (pss(*guest) - before) / MIB, "MiB", goal="≤ 1")
