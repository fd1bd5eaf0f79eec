"""What lives here: the guest's one event loop, which owns time and signals and wires the rooms together.

The only file of the guest that knows all rooms. What goes round in it: the watcher says what is staged, the
roster what has run, the schedule what starts; the runner starts it; shims fill the spool; the shipper empties it
into the session, the session into the port. Over 400 lines, because wiring pulled apart is harder to follow.
"""

from __future__ import annotations

import fcntl
import os
import selectors
import signal
import socket
import stat
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Optional, Union

import vmr_agent
from vmr_agent import control
from vmr_agent.errors import Problem, show
from vmr_agent.guest import keepsakes, processes, roster
from vmr_agent.guest.files import Files
from vmr_agent.guest.port import Port, PortState
from vmr_agent.guest.roster import Entry, Roster
from vmr_agent.guest.runner import NOTHING, Runner
from vmr_agent.guest.settings import Settings
from vmr_agent.guest.shipper import Diverged, Shipper
from vmr_agent.guest.spool import Lengths, Run, Spool, TimeZero
from vmr_agent.guest.watcher import Watcher
from vmr_agent.runs import RunId, RunState, Trigger
from vmr_agent.schedule import Decision, Now, Staging, decide, explain, near
from vmr_agent.wire import messages
from vmr_agent.wire.session import PROTOCOL, Ended, Opened, Role, Session

IDLE = 5.0  # s; what nothing tells is looked for so often
LIVE = 1.0  # s; the same while a run is live, or the launch directory amiss: neither tells when that changes
FULL = 30.0  # s; everything is looked at, for events can be lost
_SLICE = 0.2  # s; how long runs are started on end before the loop looks at the rest: a thousand take seconds
_STRANGER = 10.0  # s; a port that talks for so long and says no Hello leads to something else
_SAID_AGAIN = 60.0  # s; what keeps going wrong is said so often
_FAR = 10**18  # ns; a time zero that is further away than this overflows on the wire
_ROOM = 1.0  # s; a port that was full is tried again, for kernels 5.15 to 6.1 can lose the wake-up
_QUEUED = 20_000  # messages to the host; more is a host that asks and doesn't read, which then isn't heard
_BURST = 64  # frames written, and reads taken, before the loop looks at the rest
_REBOOT_S = 300.0  # a reboot command that has not rebooted by then has failed
_PR_SET_CHILD_SUBREAPER = 36


def boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def say(line: str) -> None:
    """One line to the log, which is standard error; journald adds the time."""
    with suppress(OSError):  # a log that can't be written, or whose reader has left, must not end the daemon
        print(line, file=sys.stderr, flush=True)


