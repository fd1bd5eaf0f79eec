"""The packages for tests, built from this checkout once in a test run; also as a later version would be.

Knows packaging/'s commands and what they print; nothing of VMs.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import pytest

from tests import apt

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = ("agent", "packaging", "systemd", "tests", "pyproject.toml", "README.md", "LICENSE")
CANNOT = 3  # a build's exit code: not on this machine
LATER = "99.1"
"""The version of an upgrade."""


WORKPLACE = "VMR_AGENT_TESTS_WORKPLACE"
"""Names a directory in the environment: what is in it serves all processes of a test run."""


@functools.cache
def workplace() -> Path:
    """A directory for all that is built; it goes with this process, or with whoever made the one that is named."""
    if WORKPLACE in os.environ:
        return Path(os.environ[WORKPLACE])
    path = Path(tempfile.mkdtemp(prefix="packages-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@contextlib.contextmanager
def _made_once(name: str) -> Iterator[tuple[Path, Path]]:
    """A directory of the workplace, and where to make it if it isn't there, while nobody else does."""
    path = workplace() / name
    with (workplace() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        making = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=workplace())) / "made"
        yield path, making
        if making.exists():
            making.rename(path)


@functools.cache
def sources() -> Path:
    """The sources as they were when first asked for, without `.git`: what is edited meanwhile makes no difference."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "out", "*.egg-info", ".*")
    with _made_once("sources") as (tree, making):
        if not tree.exists():
            making.mkdir()
            for name in SOURCES:
                if (REPOSITORY / name).is_dir():
                    shutil.copytree(REPOSITORY / name, making / name, ignore=ignore)
                else:
                    shutil.copy(REPOSITORY / name, making / name)
    return tree


def export(destination: Path, version: Optional[str] = None) -> Path:
    """A copy of the sources; if asked to, those of another version."""
    shutil.copytree(sources(), destination)
    if version is not None:
        init = destination / "agent" / "vmr_agent" / "__init__.py"
        init.write_text(re.sub('".*"', f'"{version}"', init.read_text()))
        changes = destination / "packaging" / "CHANGELOG.md"
        changes.write_text(
            changes.read_text().replace("\n## ", f"\n## {version} (2030-01-01)\n\n- Later.\n\n## ", 1)
        )
    return destination


def build(program: str, *arguments: str, tree: Path = REPOSITORY) -> list[Path]:
    """Run one of packaging/'s builds; the files it has made. Skips where it says that it can't be run here."""
    command = [tree / "packaging" / program, *arguments]
    with apt.alone():  # it may have to install what it builds with
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode == CANNOT:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-6000:]
    return [Path(line) for line in done.stdout.splitlines()]


def debs(version: Optional[str] = None) -> dict[str, Path]:
    """The Debian packages by name, from a plain export."""
    return _debs(version)  # called in whichever way, built once


@functools.cache
def _debs(version: Optional[str]) -> dict[str, Path]:
    with _made_once(version or "current") as (out, making):
        if not out.exists():
            tree = export(making.with_name("source"), version)
            build("build-deb", "--no-tests", "--out", str(making), tree=tree)
    return {path.name.partition("_")[0]: path for path in sorted(out.glob("*.deb"))}
