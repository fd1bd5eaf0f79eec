"""What lives here: what of a run's output was dropped, as its shim noted it in `gaps`; see shim.GAP.

The noting is ahead of the dropping: who has seen a length of a stream first, and looks here then, knows of each
dropped byte below that length. It must not know: why anybody asks.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple, Optional

from vmr_agent.runs import Stream

_RECORD = struct.Struct("<QQQBBB5x")
_AT_ONCE = 128 * _RECORD.size
_OVER = 2
_REASONS = {1: "the spool is over its limit", 2: "the file system is nearly full"}
ENDLESS = 1 << 63


class Gap(NamedTuple):
    """Bytes of one stream that were read and dropped."""

    begin: int
    end: int
    """:data:`ENDLESS` while it grows: then all from its beginning to the end of the stream's file is dropped."""
    wall_ns: int
    """When the first of them was read."""
    reason: str

    @property
    def growing(self) -> bool:
        return self.end == ENDLESS


class Gaps:
    """Of one run, in order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next = 0
        self._last: dict[Stream, tuple[int, int]] = {}
        """Where the last record of each stream is, in the file and in the list: it may change until another follows."""
        self._found: dict[Stream, list[Gap]] = {stream: [] for stream in Stream}
        self._begins: dict[Stream, list[int]] = {stream: [] for stream in Stream}

    def of(self, stream: Stream) -> list[Gap]:
        """Each gap of a stream so far. OSError where that can't be read."""
        self._look()
        return [gap for gap in self._found[stream] if gap.end > gap.begin]

    def first(self, stream: Stream, offset: int, end: int) -> Optional[Gap]:
        """The first that reaches into [offset, end), where ``end`` is a length that was seen before this call."""
        self._look()
        found, begins = self._found[stream], self._begins[stream]
        for number in range(max(0, bisect_right(begins, offset) - 1), len(found)):
            gap = found[number]
            if gap.begin >= end:
                break
            if gap.end > max(offset, gap.begin):
                return gap
        return None

    def growing(self) -> str:
        """Why something is being dropped; empty when nothing is."""
        self._look()
        last = [found[-1] for found in self._found.values() if found]
        return next((gap.reason for gap in last if gap.growing), "")

    def _look(self) -> None:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            # What is new comes first: where that is another of its stream, the one before is over by now.
            last = dict(self._last)
            while True:
                block = os.pread(fd, _AT_ONCE, self._next)
                records = list(_RECORD.iter_unpack(block[: len(block) - len(block) % _RECORD.size]))
                for record in records:
                    if record[3] not in (1, 2):
                        break  # behind the last
                    stream = Stream(record[3])
                    self._last[stream] = (self._next, len(self._found[stream]))
                    self._found[stream].append(_gap(record))
                    self._begins[stream].append(record[0])
                    self._next += _RECORD.size
                else:
                    if len(block) == _AT_ONCE:
                        continue
                break
            for stream, (place, number) in last.items():
                self._found[stream][number] = _gap(_RECORD.unpack(os.pread(fd, _RECORD.size, place)))
        finally:
            os.close(fd)


def _gap(record: tuple[int, ...]) -> Gap:
    begin, length, wall_ns, _, state, cause = record
    # No message carries what a damaged record may hold for a time.
    wall_ns = min(wall_ns, (1 << 63) - 1)
    return Gap(begin, begin + length if state == _OVER else ENDLESS, wall_ns, _REASONS.get(cause, "no space"))
