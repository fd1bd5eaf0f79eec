"""The channel of a real VM, cut, stalled and damaged while runs print as fast as they can: nothing is lost or doubled,
and the session is back within three heartbeats.

A relay between QEMU's socket and the collector does the harm. It takes less than the runs print, so QEMU's ring
and the guest's spool are full all the time: each cut drops what the guest saw accepted.
"""

from __future__ import annotations

import ast
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from tests.vm.host import VmWorld
from tests.vm.relay import Damage, Relay
from tests.vm.vm import AGENT_PORT, Vm
from vmr_agent.wire.session import SILENCE

SEED = 3
RATE = 2 << 20  # bytes a second
FLOODS = ("-1/flood-a", "-1/flood-b")
BLOCK = 64  # lines
LINES = b"".join(b"line %02d of this block %s\n" % (number, b"." * 40) for number in range(1, BLOCK))

# Each block begins with its number; the rest is made once, so that printing costs the guest little.
FLOOD = f"""\
#!/usr/bin/python3
import os
lines = b"".join(b"line %02d of this block %s\\n" % (number, b"." * 40) for number in range(1, {BLOCK}))
number = 0
while not os.path.exists("/root/enough"):
    data = b"".join(b"block %010d\\n" % each + lines for each in range(number, number + 8))
    number += 8
    for fd in 1, 2:
        rest = data
        while rest:
            rest = rest[os.write(fd, rest):]
"""


@pytest.fixture
def world(vm: Vm, tmp_path: Path) -> Iterator[VmWorld]:
    """Two runs that fill spool and ring, a relay, a collector."""
    world = VmWorld(tmp_path, vm, {"quiet": "1", "spool_limit": "8M"})
    yield world
    world.close()


@pytest.fixture
def relay(world: VmWorld) -> Iterator[Relay]:
    relay = Relay(world.vm.port_socket(AGENT_PORT), random.Random(SEED))
    world.channel = relay.path
    relay.rate = RATE
    world.start_collector()
    for vmr in FLOODS:
        world.guest_stage(vmr, "exec ./flood.py", {"flood.py": FLOOD})
    world.vm.check("systemctl start vmr-agent")
    for vmr in FLOODS:
        world.wait(lambda: world.raw(vmr), "some output on the host")
    yield relay
    relay.close()


def _size(world: VmWorld) -> int:
    """Bytes of the floods that the host holds."""
    return sum(path.stat().st_size for path in (world.logs / "Server").glob("-1/flood-*/1/std*"))


def _back(world: VmWorld, relay: Relay, since: float, hellos: int) -> float:
    """Wait for another session than those of so many Hellos, and for more output; how long after ``since`` it came."""
    world.wait(lambda: relay.hellos > hellos, "a Hello", limit=120.0)
    held = _size(world)
    world.wait(lambda: _size(world) > held, "more output", limit=120.0)
    return time.monotonic() - since


def _check(world: VmWorld, relay: Relay, *, stalls: int) -> None:
    """All that was printed is there once, in order: raw, in Server.log and in Server.json."""
    relay.rate = None
    world.vm.check("touch /root/enough")
    rows = {vmr: world.complete(vmr) for vmr in FLOODS}
    total = 0
    for vmr, row in rows.items():
        assert (row["exit_code"], row["attempt"], row["gaps"]) == (0, 1, [])
        size = row["stdout_bytes"]
        blocks = size // (17 + len(LINES))
        assert size == row["stderr_bytes"] and blocks > 0 and blocks % 8 == 0
        for stream in ("stdout", "stderr"):
            total += size
            with (world.logs / "Server" / vmr / "1" / stream).open("rb") as raw:
                for number in range(blocks):
                    block = b"block %010d\n" % number + LINES
                    assert raw.read(len(block)) == block, f"{vmr} {stream}, block {number}"
                assert raw.read() == b""
    for vmr in FLOODS:
        pid = rows[vmr]["pid"]
        world.wait(lambda: f"({pid}) exited after" in world.log(), "the exit in Server.log")
    _check_rendering(world, stalls)
    assert not (world.logs / "Server~1").exists()
    print(f"{total / 2**20:.0f} MiB, each byte and each line once")


