"""Ordinary work while something breaks every few seconds: nothing lost, nothing grown, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def soak(arguments: str) -> None:
    """In a process of its own, which becomes the parent of all that lose theirs."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.soak", *arguments.split()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "agent"), str(ROOT)))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout


def test_a_quarter_of_a_minute_of_it() -> None:
    soak("--minutes 0.2 --runs 60 --every 0.5 1.5 --storm 1 --no-disks --seed 238")


@pytest.mark.long
@pytest.mark.timeout(3 * 3600)
def test_an_hour_of_it() -> None:
    soak("--minutes 62 --runs 10000 --seed 1")
