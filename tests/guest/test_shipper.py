"""What leaves the guest, and what a host makes of it: real runs in a real spool, two real ends of a session."""

from __future__ import annotations

import itertools
import json
import os
import random
import struct
import tempfile
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guest.rig import BOOT_ID, Rig, eventually, everything
from vmr_agent.guest.shipper import BACKLOG, TAIL, WINDOW, Diverged, Shipper
from vmr_agent.guest.spool import RECORD, Lengths, Run, Spool
from vmr_agent.host.life import MAX_OPEN_RUNS
from vmr_agent.runs import Ending, RunResult, RunState, Stream, Trigger, result_to_json
from vmr_agent.wire import framing, messages
from vmr_agent.wire.session import Ended, Opened, Role, Session

OUT, ERR = Stream.STDOUT, Stream.STDERR
MIB = 1 << 20
FIRST_NS = 1_717_634_586_000_000_000


# --- runs, as a shim leaves them ---


def begin(spool: Spool, vmr: bytes = b"-4/a.sh") -> Run:
    run = spool.create(vmr, Trigger.SCHEDULE, boot_id=BOOT_ID, now_ns=FIRST_NS)
    process = {"pid": 1 << 22, "ticks": 1, "boot_id": BOOT_ID, "wall_ns": FIRST_NS, "boottime_ns": 20}
    info = json.loads((run.path / "run.json").read_text())
    (run.path / "started").write_text(json.dumps({"run": info, "process": process}) + "\n")
    for name in ("lock", "stdout", "stderr"):
        (run.path / name).touch()
    return run


def write(run: Run, stream: Stream, data: bytes, *, wall_ns: int = FIRST_NS) -> None:
    """One read of the pipe."""
    offset = (run.path / stream.filename).stat().st_size
    with (run.path / stream.filename).open("ab") as file:
        file.write(data)
    with (run.path / "index").open("ab") as file:
        file.write(RECORD.pack(offset, wall_ns, len(data), stream))


def end(
    run: Run,
    *,
    closed: bool = True,
    ending: Ending = Ending.CODE,
    counted: Optional[tuple[int, int]] = None,
) -> None:
    out, err = counted or run.lengths()
    text = "its shim was killed" if ending is Ending.LOST else ""
    result = RunResult(ending, 0, text, FIRST_NS, FIRST_NS + 5, 20, 25, BOOT_ID, out, err)
    (run.path / "exit.json").write_text(json.dumps({**result_to_json(result), "closed": closed}) + "\n")


def close(run: Run, reason: str = "") -> None:
    run.write_closed(reason)


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


# --- the host's end ---


class Held:
    """What a host has of one run."""

    def __init__(self, message: messages.Run) -> None:
        self.message = message
        self.data = {OUT: bytearray(), ERR: bytearray()}
        self.durable = {OUT: 0, ERR: 0}
        self.state = self.durable_state = RunState.STARTED
        self.gaps: list[messages.Gap] = []
        self.exit: Optional[messages.Exit] = None
        self.closed: Optional[messages.Closed] = None

    def lengths(self) -> tuple[int, int]:
        return len(self.data[OUT]), len(self.data[ERR])

    def tails(self) -> messages.Pairs:
        found = []
        for stream in Stream:
            upto = self.durable[stream]
            after_gap = max((g.offset + g.length for g in self.gaps if g.stream == stream), default=0)
            start = min(max(after_gap, upto - TAIL), upto)
            found.append((zlib.crc32(self.data[stream][start:upto]), upto - start))
        return tuple(found)


