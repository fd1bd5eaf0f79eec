"""What `tests/run` does: each lane is a venv with certain libraries, and the tests that are run in it.

The newest lane has the newest libraries from PyPI and runs everything; the oldest has Debian 12's versions of them and
Python 3.9, where the machine has one, and runs what depends on either. VM tests run in the first, with Debian 12's own
Python and packages in the guest.

A few tests that failed beside others are run once more, alone, as CPython's regrtest does: these tests are real
processes with real deadlines, and a machine may be busy with something else. Of a VM's tests the file is run again,
since one may begin where the one before it ended. Those that pass then are named in the lane's last line. Each is a
race that somebody should look for, in the test or in what it tests.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis"]
# The two tools are pinned to a release: another one formats, and finds, other things.
NEWEST = [".[host]", *TOOLS, "mypy~=2.4.0", "ruff~=0.17.6", "types-psutil"]
# What Debian 12 has in its own packages.
OLDEST = [".", "psutil==5.9.4", "watchdog==2.2.1", "msgpack==1.0.3", *TOOLS]
# What the libraries and the Python can break: the rooms that use them, and the main job through real processes.
LIBRARIES = [
    *("tests/wire", "tests/guest", "tests/test_schedule.py", "tests/test_runs.py"),
    *("tests/host/test_logstore.py", "tests/host/test_firewheel_log.py"),
    *("tests/e2e/test_main_job.py", "tests/e2e/test_verbs.py"),
]
# Many of these tests wait for processes much of the time, so there are more of them than cores. A VM has two cores of
# its own to emulate, and waits less; tests of one file may share one.
PARALLEL = ["-n", "4", "--dist", "worksteal"]
VMS = ["-n", "3", "--dist", "loadfile"]
ONCE_MORE = 3
"""So many failed tests, or files, at the most are given a second try: more are no accident."""


def command_in_venv(
    name: str, requirements: Sequence[str], command: Sequence[str], *, python: str = sys.executable
) -> list[str]:
    return [python, str(ROOT / "packaging" / "with_venv.py"), name, *requirements, "--", *command]


def in_venv(
    name: str,
    requirements: Sequence[str],
    arguments: Sequence[str],
    *,
    python: str = sys.executable,
    module: str = "pytest",
) -> int:
    # Compiled once, for the hundreds of processes that tests start, and not beside the sources.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(ROOT / f".venv-{name}" / "compiled")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = command_in_venv(name, requirements, ["python", "-m", module, *arguments], python=python)
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def run_lane(
    name: str,
    requirements: list[str],
    arguments: list[str],
    tests: Sequence[str],
    *,
    beside: Sequence[str] = (),
    python: str = sys.executable,
    title: str = "",
    whole_files: bool = False,
) -> int:
    """``beside``: what makes pytest run tests beside each other. ``whole_files``: what a second try is for."""
    title = f"{name}, {title}" if title else name
    print(f"\n== {title}", flush=True)
    began = time.monotonic()
    cache = ROOT / f".venv-{name}" / "pytest-cache"
    arguments = ["-o", f"cache_dir={cache}", *arguments]
    failures = cache / "v" / "cache" / "lastfailed"
    failures.unlink(missing_ok=True)
    status = in_venv(name, requirements, [*arguments, *beside, *tests], python=python)
    remark = ""
    failed = sorted(json.loads(failures.read_text())) if failures.exists() else []
    if whole_files:
        failed = sorted({test.partition("::")[0] for test in failed})
    if status == 1 and 0 < len(failed) <= ONCE_MORE:  # pytest's code for tests that failed, and nothing else
        print(f"== {title}: once more, alone: {', '.join(failed)}", flush=True)
        again = failed if whole_files else [*tests, "--last-failed"]
        status = in_venv(name, requirements, [*arguments, *again], python=python)
        remark = f"; at first FAILED: {', '.join(failed)}"
    outcome = "passed" if status == 0 else f"FAILED ({status})"
    print(f"== {title}: {outcome} in {time.monotonic() - began:.0f} s{remark}", flush=True)
    return status


def python39() -> str:
    """A Python 3.9, the oldest we support, where the machine has one."""
    of_pyenv = sorted(Path.home().glob(".pyenv/versions/3.9.*/bin/python3.9"))
    for candidate in ("python3.9", *map(str, of_pyenv)):
        found = shutil.which(candidate)
        if (
            found
            and subprocess.run([found, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0
        ):
            return found
    return ""


def install_tools() -> None:
    """Programs that some tests are about; those tests are skipped, and say so, where they can't be had."""
    if shutil.which("rsync") is None and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for arguments in (["-q", "update"], ["-qy", "install", "rsync"]):
            subprocess.run(["apt-get", *arguments], env=environment, check=False, **quiet)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests/run", description=__doc__)
    parser.add_argument("--long", action="store_true", help="the big counts too")
    parser.add_argument("--sim", type=int, metavar="SEED", help="show one simulated history, line by line")
    parser.add_argument(
        "--bench",
        nargs="*",
        metavar="ROW",
        help="measure: one table of every row, or of these; see tests/bench",
    )
    parser.add_argument(
        "--vm", nargs="*", metavar="ROW", help="with --bench: in a VM under emulation, next to qemu-ga"
    )
    parser.add_argument("--quick", action="store_true", help="with --bench: only whether each row works")
    parser.add_argument("pytest", nargs="*", help="after --: arguments for pytest")
    args = parser.parse_args()
    if args.bench is not None:
        vm = [] if args.vm is None else ["--vm", *args.vm]
        rows = [*args.bench, *vm, *(["--quick"] if args.quick else [])]
        raise SystemExit(in_venv("newest", NEWEST, rows, module="tests.bench"))
    if args.sim is not None:
        raise SystemExit(in_venv("newest", NEWEST, [str(args.sim)], module="tests.sim.run"))
    if args.pytest:
        raise SystemExit(in_venv("newest", NEWEST, args.pytest))
    with tempfile.TemporaryDirectory(prefix="vmr-agent-tests-") as built:
        # The packages are built once, for all lanes and all that runs beside each other in them.
        os.environ["VMR_AGENT_TESTS_WORKPLACE"] = built
        raise SystemExit(1 if any(run_lanes(long=args.long)) else 0)


def run_lanes(*, long: bool) -> list[int]:
    """All of them; their exit codes."""
    install_tools()
    choose = [] if long else ["-m", "not long"]
    common = ["-q", "--timeout=300", *choose]
    old = python39()
    if not old:
        print(
            "== this machine has no Python 3.9: the oldest lane has its own, and ruff holds the syntax to 3.9"
        )
    python = old or sys.executable
    # What the last lane needs is fetched while the first one runs; not at once with the first one's, for both may have
    # to install the same thing. Where it fails, the lane tries again and says so.
    if subprocess.run(command_in_venv("newest", NEWEST, ["true"])).returncode:
        return [1]
    making = subprocess.Popen(command_in_venv("oldest", OLDEST, ["true"], python=python))
    failed = [
        run_lane("newest", NEWEST, [*common, "--ignore=tests/vm"], ["tests"], beside=PARALLEL),
        run_lane(
            *("newest", NEWEST, [*common, "--timeout=600"], ["tests/vm"]),
            beside=VMS,
            title="in a VM",
            whole_files=True,
        ),
    ]
    making.wait()
    failed.append(run_lane("oldest", OLDEST, common, LIBRARIES, beside=PARALLEL, python=python))
    return failed


if __name__ == "__main__":
    main()
