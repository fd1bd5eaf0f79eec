"""The guest's end of the channel against real sockets and devices; the real port is tested in a VM."""

from __future__ import annotations

import os
import pty
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmr_agent.guest.port import Port, PortState, device, users_of


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(os.fspath(tmp_path / "port"))
        sock.listen(1)
        yield sock


def test_a_socket_that_comes_later_is_found_and_a_closed_one_is_tried_again(tmp_path: Path) -> None:
    port = Port(f"unix:{tmp_path}/port")
    assert port.look(0) is PortState.MISSING and port.reason == "No such file or directory"
    due = port.next_try()
    assert due is not None and 0 < due <= 1
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(os.fspath(tmp_path / "port"))
        sock.listen(1)
        assert port.look(0.01) is PortState.MISSING, "not before it is due"
        assert port.look(due) is PortState.UP and port.next_try() is None
        peer, _ = sock.accept()
        peer.close()
        assert port.read() == b"" and port.state is PortState.MISSING
        assert port.look(due + 1) is PortState.UP
    port.close()


def test_bytes_pass_both_ways_and_a_full_socket_takes_a_part_and_then_nothing(
    tmp_path: Path, listener: socket.socket
) -> None:
    port = Port(f"unix:{tmp_path}/port")
    assert port.look(0) is PortState.UP
    peer, _ = listener.accept()
    peer.sendall(b"\x00\xff in")
    assert select.select([port], [], [], 5)[0], "an edge tells that there is something to read"
    assert port.read() == b"\x00\xff in" and port.read() == b""
    sent = 0
    while taken := port.write([bytes(100_000)]):
        sent += taken
    assert sent > 0 and port.write([b"x"]) == 0 and port.state is PortState.UP
    got = 0
    while got < sent:
        got += len(peer.recv(1 << 20))
    assert port.write([b"x"]) == 1
    peer.close()
    port.close()


def test_a_host_that_is_gone_is_noticed_at_the_write(tmp_path: Path, listener: socket.socket) -> None:
    port = Port(f"unix:{tmp_path}/port")
    port.look(0)
    peer, _ = listener.accept()
    peer.close()
    assert port.write([b"x"]) == 0 and port.state is PortState.MISSING
    port.close()


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_no_device_is_said_and_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "port"
    path.mkdir() if kind == "directory" else path.write_bytes(b"precious")
    port = Port(os.fspath(path))
    assert port.look(0) is PortState.MISSING and port.reason == "is no character device"
    assert kind == "directory" or path.read_bytes() == b"precious"
    port.close()


def test_a_device_by_path_is_opened_closed_on_exec_and_its_users_are_named() -> None:
    ours, theirs = pty.openpty()
    path = Path(os.ttyname(theirs))
    os.close(theirs)
    port = Port(os.fspath(path))
    assert port.look(0) is PortState.UP and port.virtio
    assert any(f"({os.getpid()})" in user for user in users_of(path))
    port.close()
    os.close(ours)


def test_a_port_that_has_no_device_says_so() -> None:
    with pytest.raises(FileNotFoundError, match="no port of that name"):
        device("org.vmr_agent.none")
    port = Port("org.vmr_agent.none")
    assert port.look(0) is PortState.MISSING and port.reason == "there is no port of that name"
    port.close()
