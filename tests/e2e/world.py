"""A guest and a host as real processes of this machine, a socket for the port. Used by the tests, knows no test."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

from vmr_agent import control
from vmr_agent.errors import Problem

AGENT = Path(__file__).resolve().parents[2] / "agent"
LIMIT = 60.0  # s; for whatever must happen


def until(holds: Callable[[], Any], what: str, limit: float = LIMIT) -> Any:
    """Wait for something to hold, and return what it gave."""
    deadline = time.monotonic() + limit
    while True:
        found = holds()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"gave up after {limit:.0f} s: {what}")
        time.sleep(0.02)


class World:
    """One VM's worth of guest, and one host."""

    def __init__(self, path: Path, *, settings: Optional[Mapping[str, str]] = None) -> None:
        self.path = path
        self.launch = path / "launch"
        self.spool = path / "state"
        self.logs = path / "logs"
        # Sockets have 107 bytes for their path; pytest's directories are longer than that.
        self.sockets = Path(tempfile.mkdtemp(prefix="vmr-"))
        self.port = self.sockets / "port"
        self.runtime = self.sockets / "run"
        self.control = self.sockets / "control"
        self.config = path / "agent.conf"
        self.launch.mkdir()
        self.settings = {"quiet": "0.5", **(settings or {})}
        self.write_config()
        self.daemon: Optional[subprocess.Popen[bytes]] = None
        self.collector: Optional[subprocess.Popen[bytes]] = None

    def write_config(self) -> None:
        lines = [f"{name} = {value}" for name, value in self.settings.items()]
        self.config.write_text("\n".join(["[vmr-agent]", *lines]) + "\n")

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(AGENT),
            "VMR_AGENT_CONFIG": str(self.config),
            "VMR_AGENT_LAUNCH_DIR": str(self.launch),
            "VMR_AGENT_STATE_DIR": str(self.spool),
            "VMR_AGENT_RUNTIME_DIR": str(self.runtime),
            "VMR_AGENT_PORT": f"unix:{self.port}",
            "VMR_HOST_CONTROL": str(self.control),
        }

    # --- staging, as FIREWHEEL does it ---

    def stage(
        self,
        vmr: Union[str, bytes],
        command: Union[str, bytes],
        *,
        files: Optional[Mapping[str, Union[str, bytes]]] = None,
        commit: bool = True,
    ) -> Path:
        name = os.fsencode(vmr)
        directory = Path(os.fsdecode(os.path.join(os.fsencode(self.launch), name)))
        directory.mkdir(parents=True)
        for each, data in (files or {}).items():
            target = directory / each
            target.write_bytes(data.encode() if isinstance(data, str) else data)
            target.chmod(0o777)
        script = directory / "call_arguments.sh"
        line = command.encode() if isinstance(command, str) else command
        script.write_bytes(
            b'#!/bin/bash\nCURRENT_DIR="$(dirname "$0")"\ncd "'
            + os.fsencode(directory)
            + b'"\n'
            + line
            + b"\n"
        )
        script.chmod(0o777 if commit else 0o666)
        return directory

    # --- processes ---

    def start_daemon(self, *options: str, before: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """Start the daemon; ``before`` is a command that executes what follows it."""
        log = (self.path / "daemon.log").open("ab")
        self.daemon = subprocess.Popen(
            [*before, sys.executable, "-m", "vmr_agent.cli.start", "run", *options],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        return self.daemon

    def start_collector(self, *options: str, before: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        log = (self.path / "collector.log").open("ab")
        self.collector = subprocess.Popen(
            [
                *(
                    *before,
                    sys.executable,
                    "-m",
                    "vmr_agent.cli.host",
                    "collect",
                    "--log-dir",
                    str(self.logs),
                ),
                *("--listen", f"Server={self.port}", *options),
            ],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        return self.collector

    def agent(self, *arguments: Union[str, bytes], cwd: Optional[Path] = None, limit: float = LIMIT) -> Any:
        """Run a verb of the guest; a CompletedProcess with bytes."""
        return subprocess.run(
            [sys.executable, "-m", "vmr_agent.cli.start", *arguments],
            env=self.environment,
            cwd=cwd,
            capture_output=True,
            timeout=limit,
        )

    def host(self, *arguments: Union[str, bytes], limit: float = LIMIT) -> Any:
        return subprocess.run(
            [sys.executable, "-m", "vmr_agent.cli.host", *arguments],
            env=self.environment,
            capture_output=True,
            timeout=limit,
        )

    def ask(self, verb: str, **args: Any) -> dict[str, Any]:
        """Ask the daemon as a verb does, but without a process of its own."""
        with control.Connection(self.runtime / control.SOCKET, program="daemon", hint="") as daemon:
            return daemon.ask(verb, **args)

    def answer(self) -> dict[str, Any]:
        """What the daemon answers to `status`, empty while nobody does: for who waits, much cheaper than a verb."""
        try:
            return self.ask("status")
        except Problem:
            return {}

    def online(self) -> bool:
        """Whether the collector has a session with the VM."""
        try:
            with control.Connection(self.control, program="collector", hint="") as collector:
                return any(vm["online"] for vm in collector.ask("mix", vm="Server")["vms"])
        except Problem:
            return False

    def row(self, vmr: str) -> dict[str, Any]:
        """The row of one VMR in the daemon, empty when it isn't known there, or nobody answers."""
        return next((row for row in self.answer().get("vmrs", ()) if row["vmr"] == vmr), {})

    def state(self, vmr: str) -> str:
        """The state of a VMR in the guest, empty when it isn't known there."""
        return str(self.row(vmr).get("state", ""))

    def shims(self) -> dict[int, str]:
        """The shims there are: pid and VMR."""
        found = {}
        runs = self.spool / "runs"
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if (process / "comm").read_text() == "vmr-shim\n":
                    run = (process / "cwd").readlink().relative_to(runs)
                    found[int(process.name)] = str(run.parent)
            except (OSError, ValueError):
                continue
        return found

    def kill9(self, process: Optional[subprocess.Popen[bytes]]) -> None:
        assert process is not None
        process.send_signal(signal.SIGKILL)
        process.wait()

    def stop(self, process: Optional[subprocess.Popen[bytes]]) -> int:
        assert process is not None
        process.terminate()
        return process.wait(LIMIT)

    def close(self) -> None:
        for process in (self.daemon, self.collector):
            if process is not None and process.poll() is None:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        self._end_leftovers()
        shutil.rmtree(self.sockets, ignore_errors=True)

    def _end_leftovers(self) -> None:
        """Scripts that outlive their daemon, as they should, must not outlive the test."""
        for started in self.spool.glob("runs/*/*/*/started"):
            try:
                row = json.loads(started.read_bytes())
                os.killpg(int(row["process"]["pid"]), signal.SIGKILL)
            except (OSError, ValueError, KeyError):
                continue

    # --- what there is to see ---

    def status(self) -> dict[str, dict[str, Any]]:
        """The rows of `status` by VMR name; none while the daemon doesn't answer."""
        done = self.agent("status", "--json")
        if done.returncode:
            return {}
        return {row["vmr"]: row for row in json.loads(done.stdout)}

    def result(self, vmr: str, attempt: int = 1) -> Optional[dict[str, Any]]:
        try:
            row: dict[str, Any] = json.loads(
                (self.logs / "Server" / vmr / str(attempt) / "result.json").read_bytes()
            )
        except FileNotFoundError:
            return None
        return row

    def complete(self, vmr: str, attempt: int = 1, limit: float = LIMIT) -> dict[str, Any]:
        """Wait until the host has the run whole, and return its result.json."""

        def whole() -> Optional[dict[str, Any]]:
            row = self.result(vmr, attempt)
            return row if row is not None and row["complete"] else None

        row: dict[str, Any] = until(whole, f"{vmr} attempt {attempt} whole on the host\n{self.tail()}", limit)
        return row

    def raw(self, vmr: str, stream: str = "stdout", attempt: int = 1) -> bytes:
        path = self.logs / "Server" / vmr / str(attempt) / stream
        return path.read_bytes() if path.exists() else b""

    def log(self) -> str:
        path = self.logs / "Server.log"
        return path.read_text() if path.exists() else ""

    def rows(self) -> list[dict[str, Any]]:
        path = self.logs / "Server.json"
        text = path.read_text() if path.exists() else ""
        return [
            json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()
        ]  # the last may be half written

    def daemon_log(self) -> str:
        return (self.path / "daemon.log").read_text()

    def collector_log(self) -> str:
        return (self.path / "collector.log").read_text()

    def tail(self) -> str:
        found = []
        for name in ("daemon.log", "collector.log"):
            path = self.path / name
            if path.exists():
                found.append(f"--- {name}\n" + "\n".join(path.read_text().splitlines()[-15:]))
        return "\n".join(found)
