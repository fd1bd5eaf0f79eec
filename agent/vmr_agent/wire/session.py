"""What lives here: the state machine of one conversation, for either role: bytes and ticks in, events and frames out.

It must not know: sockets, clocks (`now` is whatever monotonic seconds the caller has), what messages make
anybody do. The states and the table of what happens in each are in `PROTOCOL.md` section 3.
"""

from __future__ import annotations

import enum
from collections import Counter
from typing import Callable, NamedTuple, Optional, Union

from vmr_agent.wire import framing, messages
from vmr_agent.wire.messages import Heartbeat, Hello, Malformed, MalformedMessage, Message, Unknown

HEARTBEAT = 5.0  # s; in the manner of minimega's miniccc: silence means reset
AWAITED = 1.0  # s; an idle guest wakes half as often when its heartbeat goes out with the host's coming in
SILENCE = 15.0  # s; three heartbeats
HALF_FRAME = 2.0  # s; a host killed in mid-frame never sends the rest
PROTOCOL = 1


class Role(enum.Enum):
    GUEST = "guest"
    HOST = "host"


class State(enum.Enum):
    SHUT = "shut"
    """There is no channel."""
    DEAF = "deaf"
    HAILED = "hailed"
    OPEN = "open"


class Opened(NamedTuple):
    """A session is open; ``hello`` is the peer's."""

    hello: Hello


class Ended(NamedTuple):
    """The session is over; what was not acknowledged in it is to be sent again in the next."""

    reason: str


Event = Union[Opened, Ended, Message]


class LocalError(Exception):
    """We asked for what the state doesn't allow: a frame while no session is open."""


