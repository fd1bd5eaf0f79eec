"""What lives here: one class per message, and payloads packed and unpacked.

The only importer of msgpack. It must not know: frames, sessions, what a message makes anybody do.
`PROTOCOL.md` is the agreement; the kinds below are its kinds, and a test holds its tables against these
classes. Named tuples, for dataclasses take the guest 2 MB and, in a slow VM, a third of a second to make.
Over 400 lines: thirteen messages, each with its fields, are read as one list.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Annotated, Any, Callable, NamedTuple, Optional, Union, get_args, get_origin, get_type_hints

import msgpack

MAX_BIN = 32_755  # the largest payload there can be: PROTOCOL.md section 1
MAX_TEXT = 4_096  # PATH_MAX: no name Linux takes is longer, and no sentence should be
MAX_MARKS = 2_048  # items of any array; more reads, a byte each, fit into no frame
MAX_MAP = 256  # keys of any map
MAX_INT = 2**63 - 1
PIECE = 31 * 1024  # bytes of a file in one frame: with all else in it, they fit
MAX_WRITE = 16 * PIECE  # bytes of a file in one request


class Malformed(ValueError):
    """A payload that is no message of this protocol; counted and skipped."""


# --- kinds ----------------------------------------------------------------------------------------


def _uint(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_INT


def _int(value: Any) -> bool:
    return type(value) is int and -MAX_INT - 1 <= value <= MAX_INT


def _bool(value: Any) -> bool:
    return type(value) is bool


def _text(value: Any) -> bool:
    return _str(value) and len(value) <= MAX_TEXT and len(value.encode()) <= MAX_TEXT


def _str(value: Any) -> bool:
    if type(value) is not str:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # it was no UTF-8: unpack lets such bytes through as lone surrogates
        return False
    return True


def _bin(value: Any) -> bool:
    return type(value) is bytes and len(value) <= MAX_BIN


def _bin8(value: Any) -> bool:
    return type(value) is bytes and len(value) == 8


def _bin16(value: Any) -> bool:
    return type(value) is bytes and len(value) == 16


def _name(value: Any) -> bool:
    return type(value) is bytes and 1 <= len(value) <= MAX_TEXT


def _map(value: Any) -> bool:
    return (
        type(value) is dict
        and len(value) <= MAX_MAP
        and all(
            _str(key) and (item is None or type(item) in (bool, bytes) or _int(item) or _str(item))
            for key, item in value.items()
        )
    )


def _pairs(value: Any) -> bool:
    return (
        type(value) is tuple
        and len(value) <= MAX_MARKS
        and all(
            type(pair) is tuple and len(pair) == 2 and _uint(pair[0]) and _uint(pair[1]) for pair in value
        )
    )


def _tails(value: Any) -> bool:
    return _pairs(value) and len(value) == 2


KINDS: Mapping[str, Callable[[Any], bool]] = {
    "uint": _uint,
    "int": _int,
    "bool": _bool,
    "text": _text,
    "bin": _bin,
    "bin8": _bin8,
    "bin16": _bin16,
    "name": _name,
    "map": _map,
    "marks": _pairs,
    "tails": _tails,
}


Scalar = Union[None, bool, int, str, bytes]
Pairs = tuple[tuple[int, int], ...]

# What a field is annotated with: what it is in Python, and which kind it is on the wire.
Uint = Annotated[int, "uint"]
Int = Annotated[int, "int"]
Bool = Annotated[bool, "bool"]
Text = Annotated[str, "text"]
Bin = Annotated[bytes, "bin"]
Bin8 = Annotated[bytes, "bin8"]
Bin16 = Annotated[bytes, "bin16"]
Name = Annotated[bytes, "name"]
Map = Annotated[Mapping[str, Scalar], "map"]
Marks = Annotated[Pairs, "marks"]
Tails = Annotated[Pairs, "tails"]

# --- messages -------------------------------------------------------------------------------------


class Hello(NamedTuple):
    """Opens a session. From ``spool`` on the fields are the guest's; ``since_zero`` < 0 before time zero."""

    id: Bin8
    peer: Optional[Bin8]
    role: Text
    protocol: Uint
    version: Text
    wall: Uint
    spool: Optional[Bin16] = None
    boot: Optional[Text] = None
    machine: Optional[Text] = None
    hostname: Optional[Bin] = None
    boottime: Optional[Uint] = None
    configured: Optional[Bool] = None
    since_zero: Optional[Int] = None
    zero_by: Optional[Text] = None


