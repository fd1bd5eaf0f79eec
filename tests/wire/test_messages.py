"""Messages packed and unpacked: each kind's whole range, and whatever else a payload may hold."""

from __future__ import annotations

import enum
import struct
import tracemalloc
from typing import Any, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.vectors import make, reader
from vmr_agent.wire import framing, messages
from vmr_agent.wire.messages import (
    FIELDS,
    MAX_BIN,
    MAX_INT,
    MAX_MAP,
    MAX_MARKS,
    MAX_TEXT,
    TYPES,
    Ack,
    Closed,
    Envelope,
    Heartbeat,
    Hello,
    Malformed,
    MalformedMessage,
    Output,
    Piece,
    Start,
    Unknown,
    Vmr,
    output_head,
    pack,
    piece_head,
    unpack,
)

TO = b"receiver"
RUN = bytes(range(16))

# --- what each kind can hold ---

uints = st.integers(0, MAX_INT) | st.sampled_from([0, 127, 128, 255, 256, 2**32 - 1, 2**32, MAX_INT])
ints = st.integers(-MAX_INT - 1, MAX_INT) | st.sampled_from([-1, -32, -33, -MAX_INT - 1, MAX_INT])
texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=60) | st.sampled_from(
    ["é" * 2048, "t" * MAX_TEXT]
)
bins = st.binary(max_size=300)
pairs = st.lists(st.tuples(uints, uints), max_size=20).map(tuple)
scalars = st.none() | st.booleans() | ints | texts | bins
GOOD: dict[str, st.SearchStrategy[Any]] = {
    "uint": uints,
    "int": ints,
    "bool": st.booleans(),
    "text": texts,
    "bin": bins,
    "bin8": st.binary(min_size=8, max_size=8),
    "bin16": st.binary(min_size=16, max_size=16),
    "name": st.binary(min_size=1, max_size=60) | st.sampled_from([b"n" * MAX_TEXT, b"\xff/\n"]),
    "map": st.dictionaries(texts, scalars, max_size=6),
    "marks": pairs,
    "tails": st.tuples(st.tuples(uints, uints), st.tuples(uints, uints)),
}
WRONG: dict[str, list[Any]] = {
    "uint": [-1, MAX_INT + 1, True, 1.0, "1", b"1", [], {}],
    "int": [MAX_INT + 1, -MAX_INT - 2, False, 0.0, "1", b"1", [1]],
    "bool": [0, 1, "true", b"", 1.0],
    "text": [b"text", 1, "t" * (MAX_TEXT + 1), "é" * 2049, "\udcff", "\ud800", []],
    "bin": ["text", 1, bytes(MAX_BIN + 1), bytearray(3), [1]],
    "bin8": [b"", bytes(7), bytes(9), "12345678", 8],
    "bin16": [b"", bytes(15), bytes(17), "0123456789abcdef", 16],
    "name": [b"", b"n" * (MAX_TEXT + 1), "name", 1],
    "map": [
        *([], "map", {1: 1}, {b"a": 1}, {"a": 1.0}, {"a": []}, {"a": {}}, {"a": MAX_INT + 1}),
        *({"a": "\udcff"}, {"\udcff": 1}, {str(n): n for n in range(MAX_MAP + 1)}),
    ],
    "marks": [
        *(1, "marks", {}, [1], [[1]], [[1, 2, 3]], [[-1, 0]], [[True, 0]], [[0, 1.0]]),
        [(0, 0)] * (MAX_MARKS + 1),
    ],
    "tails": [1, [], [(0, 0)], [(0, 0)] * 3, [(0, 0), (0, -1)], [(0, 0), (0, 0, 0)]],
}


def some(cls: Any) -> st.SearchStrategy[Any]:
    """Any good message of this class."""
    fields = {
        name: (st.none() | GOOD[kind]) if optional else GOOD[kind] for name, kind, optional, _ in FIELDS[cls]
    }
    return st.builds(cls, **fields)


def plainest(cls: Any) -> Any:
    """One good message of this class."""
    least = {
        "uint": 0,
        "int": 0,
        "bool": False,
        "text": "",
        "bin": b"",
        "bin8": bytes(8),
        "bin16": RUN,
        "name": b"n",
    }
    least.update({"map": {}, "marks": (), "tails": ((0, 0), (0, 0))})
    return cls(**{name: least[kind] for name, kind, _, _ in FIELDS[cls]})


