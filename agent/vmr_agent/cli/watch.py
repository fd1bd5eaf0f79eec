"""What lives here: `vmr-agent rerun --watch`: a VMR run again on each save in its directory.

The daemon says when to look; what was saved is found by looking, for events get lost. It must not know: how a
run is started, or its output read.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

from vmr_agent import control
from vmr_agent.cli import arguments, guest
from vmr_agent.errors import Problem, show
from vmr_agent.guest import keepsakes
from vmr_agent.guest.keepsakes import Files
from vmr_agent.guest.settings import Settings
from vmr_agent.guest.spool import History, Run
from vmr_agent.runs import Ending, RunResult, Stream, signal_name

_LOOK_S = 1.0  # how often, when nothing is heard
_LOOK_AGAIN_S = 0.1  # but no oftener: output can come a thousand times a second
_QUIET_S = 0.2  # nothing changed for so long: the save is over
_BUSY_S = 3.0  # what is written to without an end is run as it is
_STOP_S = 5.0  # after TERM; then KILL
_SELF_MADE = 5  # runs in a row, each for what was changed while the one before was in progress
_SELF_MADE_S = 10.0  # with --restart, within this time: a server is always in progress when somebody saves
_NAMED = 3  # files in a heading


def watch(vmr: bytes, settings: Settings, *, restart: bool) -> int:
    """Run it, and again on each save, until Ctrl-C. Raises Problem when it can't be run a first time."""
    attempts = _Attempts(vmr, settings, restart=restart)
    try:
        why = ""
        while True:
            if attempts.begin(why):
                attempts.follow()
            why = attempts.await_save()
    except KeyboardInterrupt:
        run = attempts.run
        if run is not None and run.result() is None:
            which = f"; attempt {run.info.attempt} goes on: vmr-agent logs --follow {show(vmr)}"
        else:
            which = ""
        guest.remark(f"stopped watching {show(vmr)}{which}", always=True)
        return 130


