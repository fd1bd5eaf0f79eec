"""What lives here: the VMRs of this VM: what is staged, which run starts when, which runs go on, and what ended.

The watcher says what is staged, the roster what has run, the schedule what starts; the runner starts it. What comes
of it, others take: :meth:`Supervisor.take_news`, the roster, the spool. It must not know: the port, the session,
the local socket, and who asks for a rerun. Over 400 lines: what may start and what has ended is one state.
"""

from __future__ import annotations

import enum
import os
import signal
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Callable, NamedTuple, Optional, Union

from vmr_agent.errors import Problem, show
from vmr_agent.guest import keepsakes, machine, processes
from vmr_agent.guest.reboot import Reboot
from vmr_agent.guest.roster import Entry, Roster
from vmr_agent.guest.runner import NOTHING, Runner, sync_directory
from vmr_agent.guest.settings import Settings
from vmr_agent.guest.shipper import Shipper
from vmr_agent.guest.spool import LET_GO, STOPPING, Lengths, Run, Spool, TimeZero
from vmr_agent.guest.watcher import Watcher
from vmr_agent.runs import RunId, Trigger
from vmr_agent.schedule import Now, Staging, decide, explain, near, standstill

_SLICE = 0.2  # s; how long runs are started on end before the loop looks at the rest: a thousand take seconds
_REPEATED = 16  # runs; a request that comes again, after a lost session, asked for one of the last
_FAR = 10**18  # ns; a time zero that is further away than this overflows on the wire


class News(enum.Enum):
    """What those who look at a VMR or a run may want to hear."""

    TOUCHED = "touched"
    """Something changed in the VMR's directory."""
    OUTPUT = "output"
    EXITED = "exited"


class Killed(NamedTuple):
    """What a signal was sent to: the attempt, and each process's name by its pid."""

    attempt: int
    processes: Mapping[int, str]