def address(cls: Any, n: int = 7) -> dict[str, Any]:
    """What :func:`pack` needs besides."""
    return {} if cls is Hello else {"to": TO, "n": n}


def rows(payload: bytes) -> dict[str, Any]:
    """The payload as a map, by the independent reader."""
    value = reader.payload_value(payload)
    assert isinstance(value, dict)
    return value


classes = pytest.mark.parametrize("cls", TYPES.values(), ids=TYPES)


def test_every_kind_is_tried() -> None:
    assert set(GOOD) == set(WRONG) == set(messages.KINDS)


# --- there and back ---


@classes
@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=uints)
def test_there_and_back(cls: Any, data: st.DataObject, n: int) -> None:
    message = data.draw(some(cls))
    payload = pack(message, **address(cls, n))
    to, number = (b"", -1) if cls is Hello else (TO, n)
    assert unpack(payload) == Envelope(message, to, number)


@classes
def test_a_payload_is_a_map_the_page_tells(cls: Any) -> None:
    message = plainest(cls)
    row = rows(pack(message, **address(cls)))
    head = ["type"] if cls is Hello else ["type", "to", "n"]
    assert list(row) == head + list(cls._fields)
    assert row["type"] == cls.__name__.lower()


@classes
def test_nil_and_absent_mean_the_same(cls: Any) -> None:
    row = rows(pack(plainest(cls), **address(cls)))
    for name, kind, optional, _ in FIELDS[cls]:
        nil = make.pack({**row, name: None})
        absent = make.pack({key: value for key, value in row.items() if key != name})
        for payload in (nil, absent):
            if optional:
                assert getattr(unpack(payload).message, name) is None
            else:
                with pytest.raises(MalformedMessage, match=rf"{name} is no {kind}") as caught:
                    unpack(payload)
                assert (caught.value.to, caught.value.n) == ((b"", -1) if cls is Hello else (TO, 7))


@classes
def test_wrong_values(cls: Any) -> None:
    """Neither sent nor taken; what is refused still says whose number it used up."""
    message = plainest(cls)
    row = rows(pack(message, **address(cls)))
    for name, kind, _, _ in FIELDS[cls]:
        for value in WRONG[kind]:
            if value not in ([], {}):  # an empty tuple, list or map is the same to the one who packs
                with pytest.raises(Malformed):
                    pack(message._replace(**{name: value}), **address(cls))
            if too_strange(value):
                continue
            with pytest.raises(MalformedMessage) as caught:
                unpack(make.pack({**row, name: as_sent(value)}))
            assert (caught.value.to, caught.value.n) == ((b"", -1) if cls is Hello else (TO, 7))


def too_strange(value: Any) -> bool:
    """Whether MessagePack has no form for it, or a receiver may count it as garbage (section 2)."""
    if isinstance(value, int):
        return not -(2**63) <= value < 2**64
    if isinstance(value, dict):
        return len(value) > MAX_MAP or not all(isinstance(key, str) for key in value)
    if isinstance(value, list):
        return len(value) > MAX_MARKS
    return isinstance(value, bytearray) or (isinstance(value, bytes) and len(value) > MAX_BIN)


def as_sent(value: Any) -> Any:
    """For the writer of the vectors: a str with lone surrogates as the bytes they stand for."""
    if isinstance(value, str):
        return make.Raw(make.pack_str(value.encode("utf-8", "surrogatepass")))
    if isinstance(value, dict):
        pairs = b"".join(make.pack(as_sent(key)) + make.pack(as_sent(item)) for key, item in value.items())
        return make.Raw(make.head(len(value), 0x80, 15, 0xDE) + pairs)
    return value


@pytest.mark.parametrize("text", [b"\xff", b"a\xffb", b"\xc3", b"\xed\xa0\x80", b"\xed\xb3\xbf", b"\xc0\x80"])
def test_text_that_is_no_utf_8(text: bytes) -> None:
    raw = make.Raw(make.pack_str(text))
    closed = {"type": "closed", "to": TO, "n": 3, "run": RUN, "stdout": 1, "stderr": 2, "reason": ""}
    with pytest.raises(MalformedMessage) as caught:
        unpack(make.pack({**closed, "reason": raw}))
    assert (caught.value.to, caught.value.n) == (TO, 3)
    assert unpack(make.pack({**closed, "unknown": [raw]})) == Envelope(Closed(RUN, 1, 2, ""), TO, 3)
    with pytest.raises(Malformed) as refused:
        unpack(make.pack({**closed, "type": raw}))
    assert not isinstance(refused.value, MalformedMessage)