class Link:
    """A shipper and a host that holds it to the protocol: whatever comes must be what is due."""

    def __init__(self, spool: Spool, *, window: int = WINDOW, backlog: int = BACKLOG) -> None:
        self.spool = spool
        self.window = window
        self.shipper = Shipper(b"/var/launch", window=window, backlog=backlog)
        ids = itertools.count(1)
        self.guest, self.host = (
            Session(
                role,
                introduce=lambda own, peer, role=role: messages.Hello(  # type: ignore[misc]
                    id=own, peer=peer, role=role.value, protocol=1, version="test", wall=5
                ),
                beat=lambda: messages.Heartbeat(wall=7),
                make_id=lambda: next(ids).to_bytes(8, "big"),
            )
            for role in Role
        )
        self.held: dict[bytes, Held] = {}
        self.answered: set[bytes] = set()
        self.came: list[messages.Message] = []
        self.made: deque[bytes] = deque()
        """Not yet sent."""
        self.frames: list[int] = []
        self.released: list[Run] = []
        for run in spool.open_runs():
            self.shipper.add(run)

    # --- the channel ---

    def connect(self) -> None:
        """A new channel, and a session on it. The host has only what it called durable."""
        if self.guest.disconnect("cut"):
            self.shipper.ended()
        self.made.clear()
        self.host.disconnect("cut")
        self.answered.clear()
        for held in self.held.values():
            for stream in Stream:
                del held.data[stream][held.durable[stream] :]
            held.gaps = [g for g in held.gaps if g.offset + g.length <= held.durable[Stream(g.stream)]]
            held.state = held.durable_state
        self.guest.connect(0.0)
        self.host.connect(0.0)
        for _ in range(3):
            for frame in self.guest.take():
                self.host.receive(frame, 0.0)
            for frame in self.host.take():
                for event in self.guest.receive(frame, 0.0):
                    if isinstance(event, (Opened, Ended)):
                        self.shipper.ended()
        assert self.guest.open and self.host.open

    def to_guest(self, message: messages.Message) -> None:
        for event in self.guest.receive(self.host.frame(message), 0.0):
            assert isinstance(event, messages.Ack)
            whole = self.shipper.ack(event)
            if whole is not None:
                self.released.append(whole)

    # --- in ---

    def step(self) -> Optional[messages.Message]:
        """One frame from guest to host; None when there is none to send."""
        if not self.made:
            self.made.extend(self.shipper.next(self.guest))
        if not self.made:
            return None
        frame = self.made.popleft()
        self.frames.append(len(frame))
        assert len(frame) <= framing.MAX_FRAME
        (message,) = self.host.receive(frame, 0.0)
        assert not isinstance(message, (Opened, Ended))
        self.came.append(message)
        self.take(message)
        return message

    def take(self, message: messages.Message) -> None:
        if isinstance(message, messages.Run):
            held = self.held.setdefault(message.run, Held(message))
            known = held.message._replace(ended=held.message.ended or message.ended)
            assert known == message, "a run never changes, but that it ends"
            held.message = message
            return
        if isinstance(message, (messages.Vmr, messages.Reply, messages.Piece)):
            return
        assert isinstance(message, (messages.Output, messages.Gap, messages.Exit, messages.Closed))
        assert message.run in self.answered, "nothing of a run before its Ack"
        held = self.held[message.run]
        if isinstance(message, messages.Output):
            data = held.data[Stream(message.stream)]
            assert message.offset == len(data), "each byte once and in order"
            assert message.data and sum(length for length, _ in message.marks) == len(message.data)
            assert all(length for length, _ in message.marks)
            data += message.data
            assert self.unacked() <= self.window
        elif isinstance(message, messages.Gap):
            data = held.data[Stream(message.stream)]
            assert message.offset == len(data) and message.length > 0 and message.reason
            data += bytes(message.length)
            held.gaps.append(message)
        elif isinstance(message, messages.Exit):
            for has, counted in zip(held.lengths(), (message.stdout, message.stderr)):
                assert has >= counted, "Exit only after what it counts"
            held.exit, held.state = message, RunState.EXITED
        else:
            assert held.state == RunState.EXITED, "Closed only after Exit"
            assert held.lengths() == (message.stdout, message.stderr)
            held.closed, held.state = message, RunState.CLOSED

    def unacked(self) -> int:
        return sum(
            len(held.data[stream]) - held.durable[stream] for held in self.held.values() for stream in Stream
        )

    # --- out ---

    def ack(self, run: bytes, *, out: Optional[int] = None, err: Optional[int] = None) -> None:
        """Make durable what there is, or so much of it, and say so."""
        held = self.held[run]
        held.durable = {
            OUT: len(held.data[OUT]) if out is None else out,
            ERR: len(held.data[ERR]) if err is None else err,
        }
        if held.lengths() == (held.durable[OUT], held.durable[ERR]):
            held.durable_state = held.state
        tails = None
        if run not in self.answered:
            self.answered.add(run)
            tails = held.tails()
        self.to_guest(messages.Ack(run, int(held.durable_state), held.durable[OUT], held.durable[ERR], tails))

    def answer(self) -> None:
        """The Acks that Runs wait for."""
        for run in [run for run in self.held if run not in self.answered]:
            held = self.held[run]
            if any(isinstance(m, messages.Run) and m.run == run for m in self.came):
                self.ack(run, out=held.durable[OUT], err=held.durable[ERR])

    def run_dry(self) -> None:
        """All that comes, without an Ack but the first of each run."""
        while self.step() is not None:
            self.answer()

    def deliver(self) -> None:
        """All that comes, acknowledged as it does, until the guest has nothing left to say."""
        while True:
            self.run_dry()
            before = self.unacked(), len(self.released)
            for run in list(self.answered):
                if run in self.held and self.held[run].message.run not in [r.info.run for r in self.released]:
                    self.ack(run)
            if (self.unacked(), len(self.released)) == before and self.step() is None:
                return
            self.answer()

    def seen(self, kind: type) -> list[Any]:
        return [message for message in self.came if isinstance(message, kind)]


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    made = Spool(tmp_path / "state")
    yield made
    made.close()


@pytest.fixture
def make_link(spool: Spool) -> Callable[..., Link]:
    def make(**options: Any) -> Link:
        link = Link(spool, **options)
        link.connect()
        return link

    return make


# --- each byte once and in order ---


