"""What lives here: a VM with the product in it and a host, ready to be measured, and the peer in the same VM.

It must not know: what is measured. What is done in the guest is done by in_guest.py there, which the host orders over
a port of its own, so that no shell and no start of a program is measured with it. Every wait has a limit.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, Optional

from tests.bench.rig import HERE, MIB, Bench, helper
from tests.vm import guests
from tests.vm.host import VmWorld
from tests.vm.vm import BENCH_PORT, QGA_PORT, Vm

LIMIT = 600.0  # s; ends a hang, measures nothing
ORDERS_PORT = "org.vmr_agent.orders.0"
TRIGGER_PORT = "org.vmr_agent.trigger.0"
PLACE = "/root/bench"
PROGRAM = f"/usr/bin/python3 -ISE {PLACE}/in_guest.py"
PAYLOAD = f"{PLACE}/lines"
PIECE = 1_024_000  # bytes; FIREWHEEL's size of a guest-file-write, which it found to be the best


@functools.cache
def new_vm() -> Callable[..., Vm]:
    """``Vm`` for a guest with the product. Raises guests.NoImage where there can be none."""
    return guests.with_product(guests.image())


class VmRig(VmWorld):
    """A VM and a host to be measured."""

    def __init__(self, path: Path, vm: Vm, *, payload: Optional[Path] = None) -> None:
        """``payload`` is a file of at most 60 MiB that is to be in the guest's memory, as `PAYLOAD`."""
        super().__init__(path, vm)
        files = {f"{PLACE}/in_guest.py": (HERE / "in_guest.py").read_bytes()}
        if payload is not None:
            files[PAYLOAD] = payload.read_bytes()
        vm.put(files)
        for port in (ORDERS_PORT, TRIGGER_PORT):
            vm.port_add(port)
        vm.check(
            f"udevadm settle; setsid {PROGRAM} serve {ORDERS_PORT} >/dev/null 2>{PLACE}/log </dev/null &"
        )
        self._orders = vm.connect(ORDERS_PORT, LIMIT)
        self._replies = self._orders.makefile("rb")
        self._numbers = iter(range(1_000_000))

    def close(self) -> None:
        super().close()
        self._replies.close()
        self._orders.close()

    # --- orders ---

    def send(self, do: str, **arguments: Any) -> float:
        """Give an order; its time, on the monotonic clock. `reply` must follow."""
        line = json.dumps({"do": do, **arguments}).encode() + b"\n"
        began = time.monotonic()
        self._orders.sendall(line)
        return began

    def reply(self) -> Any:
        answer = json.loads(self._replies.readline())
        if "error" in answer:
            raise AssertionError(f"in the guest: {answer['error']}\n{self.tail()}")
        return answer["ok"]

    def order(self, do: str, **arguments: Any) -> Any:
        """Have something done in the guest, and wait for it."""
        self.send(do, **arguments)
        return self.reply()

    def number(self) -> int:
        """Another one each time, for names."""
        return next(self._numbers)

    # --- the product ---

    def ready(self) -> None:
        self.order("stage", vmr="-9/first", mode=0o755, script="#!/bin/sh\n")  # else it is never configured
        self.start_collector()
        self.vm.check("systemctl start vmr-agent")
        self.wait_ready(configured=True)

    def wait_ready(self, *, configured: bool) -> None:
        def ready() -> bool:
            status = self.order("control", line={"verb": "status"})
            return bool(status["session"] and (status["configured"] or not configured))

        self.wait(ready, "it is ready")

    def guest_row(self, vmr: str) -> dict[str, Any]:
        rows = self.order("control", line={"verb": "status"})["vmrs"]
        return next((row for row in rows if row["vmr"] == vmr), {})

    def runs(self, vmr: str, script: str) -> None:
        """Stage it, and wait until it runs and the host has heard of it."""
        self.order("stage", vmr=vmr, mode=0o777, script=f"#!/bin/sh\n{script}\n")
        self.wait(lambda: self.guest_row(vmr).get("state") == "running", f"{vmr} runs")
        self.wait(lambda: self.result(vmr), f"{vmr} is on the host")

    def delivered(self, vmr: str, size: int) -> None:
        """Until the guest has heard that all of a run, so many bytes on stdout, is durable on the host.

        The guest is asked only when all bytes are here: asking takes its time.
        """
        raw = self.logs / "Server" / vmr / "1" / "stdout"
        deadline = time.monotonic() + LIMIT
        while (raw.stat().st_size if raw.exists() else 0) < size:
            if time.monotonic() > deadline:
                raise AssertionError(f"{vmr} is not on the host\n{self.tail()}")
            time.sleep(0.002)
        self.order("delivered", vmr=vmr, attempt=1, limit=LIMIT / 2)

    def ended(self, vmrs: Sequence[str], pause: float) -> float:
        """When the host had the result of each, which is looked for every ``pause`` seconds."""
        deadline = time.monotonic() + LIMIT
        left = list(vmrs)
        while left:
            row = self.result(left[-1])
            if row is not None and row["ended"] is not None:
                left.pop()
                continue
            if time.monotonic() > deadline:
                raise AssertionError(f"no result of {left[-1]}\n{self.tail()}")
            time.sleep(pause)
        return time.monotonic()

    # --- what waits until it is let go, so that no start is measured with it ---

    def gate(self) -> str:
        """A named pipe in the guest; who reads a line from it waits."""
        path = f"{PLACE}/gate{self.number()}"
        self.order("mkfifo", path=path)
        return path

    def open(self, gate: str) -> float:
        """Let go who waits there; when that was."""
        self.order("hold", path=gate)
        began = self.send("go", path=gate)
        self.reply()
        return began

    # --- the limit ---

    def printed(self, printer: str, size: int) -> float:
        """Seconds until what a program prints is in a file here, with as little in between as there can be.

        Through a pipe in pieces of 32 KiB into a port, and from the port's socket into the file, with a sync each MiB.
        """
        gate = self.gate()
        sunk = self.path / "sunk"
        with self.vm.connect(BENCH_PORT) as port:
            port.settimeout(None)  # else it is non-blocking, in the other process as well
            sink = helper("limits.py", "sink", os.fspath(sunk), str(size), stdin=port)
        try:
            pid = self.order(
                "spawn",
                command=f"{{ read -r word <{gate}; exec {printer}; }} | "
                f"dd bs=32k status=none of=/dev/virtio-ports/{BENCH_PORT}",
            )
            time.sleep(0.5)  # until both have started
            began = self.open(gate)
            assert sink.wait(LIMIT) == 0
            took = time.monotonic() - began
            assert self.order("wait", pid=pid, limit=60) == 0
        finally:
            sink.kill()
            sink.wait()
        assert sunk.stat().st_size == size
        sunk.unlink()
        return took

    def pushed(self, data: Path) -> float:
        """The other way: seconds until a file from here is durable in one there, as plainly."""
        target = f"{PLACE}/sunk"
        size = data.stat().st_size
        with self.vm.connect(BENCH_PORT) as port, data.open("rb") as file:
            port.settimeout(None)
            command = f"head -c {size} </dev/virtio-ports/{BENCH_PORT} >{target} && sync -d {target}"
            pid = self.order("spawn", command=command)
            time.sleep(0.5)
            began = time.monotonic()
            relay = helper("limits.py", "relay", stdin=file, stdout=port)
            try:
                assert self.order("wait", pid=pid, limit=LIMIT / 2) == 0
                took = time.monotonic() - began
                assert relay.wait(60) == 0
            finally:
                relay.kill()
                relay.wait()
        assert self.order("size", path=target) == size
        self.order("unlink", path=target)
        return took


