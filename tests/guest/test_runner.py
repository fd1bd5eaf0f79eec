"""Starting, re-attaching and judging runs while this or that is killed. Real processes throughout."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.rig import BOOT_ID, VMR, Rig, alive, eventually, everything, result
from vmr_agent.errors import Problem
from vmr_agent.guest.runner import Runner
from vmr_agent.guest.spool import Lengths, Run
from vmr_agent.runs import Ending, RunState, Stream, Trigger

WAITS = "#!/bin/sh\necho before; while [ ! -e {0}/go ]; do sleep 0.02; done; echo after; exit 6\n"


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.close()


def server_pid(rig: Rig) -> int:
    return int(rig.runner._server.pid)  # type: ignore[union-attr]


def test_attempts_count_up_and_each_keeps_its_own_output(rig: Rig) -> None:
    runs = [rig.run("#!/bin/sh\necho $VMR_ATTEMPT\n") for _ in range(3)]
    assert [run.info.attempt for run in runs] == [1, 2, 3]
    assert [everything(run, Stream.STDOUT) for run in runs] == [b"1\n", b"2\n", b"3\n"]
    assert len({run.info.run for run in runs}) == 3


def test_two_hundred_at_once_all_run(rig: Rig) -> None:
    vmrs = [b"-4/vmr %d" % i for i in range(200)]
    for vmr in vmrs:
        rig.stage("#!/bin/sh\necho $VMR_NAME\n", vmr)
    runs = [rig.start(vmr) for vmr in vmrs]
    for run in runs:
        rig.wait(run, RunState.CLOSED)
        assert everything(run, Stream.STDOUT) == run.info.vmr + b"\n"
        run.close_fds()
    assert rig.logged == []


def test_shims_leave_no_zombies(rig: Rig) -> None:
    for _ in range(3):
        rig.run("#!/bin/sh\n")
    server = server_pid(rig)
    children = Path(f"/proc/{server}/task/{server}/children")
    eventually(lambda: children.read_text() == "", "the end of the shims")


def test_a_killed_fork_server_is_replaced_and_its_runs_go_on(rig: Rig) -> None:
    rig.stage(WAITS.format(rig.base))
    run = rig.start()
    rig.wait(run, RunState.STARTED)
    time.sleep(1)  # so old that its death is not one at the start
    first = server_pid(rig)
    os.kill(first, signal.SIGKILL)
    eventually(lambda: not alive(first))
    rig.runner.handle()
    assert server_pid(rig) != first
    assert rig.runner.fileno() >= 0
    assert result(rig.run("#!/bin/sh\nexit 2\n", b"-4/other")).value == 2
    (rig.base / "go").touch()
    rig.wait(run, RunState.CLOSED)
    assert (result(run).value, everything(run, Stream.STDOUT)) == (6, b"before\nafter\n")


def test_an_order_that_died_with_the_fork_server_is_given_again(rig: Rig) -> None:
    rig.stage(f"#!/bin/sh\necho ran >> {rig.base}/log\n")
    os.kill(server_pid(rig), signal.SIGSTOP)
    run = rig.start()
    os.kill(server_pid(rig), signal.SIGKILL)
    rig.wait(run, RunState.CLOSED)
    assert (rig.base / "log").read_text() == "ran\n"


def waiting(rig: Rig) -> list[int]:
    """The shim that waits for an order, and the process that is to be the script."""
    shims = children(server_pid(rig))
    return shims + [child for shim in shims for child in children(shim)]


def children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def made_ready(rig: Rig) -> tuple[int, int]:
    rig.runner.make_ready()
    eventually(lambda: len(waiting(rig)) == 2, "a shim is ready")
    shim, script = waiting(rig)
    return shim, script


def test_a_shim_made_ahead_takes_the_next_order(rig: Rig) -> None:
    rig.stage("#!/bin/sh\necho $$ $PPID $VMR_NAME $VMR_ATTEMPT\n")
    shim, script = made_ready(rig)
    rig.runner.make_ready()  # one is enough
    run = rig.start()
    rig.wait(run, RunState.CLOSED)
    assert everything(run, Stream.STDOUT) == b"%d %d %b 1\n" % (script, shim, VMR)
    second = rig.run("#!/bin/sh\necho $$\n", b"-4/second")
    assert int(everything(second, Stream.STDOUT)) not in (shim, script)


def test_a_shim_without_an_order_goes_by_itself(rig: Rig) -> None:
    made_ready(rig)
    eventually(lambda: not waiting(rig), "it has gone", within=5.0)
    assert result(rig.run("#!/bin/sh\nexit 2\n")).value == 2


@pytest.mark.parametrize("end", ["close", "kill"])
def test_a_shim_without_an_order_goes_with_its_fork_server(rig: Rig, end: str) -> None:
    both = made_ready(rig)
    if end == "kill":
        os.kill(server_pid(rig), signal.SIGKILL)
    else:
        rig.runner.close()
    eventually(lambda: not any(map(alive, both)), "they have gone")


@pytest.mark.parametrize("which", [0, 1])
def test_whoever_is_killed_while_it_waits_for_an_order_costs_no_run(rig: Rig, which: int) -> None:
    killed = made_ready(rig)[which]
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: not alive(killed))
    rig.stage(f"#!/bin/sh\necho once >> {rig.base}/log\n")
    run = rig.start()
    rig.wait(run, RunState.CLOSED)
    assert (result(run).value, (rig.base / "log").read_text()) == (0, "once\n")
    assert run.blocked() == ""


def test_a_shim_that_could_not_get_ready_says_why_in_its_run(rig: Rig) -> None:
    rig.stage("#!/bin/sh\n")
    resource.prlimit(
        server_pid(rig), resource.RLIMIT_NOFILE, (8, 8)
    )  # enough for the fork, not for the pipes
    run = rig.start()
    eventually(run.blocked, "it waits")
    assert run.blocked() == "cannot begin: Too many open files" and run.started() is None
    os.kill(server_pid(rig), signal.SIGKILL)
    eventually(lambda: rig.runner.handle() or rig.runner.judge(run) is RunState.CLOSED, "another server")
    assert result(run).value == 0 and run.blocked() == ""


def test_a_fork_server_that_dies_at_once_is_not_started_in_a_loop(rig: Rig, tmp_path: Path) -> None:
    logged: list[str] = []
    runner = Runner(
        rig.spool,
        kick_path=tmp_path / "kick",
        launch_dir=rig.launch,
        log=logged.append,
        boot_id=BOOT_ID,
        command=["/bin/false"],
    )

    def gave_up() -> bool:
        runner.handle()
        return runner.fileno() == -1

    eventually(gave_up)
    assert len(logged) == 1
    rig.stage("#!/bin/sh\n")
    run = runner.start(VMR, Trigger.SCHEDULE, now_ns=1)
    assert runner.judge(run) is RunState.NONE
    runner.close()
    rig.wait(run, RunState.CLOSED)  # the other runner's fork server works


def test_its_files_are_kept_while_its_shim_begins_and_before_the_script_does(rig: Rig) -> None:
    seen = []

    def keep(run: Run) -> None:
        eventually(lambda: run.holder() and (run.path / "exit.json.new").exists(), "its shim has begun")
        time.sleep(0.2)  # long enough for all the rest
        seen.append((run.started(), (rig.base / "ran").exists()))

    rig.runner._keep = keep
    run = rig.run(f"#!/bin/sh\ntouch {rig.base}/ran\n")
    assert (seen, result(run).value) == ([(None, False)], 0)


DAEMON = """
import sys, time
from pathlib import Path
from vmr_agent.guest.runner import Runner
from vmr_agent.guest.spool import Spool
from vmr_agent.runs import Trigger
base = Path(sys.argv[1])
spool = Spool(base / "state")
runner = Runner(spool, kick_path=base / "kick", launch_dir=base / "launch", log=print, boot_id=sys.argv[2])
run = runner.start(b"-4/a.sh", Trigger.SCHEDULE, now_ns=time.time_ns())
while run.started() is None:
    time.sleep(0.01)
