"""What lives here: what the host knows of VMs and their VMRs, put together for people from the log directory's files
and from what guests say of VMRs that have not run.

It must not know: sockets, the collector, terminals. All of it reads; nothing here is needed to collect.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Optional
from urllib.parse import unquote_to_bytes

from vmr_agent.errors import Problem, show
from vmr_agent.host import logstore
from vmr_agent.host.held import STATES
from vmr_agent.host.journal import JOURNAL, life_of, open_read, read_file, vm_segment
from vmr_agent.runs import Ending, Stream, run_path, signal_name

COUNTS = (
    *("staged", "waiting", "refused", "running", "blocked", "exited_zero", "exited_nonzero", "killed"),
    *("failed_to_start", "lost"),
)
"""What a VM's VMRs are counted by: the states of `result.json`, with exits by their code."""

_UNRUN = ("staged", "waiting", "refused")
_ENDINGS = {word: Ending(value) for value, word in STATES.items()}
_SIGNALS = {signal_name(number): number for number in range(1, signal.NSIG)}


# --- where the log directory is -----------------------------------------------------------------------------


def leave_word(control: Path, log_dir: Path) -> None:
    """Write beside the control socket where the logs are, for whoever looks when no collector runs."""
    _word(control).write_bytes(os.fsencode(log_dir.absolute()) + b"\n")


def word_left(control: Path) -> Optional[Path]:
    """The log directory of the last collector that listened there, or None."""
    try:
        word = _word(control).read_bytes()
    except OSError:
        return None
    return Path(os.fsdecode(word[:-1])) if word.endswith(b"\n") else None


def _word(control: Path) -> Path:
    return control.with_name(control.name + ".log-dir")


# --- VMs ----------------------------------------------------------------------------------------------------


def vms(log_dir: Path) -> list[str]:
    """The names of the VMs that have logs. Raises Problem when the directory can't be read."""
    try:
        names = sorted(path.name for path in log_dir.iterdir() if (path / JOURNAL).exists())
    except OSError as error:
        raise _unreadable(log_dir, error) from None
    return [os.fsdecode(unquote_to_bytes(name)) for name in names if life_of(name)[0] == name]


def near(wanted: str, names: Iterable[str]) -> str:
    """A hint for a name that isn't there: those that look like it, or else all."""
    there = list(names)
    vm, _, number = wanted.rpartition("~")
    if number.isdecimal() and vm in there:
        return f"the files of an earlier life of {text(vm)} are in the log directory, for you to read"
    found = difflib.get_close_matches(wanted.lower(), {each.lower(): each for each in there}, n=3, cutoff=0.5)
    if found:
        return "did you mean " + " or ".join(text(each) for each in there if each.lower() in found) + "?"
    return "the VMs are " + ", ".join(map(text, there[:20])) if there else "there is none"


# --- VMRs ---------------------------------------------------------------------------------------------------