@pytest.mark.parametrize(
    "to, n", [(b"", 0), (bytes(7), 0), (bytes(9), 0), (TO, -1), (TO, True), (TO, MAX_INT + 1)]
)
def test_bad_addresses_are_not_sent(to: bytes, n: int) -> None:
    with pytest.raises(Malformed):
        pack(Start(0), to=to, n=n)


def test_an_enum_is_not_sent_by_accident() -> None:
    """Callers hand over values: what is packed must equal what is unpacked, in type too."""

    class Number(enum.IntEnum):
        ONE = 1

    with pytest.raises(Malformed):
        pack(Ack(RUN, Number.ONE, 0, 0), to=TO, n=0)


def test_unknown_is_never_sent() -> None:
    with pytest.raises(Malformed):
        pack(Unknown("x"), to=TO, n=0)


def test_a_message_may_be_longer_than_a_frame_and_then_does_not_fit() -> None:
    payload = pack(Output(RUN, 1, 0, False, ((MAX_BIN, 1),), bytes(MAX_BIN)), to=TO, n=0)
    with pytest.raises(ValueError):
        framing.encode(payload)


# --- the hot path ---


@given(
    run=GOOD["bin16"],
    stream=st.sampled_from([1, 2]),
    offset=uints,
    more=st.booleans(),
    sizes=st.lists(st.tuples(st.integers(0, 100), uints), max_size=40),
    n=uints,
    data=st.data(),
)
def test_output_head_means_what_pack_means(
    run: bytes,
    stream: int,
    offset: int,
    more: bool,
    sizes: list[tuple[int, int]],
    n: int,
    data: st.DataObject,
) -> None:
    length = sum(size for size, _ in sizes)
    content = data.draw(st.binary(min_size=length, max_size=length))
    marks = tuple(sizes)
    head = output_head(run, stream, offset, more, marks, len(content), to=TO, n=n)
    packed = pack(Output(run, stream, offset, more, marks, content), to=TO, n=n)
    assert unpack(head + content) == unpack(packed)
    assert rows(head + content) == rows(packed)
    assert list(rows(head + content)) == list(rows(packed))
    assert len(head) == messages.OUTPUT_HEAD + messages.OUTPUT_MARK * len(marks)


def slowly(payload: bytes) -> Any:
    """What comes of a payload read key by key."""
    quick = messages._unpack_output
    messages._unpack_output = lambda _: None
    try:
        return outcome(payload)
    finally:
        messages._unpack_output = quick


@settings(max_examples=1000, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.sampled_from((0, 1, MAX_INT, MAX_INT + 1))), max_size=3),
    n=st.sampled_from((0, 7, MAX_INT, MAX_INT + 1)),
    offset=st.sampled_from((0, 2**32, MAX_INT, MAX_INT + 1)),
    more=st.booleans(),
    length=st.integers(-2, 2),
    damage=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=2),
    cut=st.integers(0, 3),
)
def test_an_output_read_at_once_is_what_it_is_key_by_key(
    sizes: list[tuple[int, int]],
    n: int,
    offset: int,
    more: bool,
    length: int,
    damage: list[tuple[int, int]],
    cut: int,
) -> None:
    content = b"x" * sum(size for size, _ in sizes)
    said = max(0, len(content) + length)
    payload = bytearray(output_head(RUN, 1, offset, more, tuple(sizes), said, to=TO, n=n) + content)
    for at, byte in damage:
        payload[at % len(payload)] = byte
    whole = bytes(payload[: len(payload) - cut])
    got, expected = outcome(whole), slowly(whole)
    assert got == expected or (type(got), str(got)) == (type(expected), str(expected))


def test_what_fits_no_output_is_judged_key_by_key() -> None:
    """Longer than any frame, or with more marks than any array."""
    for marks, data in ((((70_000, 1),), bytes(70_000)), (((0, 1),) * (MAX_MARKS + 1), b"")):
        payload = output_head(RUN, 1, 0, False, marks, len(data) % 65_536, to=TO, n=0) + data
        assert isinstance(outcome(payload), Malformed)


