"""That the benchmark runs and prints its table; what it measures is nobody's test."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.__main__ import ROWS, VM_ROWS, module, table
from tests.bench.rig import Row

ROOT = Path(__file__).resolve().parents[2]


def test_a_row_by_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench", "start", "--quick", "--work", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "start → first frame" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "vm"), [*((each, False) for each in ROWS), *((each, True) for each in VM_ROWS)]
)
def test_every_row_is_there(name: str, vm: bool) -> None:
    assert inspect.isgeneratorfunction(module(name, vm=vm).rows)


@pytest.mark.vm
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_row_in_a_vm(tmp_path: Path) -> None:
    """As it is typed, but for the lane; and nothing of it is left."""
    command = [sys.executable, "-m", "tests.bench", "--vm", "throughput", "--quick", "--work", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=850)
    if "no rows in a VM: " in done.stdout:
        pytest.skip(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("output in a VM, ") == 2 and "guest-exec" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_where_there_is_no_vm_one_line_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.bench", "--vm", "start", "--quick", "--work", str(tmp_path)]
    (tmp_path / "file").touch()
    nowhere = {**os.environ, "VMR_VM_CACHE": str(tmp_path / "file")}
    done = subprocess.run(command, cwd=ROOT, env=nowhere, capture_output=True, text=True, timeout=250)
    assert done.returncode == 1
    _, said = done.stdout.splitlines()  # the first names the machine
    assert said.startswith("no rows in a VM: ")


def test_the_table_says_what_was_reached() -> None:
    shown = table(
        [
            Row("faster than the limit", 90.0, "MiB/s", "limit", 100.0, "≥ 0.8"),
            Row("slower", 70.0, "MiB/s", "limit", 100.0, "≥ 0.8"),
            Row("alone", 11.0, "ms", goal="≤ 10"),
            Row("no goal", 12345.0, "ms"),
        ]
    ).splitlines()
    assert [line.split()[-1] for line in shown[1:4]] == ["yes", "NO", "NO"]
    assert "0.9" in shown[1].split() and "12,345" in shown[4].split()
