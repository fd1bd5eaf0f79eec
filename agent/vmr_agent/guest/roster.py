"""What lives here: what is known of every VMR, staged and run: what the schedule decides on, and the rows people read.

It must not know: the loop, the port, when anything is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Optional

from vmr_agent.errors import show
from vmr_agent.guest.spool import Run, Spool
from vmr_agent.runs import SCHEDULED, Ending, RunId, RunResult, signal_name, timestamp
from vmr_agent.schedule import Past, Staging, Vmr, sort_key

_UNREADABLE = "unreadable"


class Entry:
    """One VMR: how it is staged (None: gone) and its latest runs."""

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.vmr: Optional[Vmr] = None
        self.latest: Optional[Run] = None
        self.scheduled: Optional[Run] = None
        self.unfinished: dict[RunId, Run] = {}
        self.reboots = 0
        self.changed: Optional[bool] = None
        """Whether its files are not what was staged; known after a rerun that exited with 0."""

    def began(self, run: Run) -> None:
        """A run of it was made, or found; in whatever order."""
        if self.latest is None or run.info.attempt >= self.latest.info.attempt:
            self.latest, self.changed = run, None
        self.reboots = max(self.reboots, run.info.number, run.info.reboots)
        since = 0 if self.scheduled is None else self.scheduled.info.attempt
        if run.info.trigger in SCHEDULED and run.info.attempt >= since:
            self.scheduled = run
        if _end(run) is None:
            self.unfinished[run.info.run] = run


class Roster:
    """All VMRs that are staged or have run since they were."""

    def __init__(self, spool: Spool, boot_id: str) -> None:
        self._spool = spool
        self._boot_id = boot_id
        self._entries: dict[bytes, Entry] = {}
        # What the schedule has still to think about. Done VMRs are left out: with thousands staged, a decision
        # after each exit must not look at all of them.
        self._vmrs: dict[bytes, Vmr] = {}
        self._past: dict[bytes, Past] = {}

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def names(self) -> list[bytes]:
        """In the order in which the schedule runs them."""
        return sorted(self._entries, key=sort_key)

    def get(self, name: bytes) -> Optional[Entry]:
        return self._entries.get(name)

    def staged(self, name: bytes, vmr: Vmr) -> None:
        """The watcher saw it, or saw it change."""
        entry = self._entry(name)
        if entry.vmr is None and entry.latest is not None and entry.latest.info.script == vmr.script:
            self._spool.mark_back(name)  # moved away, and back
        entry.vmr = vmr
        self._refresh(name)

    def gone(self, name: bytes) -> None:
        """The watcher saw that it is no longer there. One that never ran is forgotten."""
        entry = self._entries.get(name)
        if entry is None:
            return
        entry.vmr = None
        if entry.latest is None:
            del self._entries[name]
        else:
            self._spool.mark_gone(name, entry.latest.info.attempt)
        self._refresh(name)

    def began(self, run: Run) -> None:
        """One that was found."""
        self._entry(run.info.vmr).began(run)
        self._refresh(run.info.vmr)

    def made(self, run: Run) -> None:
        """One just begun. It may have ended before its maker could look, and is unfinished until it is said to be."""
        entry = self._entry(run.info.vmr)
        entry.began(run)
        entry.unfinished[run.info.run] = run
        self._refresh(run.info.vmr)

    def exited(self, run: Run) -> None:
        entry = self._entry(run.info.vmr)
        entry.unfinished.pop(run.info.run, None)
        self._refresh(run.info.vmr)

    def for_schedule(self) -> tuple[Mapping[bytes, Vmr], Mapping[bytes, Past]]:
        """What :func:`vmr_agent.schedule.decide` is to decide on."""
        if not self._vmrs and not self._past and self._entries:
            # Not the same as a VM where nothing was ever staged.
            entry = next(iter(self._entries.values()))
            return {}, {entry.name: self._history(entry)}
        return self._vmrs, self._past

    def clear(self) -> None:
        self._entries.clear()
        self._vmrs.clear()
        self._past.clear()

    # --- inside ---

    def _entry(self, name: bytes) -> Entry:
        entry = self._entries.get(name)
        if entry is None:
            entry = Entry(name)
            for run in self._spool.standing(name):
                entry.began(run)
            # Not before: where its past can't be read, it must not pass for one that never ran.
            self._entries[name] = entry
        return entry

    def _history(self, entry: Entry) -> Past:
        result = _end(entry.scheduled) if entry.scheduled else None
        return Past(
            attempts=entry.latest.info.attempt if entry.latest else 0,
            running=entry.scheduled is not None and entry.scheduled.info.run in entry.unfinished,
            any_running=bool(entry.unfinished),
            holds=entry.scheduled is not None and entry.scheduled.info.holds,
            asks_reboot=result is not None and result.asks_reboot,
            boot_id=result.boot_id if result else "",
            reboots=entry.reboots,
            script=entry.latest.info.script if entry.latest else None,
            gone=self._spool.gone(entry.name) if entry.latest else False,
        )

    def _refresh(self, name: bytes) -> None:
        self._vmrs.pop(name, None)
        self._past.pop(name, None)
        entry = self._entries.get(name)
        if entry is None:
            return
        past = self._history(entry)
        if past.attempts and not (past.any_running or past.asks_reboot or past.gone):
            return  # done
        if entry.vmr is not None:
            self._vmrs[name] = entry.vmr
        if past.attempts:
            self._past[name] = past


def _end(run: Run) -> Optional[RunResult]:
    """How it ended; None also as long as that can't be read, when nobody may believe that it has."""
    try:
        return run.result()
    except OSError:
        return None


