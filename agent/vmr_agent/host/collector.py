"""What lives here: the host's loop: chardev → session → log store → ack, for every VM in one process.

It must not know: how logs look (the renderer's), how files are laid out (the log store's). Guests are not trusted:
whatever one sends, the others go on. Over 400 lines, as one module: a loop and the conversations in it.
"""

from __future__ import annotations

import asyncio
import functools
import os
import selectors
import shlex
import signal
import socket
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

import vmr_agent
from vmr_agent import control, sizes
from vmr_agent.errors import Problem, show
from vmr_agent.host import view
from vmr_agent.host.chardev import Chardev, Poll
from vmr_agent.host.journal import life_of, read_in
from vmr_agent.host.life import BadGuest, Diverged, OverQuota, Sync
from vmr_agent.host.logstore import LogStore, Syncer
from vmr_agent.host.quota import Measured
from vmr_agent.host.renderer import RendererProcess
from vmr_agent.host.starts import Moment, Starts
from vmr_agent.host.transfer import Relay
from vmr_agent.runs import Stream, timestamp
from vmr_agent.schedule import near, parse_vmr
from vmr_agent.wire import messages
from vmr_agent.wire.session import PROTOCOL, Ended, Opened, Role, Session

SWEEP = 0.1  # s; the latest acknowledgement of a byte after its arrival
SOON = 0.03  # s; the earliest: the logs follow, so with a disk that syncs fast they are late by no more
SYNC_SHARE = 0.2  # of the time the disk may be at it, between these two
SWEEP_BYTES = 8 << 20  # arrived and not acknowledged; at once then
TICK = 1.0  # s; how often sessions are told the time
HELD_LINE = 1.0  # s; a line without an end is shown after so long
STRANGER = 10.0  # s; a socket that talks for so long and says no Hello speaks something else
# Without a session and without a byte for so long we connect anew. QEMU (7.2) stops serving the guest's full ring when
# its client changed while the VM stood still: the guest hears us and is not heard, until the client changes again.
UNHEARD = 7.0  # s; more than a heartbeat, and the session is back within three
GARBAGE = 1 << 20  # bytes in one connection; no guest makes so much, and to search it is work
PART = 0.0025  # s of a sweep, then what came meanwhile has its turn: that of a thousand VMs takes 80 ms
TURN = 0.02  # s of one VM's messages, then the others have theirs: there are messages that take long each
SESSIONS = 10  # at once, then one a second: each is a record in the journal
LIVES = 100  # at once, then one in ten seconds: each is a directory, and to begin it is several syncs
LINES = 40  # here, of one VM, at once; then one a second
MAX_ROWS = 20_000  # VMRs of one VM kept in memory: twice the most anyone stages
MAX_DELAY = 1e9  # s to time zero, 30 years: one that a guest can count in ns
UNREAD = 4 << 20  # bytes that a command leaves unread, at most: one that pulls has 3 MiB asked for at once
MEASURE = 5.0  # s between looks for room, of a VM over its quota
_REPLY = 30.0  # s; a guest that has not answered a request by then won't
_UNHEARD = "connected, but vmr-agent is not heard"
_NEXT = "the next experiment takes VMs launched anew, or reset, and then another collector"
_LINE = 2_000  # characters; a guest's name for something may be longer


def say(line: str) -> None:
    """One line to the collector's own log, which is standard error."""
    with suppress(OSError):  # a log that can't be written, or whose reader has left, must not end all this
        print(line[:_LINE], file=sys.stderr, flush=True)


class _Budget:
    """What may be had so often at once, and then once in so many seconds."""

    def __init__(self, most: int, seconds: float = 1.0) -> None:
        self._most = self._left = float(most)
        self._seconds = seconds
        self._at = time.monotonic()

    def spend(self) -> bool:
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._at) / self._seconds)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


@dataclass(frozen=True)
class Source:
    """A VM and where its channel is; ``listen``: the VM's side connects to us."""

    vm: str
    path: Path
    listen: bool = False


