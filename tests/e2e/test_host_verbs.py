"""The host's verbs as a person types them, with a real guest behind them, and what they say when it goes wrong."""

from __future__ import annotations

import datetime
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Optional

import pytest

from tests.e2e.relay import Relay
from tests.e2e.terminal import Terminal as GuestTerminal
from tests.e2e.world import World, until
from vmr_agent.cli import collected
from vmr_agent.host.view import LoggedRun

HOST = [sys.executable, "-m", "vmr_agent.cli.host"]
ODD = b"-1/odd \n\xff name"


@pytest.fixture
def running(world: World) -> World:
    """A guest with one VMR that has run, its host, and another VM that isn't there."""
    world.stage("-4/compress.py", "echo out; echo err >&2; exit $(cat code)", files={"code": "3"})
    world.start_collector("--listen", f"Client={world.sockets / 'client'}")
    world.start_daemon()
    world.complete("-4/compress.py")
    return world


@pytest.fixture
def begun() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Begin a verb; ended with the test."""
    started = []

    def begin(world: World, *arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [*HOST, *arguments], env=world.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def rows(world: World, *arguments: str) -> dict[str, dict[str, Any]]:
    """The rows of a verb's --json, by name."""
    done = world.host(*arguments, "--json")
    assert done.returncode == 0, done
    return {row.get("vmr", row.get("vm")): row for row in json.loads(done.stdout)}


def refused(world: World, *arguments: str) -> str:
    """What a verb says that can't be done: one line."""
    done = world.host(*arguments)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 1 and done.stdout == b"" and len(lines) == 1, done
    assert lines[0].startswith("vmr-host: cannot "), lines
    return str(lines[0])


# --- rerun ---------------------------------------------------------------------------------------------------


def test_rerun_streams_raw_and_exits_as_the_vmr_does(running: World) -> None:
    done = running.host("rerun", "Server", "-4/compress.py")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n", b"err\n")
    row = running.complete("-4/compress.py", 2)
    assert (row["trigger"], row["exit_code"]) == ("host", 3)

    where = running.launch / "-4" / "compress.py"
    noise = b"\xef\x00\xff no newline"
    (where / "noise").write_bytes(noise)
    script = where / "call_arguments.sh"
    for content, status, out, words in (
        (f"#!/bin/sh\ncat {where}/noise\n", 0, noise, ""),
        ("#!/bin/sh\nkill -TERM $$\n", 128 + signal.SIGTERM, b"", ""),
        ("#!/no/such/interpreter\n", 126, b"", "/no/such/interpreter"),
    ):
        script.write_text(content)
        done = running.host("rerun", "Server", "-4/compress.py")
        assert (done.returncode, done.stdout) == (status, out)
        assert words in done.stderr.decode() and (words or not done.stderr)


def test_output_comes_as_it_is_made_and_ctrl_c_stops_watching_alone(
    running: World, begun: Callable[..., subprocess.Popen[bytes]]
) -> None:
    go = running.path / "go"
    script = running.launch / "-4" / "compress.py" / "call_arguments.sh"
    script.write_text(f"#!/bin/sh\necho begun\nuntil [ -e {go} ]; do sleep 0.05; done\necho done; exit 7\n")
    watching = begun(running, "rerun", "Server", "-4/compress.py")
    assert watching.stdout is not None and watching.stdout.readline() == b"begun\n"
    assert "attempt 2 is still running" in refused(running, "rerun", "Server", "-4/compress.py")
    watching.send_signal(signal.SIGINT)
    _, errors = watching.communicate(timeout=30)
    assert watching.returncode == 130
    assert b"stopped watching; -4/compress.py on Server goes on" in errors
    follower = begun(running, "logs", "--follow", "Server", "-4/compress.py")
    assert follower.stdout is not None and follower.stdout.readline() == b"begun\n"
    go.touch()
    assert follower.communicate(timeout=30) == (b"done\n", b"") and follower.returncode == 0
    assert running.complete("-4/compress.py", 2)["exit_code"] == 7

    go.unlink()
    script.write_text(f"#!/bin/sh\nuntil [ -e {go} ]; do sleep 0.05; done\nexit 7\n")
    done = running.host("rerun", "Server", "-4/compress.py", "--detach")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    (row,) = json.loads(running.host("list", "Server", "--json").stdout)  # at once, though it prints nothing
    assert (row["attempt"], row["state"]) == (3, "running")
    go.touch()
    assert running.complete("-4/compress.py", 3)["exit_code"] == 7


