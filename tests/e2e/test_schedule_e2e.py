"""The schedule through real processes: what waits for what, what comes late, goes, comes back, asks for a reboot.

Orders are proven by the times in result.json, which the shims note, not by when the test looked.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.e2e.unprivileged import needs_root
from tests.e2e.world import World, until


def waits_for(path: Path) -> str:
    """A script that goes on when a file appears."""
    return f'while [ ! -e "{path}" ]; do sleep 0.02; done; echo done'


def state_is(world: World, vmr: str, state: str, attempt: int = 1) -> None:
    def holds() -> bool:
        row = world.row(vmr)
        return bool(row) and (row["state"], row["attempt"]) == (state, attempt)

    until(holds, f"{vmr} attempt {attempt} {state}\n{world.row(vmr)}\n{world.tail()}")


def configured(world: World) -> None:
    until(lambda: world.answer().get("configured"), f"configured\n{world.tail()}")


def stays(world: World, vmr: str, state: str, seconds: float = 0.7) -> dict[str, Any]:
    """It is in a state now and in a while; the longest that anything of the schedule takes is half of it."""
    assert world.row(vmr)["state"] == state, world.row(vmr)
    time.sleep(seconds)
    row = world.row(vmr)
    assert row["state"] == state, row
    return row


# --- barriers -----------------------------------------------------------------------------------------------------


def test_each_negative_time_waits_for_all_of_the_one_before(world: World) -> None:
    world.stage("-10/a", "sleep 0.8")
    world.stage("-10/b", "sleep 0.6; exit 7")
    world.stage("-10/c", "kill -9 $$")
    world.stage("-9.5/d", "sleep 0.6")
    world.stage("-9.5/e", "sleep 0.6")
    world.stage("-2/f", "true")
    world.stage("-1e-07/g", "true")
    (world.stage("-1/h", "true") / "call_arguments.sh").write_text("#!/no/such\n")
    world.start_collector()
    world.start_daemon()
    times = [["-10/a", "-10/b", "-10/c"], ["-9.5/d", "-9.5/e"], ["-2/f"], ["-1/h"], ["-1e-07/g"]]
    rows = [[world.complete(vmr) for vmr in vmrs] for vmrs in times]
    for before, after in zip(rows, rows[1:]):
        assert max(row["ended"] for row in before) <= min(row["started"] for row in after)
    for together in rows[:2]:  # concurrent: each began before any had ended
        slow = [row for row in together if row["duration_s"] > 0.1]
        assert max(row["started"] for row in together) < min(row["ended"] for row in slow)
    assert rows[0][1]["exit_code"] == 7 and rows[0][2]["signal"] == "SIGKILL"
    assert all(row["attempt"] == 1 and row["trigger"] == "schedule" for each in rows for row in each)


def test_late_arrivals_join_their_time_and_lower_ones_run_at_the_next_boundary(world: World) -> None:
    go = world.path / "go"
    world.stage("-5/slow", waits_for(go))
    world.stage("-4/next", "true")
    world.start_collector()
    world.start_daemon()
    state_is(world, "-5/slow", "running")
    world.stage("-5/joins", "true")
    world.stage("-6/lower", "true")
    state_is(world, "-5/joins", "exited")
    assert stays(world, "-6/lower", "waiting")["waiting"] == "waits for -5/slow"
    assert stays(world, "-4/next", "waiting")["waiting"] == "waits for -5/slow"
    go.touch()
    names = ("-5/slow", "-5/joins", "-6/lower", "-4/next")
    for vmr in names:
        world.complete(vmr)
    # By the guest's clock alone: the host's is compared with it anew in each session.
    slow, joins, lower, following = (world.row(vmr) for vmr in names)
    assert slow["started"] < joins["started"] and joins["ended"] < slow["ended"]
    assert slow["ended"] <= lower["started"] and lower["ended"] <= following["started"]


def test_what_comes_after_configured_runs_at_once_and_holds_nothing(
    make_world: Callable[..., World],
) -> None:
    """FIREWHEEL's `push file` and others stage helpers at -100000 in the middle of positive time."""
    world = make_world(settings={"start": "auto", "quiet": "0.3"})
    go = world.path / "go"
    world.stage("-1/first", "true")
    world.start_daemon()
    configured(world)
    world.stage("-100000/mv", waits_for(go))
    state_is(world, "-100000/mv", "running")
    for vmr in ("-100000/mv_1", "-3/x", "-2/y", "0.1/late"):
        world.stage(vmr, "true")
    for vmr in ("-100000/mv_1", "-3/x", "-2/y", "0.1/late"):
        state_is(world, vmr, "exited")
    assert world.row("-100000/mv")["state"] == "running"
    go.touch()
    state_is(world, "-100000/mv", "exited")
    assert world.ask("status")["configured"] is True