@contextlib.contextmanager
def vm_rig(bench: Bench, *, ready: bool = True, payload: int = 0) -> Iterator[VmRig]:
    """A VM and a host: configured, in session, with nothing to do. ``payload``: how large that is to be."""
    with bench.place() as path, new_vm()(disk=path / "disk.qcow2") as vm:
        rig = VmRig(path, vm, payload=bench.payload(payload) if payload else None)
        try:
            if ready:
                rig.ready()
            yield rig
        finally:
            rig.close()


def repeated(size: int, payload: int, program: str = "head") -> str:
    """A command that prints so many bytes of `PAYLOAD`, over and over: a larger file would not stay in memory."""
    times, rest = divmod(size, payload)
    assert not rest
    files = " ".join([PAYLOAD] * times)
    return f"head -q -c {payload} {files}" if program == "head" else f"{program} {files}"


class GuestAgent:
    """The peer, as it is used over its port: commands one by one, nothing said twice."""

    def __init__(self, vm: Vm) -> None:
        self._socket = vm.connect(QGA_PORT, LIMIT)
        self._received = bytearray()
        self.sync()

    def __enter__(self) -> GuestAgent:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def sync(self) -> None:
        """Whatever was said before is over when this returns."""
        token = time.monotonic_ns() & 0x7FFFFFFF
        self._socket.sendall(b"\xff" + _line("guest-sync-delimited", {"id": token}))
        while self._receive().get("return") != token:
            pass

    def ask(self, command: str, **arguments: Any) -> Any:
        self._socket.sendall(_line(command, arguments))
        answer = self._receive()
        if "error" in answer:
            raise AssertionError(f"{command}: {answer['error']}")
        return answer["return"]

    def execute(self, path: str, *arguments: str, pause: float = 0.0) -> dict[str, Any]:
        """Run a program, its output captured, and ask until it has ended; at once again, or each so many seconds."""
        pid = self.start(path, *arguments)
        deadline = time.monotonic() + LIMIT
        while True:
            status: dict[str, Any] = self.ask("guest-exec-status", pid=pid)
            if status["exited"]:
                assert status["exitcode"] == 0, status
                return status
            assert time.monotonic() < deadline, f"{path} does not end"
            if pause:
                time.sleep(pause)

    def start(self, path: str, *arguments: str) -> int:
        pid: int = self.ask("guest-exec", path=path, arg=list(arguments), **{"capture-output": True})["pid"]
        return pid

    def read(self, path: str, target: Path) -> None:
        """A file from there, durable here."""
        handle = self.ask("guest-file-open", path=path, mode="r")
        with target.open("wb") as file:
            while True:
                piece = self.ask("guest-file-read", handle=handle, count=PIECE)
                file.write(base64.b64decode(piece["buf-b64"]))
                if piece["eof"]:
                    break
            file.flush()
            os.fdatasync(file.fileno())
        self.ask("guest-file-close", handle=handle)

    def write(self, source: Path, path: str) -> None:
        """A file from here, there; it has no command that makes it durable."""
        handle = self.ask("guest-file-open", path=path, mode="w")
        with source.open("rb") as file:
            while data := file.read(PIECE):
                encoded = base64.b64encode(data).decode("ascii")
                assert self.ask("guest-file-write", handle=handle, **{"buf-b64": encoded})["count"] == len(
                    data
                )
        self.ask("guest-file-flush", handle=handle)
        self.ask("guest-file-close", handle=handle)

    def _receive(self) -> dict[str, Any]:
        pieces = []
        while b"\n" not in self._received:
            piece = self._socket.recv(MIB)
            if not piece:
                raise AssertionError("the guest agent's port is closed")
            pieces.append(piece)
            if b"\n" in piece:
                self._received += b"".join(pieces)
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line.lstrip(b"\xff"))
        return answer


def _line(command: str, arguments: dict[str, Any]) -> bytes:
    return json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"