def test_a_reply_lost_with_its_session_runs_nothing_twice(
    world: World, begun: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """The guest did it, and nobody heard: it is asked again, with the same id, in the next session."""
    world.stage("-1/once", f"echo ran >> {world.path}/count; echo out; exit 4")
    relay = Relay(world.sockets / "relay", world.port)
    try:
        world.start_collector()
        until(world.port.exists, "the collector listens")
        world.start_daemon("--port", f"unix:{world.sockets / 'relay'}")
        world.complete("-1/once")
        relay.swallowing.set()
        rerun = begun(world, "rerun", "Server", "-1/once")
        until(lambda: world.row("-1/once").get("attempt") == 2, "the request is heard")
        until(lambda: world.state("-1/once") == "exited", "and carried out")
        assert rerun.poll() is None
        relay.cut()
        assert rerun.communicate(timeout=30) == (b"out\n", b"") and rerun.returncode == 4
        assert world.complete("-1/once", 2)["exit_code"] == 4
        assert (world.path / "count").read_text() == "ran\nran\n"
        assert world.status()["-1/once"]["attempt"] == 2
    finally:
        relay.close()


def test_a_kill_whose_reply_is_lost_kills_once(
    world: World, begun: Callable[..., subprocess.Popen[bytes]]
) -> None:
    count = world.path / "count"
    world.stage("-1/counts", f"trap 'echo hit >> {count}' USR1\nwhile :; do sleep 0.05; done 2>/dev/null")
    relay = Relay(world.sockets / "relay", world.port)
    try:
        world.start_collector()
        until(world.port.exists, "the collector listens")
        world.start_daemon("--port", f"unix:{world.sockets / 'relay'}")
        until(lambda: world.result("-1/counts"), "it runs")
        time.sleep(0.2)  # until the trap is set
        relay.swallowing.set()
        kill = begun(world, "kill", "Server", "-1/counts", "--signal", "USR1")
        until(count.exists, "the request is carried out")
        assert kill.poll() is None
        relay.cut()
        out, _ = kill.communicate(timeout=30)
        assert out == b"SIGUSR1 sent to attempt 1 of -1/counts on Server\n"
        assert count.read_text() == "hit\n"
        assert world.host("kill", "Server", "-1/counts", "--signal", "KILL").returncode == 0
    finally:
        relay.close()


def test_a_vm_that_goes_while_it_is_watched_is_said_and_waited_for(
    running: World, begun: Callable[..., subprocess.Popen[bytes]]
) -> None:
    go = running.path / "go"
    script = running.launch / "-4" / "compress.py" / "call_arguments.sh"
    script.write_text(f"#!/bin/sh\necho begun\nuntil [ -e {go} ]; do sleep 0.05; done\necho done; exit 5\n")
    watching = begun(running, "rerun", "Server", "-4/compress.py")
    assert watching.stdout is not None and watching.stderr is not None
    assert watching.stdout.readline() == b"begun\n"
    running.kill9(running.daemon)
    assert b"Server is offline: the other end closed the socket; waiting" in watching.stderr.readline()
    assert "Server is offline" in refused(running, "rerun", "Server", "-4/compress.py")
    row = rows(running, "mix")["Server"]
    assert (row["state"], row["reason"]) == ("offline", "the other end closed the socket")
    assert b"Server is offline" in running.host("list", "Server").stdout
    go.touch()
    running.start_daemon()
    out, errors = watching.communicate(timeout=30)
    assert (watching.returncode, out) == (5, b"done\n"), errors


def test_a_lost_run_exits_1_with_a_sentence(
    running: World, begun: Callable[..., subprocess.Popen[bytes]]
) -> None:
    script = running.launch / "-4" / "compress.py" / "call_arguments.sh"
    script.write_text("#!/bin/sh\necho begun\nexec sleep 60\n")
    watching = begun(running, "rerun", "Server", "-4/compress.py")
    assert watching.stdout is not None and watching.stdout.readline() == b"begun\n"
    pid = running.status()["-4/compress.py"]["pid"]
    shim = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(shim, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    _, errors = watching.communicate(timeout=30)
    assert (watching.returncode, errors) == (1, b"vmr-host: lost: its shim was killed\n")
    # Closed without being complete, it is over for a follower too.
    assert running.host("logs", "Server", "-4/compress.py", "--follow").stdout == b"begun\n"


# --- kill, hold, resume, start -------------------------------------------------------------------------------


def test_kill_says_what_it_hit_and_hold_and_start_say_where(running: World) -> None:
    running.stage("-1/slow", "exec sleep 60")
    until(lambda: (running.result("-1/slow") or {}).get("state") == "running", "it runs")
    done = running.host("kill", "Server", "-1/slow", "--signal", "int")
    said = done.stdout.decode()
    assert said.startswith("SIGINT sent to attempt 1 of -1/slow on Server: ") and "sleep (" in said
    assert running.complete("-1/slow")["signal"] == "SIGINT"
    assert refused(running, "kill", "Server", "-1/slow").endswith("cannot kill -1/slow: it isn't running")
    assert "did you mean -1/slow?" in refused(running, "kill", "Server", "-1/slo")

    assert running.host("hold", "Server").stdout == b"held on Server\n"
    assert (running.launch / ".hold").exists()
    running.stage("-1/later", "true")
    until(lambda: b"held" in running.host("list", "Server").stdout, "the host knows why it waits")
    done = running.host("resume")
    assert done.returncode == 1 and done.stdout == b"resumed on 1 VM\n"
    assert done.stderr == b"vmr-host: cannot resume Client: it is offline: nobody has connected\n"
    assert not (running.launch / ".hold").exists()

    running.stage("0.1/timed", "true")
    assert running.host("start", "Server").stdout == b"time zero is now on Server\n"
    assert running.complete("0.1/timed")["exit_code"] == 0
    again = refused(running, "start", "Server")
    assert (
        "its time zero is set already" in again
        and "VMs launched anew, or reset, and then another collector" in again
    )
    done = running.host("start", "--in", "3")
    assert done.stdout.splitlines()[0] == b"time zero is in 3 s on 1 VM"
    assert b"Client is offline" in done.stdout and done.returncode == 0
    again = refused(running, "start")
    assert "is set already" in again and "VMs launched anew, or reset, and then another collector" in again


# --- mix and list --------------------------------------------------------------------------------------------


def test_mix_and_list_tell_how_every_vmr_stands(running: World) -> None:
    running.stage("-3/good", "true")
    running.stage("-2/killed", "kill -9 $$")
    crlf = running.stage("-2/crlf", "true", commit=False)
    (crlf / "call_arguments.sh").write_bytes(b"#!/bin/sh\r\ntrue\r\n")
    (crlf / "call_arguments.sh").chmod(0o777)
    running.stage("-1/holds", "sleep 60 & echo left")
    running.stage("5/later", "true")
    running.stage("6/half", "true", commit=False)
    until(lambda: (running.result("-1/holds") or {}).get("state") == "exited", "all have run")

    def counted() -> bool:
        mix = rows(running, "mix")["Server"]
        expected = {
            "staged": 1,
            "waiting": 1,
            "exited_zero": 2,
            "exited_nonzero": 1,
            "killed": 1,
            "failed_to_start": 1,
        }
        return mix["vmrs"] == {**dict.fromkeys(mix["vmrs"], 0), **expected}

    until(counted, "the counts")
    mix = rows(running, "mix")
    assert list(mix) == ["Server", "Client"]
    assert mix["Client"]["state"] == "offline" and mix["Client"]["reason"] == "nobody has connected"
    assert (mix["Server"]["time_zero"], mix["Server"]["standstill"]) == (None, "")
    table = running.host("mix").stdout.decode().splitlines()
    assert table[0].split("  ")[0] == "VM" and "1 could not start" in table[1]
    assert table[3].startswith("2 VMs: ") and "1 offline" in table[3] and "time zero" not in table[3]

    listed = rows(running, "list", "Server")
    assert list(listed) == [
        "-4/compress.py",
        "-3/good",
        "-2/crlf",
        "-2/killed",
        "-1/holds",
        "5/later",
        "6/half",
    ]
    assert {frozenset(row) for row in listed.values()} == {frozenset(listed["-3/good"])}, "one shape"
    shown = {key: row["state"] for key, row in listed.items()}
    assert shown["5/later"] == "waiting" and shown["6/half"] == "staged" and shown["-2/killed"] == "killed"
    assert listed["5/later"]["attempt"] == 0 and listed["-4/compress.py"]["exit_code"] == 3
    assert (listed["-1/holds"]["closed"], listed["-1/holds"]["stdout_bytes"]) == (False, 5)
    text = running.host("list", "Server").stdout.decode()
    assert "its pipes are still open" in text and "SIGKILL" in text and "CR" in text
    done = running.host("kill", "Server", "-1/holds", "--signal", "KILL")
    assert b"sleep (" in done.stdout
    running.complete("-1/holds")


def test_mix_says_what_is_held_and_when_the_experiment_starts(running: World) -> None:
    running.stage("5/later", "true")
    running.host("hold")
    until(lambda: rows(running, "mix")["Server"]["standstill"] == "held", "the host hears of it")
    assert b"held" in running.host("mix").stdout.splitlines()[1]
    running.host("start", "--in", "1000")
    zeros = {row["time_zero"] for row in rows(running, "mix").values()}
    (zero,) = zeros
    in_a_while = datetime.datetime.strptime(zero, "%Y-%m-%dT%H:%M:%S.%f%z").timestamp() - time.time()
    assert 900 < in_a_while <= 1000
    said = f"; time zero {zero[:10]} {zero[11:19]} UTC"
    assert said.encode() in running.host("mix").stdout.splitlines()[-1]
    running.host("resume")
    until(lambda: rows(running, "mix")["Server"]["standstill"] == "", "it hears of that too")


def test_logs_of_what_could_not_start_say_why_on_a_terminal(running: World) -> None:
    script = running.stage("-3/none", "true", commit=False) / "call_arguments.sh"
    script.write_bytes(b"#!/no/such/interpreter\n")
    script.chmod(0o777)
    running.complete("-3/none")
    terminal = Terminal(running, "logs", "Server", "-3/none")
    terminal.shows(b"vmr-host: the interpreter of", b"is missing: /no/such/interpreter")
    assert terminal.process.wait(30) == 0
    with GuestTerminal(running, "logs", "-3/none") as in_guest:
        in_guest.shows("is missing: /no/such/interpreter")
    for done in (running.host("logs", "Server", "-3/none"), running.agent("logs", "-3/none")):
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b""), "they are the VMR's"


def test_without_a_collector_what_it_wrote_still_speaks(running: World) -> None:
    running.stop(running.collector)
    assert "it isn't running (vmr-host collect starts it)" in refused(
        running, "rerun", "Server", "-4/compress.py"
    )
    assert "did you mean Server?" in running.host("list", "server").stderr.decode().splitlines()[-1]
    elsewhere = ["--control", str(running.sockets / "none")]
    assert "--log-dir DIR does without" in refused(running, "mix", *elsewhere)
    for more in ([], [*elsewhere, "--log-dir", str(running.logs)]):
        done = running.host("mix", *more)
        assert done.returncode == 0 and b"Server  unknown" in done.stdout
        assert (b"it isn't running; this is from" in done.stderr) is (more == [])
        assert rows(running, "mix", *more)["Server"]["vmrs"]["exited_nonzero"] == 1
        assert rows(running, "list", "Server", *more)["-4/compress.py"]["exit_code"] == 3
        done = running.host("logs", "Server", "-4/compress.py", *more)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"out\n", b"err\n")


