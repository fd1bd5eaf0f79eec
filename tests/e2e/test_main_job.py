"""The main job, end to end: staged VMR in a guest → exact bytes and results on the host, rerun in place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

import pytest

from tests.e2e.world import World, until

NAME_ERROR = "import sys\nprint(os)\n"


def test_the_daemon_is_spared_what_understands_command_lines(world: World) -> None:
    """As systemd starts it: it stays as long as its VM, and 2 MB with it."""
    world.start_daemon(before=["env", "PYTHONPROFILEIMPORTTIME=1"])
    log = world.path / "daemon.log"
    until(lambda: b"watching" in log.read_bytes(), "it watches")
    loaded = {line.rpartition(b"|")[2].strip() for line in log.read_bytes().splitlines()}
    assert b"vmr_agent.guest.daemon" in loaded and not {b"argparse", b"vmr_agent.cli.agent"} & loaded


def test_the_tutorials_story(world: World) -> None:
    """compress.py fails; it is repaired where it lies and run again; host and guest see the second attempt."""
    noise = b"\xef\x00\xff" + os.urandom(5000)
    opt, tmp = world.path / "opt", world.path / "tmp"
    opt.mkdir()
    tmp.mkdir()
    world.stage("-5/drop_file", f"cp file.txt {opt}/file.txt", files={"file.txt": noise})
    program = (
        "#!/usr/bin/env python3\nimport tarfile\n"
        f"with tarfile.open('{tmp}/out.tgz', 'w:gz') as tar:\n"
        f"    tar.add('{opt}/file.txt', arcname=os.path.basename('{opt}/file.txt'))\n"
    )
    where = world.stage("-4/compress.py", "./compress.py", files={"compress.py": program})
    world.stage("-3/tar", f"tar -C {tmp} -xvzf {tmp}/out.tgz")
    world.stage("-2/cat", f"cat {tmp}/file.txt")
    world.stage("1/late", "echo at one")
    world.start_collector("--expect", "1", "--start-buffer", "0")
    world.start_daemon()

    assert world.complete("-4/compress.py")["exit_code"] == 1
    assert b"NameError: name 'os' is not defined" in world.raw("-4/compress.py", "stderr")
    assert world.complete("-2/cat")["exit_code"] == 1
    assert world.complete("1/late")["exit_code"] == 0
    assert "1 VM is configured: the experiment starts in 0 s" in world.collector_log()

    (where / "compress.py").write_text(program.replace("import tarfile", "import os\nimport tarfile"))
    for vmr in ("-4/compress.py", "-3/tar"):
        done = world.agent("rerun", vmr)
        assert (done.returncode, done.stderr) == (0, b"")
    done = world.agent("rerun", "-2/cat")
    assert (done.returncode, done.stdout, done.stderr) == (0, noise, b"")

    second = world.complete("-2/cat", 2)
    assert (second["exit_code"], second["trigger"], second["stdout_bytes"]) == (0, "rerun", len(noise))
    assert world.raw("-2/cat", attempt=2) == noise
    until(lambda: world.log().count("exited after") == 8, "eight exits in Server.log")
    log = world.log()
    assert "WARNING] compress.py (" in log and "with code: 1" in log
    assert "\\xef\\x00\\xff" in log
    messages = [row["msg"] for row in world.rows()]
    assert "file.txt" in messages and "at one" in messages
    assert all(row["timestamp"] for row in world.rows())
    assert world.status()["-2/cat"]["attempt"] == 2


def test_two_streams_of_any_bytes_arrive_exactly(world: World) -> None:
    program = (
        "import os, random\nrandom.seed(7)\n"
        "for _ in range(400):\n"
        "    os.write(random.choice((1, 2)), random.randbytes(random.randrange(1, 30000)))\n"
    )
    world.stage("-1/noise", f"exec {sys.executable} noise.py", files={"noise.py": program})
    world.start_collector()
    world.start_daemon()
    row = world.complete("-1/noise")
    expected = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert world.raw("-1/noise") == expected.stdout
    assert world.raw("-1/noise", "stderr") == expected.stderr
    assert (row["stdout_bytes"], row["stderr_bytes"]) == (len(expected.stdout), len(expected.stderr))


@pytest.mark.parametrize("victim", ["daemon", "collector", "both"])
def test_killed_in_mid_output_no_byte_is_missing_or_doubled(world: World, victim: str) -> None:
    program = (
        "import sys, time\n"
        "for number in range(40000):\n"
        "    sys.stdout.write(f'{number:07d} is a line of a run that goes on\\n')\n"
        "    if number % 400 == 0:\n"
        "        sys.stdout.flush(); time.sleep(0.02)\n"
    )
    world.stage("-1/counter", f"exec {sys.executable} counter.py", files={"counter.py": program})
    world.start_collector()
    world.start_daemon()
    for _ in range(3):
        until(lambda: world.raw("-1/counter"), "some output")
        time.sleep(0.3)
        if victim != "collector":
            world.kill9(world.daemon)
        if victim != "daemon":
            world.kill9(world.collector)
            world.start_collector()
        if victim != "collector":
            time.sleep(0.2)
            world.start_daemon()
    row = world.complete("-1/counter")
    expected = b"".join(b"%07d is a line of a run that goes on\n" % number for number in range(40000))
    assert world.raw("-1/counter") == expected
    assert (row["exit_code"], row["attempt"], row["gaps"]) == (0, 1, [])
    until(lambda: len(world.rows()) >= 40000, "every line in Server.json")
    until(lambda: "exited after" in world.log(), "the exit in Server.log")
    assert [row["msg"] for row in world.rows()] == [line.decode().strip() for line in expected.splitlines()]
    assert world.log().count("0000000 is a line") == 1 and world.log().count("0039999 is a line") == 1
    assert world.log().count("CALL ARGS") == 1 and world.log().count("exited after") == 1


def test_with_no_host_runs_go_on_and_are_shipped_when_it_comes(world: World) -> None:
    world.stage("-2/a", "echo first")
    world.stage("-1/b", "echo second; exit 3")
    world.start_daemon()
    until(lambda: world.state("-1/b") == "exited", "both run with no host")
    assert world.status()["-1/b"]["delivered"] == "no"
    world.start_collector()
    assert world.complete("-1/b")["exit_code"] == 3
    assert world.raw("-2/a") == b"first\n"


def test_a_background_child_holds_the_pipe_and_not_the_barrier(world: World) -> None:
    go = world.path / "go"
    os.mkfifo(go)
    world.stage("-2/leaves-one", f"(read -r _ <{go}; echo late) & echo now")
    world.stage("-1/next", "echo next")
    world.start_collector()
    world.start_daemon()
    until(lambda: world.result("-1/next"), "the next time starts")
    until(
        lambda: (world.result("-2/leaves-one") or {}).get("state") == "exited", "the host hears of the exit"
    )
    first = world.result("-2/leaves-one")
    assert first is not None and first["complete"] is False
    go.write_text("now\n")
    assert world.complete("-2/leaves-one")["stdout_bytes"] == len(b"now\nlate\n")
    assert world.raw("-2/leaves-one") == b"now\nlate\n"


def test_every_kind_of_line_reaches_server_json(world: World) -> None:
    lines = [
        "42",
        "null",
        '{"a": 1, "vmr": "mine"}',
        "[1]",
        "",
        "plain",
        '{"timestamp": "mine"}',
        "NaN",
        '"text"',
    ]
    text = "\n".join(lines).encode() + b"\n\xefbroken\nno newline at the end"
    world.stage("-1/kinds", "cat kinds", files={"kinds": text})
    world.start_collector()
    world.start_daemon()
    world.complete("-1/kinds")
    until(lambda: "exited after" in world.log(), "the exit in Server.log")
    rows = world.rows()
    assert [row.get("msg") for row in rows if "msg" in row and row["msg"] == row["msg"]][:2] == [42, None]
    assert any(row.get("a") == 1 and row["vmr"] == "mine" for row in rows)
    assert any(row.get("msg") == "\\xefbroken" for row in rows)
    assert rows[-1]["msg"] == "no newline at the end"
    assert len(rows) == len([line for line in text.splitlines() if line.strip()])
    assert world.raw("-1/kinds") == text


def test_a_run_that_cannot_start_or_is_killed_says_why(world: World) -> None:
    world.stage("-3/killed", "kill -9 $$")
    crlf = world.stage("-2/crlf", "true")
    (crlf / "call_arguments.sh").write_bytes(b"#!/bin/sh\r\ntrue\r\n")
    gone = world.stage("-1/interpreter", "true")
    (gone / "call_arguments.sh").write_bytes(b"#!/no/such/interpreter\n")
    world.start_collector()
    world.start_daemon()
    assert world.complete("-3/killed")["signal"] == "SIGKILL"
    row = world.complete("-2/crlf")
    assert row["state"] == "failed to start" and "CR" in row["error"]
    row = world.complete("-1/interpreter")
    assert row["state"] == "failed to start" and "/no/such/interpreter" in row["error"]
    until(
        lambda: "could not start" in world.log() and "with signal: SIGKILL" in world.log(),
        "both in Server.log",
    )


def test_a_killed_shim_gives_lost_with_all_it_had_captured(world: World) -> None:
    world.stage("-1/victim", "echo captured; exec sleep 60")
    world.start_collector()
    world.start_daemon()
    until(lambda: world.raw("-1/victim") == b"captured\n", "the line on the host")
    script = world.status()["-1/victim"]["pid"]
    shim = int(Path(f"/proc/{script}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(shim, signal.SIGKILL)
    os.kill(script, signal.SIGKILL)
    until(lambda: (world.result("-1/victim") or {})["state"] == "lost", "it is lost on the host too")
    row = world.result("-1/victim")
    assert row is not None and row["error"] == "its shim was killed" and row["complete"] is False
    assert world.raw("-1/victim") == b"captured\n"
    until(lambda: "lost: its shim was killed" in world.log(), "a line in Server.log")


def test_several_vms_in_one_collector(make_world: Callable[..., World], tmp_path: Path) -> None:
    one, two = make_world(), make_world()
    one.stage("-1/a", "echo one")
    two.stage("-1/a", "echo two")
    one.start_collector("--listen", f"Client={two.port}")
    one.start_daemon()
    two.start_daemon()
    one.complete("-1/a")
    client = one.logs / "Client" / "-1" / "a" / "1" / "stdout"
    until(lambda: client.exists() and client.read_bytes() == b"two\n", "the other VM's line")
    assert one.raw("-1/a") == b"one\n"


def test_the_host_starts_the_experiment_and_late_vms_are_told(world: World) -> None:
    world.stage("-1/first", "true")
    world.stage("0.5/timed", "echo timed")
    world.start_collector()
    world.start_daemon()
    until(lambda: world.answer().get("configured"), "configured")
    assert world.state("0.5/timed") == "waiting"
    assert world.host("start").returncode == 0
    assert world.complete("0.5/timed")["exit_code"] == 0
    again = world.host("start")
    assert again.returncode == 1 and again.stderr.startswith(b"vmr-host: cannot start")


def test_a_spool_id_of_its_own_begins_a_new_life_and_keeps_the_old(world: World) -> None:
    world.stage("-1/a", "echo one life")
    world.start_collector()
    world.start_daemon()
    world.complete("-1/a")
    assert world.agent("hold").returncode == 0
    until(lambda: world.agent("reset").returncode == 0, "reset")
    assert world.agent("resume").returncode == 0
    until(lambda: (world.logs / "Server~1" / "-1" / "a" / "1" / "stdout").exists(), "the old life is kept")
    world.complete("-1/a")
    assert world.raw("-1/a") == b"one life\n"
    until(lambda: world.log().count("exited after") == 2, "both lives in Server.log")
