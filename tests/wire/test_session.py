"""The conversation between two real ends, over a pipe that loses, repeats and breaks off."""

from __future__ import annotations

import itertools
from typing import Any, Callable, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmr_agent.wire import framing, messages
from vmr_agent.wire.messages import Start, Vmr
from vmr_agent.wire.session import (
    HALF_FRAME,
    HEARTBEAT,
    SILENCE,
    Ended,
    Event,
    LocalError,
    Opened,
    Role,
    Session,
    State,
)


class End:
    """A session and what it has heard; its frames wait in ``out`` for the test to carry them."""

    def __init__(self, role: Role) -> None:
        ids = itertools.count(1)
        self.role = role
        self.events: list[Event] = []
        self.out: list[bytes] = []
        self.session = Session(
            role,
            introduce=self._introduce,
            beat=lambda: messages.Heartbeat(wall=7),
            make_id=lambda: role.value[:1].encode() + next(ids).to_bytes(7, "big"),
        )

    def _introduce(self, own: bytes, peer: Optional[bytes]) -> messages.Hello:
        return messages.Hello(id=own, peer=peer, role=self.role.value, protocol=1, version="test", wall=5)

    def do(self, act: Callable[[Session], Any]) -> None:
        found = act(self.session)
        if isinstance(found, list):
            self.events += found
        elif isinstance(found, bytes):
            self.out.append(found)
        self.out += self.session.take()

    def send(self, message: messages.Message) -> None:
        self.do(lambda session: session.frame(message))

    def heard(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def messages(self) -> list[Event]:
        return [event for event in self.events if not isinstance(event, (Opened, Ended))]


def carry(sender: End, receiver: End, now: float = 0.0) -> None:
    frames, sender.out = sender.out, []
    for frame in frames:
        receiver.do(lambda session, data=frame: session.receive(data, now))


def settle(guest: End, host: End, now: float = 0.0) -> None:
    for _ in range(20):
        if not (guest.out or host.out):
            return
        carry(guest, host, now)
        carry(host, guest, now)
    raise AssertionError("the two ends never come to rest")


def pair(now: float = 0.0) -> tuple[End, End]:
    guest, host = End(Role.GUEST), End(Role.HOST)
    guest.do(lambda session: session.connect(now))
    host.do(lambda session: session.connect(now))
    settle(guest, host, now)
    assert guest.session.open and host.session.open
    return guest, host


def row(number: int) -> Vmr:
    return Vmr(vmr=b"-4/x", state="running", attempt=number, reason="")


def test_two_ends_open_one_session_each_and_messages_pass_in_order() -> None:
    guest, host = pair()
    assert len(guest.heard(Opened)) == len(host.heard(Opened)) == 1
    for number in range(5):
        guest.send(row(number))
    host.send(Start(delay=9))
    settle(guest, host)
    assert [event.attempt for event in host.heard(Vmr)] == [0, 1, 2, 3, 4]
    assert guest.heard(Start) == [Start(delay=9)]


def test_the_end_that_opens_first_is_heard_by_the_one_that_opens_later() -> None:
    guest, host = End(Role.GUEST), End(Role.HOST)
    guest.do(lambda session: session.connect(0))
    guest.out.clear()  # nobody was there
    host.do(lambda session: session.connect(1))
    settle(guest, host, 1)
    assert guest.session.open and host.session.open


def test_nothing_can_be_sent_without_a_session() -> None:
    guest = End(Role.GUEST)
    with pytest.raises(LocalError):
        guest.session.frame(row(1))
    guest.do(lambda session: session.connect(0))
    with pytest.raises(LocalError):
        guest.session.frame(row(1))


@pytest.mark.parametrize("cut", ["whole", "bytes"])
def test_a_conversation_fed_one_byte_at_a_time_means_the_same(cut: str) -> None:
    guest, host = pair()
    for number in range(3):
        guest.send(row(number))
    data = b"".join(guest.out)
    guest.out.clear()
    pieces = [data] if cut == "whole" else [data[at : at + 1] for at in range(len(data))]
    for piece in pieces:
        host.do(lambda session, data=piece: session.receive(data, 0))
    assert [event.attempt for event in host.heard(Vmr)] == [0, 1, 2]


def test_a_host_cut_off_at_any_byte_finds_back_and_nothing_is_taken_twice() -> None:
    """QEMU drops what was under way when its client leaves; the next client's bytes follow with no mark."""
    guest, host = pair()
    for number in range(3):
        guest.send(row(number))
    stream = b"".join(guest.out)
    for at in range(len(stream) + 1):
        guest, host = pair()
        for number in range(3):
            guest.send(row(number))
        data, guest.out = b"".join(guest.out), []
        host.do(lambda session, data=data[:at]: session.receive(data, 0))
        heard = [event.attempt for event in host.heard(Vmr)]
        assert heard == list(range(len(heard)))
        host.do(lambda session: session.disconnect("gone"))
        host.out.clear()
        host.do(lambda session: session.connect(1))
        host.do(lambda session, rest=data[at:]: session.receive(rest, 1))  # stale bytes come first
        settle(guest, host, 1)
        assert guest.session.open and host.session.open
        assert len(host.heard(Vmr)) == len(heard), "stale frames are no messages of the new session"
        guest.send(row(7))
        settle(guest, host, 1)
        assert host.heard(Vmr)[-1].attempt == 7


# What is said in the conversation that is cut, from its first Hello on: who says it, and what.
SAID = (
    *(("guest", row(number)) for number in range(3)),
    ("host", messages.Ack(run=b"r" * 16, state=1, stdout=3, stderr=0)),
    ("guest", messages.Output(run=b"r" * 16, stream=1, offset=3, more=False, marks=((4, 1),), data=b"four")),
    ("host", Start(delay=9)),
    # More than a Hello holds: the next one does not fill up what is cut off.
    ("host", messages.Request(request=b"q" * 16, verb="write", args={"data": b"x" * 500})),
    ("guest", messages.Reply(request=b"q" * 16, ok=True, error="", result={"data": b"y" * 500})),
    ("host", messages.Ack(run=b"r" * 16, state=1, stdout=7, stderr=0)),
    ("guest", row(3)),
)


class Line:
    """Carries both directions byte by byte until so many bytes have passed in all; what is over stays in ``left``."""

    def __init__(self, most: int) -> None:
        self.guest, self.host = End(Role.GUEST), End(Role.HOST)
        self.most = most
        self.said = {"guest": b"", "host": b""}
        self.left = {"guest": b"", "host": b""}
        """Of what was said, what was under way when it was cut."""
        self.guest.do(lambda session: session.connect(0))
        self.host.do(lambda session: session.connect(0))
        self._settle()
        for side, message in SAID:
            end = self.guest if side == "guest" else self.host
            if end.session.open and not self.cut:
                end.send(message)
                self._settle()

    @property
    def cut(self) -> bool:
        return self.most <= 0

    def _settle(self) -> None:
        while self.guest.out or self.host.out:
            for sender, receiver in ((self.guest, self.host), (self.host, self.guest)):
                data, sender.out = b"".join(sender.out), []
                passed = data[: max(0, self.most)]
                self.most -= len(data)
                self.said[sender.role.value] += data
                self.left[sender.role.value] += data[len(passed) :]
                if passed:
                    receiver.do(lambda session, data=passed: session.receive(data, 0))


@pytest.mark.parametrize("guest_sees_it", [True, False], ids=["seen", "missed"])
@pytest.mark.parametrize("stale", [True, False], ids=["stale", "dropped"])
def test_the_host_closes_and_returns_at_every_byte_of_a_conversation(
    guest_sees_it: bool, stale: bool
) -> None:
    """Both directions, from the first byte of the first Hello on; the session is back within three heartbeats.

    What was under way is dropped, as QEMU does with the guest's, or stale bytes come first: all of what the host
    said, if the guest opens the port anew and had read none of it. A fast reconnect is one the guest doesn't see.
    """
    whole = Line(1 << 30)
    length = (1 << 30) - whole.most
    assert length > 1000 and len(whole.host.heard(Vmr)) == 4 and len(whole.guest.heard(messages.Ack)) == 2
    worst = 0.0
    for at in range(length + 1):
        line = Line(at)
        guest, host = line.guest, line.host
        heard = {}
        for end, other in ((guest, "host"), (host, "guest")):
            heard[end] = end.messages()
            said = [message for who, message in SAID if who == other]
            assert heard[end] == said[: len(heard[end])], "what is heard is what was said, from the first on"
        host.do(lambda session: session.disconnect("gone"))
        if guest_sees_it:
            guest.do(lambda session: session.disconnect("the host is away"))
        guest.out.clear()
        host.out.clear()
        now = 0.1
        host.do(lambda session: session.connect(now))
        if guest_sees_it:
            guest.do(lambda session: session.connect(now))
        if stale:
            bytes_of = line.said if guest_sees_it else line.left
            for end, data in ((guest, bytes_of["host"]), (host, bytes_of["guest"])):
                end.do(lambda session, data=data: session.receive(data, now))
            if not guest_sees_it:  # to it they are the rest of a conversation that isn't over
                heard[guest] = guest.messages()
                assert (
                    heard[guest] == [message for who, message in SAID if who == "host"][: len(heard[guest])]
                )
        settle(guest, host, now)
        while not (guest.session.open and host.session.open):
            now = max(now + 0.01, min(end.session.next_tick() or 0.0 for end in (guest, host)))
            assert now - 0.1 <= SILENCE, f"cut at byte {at}, no session {now - 0.1:.1f} s later"
            for end in (guest, host):
                end.do(lambda session: session.tick(now))
            settle(guest, host, now)
        worst = max(worst, now - 0.1)
        guest.send(row(99))
        host.send(Start(delay=99))
        settle(guest, host, now)
        assert guest.messages() == [*heard[guest], Start(delay=99)], f"cut at byte {at}"
        assert host.messages() == [*heard[host], row(99)], f"cut at byte {at}"
    print(f"{length + 1} offsets, the session back within {worst:.1f} s")


def test_a_new_host_ends_the_guests_session_and_opens_another() -> None:
    guest, _ = pair()
    new = End(Role.HOST)
    new.do(lambda session: session.connect(1))
    new.session.id = b"another1"
    new.out.clear()
    new.do(lambda session: session.tick(1 + HEARTBEAT))
    settle(guest, new, 6)
    assert [type(event) for event in guest.events] == [Opened, Ended, Opened]


def test_a_repeated_frame_is_dropped_and_counted() -> None:
    guest, host = pair()
    guest.send(row(1))
    guest.out *= 2
    settle(guest, host)
    assert len(host.heard(Vmr)) == 1
    assert host.session.counts["doubled"] == 1 and host.session.open


def test_a_missing_frame_ends_the_session_and_the_next_one_is_whole() -> None:
    guest, host = pair()
    guest.send(row(1))
    guest.out.clear()
    guest.send(row(2))
    settle(guest, host)
    assert host.heard(Vmr) == [] and len(host.heard(Ended)) == 1
    assert guest.heard(Ended) and guest.session.open and host.session.open
    guest.send(row(3))
    settle(guest, host)
    assert [event.attempt for event in host.heard(Vmr)] == [3]


def test_garbage_ends_an_open_session_and_does_no_harm_before() -> None:
    host = End(Role.HOST)
    host.do(lambda session: session.connect(0))
    host.do(lambda session: session.receive(b'{"return": {}}\n', 0))  # a QEMU guest agent at the other end
    assert host.session.state is State.DEAF and host.session.counts["garbage"] == 15
    guest, host = pair()
    host.do(lambda session: session.receive(b"garbage", 0))
    assert len(host.heard(Ended)) == 1
    settle(guest, host)
    assert guest.session.open and host.session.open


def test_an_echo_of_our_own_hello_opens_nothing() -> None:
    guest = End(Role.GUEST)
    guest.do(lambda session: session.connect(0))
    for frame in list(guest.out):
        guest.do(lambda session, data=frame: session.receive(data, 0))
    assert guest.session.state is State.DEAF


def test_silence_ends_the_session_and_heartbeats_prevent_it() -> None:
    guest, host = pair()
    now = 0.0
    while now < 60:
        now += 1
        guest.do(lambda session: session.tick(now))
        host.do(lambda session: session.tick(now))
        settle(guest, host, now)
    assert not guest.heard(Ended) and not host.heard(Ended)
    host.do(lambda session: session.tick(now + SILENCE))
    assert len(host.heard(Ended)) == 1
    settle(guest, host, now + SILENCE)
    assert guest.session.open and host.session.open


def test_a_hello_that_was_lost_is_said_again_at_each_heartbeat() -> None:
    guest, host = End(Role.GUEST), End(Role.HOST)
    guest.do(lambda session: session.connect(0))
    host.do(lambda session: session.connect(0))
    guest.out.clear()
    host.out.clear()
    assert guest.session.next_tick() == HEARTBEAT
    guest.do(lambda session: session.tick(HEARTBEAT))
    settle(guest, host, HEARTBEAT)
    assert guest.session.open and host.session.open


def test_a_guest_says_its_heartbeat_when_it_hears_one_so_that_both_cost_one_wake_up() -> None:
    guest, host = pair()
    woken = 0
    now = 0.0
    while now < 20 * HEARTBEAT:
        now = host.session.next_tick() or 0.0
        guest_due = guest.session.next_tick() or 0.0
        if guest_due < now:
            woken += 1
            guest.do(lambda session, at=guest_due: session.tick(at))
        host.do(lambda session, at=now: session.tick(at))
        settle(guest, host, now)
    assert woken <= 1
    assert len(guest.heard(messages.Heartbeat)) == len(host.heard(messages.Heartbeat)) >= 19
    assert not guest.heard(Ended) and not host.heard(Ended)


def test_half_a_frame_is_given_up_after_two_seconds_and_what_follows_it_is_found() -> None:
    """A host killed in mid-frame never sends the rest; the next one's Hello must not wait for it."""
    guest, host = pair()
    host.send(Start(delay=1))
    half = host.out[0][:-3]
    host.out.clear()
    guest.do(lambda session: session.receive(half, 1))
    assert guest.session.open
    due = guest.session.next_tick()
    assert due == 1 + HALF_FRAME
    guest.do(lambda session: session.tick(due))
    assert len(guest.heard(Ended)) == 1
    settle(guest, host, due)
    assert guest.session.open and host.session.open


def test_unknown_and_malformed_messages_use_up_their_number_and_end_nothing() -> None:
    import msgpack  # the test's own peer

    guest, host = pair()
    to, n = guest.session.peer, 0
    for payload in (
        {"type": "from_the_future", "to": to, "n": n, "x": 1},
        {"type": "vmr", "to": to, "n": n + 1, "vmr": 5, "state": "", "attempt": 0, "reason": ""},
    ):
        host.do(lambda session, p=payload: session.receive(framing.encode(msgpack.packb(p)), 0))
    assert host.session.open
    assert host.session.counts["unknown"] == 1 and host.session.counts["malformed"] == 1


faults = st.lists(
    st.tuples(
        st.sampled_from(
            ["carry", "drop", "double", "flip", "junk", "reconnect_host", "reconnect_guest", "tick", "send"]
        ),
        st.sampled_from(["guest", "host"]),
        st.integers(0, 10_000),
    ),
    max_size=60,
)


@given(faults)
@settings(max_examples=300, deadline=None)
def test_whatever_the_channel_does_sessions_are_whole_or_over(steps: list[tuple[str, str, int]]) -> None:
    """In each session what is heard is a gapless prefix of what was sent in it; and calm brings a session back."""
    guest, host = End(Role.GUEST), End(Role.HOST)
    ends = {"guest": (guest, host), "host": (host, guest)}
    now = 0.0
    guest.do(lambda session: session.connect(now))
    host.do(lambda session: session.connect(now))
    sent = itertools.count(1)
    for act, side, number in steps:
        sender, receiver = ends[side]
        now += number / 5000
        if act == "carry":
            carry(sender, receiver, now)
        elif act == "drop" and sender.out:
            del sender.out[number % len(sender.out)]
        elif act == "double" and sender.out:
            sender.out.append(sender.out[number % len(sender.out)])
        elif act == "flip" and sender.out:
            frame = bytearray(sender.out[-1])
            frame[number % len(frame)] ^= 1 << number % 8
            sender.out[-1] = bytes(frame)
        elif act == "junk":
            sender.out.append(number.to_bytes(2, "big") * 9)
        elif act.startswith("reconnect"):
            end = ends[act.rpartition("_")[2]][0]
            end.do(lambda session: session.disconnect("test"))
            end.do(lambda session: session.connect(now))
        elif act == "tick":
            sender.do(lambda session: session.tick(now))
        elif act == "send" and sender.session.open:
            sender.send(row(next(sent)))
    for _ in range(12):  # calm: time passes and all is carried
        now += HEARTBEAT
        guest.do(lambda session: session.tick(now))
        host.do(lambda session: session.tick(now))
        settle(guest, host, now)
    assert guest.session.open and host.session.open
    guest.send(row(1_000_000))
    settle(guest, host, now)
    assert host.heard(Vmr)[-1].attempt == 1_000_000
    for end in (guest, host):
        numbers = [event.attempt for event in end.events if isinstance(event, Vmr)]
        assert len(set(numbers)) == len(numbers), "nothing is taken twice"
        assert numbers == sorted(numbers), "nothing is out of order"


def test_a_buffer_of_false_beginnings_is_given_up_at_once_not_one_each_two_seconds() -> None:
    guest, host = pair()
    false_head = bytes.fromhex("c900007ff0") + b"VMR1" + bytes(4)
    guest.do(lambda session: session.receive(false_head * 100, 1))
    guest.do(lambda session: session.tick(1 + HALF_FRAME))
    settle(guest, host, 1 + HALF_FRAME)
    assert guest.session.open and host.session.open
