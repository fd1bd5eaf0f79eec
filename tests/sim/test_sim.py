"""Thousands of simulated histories, and proof that a broken guarantee would be seen in them.

Each runs in a process of its own: the simulation takes the place of `os` in the product's modules, and needs a
known hash seed, so that a history can be shown again: `./tests/run --sim SEED`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.mutants import MUTANTS, Mutant, broken

ROOT = Path(__file__).resolve().parents[2]
SEEDS = 1_000
MANY = 20_000


def simulate(*arguments: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join((str(ROOT / "agent"), str(ROOT)))
    return subprocess.Popen(
        [sys.executable, "-m", "tests.sim.run", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def assert_well(*running: subprocess.Popen[str]) -> None:
    for process in running:
        said = process.communicate()[0]
        assert process.returncode == 0, f"./tests/run --sim SEED shows the history of each\n{said}"


# In parts, which go to whatever worker and core has time for them.
@pytest.mark.timeout(1800)  # 20 to 60 seeds a second, as busy as the machine is
@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS // 5))
def test_a_thousand_histories(first: int) -> None:
    # Its threads take turns: on one core each hands over to the next in a quarter less time.
    assert_well(simulate("--cpu", str(first * 5 // SEEDS), "--seeds", f"{first}:{first + SEEDS // 5}"))


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_many_histories() -> None:
    half = (SEEDS + MANY) // 2
    assert_well(
        simulate("--cpu", "0", "--seeds", f"{SEEDS}:{half}"),
        simulate("--cpu", "1", "--seeds", f"{half}:{MANY}"),
    )


@pytest.mark.timeout(900)
def test_a_seed_makes_the_same_history_each_time() -> None:
    first, second = (simulate("7").communicate()[0] for _ in range(2))
    assert first == second and len(first.splitlines()) > 20


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_guarantee_can_be_broken(mutant: Mutant) -> None:
    """Those that take long to find are rarely tried: that the code they break has changed is to be seen at once."""
    compile(broken(mutant), mutant.place, "exec")


def find(name: str) -> None:
    said = simulate("--mutant", name, "--seeds", f"0:{MUTANTS[name].seeds}", "--stop").communicate()[0]
    assert said.startswith("seed "), f"{said}\nnot found"
    seed = int(said.split(":")[0].split()[1])
    unbroken = simulate("--seeds", f"{seed}:{seed + 1}")
    assert unbroken.communicate() and unbroken.returncode == 0, f"seed {seed} fails without it too"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [name for name, mutant in MUTANTS.items() if mutant.seeds <= 200])
def test_a_broken_guarantee_is_found(name: str) -> None:
    find(name)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [name for name, mutant in MUTANTS.items() if mutant.seeds > 200])
def test_a_broken_guarantee_is_found_in_the_end(name: str) -> None:
    find(name)
