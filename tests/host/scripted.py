"""A collector as a real process, and guests played by a script over real sockets. Used by tests, knows none."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional

from vmr_agent.runs import Stream
from vmr_agent.wire import messages
from vmr_agent.wire.session import PROTOCOL, Ended, Opened, Role, Session

AGENT = Path(__file__).resolve().parents[2] / "agent"
LIMIT = 20.0  # s; for whatever must happen
_BEGAN = time.time_ns()


def until(holds: Callable[[], Any], what: str, limit: float = LIMIT) -> Any:
    deadline = time.monotonic() + limit
    while True:
        found = holds()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"gave up after {limit:.0f} s: {what}")
        time.sleep(0.01)


class Host:
    """`vmr-host collect` for some VMs that connect to it, or it to them."""

    def __init__(
        self,
        path: Path,
        *,
        vms: tuple[str, ...] = ("evil", "good"),
        environment: Optional[Mapping[str, str]] = None,
        python: str = sys.executable,
    ) -> None:
        self.path = path
        self.python = python
        self.environment = {"PYTHONPATH": str(AGENT), **(environment or {})}
        self.logs = path / "logs"
        self.sockets = Path(
            tempfile.mkdtemp(prefix="vmr-")
        )  # a socket's path has 107 bytes, pytest's are longer
        self.vms = vms
        self.process: Optional[subprocess.Popen[bytes]] = None

    def start(self, *options: str, connect: bool = False) -> None:
        sources = [
            part
            for vm in self.vms
            for part in ([] if connect else ["--listen"]) + [f"{vm}={self.socket(vm)}"]
        ]
        command = ["collect", "--log-dir", str(self.logs), "--control", str(self.sockets / "control")]
        with (self.path / "collector.log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.python, "-m", "vmr_agent.cli.host", *command, *sources, *options],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until(lambda: self._listens() or not self.alive(), f"it listens\n{self.said()}")

    def _listens(self) -> bool:
        return all(self.socket(vm).exists() for vm in self.vms)

    def socket(self, vm: str) -> Path:
        return self.sockets / vm

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End it, and leave nothing behind."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                self.kill()
        shutil.rmtree(self.sockets)

    def said(self) -> str:
        return (self.path / "collector.log").read_bytes().decode("utf-8", "backslashreplace")

    def most_memory(self) -> int:
        """Bytes resident at the most, so far."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmHWM")

    def raw(self, vm: str, run: str, stream: str = "stdout") -> bytes:
        path = self.logs / vm / run / stream
        return path.read_bytes() if path.exists() else b""

    def log(self, vm: str, kind: str = "log") -> str:
        path = self.logs / f"{vm}.{kind}"
        return path.read_text() if path.exists() else ""