class Guest:
    """One VM: its conversation, its log store, and what it last said of itself."""

    def __init__(self, source: Source, store: LogStore, collector: Collector) -> None:
        self.vm = source.vm
        self.store = store
        self.hello: Optional[messages.Hello] = None
        self.configured = False
        self.zero: Optional[Moment] = None
        """Time zero where this VM was started by itself."""
        self.started = False
        self.rows: dict[bytes, messages.Vmr] = {}
        self.health: Mapping[str, Any] = {}
        self._collector = collector
        self._session = Session(Role.HOST, introduce=_introduce, beat=_beat, make_id=lambda: os.urandom(8))
        self.relay = Relay(self.send, self._send_pieces, lambda: self.online and self.chardev.full)
        self.chardev = Chardev(
            source.path,
            poll=collector.poll,
            listen=source.listen,
            opened=self._opened,
            received=self._received,
            closed=self._closed,
            roomy=self.relay.go_on,
        )
        self._first_round: Optional[dict[bytes, messages.Vmr]] = None
        self._waiting: dict[bytes, tuple[messages.Request, Callable[[messages.Reply], None]]] = {}
        self._held_lines: dict[tuple[bytes, int], float] = {}
        self._line_timer: Optional[asyncio.TimerHandle] = None
        self._strange_since: Optional[float] = None
        self._strange_said = False
        self._garbage_before = 0
        self._heard: Optional[float] = None
        """When the last byte came, or the connection was made; None while there is none."""
        self._announced: set[bytes] = set()
        """Runs answered in this session: only of these an Ack means anything."""
        self._contradicted = False
        self._connects = False
        self.over_quota = False
        self._withheld: set[bytes] = set()
        """Runs of which output was refused in this session: what follows it must wait for the next."""
        self._measuring = False
        self._measure_at = 0.0
        self._events: deque[Any] = deque()
        """Heard, and not yet acted on."""
        self._resting = False
        self._sessions, self._lines, self._lives = _Budget(SESSIONS), _Budget(LINES), _Budget(LIVES, 10.0)
        self._unsaid = 0
        self._failure = ""

    def say(self, line: str) -> None:
        """A line about this VM. Those it makes too many of are counted instead."""
        if not self._lines.spend():
            self._unsaid += 1
            return
        if self._unsaid:
            say(f"{self.vm}: {self._unsaid:,} lines about it are left out here")
            self._unsaid = 0
        say(f"{self.vm}: {line}")

    @property
    def online(self) -> bool:
        return self._session.open

    @property
    def reason(self) -> str:
        """Why there is no session; empty while there is one."""
        return "" if self.online else self.chardev.reason or _UNHEARD

    @property
    def dropped(self) -> dict[str, int]:
        return dict(self._session.counts)

    # --- to the guest ---

    def send(self, message: messages.Message) -> bool:
        """Send in the session there is; False when there is none."""
        if not self._session.open:
            return False
        self.chardev.write(self._session.frame(message))
        return True

    def _send_pieces(self, request: bytes, at: int, data: bytes) -> None:
        if self._session.open:
            self.chardev.write(*self._session.piece_frames(request, at, data))

    def request(
        self, verb: str, args: Mapping[str, messages.Scalar], answer: Callable[[messages.Reply], None]
    ) -> bool:
        """Ask the guest for something. False when there is no session.

        ``answer`` is called once, with its reply or with why none came in time. What it hasn't answered when a
        session ends it is asked again in the next: it does the same request once.
        """
        request = messages.Request(request=os.urandom(16), verb=verb, args=args)
        if not self.send(request):
            return False
        self._waiting[request.request] = (request, answer)
        asyncio.get_running_loop().call_later(_REPLY, self._give_up, request)
        return True

    def _give_up(self, request: messages.Request, why: str = f"no answer within {_REPLY:.0f} s") -> None:
        reason = f" ({self.reason})" if self.reason else ""
        error = f"cannot {request.verb} on {self.vm}: {why}{reason}; it may be done all the same"
        self._answered(messages.Reply(request.request, False, messages.text(error), {}))

    def _answered(self, reply: messages.Reply) -> None:
        if reply.request in self._waiting:
            self._waiting.pop(reply.request)[1](reply)

    def acknowledge(self, acks: Sequence[messages.Ack]) -> None:
        for ack in acks:
            if ack.run in self._announced:
                self.send(ack)

    # --- from the guest ---

    def tick(self, now: float) -> None:
        if self._resting:
            self._session.busy(now)
        due = self._session.next_tick()
        if due is not None and now >= due:
            self._act(self._session.tick(now))
        if self._strange_since is not None and now - self._strange_since > STRANGER:
            self._say_strange()
        if self._heard is not None and not self._session.open and now - self._heard > UNHEARD:
            self._say_strange()
            self.chardev.drop(_UNHEARD)
        if self.over_quota and now >= self._measure_at:
            self.measure()

    def _say_strange(self) -> None:
        self._strange_since = None
        if not self._strange_said:
            self._strange_said = True
            if self._garbage:
                said = f"says no Hello ({self._garbage:,} bytes of something else)"
                self.say(f"{self.chardev.path} {said}; is it the vmr-agent port's socket?")
            else:
                self.say(f"{self.chardev.path} says nothing yet: the VM boots, or runs no vmr-agent")

    @property
    def _garbage(self) -> int:
        """Bytes of it in this connection."""
        return self._session.counts["garbage"] - self._garbage_before

    def _opened(self) -> None:
        self._session.connect(time.monotonic())
        self._strange_since = self._heard = time.monotonic()
        self._garbage_before = self._session.counts["garbage"]
        self._write()

    def _closed(self, reason: str) -> None:
        self._strange_since = self._heard = None
        # What it holds it says again; but that a session was over before is not to be forgotten.
        over = [event for event in self._events if isinstance(event, Ended)]
        self._events = deque([*over, *self._session.disconnect(reason)])
        self._take_events()

    def _received(self, data: bytes) -> None:
        self._heard = now = time.monotonic()
        events = self._session.receive(data, now)
        self._act(_joined(events) if len(events) > 1 else events)
        if not self._session.open and self._garbage > GARBAGE:  # any ends a session
            self._say_strange()
            self.chardev.drop("nothing but garbage")

    def _act(self, events: Sequence[Any]) -> None:
        self._events.extend(events)
        if not self._resting:
            self._take_events()

    def _take_events(self) -> None:
        """Act on what was heard, for so long that the other VMs don't notice; then in the loop's next turn."""
        until = time.monotonic() + TURN
        while self._events:
            self._take_safely(self._events.popleft())
            if self._events and time.monotonic() > until:
                if not self._resting:
                    self._resting = True
                    self.chardev.pause()
                asyncio.get_running_loop().call_soon(self._go_on)
                break
        self.relay.flush()
        self._write()

    def _go_on(self) -> None:
        self._resting = False
        self._take_events()
        if not self._resting:
            self.chardev.resume()

    def _take_safely(self, event: Any) -> None:
        """Act on one thing heard. Whatever ends the connection, as most failures do, forgets the rest of it."""
        try:
            self._take(event)
        except Diverged as diverged:
            self._diverged(str(diverged))
        except OverQuota:
            self._withhold(event)
        except BadGuest as error:
            # Nothing it sends in this connection is believed any more; what it holds, it sends again.
            self.say(f"sends what can't be: {error}; beginning anew")
            self.chardev.drop("a bad guest")
        except OSError as failed:
            self.store_failed(failed)
        except Exception:  # a mistake of ours, which must not become every VM's
            self.say(f"cannot take what it says:\n{traceback.format_exc()[-1500:]}")
            self.chardev.drop("what it said could not be taken")

    def store_failed(self, failed: OSError) -> None:
        """What couldn't be stored isn't acknowledged, and comes again in the next session, a second from now."""
        reason = failed.strerror or str(failed)
        if reason != self._failure:
            self._failure = reason
            self.say(f"cannot write to {self.store.log_dir}: {reason}; nothing is acknowledged, trying again")
        self.chardev.drop("the log directory can't be written")

    # --- its quota: what is refused is not acknowledged, so a guest that keeps to the rules has it still

    def _withhold(self, event: Any) -> None:
        """There is no room for this; where not even for what there is to say of its runs, the session ends."""
        quota = self.store.quota
        if not self.over_quota:
            self.over_quota = True
            self._measure_at = 0.0
            self.say(
                f"takes {sizes.shown(quota.used)} in {self.store.log_dir}, over its quota of "
                f"{sizes.shown(quota.limit)}: its output waits in the VM until there is room "
                "(remove what you don't need of it, earlier lives for one, or give it a larger --quota)"
            )
        if isinstance(event, (messages.Output, messages.Gap)):
            self._withheld.add(event.run)
        else:
            self.chardev.drop("over its quota")

    def start(self) -> None:
        """Connect, as soon as it is known what the VM takes: each start would let it take as much again.

        Raises Problem where it can't listen.
        """
        self.chardev.bind()
        if self.store.quota.limit:
            self.measure()
        else:
            self._connect()

    def _connect(self) -> None:
        if not self._connects:
            self._connects = True
            self.chardev.start()

    def measure(self) -> None:
        """Look what it really takes; what is counted meanwhile comes on top."""
        if self._measuring:
            return
        self._measuring = True
        quota = self.store.quota
        before = quota.disk
        self._collector.in_background(quota.measure, lambda measured: self._measured(measured, before))

    def _measured(self, measured: Measured, before: int) -> None:
        self._measuring = False
        self._measure_at = time.monotonic() + MEASURE
        self.store.quota.take(measured, before)
        self._connect()
        if self.over_quota and self.store.quota.roomy:
            self.over_quota = False
            self.say("there is room again within its quota")
            if self._withheld:
                self._act(self._session.renew(time.monotonic(), "what was withheld is to come again"))

    def _write(self) -> None:
        for frame in self._session.take():
            self.chardev.write(frame)

    def _take(self, event: Any) -> None:
        if (
            self._withheld
            and isinstance(event, (messages.Output, messages.Gap, messages.Closed))
            and event.run in self._withheld
        ):
            return
        if isinstance(event, messages.Output):
            self.store.output(event)
            self._hold_line(event)
            self._collector.want_sweep(self.store.unsynced_bytes() >= SWEEP_BYTES)
        elif isinstance(event, messages.Piece):
            self.relay.piece(event)
        elif isinstance(event, messages.Run):
            ack = self.store.run(event)
            self._announced.add(event.run)
            self.send(ack)
            for stream in self.store.unfinished_lines(event.run):  # what more there is comes now
                self._held_lines[event.run, stream] = time.monotonic()
            self._time_lines()
            self._collector.want_sweep()
        elif isinstance(event, messages.Gap):
            self.store.gap(event)
            self._collector.want_sweep()
        elif isinstance(event, messages.Exit):
            self.store.exit(event)
            self._collector.want_sweep(True)
        elif isinstance(event, messages.Closed):
            known = self.store.closed(event)
            self.acknowledge([] if known is None else [known])
            self._collector.want_sweep(True)
        elif isinstance(event, messages.Vmr):
            self._row(event)
        elif isinstance(event, messages.Heartbeat):
            self.health = event.health or {}
            self._learn(event.configured, event.since_zero)
        elif isinstance(event, messages.Reply):
            if not self.relay.take(event):
                self._answered(event)
        elif isinstance(event, Opened):
            self._begin(event.hello)
        elif isinstance(event, Ended):
            self._held_lines.clear()
            self._announced.clear()
            self._withheld.clear()
            self.relay.ended(event.reason)
            self.say(f"session over: {event.reason}")

    def _begin(self, hello: messages.Hello) -> None:
        if hello.spool is None:
            raise BadGuest("a Hello without a spool")
        if not self._sessions.spend():
            raise BadGuest("it begins anew too often")
        if hello.spool != self.store.spool and not self._lives.spend():
            raise BadGuest("it begins a new life too often")
        self.hello, self._strange_since = hello, None
        self._strange_said = self._contradicted = False
        self._announced.clear()
        self._first_round = {}
        new_life = self.store.life(hello, time.time_ns())
        self._failure = ""
        self.say(f"session open with {show(hello.hostname or b'?')} ({show(hello.version.encode())})")
        if new_life:
            self.say("a new life of this VM begins; the earlier one is kept")
        self._collector.want_sweep()
        for request, _ in list(self._waiting.values()):
            if new_life:
                self._give_up(request, "it was asked in an earlier life of this VM")
            else:
                self.send(request)
        self._learn(hello.configured, hello.since_zero)

    def _learn(self, configured: Optional[bool], since_zero: Optional[int]) -> None:
        self.configured = bool(configured)
        self._collector.learned(self, since_zero)

    def _row(self, row: messages.Vmr) -> None:
        if row.vmr is None:
            if self._first_round is not None:
                self.rows, self._first_round = self._first_round, None
        elif parse_vmr(row.vmr) != row.vmr:
            raise BadGuest(f"no VMR has the name {show(row.vmr)}")
        elif self._first_round is None and row.state == "gone":
            self.rows.pop(row.vmr, None)
        else:
            # Cut, for what every VM may make us keep is bounded.
            kept = row._replace(state=row.state[:32], reason=row.reason[:500])
            rows = self.rows if self._first_round is None else self._first_round
            if row.changed and self._first_round is None and rows.get(row.vmr) != kept:
                name = show(row.vmr)
                self.say(f"{name} changed since staging: vmr-host pull {shlex.quote(name)} {self.vm} .")
            rows[row.vmr] = kept
        if len(self.rows) > MAX_ROWS or len(self._first_round or ()) > MAX_ROWS:
            raise BadGuest(f"more than {MAX_ROWS:,} VMRs")

    def _hold_line(self, output: messages.Output) -> None:
        if output.more or output.data[-1:] in (b"\n", b""):
            if self._held_lines:
                self._held_lines.pop((output.run, output.stream), None)
        elif output.stream in (Stream.STDOUT, Stream.STDERR):  # else of a run that is over, or it was refused
            self._held_lines[output.run, output.stream] = time.monotonic()
            self._time_lines()

    def _time_lines(self) -> None:
        if self._line_timer is None and self._held_lines:
            due = min(self._held_lines.values()) + HELD_LINE - time.monotonic()
            self._line_timer = asyncio.get_running_loop().call_later(max(due, 0.05), self._show_lines)

    def _show_lines(self) -> None:
        """Lines whose end hasn't come for a second are shown as they are: a prompt has none."""
        self._line_timer = None
        now = time.monotonic()
        try:
            for (run, stream), since in list(self._held_lines.items()):
                if now - since >= HELD_LINE:
                    del self._held_lines[run, stream]
                    self.store.flush_line(run, stream)
                    self._collector.want_sweep()
        except OSError as failed:
            self.store_failed(failed)
        self._time_lines()

    def _diverged(self, reason: str) -> None:
        if self._contradicted:
            return  # each of its runs may contradict what is held; one new life answers them all
        self._contradicted = True
        self.say(f"was set back in time: {reason}")
        # Not by request(): there is no answer, and asked again in the session it brings it would have no end.
        args = {"reason": messages.text(reason)}
        self.send(messages.Request(request=os.urandom(16), verb="diverged", args=args))


