"""A run's processes: found wherever they hide, killed to the last, and seen for what they use."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.guest.rig import Rig, alive, eventually, everything, result
from vmr_agent.guest import machine, processes
from vmr_agent.guest.spool import Run
from vmr_agent.runs import Ending, RunState, Stream


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    for run in made.runs:
        for process in processes.tree(run):
            process.kill()
    made.close()


def executing(run: Run) -> list[str]:
    """The programs of a run's processes. A shell stands still until its new child executes (vfork), and such a
    child, stopped, keeps it from being stopped itself."""
    names = []
    for process in processes.tree(run):
        with contextlib.suppress(psutil.Error):
            names.append(process.name())
    return sorted(names)


def test_the_tree_holds_children_in_other_sessions_and_orphans(rig: Rig) -> None:
    rig.stage("#!/bin/sh\n(setsid sleep 600 & echo $! >&2)\nsleep 600 & echo $! >&2\nwait\n")
    run = rig.start()
    eventually(lambda: everything(run, Stream.STDERR).count(b"\n") == 2)
    pids = {int(line) for line in everything(run, Stream.STDERR).split()}
    started = run.started()
    assert started is not None
    found = [process.pid for process in processes.tree(run)]
    assert found[0] == started.pid
    assert pids < set(found)


def test_kill_ends_all_of_it_whatever_sessions_they_made(rig: Rig) -> None:
    rig.stage("#!/bin/sh\nsetsid sh -c 'sleep 600 & sleep 600' &\nsetsid sleep 600 &\necho up; sleep 600\n")
    run = rig.start()
    eventually(lambda: run.lengths().stdout == 3 and len(processes.tree(run)) == 6)
    pids = [process.pid for process in processes.tree(run)]
    assert sorted(processes.kill(run, signal.SIGTERM)) == sorted(pids)
    rig.wait(run, RunState.CLOSED)
    assert (result(run).ending, result(run).value) == (Ending.SIGNAL, signal.SIGTERM)
    assert not any(alive(pid) for pid in pids)


def test_a_script_that_traps_the_signal_ends_as_it_wishes(rig: Rig) -> None:
    """It hears of it before its child does, so it can still say what it wants to."""
    rig.stage("#!/bin/bash\ntrap 'echo trapped; exit 3' TERM\necho up; sleep 600 & wait\n")
    run = rig.start()
    eventually(lambda: run.lengths().stdout == 3 and len(processes.tree(run)) == 2)
    started = run.started()
    assert started is not None
    signalled = processes.kill(run, signal.SIGTERM)
    assert next(iter(signalled.items())) == (started.pid, "call_arguments.sh")
    rig.wait(run, RunState.CLOSED)
    assert (result(run).value, everything(run, Stream.STDOUT)) == (3, b"up\ntrapped\n")


def test_a_tree_that_forks_all_the_time_loses_nobody(rig: Rig) -> None:
    rig.stage("#!/bin/sh\necho up\nwhile :; do setsid sleep 600 & sleep 0.01; done\n")
    run = rig.start()
    eventually(lambda: len(processes.tree(run)) > 20)
    processes.kill(run, signal.SIGKILL)
    rig.wait(run, RunState.CLOSED)
    assert result(run).value == signal.SIGKILL


def test_stop_lasts_until_cont(rig: Rig) -> None:
    rig.stage("#!/bin/sh\nsleep 600 & sleep 600\n")
    run = rig.start()
    eventually(lambda: executing(run) == ["call_arguments.", "sleep", "sleep"])
    processes.kill(run, signal.SIGSTOP)
    eventually(lambda: {process.status() for process in processes.tree(run)} == {"stopped"})
    processes.kill(run, signal.SIGCONT)
    eventually(lambda: "stopped" not in {process.status() for process in processes.tree(run)})


def test_without_its_shim_a_script_can_still_be_killed(rig: Rig) -> None:
    rig.stage("#!/bin/sh\nsleep 600 & sleep 600\n")
    run = rig.start()
    eventually(lambda: len(processes.tree(run)) == 3)
    os.kill(run.holder() or 0, signal.SIGKILL)
    eventually(lambda: not run.locked())
    assert len(processes.tree(run)) == 3
    assert len(processes.kill(run, signal.SIGTERM)) == 3
    rig.wait(run, RunState.CLOSED)
    assert result(run).ending is Ending.LOST
    assert processes.tree(run) == []


def test_who_holds_the_pipes_is_known(rig: Rig) -> None:
    rig.stage("#!/bin/sh\nsleep 600 & echo $!\nsleep 600 > /dev/null 2>&1 & echo $!\n")
    run = rig.start()
    rig.wait(run, RunState.EXITED)
    holding, detached = (int(line) for line in everything(run, Stream.STDOUT).split())
    eventually(lambda: executing(run) == ["sleep", "sleep"])  # until then the detached one holds it too
    assert processes.holders(run) == [holding]
    assert {row.pid: row.holds_pipe for row in processes.rows(run)} == {holding: True, detached: False}


def test_a_row_shows_what_a_process_uses(rig: Rig) -> None:
    code = "import os; b = bytearray(os.urandom(1)) * (32 << 20); os.write(1, b'up'); input()"
    rig.stage(f"#!{sys.executable}\nimport time\n{code.replace('input()', 'time.sleep(600)')}\n")
    run = rig.start()
    eventually(lambda: run.lengths().stdout == 2)
    (row,) = processes.rows(run)
    shim = run.holder()
    assert row.rss_bytes > 32 << 20
    assert row.cpu_s >= 0
    assert row.ppid == shim
    assert "call_arguments.sh" in row.command


def test_nothing_is_found_of_a_run_that_is_over(rig: Rig) -> None:
    run = rig.run("#!/bin/sh\n")
    assert processes.tree(run) == []
    assert processes.rows(run) == []
    assert processes.holders(run) == []
    assert processes.kill(run, signal.SIGTERM) == {}


def test_health_is_whole_numbers(tmp_path: Path) -> None:
    health = machine.health(tmp_path)
    assert all(type(value) is int and value >= 0 for value in health.values())
    assert 0 < health["memory_available"] <= health["memory_total"]
    assert health["disk_free"] <= health["disk_total"]


def test_psutil_is_imported_by_who_needs_it_only() -> None:
    agent = Path(__file__).resolve().parents[2] / "agent"
    code = "import sys, vmr_agent.guest.processes, vmr_agent.guest.runner; sys.exit('psutil' in sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.fspath(agent)}
    )