class Guest:
    """One guest by script: says what the test wants, and collects what it hears."""

    def __init__(self, path: Path, **hello: Any) -> None:
        self.path = path
        self.hello = {"spool": b"s" * 16, "boot": "boot", "wall": time.time_ns(), "boottime": 10**9, **hello}
        self.events: list[Any] = []
        self.session = Session(
            Role.GUEST, introduce=self._introduce, beat=self._beat, make_id=lambda: os.urandom(8)
        )
        self.sock: Optional[socket.socket] = None

    def _introduce(self, own: bytes, peer: Optional[bytes]) -> messages.Hello:
        return messages.Hello(
            id=own, peer=peer, role="guest", **{"protocol": PROTOCOL, "version": "1.0", **self.hello}
        )

    def _beat(self) -> messages.Heartbeat:
        return messages.Heartbeat(wall=self.hello["wall"])

    def connect(self) -> Guest:
        """Connect, without a word."""
        self.close()

        def connected() -> bool:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(os.fspath(self.path))
            except OSError:
                sock.close()
                return False
            sock.setblocking(False)
            self.sock = sock
            return True

        until(connected, f"connected to {self.path}")
        return self

    def open(self, limit: float = LIMIT) -> Guest:
        """Connect, again while it is refused, until a session is open."""
        deadline = time.monotonic() + limit
        while not self.session.open:
            assert time.monotonic() < deadline, "no session"
            self.connect()
            self.session.connect(time.monotonic())
            try:
                self.hear(lambda: self.session.open, limit=2.0)
            except (AssertionError, OSError):
                self.close()
                time.sleep(0.05)
        return self

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        self.events += self.session.disconnect("closed by the test")

    @property
    def gone(self) -> bool:
        """Whether the host has closed the connection."""
        if self.sock is not None:
            try:
                self._read()
            except OSError:
                self.close()
        return self.sock is None

    def send(self, data: bytes) -> None:
        """Bytes, whatever they are; the host reads them, or has gone, which is OSError."""
        assert self.sock is not None
        self.sock.settimeout(LIMIT)
        try:
            self.sock.sendall(data)
        finally:
            self.sock.setblocking(False)

    def say(self, *said: messages.Message) -> None:
        self.send(b"".join(self.session.frame(message) for message in said))

    def hear(self, holds: Callable[[], Any], what: str = "it was heard", limit: float = LIMIT) -> Any:
        """Read, and answer for the session, until something holds."""

        def heard() -> Any:
            self._read()
            return holds()

        return until(heard, what, limit)

    def _read(self) -> None:
        assert self.sock is not None
        now = time.monotonic()
        self._write()
        try:
            data = self.sock.recv(1 << 18)
            if not data:
                raise ConnectionResetError("the host closed the connection")
            self.events += self.session.receive(data, now)
        except BlockingIOError:
            pass
        self.events += self.session.tick(now)
        self._write()

    def _write(self) -> None:
        for frame in self.session.take():
            self.send(frame)

    def heard(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def acks(self, run: bytes) -> list[messages.Ack]:
        return [ack for ack in self.heard(messages.Ack) if ack.run == run]


def run(number: int = 1, vmr: bytes = b"-4/a.sh", **fields: Any) -> messages.Run:
    given = {
        "run": number.to_bytes(16, "big"),
        "vmr": vmr,
        "attempt": 1,
        "trigger": "schedule",
        "request": b"",
        "script": b"/var/launch/" + vmr[:200] + b"/call_arguments.sh",
        "boot": "boot",
        "pid": 1281,
        "started": _BEGAN,  # the same in each session: a run begins once
    }
    return messages.Run(**{**given, **fields})


def output(data: bytes, offset: int = 0, number: int = 1, **fields: Any) -> messages.Output:
    given: dict[str, Any] = {
        "run": number.to_bytes(16, "big"),
        "stream": int(Stream.STDOUT),
        "offset": offset,
        "more": False,
        "marks": ((len(data), time.time_ns()),),
        "data": data,
    }
    return messages.Output(**{**given, **fields})


def exited(number: int = 1, **fields: Any) -> messages.Exit:
    given: dict[str, Any] = {
        "run": number.to_bytes(16, "big"),
        "ending": "code",
        "value": 0,
        "text": "",
        "started": _BEGAN,  # the same in each session: a run begins once
        "ended": time.time_ns(),
        "started_boottime": 10**9,
        "ended_boottime": 2 * 10**9,
        "boot": "boot",
        "stdout": 0,
        "stderr": 0,
        "user": 0,
        "system": 0,
        "max_rss": 0,
        "asks_reboot": False,
    }
    return messages.Exit(**{**given, **fields})


def closed(number: int = 1, **fields: Any) -> messages.Closed:
    given: dict[str, Any] = {"run": number.to_bytes(16, "big"), "stdout": 0, "stderr": 0, "reason": ""}
    return messages.Closed(**{**given, **fields})


__all__ = ["Ended", "Guest", "Host", "Opened", "closed", "exited", "output", "run", "until"]