class Collector:
    """Every VM's guest, one sweep of syncs for all, the start of the experiment, and the control socket."""

    def __init__(
        self,
        log_dir: Path,
        sources: Sequence[Source],
        *,
        control_path: Path,
        expect: Optional[int] = None,
        start_buffer: float = 60.0,
        quota: int = 0,
    ) -> None:
        """``quota``: bytes of disk that one VM may take; 0: no bound."""
        self._log_dir = log_dir
        self._quota = quota
        self._background: Optional[ThreadPoolExecutor] = None
        self._results: deque[tuple[Callable[[Measured], None], Measured]] = deque()
        self._results_told = False
        self._sources = sources
        self._control_path = control_path
        self._expect = expect
        self._start_buffer = start_buffer
        self.guests: dict[str, Guest] = {}
        self._starts = Starts(log_dir)
        self._boot = _boot_id()
        self._zero: Optional[Moment] = None
        """Time zero of all VMs."""
        self.poll = Poll()
        self._syncer = Syncer()
        self._renderer: Optional[RendererProcess] = None
        self._renderer_failure = ""
        self._sweep_now = asyncio.Event()
        self._sweep_timer: Optional[asyncio.TimerHandle] = None
        self._sync_took = 0.0  # s, the last time
        self._clients: set[control.Client] = set()
        self._listener: Optional[socket.socket] = None
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Collect until SIGTERM or SIGINT. Raises Problem when it can't begin."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        try:
            for source in self._sources:
                self.guests[source.vm] = Guest(source, self._store(source.vm), self)
            listed = {life_of(name)[0] for name in os.listdir(self._log_dir)} if self._sources else set()
            for guest in self.guests.values():
                guest.store.begins_anew(listed)
            self._listen()
            self._start_renderer()
            for guest in self.guests.values():
                guest.start()
            say(f"collecting from {len(self.guests)} VM{'s' * (len(self.guests) != 1)} into {self._log_dir}")
            tasks = [asyncio.create_task(self._tick()), asyncio.create_task(self._sweeps())]
            stopped = asyncio.create_task(self._stop.wait())
            done, _ = await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
            for task in [*tasks, stopped]:
                task.cancel()
            for task in done:
                task.result()  # a bug in a task is not swallowed
        finally:
            await self._shut_down()

    def _store(self, vm: str) -> LogStore:
        return LogStore(self._log_dir, vm, log=say, limit=self._quota)

    def in_background(self, work: Callable[[], Measured], then: Callable[[Measured], None]) -> None:
        """Work that may take long, one after the other, beside all syncs."""
        if self._background is None:
            self._background = ThreadPoolExecutor(1)
        loop = asyncio.get_running_loop()

        def done(future: Future[Measured]) -> None:
            if future.cancelled():
                return
            self._results.append((then, future.result()))
            # Each call writes a byte to the pipe that wakes the loop. While the loop is busy three hundred fill it,
            # and a signal, whose byte goes there too, is lost: SIGTERM would have to be sent again.
            if not self._results_told:
                self._results_told = True
                with suppress(RuntimeError):  # the loop is closed: they are of no use any more
                    loop.call_soon_threadsafe(self._take_results)

        self._background.submit(work).add_done_callback(done)

    def _take_results(self) -> None:
        self._results_told = False  # first: what comes from here on is told again
        while self._results:
            then, measured = self._results.popleft()
            then(measured)

    async def _shut_down(self) -> None:
        """In this order: no more bytes in, what came made durable, then rendered to its end."""
        for guest in self.guests.values():
            guest.chardev.close()
        for client in list(self._clients):
            self._drop(client)
        if self._background is not None:
            self._background.shutdown(wait=False, cancel_futures=True)
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._control_path.unlink(missing_ok=True)
        for guest in self.guests.values():
            try:
                guest.store.sync()
            except OSError as error:
                say(f"{guest.vm}: cannot sync: {error.strerror or error}")
        if self._renderer is not None:
            self._renderer.wake()
            if not self._renderer.close():
                say("the renderer goes on by itself with what is left")
        for guest in self.guests.values():
            guest.store.close()

    # --- time ---

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            now = time.monotonic()
            for guest in self.guests.values():
                guest.tick(now)
            if self._starts.changed:
                try:
                    self._starts.write()
                except OSError as failed:
                    self._cannot_keep(failed)
            if self._renderer is not None and not self._renderer.alive():
                self._restart_renderer(self._renderer)

    def _restart_renderer(self, ended: RendererProcess) -> None:
        """Where there is no room for one now, in the next second or a later: the journals keep what it is to show."""
        if not self._renderer_failure:
            say("the renderer ended; starting another")
        try:
            ended.restart()
            self._renderer_failure = ""
        except OSError as error:
            failure = f"cannot start a renderer: {error.strerror or error}; trying again"
            if failure != self._renderer_failure:
                self._renderer_failure = failure
                say(failure)

    # --- durability ---

    def want_sweep(self, at_once: bool = False) -> None:
        """Something is to be made durable: within :data:`SWEEP`, or now."""
        if at_once:
            self._sweep_now.set()
        elif self._sweep_timer is None:
            loop = asyncio.get_running_loop()
            delay = min(SWEEP, max(SOON, self._sync_took / SYNC_SHARE))
            self._sweep_timer = loop.call_later(delay, self._sweep_now.set)

    async def _sweeps(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._sweep_now.wait()
            self._sweep_now.clear()
            if self._sweep_timer is not None:
                self._sweep_timer.cancel()
                self._sweep_timer = None
            begun: list[tuple[Guest, Sync]] = []
            began = time.monotonic()
            for guest in self.guests.values():
                try:
                    sync = guest.store.begin_sync()
                except OSError as failed:
                    guest.store_failed(failed)
                    continue
                if sync is not None:
                    begun.append((guest, sync))
                    began = await _others(began)
            if not begun:
                continue
            began = time.monotonic()
            await loop.run_in_executor(None, self._syncer.sync, [sync for _, sync in begun])
            self._sync_took = time.monotonic() - began
            began = time.monotonic()
            for guest, sync in begun:
                try:
                    guest.acknowledge(guest.store.finish_sync(sync))
                except OSError as failed:
                    guest.store_failed(failed)
                began = await _others(began)
            if self._renderer is not None:
                self._renderer.wake(guest.vm for guest, _ in begun)

    def _start_renderer(self) -> None:
        self._renderer = RendererProcess(self._log_dir, self.guests)

    # --- the experiment's start ---

    def learned(self, guest: Guest, since_zero: Optional[int]) -> None:
        """A guest said how it stands: whether it's configured, and its time zero. Of the latter nothing is believed
        but whether there is one: a guest that lies would start all the others."""
        guest.started = since_zero is not None
        self._recall(guest)
        if self._zero is None and self._expect is not None:
            configured = sum(each.configured for each in self.guests.values())
            if configured >= self._expect:
                try:
                    self.start(self._start_buffer)
                    vms = "1 VM is" if configured == 1 else f"{configured} VMs are"
                    say(f"{vms} configured: the experiment starts in {self._start_buffer:g} s")
                except OSError as failed:  # tried again when the next says something
                    self._cannot_keep(failed)
        zero = self._zero if guest.zero is None else guest.zero
        if zero is not None and since_zero is None:
            self._note_start(guest, zero)
            guest.send(messages.Start(delay=int(zero.seconds_since(self._now()) * 1e9)))

    def _recall(self, guest: Guest) -> None:
        """What a collector before this one told the VM, as long as it is the same experiment."""
        start = self._starts.of(guest.vm, guest.store.spool)
        if start is None:
            return
        if not start.everybody:
            guest.zero = start.zero
        elif self._zero is None:
            self._zero = start.zero
            seconds = start.zero.seconds_since(self._now())
            say(
                f"the experiment's start is known: {abs(seconds):.0f} s {'from now' if seconds > 0 else 'ago'}"
            )

    def _note_start(self, guest: Guest, zero: Moment) -> None:
        self._starts.note(guest.vm, guest.store.spool, everybody=guest.zero is None, zero=zero)

    def _cannot_keep(self, failed: OSError) -> None:
        say(
            f"cannot keep the experiment's start in {self._log_dir}: {failed.strerror or failed}; trying again"
        )

    def _now(self) -> Moment:
        return Moment(self._boot, time.clock_gettime_ns(time.CLOCK_BOOTTIME), time.time_ns())

    def start(self, delay: float) -> None:
        """Set time zero ``delay`` seconds from now, for all VMs, also those that come later. OSError where it can't
        be kept, and then it is not set."""
        zero = self._now().after(delay)
        self._starts.keep(
            {each.vm: each.store.spool for each in self.guests.values() if each.zero is None}, zero
        )
        self._zero = zero
        for guest in self.guests.values():
            guest.send(messages.Start(delay=int(delay * 1e9)))

    # --- the verbs ---

    def _listen(self) -> None:
        try:
            self._control_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _answers(self._control_path):
                raise Problem(
                    f"cannot listen at {self._control_path}: another collector does",
                    hint="--control names another socket",
                )
            self._listener = control.listen(self._control_path)
            view.leave_word(self._control_path, self._log_dir)
        except OSError as error:
            raise Problem(
                f"cannot listen at {self._control_path}: {error.strerror or error}",
                hint="--control names another socket",
            ) from None
        self._attend_listener()

    def _attend_listener(self) -> None:
        if self._listener is not None and self._listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptor left: it stays readable, so not at once again
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listener)
            loop.call_later(TICK, self._attend_listener)
            return
        if not control.may_ask(sock) or len(self._clients) >= control.MAX_CLIENTS:
            sock.close()
            return
        client = control.Client(sock, UNREAD)
        self._clients.add(client)
        self._attend(client)

    def _serve(self, client: control.Client) -> None:
        client.flush()
        for request in client.read():
            try:
                self._answer(client, request)
            except Problem as problem:
                self._tell(client, {"ok": False, "error": problem.args[0], "hint": problem.hint})
        self._attend(client)

    def _owe(self, client: control.Client) -> Callable[..., None]:
        """What gives the client an answer that comes later. Until then it is not let go, though it say no more. One
        that another ``follows`` is not the last."""
        client.owed += 1

        def pay(row: Mapping[str, Any], *data: bytes) -> None:
            client.owed -= not row.get("follows")
            self._tell(client, row, *data)

        return pay

    def _tell(self, client: control.Client, row: Mapping[str, Any], *data: bytes) -> None:
        if client in self._clients:
            client.say(row, *data)
            self._attend(client)

    def _attend(self, client: control.Client) -> None:
        """Wait for what the client may do next, or let it go."""
        if client not in self._clients:
            return
        events = client.events
        if events != client.attended:
            client.attended = events
            loop = asyncio.get_running_loop()
            if events & selectors.EVENT_READ:
                loop.add_reader(client.sock, self._serve, client)
            else:
                loop.remove_reader(client.sock)
            if events & selectors.EVENT_WRITE:
                loop.add_writer(client.sock, self._serve, client)
            else:
                loop.remove_writer(client.sock)
        if client.over:
            self._drop(client)

    def _drop(self, client: control.Client) -> None:
        if client in self._clients:
            self._clients.discard(client)
            asyncio.get_running_loop().remove_reader(client.sock)
            asyncio.get_running_loop().remove_writer(client.sock)
            client.sock.close()

    def _answer(self, client: control.Client, request: Mapping[str, Any]) -> None:
        verb = request["verb"]
        log_dir = os.fspath(self._log_dir.absolute())
        if verb == "mix":
            vms = [self._vm(guest) for guest in self._chosen(request)]
            self._tell(client, {"ok": True, "log_dir": log_dir, "vms": vms})
        elif verb == "list":
            guest = self._guest(request)
            row = {**self._vm(guest), "vmrs": self._rows(guest)}
            self._tell(client, {"ok": True, "log_dir": log_dir, **row})
        elif verb == "start":
            self._verb_start(client, request)
        elif verb in ("hold", "resume"):
            self._verb_hold(client, verb, request)
        elif verb == "files":
            self._verb_files(client, request)
        elif verb in ("rerun", "kill"):
            self._forward(client, verb, request)
        else:
            raise Problem(f"cannot do {verb!r}: unknown verb")

    def _verb_start(self, client: control.Client, request: Mapping[str, Any]) -> None:
        delay = request.get("delay", 0)
        if not isinstance(delay, (int, float)) or not 0 <= delay <= MAX_DELAY:
            raise Problem("cannot start: the delay must be a number of seconds")
        guests = self._chosen(request)
        if request.get("vm") is None:
            if self._zero is not None:
                raise Problem("cannot start: the experiment's start is set already", hint=_NEXT)
            try:
                self.start(delay)
            except OSError as error:
                raise Problem(f"cannot start: {self._log_dir}: {error.strerror or error}") from None
        else:
            (guest,) = guests
            if guest.started or guest.zero is not None:
                raise Problem(f"cannot start {guest.vm}: its time zero is set already", hint=_NEXT)
            guest.zero = self._now().after(delay)
            self._note_start(guest, guest.zero)
            try:
                self._starts.write()
            except OSError as error:
                self._cannot_keep(error)
            guest.send(messages.Start(delay=int(delay * 1e9)))
        failed = {guest.vm: f"is offline: {guest.reason}" for guest in guests if not guest.online}
        self._tell(client, {"ok": True, "done": len(guests) - len(failed), "failed": failed})

    def _verb_hold(self, client: control.Client, verb: str, request: Mapping[str, Any]) -> None:
        """hold or resume; answered when all VMs have answered or won't."""
        guests = self._chosen(request)
        waiting = {guest.vm for guest in guests}
        failed: dict[str, str] = {}

        def answer(guest: Guest, reply: Optional[messages.Reply]) -> None:
            if reply is None:
                failed[guest.vm] = f"is offline: {guest.reason}"
            elif not reply.ok:
                failed[guest.vm] = f"says: {show(reply.error.encode())}"
            waiting.discard(guest.vm)
            if not waiting:
                pay({"ok": True, "done": len(guests) - len(failed), "failed": failed})

        pay = self._owe(client)
        for guest in guests:
            if not guest.request(verb, {}, functools.partial(answer, guest)):
                answer(guest, None)

    def _verb_files(self, client: control.Client, request: Mapping[str, Any]) -> None:
        guest = self._guest(request)
        pay = self._owe(client)
        try:
            why = f"{guest.vm} is offline: {guest.reason}"
            guest.relay.ask(request, request.get("data", b""), pay, why, client=client)
        except Problem:
            client.owed -= 1
            raise

    def _forward(self, client: control.Client, verb: str, request: Mapping[str, Any]) -> None:
        """rerun or kill."""
        guest = self._guest(request)
        vmr = os.fsencode(str(request.get("vmr", "")))
        args: dict[str, messages.Scalar] = {"vmr": vmr}
        if parse_vmr(vmr) != vmr:
            raise Problem(f"cannot {verb} {show(vmr)}: no VMR has such a name")
        if not guest.online:
            raise Problem(f"cannot {verb} {show(vmr)}: {guest.vm} is offline: {guest.reason}")
        if verb == "kill":
            number = request.get("signal", int(signal.SIGTERM))
            if type(number) is not int or not 0 < number < signal.NSIG:
                raise Problem("cannot kill: the signal must be a number")
            args.update(run=self._running(guest, vmr), signal=number)

        def answer(reply: messages.Reply) -> None:
            if not reply.ok:
                pay({"ok": False, "error": show(reply.error.encode()), "hint": None})
                return
            # Of what a guest says here a path is made, and a line on somebody's terminal.
            attempt, processes = reply.result.get("attempt"), reply.result.get("processes")
            if type(attempt) is not int or attempt < 1:
                pay({"ok": False, "error": f"cannot {verb} {show(vmr)}: {guest.vm} names no attempt"})
                return
            row = {"processes": processes} if isinstance(processes, str) else {}
            pay({"ok": True, "attempt": attempt, **row, "log_dir": os.fspath(self._log_dir.absolute())})

        pay = self._owe(client)
        guest.request(verb, args, answer)

    def _running(self, guest: Guest, vmr: bytes) -> bytes:
        run = guest.store.latest(vmr)
        if run is not None:
            return run
        if vmr in guest.rows:
            raise Problem(f"cannot kill {show(vmr)}: it has not run on {guest.vm}")
        hint = near(vmr, guest.rows, otherwise=f"vmr-host list {guest.vm} lists them")
        raise Problem(f"cannot find a VMR {show(vmr)} on {guest.vm}", hint=hint)

    def _chosen(self, request: Mapping[str, Any]) -> list[Guest]:
        """The VM that is meant, or all."""
        return list(self.guests.values()) if request.get("vm") is None else [self._guest(request)]

    def _guest(self, request: Mapping[str, Any]) -> Guest:
        vm = request.get("vm")
        guest = self.guests.get(str(vm))
        if guest is None:
            raise Problem(f"cannot find a VM {view.text(str(vm))}", hint=view.near(str(vm), self.guests))
        return guest

    def _vm(self, guest: Guest) -> dict[str, Any]:
        """What is known of a VM, but for what its files say."""
        zero, rows = self._zero if guest.zero is None else guest.zero, guest.rows.values()
        states = Counter(row.state for row in rows)
        return {
            "vm": guest.vm,
            "online": guest.online,
            "reason": guest.reason,
            "configured": guest.configured,
            "time_zero": timestamp(zero.wall_ns) if zero is not None else None,
            "standstill": next((row.reason for row in rows if row.state == "waiting" and row.reason), ""),
            "states": dict(states),
            "disk": {
                "used": guest.store.quota.used,
                "quota": guest.store.quota.limit,
                "over": guest.over_quota,
            },
            "health": {key: each for key, each in guest.health.items() if not isinstance(each, bytes)},
            "dropped": guest.dropped,
        }

    def _rows(self, guest: Guest) -> list[dict[str, Any]]:
        return [
            {"vmr": os.fsdecode(name), "state": row.state, "attempt": row.attempt, "reason": row.reason}
            for name, row in guest.rows.items()
        ]


