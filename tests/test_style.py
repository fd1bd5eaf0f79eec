"""Types and style are tests: what the two tools find fails the build."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("mypy", ["--strict", "agent/vmr_agent"]),
        ("ruff", ["check", "agent", "packaging", "tests"]),
        ("ruff", ["format", "--check", "agent", "packaging", "tests"]),
    ],
    ids=["mypy", "ruff-check", "ruff-format"],
)
def test_the_tools_find_nothing(tool: str, arguments: list[str]) -> None:
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not in this lane")
    done = subprocess.run([sys.executable, "-m", tool, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
