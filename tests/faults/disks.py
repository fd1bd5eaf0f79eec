"""Small file systems to fill up. Used by the tests, knows none."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(path: Path, options: str) -> Iterator[Path]:
    """A file system in memory at a path, with these mount options; skips where none can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounts a file system: needs root")
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"can't mount a file system here: {mounted.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def fill_blocks(disk: Path) -> Path:
    """Take every block; removing the file that is returned gives them back."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 16, 4096):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return ballast


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """For whoever opens something by its path; what is open already can be written on.

    All of it can't be had without a VM: a file system that has files open for writing is busy.
    """
    subprocess.run(["mount", "--bind", disk, disk], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def take_inodes(disk: Path) -> list[Path]:
    """Take every inode; removing the files gives them back."""
    taken: list[Path] = []
    while True:
        path = disk / f"inode{len(taken)}"
        try:
            path.touch()
        except OSError:
            return taken
        taken.append(path)
