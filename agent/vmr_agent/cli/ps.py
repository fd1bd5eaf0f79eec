"""What lives here: `vmr-agent ps`: the processes of a VMR's run as a tree, what they use, who holds its pipes.

It must not know: how processes are found. It asks nobody: a run's own files say where to look.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from vmr_agent import sizes
from vmr_agent.cli import arguments, guest
from vmr_agent.errors import Problem, show
from vmr_agent.guest import processes
from vmr_agent.guest.processes import ProcessRow
from vmr_agent.guest.settings import Settings


def ps(vmr: bytes, settings: Settings) -> int:
    """Print them."""
    runs = guest.runs_of(vmr, settings)
    held = [run for run in runs if run.locked()]
    held += [run for run in runs[-1:] if run.result() is None and run not in held]  # its shim may be gone
    run = held[-1] if held else runs[-1]
    rows = processes.rows(run)
    own = {row.pid for row in rows}
    strangers = [pid for pid in processes.holders(run) if pid not in own]
    what = f"attempt {run.info.attempt} of {show(vmr)}"
    if not rows and not strangers:
        raise Problem(f"cannot show processes of {show(vmr)}: attempt {run.info.attempt} has none")
    table = [["PID", "STATE", "CPU", "MEMORY", "READ", "WRITTEN", "PIPES", "COMMAND"]]
    for row, depth in _tree(rows):
        amounts = [sizes.shown(count) for count in (row.rss_bytes, row.read_bytes, row.written_bytes)]
        holds = "holds" if row.holds_pipe else ""
        command = "  " * depth + show(os.fsencode(row.command))
        table.append([str(row.pid), row.status, arguments.duration(row.cpu_s), *amounts, holds, command])
    if rows:
        print(arguments.table(table, right=frozenset({0, 2, 3, 4, 5})))
    if run.result() is not None:
        print(f"{what} has exited; its pipes are still held")
    if strangers:
        print(f"held by others too: {', '.join(f'pid {pid}' for pid in strangers)}")
    earlier = [str(other.info.attempt) for other in held[:-1]]
    if earlier:
        which = f"attempt{'s' * (len(earlier) > 1)} {', '.join(earlier)}"
        print(f"processes of {which} are left too: shown, and killed, when these are gone")
    return 0


def _tree(rows: Sequence[ProcessRow]) -> list[tuple[ProcessRow, int]]:
    """Every process below its parent, with how deep it lies; the children of those that ended stand at the top."""
    pids = {row.pid for row in rows}
    ordered: list[tuple[ProcessRow, int]] = []

    def visit(row: ProcessRow, depth: int) -> None:
        ordered.append((row, depth))
        for child in rows:
            if child.ppid == row.pid and child.pid != row.pid:
                visit(child, depth + 1)

    for row in rows:
        if row.ppid not in pids:
            visit(row, 0)
    return ordered
