"""What lives here: the channel between a VM and its host: the port's ring, QEMU's socket, and what becomes of bytes.

It must not know: frames, sessions. What it does is in the project's notes on virtio-serial: a host that leaves drops
the whole ring, a guest that closes throws away what it has not read, nobody sees an end of file at a reset.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Callable, Optional, Union

from tests.sim.tasks import SECOND, Clock
from vmr_agent.guest.port import PortState
from vmr_agent.wire import framing

SLOTS = 16
PIECE = 4096  # the port gives at most so much in a read
UNREAD = 1 << 20


class Channel:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.dice = clock.dice
        self.latency = 0.0005
        self.to_host: deque[bytes] = deque()
        self.to_guest = bytearray()
        self.chardev: Optional[Chardev] = None
        self.connects = 0
        """How often a host has connected: a guest that looks too late sees only that."""
        self.stalled_until = 0
        self.wake_guest: Callable[[], None] = lambda: None
        self.damage = 0.0
        """How probable it is that a piece is damaged on its way."""
        self.lose_to_host = self.lose_to_guest = 0
        """So many of the next frames are lost, each whole."""
        self.sockets = False
        """Stands in for a port: bytes are taken in parts, and the end is seen."""
        self._delivering = False

    @property
    def connected(self) -> bool:
        return self.chardev is not None

    # --- the guest's end

    def write(self, data: bytes) -> int:
        if not self.connected or len(self.to_host) >= SLOTS:
            return 0
        if self.sockets and len(data) > 1 and self.dice.random() < 0.2:
            data = data[: self.dice.randrange(1, len(data))]
        if not self.damage or self.dice.random() >= self.damage / 2:  # else all of it is lost
            self.to_host.append(data)
        self._deliver()
        return len(data)

    def read(self) -> bytes:
        data = bytes(self.to_guest[:PIECE])
        del self.to_guest[:PIECE]
        return data

    def guest_closed(self) -> None:
        self.to_guest.clear()

    def reset(self) -> None:
        """The VM's: its ring is empty then; what the host sent meanwhile waits for the next boot."""
        self.to_host.clear()
        if self.dice.random() < 0.5:
            self.to_guest.clear()

    # --- the host's end

    def connect(self, chardev: Chardev) -> None:
        self.chardev = chardev
        self.connects += 1
        self.wake_guest()

    def disconnect(self) -> None:
        self.chardev = None
        self.to_host.clear()
        if self.dice.random() < 0.7:  # of what was sent last only a part has come
            del self.to_guest[self.dice.randrange(len(self.to_guest) + 1) :]
        self.wake_guest()

    def send(self, data: bytes) -> None:
        self.to_guest += self._damaged(data)
        self.clock.after(self.latency, self.wake_guest)

    # --- on the way

    def stall(self, seconds: float) -> None:
        self.stalled_until = self.clock.now + int(seconds * SECOND)

    def _deliver(self) -> None:
        if not self._delivering and self.to_host:
            self._delivering = True
            wait = max(0, self.stalled_until - self.clock.now) / SECOND
            self.clock.after(wait + self.latency * self.dice.random(), self._arrive)

    def _arrive(self) -> None:
        self._delivering = False
        if self.clock.now < self.stalled_until:
            self._deliver()
            return
        was_full = len(self.to_host) >= SLOTS
        data = b""
        for _ in range(self.dice.choice((1, 1, 2, SLOTS))):
            if self.to_host:
                data += self.to_host.popleft()
        if not data or self.chardev is None:
            return
        data = self._damaged(data)
        cut = self.dice.randrange(len(data) + 1) if self.dice.random() < 0.3 else len(data)
        for piece in (data[:cut], data[cut:]):
            if piece and self.chardev is not None:
                self.chardev.arrived(piece)
        if was_full:
            self.wake_guest()
        self._deliver()

    def _damaged(self, data: bytes) -> bytes:
        if not self.damage or self.dice.random() >= self.damage:
            return data
        at = self.dice.randrange(len(data))
        end = self.dice.randrange(at, len(data)) + 1
        how = self.dice.randrange(4)
        if how == 0:
            return data[:at] + bytes((data[at] ^ 1 << self.dice.randrange(8),)) + data[at + 1 :]
        if how == 1:
            return data[:at] + data[end:]
        if how == 2:
            return data[:end] + data[at:]
        return data[:at] + self.dice.randbytes(self.dice.randrange(1, 40)) + data[at:]