def notify(state: str) -> None:
    """Tell systemd; nothing where it doesn't ask (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock, suppress(OSError):
        sock.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)


class Daemon:
    """Everything the guest does. :meth:`run` returns when it was told to stop."""

    def __init__(self, settings: Settings, *, log: Callable[[str], None] = say) -> None:
        """Take the spool and the sockets. Raises Problem when another daemon has them, or they can't be made."""
        self._settings = settings
        self._log = log
        self._launch = os.fsencode(settings.launch_dir)
        self._boot_id = boot_id()
        self._runtime = _make_runtime(settings.runtime_dir)
        self._spool = Spool(settings.state_dir, limit=settings.spool_limit or None)
        self._runtime_lock = _lock_runtime(self._runtime)
        self._selector = selectors.DefaultSelector()
        self._stopping = False

        self._kicks = _kick_socket(self._runtime / "kick")
        # The fork server comes before any thread and before the port: what it has, every run would inherit.
        self._runner = Runner(
            self._spool,
            kick_path=self._runtime / "kick",
            launch_dir=settings.launch_dir,
            log=log,
            boot_id=self._boot_id,
            keep=self._keep_files,
        )
        self._roster = Roster(self._spool, self._boot_id)
        self._shipper = Shipper(self._launch)
        self._files = Files(self._launch)
        self._live: dict[RunId, Run] = {}
        self._watcher = Watcher(settings.launch_dir, settle=settings.settle, log=log)
        self._port = Port(settings.port)
        self._session = Session(
            Role.GUEST, introduce=self._introduce, beat=self._beat, make_id=lambda: os.urandom(8)
        )
        self._outbox: deque[Union[bytes, memoryview]] = deque()
        self._blocked = False  # the port took nothing more
        self._more = False  # the last turn left something undone
        self._port_said = ""
        self._port_since = 0.0
        self._garbage_before = 0
        self._listener = _control_socket(self._runtime / control.SOCKET)
        self._clients: set[control.Client] = set()

        self._since = boottime()
        self._undecided = True
        self._wake: Optional[float] = None
        self._held = False
        self._problem: Optional[str] = None
        self._given_up: set[bytes] = set()
        self._rows_sent: dict[bytes, messages.Vmr] = {}
        self._changed_rows: set[bytes] = set()
        self._reboot: Optional[subprocess.Popen[bytes]] = None
        self._reboot_asked = 0.0
        self._can_reboot = settings.reboot_command is not None or self._port.virtio
        self._next_idle = self._next_full = 0.0
        # What could not be noted in the state directory is tried again: runs that could not begin, what was seen
        # change and go, and, by a session that begins anew, what the host said.
        self._next_retry: Optional[float] = None
        self._changed: set[bytes] = set()
        self._gone: set[bytes] = set()
        self._unheeded = False
        self._complaint, self._complained = "", 0.0

    # --- the loop ---

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Runs go on when this returns; the next daemon finds them."""
        _become_subreaper()
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop())
        signal.signal(signal.SIGCHLD, lambda *_: None)  # only to wake the loop
        self._on_read(wake_read, lambda: os.read(wake_read, 4096))
        self._on_read(self._kicks, self._take_kicks)
        self._on_read(self._listener, self._accept)
        self._on_read(self._files, self._send_file_replies)
        self._on_read(self._port, lambda: None)  # each turn looks at the port
        self._find_runs()
        self._watcher.start()
        self._on_read(self._watcher, lambda: None)  # as at the watcher
        self._follow_runner()
        self._log(f"watching {self._settings.launch_dir}; {len(self._live)} runs found under way")
        notify("READY=1\nSTATUS=watching")
        while not self._stopping:
            for key, _ in self._selector.select(self._timeout()):
                self._try(key.data)
            now = boottime()
            self._try(self._look, now)
            self._try(self._decide_if_due, now)
            self._try(self._ship, now)
        self._shut_down()

    def _on_read(self, source: Any, act: Callable[[], Any]) -> None:
        self._selector.register(source, selectors.EVENT_READ, act)

    def _try(self, act: Callable[..., Any], *args: Any) -> None:
        try:
            act(*args)
        except OSError as error:
            self._failed(f"cannot use {self._settings.state_dir}: {error}")

    def _failed(self, complaint: str) -> None:
        """A full or failing disk under the state directory.

        What could not be noted is not done either, and is tried again. A script that runs goes on, and its shim
        waits for space by itself.
        """
        now = boottime()
        if complaint != self._complaint or now >= self._complained + _SAID_AGAIN:
            self._complaint, self._complained = complaint, now
            self._log(f"{complaint}; trying again")
        self._undecided, self._wake, self._next_retry = False, None, now + _ROOM
        self._next_idle = max(self._next_idle, self._next_retry)

    def _stop(self) -> None:
        self._stopping = True

    def _shut_down(self) -> None:
        """In this order: no more runs, no more orders, then the host; shims and their scripts go on."""
        notify("STOPPING=1")
        self._watcher.close()
        self._runner.close()
        for client in list(self._clients):
            self._drop(client)
        self._listener.close()
        (self._runtime / control.SOCKET).unlink(missing_ok=True)
        self._port.close()
        self._spool.close()
        self._log("stopped; runs under way go on and are found at the next start")

    def _timeout(self) -> float:
        if self._undecided or self._more:
            return 0.0
        due: list[Optional[float]] = [
            self._next_idle,
            self._port.next_try(),
            self._session.next_tick(),
            self._watcher.next_due(),
        ]
        due += [self._wake, self._next_retry]
        if self._blocked:
            due.append(boottime() + _ROOM)
        return max(0.0, min(when for when in due if when is not None) - boottime())

    # One turn: look at everything that may be new, decide, ship. Three steps, so that a full disk, which fails
    # the first two, doesn't keep the third from bringing home what would make room.

    def _look(self, now: float) -> None:
        self._more = False
        idle = now >= self._next_idle
        full = idle and now >= self._next_full
        again = self._next_retry is not None and now >= self._next_retry
        if again:
            self._next_retry, self._undecided = None, True
            if self._unheeded:
                self._unheeded = False
                self._take(self._session.renew(now, "something in it could not be done"))
        self._reap()
        if idle or again or self._watcher.due(now):
            self._watch(now, full=full)
        if idle:
            self._idle(now, full=full)

    def _decide_if_due(self, now: float) -> None:
        if self._undecided or (self._wake is not None and now >= self._wake):
            self._decide(now)

    def _ship(self, now: float) -> None:
        self._serve_port(now)
        self._send_rows()
        self._pump(now)

    def _idle(self, now: float, *, full: bool) -> None:
        for run in list(self._live.values()):
            self._judge(run)
        self._next_idle = now + (LIVE if self._live or self._problem else IDLE)
        if full:
            self._next_full = now + FULL
        acked = {}
        for run in self._spool.open_runs():
            delivered = self._shipper.acked(run.info.run)
            acked[run.info.run] = Lengths(*delivered[1:]) if delivered else NOTHING
        self._spool.enforce(acked)
        self._shipper.touch_all()  # a kick that was lost
        self._follow_runner()
        if self._watcher.alive():
            notify("WATCHDOG=1")

    # --- what is staged ---

    def _watch(self, now: float, *, full: bool) -> None:
        self._watcher.scan(now, full=full)
        if self._watcher.problem != self._problem:
            self._problem = self._watcher.problem
            self._log(self._problem or f"{self._settings.launch_dir} can be used again")
            self._undecided = True
        if self._watcher.held != self._held:
            self._held, self._since, self._undecided = self._watcher.held, now, True
        for name in self._watcher.take_stirred():
            self._nudge("touched", [each for each in self._clients if each.observing == name])
        changed, gone = self._watcher.take_changes()
        self._changed |= changed
        self._gone |= gone
        if self._changed or self._gone:
            self._undecided = True
        # Each is taken off only when it has been noted, which a full disk can prevent: then it waits, and holds up
        # nothing but what came in its place.
        failed: Optional[OSError] = None
        for note, names in ((self._roster.gone, self._gone), (self._note_change, self._changed)):
            for name in names - (self._gone if names is self._changed else set()):
                self._changed_rows.add(name)
                try:
                    note(name)
                    names.discard(name)
                except OSError as error:
                    failed = error
        if failed is not None:
            raise failed

    def _note_change(self, name: bytes) -> None:
        vmr = self._watcher.vmrs.get(name)
        if vmr is None:
            return
        known = self._roster.get(name)
        if vmr.staging is Staging.REFUSED and (
            known is None or known.vmr is None or known.vmr.reason != vmr.reason
        ):
            self._log(f"refused {show(name)}: {vmr.reason}")
        self._roster.staged(name, vmr)
        entry = self._roster.get(name)
        if known is None and entry is not None and entry.latest is not None:
            self._watcher.done(name)
            self._follow_open(entry)

    # --- the schedule ---

    def _now(self, now: float) -> Now:
        return Now(
            boottime=now,
            boot_id=self._boot_id,
            held=self._held,
            enabled=self._settings.schedule,
            configured=self._spool.configured(),
            zero=self._zero(now),
            since=self._since,
            quiet=self._settings.quiet,
            max_reboots=self._settings.max_reboots,
            can_reboot=self._can_reboot,
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
        self._undecided, self._wake = False, None
        if self._reboot is not None:
            return
        decision = decide(*self._roster.for_schedule(), self._now(now))
        self._wake = decision.wake
        for name in decision.given_up:
            if name not in self._given_up:
                self._given_up.add(name)
                self._log(f"{show(name)} asked for a reboot and gets none: {self._why_no_reboot()}")
        for start in decision.start:
            if boottime() > now + _SLICE:
                self._undecided = True
                break
            entry = self._roster.get(start.vmr)
            if entry is None or entry.vmr is None:
                continue
            number = entry.reboots + 1 if start.trigger is Trigger.REBOOT else 0
            try:
                run = self._runner.start(
                    start.vmr,
                    start.trigger,
                    now_ns=time.time_ns(),
                    script=entry.vmr.script or (0, 0, 0),
                    holds=start.holds,
                    number=number,
                    clear_reboot=start.clear_reboot,
                )
            except Problem as problem:
                self._failed(str(problem))
                return
            self._began(run)
        if decision.configured and not self._spool.configured():
            self._spool.set_configured()
            self._log("configured: every negative time has run")
            self._undecided = True
            self._session.beat(now)
        elif decision.reboot:
            self._do_reboot(decision, now)
        if self._settings.start_auto and self._spool.zero() is None and self._spool.configured():
            self._start(0, "guest")  # apart, for a daemon that died between the two

    def _keep_files(self, run: Run) -> None:
        try:
            self._spool.keep_files(run, self._launch + b"/" + run.info.vmr, each=self._settings.keep_files)
        except OSError as error:
            self._log(f"cannot keep the files of {show(run.info.vmr)}: {error.strerror}; it starts without")

    def _began(self, run: Run) -> None:
        self._roster.began(run)
        self._changed_rows.add(run.info.vmr)
        self._watcher.done(run.info.vmr)
        self._follow(run)

    def _start(self, delay_ns: int, source: str) -> bool:
        """Set time zero; False when it was set before."""
        if self._spool.zero() is not None:
            return False
        delay_ns = min(max(delay_ns, -_FAR), _FAR)
        here = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self._spool.set_zero(TimeZero(self._boot_id, here + delay_ns, time.time_ns() + delay_ns, source))
        self._log(f"time zero is {delay_ns / 1e9:.0f} s from now, set by the {source}")
        self._undecided = True
        self._session.beat(boottime())
        return True

    # --- reboot ---

    def _why_no_reboot(self) -> str:
        if not self._can_reboot:
            return "none can be done here"
        return "the VM is configured, or it has asked too often"

    def _do_reboot(self, decision: Decision, now: float) -> None:
        names = ", ".join(show(name) for name in decision.reboot)
        command = self._settings.reboot_command or ("systemctl", "reboot")
        self._log(f"rebooting, asked for by {names}: {' '.join(command)}")
        os.sync()
        try:
            self._reboot = subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd="/")
            self._reboot_asked = now
        except OSError as error:
            self._can_reboot, self._undecided = False, True
            self._log(f"cannot run {command[0]}: {error.strerror}")

    def _reap(self) -> None:
        """Take whatever children ended: orphans fall to us, a subreaper, as well as what we started."""
        if self._reboot is not None:
            status = self._reboot.poll()
            why = f"ended with status {status}" if status else ""
            if boottime() - self._reboot_asked > _REBOOT_S:
                why = why or f"has not rebooted the VM in {_REBOOT_S:.0f} s"
            if why:
                self._log(f"the reboot command {why}; the results stand")
                self._reboot, self._can_reboot, self._undecided = None, False, True
        while True:
            try:
                # Looks without taking: the fork server and the reboot command are reaped by who started them.
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if found is None or found.si_pid in self._own_children():
                    return
                os.waitpid(found.si_pid, os.WNOHANG)
            except ChildProcessError:
                return

    def _own_children(self) -> set[int]:
        own = {self._runner.server_pid}
        if self._reboot is not None:
            own.add(self._reboot.pid)
        return own

    # --- runs ---

    def _find_runs(self) -> None:
        """The runs that the host has not whole, and what has become of them while nobody looked."""
        for run in self._runner.attach():
            self._roster.began(run)
            self._follow(run)
        for entry in self._roster:
            self._follow_open(entry)
        for run in list(self._live.values()):
            self._judge(run)

    def _follow_open(self, entry: Entry) -> None:
        """Its runs whose link in open/ was lost with the power, and with it what said that they were over."""
        for run in (entry.latest, *entry.unfinished.values()):
            if run is not None and run.closed() is None and run.info.run not in self._live:
                self._follow(run)

    def _follow(self, run: Run) -> None:
        self._live[run.info.run] = run
        self._next_idle = min(self._next_idle, boottime() + LIVE)
        self._shipper.add(run)

    def _follow_runner(self) -> None:
        """Watch the fork server's socket, which is another after it was started again."""
        fileno = self._runner.fileno()
        for key in list(self._selector.get_map().values()):
            if key.data == self._handle_runner and key.fd != fileno:
                self._selector.unregister(key.fileobj)
        if fileno >= 0 and fileno not in self._selector.get_map():
            self._on_read(fileno, self._handle_runner)

    def _handle_runner(self) -> None:
        # Forget the old descriptor before it is closed: its number may be given again.
        for key in list(self._selector.get_map().values()):
            if key.data == self._handle_runner:
                self._selector.unregister(key.fileobj)
        self._runner.handle()
        self._follow_runner()

    def _take_kicks(self) -> None:
        kicked = set()
        with suppress(BlockingIOError):
            for _ in range(1000):
                kicked.add(self._kicks.recv(64))
        for run_id in kicked:
            self._shipper.touch(run_id)
            run = self._live.get(run_id)
            if run is None:
                continue
            self._settle(run)
            self._nudge("output", self._watchers(run_id))

    def _judge(self, run: Run) -> None:
        delivered = self._shipper.acked(run.info.run)
        try:
            self._runner.judge(run, acked=Lengths(*delivered[1:]) if delivered else NOTHING)
        except OSError as error:
            self._log(f"cannot judge {show(run.info.vmr)}: {error.strerror}; trying again")
            return
        self._settle(run)

    def _settle(self, run: Run) -> None:
        """Act on what a run's directory says now. Harmless when it says nothing new."""
        entry = self._roster.get(run.info.vmr)
        if run.result() is not None and entry is not None and run.info.run in entry.unfinished:
            self._roster.exited(run)
            self._since = max(self._since, boottime())
            self._undecided = True
            if entry.latest is run:
                self._look_for_edits(entry, run)
            self._nudge("exited", self._watchers(run.info.run))
        self._changed_rows.add(run.info.vmr)
        if run.closed() is not None:
            self._live.pop(run.info.run, None)
            self._shipper.touch(run.info.run)

    def _look_for_edits(self, entry: Entry, run: Run) -> None:
        """After a rerun that went well, say how to bring home what was edited for it."""
        result = run.result()
        if run.info.trigger in (Trigger.RERUN, Trigger.HOST) and result is not None and result.exit_code == 0:
            paths = self._spool.edited(entry.name, self._launch + b"/" + entry.name)
            entry.changed = bool(paths)
            if paths:
                self._log(keepsakes.pull_hint(entry.name, paths, socket.gethostname()))

    # --- the host ---

    def _introduce(self, own: bytes, peer: Optional[bytes]) -> messages.Hello:
        since, by = self._since_zero()
        return messages.Hello(
            id=own,
            peer=peer,
            role=Role.GUEST.value,
            protocol=PROTOCOL,
            version=vmr_agent.__version__,
            wall=time.time_ns(),
            spool=self._spool.id,
            boot=self._boot_id,
            machine=_machine_id(),
            hostname=os.fsencode(socket.gethostname()),
            boottime=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            configured=self._spool.configured(),
            since_zero=since,
            zero_by=by,
        )

    def _beat(self) -> messages.Heartbeat:
        since, by = self._since_zero()
        return messages.Heartbeat(
            wall=time.time_ns(),
            boottime=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            configured=self._spool.configured(),
            since_zero=since,
            zero_by=by,
            health=processes.health(self._settings.state_dir),
        )

    def _since_zero(self) -> tuple[Optional[int], Optional[str]]:
        now = boottime()
        at, zero = self._zero(now), self._spool.zero()
        return (None, None) if at is None or zero is None else (int((now - at) * 1e9), zero.source)

    def _serve_port(self, now: float) -> None:
        before = self._port.state
        state = self._port.look(now)
        if state is PortState.UP and before is not PortState.UP:
            self._outbox.clear()
            self._session.connect(now)
            self._port_since, self._garbage_before = now, self._session.counts["garbage"]
        # Reads also tell that the host has left. A port that is UP is read each turn: its edges are not counted.
        for _ in range(_BURST):
            if self._shipper.queued() > _QUEUED:
                self._more = not self._blocked
                break
            data = self._port.read() if self._port.state is PortState.UP else b""
            if not data:
                break
            self._take(self._session.receive(data, now))
        else:
            self._more = True  # to read, and its edge is used up
        if self._port.state is not PortState.UP:
            self._take(self._session.disconnect(self._port.reason))
            self._blocked = False
        else:
            self._take(self._session.tick(now))
        self._say_port()

    def _strange(self) -> str:
        """What is wrong with whoever is at the port's other end, if it doesn't speak as we do."""
        if self._port.state is not PortState.UP or self._session.open:
            return ""
        if (
            boottime() < self._port_since + _STRANGER
            or self._session.counts["garbage"] == self._garbage_before
        ):
            return ""
        return "what comes in is no Hello; is a vmr-host collector at the other end?"

    def _say_port(self) -> None:
        up = self._port.state is PortState.UP
        said = self._strange() if up else f"{self._port.state.value}: {self._port.reason}"
        if said != self._port_said:
            self._port_said = said
            self._log(f"port {self._settings.port}: {said or 'up'}")

    def _take(self, events: list[Any]) -> None:
        session = self._session.id
        for event in events:
            if self._session.id != session:
                return  # one of them ended the session, by us: the others are of one that is over
            try:
                self._heed(event)
            except OSError as error:
                self._failed(f"cannot use {self._settings.state_dir}: {error}")
                # A Start comes again with the host's next heartbeat; all else comes again in a new session.
                self._unheeded = self._unheeded or not isinstance(event, messages.Start)

    def _heed(self, event: Any) -> None:
        if isinstance(event, Opened):
            self._shipper.ended()
            self._log(f"session open with the host ({event.hello.version})")
            self._rows_sent.clear()
            for entry in self._roster:
                self._send_row(entry)
            self._shipper.send(messages.Vmr(vmr=None, state="", attempt=0, reason=""))
        elif isinstance(event, Ended):
            self._log(f"session with the host over: {event.reason}")
            self._shipper.ended()
        elif isinstance(event, messages.Ack):
            self._take_ack(event)
        elif isinstance(event, messages.Start):
            self._start(event.delay, "host")
        elif isinstance(event, messages.Request):
            self._take_request(event)

    def _take_ack(self, ack: messages.Ack) -> None:
        try:
            run = self._shipper.ack(ack)
        except Diverged as diverged:
            self._diverge(str(diverged))
            return
        if run is not None:
            self._spool.release(run)
            self._live.pop(run.info.run, None)

    def _diverge(self, reason: str) -> None:
        """Time travel: the VM was restored from a snapshot. All is offered again, under another spool id."""
        self._log(f"this VM has been set back in time ({reason}): beginning a new life")
        try:
            self._spool.new_life()
            self._shipper.clear()
        finally:  # where it fails some runs have their links again all the same, and only the host ends these
            for run in self._spool.open_runs():
                self._shipper.add(run)
        self._take(self._session.renew(boottime(), "a new life"))

    def _take_request(self, request: messages.Request) -> None:
        if self._files.knows(request.verb):
            self._take_file_request(request)
            return
        args = request.args
        if request.verb == "diverged":
            # No reply: the session is another one then. Where it fails a new one begins too, and the host asks again.
            self._diverge(str(args.get("reason", "the host saw it")))
            return
        ok, error = True, ""
        result: dict[str, messages.Scalar] = {}
        try:
            if request.verb == "rerun":
                run = self._rerun(_bytes(args, "vmr"), Trigger.HOST, request.request)
                result = {"run": run.info.run, "attempt": run.info.attempt}
            elif request.verb == "kill":
                result = self._kill_run(args, request.request.hex())
            elif request.verb == "hold":
                self._hold()
            elif request.verb == "resume":
                self._resume()
            else:
                raise Problem(f"cannot do {request.verb[:40]!r}: this vmr-agent doesn't know it")
        except Problem as problem:
            ok, error = False, str(problem)
        except OSError as failed:
            ok, error = False, f"cannot do {request.verb!r}: {failed}"
        self._shipper.send(
            messages.Reply(request=request.request, ok=ok, error=messages.text(error), result=result)
        )

    def _take_file_request(self, request: messages.Request) -> None:
        if request.verb == "read":
            self._shipper.send_piece(lambda: self._files.read(request))
            return
        reply = self._files.do(request)
        if reply is not None:
            self._shipper.send(reply)

    def _send_file_replies(self) -> None:
        for reply in self._files.take():
            self._shipper.send(reply)  # to another session than asked, the host repeats what it needs

    def _send_rows(self) -> None:
        changed, self._changed_rows = self._changed_rows, set()
        if not self._session.open:
            return
        for name in changed:
            entry = self._roster.get(name)
            if entry is not None:
                self._send_row(entry)
            elif self._rows_sent.pop(name, None) is not None:
                self._shipper.send(messages.Vmr(vmr=name, state="gone", attempt=0, reason=""))

    def _send_row(self, entry: Entry) -> None:
        state, reason = roster.state_of(entry)
        attempt = entry.latest.info.attempt if entry.latest else 0
        row = messages.Vmr(
            vmr=entry.name, state=state, attempt=attempt, reason=messages.text(reason), changed=entry.changed
        )
        if self._rows_sent.get(entry.name) != row:
            self._rows_sent[entry.name] = row
            self._shipper.send(row)

    def _pump(self, now: float) -> None:
        """Write what there is to write, until the port takes no more."""
        self._outbox.extend(self._session.take())
        self._blocked = False
        for _ in range(_BURST):
            if not self._write():
                break
        else:
            self._more = True  # to write, and no edge will tell
        if self._port.state is PortState.UP:
            self._port.want_room(self._blocked)

    def _write(self) -> bool:
        """Write one frame. False when there is none, or no room for all of it."""
        if self._port.state is not PortState.UP:
            return False
        if not self._outbox:
            frame = self._shipper.next(self._session) if self._session.open else None
            if frame is None:
                return False
            self._outbox.append(frame)
        data = self._outbox[0]
        taken = self._port.write(data)
        if taken < len(data):
            self._blocked = True
            self._outbox[0] = memoryview(data)[taken:]
            return False
        self._outbox.popleft()
        return True

    # --- the verbs ---

    def _accept(self) -> None:
        with suppress(OSError):
            sock, _ = self._listener.accept()
            if not control.may_ask(sock) or len(self._clients) >= control.MAX_CLIENTS:
                sock.close()
                return
            client = control.Client(sock)
            self._clients.add(client)
            self._on_read(client, lambda: self._serve(client))

    def _serve(self, client: control.Client) -> None:
        client.flush()
        for request in client.read():
            client.say(self._answer(client, request))
        self._attend(client)

    def _attend(self, client: control.Client) -> None:
        """Wait for what the client may do next, or let it go."""
        if client not in self._clients:
            return
        if not client.events:
            self._drop(client)
        elif self._selector.get_key(client).events != client.events:
            self._selector.modify(client, client.events, lambda: self._serve(client))

    def _nudge(self, event: str, clients: list[control.Client]) -> None:
        """Tell them that there is something to look at."""
        for client in clients:
            client.nudge({"event": event})
            self._attend(client)

    def _watchers(self, run: RunId) -> list[control.Client]:
        return [client for client in self._clients if client.watching == run]

    def _drop(self, client: control.Client) -> None:
        if client in self._clients:
            self._clients.discard(client)
            self._selector.unregister(client)
            client.sock.close()
            self._watcher.observe(each.observing for each in self._clients if each.observing)

    def _answer(self, client: control.Client, request: Mapping[str, Any]) -> dict[str, Any]:
        verbs: dict[str, Callable[[control.Client, Mapping[str, Any]], dict[str, Any]]] = {
            "rerun": self._verb_rerun,
            "observe": self._verb_observe,
            "status": self._verb_status,
            "start": self._verb_start,
            "kill": self._verb_kill,
            "hold": lambda *_: self._hold(),
            "resume": lambda *_: self._resume(),
            "reset": self._verb_reset,
        }
        verb = verbs.get(request["verb"])
        try:
            if verb is None:
                raise Problem(
                    f"cannot do {request['verb']!r}: unknown verb", hint="verbs: " + ", ".join(verbs)
                )
            return {"ok": True, **verb(client, request)}
        except Problem as problem:
            return {"ok": False, "error": problem.args[0], "hint": problem.hint}
        except OSError as error:
            return {"ok": False, "error": f"cannot do {request['verb']!r}: {error}", "hint": None}

    def _verb_rerun(self, client: control.Client, request: Mapping[str, Any]) -> dict[str, Any]:
        run = self._rerun(_name(request), Trigger.RERUN, _request_id(request))
        client.watching = run.info.run
        return {
            "run": run.info.run.hex(),
            "attempt": run.info.attempt,
            "path": os.fspath(run.path.absolute()),
        }

    def _verb_observe(self, client: control.Client, request: Mapping[str, Any]) -> dict[str, Any]:
        client.observing = self._known(_name(request)).name
        self._watcher.observe(each.observing for each in self._clients if each.observing)
        return {}

    def _verb_status(self, client: control.Client, request: Mapping[str, Any]) -> dict[str, Any]:
        now = boottime()
        why = explain(*self._roster.for_schedule(), self._now(now))
        rows = []
        for name in self._roster.names():
            entry = self._roster.get(name)
            assert entry is not None
            delivered = self._delivered(entry)
            rows.append(roster.row(entry, waiting=why.get(name, ""), delivered=delivered, now=now))
        since, by = self._since_zero()
        return {
            "vmrs": rows,
            "configured": self._spool.configured(),
            "held": self._held,
            "schedule": "on" if self._settings.schedule else "off",
            "since_zero_s": since / 1e9 if since is not None else None,
            "zero_by": by,
            "problem": self._problem,
            "port": self._settings.port,
            "port_state": self._port.state.value,
            "port_reason": self._port.reason or self._strange(),
            "session": self._session.open,
            "dropped": dict(self._session.counts),
        }

    def _delivered(self, entry: Entry) -> str:
        run = entry.latest
        if run is None:
            return ""
        delivered = self._shipper.acked(run.info.run)
        if delivered is None:
            return "yes"
        lengths = run.lengths()
        total, held = lengths.stdout + lengths.stderr, delivered[1] + delivered[2]
        if held >= total and delivered[0] >= RunState.STARTED:
            return "so far" if run.closed() is None else "almost"
        return f"{100 * held // total} %" if held else "no"

    def _verb_start(self, client: control.Client, request: Mapping[str, Any]) -> dict[str, Any]:
        if not self._start(0, "guest"):
            raise Problem("cannot start: time zero is set already", hint="vmr-agent status shows when")
        return {"configured": self._spool.configured()}

    def _verb_kill(self, client: control.Client, request: Mapping[str, Any]) -> dict[str, Any]:
        number = _int({"signal": signal.SIGTERM.value, **request}, "signal")
        entry = self._known(_name(request))
        running = [run for run in entry.unfinished.values() if run.result() is None]
        open_ones = [
            run for run in self._live.values() if run.info.vmr == entry.name and run.closed() is None
        ]
        for run in running or open_ones:
            killed = processes.kill(run, number)
            rows = [{"pid": pid, "name": show(os.fsencode(name))} for pid, name in killed.items()]
            return {"attempt": run.info.attempt, "processes": rows}
        raise Problem(f"cannot kill {show(entry.name)}: it isn't running")

    def _kill_run(self, args: Mapping[str, Any], key: str) -> dict[str, messages.Scalar]:
        run_id, name, number = _bytes(args, "run"), _bytes(args, "vmr"), _int(args, "signal")
        found = [run for run in self._spool.runs_of(name) if run.info.run == run_id]
        for run in found:
            if run.remembered(f"kill {key}"):
                return {"attempt": run.info.attempt}
        live = self._live.get(run_id)
        if not found or live is None or live.closed() is not None:
            raise Problem(f"cannot kill {show(name)}: it isn't running")
        with suppress(OSError):  # on a full disk it is killed all the more
            live.remember(f"kill {key}")
        killed = processes.kill(live, number)
        return {
            "attempt": live.info.attempt,
            "processes": messages.text(
                ", ".join(f"{show(os.fsencode(each))} ({pid})" for pid, each in killed.items())
            ),
        }

    def _verb_reset(self, client: control.Client, request: Mapping[str, Any]) -> dict[str, Any]:
        self._watch(boottime(), full=False)
        if not self._held:
            raise Problem("cannot reset: VMRs would run again at once", hint="vmr-agent hold first")
        if any(run.result() is None for run in self._live.values()):
            raise Problem("cannot reset: a run is in progress", hint="vmr-agent status shows it")
        self._spool.forget()
        self._shipper.clear()
        self._live.clear()
        self._roster.clear()
        self._given_up.clear()
        self._watcher.forget()
        self._watch(boottime(), full=True)
        self._since, self._undecided = boottime(), True
        self._take(self._session.renew(boottime(), "reset"))
        return {}

    def _hold(self) -> dict[str, Any]:
        path = self._launch + b"/.hold"
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
        except OSError as error:
            raise Problem(f"cannot hold: {show(path)}: {error.strerror}") from None
        self._watch(boottime(), full=False)
        return {}

    def _resume(self) -> dict[str, Any]:
        path = self._launch + b"/.hold"
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise Problem(f"cannot resume: {show(path)}: {error.strerror}") from None
        self._watch(boottime(), full=False)
        return {}

    def _known(self, name: bytes) -> Entry:
        entry = self._roster.get(name)
        if entry is not None:
            return entry
        if self._problem is not None:
            raise Problem(self._problem)
        hint = near(name, self._roster.names())
        raise Problem(f"cannot find a VMR {show(name)} in {self._settings.launch_dir}", hint=hint)

    def _rerun(self, name: bytes, trigger: Trigger, request: bytes) -> Run:
        """Start the next attempt of a VMR in place. The same request again gives the same run."""
        now = boottime()
        self._watch(now, full=True)  # what lies there now is what runs: look at it, not at what we remember
        entry = self._known(name)
        for run in self._spool.runs_of(name)[::-1]:
            if request and run.info.request == request:
                return run
        for run in entry.unfinished.values():
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
        if self._problem is not None:
            raise Problem(f"cannot rerun {show(name)}: {self._problem}")
        if vmr.staging is Staging.REFUSED:
            raise Problem(f"cannot rerun {show(name)}: {vmr.reason}")
        if vmr.staging is Staging.STAGING:
            raise Problem(f"cannot rerun {show(name)}: call_arguments.sh is missing or its x bit isn't set")
        if self._settings.schedule and entry.latest is None:
            why = explain(*self._roster.for_schedule(), self._now(now)).get(name, "")
            raise Problem(f"cannot rerun {show(name)}: its turn hasn't come" + (f": {why}" if why else ""))
        run = self._runner.start(
            name, trigger, now_ns=time.time_ns(), script=vmr.script or (0, 0, 0), request=request
        )
        self._began(run)
        return run


