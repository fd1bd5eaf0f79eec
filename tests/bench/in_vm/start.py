"""How long after its unit's start the daemon says its first frame, against Python with the three libraries alone."""

from __future__ import annotations

import time
from collections.abc import Iterator

from tests.bench.rig import Bench, Row, interleaved
from tests.bench.vm_rig import GuestAgent, VmRig, vm_rig
from tests.vm.vm import AGENT_PORT, START_LIMIT, drain


def rows(bench: Bench) -> Iterator[Row]:
    with vm_rig(bench, ready=False) as rig, GuestAgent(rig.vm) as peer:
        found = interleaved(
            bench.rounds,
            bare=lambda: bare(rig),
            ours=lambda: first_frame(rig),
            peer=lambda: first_answer(rig, peer),
        )
    yield Row(
        "systemctl start in a VM → first frame",
        1000 * found["ours"],
        "ms",
        "python3 -c 'import psutil, watchdog, msgpack'",
        1000 * found["bare"],
    )
    yield Row("  qemu-ga, its first answer", 1000 * found["peer"], "ms")


def bare(rig: VmRig) -> float:
    began = time.monotonic()
    rig.vm.check("python3 -c 'import psutil, watchdog, msgpack'")
    return time.monotonic() - began


def first_frame(rig: VmRig) -> float:
    rig.vm.check("systemctl stop vmr-agent")
    with rig.vm.connect(AGENT_PORT) as port:
        drain(port)
        port.settimeout(START_LIMIT)
        began = time.monotonic()
        rig.vm.start("systemctl start vmr-agent")
        assert port.recv(1)
        return time.monotonic() - began


def first_answer(rig: VmRig, peer: GuestAgent) -> float:
    rig.vm.check("systemctl stop qemu-guest-agent")
    began = time.monotonic()
    rig.vm.start("systemctl start qemu-guest-agent")
    peer.sync()
    return time.monotonic() - began