def test_the_fullest_output_frames() -> None:
    """One read alone, and as many reads of a byte each as a frame has room for: fewer than MAX_MARKS."""
    room = framing.MAX_PAYLOAD - messages.OUTPUT_HEAD
    for count, each in ((1, room - messages.OUTPUT_MARK), (room // (messages.OUTPUT_MARK + 1), 1)):
        assert count <= MAX_MARKS
        marks = ((each, MAX_INT),) * count
        content = bytes(count * each)
        head = output_head(RUN, 2, MAX_INT, True, marks, len(content), to=TO, n=MAX_INT)
        (payload,) = framing.Decoder().feed(framing.encode(head, content))
        assert isinstance(payload, bytes)
        assert unpack(payload) == Envelope(Output(RUN, 2, MAX_INT, True, marks, content), TO, MAX_INT)


@given(request=GOOD["bin16"], at=uints, n=uints, data=bins)
def test_a_piece_by_its_head_is_what_pack_makes(request: bytes, at: int, n: int, data: bytes) -> None:
    payload = piece_head(request, at, len(data), to=TO, n=n) + data
    packed = pack(Piece(request, at, data), to=TO, n=n)
    assert unpack(payload) == unpack(packed) == Envelope(Piece(request, at, data), TO, n)
    assert list(rows(payload).items()) == list(rows(packed).items())


def test_the_fullest_piece_fits_into_a_frame() -> None:
    head = piece_head(RUN, MAX_INT, messages.PIECE, to=TO, n=MAX_INT)
    assert len(framing.encode(head, bytes(messages.PIECE))) <= framing.MAX_FRAME


# --- whatever comes ---


def outcome(payload: bytes) -> Any:
    """An Envelope or a Malformed; anything else is raised."""
    try:
        envelope = unpack(payload)
    except MalformedMessage as error:
        assert error.n == -1 or (len(error.to) == 8 and 0 <= error.n <= MAX_INT)
        assert len(str(error)) < 200
        return error
    except Malformed as error:
        assert len(str(error)) < 200
        return error
    assert isinstance(envelope, Envelope)
    return envelope


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(payload: bytes) -> None:
    outcome(payload)


@classes
@settings(deadline=None)
@given(data=st.data())
def test_damaged_messages(cls: Any, data: st.DataObject) -> None:
    payload = bytearray(pack(data.draw(some(cls)), **address(cls)))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    outcome(bytes(payload))


values = st.recursive(
    scalars | st.floats() | st.integers(MAX_INT, 2**64 - 1),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=10,
)
keys = st.sampled_from(sorted({"type", "to", "n"} | {row[0] for fields in FIELDS.values() for row in fields}))


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(sorted(TYPES)), st.dictionaries(keys, values, max_size=8))
def test_known_keys_with_any_value(kind: str, row: dict[str, Any]) -> None:
    got = outcome(make.pack(as_utf8({"to": TO, "n": 1, **row, "type": kind})))
    if "to" not in row and "n" not in row and kind != "hello":
        assert (got.to, got.n) == (TO, 1)


def as_utf8(value: Any) -> Any:
    """The same with each str made fit for the writer of the vectors."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [as_utf8(item) for item in value]
    if isinstance(value, dict):
        return {as_utf8(key): as_utf8(item) for key, item in value.items()}
    return value


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(max_codepoint=127), max_size=6).map("x-{}".format), values, max_size=6
    )
)
def test_unknown_keys_are_ignored(more: dict[str, Any]) -> None:
    row = {**as_utf8(more), "type": "heartbeat", "to": TO, "n": 5, "wall": 9}
    assert unpack(make.pack(row)) == Envelope(Heartbeat(9), TO, 5)


@given(
    st.text(st.characters(blacklist_categories=["Cs"]), max_size=100).filter(lambda name: name not in TYPES)
)
def test_unknown_types_use_up_their_number(name: str) -> None:
    assert unpack(make.pack({"type": name, "to": TO, "n": 2, "wall": "x"})) == Envelope(
        Unknown(name[:64]), TO, 2
    )


@pytest.mark.parametrize("name", ["Hello", "unknown", "envelope", "malformed", "__class__", "output\0", ""])
def test_types_are_the_twelve_names_only(name: str) -> None:
    assert unpack(make.pack({"type": name, "to": TO, "n": 0})) == Envelope(Unknown(name), TO, 0)


@pytest.mark.parametrize("size", range(0, 60))
def test_cut_short_at_every_byte(size: int) -> None:
    payload = pack(Vmr(b"-4/compress.py", "waiting", 0, ""), to=TO, n=0)
    assert size < len(payload)
    assert type(outcome(payload[:size])) is Malformed


# --- bombs ---

HEARTBEAT = {"type": "heartbeat", "to": TO, "n": 0, "wall": 1}
EXT_FORMS = [
    b"\xd4\x05x",
    b"\xd8\x05" + bytes(16),
    b"\xc7\x03\x05abc",
    b"\xc8\x00\x03\x05abc",
    b"\xc9\x00\x00\x00\x03\x05abc",
]
TIMESTAMPS = [
    b"\xd6\xff" + bytes(4),
    b"\xd7\xff" + b"\xff" * 8,
    b"\xc7\x0c\xff" + b"\xff" * 12,
    b"\xd4\xff\x00",
]
LENGTHS = [2**16, 10**6, 2**31 - 1, 2**31, 2**32 - 1]


def filled(piece: bytes) -> bytes:
    """A payload full of this."""
    return (piece * (MAX_BIN // len(piece) + 1))[:MAX_BIN]


def u32(code: int) -> Callable[[int], bytes]:
    """A value's head that claims a length."""
    return lambda length: bytes([code]) + struct.pack(">I", length)


BOMBS = {
    "nested arrays": filled(b"\x91"),
    "nested maps": filled(b"\x81\xa1a"),
    "nested maps as keys": filled(b"\x81"),
    "nested arrays that claim much": filled(b"\xdc\x08\x00"),
    "nested arrays that claim too much": filled(b"\xdd\x7f\xff\xff\xff"),
    "nested maps that claim much": filled(b"\xde\x01\x00\xa1a"),
    "an array of arrays": b"\xdc\x08\x00" + filled(b"\x90")[:-3],
    "1023 deep": b"\x91" * 1023 + b"\x00",
    "1025 deep": b"\x91" * 1025 + b"\x00",
    **{f"array of {n}": u32(0xDD)(n) for n in LENGTHS},
    **{f"map of {n}": u32(0xDF)(n) + filled(b"\xa1a\x01")[:-5] for n in LENGTHS},
    **{f"bin of {n}": u32(0xC6)(n) + bytes(100) for n in LENGTHS},
    **{f"str of {n}": u32(0xDB)(n) + bytes(100) for n in LENGTHS},
    **{f"ext of {n}": u32(0xC9)(n) + bytes(100) for n in LENGTHS},
}


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "in a message"])
@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str, wrapped: bool) -> None:
    bomb = BOMBS[name]
    payload = make.pack({**HEARTBEAT, "bomb": make.Raw(bomb)})[:MAX_BIN] if wrapped else bomb
    tracemalloc.start()
    try:
        got = outcome(payload)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert wrapped or isinstance(got, Malformed)
    assert peak < 32 << 20