print(runner._server.pid, flush=True)
time.sleep(600)
"""


def another_daemon(rig: Rig, text: str) -> subprocess.Popen[bytes]:
    """In a process of its own, in the place of the rig's."""
    rig.runner.close()
    rig.spool.close()
    agent = Path(__file__).resolve().parents[2] / "agent"
    return subprocess.Popen(
        [sys.executable, "-c", text, rig.base, BOOT_ID],
        env={**os.environ, "PYTHONPATH": os.fspath(agent)},
        stdout=subprocess.PIPE,
    )


def test_a_daemon_killed_outright_finds_its_runs_again(rig: Rig) -> None:
    rig.stage(WAITS.format(rig.base))
    daemon = another_daemon(rig, DAEMON)
    assert daemon.stdout is not None
    server = int(daemon.stdout.readline())
    daemon.kill()
    daemon.wait()
    daemon.stdout.close()
    eventually(lambda: not alive(server), "the end of the fork server with its daemon")
    second = Rig(rig.base)
    try:
        (run,) = second.runner.attach()
        assert second.runner.judge(run) is RunState.STARTED
        (rig.base / "go").touch()
        second.wait(run, RunState.CLOSED)
        assert (result(run).value, everything(run, Stream.STDOUT)) == (6, b"before\nafter\n")
        assert second.spool.latest(VMR) is run
    finally:
        second.close()


