"""`pull` against a VM that lies: a real collector, the real verb, and a guest that says whatever the test wants."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Callable

import pytest

from vmr_agent.errors import Problem
from vmr_agent.host.transfer import Relay
from vmr_agent.wire import messages
from vmr_agent.wire.session import PROTOCOL, Role, Session

AGENT = Path(__file__).resolve().parents[2] / "agent"
LIMIT = 20.0  # s; for whatever must happen

Say = Callable[[str, Mapping[str, Any]], dict[str, Any]]
"""What a guest answers to a request; Problem: why not. ``pieces``: offsets and bytes that it sends before; ``cut``: the
session ends behind them."""


class Liar:
    """A guest over a real socket, in a thread."""

    def __init__(self, path: Path) -> None:
        self.say: Say = lambda verb, args: {}
        self._session = Session(
            Role.GUEST,
            introduce=lambda own, peer: messages.Hello(
                id=own,
                peer=peer,
                role="guest",
                protocol=PROTOCOL,
                version="1",
                wall=time.time_ns(),
                spool=b"s" * 16,
                boot="b",
                boottime=time.monotonic_ns(),
            ),
            beat=lambda: messages.Heartbeat(wall=time.time_ns()),
            make_id=lambda: os.urandom(8),
        )
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(os.fspath(path))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        self._session.connect(time.monotonic())
        while True:
            for frame in self._session.take():
                self._sock.sendall(frame)
            try:
                data = self._sock.recv(1 << 18)
            except OSError:
                return
            if not data:
                return
            for event in self._session.receive(data, time.monotonic()):
                if isinstance(event, messages.Request):
                    try:
                        error, result = "", self.say(event.verb, event.args)
                    except Problem as problem:
                        error, result = str(problem), {}
                    said: list[messages.Message] = [
                        messages.Piece(event.request, at, data) for at, data in result.pop("pieces", ())
                    ]
                    cut = result.pop("cut", False)
                    if not cut:
                        said.append(messages.Reply(event.request, not error, error, result))
                    self._sock.sendall(b"".join(self._session.frame(each) for each in said))
                    if cut:
                        self._session.renew(time.monotonic(), "cut")
                        break

    def close(self) -> None:
        self._sock.close()


class Host:
    """A collector for one VM, and the verbs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sockets = Path(
            tempfile.mkdtemp(prefix="vmr-")
        )  # a socket's path has 107 bytes, pytest's are longer
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(AGENT),
            "VMR_HOST_CONTROL": str(self.sockets / "control"),
        }
        self.collector = self.start(
            *("collect", "--log-dir", str(path / "logs"), "--listen", f"evil={self.sockets / 'port'}")
        )
        deadline = time.monotonic() + LIMIT
        while not (self.sockets / "control").exists() or not (self.sockets / "port").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "vmr_agent.cli.host", *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def pull(self, source: str, target: Path) -> tuple[int, str]:
        process = self.start("pull", source, "evil", str(target))
        out, err = process.communicate(timeout=LIMIT)
        return process.returncode, (out + err).decode()

    def close(self) -> None:
        self.collector.send_signal(signal.SIGTERM)
        self.collector.communicate(timeout=LIMIT)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("host"))
    yield host
    host.close()


@pytest.fixture(scope="module")
def only(host: Host) -> Iterator[Liar]:
    liar = Liar(host.sockets / "port")
    yield liar
    liar.close()


@pytest.fixture
def liar(only: Liar, host: Host, tmp_path: Path) -> Liar:
    deadline = time.monotonic() + LIMIT
    only.say = lambda verb, args: file_facts(0)
    while "offline" in host.pull("x", tmp_path / "ready")[1]:
        assert time.monotonic() < deadline
    (tmp_path / "ready").unlink(missing_ok=True)
    return only


def file_facts(size: int, **other: Any) -> dict[str, Any]:
    facts = {"path": b"/x", "kind": "file", "size": size, "mode": 0o644, "mtime": 1, "id": b"i"}
    return {**facts, **other}


def a_file(content: bytes, **other: Any) -> Say:
    def say(verb: str, args: Mapping[str, Any]) -> dict[str, Any]:
        if verb == "digest":
            return {"digest": hashlib.new(os.fsdecode(args["kind"]), content).digest()}
        if verb == "read":
            start, end = args["offset"], args["end"]
            return {"at": min(end, len(content)), "pieces": [(start, content[start:end])] if content else []}
        return file_facts(len(content), **other)

    return say