class Terminal:
    """A verb on a terminal of 24 lines."""

    def __init__(self, world: World, *arguments: str, path: Optional[Path] = None) -> None:
        self._main, side = pty.openpty()
        environment = {**world.environment, "TERM": "xterm", "COLUMNS": "100", "LINES": "24"}
        if path is not None:
            environment["PYTHONPATH"] = f"{path}:{environment['PYTHONPATH']}"
        self.process = subprocess.Popen(
            [*HOST, *arguments], env=environment, stdin=side, stdout=side, stderr=side
        )
        os.close(side)
        self.seen = b""

    def shows(self, *words: bytes) -> None:
        deadline = time.monotonic() + 30
        while not all(word in self.seen for word in words):
            assert time.monotonic() < deadline, self.seen
            if select.select([self._main], [], [], 0.1)[0]:
                self.seen += os.read(self._main, 65536)

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        with suppress(OSError):
            while os.read(self._main, 65536):
                pass
        assert self.process.wait(30) == 130
        os.close(self._main)


@pytest.mark.parametrize("rich", [True, False])
def test_mix_is_kept_fresh_on_a_terminal_with_rich_and_without(
    running: World, tmp_path: Path, rich: bool
) -> None:
    if rich:
        pytest.importorskip("rich")
    else:
        (tmp_path / "rich.py").write_text("raise ImportError\n")
    terminal = Terminal(running, "mix", "--watch", path=None if rich else tmp_path)
    terminal.shows(b"Server", b"Client", b"offline", b"2 VMs: ")
    terminal.seen = b""
    running.stop(running.daemon)
    terminal.shows(b"2 VMs: 2 offline")
    terminal.close()


