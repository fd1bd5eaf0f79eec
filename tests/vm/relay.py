"""Between a VM's chardev socket and the collector: a channel that a test can cut, stall and damage. Knows no test.

One thread serves it; the test's thread says what is to happen, and when it did. ``path`` is what the collector is
told to connect to. QEMU sees a client come and go, as it would with a collector that does.
"""

from __future__ import annotations

import enum
import os
import random
import select
import shutil
import socket
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Optional

PIECE = 1 << 16
TURN = 0.02  # s
KEPT = 1 << 18  # bytes of an earlier conversation
HELLO = b"\xa4type\xa5hello"


class Damage(enum.Enum):
    """What becomes of a piece on its way."""

    FLIP = "a bit is flipped"
    DROP = "some bytes are dropped"
    DOUBLE = "some bytes come twice"
    JUNK = "other bytes come between"


class _Way:
    """One direction."""

    def __init__(self) -> None:
        self.waiting = b""
        self.damage: Optional[Damage] = None
        self.earlier = b""
        self.passed = b""
        """The last bytes of the conversation before, and of this one."""


class Relay:
    """``rate``: bytes a second that it takes from the guest; None: all there are."""

    def __init__(self, qemu: Path, rng: random.Random) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="vmr-"))
        self.path = self._directory / "relay"
        self.rate: Optional[float] = None
        self.stalled = False
        """Nothing is read from either side; QEMU's client is there all the same."""
        self.hellos = 0
        """How many the guest has said."""
        self.connected = 0.0
        """time.monotonic() when QEMU last got a client."""
        self._qemu_path, self._rng = qemu, rng
        self._cut = self._switch = self._stale = self._ended = False
        self._lock = threading.Lock()
        self._to_host, self._to_guest = _Way(), _Way()
        self._near: Optional[socket.socket] = None  # the collector
        self._far: Optional[socket.socket] = None  # QEMU
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(os.fspath(self.path))
        self._listener.listen(8)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    # --- the test's thread

    def cut(self, *, stale: bool = False) -> None:
        """Both connections end; the collector may come back at once.

        ``stale``: what each side said in the conversation before this one's end comes first in the next.
        """
        with self._lock:
            self._cut, self._stale = True, stale

    def switch(self) -> None:
        """QEMU's client goes and another comes at once, and the collector sees nothing of it."""
        with self._lock:
            self._switch = True

    def damage(self, way: str, what: Damage) -> None:
        """The next piece to ``host`` or ``guest`` is damaged."""
        with self._lock:
            self._ways[way].damage = what

    def damaged(self, way: str) -> bool:
        """Whether that has happened."""
        return self._ways[way].damage is None

    @property
    def connects(self) -> bool:
        """Whether a cut, or a switch, is yet to be done."""
        return self._cut or self._switch or self._far is None

    def close(self) -> None:
        self._ended = True
        self._thread.join()
        self._close()
        self._listener.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    # --- its own thread

    @property
    def _ways(self) -> dict[str, _Way]:
        return {"host": self._to_host, "guest": self._to_guest}

    def _serve(self) -> None:
        began, allowed = time.monotonic(), 0.0
        while not self._ended:
            now = time.monotonic()
            rate = self.rate
            allowed = min(allowed + (now - began) * rate, rate * 4 * TURN) if rate else float(PIECE)
            began = now
            with self._lock:
                if self._cut:
                    self._cut = False
                    self._close()
                if self._switch:
                    self._switch = False
                    if self._far is not None:
                        self._far.close()
                        self._far = None
                        self._forget()
                        self._connect()
            if self._near is None or self._far is None:
                self._accept()
                continue
            try:
                allowed -= self._turn(self._near, self._far, int(allowed))
            except OSError:
                self._close()

    def _accept(self) -> None:
        if not select.select([self._listener], [], [], TURN)[0]:
            return
        self._close()
        self._near, _ = self._listener.accept()
        self._near.setblocking(False)
        self._connect()

    def _connect(self) -> None:
        far = socket.socket(socket.AF_UNIX)
        try:
            far.connect(os.fspath(self._qemu_path))
        except OSError:
            far.close()
            self._close()
            time.sleep(TURN)
            return
        far.setblocking(False)
        self._far = far
        if self._stale:
            self._stale = False
            for way in self._ways.values():
                way.waiting = way.earlier
        self.connected = time.monotonic()

    def _close(self) -> None:
        for end in (self._near, self._far):
            if end is not None:
                end.close()
        self._near = self._far = None
        self._forget()

    def _forget(self) -> None:
        """What is under way is lost."""
        for way in self._ways.values():
            way.waiting = b""
            if way.passed:
                way.earlier, way.passed = way.passed, b""

    def _turn(self, near: socket.socket, far: socket.socket, allowed: int) -> int:
        """Carry what there is; the bytes taken from the guest."""
        if self.stalled:
            time.sleep(TURN)
            return 0
        taken = 0
        reads, writes = [], []
        for source, target, way in ((far, near, self._to_host), (near, far, self._to_guest)):
            if way.waiting:
                writes.append(target)
            elif way is self._to_guest or allowed > 0:
                reads.append(source)
        readable, writable, _ = select.select(reads, writes, [], TURN)
        for source, way in ((far, self._to_host), (near, self._to_guest)):
            if source in readable:
                data = source.recv(min(PIECE, allowed) if way is self._to_host else PIECE)
                if not data:
                    raise ConnectionError
                if way is self._to_host:
                    self.hellos += (way.passed[1 - len(HELLO) :] + data).count(HELLO)
                way.waiting = self._damaged(way, data)
                way.passed = (way.passed + way.waiting)[-KEPT:]
                taken += len(data) if way is self._to_host else 0
        for target, way in ((near, self._to_host), (far, self._to_guest)):
            if way.waiting and (target in writable or target not in writes):
                with suppress(BlockingIOError):
                    way.waiting = way.waiting[target.send(way.waiting) :]
        if allowed <= 0:
            time.sleep(TURN / 4)
        return taken

    def _damaged(self, way: _Way, data: bytes) -> bytes:
        what, way.damage = way.damage, None
        rng = self._rng
        start = rng.randrange(len(data))
        end = rng.randrange(start, len(data)) + 1
        if what is Damage.FLIP:
            return data[:start] + bytes((data[start] ^ 1 << rng.randrange(8),)) + data[start + 1 :]
        if what is Damage.DROP:
            return data[:start] + data[end:]
        if (
            what is Damage.DOUBLE
        ):  # less than a frame: one that comes twice does no harm, and isn't noticed here
            return data[: start + 9] + data[start:]
        if what is Damage.JUNK:
            return data[:start] + rng.randbytes(rng.randrange(1, 200)) + data[start:]
        return data
