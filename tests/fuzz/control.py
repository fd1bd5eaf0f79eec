"""Target: the collector's control socket: whatever lines come, each is answered by one, and none is the last."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

from tests.fuzz.given import Given
from vmr_agent import control
from vmr_agent.host import collector
from vmr_agent.host.logstore import LogStore

_VERBS = ("mix", "list", "start", "hold", "resume", "files", "rerun", "kill", "names", "")
_VALUES: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        1,
        7,
        65,
        2**63,
        10**30,
        1.5,
        1e308,
        float("inf"),
        float("nan"),
        "",
        "vm",
        "VM",
        "\udcff",
    ),
    *(
        "\ud800",
        "-4/a.sh",
        "../..",
        "a\0b",
        "\x1b[31m",
        "n" * 5_000,
        [],
        ["vm"],
        {},
        {"path": "x"},
        "ab" * 16,
    ),
    *("read", "write", "stat", "\n", {"\ud800": "\ud800"}, {"offset": 2**70}, {"a": 1.5}, {"a": []}),
]
_KEYS = ("vm", "vmr", "delay", "signal", "bytes", "id", "ask", "args", "data", "request", "verb")
SEEDS = [
    b"",
    b'\x00{"verb": "mix"}\n{"verb": "list", "vm": "vm"}\n',
    *(bytes((1, verb, 2, 0, 14, 1, 18)) for verb in range(len(_VERBS))),
    b"\x00" + b"[" * 60 + b'\n{"verb": "files", "vm": "vm", "bytes": 3}\nabc',
]
_BASE = "/dev/shm" if Path("/dev/shm").is_dir() else None


def check(data: bytes) -> None:
    top = Path(tempfile.mkdtemp(prefix="vmr-fuzz-", dir=_BASE))
    loop = asyncio.new_event_loop()
    failed: list[Any] = []
    loop.set_exception_handler(lambda _, context: failed.append(context))
    try:
        loop.run_until_complete(_drive(top, Given(data)))
        assert not failed, failed
    finally:
        loop.close()
        shutil.rmtree(top)


async def _drive(top: Path, given: Given) -> None:
    made = collector.Collector(top / "logs", [], control_path=top / "control")
    store = LogStore(top / "logs", "vm", log=lambda line: None)
    guest = collector.Guest(collector.Source("vm", top / "vm"), store, made)
    made.guests["vm"] = guest
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    client = control.Client(ours)
    made._clients.add(client)
    made._attend(client)
    try:
        theirs.setblocking(False)
        lines = 0
        heard = b""
        while given.left and client in made._clients:
            said, count = _said(given)
            lines += count
            theirs.sendall(said)
            made._serve(client)
            heard += _hear(theirs)
        # Half an answer: of who is hung up on, or the rest waits for room in the socket.
        whole, _, cut = heard.rpartition(b"\n")
        answers = [json.loads(line) for line in whole.splitlines()]
        assert not cut or client._out or client not in made._clients
        assert all(type(answer["ok"]) is bool for answer in answers)
        assert all(
            answer["ok"] or str(answer["error"]).startswith("cannot ") or "id" in answer for answer in answers
        )
        if client in made._clients and lines >= 0 and not client._in and not client._out:
            assert len(answers) == lines, (answers, lines)
        assert len(client._in) <= 2 * 64 * 1024
        if client in made._clients and not client._in and not client._out:
            theirs.sendall(b'{"verb": "mix"}\n')
            made._serve(client)
            assert json.loads(_hear(theirs))["vms"][0]["vm"] == "vm", "it still answers"
    finally:
        made._drop(client)
        theirs.close()
        store.close()
    assert sorted(os.listdir(top)) == ["logs"]


def _said(given: Given) -> tuple[bytes, int]:
    """Some bytes, and how many answers they must bring; a count that can't be known is below any sum."""
    if given.byte() % 4 == 0:
        return given.blob(), -(10**9)
    row: dict[str, Any] = {"verb": given.pick(_VERBS)}
    for _ in range(given.byte() % 6):
        row[given.pick(_KEYS)] = given.pick(_VALUES)
    size = row.get("bytes", 0)
    payload = b"d" * size if type(size) is int and 0 < size < 1_000 else b""
    return json.dumps(row).encode() + b"\n" + payload, 1


def _hear(sock: socket.socket) -> bytes:
    heard = b""
    while True:
        try:
            data = sock.recv(1 << 20)
        except (
            BlockingIOError,
            ConnectionResetError,
        ):  # nothing yet; hung up on, with something of ours unread
            return heard
        if not data:
            return heard
        heard += data
