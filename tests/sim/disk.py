"""What lives here: a disk in memory that forgets, when the power goes, what was never synced.

A file has its content, what of that would survive, and the changes in between; a directory has the same of its
names. A sync makes one file's content, or one directory's names, survive; nothing else does. A power cut keeps of
each file some of the changes since its last sync and of each directory the first few, by the dice: more than any
file system we know takes, and no less.

What is assumed of a file opened with O_APPEND alone, a stream in the spool: bytes come to the disk in their order;
and a power cut between a sync that failed and one that did not takes all since the last that did not. (It might
leave zeros: nobody would see that they are none of the script's.)
It must not know: descriptors, processes, paths; those are the kernel's.
"""

from __future__ import annotations

import errno
import functools
import os
import random
import stat
from typing import Optional, Union

PAGE = 4096
BLOCK = 4_096
TICK_NS = 4_000_000  # the kernel's clock, which stamps files


def fail(number: int) -> OSError:
    return OSError(number, _strerror(number))


_strerror = functools.lru_cache(os.strerror)


Change = tuple[str, int, bytes]
"""("write", offset, data), ("size", size, b"") or ("punch", upto, b"")."""


def _apply(content: bytearray, change: Change, most: Optional[int] = None) -> None:
    kind, at, data = change
    if kind == "write":
        data = data if most is None else data[:most]
        if at > len(content):
            content.extend(bytes(at - len(content)))
        content[at : at + len(data)] = data
    elif kind == "size":
        if at < len(content):
            del content[at:]
        else:
            content.extend(bytes(at - len(content)))
    else:
        content[:at] = bytes(min(at, len(content)))


class Node:
    __slots__ = ("allocated", "ctime", "disk", "ino", "mode", "mtime", "nlink", "uid")

    def __init__(self, disk: Disk, mode: int) -> None:
        self.disk = disk
        self.ino = disk.next_ino()
        self.mode = mode
        self.uid = 0
        self.nlink = 1
        self.allocated = 0  # bytes taken by posix_fallocate
        self.mtime = self.ctime = disk.now()

    def touch(self) -> None:
        self.mtime = self.ctime = self.disk.now()