def test_positive_times_count_from_time_zero_and_late_ones_run_at_once(
    make_world: Callable[..., World],
) -> None:
    world = make_world(settings={"start": "auto"})
    world.stage("-1/before", "true")
    world.stage("0.4/a", "sleep 1.2")
    world.stage("0.8/b", "true")
    world.stage("4/c", "true")
    world.start_collector()
    world.start_daemon()
    before, a, b = (world.complete(vmr) for vmr in ("-1/before", "0.4/a", "0.8/b"))
    assert before["ended"] <= a["started"] < b["started"] < a["ended"], "no barrier among positive times"
    world.stage("0.1/late", "true")
    late, c = world.complete("0.1/late"), world.complete("4/c")
    assert b["started"] < late["started"] < c["started"]
    apart = datetime.fromisoformat(c["started"][:-1]) - datetime.fromisoformat(a["started"][:-1])
    assert apart.total_seconds() > 2.5


# --- ways of staging ------------------------------------------------------------------------------------------------


def test_nothing_starts_under_hold_however_it_is_copied_and_all_of_it_afterwards(world: World) -> None:
    """`cp -a`, `tar x` and rsync make the script executable before the data it needs is there."""
    world.start_daemon()
    until(lambda: world.agent("hold").returncode == 0, "held")
    tree = world.path / "tree"
    for vmr in ("-3/cp", "-2/tar", "-1/rsync"):
        directory = tree / vmr
        directory.mkdir(parents=True)
        (directory / "call_arguments.sh").write_text('#!/bin/bash\ncd "$(dirname "$0")"\ncat zz-data\n')
        (directory / "call_arguments.sh").chmod(0o755)
        (directory / "zz-data").write_text(f"data of {vmr}\n")
    subprocess.run(["cp", "-a", tree / "-3", world.launch], check=True)
    tar = subprocess.run(["tar", "-C", tree, "-c", "./-2"], capture_output=True, check=True)
    subprocess.run(["tar", "-C", world.launch, "-x"], input=tar.stdout, check=True)
    as_rsync_does(tree / "-1", world.launch / "-1")
    for vmr in ("-3/cp", "-2/tar", "-1/rsync"):
        state_is(world, vmr, "waiting", attempt=0)
    assert stays(world, "-3/cp", "waiting")["waiting"] == "held"
    assert world.ask("status")["configured"] is False
    # A VMR that is half there when the hold ends is waited for all the same.
    assert world.agent("resume").returncode == 0
    for vmr in ("-3/cp", "-2/tar", "-1/rsync"):
        state_is(world, vmr, "exited")
        assert world.agent("logs", vmr).stdout == f"data of {vmr}\n".encode()
    assert not (world.launch / ".hold").exists()


def as_rsync_does(source: Path, target: Path) -> None:
    """A file at a time under a temporary name, its mode and time set, then renamed."""
    for path in sorted(source.rglob("*")):
        there = target / path.relative_to(source)
        if path.is_dir():
            there.mkdir(parents=True)
            continue
        temporary = there.with_name(f".{there.name}.Xa3fQ1")
        temporary.write_bytes(path.read_bytes())
        shutil.copystat(path, temporary)
        temporary.rename(there)
        time.sleep(0.05)


def test_hold_and_reset_follow_each_other_in_a_script(world: World) -> None:
    world.stage("-1/a", "true")
    world.start_daemon()
    state_is(world, "-1/a", "exited")
    planted = world.path / "planted"
    (world.launch / ".hold").symlink_to(planted)  # holds as well, and is not followed
    assert world.agent("hold").returncode == 0
    assert not planted.exists()
    done = world.agent("reset")
    assert (done.returncode, done.stderr) == (0, b"")
    assert world.row("-1/a")["attempt"] == 0
    assert world.agent("resume").returncode == 0
    state_is(world, "-1/a", "exited")


def test_a_whole_tree_moved_into_the_launch_directory_runs_in_order(
    make_world: Callable[..., World],
) -> None:
    world = make_world(settings={"start": "auto"})
    world.start_collector()
    world.start_daemon()
    until(world.answer, "the daemon")
    launch, world.launch = world.launch, world.path / "tree"
    for vmr in ("-2/a", "-2/b", "-1/c", "0.1/d"):
        world.stage(vmr, f"echo {vmr}")
    tree, world.launch = world.launch, launch
    # The scripts in it do not `cd` to where they were made: that is gone.
    for script in tree.glob("*/*/call_arguments.sh"):
        script.write_text(f"#!/bin/sh\necho {script.parent.name}\n")
    subprocess.run(["mv", *(os.fspath(each) for each in tree.iterdir()), launch], check=True)
    a, b, c, d = (world.complete(vmr) for vmr in ("-2/a", "-2/b", "-1/c", "0.1/d"))
    assert max(a["ended"], b["ended"]) <= c["started"] and c["ended"] <= d["started"]
    assert world.raw("0.1/d") == b"d\n"


