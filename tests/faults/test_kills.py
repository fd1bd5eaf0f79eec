"""SIGKILL to whatever of ours is killable, at random moments, alone and together: every byte and line once."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest

from tests.faults.once import assert_all_is_there_once
from tests.faults.supervised import Supervised

VICTIMS = ("daemon", "collector", "renderer", "forkserver", "shim")
MIB = 1024 * 1024
LINE = 70  # bytes of a talker's line, at least


def run_under_kills(
    path: Path, seed: int, *, moments: int, large: int, lines: int, every: int, pause: float
) -> dict[str, float]:
    """Small runs, then pairs of large ones, until ``moments`` kills and all runs are over; what it came to."""
    rng = random.Random(seed)
    world = Supervised(path)
    world.delays = lambda: rng.choice((0.0, 0.05, 0.3))
    began = time.monotonic()
    try:
        for number in range(5):
            world.stage_talker(f"-{99 - number}/small{number}", 3)
        for number in range(large):
            world.stage_talker(f"-{90 - number // 2}/large{number}", lines, every=every, pause=pause)
        world.start()
        struck = 0
        while struck < moments:
            time.sleep(rng.uniform(0.05, 1.0))
            # A shim's kill ends its run, so most moments leave them alone.
            victims = rng.sample(VICTIMS[:-1], rng.choice((1, 1, 1, 2, 2, 3, 4)))
            if rng.random() < 0.15:
                victims = rng.choice((["shim"], ["shim", *victims], [*victims, "shim"]))
            struck += any([world.kill(victim, rng) for victim in victims])
            world.history.append(";")
        history = f"seed {seed}: {' '.join(world.history)}"
        rows = assert_all_is_there_once(
            world, world.printed, killed=world.killed, history=history, limit=200.0
        )
        return {
            "moments": struck,
            "kills": len(world.history) - struck,
            "lost": sum(row["state"] == "lost" for row in rows.values()),
            "bytes": sum(row["stdout_bytes"] + row["stderr_bytes"] for row in rows.values()),
            "seconds": time.monotonic() - began,
        }
    finally:
        world.close()
        shutil.rmtree(path)  # gigabytes, in the long form


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kills_at_random(tmp_path: Path, seed: int) -> None:
    figures = run_under_kills(tmp_path, seed, moments=8, large=4, lines=14_000, every=200, pause=0.04)
    assert figures["bytes"] > 0


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(100, 110))
def test_kills_at_random_long(tmp_path: Path, seed: int) -> None:
    """30 moments each, 300 in all, while runs print 50 MiB on each of both streams."""
    lines = 50 * MIB // LINE
    figures = run_under_kills(tmp_path, seed, moments=30, large=6, lines=lines, every=2_000, pause=0.01)
    print(f"seed {seed}:", ", ".join(f"{name} {number:,.0f}" for name, number in figures.items()))
    assert figures["moments"] == 30
