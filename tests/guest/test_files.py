"""The guest's half of a transfer: each verb, and each verb again, as after a lost session."""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import stat
import threading
import time
from pathlib import Path
from typing import Any, Optional, Union

import pytest

from vmr_agent.guest.files import Files
from vmr_agent.wire.messages import MAX_WRITE, PIECE, Piece, Reply, Request, pack


class Asking:
    """A `Files` and somebody who waits for its answers."""

    def __init__(self, launch: Path) -> None:
        self.files = Files(os.fsencode(launch))

    def reply(self, verb: str, request: bytes = b"", data: bytes = b"", **args: Any) -> Reply:
        """``data``: what a `write` is to write; what a `read` has read is in the result, as one."""
        if verb == "read":
            return self._read(Request(request or os.urandom(16), verb, args))
        if verb == "write":
            args.setdefault("size", len(data))
        asked = Request(request or os.urandom(16), verb, args)
        reply = self.files.do(asked)
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            reply = reply or self.files.piece(Piece(asked.request, args["offset"] + start, piece))
        self.files.go()
        while reply is None:
            assert select.select([self.files], [], [], 20.0)[0], f"{verb} is never answered"
            reply = next((each for each in self.files.take() if each.request == asked.request), None)
        pack(reply, to=bytes(8), n=0)  # whatever it is, it fits into a frame
        return reply

    def _read(self, asked: Request) -> Reply:
        *pieces, reply = self.files.read(asked)
        assert isinstance(reply, Reply) and reply.request == asked.request
        pack(reply, to=bytes(8), n=0)
        at, data = None, b""
        for piece in pieces:
            assert isinstance(piece, Piece) and piece.request == asked.request and piece.data
            assert at is None or at == piece.at, "a hole: look at the pieces themselves"
            at, data = piece.at + len(piece.data), data + piece.data
        return reply._replace(result={**reply.result, "data": data})

    def ask(self, verb: str, **args: Any) -> dict[str, Any]:
        reply = self.reply(verb, **args)
        assert reply.ok, reply.error
        return dict(reply.result)

    def refused(self, verb: str, **args: Any) -> str:
        reply = self.reply(verb, **args)
        assert not reply.ok and reply.error and "\n" not in reply.error
        return reply.error


@pytest.fixture
def launch(tmp_path: Path) -> Path:
    path = tmp_path / "launch"
    path.mkdir()
    return path


@pytest.fixture
def asking(launch: Path) -> Asking:
    return Asking(launch)


def raw(path: Union[Path, str]) -> bytes:
    return os.fsencode(path)


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


# --- out of the VM ---


def test_a_relative_path_is_one_in_the_launch_directory(asking: Asking, launch: Path) -> None:
    (launch / "-4" / "a").mkdir(parents=True)
    found = asking.ask("stat", path=b"-4/a")
    assert (found["kind"], found["path"]) == ("directory", raw(launch / "-4" / "a"))
    assert asking.ask("stat", path=b".")["path"] == raw(launch)
    assert asking.ask("stat", path=b"-4/nothing")["kind"] == "nothing"
    assert asking.ask("stat", path=b"/dev/null")["kind"] == "device"


