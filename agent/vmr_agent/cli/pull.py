"""What lives here: `pull`: a file or a tree out of a VM.

It must not know: sessions, frames, the collector. A VM is not trusted: it names files, says sizes and sends bytes,
and none of that may touch anything on the host but the destination.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from vmr_agent.cli.progress import Progress
from vmr_agent.cli.remote import Ask, Remote, kind, remote_of
from vmr_agent.contents import Written, write_all
from vmr_agent.errors import Problem, show
from vmr_agent.wire.messages import PIECE

_SPAN = 32 * PIECE  # bytes asked for in one request
_MOST = 1_000_000  # entries of a tree: ten times what anyone has, and what a VM may make us remember
_FACTS = ("name", "kind", "size", "mode", "mtime", "id", "target")  # of an entry, as PROTOCOL.md has them
_LONGEST = 4096  # characters of one of them: a link's target, PATH_MAX
_STREAMS = (b"/dev/std", b"/dev/fd/", b"/proc/self/fd/")
_MODE = 0o777  # of a file that a VM sends: with its set-uid bit others would run a VM's program as our user


def pull(args: argparse.Namespace) -> int:
    """`vmr-host pull FILE VM DESTINATION`."""
    source = os.fsencode(args.file)
    name = os.path.basename(source.rstrip(b"/"))
    with Progress(show(name)) as progress:
        remote = remote_of(args, "pull", progress)
        facts, _ = remote.ask("stat", path=source)
        found = kind(facts)
        if found not in ("file", "directory"):
            what = os.strerror(errno.ENOENT) if found == "nothing" else f"is a {found}"
            raise Problem(f"cannot pull {args.vm}:{show(remote.bytes(facts, 'path'))}: {what}")
        target = _target(os.fsencode(args.destination), name)
        try:
            if found == "file":
                line = _pull_file(remote, facts, target, progress)
            else:
                line = _pull_tree(remote, remote.bytes(facts, "path"), target, progress)
        except OSError as error:  # of our own files: Remote has none
            raise Problem(f"cannot write {show(target)}: {error.strerror or error}") from None
    print(line)
    return 0


def _target(destination: bytes, name: bytes) -> bytes:
    """Where it goes: into a directory, or to just this path."""
    given = destination
    if os.path.isdir(destination):
        if name in (b"", b".", b".."):
            raise Problem(f"cannot pull to {show(destination)}: give the name it shall have there")
        destination = os.path.join(destination, name)
    elif destination.endswith(b"/"):
        raise Problem(f"cannot pull to {show(destination)}: there is no such directory")
    if os.path.islink(destination):
        destination = os.path.realpath(destination)
    parent = os.path.dirname(os.path.abspath(destination))
    if not os.path.isdir(parent):
        raise Problem(f"cannot pull to {show(destination)}: there is no directory {show(parent)}")
    if os.path.abspath(given).startswith(_STREAMS):  # which may lead to a file that others write to
        raise Problem(f"cannot pull to {show(given)}: it replaces a file in one step, and none there can be")
    if os.path.exists(destination) and not os.path.isfile(destination) and not os.path.isdir(destination):
        raise Problem(f"cannot pull to {show(destination)}: a device or the like is there")
    return os.path.abspath(destination)


class _Incoming:
    """One file on its way in, into a descriptor that nobody else writes to."""

    def __init__(
        self, remote: Remote, path: bytes, facts: Mapping[str, Any], fd: int, progress: Progress
    ) -> None:
        self._remote, self._path, self._fd, self._progress = remote, path, fd, progress
        self._id = remote.bytes(facts, "id")
        self._size = remote.number(facts, "size")
        self._mode = remote.number(facts, "mode") & _MODE
        self._mtime = remote.number(facts, "mtime", least=-(2**63))
        self._at = 0
        """Up to where it is asked for."""
        self._written = Written(remote.digest)
        self._flying = 0
        self._asked_all = False
        self._digest = b""

    def asks(self) -> Iterator[Ask]:
        # The digest first: the VM computes it while it sends.
        self._flying += 1
        args = {"path": self._path, "id": self._id, "kind": self._written.kind.encode()}
        yield Ask("digest", args, answered=self._take_digest)
        while self._at < self._size:
            start, self._at = self._at, min(self._at + _SPAN, self._size)
            self._flying += 1
            yield self._read(start, self._at)
        self._asked_all = True
        self._finish()

    @property
    def done(self) -> bool:
        return self._fd < 0

    def _read(self, start: int, end: int) -> Ask:
        args: dict[str, Any] = {"path": self._path, "id": self._id, "offset": start, "end": end}

        def came(at: int, data: memoryview) -> None:
            if not args["offset"] <= at <= end - len(data):
                raise self._remote.nonsense("it sends other bytes than were asked for")
            self._take(at, data)
            args["offset"] = at + len(data)  # asked again, it is for the rest

        def take(result: Mapping[str, Any], data: bytes) -> None:
            at = self._remote.number(result, "at")
            if at < end:
                raise self._remote.nonsense("a file is shorter than it was")
            self._progress.add(end - start)
            skip = min(at, self._size) - self._at
            if skip > 0:  # a hole: nothing in it need be asked for
                self._at += skip
                self._progress.add(skip)
            self._landed()

        return Ask("read", args, answered=take, came=came, size=max(end - start, PIECE))

    def _take(self, at: int, data: memoryview) -> None:
        if at < self._written.at or not data:
            raise self._remote.nonsense("the bytes of a file come in no order")
        self._written.write(self._fd, data, at)

    def _take_digest(self, result: Mapping[str, Any], data: bytes) -> None:
        self._digest = self._remote.bytes(result, "digest")
        self._landed()

    def _landed(self) -> None:
        self._flying -= 1
        if self._asked_all:
            self._finish()

    def _finish(self) -> None:
        if self._flying or self._fd < 0:
            return
        os.ftruncate(self._fd, self._size)
        if self._written.digest(self._size) != self._digest:
            raise Problem(
                f"cannot pull {self._remote.vm}:{show(self._path)}: what arrived is not what is there",
                hint="was it written to meanwhile?",
            )
        os.fchmod(self._fd, self._mode)
        _utime(self._fd, self._mtime)
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _pull_file(remote: Remote, facts: Mapping[str, Any], target: bytes, progress: Progress) -> str:
    if os.path.isdir(target):
        raise Problem(f"cannot pull to {show(target)}: a directory of this name is there")
    path, size = remote.bytes(facts, "path"), remote.number(facts, "size")
    progress.begin(size)
    directory, name = os.path.split(target)
    fd, part = tempfile.mkstemp(prefix=b"." + name[:100] + b".", suffix=b".part", dir=directory)
    try:
        if size:
            incoming = _Incoming(remote, path, facts, fd, progress)
            remote.all(incoming.asks())
        else:
            _pull_unsized(remote, path, facts, fd, progress)
        _sync(part)
        os.rename(part, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise
    return progress.line()


def _pull_unsized(remote: Remote, path: bytes, facts: Mapping[str, Any], fd: int, progress: Progress) -> None:
    """An empty file, or one of the kernel's, as in /proc: they say 0 and end where they end, each time elsewhere."""
    at, more = 0, True
    args: dict[str, Any] = {}

    def came(start: int, data: memoryview) -> None:
        nonlocal at, more
        if not data or start != at or at + len(data) > args["end"]:
            raise remote.nonsense("it sends other bytes than were asked for")
        write_all(fd, data, at)
        at += len(data)
        args["offset"], more = at, True  # asked again, it is for the rest
        progress.add(len(data))

    while more:
        more = False
        args = {"path": path, "offset": at, "end": at + PIECE}
        remote.all(iter([Ask("read", args, came=came)]))
    os.fchmod(fd, remote.number(facts, "mode") & _MODE)
    _utime(fd, remote.number(facts, "mtime", least=-(2**63)))
    os.close(fd)


