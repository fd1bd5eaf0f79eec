"""Target: the frame decoder, on whatever comes, in whatever pieces."""

from __future__ import annotations

from typing import Union

from tests.fuzz.given import Given
from vmr_agent.wire import framing

SEEDS = [
    b"",
    b"\x00" + framing.encode(b"payload"),
    bytes((1, 3, 2)) + b"abc" * 9,
    b"\x07\xc9\x00\x00\x00\x01VMR1",
]
_GOOD = framing.encode(b"the frame that is to be found")

Found = list[Union[bytes, framing.Garbage]]


def check(data: bytes) -> None:
    given = Given(data)
    kind = given.byte()
    if kind & 1:
        stream, sent = _mixed(given)
    else:
        stream, sent = given.rest(), []
    piece = 1 + (kind >> 1) % 127
    whole, inside = _decode(stream, len(stream) or 1)
    pieces, inside_pieces = _decode(stream, piece)
    assert _payloads(whole) == _payloads(pieces), "what is found depends on the pieces"
    assert inside == inside_pieces and _garbage(whole) == _garbage(pieces)
    found = sum(framing.HEADER.size + len(payload) for payload in _payloads(whole))
    assert found + _garbage(whole) + inside == len(stream), "each byte is a frame's, garbage or still to come"
    assert inside < framing.MAX_FRAME

    decoder = framing.Decoder()
    all_found = [*decoder.feed(stream), *decoder.feed(_GOOD)]
    for _ in range(len(stream) + len(_GOOD) + 1):
        if not decoder.pending:
            break
        all_found += decoder.expire()
    assert not decoder.pending
    payloads = _payloads(all_found)
    for payload in [*sent, _GOOD[framing.HEADER.size :]]:
        assert payload in payloads, "a whole frame is found, whatever stands before it"
        payloads = payloads[payloads.index(payload) + 1 :]
    for payload in sent:
        assert _decode(framing.encode(payload), 3) == ([payload], 0)


def _mixed(given: Given) -> tuple[bytes, list[bytes]]:
    """Frames with anything between them."""
    stream, sent = b"", []
    while given.left and len(sent) < 8:
        kind = given.byte() % 4
        blob = given.take(given.byte())
        if kind == 0:
            stream += blob
        elif kind == 1:
            stream += framing.encode(blob or b"x")[: given.byte()]  # cut off
            stream += b"\x00"  # so that it can't be whole
        else:
            sent.append(blob or b"x")
            stream += framing.encode(sent[-1])
    # A frame inside what looks like a longer one is found too, but where garbage holds a whole frame by itself
    # there are more than were sent: both are right.
    return stream, sent


def _decode(stream: bytes, piece: int) -> tuple[Found, int]:
    decoder = framing.Decoder()
    found: Found = []
    for at in range(0, len(stream), piece):
        found += decoder.feed(stream[at : at + piece])
    return found, len(decoder._buffer)


def _payloads(found: Found) -> list[bytes]:
    return [item for item in found if isinstance(item, bytes)]


def _garbage(found: Found) -> int:
    return sum(item.length for item in found if isinstance(item, framing.Garbage))