class Session:
    """One end of the conversation.

    Each call may leave frames of the session's own to be written, in :meth:`take`; they and the frames from
    :meth:`frame` must be written in the order they were made, since each holds its number.

    ``introduce(id, peer)`` makes a Hello, ``beat()`` a Heartbeat, ``make_id()`` 8 random bytes.
    """

    def __init__(
        self,
        role: Role,
        *,
        introduce: Callable[[bytes, Optional[bytes]], Hello],
        beat: Callable[[], Heartbeat],
        make_id: Callable[[], bytes],
    ) -> None:
        self.role = role
        self.state = State.SHUT
        self.counts: Counter[str] = Counter()
        """Frames dropped, by cause: ``garbage`` (bytes), ``stale``, ``doubled``, ``malformed``, ``unknown``."""
        self.id = b""
        self.peer: Optional[bytes] = None
        self._introduce = introduce
        self._beat = beat
        self._make_id = make_id
        self._decoder = framing.Decoder()
        self._hello: Optional[Hello] = None
        self._due = 0  # the n of the next frame to come
        self._next = 0  # the n of the next frame to go
        self._outbox: list[bytes] = []
        self._heard = self._sent = self._begun = self._arrived = 0.0

    @property
    def open(self) -> bool:
        return self.state is State.OPEN

    # --- the channel ---

    def connect(self, now: float) -> None:
        """The channel was opened, by us or anew."""
        self._decoder.clear()
        self.peer = self._hello = None
        self.state = State.DEAF
        self._renew(now)

    def disconnect(self, reason: str) -> list[Event]:
        """The channel is gone."""
        was_open = self.open
        self.state = State.SHUT
        self._outbox.clear()
        return [Ended(reason)] if was_open else []

    def renew(self, now: float, reason: str) -> list[Event]:
        """End the session by ourselves and say Hello with a new id."""
        if self.state is State.SHUT:
            return []
        events: list[Event] = [Ended(reason)] if self.open else []
        if self.state is State.OPEN:
            self.state = State.HAILED
        self._renew(now)
        return events

    # --- in ---

    def receive(self, data: bytes, now: float) -> list[Event]:
        """What these bytes from the channel mean."""
        if self.state is State.SHUT or not data:
            return []
        self._heard = self._arrived = now
        was_pending = self._decoder.pending
        found = self._decoder.feed(data)
        if self._decoder.pending and (found or not was_pending):
            self._begun = now
        events: list[Event] = []
        for item in found:
            self._item(item, now, events)
        return events

    def busy(self, now: float) -> None:
        """What came is still being acted on: nobody listens, so nobody is silent."""
        self._heard = now

    def tick(self, now: float) -> list[Event]:
        """What the passing of time means; to be called at :meth:`next_tick`."""
        events: list[Event] = []
        if self.state is State.SHUT:
            return events
        while self._decoder.pending and now - self._begun >= HALF_FRAME:
            self._begun = self._arrived  # what is begun now came no later than the last byte
            for item in self._decoder.expire():
                self._item(item, now, events)
        if self.open and now - self._heard >= SILENCE:
            events += self.renew(now, f"silence of {SILENCE:.0f} s")
        if now >= self._beat_due():
            if self.open:
                self.beat(now)
            else:
                self._say_hello(now)
        return events

    def next_tick(self) -> Optional[float]:
        """When :meth:`tick` has something to do if nothing comes before; None while there is no channel."""
        if self.state is State.SHUT:
            return None
        due = self._beat_due()
        if self.open:
            due = min(due, self._heard + SILENCE)
        if self._decoder.pending:
            due = min(due, self._begun + HALF_FRAME)
        return due

    # --- out ---

    def take(self) -> list[bytes]:
        """The session's own frames to be written, in order."""
        frames, self._outbox = self._outbox, []
        return frames

    def frame(self, message: Message) -> bytes:
        """The frame that carries ``message`` in this session. Raises LocalError when none is open."""
        to, n = self._number()
        return framing.encode(messages.pack(message, to=to, n=n))

    def output_frame(
        self,
        run: bytes,
        stream: int,
        offset: int,
        more: bool,
        marks: messages.Pairs,
        data: Union[bytes, memoryview],
    ) -> bytes:
        """:meth:`frame` for an Output, without a copy of ``data`` but the one into the frame."""
        to, n = self._number()
        head = messages.output_head(run, stream, offset, more, marks, len(data), to=to, n=n)
        return framing.encode(head, data)

    def piece_frames(self, request: bytes, at: int, data: Union[bytes, memoryview]) -> list[bytes]:
        """The frames of as many Pieces as ``data`` takes, likewise."""
        view, frames = memoryview(data), []
        for start in range(0, len(view), messages.PIECE):
            piece = view[start : start + messages.PIECE]
            to, n = self._number()
            head = messages.piece_head(request, at + start, len(piece), to=to, n=n)
            frames.append(framing.encode(head, piece))
        return frames

    def beat(self, now: float) -> None:
        """Send a Heartbeat now, because something in it changed."""
        if self.open:
            self._sent = now
            self._outbox.append(self.frame(self._beat()))

    # --- inside ---

    def _beat_due(self) -> float:
        return self._sent + HEARTBEAT + (AWAITED if self.open and self.role is Role.GUEST else 0.0)

    def _number(self) -> tuple[bytes, int]:
        if not self.open or self.peer is None:
            raise LocalError("no session is open")
        n, self._next = self._next, self._next + 1
        return self.peer, n

    def _renew(self, now: float) -> None:
        self.id = self._make_id()
        self._say_hello(now)

    def _say_hello(self, now: float) -> None:
        self._sent = now
        self._outbox.append(framing.encode(messages.pack(self._introduce(self.id, self.peer))))

    def _enter(self, now: float, events: list[Event]) -> None:
        self.state = State.OPEN
        self._due = self._next = 0
        self._heard = now
        self._sent = now
        assert self._hello is not None
        events.append(Opened(self._hello))

    def _item(self, item: Union[bytes, framing.Garbage], now: float, events: list[Event]) -> None:
        if isinstance(item, framing.Garbage):
            self._garbage(item.length, now, events)
            return
        message: Optional[Message] = None
        try:
            envelope = messages.unpack(item)
            message, to, n = envelope.message, envelope.to, envelope.n
        except MalformedMessage as error:
            to, n = error.to, error.n
            self.counts["malformed"] += 1
        except Malformed:
            self.counts["malformed"] += 1
            self._garbage(len(item), now, events)
            return
        if isinstance(message, Hello):
            if message.role == self.role.value:
                self._garbage(len(item), now, events)  # crossed wires, or our own echo
            else:
                self._hear(message, now, events)
            return
        if to != self.id or self.state is State.DEAF:
            self.counts["stale"] += 1
            return
        if self.state is State.HAILED:
            if n != 0:
                self.counts["missing"] += 1
                events += self.renew(now, "frames missing")
                return
            self._enter(now, events)
        if n < self._due:
            self.counts["doubled"] += 1
        elif n > self._due:
            self.counts["missing"] += n - self._due
            events += self.renew(now, f"{n - self._due} frames missing")
        else:
            self._due += 1
            if isinstance(message, Unknown):
                self.counts["unknown"] += 1
            elif message is not None:
                events.append(message)
                if (
                    isinstance(message, Heartbeat)
                    and self.role is Role.GUEST
                    and now - self._sent >= HEARTBEAT / 2
                ):
                    self.beat(now)

    def _garbage(self, length: int, now: float, events: list[Event]) -> None:
        self.counts["garbage"] += length
        if self.open:
            events += self.renew(now, f"{length} bytes of garbage")

    def _hear(self, hello: Hello, now: float, events: list[Event]) -> None:
        known = hello.id == self.peer
        ours = hello.peer == self.id
        self.peer, self._hello = hello.id, hello
        if not known and self.open:
            events.append(Ended("the peer began anew"))
        if not known:
            self.state = State.HAILED
        if not (known and ours):
            self._say_hello(now)
        if ours and self.state is not State.OPEN:
            self._enter(now, events)
