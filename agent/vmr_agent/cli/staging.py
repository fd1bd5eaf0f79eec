"""What lives here: `stage`: VMRs put into a VM, all of them or none, in the order of their start times.

It must not know: how files travel. The tree goes into a dot directory of the launch directory, which the guest's
watcher skips, and the guest moves its VMRs to their places within one turn of its loop.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmr_agent.cli.arguments import protect
from vmr_agent.cli.progress import Progress
from vmr_agent.cli.push import Entry, push_tree, walk
from vmr_agent.cli.remote import Ask, Remote, kind, part_name, remote_of
from vmr_agent.errors import Problem, show
from vmr_agent.schedule import is_vmr_directory, parse_start_time, sort_key

SCRIPT = b"call_arguments.sh"
_MASK = 0o755  # what others may write the guest's agent runs only after it has taken that from them
_VALUED = ("--at", "--name", "--control")


def mark_program(argv: Sequence[str]) -> list[str]:
    """The command line with all that follows `stage VM --at TIME PROGRAM` marked as no options of ours."""
    if not argv or argv[0] != "stage":
        return list(argv)
    at, words, place = False, 0, 1
    while place < len(argv) and words < 2:
        token = argv[place]
        at = at or token.partition("=")[0] == "--at"
        words += not token.startswith("--")
        place += 1
        if token in _VALUED:
            place += 1
    return [*argv[:place], *(protect(each) for each in argv[place:])] if at else list(argv)


def stage(args: argparse.Namespace) -> int:
    """`vmr-host stage VM DIRECTORY` and `vmr-host stage VM --at TIME [--name N] PROGRAM [ARG ...]`."""
    source = os.fsencode(args.source)
    if args.at is None:
        if args.arguments or args.name is not None:
            raise Problem("cannot stage a program without --at", hint="a directory is staged alone")
        return _stage_tree(args, source)
    with tempfile.TemporaryDirectory(prefix="vmr-host-") as made:
        top = os.fsencode(made)
        with Progress(args.source) as progress:
            remote = remote_of(args, "stage", progress)
            launch = remote.bytes(remote.ask("stat", path=b".")[0], "path")
        _make_vmr(args, source, top, launch)
        return _stage_tree(args, top)


def _make_vmr(args: argparse.Namespace, program: bytes, top: bytes, launch: bytes) -> None:
    """One VMR as FIREWHEEL makes them: the program, if it is a file of ours, and the script that calls it."""
    time = os.fsencode(args.at)
    if parse_start_time(time) is None:
        raise Problem(
            f"cannot stage at {show(time)}: it is no start time", hint="as in -4 or 10.5: a number but 0"
        )
    base = os.path.basename(program)
    name = os.fsencode(args.name) if args.name is not None else base
    if not is_vmr_directory(name):
        raise Problem(f"cannot stage a VMR of the name {show(name)!r}", hint="--name gives it another")
    directory = os.path.join(top, time, name)
    there = os.path.join(launch, time, name)
    os.makedirs(directory)
    called = program
    if os.path.isfile(program):
        if base == SCRIPT:
            raise Problem(f"cannot stage a program called {show(SCRIPT)}", hint="the script is called so")
        try:
            shutil.copy2(program, os.path.join(directory, base))
        except OSError as error:
            raise Problem(f"cannot read {show(program)}: {error.strerror}") from None
        os.chmod(os.path.join(directory, base), 0o755)
        called = os.path.join(there, base)
    elif os.path.exists(program):
        raise Problem(f"cannot stage {show(program)}: it is no file", hint="without --at a tree is staged")
    elif b"/" in program and not program.startswith(b"/"):
        raise Problem(f"cannot stage {show(program)}: there is no such file")
    words = [_quote(each) for each in (called, *(os.fsencode(each) for each in args.arguments))]
    lines = [b"#!/bin/bash", b'CURRENT_DIR="$(dirname "$0")"', b"cd " + _quote(there), b" ".join(words), b""]
    script = Path(os.fsdecode(os.path.join(directory, SCRIPT)))
    script.write_bytes(b"\n".join(lines))
    script.chmod(0o755)


def _quote(word: bytes) -> bytes:
    return os.fsencode(shlex.quote(os.fsdecode(word)))


def _stage_tree(args: argparse.Namespace, top: bytes) -> int:
    try:
        entries = _checked(top, walk(top))
    except OSError as error:
        raise Problem(f"cannot stage {show(top)}: {error.strerror}") from None
    vmrs = sorted((each.inside for each in entries if each.inside.count(b"/") == 1), key=sort_key)
    with Progress(f"{len(vmrs)} VMRs") as progress:
        remote = remote_of(args, "stage", progress)
        _refuse_staged(
            remote, vmrs, hint="push replaces its files" if args.at is None else "--name gives another"
        )
        part = part_name(b"stage", os.urandom(16))
        progress.begin(sum(entry.status.st_size for entry in entries if entry.is_file))
        try:
            remote.ask(
                "mkdir", path=b"."
            )  # an image in which nothing else stages may have no launch directory
            push_tree(remote, entries, top, part, progress, mask=_MASK)
            remote.ask("sync")
            remote.ask("stage", path=part)
            remote.ask("sync")
        except BaseException as failed:
            remote.leave("remove", path=part)
            if isinstance(failed, OSError):
                raise Problem(f"cannot read {show(top)}: {failed.strerror or failed}") from None
            raise
    for vmr in vmrs:
        print(f"{show(vmr)} is staged on {args.vm}")
    return 0


def _checked(top: bytes, entries: Sequence[Entry]) -> list[Entry]:
    """The entries that make VMRs; Problem for whatever would not run. Dot names at the top are left out."""
    found: list[Entry] = []
    scripts = {entry.inside: entry for entry in entries if entry.inside.endswith(b"/" + SCRIPT)}
    for entry in entries:
        segments = entry.inside.split(b"/")
        if segments[0].startswith(b"."):
            continue
        where = show(os.path.join(top, entry.inside))
        if len(segments) == 1 and (not entry.is_directory or parse_start_time(segments[0]) is None):
            raise Problem(f"cannot stage {where}: it is no start time", hint="<start time>/<name>/ is staged")
        if len(segments) == 2:
            if not entry.is_directory or not is_vmr_directory(segments[1]):
                raise Problem(f"cannot stage {where}: it is no VMR's directory")
            script = scripts.get(entry.inside + b"/" + SCRIPT)
            if script is None or not script.is_file:
                raise Problem(f"cannot stage {where}: it has no {show(SCRIPT)}")
            if not script.status.st_mode & stat.S_IXUSR:
                raise Problem(
                    f"cannot stage {where}: its {show(SCRIPT)} may not be executed", hint="chmod +x"
                )
        found.append(entry)
    if not any(entry.inside.count(b"/") == 1 for entry in found):
        raise Problem(
            f"cannot stage {show(top)}: there is no VMR in it", hint="<start time>/<name>/ is staged"
        )
    return found


def _refuse_staged(remote: Remote, vmrs: Sequence[bytes], *, hint: str) -> None:
    there: list[bytes] = []

    def look(vmr: bytes) -> Ask:
        def take(result: Any, data: bytes) -> None:
            if kind(result) != "nothing":
                there.append(vmr)

        return Ask("stat", {"path": vmr}, answered=take)

    remote.all(look(vmr) for vmr in vmrs)
    if there:
        more = f" (and {len(there) - 1} more)" if len(there) > 1 else ""
        raise Problem(f"cannot stage {show(there[0])}{more}: {remote.vm} has it already", hint=hint)
