"""What lives here: the host's loop: chardev → session → log store → ack, for every VM in one process.

It must not know: how logs look (the renderer's), how files are laid out (the log store's). Guests are not trusted:
whatever one sends, the others go on. Over 400 lines, as one module: a loop and the conversations in it.
"""

from __future__ import annotations

import asyncio
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

import vmr_agent
from vmr_agent import control
from vmr_agent.errors import Problem, show
from vmr_agent.host.chardev import Chardev
from vmr_agent.host.life import BadGuest, Diverged
from vmr_agent.host.logstore import LogStore, Syncer
from vmr_agent.host.renderer import RendererProcess
from vmr_agent.wire import messages
from vmr_agent.wire.session import PROTOCOL, Ended, Opened, Role, Session

SWEEP = 0.1  # s; the latest acknowledgement of a byte after its arrival
SWEEP_BYTES = 8 << 20  # arrived and not acknowledged; at once then
TICK = 1.0  # s; how often sessions are told the time
HELD_LINE = 1.0  # s; a line without an end is shown after so long
STRANGER = 10.0  # s; a socket that talks for so long and says no Hello speaks something else
_REPLY = 30.0  # s; a guest that has not answered a request by then won't


def say(line: str) -> None:
    """One line to the collector's own log, which is standard error."""
    print(line, file=sys.stderr, flush=True)


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
        self.rows: dict[bytes, messages.Vmr] = {}
        self.health: Mapping[str, Any] = {}
        self._collector = collector
        self._session = Session(Role.HOST, introduce=_introduce, beat=_beat, make_id=lambda: os.urandom(8))
        self.chardev = Chardev(
            source.path,
            listen=source.listen,
            opened=self._opened,
            received=self._received,
            closed=self._closed,
        )
        self._first_round: Optional[dict[bytes, messages.Vmr]] = None
        self._waiting: dict[bytes, Callable[[messages.Reply], None]] = {}
        self._held_lines: dict[tuple[bytes, int], float] = {}
        self._line_timer: Optional[asyncio.TimerHandle] = None
        self._strange_since: Optional[float] = None
        self._failure = ""

    @property
    def online(self) -> bool:
        return self._session.open

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

    def request(
        self, verb: str, args: Mapping[str, messages.Scalar], answer: Callable[[messages.Reply], None]
    ) -> bool:
        """Ask the guest for something; ``answer`` is called with its reply. False when there is no session."""
        request = os.urandom(16)
        if not self.send(messages.Request(request=request, verb=verb, args=args)):
            return False
        self._waiting[request] = answer
        asyncio.get_running_loop().call_later(_REPLY, self._waiting.pop, request, None)
        return True

    def acknowledge(self, acks: Sequence[messages.Ack]) -> None:
        for ack in acks:
            self.send(ack)

    # --- from the guest ---

    def tick(self, now: float) -> None:
        due = self._session.next_tick()
        if due is not None and now >= due:
            self._act(self._session.tick(now))
        if self._strange_since is not None and now - self._strange_since > STRANGER:
            self._strange_since = None
            garbage = self._session.counts["garbage"]
            say(
                f"{self.vm}: {self.chardev.path} says no Hello ({garbage:,} bytes of something else);"
                " is it the vmr-agent port's socket?"
            )

    def _opened(self) -> None:
        self._session.connect(time.monotonic())
        self._strange_since = time.monotonic()
        self._write()

    def _closed(self, reason: str) -> None:
        self._strange_since = None
        self._act(self._session.disconnect(reason))

    def _received(self, data: bytes) -> None:
        self._act(self._session.receive(data, time.monotonic()))

    def _act(self, events: Sequence[Any]) -> None:
        for event in events:
            try:
                self._take(event)
            except Diverged as diverged:
                self._diverged(str(diverged))
            except BadGuest as error:
                # Nothing it sends in this connection is believed any more; what it holds, it sends again.
                say(f"{self.vm}: sends what can't be: {error}; beginning anew")
                self.chardev.drop("a bad guest")
                return
            except OSError as failed:
                self.store_failed(failed)
                return
        self._write()

    def store_failed(self, failed: OSError) -> None:
        """What couldn't be stored isn't acknowledged, and comes again in the next session, a second from now."""
        reason = failed.strerror or str(failed)
        if reason != self._failure:
            self._failure = reason
            say(
                f"{self.vm}: cannot write to {self.store.log_dir}: {reason}; nothing is acknowledged, trying again"
            )
        self.chardev.drop("the log directory can't be written")

    def _write(self) -> None:
        for frame in self._session.take():
            self.chardev.write(frame)

    def _take(self, event: Any) -> None:
        if isinstance(event, messages.Output):
            self.store.output(event)
            self._hold_line(event)
            self._collector.want_sweep(self.store.unsynced_bytes() >= SWEEP_BYTES)
        elif isinstance(event, messages.Run):
            self.send(self.store.run(event))
            self._collector.want_sweep()
        elif isinstance(event, messages.Gap):
            self.store.gap(event)
            self._collector.want_sweep()
        elif isinstance(event, messages.Exit):
            self.store.exit(event)
            self._collector.want_sweep(True)
        elif isinstance(event, messages.Closed):
            self.store.closed(event)
            self._collector.want_sweep(True)
        elif isinstance(event, messages.Vmr):
            self._row(event)
        elif isinstance(event, messages.Heartbeat):
            self.health = event.health or {}
            self._learn(event.configured, event.since_zero, event.zero_by)
        elif isinstance(event, messages.Reply):
            answer = self._waiting.pop(event.request, None)
            if answer is not None:
                answer(event)
        elif isinstance(event, Opened):
            self._begin(event.hello)
        elif isinstance(event, Ended):
            self._held_lines.clear()
            say(f"{self.vm}: session over: {event.reason}")

    def _begin(self, hello: messages.Hello) -> None:
        if hello.spool is None:
            raise BadGuest("a Hello without a spool")
        self.hello, self._strange_since = hello, None
        new_life = self.store.life(hello, time.time_ns())
        self._failure = ""
        say(f"{self.vm}: session open with {show(hello.hostname or b'?')} ({hello.version})")
        if new_life:
            say(f"{self.vm}: a new life of this VM begins; the earlier one is kept")
        self._first_round = {}
        now = time.monotonic()
        for run, stream in self.store.unfinished_lines():
            self._held_lines[run, stream] = now
        self._time_lines()
        self._collector.want_sweep()
        self._learn(hello.configured, hello.since_zero, hello.zero_by)

    def _learn(self, configured: Optional[bool], since_zero: Optional[int], zero_by: Optional[str]) -> None:
        self.configured = bool(configured)
        self._collector.learned(self, since_zero, zero_by)

    def _row(self, row: messages.Vmr) -> None:
        if row.vmr is None:
            if self._first_round is not None:
                self.rows, self._first_round = self._first_round, None
        elif self._first_round is not None:
            self._first_round[row.vmr] = row
        elif row.state == "gone":
            self.rows.pop(row.vmr, None)
        else:
            self.rows[row.vmr] = row
        if len(self.rows) > MAX_ROWS or len(self._first_round or ()) > MAX_ROWS:
            raise BadGuest(f"more than {MAX_ROWS:,} VMRs")

    def _hold_line(self, output: messages.Output) -> None:
        key = (output.run, output.stream)
        if output.more or output.data[-1:] in (b"\n", b""):
            self._held_lines.pop(key, None)
        else:
            self._held_lines[key] = time.monotonic()
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
        say(f"{self.vm}: was set back in time: {reason}")
        self.request("diverged", {"reason": messages.text(reason)}, lambda _: None)


