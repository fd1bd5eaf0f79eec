"""What lives here: the runs of a life that are over, by id and by label, in 72 bytes each: there may be 200,000.

All that is asked of them is whether a run is one of them and which run has a label, so two sorted tables, as they
stand in the checkpoint, are searched as they are; what came since the last is kept beside them.
It must not know: files, the journal, what a run is else.
"""

from __future__ import annotations

import hashlib
import struct
from typing import NamedTuple, Optional

Label = tuple[bytes, int]
"""A VMR's name and an attempt."""

_ID = 16
_ROW = struct.Struct("<16s16sQ")  # run, digest of its label, when
_NAME = struct.Struct("<16s16s")  # digest of a label, run


class Over(NamedTuple):
    digest: bytes
    """Of its label."""
    when: int
    """When it was executed."""


class Finished:
    def __init__(self, tables: bytes = b"") -> None:
        """``tables``: what :meth:`pack` made."""
        count = len(tables) // (_ROW.size + _NAME.size)
        self._rows, self._names = tables[: count * _ROW.size], tables[count * _ROW.size :]
        self._new: dict[bytes, Over] = {}
        self._new_names: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        return len(self._rows) // _ROW.size + len(self._new)

    def __contains__(self, run: bytes) -> bool:
        return self.get(run) is not None

    def add(self, run: bytes, label: Label, when: int) -> None:
        if run not in self:
            digest = digest_of(label)
            self._new[run] = Over(digest, when)
            self._new_names[digest] = run

    def get(self, run: bytes) -> Optional[Over]:
        new = self._new.get(run)
        if new is not None:
            return new
        row = _find(self._rows, _ROW.size, run)
        return Over(*_ROW.unpack(row)[1:]) if row else None

    def run_of(self, label: Label) -> Optional[bytes]:
        digest = digest_of(label)
        return self._new_names.get(digest) or _find(self._names, _NAME.size, digest)[_ID:] or None

    def pack(self) -> bytes:
        """All of them, and from now on nothing is beside the tables."""
        rows = [_ROW.pack(run, *over) for run, over in self._new.items()]
        names = [_NAME.pack(digest, run) for digest, run in self._new_names.items()]
        self._rows, self._names = (
            _merged(self._rows, _ROW.size, rows),
            _merged(self._names, _NAME.size, names),
        )
        self._new, self._new_names = {}, {}
        return self._rows + self._names


def digest_of(label: Label) -> bytes:
    vmr, attempt = label
    return hashlib.blake2b(b"%d/%s" % (attempt, vmr), digest_size=_ID).digest()


def _merged(table: bytes, size: int, rows: list[bytes]) -> bytes:
    if not rows:
        return table
    return b"".join(sorted([*(table[at : at + size] for at in range(0, len(table), size)), *sorted(rows)]))


def _find(table: bytes, size: int, key: bytes) -> bytes:
    """The row that begins with a key of 16 bytes; empty when there is none."""
    low, high = 0, len(table) // size
    while low < high:
        middle = (low + high) // 2
        if table[middle * size : middle * size + _ID] < key:
            low = middle + 1
        else:
            high = middle
    row = table[low * size : (low + 1) * size]
    return row if row[:_ID] == key else b""