class Heartbeat(NamedTuple):
    """Shows that the sender is there. All but ``wall`` is the guest's."""

    wall: Uint
    boottime: Optional[Uint] = None
    configured: Optional[Bool] = None
    since_zero: Optional[Int] = None
    zero_by: Optional[Text] = None
    health: Optional[Map] = None


class Vmr(NamedTuple):
    """One row of the guest's table; ``vmr`` nil is the mark that ends a session's first round."""

    vmr: Optional[Name]
    state: Text
    attempt: Uint
    reason: Text
    changed: Optional[Bool] = None


class Run(NamedTuple):
    """A run that has begun; answered by :class:`Ack`."""

    run: Bin16
    vmr: Name
    attempt: Uint
    trigger: Text
    request: Bin
    script: Name
    boot: Text
    pid: Uint
    started: Uint
    ended: Optional[Uint] = None


class Output(NamedTuple):
    """Bytes of one stream from ``offset``; ``marks``: (length, wall ns) of the reads joined in ``data``."""

    run: Bin16
    stream: Uint
    offset: Uint
    more: Bool
    marks: Marks
    data: Bin


class Gap(NamedTuple):
    """``length`` bytes from ``offset`` that will never come."""

    run: Bin16
    stream: Uint
    offset: Uint
    length: Uint
    reason: Text
    wall: Optional[Uint] = None


class Exit(NamedTuple):
    """How a run ended. Times: ns; ``max_rss``: bytes; ``ending``: :class:`vmr_agent.runs.Ending`'s value."""

    run: Bin16
    ending: Text
    value: Uint
    text: Text
    started: Uint
    ended: Uint
    started_boottime: Uint
    ended_boottime: Uint
    boot: Text
    stdout: Uint
    stderr: Uint
    user: Uint
    system: Uint
    max_rss: Uint
    asks_reboot: Bool


class Closed(NamedTuple):
    """No byte will follow; the final lengths."""

    run: Bin16
    stdout: Uint
    stderr: Uint
    reason: Text


class Ack(NamedTuple):
    """What of a run the host holds durably; ``state`` is a value of :class:`vmr_agent.runs.RunState`."""

    run: Bin16
    state: Uint
    stdout: Uint
    stderr: Uint
    tails: Optional[Tails] = None


class Start(NamedTuple):
    """Time zero is ``delay`` ns from now."""

    delay: Int


class Request(NamedTuple):
    """Asks for something by ``verb``; answered by :class:`Reply`."""

    request: Bin16
    verb: Text
    args: Map


class Reply(NamedTuple):
    """The answer to a :class:`Request`."""

    request: Bin16
    ok: Bool
    error: Text
    result: Map


class Piece(NamedTuple):
    """Bytes of a file from ``at``: part of the answer to a :class:`Request`, or of what it asks to write."""

    request: Bin16
    at: Uint
    data: Bin


class Unknown(NamedTuple):
    """A message of a type this version doesn't know; counted and skipped. Never sent."""

    type: str


Message = Union[
    Hello, Heartbeat, Vmr, Run, Output, Gap, Exit, Closed, Ack, Start, Request, Reply, Piece, Unknown
]

TYPES: Mapping[str, Any] = {
    cls.__name__.lower(): cls
    for cls in (Hello, Heartbeat, Vmr, Run, Output, Gap, Exit, Closed, Ack, Start, Request, Reply, Piece)
}


def _fields(cls: Any) -> tuple[tuple[str, str, bool, Callable[[Any], bool]], ...]:
    rows = []
    for name, hint in get_type_hints(cls, include_extras=True).items():
        optional = get_origin(hint) is Union
        kind = (get_args(hint)[0] if optional else hint).__metadata__[0]
        rows.append((name, kind, optional, KINDS[kind]))
    return tuple(rows)


