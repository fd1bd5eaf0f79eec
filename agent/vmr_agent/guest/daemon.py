"""What lives here: the guest's one event loop, which owns time and signals and wires the rooms together.

The only file of the guest that knows all rooms. What goes round in it: the supervisor says what runs and what has
ended; shims fill the spool; the shipper empties it into the link. What the host says comes back by the link and
becomes a call of the supervisor. Over 400 lines, because wiring pulled apart is harder to follow.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Callable, Optional

import vmr_agent
from vmr_agent import control
from vmr_agent.errors import Problem
from vmr_agent.guest import machine, roster, runtime
from vmr_agent.guest.files import Files
from vmr_agent.guest.link import Link
from vmr_agent.guest.roster import Entry
from vmr_agent.guest.runner import NOTHING
from vmr_agent.guest.settings import Settings
from vmr_agent.guest.shipper import Diverged, Shipper
from vmr_agent.guest.spool import Lengths, Spool
from vmr_agent.guest.supervisor import Supervisor
from vmr_agent.guest.verbs import Verbs, killed_rows, signal_number
from vmr_agent.runs import Trigger
from vmr_agent.wire import messages
from vmr_agent.wire.session import PROTOCOL, Ended, Event, Opened, Role

# s; what nothing tells is looked for so often, or with something that wakes us after half of it: with a session open
# that is the host's heartbeat, so it must be longer than that.
IDLE = 6.0
LIVE = 1.0  # s; the same while a run is live, or the launch directory amiss: neither tells when that changes
FULL = 30.0  # s; everything is looked at, for events can be lost
_RETRY = 1.0  # s; what could not be noted in the state directory is tried again so often
_SAID_AGAIN = 60.0  # s; what keeps going wrong is said so often


def say(line: str) -> None:
    """One line to the log, which is standard error; journald adds the time."""
    with suppress(OSError):  # a log that can't be written, or whose reader has left, must not end the daemon
        print(line, file=sys.stderr, flush=True)


class Daemon:
    """Everything the guest does. :meth:`run` returns when it was told to stop."""

    def __init__(self, settings: Settings, *, log: Callable[[str], None] = say) -> None:
        """Take the spool and the sockets. Raises Problem when another daemon has them, or they can't be made."""
        self._settings = settings
        self._log = log
        self._boot_id = machine.boot_id()
        self._runtime = runtime.make(settings.runtime_dir)
        self._spool = Spool(
            settings.state_dir, limit=settings.spool_limit or None, drop=settings.overflow_drop
        )
        self._runtime_lock = runtime.lock(self._runtime)
        self._selector = selectors.DefaultSelector()
        self._stopping = False

        launch = os.fsencode(settings.launch_dir)
        self._kicks = runtime.kick_socket(self._runtime / "kick")
        self._shipper = Shipper(launch)
        self._link = Link(
            settings.port, self._shipper, introduce=self._introduce, beat=self._beat, heed=self._heed, log=log
        )
        self._supervisor = Supervisor(
            settings,
            self._spool,
            self._shipper,
            kick_path=self._runtime / "kick",
            boot_id=self._boot_id,
            in_vm=self._link.virtio,
            log=log,
        )
        self._files = Files(launch)
        self._verbs = Verbs(
            runtime.control_socket(self._runtime / control.SOCKET),
            self._selector,
            settings=settings,
            supervisor=self._supervisor,
            shipper=self._shipper,
            link=self._link,
        )
        self._rows_sent: dict[bytes, messages.Vmr] = {}
        self._milestones = (False, False)
        self._next_idle = self._next_full = 0.0
        self._idled = 0.0
        self._children = True  # some may have ended
        # What could not be noted in the state directory is tried again: runs that could not begin, what was seen
        # change and go, and, by a session that begins anew, what the host said.
        self._next_retry: Optional[float] = None
        self._unheeded = False
        self._complaint, self._complained = "", 0.0
        self._runner_watched = (0, -1)

    # --- the loop ---

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Runs go on when this returns; the next daemon finds them."""
        machine.become_subreaper()
        machine.go_first()
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop())
        signal.signal(signal.SIGCHLD, lambda *_: None)  # only to wake the loop
        self._on_read(wake_read, lambda: self._woken(wake_read))
        self._on_read(self._kicks, self.take_kicks)
        self._on_read(self._verbs, self._verbs.accept)
        self._on_read(self._files, self._send_file_replies)
        self._on_read(self._link, lambda: None)  # the turn hears it
        self.begin()
        self._on_read(self._supervisor.watcher, self._supervisor.watcher.hush)  # the turn looks
        self._follow_runner()
        self._log(f"watching {self._settings.launch_dir}; {len(self._supervisor.live)} runs found under way")
        machine.notify("READY=1\nSTATUS=watching")
        machine.give_back_memory()
        while not self._stopping:
            ready = self._selector.select(self.timeout())
            self._link.untold = all(key.fileobj is not self._link for key, _ in ready)
            for key, _ in ready:
                self._try(key.data)
                self._follow_runner()
            self.turn()
            self._follow_runner()
        self._shut_down()

    def begin(self) -> None:
        """Find what went on without a daemon. Raises OSError where the state directory can't be read."""
        self._supervisor.begin()

    def turn(self) -> None:
        """Look at everything that may be new, decide, ship.

        Three steps, so that a full disk, which fails the first two, doesn't keep the third from bringing home what
        would make room.
        """
        now = machine.boottime()
        self._try(self._look, now)
        self._try(self._decide, now)
        self._try(self._ship, now)
        self._verbs.tell(self._supervisor.take_news())
        if self._supervisor.eager:
            self._next_idle = min(self._next_idle, now + LIVE)

    def timeout(self) -> float:
        """How long the loop may sleep, in seconds."""
        if self._link.more:
            return 0.0
        due = [self._next_idle, self._link.next_due(), self._supervisor.next_due()]
        if self._next_retry is not None:
            due.append(self._next_retry)
        return max(0.0, min(due) - machine.boottime())

    def take_kicks(self) -> None:
        """Take what shims say: there is something new of a run."""
        kicked: dict[bytes, bool] = {}
        with suppress(BlockingIOError):
            for _ in range(1000):
                said = self._kicks.recv(64)
                run_id = said[:16]
                kicked[run_id] = kicked.get(run_id, False) or said == run_id
        for run_id, more in kicked.items():
            self._supervisor.kicked(run_id, only_output=not more)

    def _on_read(self, source: Any, act: Callable[[], Any]) -> None:
        self._selector.register(source, selectors.EVENT_READ, act)

    def _try(self, act: Callable[..., Any], *args: Any) -> None:
        try:
            act(*args)
        except Problem as problem:
            self._failed(str(problem))
        except OSError as error:
            self._failed(f"cannot use {self._settings.state_dir}: {error}")

    def _failed(self, complaint: str) -> None:
        """A full or failing disk under the state directory.

        What could not be noted is not done either, and is tried again. A script that runs goes on, and its shim
        waits for space by itself.
        """
        now = machine.boottime()
        if complaint != self._complaint or now >= self._complained + _SAID_AGAIN:
            self._complaint, self._complained = complaint, now
            self._log(f"{complaint}; trying again")
        if self._next_retry is None:  # else what fails again and again would put off for ever what makes room
            self._next_retry = now + _RETRY
        self._next_idle = max(self._next_idle, self._next_retry)

    def _woken(self, wake: int) -> None:
        os.read(wake, 4096)
        self._children = True

    def _stop(self) -> None:
        self._stopping = True

    def _shut_down(self) -> None:
        """In this order: no more runs, no more orders, then the host; shims and their scripts go on."""
        machine.notify("STOPPING=1")
        self._supervisor.close()
        self._verbs.close()
        (self._runtime / control.SOCKET).unlink(missing_ok=True)
        self._link.close()
        self._spool.close()
        self._log("stopped; runs under way go on and are found at the next start")

    def _look(self, now: float) -> None:
        calm = not self._supervisor.eager and self._next_retry is None
        # By when it was done last, not by when it is due: that is soon where a run has just ended, which is to be told.
        idle = now >= self._next_idle or (calm and now >= self._idled + IDLE / 2)
        full = idle and now >= self._next_full
        again = self._next_retry is not None and now >= self._next_retry
        if again:
            self._next_retry = None
            self._supervisor.reconsider()
            if self._unheeded:
                self._unheeded = False
                self._link.renew("something in it could not be done")
        if self._children or idle:
            self._children = not self._supervisor.reap()
        if idle or again or self._supervisor.watcher.due(now):
            self._try(self._scan, now, full)
        if idle:
            self._idle(now, full=full)

    def _scan(self, now: float, full: bool) -> None:
        try:
            self._supervisor.look(now, full=full)
        except OSError:
            self._supervisor.put_off()  # what could not be noted may have its turn before all else
            raise

    def _decide(self, now: float) -> None:
        try:
            self._supervisor.decide_if_due(now)
        except (Problem, OSError):
            self._supervisor.put_off()
            raise

    def _idle(self, now: float, *, full: bool) -> None:
        """What one step can't do, on a disk that fails, keeps no other from being done."""
        self._idled, self._next_idle = now, now + (LIVE if self._supervisor.eager else IDLE)
        if full:
            self._next_full = now + FULL
        self._try(self._supervisor.judge_all)
        self._try(self._make_room)
        self._shipper.touch_all()  # a kick that was lost
        if self._supervisor.watcher.alive():
            machine.notify("WATCHDOG=1")

    def _make_room(self) -> None:
        acked = {}
        for run in self._spool.open_runs():
            delivered = self._shipper.acked(run.info.run)
            acked[run.info.run] = Lengths(*delivered[1:]) if delivered else NOTHING
        self._spool.enforce(acked)

    def _follow_runner(self) -> None:
        """Watch the fork server's socket: another, though its number be the same, when there is another server."""
        runner = self._supervisor.runner
        watched = (runner.server_pid, runner.fileno())
        if watched == self._runner_watched:
            return
        if self._runner_watched[1] >= 0:
            self._selector.unregister(self._runner_watched[1])
        if watched[1] >= 0:
            self._on_read(watched[1], self._handle_runner)
        self._runner_watched = watched

    def _handle_runner(self) -> None:
        self._supervisor.runner.handle()

    # --- to the host ---

    def _ship(self, now: float) -> None:
        self._link.hear(now)
        self._files.go()
        since, _ = self._supervisor.since_zero()
        milestones = (self._supervisor.configured(), since is not None)
        if milestones != self._milestones:
            self._milestones = milestones
            self._link.beat(now)
        self._send_rows()
        self._link.speak()

    def _introduce(self, own: bytes, peer: Optional[bytes]) -> messages.Hello:
        since, by = self._supervisor.since_zero()
        return messages.Hello(
            id=own,
            peer=peer,
            role=Role.GUEST.value,
            protocol=PROTOCOL,
            version=vmr_agent.__version__,
            wall=time.time_ns(),
            spool=self._spool.id,
            boot=self._boot_id,
            machine=machine.machine_id(),
            hostname=os.fsencode(socket.gethostname()),
            boottime=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            configured=self._supervisor.configured(),
            since_zero=since,
            zero_by=by,
        )

    def _beat(self) -> messages.Heartbeat:
        since, by = self._supervisor.since_zero()
        return messages.Heartbeat(
            wall=time.time_ns(),
            boottime=time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            configured=self._supervisor.configured(),
            since_zero=since,
            zero_by=by,
            health=machine.health(self._settings.state_dir),
        )

    def _send_rows(self) -> None:
        changed = self._supervisor.take_rows()
        if not self._link.open:
            return
        for name in changed:
            entry = self._supervisor.roster.get(name)
            if entry is not None:
                self._try(self._send_row, entry)
            elif self._rows_sent.pop(name, None) is not None:
                self._shipper.send(messages.Vmr(vmr=name, state="gone", attempt=0, reason=""))

    def _send_row(self, entry: Entry) -> None:
        state, reason = roster.state_of(entry)
        if state == "waiting":
            reason = self._supervisor.standstill
        attempt = entry.latest.info.attempt if entry.latest else 0
        row = messages.Vmr(
            vmr=entry.name, state=state, attempt=attempt, reason=messages.text(reason), changed=entry.changed
        )
        if self._rows_sent.get(entry.name) != row:
            self._rows_sent[entry.name] = row
            self._shipper.send(row)

    def _send_file_replies(self) -> None:
        for reply in self._files.take():
            self._shipper.send(reply)  # to another session than asked, the host repeats what it needs

    # --- from the host ---

    def _heed(self, event: Event) -> None:
        try:
            self._act_on(event)
        except OSError as error:
            self._failed(f"cannot use {self._settings.state_dir}: {error}")
            # A Start comes again with the host's next heartbeat; all else comes again in a new session.
            self._unheeded = self._unheeded or not isinstance(event, messages.Start)

    def _act_on(self, event: Event) -> None:
        if isinstance(event, Opened):
            self._shipper.ended()
            self._files.forget()
            self._log(f"session open with the host ({event.hello.version})")
            self._rows_sent.clear()
            for entry in self._supervisor.roster:
                self._try(self._send_row, entry)
            self._shipper.send(messages.Vmr(vmr=None, state="", attempt=0, reason=""))
        elif isinstance(event, Ended):
            self._log(f"session with the host over: {event.reason}")
            self._shipper.ended()
            self._files.forget()
        elif isinstance(event, messages.Ack):
            self._take_ack(event)
        elif isinstance(event, messages.Start):
            self._supervisor.start(event.delay, "host")
        elif isinstance(event, messages.Request):
            self._take_request(event)
        elif isinstance(event, messages.Piece):
            refusal = self._files.piece(event)
            if refusal is not None:
                self._shipper.send(refusal)

    def _take_ack(self, ack: messages.Ack) -> None:
        try:
            run = self._shipper.ack(ack)
        except Diverged as diverged:
            self._diverge(str(diverged))
            return
        if run is not None:
            self._supervisor.delivered_whole(run)

    def _diverge(self, reason: str) -> None:
        """Time travel: the VM was restored from a snapshot. All is offered again, under another spool id."""
        self._log(f"this VM has been set back in time ({reason}): beginning a new life")
        try:
            self._spool.new_life()
            self._shipper.clear()
        finally:  # where it fails some runs have their links again all the same, and only the host ends these
            self._supervisor.follow_again()
        self._link.renew("a new life")

    def _take_request(self, request: messages.Request) -> None:
        if request.verb == "read":
            self._shipper.send_pieces(self._files.read(request))
        elif self._files.knows(request.verb):
            reply = self._files.do(request)
            if reply is not None:
                self._shipper.send(reply)
        elif request.verb == "diverged":
            # No reply: the session is another one then. Where it fails a new one begins too, and the host asks again.
            self._diverge(str(request.args.get("reason", "the host saw it")))
        else:
            self._shipper.send(self._reply(request))

    def _reply(self, request: messages.Request) -> messages.Reply:
        ok, error = True, ""
        result: dict[str, messages.Scalar] = {}
        try:
            result = self._do(request.verb, request.args, request.request)
        except Problem as problem:
            ok, error = False, str(problem)
        except OSError as failed:
            ok, error = False, f"cannot do {request.verb!r}: {failed}"
        return messages.Reply(request=request.request, ok=ok, error=messages.text(error), result=result)

    def _do(self, verb: str, args: Mapping[str, Any], request: bytes) -> dict[str, messages.Scalar]:
        """Do one of the host's requests. Each may come twice, and is done once."""
        if verb == "rerun":
            run = self._supervisor.rerun(_bytes(args, "vmr"), Trigger.HOST, request)
            return {"run": run.info.run, "attempt": run.info.attempt}
        if verb == "kill":
            number = signal_number(args.get("signal"))
            killed = self._supervisor.kill_run(
                _bytes(args, "vmr"), _bytes(args, "run"), number, request.hex()
            )
            if not killed.processes:
                return {"attempt": killed.attempt}
            rows = ", ".join(f"{row['name']} ({row['pid']})" for row in killed_rows(killed))
            return {"attempt": killed.attempt, "processes": messages.text(rows)}
        if verb == "hold":
            self._supervisor.hold()
        elif verb == "resume":
            self._supervisor.resume()
        else:
            raise Problem(f"cannot do {verb[:40]!r}: this vmr-agent doesn't know it")
        return {}


def _bytes(args: Mapping[str, Any], key: str) -> bytes:
    value = args.get(key)
    if not isinstance(value, bytes):
        raise Problem(f"cannot read the request: {key} must be bytes")
    return value