MAX_ROWS = 100_000  # VMRs of one VM kept in memory: ten times the most anyone stages


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
    ) -> None:
        self._log_dir = log_dir
        self._sources = sources
        self._control_path = control_path
        self._expect = expect
        self._start_buffer = start_buffer
        self.guests: dict[str, Guest] = {}
        self._zero: Optional[float] = None  # time zero on the monotonic clock
        self._syncer = Syncer()
        self._renderer: Optional[RendererProcess] = None
        self._sweep_now = asyncio.Event()
        self._sweep_timer: Optional[asyncio.TimerHandle] = None
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
                self.guests[source.vm] = Guest(source, LogStore(self._log_dir, source.vm, log=say), self)
            self._listen()
            self._start_renderer()
            for guest in self.guests.values():
                guest.chardev.start()
            say(f"collecting from {len(self.guests)} VMs into {self._log_dir}")
            tasks = [asyncio.create_task(self._tick()), asyncio.create_task(self._sweeps())]
            stopped = asyncio.create_task(self._stop.wait())
            done, _ = await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
            for task in [*tasks, stopped]:
                task.cancel()
            for task in done:
                task.result()  # a bug in a task is not swallowed
        finally:
            await self._shut_down()

    async def _shut_down(self) -> None:
        """In this order: no more bytes in, what came made durable, then rendered to its end."""
        for guest in self.guests.values():
            guest.chardev.close()
        for client in list(self._clients):
            self._drop(client)
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
            if self._renderer is not None and not self._renderer.alive():
                say("the renderer ended; starting another")
                self._renderer.restart()

    # --- durability ---

    def want_sweep(self, at_once: bool = False) -> None:
        """Something is to be made durable: within :data:`SWEEP`, or now."""
        if at_once:
            self._sweep_now.set()
        elif self._sweep_timer is None:
            self._sweep_timer = asyncio.get_running_loop().call_later(SWEEP, self._sweep_now.set)

    async def _sweeps(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._sweep_now.wait()
            self._sweep_now.clear()
            if self._sweep_timer is not None:
                self._sweep_timer.cancel()
                self._sweep_timer = None
            begun = []
            for guest in self.guests.values():
                try:
                    sync = guest.store.begin_sync()
                except OSError as failed:
                    guest.store_failed(failed)
                    continue
                if sync is not None:
                    begun.append((guest, sync))
            if not begun:
                continue
            await loop.run_in_executor(None, self._syncer.sync, [sync for _, sync in begun])
            for guest, sync in begun:
                try:
                    guest.acknowledge(guest.store.finish_sync(sync))
                except OSError as failed:
                    guest.store_failed(failed)
            if self._renderer is not None:
                self._renderer.wake(guest.vm for guest, _ in begun)

    def _start_renderer(self) -> None:
        self._renderer = RendererProcess(self._log_dir, self.guests)

    # --- the experiment's start ---

    def learned(self, guest: Guest, since_zero: Optional[int], zero_by: Optional[str]) -> None:
        """A guest said how it stands: whether it's configured, and its time zero."""
        now = time.monotonic()
        if self._zero is None and since_zero is not None and zero_by == "host":
            # We were started again: the first guest that was told by a host tells us.
            self._zero = now - since_zero / 1e9
        if self._zero is None and self._expect is not None:
            configured = sum(each.configured for each in self.guests.values())
            if configured >= self._expect:
                say(f"{configured} VMs are configured: the experiment starts in {self._start_buffer:g} s")
                self.start(self._start_buffer)
        if self._zero is not None and since_zero is None:
            guest.send(messages.Start(delay=int((self._zero - now) * 1e9)))

    def start(self, delay: float) -> None:
        """Set time zero ``delay`` seconds from now, for all VMs, also those that come later."""
        self._zero = time.monotonic() + delay
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
        except OSError as error:
            raise Problem(
                f"cannot listen at {self._control_path}: {error.strerror or error}",
                hint="--control names another socket",
            ) from None
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        if not control.may_ask(sock) or len(self._clients) >= control.MAX_CLIENTS:
            sock.close()
            return
        client = control.Client(sock)
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

    def _tell(self, client: control.Client, row: Mapping[str, Any]) -> None:
        if client in self._clients:
            client.say(row)
            self._attend(client)

    def _attend(self, client: control.Client) -> None:
        """Wait for what the client may do next, or let it go."""
        if client not in self._clients:
            return
        loop = asyncio.get_running_loop()
        if client.events & selectors.EVENT_READ:
            loop.add_reader(client.sock, self._serve, client)
        else:
            loop.remove_reader(client.sock)
        if client.events & selectors.EVENT_WRITE:
            loop.add_writer(client.sock, self._serve, client)
        else:
            loop.remove_writer(client.sock)
        if not client.events:
            self._drop(client)

    def _drop(self, client: control.Client) -> None:
        if client in self._clients:
            self._clients.discard(client)
            asyncio.get_running_loop().remove_reader(client.sock)
            asyncio.get_running_loop().remove_writer(client.sock)
            client.sock.close()

    def _answer(self, client: control.Client, request: Mapping[str, Any]) -> None:
        verb = request["verb"]
        if verb == "mix":
            self._tell(client, {"ok": True, "log_dir": os.fspath(self._log_dir), "vms": self._mix()})
        elif verb == "start":
            self._verb_start(client, request)
        elif verb in ("rerun", "kill", "hold", "resume"):
            self._forward(client, verb, request)
        else:
            raise Problem(f"cannot do {verb!r}: unknown verb")

    def _verb_start(self, client: control.Client, request: Mapping[str, Any]) -> None:
        delay = request.get("delay", 0)
        if not isinstance(delay, (int, float)) or not 0 <= delay <= 10**9:
            raise Problem("cannot start: the delay must be a number of seconds")
        if request.get("vm") is not None:
            guest = self._guest(request)
            if not guest.send(messages.Start(delay=int(delay * 1e9))):
                raise Problem(f"cannot start {guest.vm}: no session with it: {guest.chardev.reason}")
        elif self._zero is not None:
            raise Problem("cannot start: the experiment's start is set already")
        else:
            self.start(delay)
        self._tell(client, {"ok": True})

    def _forward(self, client: control.Client, verb: str, request: Mapping[str, Any]) -> None:
        if verb in ("hold", "resume") and request.get("vm") is None:
            guests = [guest for guest in self.guests.values() if guest.online]
            for guest in guests:
                guest.request(verb, {}, lambda _: None)
            self._tell(client, {"ok": True, "vms": [guest.vm for guest in guests]})
            return
        guest = self._guest(request)
        args: dict[str, messages.Scalar] = {}
        if verb in ("rerun", "kill"):
            vmr = os.fsencode(str(request.get("vmr", "")))
            args = {"vmr": vmr}
            if verb == "kill":
                args = {
                    "run": self._running(guest, vmr),
                    "signal": int(request.get("signal", signal.SIGTERM)),
                }

        def answer(reply: messages.Reply) -> None:
            result = {
                key: value.hex() if isinstance(value, bytes) else value for key, value in reply.result.items()
            }
            if reply.ok:
                self._tell(client, {"ok": True, **result})
            else:
                self._tell(client, {"ok": False, "error": show(reply.error.encode()), "hint": None})

        if not guest.request(verb, args, answer):
            raise Problem(
                f"cannot {verb}: no session with {guest.vm}: {guest.chardev.reason or 'it says nothing'}"
            )

    def _running(self, guest: Guest, vmr: bytes) -> bytes:
        run = guest.store.latest(vmr)
        if run is None:
            raise Problem(f"cannot kill {show(vmr)}: no run of it has been seen on {guest.vm}")
        return run

    def _guest(self, request: Mapping[str, Any]) -> Guest:
        vm = request.get("vm")
        guest = self.guests.get(str(vm))
        if guest is None:
            raise Problem(f"cannot find a VM {str(vm)!r}", hint="the VMs are " + ", ".join(self.guests))
        return guest

    def _mix(self) -> list[dict[str, Any]]:
        rows = []
        for guest in self.guests.values():
            counts: dict[str, int] = {}
            for row in guest.rows.values():
                counts[row.state] = counts.get(row.state, 0) + 1
            rows.append(
                {
                    "vm": guest.vm,
                    "online": guest.online,
                    "reason": guest.chardev.reason,
                    "configured": guest.configured,
                    "counts": counts,
                    "rows": [
                        {
                            "vmr": show(row.vmr or b""),
                            "state": row.state,
                            "attempt": row.attempt,
                            "reason": row.reason,
                        }
                        for row in guest.rows.values()
                    ],
                    "health": dict(guest.health),
                    "dropped": guest.dropped,
                }
            )
        return rows


def _introduce(own: bytes, peer: Optional[bytes]) -> messages.Hello:
    return messages.Hello(
        id=own,
        peer=peer,
        role=Role.HOST.value,
        protocol=PROTOCOL,
        version=vmr_agent.__version__,
        wall=time.time_ns(),
    )


def _beat() -> messages.Heartbeat:
    return messages.Heartbeat(wall=time.time_ns())


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False
        return True
