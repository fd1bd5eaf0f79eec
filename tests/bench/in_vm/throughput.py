"""What a VMR prints → durable on the host, in MiB/s, against as little as there can be in between, and qemu-ga."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Iterator

from tests.bench.rig import MIB, Bench, Row, interleaved
from tests.bench.vm_rig import GuestAgent, VmRig, repeated, vm_rig

LIMIT = "head | pipe in 32 KiB → port, a sync each MiB"


def rows(bench: Bench) -> Iterator[Row]:
    small = bench.size(16 << 20, 4 << 20)  # qemu-ga holds no more than 16 MiB
    large = bench.size(1 << 30, 32 << 20)
    with vm_rig(bench, payload=small) as rig, GuestAgent(rig.vm) as peer:
        one = repeated(small, small)
        found = interleaved(
            bench.rounds,
            limit=lambda: small / MIB / rig.printed(one, small),
            ours=lambda: small / MIB / printed(rig, one, small),
            peer=lambda: small / MIB / executed(rig, peer, one, small),
        )
        name = f"output in a VM, {small // MIB} MiB in lines → durable"
        yield Row(name, found["ours"], "MiB/s", LIMIT, found["limit"], "≥ 0.55")
        yield Row("  the same", found["ours"], "MiB/s", "guest-exec, busy-polled", found["peer"], "≥ 4")
        many = repeated(large, small)
        found = interleaved(
            min(bench.rounds, 3),
            limit=lambda: large / MIB / rig.printed(many, large),
            ours=lambda: large / MIB / printed(rig, many, large),
        )
        name = f"output in a VM, {large // MIB:,} MiB in lines → durable"
        yield Row(name, found["ours"], "MiB/s", LIMIT, found["limit"], "≥ 0.55")


def printed(rig: VmRig, printer: str, size: int) -> float:
    """Seconds from the moment a script begins to print until the guest knows it durable on the host."""
    gate, vmr = rig.gate(), f"-1/prints{rig.number()}"
    rig.runs(vmr, f"read -r word <{gate}\nexec {printer}")
    began = rig.open(gate)
    rig.delivered(vmr, size)
    return time.monotonic() - began


def executed(rig: VmRig, peer: GuestAgent, printer: str, size: int) -> float:
    """The same through guest-exec: until its answer has been taken apart and synced."""
    gate, target = rig.gate(), rig.path / "answer"
    pid = peer.start("/bin/sh", "-c", f"read -r word <{gate}\nexec {printer}")
    began = rig.open(gate)
    while not (status := peer.ask("guest-exec-status", pid=pid))["exited"]:
        assert time.monotonic() < began + 300
    data = base64.b64decode(status["out-data"])
    with target.open("wb") as file:
        file.write(data)
        file.flush()
        os.fdatasync(file.fileno())
    took = time.monotonic() - began
    assert len(data) == size
    target.unlink()
    return took