FIELDS: Mapping[Any, tuple[tuple[str, str, bool, Callable[[Any], bool]], ...]] = {
    cls: _fields(cls) for cls in TYPES.values()
}
"""For each message class its fields: (name, kind, may be nil, check)."""


def text(value: str) -> str:
    """``value`` as a ``text`` may be: valid UTF-8 and short. For sentences that quote what others made."""
    return value.encode("utf-8", "backslashreplace")[: MAX_TEXT - 4].decode("utf-8", "ignore")


# --- packing --------------------------------------------------------------------------------------


class Envelope(NamedTuple):
    """A message and what the session needs to place it; ``to`` is empty and ``n`` -1 for a Hello."""

    message: Message
    to: bytes
    n: int


def pack(message: Message, *, to: bytes = b"", n: int = -1) -> bytes:
    """The payload of a message. ``to`` and ``n`` are left out for a Hello.

    Raises Malformed when a field, `to` or `n` holds what its kind does not allow.
    """
    cls = type(message)
    if cls is Unknown:
        raise Malformed("an unknown message can't be packed")
    payload: dict[str, Any] = {"type": cls.__name__.lower()}
    if cls is not Hello:
        if not _bin8(to) or not _uint(n):
            raise Malformed(f"{payload['type']}: no to or n")
        payload["to"] = to
        payload["n"] = n
    for (name, kind, optional, check), value in zip(FIELDS[cls], message):
        if not check(value) and not (value is None and optional):
            value = _made(kind, value)
            if not check(value):
                raise Malformed(f"{payload['type']}: {name} is no {kind}")
        payload[name] = value
    packed: bytes = msgpack.packb(payload, use_bin_type=True)
    return packed


def _made(kind: str, value: Any) -> Any:
    """What was meant for this kind, made into what it is on the wire: a list for a tuple, any mapping for a dict."""
    try:
        if kind in ("marks", "tails"):
            return tuple(map(tuple, value))
        return dict(value) if kind == "map" else None
    except (TypeError, ValueError):
        return None


def unpack(payload: bytes) -> Envelope:
    """The message in a payload whose frame was whole. Raises Malformed, and nothing else, for what is none.

    Raises :class:`MalformedMessage` where ``to`` and ``n`` could still be read: that frame used up its ``n``.
    """
    envelope = _unpack_output(payload) if payload.startswith(_OUTPUT_START) else None
    if envelope is not None:
        return envelope
    try:
        row = msgpack.unpackb(
            payload,
            raw=False,
            unicode_errors="surrogateescape",  # one bad str must not hide `to` and `n`
            strict_map_key=True,
            use_list=False,  # arrays are as the messages have them
            max_str_len=MAX_BIN,
            max_bin_len=MAX_BIN,
            max_array_len=MAX_MARKS,
            max_map_len=MAX_MAP,
            max_ext_len=0,
        )
    except RecursionError:
        raise Malformed("nested too deep") from None
    except Exception as error:  # msgpack raises ValueError, its own classes, TypeError, struct.error …
        raise Malformed(f"no MessagePack: {type(error).__name__}") from None
    kind_of_message: Any = row.get("type") if type(row) is dict else None
    cls = TYPES.get(kind_of_message) if type(kind_of_message) is str else None
    if cls is None and not _text(kind_of_message):
        raise Malformed("no map with a type")
    to: Any = b""
    n: Any = -1
    if kind_of_message != "hello":
        to, n = row.get("to"), row.get("n")
        if not _bin8(to) or not _uint(n):
            raise Malformed("no to or n")
    if cls is None:
        return Envelope(Unknown(kind_of_message[:64]), to, n)
    values = []
    for name, kind, optional, check in FIELDS[cls]:
        value = row.get(name)
        if not check(value) and not (value is None and optional):
            raise MalformedMessage(f"{kind_of_message}: {name} is no {kind}", to, n)
        values.append(value)
    return Envelope(cls(*values), to, n)


class MalformedMessage(Malformed):
    """A message of a known type with a field missing or of the wrong kind."""

    def __init__(self, sentence: str, to: bytes, n: int) -> None:
        super().__init__(sentence)
        self.to = to
        self.n = n


