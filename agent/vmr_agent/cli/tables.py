"""What lives here: the tables of `vmr-host`, printed once or shown again as they change.

It must not know: where the rows come from. `rich` draws what is shown again on a terminal; where it is absent
the screen is written anew, and what isn't a terminal gets each table that differs from the last.
"""

from __future__ import annotations

import datetime
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Callable, NamedTuple

from vmr_agent import sizes
from vmr_agent.cli import arguments
from vmr_agent.errors import show

EVERY = 1.0  # s between looks
_BELOW = 4  # lines of the screen that rows can't have: the frame, what stands below, the cursor

_COUNTED = {
    "RUNNING": ("running", "blocked"),
    "EXIT 0": ("exited_zero",),
    "NON-ZERO": ("exited_nonzero",),
    "KILLED": ("killed",),
    "LOST": ("lost",),
}
_NOTED = {"blocked": "blocked", "refused": "refused", "failed_to_start": "could not start"}


VM_KEYS: Mapping[str, str] = {
    "vm": "the VM's name",
    "state": "configuring, configured or offline; unknown: no collector was asked",
    "online": "whether there is a session with it",
    "reason": "why there is none; else empty",
    "configured": "whether its negative times are over; null: not known",
    "time_zero": "as the host set it: UTC by its clock, as started in list --json; null: it has not set any. A VM that "
    "set its own before goes by that",
    "standstill": "why nothing that waits is started by schedule: held, or schedule is off; else empty",
    "vmrs": "object: how many of its VMRs are staged, waiting, refused, running, blocked, exited_zero, "
    "exited_nonzero, killed, failed_to_start, lost",
    "health": "object, with the last heartbeat: load_1m_milli (thousandths), cpus, memory_total, memory_available, "
    "disk_total, disk_free (bytes); empty: none came",
    "disk": "object: used (bytes that its output and logs take, near enough), quota (the most; 0: no bound), over "
    "(whether its output waits in the VM for room); empty: not known",
    "dropped": "object: bytes and frames from it that could not be understood, by kind",
}
"""What `mix --json` prints of each VM. Keys may be added; none is removed, renamed or given another meaning."""

VMR_KEYS: Mapping[str, str] = {
    "vmr": "the VMR's name, <start time>/<directory name>; odd bytes as \\xNN",
    "start_time": "its first part",
    "name": "its second part",
    "attempt": "the latest attempt; 0: none yet",
    "trigger": "what started it: schedule, rerun, host or reboot; null: none yet",
    "state": "staged, waiting, refused, running, blocked, exited, killed, failed to start, lost or unreadable",
    "pid": "process id of the script in the VM, or null",
    "started": "UTC by the host's clock, as in 2024-06-06T00:43:08.123456Z; null: not started",
    "ended": "likewise; null: not ended",
    "duration_s": "seconds from start to end; null: not ended",
    "exit_code": "null: not ended, or ended otherwise",
    "signal": "name of the signal that ended it, as in SIGKILL; else null",
    "error": "why it is held, refused, blocked, lost, could not start or has its output dropped; else null",
    "stdout_bytes": "bytes in the log directory, gaps included",
    "stderr_bytes": "likewise",
    "closed": "whether nothing more can come",
    "complete": "whether all of it is here: closed, and without a gap",
    "gaps": "array of objects, the first thousand: bytes that will never come, with stream, offset, length, reason and "
    "the time of the first, or null",
    "missing_bytes": "bytes in all gaps",
    "rusage": "object: user_s, system_s, max_rss_bytes of the run; null: not ended",
}
"""What `list --json` prints of each VMR, and `result.json` holds. Keys may be added; none is removed, renamed or
given another meaning."""


class Table(NamedTuple):
    head: list[str]
    rows: list[list[str]]
    right: frozenset[int]
    """The columns set to the right."""
    below: str = ""

    def text(self) -> str:
        lines = arguments.table([self.head, *self.rows], right=self.right)
        return f"{lines}\n{self.below}" if self.below else lines


