"""A spool, a runner and a launch directory under a test's own directory: what the guest's tests stand on."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Callable, Optional

from vmr_agent.guest.runner import Runner
from vmr_agent.guest.spool import Run, Spool
from vmr_agent.runs import RunResult, RunState, Stream, Trigger

VMR = b"-4/a.sh"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
PATIENCE_S = 60.0


def eventually(condition: Callable[[], object], what: str = "it", *, within: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {within} s"
        time.sleep(0.005)


def alive(pid: int) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return fields[0] not in (b"Z", b"X")


def may_raise_priority() -> bool:
    """CAP_SYS_NICE (capabilities(7)), which root in a container need not have."""
    effective = Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0]
    return bool(int(effective, 16) >> 23 & 1)


class Rig:
    def __init__(self, base: Path, *, state: Optional[Path] = None, boot_id: str = BOOT_ID) -> None:
        self.base = base
        self.launch = base / "launch"
        self.state = state or base / "state"
        self.logged: list[str] = []
        self.kicks = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        (base / "kick").unlink(missing_ok=True)
        self.kicks.bind(os.fspath(base / "kick"))
        self.kicks.settimeout(0.05)
        self.boot_id = boot_id
        self.spool = Spool(self.state)
        self.runner = Runner(
            self.spool,
            kick_path=base / "kick",
            launch_dir=self.launch,
            log=self.logged.append,
            boot_id=boot_id,
        )
        self.runs: list[Run] = []

    def stage(self, text: str | bytes, vmr: bytes = VMR) -> Path:
        directory = self.launch / os.fsdecode(vmr)
        directory.mkdir(parents=True, exist_ok=True)
        script = directory / "call_arguments.sh"
        script.write_bytes(text if isinstance(text, bytes) else text.encode())
        script.chmod(0o755)
        return script

    def start(self, vmr: bytes = VMR) -> Run:
        run = self.runner.start(vmr, Trigger.SCHEDULE, now_ns=time.time_ns())
        self.runs.append(run)
        return run

    def wait(self, run: Run, state: RunState) -> None:
        """Judge on each kick and each now and then, as the daemon does, until the run got so far."""
        deadline = time.monotonic() + PATIENCE_S
        while self.runner.judge(run) < state:
            assert time.monotonic() < deadline, f"{run!r} did not get to {state!r}"
            try:
                self.kicks.recv(16)
            except socket.timeout:
                pass

    def run(self, text: str | bytes, vmr: bytes = VMR) -> Run:
        self.stage(text, vmr)
        run = self.start(vmr)
        self.wait(run, RunState.CLOSED)
        return run

    def restart(self, *, boot_id: Optional[str] = None) -> Rig:
        """Another daemon on the same directories."""
        self.runner.close()
        self.spool.close()
        self.kicks.close()
        return Rig(self.base, state=self.state, boot_id=boot_id or self.boot_id)

    def close(self) -> None:
        self.runner.close()
        for run in self.runs:
            for pid in (run.holder(), run.started() and run.started().pid):  # type: ignore[union-attr]
                if pid:
                    try:
                        os.kill(pid, 9)
                    except ProcessLookupError:
                        pass
        self.spool.close()
        self.kicks.close()


def everything(run: Run, stream: Stream) -> bytes:
    data = b""
    while True:
        piece = run.read(stream, len(data), 1 << 20)
        if not piece:
            return data
        data += piece


def result(run: Run) -> RunResult:
    found = run.result()
    assert found is not None
    return found
