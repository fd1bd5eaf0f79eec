"""The collector as a real process: what it acknowledges, and what guests that lie can make of it (nothing)."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import resource
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable

import msgpack
import pytest

from tests.host.scripted import AGENT, Ended, Guest, Host, Opened, closed, exited, output, run, until
from vmr_agent import control
from vmr_agent.errors import Problem
from vmr_agent.host import chardev, collector
from vmr_agent.host.chardev import Chardev, Poll
from vmr_agent.host.collector import UNHEARD, Collector, Source
from vmr_agent.host.journal import JOURNAL, OUTPUT, Kind, records
from vmr_agent.host.starts import Moment, Starts
from vmr_agent.runs import Ending, RunState
from vmr_agent.wire import framing, messages
from vmr_agent.wire.session import LocalError

PATH = "-4/a.sh/1"
FIRST = (1).to_bytes(16, "big")
HUGE = 2**63 - 1
MIB = 1 << 20


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def guest(host: Host) -> Iterator[Guest]:
    made = Guest(host.socket("good")).open()
    yield made
    made.close()


def begin(guest: Guest, number: int = 1, **fields: Any) -> messages.Ack:
    """Announce a run, and return its first Ack."""
    announced = run(number, **fields)
    before = len(guest.acks(announced.run))
    guest.say(announced)
    guest.hear(lambda: len(guest.acks(announced.run)) > before, "the Ack of a Run")
    return guest.acks(announced.run)[before]


# --- acknowledged is stored ---


def test_an_ack_comes_only_when_the_bytes_are_in_their_files(host: Host, guest: Guest) -> None:
    begin(guest)
    data = random.Random(3).randbytes(3 * MIB)
    offset = seen = 0
    while offset < len(data):
        piece = data[offset : offset + random.Random(offset).randrange(1, 30_000)]
        guest.say(output(piece, offset))
        offset += len(piece)
        guest.hear(lambda: True)
        acks = guest.acks(FIRST)
        for ack in acks[seen:]:
            assert host.raw("good", PATH)[: ack.stdout] == data[: ack.stdout]
        seen = len(acks)
        time.sleep(0.002)
    guest.hear(lambda: guest.acks(FIRST)[-1].stdout == len(data), "all of it is acknowledged")
    assert len(guest.acks(FIRST)) > 3, "it is acknowledged on the way, not at the end"


def test_what_was_acknowledged_is_there_when_the_collector_is_killed(host: Host, guest: Guest) -> None:
    begin(guest)
    data = b"".join(b"line %d\n" % number for number in range(100_000))
    for offset in range(0, len(data), 30_000):
        guest.say(output(data[offset : offset + 30_000], offset))
    guest.hear(lambda: guest.acks(FIRST)[-1].stdout > 0, "some of it is acknowledged")
    acknowledged = guest.acks(FIRST)[-1].stdout
    host.kill()
    host.start()
    again = Guest(host.socket("good")).open()
    ack = begin(again)
    assert ack.stdout >= acknowledged and ack.state == RunState.STARTED
    assert host.raw("good", PATH)[: ack.stdout] == data[: ack.stdout]
    again.say(*(output(data[at : at + 30_000], at) for at in range(ack.stdout, len(data), 30_000)))
    again.hear(lambda: again.acks(FIRST)[-1].stdout == len(data), "the rest is acknowledged")
    until(lambda: host.log("good", "json").count("\n") == 100_000, "each line in good.json, once")


def test_the_first_ack_of_each_session_tells_the_tails(host: Host, guest: Guest) -> None:
    assert begin(guest) == messages.Ack(FIRST, 0, 0, 0, ((0, 0), (0, 0)))
    data = random.Random(1).randbytes(100_000)
    for at in range(0, len(data), 20_000):
        guest.say(output(data[at : at + 20_000], at))
    guest.say(output(b"oops", stream=2))
    guest.hear(lambda: (guest.acks(FIRST)[-1].stdout, guest.acks(FIRST)[-1].stderr) == (len(data), 4))
    guest.close()
    ack = begin(guest.open())
    assert (ack.state, ack.stdout, ack.stderr) == (RunState.STARTED, len(data), 4)
    assert ack.tails == ((zlib.crc32(data[-65_536:]), 65_536), (zlib.crc32(b"oops"), 4))


def test_no_ack_of_a_run_comes_in_a_session_before_its_run(host: Host, guest: Guest) -> None:
    """One of a sweep that began in the last session would be taken for the first, which tells the tails."""
    for attempt in range(5):
        guest.say(run(attempt, attempt=attempt + 1))
        data = random.Random(attempt).randbytes(30_000)
        guest.say(*(output(data, at * len(data), attempt) for at in range(40)), exited(attempt, stdout=7))
        guest.events += guest.session.renew(time.monotonic(), "by the test")
        before = len(guest.events)
        guest.hear(lambda: guest.session.open, "a new session")
        time.sleep(0.15)
        guest.hear(lambda: True)
        assert [event for event in guest.events[before:] if isinstance(event, messages.Ack)] == []


def test_what_is_sent_again_is_stored_and_shown_once(host: Host, guest: Guest) -> None:
    data = b"".join(b"line %d\n" % number for number in range(1000))
    ended = exited(stdout=len(data))
    over = closed(stdout=len(data))
    for _ in range(3):
        if not guest.session.open:
            guest.open()
        begin(guest, started=5)
        for at in range(0, len(data), 1000):
            guest.say(output(data[at : at + 1000], at))
        guest.say(ended)
        guest.hear(lambda: guest.acks(FIRST)[-1].state >= RunState.EXITED, "exited")
        guest.close()
    guest.open()
    begin(guest, started=5)
    guest.say(over)
    guest.hear(lambda: guest.acks(FIRST)[-1].state == RunState.CLOSED, "closed")
    assert host.raw("good", PATH) == data
    until(lambda: "exited after" in host.log("good"), "the exit in good.log")
    assert host.log("good", "json").count("\n") == 1000
    assert host.log("good").count("exited after") == 1 and host.log("good").count("CALL ARGS") == 1
    row = json.loads((host.logs / "good" / PATH / "result.json").read_text())
    assert row["complete"] is True and row["stdout_bytes"] == len(data)


def test_a_run_that_is_whole_is_answered_with_closed_for_ever(host: Host, guest: Guest) -> None:
    begin(guest)
    guest.say(output(b"all\n"), exited(stdout=4), closed(stdout=4))
    guest.hear(lambda: guest.acks(FIRST)[-1].state == RunState.CLOSED, "closed")
    for _ in range(2):
        guest.close()
        host.kill()
        host.start()
        guest = Guest(host.socket("good")).open()
        ack = begin(guest)
        assert (ack.state, ack.stdout) == (RunState.CLOSED, 4)
        assert ack.tails == ((zlib.crc32(b"all\n"), 4), (0, 0))
    guest.close()


def test_a_second_connection_is_refused_and_disturbs_nothing(host: Host, guest: Guest) -> None:
    begin(guest)
    for _ in range(5):
        other = Guest(host.socket("good")).connect()
        until(lambda: other.gone, "the second is refused")
    guest.say(output(b"still here\n"))
    guest.hear(lambda: guest.acks(FIRST)[-1].stdout == 11, "acked")
    assert guest.heard(Ended) == []


def test_a_guest_that_hears_us_and_is_not_heard_is_connected_to_anew(tmp_path: Path) -> None:
    """As QEMU leaves it when its client changes while the VM stands still, with a full ring; but not one that talks,
    however long it takes to open a session, nor one in a session."""
    host = Host(tmp_path, vms=("mute", "slow"))
    listeners = {vm: socket.socket(socket.AF_UNIX) for vm in host.vms}
    for vm, listener in listeners.items():
        listener.bind(os.fspath(host.socket(vm)))
        listener.listen(8)
        listener.settimeout(60)
    host.start(connect=True)
    try:
        mute, slow = (listeners[vm].accept()[0] for vm in host.vms)
        mute.settimeout(60)
        slow.setblocking(False)
        hello = messages.Hello(id=b"12345678", peer=None, role="guest", protocol=1, version="1", wall=1)
        ended = False
        while not ended:  # each Hello of ours is for another peer than there is
            slow.sendall(framing.encode(messages.pack(hello)))
            with suppress(BlockingIOError):
                assert slow.recv(1 << 16), "who talks is listened to"
            if select.select([mute], [], [], 0.5)[0]:
                ended = not mute.recv(1 << 16)
        listeners["mute"].accept()[0].close()
    finally:
        host.stop()


def test_a_vm_that_says_nothing_is_said_once_however_often_it_is_connected_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def connect() -> None:
        with socket.socket(socket.AF_UNIX) as listener, tempfile.TemporaryDirectory(prefix="vmr-") as short:
            listener.bind(f"{short}/vm")
            listener.listen()
            listener.setblocking(False)
            loop = asyncio.get_running_loop()
            made = Collector(tmp_path, [], control_path=Path(short, "control"))
            source = Source("mute", Path(short, "vm"))
            store = made._store("mute")
            mute = made.guests["mute"] = collector.Guest(source, store, made)
            mute.start()
            for _ in range(3):
                accepted, _ = await asyncio.wait_for(loop.sock_accept(listener), 20)
                mute.tick(time.monotonic() + UNHEARD - 1)
                assert not mute.chardev.reason
                mute.tick(time.monotonic() + UNHEARD + 1)
                assert mute.chardev.reason
                accepted.close()
            mute.chardev.close()
            store.close()

    asyncio.run(connect())
    assert capsys.readouterr().err.count("/vm says nothing yet: the VM boots, or runs no vmr-agent") == 1


def test_a_line_without_its_end_is_shown_after_a_second_and_not_while_there_is_more(
    host: Host, guest: Guest
) -> None:
    begin(guest)
    guest.say(output(b"more to come", more=True))
    time.sleep(2.5)
    assert "more to come" not in host.log("good")
    guest.say(output(b", login: ", 12))
    until(lambda: "b'more to come, login: '" in host.log("good"), "the prompt", 4.0)


def test_half_a_line_waits_for_a_guest_that_is_slow_to_say_what_it_has(host: Host, guest: Guest) -> None:
    """A collector that was started again can't know whether there is more, before the run is announced."""
    begin(guest)
    guest.say(output(b"one half", more=True))
    guest.hear(lambda: guest.acks(FIRST)[-1].stdout == 8, "acked")
    host.kill()
    host.start()
    again = Guest(host.socket("good")).open()
    time.sleep(1.5)
    ack = begin(again)
    again.say(output(b" and the other\n", ack.stdout))
    until(lambda: "b'one half and the other\\n'" in host.log("good"), "the line, whole")
    assert host.log("good", "json").count("\n") == 1
    again.close()