class Supervisor:
    """Each turn of the loop calls :meth:`look` and :meth:`decide_if_due`.

    Where the state directory can't be written to they raise OSError or Problem: what could not be noted is not done
    either, and is tried again when the caller calls again, after :meth:`put_off`.
    """

    def __init__(
        self,
        settings: Settings,
        spool: Spool,
        shipper: Shipper,
        *,
        kick_path: Path,
        boot_id: str,
        in_vm: bool,
        log: Callable[[str], None],
    ) -> None:
        """Starts the fork server, which must come before any thread. ``in_vm``: `systemctl reboot` may be used."""
        self._settings = settings
        self._spool = spool
        self._shipper = shipper
        self._boot_id = boot_id
        self._log = log
        self._launch = os.fsencode(settings.launch_dir)
        self.runner = Runner(
            spool,
            kick_path=kick_path,
            launch_dir=settings.launch_dir,
            log=log,
            boot_id=boot_id,
            keep=self._keep_files,
        )
        self.roster = Roster(spool, boot_id)
        self.watcher = Watcher(settings.launch_dir, settle=settings.settle, log=log)
        self.live: dict[RunId, Run] = {}
        """The runs whose streams are not closed, and that the host has not whole."""
        self.problem: Optional[str] = None
        """What is amiss with the launch directory."""
        self.held = False
        self._reboot = Reboot(settings.reboot_command, possible=in_vm, log=log)
        self._since = machine.boottime()
        self._undecided = True
        self._wake: Optional[float] = None
        self._given_up: set[bytes] = set()
        # Seen, and not yet noted in the state directory.
        self._changed: set[bytes] = set()
        self._gone: set[bytes] = set()
        self._unjudged: set[RunId] = set()
        # Known, but a failing disk has kept their runs from being followed.
        self._unmet: set[bytes] = set()
        self._news: set[tuple[News, Union[bytes, RunId]]] = set()
        self._rows: set[bytes] = set()

    def begin(self) -> None:
        """Find the runs that the host has not whole, and what has become of them while nobody looked; then watch."""
        for run in self.runner.attach():
            self._follow(run)
            try:
                self.roster.began(run)
                if run.interrupted():
                    processes.let_go(run)
                    run.remember(LET_GO)
            except OSError as error:  # of one that can't be read; the others go on
                self._log(f"cannot look after {show(run.info.vmr)}: {error.strerror}")
        for entry in self.roster:
            with suppress(OSError):
                self._follow_open(entry)
        for run in list(self.live.values()):
            self._judge(run)
        self.watcher.start()

    def follow_again(self) -> None:
        """A new life: the host is offered all runs once more. It may have had one whole that is not over here, its
        end unwritten on a full disk."""
        for run in self._spool.open_runs():
            if run.closed() is None:
                self._follow(run)
            else:
                self._shipper.add(run)

    def close(self) -> None:
        """No more runs start. Those under way go on; the next daemon finds them."""
        self.watcher.close()
        self.runner.close()

    # --- a turn of the loop ---

    def next_due(self) -> float:
        """When there is something to do by itself: BOOTTIME, s."""
        if self._undecided:
            return 0.0
        due = (self.watcher.next_due(), self._wake)
        return min((when for when in due if when is not None), default=float("inf"))

    @property
    def eager(self) -> bool:
        """Whether something is to be looked at often, for it doesn't tell when it changes."""
        return bool(self.live) or self.problem is not None

    @property
    def standstill(self) -> str:
        """Why nothing is started by schedule; empty when something may be."""
        return standstill(held=self.held, enabled=self._settings.schedule)

    def put_off(self) -> None:
        """Decide nothing until :meth:`reconsider`: what was decided could not be noted."""
        self._undecided, self._wake = False, None

    def reconsider(self) -> None:
        self._undecided = True

    def take_news(self) -> set[tuple[News, Union[bytes, RunId]]]:
        """What happened, and to which VMR (TOUCHED) or run (the others), since this was last asked."""
        news, self._news = self._news, set()
        return news

    def take_rows(self) -> set[bytes]:
        """The VMRs of which something that the host is told may have changed."""
        rows, self._rows = self._rows, set()
        return rows

    def look(self, now: float, *, full: bool = False) -> None:
        """See what is staged. ``full`` looks at everything, for events can be lost."""
        self.watcher.scan(now, full=full)
        if self.watcher.problem != self.problem:
            self.problem = self.watcher.problem
            self._log(self.problem or f"{self._settings.launch_dir} can be used again")
            self._undecided = True
        if self.watcher.held != self.held:
            self.held, self._since, self._undecided = self.watcher.held, now, True
            self._rows |= {
                entry.name for entry in self.roster if entry.latest is None
            }  # why these wait is another
        self._news |= {(News.TOUCHED, name) for name in self.watcher.take_stirred()}
        changed, gone = self.watcher.take_changes()
        if not self.standstill and self.watcher.settling:
            self.runner.make_ready()
        self._changed |= changed
        self._gone |= gone
        if self._changed or self._gone:
            self._undecided = True
        # Each is taken off only when it has been noted, which a full disk can prevent: then it waits, and holds up
        # nothing but what came in its place.
        failed: Optional[OSError] = None
        for note, names in ((self.roster.gone, self._gone), (self._note_change, self._changed)):
            for name in names - (self._gone if names is self._changed else set()):
                self._rows.add(name)
                try:
                    note(name)
                    names.discard(name)
                except OSError as error:
                    failed = error
        if failed is not None:
            raise failed

    def judge_all(self) -> None:
        """Ask each live run what has become of it: a shim that was killed tells nobody."""
        for run in list(self.live.values()):
            self._judge(run)

    def kicked(self, run_id: RunId, *, only_output: bool) -> None:
        """A shim says that there is something new."""
        self._shipper.touch(run_id, only_output=only_output)
        run = self.live.get(run_id)
        if run is not None:
            if not only_output:
                self._settle(run)
            self._news.add((News.OUTPUT, run_id))

    def delivered_whole(self, run: Run) -> None:
        """The host has all of it: it needn't be found at the next start."""
        self._settle(run)  # where its shim died before it told us of the end, its barrier would wait for ever
        self._spool.release(run)
        self.live.pop(run.info.run, None)

    def reap(self) -> bool:
        """Take whatever children ended: orphans fall to us, a subreaper, as well as what we started. False where one
        that somebody else takes may have hidden others."""
        if not self._reboot.look():
            self._undecided = True
        own = {self.runner.server_pid, self._reboot.pid}
        while True:
            try:
                # Looks without taking: the fork server and the reboot command are reaped by who started them.
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if found is None or found.si_pid in own:
                    return found is None
                os.waitpid(found.si_pid, os.WNOHANG)
            except ChildProcessError:
                return True

    # --- the schedule ---

    def decide_if_due(self, now: float) -> None:
        if self._undecided or (self._wake is not None and now >= self._wake):
            self._decide(now)

    def configured(self) -> bool:
        return self._spool.configured()

    def since_zero(self) -> tuple[Optional[int], Optional[str]]:
        """Nanoseconds since time zero, negative before it, and who set it; None, None while nobody has."""
        now = machine.boottime()
        at, zero = self._zero(now), self._spool.zero()
        return (None, None) if at is None or zero is None else (int((now - at) * 1e9), zero.source)

    def start(self, delay_ns: int, source: str) -> bool:
        """Set time zero; False when it was set before."""
        if self._spool.zero() is not None:
            return False
        delay_ns = min(max(delay_ns, -_FAR), _FAR)
        here = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self._spool.set_zero(TimeZero(self._boot_id, here + delay_ns, time.time_ns() + delay_ns, source))
        self._log(f"time zero is {delay_ns / 1e9:.0f} s from now, set by the {source}")
        self._undecided = True
        return True

    def waiting(self, now: float) -> Mapping[bytes, str]:
        """Why each VMR that has not run hasn't."""
        return explain(*self.roster.for_schedule(), self._now(now))

    def _now(self, now: float) -> Now:
        return Now(
            boottime=now,
            boot_id=self._boot_id,
            held=self.held,
            enabled=self._settings.schedule,
            configured=self._spool.configured(),
            zero=self._zero(now),
            since=self._since,
            quiet=self._settings.quiet,
            max_reboots=self._settings.max_reboots,
            can_reboot=self._reboot.possible,
        )

    def _zero(self, now: float) -> Optional[float]:
        """Time zero in this boot's CLOCK_BOOTTIME; after a reboot only the wall clock can tell."""
        zero = self._spool.zero()
        if zero is None:
            return None
        if zero.boot_id == self._boot_id:
            return zero.boottime_ns / 1e9
        return now + (zero.wall_ns - time.time_ns()) / 1e9

    def _decide(self, now: float) -> None:
        self.put_off()
        if self._reboot.under_way:
            return
        decision = decide(*self.roster.for_schedule(), self._now(now))
        self._wake = decision.wake
        self._say_given_up(decision.given_up)
        until, failed = machine.boottime() + _SLICE, None
        for start in decision.start:
            if machine.boottime() > until:
                self._undecided = True
                break
            entry = self.roster.get(start.vmr)
            if entry is None or entry.vmr is None:
                continue
            number = entry.reboots + 1 if start.trigger is Trigger.REBOOT else 0
            try:
                run = self.runner.start(
                    start.vmr,
                    start.trigger,
                    now_ns=time.time_ns(),
                    script=entry.vmr.script or (0, 0, 0),
                    holds=start.holds,
                    number=number,
                    clear_reboot=start.clear_reboot,
                )
            except Problem as problem:
                failed = problem
                continue
            self._began(run)
        if failed is not None:
            raise failed
        if decision.configured and not self._spool.configured():
            self._spool.set_configured()
            self._log("configured: every negative time has run")
            self._undecided = True
        elif decision.reboot:
            self._reboot.begin(now, "asked for by " + ", ".join(show(name) for name in decision.reboot))
            self._undecided = not self._reboot.under_way
        if self._settings.start_auto and self._spool.zero() is None and self._spool.configured():
            self.start(0, "guest")  # apart, for a daemon that died between the two

    def _say_given_up(self, names: Iterable[bytes]) -> None:
        why = (
            "the VM is configured, or it has asked too often"
            if self._reboot.possible
            else "none can be done here"
        )
        for name in names:
            if name not in self._given_up:
                self._given_up.add(name)
                self._log(f"{show(name)} asked for a reboot and gets none: {why}")

    # --- runs ---

    def rerun(self, name: bytes, trigger: Trigger, request: bytes) -> Run:
        """Start the next attempt of a VMR in place. The same request again gives the same run.

        Raises Problem where it can't be: unknown, running, refused, not its turn.
        """
        now = machine.boottime()
        self.look(now, full=True)  # what lies there now is what runs: look at it, not at what we remember
        entry = self.known(name)
        for run in islice(self._spool.newest_first(name), _REPEATED):
            if request and run.info.request == request:
                return run
        for run in list(entry.unfinished.values()):  # settled, one leaves it
            if run.result() is None:
                started = run.started()
                pid = f", pid {started.pid}" if started else ""
                raise Problem(
                    f"cannot rerun {show(name)}: attempt {run.info.attempt} is still running{pid}",
                    hint="kill ends it",
                )
            self._settle(run)
        vmr = entry.vmr
        if vmr is None:
            raise Problem(f"cannot rerun {show(name)}: it is no longer in {self._settings.launch_dir}")
        if self.problem is not None:
            raise Problem(f"cannot rerun {show(name)}: {self.problem}")
        if vmr.staging is Staging.REFUSED:
            raise Problem(f"cannot rerun {show(name)}: {vmr.reason}")
        if vmr.staging is Staging.STAGING:
            raise Problem(f"cannot rerun {show(name)}: call_arguments.sh is missing or its x bit isn't set")
        if self._settings.schedule and entry.latest is None:
            why = self.waiting(now).get(name, "")
            raise Problem(f"cannot rerun {show(name)}: its turn hasn't come" + (f": {why}" if why else ""))
        run = self.runner.start(
            name, trigger, now_ns=time.time_ns(), script=vmr.script or (0, 0, 0), request=request
        )
        self._began(run)
        return run

    def kill(self, name: bytes, number: int) -> Killed:
        """Send a signal to the process tree of the VMR's run, or to what an ended run has left behind.

        Raises Problem when there is neither.
        """
        entry = self.known(name)
        running = [run for run in entry.unfinished.values() if run.result() is None]
        left = [run for run in self.live.values() if run.info.vmr == entry.name and run.closed() is None]
        left.sort(key=lambda run: -run.info.attempt)  # the latest first, as ps shows them
        for run in running or left:
            if run.started() is None and run.result() is None:
                raise Problem(
                    f"cannot kill {show(entry.name)}: its script has not begun: {run.blocked() or 'it is about to'}"
                )
            return Killed(run.info.attempt, self._signal(run, number))
        raise Problem(f"cannot kill {show(entry.name)}: it isn't running")

    def kill_run(self, name: bytes, run_id: bytes, number: int, request: str) -> Killed:
        """The same for one run, and once for each request, however often it comes. Raises Problem as :meth:`kill`."""
        found = next((run for run in self._spool.newest_first(name) if run.info.run == run_id), None)
        if found is not None and found.remembered(f"kill {request}"):
            return Killed(found.info.attempt, {})
        live = self.live.get(RunId(run_id))
        if found is None or live is None or live.closed() is not None:
            raise Problem(f"cannot kill {show(name)}: it isn't running")
        note = f"kill {request}"
        if number == signal.SIGKILL:
            # Twice is harmless, and a daemon that dies in between must not make it never.
            killed = Killed(live.info.attempt, self._signal(live, number))
            self._remember(live, note)
            return killed
        self._remember(live, note)
        return Killed(live.info.attempt, self._signal(live, number))

    def hold(self) -> None:
        """Start nothing by schedule until :meth:`resume`. Raises Problem when that can't be noted."""
        path = self._launch + b"/.hold"
        try:
            # O_EXCL: a link that lies there holds as well, and is not followed.
            with suppress(FileExistsError):
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
            sync_directory(self._launch)  # nothing starts after a power cut either
        except OSError as error:
            raise Problem(f"cannot hold: {show(path)}: {error.strerror}") from None
        self.look(machine.boottime())

    def resume(self) -> None:
        path = self._launch + b"/.hold"
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise Problem(f"cannot resume: {show(path)}: {error.strerror}") from None
        self.look(machine.boottime())

    def forget(self) -> None:
        """Forget all history, for an image that is to be baked. Raises Problem where VMRs would run again at once."""
        self.look(machine.boottime())
        if not self.held:
            raise Problem("cannot reset: VMRs would run again at once", hint="vmr-agent hold first")
        if any(run.result() is None for run in self.live.values()):
            raise Problem("cannot reset: a run is in progress", hint="vmr-agent status shows it")
        self._spool.forget()
        self._shipper.clear()
        self.live.clear()
        self.roster.clear()
        self._given_up.clear()
        self.watcher.forget()
        self.look(machine.boottime(), full=True)
        self._since, self._undecided = machine.boottime(), True

    def known(self, name: bytes) -> Entry:
        """The VMR of this name. Raises Problem, with near names, when there is none."""
        entry = self.roster.get(name)
        if entry is not None:
            return entry
        if self.problem is not None:
            raise Problem(self.problem)
        hint = near(name, self.roster.names())
        raise Problem(f"cannot find a VMR {show(name)} in {self._settings.launch_dir}", hint=hint)

    # --- inside ---

    def _signal(self, run: Run, number: int) -> dict[int, str]:
        """Signal a run's processes, which stand still meanwhile; noted, for whoever comes when we die in it."""
        self._remember(run, STOPPING)
        try:
            return processes.kill(run, number)
        finally:
            self._remember(run, LET_GO)

    def _remember(self, run: Run, note: str) -> None:
        with suppress(OSError):  # on a full disk it is killed all the more
            run.remember(note)

    def _note_change(self, name: bytes) -> None:
        vmr = self.watcher.vmrs.get(name)
        if vmr is None:
            return
        known = self.roster.get(name)
        if vmr.staging is Staging.REFUSED and (
            known is None or known.vmr is None or known.vmr.reason != vmr.reason
        ):
            self._log(f"refused {show(name)}: {vmr.reason}")
        if known is None:
            self._unmet.add(name)
        self.roster.staged(name, vmr)
        entry = self.roster.get(name)
        if entry is not None and entry.latest is not None and not self._spool.gone(name):
            self.watcher.done(name)
        if name in self._unmet:
            if entry is not None and entry.latest is not None:
                self._follow_open(entry)
            self._unmet.discard(name)

    def _keep_files(self, run: Run) -> None:
        try:
            self._spool.keep_files(run, self._launch + b"/" + run.info.vmr, each=self._settings.keep_files)
        except OSError as error:
            self._log(f"cannot keep the files of {show(run.info.vmr)}: {error.strerror}; it starts without")

    def _began(self, run: Run) -> None:
        self.roster.made(run)
        self._rows.add(run.info.vmr)
        self.watcher.done(run.info.vmr)
        self._follow(run)

    def _follow(self, run: Run) -> None:
        self.live[run.info.run] = run
        self._shipper.add(run)

    def _follow_open(self, entry: Entry) -> None:
        """Its runs whose link in open/ was lost with the power, and with it what said that they were over."""
        for run in (entry.latest, *entry.unfinished.values()):
            if run is not None and run.closed() is None and run.info.run not in self.live:
                self._follow(run)

    def _judge(self, run: Run) -> None:
        delivered = self._shipper.acked(run.info.run)
        try:
            self.runner.judge(run, acked=Lengths(*delivered[1:]) if delivered else NOTHING)
        except OSError as error:
            if run.info.run not in self._unjudged:
                self._unjudged.add(run.info.run)
                self._log(f"cannot judge {show(run.info.vmr)}: {error.strerror}; trying again")
            return
        self._unjudged.discard(run.info.run)
        self._settle(run)

    def _settle(self, run: Run) -> None:
        """Act on what a run's directory says now. Harmless when it says nothing new."""
        entry = self.roster.get(run.info.vmr)
        result, closed = run.ends()
        if result is not None and entry is not None and run.info.run in entry.unfinished:
            self.roster.exited(run)
            self._since = max(self._since, machine.boottime())
            self._undecided = True
            if entry.latest is run:
                self._look_for_edits(entry, run)
            self._news.add((News.EXITED, run.info.run))
        self._rows.add(run.info.vmr)
        if result is not None:
            self._shipper.touch(run.info.run)
        if closed is not None:
            self.live.pop(run.info.run, None)

    def _look_for_edits(self, entry: Entry, run: Run) -> None:
        """After a rerun that went well, say how to bring home what was edited for it."""
        result = run.result()
        if run.info.trigger in (Trigger.RERUN, Trigger.HOST) and result is not None and result.exit_code == 0:
            paths = self._spool.edited(entry.name, self._launch + b"/" + entry.name)
            entry.changed = bool(paths)
            if paths:
                self._log(keepsakes.pull_hint(entry.name, paths, socket.gethostname()))
