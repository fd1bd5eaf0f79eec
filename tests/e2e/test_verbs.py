"""The guest's verbs as a person types them, and what they say when it goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.e2e.world import World, until
from vmr_agent import control


@pytest.fixture
def running(world: World) -> World:
    """A daemon with one VMR that has run."""
    world.stage("-4/compress.py", "echo out; echo err >&2; exit $(cat code)", files={"code": "3"})
    world.start_daemon()
    until(lambda: world.state("-4/compress.py") == "exited", "the VMR has run")
    return world


def test_rerun_streams_raw_and_exits_as_the_vmr_does(running: World) -> None:
    done = running.agent("rerun", "-4/compress.py")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n", b"err\n")
    assert running.status()["-4/compress.py"]["attempt"] == 2


def test_every_spelling_names_the_same_vmr(running: World) -> None:
    at, inside = running.launch / "-4", running.launch / "-4" / "compress.py"
    for arguments, cwd in (
        (["-4/compress.py"], None),
        ([str(inside)], None),
        ([f"{inside}/"], None),
        (["./compress.py"], at),
        (["compress.py"], at),
        ([], inside),
        (["."], inside),
        (["--runtime-dir", str(running.runtime), "-4/compress.py"], None),
        (["-4/compress.py", "--runtime-dir", str(running.runtime)], None),
    ):
        done = running.agent("rerun", *arguments, cwd=cwd)
        assert (done.returncode, done.stdout) == (3, b"out\n"), (arguments, cwd, done.stderr)


def test_rerun_returns_at_the_exit_and_the_next_one_is_accepted_at_once(running: World) -> None:
    for _ in range(5):
        assert running.agent("rerun", "-4/compress.py").returncode == 3


def test_a_rerun_finds_out_by_itself_that_the_run_before_has_ended(world: World) -> None:
    """The shim's word of it may be lost, or not have been read yet."""
    directory = world.stage("-1/waits", "read -r word <fifo", commit=False)
    os.mkfifo(directory / "fifo")
    (directory / "call_arguments.sh").chmod(0o777)
    daemon = world.start_daemon()
    until(lambda: world.row("-1/waits").get("state") == "running", "it runs")
    with control.Connection(world.runtime / control.SOCKET, program="daemon", hint="") as asked:
        asked.ask("status")
        daemon.send_signal(signal.SIGSTOP)
        (world.runtime / "kick").unlink()
        (directory / "fifo").write_bytes(b"go\n")
        until(lambda: (world.spool / "runs/-1/waits/1/exit.json").exists(), "it has ended")
        asked.say({"verb": "rerun", "vmr": "-1/waits"})
        daemon.send_signal(signal.SIGCONT)
        answer, _ = asked.hear()
    assert answer["attempt"] == 2, answer
    assert daemon.poll() is None


def test_a_signal_is_128_and_its_number(world: World) -> None:
    world.stage("-1/dies", "kill -TERM $$")
    world.start_daemon()
    until(lambda: world.agent("rerun", "-1/dies").returncode == 128 + signal.SIGTERM, "the rerun")


def test_errors_are_one_line_and_say_what_to_do(running: World) -> None:
    for arguments, status, words in (
        (["rerun", "-4/compres.py"], 1, ["cannot find a VMR -4/compres.py", "did you mean -4/compress.py?"]),
        (["rerun", "-3/compress.py"], 1, ["did you mean -4/compress.py?"]),
        (["rerun"], 1, ["cannot tell which VMR is meant"]),
        (["rerun", "/etc/passwd"], 1, ["cannot tell which VMR /etc/passwd is"]),
        (["logs", "-4/nothing"], 1, ["cannot find a run of -4/nothing"]),
        (["logs", "-4/compress.py", "--attempt", "9"], 1, ["cannot find attempt 9"]),
        (["kill", "-4/compress.py"], 1, ["it isn't running"]),
        (["kill", "-4/compress.py", "--signal", "NONSENSE"], 2, ["there is no signal"]),
        (["frobnicate"], 2, ["invalid choice"]),
        (["reset"], 1, ["cannot reset", "vmr-agent hold"]),
    ):
        done = running.agent(*arguments)
        lines = done.stderr.decode().splitlines()
        assert done.returncode == status, (arguments, done.stderr)
        assert len(lines) == 1 and lines[0].startswith("vmr-agent"), lines
        assert all(word in lines[0] for word in words), lines


def test_without_a_daemon_the_error_says_what_to_do_and_logs_still_work(running: World) -> None:
    running.stop(running.daemon)
    done = running.agent("rerun", "-4/compress.py")
    assert done.returncode == 1
    assert b"it isn't running" in done.stderr and b"systemctl start vmr-agent" in done.stderr
    done = running.agent("logs", "-4/compress.py")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"out\n", b"err\n")
    assert running.agent("logs", "-4/compress.py", "--stream", "stderr").stdout == b"err\n"


