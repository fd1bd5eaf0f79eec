"""Run a command in a venv with some requirements in it, made once and again when they or the Python change.

Usage: with_venv.py NAME REQUIREMENT ... -- COMMAND ARG ...
The venv is `.venv-NAME` in the clone. Standard library only: this is the first thing that runs on a machine.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def die(sentence: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    raise SystemExit(1)


def make_venv(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    made = subprocess.run([sys.executable, "-m", "venv", path], capture_output=True, text=True)
    if made.returncode == 0:
        return
    # Debian has split ensurepip off into python3-venv, and `python3 -m venv` only says so when it fails.
    if os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {"stdout": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "-q", "update"], env=environment, check=False, **quiet)
        subprocess.run(["apt-get", "-qy", "install", "python3-venv"], env=environment, check=False, **quiet)
        shutil.rmtree(path, ignore_errors=True)
        made = subprocess.run([sys.executable, "-m", "venv", path], capture_output=True, text=True)
        if made.returncode == 0:
            return
    shutil.rmtree(path, ignore_errors=True)
    die("cannot make a venv: install your distribution's python3-venv and try again")


def main() -> None:
    if sys.version_info < (3, 9):
        die("cannot go on: Python 3.9 or newer is needed")
    split = sys.argv.index("--")
    name, requirements, command = sys.argv[1], sys.argv[2:split], sys.argv[split + 1 :]
    venv = ROOT / f".venv-{name}"
    wanted = hashlib.sha256(
        "\n".join([sys.version, *requirements, (ROOT / "pyproject.toml").read_text()]).encode()
    ).hexdigest()
    stamp = venv / "made-from"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"making {venv.name} ...", file=sys.stderr, flush=True)
        make_venv(venv)
        editable = [
            part for each in requirements for part in (["-e", each] if each.startswith(".") else [each])
        ]
        done = subprocess.run(
            [
                venv / "bin" / "python",
                "-m",
                "pip",
                "install",
                "-qq",
                "--disable-pip-version-check",
                *editable,
            ],
            cwd=ROOT,
            stdout=sys.stderr,
        )
        if done.returncode:
            die("cannot install " + " ".join(requirements) + ": see above")
        stamp.write_text(wanted)
    os.environ["PATH"] = f"{venv / 'bin'}:{os.environ['PATH']}"
    os.environ["VIRTUAL_ENV"] = str(venv)
    os.execvp(command[0], command)


main()
