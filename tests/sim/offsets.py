"""The host end closes and returns at every byte of one conversation: `tests.sim.offsets FIRST STEP`.

One small history is played again and again, the same up to the cut: the real daemon, shim, session, shipper,
collector, log store and renderer. Both directions count. What the simulation checks of every history is checked
of each of these, and that the session is back within three heartbeats. The guest sees the host go, or, as after a
fast reconnect, does not.
"""

from __future__ import annotations

import gc
import sys
from typing import Any, Callable, Optional

from tests.sim import world
from tests.sim.channel import Channel, Chardev
from tests.sim.guest import Script
from tests.sim.tasks import SECOND, Clock
from vmr_agent.runs import Stream
from vmr_agent.wire.session import SILENCE

RETURNS = (0.0001, 0.1)
"""Seconds until the host is back: the guest misses the first."""


class CutChannel(Channel):
    """Passes so many bytes in all, then the host goes, once."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.left = 1 << 60
        self.passed = 0
        self.cut: Optional[Callable[[], None]] = None

    def _pass(self, data: bytes) -> bytes:
        if self.cut is None:
            return data
        part = data[: self.left]
        self.left -= len(data)
        self.passed += len(part)
        if self.left < 0:
            cut, self.cut = self.cut, None
            self.clock.after(0, cut)
        return part

    @property
    def cutting(self) -> bool:
        return self.left < 0 and self.connects == 1

    def send(self, data: bytes) -> None:
        if not self.cutting:
            super().send(self._pass(data))

    def _arrive(self) -> None:
        self._delivering = False
        data = b"".join(self.to_host)
        self.to_host.clear()
        if data and self.chardev is not None and not self.cutting:
            self.chardev.arrived(self._pass(data))
        self.wake_guest()

    def disconnect(self) -> None:
        self.chardev = None
        self.to_host.clear()
        self.wake_guest()


class OffsetWorld(world.World):
    """No faults but the one, and a script that always says the same."""

    def __init__(self, at: int, back: float, *, verbose: bool = False) -> None:
        super().__init__(1, verbose=verbose)
        channel = self.channel
        channel.__class__ = CutChannel
        assert isinstance(channel, CutChannel)
        channel.left, channel.passed, channel.cut = at, 0, self._cut
        self.cut_channel = channel
        self.back = back
        self.cut_at = self.opened_at = 0
        self.plan.vmrs, self.plan.late = ["-1/v"], []

    def _steps(self, script: Script) -> list[tuple[Any, ...]]:
        return [
            ("write", Stream.STDOUT, b"the first line\n" * 20),
            ("write", Stream.STDERR, b"and half a line"),
            ("sleep", 0.3),
            ("write", Stream.STDOUT, b"the last line\n"),
            ("exit", 3),
        ]

    def _cut(self) -> None:
        chardev, process = self.channel.chardev, self.host.process
        assert isinstance(chardev, Chardev) and process is not None
        self.say(f"cut after {self.cut_channel.passed} bytes")
        self.cut_at = self.clock.now
        chardev._retry = self.back
        self.host.call(process, lambda: chardev.lost("cut"))

    def host_says(self, line: str) -> None:
        super().host_says(line)
        if "session open with" in line and self.cut_at and not self.opened_at:
            self.opened_at = self.clock.now

    def _until(self, seconds: float, well: Callable[[], Any]) -> bool:
        return super()._until(seconds, lambda: (not self.cut_at or self.opened_at) and well())


def _plan(dice: Any) -> world.Plan:
    return world.Plan(
        length=0.1,
        faults={},
        traps=dict.fromkeys(("daemon", "collector", "renderer", "shim"), 0.0),
        vmrs=[],
        late=[],
        quiet=0.5,
        spool_limit=0,
        quota=0,
        drop=False,
        lost_orders=0.0,
        lost_events=0.0,
        syncfs=None,
        sockets=False,
        buffer=0.5,
        size=300,
        slow=0.0,
        constants={"chunk": 200, "window": 2500, "tail": 512, "sync_s": 1.0},
    )


def play(at: int, back: float, *, verbose: bool = False) -> tuple[OffsetWorld, str]:
    """A history cut after ``at`` bytes; and what was wrong with it."""
    made = OffsetWorld(at, back, verbose=verbose)
    made.run()
    if made.violations:
        return made, made.violations[0]
    if made.cut_at and made.opened_at - made.cut_at > SILENCE * SECOND:
        return made, "the session was not back in time"
    return made, ""


def main() -> int:
    gc.disable()
    world.make_plan = _plan
    first, step = map(int, sys.argv[1:3])
    whole, wrong = play(1 << 60, 0.1)
    assert not wrong, wrong
    length = whole.cut_channel.passed
    worst = failed = tried = 0
    for at in range(first, length, step):
        for back in RETURNS:
            made, wrong = play(at, back)
            tried += 1
            assert made.cut_at, f"not cut after {at} bytes"
            worst = max(worst, made.opened_at - made.cut_at)
            if wrong:
                failed += 1
                print(f"cut after {at} bytes, back after {back} s: {wrong}", flush=True)
        if at % 20 == 0:
            gc.collect()
    print(
        f"a conversation of {length} bytes cut {tried} times, {failed} failed; "
        f"the session back within {worst / SECOND:.2f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
