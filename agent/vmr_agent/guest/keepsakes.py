"""What lives here: the files of a VMR as they lay there when an attempt began, small ones with their content.

Kept in the run's directory, for `diff`, for "changed since staging", and to see what was saved meanwhile. Nothing
else needs them: where they can't be kept the run starts all the same. It must not know: the daemon, what has run.

    <run>/files.json    every file's signature, and the name of its copy
    <run>/files/<n>     the copies; one that is unchanged since the attempt before is a link to that one's

Copies are never links to the VMR's own files, which are edited in place, and nothing is hashed: a start waits.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

from vmr_agent.errors import show
from vmr_agent.runs import whole

MAX_SURVEYED = 1000  # files; what comes after isn't looked at, for a start waits for it
MAX_KEPT = 64  # files of one attempt
MAX_KEPT_BYTES = 8 << 20  # of one attempt
_MAX_DEPTH = 16
# Two writes within one tick of the kernel's clock leave the same times. A copy made so soon after its file was
# changed may lack a later change that nothing shows.
_TICK_NS = 20_000_000

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # non-blocking: it may be a FIFO by now
_MANIFEST, _COPIES = "files.json", "files"


class File(NamedTuple):
    """One file as it was seen. Links are not followed; a file that is no regular one is only noted."""

    mode: int
    uid: int
    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int
    target: str = ""
    """Where a link leads."""
    kept: str = ""
    """The name of its copy."""

    @property
    def regular(self) -> bool:
        return stat.S_ISREG(self.mode)

    def untouched(self, earlier: File) -> bool:
        """Whether nothing can have happened to it since."""
        return self._replace(kept="") == earlier._replace(kept="")


Files = Mapping[bytes, File]
"""By path below the VMR's directory."""


class Change(NamedTuple):
    """A file that is not what it was; None where there was none, or is none."""

    path: bytes
    before: Optional[File]
    after: Optional[File]


class Snapshot:
    """A VMR's files at one time: now, or when an attempt began."""

    def __init__(self, files: Files, open_file: Callable[[bytes], int]) -> None:
        self.files = files
        self._open = open_file

    @property
    def cut(self) -> bool:
        """Whether there may have been more files than were looked at."""
        return len(self.files) >= MAX_SURVEYED

    def open(self, path: bytes) -> Optional[int]:
        """A descriptor of a regular file's content; None where that is not to be had."""
        file = self.files.get(path)
        if file is None or not file.regular:
            return None
        try:
            return self._open(path)
        except OSError:
            return None

    def read(self, path: bytes, most: int) -> Optional[bytes]:
        """A regular file's content; None where that is not to be had, or longer than ``most``."""
        fd = self.open(path)
        if fd is None:
            return None
        with os.fdopen(fd, "rb") as file, contextlib.suppress(OSError):
            data = file.read(most + 1)
            return data if len(data) <= most else None
        return None


def now(directory: bytes) -> Snapshot:
    """The files in a VMR's directory. OSError when there is no such directory."""
    root = os.open(directory, _DIRECTORY)
    try:
        files = dict(_walk(root, b"", 0))
    finally:
        os.close(root)
    return Snapshot(files, lambda path: _open_below(directory, path))


def kept(run: Path) -> Optional[Snapshot]:
    """The files when the attempt in a run's directory began; None when that was not noted."""
    row = _manifest(run)
    if row is None:
        return None
    files = row[1]
    return Snapshot(files, lambda path: os.open(run / _COPIES / (files[path].kept or "none"), _FILE))


def changes(before: Snapshot, after: Snapshot) -> list[Change]:
    """What differs, by path. A file that was only touched, or written anew with the same content, does not."""
    found = []
    for path in sorted(before.files.keys() | after.files.keys()):
        one, other = before.files.get(path), after.files.get(path)
        if (one is None and before.cut) or (other is None and after.cut):
            continue  # nobody knows whether it was there
        if one is None or other is None or _differs(path, before, after):
            found.append(Change(path, one, other))
    return found


def edited(staged: Snapshot, present: Snapshot) -> list[bytes]:
    """The files that were staged and are not what they were. A file that came later may be the script's own."""
    return [change.path for change in changes(staged, present) if change.before is not None]


def pull_hint(vmr: bytes, paths: Sequence[bytes], host_name: str) -> str:
    """How to bring home what was edited, in one line. A guest knows its host name, which is its VM's as a rule."""
    what = vmr + b"/" + paths[0] if len(paths) == 1 else vmr
    vm = "VM" if host_name in ("", "localhost", "(none)") else host_name
    return f"{show(vmr)} changed since staging: vmr-host pull {shlex.quote(show(what))} {vm} ."


def keep(
    run: Path, directory: bytes, *, previous: Optional[Path], each: int, room: int, trusted: frozenset[int]
) -> None:
    """Note the files of a VMR with an attempt that is about to start, and keep the small ones.

    ``each`` is the longest file kept, ``room`` how much may be copied at all; ``trusted`` owns what is kept.
    OSError where it can't be done.
    """
    try:
        _keep(run, directory, previous, each, room, trusted)
    except OSError:
        shutil.rmtree(run / _COPIES, ignore_errors=True)  # on a full disk the run needs the room
        raise


