"""pull and push of one file by their verbs, against the same relay as output: file → socket → file."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.rig import MIB, Bench, Rig, Row, helper, interleaved


def rows(bench: Bench) -> Iterator[Row]:
    size = bench.size(1 << 30, 64 << 20)
    name = "1 GiB" if size == 1 << 30 else f"{size // MIB} MiB"
    data = bench.payload(size)
    with bench.rig() as rig:
        found = interleaved(
            bench.rounds,
            limit=lambda: size / MIB / relayed(bench, data),
            pull=lambda: size / MIB / moved(rig, data, "pull"),
            push=lambda: size / MIB / moved(rig, data, "push"),
        )
        empty = rig.path / "empty"
        empty.touch()
        start = interleaved(bench.rounds, pull=lambda: moved(rig, empty, "pull"))["pull"]
    for verb in ("pull", "push"):
        yield Row(
            f"vmr-host {verb} of {name}, with the verb's start",
            found[verb],
            "MiB/s",
            "relay, a sync each MiB",
            found["limit"],
            "≥ 0.8",
        )
    yield Row("  pull of an empty file", start * 1000, "ms")


def moved(rig: Rig, data: Path, verb: str) -> float:
    target = rig.path / f"target-{verb}"
    began = time.monotonic()
    done = rig.host(verb, os.fspath(data), "Server", os.fspath(target), limit=600)
    took = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    assert target.stat().st_size == data.stat().st_size
    target.unlink()
    return took


def relayed(bench: Bench, data: Path) -> float:
    with bench.place() as place, data.open("rb") as file:
        near, far = socket.socketpair()
        began = time.monotonic()
        relay = helper("limits.py", "relay", stdin=file, stdout=near)
        sink = helper("limits.py", "sink", os.fspath(place / "sunk"), stdin=far)
        near.close()
        far.close()
        assert relay.wait() == 0 and sink.wait() == 0
        return time.monotonic() - began
