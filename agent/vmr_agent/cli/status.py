"""What lives here: `vmr-agent status`: every VMR and what became of it, as a table, as JSON, or kept fresh.

It must not know: how it is found out. The daemon says it, but for `changed`, which is looked up in the files.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Optional

from vmr_agent import sizes
from vmr_agent.cli import arguments, guest
from vmr_agent.cli.start import PROGRAM
from vmr_agent.errors import Problem, show
from vmr_agent.guest import keepsakes
from vmr_agent.guest.keepsakes import Snapshot
from vmr_agent.guest.settings import Settings
from vmr_agent.guest.spool import History

KEYS: Mapping[str, str] = {
    "vmr": "the VMR's name, <start time>/<directory name>; odd bytes as \\xNN",
    "start_time": "its first part",
    "name": "its second part",
    "attempt": "the latest attempt; 0: none yet",
    "trigger": "what started it: schedule, rerun, host or reboot; null: none yet",
    "state": "staged, waiting, refused, running, blocked, exited, killed, failed to start, lost or unreadable",
    "pid": "process id of the script, or null",
    "started": "UTC, as in 2024-06-06T00:43:08.123456Z; null: not started",
    "ended": "likewise; null: not ended",
    "duration_s": "seconds from start to end; null: not ended",
    "age_s": "seconds since the start of a run in progress; else null",
    "exit_code": "null: not ended, or ended otherwise",
    "signal": "name of the signal that ended it, as in SIGKILL; else null",
    "error": "why it is refused, blocked, lost, could not start or has its output dropped; else null",
    "stdout_bytes": "bytes captured so far, dropped ones included",
    "stderr_bytes": "likewise",
    "dropped_bytes": "of these, bytes that were dropped for want of space; see overflow in vmr-agent.conf(5)",
    "complete": "true: no more bytes can come",
    "waiting": "why it has not run yet; else null",
    "delivered": "what the host has of it: yes, no, a percentage, so far (it runs on), almost, or empty",
    "staged": "false: it is gone from the launch directory",
    "changed": "whether a file of it is not what was staged; null: not known, or it has not run",
}
"""What `--json` prints of each VMR. Keys may be added; none is removed, renamed or given another meaning."""

_HEAD = ("VMR", "TRY", "STATE", "EXIT", "TIME", "OUTPUT", "CHANGED", "ON HOST")
_NO_START = "failed to start"
_RIGHT = frozenset({1, 3, 4, 5})
_REFRESH_S = 1.0
_ABOVE = 3  # rows shown before the first that isn't over, where not all have room


def status(settings: Settings, *, as_json: bool, watch: bool) -> int:
    edits = _Edits(settings)
    if watch:
        return _watch(settings, edits)
    found = _ask(settings, edits)
    if as_json:
        print(json.dumps(found["vmrs"], indent=2))
        return 0
    lines = (line for block in table(found["vmrs"]) for line in block)
    print("\n".join([*lines, "", *_summary(found)]))
    return 0


def _ask(settings: Settings, edits: _Edits) -> dict[str, Any]:
    with guest.daemon(settings) as daemon:
        found = daemon.ask("status")
    edits.look()
    for row in found["vmrs"]:
        row["changed"] = edits.of(row["vmr"]) if row["attempt"] else None
    return found


class _Edits:
    """Which VMRs have been edited since they were staged."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._history = History(settings.state_dir)
        self._names: dict[str, bytes] = {}
        self._staged: dict[tuple[bytes, int], Optional[Snapshot]] = {}

    def look(self) -> None:
        """Learn the names there are: what is shown of one need not be all of it."""
        launch = os.fsencode(self._settings.launch_dir)
        self._names = {}
        for start_time in _list(launch):
            for directory in _list(launch + b"/" + start_time):
                name = start_time + b"/" + directory
                self._names[show(name)] = name

    def of(self, shown: str) -> Optional[bool]:
        """Whether a VMR was edited; None where that can't be told."""
        vmr = self._names.get(shown)
        run = self._history.staged_as(vmr) if vmr is not None else None
        if vmr is None or run is None:
            return None
        key = (vmr, run.info.attempt)
        if key not in self._staged:
            self._staged[key] = keepsakes.kept(run.path)
        staged = self._staged[key]
        if staged is not None:
            with suppress(OSError):
                return bool(keepsakes.edited(staged, keepsakes.now(guest.directory(vmr, self._settings))))
        return None


def _list(path: bytes) -> list[bytes]:
    try:
        return os.listdir(path)
    except OSError:
        return []


