"""The link to the host over a real socket, with a spool that can't be read everywhere."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Callable

import pytest

from tests.guest.rig import Rig
from vmr_agent.guest.link import Link
from vmr_agent.guest.shipper import Shipper
from vmr_agent.guest.spool import Run
from vmr_agent.wire import messages
from vmr_agent.wire.session import PROTOCOL, Event, Role, Session


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.close()


def hello(role: Role, own: bytes, peer: object) -> messages.Hello:
    assert peer is None or isinstance(peer, bytes)
    return messages.Hello(
        id=own, peer=peer, role=role.value, protocol=PROTOCOL, version="1", wall=0, spool=b"s" * 16
    )


def a_link(path: Path, shipper: Shipper, heed: Callable[[Event], None]) -> Link:
    return Link(
        f"unix:{path}",
        shipper,
        introduce=lambda own, peer: hello(Role.GUEST, own, peer),
        beat=lambda: messages.Heartbeat(wall=0),
        heed=heed,
        log=lambda line: None,
    )


def a_host() -> Session:
    return Session(
        Role.HOST,
        introduce=lambda own, peer: hello(Role.HOST, own, peer),
        beat=lambda: messages.Heartbeat(wall=0),
        make_id=lambda: os.urandom(8),
    )


def test_a_run_that_cannot_be_read_takes_no_other_frame_with_it(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was joined with it has its number already: missing, it would end each session, and the next one too."""
    path = tmp_path / "port"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        shipper = Shipper(b"/launch")
        link = a_link(path, shipper, lambda event: None)
        host = a_host()
        link.hear(time.monotonic())
        with listener.accept()[0] as sock:
            sock.setblocking(False)
            host.connect(time.monotonic())
            replies = []

            def turn() -> None:
                link.hear(time.monotonic())
                with suppress(OSError):
                    link.speak()
                with suppress(BlockingIOError):
                    events = host.receive(sock.recv(1 << 20), time.monotonic())
                    replies.extend(event for event in events if isinstance(event, messages.Reply))
                for frame in host.take():
                    sock.sendall(frame)

            while not (link.open and host.open):
                turn()
            rig.stage("#!/bin/sh\necho here\n")
            run = rig.start()

            def unreadable(self: Run) -> None:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            monkeypatch.setattr(Run, "started", unreadable)
            shipper.add(run)
            for number in range(40):
                shipper.send(messages.Reply(request=bytes([number]) * 16, ok=True, error="", result={}))
                if number % 8 == 7:
                    shipper.touch_all()
                    turn()
            for _ in range(4):
                turn()
            monkeypatch.undo()
            assert [reply.request[0] for reply in replies] == list(range(40))
            assert link.open and host.open and not host.counts["missing"]
        link.close()


def test_a_port_that_says_nothing_is_asked_each_second_all_the_same(tmp_path: Path) -> None:
    """And at once where it was not read to its end: no edge would tell of what is left."""
    path = tmp_path / "port"
    heard: list[object] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        shipper = Shipper(b"/launch")
        link = a_link(path, shipper, heard.append)
        host = a_host()
        link.hear(100.0)
        with listener.accept()[0] as sock:
            host.connect(100.0)
            while not (link.open and host.open):
                link.hear(100.0)
                link.speak()
                host.receive(sock.recv(1 << 20), 100.0)
                for frame in host.take():
                    sock.sendall(frame)
            link.hear(100.0)
            heard.clear()

            def say() -> None:
                sock.sendall(host.frame(messages.Request(request=bytes(16), verb="hold", args={})))

            link.untold = True
            say()
            for now in (100.1, 100.9):
                link.hear(now)
                assert not heard
            link.hear(101.0)
            assert len(heard) == 1
            link.untold = False
            say()
            link.hear(101.1)
            assert len(heard) == 2

            for _ in range(20_001):  # so many replies that more requests aren't heard
                shipper.send(messages.Reply(request=bytes(16), ok=True, error="", result={}))
            say()
            link.hear(101.2)
            assert len(heard) == 2
            shipper.ended()
            link.untold = True
            link.hear(101.3)
            assert len(heard) == 3
        link.close()
