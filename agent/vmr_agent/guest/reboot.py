"""What lives here: the command that reboots the VM, and what becomes of it.

It must not know: who asks for a reboot, and when there is one: the schedule says so.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from typing import Callable, Optional

from vmr_agent.guest import machine

_COMMAND = ("systemctl", "reboot")
_LIMIT = 300.0  # s; a reboot command that has not rebooted by then has failed


class Reboot:
    def __init__(
        self, command: Optional[Sequence[str]], *, possible: bool, log: Callable[[str], None]
    ) -> None:
        """``possible``: this is a VM, which the default command may reboot; a command of one's own always may."""
        self._command = list(command or _COMMAND)
        self._log = log
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._asked = 0.0
        self.possible = possible or command is not None
        """False, too, once it has failed: the results of those that asked stand."""

    @property
    def under_way(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int:
        """The command's pid, which this room reaps itself; 0 while there is none."""
        return self._process.pid if self._process is not None else 0

    def begin(self, now: float, why: str) -> None:
        """Run the command; look at :attr:`under_way` for whether it could be started."""
        self._log(f"rebooting, {why}: {' '.join(self._command)}")
        os.sync()
        try:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, cwd="/")
            self._asked = now
        except OSError as error:
            self.possible = False
            self._log(f"cannot run {self._command[0]}: {error.strerror}")

    def look(self) -> bool:
        """False once when the command has failed. One that ended well only began it: the VM goes down after it."""
        if self._process is None:
            return True
        status = self._process.poll()
        if status:
            why = f"ended with status {status}"
        elif machine.boottime() - self._asked > _LIMIT:
            why = f"has not rebooted the VM in {_LIMIT:.0f} s"
        else:
            return True
        self._log(f"the reboot command {why}; the results stand")
        self._process, self.possible = None, False
        return False