class Port:
    """`guest.port.Port`, on a channel."""

    def __init__(self, channel: Channel, sent: Callable[[bytes], None]) -> None:
        self.spec = "simulated"
        self.virtio = True
        self.state = PortState.MISSING
        self.reason = "not tried yet"
        self._channel = channel
        self._sent = sent
        self._connects = -1
        self._taken = framing.Decoder()

    def fileno(self) -> int:
        return -1

    def next_try(self) -> Optional[float]:
        return None

    def close(self) -> None:
        self._channel.guest_closed()

    def present(self) -> bool:
        return True

    def look(self, now: float) -> PortState:
        channel = self._channel
        if channel.sockets and self.state is PortState.UP and channel.connects != self._connects:
            self.state, self.reason = PortState.MISSING, "the host closed the socket"
            channel.guest_closed()
        elif channel.connected:
            if self.state is not PortState.UP:
                self._taken.clear()
            self.state, self.reason = PortState.UP, ""
            self._connects = channel.connects
        else:
            self.state, self.reason = PortState.AWAY, "no host at the other end"
        return self.state

    def read(self) -> bytes:
        return self._channel.read()

    def write(self, frames: Sequence[Union[bytes, memoryview]]) -> int:
        total = 0
        for frame in frames:
            taken = self._write(frame)
            total += taken
            if taken < len(frame):
                break
        return total

    def _write(self, data: Union[bytes, memoryview]) -> int:
        if self._channel.lose_to_host and not self._taken.pending:
            self._channel.lose_to_host -= 1
            taken = len(data)
        else:
            taken = self._channel.write(bytes(data))
        for payload in self._taken.feed(bytes(data[:taken])):
            assert isinstance(payload, bytes), "the guest writes what is no frame"
            self._sent(payload)
        return taken

    def want_room(self, wanted: bool) -> None:
        pass


class Chardev:
    """`host.chardev.Chardev`, on a channel."""

    def __init__(
        self,
        channel: Channel,
        call: Callable[[Callable[[], None]], None],
        sent: Callable[[bytes], None],
        **callbacks: Any,
    ) -> None:
        self.path = "simulated"
        self.listen = False
        self.reason = "not tried yet"
        self._channel = channel
        self._call = call
        self._sent = sent
        self._opened, self._received = callbacks["opened"], callbacks["received"]
        self._closed = callbacks["closed"]
        self._retry = 0.1
        self._over = False

    @property
    def _up(self) -> bool:
        return self._channel.chardev is self

    @property
    def full(self) -> bool:
        return False

    def bind(self) -> None:
        pass

    def start(self) -> None:
        self._connect()

    def _connect(self) -> None:
        if self._over or self._up:
            return
        if self._channel.connected:  # by another collector, not quite dead
            self._try_again()
            return
        self._retry = 0.1
        self.reason = ""
        self._channel.connect(self)
        self._opened()

    def _try_again(self) -> None:
        self._channel.clock.after(self._retry, lambda: self._call(self._connect))
        self._retry = min(2 * self._retry, 1.0)

    def write(self, *frames: bytes) -> None:
        for frame in frames:
            self._write(frame)

    def _write(self, frame: bytes) -> None:
        if self._up:
            self._sent(frame)
            if self._channel.lose_to_guest:
                self._channel.lose_to_guest -= 1
                return
            self._channel.send(frame)
            if len(self._channel.to_guest) > UNREAD:
                self.drop("the guest doesn't read")

    def pause(self) -> None:
        raise AssertionError("no time passes while a collector works")

    resume = pause

    def drop(self, reason: str) -> None:
        if self._up:
            self._retry = 1.0
            self.lost(reason)

    def lost(self, reason: str) -> None:
        self._channel.disconnect()
        self.reason = reason
        self._closed(reason)
        self._try_again()

    def arrived(self, data: bytes) -> None:
        self._call(lambda: self._received(data) if self._up else None)

    def close(self) -> None:
        self._over = True
        if self._up:
            self._channel.disconnect()
