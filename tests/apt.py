"""Programs that tests are about, from the distribution: one at a time, for apt-get refuses while another runs.

Knows no test.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While no other test of this machine's user runs apt-get."""
    path = Path(tempfile.gettempdir()) / f"vmr-agent-tests-apt-{os.geteuid()}"
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def need(program: str, package: str) -> str:
    """The program, installed where it is missing and we are root; else the test is skipped."""
    install = ["apt-get", "-qqy", "--no-install-recommends", "install", package]
    if shutil.which(program) is None and os.geteuid() == 0 and shutil.which("apt-get"):
        with alone():
            subprocess.run(install, stdin=subprocess.DEVNULL, capture_output=True)
    if shutil.which(program) is None:
        pytest.skip(f"no {program} here")
    return program