def vmrs(log_dir: Path, vm: str, said: Iterable[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """One row per VMR in the shape of `result.json`, in the schedule's order.

    ``said`` are the rows the guest last said: VMRs that have not run are in no file. Raises Problem when the
    directory can't be read.
    """
    rows = {row["vmr"]: row for row in _logged(log_dir, vm)}
    for each in said:
        name = os.fsencode(each["vmr"])
        row = rows.setdefault(show(name), _unlogged(name, each))
        if row["attempt"] == each["attempt"] and each["state"] == "blocked" and row["state"] == "running":
            row.update(state="blocked", error=each["reason"] or None)
        elif row["attempt"] == each["attempt"] and each["state"] == row["state"] == "running":
            row["error"] = each["reason"] or None  # what it prints is being dropped
    return sorted(rows.values(), key=logstore.row_order)


def counts(log_dir: Path, vm: str, said: Mapping[str, int]) -> dict[str, int]:
    """How many VMRs stand how. ``said``: how many are in which state, as the guest last said."""
    found = dict.fromkeys(COUNTS, 0)
    for row in _logged(log_dir, vm):
        word = str(row["state"]).replace(" ", "_")
        if word == "exited":
            word = "exited_nonzero" if row["exit_code"] else "exited_zero"
        found[word] = found.get(word, 0) + 1
    for state in _UNRUN:
        found[state] = said.get(state, 0)
    found["blocked"] = min(said.get("blocked", 0), found["running"])
    found["running"] -= found["blocked"]
    return found


def _logged(log_dir: Path, vm: str) -> list[dict[str, Any]]:
    directory = log_dir / vm_segment(vm)
    try:
        os.listdir(directory)  # the search itself would take a directory it may not read for an empty one
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(directory, error) from None
    return logstore.rows(log_dir, vm)


def _unlogged(vmr: bytes, said: Mapping[str, Any]) -> dict[str, Any]:
    start_time, _, name = vmr.partition(b"/")
    return {
        "vmr": show(vmr),
        "start_time": show(start_time),
        "name": show(name),
        "attempt": said["attempt"],
        "trigger": None,
        "state": said["state"],
        "pid": None,
        "started": None,
        "ended": None,
        "duration_s": None,
        "exit_code": None,
        "signal": None,
        "error": said["reason"] or None,
        "stdout_bytes": 0,
        "stderr_bytes": 0,
        "closed": False,
        "complete": False,
        "gaps": [],
        "missing_bytes": 0,
        "rusage": None,
    }


# --- one run ------------------------------------------------------------------------------------------------


def attempts(log_dir: Path, vm: str, vmr: bytes) -> list[int]:
    """The attempts of a VMR of which something is held, in order."""
    directory = (log_dir / vm_segment(vm) / run_path(vmr, 1)).parent
    try:
        return sorted(int(name) for name in os.listdir(directory) if name.isdecimal())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(directory, error) from None


class LoggedRun:
    """One run in the log directory. It may not be there yet, and what it holds grows while it is read."""

    def __init__(self, log_dir: Path, vm: str, vmr: bytes, attempt: int) -> None:
        self.path = log_dir / vm_segment(vm) / run_path(vmr, attempt)
        # Its directory is held open: when a new life of its VM begins another takes its name.
        self._directory = -1
        self._fds: dict[Stream, int] = {}

    def row(self) -> Optional[dict[str, Any]]:
        """Its `result.json`; None when there is none yet."""
        if not self._found():
            return None
        try:
            row = json.loads(read_file(self._directory, "result.json"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            raise Problem(f"cannot read {self.path / 'result.json'}") from None
        return row if isinstance(row, dict) else None

    def read(self, stream: Stream, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes from an offset, fewer at the end of what is held."""
        if stream not in self._fds:
            if not self._found():
                return b""
            try:
                self._fds[stream] = open_read(self._directory, stream.filename)
            except FileNotFoundError:
                return b""
            except OSError as error:
                raise _unreadable(self.path / stream.filename, error) from None
        return os.pread(self._fds[stream], size, offset)

    def set_aside(self) -> bool:
        """Whether it is no longer where it was, so that nothing more comes: a new life of its VM began."""
        if self._directory < 0:
            return False
        there = None
        with contextlib.suppress(OSError):
            there = os.stat(self.path)
        return there is None or not os.path.samestat(there, os.fstat(self._directory))

    def _found(self) -> bool:
        if self._directory < 0:
            try:
                self._directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                return False
            except OSError as error:
                raise _unreadable(self.path, error) from None
        return True


def ending(row: Mapping[str, Any]) -> tuple[Ending, int, str]:
    """How a run ended, from its row: (ending, code or signal, sentence)."""
    found = _ENDINGS[row["state"]]
    value = row["exit_code"] if found is Ending.CODE else _SIGNALS.get(str(row["signal"]), 0)
    return found, int(value or 0), text(row["error"] or "")


def text(said: str) -> str:
    """What a guest or a user wrote, safe on a terminal."""
    return show(said.encode("utf-8", "surrogateescape"))


def _unreadable(path: Path, error: OSError) -> Problem:
    hint = "try as root" if isinstance(error, PermissionError) else None
    return Problem(
        f"cannot read {path}: {error.strerror or error}".replace("Permission", "permission"), hint=hint
    )
