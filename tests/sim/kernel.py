"""What lives here: a process of the simulation, as what its code calls `os`: files, pipes, locks, and its own death.

A process's code is the product's own; its module's name `os` is bound to the :class:`Process` that runs it. Each
call may be the last one: :attr:`Process.trap` counts down to a kill, a power cut, or a pause. It must not know:
what the product does with any of it, or what time it is.

Over 400 lines: one call of the system after the other.
"""

from __future__ import annotations

import errno
import fcntl as real_fcntl
import functools
import os as real_os
import posixpath
import stat
import struct
from collections.abc import Iterator, Sequence
from typing import Any, Callable, Optional, Union

from tests.sim.disk import PAGE, Directory, Disk, Entry, File, Link, fail


class Killed(BaseException):
    """The process is dead: what its code would do next is never done."""


class Pipe:
    """Bytes on their way from one process to another."""

    def __init__(self, capacity: int = 65_536) -> None:
        self.data = bytearray()
        self.capacity = capacity
        self.readers = 0
        self.writers = 0


class Opened:
    """An open file, shared by the descriptors that were made from each other."""

    __slots__ = ("at", "flags", "locks", "node", "uses", "write_end")

    def __init__(self, node: Union[Entry, Pipe], flags: int, *, write_end: bool = False) -> None:
        self.node = node
        self.flags = flags
        self.at = 0
        self.uses = 1
        self.locks = False
        self.write_end = write_end


class Locks:
    """Who holds which file of a machine."""

    def __init__(self) -> None:
        self.flocks: dict[int, Opened] = {}
        self.records: dict[int, Process] = {}


class Item:
    """What `os.scandir` gives."""

    def __init__(self, process: Process, parent: str, name: str, entry: Entry, as_bytes: bool) -> None:
        self._process, self._entry = process, entry
        self.name: Any = real_os.fsencode(name) if as_bytes else name
        path = f"{parent}/{name}" if parent else name
        self.path: Any = real_os.fsencode(path) if as_bytes else path

    def inode(self) -> int:
        return self._entry.ino

    def is_symlink(self) -> bool:
        return isinstance(self._entry, Link)

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return isinstance(self._entry, Directory)

    def stat(self, *, follow_symlinks: bool = True) -> real_os.stat_result:
        return _stat(self._entry)


class Items(list[Item]):
    def __enter__(self) -> Items:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Item]:  # type: ignore[override]
        while self:
            yield self.pop(0)

    def __next__(self) -> Item:
        if not self:
            raise StopIteration
        return self.pop(0)


def _stat(entry: Entry) -> real_os.stat_result:
    if isinstance(entry, File):
        size, blocks = len(entry.content), entry.blocks
    else:
        size, blocks = PAGE, 1
    mtime, ctime = entry.mtime, entry.ctime
    head = (entry.mode, entry.ino, 7, entry.nlink, entry.uid, 0, size, 0, mtime // 10**9, ctime // 10**9)
    more = (0.0, mtime / 1e9, ctime / 1e9, 0, mtime, ctime, PAGE, blocks, 0)
    return real_os.stat_result((*head, *more))


def _text(path: Any) -> str:
    if type(path) is str:
        return path
    path = real_os.fspath(path)
    return path if isinstance(path, str) else real_os.fsdecode(path)


@functools.lru_cache(10_000)
def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split("/") if part and part != ".")