def _bytes(args: Mapping[str, Any], key: str) -> bytes:
    value = args.get(key)
    if not isinstance(value, bytes):
        raise Problem(f"cannot read the request: {key} must be bytes")
    return value


def _int(args: Mapping[str, Any], key: str) -> int:
    value = args.get(key)
    if type(value) is not int or not 0 < value < 65:
        raise Problem(f"cannot read the request: {key} must be a signal's number")
    return value


def _name(request: Mapping[str, Any]) -> bytes:
    name = request.get("vmr")
    if not isinstance(name, str):
        raise Problem('cannot read the request: "vmr" must be a VMR name')
    try:
        return os.fsencode(name)
    except UnicodeEncodeError:
        raise Problem('cannot read the request: "vmr" holds half of a surrogate pair') from None


def _request_id(request: Mapping[str, Any]) -> bytes:
    try:
        return bytes.fromhex(str(request.get("request", "")))[:16]
    except ValueError:
        raise Problem('cannot read the request: "request" must be hex digits') from None


def _machine_id() -> Optional[str]:
    try:
        return Path("/etc/machine-id").read_text().strip()[:64] or None
    except (OSError, UnicodeDecodeError):
        return None


def _make_runtime(path: Path) -> Path:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.stat()
    except OSError as error:
        raise _no_runtime(path, str(error.strerror)) from None
    # Whoever may put another socket in the place of ours is asked by root's verbs in our stead.
    if info.st_uid not in (0, os.geteuid()):
        raise _no_runtime(path, f"it belongs to user {info.st_uid}")
    if info.st_mode & 0o022 and not info.st_mode & stat.S_ISVTX:
        raise _no_runtime(path, f"others may write to it (mode {stat.S_IMODE(info.st_mode):04o})")
    return path


def _no_runtime(path: Path, why: str) -> Problem:
    return Problem(f"cannot use {path}: {why}", hint="--runtime-dir names another directory")


def _lock_runtime(path: Path) -> int:
    """Hold the runtime directory: a second daemon, on another state directory, would take our sockets away."""
    try:
        fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _no_runtime(path, "another vmr-agent has it") from None
    except OSError as error:
        raise _no_runtime(path, str(error.strerror)) from None
    return fd


def _kick_socket(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    old = os.umask(0o177)
    try:
        path.unlink(missing_ok=True)
        sock.bind(os.fspath(path))
    except OSError as error:
        raise _cannot_listen(path, error) from None
    finally:
        os.umask(old)
    return sock


def _control_socket(path: Path) -> socket.socket:
    try:
        return control.listen(path)
    except OSError as error:
        raise _cannot_listen(path, error) from None


def _cannot_listen(path: Path, error: OSError) -> Problem:
    return Problem(
        f"cannot listen at {path}: {error.strerror or error}", hint="--runtime-dir names another directory"
    )


def _become_subreaper() -> None:
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