def mix(vms: Sequence[Mapping[str, Any]]) -> Table:
    """One row a VM, and how many VMs are in which state."""
    rows = []
    for vm in vms:
        counts = vm["vmrs"]
        numbers = [counts["staged"] + counts["waiting"]]
        numbers += [sum(counts[each] for each in word) for word in _COUNTED.values()]
        notes = [f"{counts[each]} {word}" for each, word in _NOTED.items() if counts[each]]
        if vm["state"] == "offline":
            notes.insert(0, vm["reason"])
        if vm["standstill"]:
            notes.insert(0, vm["standstill"])
        if vm["disk"].get("over"):
            notes.insert(0, f"over its quota of {sizes.shown(vm['disk']['quota'])}")
        rows.append(
            [_cell(vm["vm"]), vm["state"], *(str(each or "") for each in numbers), _cell(", ".join(notes))]
        )
    states = Counter(vm["state"] for vm in vms)
    below = ", ".join(f"{count} {state}" for state, count in states.most_common())
    below = f"{len(vms)} VM{'s' * (len(vms) != 1)}" + (f": {below}" if below else "")
    zeros = {vm["time_zero"] for vm in vms}
    if zeros != {None} and vms:
        zero = zeros.pop() if len(zeros) == 1 else None
        below += (
            f"; time zero {zero[:19].replace('T', ' ')} UTC"
            if zero
            else "; time zero is not the same for all"
        )
    head = ["VM", "STATE", "WAITING", *_COUNTED, "NOTE"]
    return Table(head, rows, frozenset(range(2, len(head) - 1)), below)


def vmrs(rows: Sequence[Mapping[str, Any]], below: str) -> Table:
    """One row a VMR."""
    head = ["VMR", "TRY", "STATE", "EXIT", "TIME", "OUTPUT", "NOTE"]
    cells = []
    for row in rows:
        exit_code = "" if row["exit_code"] is None else row["exit_code"]
        cells.append(
            [
                _cell(row["vmr"]),
                str(row["attempt"] or ""),
                _cell(row["state"]),
                _cell(row["signal"] or exit_code),
                arguments.duration(_seconds(row)),
                sizes.shown(row["stdout_bytes"] + row["stderr_bytes"]) if row["attempt"] else "",
                _cell(_note(row)),
            ]
        )
    return Table(head, cells, frozenset({1, 3, 4, 5}), below)


def _seconds(row: Mapping[str, Any]) -> Any:
    """How long it ran, or has run by now."""
    if row["state"] not in ("running", "blocked") or not row["started"]:
        return row["duration_s"]
    started = datetime.datetime.strptime(row["started"], "%Y-%m-%dT%H:%M:%S.%fZ")
    now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
    return max(0.0, (now - started).total_seconds())


def _note(row: Mapping[str, Any]) -> str:
    if row["error"]:
        return str(row["error"])
    if row.get("missing_bytes"):
        return f"{sizes.shown(row['missing_bytes'])} missing"
    running = not row["attempt"] or row["state"] in ("running", "blocked")
    return "" if running or row["closed"] else "its pipes are still open"


def _cell(value: object) -> str:
    """Safe on a terminal: names, states and sentences are the guest's."""
    return show(str(value).encode("utf-8", "surrogateescape"))


# --- shown again ---------------------------------------------------------------------------------------------


def watch(draw: Callable[[], Table]) -> None:
    """Show a table again as it changes, for ever."""
    if not sys.stdout.isatty():
        changes(lambda: draw().text() + "\n")
    try:
        import rich.live  # noqa: F401
    except ImportError:
        while True:
            print("\x1b[H\x1b[J" + _cut(draw()).text(), flush=True)
            time.sleep(EVERY)
    _live(draw)


def changes(draw: Callable[[], str]) -> None:
    """Print what is drawn whenever it differs from the last, for ever."""
    last = None
    while True:
        text = draw()
        if text != last:
            print(text, flush=True)
        last = text
        time.sleep(EVERY)


def _live(draw: Callable[[], Table]) -> None:
    import rich.box
    import rich.live
    import rich.table
    import rich.text

    def drawn() -> rich.table.Table:
        table = _cut(draw())
        caption = rich.text.Text(table.below)
        shown = rich.table.Table(box=rich.box.SIMPLE, caption=caption, caption_justify="left", pad_edge=False)
        for column, name in enumerate(table.head):
            shown.add_column(
                name,
                justify="right" if column in table.right else "left",
                no_wrap=column > 0 and name != "NOTE",
            )
        for row in table.rows:
            shown.add_row(*map(rich.text.Text, row))  # as Text: markup in a guest's words stays as it is
        return shown

    with rich.live.Live(drawn(), auto_refresh=False) as live:
        while True:
            time.sleep(EVERY)
            live.update(drawn(), refresh=True)


def _cut(table: Table) -> Table:
    """As much of the table as the screen has lines for."""
    room = max(1, shutil.get_terminal_size().lines - _BELOW - 2)
    if len(table.rows) <= room:
        return table
    return table._replace(rows=table.rows[:room], below=f"{len(table.rows) - room} more; {table.below}")
