"""What lives here: a file's contents, for both ends of a transfer: where its data are, what is written, its digest.

It must not know: transfers, paths.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from typing import Union

# Kinds of digest, the one for whoever has no preference first. It is no seal against a forger, who could only be one of
# the two ends: it finds mistakes. A processor with instructions for SHA-256 is twice as fast by it, another is slower,
# and one that is emulated six times slower.
DIGESTS = ("sha256", "md5")
_BLOCK = 1 << 20  # bytes hashed at once; other threads run meanwhile
_WRITE_BACK = 8 << 20  # bytes that the disk is given at once, while more come
_ZEROS = memoryview(bytes(_BLOCK))


def next_data(fd: int, at: int, size: int) -> int:
    """Where data are next: at ``at`` or after the hole there; the ``size`` when there are no more."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        return size if error.errno == errno.ENXIO else at  # else nobody can tell: all of it is data


def read_data(fd: int, at: int, most: int) -> bytes:
    """Up to ``most`` bytes from ``at``, where data are, and none of a hole behind them."""
    with suppress(OSError):  # nobody can tell, or nothing is there
        most = min(most, os.lseek(fd, at, os.SEEK_HOLE) - at)
    return os.pread(fd, most, at)


def mtime_of(status: os.stat_result) -> int:
    """When it was changed, in ns, or the nearest to it that a message can hold: there are files of the year 2300."""
    return max(-(2**63), min(status.st_mtime_ns, 2**63 - 1))


def write_all(fd: int, data: Union[bytes, memoryview], at: int) -> None:
    while data:
        taken = os.pwrite(fd, data, at)
        data, at = data[taken:], at + taken


class Written:
    """A file written from its start on, holes left out: its digest without reading it, and a short sync at its end."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.at = 0
        """Where it ends by now."""
        self.whole = True
        """Whether there is no hole in it."""
        self._digest = Digest(kind)
        self._begun = 0

    def write(self, fd: int, data: Union[bytes, memoryview], at: int) -> None:
        """Write ``data``, which are no earlier in the file than :attr:`at`."""
        self.whole = self.whole and at == self.at
        self._digest.hole(at - self.at)
        self._digest.data(data)
        write_all(fd, data, at)
        self.at = at + len(data)
        if self.at - self._begun >= _WRITE_BACK:
            # The kernel begins to write, and nobody waits for it: what sync_file_range would do.
            os.posix_fadvise(fd, self._begun, self.at - self._begun, os.POSIX_FADV_DONTNEED)
            self._begun = self.at

    def digest(self, size: int) -> bytes:
        """That of the file, ``size`` bytes long."""
        self._digest.hole(size - self.at)
        return self._digest.digest()


class Digest:
    """The digest of contents told from the start on, holes by their length."""

    def __init__(self, kind: str) -> None:
        import hashlib  # half a megabyte of memory, which a guest takes that is asked for a file

        self._hash = hashlib.new(kind, usedforsecurity=False)

    def data(self, data: Union[bytes, memoryview]) -> None:
        self._hash.update(data)

    def hole(self, length: int) -> None:
        for at in range(0, length, _BLOCK):
            self._hash.update(_ZEROS[: length - at])

    def digest(self) -> bytes:
        return self._hash.digest()


def fastest() -> str:
    """The kind of digest that this machine is fastest at."""
    took = {}
    for kind in DIGESTS:
        times = []
        with suppress(ValueError):  # a Python without it
            for _ in range(3):
                began = time.thread_time()  # of others' turns nothing
                Digest(kind).data(_ZEROS[: 1 << 16])
                times.append(time.thread_time() - began)
            took[kind] = min(times)
    return min(took, key=took.__getitem__)


def digest_of(fd: int, kind: str) -> bytes:
    """The digest of all there is in a file."""
    digest = Digest(kind)
    at, size = 0, os.fstat(fd).st_size
    while True:
        # Holes are not read: each page of zeros would take a page of memory.
        start = next_data(fd, at, size)
        digest.hole(max(0, start - at))
        data = os.pread(fd, _BLOCK, start)
        if not data:
            return digest.digest()
        digest.data(data)
        at = start + len(data)
