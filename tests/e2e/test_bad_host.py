"""A guest whose host is broken, or not ours: it lives on, loses nothing, and serves the next host."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import msgpack
import pytest

from tests.e2e.world import World, until
from vmr_agent.wire import framing, messages
from vmr_agent.wire.session import Opened, Role, Session

HUGE = 2**63 - 1
DATA = b"".join(b"line %06d\n" % number for number in range(50_000))
VMR = b"-1/talks"
MIB = 1 << 20


class BadHost:
    """Listens where the guest connects, and says what the test wants."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(os.fspath(path))
        self.listener.listen(8)
        self.listener.settimeout(60)
        self.sock: Optional[socket.socket] = None
        self.events: list[Any] = []
        self.session = Session(
            Role.HOST,
            introduce=lambda own, peer: messages.Hello(
                id=own, peer=peer, role="host", protocol=1, version="bad", wall=1
            ),
            beat=lambda: messages.Heartbeat(wall=1),
            make_id=lambda: os.urandom(8),
        )

    def accept(self) -> None:
        if self.sock is not None:
            self.sock.close()
        self.sock, _ = self.listener.accept()
        self.sock.settimeout(0.02)
        self.session.disconnect("another connection")
        self.session.connect(time.monotonic())

    def close(self) -> None:
        for sock in (self.sock, self.listener):
            if sock is not None:
                sock.close()
        self.sock = None
        self.path.unlink(missing_ok=True)

    def hear(self, holds: Callable[[], Any] = lambda: True, what: str = "it was heard") -> None:
        assert self.sock is not None

        def heard() -> Any:
            assert self.sock is not None
            for frame in self.session.take():
                self.send(frame)
            try:
                data = self.sock.recv(1 << 18)
                assert data, "the guest closed the connection"
                self.events += self.session.receive(data, time.monotonic())
            except socket.timeout:
                pass
            self.events += self.session.tick(time.monotonic())
            return holds()

        until(heard, what, 60.0)

    def open(self) -> None:
        self.accept()
        self.hear(lambda: self.session.open, "a session")

    def send(self, data: bytes) -> None:
        assert self.sock is not None
        self.sock.settimeout(60)
        self.sock.sendall(data)
        self.sock.settimeout(0.02)

    def say(self, *said: messages.Message) -> None:
        self.send(b"".join(self.session.frame(message) for message in said))

    def heard(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def hellos(self) -> set[bytes]:
        return {event.hello.spool for event in self.heard(Opened)}


def most_memory(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture
def bad(world: World) -> Iterator[BadHost]:
    """A guest with one run, done, at a host that is about to be bad."""
    world.stage(os.fsdecode(VMR), "cat data", files={"data": DATA})
    host = BadHost(world.port)
    world.start_daemon()
    until(lambda: world.state("-1/talks") == "exited", "it has run")
    yield host
    host.close()


def at_last(world: World, bad: BadHost) -> None:
    """Then a good host comes, and gets all of it."""
    assert world.daemon is not None and world.daemon.poll() is None, world.daemon_log()[-2000:]
    assert "Traceback" not in world.daemon_log(), world.daemon_log()[-2000:]
    bad.close()
    world.start_collector()
    world.complete("-1/talks")
    assert world.raw("-1/talks") == DATA


@pytest.mark.parametrize("delay", [HUGE, -HUGE - 1, 0])
def test_a_start_at_any_time_is_survived_also_by_the_next_daemon(
    world: World, bad: BadHost, delay: int
) -> None:
    bad.open()
    bad.say(*[messages.Start(delay=delay)] * 3)
    bad.hear(lambda: bad.heard(messages.Heartbeat), "it is acted on")
    world.stop(world.daemon)
    world.start_daemon()
    bad.open()
    at_last(world, bad)


def test_requests_of_all_kinds_are_answered_and_survived(world: World, bad: BadHost) -> None:
    bad.open()
    rng = random.Random(7)
    verbs = [
        "rerun",
        "kill",
        "hold",
        "resume",
        "read",
        "write",
        "commit",
        "stat",
        "",
        "\x1b[31m",
        "x" * 4_096,
    ]
    values: list[messages.Scalar] = [
        None, True, 0, 1, 9, 65, -1, HUGE, -HUGE - 1, "", "\n", "x" * 4_000, b"", b"/etc/passwd", b"../../x",
        b"-1/talks", b"-1/../talks", b"r" * 16, b"\xff" * 4_000, b"-1/a\0b",
    ]  # fmt: skip
    keys = ["vmr", "run", "signal", "path", "offset", "length", "digest", "data", "mode", "size", "reason"]
    asked = 0
    for _ in range(300):
        args = {rng.choice(keys): rng.choice(values) for _ in range(rng.randrange(6))}
        if args.get("vmr") == VMR:
            continue
        bad.say(messages.Request(os.urandom(16), rng.choice(verbs), args))
        asked += 1
    bad.hear(lambda: len(bad.heard(messages.Reply)) >= asked, "an answer to each")
    bad.say(messages.Request(os.urandom(16), "resume", {}))
    at_last(world, bad)


def test_acks_of_all_kinds_are_survived(world: World, bad: BadHost) -> None:
    rng = random.Random(8)
    numbers = [0, 1, 5, len(DATA), len(DATA) + 1, 2**40, HUGE]
    for _ in range(3):
        bad.open()
        bad.hear(lambda: bad.heard(messages.Run), "the run")
        run = bad.heard(messages.Run)[-1].run
        for _ in range(100):
            tails = rng.choice([None, ((rng.choice(numbers), rng.choice(numbers)), (0, rng.choice(numbers)))])
            which = rng.choice([run, run, b"?" * 16])
            state = rng.choice([0, 1, 2])  # from 3 on it says that it has all, which is to be believed
            if not bad.session.open:
                break
            bad.say(messages.Ack(which, state, rng.choice(numbers), rng.choice(numbers), tails))
            bad.hear()
        bad.events.clear()
    bad.open()
    at_last(world, bad)


def test_a_thousand_requests_for_a_new_life_at_once_begin_one(world: World, bad: BadHost) -> None:
    """A host that is set back in time says so for each run; each life is a directory there, for ever."""
    bad.open()
    first = bad.hellos()
    bad.say(*(messages.Request(os.urandom(16), "diverged", {"reason": "\x1b[31m"}) for _ in range(1_000)))
    bad.hear(lambda: bad.hellos() - first, "a new life")
    deadline = time.monotonic() + 1.0
    bad.hear(lambda: time.monotonic() > deadline)
    assert len(bad.hellos()) == 2
    at_last(world, bad)


def test_garbage_and_half_frames_are_survived(world: World, bad: BadHost) -> None:
    bad.open()
    rng = random.Random(9)
    header = framing.HEADER.pack(0xC9, 32_000, b"VMR1", 7)
    for junk in (header * 20_000, rng.randbytes(MIB), b"\xc9" * MIB, b"SSH-2.0-OpenSSH_9.2\r\n" * 500):
        bad.send(junk)
        bad.hear()
    own = bad.session.frame(messages.Heartbeat(wall=1)) if bad.session.open else b""
    bad.send(own[:-1])
    odd = {"type": "ack", "to": b"x" * 8, "n": 0, "run": [[[[]]]], "state": "x"}
    bad.send(framing.encode(msgpack.packb(odd)) * 1_000)
    bad.hear()
    at_last(world, bad)


def test_a_host_that_hangs_up_at_once_is_tried_ever_less_often(world: World, bad: BadHost) -> None:
    assert world.daemon is not None
    before = cpu_s(world.daemon.pid)
    connections = 0
    deadline = time.monotonic() + 3.0
    while time.monotonic() < deadline:
        bad.listener.accept()[0].close()
        connections += 1
    assert 3 <= connections <= 10
    assert cpu_s(world.daemon.pid) - before < 1.0
    bad.open()
    at_last(world, bad)


def test_a_host_that_reads_nothing_costs_no_memory(world: World, bad: BadHost) -> None:
    bad.open()
    assert world.daemon is not None
    before = most_memory(world.daemon.pid)
    asked = [messages.Request(os.urandom(16), "x" * 40, {}) for _ in range(200)]
    try:
        for _ in range(1_000):
            bad.say(*asked)
    except (OSError, AssertionError):
        pass  # it may well be thrown out
    time.sleep(0.5)
    assert most_memory(world.daemon.pid) - before < 32 * MIB
    at_last(world, bad)