def test_mix_watched_from_a_pipe_prints_what_changed(
    running: World, begun: Callable[..., subprocess.Popen[bytes]]
) -> None:
    watching = begun(running, "mix", "--watch", "--json")
    assert watching.stdout is not None
    first = json.loads(watching.stdout.readline())
    assert first[0]["online"] is True
    running.stop(running.daemon)
    second = json.loads(watching.stdout.readline())
    while second[0]["online"]:
        second = json.loads(watching.stdout.readline())
    assert second[0]["state"] == "offline"


# --- names, and what is wrong with them ----------------------------------------------------------------------


def test_names_as_typed_and_of_any_bytes(running: World) -> None:
    running.stage(ODD, "echo odd")
    running.stage(b"-1/--help", "echo dashes")
    shown = "-1/odd \\n\\xff name"
    until(lambda: rows(running, "list", "Server").get(shown, {}).get("closed"), "it ran")
    for verb in (["logs", "Server"], ["rerun", "Server"], ["kill", "Server"]):
        assert f"are typed $'{shown}'" in refused(running, *verb, shown)
    for done in (running.agent("logs", shown), running.agent("rerun", shown)):
        assert f"are typed $'{shown}'" in done.stderr.decode()
    typed = subprocess.run(
        ["bash", "-c", f"{' '.join(HOST)} logs Server $'{shown}'"],
        env=running.environment,
        capture_output=True,
    )
    assert typed.stdout == b"odd\n"
    for arguments, status, out in (
        ([b"rerun", b"Server", ODD], 0, b"odd\n"),
        ([b"logs", b"--attempt", b"2", b"Server", ODD, b"--stream", b"stdout"], 0, b"odd\n"),
        (["rerun", "Server", "-1/--help"], 0, b"dashes\n"),
        (["rerun", "Server", "-4/compress.py/"], 3, b"out\n"),
        (["rerun", "--control", str(running.control), "Server", "-4/compress.py"], 3, b"out\n"),
        (["rerun", "Server", "-4/compress.py", "--control", str(running.control)], 3, b"out\n"),
    ):
        done = running.host(*arguments)
        assert (done.returncode, done.stdout) == (status, out), (arguments, done)
    assert shown in running.host("list", "Server").stdout.decode()