# --- the table -----------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The head, and a line or two for each VMR.

    What has not run has its reason in place of figures; why one was lost or could not start comes below it.
    """
    cells = [list(_HEAD), *(_cells(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells if len(row) > 4) for column in range(len(_HEAD))]
    widths[0] = max(len(row[0]) for row in cells)
    # "failed to start" has no exit code: it takes that column's place too, or no table would fit 80 columns.
    states = [row[2] for row in cells]
    widths[2] = max(len(state) for state in states if state != _NO_START)
    widths[3] = max(widths[3], max(map(len, states)) - widths[2] - 2)
    found = []
    for row, reason in zip(cells, [None, *map(_remark, rows)]):
        padded = [
            cell.rjust(width) if column in _RIGHT and len(row) > 4 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        if row[2] == _NO_START:
            padded[2:4] = [_NO_START.ljust(widths[2] + 2 + widths[3])]
        found.append(["  ".join(padded).rstrip(), *([f"    {reason}"] if reason else [])])
    return found


def _cells(row: Mapping[str, Any]) -> list[str]:
    if not row["attempt"]:
        return [row["vmr"], "", row["state"], row["waiting"] or row["error"] or ""]
    seconds = row["duration_s"] if row["duration_s"] is not None else row["age_s"]
    return [
        row["vmr"],
        str(row["attempt"]),
        row["state"],
        str(row["signal"] or ("" if row["exit_code"] is None else row["exit_code"])),
        _span(seconds),
        sizes.shown(row["stdout_bytes"] + row["stderr_bytes"]),
        "yes" if row["changed"] else "",
        row["waiting"] or row["delivered"],
    ]


def _remark(row: Mapping[str, Any]) -> str:
    """What comes below its line."""
    if not row["attempt"]:
        return ""
    dropped = f"{row['dropped_bytes']:,} bytes dropped" if row["dropped_bytes"] else ""
    return "; ".join(filter(None, (row["error"], dropped)))


def _span(seconds: Optional[float]) -> str:
    if seconds is None or seconds < 100:
        return arguments.duration(seconds)
    minutes = int(seconds) // 60
    return f"{minutes}m{int(seconds) % 60:02}s" if minutes < 100 else f"{minutes // 60}h{minutes % 60:02}m"


def _summary(found: Mapping[str, Any]) -> Iterator[str]:
    if found["problem"]:
        yield found["problem"]
    where = "configured" if found["configured"] else "not yet configured"
    zero = found["since_zero_s"]
    if zero is None:
        when = "time zero not set"
    elif zero < 0:
        when = f"time zero in {arguments.duration(-zero)}"
    else:
        when = f"{arguments.duration(zero)} after time zero"
    held = "; held (vmr-agent resume)" if found["held"] else ""
    off = "; schedule is off" if found["schedule"] == "off" else ""
    yield f"{where}, {when}{held}{off}"
    reason = f": {found['port_reason']}" if found["port_reason"] else ""
    host = "" if found["session"] else ", no session with the host"
    yield f"port {found['port']} is {found['port_state']}{reason}{host}"


# --- kept fresh ----------------------------------------------------------------------------------------------


def _watch(settings: Settings, edits: _Edits) -> int:
    if not sys.stdout.isatty():
        raise Problem("cannot watch: standard output is no terminal", hint="--json is for programs")
    sys.stdout.write("\x1b[2J")
    try:
        while True:
            began = time.monotonic()
            try:
                found = _ask(settings, edits)
                rows, foot = found["vmrs"], list(_summary(found))
            except Problem as problem:  # it may come back
                rows, foot = [], [f"{PROGRAM}: {problem}"]
            size = shutil.get_terminal_size()
            foot = _fitted(foot, size.columns)
            lines = [*_window(rows, size.lines - len(foot) - 1, size.columns), "", *foot]
            # Written over what is there, line by line: a screen that is cleared first flickers.
            text = "".join(line + "\x1b[K\n" for line in lines)
            sys.stdout.write("\x1b[H" + text.rstrip("\n") + "\x1b[J")
            sys.stdout.flush()
            # On a slow VM with many VMRs looking takes a while: no more than a fifth of the time goes into it.
            time.sleep(max(_REFRESH_S, 4 * (time.monotonic() - began)))
    except KeyboardInterrupt:
        print()
        return 130


def _fitted(lines: Iterable[str], columns: int) -> list[str]:
    """The lines, the long ones in several."""
    return [part for line in lines for part in textwrap.wrap(line, columns, subsequent_indent="    ") or [""]]


def _window(rows: Sequence[Mapping[str, Any]], room: int, columns: int) -> list[str]:
    """The head, and as many lines as there is room for, about the first VMR that isn't over."""
    (head,), *blocks = table(rows)
    head, blocks = head[:columns], [_fitted(block, columns) for block in blocks]
    lines = [line for block in blocks for line in block]
    room = max(room - 1, 2)
    if len(lines) <= room:
        return [head, *lines]
    room -= 1  # one line says what isn't shown
    over = list(itertools.takewhile(lambda pair: _over(pair[0]), zip(rows, blocks)))
    above = sum(len(block) for _, block in over)
    first = max(0, min(above - _ABOVE, len(lines) - room))
    hidden = f"… {first} lines above, {len(lines) - room - first} below"
    return [head, *lines[first : first + room], hidden]


def _over(row: Mapping[str, Any]) -> bool:
    return row["ended"] is not None or row["state"] == "refused"