def test_a_prompt_is_shown_also_after_the_collector_was_started_again(host: Host, guest: Guest) -> None:
    begin(guest)
    guest.say(output(b"login: "))
    guest.hear(lambda: guest.acks(FIRST)[-1].stdout == 7, "acked")
    host.kill()
    host.start()
    again = Guest(host.socket("good")).open()
    begin(again)
    until(lambda: "b'login: '" in host.log("good"), "the prompt")
    again.close()


def test_time_travel_is_said_once_a_session(host: Host, guest: Guest) -> None:
    """Each request begins a new life of the guest: one for each run it announces would be a life for each."""
    for number in range(1, 6):
        begin(guest, number, vmr=b"-4/%d" % number)
    guest.say(*(run(number + 100, vmr=b"-4/%d" % number) for number in range(1, 6)))
    guest.hear(lambda: guest.heard(messages.Request), "the request")
    time.sleep(0.3)
    guest.hear(lambda: True)
    assert [request.verb for request in guest.heard(messages.Request)] == ["diverged"]


# --- guests that lie ---


Evil = Callable[[Guest], None]
EVIL: list[Evil] = []


def evil(act: Evil) -> Evil:
    EVIL.append(act)
    return act


def each_alone(guest: Guest, said: list[list[messages.Message]]) -> None:
    """Say each of these in a session of its own, for the host ends it."""
    for some in said:
        guest.open()
        try:
            guest.say(*some)
            guest.hear(lambda: False, limit=0.1)
        except (OSError, AssertionError):
            pass
        if guest.gone:
            guest.close()


def any_frame(guest: Guest, **payload: Any) -> bytes:
    to, n = guest.session._number()
    return framing.encode(msgpack.packb({"to": to, "n": n, **payload}, use_bin_type=True))


ODD_NAMES = [
    b"-4/..",
    b"-4/../../x",
    b"../x/y",
    b"/etc/passwd",
    b"-4/a\0b",
    b"-4/a/b/c",
    b"1e999/x",
    b"-4/" + b"n" * 255,
    b"-4/" + b"n" * 4_000,
    b"-4/\xff\x1b[31m\n[2024-06-06 00:43:06 GMT INFO] fake",
    b"-4/%2E%2E",
]


@evil
def odd_names(guest: Guest) -> None:
    numbered = list(enumerate(ODD_NAMES))
    each_alone(guest, [[run(number, vmr=name), output(b"x\n", 0, number)] for number, name in numbered])
    each_alone(guest, [[messages.Vmr(name, "exited", 1, "")] for name in ODD_NAMES[:2]])
    each_alone(guest, [[run(98, vmr=b"-4/long", attempt=0)]])


@evil
def names_of_64_kib(guest: Guest) -> None:
    guest.open()
    frame = msgpack.packb({"type": "vmr", "to": guest.session.peer, "n": 0, "vmr": b"n" * 65_536})
    guest.send(framing.HEADER.pack(0xC9, len(frame) + 7, b"VMR1", zlib.crc32(frame)) + frame)


@evil
def runs_that_never_began(guest: Guest) -> None:
    gap = messages.Gap(FIRST, 1, 0, 5, "")
    each_alone(guest, [[output(b"x\n")], [gap], [exited()], [closed()]])


