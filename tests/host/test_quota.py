"""What a VM's quota counts, held against what its files take; and guests that try to take more."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.host import said
from tests.host.scripted import Guest, Host, output, run, until
from vmr_agent.host.logstore import LogStore
from vmr_agent.host.quota import RESERVE, Quota
from vmr_agent.host.vmlogs import RawFiles, VmLogs
from vmr_agent.wire import messages

MIB = 1 << 20
LARGE = 1 << 40
DICE = random.Random(3)
SHAPES = {
    "text": b"an ordinary line of output, as most are\n" * 25,
    "empty lines": b"\n" * 1_000,
    "short lines": b"1\n" * 500,
    "no lines": b"x" * 1_000,
    "carriage returns": b"a\r" * 500,
    "bytes": bytes(range(256)) * 4,
    "quotes": b"\"'\\\n" * 250,
    "objects": b'{"a": 1, "b": [true, null]}\n' * 40,
    "control characters": b"\x1b" * 1_000,
    "accents": "é\n".encode() * 300,
}


def taken(logs: Path, vm: str = "vm1") -> int:
    """Bytes of disk of all that is a VM's; of the logs their length."""
    total = 0
    for path in logs.rglob("*"):
        if path.suffix in (".log", ".json") and path.parent == logs:
            total += path.stat().st_size
        elif path.relative_to(logs).parts[0].split("~")[0] == vm:
            total += path.lstat().st_blocks * 512
    return total


def render(logs: Path) -> None:
    root = os.open(logs, os.O_RDONLY | os.O_DIRECTORY)
    rendered = VmLogs(root, "vm1", RawFiles())
    while rendered.step():
        pass
    rendered.sync_logs()
    rendered.write_note(sync=False)
    rendered.commit_note()
    rendered.reset()
    os.close(root)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("large", [False, True], ids=["small pieces", "large pieces"])
def test_what_is_reckoned_is_no_less_than_what_is_taken(tmp_path: Path, shape: str, large: bool) -> None:
    data = SHAPES[shape] * (10 if large else 1)
    store = LogStore(tmp_path, "vm1", log=print, limit=LARGE)
    store.life(said.hello(), said.T)
    store.run(said.run())
    for at in range(200):
        store.output(said.output(data, at * len(data)))
    store.exit(said.exit(200 * len(data)))
    store.closed(said.closed(200 * len(data)))
    store.sync()
    reckoned = store.quota.used
    render(tmp_path)
    there = taken(tmp_path)
    assert there - 64 * 1024 <= reckoned, "rows and journal aside, which are small"
    assert reckoned <= 8 * there + MIB, "nor is it out of all proportion"
    store.quota.take(store.quota.measure(), store.quota.disk)
    assert abs(store.quota.used - there) < 64 * 1024, "once it is rendered it is what it is"
    store.close()


def test_a_measurement_in_between_forgets_nothing_that_is_to_be_rendered_yet(tmp_path: Path) -> None:
    store = LogStore(tmp_path, "vm1", log=print, limit=LARGE)
    store.life(said.hello(), said.T)
    store.run(said.run())
    before = store.quota.disk
    measured = store.quota.measure()
    store.output(said.output(b"1\n" * 10_000))
    store.sync()
    store.quota.take(measured, before)
    assert store.quota.used > 100 * 10_000
    store.quota.take(store.quota.measure(), store.quota.disk)
    assert store.quota.used > 100 * 10_000
    store.close()