def _pull_tree(remote: Remote, path: bytes, target: bytes, progress: Progress) -> str:
    if os.path.lexists(target):
        raise Problem(
            f"cannot pull to {show(target)}: it is there already",
            hint="a directory replaces nothing: move it away, or name another",
        )
    entries = list(_manifest(remote, path))
    files = [(inside, facts) for inside, facts in entries if facts["kind"] == "file"]
    progress.begin(sum(remote.number(facts, "size") for _, facts in files))
    directory, name = os.path.split(target)
    part = tempfile.mkdtemp(prefix=b"." + name[:100] + b".", suffix=b".part", dir=directory)
    # Directories, then files, then links: while anything is written there is no link on the way.
    try:
        for inside, facts in entries:
            if facts["kind"] == "directory":
                os.mkdir(os.path.join(part, inside), 0o700)
        incoming: list[_Incoming] = []
        try:
            remote.all(_tree_asks(remote, path, files, part, incoming, progress))
        finally:
            for each in incoming:
                each.close()
        for inside, facts in entries:
            if facts["kind"] == "link":
                leads_to = remote.bytes(facts, "target")
                if b"\0" in leads_to:
                    raise remote.nonsense(f"a link leads to {show(leads_to)}")
                os.symlink(leads_to, os.path.join(part, inside))
        for inside, facts in [*entries[::-1], (b"", remote.ask("stat", path=path)[0])]:
            if facts.get("kind") == "directory":
                made = os.path.join(part, inside)
                os.chmod(made, remote.number(facts, "mode") & _MODE)
                _utime(made, remote.number(facts, "mtime", least=-(2**63)))
        os.sync()
        os.rename(part, target)
    except BaseException:
        _remove_tree(part)
        raise
    return progress.line(f"{len(entries)} entries")


