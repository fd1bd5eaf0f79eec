"""The link to the host over a real socket, with a spool that can't be read everywhere."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.guest.rig import Rig
from vmr_agent.guest.link import Link
from vmr_agent.guest.shipper import Shipper
from vmr_agent.guest.spool import Run
from vmr_agent.wire import messages
from vmr_agent.wire.session import PROTOCOL, Role, Session


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


def test_a_run_that_cannot_be_read_takes_no_other_frame_with_it(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was joined with it has its number already: missing, it would end each session, and the next one too."""
    path = tmp_path / "port"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        shipper = Shipper(b"/launch")
        link = Link(
            f"unix:{path}",
            shipper,
            introduce=lambda own, peer: hello(Role.GUEST, own, peer),
            beat=lambda: messages.Heartbeat(wall=0),
            heed=lambda event: None,
            log=lambda line: None,
        )
        host = Session(
            Role.HOST,
            introduce=lambda own, peer: hello(Role.HOST, own, peer),
            beat=lambda: messages.Heartbeat(wall=0),
            make_id=lambda: os.urandom(8),
        )
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