class _Attempts:
    def __init__(self, vmr: bytes, settings: Settings, *, restart: bool) -> None:
        self.run: Optional[Run] = None
        self._vmr = vmr
        self._settings = settings
        self._restart = restart
        self._history = History(settings.state_dir)
        self._daemon: Optional[control.Connection] = None
        self._seen: Files = {}
        self._looked = 0.0
        self._saved: dict[bytes, None] = {}  # a set that keeps its order
        self._self_made: list[float] = []
        # What a script writes beside itself must not start it again: while it runs only those files count that
        # were staged, or were saved when it did not run.
        self._known: set[bytes] = set()

    # --- a run ---

    def begin(self, why: str) -> bool:
        """Start the next attempt; False when it can't be, which is said. The first time it is a Problem."""
        first = self.run is None
        try:
            self._clear_the_way()
            self._seen = self._look()
            began = self._ask("rerun", vmr=os.fsdecode(self._vmr), request=os.urandom(16).hex())
            run = Run.load(Path(began["path"]))
            if run is None:
                raise Problem(f"cannot read the run of {show(self._vmr)} in {began['path']}")
        except Problem as problem:
            if first:
                raise
            _say(f"{problem}; waiting for a save")
            return False
        if first:
            staged = self._history.staged_as(self._vmr)
            snapshot = keepsakes.kept(staged.path) if staged is not None else None
            self._known = set(snapshot.files if snapshot is not None else self._seen)
        self.run, self._printer = run, guest.Printer(run, list(Stream))
        heading = f"attempt {run.info.attempt} of {show(self._vmr)}, {time.strftime('%H:%M:%S')}{why}"
        _say(f"\x1b[1m{heading}\x1b[m" if sys.stderr.isatty() else heading)
        return True

    def _clear_the_way(self) -> None:
        """An attempt in progress, ours or another's, ends first; with ``restart`` what it left behind goes too."""
        run = self._history.latest(self._vmr)
        if run is None or (run.closed() if self._restart else run.result()) is not None:
            return
        if self._restart:
            self._stop(run)
        else:
            _say(f"attempt {run.info.attempt} of {show(self._vmr)} is in progress; waiting for its end")
            guest.follow(run, guest.Printer(run, []), daemon=self._daemon)

    def _stop(self, run: Run) -> None:
        ours = self.run is not None and self.run.info.run == run.info.run
        printer = self._printer if ours else guest.Printer(run, [])
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                self._ask("kill", vmr=os.fsdecode(self._vmr), signal=int(number))
            except Problem:
                return  # it has just ended
            give_up = time.monotonic() + _STOP_S
            guest.follow(
                run,
                printer,
                daemon=self._daemon,
                until_closed=True,
                enough=lambda until=give_up: time.monotonic() > until,  # type: ignore[misc]
            )
            if run.closed() is not None:
                return

    def follow(self) -> None:
        """Pass its output on until it has exited, or, with ``restart``, something was saved."""
        assert self.run is not None
        result = guest.follow(
            self.run,
            self._printer,
            daemon=self._daemon,
            enough=lambda: self._restart and self._any_saved(),
        )
        if result is None:
            return
        saved = self._any_saved(at_once=True, in_progress=True)
        then = "" if saved else "; waiting for a save, Ctrl-C ends"
        _say(_ended(self.run.info.attempt, result) + then)
        if result.exit_code == 0 and not saved:
            guest.say_what_to_pull(self._vmr, self._settings)

    # --- saves ---

    def await_save(self) -> str:
        """Wait until something was saved, and the save is over; what it was, for the next heading."""
        if self._saved:
            self._forget_self_made()
        else:
            self._self_made.clear()
        while not self._any_saved(at_once=True):
            self._wait(_LOOK_S)
        began = quiet = time.monotonic()
        while time.monotonic() < min(quiet + _QUIET_S, began + _BUSY_S):
            time.sleep(_QUIET_S / 4)
            before = self._seen
            self._any_saved(at_once=True)
            if self._seen != before:
                quiet = time.monotonic()
        saved, self._saved = list(self._saved), {}
        names = ", ".join(show(path) for path in saved[:_NAMED])
        more = f" and {len(saved) - _NAMED} more" if len(saved) > _NAMED else ""
        return f": {names}{more} changed"

    def _any_saved(self, *, at_once: bool = False, in_progress: bool = False) -> bool:
        """Look whether anything was saved since the last look, or, having looked just now, what that found."""
        if at_once or time.monotonic() >= self._looked + _LOOK_AGAIN_S:
            self._looked = time.monotonic()
            seen, self._seen = self._seen, self._look()
            in_progress = in_progress or (self.run is not None and self.run.closed() is None)
            for path in sorted(seen.keys() | self._seen.keys()):
                before, after = seen.get(path), self._seen.get(path)
                if before is not None and after is not None and after.untouched(before):
                    continue
                if path in self._known or not (in_progress or _is_litter(path)):
                    self._known.add(path)
                    self._saved[path] = None
        return bool(self._saved)

    def _forget_self_made(self) -> None:
        """A script that changes what was staged with it would start itself for ever: see when it does."""
        now = time.monotonic()
        self._self_made.append(now)
        recent = self._self_made[-_SELF_MADE:]
        if len(recent) == _SELF_MADE and not (self._restart and now - recent[0] > _SELF_MADE_S):
            names = ", ".join(show(path) for path in self._saved)
            _say(
                f"{names} changed during each of {_SELF_MADE} runs: taken for the script's doing from now on"
            )
            self._known.difference_update(self._saved)
            self._saved.clear()
            self._self_made.clear()

    def _look(self) -> Files:
        try:
            return keepsakes.now(guest.directory(self._vmr, self._settings)).files
        except OSError:
            return {}  # gone; what it was may come back

    # --- the daemon ---

    def _ask(self, verb: str, **args: Any) -> dict[str, Any]:
        if self._daemon is None:
            daemon = guest.daemon(self._settings)
            daemon.ask("observe", vmr=os.fsdecode(self._vmr))
            self._daemon = daemon
        try:
            return self._daemon.ask(verb, **args)
        except Problem:
            self._daemon = None  # it may have gone away; asked again, it is connected to again
            raise

    def _wait(self, seconds: float) -> None:
        if self._daemon is None:
            with suppress(Problem):
                self._ask("observe", vmr=os.fsdecode(self._vmr))
        if self._daemon is None:
            time.sleep(seconds)
        elif not guest.heard(self._daemon, seconds):
            self._daemon = None


def _is_litter(path: bytes) -> bool:
    """What editors and interpreters leave beside a file that was saved."""
    name = path.rpartition(b"/")[2]
    return (
        name.startswith((b".", b"#"))
        or name.endswith((b"~", b".swp", b".tmp"))
        or name == b"4913"  # vim tries with this name whether it may write there
        or b"__pycache__/" in path
    )


def _ended(attempt: int, result: RunResult) -> str:
    span = arguments.duration(result.duration_s)
    return {
        Ending.CODE: f"attempt {attempt} exited with code {result.value} after {span}",
        Ending.SIGNAL: f"attempt {attempt} was ended by {signal_name(result.value)} after {span}",
        Ending.ERRNO: f"attempt {attempt} could not start: {result.text}",
        Ending.LOST: f"attempt {attempt} was lost: {result.text}",
    }[result.ending]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