def _check_rendering(world: VmWorld, stalls: int) -> None:
    """Against the raw files, which are as they must be."""
    raw = {
        (vmr.partition("/")[2], stream): (world.logs / "Server" / vmr / "1" / stream).open("rb")
        for vmr in FLOODS
        for stream in ("stdout", "stderr")
    }
    line = re.compile(r"\[[^]]*INFO\] (flood-.) \(\d+\) (\w+): (b.*)\n")
    with (world.logs / "Server.log").open() as log:
        for text in log:
            found = line.fullmatch(text)
            if found:
                shown = ast.literal_eval(found[3])
                assert raw[found[1], found[2]].read(len(shown)) == shown
    assert {key: file.read(100) for key, file in raw.items()} == dict.fromkeys(raw, b"")
    for file in raw.values():
        file.seek(0)
    # A line whose end doesn't come for a second, by a channel that stands still, has a row for each part.
    begun = dict.fromkeys(raw, "")
    parts = 0
    with (world.logs / "Server.json").open() as rows:
        for text in rows:
            row = json.loads(text)
            key = row["vmr"].partition("/")[2], row["stream"]
            line_left = begun[key] or raw[key].readline().decode().strip()
            assert row["msg"] and line_left.startswith(row["msg"]), (key, line_left, row)
            begun[key] = line_left[len(row["msg"]) :].strip()
            parts += bool(begun[key])
    for key, file in raw.items():
        assert (file.read(100), begun[key]) == (b"", ""), f"{key}: lines are missing in Server.json"
        file.close()
    assert parts <= 4 * stalls, "as many as there are streams"


# --- what goes wrong -----------------------------------------------------------------------------------------


def _done(world: VmWorld, relay: Relay) -> float:
    """Wait until QEMU has a client again; when it got it."""
    world.wait(lambda: not relay.connects, "the collector is back")
    return relay.connected


def _cut(world: VmWorld, relay: Relay) -> float:
    relay.cut()
    return _done(world, relay)


def _stand_still_and_cut(world: VmWorld, relay: Relay) -> float:
    """The ring is as full as it gets."""
    relay.stalled = True
    time.sleep(1)
    relay.cut()
    relay.stalled = False
    return _done(world, relay)


def _switch(world: VmWorld, relay: Relay) -> float:
    """QEMU has another client before the guest has looked; the collector sees nothing of it."""
    relay.switch()
    return _done(world, relay)


def _cut_while_paused(world: VmWorld, relay: Relay) -> float:
    """The guest can't see it, and QEMU may not serve its ring any more until its client changes again."""
    world.vm.pause()
    relay.cut()
    _done(world, relay)
    world.vm.resume()
    return time.monotonic()


def _stale(world: VmWorld, relay: Relay) -> float:
    relay.cut(stale=True)
    return _done(world, relay)


def _damage(way: str, what: Damage) -> Callable[[VmWorld, Relay], float]:
    def damage(world: VmWorld, relay: Relay) -> float:
        relay.damage(way, what)
        world.wait(lambda: relay.damaged(way), "a piece is damaged")
        return time.monotonic()

    damage.__name__ = f"to {way}: {what.value}"
    return damage


CUTS = (_cut, _switch, _stand_still_and_cut, _cut_while_paused, _stale)
DAMAGES = tuple(_damage(way, what) for way in ("host", "guest") for what in Damage)


def _disturb(
    world: VmWorld, relay: Relay, kinds: list[Callable[[VmWorld, Relay], float]], rng: random.Random
) -> None:
    worst: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for kind in kinds:
        time.sleep(rng.random() * 0.3)
        # A switch may go unnoticed, where nothing was under way.
        hellos = -1 if kind is _switch else relay.hellos
        since = kind(world, relay)
        name = kind.__name__.strip("_").replace("_", " ")
        try:
            took = _back(world, relay, since, hellos)
        except AssertionError as error:
            said = world.vm.check("journalctl -o short-monotonic -u vmr-agent | tail -20").decode()
            raise AssertionError(f"{name}: {error}\n{world.guest_status()}\n{said}") from None
        assert took <= SILENCE, f"{name}: no output for {took:.1f} s"
        times[name] += 1
        worst[name] = max(worst[name], took)  # type: ignore[assignment]
    for name, count in times.items():
        print(f"{count} times {name}: output again after {worst[name]:.2f} s at the most")


def _stall(world: VmWorld, relay: Relay, seconds: float) -> None:
    """Longer than either side bears with silence."""
    hellos = relay.hellos
    relay.stalled = True
    time.sleep(seconds)
    relay.stalled = False
    took = _back(world, relay, time.monotonic(), hellos)
    assert took <= SILENCE
    said = world.vm.check("journalctl -o cat -u vmr-agent")
    assert f"session with the host over: silence of {SILENCE:.0f} s".encode() in said
    print(f"stalled for {seconds:.0f} s: output again after {took:.2f} s")


def test_the_channel_is_cut_damaged_and_stalled_under_load(world: VmWorld, relay: Relay) -> None:
    rng = random.Random(SEED)
    kinds = [*CUTS, *DAMAGES]
    rng.shuffle(kinds)
    _disturb(world, relay, kinds, rng)
    _stall(world, relay, SILENCE + 3)
    _check(world, relay, stalls=len(kinds) + 1)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_host_closes_and_returns_two_hundred_times(world: VmWorld, relay: Relay) -> None:
    rng = random.Random(SEED + 1)
    kinds = [rng.choice(CUTS) for _ in range(200)] + [rng.choice(DAMAGES) for _ in range(60)]
    rng.shuffle(kinds)
    _disturb(world, relay, kinds, rng)
    _stall(world, relay, 60.0)
    _check(world, relay, stalls=len(kinds) + 1)