# The hot path. An Output's map is packed by hand, so that `data`, last and largest, is never copied into a
# packer: the head below plus the bytes as they lie in the spool are the payload. MessagePack: 0x89 is a map
# of nine, 0xA? a short str, C4 bin 8, C5 bin 16, CF uint 64, DC array 16, 92 an array of two.
_OUTPUT = struct.Struct(">18s8s3sQ6s16s7sB8sQ5ss7sH")
_OUTPUT_START = b"\x89\xa4type\xa6output\xa2to\xc4\x08"
_OUTPUT_KEYS = (
    b"\xa1n\xcf",
    b"\xa3run\xc4\x10",
    b"\xa6stream",
    b"\xa6offset\xcf",
    b"\xa4more",
    b"\xa5marks\xdc",
)
_BOOLS = (b"\xc2", b"\xc3")
_MARK = struct.Struct(">BBIBQ")


def output_head(
    run: bytes, stream: int, offset: int, more: bool, marks: Pairs, length: int, *, to: bytes, n: int
) -> bytes:
    """All of an Output's payload but its last ``length`` bytes, which are the data themselves."""
    head = _OUTPUT.pack(
        _OUTPUT_START,
        to,
        b"\xa1n\xcf",
        n,
        b"\xa3run\xc4\x10",
        run,
        b"\xa6stream",
        stream,
        b"\xa6offset\xcf",
        offset,
        b"\xa4more",
        b"\xc3" if more else b"\xc2",
        b"\xa5marks\xdc",
        len(marks),
    )
    packed_marks = [_MARK.pack(0x92, 0xCE, size, 0xCF, wall) for size, wall in marks]
    return b"".join((head, *packed_marks, b"\xa4data\xc5", length.to_bytes(2, "big")))


def _unpack_output(payload: bytes) -> Optional[Envelope]:
    """An Output packed as :func:`output_head` does; None for whatever else it is, which is judged key by key."""
    if len(payload) < OUTPUT_HEAD:
        return None
    # fmt: off
    _, to, n_key, n, run_key, run, stream_key, stream, offset_key, offset, more_key, more, marks_key, count = (
        _OUTPUT.unpack_from(payload)
    )
    # fmt: on
    at = _OUTPUT.size + count * _MARK.size
    data = payload[at + 8 :]
    if (
        (n_key, run_key, stream_key, offset_key, more_key, marks_key) != _OUTPUT_KEYS
        or more not in _BOOLS
        or n > MAX_INT
        or stream > 0x7F
        or offset > MAX_INT
        or count > MAX_MARKS
        or payload[at : at + 6] != b"\xa4data\xc5"
        or int.from_bytes(payload[at + 6 : at + 8], "big") != len(payload) - at - 8
        or len(data) > MAX_BIN
    ):
        return None
    marks = []
    for array, size_type, size, wall_type, wall in _MARK.iter_unpack(payload[_OUTPUT.size : at]):
        if array != 0x92 or size_type != 0xCE or wall_type != 0xCF or wall > MAX_INT:
            return None
        marks.append((size, wall))
    return Envelope(Output(run, stream, offset, more == b"\xc3", tuple(marks), data), to, n)


OUTPUT_HEAD = len(output_head(bytes(16), 1, 0, False, (), 0, to=bytes(8), n=0))
"""Bytes of an Output's payload besides its data and its marks."""
OUTPUT_MARK = _MARK.size
"""Bytes one mark takes."""

_PIECE = struct.Struct(">17s8s3sQ10s16s4sQ6sH")


def piece_head(request: bytes, at: int, length: int, *, to: bytes, n: int) -> bytes:
    """All of a Piece's payload but its last ``length`` bytes, which are the data themselves."""
    # fmt: off
    return _PIECE.pack(
        b"\x86\xa4type\xa5piece\xa2to\xc4\x08", to, b"\xa1n\xcf", n,
        b"\xa7request\xc4\x10", request, b"\xa2at\xcf", at, b"\xa4data\xc5", length,
    )