# --- inside --------------------------------------------------------------------------------------------------


def _keep(
    run: Path, directory: bytes, previous: Optional[Path], each: int, room: int, trusted: frozenset[int]
) -> None:
    began_ns = time.time_ns()
    present = now(directory)
    earlier_ns, earlier = (previous and _manifest(previous)) or (0, {})
    room = min(room, MAX_KEPT_BYTES) if each else -1
    files = dict(present.files)
    copies = 0
    for path in sorted(files, key=lambda path: files[path].size):
        file = files[path]
        if not file.regular or file.uid not in trusted or file.size > min(each, room) or copies >= MAX_KEPT:
            continue
        if not copies:
            (run / _COPIES).mkdir(mode=0o700, exist_ok=True)
        name = str(copies)
        before = earlier.get(path)
        same = before is not None and file.untouched(before) and file.ctime_ns < earlier_ns - _TICK_NS
        linked = same and before is not None and _link(previous, before.kept, run, name)
        if not linked and not _copy(directory, path, run / _COPIES / name, each, trusted):
            continue
        room -= file.size
        copies += 1
        files[path] = file._replace(kept=name)
    rows = {os.fsdecode(path): list(file) for path, file in files.items()}
    text = json.dumps({"at_ns": began_ns, "files": rows}).encode() + b"\n"
    fd = os.open(run / _MANIFEST, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as manifest:
        manifest.write(text)


def _manifest(run: Path) -> Optional[tuple[int, dict[bytes, File]]]:
    try:
        row = json.loads((run / _MANIFEST).read_bytes())
        return whole(row["at_ns"]), {os.fsencode(path): _file(each) for path, each in row["files"].items()}
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None


def _file(row: Sequence[Any]) -> File:
    file = File(*row)
    numbers, texts = file[:6], file[6:]
    if not all(type(each) is int for each in numbers) or not all(type(each) is str for each in texts):
        raise ValueError("no signature of a file")
    if file.kept and not file.kept.isdecimal():
        raise ValueError("no name of a copy")
    os.fsencode(file.target)
    return file


def _walk(fd: int, prefix: bytes, depth: int) -> Iterator[tuple[bytes, File]]:
    """Every file below an open directory, in whatever order; what vanishes under the walk is left out."""
    left = MAX_SURVEYED
    try:
        items = os.scandir(fd)
    except OSError:
        return
    with items:
        for item in items:
            name = os.fsencode(item.name)
            try:
                info = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if stat.S_ISDIR(info.st_mode):
                    if depth >= _MAX_DEPTH:
                        continue
                    below = os.open(name, _DIRECTORY, dir_fd=fd)
                    try:
                        for found in _walk(below, prefix + name + b"/", depth + 1):
                            yield found
                            left -= 1
                            if left <= 0:
                                return
                    finally:
                        os.close(below)
                    continue
                target = os.readlink(name, dir_fd=fd) if stat.S_ISLNK(info.st_mode) else b""
            except OSError:
                continue
            yield (
                prefix + name,
                File(
                    *(
                        info.st_mode,
                        info.st_uid,
                        info.st_size,
                        info.st_ino,
                        info.st_mtime_ns,
                        info.st_ctime_ns,
                    ),
                    target=os.fsdecode(target),
                ),
            )
            left -= 1
            if left <= 0:
                return


def _open_below(directory: bytes, path: bytes) -> int:
    """Open a file below a directory, following no link on the way."""
    *above, name = path.split(b"/")
    fd = os.open(directory, _DIRECTORY)
    try:
        for part in above:
            below = os.open(part, _DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = below
        return os.open(name, _FILE, dir_fd=fd)
    finally:
        os.close(fd)


def _differs(path: bytes, before: Snapshot, after: Snapshot) -> bool:
    one, other = before.files[path], after.files[path]
    # The cases: another kind, mode, size or target; untouched; not regular; content to be had from both; else
    # the times decide.
    if (one.mode, one.size, one.target) != (other.mode, other.size, other.target):
        return True
    if one.untouched(other) or not one.regular:
        return False
    mine = before.read(path, one.size)
    theirs = (
        after.read(path, one.size) if mine is not None else None
    )  # one too large to be kept is not read either
    if mine is not None and theirs is not None:
        return mine != theirs
    return one.mtime_ns != other.mtime_ns


def _link(previous: Optional[Path], copy: str, run: Path, name: str) -> bool:
    if previous is None or not copy:
        return False
    try:
        os.link(previous / _COPIES / copy, run / _COPIES / name)
    except OSError:
        return False  # pruned, or it has too many names
    return True


def _copy(directory: bytes, path: bytes, target: Path, each: int, trusted: frozenset[int]) -> bool:
    """Copy a file; False where it is not what it was when it was looked at, or can't be read."""
    try:
        source = _open_below(directory, path)
    except OSError:
        return False
    try:
        info = os.fstat(source)
        if not stat.S_ISREG(info.st_mode) or info.st_uid not in trusted or info.st_size > each:
            return False
        copy = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            at = 0
            while at < info.st_size:
                count = os.sendfile(copy, source, at, info.st_size - at)
                if not count:
                    break
                at += count
        except OSError:
            target.unlink()
            raise
        finally:
            os.close(copy)
        return True
    finally:
        os.close(source)
