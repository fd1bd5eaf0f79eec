"""What lives here: the way to the host: the port, the conversation over it, and what waits to be written.

It must not know: what the host's messages mean, which are handed on, nor what there is to ship, which the
shipper says.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from typing import Callable, Optional, Union

from vmr_agent.guest import machine
from vmr_agent.guest.port import Port, PortState
from vmr_agent.guest.shipper import Shipper
from vmr_agent.wire import framing, messages
from vmr_agent.wire.session import Event, Role, Session

_STRANGER = 10.0  # s; a port that talks for so long and says no Hello leads to something else
_ROOM = 1.0  # s; a port that was full is tried again, for kernels 5.15 to 6.15 can lose the wake-up
_NEVER = float("-inf")
_QUIET = 1.0  # s; so long the port is believed to have nothing to read unless it says so
_QUEUED = 20_000  # messages to the host; more is a host that asks and doesn't read, which then isn't heard
_BURST = 64  # writes done, and reads taken, before the loop looks at the rest
_JOINED = 16  # frames written at once, at most
_TOGETHER = 8  # writes done by one call, at most
# The same where writes take their time, so that a line beside a flood is not late by all of them: four times as long as
# the rest of the loop takes, which in a slow VM is long.
_SHARE = 4
_SLICE = (0.001, 0.03)  # s; at least, at most


class Link:
    """One end of the virtio-serial port. Each turn of the loop calls :meth:`hear`, then :meth:`speak`."""

    def __init__(
        self,
        spec: str,
        shipper: Shipper,
        *,
        introduce: Callable[[bytes, Optional[bytes]], messages.Hello],
        beat: Callable[[], messages.Heartbeat],
        heed: Callable[[Event], None],
        log: Callable[[str], None],
    ) -> None:
        """``heed`` is called with each event of the session, in order; it may call :meth:`renew`."""
        self._spec = spec
        self._shipper = shipper
        self._heed = heed
        self._log = log
        self._port = Port(spec)
        self._session = Session(Role.GUEST, introduce=introduce, beat=beat, make_id=lambda: os.urandom(8))
        self._outbox: deque[Union[bytes, memoryview]] = deque()
        self._blocked = False  # the port took nothing more
        self.more = False
        """The last turn left something undone that no wake-up will tell of."""
        self._spoke = 0.0  # when that was, where it left something undone; else 0
        self._rest = 0.0  # s, for the rest of the loop
        self.untold = False
        """The port is not among what woke the loop."""
        self._drained = _NEVER  # when the port had nothing more to read, unless it may have
        self._said = ""
        self._up_since = 0.0
        self._garbage_before = 0

    def fileno(self) -> int:
        return self._port.fileno()

    def close(self) -> None:
        self._port.close()

    @property
    def virtio(self) -> bool:
        """Whether the port is a real one: this is a VM, and no test of one."""
        return self._port.virtio

    @property
    def state(self) -> PortState:
        return self._port.state

    @property
    def reason(self) -> str:
        """Why there is no conversation, as far as it is known."""
        return self._port.reason or self._strange()

    @property
    def open(self) -> bool:
        """Whether a session is open with a host."""
        return self._session.open

    @property
    def dropped(self) -> dict[str, int]:
        """What came in and was of no use, counted by kind."""
        return dict(self._session.counts)

    def next_due(self) -> float:
        """When :meth:`hear` and :meth:`speak` have something to do by themselves: BOOTTIME, s."""
        due = [self._port.next_try(), self._session.next_tick()]
        if self._blocked:
            due.append(machine.boottime() + _ROOM)
        return min((when for when in due if when is not None), default=float("inf"))

    def beat(self, now: float) -> None:
        """Say a heartbeat at once: what it tells has changed."""
        self._session.beat(now)

    def renew(self, reason: str) -> None:
        """End the session and begin another, in which all that was not done comes again."""
        self._deliver(self._session.renew(machine.boottime(), reason))

    def hear(self, now: float) -> None:
        """Look after the port, and hand on what the host said."""
        self.more = False
        if self.untold and self._port.state is PortState.UP and now < self._drained + _QUIET:
            self._deliver(self._session.tick(now))
            return
        self._drained = _NEVER
        before = self._port.state
        state = self._port.look(now)
        if state is PortState.UP and before is not PortState.UP:
            self._outbox.clear()
            self._session.connect(now)
            self._up_since, self._garbage_before = now, self._session.counts["garbage"]
        # Reads also tell that the host has left. They go on until there is nothing: edges are not counted.
        for _ in range(_BURST):
            if self._shipper.queued() > _QUEUED:
                self.more = not self._blocked
                break
            data = self._port.read() if self._port.state is PortState.UP else b""
            if not data:
                self._drained = now
                break
            self._deliver(self._session.receive(data, now))
        else:
            self.more = True  # to read, and its edge is used up
        if self._port.state is not PortState.UP:
            self._deliver(self._session.disconnect(self._port.reason))
            self._blocked = False
        else:
            self._deliver(self._session.tick(now))
        self._say_state()

    def speak(self) -> None:
        """Write what there is to write, until the port takes no more."""
        self._outbox.extend(self._session.take())
        self._blocked = False
        began = now = machine.boottime()
        if self._spoke:  # and who had the processor meanwhile is soon forgotten
            self._rest = min(began - self._spoke, 2 * self._rest + _SLICE[0])
        until = began + min(max(_SHARE * self._rest, _SLICE[0]), _SLICE[1])
        for _ in range(_BURST):
            if not self._write():
                break
            now = machine.boottime()
            if now > until:
                self.more = True
                break
        else:
            self.more = True  # to write, and no edge will tell
        self._spoke = now if self.more else 0.0
        if self._port.state is PortState.UP:
            self._port.want_room(self._blocked)

    # --- inside ---

    def _deliver(self, events: Sequence[Event]) -> None:
        session = self._session.id
        for event in events:
            if self._session.id != session:
                return  # one of them ended the session, by us: the others are of one that is over
            self._heed(event)

    def _write(self) -> bool:
        """Write some frames at once, for a write costs a slow VM a millisecond. False when there are none, or no room
        for all of them."""
        if self._port.state is not PortState.UP:
            return False
        writes, failure = self._gather()
        taken = self._port.write(writes) if writes else 0
        for number, data in enumerate(writes):
            if taken < len(data):
                self._blocked = True
                self._outbox.extendleft(reversed([memoryview(data)[taken:], *writes[number + 1 :]]))
                break
            taken -= len(data)
        if failure is not None:
            raise failure
        return bool(writes) and not self._blocked

    def _gather(self) -> tuple[list[Union[bytes, memoryview]], Optional[OSError]]:
        """What to write next, each as much as the port takes in one write: a large frame, or several small ones."""
        writes: list[Union[bytes, memoryview]] = []
        frames: list[Union[bytes, memoryview]] = []
        room = framing.MAX_FRAME
        failure: Optional[OSError] = None
        for _ in range(_JOINED):
            try:
                if not self._outbox and not self._fetch():
                    break
            except OSError as error:
                failure = error  # one run can't be read; what was taken up to it has its numbers, and must go
                break
            if len(self._outbox[0]) > room:
                writes.append(b"".join(frames) if len(frames) > 1 else frames[0])
                frames, room = [], framing.MAX_FRAME
                if len(writes) == _TOGETHER:
                    break
            room -= len(self._outbox[0])
            frames.append(self._outbox.popleft())
        if frames:
            writes.append(b"".join(frames) if len(frames) > 1 else frames[0])
        return writes, failure

    def _fetch(self) -> bool:
        """Have the shipper's next frames in the outbox, if it has any."""
        if self._session.open:
            self._outbox.extend(self._shipper.next(self._session))
        return bool(self._outbox)

    def _strange(self) -> str:
        """What is wrong with whoever is at the port's other end, if it doesn't speak as we do."""
        if self._port.state is not PortState.UP or self._session.open:
            return ""
        if machine.boottime() < self._up_since + _STRANGER:
            return ""
        if self._session.counts["garbage"] == self._garbage_before:
            return ""
        return "what comes in is no Hello; is a vmr-host collector at the other end?"

    def _say_state(self) -> None:
        up = self._port.state is PortState.UP
        said = self._strange() if up else f"{self._port.state.value}: {self._port.reason}"
        if said != self._said:
            self._said = said
            self._log(f"port {self._spec}: {said or 'up'}")
