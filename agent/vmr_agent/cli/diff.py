"""What lives here: `vmr-agent diff`: what changed in a VMR's files: text as `diff -u` has it, else sizes and digests.

It must not know: how files are kept. It asks nobody: all is read from the spool and the launch directory.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from typing import NamedTuple, Optional

from vmr_agent.cli import guest
from vmr_agent.errors import Problem, show
from vmr_agent.guest import keepsakes
from vmr_agent.guest.keepsakes import Change, File, Snapshot
from vmr_agent.guest.settings import Settings
from vmr_agent.guest.spool import History

_MAX_TEXT = 4 << 20  # bytes; lines of longer files aren't compared
_COLOURS = {b"-": b"\x1b[31m", b"+": b"\x1b[32m", b"@": b"\x1b[36m"}


class _Side(NamedTuple):
    label: str
    snapshot: Snapshot


def diff(vmr: bytes, settings: Settings, attempts: Optional[list[int]]) -> int:
    """Print what differs between two attempts, or, for None, between what was staged and what is there now."""
    if attempts is not None:
        before, after = (_attempt(vmr, number, settings) for number in attempts)
    else:
        before, after = staged(vmr, settings), present(vmr, settings)
    found = keepsakes.changes(before.snapshot, after.snapshot)
    if not found:
        guest.remark(f"nothing differs between {before.label} and {after.label}", always=True)
    colours = sys.stdout.isatty()
    for change in found:
        for line in _describe(change, before, after):
            colour = _COLOURS.get(line[:1]) if colours else None
            sys.stdout.buffer.write(colour + line.rstrip(b"\n") + b"\x1b[m\n" if colour else line)
    return 0


def staged(vmr: bytes, settings: Settings) -> _Side:
    """What the VMR's first attempt since it was staged began with."""
    guest.runs_of(vmr, settings)  # its Problem says more
    run = History(settings.state_dir).staged_as(vmr)
    if run is None:
        raise Problem(f"cannot compare {show(vmr)}: it has not run since it was staged anew")
    return _attempt(vmr, run.info.attempt, settings)


def present(vmr: bytes, settings: Settings) -> _Side:
    """What lies in the VMR's directory now."""
    try:
        return _Side("now", keepsakes.now(guest.directory(vmr, settings)))
    except FileNotFoundError:
        raise Problem(
            f"cannot compare {show(vmr)}: it is no longer in {settings.launch_dir}",
            hint="--attempt A B compares two attempts",
        ) from None
    except OSError as error:
        raise Problem(f"cannot read {show(guest.directory(vmr, settings))}: {error.strerror}") from None


def _attempt(vmr: bytes, number: int, settings: Settings) -> _Side:
    snapshot = keepsakes.kept(guest.attempt_of(vmr, number, settings).path)
    if snapshot is None:
        raise Problem(f"cannot compare attempt {number} of {show(vmr)}: its files were not kept")
    return _Side(f"attempt {number}", snapshot)


# --- one file ------------------------------------------------------------------------------------------------


def _describe(change: Change, before: _Side, after: _Side) -> Iterator[bytes]:
    path = show(change.path)
    if change.before and change.after and change.before.mode != change.after.mode:
        yield f"{path}: {_mode(change.before)} -> {_mode(change.after)}\n".encode()
    old, new = _content(change.path, before, change.before), _content(change.path, after, change.after)
    if old is not None and new is not None and (old or new) and b"\0" not in old + new:
        lines = difflib.diff_bytes(
            difflib.unified_diff,
            old.splitlines(keepends=True),
            new.splitlines(keepends=True),
            f"a/{path}".encode() if change.before else b"/dev/null",
            f"b/{path}".encode() if change.after else b"/dev/null",
            before.label.encode(),
            after.label.encode(),
        )
        for line in lines:
            yield line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n"
        return
    for side, file in ((before, change.before), (after, change.after)):
        yield f"{path}: {side.label}: {_sum(change.path, side, file)}\n".encode()


def _content(path: bytes, side: _Side, file: Optional[File]) -> Optional[bytes]:
    return b"" if file is None else side.snapshot.read(path, _MAX_TEXT)


def _mode(file: File) -> str:
    kind = "mode" if file.regular else "link, mode" if stat.S_ISLNK(file.mode) else "no regular file, mode"
    return f"{kind} {stat.S_IMODE(file.mode):04o}"


def _sum(path: bytes, side: _Side, file: Optional[File]) -> str:
    """A file in a few words, with the digest of its content where that is to be had."""
    if file is None:
        return "not there"
    if stat.S_ISLNK(file.mode):
        return f"link to {show(os.fsencode(file.target))}"
    if not file.regular:
        return "no regular file"
    fd = side.snapshot.open(path)
    if fd is None:
        return f"{file.size:,} bytes, not kept"
    digest, size = hashlib.sha256(), 0
    with os.fdopen(fd, "rb") as content:
        while data := content.read(1 << 20):
            digest.update(data)
            size += len(data)
    return f"{size:,} bytes, sha256 {digest.hexdigest()}"
