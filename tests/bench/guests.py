"""Many guests in one process, with the protocol's own code and real sockets: what the collector is measured with.

`guests.py SOCKETS COUNT RATE SECONDS [--flat] [--flood]`: each of COUNT guests connects to SOCKETS/vm<n>, begins one
run, says "ready", and waits for a line on standard input; then it prints RATE lines a second for SECONDS. --flat:
all of them send what they can; --flood: the first does, the others keep their rate. Then it waits until all is
acknowledged, and says what it did as JSON.
`guests.py SOCKETS 1 0 0 --runs N`: one guest that delivers N short runs, one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, Optional

from vmr_agent.wire import messages
from vmr_agent.wire.session import PROTOCOL, Opened, Role, Session

WINDOW = 16 << 20  # as the shipper's
PIECE = 32_000
LINE = b"%015d @%d@ as much as a line of a program holds, about\n"
BLOCK = (b"as much as a line of a program that has a lot to say holds, about\n" * 500)[:PIECE]


class Guest:
    """One guest, and the one run it has."""

    def __init__(self, path: Path, number: int) -> None:
        self.session = Session(
            Role.GUEST, introduce=self._introduce, beat=self._beat, make_id=lambda: os.urandom(8)
        )
        self.spool, self.run = os.urandom(16), os.urandom(16)
        self.vmr = b"1/prints"
        self.number = number
        self.sent = self.acked = self.lines = 0
        self.state = 0
        self.started = time.time_ns()
        self.answered = False
        self.unacked: deque[tuple[int, float]] = deque()
        self.kept = b""
        """What is not acknowledged, up to ``sent``: it is said again in the next session."""
        self.sessions = 0
        self.delays: list[float] = []
        self.out = b""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(os.fspath(path))
        self.sock.setblocking(False)
        self.session.connect(time.monotonic())
        self.flush()

    def _introduce(self, own: bytes, peer: Optional[bytes]) -> messages.Hello:
        return messages.Hello(
            id=own,
            peer=peer,
            role="guest",
            protocol=PROTOCOL,
            version="bench",
            wall=time.time_ns(),
            spool=self.spool,
            boot="bench",
            boottime=time.monotonic_ns(),
            hostname=b"vm%d" % self.number,
            configured=True,
            since_zero=0,
            zero_by="guest",
        )

    def _beat(self) -> messages.Heartbeat:
        return messages.Heartbeat(wall=time.time_ns(), boottime=time.monotonic_ns(), configured=True)

    def flush(self) -> bool:
        """True when nothing waits to be sent."""
        for frame in self.session.take():
            self.out += frame
        if self.out:
            try:
                self.out = self.out[self.sock.send(self.out) :]
            except BlockingIOError:
                pass
        return not self.out

    def say(self, message: messages.Message) -> None:
        self.out += self.session.frame(message)
        self.flush()

    def read(self, now: float) -> None:
        while True:
            try:
                data = self.sock.recv(1 << 16)
            except BlockingIOError:
                break
            if not data:
                raise SystemExit(f"guest {self.number}: the host closed the connection")
            for event in self.session.receive(data, now):
                self._take(event, now)
            if len(data) < 1 << 16:
                break
        self.flush()

    def _take(self, event: Any, now: float) -> None:
        if isinstance(event, Opened):
            self.sessions += 1
            self.answered = False
            self.say(messages.Vmr(vmr=None, state="", attempt=0, reason=""))
            self.begin(1)
        elif isinstance(event, messages.Ack) and event.run == self.run:
            self.kept = self.kept[event.stdout - self.acked :]
            self.acked, self.state = event.stdout, event.state
            while self.unacked and self.unacked[0][0] <= self.acked:
                self.delays.append(now - self.unacked.popleft()[1])
            if not self.answered:
                self.answered = True
                for at in range(0, len(self.kept), len(BLOCK)):
                    self.tell(self.acked + at, self.kept[at : at + len(BLOCK)])

    def begin(self, attempt: int) -> None:
        self.say(
            messages.Run(
                run=self.run,
                vmr=self.vmr,
                attempt=attempt,
                trigger="schedule",
                request=b"",
                script=b"/var/launch/1/prints/call_arguments.sh",
                boot="bench",
                pid=1000 + attempt % 30_000,
                started=self.started,
            )
        )

    def print(self, data: bytes, now: float) -> None:
        offset, self.sent = self.sent, self.sent + len(data)
        self.kept += data
        self.unacked.append((self.sent, now))
        if self.answered and self.session.open:
            self.tell(offset, data)

    def tell(self, offset: int, data: bytes) -> None:
        marks = ((len(data), time.time_ns()),)
        self.out += self.session.output_frame(self.run, 1, offset, False, marks, data)  # as the shipper does
        self.flush()

    def end(self) -> None:
        now = time.time_ns()
        self.say(
            messages.Exit(
                run=self.run,
                ending="code",
                value=0,
                text="",
                started=now,
                ended=now,
                started_boottime=1,
                ended_boottime=2,
                boot="bench",
                stdout=self.sent,
                stderr=0,
                user=0,
                system=0,
                max_rss=0,
                asks_reboot=False,
            )
        )
        self.say(messages.Closed(run=self.run, stdout=self.sent, stderr=0, reason=""))


class Guests:
    def __init__(self, sockets: Path, count: int) -> None:
        self.all: list[Guest] = []
        self.poll = select.epoll()
        self.by_fd: dict[int, Guest] = {}
        self.tick = time.monotonic()
        for number in range(count):
            guest = Guest(sockets / f"vm{number}", number)
            self.all.append(guest)
            self.by_fd[guest.sock.fileno()] = guest
            self.poll.register(guest.sock, select.EPOLLIN)
            self.serve(0.0)

    def serve(self, wait: float) -> None:
        """Read what came, keep the sessions going."""
        ready = self.poll.poll(wait, 256)
        now = time.monotonic()
        for fd, _ in ready:
            self.by_fd[fd].read(now)
        if now >= self.tick:
            self.tick = now + 1.0
            for guest in self.all:
                guest.session.tick(now)
                guest.flush()

    def until(self, holds: Any, limit: float = 300.0) -> None:
        deadline = time.monotonic() + limit
        while not all(holds(guest) for guest in self.all):
            if time.monotonic() > deadline:
                raise SystemExit("the host doesn't answer")
            self.serve(0.05)
            for guest in self.all:
                guest.flush()

    def print_lines(
        self, guests: list[Guest], rate: float, seconds: float, flooding: list[Guest]
    ) -> list[float]:
        """Each its lines, in turn, at an even pace; how late each was."""
        late = []
        begun = time.monotonic()
        count = int(len(guests) * rate * seconds)
        step = 1 / (len(guests) * rate) if count else 0.0
        done = 0
        while done < count or (not count and time.monotonic() < begun + seconds):
            now = time.monotonic()
            while done < count and begun + done * step <= now:
                guest = guests[done % len(guests)]
                stamp = time.monotonic_ns()
                guest.print(LINE % (guest.lines, stamp), stamp / 1e9)
                guest.lines += 1
                late.append(stamp / 1e9 - (begun + done * step))
                done += 1
                if done % 256 == 0:
                    self.serve(0.0)
            for number, guest in enumerate(flooding):
                # A few at a time, and what the host says in between, or some of a thousand are silent for too long.
                for _ in range(8):
                    if not guest.flush() or guest.sent - guest.acked >= WINDOW:
                        break
                    guest.print(BLOCK, time.monotonic())
                if number % 32 == 31:
                    self.serve(0.0)
            self.serve(0.0 if flooding else min(0.001, max(0.0, begun + done * step - time.monotonic())))
        return late

    def deliver(self, count: int) -> None:
        """Many short runs of one guest, each to its end."""
        (guest,) = self.all
        for number in range(count):
            if number:
                guest.run, guest.sent, guest.acked, guest.state, guest.kept = os.urandom(16), 0, 0, 0, b""
                guest.started = time.time_ns()
                guest.answered = False
                guest.vmr = b"1/run%03d" % (number % 100)
                guest.begin(number // 100 + 1)
            self.until(lambda guest: guest.answered)
            guest.print(b"one line of a short run\n", time.monotonic())
            guest.end()
            if number % 1000 == 999:
                print(number + 1, file=sys.stderr, flush=True)
            self.until(lambda guest: guest.state == 3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sockets", type=Path)
    parser.add_argument("count", type=int)
    parser.add_argument("rate", type=float)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--flat", action="store_true")
    parser.add_argument("--flood", action="store_true")
    parser.add_argument("--runs", type=int, default=0)
    args = parser.parse_args()
    guests = Guests(args.sockets, args.count)
    if args.runs:
        guests.deliver(args.runs)
        return
    guests.until(lambda guest: guest.answered)
    print("ready", flush=True)
    sys.stdin.readline()
    flooding = guests.all if args.flat else guests.all[:1] if args.flood else []
    quiet = [guest for guest in guests.all if guest not in flooding] if not args.flat else []
    begun = time.monotonic()
    late = guests.print_lines(quiet, args.rate, args.seconds, flooding)
    took = time.monotonic() - begun
    guests.until(lambda guest: guest.acked == guest.sent)
    acked = time.monotonic() - begun
    delays = sorted(delay for guest in quiet or guests.all for delay in guest.delays)
    late.sort()
    json.dump(
        {
            "took": took,
            "acked": acked,
            "bytes": sum(guest.sent for guest in guests.all),
            "lines": sum(guest.lines for guest in guests.all),
            "late_p99": late[int(len(late) * 0.99)] if late else 0.0,
            "ack_p50": delays[len(delays) // 2] if delays else None,
            "ack_p99": delays[int(len(delays) * 0.99)] if delays else None,
            "sizes": [guest.sent for guest in guests.all],
            "sessions": sum(guest.sessions for guest in guests.all) - len(guests.all),
        },
        sys.stdout,
    )
    sys.stdout.flush()
    # The sessions are kept until the measuring is done, or a thousand ends would be measured with it.
    sys.stdin.readline()


if __name__ == "__main__":
    main()