def test_what_an_earlier_collector_left_unrendered_is_reckoned(tmp_path: Path) -> None:
    store = LogStore(tmp_path, "vm1", log=print, limit=LARGE)
    store.life(said.hello(), said.T)
    store.run(said.run())
    store.output(said.output(b"1\n" * 10_000))
    store.sync()
    render(tmp_path)
    assert taken(tmp_path) > 100 * 10_000
    store.quota.take(store.quota.measure(), store.quota.disk)
    store.output(said.output(b"2\n" * 10_000, 20_000))
    store.exit(said.exit(40_000))
    store.closed(said.closed(40_000))
    reckoned = store.quota.used
    store.close()
    for _ in range(2):
        store = LogStore(tmp_path, "vm1", log=print, limit=LARGE)
        store.quota.take(store.quota.measure(), store.quota.disk)
        assert reckoned - 64 * 1024 <= store.quota.used <= reckoned + 64 * 1024
        store.close()
    render(tmp_path)
    store = LogStore(tmp_path, "vm1", log=print, limit=LARGE)
    assert abs(store.quota.used - taken(tmp_path)) < 128 * 1024, "raw files and journal are not measured yet"
    store.close()


def test_holes_take_nothing_and_what_is_between_them_a_block_each(tmp_path: Path) -> None:
    store = LogStore(tmp_path, "vm1", log=print, limit=LARGE)
    store.life(said.hello(), said.T)
    store.run(said.run())
    store.gap(said.gap(0, 1 << 40))
    assert store.quota.used < MIB
    at = 1 << 40
    for _ in range(500):
        store.output(said.output(b"x", at))
        store.gap(said.gap(at + 1, 99_999))
        at += 100_000
    store.sync()
    render(tmp_path)
    assert taken(tmp_path) - 64 * 1024 <= store.quota.used
    store.close()


def test_without_a_limit_nothing_is_ever_too_much(tmp_path: Path) -> None:
    quota = Quota(tmp_path, "vm1", 0)
    quota.add(1 << 60)
    assert not quota.over and not quota.exhausted and quota.roomy


def short_lines(guest: Guest, number: int) -> None:
    guest.say(run(1))
    data = b"1\n" * 15_000
    guest.say(*(output(data, at * len(data)) for at in range(number * 100, number * 100 + 100)))


def bytes_between_gaps(guest: Guest, number: int) -> None:
    guest.say(run(1))
    at = number * 200 * 5_000
    first = (1).to_bytes(16, "big")
    for _ in range(200):
        guest.say(output(b"x", at), messages.Gap(first, 1, at + 1, 4_999, "y" * 900))
        at += 5_000


def runs(guest: Guest, number: int) -> None:
    guest.say(*(run(number * 100 + each, vmr=b"-4/%d" % (number * 100 + each)) for each in range(100)))


def lives(guest: Guest, number: int) -> None:
    guest.hello = {**guest.hello, "spool": os.urandom(16), "version": "v" * 4_000, "machine": "m" * 4_000}
    guest.events += guest.session.renew(time.monotonic(), "by the test")
    guest.hear(lambda: guest.session.open, limit=2.0)


@pytest.mark.parametrize("act", [short_lines, bytes_between_gaps, runs, lives], ids=lambda act: act.__name__)
def test_no_guest_takes_more_than_its_quota_and_what_its_runs_say(tmp_path: Path, act: object) -> None:
    """Whatever it does for some seconds; another VM is served all the while."""
    quota = MIB
    host = Host(tmp_path)
    host.start("--quota", str(quota))
    evil, good = Guest(host.socket("evil")), Guest(host.socket("good")).open()
    try:
        good.say(run(1))
        deadline = time.monotonic() + 5.0
        number = at = 0
        while time.monotonic() < deadline:
            try:
                evil.open(2.0)
                act(evil, number)  # type: ignore[operator]
                evil.hear(lambda: True)
                number += 1
            except (OSError, AssertionError):
                evil.close()
                number += 1
            evil.events.clear()
            good.say(output(b"still here\n", at))
            at += 11
            time.sleep(0.02)  # or it comes to its own quota
            good.hear(lambda: True)
        until(lambda: host.raw("good", "-4/a.sh/1") == b"still here\n" * (at // 11), "the other VM's output")
        assert host.alive()
        time.sleep(1.5)  # until all is rendered
        there = taken(host.logs, "evil")
        assert there < quota + RESERVE + 2 * MIB, there
        assert "Traceback" not in host.said()
    finally:
        evil.close()
        good.close()
        host.stop()