def test_a_daemon_killed_while_it_keeps_the_files_holds_no_run_back(rig: Rig) -> None:
    rig.stage(f"#!/bin/sh\necho ran >> {rig.base}/log\n")
    text = DAEMON.replace("boot_id=sys.argv[2]", "boot_id=sys.argv[2], keep=lambda _: time.sleep(3600)")
    daemon = another_daemon(rig, text)
    run_directory = rig.state / "runs" / os.fsdecode(VMR) / "1"
    eventually((run_directory / "exit.json.new").exists, "the shim has begun")
    assert not (rig.base / "log").exists()
    daemon.kill()
    daemon.communicate()
    second = Rig(rig.base)
    try:
        (run,) = second.runner.attach()
        second.wait(run, RunState.CLOSED)
        assert (rig.base / "log").read_text() == "ran\n"
    finally:
        second.close()


def test_a_killed_shim_makes_the_run_lost_with_all_it_had_captured(rig: Rig) -> None:
    rig.stage(WAITS.format(rig.base))
    run = rig.start()
    eventually(lambda: run.lengths().stdout == 7)
    shim, started = run.holder(), run.started()
    assert shim is not None and started is not None
    os.kill(shim, signal.SIGKILL)
    eventually(lambda: not run.locked())
    # The script doesn't know yet: it is still running, so nothing may take its place.
    assert alive(started.pid)
    assert rig.runner.judge(run) is RunState.STARTED
    (rig.base / "go").touch()
    rig.wait(run, RunState.CLOSED)
    assert not alive(started.pid)
    assert (result(run).ending, result(run).text) == (Ending.LOST, "its shim was killed")
    assert everything(run, Stream.STDOUT) == b"before\n"
    assert (run.closed(), run.close_reason()) == ((7, 0), "its shim was killed")
    assert result(run).boot_id == BOOT_ID
    assert result(run).ended_ns >= result(run).started_ns


def test_a_shim_that_failed_by_itself_leaves_its_last_word(rig: Rig) -> None:
    rig.stage("#!/bin/sh\necho before; exec sleep 60\n")
    run = rig.start()
    eventually(lambda: run.lengths().stdout == 7)
    (run.path / "failed").symlink_to(
        "MemoryError: (line 9)"
    )  # as it would; it has no known bug to show it with
    kill_both(run)
    rig.wait(run, RunState.CLOSED)
    assert (result(run).ending, result(run).text) == (Ending.LOST, "its shim failed: MemoryError: (line 9)")


def test_an_exit_record_whose_prepared_file_was_cleaned_away_is_written_all_the_same(rig: Rig) -> None:
    rig.stage(WAITS.format(rig.base))
    run = rig.start()
    eventually(lambda: run.lengths().stdout == 7)
    (run.path / "exit.json.new").unlink()
    (rig.base / "go").touch()
    rig.wait(run, RunState.CLOSED)
    assert result(run).value == 6


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system: needs root")
@pytest.mark.parametrize("ended", [False, True])
def test_a_shim_killed_while_it_waits_for_space_leaves_no_note_of_it(rig: Rig, ended: bool) -> None:
    (rig.state / "full").touch()
    child = "yes &" if ended else "exec yes"
    rig.stage(f"#!/bin/sh\necho begun\n{child}\n")
    run = rig.start()
    eventually(run.blocked)
    if ended:
        rig.wait(run, RunState.EXITED)
        eventually(run.blocked)
    shim = run.holder()
    assert shim is not None
    os.kill(shim, signal.SIGKILL)
    rig.wait(run, RunState.CLOSED)
    assert not os.path.lexists(run.path / "blocked")