def test_what_a_script_wrote_is_what_the_host_has(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    try:
        text = "#!/bin/sh\nhead -c 300000 /dev/urandom\nhead -c 200000 /dev/urandom >&2\nexit 3\n"
        run = rig.run(text)
        link = Link(rig.spool)
        link.connect()
        link.deliver()
        held = link.held[run.info.run]
        assert link.released == [run]
        assert (held.data[OUT], held.data[ERR]) == (everything(run, OUT), everything(run, ERR))
        assert held.exit is not None and (held.exit.ending, held.exit.value) == ("code", 3)
        assert (held.exit.stdout, held.exit.stderr) == (300_000, 200_000)
        assert held.gaps == [] and held.closed is not None and held.closed.reason == ""
    finally:
        rig.close()


def test_a_live_scripts_bytes_go_as_they_come_and_its_end_comes_last(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    try:
        # Two: who opens the first again before its writer has closed it would read its end.
        for name in ("first", "second"):
            os.mkfifo(tmp_path / name)
        rig.stage(
            f"#!/bin/sh\ncd {tmp_path}\necho one\nread x < first\necho two\n(read x < second; echo three) &\n"
        )
        run = rig.start()
        link = Link(rig.spool)
        link.connect()

        def has(data: bytes) -> bool:
            link.shipper.touch(run.info.run)
            link.run_dry()
            return run.info.run in link.held and link.held[run.info.run].data[OUT] == data

        eventually(lambda: has(b"one\n"))
        assert link.seen(messages.Exit) == []
        (tmp_path / "first").write_bytes(b"\n")
        eventually(lambda: has(b"one\ntwo\n") and link.seen(messages.Exit))
        assert link.seen(messages.Closed) == []
        (tmp_path / "second").write_bytes(b"\n")
        eventually(lambda: has(b"one\ntwo\nthree\n") and link.seen(messages.Closed))
        assert link.seen(messages.Exit)[0].stdout == 8 and link.seen(messages.Closed)[0].stdout == 14
    finally:
        rig.close()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_with_any_acks_and_any_breaks_each_byte_comes_once(data: st.DataObject) -> None:
    """The host acknowledges what it likes when it likes; channels break; runs grow, exit and close meanwhile."""
    with tempfile.TemporaryDirectory() as path:
        spool = Spool(Path(path) / "state")
        try:
            _any_acks(data, spool)
        finally:
            spool.close()


def _any_acks(data: st.DataObject, spool: Spool) -> None:
    window = data.draw(st.sampled_from([framing.MAX_FRAME, 100_000, WINDOW]))
    runs = [begin(spool, b"-4/%d" % number) for number in range(data.draw(st.integers(1, 3)))]
    wrote = {run.info.run: {OUT: b"", ERR: b""} for run in runs}
    stage = dict.fromkeys(wrote, 0)
    link = Link(spool, window=window)
    link.connect()
    pieces = st.one_of(st.integers(1, 50), st.integers(30_000, 70_000))
    for _ in range(data.draw(st.integers(5, 60))):
        run = data.draw(st.sampled_from(runs))
        key = run.info.run
        act = data.draw(
            st.sampled_from(["write", "write", "step", "step", "step", "ack", "ack", "end", "cut"])
        )
        if act == "write" and stage[key] < 2:
            stream, piece = data.draw(st.sampled_from([OUT, ERR])), noise(data.draw(pieces))
            write(run, stream, piece)
            wrote[key][stream] += piece
            link.shipper.touch(key, only_output=True)
        elif act == "step":
            link.step()
            link.answer()
        elif act == "ack" and key in link.answered and run not in link.released:
            held = link.held[key]
            link.ack(
                key,
                out=data.draw(st.integers(held.durable[OUT], len(held.data[OUT]))),
                err=data.draw(st.integers(held.durable[ERR], len(held.data[ERR]))),
            )
        elif act == "end" and stage[key] < 2:
            stage[key] += 1
            end(run, closed=False) if stage[key] == 1 else close(run)
            link.shipper.touch(key)
        elif act == "cut":
            link.connect()
    for run in runs:
        if stage[run.info.run] < 1:
            end(run)
        elif stage[run.info.run] < 2:
            close(run)
        else:
            continue  # that was said when it was so
        link.shipper.touch(run.info.run)
    link.deliver()
    for run in runs:
        assert link.held[run.info.run].data == wrote[run.info.run]
    assert sorted(map(id, link.released)) == sorted(map(id, runs))


def test_what_is_said_to_be_output_alone_is_not_searched_for_an_end(
    spool: Spool, make_link: Callable[..., Link]
) -> None:
    run = begin(spool)
    link = make_link()
    link.run_dry()
    write(run, OUT, b"a line\n")
    end(run)
    link.shipper.touch(run.info.run, only_output=True)
    link.run_dry()
    assert link.held[run.info.run].data[OUT] == b"a line\n" and not link.seen(messages.Exit)
    link.shipper.touch(run.info.run)
    link.shipper.touch(run.info.run, only_output=True)  # takes nothing back
    link.run_dry()
    assert link.seen(messages.Exit) and link.seen(messages.Closed)


def test_a_session_that_ends_at_any_frame_is_resumed_where_the_host_stands(
    spool: Spool, make_link: Callable[..., Link]
) -> None:
    run = begin(spool)
    for number in range(5):
        write(run, OUT, noise(20_000, number))
        write(run, ERR, noise(20_000, number + 50))
    end(run)
    whole = make_link()
    whole.deliver()
    frames = len(whole.frames)
    assert frames > 6
    for cut in range(frames):
        for acknowledged in (False, True):
            link = make_link()
            for _ in range(cut):
                link.step()
                link.answer()
                if acknowledged and run.info.run in link.answered and not link.released:
                    link.ack(run.info.run)
            if link.released:
                continue
            link.connect()
            link.deliver()
            assert link.held[run.info.run].data == {OUT: everything(run, OUT), ERR: everything(run, ERR)}
            assert link.released == [run]


# --- the window, and the turns ---


def test_no_more_than_the_window_is_in_flight_and_the_rest_comes_as_it_is_acknowledged(
    spool: Spool, make_link: Callable[..., Link]
) -> None:
    run = begin(spool)
    write(run, OUT, noise(MIB))
    window = 200_000
    link = make_link(window=window)
    link.run_dry()
    assert window - framing.MAX_FRAME < link.unacked() <= window
    for _ in range(1000):
        held = link.held[run.info.run]
        if len(held.data[OUT]) == MIB:
            break
        link.ack(run.info.run, out=held.durable[OUT] + 10_000)
        link.run_dry()
        assert link.unacked() <= window
    assert link.held[run.info.run].data[OUT] == noise(MIB)


def test_an_ack_of_one_run_lets_another_go_on(spool: Spool, make_link: Callable[..., Link]) -> None:
    one, two = begin(spool, b"-4/one"), begin(spool, b"-4/two")
    link = make_link(window=100_000)
    link.run_dry()
    write(one, OUT, noise(100_000))
    link.shipper.touch(one.info.run)
    link.run_dry()
    write(two, OUT, noise(50_000))
    link.shipper.touch(two.info.run)
    link.run_dry()
    assert len(link.held[two.info.run].data[OUT]) == 0, "the window is full"
    link.ack(one.info.run)
    link.run_dry()
    assert len(link.held[two.info.run].data[OUT]) == 50_000


def test_a_run_that_is_released_gives_back_its_part_of_the_window(
    spool: Spool, make_link: Callable[..., Link]
) -> None:
    link = make_link(window=100_000)
    for number in range(6):
        run = begin(spool, b"-4/%d" % number)
        write(run, OUT, noise(60_000))
        end(run)
        link.shipper.add(run)
        link.run_dry()
        assert len(link.held[run.info.run].data[OUT]) == 60_000
        link.ack(run.info.run)
        assert link.released[-1] is run


def test_runs_share_fairly_and_so_do_the_two_streams(spool: Spool, make_link: Callable[..., Link]) -> None:
    runs = [begin(spool, b"-4/%d" % number) for number in range(3)]
    link = make_link()
    link.run_dry()
    for run in runs:
        write(run, OUT, noise(MIB))
        write(run, ERR, noise(MIB))
        link.shipper.touch(run.info.run)
    for _ in range(60):
        link.step()
        sizes = [len(link.held[run.info.run].data[stream]) for run in runs for stream in Stream]
        assert max(sizes) - min(sizes) <= framing.MAX_FRAME


def test_control_goes_before_output(spool: Spool, make_link: Callable[..., Link]) -> None:
    run = begin(spool)
    write(run, OUT, noise(MIB))
    link = make_link()
    for _ in range(4):
        link.step()
        link.answer()
    link.shipper.send(messages.Vmr(vmr=b"-4/x", state="staged", attempt=0, reason=""))
    while link.made:
        assert isinstance(link.step(), messages.Output)
    assert isinstance(link.step(), messages.Vmr)
    assert isinstance(link.step(), messages.Output)


def test_pieces_at_their_end_hold_up_no_output(spool: Spool, make_link: Callable[..., Link]) -> None:
    run = begin(spool)
    link = make_link()
    link.run_dry()
    link.shipper.send_pieces(iter([messages.Reply(bytes(16), True, "", {})]))
    assert isinstance(link.step(), messages.Reply)
    for _ in range(3):  # in the second it would be the pieces' turn
        write(run, OUT, b"line\n")
        link.shipper.touch(run.info.run)
        assert isinstance(link.step(), messages.Output)


def test_a_stretch_of_a_file_and_output_take_turns_frame_by_frame(
    spool: Spool, make_link: Callable[..., Link]
) -> None:
    data = noise(8 * messages.PIECE)
    run = begin(spool)
    link = make_link()
    link.run_dry()
    link.shipper.send_pieces(
        iter([messages.Piece(bytes(16), 5, data), messages.Reply(bytes(16), True, "", {})])
    )
    write(run, OUT, noise(200_000))
    link.shipper.touch(run.info.run)
    heard: list[messages.Message] = []
    while not any(isinstance(each, messages.Reply) for each in heard):
        message = link.step()
        assert message is not None
        heard.append(message)
    pieces = [each for each in heard if isinstance(each, messages.Piece)]
    assert b"".join(each.data for each in pieces) == data
    assert [each.at for each in pieces] == list(range(5, 5 + len(data), messages.PIECE))
    kinds = [type(each) for each in heard[:8]]
    assert kinds.count(messages.Piece) == kinds.count(messages.Output) == 4


def test_a_stretch_of_a_session_that_ended_is_not_sent_in_the_next(make_link: Callable[..., Link]) -> None:
    link = make_link()
    link.shipper.send_pieces(iter([messages.Piece(bytes(16), 0, noise(8 * messages.PIECE))]))
    assert isinstance(link.step(), messages.Piece)
    link.connect()
    assert link.step() is None


def test_a_flood_leaves_room_in_the_window(spool: Spool, make_link: Callable[..., Link]) -> None:
    flood, other = begin(spool, b"-4/flood"), begin(spool, b"-4/other")
    link = make_link(window=4 * MIB)
    link.run_dry()
    write(flood, OUT, noise(8 * MIB))
    link.shipper.touch(flood.info.run)
    while link.step() is not None:
        pass
    assert 3 * MIB < link.unacked() < 4 * MIB
    write(other, OUT, b"a line\n")
    link.shipper.touch(other.info.run)
    said = link.step()
    assert isinstance(said, messages.Output) and said.data == b"a line\n"


def test_control_of_a_session_that_ended_is_not_sent_in_the_next(make_link: Callable[..., Link]) -> None:
    link = make_link()
    link.shipper.send(messages.Vmr(vmr=b"-4/x", state="staged", attempt=0, reason=""))
    link.connect()
    assert link.step() is None


# --- the end of a run ---


def test_exit_and_closed_are_said_again_in_each_session_until_acknowledged(
    spool: Spool, make_link: Callable[..., Link]
) -> None:
    run = begin(spool)
    write(run, OUT, b"all\n")
    end(run)
    link = make_link()
    for times in range(1, 4):
        link.run_dry()
        assert len(link.seen(messages.Exit)) == len(link.seen(messages.Closed)) == times
        link.connect()
    link.run_dry()
    link.held[run.info.run].durable_state = RunState.EXITED
    link.connect()
    link.run_dry()
    assert len(link.seen(messages.Exit)) == 4 and len(link.seen(messages.Closed)) == 5
    link.ack(run.info.run)
    link.connect()
    assert link.step() is None, "a run that is whole is not offered again"


def test_what_was_over_before_the_host_heard_of_it_is_offered_so_much_at_once(
    spool: Spool, make_link: Callable[..., Link]
) -> None:
    """A host that was away for days takes it bit by bit: it keeps each run that it is offered in memory."""
    runs = []
    for number in range(12):
        run = begin(spool, vmr=b"-4/%d" % number)
        write(run, OUT, b"%d\n" % number)
        if number != 3:
            end(run)
        runs.append(run)
    link = make_link(backlog=4)
    for _ in range(2):
        link.run_dry()
        offered = {message.run for message in link.came if isinstance(message, messages.Run)}
        assert len(offered) == 5 and runs[3].info.run in offered, "what still runs is always offered"
        link.shipper.touch_all()
        assert link.step() is None
        link.connect()
        link.came.clear()
    most = 0
    while len(link.released) < 11:
        link.run_dry()
        open_runs = link.answered - {run.info.run for run in link.released}
        most = max(most, len(open_runs))
        link.ack(next(iter(open_runs - {runs[3].info.run})))
    assert most == 5
    assert {run.info.run for run in link.released} == {run.info.run for run in runs} - {runs[3].info.run}
    assert BACKLOG <= MAX_OPEN_RUNS // 2


def test_what_is_new_or_still_held_open_waits_for_no_backlog(
    spool: Spool, make_link: Callable[..., Link]
) -> None:
    held = [begin(spool, vmr=b"-4/held%d" % number) for number in range(3)]
    for run in held:
        end(run, closed=False)  # a server holds its pipes
    over = [begin(spool, vmr=b"-4/%d" % number) for number in range(4)]
    for run in over:
        end(run)
    link = make_link(backlog=1)
    link.run_dry()
    assert link.answered == {run.info.run for run in (*held, over[0])}
    new = begin(spool, vmr=b"-4/new")
    end(new)
    link.shipper.add(new)
    link.run_dry()
    assert new.info.run in link.answered, "somebody may wait for it"
    for number, run in enumerate(over):
        for other in over[number + 1 :]:
            link.shipper.touch(other.info.run)  # each may have its turn before its place is free
        link.run_dry()
        waiting = [
            run for run in link.answered if run not in {r.info.run for r in (*link.released, *held, new)}
        ]
        assert len(waiting) == 1, number
        for each in over[::-1]:
            link.shipper.touch(each.info.run)
        link.ack(waiting[0])
    assert {run.info.run for run in link.released} == {run.info.run for run in over}


def test_a_run_that_has_not_started_is_not_announced(spool: Spool, make_link: Callable[..., Link]) -> None:
    run = spool.create(b"-4/a.sh", Trigger.SCHEDULE, boot_id=BOOT_ID, now_ns=1)
    link = make_link()
    assert link.step() is None
    begun = json.loads((run.path / "run.json").read_text())
    process = {"pid": 77, "ticks": 1, "boot_id": BOOT_ID, "wall_ns": 10, "boottime_ns": 20}
    (run.path / "started").write_text(json.dumps({"run": begun, "process": process}) + "\n")
    link.shipper.touch(run.info.run)
    announced = link.step()
    assert isinstance(announced, messages.Run) and announced.pid == 77


# --- bytes that are gone ---


def test_a_lost_run_of_which_the_host_holds_more_than_the_spool(
    spool: Spool, make_link: Callable[..., Link]
) -> None:
    """A power cut took bytes that had been sent but not yet synced: they count, and are not asked for."""
    run = begin(spool)
    write(run, OUT, noise(50_000))
    link = make_link()
    link.run_dry()
    link.ack(run.info.run)
    run.close_fds()
    os.truncate(run.path / "stdout", 30_000)
    end(run, ending=Ending.LOST)
    link.shipper.touch(run.info.run)
    link.connect()
    link.deliver()
    held = link.held[run.info.run]
    assert held.data[OUT] == noise(50_000) and held.gaps == []
    assert held.exit is not None and (held.exit.ending, held.exit.stdout) == ("lost", 50_000)
    assert held.closed is not None and held.closed.stdout == 50_000
    assert link.released == [run]


def test_an_exited_run_of_which_the_host_holds_more_than_the_spool(
    spool: Spool, make_link: Callable[..., Link]
) -> None:
    """The same after the exit: what a background child wrote last is gone with the power; no time travel."""
    run = begin(spool)
    write(run, OUT, b"counted\n")
    end(run, closed=False)
    write(run, OUT, noise(5_000))
    link = make_link()
    link.run_dry()
    link.ack(run.info.run)
    os.truncate(run.path / "stdout", 1_000)
    close(run, "the VM went down before it was over")
    link.connect()
    link.deliver()
    held = link.held[run.info.run]
    assert held.data[OUT] == b"counted\n" + noise(5_000) and held.gaps == []
    assert held.closed is not None and held.closed.stdout == 5_008
    assert link.released == [run]


def test_bytes_counted_and_gone_from_the_spool_are_a_gap(
    spool: Spool, make_link: Callable[..., Link]
) -> None:
    run = begin(spool)
    write(run, OUT, noise(50_000))
    write(run, ERR, noise(100))
    end(run)
    os.truncate(run.path / "stdout", 30_000)
    link = make_link()
    link.deliver()
    held = link.held[run.info.run]
    (gap,) = held.gaps
    assert (gap.stream, gap.offset, gap.length) == (OUT, 30_000, 20_000)
    assert held.data[OUT] == noise(50_000)[:30_000] + bytes(20_000)
    assert link.released == [run]


def drop(run: Run, place: int, stream: Stream, length: int, *, over: bool) -> None:
    """What a shim does that drops, or goes on with it."""
    path = run.path / stream.filename
    if not (run.path / "gaps").exists():
        (run.path / "gaps").write_bytes(bytes(4096))
    with (run.path / "gaps").open("r+b") as file:
        file.seek(32 * place)
        known = struct.unpack("<QQQBBB5x", file.read(32))
        offset = known[0] if known[3] else path.stat().st_size
        os.truncate(path, offset + length)
        file.seek(32 * place)
        file.write(struct.pack("<QQQBBB5x", offset, length * over, FIRST_NS + 7, stream, 2 if over else 1, 1))


def test_what_is_dropped_is_one_gap_told_when_it_is_over(
    spool: Spool, make_link: Callable[..., Link]
) -> None:
    run = begin(spool)
    write(run, OUT, b"kept\n")
    drop(run, 0, OUT, 30_000, over=False)
    write(run, ERR, b"the other stream goes on\n")
    link = make_link()
    link.run_dry()
    held = link.held[run.info.run]
    assert (held.data[OUT], held.gaps) == (b"kept\n", []), "no zeros of the hole pass for output"
    drop(run, 0, OUT, 50_000, over=True)
    write(run, OUT, b"kept again\n")
    drop(run, 1, OUT, 1_000, over=True)
    drop(run, 2, ERR, 9, over=False)
    end(run)
    link.shipper.touch(run.info.run)
    link.deliver()
    assert held.data[OUT] == b"kept\n" + bytes(50_000) + b"kept again\n" + bytes(1_000)
    assert held.data[ERR] == b"the other stream goes on\n" + bytes(9)
    gaps = [(gap.stream, gap.offset, gap.length, gap.wall) for gap in held.gaps]
    assert sorted(gaps) == [
        (OUT, 5, 50_000, FIRST_NS + 7),
        (OUT, 50_016, 1_000, FIRST_NS + 7),
        (ERR, 25, 9, FIRST_NS + 7),
    ]
    assert {gap.reason for gap in held.gaps} == {"dropped in the guest: the spool is over its limit"}
    assert link.released == [run]


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_wherever_a_session_ends_a_gap_is_told_once(
    spool: Spool, make_link: Callable[..., Link], cut: int
) -> None:
    """The host stands before, in or behind it: the rest comes, from there."""
    run = begin(spool)
    write(run, OUT, b"a" * 20)
    drop(run, 0, OUT, 20, over=True)
    write(run, OUT, b"b" * 20)
    end(run)
    link = make_link()
    link.run_dry()
    link.ack(run.info.run, out=cut, err=0)
    link.connect()
    link.deliver()
    held = link.held[run.info.run]
    assert held.data[OUT] == b"a" * 20 + bytes(20) + b"b" * 20
    assert sum(gap.length for gap in held.gaps) == 20 if cut <= 20 or cut >= 40 else 40 - cut
    assert link.released == [run]


def test_bytes_that_a_shim_still_holds_for_want_of_space_are_no_gap(
    spool: Spool, make_link: Callable[..., Link]
) -> None:
    """On a full disk the exit record counts bytes that wait in the shim's memory: they come when there is space."""
    run = begin(spool)
    write(run, OUT, b"spooled\n")
    end(run, closed=False, counted=(20, 0))
    link = make_link()
    link.run_dry()
    assert link.seen(messages.Gap) == [] and link.seen(messages.Exit) == []
    write(run, OUT, b"held back: 1\n"[:12])
    close(run)
    link.shipper.touch(run.info.run)
    link.deliver()
    held = link.held[run.info.run]
    assert held.data[OUT] == b"spooled\nheld back: 1" and held.gaps == []
    assert link.released == [run]


def test_bytes_that_died_with_their_shim_are_a_gap_that_says_so(
    spool: Spool, make_link: Callable[..., Link]
) -> None:
    run = begin(spool)
    write(run, OUT, b"spooled\n")
    end(run, closed=False, counted=(20, 0))
    close(run, "its shim was killed")
    link = make_link()
    link.deliver()
    (gap,) = link.held[run.info.run].gaps
    assert (gap.offset, gap.length) == (8, 12) and "its shim was killed" in gap.reason
    assert link.released == [run]


def test_pruned_bytes_are_a_gap_for_a_host_that_begins_anew(
    spool: Spool, make_link: Callable[..., Link]
) -> None:
    run = begin(spool)
    write(run, OUT, noise(MIB))
    end(run)
    run.prune(Lengths(MIB, 0), whole=True)
    pruned = run.pruned(OUT)
    if not pruned:
        pytest.skip("this file system can't punch holes")
    link = make_link()
    link.deliver()
    held = link.held[run.info.run]
    (gap,) = held.gaps
    assert (gap.offset, gap.length) == (0, pruned)
    assert held.data[OUT][pruned:] == noise(MIB)[pruned:]
    assert link.released == [run]


def test_a_pruned_run_goes_on_where_the_host_stands(spool: Spool, make_link: Callable[..., Link]) -> None:
    run = begin(spool)
    write(run, OUT, noise(MIB))
    link = make_link()
    link.deliver()
    run.prune(Lengths(MIB, 0), whole=False)
    write(run, OUT, b"more")
    link.connect()
    link.run_dry()
    held = link.held[run.info.run]
    assert held.data[OUT] == noise(MIB) + b"more" and held.gaps == []


# --- time travel ---


def announced(link: Link) -> bytes:
    message = link.step()
    assert isinstance(message, messages.Run)
    return message.run


def test_a_host_that_holds_more_of_a_live_run_saw_another_future(
    spool: Spool, make_link: Callable[..., Link]
) -> None:
    run = begin(spool)
    write(run, OUT, b"short")
    link = make_link()
    announced(link)
    with pytest.raises(Diverged):
        link.to_guest(messages.Ack(run.info.run, 1, 6, 0, ((0, 0), (0, 0))))


@pytest.mark.parametrize("size", [1, 100, TAIL - 1, TAIL, TAIL + 1, 3 * TAIL])
def test_a_tail_that_the_spool_does_not_have_is_another_past(
    spool: Spool, make_link: Callable[..., Link], size: int
) -> None:
    run = begin(spool)
    write(run, OUT, noise(size))
    for data, differs in ((noise(size), False), (noise(size)[:-1] + b"?", True)):
        link = make_link()
        announced(link)
        tail = data[-TAIL:]
        ack = messages.Ack(run.info.run, 1, size, 0, ((zlib.crc32(tail), len(tail)), (0, 0)))
        if differs and data != noise(size):
            with pytest.raises(Diverged):
                link.to_guest(ack)
        else:
            link.to_guest(ack)
            assert link.step() is None


@pytest.mark.parametrize("state", [RunState.EXITED, RunState.CLOSED])
def test_a_host_that_knows_the_end_of_a_live_run_saw_another_future(
    spool: Spool, make_link: Callable[..., Link], state: RunState
) -> None:
    """A snapshot from before the exit: taking the host's word would throw away all that comes from now on."""
    run = begin(spool)
    write(run, OUT, b"all of it")
    link = make_link()
    announced(link)
    with pytest.raises(Diverged):
        link.to_guest(messages.Ack(run.info.run, int(state), 9, 0, ((zlib.crc32(b"all of it"), 9), (0, 0))))


# --- a broken host ---


JUNK = [
    pytest.param(lambda run: messages.Ack(run, 99, 10, 0), id="a state there is not"),
    pytest.param(lambda run: messages.Ack(run, 3, 10, 0), id="closed, of a live run"),
    pytest.param(lambda run: messages.Ack(run, 2, 10, 0), id="exited, of a live run"),
    pytest.param(lambda run: messages.Ack(run, 1, 2**63 - 1, 2**63 - 1), id="beyond all that was sent"),
    pytest.param(lambda run: messages.Ack(run, 1, 60_001, 5), id="a little beyond"),
    pytest.param(lambda run: messages.Ack(run, 0, 0, 0), id="back to nothing"),
    pytest.param(lambda run: messages.Ack(run, 1, 5, 0, ((7, 2**40), (1, 1))), id="tails again"),
    pytest.param(lambda run: messages.Ack(b"?" * 16, 3, 10, 10), id="a run nobody has"),
]


@pytest.mark.parametrize("junk", JUNK)
def test_no_ack_makes_the_guest_lose_a_byte(
    spool: Spool, make_link: Callable[..., Link], junk: Callable[[bytes], messages.Ack]
) -> None:
    run = begin(spool)
    write(run, OUT, noise(60_000))
    write(run, ERR, b"e" * 10)
    link = make_link()
    for _ in range(3):
        link.step()
        link.answer()
    link.ack(run.info.run, out=100, err=0)
    for _ in range(5):
        link.to_guest(junk(run.info.run))
    assert link.released == []
    write(run, OUT, noise(200_000, 2))
    end(run)
    link.shipper.touch(run.info.run)
    link.deliver()
    held = link.held[run.info.run]
    assert held.data[OUT] == noise(60_000) + noise(200_000, 2) and held.data[ERR] == b"e" * 10
    assert link.released == [run]


@pytest.mark.parametrize(
    "tails",
    [((7, 2**40), (0, 0)), ((7, 5), (0, 2**63 - 1)), ((2**60, 1), (0, 0)), None],
    ids=["longer than the stream", "longer than an empty one", "no CRC-32", "none"],
)
def test_a_first_ack_with_impossible_tails_never_crashes(
    spool: Spool, make_link: Callable[..., Link], tails: Optional[messages.Pairs]
) -> None:
    run = begin(spool)
    write(run, OUT, b"12345")
    link = make_link()
    announced(link)
    try:
        link.to_guest(messages.Ack(run.info.run, 1, 5, 0, tails))
    except Diverged:
        pass


def test_an_ack_before_its_run_was_announced_means_nothing(
    spool: Spool, make_link: Callable[..., Link]
) -> None:
    run = begin(spool)
    write(run, OUT, b"12345")
    end(run)
    link = make_link()
    link.to_guest(messages.Ack(run.info.run, 3, 5, 0))
    link.deliver()
    assert link.held[run.info.run].data[OUT] == b"12345" and link.released == [run]


# --- thousands of tiny reads ---


def test_tiny_reads_keep_their_times_and_frames_stay_within_their_size(
    spool: Spool, make_link: Callable[..., Link]
) -> None:
    run = begin(spool)
    reads = 20_000
    with (run.path / "index").open("wb") as index:
        for number in range(reads):
            stream = (OUT, ERR)[number % 2]
            index.write(RECORD.pack(number // 2, FIRST_NS + number, 1, stream))
    data = noise(reads // 2)
    (run.path / "stdout").write_bytes(data)
    (run.path / "stderr").write_bytes(data)
    end(run)
    link = make_link()
    before = _bytes_read()
    link.deliver()
    assert link.held[run.info.run].data == {OUT: data, ERR: data}
    for stream, first in ((OUT, 0), (ERR, 1)):
        marks = [mark for m in link.seen(messages.Output) if m.stream == stream for mark in m.marks]
        assert marks == [(1, FIRST_NS + first + 2 * number) for number in range(reads // 2)]
    # The index is read about once, not once a frame: a frame of 256 marks out of the 32,768 it might have held.
    assert _bytes_read() - before < 10 * reads * RECORD.size


def _bytes_read() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise AssertionError("no rchar")


def test_an_index_that_says_impossible_times_stops_nothing(
    spool: Spool, make_link: Callable[..., Link]
) -> None:
    """What a power cut left of it, on a file system that shows old blocks; a time no message can carry."""
    run = begin(spool)
    write(run, OUT, b"one\n", wall_ns=2**64 - 1)
    write(run, OUT, b"two\n", wall_ns=2**63)
    with (run.path / "index").open("ab") as index:
        index.write(b"\xff" * RECORD.size * 3 + b"torn")
    write(run, OUT, b"three\n")
    end(run)
    link = make_link()
    link.deliver()
    assert link.held[run.info.run].data[OUT] == b"one\ntwo\nthree\n" and link.released == [run]
