"""What lives here: spooled bytes from the acknowledged offset to Output, within a window, fair between runs.

It must not know: the port, the clock, why a run runs. What a session needs to be told again is worked out from
the spool, so ending one costs nothing but :meth:`Shipper.ended`. Just over 400 lines: what may follow what is one
decision.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator
from typing import Optional, Union

from vmr_agent.guest.spool import Run
from vmr_agent.runs import Ending, RunId, RunState, Stream
from vmr_agent.wire import framing, messages
from vmr_agent.wire.session import Session

WINDOW = 16 * 1024 * 1024  # bytes sent and not acknowledged: what one lost session may cost to send again
BACKLOG = 1_000  # runs that were over before the host heard of them, and are offered at once: it keeps each in memory
TAIL = 64 * 1024  # bytes whose CRC shows that guest and host speak of the same run
_MARKS = 256  # in one frame
_BURST = 8  # frames of one stretch that are made at once while nobody else has anything to say
_CHUNK = framing.MAX_PAYLOAD - messages.OUTPUT_HEAD - messages.OUTPUT_MARK


class Diverged(Exception):
    """The host holds what this spool never had: the VM was restored from a snapshot."""


class _Delivery:
    """How far one run has got."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.state = RunState.NONE
        self.acked = {Stream.STDOUT: 0, Stream.STDERR: 0}
        # As last looked at: bytes spooled, and whether some of them may have been dropped.
        self.spooled = {Stream.STDOUT: 0, Stream.STDERR: 0}
        self.gaps = True
        self.ends = True
        """Whether what ends the run may have come since it was last looked for."""
        self.more = False
        """Whether there may be more to say than what was said last, and that nobody will tell of."""
        self.waited = False
        """Whether it is older than the session."""
        self.forget_session()

    def forget_session(self) -> None:
        self.sent = dict(self.acked)
        self.announced = self.answered = False
        self.told = RunState.NONE
        self.turn = Stream.STDOUT

    @property
    def in_flight(self) -> int:
        return sum(self.sent.values()) - sum(self.acked.values())

    @property
    def left(self) -> int:
        """Bytes of the longer stream that were last seen and are not sent."""
        return max(there - sent for there, sent in zip(self.spooled.values(), self.sent.values()))

    def look(self) -> None:
        # In this order: what is dropped is noted before it makes a file longer.
        lengths = self.run.lengths()
        self.spooled = {Stream.STDOUT: lengths.stdout, Stream.STDERR: lengths.stderr}
        self.gaps = self.run.has_gaps()