def a_tree(*rows: Mapping[str, Any], content: bytes = b"", more: bool = False) -> Say:
    file = a_file(content)

    def say(verb: str, args: Mapping[str, Any]) -> dict[str, Any]:
        if verb == "list":
            if args["path"] != b"/x/":
                return {"data": b"", "more": False}
            lines = [json.dumps({**entry(len(content)), **row}) + "\n" for row in rows]
            return {"data": "".join(lines).encode(), "more": more}
        if verb == "stat":
            return {"path": b"/x", "kind": "directory", "size": 0, "mode": 0o755, "mtime": 1, "id": b"i"}
        return file(verb, args)

    return say


def entry(size: int) -> dict[str, Any]:
    return {"kind": "file", "size": size, "mode": 0o644, "mtime": 1, "id": "i"}


def all_there(path: Path) -> list[str]:
    return sorted(os.fspath(each.relative_to(path)) for each in path.rglob("*"))


def test_a_tree_whose_facts_have_no_end_is_refused(host: Host, liar: Liar, tmp_path: Path) -> None:
    liar.say = a_tree({"name": "a", "id": "i" * 20_000})
    code, said = host.pull("x", tmp_path / "inside")
    assert code == 1 and said.count("\n") == 1 and "says what can't be" in said
    assert all_there(tmp_path) == []


def test_a_tree_that_is_no_longer_one_at_its_end(host: Host, liar: Liar, tmp_path: Path) -> None:
    tree = a_tree({"name": "a"}, content=b"what is in it")
    asked: list[str] = []

    def say(verb: str, args: Mapping[str, Any]) -> dict[str, Any]:
        asked.append(verb)
        return {} if verb == "stat" and asked.count("stat") > 1 else tree(verb, args)

    liar.say = say
    code, said = host.pull("x", tmp_path / "inside")
    assert code == 0, said
    assert (tmp_path / "inside" / "a").read_bytes() == b"what is in it"


def test_an_honest_file_comes_without_set_uid(host: Host, liar: Liar, tmp_path: Path) -> None:
    liar.say = a_file(b"#!/bin/sh\n", mode=0o6755)
    code, said = host.pull("x", tmp_path)
    assert code == 0, said
    assert (tmp_path / "x").read_bytes() == b"#!/bin/sh\n"
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o755


@pytest.mark.parametrize("kind", [b"sha256", b"md5", b"crc\x1b", 7, None])
def test_the_digest_is_one_that_both_know(host: Host, liar: Liar, tmp_path: Path, kind: Any) -> None:
    honest, asked = a_file(b"x" * 10, digest=kind), []

    def say(verb: str, args: Mapping[str, Any]) -> dict[str, Any]:
        asked.extend([args["kind"]] if verb == "digest" else [])
        return honest(verb, args)

    liar.say = say
    assert host.pull("x", tmp_path)[0] == 0
    assert asked == [kind if kind in (b"sha256", b"md5") else b"sha256"]


@pytest.mark.parametrize(
    "name",
    ["..", ".", "", "a/b", "/etc/passwd", "../outside", "a\0b", "n" * 256, 5, None, "\ud800", ["x"]],
)
def test_a_name_that_leads_elsewhere_is_refused(host: Host, liar: Liar, tmp_path: Path, name: Any) -> None:
    liar.say = a_tree({"name": name}, content=b"bad")
    code, said = host.pull("x", tmp_path / "inside")
    assert code == 1 and said.count("\n") == 1 and "says what can't be" in said
    assert all_there(tmp_path) == []