@evil
def offsets_beyond_all_bounds(guest: Guest) -> None:
    said: list[list[messages.Message]] = []
    for offset in (2**40, 2**63 - 1):
        for act in range(6):
            number = len(said) + 1
            which = number.to_bytes(16, "big")
            acts: list[list[messages.Message]] = [
                [output(b"x", offset, number)],
                [messages.Gap(which, 1, offset, 1, "")],
                [messages.Gap(which, 1, 0, offset, "")],
                [messages.Gap(which, 2, 0, offset, ""), output(b"x\n", offset, number, stream=2)],
                [exited(number, stdout=offset, stderr=offset)],
                [closed(number, stdout=offset)],
            ]
            said.append([run(number, vmr=b"-4/%d" % number), *acts[act]])
    each_alone(guest, said)


@evil
def output_that_overlaps_and_contradicts(guest: Guest) -> None:
    guest.open()
    begin(guest)
    guest.say(output(b"0123456789"), output(b"345", 3), output(b"0123456789abc"), output(b"", 4))
    guest.hear(lambda: guest.acks(FIRST)[-1].stdout == 13)
    guest.say(output(b"XX", 2), output(b"abcXYZ", 10), *(output(b"%d" % at, 9) for at in range(1000)))
    guest.hear(lambda: guest.heard(messages.Request))
    assert len(guest.heard(messages.Request)) == 1


@evil
def marks_that_lie(guest: Guest) -> None:
    wild = tuple((1, HUGE if number % 2 else 0) for number in range(2_000))
    each_alone(
        guest,
        [
            [run(), output(b"abc", marks=((2, 5),))],
            [run(), output(b"abc", marks=())],
            [run(), output(b"abc", marks=((HUGE, 1), (HUGE, 1)))],
            [run(), output(b"", marks=((0, HUGE),) * 2_000)],
            [run(), *(output(b"x" * 2_000, at * 2_000, marks=wild) for at in range(20))],
        ],
    )


@evil
def streams_there_are_not(guest: Guest) -> None:
    said: list[list[messages.Message]] = [[run(), output(b"x", stream=n)] for n in (0, 3, HUGE)]
    each_alone(guest, said)
    guest.open()
    begin(guest, 2, vmr=b"-4/done")
    guest.say(exited(2), closed(2))
    guest.hear(lambda: guest.acks((2).to_bytes(16, "big"))[-1].state == RunState.CLOSED)
    guest.say(output(b"no end", 0, 2, stream=77), output(b"no end", 0, 2))
    time.sleep(1.3)  # until lines without an end are shown


@evil
def ends_there_are_not(guest: Guest) -> None:
    wild = {"started": HUGE, "ended": 0, "started_boottime": HUGE, "user": HUGE, "max_rss": HUGE}
    each_alone(
        guest,
        [
            [run(1, vmr=b"-4/1"), exited(1, ending="\x1b[31mdead")],
            [run(2, vmr=b"-4/2"), exited(2, ending="signal", value=HUGE, **wild), closed(2)],
            [run(3, vmr=b"-4/3"), exited(3, ending="code", value=HUGE, **wild), closed(3)],
            [
                run(4, vmr=b"-4/4"),
                exited(4, ending="errno", value=HUGE, text="\n[fake]\x1b[31m" * 99, **wild),
            ],
            [run(5, vmr=b"-4/5"), exited(5), exited(5, value=1)],
            [run(6, vmr=b"-4/6"), closed(6)],
            [run(7, vmr=b"-4/7"), exited(7), closed(7), output(b"after", 0, 7), exited(7, value=1)],
        ],
    )


@evil
def times_there_are_not(guest: Guest) -> None:
    for number, hello in enumerate(
        (
            {"wall": 0},
            {"wall": HUGE},
            {"wall": HUGE, "boottime": HUGE, "since_zero": HUGE, "zero_by": "host"},
            {"boottime": 0, "since_zero": -HUGE - 1, "zero_by": "host"},
            {"since_zero": -HUGE - 1, "zero_by": "somebody\x1b[31m"},
            {"configured": True, "since_zero": None},
        )
    ):
        guest.close()
        own = {"boot": f"boot {number}", "wall": 5, "boottime": 1, "since_zero": None, "zero_by": None}
        guest.hello = {**guest.hello, **own, **hello}
        guest.open()
        for first, started in ((1, 0), (100, HUGE)):
            begin(guest, number + first, vmr=b"-4/%d" % (number + first), started=started)
            guest.say(output(b"timeless\n", 0, number + first, marks=((9, HUGE),)))
        guest.say(messages.Heartbeat(wall=HUGE, boottime=HUGE, since_zero=-HUGE, zero_by="host"))
        guest.hear(lambda: guest.acks((number + 100).to_bytes(16, "big"))[-1].stdout == 9, "all is acked")


@evil
def a_frame_without_end(guest: Guest) -> None:
    guest.open()
    begin(guest)
    whole = guest.session.frame(output(b"x" * 32_000))
    guest.send(whole[:-1])
    for _ in range(30):
        guest.send(framing.HEADER.pack(0xC9, 32_000, b"VMR1", 7))
        time.sleep(0.01)


@evil
def a_flood_of_tiny_frames(guest: Guest) -> None:
    guest.open()
    begin(guest)
    for at in range(0, 50_000, 500):
        guest.say(*(output(b"x", at + more) for more in range(500)))
        guest.hear(lambda: True)
    guest.hear(lambda: guest.acks(FIRST)[-1].stdout == 50_000, "all of it is acked")


@evil
def a_flood_of_hellos(guest: Guest) -> None:
    guest.open()
    for _ in range(100):
        hellos = [
            framing.encode(
                messages.pack(
                    messages.Hello(
                        id=os.urandom(8), peer=guest.session.peer, role="guest", protocol=1, version="1", wall=1,
                        spool=b"s" * 16,
                    )
                )
            )
            for _ in range(500)
        ]  # fmt: skip
        guest.send(b"".join(hellos))
        guest.events.clear()


@evil
def hellos_of_another_life_each(guest: Guest) -> None:
    guest.open()
    for number in range(30):
        guest.hello = {**guest.hello, "spool": os.urandom(16)}
        guest.events += guest.session.renew(time.monotonic(), "by the test")
        guest.hear(lambda: guest.session.open, f"life {number}", limit=3.0)


@evil
def a_host_that_is_not_listened_to(guest: Guest) -> None:
    """It says Hello for ever and reads nothing: what is answered must not pile up."""
    guest.connect()
    hello = framing.encode(
        messages.pack(messages.Hello(id=b"i" * 8, peer=None, role="guest", protocol=1, version="1", wall=1))
    )
    for _ in range(200):
        guest.send(hello * 1_000)


@evil
def a_handshake_that_never_ends(guest: Guest) -> None:
    guest.connect()
    guest.send(b"\xc9")
    time.sleep(0.2)
    for peer in (None, b"x" * 8, None):
        hello = messages.Hello(id=b"i" * 8, peer=peer, role="guest", protocol=99, version="9" * 4000, wall=1)
        guest.send(framing.encode(messages.pack(hello)))
    own = messages.Hello(id=b"i" * 8, peer=None, role="host", protocol=1, version="", wall=1)
    guest.send(framing.encode(messages.pack(own)) * 50)


