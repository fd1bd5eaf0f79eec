"""What lives here: `push`: a file or a tree into a VM, where it gets its name when all of it is there and right.

It must not know: sessions, frames, the collector; what a tree is for.
"""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Optional

from vmr_agent.cli.progress import LONG, Progress
from vmr_agent.cli.remote import Answered, Ask, Remote, kind, part_name, remote_of
from vmr_agent.contents import Digest, mtime_of, next_data, read_data
from vmr_agent.errors import Problem, show
from vmr_agent.wire.messages import MAX_WRITE, PIECE


def push(args: argparse.Namespace) -> int:
    """`vmr-host push FILE VM DESTINATION`."""
    source = os.path.abspath(os.fsencode(args.file))
    name = os.path.basename(source)
    try:
        status = os.stat(source)
        is_tree = stat.S_ISDIR(status.st_mode)
        entries = walk(source) if is_tree else []
    except OSError as error:
        raise Problem(f"cannot push {_named(error, source)}: {error.strerror}") from None
    if not is_tree and not stat.S_ISREG(status.st_mode):
        raise Problem(f"cannot push {show(source)}: it is neither a file nor a directory")
    with Progress(show(name)) as progress:
        remote = remote_of(args, "push", progress)
        target = _remote_target(remote, os.fsencode(args.destination), name, is_tree)
        word = b"%d:%d:%d:%d:" % (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        part = os.path.join(os.path.dirname(target), part_name(os.path.basename(target), word + target))
        try:
            if is_tree:
                progress.begin(sum(entry.status.st_size for entry in entries if entry.is_file))
                push_tree(remote, entries, source, part, progress)
                made, _ = remote.ask("mkdir", path=part, mode=status.st_mode & 0o7777, mtime=mtime_of(status))
                remote.ask("sync")
                remote.ask("rename", path=target, part=part, id=remote.bytes(made, "id"))
                remote.ask("sync")
            else:
                progress.begin(status.st_size)
                remote.all(_sending(remote, Entry(b"", status, None), source, part, target, progress))
        except BaseException as failed:
            remote.leave("remove", path=part)
            if isinstance(failed, OSError):
                raise Problem(f"cannot read {_named(failed, source)}: {failed.strerror or failed}") from None
            if isinstance(failed, Problem):
                told = str(failed.args[0]).replace(show(part), show(target))
                raise Problem(told, hint=failed.hint) from None
            raise
    print(progress.line(f"{len(entries)} entries" if is_tree else ""))
    return 0


@dataclass(frozen=True)
class Entry:
    """A file, directory or link of ours that is to be sent."""

    inside: bytes
    """Its path below the tree's top."""
    status: os.stat_result
    target: Optional[bytes]
    """Where a link leads."""

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.status.st_mode)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.status.st_mode)


def walk(top: bytes) -> list[Entry]:
    """What is in a directory of ours, each directory before what is in it; what can't be sent is said and left out."""
    found: list[Entry] = []
    directories = [b""]
    while directories:
        directory = directories.pop()
        for name in sorted(os.listdir(os.path.join(top, directory))):
            inside = os.path.join(directory, name)
            status = os.lstat(os.path.join(top, inside))
            target = os.readlink(os.path.join(top, inside)) if stat.S_ISLNK(status.st_mode) else None
            entry = Entry(inside, status, target)
            if not (entry.is_file or entry.is_directory or entry.target is not None):
                print(f"skipped {show(inside)}: neither a file, a directory nor a link", file=sys.stderr)
                continue
            if entry.is_directory:
                directories.append(inside)
            found.append(entry)
    return found


def push_tree(
    remote: Remote,
    entries: Sequence[Entry],
    top: bytes,
    part: bytes,
    progress: Progress,
    *,
    mask: int = 0o7777,
) -> None:
    """Send a tree into the new directory ``part`` of the VM; ``mask``: the bits of modes that are kept."""

    def asks() -> Iterator[Ask]:
        yield Ask("mkdir", {"path": part})
        for entry in entries:
            path = os.path.join(part, entry.inside)
            if entry.is_directory:
                yield Ask("mkdir", {"path": path})
            elif entry.target is not None:
                yield Ask("link", {"path": path, "target": entry.target})
            else:
                source = os.path.join(top, entry.inside)
                yield from _sending(remote, entry, source, path, path, progress, mask=mask)
        # Last, and the innermost first: what is put into a directory changes its time.
        for entry in entries[::-1]:
            if entry.is_directory:
                mode, mtime = entry.status.st_mode & mask, mtime_of(entry.status)
                yield Ask("mkdir", {"path": os.path.join(part, entry.inside), "mode": mode, "mtime": mtime})

    remote.all(asks())


def _sending(
    remote: Remote,
    entry: Entry,
    source: bytes,
    part: bytes,
    path: bytes,
    progress: Progress,
    *,
    mask: int = 0o7777,
) -> Iterator[Ask]:
    """The requests that write one file as ``part`` and place it as ``path``."""
    expected = entry.status
    fd = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not os.path.samestat(os.fstat(fd), expected):
            raise Problem(f"cannot push {show(source)}: it has changed meanwhile")
        digest, kind = Digest(remote.digest), remote.digest.encode()
        # An empty file is one, too.
        yield Ask("write", {"path": part, "offset": 0, "make": True, "kind": kind})
        at = 0
        while at < expected.st_size:
            start = min(next_data(fd, at, expected.st_size), expected.st_size)
            digest.hole(start - at)
            progress.add(start - at)
            at = start
            data = read_data(fd, at, min(MAX_WRITE, expected.st_size - at))
            if data:
                digest.data(data)
                counting, size = _counting(progress, len(data)), max(len(data), PIECE)
                yield Ask("write", {"path": part, "offset": at}, data, counting, size=size)
                at += len(data)
            elif at < expected.st_size:
                break  # cut short; said below
        status = os.fstat(fd)
        if (status.st_size, status.st_mtime_ns) != (expected.st_size, expected.st_mtime_ns):
            raise Problem(
                f"cannot push {show(source)}: it has changed meanwhile", hint="is it still written to?"
            )
        args = {
            "path": path,
            "part": part,
            "size": status.st_size,
            "mode": status.st_mode & mask,
            "mtime": mtime_of(status),
            "kind": kind,
            "digest": digest.digest(),
        }
        if status.st_size > LONG:
            progress.note("the VM checks it and writes it to disk")
        yield Ask("place", args, answered=lambda result, data: progress.note(""))
    finally:
        os.close(fd)


def _named(error: OSError, otherwise: bytes) -> str:
    return show(error.filename if isinstance(error.filename, bytes) else otherwise)


def _counting(progress: Progress, count: int) -> Answered:
    return lambda result, data: progress.add(count)


def _remote_target(remote: Remote, destination: bytes, name: bytes, is_tree: bool) -> bytes:
    """Where it goes in the VM: into a directory, or to just this path."""
    facts, _ = remote.ask("stat", path=destination)
    path = remote.bytes(facts, "path")
    if kind(facts) == "directory":
        facts, _ = remote.ask("stat", path=os.path.join(path, name))
        path = os.path.join(path, name)
    elif destination.endswith(b"/"):
        raise Problem(f"cannot push to {remote.vm}:{show(path)}: there is no such directory")
    there = kind(facts)
    if there != "nothing" and (is_tree or there != "file"):
        raise Problem(
            f"cannot push to {remote.vm}:{show(path)}: a {there} is there already",
            hint="a directory replaces nothing" if is_tree else None,
        )
    return path
