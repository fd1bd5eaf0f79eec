"""A whole conversation, from script to rendered logs, cut at each of its bytes; see offsets.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.long)])
def test_the_host_closes_and_returns_at_every_byte_and_nothing_is_lost_or_doubled(step: int) -> None:
    """Each 11th byte, or each one."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.sim.offsets", "0", str(step)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONHASHSEED": "0",  # sets are walked in an order that depends on it
            "PYTHONPATH": os.pathsep.join((str(ROOT / "agent"), str(ROOT))),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:]