@evil
def garbage_that_looks_like_frames(guest: Guest) -> None:
    """A header each 13 bytes, of a frame of 32 KiB each: checking them all is the most work a byte can make."""
    guest.connect()
    header = framing.HEADER.pack(0xC9, 32_000, b"VMR1", 7)
    for _ in range(8):
        guest.send(header * (MIB // len(header)))


@evil
def a_hundred_thousand_rows(guest: Guest) -> None:
    guest.open()
    filler = "r" * 3_000
    for number in range(0, 110_000, 100):
        guest.say(
            *(
                messages.Vmr(vmr=b"-4/%d" % (number + more), state="exited", attempt=1, reason=filler)
                for more in range(100)
            )
        )
    guest.say(messages.Vmr(vmr=None, state="", attempt=0, reason=""))


@evil
def a_row_that_changes_for_ever(guest: Guest) -> None:
    guest.open()
    guest.say(messages.Vmr(vmr=None, state="", attempt=0, reason=""))
    for number in range(20_000):
        guest.say(messages.Vmr(b"-4/a.sh", "exited", number, "r" * 400, changed=True))


@evil
def runs_without_end(guest: Guest) -> None:
    guest.open()
    for number in range(10_500):
        guest.say(run(number + 1, vmr=b"-4/r%d" % number, script=b"/" * 4_096))
        if number % 50 == 0:
            guest.hear(lambda: True)
            guest.events.clear()


@evil
def answers_nobody_asked_for(guest: Guest) -> None:
    guest.open()
    for number in range(2_000):
        guest.say(
            messages.Reply(
                number.to_bytes(16, "big"), True, "\x1b[31m", {"run": b"\xff", "data": "x" * 9_000}
            )
        )
        health = {f"{key}{'k' * 50}": b"\xff" * 50 for key in range(256)}
        guest.say(messages.Heartbeat(wall=1, health=health))
        guest.hear(lambda: True)


@evil
def any_message_with_anything_in_it(guest: Guest) -> None:
    """By the thousand, well-formed and not; seeded, so that what fails fails again."""
    rng = random.Random(20_240_606)
    integers = [0, 1, 2, 3, 4, 1281, 65_536, 2**31, 2**32, 2**62, HUGE, -1, -(2**63)]
    texts = [
        "",
        "code",
        "lost",
        "signal",
        "errno",
        "running",
        "gone",
        "\x1b[31m",
        "\n",
        "é" * 40,
        "x" * 4_096,
    ]
    blobs = [
        b"",
        b"r" * 16,
        FIRST,
        (2).to_bytes(16, "big"),
        b"-4/a.sh",
        b"-4/b.sh",
        b"\xff" * 300,
        b"x\n" * 900,
    ]
    shapes: list[Any] = [None, True, {}, {"a": 1}, [], [[1, 5]], [[0, 0], [0, 0]], [[7, HUGE]], 1.5, [[]]]
    kinds = {
        "uint": integers, "int": integers, "bool": [True, False], "text": texts, "bin": blobs, "name": blobs,
        "bin8": [b"12345678"], "bin16": [FIRST, (2).to_bytes(16, "big"), b"r" * 16],
        "map": [{}, {"a": 1, "b": b"\xff"}], "marks": [[], [[1, 5]], [[1800, 7]]], "tails": [[[0, 0], [0, 0]]],
    }  # fmt: skip
    everything = [*integers, *texts, *blobs, *shapes]
    names = [name for name in messages.TYPES if name != "hello"]
    for _ in range(300):
        try:
            guest.open(5.0)
            for _ in range(40):
                name = rng.choice(names)
                fields: dict[str, Any] = {
                    key: rng.choice(kinds.get(kind, everything) if rng.random() < 0.97 else everything)
                    for key, kind, _, _ in messages.FIELDS[messages.TYPES[name]]
                }
                try:
                    frame = any_frame(guest, type=name, **fields)
                except (ValueError, OverflowError):
                    continue
                guest.send(frame)
            guest.hear(lambda: True)
        except (OSError, AssertionError):
            pass
        guest.close()
        guest.events.clear()
        if time.monotonic() > guest.hello["until"]:
            return


@evil
def numbers_no_message_can_hold(guest: Guest) -> None:
    for number in (2**63, 2**64 - 1, -1, 1e300, True):
        guest.open()
        begin(guest, started=5)
        fields = {"run": FIRST, "stream": 1, "offset": number, "more": False, "marks": [[1, 5]], "data": b"x"}
        guest.send(any_frame(guest, type="output", **fields))
        guest.send(any_frame(guest, type="gap", run=FIRST, stream=1, offset=0, length=number, reason=""))
        attempt = {"run": b"r" * 16, "vmr": b"-4/b", "attempt": number, "trigger": "", "request": b""}
        guest.send(any_frame(guest, type="run", **attempt, script=b"/", boot="", pid=number, started=number))
        time.sleep(0.05)
        guest.close()
    each_alone(guest, [[run(3, vmr=b"-4/c", attempt=HUGE, pid=HUGE), exited(4), closed(3)]])


@evil
def the_largest_frames_without_end(guest: Guest) -> None:
    guest.open()
    begin(guest)
    data, at, deadline = os.urandom(32_000), 0, time.monotonic() + 2.0
    while time.monotonic() < deadline:
        guest.say(*(output(data, at + number * len(data)) for number in range(30)))
        at += 30 * len(data)
        guest.hear(lambda: True)
        guest.events.clear()


@evil
def tiny_frames_as_fast_as_they_are_taken(guest: Guest) -> None:
    guest.open()
    frames = [guest.session.frame(messages.Heartbeat(wall=1)) for _ in range(100_000)]
    began = time.monotonic()
    for at in range(0, len(frames), 2_000):
        guest.send(b"".join(frames[at : at + 2_000]))
    guest.hello["rate"] = len(frames) / (time.monotonic() - began)


@evil
def claims_to_be_another_vm(guest: Guest) -> None:
    guest.hello = {**guest.hello, "hostname": b"good", "machine": "good", "spool": b"good".ljust(16)}
    each_alone(guest, [[run(3, vmr=b"-4/good"), output(b"forged\n", 0, 3)], [run(4, vmr=b"good/stdout")]])
    guest.open()
    begin(guest, 2, vmr=b"-4/good.log")
    guest.say(output(b"forged\n", 0, 2))
    guest.hear(lambda: guest.acks((2).to_bytes(16, "big"))[-1].stdout == 7)


FAKE = "[2024-06-06 00:43:06 GMT INFO] b'forged'"


@evil
def words_that_forge_lines(guest: Guest) -> None:
    ugly = f"\r\n{FAKE}\n\x1b[2J\x1b]0;owned\x07\u202e\u2028"
    guest.hello = {
        **guest.hello, "version": ugly, "hostname": ugly.encode(), "boot": ugly, "machine": ugly,
    }  # fmt: skip
    guest.open()
    vmr = b"-4/" + ugly.encode().replace(b"/", b"")
    begin(guest, 1, vmr=vmr, script=ugly.encode(), trigger=ugly, boot=ugly)
    data = ugly.encode() + b"\n"
    guest.say(output(data), messages.Gap(FIRST, 1, len(data), 5, ugly))
    guest.say(exited(ending=Ending.ERRNO.value, text=ugly, stdout=len(data) + 5))
    guest.say(closed(stdout=len(data) + 5, reason=ugly))
    guest.hear(lambda: guest.acks(FIRST)[-1].state == RunState.CLOSED)
    guest.say(messages.Vmr(vmr=vmr, state=ugly, attempt=1, reason=ugly))
    guest.say(run(9, vmr=vmr, attempt=1), run(10, vmr=ugly.encode()))
    guest.hear(lambda: guest.heard(messages.Request) or guest.gone)


CAUGHT = {
    *(odd_names, runs_that_never_began, offsets_beyond_all_bounds, marks_that_lie, streams_there_are_not),
    *(ends_there_are_not, hellos_of_another_life_each, a_hundred_thousand_rows, runs_without_end),
    *(output_that_overlaps_and_contradicts, garbage_that_looks_like_frames, words_that_forge_lines),
}
"""What each of these is caught at is said."""


@pytest.fixture(scope="module")
def liars_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """One collector for all liars, each with a VM of its own, and one VM that is good."""
    made = Host(tmp_path_factory.mktemp("liars"), vms=("good", *(act.__name__ for act in EVIL)))
    made.start()
    yield made
    made.stop()


@pytest.mark.parametrize("act", EVIL, ids=lambda act: act.__name__)
def test_a_guest_that_lies_hurts_nobody_but_itself(
    liars_host: Host, act: Evil, capsys: pytest.CaptureFixture[str]
) -> None:
    host, vm = liars_host, act.__name__
    good = Guest(host.socket("good"), spool=vm.encode().ljust(16)[:16])
    liar = Guest(host.socket(vm))
    liar.hello["until"] = time.monotonic() + 6.0  # type: ignore[assignment]
    liar.hello["rate"] = 0.0
    liar._introduce = _introducing(liar)  # type: ignore[method-assign]
    failed: list[BaseException] = []

    def lie() -> None:
        try:
            act(liar)
        except (OSError, LocalError):
            pass  # it was thrown out, and hears of it from the socket or from its session, whichever comes first
        except BaseException as error:
            failed.append(error)

    good.open()
    begin(good)
    before = host.most_memory()
    said = len(host.said())
    thread = threading.Thread(target=lie)
    thread.start()
    worst = at = lines = 0
    began = time.monotonic()
    while thread.is_alive() or lines < 5:
        assert host.alive(), host.said()[-3000:]
        assert time.monotonic() < began + 60
        sent = time.monotonic()
        good.say(output(b"still here %04d\n" % lines, at))
        at, lines = at + 16, lines + 1
        until(lambda: len(host.raw("good", PATH)) >= at, "the good VM's line")
        worst = max(worst, time.monotonic() - sent)  # type: ignore[assignment]
        good.hear(lambda: True)
        time.sleep(0.02)
    thread.join()
    liar.close()
    good.hear(lambda: good.acks(FIRST)[-1].stdout == at, "the good VM's lines are acknowledged")
    starts = good.heard(messages.Start)
    good.close()
    memory, rendering = host.most_memory(), renderers_memory(host)
    rate = f", {liar.hello['rate']:,.0f} frames/s" if liar.hello["rate"] else ""
    with capsys.disabled():
        print(
            f"\n    {vm}: another VM's line took {1000 * worst:.0f} ms at the most of {lines};"
            f" {memory / MIB:.0f} MiB, {(memory - before) / MIB:+.0f}; renderer {rendering / MIB:.0f} MiB{rate}"
        )
    assert failed == []
    assert host.alive()
    new = host.said()[said:]
    assert "Traceback" not in new and "\x1b" not in new, new[-3000:]
    assert len(new) < 100_000, "its log can't be flooded"
    # The renderer notes each second what 10,000 open runs say of themselves, 16 MiB at the most.
    assert memory < 160 * MIB and rendering < 256 * MIB
    if act in CAUGHT:
        evidence = [line for line in new.splitlines() if line.startswith(f"{vm}: ")]
        words = ("sends what can't be", "was set back in time", "says no Hello", "session over")
        assert any(word in line for line in evidence for word in words), new
    assert all(abs(start.delay) <= 10**18 for start in starts), "no VM can set nonsense for all"
    # Nothing outside its own directory, and nothing in the logs that it could forge.
    mine = tuple(f"{prefix}{name}{dot}" for name in host.vms for prefix, dot in ((".", "."), ("", ".")))
    for entry in host.logs.iterdir():
        name = entry.name
        assert name in host.vms or name.startswith(mine) or name.split("~")[0] in host.vms, name
    assert sorted(path.name for path in host.path.iterdir()) == ["collector.log", "logs"]
    for kind in ("log", "json"):
        text = host.log(vm, kind)
        assert "\x1b" not in text and not any(line.startswith(FAKE) for line in text.splitlines())
    assert FAKE not in new.splitlines()


def renderers_memory(host: Host) -> int:
    """Bytes resident at the most, so far, of the renderer."""
    most = 0
    for pid in Path(f"/proc/{host.pid}/task/{host.pid}/children").read_text().split():
        status = Path(f"/proc/{pid}/status").read_text()
        most += sum(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:"))
    return most


@pytest.mark.long
def test_a_million_vmrs_take_bounded_memory_and_few_files(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    """A million rows in the table, then runs without end; each time it is refused it begins anew."""
    evil, good = Guest(host.socket("evil")), Guest(host.socket("good")).open()
    begin(good)
    at = 0
    worst = 0.0
    for number in range(0, 1_040_000, 500):
        said: list[messages.Message] = []
        for each in range(number, number + 500):
            name = b"-4/%d" % each
            row = each < 1_000_000
            said.append(messages.Vmr(name, "waiting", 0, "r" * 200) if row else run(each + 1, vmr=name))
        try:
            evil.open(5.0)
            evil.say(*said)
            evil.hear(lambda: True)
        except (OSError, AssertionError):
            evil.close()
        evil.events.clear()
        good.hear(lambda: True)
        if number % 10_000 == 0:
            began = time.monotonic()
            good.say(output(b"still here\n", at))
            at += 11
            until(lambda: len(host.raw("good", PATH)) == at, "the other VM's line")
            worst = max(worst, time.monotonic() - began)
            good.hear(lambda: True)
    files = sum(len(names) for _, _, names in os.walk(host.logs / "evil"))
    memory, rendering = host.most_memory(), renderers_memory(host)
    with capsys.disabled():
        print(
            f"\n    a million VMRs: {memory / MIB:.0f} MiB, renderer {rendering / MIB:.0f} MiB, {files:,} files,"
            f" another VM's line {1000 * worst:.0f} ms at the most"
        )
    assert memory < 200 * MIB and rendering < 256 * MIB
    assert files < 4 * 12_000, "the runs that were let in, no row"
    evil.close()
    good.close()


def _introducing(guest: Guest) -> Callable[..., messages.Hello]:
    real = Guest._introduce

    def introduce(own: bytes, peer: Any) -> messages.Hello:
        kept = guest.hello
        guest.hello = {key: value for key, value in kept.items() if key not in ("until", "rate")}
        try:
            return real(guest, own, peer)
        finally:
            guest.hello = kept

    guest.session._introduce = introduce
    return introduce


def test_outputs_that_come_together_are_journaled_together(host: Host, guest: Guest) -> None:
    """Of one stream, where each begins at the last one's end; a second of the logs' clock is still a record's most."""
    begin(guest)
    at = guest.hello["wall"] // 10**9 * 10**9 + 10**9
    said = [(1, 0, b"a\n", at), (1, 2, b"b\n", at + 1), (1, 4, b"c\n", at + 5 * 10**9), (2, 0, b"d\n", at)]
    guest.say(
        *(output(data, offset, stream=stream, marks=((2, wall),)) for stream, offset, data, wall in said),
        output(b"b\nc\ne", 2, marks=((5, at),)),  # again, and more
    )
    until(lambda: host.raw("good", PATH) == b"a\nb\nc\ne", "all of it")
    guest.hear(lambda: any(ack.stdout == 7 and ack.stderr == 2 for ack in guest.acks(FIRST)), "its Ack")
    data = (host.logs / "good" / JOURNAL).read_bytes()
    outputs = [OUTPUT.unpack(content) for _, kind, content in records(data) if kind == Kind.OUTPUT]
    assert [(stream, offset, length) for _, stream, offset, length, _, _ in outputs] == [
        *((1, 0, 4), (1, 4, 2), (2, 0, 2), (1, 6, 1)),
    ]


def test_sockets_of_many_vms_are_read_with_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets all its bytes and its end, also one taken out meanwhile, put in twice, or whose number another has."""
    monkeypatch.setattr(chardev, "MANY", 2)
    monkeypatch.setattr(chardev, "SOCKETS", 3)
    got: dict[int, bytes] = {}
    reused: list[bool] = []

    async def read() -> None:
        poll = Poll()
        pairs = [socket.socketpair() for _ in range(8)]

        def reader(number: int) -> Callable[[], bool]:
            def take() -> bool:
                try:
                    data = pairs[number][1].recv(100)
                except BlockingIOError:  # it has the number of one that was ready
                    return False
                got[number] = got.get(number, b"") + data
                if not data:
                    poll.remove(pairs[number][1])
                    pairs[number][1].close()
                    got[number] += b"."
                if number == 0 and data == b"0":
                    # Two that are ready in the same turn are taken out; another gets the number of one of them.
                    poll.remove(pairs[1][1])
                    poll.remove(pairs[1][1])
                    poll.remove(pairs[2][1])
                    fd = pairs[2][1].fileno()
                    for each in pairs[2]:
                        each.close()
                    pairs[2] = socket.socketpair()[::-1]
                    if pairs[2][0].fileno() == fd:
                        pairs[2] = pairs[2][::-1]
                    reused.append(pairs[2][1].fileno() == fd)
                    pairs[2][1].setblocking(False)
                    poll.add(pairs[2][1], reader(2))
                    pairs[2][0].send(b"2")
                return len(data) == 100

            return take

        for number, (_, ours) in enumerate(pairs):
            ours.setblocking(False)
            poll.add(ours, reader(number))
            poll.add(ours, reader(number))
        for number, (theirs, _) in enumerate(pairs):
            theirs.send(b"%d" % number)
        while len(got) < 7:
            await asyncio.sleep(0.001)
        assert 1 not in got
        poll.add(pairs[1][1], reader(1))
        for theirs, _ in pairs:
            theirs.send(b"x" * 300)
            theirs.close()
        while not all(got.get(number, b"").endswith(b".") for number in range(8)):
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(read(), 20))
    assert got == {number: b"%d" % number + b"x" * 300 + b"." for number in range(8)} and reused == [True]


def test_one_vm_that_says_what_takes_long_leaves_the_others_their_turn(host: Host, guest: Guest) -> None:
    liar = Guest(host.socket("evil")).open()
    begin(liar)
    begin(guest)
    gaps = [messages.Gap(FIRST, 1, at, 1, "") for at in range(600)]
    for some in (gaps[:300], gaps[300:]):  # each is listed in the row that the next writes anew
        done = len(host.raw("evil", PATH))
        liar.say(*some)
    until(lambda: len(host.raw("evil", PATH)) > done, "it is at the second half")
    guest.say(output(b"still here\n"))
    until(lambda: host.raw("good", PATH), "the good VM's line")
    assert len(host.raw("evil", PATH)) < len(gaps)
    until(lambda: len(host.raw("evil", PATH)) == len(gaps), "all of it", 120.0)
    liar.close()


@pytest.mark.parametrize("verb", ["rerun", "kill"])
@pytest.mark.parametrize(
    "result",
    [{}, {"attempt": "\x1b[31m"}, {"attempt": "../../good/-4/a.sh/1"}, {"attempt": True}, {"attempt": 0}],
)
def test_what_a_guest_answers_leads_nowhere(
    host: Host, guest: Guest, verb: str, result: dict[str, messages.Scalar]
) -> None:
    begin(guest)
    told: list[str] = []

    def ask() -> None:
        with control.Connection(host.sockets / "control", program="collector", hint="") as asked:
            with pytest.raises(Problem) as problem:
                asked.ask(verb, vm="good", vmr="-4/a.sh")
            told.append(str(problem.value))

    asking = threading.Thread(target=ask)
    asking.start()
    request = guest.hear(lambda: guest.heard(messages.Request), "what it is asked")[0]
    # With a key that would pass for something said unasked.
    guest.say(messages.Reply(request.request, True, "", {**result, "event": "output"}))
    asking.join(20.0)
    assert told == [f"cannot {verb} -4/a.sh: good names no attempt"]


def test_who_asks_and_says_no_more_gets_the_answer_all_the_same(host: Host, guest: Guest) -> None:
    """As `echo … | socat - UNIX-CONNECT:…` does."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(os.fspath(host.sockets / "control"))
        asking.sendall(b'{"verb": "hold", "vm": "good"}\n')
        asking.shutdown(socket.SHUT_WR)
        request = guest.hear(lambda: guest.heard(messages.Request), "what it is asked")[0]
        guest.say(messages.Reply(request.request, True, "", {}))
        asking.settimeout(20.0)
        assert json.loads(asking.makefile().read()) == {"ok": True, "done": 1, "failed": {}}


# --- the experiment's start


def start(host: Host, **args: Any) -> None:
    with control.Connection(host.sockets / "control", program="collector", hint="") as collector:
        collector.ask("start", **args)


def told(guest: Guest) -> float:
    """Seconds to time zero, as it is told."""
    before = len(guest.heard(messages.Start))
    guest.say(messages.Heartbeat(wall=5, configured=True))
    guest.hear(lambda: len(guest.heard(messages.Start)) > before, "when it starts")
    return float(guest.heard(messages.Start)[-1].delay) / 1e9


def told_nothing(guest: Guest) -> None:
    guest.say(messages.Heartbeat(wall=5, configured=True), run(77, vmr=b"-4/told", started=5))
    guest.hear(lambda: guest.acks((77).to_bytes(16, "big")), "an answer")
    assert guest.heard(messages.Start) == []


def test_no_vm_sets_time_zero_for_another(host: Host) -> None:
    good = Guest(host.socket("good")).open()
    for since in (0, 5 * 10**9, -(10**12), HUGE, -HUGE - 1):
        liar = Guest(host.socket("evil"), since_zero=since, zero_by="host", configured=True).open()
        liar.say(messages.Heartbeat(wall=5, since_zero=since, zero_by="host"))
        told_nothing(good)
        liar.close()
    good.close()
    assert "Traceback" not in host.said()


def test_a_start_that_could_not_be_kept_is_none(host: Host) -> None:
    good = Guest(host.socket("good")).open()
    in_the_way = host.logs / ".start.tmp"
    in_the_way.mkdir()
    with pytest.raises(Problem, match=r"cannot start: .*Is a directory"):
        start(host, delay=1_000)
    told_nothing(good)
    time.sleep(1.5)  # what is noted is written each second
    in_the_way.rmdir()
    time.sleep(1.5)
    told_nothing(good)
    start(host, delay=1_000)
    assert 900 < told(good) <= 1_000
    good.close()


def test_a_start_that_came_to_the_disk_and_is_not_durable_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its name when the sync of that name fails: the next collector must not believe it."""
    spools = {"vm": b"s" * 16, "later": None}
    starts = Starts(tmp_path)

    def failing(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing)
        with pytest.raises(OSError):
            starts.keep(spools, Moment("boot", 5, 5))
    assert starts.of("vm", b"s" * 16) is None and starts.changed
    assert Starts(tmp_path).of("vm", b"s" * 16) is not None, "else this shows nothing"
    starts.write()  # as each second
    assert Starts(tmp_path).of("vm", b"s" * 16) is None
    zero = Moment("boot", 6, 6)
    starts.keep(spools, zero)
    kept = Starts(tmp_path).of("vm", b"s" * 16)
    assert kept is not None and (kept.everybody, kept.zero) == (True, zero)


def test_a_collector_that_is_started_again_keeps_the_start_by_itself(host: Host) -> None:
    good = Guest(host.socket("good")).open()
    start(host, delay=1_000)
    assert 900 < told(good) <= 1_000
    good.close()
    host.kill()
    host.start()
    late = Guest(host.socket("evil"), spool=b"l" * 16, since_zero=-7, zero_by="host").open()
    late.hello = {**late.hello, "since_zero": None, "zero_by": None}
    told_nothing(late)
    good = Guest(host.socket("good")).open()
    assert 800 < told(good) <= 1_000
    assert 800 < told(late) <= 1_000, "the same experiment, as the other shows: it is told too"
    late.close()
    good.close()
    time.sleep(1.5)  # until it is noted that the late one was told
    host.kill()
    host.start()
    late = Guest(host.socket("evil"), spool=b"l" * 16).open()
    assert 700 < told(late) <= 1_000
    late.close()


def test_the_next_experiment_in_the_same_directory_has_a_start_of_its_own(host: Host) -> None:
    good = Guest(host.socket("good")).open()
    start(host, delay=1_000)
    told(good)
    good.close()
    host.kill()
    host.start()
    good = Guest(host.socket("good"), spool=b"n" * 16).open()
    told_nothing(good)
    start(host, delay=50)
    assert told(good) <= 50
    good.close()


def test_what_one_vm_was_started_with_is_its_own_also_later(host: Host) -> None:
    good, other = Guest(host.socket("good")).open(), Guest(host.socket("evil"), spool=b"o" * 16).open()
    start(host, vm="good", delay=1_000)
    assert 900 < told(good) <= 1_000
    told_nothing(other)
    good.close()
    other.close()
    time.sleep(1.5)  # until it is noted
    host.kill()
    host.start()
    good, other = Guest(host.socket("good")).open(), Guest(host.socket("evil"), spool=b"o" * 16).open()
    assert 700 < told(good) <= 1_000
    told_nothing(other)
    good.close()
    other.close()


@pytest.mark.parametrize("damage", [b"", b"[" * 99_999, b'{"vm": 5}', b'{"vm": ["", true, [1, 2]]}', b"\xff"])
def test_a_start_that_is_damaged_is_none(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / ".start").write_bytes(damage)
    starts = Starts(tmp_path)
    assert starts.of("vm", b"") is None
    starts.note("vm", b"s", everybody=True, zero=Moment("boot", 1, 2))
    starts.write()
    found = Starts(tmp_path).of("vm", b"s")
    assert found is not None and found.zero.seconds_since(Moment("boot", 1, 10**18)) == 0


# --- files on their way


def test_two_who_push_do_not_end_the_session_of_a_guest_that_is_slow(host: Host, guest: Guest) -> None:
    """Each asks for what may lie unread at most; together they ask for more, and would again in the next session."""
    piece, windows, clients = 31 * 1024, 24, []
    try:
        for client in range(3):
            asking = control.Connection(host.sockets / "control", program="collector", hint="")
            clients.append(asking)
            for number in range(windows):
                id = bytes((client, number)).hex() * 8
                args = {"path": "/x", "offset": number * piece}
                asking.say(
                    {"verb": "files", "vm": "good", "id": id, "ask": "write", "args": args}, bytes(piece)
                )
        time.sleep(0.5)  # the guest does something else
        guest.hear(lambda: len(guest.heard(messages.Request)) == windows * len(clients), "all that was asked")
        assert guest.heard(Ended) == []
        asked = [request.request[:2] for request in guest.heard(messages.Request)]
        for client in range(len(clients)):
            assert [each[1] for each in asked if each[0] == client] == list(range(windows))
        guest.say(*(messages.Reply(each.request, True, "", {}) for each in guest.heard(messages.Request)))
        for asking in clients:
            assert all(asking.hear()[0]["ok"] for _ in range(windows))
    finally:
        for asking in clients:
            asking.close()
    assert "session over" not in host.said()


# --- no descriptor left


def test_without_descriptors_it_waits_and_then_goes_on(host: Host) -> None:
    """The listener stays readable: a collector that looked again at once would do nothing else."""
    good = Guest(host.socket("good")).open()
    begin(good)
    limits = resource.prlimit(host.pid, resource.RLIMIT_NOFILE)
    free = 1_000  # the lowest that is, while no sync is under way
    for _ in range(20):
        there = set(map(int, os.listdir(f"/proc/{host.pid}/fd")))
        free = min(free, *(set(range(1_000)) - there))
        time.sleep(0.05)
    resource.prlimit(host.pid, resource.RLIMIT_NOFILE, (free, limits[1]))
    waiting = Guest(host.socket("evil")).connect()
    before, began = cpu(host), time.process_time()
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline:
        pass  # as one that looks again at once does: it gets as much of the machine
    used, spent = cpu(host) - before, time.process_time() - began
    resource.prlimit(host.pid, resource.RLIMIT_NOFILE, limits)
    waiting.session.connect(time.monotonic())
    waiting.hear(lambda: waiting.session.open, "it is served")
    waiting.close()
    good.close()
    assert used < spent / 4


def test_without_descriptors_a_vm_is_connected_to_later(tmp_path: Path) -> None:
    heard: list[bytes] = []

    async def connect() -> str:
        over = asyncio.Event()

        def received(data: bytes) -> None:
            heard.append(data)
            over.set()

        with socket.socket(socket.AF_UNIX) as listener, tempfile.TemporaryDirectory(prefix="vmr-") as short:
            listener.bind(f"{short}/vm")
            listener.listen()
            chardev = Chardev(
                Path(short, "vm"),
                poll=Poll(),
                listen=False,
                opened=lambda: None,
                received=received,
                closed=lambda _: None,
                roomy=lambda: None,
            )
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
            try:
                chardev.start()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            reason = chardev.reason
            loop = asyncio.get_running_loop()
            listener.setblocking(False)
            accepted, _ = await asyncio.wait_for(loop.sock_accept(listener), 20)
            accepted.send(b"here")
            await asyncio.wait_for(over.wait(), 20)
            accepted.close()
            chardev.close()
            return reason

    assert asyncio.run(connect()) == os.strerror(errno.EMFILE)
    assert heard == [b"here"]


def cpu(host: Host) -> float:
    """Seconds."""
    fields = Path(f"/proc/{host.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_liar_in_listen_mode_is_heard_once_a_second(host: Host) -> None:
    """It connects again at once; each time costs a line in the collector's log and the reading of a journal."""
    liar = Guest(host.socket("evil"))
    deadline = time.monotonic() + 3.0
    while time.monotonic() < deadline:
        try:
            liar.open(1.0)
            liar.say(output(b"never began"))
            liar.hear(lambda: False, limit=0.2)
        except (OSError, AssertionError):
            pass
        liar.close()
    assert 2 <= host.said().count("beginning anew") <= 5


def test_while_no_renderer_can_be_started_all_else_goes_on(tmp_path: Path) -> None:
    """As with no memory for another process: it is said once, and what came is shown when there is one."""
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    modules = os.pathsep.join([str(AGENT), *filter(None, sys.path)])  # a link is no venv
    host = Host(tmp_path, vms=("good",), python=str(python), environment={"PYTHONPATH": modules})
    host.start()
    try:
        guest = Guest(host.socket("good")).open()
        begin(guest)
        (renderer,) = map(int, Path(f"/proc/{host.pid}/task/{host.pid}/children").read_text().split())
        python.unlink()
        os.kill(renderer, signal.SIGKILL)
        until(lambda: "cannot start a renderer: " in host.said(), "it is said")
        guest.say(output(b"meanwhile\n"))
        guest.hear(lambda: guest.acks(FIRST)[-1].stdout == 10, "what comes is stored all the same")
        time.sleep(1.5)  # as long as to try again takes
        python.symlink_to(sys.executable)
        until(lambda: "meanwhile" in host.log("good"), "it is shown")
        assert host.said().count("cannot start a renderer") == host.said().count("the renderer ended") == 1
        guest.close()
    finally:
        host.stop()


def test_a_collector_ends_well_without_its_renderer(tmp_path: Path) -> None:
    host = Host(tmp_path, vms=("good",), python=str(tmp_path / "python"))
    host.environment["PYTHONPATH"] = os.pathsep.join([str(AGENT), *filter(None, sys.path)])
    (tmp_path / "python").symlink_to(sys.executable)
    host.start()
    try:
        (tmp_path / "python").unlink()
        (renderer,) = map(int, Path(f"/proc/{host.pid}/task/{host.pid}/children").read_text().split())
        os.kill(renderer, signal.SIGKILL)
        until(lambda: "cannot start a renderer: " in host.said(), "it is said")
        assert host.process is not None
        host.process.terminate()
        assert host.process.wait(20) == 0 and "Traceback" not in host.said()
    finally:
        host.stop()


# --- what lies in the log directory's way ---


@pytest.mark.parametrize(
    "name", ["good", "good.log", "good.json", ".good.rendered", ".good.lock", ".good.new", ".start"]
)
def test_a_link_in_the_log_directory_itself_leads_nowhere(tmp_path: Path, name: str) -> None:
    """A VM's logs stay unwritten rather than written elsewhere; and the others' are written."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    (tmp_path / "logs").mkdir()
    where = outside if name in ("good", ".good.new") else outside / "precious"
    (tmp_path / "logs" / name).symlink_to(where)
    host = Host(tmp_path)
    try:
        host.start()
        guest = Guest(host.socket("good")) if host.alive() else None
        if guest is not None:
            with suppress(OSError, AssertionError):
                guest.open(2.0)
                guest.say(run(), output(b"overwritten\n"))
                guest.hear(lambda: guest.acks(FIRST), limit=1.0)
            other = Guest(host.socket("evil"), spool=b"o" * 16).open()
            begin(other)
            other.say(output(b"fine\n"))
            until(lambda: "fine" in host.log("evil"), "the other VM's log")
            other.close()
            guest.close()
        else:
            assert "cannot" in host.said() and "Traceback" not in host.said()
        assert (outside / "precious").read_text() == "precious"
        assert [path.name for path in outside.iterdir()] == ["precious"]
        (tmp_path / "logs" / name).unlink()  # or the end waits for it, long
    finally:
        host.stop()


def test_links_in_the_way_lead_nowhere(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    host = Host(tmp_path, vms=("good",))
    host.start()
    try:
        guest = Guest(host.socket("good")).open()
        begin(guest)
        for name in ("-5", "-6"):
            os.symlink(outside, host.logs / "good" / name)
        (host.logs / "good" / "-7").mkdir()
        os.symlink(outside, host.logs / "good" / "-7" / "a.sh")
        (host.logs / "good" / "-8" / "a.sh" / "1").mkdir(parents=True)
        os.symlink(outside / "precious", host.logs / "good" / "-8" / "a.sh" / "1" / "stdout")
        for number, vmr in ((5, b"-5/a.sh"), (7, b"-7/a.sh"), (8, b"-8/a.sh")):
            guest.close()
            guest.open()
            try:
                guest.say(run(number, vmr=vmr), output(b"overwritten\n", 0, number))
                guest.hear(lambda: guest.acks(number.to_bytes(16, "big")), limit=0.3)
            except (OSError, AssertionError):
                pass
        assert host.alive()
        assert [path.name for path in outside.iterdir()] == ["precious"]
        assert (outside / "precious").read_text() == "precious"
        assert guest.heard(Opened)
        guest.close()
    finally:
        host.stop()


def test_a_signal_is_heard_however_much_came_from_the_background_meanwhile(tmp_path: Path) -> None:
    """Both wake the loop by the same pipe, and one that is full takes no signal."""

    async def hear() -> list[str]:
        collector = Collector(tmp_path / "logs", [], control_path=tmp_path / "control")
        heard = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, heard.set)
        taken: list[str] = []
        worked = threading.Semaphore(0)
        for _ in range(600):
            collector.in_background(worked.release, lambda _: taken.append("result"))  # type: ignore[arg-type]
        for _ in range(600):  # the loop is busy as long as this takes
            worked.acquire()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(heard.wait(), 20)
        while len(taken) < 600:
            await asyncio.sleep(0.01)
        return taken

    assert asyncio.run(hear()) == ["result"] * 600