def _tree_asks(
    remote: Remote,
    path: bytes,
    files: Sequence[tuple[bytes, Mapping[str, Any]]],
    part: bytes,
    incoming: list[_Incoming],
    progress: Progress,
) -> Iterator[Ask]:
    for inside, facts in files:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(os.path.join(part, inside), flags, 0o600)
        incoming[:] = [each for each in incoming if not each.done]
        incoming.append(_Incoming(remote, os.path.join(path, inside), facts, fd, progress))
        yield from incoming[-1].asks()


def _manifest(remote: Remote, top: bytes) -> Iterator[tuple[bytes, Mapping[str, Any]]]:
    """What is in a directory of the VM, each directory before what is in it: a path below ``top``, and what it is."""
    directories = [b""]
    count = 0
    while directories:
        directory = directories.pop()
        after, more = b"", True
        while more:
            result, data = remote.ask("list", path=os.path.join(top, directory), after=after)
            more = result.get("more") is True
            for facts in _facts(remote, data):
                name = remote.bytes(facts, "name")
                # One segment, none of those that lead elsewhere, and later than the one before, so that the list ends.
                if b"/" in name or b"\0" in name or name in (b".", b"..") or len(name) > 255 or name <= after:
                    raise remote.nonsense(f"a file's name is {show(name)}")
                after = name
                inside = os.path.join(directory, name)
                count += 1
                if count > _MOST or len(inside) > 4096:
                    raise remote.nonsense(f"{show(top)} has no end")
                if facts.get("kind") not in ("file", "directory", "link"):
                    print(f"skipped {show(inside)}: a {kind(facts)}", file=sys.stderr)
                    continue
                if facts["kind"] == "directory":
                    directories.append(inside)
                yield inside, facts
            if more and not data:
                raise remote.nonsense(f"{show(top)} has no end")


def _facts(remote: Remote, data: bytes) -> Iterator[Mapping[str, Any]]:
    for line in data.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise remote.nonsense("a directory's list is no JSON")
        # What is not known here isn't kept, and nothing that is too long: a VM makes all of it.
        facts = {key: row.get(key) for key in _FACTS}
        for fact in facts.values():
            if not (fact is None or type(fact) is int or (type(fact) is str and len(fact) <= _LONGEST)):
                raise remote.nonsense("a file's facts have no end")
        yield facts


# --- our own files ---


def _sync(path: bytes) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    os.fsync(fd)
    os.close(fd)


def _utime(target: Any, mtime: int) -> None:
    with suppress(OverflowError):  # a time beyond what this file system knows
        os.utime(target, ns=(mtime, mtime))


def _remove_tree(path: bytes) -> None:
    for directory, _, _ in os.walk(path):
        with suppress(OSError):
            os.chmod(directory, 0o700)  # a mode that came with it may keep us out
    shutil.rmtree(path, ignore_errors=True)