class _Names:
    """`os.path`."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.join, self.normpath, self.dirname = posixpath.join, posixpath.normpath, posixpath.dirname
        self.basename = posixpath.basename

    def abspath(self, path: Any) -> Any:
        return posixpath.normpath(path)

    def lexists(self, path: Any) -> bool:
        return self._process.exists(path, follow=False)

    def exists(self, path: Any) -> bool:
        return self._process.exists(path)

    def isdir(self, path: Any) -> bool:
        try:
            return isinstance(self._process.walk(_text(path)), Directory)
        except OSError:
            return False


class Process:
    """What a module calls `os`, while this process's code runs."""

    def __init__(self, disk: Disk, locks: Locks, *, pid: int, urandom: Callable[[int], bytes]) -> None:
        self.disk = disk
        self.locks = locks
        self.pid = pid
        self.dead = False
        self.calls = 0
        self.trap = 1 << 60
        self.trapped: Callable[[], None] = lambda: None
        """Called before the call whose number :attr:`trap` is; may kill the process, or pause it."""
        self.fds: dict[int, Opened] = {}
        self.next_fd = 3
        self.cwd: Directory = disk.root
        self.path: Any = _Names(self)
        self.urandom = urandom
        self.environ = {"PATH": "/bin"}

    def __getattr__(self, name: str) -> Any:
        if name in _PURE or name.startswith(("O_", "SEEK_", "W", "P_", "ST_")):
            value = getattr(real_os, name)
            setattr(self, name, value)
            return value
        raise AttributeError(f"the simulation has no os.{name}")

    def enter(self) -> None:
        if self.dead:
            raise Killed
        self.calls += 1
        if self.calls >= self.trap:
            self.trap = 1 << 60
            self.trapped()
            if self.dead:
                raise Killed

    def die(self) -> None:
        """Nothing of its code runs any more; its descriptors and locks are gone."""
        if not self.dead:
            self.dead = True
            for opened in self.fds.values():
                self._release(opened)
            self.fds.clear()
            for ino in [ino for ino, process in self.locks.records.items() if process is self]:
                del self.locks.records[ino]

    # --- paths

    def walk(
        self, path: str, *, base: Optional[Directory] = None, follow: bool = True, depth: int = 0
    ) -> Entry:
        begin: Entry = self.disk.root if path[:1] == "/" else (base or self.cwd)
        parts = _parts(path)
        node = begin
        for part in parts:  # nearly always this is all
            found = node.names.get(part) if type(node) is Directory else None
            if found is None and part != ".." and type(node) is Directory:
                raise fail(errno.ENOENT)
            if found is None or type(found) is Link:
                break
            node = found
        else:
            return node
        return self._walk_slowly(begin, parts, follow, depth)

    def _walk_slowly(self, node: Entry, parts: Sequence[str], follow: bool, depth: int) -> Entry:
        trail: list[Entry] = [node]
        for number, part in enumerate(parts):
            if not isinstance(node, Directory):
                raise fail(errno.ENOTDIR)
            if part == "..":
                node = self._parent(trail, node)
                continue
            found = node.names.get(part)
            if found is None:
                raise fail(errno.ENOENT)
            if isinstance(found, Link) and (follow or number < len(parts) - 1):
                if depth > 8:
                    raise fail(errno.ELOOP)
                found = self.walk(found.target, base=node, depth=depth + 1)
            trail.append(found)
            node = found
        return node

    def _parent(self, trail: list[Entry], node: Directory) -> Directory:
        if len(trail) > 1:
            trail.pop()
            above = trail[-1]
        else:
            above = self._search(self.disk.root, node) or self.disk.root
            trail[:] = [above]
        assert isinstance(above, Directory)
        return above

    def _search(self, top: Directory, node: Directory) -> Optional[Directory]:
        for entry in top.names.values():
            if entry is node:
                return top
            if isinstance(entry, Directory):
                found = self._search(entry, node)
                if found is not None:
                    return found
        return None

    def _base(self, dir_fd: Optional[int]) -> Optional[Directory]:
        if dir_fd is None:
            return None
        node = self._fd(dir_fd).node
        if not isinstance(node, Directory):
            raise fail(errno.ENOTDIR)
        return node

    def _place(self, path: Any, dir_fd: Optional[int]) -> tuple[Directory, str]:
        """The directory that has, or is to have, the last name of a path."""
        text = _text(path).rstrip("/")
        head, _, name = text.rpartition("/")
        base = self._base(dir_fd)
        if text.startswith("/") and not head:
            above: Entry = self.disk.root
        else:
            above = self.walk(head, base=base) if head else (base or self.cwd)
        if not isinstance(above, Directory):
            raise fail(errno.ENOTDIR)
        return above, name

    def _fd(self, fd: int) -> Opened:
        found = self.fds.get(fd)
        if found is None:
            raise fail(errno.EBADF)
        return found

    def _give(self, opened: Opened) -> int:
        fd = self.next_fd
        self.next_fd += 1
        self.fds[fd] = opened
        return fd

    def exists(self, path: Any, follow: bool = True) -> bool:
        self.enter()
        try:
            self.walk(_text(path), follow=follow)
            return True
        except OSError:
            return False

    def access(self, path: Any, mode: int) -> bool:
        assert mode == real_os.F_OK
        return self.exists(path)

    def _room(self) -> None:
        if self.disk.full:
            raise fail(errno.ENOSPC)

    # --- files

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: Optional[int] = None) -> int:
        self.enter()
        text = _text(path)
        if text in ("/dev/null",) or text.startswith("/proc/"):
            raise fail(errno.ENOENT)
        node: Optional[Entry]
        if flags & real_os.O_CREAT:
            above, name = self._place(text, dir_fd)
            node = above.names.get(name)
            if node is None:
                self._room()
                node = File(self.disk, mode)
                above.change((name, node))
            elif flags & real_os.O_EXCL:
                raise fail(errno.EEXIST)
        else:
            node = self.walk(text, base=self._base(dir_fd), follow=not flags & real_os.O_NOFOLLOW)
        if isinstance(node, Link):
            raise fail(errno.ELOOP)
        if flags & real_os.O_DIRECTORY and not isinstance(node, Directory):
            raise fail(errno.ENOTDIR)
        if isinstance(node, File):
            if flags & real_os.O_TRUNC and node.content:
                node.change(("size", 0, b""))
            access = flags & (real_os.O_WRONLY | real_os.O_RDWR)
            if flags & real_os.O_APPEND and access == real_os.O_WRONLY:
                node.appends = True
        return self._give(Opened(node, flags))

    def close(self, fd: int) -> None:
        self.enter()
        opened = self._fd(fd)
        del self.fds[fd]
        # A record lock goes with *any* descriptor of the file that its owner closes.
        if isinstance(opened.node, File) and self.locks.records.get(opened.node.ino) is self:
            del self.locks.records[opened.node.ino]
        self._release(opened)

    def _release(self, opened: Opened) -> None:
        opened.uses -= 1
        if opened.uses:
            return
        if isinstance(opened.node, Pipe):
            if opened.write_end:
                opened.node.writers -= 1
            else:
                opened.node.readers -= 1
        elif opened.locks:
            self.locks.flocks.pop(opened.node.ino, None)

    def dup(self, fd: int) -> int:
        self.enter()
        opened = self._fd(fd)
        opened.uses += 1
        return self._give(opened)

    def read(self, fd: int, most: int) -> bytes:
        self.enter()
        opened = self._fd(fd)
        if isinstance(opened.node, Pipe):
            return self.read_pipe(opened.node, most)
        if not isinstance(opened.node, File):
            raise fail(errno.EISDIR)
        data = bytes(opened.node.content[opened.at : opened.at + most])
        opened.at += len(data)
        return data

    def read_pipe(self, pipe: Pipe, most: int) -> bytes:
        if not pipe.data and pipe.writers:
            raise BlockingIOError(errno.EAGAIN, "nothing there")
        data = bytes(pipe.data[:most])
        del pipe.data[:most]
        return data

    def readv(self, fd: int, buffers: list[memoryview]) -> int:
        data = self.read(fd, len(buffers[0]))
        buffers[0][: len(data)] = data
        return len(data)

    def pread(self, fd: int, most: int, offset: int) -> bytes:
        self.enter()
        node = self._fd(fd).node
        if not isinstance(node, File):
            raise fail(errno.EISDIR)
        if offset < 0:
            raise fail(errno.EINVAL)
        return bytes(node.content[offset : offset + most])

    def write(self, fd: int, data: Any) -> int:
        self.enter()
        opened = self._fd(fd)
        node = opened.node
        if isinstance(node, Pipe):
            node.data += data
            return len(data)
        if not isinstance(node, File):
            raise fail(errno.EBADF)
        if opened.flags & real_os.O_APPEND:
            opened.at = len(node.content)
        count = self._put(node, bytes(data), opened.at)
        opened.at += count
        return count

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        self.enter()
        opened = self._fd(fd)
        if not isinstance(opened.node, File):
            raise fail(errno.EBADF)
        if opened.flags & real_os.O_APPEND:
            offset = len(opened.node.content)  # as Linux has it
        return self._put(opened.node, bytes(data), offset)

    def _put(self, node: File, data: bytes, offset: int) -> int:
        if self.disk.full and data:
            # What lies in blocks that are there already can be written still.
            room = max(len(node.content), -(-len(node.content) // PAGE) * PAGE if node.content else 0)
            data = data[: max(0, room - offset)]
            if not data:
                raise fail(errno.ENOSPC)
        node.change(("write", offset, data))
        return len(data)

    def ftruncate(self, fd: int, size: int) -> None:
        self.enter()
        node = self._fd(fd).node
        assert isinstance(node, File)
        if size != len(node.content):
            node.change(("size", size, b""))
        node.allocated = min(node.allocated, size)
        node.punched = min(node.punched, size)

    def posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        self.enter()
        self._room()
        node = self._fd(fd).node
        assert isinstance(node, File)
        node.allocated = offset + length
        if len(node.content) < offset + length:
            node.change(("size", offset + length, b""))

    def punch(self, path: Any, upto: int) -> None:
        """`fallocate` with PUNCH_HOLE, from the file's start."""
        self.enter()
        node = self.walk(_text(path))
        assert isinstance(node, File)
        if upto > node.punched:
            node.change(("punch", upto, b""))
            node.punched = upto

    def lseek(self, fd: int, offset: int, whence: int) -> int:
        self.enter()
        node = self._fd(fd).node
        assert isinstance(node, File) and whence in (real_os.SEEK_DATA, real_os.SEEK_END)
        if whence == real_os.SEEK_END:
            return len(node.content) + offset
        at = max(offset, node.punched)
        if at >= len(node.content):
            raise fail(errno.ENXIO)
        return at

    def fsync(self, fd: int) -> None:
        self.enter()
        node = self._fd(fd).node
        assert isinstance(node, (File, Directory))
        node.sync()

    def fdatasync(self, fd: int) -> None:
        self.fsync(fd)

    def sync(self) -> None:
        self.enter()
        self.disk.sync_all("/")

    def fstat(self, fd: int) -> real_os.stat_result:
        self.enter()
        node = self._fd(fd).node
        assert not isinstance(node, Pipe)
        return _stat(node)

    def stat(
        self, path: Any, *, dir_fd: Optional[int] = None, follow_symlinks: bool = True
    ) -> real_os.stat_result:
        if isinstance(path, int):
            return self.fstat(path)
        self.enter()
        return _stat(self.walk(_text(path), base=self._base(dir_fd), follow=follow_symlinks))

    def lstat(self, path: Any) -> real_os.stat_result:
        return self.stat(path, follow_symlinks=False)

    def fchmod(self, fd: int, mode: int) -> None:
        self.enter()
        self._chmod(self._fd(fd).node, mode)

    def chmod(self, path: Any, mode: int) -> None:
        self.enter()
        self._chmod(self.walk(_text(path)), mode)

    def _chmod(self, node: Any, mode: int) -> None:
        node.mode = stat.S_IFMT(node.mode) | mode
        node.ctime = self.disk.now()

    def statvfs(self, path: Any) -> Any:
        self.enter()
        free = 0 if self.disk.full else 1 << 20
        return real_os.statvfs_result((PAGE, PAGE, 1 << 21, free, free, 1 << 20, 1 << 20, 1 << 20, 0, 255))

    # --- directories

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: Optional[int] = None) -> None:
        self.enter()
        above, name = self._place(path, dir_fd)
        if not name or name in above.names:
            raise fail(errno.EEXIST)
        self._room()
        above.change((name, Directory(self.disk, mode)))

    def makedirs(self, path: Any, mode: int = 0o777, exist_ok: bool = False) -> None:
        text, at = _text(path), ""
        for part in text.strip("/").split("/"):
            at = f"{at}/{part}"
            try:
                self.mkdir(at, mode)
            except FileExistsError:
                pass

    def rmdir(self, path: Any) -> None:
        self.enter()
        above, name = self._place(path, None)
        node = above.names.get(name)
        if node is None:
            raise fail(errno.ENOENT)
        if not isinstance(node, Directory):
            raise fail(errno.ENOTDIR)
        if node.names:
            raise fail(errno.ENOTEMPTY)
        above.change((name, None))

    def unlink(self, path: Any, *, dir_fd: Optional[int] = None) -> None:
        self.enter()
        above, name = self._place(path, dir_fd)
        node = above.names.get(name)
        if node is None:
            raise fail(errno.ENOENT)
        if isinstance(node, Directory):
            raise fail(errno.EISDIR)
        node.nlink -= 1
        above.change((name, None))

    def rename(
        self, old: Any, new: Any, *, src_dir_fd: Optional[int] = None, dst_dir_fd: Optional[int] = None
    ) -> None:
        self.enter()
        above, name = self._place(old, src_dir_fd)
        below, other = self._place(new, dst_dir_fd)
        node = above.names.get(name)
        if node is None:
            raise fail(errno.ENOENT)
        there = below.names.get(other)
        if isinstance(there, Directory) and there.names:
            raise fail(errno.ENOTEMPTY)
        node.ctime = self.disk.now()
        if above is below:
            above.change((name, None), (other, node))
        else:
            below.change((other, node))
            above.change((name, None))

    def symlink(self, target: Any, path: Any) -> None:
        self.enter()
        above, name = self._place(path, None)
        if name in above.names:
            raise fail(errno.EEXIST)
        above.change((name, Link(self.disk, _text(target))))

    def link(self, old: Any, new: Any) -> None:
        self.enter()
        node = self.walk(_text(old))
        above, name = self._place(new, None)
        if name in above.names:
            raise fail(errno.EEXIST)
        node.nlink += 1
        above.change((name, node))

    def readlink(self, path: Any, *, dir_fd: Optional[int] = None) -> Any:
        self.enter()
        node = self.walk(_text(path), base=self._base(dir_fd), follow=False)
        if not isinstance(node, Link):
            raise fail(errno.EINVAL)
        return real_os.fsencode(node.target) if isinstance(real_os.fspath(path), bytes) else node.target

    def listdir(self, path: Any) -> list[Any]:
        self.enter()
        names = list(self._directory(path).names)
        as_bytes = not isinstance(path, int) and isinstance(real_os.fspath(path), bytes)
        return [real_os.fsencode(name) for name in names] if as_bytes else names

    def scandir(self, path: Any) -> Items:
        self.enter()
        text = "" if isinstance(path, int) else _text(path)
        as_bytes = not isinstance(path, int) and isinstance(real_os.fspath(path), bytes)
        found = self._directory(path).names.items()
        return Items(Item(self, text, name, entry, as_bytes) for name, entry in found)

    def _directory(self, path: Any) -> Directory:
        node = self._fd(path).node if isinstance(path, int) else self.walk(_text(path))
        if not isinstance(node, Directory):
            raise fail(errno.ENOTDIR)
        return node

    def chdir(self, path: Any) -> None:
        self.enter()
        self.cwd = self._directory(path)

    # --- locks (the module `fcntl`)

    def flock(self, fd: int, how: int) -> None:
        self.enter()
        opened = self._fd(fd)
        assert isinstance(opened.node, (File, Directory))
        holder = self.locks.flocks.get(opened.node.ino)
        if holder is not None and holder is not opened:
            raise BlockingIOError(errno.EWOULDBLOCK, "locked")
        if how & real_fcntl.LOCK_SH:
            return  # who shares one lets it go at once
        self.locks.flocks[opened.node.ino] = opened
        opened.locks = True

    def lockf(self, fd: int, how: int) -> None:
        self.enter()
        node = self._fd(fd).node
        assert isinstance(node, File)
        if self.locks.records.get(node.ino, self) is not self:
            raise BlockingIOError(errno.EAGAIN, "locked")
        self.locks.records[node.ino] = self

    def fcntl(self, fd: int, what: int, arg: Any = 0) -> Any:
        self.enter()
        node = self._fd(fd).node
        if isinstance(node, Pipe):
            return node.capacity
        assert what == real_fcntl.F_GETLK
        holder = self.locks.records.get(node.ino)
        layout = "hhqqi4x"
        if holder is None or holder is self:
            return struct.pack(layout, real_fcntl.F_UNLCK, 0, 0, 0, 0)
        return struct.pack(layout, real_fcntl.F_WRLCK, 0, 0, 0, holder.pid)

    # --- pipes and processes

    def pipe(self) -> tuple[int, int]:
        self.enter()
        return self.give_pipe(Pipe())

    def give_pipe(self, pipe: Pipe) -> tuple[int, int]:
        pipe.readers, pipe.writers = 1, 1
        return self._give(Opened(pipe, 0)), self._give(Opened(pipe, 0, write_end=True))

    def pipe2(self, flags: int) -> tuple[int, int]:
        return self.pipe()

    def set_blocking(self, fd: int, blocking: bool) -> None:
        self.enter()

    def getpid(self) -> int:
        return self.pid

    def geteuid(self) -> int:
        return 0

    def umask(self, mask: int) -> int:
        return 0o022

    def waitid(self, *_: Any) -> Any:
        raise ChildProcessError(errno.ECHILD, "no child")

    def _exit(self, status: int) -> None:
        raise Killed


_PURE = frozenset(
    ("F_OK", "fsencode", "fsdecode", "fspath", "strerror", "stat_result", "pathsep", "PathLike", "uname")
)


def make_path(process_of: Callable[[], Process]) -> type:
    """`pathlib.Path`, with its I/O in whatever process runs."""

    class SimPath:
        __slots__ = ("_text",)

        def __init__(self, *parts: Any) -> None:
            self._text = posixpath.normpath(posixpath.join(*map(_text, parts)))

        def __fspath__(self) -> str:
            return self._text

        __str__ = __fspath__

        def __repr__(self) -> str:
            return f"SimPath({self._text!r})"

        def __hash__(self) -> int:
            return hash(self._text)

        def __eq__(self, other: object) -> bool:
            return isinstance(other, SimPath) and other._text == self._text

        def __lt__(self, other: Any) -> bool:
            return bool(self._text < other._text)

        def __truediv__(self, name: Any) -> SimPath:
            made = SimPath.__new__(SimPath)
            made._text = f"{self._text}/{_text(name)}"
            return made

        @property
        def name(self) -> str:
            return posixpath.basename(self._text)

        @property
        def parent(self) -> SimPath:
            return SimPath(posixpath.dirname(self._text))

        def with_name(self, name: str) -> SimPath:
            return self.parent / name

        def absolute(self) -> SimPath:
            return self

        def is_absolute(self) -> bool:
            return self._text.startswith("/")

        def read_bytes(self) -> bytes:
            os = process_of()
            fd = os.open(self, real_os.O_RDONLY)
            try:
                return os.read(fd, 1 << 30)
            finally:
                os.close(fd)

        def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
            os = process_of()
            if parents and not os.exists(self.parent):
                self.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.mkdir(self, mode)
            except FileExistsError:
                if not exist_ok or not self.is_dir():
                    raise

        def rename(self, other: Any) -> None:
            process_of().rename(self, other)

        def unlink(self, missing_ok: bool = False) -> None:
            try:
                process_of().unlink(self)
            except FileNotFoundError:
                if not missing_ok:
                    raise

        def touch(self, mode: int = 0o666) -> None:
            os = process_of()
            os.close(os.open(self, real_os.O_WRONLY | real_os.O_CREAT, mode))

        def symlink_to(self, target: Any) -> None:
            process_of().symlink(target, self)

        def stat(self) -> real_os.stat_result:
            return process_of().stat(self)

        def chmod(self, mode: int) -> None:
            process_of().chmod(self, mode)

        def exists(self) -> bool:
            return process_of().exists(self)

        def is_dir(self) -> bool:
            return bool(process_of().path.isdir(self))

        def iterdir(self) -> Iterator[SimPath]:
            for name in process_of().listdir(self):
                yield self / name

    return SimPath


def rmtree(process: Process, path: Any, ignore_errors: bool = False) -> None:
    """`shutil.rmtree`."""
    try:
        for name in process.listdir(path):
            below = f"{_text(path)}/{name}"
            if stat.S_ISDIR(process.lstat(below).st_mode):
                rmtree(process, below)
            else:
                process.unlink(below)
        process.rmdir(path)
    except OSError:
        if not ignore_errors:
            raise