# --- what goes, and what comes back -----------------------------------------------------------------------------------


def test_a_vmr_that_removes_the_launch_directory_stops_nothing(world: World) -> None:
    """FIREWHEEL has one that runs `/bin/rm -rf /var/launch`."""
    world.stage("-3/before", "echo before")
    world.stage("-2/wipe", f"cd /; rm -rf {world.launch}; sleep 0.2; echo wiped")
    world.stage("-1/never", "echo must not run")
    world.start_collector()
    world.start_daemon()
    assert world.complete("-2/wipe")["exit_code"] == 0
    until(lambda: "does not exist" in world.daemon_log(), "a line in the log")
    assert "does not exist" in world.agent("status").stdout.decode()
    assert world.agent("logs", "-2/wipe").stdout == b"wiped\n"
    done = world.agent("rerun", "-2/wipe")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    world.launch.mkdir()
    world.stage("-3/before", "echo again")
    world.stage("-1/new", "echo new")
    assert world.complete("-3/before", 2)["trigger"] == "schedule"
    assert world.complete("-1/new")["attempt"] == 1
    assert world.raw("-3/before", attempt=2) == b"again\n" and world.raw("-3/before") == b"before\n"
    assert world.row("-1/never") == {} and world.result("-1/never") is None


def test_a_vmr_staged_anew_runs_as_the_next_attempt_and_an_edited_one_does_not(world: World) -> None:
    directory = world.stage("-1/a", "echo first", files={"data": "x"})
    world.start_daemon()
    state_is(world, "-1/a", "exited")
    script = directory / "call_arguments.sh"
    directory.rename(world.path / "away")
    until(lambda: world.row("-1/a")["staged"] is False, "it was seen gone")
    (world.path / "away").rename(directory)
    until(lambda: world.row("-1/a")["staged"] is True, "it is back")
    # Every way to edit: in place, by rename, its mode, its time, data beside it.
    script.write_text("#!/bin/sh\necho edited\n")
    script.touch()
    script.chmod(0o600)
    script.chmod(0o755)
    (directory / "data").write_text("y")
    beside = directory / "call_arguments.sh~"
    shutil.copy2(script, beside)
    beside.rename(script)
    assert stays(world, "-1/a", "exited")["attempt"] == 1
    assert world.agent("rerun", "-1/a").stdout == b"edited\n"
    shutil.rmtree(directory)
    until(lambda: world.row("-1/a")["staged"] is False, "it was seen gone")
    world.stage("-1/a", "echo anew")
    state_is(world, "-1/a", "exited", attempt=3)
    assert world.row("-1/a")["trigger"] == "schedule"
    assert world.agent("logs", "-1/a").stdout == b"anew\n"
    # At once, so that nobody saw it gone but an event, which may be lost, and the inode may be the same.
    for _ in range(5):
        shutil.rmtree(directory)
        world.stage("-1/a", "echo at once")
        time.sleep(3)
        if world.row("-1/a")["attempt"] == 4:
            break
    state_is(world, "-1/a", "exited", attempt=4)
    assert world.agent("logs", "-1/a").stdout == b"at once\n"


# --- reboots ----------------------------------------------------------------------------------------------------------


def rebooting(make_world: Callable[..., World], status: int) -> tuple[World, Callable[[], int]]:
    """A world whose reboot command notes its calls and ends with a status; and the number of calls."""
    world = make_world()
    calls, command = world.path / "calls", world.path / "reboot-command"
    command.write_text(f"#!/bin/sh\necho called >> {calls}\nexit {status}\n")
    command.chmod(0o755)
    world.settings["reboot_command"] = str(command)
    world.write_config()
    return world, lambda: len(calls.read_text().splitlines()) if calls.exists() else 0


def test_a_reboot_is_asked_for_once_after_all_of_that_time_and_everything_waits(
    make_world: Callable[..., World],
) -> None:
    world, calls = rebooting(make_world, 0)
    world.stage("-2/by-code", "exit 10")
    world.stage("-2/by-file", "touch reboot")
    world.stage("-2/slow", "sleep 0.5")
    world.stage("-1/next", "true")
    world.start_daemon()
    state_is(world, "-2/by-code", "exited")
    early = calls()
    assert early == 0 or world.row("-2/slow")["state"] == "exited"
    until(calls, "the reboot command")
    assert world.row("-2/slow")["state"] == "exited"
    assert stays(world, "-1/next", "waiting")["waiting"] == "waits for a reboot"
    assert calls() == 1
    log = world.daemon_log()
    assert log.count("rebooting, asked for by -2/by-code, -2/by-file") == 1
    assert (world.launch / "-2" / "by-file" / "reboot").exists()
    assert world.ask("status")["configured"] is False


