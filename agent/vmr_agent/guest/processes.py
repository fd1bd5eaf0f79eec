"""What lives here: the processes of a run: which they are, what they use, who holds its pipes; killing them.

Only looking and signalling: reaping is the shim's, since psutil's wait() takes the
exit status from whoever needs it. It must not know: the schedule, the wire.

psutil is imported when it is first needed: verbs that don't look at processes need not pay for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vmr_agent.guest.spool import Run
from vmr_agent.runs import Started

if TYPE_CHECKING:
    import psutil

_STOP_S = 1.0  # how long a tree may take to stand still; a process in disk sleep never does


class ProcessRow(NamedTuple):
    """One process of a run."""

    pid: int
    ppid: int
    command: str
    status: str
    cpu_s: float
    rss_bytes: int
    read_bytes: int
    written_bytes: int
    holds_pipe: bool
    """It has one of the run's pipes open: the run stays open until it lets go."""


def gone(started: Started, *, boot_id: str) -> bool:
    """Whether a script's process is gone for good: boot, pid and start ticks together name one process."""
    if started.boot_id != boot_id:
        return True
    fields = _stat(started.pid)
    return not fields or int(fields[19]) != started.ticks or fields[0] in (b"Z", b"X")


def tree(run: Run) -> list[psutil.Process]:
    """The live processes of a run, the script's own first.

    The shim is a subreaper, so all that the script ever forked is below it, whatever sessions they made.
    Without a shim only what is still below the script's own process can be found.
    """
    import psutil

    started = run.started()
    holder = run.holder()
    found: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        if holder is not None:
            found = psutil.Process(holder).children(recursive=True)
        elif started is not None and not gone(started, boot_id=started.boot_id):
            script = psutil.Process(started.pid)
            found = [script, *script.children(recursive=True)]
    own = started.pid if started is not None else 0
    return sorted(found, key=lambda process: process.pid != own)


def rows(run: Run) -> list[ProcessRow]:
    """What each process of a run is doing, for ``ps``."""
    import psutil

    pipes = _pipes(run)
    found = []
    for process in tree(run):
        with contextlib.suppress(psutil.Error), process.oneshot():
            times = process.cpu_times()
            read = written = 0
            with contextlib.suppress(psutil.Error, NotImplementedError):
                io = process.io_counters()
                read, written = io.read_bytes, io.write_bytes
            row = ProcessRow(
                pid=process.pid,
                ppid=process.ppid(),
                command=" ".join(process.cmdline()) or process.name(),
                status=process.status(),
                cpu_s=times.user + times.system,
                rss_bytes=process.memory_info().rss,
                read_bytes=read,
                written_bytes=written,
                holds_pipe=_holds(process.pid, pipes),
            )
            found.append(row)
    return found


def holders(run: Run) -> list[int]:
    """The pids of all processes that have one of the run's pipes open, in its tree or not."""
    pipes = _pipes(run)
    shim = run.holder()
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [pid for pid in sorted(pids) if pid != shim and _holds(pid, pipes)]


def kill(run: Run, number: int) -> dict[int, str]:
    """Send a signal to every process of a run; the pids it went to, with their names, the script's own first.

    A tree that forks while it is being signalled loses nobody: it is stopped, and walked until nothing new
    appears and all stand still. The script's own process hears of it first, so that a shell doesn't report
    its children's deaths; then the rest; then all are let go on.
    """
    import psutil

    stopped: dict[int, psutil.Process] = {}
    signalled = {}
    deadline = time.monotonic() + _STOP_S
    try:
        while True:
            found = tree(run)
            fresh = [process for process in found if process.pid not in stopped]
            for process in fresh:
                stopped[process.pid] = process
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGSTOP)
            if not fresh and all(_stands_still(process) for process in found):
                break
            if time.monotonic() > deadline:
                break
            time.sleep(0.001)
        for process in tree(run):
            stopped[process.pid] = process
            with contextlib.suppress(psutil.Error):
                name = _name(process)
                process.send_signal(number)
                signalled[process.pid] = name
    finally:  # whatever fails, nobody is left standing still
        if number != signal.SIGSTOP:
            for process in stopped.values():
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGCONT)
    return signalled


def let_go(run: Run) -> None:
    """Let every process of a run go on, whatever stopped it: :func:`kill` was cut off in the middle."""
    import psutil

    for process in tree(run):
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGCONT)


def _stat(pid: int) -> list[bytes]:
    """The fields of /proc/<pid>/stat from the third on: the name before may hold blanks and parentheses."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _name(process: psutil.Process) -> str:
    """Its name, whole where the kernel has only its first 15 bytes and a word of its command line begins so."""
    name = str(process.name())
    words = (os.path.basename(word) for word in process.cmdline()) if len(name) >= 15 else iter(())
    return next((word for word in words if word.startswith(name)), name)


def _stands_still(process: psutil.Process) -> bool:
    import psutil

    try:
        return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.Error:
        return True


def _pipes(run: Run) -> set[str]:
    """The run's pipes as /proc names them: those of which its shim has the reading end only."""
    shim = run.holder()
    if shim is None:
        return set()
    modes: dict[str, set[int]] = {}
    for name, mode in _open_pipes(shim):
        modes.setdefault(name, set()).add(mode)
    return {name for name, found in modes.items() if found == {os.O_RDONLY}}


def _holds(pid: int, pipes: set[str]) -> bool:
    return any(name in pipes for name, _ in _open_pipes(pid))


def _open_pipes(pid: int) -> list[tuple[str, int]]:
    """(name, access mode) of the pipes a process has open; none when it is gone, or not ours to see."""
    found = []
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                name = os.readlink(f"/proc/{pid}/fd/{fd}")
                if name.startswith("pipe:"):
                    info = Path(f"/proc/{pid}/fdinfo/{fd}").read_text(encoding="ascii")
                    flags = next(line.split()[1] for line in info.splitlines() if line.startswith("flags:"))
                    found.append((name, int(flags, 8) & os.O_ACCMODE))
    return found
