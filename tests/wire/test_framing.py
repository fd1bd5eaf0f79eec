"""Frames found in whatever comes: in pieces, after garbage, within bounds of memory and work."""

from __future__ import annotations

import random
import struct
import zlib
from typing import Any, Union

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.wire.vectors import reader
from vmr_agent.wire import framing
from vmr_agent.wire.framing import MAX_FRAME, MAX_PAYLOAD, Decoder, Garbage, encode

Item = Union[bytes, Garbage]
LOGIN = b"\r\nDebian GNU/Linux 12 vm hvc0\r\n\r\nvm login: "


def head(length: int, crc: int = 0) -> bytes:
    """The first 13 bytes of a frame."""
    return b"\xc9" + struct.pack(">I", length) + b"VMR1" + struct.pack(">I", crc)


def feed(decoder: Decoder, data: bytes, sizes: Any = None) -> list[Item]:
    """Feeds the data in pieces of these sizes (the last one again and again)."""
    found: list[Item] = []
    at, size = 0, len(data) or 1
    sizes = iter(sizes or ())
    while at < len(data):
        size = next(sizes, size)
        found += decoder.feed(data[at : at + size])
        at += size
    return found


def finish(decoder: Decoder) -> list[Item]:
    """Whatever time brings out."""
    found: list[Item] = []
    while decoder.pending:
        got = decoder.expire()
        assert got, "expire() must take at least a byte"
        found += got
    return found


def joined(items: list[Item]) -> list[reader.Found]:
    """As the independent reader tells it: garbage as its length, neighbours together."""
    out: list[reader.Found] = []
    for item in items:
        found = item.length if isinstance(item, Garbage) else item
        if isinstance(found, int) and out and isinstance(out[-1], int):
            found += int(out.pop())
        out.append(found)
    return out


def total(items: list[Item]) -> int:
    """Bytes of the stream that these account for."""
    return sum(item.length if isinstance(item, Garbage) else len(item) + 13 for item in items)


payloads = st.binary(min_size=1, max_size=60)
lies = st.builds(head, st.integers(0, 2**32 - 1) | st.integers(0, 200), st.integers(0, 2**32 - 1))
shards = st.sampled_from([b"\xc9", b"VMR1", b"\xc9\x00\x00\x00\x10VMR", b"\xc9\xc9\xc9VMR1VMR1", LOGIN])
cut_frames = st.builds(
    lambda payload, cut: encode(payload)[: cut % (len(payload) + 13)], payloads, st.integers(0)
)
tails = st.builds(lambda payload, cut: encode(payload)[cut % (len(payload) + 13) :], payloads, st.integers(1))
nested = st.builds(lambda payload: head(500) + encode(payload), payloads)
pieces = st.one_of(
    st.binary(max_size=40), lies, shards, cut_frames, tails, nested, st.builds(encode, payloads)
)
streams = st.lists(pieces, max_size=12).map(b"".join)


def test_a_frame_is_what_the_page_says() -> None:
    payload = b"\x81\xa1a\x01"
    assert encode(payload) == b"\xc9\x00\x00\x00\x0bVMR1" + zlib.crc32(payload).to_bytes(4, "big") + payload
    assert encode(payload[:1], memoryview(payload)[1:]) == encode(payload)
    assert Decoder().feed(encode(payload)) == [payload]


@pytest.mark.parametrize("size", [1, 2, MAX_PAYLOAD - 1, MAX_PAYLOAD])
def test_sizes_that_fit(size: int) -> None:
    frame = encode(bytes(size))
    assert len(frame) == size + 13 <= MAX_FRAME
    assert Decoder().feed(frame) == [bytes(size)]


@pytest.mark.parametrize(
    "head, data", [(b"", b""), (bytes(MAX_PAYLOAD), b"x"), (bytes(MAX_PAYLOAD + 1), b"")]
)
def test_sizes_that_do_not(head: bytes, data: bytes) -> None:
    with pytest.raises(ValueError):
        encode(head, data)


@given(st.lists(payloads, max_size=6), st.lists(st.integers(1, 50), min_size=1))
def test_frames_in_any_pieces(sent: list[bytes], sizes: list[int]) -> None:
    decoder = Decoder()
    assert feed(decoder, b"".join(map(encode, sent)), sizes) == sent
    assert not decoder.pending


@pytest.mark.parametrize("size", [1, 2, 13, 14, 4095])
def test_longest_frames_in_small_pieces(size: int) -> None:
    payload = random.Random(size).randbytes(MAX_PAYLOAD)
    assert feed(Decoder(), encode(payload) + encode(b"x"), [size]) == [payload, b"x"]


def test_cut_at_every_offset() -> None:
    sent = [b"first", bytes(range(256)), b"\xc9\xc9\xc9VMR1", encode(b"inner")]
    stream = LOGIN + b"".join(map(encode, sent))
    for cut in range(len(stream) + 1):
        decoder = Decoder()
        found = decoder.feed(stream[:cut]) + decoder.feed(stream[cut:])
        assert joined(found) == [len(LOGIN), *sent], cut


def test_begun_at_every_offset() -> None:
    """A reader that comes late finds every frame that is whole from where it begins."""
    sent = [b"first", bytes(range(200)), b"last"]
    stream = b"".join(map(encode, sent))
    starts = [0, 18, 18 + 213]
    for offset in range(len(stream)):
        decoder = Decoder()
        found = decoder.feed(stream[offset:]) + finish(decoder)
        whole = [payload for start, payload in zip(starts, sent) if start >= offset]
        assert [item for item in found if isinstance(item, bytes)] == whole