class File(Node):
    __slots__ = ("appends", "changes", "content", "durable", "failed", "made", "punched")

    def __init__(self, disk: Disk, mode: int) -> None:
        super().__init__(disk, stat.S_IFREG | mode)
        self.content = bytearray()
        self.durable = bytearray()
        self.changes: list[Change] = []
        self.made = 0  # how many changes there ever were
        self.punched = 0
        self.appends = False
        self.failed = -1  # the durable length when a sync failed, if none has been well since

    @property
    def blocks(self) -> int:
        held = max(len(self.content) - self.punched, self.allocated)
        return -(-max(0, held) // 512)

    def change(self, change: Change) -> None:
        _apply(self.content, change)
        self.changes.append(change)
        self.made += 1
        self.touch()

    def sync(self, upto: Optional[int] = None) -> None:
        """Make its changes survive; where it took a while, as far as the one that was `made` as number `upto`."""
        later = 0 if upto is None else min(self.made - upto, len(self.changes))
        changes = self.changes[: len(self.changes) - later]
        if changes:
            del self.changes[: len(changes)]
            if self.disk.fails_sync():
                # The kernel says so once, then calls the pages clean: what was written is on no disk. A size is.
                if self.failed < 0:
                    self.failed = len(self.durable)
                for change in changes:
                    if change[0] != "write":
                        _apply(self.durable, change)
                if not self.appends:
                    _apply(self.durable, ("size", len(self.content), b""))
                raise fail(self.disk.sync_errno)
            for change in changes:
                _apply(self.durable, change)
        self.failed = -1

    def lose_power(self, dice: random.Random) -> None:
        if self.appends and self.failed >= 0:
            del self.durable[self.failed :]
            self.changes = []
        self.failed = -1
        changes = self.changes
        if changes:
            how = dice.random()
            if how < 0.3:
                kept = []
            elif how < 0.5:
                kept = changes
            elif how < 0.8 or self.appends:
                kept = changes[: dice.randrange(len(changes) + 1)]
            else:
                kept = [change for change in changes if dice.random() < 0.5]
            for number, change in enumerate(kept):
                torn = number == len(kept) - 1 and change[0] == "write" and dice.random() < 0.5
                _apply(self.durable, change, dice.randrange(len(change[2]) + 1) if torn else None)
            # As ext4 does within a block, where the sync of another file made the new size durable and not the bytes.
            if self.appends and len(self.content) > len(self.durable) > 0 and dice.random() < 0.3:
                room = -len(self.durable) % BLOCK
                self.durable += bytes(min(room, len(self.content) - len(self.durable)))
            self.changes = []
        self.content = bytearray(self.durable)
        self.punched = min(self.punched, len(self.content))

    def copy(self, disk: Disk) -> File:
        twin = File.__new__(File)
        _copy_node(self, twin, disk)
        twin.content, twin.durable = bytearray(self.content), bytearray(self.content)
        twin.changes, twin.made, twin.punched = [], 0, self.punched
        twin.appends, twin.failed = self.appends, -1
        return twin


class Link(Node):
    __slots__ = ("target",)

    def __init__(self, disk: Disk, target: str) -> None:
        super().__init__(disk, stat.S_IFLNK | 0o777)
        self.target = target

    def copy(self, disk: Disk) -> Link:
        twin = Link.__new__(Link)
        _copy_node(self, twin, disk)
        twin.target = self.target
        return twin


class Directory(Node):
    __slots__ = ("changes", "durable", "names")

    def __init__(self, disk: Disk, mode: int) -> None:
        super().__init__(disk, stat.S_IFDIR | mode)
        self.names: dict[str, Entry] = {}
        self.durable: dict[str, Entry] = {}
        self.changes: list[tuple[tuple[str, Optional[Entry]], ...]] = []

    def change(self, *names: tuple[str, Optional[Entry]]) -> None:
        """Set or remove names; together, all or none."""
        for name, entry in names:
            if entry is None:
                self.names.pop(name, None)
            else:
                self.names[name] = entry
        self.changes.append(names)
        self.touch()

    def sync(self) -> None:
        if self.changes:
            if self.disk.fails_sync():
                raise fail(self.disk.sync_errno)
            self.changes.clear()
            self.durable = dict(self.names)

    def lose_power(self, dice: random.Random) -> None:
        if self.changes:
            how = dice.random()
            upto = 0 if how < 0.4 else dice.randrange(len(self.changes) + 1)
            for names in self.changes[:upto]:
                for name, entry in names:
                    if entry is None:
                        self.durable.pop(name, None)
                    else:
                        self.durable[name] = entry
            self.changes = []
        self.names = dict(self.durable)
        for entry in self.names.values():
            if not isinstance(entry, Link):
                entry.lose_power(dice)

    def copy(self, disk: Disk) -> Directory:
        twin = Directory.__new__(Directory)
        _copy_node(self, twin, disk)
        twin.names = {name: entry.copy(disk) for name, entry in self.names.items()}
        twin.durable, twin.changes = dict(twin.names), []
        return twin


Entry = Union[File, Link, Directory]


def _copy_node(node: Node, twin: Node, disk: Disk) -> None:
    twin.disk = disk
    for slot in Node.__slots__:
        if slot != "disk":
            setattr(twin, slot, getattr(node, slot))


class Disk:
    """One file system."""

    def __init__(self, name: str, wall_ns: object) -> None:
        self.name = name
        self.wall_ns = wall_ns  # a function; who says what time it is
        self.full = False
        self.sync_failures = 0
        self.sync_errno = errno.EIO
        """Where space is taken late it is a sync that says that there is none."""
        """How many of the next syncs fail."""
        self._ino = 1
        self.root = Directory(self, 0o755)

    def next_ino(self) -> int:
        self._ino += 1
        return self._ino

    def now(self) -> int:
        at: int = self.wall_ns()  # type: ignore[operator]
        return at - at % TICK_NS

    def fails_sync(self) -> bool:
        if self.sync_failures:
            self.sync_failures -= 1
            return True
        return False

    def lose_power(self, dice: random.Random) -> None:
        self.root.lose_power(dice)
        self.full, self.sync_failures = False, 0

    def snapshot(self) -> Directory:
        """All that is there now, also what isn't synced: what a machine's snapshot holds."""
        return self.root.copy(self)

    def restore(self, snapshot: Directory) -> None:
        self.root = snapshot.copy(self)

    # --- for who checks, not for who uses it

    def find(self, path: str, *, durable: bool = False) -> Optional[Entry]:
        node: Entry = self.root
        for part in path.split("/"):
            if part:
                if not isinstance(node, Directory):
                    return None
                found = (node.durable if durable else node.names).get(part)
                if found is None:
                    return None
                node = found
        return node

    def content(self, path: str, *, durable: bool = False) -> Optional[bytes]:
        node = self.find(path, durable=durable)
        return bytes(node.durable if durable else node.content) if isinstance(node, File) else None

    def sync_all(self, path: str) -> None:
        """Whatever is below a path survives, and the path; by the world's will, which never fails."""
        failures, self.sync_failures = self.sync_failures, 0
        self._sync_all(path)
        self.sync_failures = failures

    def _sync_all(self, path: str) -> None:
        node: Entry = self.root
        for part in path.split("/"):
            if part and isinstance(node, Directory):
                node.sync()
                if part not in node.names:
                    return
                node = node.names[part]
        _sync_below(node)

    def size(self, path: str) -> int:
        """Bytes of the blocks below a path."""
        node = self.find(path)
        return 0 if node is None else _size(node)


def _sync_below(node: Entry) -> None:
    if isinstance(node, Link):
        return
    if isinstance(node, File) and node.failed >= 0:
        node.durable[:] = node.content  # what no sync would bring back is there still
        node.changes.clear()
    node.sync()
    if isinstance(node, Directory):
        for entry in node.names.values():
            _sync_below(entry)


def _size(node: Entry) -> int:
    if isinstance(node, Directory):
        return sum(_size(entry) for entry in node.names.values())
    return node.blocks * 512 if isinstance(node, File) else 0
