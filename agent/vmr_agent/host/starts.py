"""What lives here: when the experiment starts, or started, as it is kept in the log directory.

A collector that is started again takes it from here, so that no guest is believed about it. A guest only shows that
this is the same experiment still, by the spool it had when it was told. It must not know: sessions, clocks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Optional

from vmr_agent.host.journal import read_in, replace_durably

_FILE = ".start"


class Moment(NamedTuple):
    """As the spool keeps time zero: within a boot of this host only ``boottime_ns`` counts, after it the wall clock."""

    boot: str
    boottime_ns: int
    wall_ns: int

    def after(self, seconds: float) -> Moment:
        ns = int(seconds * 1e9)
        return Moment(self.boot, self.boottime_ns + ns, self.wall_ns + ns)

    def seconds_since(self, other: Moment) -> float:
        if self.boot and self.boot == other.boot:
            return (self.boottime_ns - other.boottime_ns) / 1e9
        return (self.wall_ns - other.wall_ns) / 1e9


class Start(NamedTuple):
    """What one VM was told."""

    spool: str
    """Its spool's id in hex digits; empty: it had not been heard of yet."""
    everybody: bool
    """It is the start of all VMs, also of those that come later."""
    zero: Moment


class Starts:
    """Of all VMs of one log directory, those of other collectors too."""

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._ours: dict[str, Start] = {}
        self._void: dict[str, Start] = {}
        """What could not be kept, and may be on the disk all the same."""
        self._found = self._read()
        self.changed = False
        """What was noted is not durable yet."""

    def of(self, vm: str, spool: Optional[bytes]) -> Optional[Start]:
        """What a VM was told when it had this spool."""
        start = self._ours.get(vm) or self._found.get(vm)
        return start if start is not None and spool is not None and start.spool == spool.hex() else None

    def note(self, vm: str, spool: Optional[bytes], *, everybody: bool, zero: Moment) -> None:
        start = Start("" if spool is None else spool.hex(), everybody, zero)
        if self._ours.get(vm) != start:
            self._ours[vm] = start
            self.changed = True

    def keep(self, spools: Mapping[str, Optional[bytes]], zero: Moment) -> None:
        """Note the start of everybody, for these VMs, and make it durable. OSError where that can't be, and then it is
        none: not here, nor on the disk, where it may have come as far as that."""
        before = dict(self._ours)
        for vm, spool in spools.items():
            self.note(vm, spool, everybody=True, zero=zero)
        try:
            self.write()
        except OSError:
            self._void = {vm: start for vm, start in self._ours.items() if before.get(vm) != start}
            self._ours, self.changed = before, True
            raise

    def write(self) -> None:
        """Make it durable. OSError where that can't be."""
        kept = {vm: start for vm, start in self._read().items() if self._void.get(vm) != start}
        rows = {**kept, **self._ours}
        content = {vm: [start.spool, start.everybody, list(start.zero)] for vm, start in rows.items()}
        replace_durably(self._log_dir, _FILE, json.dumps(content).encode())
        self.changed = False

    def _read(self) -> dict[str, Start]:
        try:
            rows = json.loads(read_in(self._log_dir, _FILE))
            return {
                str(vm): Start(str(spool), bool(everybody), Moment(str(zero[0]), int(zero[1]), int(zero[2])))
                for vm, (spool, everybody, zero) in rows.items()
            }
        except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
            return {}  # none yet, or damaged: the experiment's start is not known
