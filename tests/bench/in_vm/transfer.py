"""pull and push of one file by their verbs, against a program's output on the same way, and qemu-ga's files."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.in_vm.throughput import LIMIT
from tests.bench.rig import MIB, Bench, Row, interleaved
from tests.bench.vm_rig import PLACE, GuestAgent, VmRig, repeated, vm_rig

FILE = f"{PLACE}/file"


def rows(bench: Bench) -> Iterator[Row]:
    piece = bench.size(16 << 20, 2 << 20)
    size = bench.size(64 << 20, 4 << 20)
    with vm_rig(bench, payload=piece) as rig, GuestAgent(rig.vm) as peer:
        printer = repeated(size, piece)
        rig.vm.check(f"{printer} >{FILE}; sync")
        data, small = bench.payload(size), bench.payload(piece)
        found = interleaved(
            bench.rounds,
            limit=lambda: size / MIB / rig.printed(printer, size),
            back=lambda: size / MIB / rig.pushed(data),
            pull=lambda: size / MIB / pulled(rig, size),
            push=lambda: size / MIB / pushed(rig, data),
            read=lambda: piece / MIB / read(rig, peer, piece),
            write=lambda: piece / MIB / written(rig, peer, small),
        )
    name = f"{size // MIB} MiB, with the verb's start"
    yield Row(f"vmr-host pull from a VM, {name}", found["pull"], "MiB/s", LIMIT, found["limit"], "≥ 0.55")
    yield Row("  the same", found["pull"], "MiB/s", "guest-file-read", found["read"])
    yield Row(f"vmr-host push to a VM, {name}", found["push"], "MiB/s", LIMIT, found["limit"], "≥ 0.55")
    yield Row("  the same", found["push"], "MiB/s", "port → head >file, one sync", found["back"])
    yield Row("  the same", found["push"], "MiB/s", "guest-file-write, no sync", found["write"])


def pulled(rig: VmRig, size: int) -> float:
    target = rig.path / "pulled"
    took = verb(rig, "pull", FILE, "Server", os.fspath(target))
    assert target.stat().st_size == size
    target.unlink()
    return took


def pushed(rig: VmRig, data: Path) -> float:
    target = f"{PLACE}/pushed"
    took = verb(rig, "push", os.fspath(data), "Server", target)
    assert rig.order("size", path=target) == data.stat().st_size
    rig.order("unlink", path=target)
    return took


def verb(rig: VmRig, *words: str) -> float:
    began = time.monotonic()
    done = rig.host(*words, limit=600)
    took = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    return took


def read(rig: VmRig, peer: GuestAgent, size: int) -> float:
    target = rig.path / "read"
    began = time.monotonic()
    peer.read(f"{PLACE}/lines", target)
    took = time.monotonic() - began
    assert target.stat().st_size == size
    target.unlink()
    return took


def written(rig: VmRig, peer: GuestAgent, source: Path) -> float:
    target = f"{PLACE}/written"
    began = time.monotonic()
    peer.write(source, target)
    took = time.monotonic() - began
    assert rig.order("size", path=target) == source.stat().st_size
    rig.order("unlink", path=target)
    return took
