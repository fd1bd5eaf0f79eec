"""Memory of both agents in one VM, and what they cost while nothing happens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from tests.bench.rig import MIB, Bench, Row
from tests.bench.vm_rig import GuestAgent, VmRig, repeated, vm_rig

RUNS = 10
OURS, THEIRS = "vmr-agent", "qemu-guest-agent"


def rows(bench: Bench) -> Iterator[Row]:
    size = bench.size(16 << 20, 4 << 20)
    with vm_rig(bench, payload=size) as rig, GuestAgent(rig.vm) as peer:
        time.sleep(8.0)
        yield Row("PSS in a VM, daemon and fork server", pss(rig, OURS), "MiB", goal="≤ 16")
        yield Row("  qemu-ga", pss(rig, THEIRS), "MiB")
        yield from idle(bench, rig)
        yield from with_runs(rig, peer)
        rig.runs("-1/prints", f"exec {repeated(size, size)}")
        rig.delivered("-1/prints", size)
        peer.execute("/bin/sh", "-c", f"exec {repeated(size, size)}")
        time.sleep(2.0)
        yield Row(f"PSS in a VM, the whole, then {size // MIB} MiB of output", pss(rig, OURS), "MiB")
        yield Row("  qemu-ga", pss(rig, THEIRS), "MiB")


def idle(bench: Bench, rig: VmRig) -> Iterator[Row]:
    seconds = bench.size(600, 15)
    units = (OURS, THEIRS)
    before = [look(rig, unit) for unit in units]
    time.sleep(seconds)
    after = [look(rig, unit) for unit in units]
    for unit, was, now, goals in zip(units, before, after, (("≤ 0.2", "≤ 1"), ("", ""))):
        share = 100 * (now["cpu_s"] - was["cpu_s"]) / seconds
        yield Row(f"idle in a VM for {seconds} s, {unit}: CPU", share, "% of a core", goal=goals[0])
        yield Row("  wake-ups", (woken(now) - woken(was)) / seconds, "a second", goal=goals[1])


def with_runs(rig: VmRig, peer: GuestAgent) -> Iterator[Row]:
    for number in range(RUNS):
        rig.runs(f"-1/sleeps{number}", "exec sleep 100000")
        peer.start("/bin/sleep", "100000")
    time.sleep(2.0)
    shims = sum(each["pss"] for each in look(rig, OURS)["processes"] if each["name"] == "vmr-shim")
    yield Row(f"PSS in a VM, each of {RUNS} runs", shims / MIB / RUNS, "MiB", goal="≤ 2")
    yield Row(f"PSS in a VM, the whole with {RUNS} runs", pss(rig, OURS), "MiB")
    yield Row("  qemu-ga", pss(rig, THEIRS), "MiB")
    rig.vm.check("pkill -x sleep")
    rig.wait(
        lambda: not any(each["name"] == "vmr-shim" for each in look(rig, OURS)["processes"]), "all have ended"
    )


def look(rig: VmRig, unit: str) -> dict[str, Any]:
    found: dict[str, Any] = rig.order("look", unit=unit)
    return found


def pss(rig: VmRig, unit: str) -> float:
    """MiB of what the agent is made of; the scripts and programs it executes are not."""
    sizes: list[int] = [each["pss"] for each in look(rig, unit)["processes"] if each["name"] != "sleep"]
    return sum(sizes) / MIB


def woken(look: dict[str, Any]) -> int:
    return sum(each["woken"] for each in look["processes"])
