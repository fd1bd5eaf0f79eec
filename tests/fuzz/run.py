"""Fuzzing with atheris: `python -m tests.fuzz.run TARGET --seconds N`. The normal run needs neither.

What finds something new is kept in a directory of its own until the end; then corpus and finds are merged to the
fewest inputs that reach as much, under tests/fuzz/corpus/TARGET. An input that fails stays there by itself: mend
the product, and it is replayed for ever.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORPUS = Path(__file__).resolve().parent / "corpus"
TARGETS = ("frames", "payloads", "spool", "collector", "control")
MAX_LEN = 2_048


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--inside", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside is not None:
        fuzz(args.target, args.inside)
    sys.path.insert(0, str(ROOT / "agent"))
    corpus = CORPUS / args.target
    corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as found:
        for number, seed in enumerate(importlib.import_module(f"tests.fuzz.{args.target}").SEEDS):
            (Path(found) / f"seed-{number}").write_bytes(seed)
        limits = [f"-max_len={MAX_LEN}", "-timeout=60", "-rss_limit_mb=1500", f"-artifact_prefix={corpus}/"]
        status = inside(args.target, f"-max_total_time={args.seconds}", *limits, found, str(corpus))
        if status == 0:
            with tempfile.TemporaryDirectory() as merged:
                status = inside(args.target, "-merge=1", *limits, merged, found, str(corpus))
                if status == 0:
                    for path in corpus.iterdir():
                        if not path.name.startswith(("crash-", "timeout-", "oom-")):
                            path.unlink()
                    shutil.copytree(merged, corpus, dirs_exist_ok=True)
    return status


def inside(target: str, *arguments: str) -> int:
    command = [sys.executable, "-m", "tests.fuzz.run", target, "--inside", *arguments]
    paths = os.pathsep.join((str(ROOT / "agent"), str(ROOT)))
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}).returncode


def fuzz(target: str, arguments: list[str]) -> None:
    import atheris  # type: ignore[import-not-found]

    with atheris.instrument_imports(include=["vmr_agent"]):
        module = importlib.import_module(f"tests.fuzz.{target}")
    # What libFuzzer takes for its own name is a command of the shell, by which it starts itself again to merge.
    itself = f"{sys.executable} -m tests.fuzz.run {target} --inside"
    atheris.Setup([itself, *arguments], module.check)
    atheris.Fuzz()


if __name__ == "__main__":
    raise SystemExit(main())
