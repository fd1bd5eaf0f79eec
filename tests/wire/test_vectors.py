"""The example conversations: our decoder reads each as `vectors.json` says, another reader reads ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.wire.vectors import make, reader
from vmr_agent.wire import framing, messages, session

HERE = Path(__file__).parent / "vectors"
VECTORS: dict[str, Any] = json.loads((HERE / "vectors.json").read_text())
BOTH = ("conversation-guest.bin", "conversation-host.bin")


def plain(value: Any) -> Any:
    """`{"hex": ...}` back to bytes, `{"hex": ..., "length": n}` too."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "hex" not in value:
        return {key: plain(item) for key, item in value.items()}
    data = bytes.fromhex(value["hex"])
    return (data * (value["length"] // len(data) + 1))[: value["length"]] if "length" in value else data


def lists(value: Any) -> Any:
    """Tuples as lists."""
    return [lists(item) for item in value] if isinstance(value, (tuple, list)) else value


def known(message: Any) -> dict[str, Any]:
    """A message as the vectors tell it, without its nils."""
    told = {name: lists(value) for name, value in message._asdict().items()}
    return {key: value for key, value in told.items() if value is not None}


def event(item: Any) -> Any:
    """What the decoder found, as the vectors tell it."""
    if isinstance(item, framing.Garbage):
        return {"garbage": item.length}
    try:
        envelope = messages.unpack(item)
    except messages.MalformedMessage as error:
        return {"malformed": {"to": error.to or None, "n": None if error.n < 0 else error.n}}
    except messages.Malformed:
        return {"malformed": {"to": None, "n": None}}
    address = {} if isinstance(envelope.message, messages.Hello) else {"to": envelope.to, "n": envelope.n}
    if isinstance(envelope.message, messages.Unknown):
        return {"unknown": {"type": envelope.message.type, **address}}
    kind = type(envelope.message).__name__.lower()
    return {"message": {"type": kind, **address, **known(envelope.message)}}


def told(event: Any) -> Any:
    """An event of vectors.json, as :func:`event` tells it."""
    ((what, content),) = event.items()
    if what == "malformed":
        return {what: {"to": plain(content["to"]), "n": content["n"]}}
    if what == "message":
        return {what: {key: value for key, value in plain(content).items() if value is not None}}
    if what == "unknown":
        return {what: {**plain(content), "type": content["type"][:64]}}
    return {what: content}


def joined(events: list[Any]) -> list[Any]:
    """Neighbouring garbage as one."""
    out: list[Any] = []
    for item in events:
        if "garbage" in item and out and "garbage" in out[-1]:
            item = {"garbage": out.pop()["garbage"] + item["garbage"]}
        out.append(item)
    return out


def read(data: bytes, size: int) -> tuple[list[Any], list[Any]]:
    """What our decoder finds at once, and what when time passes."""
    decoder = framing.Decoder()
    found = [item for at in range(0, len(data), size) for item in decoder.feed(data[at : at + size])]
    late: list[Any] = []
    while decoder.pending:
        late += decoder.expire()
    return joined([event(item) for item in found]), joined([event(item) for item in late])


def test_files_are_as_made() -> None:
    made = make.build()
    there = {path.name: path.read_bytes() for path in HERE.glob("*.bin")}
    there["vectors.json"] = (HERE / "vectors.json").read_bytes()
    assert there.keys() == made.keys()
    assert [name for name in made if made[name] != there[name]] == []


@pytest.mark.parametrize("size", [1 << 20, 4096, 333, 7, 1])
@pytest.mark.parametrize("name", VECTORS)
def test_our_decoder_reads_it(name: str, size: int) -> None:
    entry = VECTORS[name]
    found, late = read((HERE / name).read_bytes(), size)
    assert found == [told(item) for item in entry["events"]]
    assert late == [told(item) for item in entry.get("late", [])]


@pytest.mark.parametrize("name", VECTORS)
def test_independent_reader_finds_the_same_frames(name: str) -> None:
    data = (HERE / name).read_bytes()
    decoder = framing.Decoder()
    ours = decoder.feed(data)
    while decoder.pending:
        ours += decoder.expire()
    merged: list[Any] = []
    for item in ours:
        if isinstance(item, framing.Garbage):
            length = item.length
            merged.append(merged.pop() + length if merged and isinstance(merged[-1], int) else length)
        else:
            merged.append(item)
    assert merged == reader.frames(data)


@pytest.mark.parametrize("name", VECTORS)
def test_what_we_pack_reads_the_same(name: str) -> None:
    for item in VECTORS[name]["events"]:
        if "message" not in item:
            continue
        fields = plain(item["message"])
        cls = messages.TYPES[fields["type"]]
        names = [row[0] for row in messages.FIELDS[cls]]
        message = cls(**{key: fields.get(key) for key in names})
        address = {key: fields[key] for key in ("to", "n") if key in fields}
        framed = framing.encode(messages.pack(message, **address))
        (payload,) = reader.frames(framed)
        assert isinstance(payload, bytes)
        again = reader.payload_value(payload)
        assert {key: value for key, value in again.items() if value is not None} == {
            key: value for key, value in fields.items() if value is not None
        }


def test_every_message_and_every_optional_key_is_there() -> None:
    told_messages = [
        {key: value for key, value in item["message"].items() if value is not None}
        for entry in VECTORS.values()
        for item in entry["events"]
        if "message" in item
    ]
    for kind, cls in messages.TYPES.items():
        of_kind = [message for message in told_messages if message["type"] == kind]
        for name, _, optional, _ in messages.FIELDS[cls]:
            assert any(name in message for message in of_kind), f"no vector has {kind}.{name}"
            assert not optional or any(name not in message for message in of_kind), (
                f"{kind}.{name} is never nil"
            )


def test_conversation_is_told_in_turns() -> None:
    turns = sorted(turn for name in BOTH for turn in VECTORS[name]["turns"])
    assert turns == list(range(len(turns)))
    for name in BOTH:
        assert len(VECTORS[name]["turns"]) == len(VECTORS[name]["events"])


@pytest.mark.parametrize("role", session.Role)
def test_a_session_holds_the_conversation(role: session.Role) -> None:
    """Our session in the place of one side: it takes all the other says, and numbers its own frames alike."""
    turns: dict[int, tuple[str, Any]] = {}
    for name in BOTH:
        side = VECTORS[name]["from"]
        payloads = reader.frames((HERE / name).read_bytes())
        turns.update(zip(VECTORS[name]["turns"], ((side, payload) for payload in payloads)))
    ids = iter((make.GUEST, make.GUEST2) if role is session.Role.GUEST else (make.HOST,))
    end = session.Session(
        role,
        introduce=lambda mine, peer: messages.Hello(mine, peer, role.value, 1, "", 0),
        beat=lambda: messages.Heartbeat(0),
        make_id=lambda: next(ids),
    )
    end.connect(0)
    opened, hellos = 0, list[Any]()
    for turn, (side, payload) in sorted(turns.items()):
        envelope: Any = messages.unpack(payload)
        if side != role.value:
            events = end.receive(framing.encode(payload), turn / 100)
            opened += sum(isinstance(item, session.Opened) for item in events)
            if not isinstance(envelope.message, messages.Hello):
                assert events == [envelope.message]
        elif isinstance(envelope.message, messages.Hello):
            if envelope.message.id == make.GUEST2:
                end.renew(turn / 100, "as in the vector")
            hellos += [
                messages.unpack(item).message for item in map(bytes, reader.frames(b"".join(end.take())))
            ]
            hello = hellos.pop(0)
            assert (hello.id, hello.peer) == (envelope.message.id, envelope.message.peer)
        else:
            assert framing.Decoder().feed(end.frame(envelope.message)) == [
                messages.pack(**envelope._asdict())
            ]
    assert (opened, hellos, end.take(), end.counts) == (2, [], [], {})


def test_every_file_is_told() -> None:
    assert {path.name for path in HERE.glob("*.bin")} == set(VECTORS)
    assert all(entry["from"] in ("guest", "host") and entry["about"] for entry in VECTORS.values())