def test_bombs_within_the_limits_are_only_unknown_keys() -> None:
    deep: Any = 0
    for _ in range(15):
        deep = [deep]
    row = {**HEARTBEAT, "deep": deep, "long": [0] * MAX_MARKS, "wide": {str(n): n for n in range(MAX_MAP)}}
    assert unpack(make.pack(row)) == Envelope(Heartbeat(1), TO, 0)


@pytest.mark.parametrize("ext", EXT_FORMS + TIMESTAMPS)
def test_ext_is_refused(ext: bytes) -> None:
    for row in ({**HEARTBEAT, "wall": make.Raw(ext)}, {**HEARTBEAT, "new": make.Raw(ext)}):
        assert type(outcome(make.pack(row))) is Malformed
    assert type(outcome(ext)) is Malformed


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan"), float("inf"), 1e300])
def test_floats_are_no_integers(value: float) -> None:
    for row in (
        {**HEARTBEAT, "wall": value},
        {**HEARTBEAT, "boottime": value},
        {**HEARTBEAT, "health": {"a": value}},
    ):
        assert isinstance(outcome(make.pack(row)), MalformedMessage)
    assert unpack(make.pack({**HEARTBEAT, "new": value})).message == Heartbeat(1)


@pytest.mark.parametrize("key", [1, None, True, 1.5, b"x", ["a"], {}])
def test_keys_that_are_no_str(key: Any) -> None:
    entries = make.pack(HEARTBEAT)[1:] + make.pack(key) + b"\x01"
    outcome(b"\x85" + entries)  # garbage or ignored, as a receiver likes


def test_a_frame_within_a_payload_is_refused() -> None:
    """A frame is MessagePack itself; it must not come back as a value."""
    assert type(outcome(framing.encode(make.pack(HEARTBEAT)))) is Malformed
