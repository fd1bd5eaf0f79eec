"""What lives here: how much disk one VM takes, and whether that is too much.

Raw files, journal and rows are counted as they grow. The two logs are written later, by another process, and may take
two hundred times what was printed, for each line has a row: so what they will take is reckoned, rather too high, as
output comes. Once all of it is rendered, a measurement puts what there is in the place of what was reckoned. Holes
take nothing. It must not know: what is stored, what happens to a VM that takes too much.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
from pathlib import Path
from typing import NamedTuple

from vmr_agent.host.journal import lives

RESERVE = 16 << 20
"""Over the quota sessions, starts and ends of runs are stored still, a sixteenth of it or so much more."""
BLOCK = 4096
RUN = 5 * BLOCK
"""The directory of a run, its row, and the ends of two streams."""

_LOOK_EVERY = 1 << 20  # bytes that come between two looks at the logs' sizes
_ROW = 160  # bytes of a row in <VM>.json, or of a line in <VM>.log, besides output and the VMR's name
SAMPLE = 1024
"""Of so many bytes it can be told well enough how the others will look in the logs."""
_ONE_FOR_ONE = bytes(byte for byte in range(0x20, 0x7F) if byte not in b"\"'\\")


class Measured(NamedTuple):
    disk: int
    logs: int
    rendered: tuple[int, int]
    """The life and the place in its journal up to which the logs are written."""


class Quota:
    """One VM's. All but :meth:`measure` belongs to one thread."""

    def __init__(self, log_dir: Path, segment: str, limit: int) -> None:
        """``limit``: bytes; 0: none."""
        self.limit = limit
        self._log_dir = log_dir
        self._segment = segment
        self._disk = 0
        self._logs = _sizes(log_dir, segment)
        self._reckoned = 0
        """Bytes that the logs will grow by."""
        self._looked = 0
        self._last = (0, 0)
        """Where the last output stands, as in :attr:`Measured.rendered`."""

    @property
    def used(self) -> int:
        return self._disk + self._logs + self._reckoned

    @property
    def over(self) -> bool:
        return 0 < self.limit <= self.used

    @property
    def exhausted(self) -> bool:
        """Not even what there is to say of runs may be stored."""
        return self.limit > 0 and self.limit + max(RESERVE, self.limit // 16) <= self.used

    @property
    def roomy(self) -> bool:
        """There is room again. Less than the limit, or a VM would go back and forth at it."""
        return not self.limit or self.used < self.limit - self.limit // 16

    def add(self, size: int) -> None:
        """Something takes so many bytes more."""
        self._disk += size

    def add_output(self, data: bytes, name: int, where: tuple[int, int]) -> None:
        """``name``: bytes of the VMR's name, which stands in each row. ``where``: see :attr:`Measured.rendered`."""
        if not self.limit:
            return
        length = len(data)
        if length > SAMPLE:
            # Of a large piece a part is looked at, anywhere in it: all of it would take as long as storing it.
            begin = int(random.random() * (length - SAMPLE))
            data = data[begin : begin + SAMPLE]
        self.reckon(data, length, name, where)
        self._disk += length
        self._looked += length
        if self._looked >= _LOOK_EVERY:
            # Where the reckoning was too low: a number such as 1e15 is written in full.
            self._looked = 0
            self._reckoned = max(self._reckoned, _sizes(self._log_dir, self._segment) - self._logs)

    def reckon(self, sample: bytes, length: int, name: int, where: tuple[int, int]) -> None:
        """What the logs will take of ``length`` bytes that are like the sample."""
        odd = len(sample.translate(None, _ONE_FOR_ONE))
        ends = sample.count(b"\n") + sample.count(b"\r")
        rows = min(ends, len(sample) - ends)  # a blank line has none
        # In JSON an odd byte is at most \u0000; in a Python literal, \x00.
        text = 2 * len(sample) + 8 * odd + rows * (_ROW + 2 * name)
        self._reckoned += text * length // (len(sample) or 1) + 2 * (_ROW + 2 * name)
        self._last = where

    def measure(self) -> Measured:
        """What there is on the disk now. Takes its time where there are many runs; changes nothing."""
        disk = 0
        with contextlib.suppress(OSError):
            root = os.open(self._log_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                found = lives(root, self._segment)
            finally:
                os.close(root)
            for name in found:
                disk += _blocks(os.path.join(self._log_dir, name))
        rendered = (0, 0)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads((self._log_dir / f".{self._segment}.rendered").read_bytes())
            rendered = (int(note["life"]), int(note["journal"]))
        return Measured(disk, _sizes(self._log_dir, self._segment), rendered)

    def take(self, measured: Measured, before: int) -> None:
        """Believe what was measured; ``before``: :attr:`disk` when that began."""
        since = self._disk - before
        self._disk = measured.disk + since
        if measured.rendered >= self._last:
            self._logs, self._reckoned = measured.logs, 0
        else:
            self._reckoned = max(self._reckoned - max(0, measured.logs - self._logs), 0)
            self._logs = measured.logs

    @property
    def disk(self) -> int:
        """What of it is no log."""
        return self._disk


def _sizes(log_dir: Path, segment: str) -> int:
    total = 0
    for kind in ("log", "json"):
        with contextlib.suppress(OSError):
            total += (log_dir / f"{segment}.{kind}").stat().st_size
    return total


def _blocks(path: str) -> int:
    """Bytes of disk that a tree takes; links are not followed, what vanishes meanwhile counts nothing."""
    total = 0
    with contextlib.suppress(OSError):
        total += os.lstat(path).st_blocks * 512
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    total += _blocks(entry.path)
                else:
                    with contextlib.suppress(OSError):
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total