@needs_root
def test_after_the_reboot_those_that_asked_run_again_and_nobody_else(
    make_world: Callable[..., World],
) -> None:
    """Another boot is another boot id, which a mount can show to one process and its children."""
    world, calls = rebooting(make_world, 0)
    world.stage("-2/by-code", "exit $(( VMR_ATTEMPT == 1 ? 10 : 0 ))")
    world.stage("-2/by-file", '[ "$VMR_ATTEMPT" -gt 1 ] || touch reboot')
    world.stage("-2/other", "true")
    world.stage("-1/next", "true")
    world.start_daemon()
    until(calls, "the reboot command")
    world.kill9(world.daemon)
    boot = world.path / "boot_id"
    boot.write_text(f"{uuid.uuid4()}\n")
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("no mount namespaces here")
    world.start_daemon(
        before=[
            "unshare",
            "-m",
            "sh",
            "-c",
            'mount --bind "$0" /proc/sys/kernel/random/boot_id; exec "$@"',
            str(boot),
        ]
    )
    state_is(world, "-1/next", "exited")
    for vmr, attempt, trigger in (
        ("-2/by-code", 2, "reboot"),
        ("-2/by-file", 2, "reboot"),
        ("-2/other", 1, "schedule"),
        ("-1/next", 1, "schedule"),
    ):
        row = world.row(vmr)
        assert (row["attempt"], row["trigger"], row["state"]) == (attempt, trigger, "exited"), row
    assert (
        max(world.row(f"-2/{name}")["ended"] for name in ("by-code", "by-file"))
        <= world.row("-1/next")["started"]
    )
    assert not (world.launch / "-2" / "by-file" / "reboot").exists()
    assert calls() == 1


def test_a_reboot_that_fails_or_that_none_can_do_leaves_the_results_and_goes_on(
    make_world: Callable[..., World],
) -> None:
    failing, calls = rebooting(make_world, 3)
    missing, _ = rebooting(make_world, 0)
    missing.settings["reboot_command"] = "/no/such/command now"
    missing.write_config()
    without = make_world()
    for world, words in (
        (failing, "the reboot command ended with status 3; the results stand"),
        (missing, "cannot run /no/such/command"),
        (without, "asked for a reboot and gets none: none can be done here"),
    ):
        world.stage("-2/asks", "exit 10")
        world.stage("-1/next", "true")
        world.start_daemon()
        state_is(world, "-1/next", "exited")
        assert words in world.daemon_log()
        row = world.row("-2/asks")
        assert (row["attempt"], row["exit_code"]) == (1, 10)
        configured(world)
    assert calls() == 1


# --- what dies --------------------------------------------------------------------------------------------------


def test_a_lost_run_is_not_repeated_and_the_schedule_goes_on(world: World) -> None:
    world.stage("-2/victim", "echo had; exec sleep 60")
    world.stage("-1/next", "true")
    world.start_daemon()
    until(lambda: world.row("-2/victim").get("pid") and world.row("-2/victim")["stdout_bytes"], "it runs")
    script = world.row("-2/victim")["pid"]
    shim = int(Path(f"/proc/{script}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(shim, signal.SIGKILL)
    # The script lives on without its shim: it holds its barrier still.
    time.sleep(1.5)
    assert world.row("-1/next")["state"] == "waiting"
    done = world.agent("rerun", "-2/victim")
    assert done.returncode == 1 and b"still running" in done.stderr
    os.kill(script, signal.SIGKILL)
    state_is(world, "-1/next", "exited")
    row = world.row("-2/victim")
    assert (row["state"], row["attempt"], row["error"]) == ("lost", 1, "its shim was killed")
    assert world.agent("logs", "-2/victim").stdout == b"had\n"
    assert "its shim was killed" in world.agent("status").stdout.decode()


def test_a_daemon_killed_at_any_time_goes_on_where_it_was(make_world: Callable[..., World]) -> None:
    world = make_world(settings={"start": "auto"})
    names = ["-4/a", "-3/b", "-2/c", "-1/d", "0.1/e"]
    for name in names:
        world.stage(name, "sleep 0.3; echo once >> count")
    world.start_collector()
    for _ in range(12):
        daemon = world.start_daemon()
        time.sleep(0.37)
        if daemon.poll() is None:
            world.kill9(daemon)
    world.start_daemon()
    rows = [world.complete(name) for name in names]
    for before, after in zip(rows, rows[1:]):
        assert before["ended"] <= after["started"]
    assert [row["attempt"] for row in rows] == [1] * 5
    assert all((world.launch / name / "count").read_text() == "once\n" for name in names)
    # In the pause after the last exit of a time, too: the script ends while nobody is there to see it.
    assert "Traceback" not in world.daemon_log()
