"""Simulated histories by their seeds: `python -m tests.sim.run SEED` shows one, `--seeds A:B` tries many.

python -m tests.sim.run 17                    the history of seed 17, line by line
python -m tests.sim.run --seeds 0:1000        those that fail, and how many were tried
python -m tests.sim.run --hours 1 --jobs 2    as many as there is time for, from a first seed by the clock
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Sets are walked in an order that depends on it, and a seed must always make the same history.
        paths = [str(ROOT / "agent"), str(ROOT)]
        environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(paths)}
        os.chdir(ROOT)
        os.execve(sys.executable, [sys.executable, "-m", "tests.sim.run", *sys.argv[1:]], environment)
    parser = argparse.ArgumentParser(prog="tests/sim/run.py", description=__doc__.splitlines()[0])
    parser.add_argument("seed", nargs="?", type=int, help="show this history")
    parser.add_argument("--seeds", help="FIRST:END, try these")
    parser.add_argument("--mutant", help="break this guarantee first")
    parser.add_argument("--stop", action="store_true", help="at the first that fails")
    parser.add_argument("--hours", type=float, help="as many as there is time for")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--first", type=int, help="with --hours: the first seed, else made from the time")
    parser.add_argument("--cpu", type=int, help="stay on this one: its threads take turns, never run at once")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds that one history may take")
    args = parser.parse_args()
    from tests.sim import mutants, world

    needs: Optional[Callable[[Any], object]] = None
    if args.mutant:
        mutant = mutants.MUTANTS[args.mutant]
        needs = mutant.needs
        mutants.apply(mutant)
    if args.cpu is not None:
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpus[args.cpu % len(cpus)]})
    gc.freeze()
    faulthandler.dump_traceback_later(args.patience, exit=True)  # a history that never ends
    if args.seed is not None:
        made = world.run(args.seed, verbose=True)
        print(f"seed {args.seed}: {made.steps} steps, {len(made.violations)} violations; {made.happened}")
        return 1 if made.violations else 0
    if args.hours and args.jobs > 1:
        return _in_parallel(args)
    began = time.monotonic()
    if args.hours:
        start = args.first if args.first is not None else int(time.time()) * 1000
        seeds: Iterator[int] = itertools.takewhile(
            lambda _: time.monotonic() - began < args.hours * 3600, itertools.count(start)
        )
    else:
        first, _, end = args.seeds.partition(":")
        seeds = iter(range(int(first), int(end)))
    failed = tried = 0
    for seed in seeds:
        faulthandler.dump_traceback_later(args.patience, exit=True)
        if needs is not None and not needs(world.make_plan(random.Random(seed))):
            continue
        print(f"seed {seed}", end="\r", file=sys.stderr)
        made = world.run(seed)
        tried += 1
        if made.violations:
            failed += 1
            print(f"seed {seed}: {made.violations[0].strip()}", flush=True)
            if args.stop:
                break
        if tried % 50 == 0:
            gc.collect()
    took = time.monotonic() - began
    print(f"{tried} seeds in {took:.1f} s, {failed} failed", flush=True)
    return 1 if failed else 0


def _in_parallel(args: argparse.Namespace) -> int:
    faulthandler.cancel_dump_traceback_later()
    start = args.first if args.first is not None else int(time.time()) * 1000
    command = [sys.executable, "-m", "tests.sim.run", "--hours", str(args.hours)]
    jobs = [
        subprocess.Popen([*command, "--cpu", str(number), "--first", str(start + number * 10**9)])
        for number in range(args.jobs)
    ]
    return max(job.wait() for job in jobs)


if __name__ == "__main__":
    sys.exit(main())
