"""What lives here: the journal's records, packed and read, and the names in a log directory.

The log store writes the journal, the renderer reads it, so what both must agree on is here.
It must not know: what a record makes anybody do.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NamedTuple, Optional, Union

from vmr_agent.errors import Problem
from vmr_agent.runs import path_segment

NO_LINK = os.O_NOFOLLOW | os.O_CLOEXEC
"""For every open in a log directory: a link planted there leads nowhere."""

# A record is `<II` (length and CRC-32 of the body) and the body: a kind byte and what belongs to it. Integers
# are little-endian, times ns of the host's clock unless said.
#
#   L  number u32, spool 16 bytes, time i64          a life begins; always the first record
#   H  time i64, payload of Hello                    a session was opened
#   R, G, X, C  payload of Run, Gap, Exit, Closed
#   O  run, stream u8, offset u64, length u32, wall of the guest u64, CRC-32 of the bytes u32
#   F  run, stream u8                                the part of a line held back now is to be shown
#   M  u64                                           a mark: all before this offset of the journal is durable

JOURNAL = ".journal"
MAX_RECORD = 40_000  # a message's payload is at most 32,755 bytes

FRAME = struct.Struct("<II")
LIFE = struct.Struct("<I16sq")
TIME = struct.Struct("<q")
OUTPUT = struct.Struct("<16sBQIQI")
_OUTPUT_BODY = struct.Struct("<B16sBQIQI")
FLUSH = struct.Struct("<16sB")
MARK = struct.Struct("<Q")


class Kind:
    LIFE, HELLO, RUN, OUTPUT, GAP, EXIT, CLOSED, FLUSH, MARK = b"LHROGXCFM"


def pack_record(kind: int, content: bytes) -> bytes:
    body = bytes((kind,)) + content
    return FRAME.pack(len(body), zlib.crc32(body)) + body


def pack_output(run: bytes, stream: int, offset: int, length: int, wall: int, crc: int) -> bytes:
    """A record of output, whole: there is one for each line that comes alone."""
    body = _OUTPUT_BODY.pack(Kind.OUTPUT, run, stream, offset, length, wall, crc)
    return FRAME.pack(_OUTPUT_BODY.size, zlib.crc32(body)) + body


def records(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Each record of ``data`` as (offset behind it, kind, content), up to the first that is not whole."""
    at = 0
    while at + FRAME.size <= len(data):
        length, crc = FRAME.unpack_from(data, at)
        body = data[at + FRAME.size : at + FRAME.size + length]
        if not 0 < length <= MAX_RECORD or len(body) < length or zlib.crc32(body) != crc:
            return
        at += FRAME.size + length
        yield at, body[0], body[1:]


def read_records(fd: int, offset: int) -> Iterator[tuple[int, int, bytes]]:
    """The same from a file; offsets are the file's."""
    while True:
        last = offset
        for behind, kind, content in records(os.pread(fd, 1 << 20, offset)):
            last = offset + behind
            yield last, kind, content
        if last == offset:
            return
        offset = last


def read_life(directory: int) -> Optional[tuple[int, int, bytes, int]]:
    """(journal, number, spool, time) of the life in a directory, or None when there is none."""
    try:
        journal = os.open(JOURNAL, os.O_RDONLY | NO_LINK, dir_fd=directory)
    except FileNotFoundError:
        return None
    for _, kind, content in records(os.pread(journal, 256, 0)):
        if kind == Kind.LIFE:
            number, spool, wall = LIFE.unpack(content)
            return journal, number, spool, wall
        break
    os.close(journal)
    return None


# --- names and files ----------------------------------------------------------------------------------------


def vm_segment(vm: str) -> str:
    """A VM's name as it stands in the log directory. Raises Problem for a name that can't."""
    if not vm or vm.startswith(".") or vm.endswith((".log", ".json")):
        hint = "a VM's name may not begin with a dot, nor end in .log or .json"
        raise Problem(f"cannot keep logs of a VM named {vm!r}", hint=hint)
    return path_segment(os.fsencode(vm))


def life_of(name: str) -> tuple[str, int]:
    """What the name of a life's directory says: the VM as a segment, and the life's number, 0 for the current one.

    A ~ of a VM's own is written %7E; where a segment was cut %~ stands.
    """
    segment, tilde, number = name.rpartition("~")
    if tilde and number.isdecimal() and not segment.endswith("%"):
        return segment, int(number)
    return name, 0


def lives(log_dir: int, segment: str) -> dict[str, int]:
    """The directories of a VM's lives, by the number in their names; the current one has 0. Reads the whole log
    directory, which is long where there are many VMs."""
    found = {name: life_of(name) for name in os.listdir(log_dir) if name.startswith(segment)}
    return {name: number for name, (each, number) in found.items() if each == segment}


class Rendered(NamedTuple):
    life: int = 0
    """The number of the life that is being rendered; 0: none was."""
    place: int = 0
    """In its journal, up to which it is."""
    runs: tuple[str, ...] = ()
    """What was said of those under way there, as the note has it."""


def rendered(log_dir: int, segment: str) -> Rendered:
    try:
        note = json.loads(read_file(log_dir, f".{segment}.rendered"))
        return Rendered(int(note["life"]), int(note["journal"]), tuple([row["run"] for row in note["runs"]]))
    except (OSError, ValueError, KeyError, TypeError):
        return Rendered()


def read_file(directory: int, name: str) -> bytes:
    fd = open_read(directory, name)
    try:
        return b"".join(iter(lambda: os.read(fd, 1 << 20), b""))
    finally:
        os.close(fd)


def open_read(directory: int, name: str) -> int:
    return os.open(name, os.O_RDONLY | NO_LINK, dir_fd=directory)


def replace_file(directory: int, name: str, content: bytes) -> None:
    write_temporary(directory, name, content, sync=False)
    commit_temporary(directory, name)


def read_in(directory: Path, name: str) -> bytes:
    """A file's content. OSError where there is none."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return read_file(fd, name)
    finally:
        os.close(fd)


def replace_durably(directory: Path, name: str, content: bytes) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        write_temporary(fd, name, content, sync=True)
        commit_temporary(fd, name)
        os.fsync(fd)
    finally:
        os.close(fd)


def write_temporary(directory: int, name: str, content: bytes, *, sync: bool) -> None:
    fd = os.open(f"{name}.tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | NO_LINK, 0o644, dir_fd=directory)
    try:
        write_all(fd, content)
        if sync:
            os.fdatasync(fd)
    finally:
        os.close(fd)


def commit_temporary(directory: int, name: str) -> None:
    os.rename(f"{name}.tmp", name, src_dir_fd=directory, dst_dir_fd=directory)


def write_all(fd: int, data: Union[bytes, bytearray, memoryview], offset: Optional[int] = None) -> None:
    while data:
        written = os.write(fd, data) if offset is None else os.pwrite(fd, data, offset)
        if written == len(data):
            return
        data = memoryview(data)[written:]
        if offset is not None:
            offset += written


SYNCFS_FROM = 16
"""From so many files on one ``syncfs`` is cheaper than a sync each."""


def find_syncfs() -> Optional[Callable[[int], None]]:
    """``syncfs``, where it says when writing back failed: since Linux 5.8."""
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    function = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if function is None or release < (5, 8):
        return None

    def syncfs(fd: int) -> None:
        if function(fd) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    return syncfs