def test_a_file_of_a_time_that_no_message_holds_has_the_nearest(asking: Asking, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    seconds = 330 * 31_557_600
    os.utime(path, (seconds, seconds))
    if path.stat().st_mtime != seconds:
        pytest.skip("its file system knows no such time")
    assert asking.ask("stat", path=raw(path))["mtime"] == 2**63 - 1


def test_read_gives_what_is_asked_for_and_says_where_data_are_after_a_hole(
    asking: Asking, tmp_path: Path
) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(b"begin")
        file.seek(8 << 20)
        file.write(b"end")
    hole = asking.ask("read", path=raw(path), offset=4 << 20, end=(4 << 20) + PIECE)
    assert hole == {"at": 8 << 20, "data": b""}
    assert asking.ask("read", path=raw(path), offset=(8 << 20) + 1, end=1 << 30)["data"] == b"nd"
    past = asking.ask("read", path=raw(path), offset=1 << 29, end=1 << 30)
    assert past == {"at": (8 << 20) + 3, "data": b""}
    *pieces, last = asking.files.read(
        Request(bytes(16), "read", {"path": raw(path), "offset": 0, "end": 1 << 30})
    )
    assert last == Reply(bytes(16), True, "", {"at": (8 << 20) + 3})
    first, second = (piece for piece in pieces if isinstance(piece, Piece))
    assert first.at == 0 and first.data[:6] == b"begin\0" and len(first.data) < 8 << 10
    assert (second.at, second.data) == (8 << 20, b"end")
    for kind in ("sha256", "md5"):
        digest = asking.ask("digest", path=raw(path), kind=kind.encode())["digest"]
        assert digest == hashlib.new(kind, path.read_bytes()).digest()


def test_read_is_done_part_by_part_and_the_file_closed_when_nobody_asks_on(
    asking: Asking, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(random.Random(1).randbytes(40 * PIECE + 5))
    open_before = len(os.listdir("/proc/self/fd"))
    assert asking.ask("read", path=raw(path), offset=7, end=40 * PIECE) == {
        "at": 40 * PIECE,
        "data": path.read_bytes()[7 : 40 * PIECE],
    }
    half = asking.files.read(Request(bytes(16), "read", {"path": raw(path), "offset": 0, "end": 40 * PIECE}))
    assert len(next(half).data) < 20 * PIECE  # type: ignore[union-attr]
    half.close()  # type: ignore[attr-defined]
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_file_that_changes_while_it_is_read_is_an_error(asking: Asking, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 5120)
    args = {"path": raw(path), "id": asking.ask("stat", path=raw(path))["id"], "offset": 0, "end": 1 << 30}
    replies = asking.files.read(Request(os.urandom(16), "read", args))
    assert isinstance(next(replies), Piece)
    with path.open("ab") as file:
        file.write(b"more")
    (last,) = replies
    assert isinstance(last, Reply) and not last.ok and "has changed meanwhile" in last.error


def test_a_file_that_changed_is_not_the_one_meant(asking: Asking, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    meant = asking.ask("stat", path=raw(path))["id"]
    assert asking.ask("read", path=raw(path), id=meant, offset=0, end=9)["data"] == b"one"
    with path.open("ab") as file:
        file.write(b"more")
    assert "has changed meanwhile" in asking.refused("read", path=raw(path), id=meant, offset=0, end=9)
    assert "has changed meanwhile" in asking.refused("digest", path=raw(path), id=meant, kind=b"md5")
    path.unlink()
    assert "No such file" in asking.refused("read", path=raw(path), id=meant, offset=0, end=9)


def test_what_is_no_file_is_named_and_never_waited_for(asking: Asking, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "named pipe"), (tmp_path, "directory"), ("/dev/zero", "device")):
        assert f"is a {kind}, not a file" in asking.refused("read", path=raw(path), offset=0, end=9)
        assert f"is a {kind}, not a file" in asking.refused("digest", path=raw(path), kind=b"md5")


def test_the_kernels_files_say_no_size_and_are_read_all_the_same(asking: Asking) -> None:
    assert asking.ask("stat", path=b"/proc/version")["size"] == 0
    found = asking.ask("read", path=b"/proc/version", offset=0, end=PIECE)["data"]
    assert found == Path("/proc/version").read_bytes()


def test_a_list_comes_in_pages_and_names_are_any_bytes(asking: Asking, tmp_path: Path) -> None:
    names = {b'\xff\n"odd"', b"-4", b"...", "é".encode(), *(b"n" * 200 + b"%d" % n for n in range(400))}
    for name in names:
        Path(os.fsdecode(raw(tmp_path) + b"/" + name)).touch()
    os.symlink(b"/no/\xfe", raw(tmp_path / "link"))
    found: dict[bytes, dict[str, Any]] = {}
    after, more, pages = b"", True, 0
    while more:
        page = asking.ask("list", path=raw(tmp_path), after=after)
        rows = [json.loads(line) for line in page["data"].splitlines()]
        found.update({os.fsencode(row["name"]): row for row in rows})
        after, more, pages = os.fsencode(rows[-1]["name"]), page["more"], pages + 1
    assert set(found) == names | {b"link", b"launch"} and pages > 1
    assert os.fsencode(found[b"link"]["target"]) == b"/no/\xfe"
    assert (found[b"launch"]["kind"], found[b"-4"]["kind"]) == ("directory", "file")


# --- into the VM ---


def send(asking: Asking, path: Path, data: bytes, **other: Any) -> None:
    part = raw(path.with_name(".x.part"))
    asking.ask("write", path=part, make=True, kind=b"sha256", offset=0, data=data)
    args = {
        "size": len(data),
        "mode": 0o640,
        "mtime": 1_000_000_007,
        "kind": b"sha256",
        "digest": sha256(data),
        **other,
    }
    asking.ask("place", path=raw(path), part=part, **args)


def test_a_file_gets_its_name_when_it_is_whole(asking: Asking, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    send(asking, path, b"new")
    assert path.read_bytes() == b"new"
    status = path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (0o640, 1_000_000_007)
    assert sorted(os.listdir(tmp_path)) == ["file", "launch"]


def test_what_arrived_wrong_leaves_the_old_one_and_nothing_else(asking: Asking, tmp_path: Path) -> None:
    path, part = tmp_path / "file", raw(tmp_path / ".x.part")
    path.write_bytes(b"old")
    asking.ask("write", path=part, make=True, kind=b"sha256", offset=0, data=b"new")
    args = {"size": 3, "mode": 0o644, "mtime": 0, "kind": b"sha256", "digest": sha256(b"other")}
    assert "the digests differ" in asking.refused("place", path=raw(path), part=part, **args)
    assert path.read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["file", "launch"]


def test_writes_and_place_repeated_change_nothing(asking: Asking, tmp_path: Path) -> None:
    """The answers of a whole session were lost: its last requests come again, some after the file has its name."""
    path, part = tmp_path / "file", raw(tmp_path / ".x.part")
    data = b"a" * PIECE + b"b"
    asks: list[tuple[str, dict[str, Any]]] = [
        ("write", {"path": part, "offset": 0, "data": data[:PIECE], "make": True, "kind": b"sha256"}),
        ("write", {"path": part, "offset": PIECE, "data": data[PIECE:]}),
        (
            "place",
            {
                "path": raw(path),
                "part": part,
                "size": len(data),
                "mode": 0o644,
                "mtime": 5,
                "kind": b"sha256",
                "digest": sha256(data),
            },
        ),
    ]
    for first in range(len(asks)):
        for verb, args in asks + asks[first:]:
            asking.ask(verb, **args)
        assert path.read_bytes() == data and sorted(os.listdir(tmp_path)) == ["file", "launch"]
        path.unlink()


Wrote = tuple[int, bytes]
WHOLE = random.Random(2).randbytes(6 * PIECE)
PARTS: list[Wrote] = [(at, WHOLE[at : at + 2 * PIECE]) for at in range(0, len(WHOLE), 2 * PIECE)]


@pytest.mark.parametrize(
    "writes",
    [
        PARTS,
        [*PARTS, *PARTS],
        [*PARTS[:2], *PARTS],
        [*PARTS[:2], *PARTS[1:]],
        [PARTS[0], (PIECE, WHOLE[PIECE : 3 * PIECE]), *PARTS[1:]],
        [PARTS[0], PARTS[2], PARTS[1]],
        PARTS[::-1],
    ],
    ids=[
        "once",
        "twice",
        "again from the start",
        "again in part",
        "overlapping",
        "out of order",
        "backwards",
    ],
)
@pytest.mark.parametrize("before", [None, b"", b"half of it was there", bytes(9 * PIECE)])
@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_whatever_is_repeated_what_is_placed_is_what_was_sent(
    asking: Asking, tmp_path: Path, writes: list[Wrote], before: Optional[bytes], kind: str
) -> None:
    """In order into an empty file its digest is known without reading it; else it is read."""
    path, part = tmp_path / "file", tmp_path / ".x.part"
    if before is not None:
        part.write_bytes(before)
        part.chmod(0o600)
    asking.ask("write", path=raw(part), make=True, offset=0, kind=kind.encode())
    for offset, data in writes:
        asking.ask("write", path=raw(part), offset=offset, data=data)
    digest = hashlib.new(kind, WHOLE).digest()
    args = {"path": raw(path), "part": raw(part), "size": len(WHOLE), "mode": 0o644, "mtime": 5}
    asking.ask("place", **args, kind=kind.encode(), digest=digest)
    assert path.read_bytes() == WHOLE


@pytest.mark.parametrize("what", ["missing", "another's", "longer", "replaced", "overwritten"])
def test_what_was_not_sent_is_never_placed(asking: Asking, tmp_path: Path, what: str) -> None:
    path, part = tmp_path / "file", tmp_path / ".x.part"
    asking.ask("write", path=raw(part), make=True, offset=0, kind=b"sha256")
    for offset, data in PARTS[: 2 if what == "missing" else 3]:
        asking.ask("write", path=raw(part), offset=offset, data=data)
    if what == "another's":
        part.write_bytes(b"x" * 7)
    elif what == "longer":
        with part.open("ab") as file:
            file.write(b"more")
    elif what == "overwritten":
        time.sleep(0.02)  # more than a tick of the kernel's clock
        with part.open("r+b") as file:
            file.write(b"EVIL")
    elif what == "replaced":
        part.rename(tmp_path / "away")
        part.write_bytes(bytes(len(WHOLE)))
    size = len(WHOLE) + (4 if what == "longer" else 0)
    args = {"path": raw(path), "part": raw(part), "size": size, "mode": 0o644, "mtime": 5}
    digest = sha256(WHOLE + bytes(size - len(WHOLE)))
    assert "the digests differ" in asking.refused("place", **args, kind=b"sha256", digest=digest)
    assert not path.exists() and not part.exists()


def test_a_file_with_holes_and_many_files_at_once(asking: Asking, tmp_path: Path) -> None:
    """More of them than digests are kept of."""
    whole = b"one" + bytes(3 * PIECE) + b"two" + bytes(PIECE)
    parts = [raw(tmp_path / f".{number}.part") for number in range(12)]
    for part in parts:
        asking.ask("write", path=part, make=True, offset=0, kind=b"md5")
    for offset, data in ((0, b"one"), (3 + 3 * PIECE, b"two")):
        for part in parts:
            asking.ask("write", path=part, offset=offset, data=data)
    for part in parts:
        args = {"path": part[:-5], "part": part, "size": len(whole), "mode": 0o644, "mtime": 5}
        asking.ask("place", **args, kind=b"md5", digest=hashlib.md5(whole).digest())
        assert Path(os.fsdecode(part[:-5])).read_bytes() == whole


def test_a_write_is_done_when_all_of_it_has_come_and_not_in_the_next_session(
    asking: Asking, tmp_path: Path
) -> None:
    part = raw(tmp_path / ".x.part")
    asking.ask("write", path=part, make=True, offset=0, kind=b"md5")
    asked = Request(b"w" * 16, "write", {"path": part, "offset": 0, "size": 2 * PIECE})
    first, second = (Piece(asked.request, at, bytes([at % 7]) * PIECE) for at in (0, PIECE))

    def said() -> list[Reply]:
        asking.files.go()
        select.select([asking.files], [], [], 0.2)
        return asking.files.take()

    assert asking.files.do(asked) is None and asking.files.piece(first) is None and said() == []
    asking.files.forget()
    assert asking.files.piece(second) is None and said() == []
    assert asking.files.do(asked) is None
    for piece in (first, second):
        assert asking.files.piece(piece) is None
    assert asking.files.do(asked) is None  # repeated while it is under way, with all its pieces
    for piece in (first, second):
        assert asking.files.piece(piece) is None
    assert [(reply.request, reply.ok) for reply in said()] == [(asked.request, True)]
    assert Path(os.fsdecode(part)).read_bytes() == first.data + second.data


@pytest.mark.parametrize("at, length", [(1, 1), (0, 11), (2**62, 10)])
def test_pieces_of_something_else_are_refused_once(
    asking: Asking, tmp_path: Path, at: int, length: int
) -> None:
    asked = Request(b"w" * 16, "write", {"path": raw(tmp_path / ".x.part"), "offset": 0, "size": 10})
    assert asking.files.do(asked) is None
    refusal = asking.files.piece(Piece(asked.request, at, bytes(length)))
    assert refusal is not None and not refusal.ok and "other bytes come" in refusal.error
    assert asking.files.piece(Piece(asked.request, 0, bytes(10))) is None
    assert os.listdir(tmp_path) == ["launch"]


def test_no_more_is_taken_at_once_than_has_room(asking: Asking, tmp_path: Path) -> None:
    path = raw(tmp_path / ".x.part")
    assert "bytes at once" in asking.refused("write", path=path, offset=0, size=MAX_WRITE + 1, make=True)
    asking.ask("write", path=path, offset=0, data=bytes(MAX_WRITE), make=True, kind=b"md5")
    assert "no kind of digest" in asking.refused("digest", path=path, kind=b"crc32")


def test_a_write_that_comes_too_late_makes_no_file(asking: Asking, tmp_path: Path) -> None:
    """The host gave up and removed the part, while writes it had asked for were still on their way."""
    asking.ask("write", path=raw(tmp_path / ".x.part"), make=True, kind=b"sha256", offset=0, data=b"")
    asking.ask("remove", path=raw(tmp_path / ".x.part"))
    asking.ask("write", path=raw(tmp_path / ".x.part"), offset=5, data=b"late")
    assert os.listdir(tmp_path) == ["launch"]


def test_nothing_is_written_through_a_link_or_into_a_device(asking: Asking, tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"safe")
    (tmp_path / ".x.part").symlink_to("victim")
    asking.refused("write", path=raw(tmp_path / ".x.part"), make=True, kind=b"sha256", offset=0, data=b"bad")
    assert (tmp_path / "victim").read_bytes() == b"safe"
    os.mkfifo(tmp_path / ".y.part")
    asking.refused("write", path=raw(tmp_path / ".y.part"), make=True, kind=b"sha256", offset=0, data=b"bad")


def test_a_tree_is_made_and_named_also_when_asked_twice(asking: Asking, tmp_path: Path) -> None:
    part, path = tmp_path / ".t.part", tmp_path / "tree"
    for _ in range(2):
        asking.ask("mkdir", path=raw(part))
        asking.ask("mkdir", path=raw(part / "d"))
        asking.ask("link", path=raw(part / "l"), target=b"/etc")
        top = asking.ask("mkdir", path=raw(part), mode=0o750, mtime=7_000_000_000)
    asking.refused("link", path=raw(part / "l"), target=b"/other")
    for _ in range(2):
        asking.ask("rename", path=raw(path), part=raw(part), id=top["id"])
    assert sorted(os.listdir(path)) == ["d", "l"] and (path / "l").readlink() == Path("/etc")
    status = path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (0o750, 7_000_000_000)


def test_a_tree_replaces_no_tree(asking: Asking, tmp_path: Path) -> None:
    (tmp_path / "tree" / "precious").mkdir(parents=True)
    made = asking.ask("mkdir", path=raw(tmp_path / ".t.part"))
    asking.refused("rename", path=raw(tmp_path / "tree"), part=raw(tmp_path / ".t.part"), id=made["id"])
    assert (tmp_path / "tree" / "precious").is_dir()


def test_only_half_transfers_are_removed(asking: Asking, tmp_path: Path) -> None:
    (tmp_path / ".t.part" / "d").mkdir(parents=True)
    (tmp_path / ".f.part").touch()
    (tmp_path / ".keep").touch()
    for name in (".t.part", ".f.part", ".f.part"):
        asking.ask("remove", path=raw(tmp_path / name))
    asking.refused("remove", path=raw(tmp_path / ".keep"))
    asking.refused("remove", path=raw(tmp_path / "launch"))
    assert sorted(os.listdir(tmp_path)) == [".keep", "launch"]


# --- staging ---


def prepare(launch: Path, *vmrs: str) -> bytes:
    part = launch / ".stage.part"
    for vmr in vmrs:
        (part / vmr).mkdir(parents=True)
        (part / vmr / "call_arguments.sh").touch(0o755)
    return raw(part)


def test_staging_moves_every_vmr_and_asked_twice_none(asking: Asking, launch: Path) -> None:
    (launch / "-4" / "there").mkdir(parents=True)
    part = prepare(launch, "-4/a", "-10/b", "5.5/c")
    assert asking.ask("stage", path=part)["staged"] == 3
    assert asking.ask("stage", path=part)["staged"] == 0
    found = sorted(os.fspath(path.relative_to(launch)) for path in launch.glob("*/*"))
    assert found == ["-10/b", "-4/a", "-4/there", "5.5/c"]
    assert not (launch / ".stage.part").exists()


def test_staging_is_all_or_nothing(asking: Asking, launch: Path) -> None:
    (launch / "5" / "c").mkdir(parents=True)
    part = prepare(launch, "-4/a", "5/c")
    assert "5/c: is staged already" in asking.refused("stage", path=part)
    assert not (launch / "-4").exists()
    (launch / "5" / "c").rmdir()
    prepare(launch, "04/a")
    assert "no VMR's name" in asking.refused("stage", path=part)
    assert not (launch / "-4").exists()


# --- requests ---


def test_a_slow_request_that_is_repeated_meanwhile_is_done_once(asking: Asking, tmp_path: Path) -> None:
    gate = threading.Event()
    done: list[object] = []

    def slow(args: object) -> dict[str, Any]:
        gate.wait(20)
        done.append(args)
        return {}

    asking.files._in_any_order = {**asking.files._in_any_order, "sync": slow}
    request = Request(b"r" * 16, "sync", {})
    assert asking.files.do(request) is None and asking.files.do(request) is None
    gate.set()
    answers: list[Reply] = []
    while not answers:
        assert select.select([asking.files], [], [], 20.0)[0]
        answers = asking.files.take()
    assert asking.reply("sync").ok
    assert len(answers) == 1 and len(done) == 2  # that one, and the one asked last


def test_without_a_thread_requests_are_refused_and_done_when_there_can_be_one(
    asking: Asking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that forks until nobody can have another process must not end the daemon."""
    written = {"path": raw(tmp_path / "file"), "offset": 0, "make": True, "kind": b"sha256"}

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    for verb in ("stat", "list", "write"):
        args = written if verb == "write" else {"path": raw(tmp_path), "after": b""}
        assert "can't start new thread" in asking.refused(verb, **args)
    monkeypatch.undo()
    assert asking.ask("stat", path=raw(tmp_path))["kind"] == "directory"
    asking.ask("write", **written)
    assert (tmp_path / "file").exists()


def test_many_slow_requests_are_all_answered(asking: Asking, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    waiting = {bytes([n]) * 16 for n in range(200)}
    for request in waiting:
        assert (
            asking.files.do(Request(request, "digest", {"path": raw(tmp_path / "file"), "kind": b"md5"}))
            is None
        )
    while waiting:
        assert select.select([asking.files], [], [], 20.0)[0]
        waiting -= {reply.request for reply in asking.files.take()}


def test_stat_waits_for_no_digest(asking: Asking, tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    args = {"path": raw(path), "kind": b"sha256"}
    digests = {bytes([n]) * 16 for n in range(40)}
    for request in digests:
        assert asking.files.do(Request(request, "digest", args)) is None
    stat_request = bytes([99]) * 16
    assert asking.files.do(Request(stat_request, "stat", {"path": raw(path)})) is None
    answered: list[bytes] = []
    while stat_request not in answered:
        assert select.select([asking.files], [], [], 20.0)[0]
        answered += [reply.request for reply in asking.files.take()]
    assert len(answered) < 30
    while len(answered) <= len(digests):
        assert select.select([asking.files], [], [], 20.0)[0]
        answered += [reply.request for reply in asking.files.take()]


@pytest.mark.parametrize(
    "verb", ["stat", "read", "write", "place", "list", "mkdir", "link", "stage", "remove"]
)
@pytest.mark.parametrize(
    "args",
    [
        {},
        {"path": 5},
        {"path": b"a\0b", "offset": 0, "end": 1, "after": b"", "target": b"x", "size": 0},
        {"path": b"x", "offset": -1, "end": "1", "size": None, "after": 0, "target": 1, "part": b"x"},
        {
            "path": b"x" * 300,
            "offset": 2**63 - 1,
            "end": 2**63 - 1,
            "size": 0,
            "kind": b"x",
            "after": b"",
            "target": b"",
        },
        {"path": b"x", "offset": 0, "end": 2**63 - 1, "size": 0, "make": True, "kind": 1},
    ],
)
def test_no_odd_request_is_more_than_an_error(asking: Asking, verb: str, args: dict[str, Any]) -> None:
    reply = asking.reply(verb, **args)
    assert reply.ok == (not reply.error)