def test_errors_are_one_line_and_say_what_to_do(running: World) -> None:
    running.stage("5/later", "true")
    until(lambda: "5/later" in rows(running, "list", "Server"), "it is seen")
    for arguments, words in (
        (["rerun", "server", "-4/compress.py"], ["cannot find a VM server", "did you mean Server?"]),
        (["list", "Zzz"], ["cannot find a VM Zzz", "the VMs are Server, Client"]),
        (
            ["rerun", "Server", "-4/compres.py"],
            ["cannot find a VMR -4/compres.py", "did you mean -4/compress.py?"],
        ),
        (["rerun", "Server", "5/later"], ["its turn hasn't come"]),
        (["rerun", "Client", "-4/compress.py"], ["Client is offline: nobody has connected"]),
        (["kill", "Client", "-4/compress.py"], ["Client is offline"]),
        (["hold", "Client"], ["cannot hold Client: it is offline"]),
        (["rerun", "-4/compress.py", "Server"], ["the VM comes first"]),
        (["rerun", "Server", "/var/launch/-4/compress.py"], ["did you mean -4/compress.py?"]),
        (["logs", "Server", "compress.py"], ["a name is <start time>/<name>"]),
        (
            ["logs", "Server", "-4/compres"],
            ["cannot find a VMR -4/compres on Server", "did you mean -4/compress.py?"],
        ),
        (["logs", "Server", "5/later"], ["it has not run on Server yet"]),
        (["logs", "Server", "-4/compress.py", "--attempt", "9"], ["cannot find attempt 9", "there is 1"]),
        (["mix", "--log-dir", "/no/such"], ["cannot read /no/such"]),
    ):
        line = refused(running, *arguments)
        assert all(word in line for word in words), line
    for arguments in (["kill", "Server", "-4/x", "--signal", "NONE"], ["rerun", "Server"], ["frobnicate"]):
        done = running.host(*arguments)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done


def test_what_one_may_not_read_or_ask_is_said(running: World) -> None:
    from tests.e2e import unprivileged

    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    done = unprivileged.verb("host", ["rerun", "Server", "-4/compress.py"], running.environment)
    assert done.returncode == 1 and b"permission denied (try as root)" in done.stderr, done
    done = unprivileged.verb("host", ["list", "Server", "--log-dir", str(running.logs)], running.environment)
    assert done.returncode == 1 and b"permission denied" in done.stderr.lower(), done


def test_whether_a_run_has_begun_is_waited_for_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = LoggedRun(tmp_path, "Server", b"-1/late", 1)
    monkeypatch.setattr(collected, "_BEGINS", 0.2)
    assert not collected.begins(run)
    monkeypatch.setattr(collected, "_BEGINS", 30.0)

    def begin() -> None:
        run.path.mkdir(parents=True)
        (run.path / "row").write_text('{"state": "running"}')
        (run.path / "row").rename(run.path / "result.json")

    beginning = threading.Timer(0.3, begin)
    beginning.start()
    assert collected.begins(run) and run.row() == {"state": "running"}
    beginning.join()
    (run.path / "result.json").write_text("torn")
    assert not collected.begins(run)