def test_every_flipped_bit_is_noticed() -> None:
    frame = encode(b"some payload")
    for bit in range(len(frame) * 8):
        broken = bytearray(frame)
        broken[bit // 8] ^= 1 << bit % 8
        decoder = Decoder()
        found = decoder.feed(bytes(broken) + encode(b"next")) + finish(decoder)
        assert joined(found) == [len(frame), b"next"], bit


@settings(max_examples=500, deadline=None)
@given(streams, st.lists(st.integers(1, 200), min_size=1, max_size=20))
@example(head(9) * 3, [1])
@example(encode(b"a") + head(32_762) + encode(b"b") * 3, [5])
def test_any_stream_reads_as_the_page_says(stream: bytes, sizes: list[int]) -> None:
    decoder = Decoder()
    found = feed(decoder, stream, sizes) + finish(decoder)
    assert joined(found) == reader.frames(stream)
    assert total(found) == len(stream)
    assert all(isinstance(item, bytes) or item.length > 0 for item in found)


@given(streams)
def test_bytes_are_accounted_for_at_any_time(stream: bytes) -> None:
    decoder = Decoder()
    seen = 0
    for at in range(len(stream)):
        seen += total(decoder.feed(stream[at : at + 1]))
        held = at + 1 - seen
        assert 0 <= held < MAX_FRAME
        assert decoder.pending == (held > 0) == bool(decoder._buffer)


@given(st.binary(max_size=300), payloads)
def test_a_frame_after_garbage_is_found_once_time_passes(rubbish: bytes, payload: bytes) -> None:
    decoder = Decoder()
    found = decoder.feed(rubbish + encode(payload)) + finish(decoder)
    assert found[-1] == payload
    assert total(found) == len(rubbish) + len(payload) + 13


def test_expire_frees_what_a_false_head_held_back() -> None:
    decoder = Decoder()
    assert decoder.feed(head(32_762)) == []
    assert decoder.feed(encode(b"one") + encode(b"two")) == []
    assert decoder.pending
    assert decoder.expire() == [Garbage(13), b"one", b"two"]
    assert not decoder.pending and decoder.expire() == []


def test_expire_keeps_what_may_still_begin_a_frame() -> None:
    decoder = Decoder()
    frame = encode(b"later")
    assert decoder.feed(head(100) + frame[:7]) == []
    assert decoder.expire() == [Garbage(13)]
    assert decoder.feed(frame[7:]) == [b"later"]


def test_clear_forgets_half_a_frame() -> None:
    decoder = Decoder()
    frame = encode(b"payload")
    assert decoder.feed(frame[:15]) == [] and decoder.pending
    decoder.clear()
    assert not decoder.pending and decoder.feed(frame) == [b"payload"]


def test_empty_feed() -> None:
    assert Decoder().feed(b"") == [] and Decoder().expire() == []


# --- bounds ---

MIB = 1 << 20
HOSTILE = {
    "C9 only": b"\xc9" * MIB,
    "C9, zeros": b"\xc9\x00\x00\x00\x10" * (MIB // 5),
    "magic only": b"VMR1" * (MIB // 4),
    "heads of the shortest frame": head(8) * (MIB // 13),
    "heads of the longest frame": head(32_762) * (MIB // 13),
    "heads just too long": head(32_763) * (MIB // 13),
    "heads within heads": b"\xc9\xc9\xc9\xc9\xc9VMR1VMR1" * (MIB // 13),
    "zeros": bytes(MIB),
}


class Work:
    """Counts what the decoder does: bytes under a CRC, heads looked at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.crc_bytes = self.crcs = self.candidates = 0
        inner = framing._candidate

        def crc32(data: Any, start: int = 0) -> int:
            self.crcs += 1
            self.crc_bytes += len(data)
            return zlib.crc32(data, start)

        def candidate(buffer: bytes, at: int) -> int:
            self.candidates += 1
            return inner(buffer, at)

        monkeypatch.setattr(framing, "zlib", type("zlib", (), {"crc32": staticmethod(crc32)}))
        monkeypatch.setattr(framing, "_candidate", candidate)


@pytest.mark.parametrize("size", [MIB, 65_536, 4_096])
@pytest.mark.parametrize("name", HOSTILE)
def test_work_and_memory_are_bounded(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each head in the stream costs at most one CRC of one frame, however the bytes come."""
    work = Work(monkeypatch)
    decoder = Decoder()
    stream = HOSTILE[name]
    seen = 0
    for at in range(0, len(stream), size):
        seen += total(decoder.feed(stream[at : at + size]))
        assert len(decoder._buffer) < MAX_FRAME
    assert seen + len(decoder._buffer) == len(stream)
    heads = stream.count(b"VMR1")
    feeds = -(-len(stream) // size)
    assert work.candidates <= heads + feeds + len(stream) // 9
    assert work.crcs <= heads
    assert work.crc_bytes <= heads * MAX_PAYLOAD


def test_a_frame_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch)
    frame = encode(bytes(MAX_PAYLOAD))
    work.crcs = work.crc_bytes = 0
    feed(Decoder(), frame * 4, [100])
    assert (work.crcs, work.crc_bytes) == (4, 4 * MAX_PAYLOAD)


def test_held_back_memory_is_given_back() -> None:
    decoder = Decoder()
    decoder.feed(bytes(MIB) + head(8)[:4])
    assert len(decoder._buffer) == 4