def test_a_vmr_in_progress_is_refused_with_its_attempt(running: World) -> None:
    running.stage("-1/slow", "exec sleep 30")
    until(lambda: running.state("-1/slow") == "running", "it runs")
    done = running.agent("rerun", "-1/slow")
    assert done.returncode == 1 and b"attempt 1 is still running" in done.stderr
    killed = running.agent("kill", "-1/slow")
    assert killed.returncode == 0
    until(lambda: running.state("-1/slow") == "killed", "it is killed")
    assert running.status()["-1/slow"]["signal"] == "SIGTERM"


def test_ctrl_c_stops_watching_and_not_the_run(running: World) -> None:
    running.stage("-1/slow", "echo begun; sleep 3; echo done")
    until(lambda: running.state("-1/slow") == "exited", "its first run")
    watching = subprocess.Popen(
        [sys.executable, "-m", "vmr_agent.cli.start", "rerun", "-1/slow"],
        env=running.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert watching.stdout is not None and watching.stdout.readline() == b"begun\n"
    watching.send_signal(signal.SIGINT)
    _, errors = watching.communicate(timeout=30)
    assert watching.returncode == 130
    assert b"stopped watching; -1/slow goes on" in errors
    until(lambda: running.state("-1/slow") == "exited", "the run goes on to its end")
    assert running.agent("logs", "-1/slow").stdout == b"begun\ndone\n"


def test_a_vmr_whose_turn_has_not_come_cannot_be_rerun(running: World) -> None:
    running.stage("5/later", "echo later")
    until(lambda: running.row("5/later"), "it is seen")
    done = running.agent("rerun", "5/later")
    assert done.returncode == 1 and b"its turn hasn't come" in done.stderr


def test_names_of_any_bytes_run_and_rerun(world: World) -> None:
    name = b"-1/odd \n\xff name"
    world.stage(name, "echo odd")
    world.stage("-100000/mv_1", "echo helper")
    world.stage("-10.5/half", "echo half")
    world.start_collector()
    world.start_daemon()
    shown = "-1/odd \\n\\xff name"
    until(
        lambda: world.state(shown) == "exited",
        "it ran",
    )
    done = world.agent(b"rerun", name)
    assert (done.returncode, done.stdout) == (0, b"odd\n")
    encoded = "odd%20%0A%FF%20name"
    until(lambda: (world.logs / "Server" / "-1" / encoded / "2" / "stdout").exists(), "on the host, encoded")
    assert b"odd \\n\\xff name" in world.agent("status").stdout


def test_status_json_is_one_array_and_the_table_lines_up(running: World) -> None:
    rows = json.loads(running.agent("status", "--json").stdout)
    assert [row["vmr"] for row in rows] == ["-4/compress.py"]
    assert rows[0]["exit_code"] == 3 and rows[0]["duration_s"] > 0 and rows[0]["complete"] is True
    table = running.agent("status").stdout.decode().splitlines()
    assert table[0].split() == ["VMR", "TRY", "STATE", "EXIT", "TIME", "OUTPUT", "CHANGED", "ON", "HOST"]
    assert table[1].startswith("-4/compress.py")


def test_schedule_off_runs_nothing_by_itself_and_reruns_all(make_world: object) -> None:
    world: World = make_world(settings={"schedule": "off"})  # type: ignore[operator]
    world.stage("-1/a", "echo by hand")
    world.start_daemon()
    until(lambda: world.row("-1/a"), "it is seen")
    time.sleep(1)
    assert world.status()["-1/a"]["attempt"] == 0
    until(lambda: world.agent("rerun", "-1/a").stdout == b"by hand\n", "a rerun by hand")


def test_a_reader_that_leaves_gets_no_traceback(running: World) -> None:
    running.stage("-1/much", "head -c 5000000 /dev/zero")
    until(lambda: running.state("-1/much") == "exited", "it ran")
    piped = subprocess.run(
        f"{sys.executable} -m vmr_agent.cli.start logs -1/much | head -c 10 | wc -c",
        shell=True,
        env=running.environment,
        capture_output=True,
    )
    assert piped.stdout.strip() == b"10" and b"Traceback" not in piped.stderr


def test_the_environment_of_a_script_is_clean(world: World) -> None:
    world.stage("-1/env", "env | sort; ls /proc/self/fd | wc -l; pwd; umask; readlink /proc/self/fd/0")
    world.start_daemon()
    until(lambda: world.state("-1/env") == "exited", "it ran")
    lines = world.agent("logs", "-1/env").stdout.decode().splitlines()
    names = {line.partition("=")[0] for line in lines if "=" in line}
    assert names - {"PWD", "SHLVL", "_", "OLDPWD"} == {
        "PATH",
        "LANG",
        "HOME",
        "VMR_NAME",
        "VMR_ATTEMPT",
        "VMR_START_TIME",
    }
    assert "0022" in lines and "/dev/null" in lines
    assert os.fspath(world.launch / "-1" / "env") in lines
