"""Reads frames and payloads as PROTOCOL.md says, slowly and plainly, without the product's code.

The tests hold the product's decoder and packer against it. It imports only the standard library.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any, Union

Found = Union[bytes, int]  # a payload, or the length of a run of garbage


def frames(stream: bytes) -> list[Found]:
    """What a whole stream holds, once nothing more is waited for."""
    found: list[Found] = []
    at = skipped = 0
    while at < len(stream):
        payload = frame_at(stream, at)
        if payload is None:
            at, skipped = at + 1, skipped + 1
            continue
        if skipped:
            found.append(skipped)
            skipped = 0
        found.append(payload)
        at += 13 + len(payload)
    return found + ([skipped] if skipped else [])


def frame_at(stream: bytes, at: int) -> Union[bytes, None]:
    """The payload of the good frame that begins here, if one does."""
    if stream[at] != 0xC9 or stream[at + 5 : at + 9] != b"VMR1" or len(stream) < at + 14:
        return None
    length = int.from_bytes(stream[at + 1 : at + 5], "big")
    payload = stream[at + 13 : at + 6 + length]
    if not 8 <= length <= 32_762 or len(payload) != length - 7:
        return None
    return payload if zlib.crc32(payload).to_bytes(4, "big") == stream[at + 9 : at + 13] else None


class Reader:
    """A cursor in one MessagePack value; only what the protocol's payloads hold."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if self.at + count > len(self.data):
            raise ValueError("cut short")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        """The next number of this struct form."""
        return struct.unpack(">" + form, self.take(struct.calcsize(form)))[0]

    def value(self) -> Any:
        """The next value."""
        code = self.number("B")
        if code <= 0x7F:
            return code
        if code >= 0xE0:
            return code - 256
        make: Any
        for first, last, make in ((0x80, 0x8F, self.map), (0x90, 0x9F, self.array), (0xA0, 0xBF, self.text)):
            if first <= code <= last:
                return make(code - first)
        if code in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[code]
        if 0xCA <= code <= 0xD3:
            return self.number("fdBHIQbhiq"[code - 0xCA])
        for first, make in ((0xC4, self.take), (0xD9, self.text)):
            if first <= code <= first + 2:
                return make(self.number("BHI"[code - first]))
        for first, make in ((0xDC, self.array), (0xDE, self.map)):
            if first <= code <= first + 1:
                return make(self.number("HI"[code - first]))
        raise ValueError(f"byte {code:#x} begins nothing a payload holds")

    def text(self, count: int) -> str:
        """The next str."""
        return self.take(count).decode()

    def array(self, count: int) -> list[Any]:
        """The next items."""
        return [self.value() for _ in range(count)]

    def map(self, count: int) -> dict[str, Any]:
        """The next keys and values."""
        return {self.value(): self.value() for _ in range(count)}


def payload_value(payload: bytes) -> Any:
    """The one value in a payload."""
    reader = Reader(payload)
    value = reader.value()
    if reader.at != len(payload):
        raise ValueError("more than one value")
    return value
