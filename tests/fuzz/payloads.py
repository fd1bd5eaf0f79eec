"""Target: payloads unpacked, whatever is in them, and packed again."""

from __future__ import annotations

from typing import Any

import msgpack

from tests.fuzz.given import Given
from vmr_agent.wire import messages

_TYPES = sorted(messages.TYPES)
_ADDRESS = {"to": b"receiver", "n": 7}
SEEDS = [b"", b"\x00\x81\xa4type\xa5hello", *(bytes((1, number)) for number in range(len(_TYPES)))]
_ANYTHING: list[Any] = [
    *(
        None,
        True,
        -1,
        2**63,
        2**64 - 1,
        1.5,
        float("nan"),
        "",
        "\udcff",
        b"",
        b"x" * 16,
        [],
        [[1, 2]],
        {},
        {"a": 1},
    ),
    *([[]] * 2_049, {str(number): number for number in range(300)}, "t" * 5_000, msgpack.ExtType(1, b"x")),
]


def check(data: bytes) -> None:
    given = Given(data)
    kind = given.byte() % 3
    if kind == 0:
        payload = given.rest()
    else:
        cls = messages.TYPES[given.pick(_TYPES)]
        message = given.message(cls)
        address = {} if cls is messages.Hello else _ADDRESS
        try:
            payload = messages.pack(message, **address)
        except messages.Malformed:
            return  # a text of the input's was too long
        envelope = messages.unpack(payload)
        assert envelope.message == message and (envelope.to, envelope.n) == tuple(
            address.values() or (b"", -1)
        )
        if kind == 2:
            payload = _spoiled(given, payload)
    try:
        envelope = messages.unpack(payload)
    except messages.Malformed:
        return
    if isinstance(envelope.message, messages.Unknown):
        assert len(envelope.message.type) <= 64
        return
    hello = isinstance(envelope.message, messages.Hello)
    again = messages.pack(envelope.message, **({} if hello else {"to": envelope.to, "n": envelope.n}))
    assert messages.unpack(again) == envelope


def _spoiled(given: Given, payload: bytes) -> bytes:
    """A field missing, of another kind, or one nobody knows; or the payload cut."""
    row = msgpack.unpackb(payload, strict_map_key=False)
    name = given.pick(sorted(row))
    act = given.byte() % 4
    if act == 0:
        del row[name]
    elif act == 1:
        row[name] = given.pick(_ANYTHING)
    elif act == 2:
        row[given.text()] = given.pick(_ANYTHING)
    else:
        return payload[: given.integer()]
    spoiled: bytes = msgpack.packb(row, unicode_errors="surrogateescape")
    return spoiled