def test_a_run_can_be_lost_on_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=True)
    rig = Rig(tmp_path, state=disk / "state")
    try:
        rig.stage("#!/bin/sh\necho before; exec sleep 60\n")
        run = rig.start()
        eventually(lambda: run.lengths().stdout == 7)
        with (disk / "ballast").open("wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(b"\0" * 4096)
        kill_both(run)
        assert rig.runner.judge(run) is RunState.CLOSED
        assert (result(run).ending, run.closed()) == (Ending.LOST, (7, 0))
    finally:
        rig.close()
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_lost_run_is_as_long_as_what_the_host_has_of_it(rig: Rig) -> None:
    """After a power cut the host may hold bytes that the spool has no more."""
    rig.stage("#!/bin/sh\necho before; exec sleep 60\n")
    run = rig.start()
    eventually(lambda: run.lengths().stdout == 7)
    kill_both(run)
    rig.runner.judge(run, acked=Lengths(100, 3))
    assert (result(run).stdout, result(run).stderr) == (100, 3)
    assert run.lengths() == (7, 0)


def judge_late(rig: Rig, run: Run, monkeypatch: pytest.MonkeyPatch) -> RunState:
    """Judge a run whose shim began just after its lock was looked at."""
    asked: list[bool] = []
    real = Run.locked

    def locked(self: Run) -> bool:
        asked.append(real(self))
        return len(asked) > 1 and asked[-1]

    monkeypatch.setattr(Run, "locked", locked)
    state = rig.runner.judge(run)
    monkeypatch.undo()
    assert len(asked) > 1
    return state


def test_a_shim_that_begins_while_its_run_is_judged_goes_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.stage("#!/bin/sh\nexec sleep 60\n")
    run = rig.start()
    rig.wait(run, RunState.STARTED)
    (run.path / "started").rename(run.path / "starting")  # as it is until all of it is durable
    again = Run.load(run.path)
    assert again is not None
    judge_late(rig, again, monkeypatch)
    assert (run.path / "starting").exists() and not (run.path / "started").exists()


def test_one_that_ended_meanwhile_with_its_pipes_open_is_not_closed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.stage("#!/bin/sh\nsleep 60 & exit 3\n")
    run = rig.start()
    rig.wait(run, RunState.EXITED)
    assert judge_late(rig, run, monkeypatch) is RunState.EXITED
    assert run.closed() is None and result(run).exit_code == 3


def kill_both(run: Run) -> None:
    started, shim = run.started(), run.holder()
    assert started is not None and shim is not None
    os.kill(shim, signal.SIGKILL)
    os.kill(started.pid, signal.SIGKILL)
    eventually(lambda: not run.locked() and not alive(started.pid))


@pytest.mark.parametrize("left_file", [True, False])
def test_after_a_reboot_what_has_no_result_is_lost_and_may_ask_for_another(rig: Rig, left_file: bool) -> None:
    script = rig.stage("#!/bin/sh\nexec sleep 60\n")
    run = rig.start()
    rig.wait(run, RunState.STARTED)
    if left_file:
        (script.parent / "reboot").touch()
    kill_both(run)
    second = rig.restart(boot_id="another boot")
    try:
        (run,) = second.runner.attach()
        assert second.runner.judge(run) is RunState.CLOSED
        assert result(run).text == "the VM went down before it was over"
        assert result(run).boot_id == BOOT_ID
        assert result(run).asks_reboot is left_file
        again = second.runner.start(VMR, Trigger.REBOOT, now_ns=1, number=1, clear_reboot=True)
        second.runs.append(again)
        assert not (script.parent / "reboot").exists()
        assert (again.info.attempt, again.info.number, again.info.boot_id) == (2, 1, "another boot")
    finally:
        second.close()


def test_another_boots_process_number_is_somebody_elses(rig: Rig) -> None:
    rig.stage("#!/bin/sh\necho up; exec sleep 60\n")
    run = rig.start()
    eventually(lambda: run.lengths().stdout == 3)
    shim, started = run.holder(), run.started()
    assert shim is not None and started is not None
    os.kill(shim, signal.SIGKILL)
    eventually(lambda: not run.locked())
    assert rig.runner.judge(run) is RunState.STARTED
    elsewhere = Runner(
        rig.spool, kick_path=rig.base / "k", launch_dir=rig.launch, log=print, boot_id="another boot"
    )
    assert elsewhere.judge(run) is RunState.CLOSED
    elsewhere.close()


def undo_a_rename(run: Run, name: str, durable: str) -> None:
    """What a power cut may do to a rename that was not synced."""
    eventually(lambda: not run.locked(), "the shim's end")
    (run.path / name).rename(run.path / durable)


def test_a_start_whose_name_was_lost_with_the_power_is_no_second_start(rig: Rig) -> None:
    rig.stage(f"#!/bin/sh\necho ran >> {rig.base}/log; exec sleep 60\n")
    run = rig.start()
    eventually((rig.base / "log").exists)
    kill_both(run)
    undo_a_rename(run, "started", "starting")
    (run.path / "run.json").write_bytes(b"")  # it was never synced by itself
    second = rig.restart(boot_id="another boot")
    try:
        (again,) = second.runner.attach()
        assert again.info == run.info
        second.wait(again, RunState.CLOSED)
        assert result(again).ending is Ending.LOST
        assert (rig.base / "log").read_text() == "ran\n"
    finally:
        second.close()


def test_an_exit_whose_name_was_lost_with_the_power_stands(rig: Rig) -> None:
    run = rig.run("#!/bin/sh\necho out; exit 5\n")
    undo_a_rename(run, "exit.json", "exit.json.new")
    second = rig.restart(boot_id="another boot")
    try:
        (again,) = second.runner.attach()
        assert second.runner.judge(again) is RunState.CLOSED
        assert (result(again).value, again.closed()) == (5, (4, 0))
    finally:
        second.close()


def test_a_closed_whose_name_was_lost_with_the_power_is_whole(rig: Rig) -> None:
    rig.stage("#!/bin/sh\n(sleep 0.3; echo late) &\necho out\n")
    run = rig.start()
    rig.wait(run, RunState.CLOSED)
    undo_a_rename(run, "closed", "closed.new")
    second = rig.restart(boot_id="another boot")
    try:
        (again,) = second.runner.attach()
        assert second.runner.judge(again) is RunState.CLOSED
        assert (again.closed(), again.close_reason()) == ((9, 0), "")
    finally:
        second.close()


def test_short_runs_leave_nothing_of_their_orders(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are over before anybody asks what has become of them."""
    monkeypatch.setattr("vmr_agent.guest.runner._AGAIN_S", 0.001)
    rig.stage("#!/bin/sh\n")
    for _ in range(3):
        run = rig.start()
        eventually(lambda: run.closed() is not None)
    assert len(rig.runner._ordered) == 1


def test_a_run_made_but_never_begun_is_begun_by_the_next_daemon(rig: Rig) -> None:
    rig.stage("#!/bin/sh\necho ran\n")
    rig.spool.create(VMR, Trigger.SCHEDULE, boot_id="an earlier boot", now_ns=1)
    second = rig.restart()
    try:
        (run,) = second.runner.attach()
        second.wait(run, RunState.CLOSED)
        assert everything(run, Stream.STDOUT) == b"ran\n"
        assert (run.info.attempt, result(run).boot_id) == (1, BOOT_ID)
    finally:
        second.close()


def test_a_shim_that_dies_waiting_for_the_pipes_end_leaves_a_closed_with_a_reason(rig: Rig) -> None:
    rig.stage(f"#!/bin/sh\n(while [ ! -e {rig.base}/go ]; do sleep 0.02; done) &\necho out\n")
    run = rig.start()
    rig.wait(run, RunState.EXITED)
    shim = run.holder()
    assert shim is not None
    os.kill(shim, signal.SIGKILL)
    rig.wait(run, RunState.CLOSED)
    (rig.base / "go").touch()
    assert (run.closed(), run.close_reason()) == ((4, 0), "its shim was killed")
    assert (result(run).ending, result(run).value) == (Ending.CODE, 0)


def test_no_space_for_a_run_is_a_problem_and_leaves_nothing_behind(rig: Rig) -> None:
    rig.stage("#!/bin/sh\n")
    (rig.state / "runs").rmdir()
    (rig.state / "runs").write_text("in the way")
    with pytest.raises(Problem, match="cannot begin a run of -4/a\\.sh"):
        rig.start()
    assert list((rig.state / "open").iterdir()) == []
    assert rig.spool.open_runs() == []


def test_closing_ends_the_fork_server_and_not_the_runs(rig: Rig) -> None:
    rig.stage(WAITS.format(rig.base))
    run = rig.start()
    rig.wait(run, RunState.STARTED)
    server = server_pid(rig)
    rig.runner.close()
    assert not alive(server)
    (rig.base / "go").touch()
    rig.wait(run, RunState.CLOSED)
    assert result(run).value == 6


def test_the_environment_of_the_daemon_reaches_no_script(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "PYTHONPATH", "LD_LIBRARY_PATH", "INVOCATION_ID"):
        monkeypatch.setenv(name, "x")
    second = rig.restart()
    try:
        names = everything(second.run("#!/bin/sh\nenv\n"), Stream.STDOUT)
        for unwanted in (b"NOTIFY_SOCKET", b"PYTHON", b"LD_", b"INVOCATION_ID"):
            assert unwanted not in names
    finally:
        second.close()