class Shipper:
    """Decides what the next frames are. Control frames go before output that is not made yet; runs with output take
    turns, and so do output and pieces of files."""

    def __init__(self, launch_dir: bytes, *, window: int = WINDOW, backlog: int = BACKLOG) -> None:
        self._launch_dir = launch_dir
        self._window = window
        self._most = backlog
        self._control: deque[messages.Message] = deque()
        self._pieces: deque[Iterator[Union[messages.Piece, messages.Reply]]] = deque()
        self._stretch: Optional[messages.Piece] = None
        """The one that was made last, while some of it isn't sent,"""
        self._cut = 0
        """from here on."""
        self._pieces_turn = False
        self._deliveries: dict[RunId, _Delivery] = {}
        # Runs that may have something to say: a deque for the turns, a set so that each is in it once.
        self._turns: deque[RunId] = deque()
        self._waiting: set[RunId] = set()
        self._stalled: set[RunId] = set()  # runs the window kept from sending
        self._backlog: set[RunId] = set()  # offered in this session, when they were over already
        self._behind: dict[RunId, None] = {}  # over too, and not offered yet, in their order
        self._in_flight = 0

    # --- what there is to deliver ---

    def add(self, run: Run) -> None:
        """A run the host has not whole."""
        if run.info.run not in self._deliveries:
            self._deliveries[run.info.run] = _Delivery(run)
        self.touch(run.info.run)

    def touch(self, run: RunId, *, only_output: bool = False) -> None:
        """Something of this run may be new in the spool; with ``only_output`` surely not its end."""
        delivery = self._deliveries.get(run)
        if delivery is None:
            return
        if not only_output:
            delivery.ends = True
        if run not in self._waiting:
            self._waiting.add(run)
            self._turns.append(run)

    def touch_all(self) -> None:
        for run in self._deliveries:
            if run not in self._behind:
                self.touch(run)

    def send(self, message: messages.Message) -> None:
        """Queue a control message for this session."""
        self._control.append(message)

    def send_pieces(self, pieces: Iterator[Union[messages.Piece, messages.Reply]]) -> None:
        """Queue stretches of a file, each made when its turn comes: one frame of output, one of these."""
        self._pieces.append(pieces)

    def queued(self) -> int:
        """Control messages that wait to be sent."""
        return len(self._control)

    def acked(self, run: RunId) -> Optional[tuple[RunState, int, int]]:
        """(state, stdout, stderr) the host is known to hold of a run; None for one that is delivered whole."""
        delivery = self._deliveries.get(run)
        if delivery is None:
            return None
        return delivery.state, delivery.acked[Stream.STDOUT], delivery.acked[Stream.STDERR]

    def runs(self) -> list[Run]:
        return [delivery.run for delivery in self._deliveries.values()]

    def clear(self) -> None:
        """Forget every run: the spool began another life."""
        self._deliveries.clear()
        self._turns.clear()
        self._waiting.clear()
        self._stalled.clear()
        self._backlog.clear()
        self._behind.clear()
        self._in_flight = 0

    # --- the session ---

    def ended(self) -> None:
        """The session is over: what was not acknowledged in it is sent again in the next."""
        self._control.clear()
        self._pieces.clear()
        self._stretch = None
        self._in_flight = 0
        self._backlog.clear()
        self._behind.clear()
        for delivery in self._deliveries.values():
            delivery.forget_session()
            delivery.waited = True
        self.touch_all()

    def ack(self, ack: messages.Ack) -> Optional[Run]:
        """Take an Ack. Returns the run when the host now holds it whole.

        Raises Diverged when the host holds bytes that this spool never had.
        """
        delivery = self._deliveries.get(ack.run)
        if delivery is None or not delivery.announced:
            return None
        held = {Stream.STDOUT: ack.stdout, Stream.STDERR: ack.stderr}
        state = RunState(min(ack.state, RunState.CLOSED))
        if not delivery.answered:
            self._check(delivery, held, state, ack.tails)
            delivery.answered = True
            delivery.acked, delivery.sent = held, dict(held)  # nothing of it is in flight yet
            delivery.state = state
            self.touch(ack.run)
        else:
            # Within a session a host takes nothing back and holds no more than was sent: what else it says is a
            # mistake, which must not cost a byte.
            self._in_flight -= delivery.in_flight
            for stream, offset in held.items():
                delivery.acked[stream] = min(max(offset, delivery.acked[stream]), delivery.sent[stream])
            self._in_flight += delivery.in_flight
            delivery.state = max(delivery.state, min(state, max(delivery.told, RunState.STARTED)))
        for run in self._stalled:
            self.touch(run, only_output=True)
        self._stalled.clear()
        if delivery.state is RunState.CLOSED:
            self._in_flight -= delivery.in_flight
            del self._deliveries[ack.run]
            self._backlog.discard(ack.run)
            self._behind.pop(ack.run, None)
            self._let_in()
            return delivery.run
        return None

    def next(self, session: Session) -> list[bytes]:
        """The next frame to write, or the next few; none when there is nothing to send now."""
        if self._control:
            return [session.frame(self._control.popleft())]
        self._pieces_turn = bool(self._pieces) and not self._pieces_turn
        if not self._pieces_turn:
            output = self._next_output(session)
            if output:
                return output
        return self._next_piece(session) or (self._next_output(session) if self._pieces_turn else [])

    # --- inside ---

    def _let_in(self) -> None:
        """The next of those behind takes a place in the backlog that is free."""
        if self._behind and len(self._backlog) < self._most:
            behind = next(iter(self._behind))
            del self._behind[behind]
            self.touch(behind)

    def _next_piece(self, session: Session) -> list[bytes]:
        while self._stretch is None and self._pieces:
            made = next(self._pieces[0], None)
            if isinstance(made, messages.Piece):
                self._stretch, self._cut = made, 0
            elif made is not None:
                return [session.frame(made)]
            else:
                self._pieces.popleft()
        if self._stretch is None:
            return []
        request, at, data = self._stretch
        start = self._cut
        self._cut = start + messages.PIECE if self._turns else len(data)
        if self._cut >= len(data):
            self._stretch = None
        return session.piece_frames(request, at + start, memoryview(data)[start : self._cut])

    def _next_output(self, session: Session) -> list[bytes]:
        for _ in range(len(self._turns)):
            run_id = self._turns.popleft()
            self._waiting.discard(run_id)
            delivery = self._deliveries.get(run_id)
            if delivery is None:
                continue
            frames = self._frames(delivery, session)
            if frames:
                if delivery.more:
                    self.touch(run_id, only_output=True)
                return frames
        return []

    def _frames(self, delivery: _Delivery, session: Session) -> list[bytes]:
        run = delivery.run
        if not delivery.announced:
            # Not what is new: somebody may wait for it. Nor what may live on, which would keep its place for ever.
            over = delivery.waited and run.closed() is not None
            if over and len(self._backlog) >= self._most:
                self._behind[run.info.run] = None
                return []
            self._behind.pop(run.info.run, None)
            announcement = self._announcement(run)
            if announcement is None:
                self._let_in()
                return []
            if over:
                self._backlog.add(run.info.run)
            delivery.announced, delivery.more = True, False
            return [session.frame(announcement)]
        if not delivery.answered:
            return []
        closed = result = None
        look = delivery.left <= _CHUNK  # else there is no need to before a frame
        if look:
            # The order matters: what the exit counted is on disk before the exit record is, and the final bytes
            # before `closed` is; so read the records first, the lengths after.
            if delivery.ends and delivery.told < RunState.EXITED:
                result, closed = run.ends()
            elif delivery.ends and delivery.told < RunState.CLOSED:
                closed = run.closed()
            delivery.ends = result is not None or closed is not None  # what was found is to be told
            delivery.look()
        delivery.more = True
        output = self._output(delivery, session)
        if output:
            # What came since the look a kick tells of.
            delivery.more = not look or closed is not None or result is not None or delivery.left > 0
            return output
        if result is not None:
            counted = {Stream.STDOUT: result.stdout, Stream.STDERR: result.stderr}
            if result.ending is Ending.LOST:
                # The host may hold bytes that a power cut took from the spool: they count.
                counted = {stream: max(length, delivery.sent[stream]) for stream, length in counted.items()}
            if delivery.state >= RunState.EXITED:
                delivery.told = RunState.EXITED
            elif gap := self._gap(delivery, counted, session) if closed is not None else None:
                return [gap]  # not before: what the spool lacks may wait for space, in the shim's memory
            elif all(delivery.sent[stream] >= length for stream, length in counted.items()):
                delivery.told = RunState.EXITED
                return [
                    session.frame(
                        messages.Exit(
                            run=run.info.run,
                            ending=result.ending.value,
                            value=result.value,
                            text=messages.text(result.text),
                            started=result.started_ns,
                            ended=result.ended_ns,
                            started_boottime=result.started_boottime_ns,
                            ended_boottime=result.ended_boottime_ns,
                            boot=result.boot_id,
                            stdout=counted[Stream.STDOUT],
                            stderr=counted[Stream.STDERR],
                            user=int(result.rusage.user_s * 1e9),
                            system=int(result.rusage.system_s * 1e9),
                            max_rss=result.rusage.max_rss_bytes,
                            asks_reboot=result.asks_reboot,
                        )
                    )
                ]
        if closed is not None and delivery.told is RunState.EXITED:
            final = {Stream.STDOUT: closed.stdout, Stream.STDERR: closed.stderr}
            if gap := self._gap(delivery, final, session):
                return [gap]
            if all(delivery.sent[stream] >= length for stream, length in final.items()):
                delivery.told = RunState.CLOSED
                return [
                    session.frame(
                        messages.Closed(
                            run=run.info.run,
                            stdout=delivery.sent[Stream.STDOUT],
                            stderr=delivery.sent[Stream.STDERR],
                            reason=messages.text(run.close_reason()),
                        )
                    )
                ]
        return []

    def _announcement(self, run: Run) -> Optional[messages.Run]:
        result, started = run.result(), run.started()  # this way round: both may come in between
        if started is None and result is None:
            return None
        return messages.Run(
            run=run.info.run,
            vmr=run.info.vmr,
            attempt=run.info.attempt,
            trigger=run.info.trigger.value,
            request=run.info.request,
            script=(self._launch_dir + b"/" + run.info.vmr + b"/call_arguments.sh")[: messages.MAX_TEXT],
            boot=run.info.boot_id,
            pid=started.pid if started else 0,
            started=started.wall_ns if started else (result.started_ns if result else run.info.created_ns),
            ended=result.ended_ns if result else None,
        )

    def _output(self, delivery: _Delivery, session: Session) -> list[bytes]:
        # The last sixteenth is kept for runs with little under way: their lines don't wait for the Acks of a flood.
        window = self._window - (self._window // 16 if delivery.in_flight > _CHUNK else 0)
        if self._in_flight + _CHUNK > window:
            self._stalled.add(delivery.run.info.run)
            return []
        spooled = delivery.spooled
        other = Stream.STDERR if delivery.turn is Stream.STDOUT else Stream.STDOUT
        for stream in (delivery.turn, other):
            offset = delivery.sent[stream]
            left = spooled[stream] - offset
            if left <= 0:
                continue
            pruned = delivery.run.pruned(stream)
            if offset < pruned:
                return [self._missing(delivery, stream, pruned - offset, "pruned in the guest", session)]
            gap = delivery.run.gap(stream, offset, spooled[stream]) if delivery.gaps else None
            if gap is not None and gap.begin > offset:
                left = gap.begin - offset
            elif gap is not None:
                if gap.growing:
                    continue  # told whole, when it is over
                why, length = f"dropped in the guest: {gap.reason}", gap.end - offset
                return [self._missing(delivery, stream, length, why, session, gap.wall_ns)]
            marks = delivery.run.marks(stream, offset, min(left, _CHUNK), most=_MARKS)
            size = min(sum(length for length, _ in marks), _CHUNK - messages.OUTPUT_MARK * (len(marks) - 1))
            if size == _CHUNK and not self._turns and not self._pieces:
                most = min(_BURST, (window - self._in_flight) // _CHUNK) * _CHUNK
                marks = delivery.run.marks(stream, offset, min(left, most), most=1)
                size = marks[0][0]
            data = memoryview(delivery.run.read(stream, offset, size))
            if not data:
                continue
            delivery.turn = Stream.STDERR if stream is Stream.STDOUT else Stream.STDOUT
            delivery.sent[stream] += len(data)
            self._in_flight += len(data)
            run, frames = delivery.run.info.run, []
            for at in range(0, len(data), _CHUNK):
                piece = data[at : at + _CHUNK]
                more = at + len(piece) < left
                fitted = _fit(marks, len(piece))
                frames.append(session.output_frame(run, stream, offset + at, more, fitted, piece))
            return frames
        return []

    def _gap(self, delivery: _Delivery, counted: dict[Stream, int], session: Session) -> Optional[bytes]:
        """Bytes that were counted and never will be in the spool: the power, or their shim, went first."""
        lengths = delivery.run.lengths()
        why = delivery.run.close_reason()
        reason = messages.text("lost from the spool" + (f": {why}" if why else ""))
        for stream, spooled in ((Stream.STDOUT, lengths.stdout), (Stream.STDERR, lengths.stderr)):
            offset = delivery.sent[stream]
            if offset >= spooled and offset < counted[stream]:
                return self._missing(delivery, stream, counted[stream] - offset, reason, session)
        return None

    def _missing(
        self,
        delivery: _Delivery,
        stream: Stream,
        length: int,
        reason: str,
        session: Session,
        wall_ns: Optional[int] = None,
    ) -> bytes:
        offset = delivery.sent[stream]
        delivery.sent[stream] += length
        self._in_flight += length
        return session.frame(
            messages.Gap(delivery.run.info.run, int(stream), offset, length, reason, wall_ns)
        )

    def _check(
        self,
        delivery: _Delivery,
        held: dict[Stream, int],
        state: RunState,
        tails: Optional[messages.Pairs],
    ) -> None:
        run = delivery.run
        # Cases: the host knows no more than we, the usual one; it knows more and the run is live: a snapshot; it
        # knows more and the run is over: a power cut took what wasn't synced, nothing differs.
        if state >= RunState.EXITED and run.result() is None:
            raise Diverged("the host knows the end of a run in progress")
        live = run.closed() is None and (state is not RunState.CLOSED or run.locked())
        if live and state is RunState.CLOSED:
            raise Diverged("the host knows the last byte of a run in progress")
        spooled = run.lengths()
        # Where the end was seen, by its own shim, its lengths are no guess.
        final = run.closed() if not run.close_reason() else None
        told = state is RunState.CLOSED
        for stream, (crc, size) in zip((Stream.STDOUT, Stream.STDERR), tails or ((0, 0), (0, 0))):
            end = held[stream]
            if final is not None and (end > final.of(stream) or (told and 0 < end < final.of(stream))):
                raise Diverged(
                    f"the host holds {end:,} bytes of a {stream.filename} that ended at {final.of(stream):,}"
                )
            if end > spooled.of(stream):
                if live:
                    raise Diverged(
                        f"the host holds {end:,} bytes of a {stream.filename} of {spooled.of(stream):,}"
                    )
                continue
            start = end - min(size, end, TAIL)
            if start < run.pruned(stream):
                continue
            if start < end and _crc(run, stream, start, end) != crc:
                raise Diverged(f"the host holds another {stream.filename} of this run")


def _fit(marks: list[tuple[int, int]], size: int) -> messages.Pairs:
    """The marks that cover exactly ``size`` bytes. Times that no message can carry come from a damaged index."""
    fitted = []
    for length, wall in marks:
        if size <= 0:
            break
        fitted.append((min(length, size), min(wall, messages.MAX_INT)))
        size -= length
    return tuple(fitted)


def _crc(run: Run, stream: Stream, start: int, end: int) -> int:
    crc = 0
    while start < end:
        data: Union[bytes, memoryview] = run.read(stream, start, min(end - start, TAIL))
        if not data:
            break
        crc = zlib.crc32(data, crc)
        start += len(data)
    return crc