@pytest.mark.parametrize(
    "rows",
    [
        [{"name": "a", "kind": "link", "target": ".."}, {"name": "a", "kind": "directory"}],
        [{"name": "a", "kind": "directory"}, {"name": "a", "kind": "link", "target": "/tmp"}],
        [{"name": "b"}, {"name": "a"}],
        [{"name": "a"}, {"name": "a"}],
        [{"name": "a", "size": -1}],
        [{"name": "a", "size": 2**63}],
        [{"name": "a", "size": "1"}],
        [{"name": "a", "mode": -1}],
        [{"name": "a", "mtime": 1e300}],
        [{"name": "a", "kind": "link"}],
        [{"name": "a", "kind": "link", "target": "a\0b"}],
    ],
)
def test_a_manifest_that_cannot_be_is_refused(
    host: Host, liar: Liar, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    liar.say = a_tree(*rows)
    code, said = host.pull("x", tmp_path / "inside")
    assert code == 1 and said.count("\n") == 1, said
    assert all_there(tmp_path) == []


def test_links_are_made_as_they_are_and_nothing_follows_them(host: Host, liar: Liar, tmp_path: Path) -> None:
    """A link that leads out of the destination, and one whose target is the destination's own name."""
    (tmp_path / "outside").mkdir()
    rows = [
        {"name": "a", "kind": "link", "target": os.fspath(tmp_path / "outside")},
        {"name": "b", "kind": "directory"},
        {"name": "c"},
        {"name": "d", "kind": "link", "target": os.fspath(tmp_path / "elsewhere")},
    ]
    liar.say = a_tree(*rows, content=b"c")
    code, said = host.pull("x", tmp_path / "inside")
    assert code == 0, said
    assert all_there(tmp_path) == ["inside", *(f"inside/{name}" for name in "abcd"), "outside"]
    assert (tmp_path / "inside" / "a").readlink() == tmp_path / "outside"


@pytest.mark.parametrize("endless", ["same page", "empty pages", "directories in directories"])
def test_a_tree_without_end_has_one_here(host: Host, liar: Liar, tmp_path: Path, endless: str) -> None:
    if endless == "same page":
        liar.say = a_tree({"name": "a"}, more=True)
    elif endless == "empty pages":
        liar.say = a_tree(more=True)
    else:

        def say(verb: str, args: Mapping[str, Any]) -> dict[str, Any]:
            if verb != "list":
                return file_facts(0, kind="directory")
            row = {**entry(0), "name": "d" * 200, "kind": "directory"}
            return {"data": json.dumps(row).encode(), "more": False}

        liar.say = say
    code, said = host.pull("x", tmp_path / "inside")
    assert code == 1 and said.count("\n") == 1, said
    assert all_there(tmp_path) == []


@pytest.mark.parametrize(
    ("verb", "result"),
    [
        ("read", {"at": 10, "pieces": [(0, b"x" * 20)]}),
        ("read", {"at": 10, "pieces": [(5, b"x" * 10)]}),
        ("read", {"at": 10, "pieces": [(0, b"x" * 5), (0, b"x" * 5)]}),
        ("read", {"at": 10, "pieces": [(5, b"x" * 5), (0, b"x" * 5)]}),
        ("read", {"at": 10, "pieces": [(0, b"")]}),
        ("read", {"at": 10, "pieces": [(2**62, b"x" * 10)]}),
        ("read", {"at": 10, "pieces": []}),
        ("read", {"at": 5, "pieces": [(0, b"x" * 5)]}),
        ("read", {"at": 0}),
        ("read", {"at": -1, "pieces": [(0, b"x" * 10)]}),
        ("read", {"pieces": [(0, b"x" * 10)]}),
        ("read", {}),
        ("digest", {"digest": b"wrong"}),
        ("digest", {"digest": None}),
        ("digest", {"digest": hashlib.sha256(b"x" * 10).digest(), "pieces": [(0, b"x" * 10)]}),
        ("digest", {}),
        ("stat", {"kind": "file"}),
        ("stat", {"kind": "\x1b[31m", "path": b"\x1b[31m"}),
        ("stat", {"kind": None, "path": b"x"}),
        ("stat", {"kind": "file", "path": b"x", "size": True, "mode": 0, "mtime": 0, "id": b""}),
    ],
)
def test_what_a_file_cannot_be_is_refused(
    host: Host, liar: Liar, tmp_path: Path, verb: str, result: dict[str, Any]
) -> None:
    honest = a_file(b"x" * 10)
    liar.say = lambda asked, args: dict(result) if asked == verb else honest(asked, args)
    (tmp_path / "x").write_bytes(b"the old one")
    code, said = host.pull("x", tmp_path)
    assert code == 1 and said.count("\n") == 1 and "\x1b" not in said, said
    assert (tmp_path / "x").read_bytes() == b"the old one"
    assert all_there(tmp_path) == ["x"]


def test_a_file_that_says_no_size_goes_on_where_the_session_ended(
    host: Host, liar: Liar, tmp_path: Path
) -> None:
    whole, cuts, asked = bytes(range(256)) * 200, [100, 40_000], []

    def say(verb: str, args: Mapping[str, Any]) -> dict[str, Any]:
        if verb != "read":
            return file_facts(0)
        start, end = args["offset"], args["end"]
        asked.append(start)
        if cuts and start < cuts[0] <= end:
            return {"pieces": [(start, whole[start : cuts[0]])], "cut": bool(cuts.pop(0))}
        return {
            "at": min(end, len(whole)),
            "pieces": [(start, whole[start:end])] if start < len(whole) else [],
        }

    liar.say = say
    code, said = host.pull("x", tmp_path)
    assert code == 0, said
    assert (tmp_path / "x").read_bytes() == whole
    assert asked[:2] == [0, 100] and 40_000 in asked


@pytest.mark.parametrize(
    "pieces", [[(0, b"")], [(1, b"x")], [(0, b"x"), (0, b"x")], [(0, b"x" * 31_744), (31_744, b"x")]]
)
def test_what_a_file_that_says_no_size_cannot_be_is_refused(
    host: Host, liar: Liar, tmp_path: Path, pieces: list[tuple[int, bytes]]
) -> None:
    liar.say = lambda verb, args: {"at": 0, "pieces": list(pieces)} if verb == "read" else file_facts(0)
    code, said = host.pull("x", tmp_path)
    assert code == 1 and "other bytes than were asked for" in said
    assert all_there(tmp_path) == []


def test_an_error_of_the_vms_is_shown_without_its_escapes(host: Host, liar: Liar, tmp_path: Path) -> None:
    def say(verb: str, args: Mapping[str, Any]) -> dict[str, Any]:
        raise Problem("/x: \x1b[2J gone\nvmr-host: all is well")

    liar.say = say
    code, said = host.pull("x", tmp_path)
    assert code == 1 and said.count("\n") == 1 and "\x1b" not in said


# --- the relay ---


def row(**other: Any) -> dict[str, Any]:
    return {"id": "ab" * 16, "ask": "stat", "args": {"path": "/x"}, **other}


class Passed:
    """A relay, what it sent to the guest, and what it told a command."""

    def __init__(self, *, online: bool = True) -> None:
        self.online = online
        self.room = 1_000
        self.sent: list[Any] = []
        self.heard: list[tuple[Any, ...]] = []
        self.relay = Relay(
            self._send, lambda *pieces: self.sent.append(pieces), lambda: self.online and self.room <= 0
        )

    def ask(self, data: bytes = b"", *, client: object = None, **other: Any) -> None:
        self.relay.ask(
            row(**other),
            data,
            lambda told, *data: self.heard.append((told, *data)),
            "it is offline",
            client=client,
        )

    def _send(self, message: messages.Message) -> bool:
        self.room -= 1
        self.sent.append(message)
        return self.online


ID = bytes.fromhex("ab" * 16)


def test_a_request_goes_out_and_its_reply_comes_back() -> None:
    passed = Passed()
    passed.ask(ask="stat", args={"path": "/\udcff"})
    assert passed.sent == [messages.Request(ID, "stat", {"path": b"/\xff"})]
    reply = messages.Reply(ID, True, "", {"path": b"\xfe", "n": 1, "data": b"raw"})
    assert passed.relay.take(reply) and not passed.relay.take(reply)
    result = {"path": "\udcfe", "n": 1}
    assert passed.heard == [({"id": "ab" * 16, "ok": True, "error": "", "result": result}, b"raw")]


def test_who_asks_again_over_another_connection_is_answered_and_so_is_the_old_one() -> None:
    passed = Passed()
    passed.ask(ask="stat", args={"path": "/x"}, client="old")
    passed.ask(ask="stat", args={"path": "/x"}, client="old")
    assert passed.heard == []
    passed.ask(ask="stat", args={"path": "/x"}, client="new")
    assert [(told["ok"], told.get("again")) for (told,) in passed.heard] == [(False, True)], "the old one"
    passed.relay.take(messages.Reply(ID, True, "", {}))
    assert [told["ok"] for told, *_ in passed.heard] == [False, True]


def test_bytes_for_what_takes_none_are_nothing() -> None:
    passed = Passed()
    passed.ask(b"data", ask="stat", args={"path": "/x"})
    assert passed.sent == [messages.Request(ID, "stat", {"path": b"/x"})]


def test_what_is_to_be_written_follows_its_request() -> None:
    passed = Passed()
    passed.ask(b"data", ask="write", args={"path": "/x", "offset": 3, "size": 7})
    assert passed.sent == [
        messages.Request(ID, "write", {"path": b"/x", "offset": 3, "size": 4}),
        (ID, 3, b"data"),
    ]
    passed.room = 0
    passed.ask(b"more", id="cd" * 16, ask="write", args={"path": "/x", "offset": 7})
    assert len(passed.sent) == 2
    passed.room = 1_000
    passed.relay.go_on()
    assert passed.sent[3] == (bytes.fromhex("cd" * 16), 7, b"more")


def test_pieces_are_told_together_as_far_as_they_follow_each_other_and_before_the_reply() -> None:
    passed = Passed()
    passed.ask(ask="read")
    for at, data in ((0, b"one"), (3, b"two"), (9, b"three")):
        passed.relay.piece(messages.Piece(ID, at, data))
    passed.relay.piece(messages.Piece(bytes(16), 14, b"nobody's"))
    told = {"id": "ab" * 16, "ok": True, "follows": True}
    assert passed.heard == [({**told, "at": 0}, b"one", b"two")]
    passed.relay.take(messages.Reply(ID, True, "", {"at": 14}))
    assert passed.heard[1] == ({**told, "at": 9}, b"three") and len(passed.heard) == 3
    passed.relay.piece(messages.Piece(ID, 14, b"late"))
    passed.relay.flush()
    assert len(passed.heard) == 3


def test_pieces_of_a_session_that_is_over_are_told_before_it() -> None:
    passed = Passed()
    passed.ask(ask="read")
    passed.relay.piece(messages.Piece(ID, 0, b"one"))
    passed.relay.ended("gone")
    passed.relay.flush()
    assert [told.get("again") for told, *_ in passed.heard] == [None, True]


def test_a_session_that_ends_while_it_is_asked_is_told_once() -> None:
    for sent in (True, False):
        passed = Passed(online=sent)
        send = passed._send

        def breaking(message: messages.Message, passed: Passed = passed, send: Any = send) -> bool:
            passed.relay.ended("it broke")
            return bool(send(message))

        passed.relay._send = breaking
        passed.ask()
        assert [(told["again"], told["error"]) for told, *_ in passed.heard] == [(True, "it broke")]


@pytest.mark.parametrize("when", ["offline", "ended"])
def test_what_cannot_be_answered_is_to_be_asked_again(when: str) -> None:
    passed = Passed(online=when == "ended")
    passed.ask()
    passed.relay.ended("it is offline")
    passed.relay.ended("again")
    again = {"id": "ab" * 16, "ok": False, "again": True, "error": "it is offline"}
    assert passed.heard == [(again,)]


def test_what_there_is_no_room_for_waits_in_its_order_and_goes_out_once() -> None:
    passed = Passed()
    passed.room = 0

    def sent() -> list[str]:
        return [each.request.hex()[:2] for each in passed.sent]

    for name in ("0a", "0b", "0c", "0b", "0d"):
        passed.ask(id=name * 16)
    assert sent() == []
    passed.room = 3
    passed.relay.go_on()
    assert sent() == ["0a", "0b", "0c"]
    passed.room = 1
    passed.ask(id="0e" * 16)
    assert sent()[3:] == [], "nobody overtakes"
    passed.relay.ended("it left")
    assert [told["id"][:2] for (told,) in passed.heard] == ["0a", "0b", "0c", "0d", "0e"]
    assert all(told["again"] for (told,) in passed.heard)
    passed.relay.go_on()
    assert sent()[3:] == []


@pytest.mark.parametrize(
    "odd",
    [
        {"ask": "rerun"},
        {"ask": None},
        {"ask": ["stat"]},
        {"args": None},
        {"args": {"path": ["x"]}},
        {"args": {"path": 1.5}},
        {"args": {"path": "\ud800"}},
        {"args": {"n": 2**70}},
        {"ask": "write"},
        {"ask": "write", "args": {"path": "x", "offset": -1}},
        {"ask": "write", "args": {"path": "x", "offset": True}},
        {"ask": "write", "args": {"path": "x", "offset": 2**63 - 1}},
        {"id": "zz"},
        {"id": "ab"},
        {"id": None},
    ],
)
def test_an_odd_request_of_a_client_is_a_problem_and_nothing_is_sent(odd: dict[str, Any]) -> None:
    passed = Passed()
    with pytest.raises(Problem):
        passed.ask(b"data", **odd)
    assert not passed.sent


def test_a_request_too_large_for_a_frame_is_a_problem() -> None:
    passed = Passed()
    with pytest.raises(Problem):
        passed.ask(args={"path": "x" * 33_000})
    assert not passed.sent
