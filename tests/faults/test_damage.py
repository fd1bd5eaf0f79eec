"""A run's records that can't be read, and a daemon that died where nobody may: the others go on.

A directory in a file's place stands for a bad block: it can be opened, and each read of it fails.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.world import World, until
from vmr_agent.guest.spool import STOPPING

PRINTS = "while :; do echo line; sleep 0.05; done"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


def spoil(path: Path) -> None:
    path.rename(path.with_name("aside"))
    path.mkdir()


def mend(path: Path) -> None:
    path.rmdir()
    path.with_name("aside").rename(path)


def run_of(world: World, name: str) -> Path:
    return world.spool / "runs" / name / "1"


def test_a_run_whose_end_cannot_be_read_holds_up_its_barrier_and_nothing_else(world: World) -> None:
    world.settings["quiet"] = "600"  # once the VM is configured there are no barriers
    world.write_config()
    world.stage("-2/a", "exit 3")
    daemon = world.start_daemon()
    until(lambda: world.state("-2/a") == "exited", "it has run")
    world.stop(daemon)
    spoil(run_of(world, "-2/a") / "exit.json")
    world.start_daemon()
    until(lambda: world.state("-2/a") == "unreadable", "it is said")
    world.stage("-2/same", "exit 4")
    world.stage("-1/later", "exit 5")
    until(lambda: world.state("-2/same") == "exited", "of the same time, it runs")
    world.start_collector()
    assert world.complete("-2/same")["exit_code"] == 4
    assert world.state("-1/later") == "waiting"
    mend(run_of(world, "-2/a") / "exit.json")
    until(lambda: world.state("-1/later") == "exited", "the barrier is open")
    assert world.complete("-1/later")["exit_code"] == 5
    assert world.complete("-2/a")["exit_code"] == 3
    assert "Traceback" not in world.daemon_log()


def test_output_that_cannot_be_read_keeps_nobody_from_looking_after_the_others(world: World) -> None:
    world.stage("-1/prints", PRINTS)
    world.stage("-1/sleeps", "exec sleep 600")
    daemon = world.start_daemon()
    until(lambda: {world.state("-1/prints"), world.state("-1/sleeps")} == {"running"}, "both run")
    world.kill9(daemon)
    index = run_of(world, "-1/prints") / "index"
    spoil(index)  # its shim has the file open, and goes on
    world.start_collector()
    daemon = world.start_daemon()
    until(lambda: "cannot use" in world.daemon_log(), "each line that is printed is one that can't be read")
    shim = next(pid for pid, vmr in world.shims().items() if vmr == "-1/sleeps")
    os.kill(int(world.row("-1/sleeps")["pid"]), signal.SIGKILL)
    os.kill(shim, signal.SIGKILL)
    until(
        lambda: world.state("-1/sleeps") in ("lost", "killed"), "its end is seen, though no kick tells of it"
    )
    world.stage("-1/new", "echo new")
    assert world.complete("-1/new")["exit_code"] == 0
    world.stop(daemon)
    mend(index)
    world.start_daemon()
    until(lambda: b"line\n" in world.raw("-1/prints"), "what was printed meanwhile")
    assert "Traceback" not in world.daemon_log()


def test_processes_that_a_daemon_left_standing_are_let_go(world: World) -> None:
    """Killed in the middle of a kill, when all of the run stands still so that none can be missed."""
    world.stage("-1/prints", PRINTS)
    daemon = world.start_daemon()
    until(lambda: world.row("-1/prints").get("pid"), "it runs")
    pid = int(world.row("-1/prints")["pid"])
    world.kill9(daemon)
    os.kill(pid, signal.SIGSTOP)
    with (run_of(world, "-1/prints") / "notes").open("a") as notes:
        notes.write(json.dumps(STOPPING) + "\n")
    world.start_daemon()
    until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T", "it goes on")
    size = (run_of(world, "-1/prints") / "stdout").stat().st_size
    until(lambda: (run_of(world, "-1/prints") / "stdout").stat().st_size > size, "and prints")


def test_a_script_stopped_on_purpose_stays_so_over_a_restart(world: World) -> None:
    world.stage("-1/prints", PRINTS)
    daemon = world.start_daemon()
    until(lambda: world.row("-1/prints").get("pid"), "it runs")
    pid = int(world.row("-1/prints")["pid"])
    assert world.agent("kill", "-1/prints", "--signal", "STOP").returncode == 0
    world.kill9(daemon)
    world.start_daemon()
    until(lambda: world.state("-1/prints") == "running", "it is found")
    time.sleep(0.5)
    assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