def state_of(entry: Entry) -> tuple[str, str]:
    """(state, reason): the words of DESIGN "result.json" for the VMR's latest attempt, or for how it is staged."""
    try:
        return _state(entry)
    except OSError as error:  # of one run's records, which hide no other's
        return _UNREADABLE, str(error.strerror)


def _state(entry: Entry) -> tuple[str, str]:
    vmr = entry.vmr
    if entry.latest is not None:
        result = entry.latest.result()
        if result is not None:
            return ending_word(result), result.text
        blocked = entry.latest.blocked()
        if blocked:
            return "blocked", blocked
        why = entry.latest.dropping()
        return "running", f"its output is being dropped: {why}" if why else ""
    if vmr is None or vmr.staging is Staging.STAGING:
        return "staged", ""
    if vmr.staging is Staging.REFUSED:
        return "refused", vmr.reason
    return "waiting", ""


def ending_word(result: RunResult) -> str:
    return {
        Ending.CODE: "exited",
        Ending.SIGNAL: "killed",
        Ending.ERRNO: "failed to start",
        Ending.LOST: "lost",
    }[result.ending]


def row(entry: Entry, *, waiting: str, delivered: str, now: float) -> dict[str, Any]:
    """The row of one VMR for ``--json`` and tables: `result.json`'s shape, and what only the guest knows.

    ``waiting`` says why it has not run; ``delivered`` is ``yes``, ``no`` or how much of it the host holds; ``now``
    is CLOCK_BOOTTIME. Each key is explained to those who read it in cli/status.py.
    """
    state, reason = state_of(entry)
    run = None if state == _UNREADABLE else entry.latest
    start_time, _, name = entry.name.partition(b"/")
    result = run.result() if run is not None else None
    started = run.started() if run is not None else None
    lengths = run.lengths() if run is not None else None
    closed = run is not None and run.closed() is not None
    started_ns = result.started_ns if result else started.wall_ns if started else None
    return {
        "vmr": show(entry.name),
        "start_time": show(start_time),
        "name": show(name),
        "attempt": entry.latest.info.attempt if entry.latest else 0,
        "trigger": entry.latest.info.trigger.value if entry.latest else None,
        "state": state,
        "pid": started.pid if started else None,
        "started": timestamp(started_ns) if started_ns is not None else None,
        "ended": timestamp(result.ended_ns) if result else None,
        "duration_s": round(result.duration_s, 6) if result else None,
        "age_s": round(now - started.boottime_ns / 1e9, 3) if started and not result else None,
        "exit_code": result.exit_code if result else None,
        "signal": signal_name(result.value) if result and result.ending is Ending.SIGNAL else None,
        "error": reason or None,
        "stdout_bytes": lengths.stdout if lengths else 0,
        "stderr_bytes": lengths.stderr if lengths else 0,
        "dropped_bytes": run.dropped() if run is not None else 0,
        "complete": closed,
        "waiting": waiting or None,
        "delivered": delivered,
        "staged": entry.vmr is not None,
    }
