"""What a VMR prints → durable on the host, in MiB/s, against a relay with the same syncs."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.rig import MIB, Bench, Gate, Row, helper, interleaved


def rows(bench: Bench) -> Iterator[Row]:
    size = bench.size(1 << 30, 64 << 20)
    yield from compare(bench, size, "1 GiB" if size == 1 << 30 else f"{size // MIB} MiB")
    small = bench.size(16 << 20, 4 << 20)
    yield from compare(bench, small, f"{small // MIB} MiB")


def compare(bench: Bench, size: int, name: str) -> Iterator[Row]:
    data = bench.payload(size)
    found = interleaved(
        bench.rounds,
        limit=lambda: size / MIB / relayed(bench, data),
        ours=lambda: size / MIB / printed(bench, data),
    )
    yield Row(
        f"output, {name} in lines → durable",
        found["ours"],
        "MiB/s",
        "relay, a sync each MiB",
        found["limit"],
        "≥ 0.8",
    )


def printed(bench: Bench, data: Path, *, unsynced: bool = False) -> float:
    """Seconds from the moment a script begins to print a file until the host has it, durable."""
    with bench.rig(unsynced=unsynced) as rig:
        gate = rig.gated("-1/prints", f"exec cat {data}")
        began = gate.open()
        rig.delivered("-1/prints")
        took = time.monotonic() - began
        printed = rig.logs / "Server" / "-1/prints/1/stdout"
        assert printed.stat().st_size == data.stat().st_size
        return took


def relayed(bench: Bench, data: Path) -> float:
    """The same through the relay."""
    with bench.place() as place:
        os.mkfifo(place / "gate")
        near, far = socket.socketpair()
        script = subprocess.Popen(
            ["sh", "-c", f"read -r word <{place}/gate; exec cat {data}"], stdout=subprocess.PIPE
        )
        relay = helper("limits.py", "relay", stdin=script.stdout, stdout=near)
        sink = helper("limits.py", "sink", str(place / "sunk"), stdin=far)
        near.close()
        far.close()
        assert script.stdout is not None
        script.stdout.close()
        time.sleep(0.3)  # until all have started
        began = Gate(place / "gate").open()
        for process in (script, relay, sink):
            assert process.wait() == 0
        took = time.monotonic() - began
        assert (place / "sunk").stat().st_size == data.stat().st_size
        return took
