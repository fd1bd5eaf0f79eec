"""What lives here: the daemon's runtime directory, who holds it, and the sockets that lie in it.

It must not know: what comes over the sockets.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from pathlib import Path

from vmr_agent import control
from vmr_agent.errors import Problem

_HINT = "--runtime-dir names another directory"


def make(path: Path) -> Path:
    """The directory, fit to hold the sockets. Raises Problem when it isn't."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.stat()
    except OSError as error:
        raise _unusable(path, str(error.strerror)) from None
    # Whoever may put another socket in the place of ours is asked by root's verbs in our stead.
    if info.st_uid not in (0, os.geteuid()):
        raise _unusable(path, f"it belongs to user {info.st_uid}")
    if info.st_mode & 0o022 and not info.st_mode & stat.S_ISVTX:
        raise _unusable(path, f"others may write to it (mode {stat.S_IMODE(info.st_mode):04o})")
    return path


def lock(path: Path) -> int:
    """Hold the runtime directory: a second daemon, on another state directory, would take our sockets away.

    Returns the descriptor that holds it. Raises Problem when another daemon does.
    """
    try:
        fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _unusable(path, "another vmr-agent has it") from None
    except OSError as error:
        raise _unusable(path, str(error.strerror)) from None
    return fd


def kick_socket(path: Path) -> socket.socket:
    """Where shims say that there is something new. Raises Problem when it can't be made."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    old = os.umask(0o177)
    try:
        path.unlink(missing_ok=True)
        sock.bind(os.fspath(path))
    except OSError as error:
        raise _cannot_listen(path, error) from None
    finally:
        os.umask(old)
    return sock


def control_socket(path: Path) -> socket.socket:
    """Where the verbs connect. Raises Problem when it can't be made."""
    try:
        return control.listen(path)
    except OSError as error:
        raise _cannot_listen(path, error) from None


def _unusable(path: Path, why: str) -> Problem:
    return Problem(f"cannot use {path}: {why}", hint=_HINT)


def _cannot_listen(path: Path, error: OSError) -> Problem:
    return Problem(f"cannot listen at {path}: {error.strerror or error}", hint=_HINT)
