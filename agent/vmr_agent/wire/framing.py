"""What lives here: payloads to frames and frames found in a stream of bytes, after garbage too.

It must not know: what is in a payload; the time (the session says when a half frame is too old). The format
and its limits are in `PROTOCOL.md` section 1.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple, Union

MAX_FRAME = 32_768  # a virtio-serial port takes at most 32 KiB in one write (drivers/char/virtio_console.c)
HEADER = struct.Struct(">BI4sI")
MAX_PAYLOAD = MAX_FRAME - HEADER.size
_MAGIC = b"VMR1"
_EXT32 = 0xC9
_INSIDE = 7  # bytes of the ext's data before the payload: "MR1" and the CRC
_MAGIC_AT = 5


def encode(head: bytes, data: Union[bytes, memoryview] = b"") -> bytes:
    """The frame of the payload ``head + data``. Raises ValueError when it would not fit.

    The payload comes in two parts so that output bytes are copied once only, into the frame.
    """
    length = len(head) + len(data)
    if not 0 < length <= MAX_PAYLOAD:
        raise ValueError(f"a payload of {length} bytes does not fit into a frame")
    crc = zlib.crc32(data, zlib.crc32(head))
    return b"".join((HEADER.pack(_EXT32, length + _INSIDE, _MAGIC, crc), head, data))


class Garbage(NamedTuple):
    """Bytes that belong to no frame."""

    length: int


class Decoder:
    """Finds frames in bytes as they come; holds less than one frame, whatever comes."""

    def __init__(self) -> None:
        self._buffer = b""

    @property
    def pending(self) -> bool:
        """Whether a frame has begun and isn't whole."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> list[Union[bytes, Garbage]]:
        """What ``data`` completes, in order: payloads, and runs of garbage."""
        return self._parse(self._buffer + data if self._buffer else data, False)

    def expire(self) -> list[Union[bytes, Garbage]]:
        """The frame begun is given up as garbage from its first byte; what follows may hold whole ones."""
        return self._parse(self._buffer, True)

    def clear(self) -> None:
        """Forget what is begun: the channel is another one."""
        self._buffer = b""

    def _parse(self, buffer: bytes, expired: bool) -> list[Union[bytes, Garbage]]:
        found: list[Union[bytes, Garbage]] = []
        end = len(buffer)
        at = skipped = 0
        if expired and buffer:
            at, skipped = 1, 1
        while at < end:
            if not buffer.startswith(_MAGIC, at + _MAGIC_AT) or buffer[at] != _EXT32:
                start = _candidate(buffer, at)
                skipped += start - at
                at = start
            if end - at < HEADER.size:
                break  # all of it may begin a frame
            _, length, _, crc = HEADER.unpack_from(buffer, at)
            stop = at + HEADER.size - _INSIDE + length
            if not _INSIDE < length <= MAX_PAYLOAD + _INSIDE:
                at, skipped = at + 1, skipped + 1
                continue
            if stop > end:
                break
            payload = buffer[at + HEADER.size : stop]
            if zlib.crc32(payload) != crc:
                at, skipped = at + 1, skipped + 1
                continue
            if skipped:
                found.append(Garbage(skipped))
                skipped = 0
            found.append(payload)
            at = stop
        if skipped:
            found.append(Garbage(skipped))
        self._buffer = buffer[at:]
        return found


def _candidate(buffer: bytes, at: int) -> int:
    """The first position from ``at`` where a frame may begin, given the bytes there are; else the end."""
    end = len(buffer)
    while at < end:
        at = buffer.find(b"\xc9", at)
        if at < 0:
            return end
        there = buffer[at + _MAGIC_AT : at + _MAGIC_AT + len(_MAGIC)]
        if _MAGIC.startswith(there):  # whole, cut off by the end, or not there yet
            return at
        at += 1
    return end
