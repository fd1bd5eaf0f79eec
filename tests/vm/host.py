"""The host beside a VM: a real collector on the VM's socket, and what a test asks of its logs and of the guest.

The e2e tests' World with a VM in place of its guest: what it knows of logs and results serves here as well.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable, Optional

from tests.e2e.world import World, until
from tests.vm.vm import AGENT_PORT, Vm

PATIENCE = 180.0  # s; emulated CPUs are slow and the machine may be busy: ends a hang, measures nothing
LINE = 64  # bytes; of what `COUNTER` prints
LAUNCH = "/var/launch"

# Prints numbered lines to both streams until the test has had enough; how long that takes is the test's business.
COUNTER = """\
#!/usr/bin/python3
import os, time
number = 0
while number < 20000 or not os.path.exists("/root/enough"):
    for fd in 1, 2:
        data = b"".join(b"%08d to %d %s\\n" % (each, fd, b"." * 49) for each in range(number, number + 200))
        while data:
            data = data[os.write(fd, data):]
    number += 200
    time.sleep(0.02)
"""


def counted(stream: int, size: int) -> bytes:
    """The first ``size`` bytes that `COUNTER` prints to a stream."""
    return b"".join(b"%08d to %d %s\n" % (each, stream, b"." * 49) for each in range(size // LINE + 1))[:size]


class VmWorld(World):
    """One VM with the product in it, one host."""

    def __init__(self, path: Path, vm: Vm, settings: Optional[Mapping[str, str]] = None) -> None:
        super().__init__(path)
        self.vm = vm
        self.channel: Optional[Path] = None
        """Where the collector connects, if not to QEMU itself."""
        lines = ["[vmr-agent]", *(f"{key} = {value}" for key, value in (settings or {"quiet": "1"}).items())]
        vm.put({"/etc/vmr-agent.conf": "\n".join([*lines, ""]).encode()})

    # --- the host ---

    def start_collector(self, *options: str) -> subprocess.Popen[bytes]:
        with (self.path / "collector.log").open("ab") as log:
            self.collector = subprocess.Popen(
                [
                    *(sys.executable, "-m", "vmr_agent.cli.host", "collect", "--log-dir", str(self.logs)),
                    *(f"Server={self.channel or self.vm.port_socket(AGENT_PORT)}", *options),
                ],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return self.collector

    def complete(self, vmr: str, attempt: int = 1, limit: float = PATIENCE) -> dict[str, Any]:
        row = self.closed(vmr, attempt, limit)
        assert row["complete"], row
        return row

    def closed(self, vmr: str, attempt: int = 1, limit: float = PATIENCE) -> dict[str, Any]:
        """Wait until nothing of the run will follow, whole or lost, and return its result.json."""

        def over() -> Optional[dict[str, Any]]:
            row = self.result(vmr, attempt)
            return row if row is not None and row["closed"] else None

        try:
            row: dict[str, Any] = self.wait(over, f"{vmr} attempt {attempt} closed on the host", limit)
        except AssertionError as error:
            _, journal = self.vm.run(
                "systemctl status vmr-agent; journalctl -b -o cat -u vmr-agent | tail -40"
            )
            raise AssertionError(f"{error}\n--- the guest\n{journal.decode(errors='replace')}") from None
        return row

    def wait(self, holds: Callable[[], Any], what: str, limit: float = PATIENCE) -> Any:
        try:
            return until(holds, what, limit)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.tail()}") from None

    def more(self, vmr: str, attempt: int = 1) -> None:
        """Wait until the host gets more of a run than it has now."""
        before = len(self.raw(vmr, attempt=attempt))
        self.wait(lambda: len(self.raw(vmr, attempt=attempt)) > before, f"more of {vmr} on the host")

    def logged(self, vmr: str) -> dict[str, bytes]:
        """All output of a VMR's runs that Server.log shows, by stream."""
        name = re.escape(vmr.partition("/")[2])
        found: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        for stream, shown in re.findall(rf"INFO\] {name} \(\d+\) (\w+): (b.*)", self.log()):
            found[stream].append(ast.literal_eval(shown))
        return {stream: b"".join(pieces) for stream, pieces in found.items()}

    # --- the guest ---

    def guest_stage(self, vmr: str, command: str, files: Optional[Mapping[str, str]] = None) -> None:
        """Stage with tar, which sets the x bit last."""
        where = f"{LAUNCH}/{vmr}"
        staged = {f"{where}/{name}": content.encode() for name, content in (files or {}).items()}
        script = f'#!/bin/bash\nCURRENT_DIR="$(dirname "$0")"\ncd {shlex.quote(where)}\n{command}\n'
        self.vm.put({**staged, f"{where}/call_arguments.sh": script.encode()})

    def guest_status(self) -> dict[str, Any]:
        """What the daemon answers to `status` on its socket; empty while it doesn't."""
        # Asked again and again while something is waited for: `json` and `socket` would take as long as Python itself.
        ask = (
            "import _socket, sys\n"
            "s = _socket.socket(_socket.AF_UNIX); s.connect('/run/vmr-agent/control')\n"
            's.send(b\'{"verb": "status"}\\n\'); line = b""\n'
            "while not line.endswith(b'\\n'):\n"
            "    line += s.recv(1 << 16) or sys.exit(1)\n"
            "print(line.decode())\n"
        )
        code, output = self.vm.run(f"python3 -ISE -c {shlex.quote(ask)} 2>/dev/null")
        return json.loads(output) if code == 0 else {}

    def guest_row(self, vmr: str) -> dict[str, Any]:
        rows = self.guest_status().get("vmrs", [])
        return next((row for row in rows if row["vmr"] == vmr), {})

    def daemon_pid(self) -> int:
        return int(self.vm.check("systemctl show -p MainPID --value vmr-agent"))

    def guest_cpu(self, seconds: float) -> float:
        """The share of a core that the daemon and its fork server use, idle as they are."""
        pid = self.daemon_pid()
        script = (
            f"sum() {{ cat /proc/{pid}/stat /proc/$(pgrep -P {pid})/stat; }}\n"
            "cpu() { sum | awk '{ n += $14 + $15 } END { print n }'; cut -d' ' -f1 /proc/uptime; }\n"
            f"cpu; sleep {seconds}; cpu"
        )
        first, start, last, end = map(float, self.vm.check(script).split())
        return (last - first) / 100 / (end - start)
