"""What lives here: a file's contents, for both ends of a transfer: where its data are, and their digest.

It must not know: transfers, paths.
"""

from __future__ import annotations

import errno
import os

_BLOCK = 1 << 20  # bytes hashed at once; other threads run meanwhile
_ZEROS = memoryview(bytes(_BLOCK))


def next_data(fd: int, at: int, size: int) -> int:
    """Where data are next: at ``at`` or after the hole there; the ``size`` when there are no more."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        return size if error.errno == errno.ENXIO else at  # else nobody can tell: all of it is data


class Digest:
    """SHA-256 of contents told from the start on, holes by their length."""

    def __init__(self) -> None:
        import hashlib  # half a megabyte of memory, which a guest takes that is asked for a file

        self._sha256 = hashlib.sha256()

    def data(self, data: bytes) -> None:
        self._sha256.update(data)

    def hole(self, length: int) -> None:
        for at in range(0, length, _BLOCK):
            self._sha256.update(_ZEROS[: length - at])

    def digest(self) -> bytes:
        return self._sha256.digest()


def sha256(fd: int) -> bytes:
    """The digest of all there is in a file."""
    digest = Digest()
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