def _joined(events: Sequence[Any]) -> list[Any]:
    """The same, where Outputs that follow each other in one stream are one: it is written, and journaled, once."""
    joined: list[Any] = []
    parts: list[messages.Output] = []
    for event in (*events, None):
        if parts and not (
            type(event) is messages.Output
            and event.run == parts[0].run
            and event.stream == parts[0].stream
            and event.offset == parts[-1].offset + len(parts[-1].data)
        ):
            joined.append(_join(parts) if len(parts) > 1 else parts[0])
            parts = []
        if type(event) is messages.Output:
            parts.append(event)
        elif event is not None:
            joined.append(event)
    return joined


def _join(parts: Sequence[messages.Output]) -> messages.Output:
    marks = tuple([mark for part in parts for mark in part.marks])
    data = b"".join([part.data for part in parts])
    return parts[0]._replace(more=parts[-1].more, marks=marks, data=data)


async def _others(began: float) -> float:
    """After each :data:`PART` of a sweep, what came meanwhile is taken first. Returns when the part began."""
    if time.monotonic() - began <= PART:
        return began
    await asyncio.sleep(0)
    return time.monotonic()


def _introduce(own: bytes, peer: Optional[bytes]) -> messages.Hello:
    return messages.Hello(
        id=own,
        peer=peer,
        role=Role.HOST.value,
        protocol=PROTOCOL,
        version=vmr_agent.__version__,
        wall=time.time_ns(),
    )


def _boot_id() -> str:
    """Of this host; empty where it can't be known, and then the wall clock counts."""
    try:
        return read_in(Path("/proc/sys/kernel/random"), "boot_id").decode().strip()
    except OSError:
        return ""


def _beat() -> messages.Heartbeat:
    return messages.Heartbeat(wall=time.time_ns())


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False
        return True
