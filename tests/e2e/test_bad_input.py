"""What people and other programs get wrong: each is said in one line that names the thing, and loses nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, Optional

import pytest

from tests.e2e import unprivileged
from tests.e2e.unprivileged import needs_root
from tests.e2e.world import World, until


def one_line(done: Any, *words: str, status: int = 1) -> str:
    """The one line that a command said, which begins with its name and holds all words."""
    lines = done.stderr.decode().splitlines()
    assert done.returncode == status, done
    assert len(lines) == 1 and lines[0].startswith("vmr-"), lines
    assert all(word in lines[0] for word in words), lines[0]
    return str(lines[0])


def exited(world: World, vmr: str) -> dict[str, Any]:
    until(lambda: world.row(vmr).get("state") == "exited", f"{vmr} has run\n{world.tail()}")
    return world.row(vmr)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory with a short name, to which every user can come."""
    with tempfile.TemporaryDirectory(prefix="vmr-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., None]]:
    mounted: list[Path] = []

    def do(path: Path, options: str) -> None:
        path.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.decode().strip()}")
        mounted.append(path)

    yield do
    for path in mounted:
        subprocess.run(["umount", "-l", path], check=True)


# --- the configuration -----------------------------------------------------------------------------------------


def test_a_config_that_is_wrong_is_one_line_that_names_file_and_option(world: World) -> None:
    for content, words in (
        ("[vmr-agent]\nquite = 3\n", ["unknown option 'quite'", "quiet", "settle"]),
        ("[agent]\nquiet = 3\n", ["unknown section [agent]", "[vmr-agent]"]),
        ("quiet = 3\n", ["cannot read", "section"]),
        ("[vmr-agent]\nquiet\n", ["cannot read"]),
        ("[vmr-agent]\nquiet = 3\nquiet = 4\n", ["cannot read", "already exists"]),
        ("[vmr-agent]\nquiet = nan\n", ["quiet", "'nan'", "0 to 86400"]),
        ("[vmr-agent]\nsettle = soon\n", ["settle", "'soon'", "number of seconds"]),
        ("[vmr-agent]\nmax_reboots = many\n", ["max_reboots", "whole number"]),
        ("[vmr-agent]\nspool_limit = lots\n", ["spool_limit", "512M"]),
        ("[vmr-agent]\nschedule = maybe\n", ["schedule", "on or off"]),
        ("[vmr-agent]\nlaunch_dir = launch\n", ["launch_dir", "absolute"]),
        ("[vmr-agent]\nport =\n", ["port", "unix:PATH"]),
        # Empty must not mean the default: that is `systemctl reboot`.
        ("[vmr-agent]\nreboot_command =\n", ["reboot_command", "must be a command"]),
        ("[vmr-agent]\nreboot_command = 'reboot\n", ["reboot_command", "quotation"]),
        ("[vmr-agent]\nlaunch_dir = /a\0b\n", ["launch_dir", "NUL"]),
    ):
        world.config.write_text(content)
        line = one_line(world.agent("status"), *words)
        assert str(world.config) in line
    world.config.write_bytes(b"[vmr-agent]\nport = \xff\n")
    one_line(world.agent("status"), "cannot read", str(world.config))
    one_line(world.agent("status", "--config", "/no/such/file"), "/no/such/file", "no such file")
    one_line(world.agent("status", "--config", "/"), "cannot read /", "directory")


@needs_root
def test_a_config_one_may_not_read_is_said_with_its_name(make_world: Any, short_path: Path) -> None:
    config = short_path / "agent.conf"
    config.write_text("[vmr-agent]\n")
    config.chmod(0o600)
    done = unprivileged.verb("agent", ["status", "--config", str(config)], os.environ)
    one_line(done, f"cannot read {config}", "permission denied", "root")


# --- the launch directory ---------------------------------------------------------------------------------------


def test_a_missing_launch_directory_is_made(world: World) -> None:
    world.launch.rmdir()
    world.start_daemon()
    until(world.launch.is_dir, "it is made")
    world.stage("-1/a", "echo here")
    exited(world, "-1/a")


def test_a_file_in_the_place_of_the_launch_directory_is_said_until_it_is_gone(world: World) -> None:
    world.launch.rmdir()
    world.launch.write_text("")
    world.start_daemon()
    complaint = f"cannot use {world.launch}: it is not a directory"
    until(lambda: complaint in world.daemon_log(), "a line in the log")
    assert complaint in world.agent("status").stdout.decode()
    world.launch.unlink()
    world.launch.mkdir()
    world.stage("-1/a", "true")
    exited(world, "-1/a")
    assert f"{world.launch} can be used again" in world.daemon_log()
    assert world.ask("status")["problem"] is None


def test_a_launch_directory_others_may_write_to_is_used_once_it_is_mended(world: World) -> None:
    world.stage("-1/a", "true")
    world.launch.chmod(0o777)
    world.start_daemon()
    why = f"cannot use {world.launch}: it can be written to by others (mode 0777)"
    until(lambda: why in world.daemon_log(), "a line in the log")
    assert why in world.agent("status").stdout.decode()
    one_line(world.agent("rerun", "-1/a"), why)
    world.launch.chmod(0o755)
    assert exited(world, "-1/a")["attempt"] == 1
    world.launch.chmod(0o777)
    world.stage("-1/b", "true")
    until(lambda: world.ask("status")["problem"], "it is seen")
    one_line(world.agent("rerun", "-1/a"), why)
    world.launch.chmod(0o755)
    assert exited(world, "-1/b")["attempt"] == 1


def test_what_is_no_start_time_is_named_once_and_stops_nothing(world: World) -> None:
    names = ["abc", "0", "1e999", "nan", "-0", "04", "+4", "1_0"]
    for name in names:
        world.stage(f"{name}/vmr", "echo must not run >&2")
    (world.launch / "README").write_text("")
    (world.launch / "-1").mkdir()
    (world.launch / "-1" / "file").write_text("")
    world.stage("-1/a", "true")
    world.start_daemon()
    exited(world, "-1/a")
    for name in names:
        assert world.daemon_log().count(f"cannot use {world.launch}/{name}: it is no start time") == 1
    assert f"{world.launch}/README" in world.daemon_log()
    assert f"{world.launch}/-1/file: it is not a directory" in world.daemon_log()
    assert [row["vmr"] for row in world.ask("status")["vmrs"]] == ["-1/a"]


def test_a_name_of_255_bytes_runs_reruns_and_reaches_the_host(world: World) -> None:
    vmr = "-1/" + "n" * 255
    world.stage(vmr, "echo long; exit 4")
    world.start_collector()
    world.start_daemon()
    exited(world, vmr)
    done = world.agent("rerun", vmr)
    assert (done.returncode, done.stdout) == (4, b"long\n")
    assert world.agent("logs", vmr).stdout == b"long\n"

    def whole() -> list[Path]:
        return list((world.logs / "Server" / "-1").glob("n*/2/result.json"))

    until(whole, "the second attempt on the host")
    row = json.loads(whole()[0].read_bytes())
    assert row["vmr"] == vmr
    assert vmr in world.agent("status").stdout.decode()


# --- scripts that can't be executed -------------------------------------------------------------------------------


def test_scripts_that_cannot_be_executed_say_why_and_hold_nothing_up(world: World) -> None:
    world.stage("-9/no-x", "true", commit=False)
    contents = {
        "-5/no-shebang": b"echo by sh\n",
        "-4/crlf": b"#!/bin/sh\r\ntrue\r\n",
        "-3/no-interpreter": b"#!/no/such/interpreter\n",
        "-2/empty": b"",
        "-1/interpreter-is-a-directory": b"#!/etc\n",
    }
    for vmr, content in contents.items():
        (world.stage(vmr, "true") / "call_arguments.sh").write_bytes(content)
    world.start_daemon()
    until(lambda: world.row("-1/interpreter-is-a-directory").get("state") == "failed to start", "the last")
    assert world.agent("logs", "-5/no-shebang").stdout == b"by sh\n"
    assert exited(world, "-2/empty")["exit_code"] == 0
    for vmr, words in (
        ("-4/crlf", ["CR LF"]),
        ("-3/no-interpreter", ["missing", "/no/such/interpreter"]),
        ("-1/interpreter-is-a-directory", ["interpreter", "/etc"]),
    ):
        row = world.row(vmr)
        assert row["state"] == "failed to start" and all(word in row["error"] for word in words), row
    # Without x bit it isn't complete, however long that takes; a rerun says what is missing.
    assert world.row("-9/no-x")["state"] == "staged"
    one_line(world.agent("rerun", "-9/no-x"), "cannot rerun -9/no-x", "x bit")
    until(lambda: world.ask("status")["configured"], "it doesn't keep the VM from being configured")
    (world.launch / "-9" / "no-x" / "call_arguments.sh").chmod(0o755)
    exited(world, "-9/no-x")


@needs_root
def test_a_noexec_mount_is_named_as_the_reason(world: World, mount: Callable[..., None]) -> None:
    mount(world.launch, "size=1m,mode=755,noexec")
    world.stage("-1/a", "true")
    world.start_daemon()
    until(lambda: world.row("-1/a").get("state") == "failed to start", "it can't be started")
    assert "noexec" in world.row("-1/a")["error"]


# --- the state directory ------------------------------------------------------------------------------------------


@needs_root
def test_a_state_directory_that_cannot_be_used_is_one_line(world: World, short_path: Path) -> None:
    closed, theirs, file = short_path / "closed", short_path / "theirs", short_path / "file"
    closed.mkdir(mode=0o755)
    theirs.mkdir()
    os.chown(theirs, unprivileged.NOBODY, unprivileged.NOBODY)
    file.write_text("")
    runtime = short_path / "run"
    runtime.mkdir()
    os.chown(runtime, unprivileged.NOBODY, unprivileged.NOBODY)
    options = ["--state-dir", str(closed / "state"), "--runtime-dir", str(runtime)]
    environment = {**world.environment, "VMR_AGENT_CONFIG": ""}
    done = unprivileged.verb("agent", ["run", *options], environment)
    one_line(done, f"cannot use {closed}/state", "Permission denied", "--state-dir")
    done = unprivileged.verb("agent", ["run", "--state-dir", str(closed), *options[2:]], environment)
    one_line(done, f"cannot use {closed}", "--state-dir")
    one_line(world.agent("run", "--state-dir", str(theirs)), str(theirs), "belongs to user", "--state-dir")
    one_line(world.agent("run", "--state-dir", str(file)), str(file), "Not a directory", "--state-dir")
    one_line(world.agent("run", "--runtime-dir", str(runtime)), "belongs to user", "--runtime-dir")
    # Somebody who means /var/lib/vmr-agent and says /var/lib must not find it closed to everybody.
    one_line(world.agent("run", "--state-dir", str(short_path)), str(short_path), "other files")
    assert short_path.stat().st_mode & 0o777 == 0o755


@needs_root
def test_a_full_state_directory_stops_nothing_for_good(world: World, mount: Callable[..., None]) -> None:
    mount(world.spool, "size=2m,mode=700")
    world.stage("-3/first", "true")
    daemon = world.start_daemon()
    exited(world, "-3/first")
    until(lambda: world.ask("status")["configured"], "configured")
    ballast = world.spool / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    # What comes and goes meanwhile can't be recorded, and must not be forgotten either.
    world.stage("-2/second", "echo second")
    subprocess.run(["rm", "-r", world.launch / "-3"], check=True)
    until(lambda: "No space left on device; trying again" in world.daemon_log(), "a line in the log")
    before = cpu_seconds(daemon.pid)
    time.sleep(1.5)
    assert cpu_seconds(daemon.pid) - before < 0.75, "it doesn't spin"
    assert world.daemon_log().count("trying again") <= 3, "nor fill the log"
    assert world.row("-2/second")["state"] in ("waiting", "blocked")
    assert world.row("-3/first")["state"] == "exited"
    ballast.unlink()
    assert exited(world, "-2/second")["attempt"] == 1
    until(lambda: world.row("-3/first").get("staged") is False, "it was seen gone")
    world.stage("-3/first", "true")
    until(lambda: world.row("-3/first").get("attempt") == 2, "a new one runs")
    assert world.agent("logs", "-2/second").stdout == b"second\n"
    assert "Traceback" not in world.daemon_log()


@needs_root
def test_a_disk_full_before_the_vm_is_configured_only_delays_it(
    make_world: Callable[..., World], mount: Callable[..., None]
) -> None:
    world = make_world(settings={"start": "auto", "quiet": "1.5"})
    mount(world.spool, "size=2m,mode=700")
    world.stage("-1/a", "true")
    world.stage("0.1/b", "echo positive")
    daemon = world.start_daemon()
    exited(world, "-1/a")
    ballast = world.spool / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    until(lambda: "trying again" in world.daemon_log(), "a line in the log")
    before = cpu_seconds(daemon.pid)
    time.sleep(1.2)
    assert cpu_seconds(daemon.pid) - before < 0.6, "it doesn't spin"
    assert world.ask("status")["configured"] is False
    ballast.unlink()
    exited(world, "0.1/b")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- many ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.long)])
def test_thousands_of_vmrs_run_exactly_once_and_status_answers(
    make_world: Callable[..., World], count: int
) -> None:
    """Half at one negative time, half at one positive; listing all of them takes more than one socket buffer."""
    world = make_world(settings={"start": "auto"})
    vmrs = [f"{'-1' if number % 2 else '1'}/vmr{number}" for number in range(count)]
    (world.launch / ".hold").touch()
    for vmr in vmrs:
        directory = world.launch / vmr
        directory.mkdir(parents=True)
        script = directory / "call_arguments.sh"
        script.write_text('#!/bin/sh\necho x >> "${0%/*}/count"\n')
        script.chmod(0o755)
    daemon = world.start_daemon()
    until(lambda: len(_status_rows(world)) == count, "all are listed", limit=300)
    assert len(json.loads(world.agent("status", "--json").stdout)) == count
    assert len(world.agent("status").stdout.splitlines()) > count
    (world.launch / ".hold").unlink()
    slowest = 0.0

    def all_ran() -> bool:
        nonlocal slowest
        asked = time.monotonic()
        rows = _status_rows(world)
        slowest = max(slowest, time.monotonic() - asked)
        return len(rows) == count and all(row["state"] == "exited" for row in rows)

    until(all_ran, "all have run", limit=900)
    assert slowest < 15, f"status took {slowest:.1f} s"
    rows = _status_rows(world)
    assert {row["vmr"] for row in rows} == set(vmrs)
    assert all(row["attempt"] == 1 and row["exit_code"] == 0 for row in rows)
    counts = [(world.launch / vmr / "count").read_text() for vmr in vmrs]
    assert counts == ["x\n"] * count
    first_positive = min(row["started"] for row in rows if row["vmr"].startswith("1/"))
    assert max(row["ended"] for row in rows if row["vmr"].startswith("-1/")) <= first_positive
    assert len(os.listdir(f"/proc/{daemon.pid}/fd")) < 200
    done = world.agent("rerun", "1/vmr0")
    assert done.returncode == 0
    one_line(world.agent("rerun", "1/vmr00"), "cannot find a VMR 1/vmr00", "did you mean")


def _status_rows(world: World) -> list[dict[str, Any]]:
    try:
        return list(world.ask("status")["vmrs"])
    except Exception:
        assert world.daemon is not None and world.daemon.poll() is None, world.tail()
        return []


# --- the port, the host -----------------------------------------------------------------------------------------


def test_a_port_that_is_no_port_is_said_once_and_vmrs_run(make_world: Callable[..., World]) -> None:
    for kind, words in (("device", "character device"), ("unix", "")):
        world = make_world()
        world.port.write_text("")
        world.stage("-1/a", "true")
        world.start_daemon("--port", f"unix:{world.port}" if kind == "unix" else str(world.port))
        exited(world, "-1/a")
        time.sleep(0.5)
        lines = [line for line in world.daemon_log().splitlines() if line.startswith("port ")]
        assert len(lines) == 1 and str(world.port) in lines[0] and words in lines[0]
        status = world.agent("status").stdout.decode()
        assert str(world.port) in status and "missing" in status and words in status


def test_whoever_speaks_something_else_is_named_at_both_ends_and_harms_nothing(world: World) -> None:
    """The guest agent's port is right beside ours in /dev and in QEMU's directory: mixing them up is easy."""
    stop = threading.Event()

    def talk(sock: socket.socket) -> None:
        with sock:
            while not stop.wait(0.2):
                try:
                    sock.send(b'{"execute": "guest-sync", "arguments": {"id": 1}}\n')
                except OSError:
                    return

    talkers = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(world.sockets / "qga"))
    listener.listen(1)
    world.stage("-1/a", "echo at last")
    world.start_collector()
    world.start_daemon("--port", f"unix:{world.sockets}/qga")
    talkers.append(threading.Thread(target=talk, args=(listener.accept()[0],)))
    until(world.port.exists, "the collector listens")
    stranger = socket.socket(socket.AF_UNIX)
    stranger.connect(str(world.port))
    talkers.append(threading.Thread(target=talk, args=(stranger,)))
    for talker in talkers:
        talker.start()
    try:
        exited(world, "-1/a")
        until(
            lambda: "Server: " in world.collector_log() and "says no Hello" in world.collector_log(), "host"
        )
        until(lambda: "is no Hello" in world.daemon_log(), "the daemon's log")
        assert world.daemon_log().count("is no Hello") == 1
        assert "is no Hello" in world.agent("status").stdout.decode()
    finally:
        stop.set()
        for talker in talkers:
            talker.join()
        listener.close()
    world.stop(world.daemon)
    world.start_daemon()
    assert world.complete("-1/a")["attempt"] == 1
    assert world.raw("-1/a") == b"at last\n"


@needs_root
def test_a_log_directory_that_cannot_be_written_is_one_line(world: World, short_path: Path) -> None:
    options = ["--control", str(short_path / "none" / "control"), f"VM={short_path}/port"]
    done = unprivileged.verb("host", ["collect", "--log-dir", str(short_path), *options], os.environ)
    one_line(done, "cannot write to", str(short_path), "ermission denied")
    (short_path / "file").write_text("")
    one_line(world.host("collect", "--log-dir", str(short_path / "file"), "VM=/x"), str(short_path / "file"))


def test_vms_whose_names_cannot_be_are_refused_with_the_name(world: World) -> None:
    for names, words in (
        (["A", "A"], ["two VMs named A"]),
        ([".x"], [".x"]),
        (["a.log"], ["a.log"]),
        (["a.json"], ["a.json"]),
        (["a/b", "a/b"], ["two VMs"]),
        ([""], ["VM=SOCKET"]),
    ):
        done = world.host("collect", "--log-dir", str(world.logs), *(f"{name}=/no/socket" for name in names))
        one_line(done, "cannot", *words)
    one_line(world.host("collect", "--log-dir", str(world.logs), "Server"), "'Server'", "VM=SOCKET")
    one_line(world.host("collect", "--log-dir", str(world.logs)), "no VM", "VM=SOCKET")


def test_a_start_that_could_never_come_is_refused(world: World) -> None:
    sources = [f"A={world.sockets}/a", f"B={world.sockets}/b"]
    for options, words in (
        (["--expect", "0"], ["cannot wait for 0 VMs", "--expect takes 1 to 2 here"]),
        (["--expect=-1"], ["--expect takes 1 to 2 here"]),
        (["--expect", "3"], ["--expect takes 1 to 2 here"]),
        (
            ["--start-buffer=-1"],
            ["cannot start the experiment after -1 s", "--start-buffer takes 0 to 1000000000"],
        ),
        (["--start-buffer", "nan"], ["after nan s"]),
        (["--start-buffer", "inf"], ["after inf s"]),
        (["--start-buffer", "1e10"], ["after 1e+10 s"]),
    ):
        one_line(world.host("collect", "--log-dir", str(world.logs), *options, *sources), *words)
    one_line(world.host("collect", "--log-dir", str(world.logs), "--expect", "2", sources[0]), "takes 1 here")


# --- two at once ------------------------------------------------------------------------------------------------


def test_a_second_daemon_or_collector_is_refused_and_the_first_goes_on(
    world: World, make_world: Callable[..., World]
) -> None:
    world.stage("-1/a", "echo a")
    world.start_collector()
    world.start_daemon()
    world.complete("-1/a")
    other = make_world()
    state, runtime = ["--state-dir", str(world.spool)], ["--runtime-dir", str(world.runtime)]
    one_line(other.agent("run", *state), f"cannot use {world.spool}", "another vmr-agent has it")
    # It would take the first one's sockets away, which were deaf from then on.
    one_line(other.agent("run", *runtime), f"cannot use {world.runtime}", "another vmr-agent has it")
    one_line(world.agent("run"), "another vmr-agent has it")
    line = one_line(other.host("collect", "--log-dir", str(world.logs), "Server=/x"), str(world.logs))
    assert world.collector is not None and str(world.collector.pid) in line
    one_line(
        other.host("collect", "--log-dir", str(other.logs), "--control", str(world.control), "Server=/x"),
        str(world.control),
        "another collector",
    )
    one_line(
        other.host("collect", "--log-dir", str(other.logs), "--listen", f"Other={world.port}"),
        str(world.port),
    )
    assert world.agent("rerun", "-1/a").stdout == b"a\n"
    world.complete("-1/a", 2)


def test_a_runtime_directory_whose_sockets_have_too_long_a_name_is_one_line(
    world: World, short_path: Path
) -> None:
    """107 bytes; `kick` is shorter than `control`, so there are lengths at which only one of the two fits."""
    for length in (101, 110, 200):
        path = str(short_path).ljust(length, "x")
        for arguments in (["run"], ["status"], ["rerun", "-1/a"]):
            one_line(world.agent(*arguments, "--runtime-dir", path), "cannot", path)


# --- the verbs --------------------------------------------------------------------------------------------------


def test_requests_of_every_shape_are_answered_and_the_daemon_lives(world: World) -> None:
    """The control socket is for `socat` too, so for typing mistakes; root's, but no reason to die."""
    world.stage("-1/a", "true")
    daemon = world.start_daemon()
    exited(world, "-1/a")

    def say(data: bytes, *, close: bool = False) -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(world.runtime / "control"))
            sock.sendall(data)
            if close:
                return b""
            sock.shutdown(socket.SHUT_WR)  # as `echo … | socat` does, and the answer must come all the same
            found = b""
            while piece := sock.recv(65536):
                found += piece
            return found

    for line in (
        b"nonsense",
        b"[]",
        b"{}",
        b'{"verb": 3}',
        b'{"verb": "frobnicate"}',
        b'{"verb": "rerun"}',
        b'{"verb": "rerun", "vmr": 3}',
        b'{"verb": "rerun", "vmr": "\\ud800"}',
        b'{"verb": "rerun", "vmr": "-1/a", "request": "zz"}',
        b'{"verb": "rerun", "vmr": "-1/\\u0000"}',
        b'{"verb": "kill", "vmr": "-1/a", "signal": 1e999}',
        b'{"verb": "kill", "vmr": "-1/a", "signal": "TERM"}',
        b'{"verb": "kill", "vmr": "-1/a", "signal": 0}',
        b'{"verb": "kill", "vmr": "-1/a", "signal": 1000000}',
        b'{"verb": "\\ud800"}',
        b'{"verb": "status", "verb": null}',
        b"\xff\xfe\x00",
        b"[" * 50_000,
    ):
        answers = say(line + b"\n").splitlines()
        assert len(answers) == 1, (line, answers)
        answer = json.loads(answers[0])
        assert answer["ok"] is False and answer["error"].startswith("cannot "), (line, answer)
    assert json.loads(say(b'{"verb": "status"}\n'))["vmrs"][0]["vmr"] == "-1/a"
    assert len(say(b'{"verb": "status"}\n' * 50).splitlines()) == 50
    say(b'{"verb": "status"}\n' * 50, close=True)
    say(b"x" * 200_000, close=True)
    say(b"", close=True)
    assert daemon.poll() is None and "Traceback" not in world.daemon_log()
    assert world.agent("rerun", "-1/a").returncode == 0


def test_a_shell_that_is_stopped_sees_it_all_when_it_goes_on(world: World) -> None:
    """Ctrl-Z on a rerun. The daemon's hints that there is output wait in a socket nobody reads."""
    script = "for i in $(seq 3000); do echo line $i; done; sleep 1; exit 7"
    world.stage("-1/a", script)
    world.start_daemon()
    exited(world, "-1/a")
    with (world.path / "out").open("wb") as out:
        asking = subprocess.Popen(
            [sys.executable, "-m", "vmr_agent.cli.start", "rerun", "-1/a"],
            env=world.environment,
            stdout=out,
            stderr=subprocess.PIPE,
        )
        until(lambda: world.row("-1/a").get("attempt") == 2, "the rerun")
        asking.send_signal(signal.SIGSTOP)
        exited(world, "-1/a")
        asking.send_signal(signal.SIGCONT)
        _, errors = asking.communicate(timeout=30)
    assert (asking.returncode, errors) == (7, b"")
    assert (world.path / "out").read_bytes() == b"".join(b"line %d\n" % n for n in range(1, 3001))


def test_more_clients_than_there_is_room_for_are_told_in_one_line(world: World) -> None:
    world.start_daemon()
    until((world.runtime / "control").exists, "it listens")
    idle = [socket.socket(socket.AF_UNIX) for _ in range(64)]
    try:
        for sock in idle:
            sock.connect(str(world.runtime / "control"))
        one_line(world.agent("status"), "went away before it answered")
    finally:
        for sock in idle:
            sock.close()
    until(lambda: world.agent("status").returncode == 0, "room again")


def test_verbs_with_nowhere_to_write_or_to_stand_say_so_in_one_line(world: World) -> None:
    world.stage("-1/a", "echo a; echo b")
    world.start_daemon()
    exited(world, "-1/a")
    program = f"{sys.executable} -m vmr_agent.cli.start"

    def shell(command: str, cwd: Optional[Path] = None) -> Any:
        return subprocess.run(command, shell=True, env=world.environment, cwd=cwd, capture_output=True)

    for verb in ("logs -1/a", "status", "status --json"):
        done = shell(f"{program} {verb} > /dev/full")
        one_line(done, "No space left on device")
        done = shell(f"{program} {verb} >&-")
        assert b"Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 1
    removed = world.path / "removed"
    removed.mkdir()
    done = shell(f"rmdir {removed}; {program} rerun", cwd=removed)
    one_line(done, "cannot tell where you are", "removed")
    assert shell(f"mkdir {removed}; cd {removed}; rmdir {removed}; {program} rerun -1/a").returncode == 0
    done = shell(f"cd {world.launch}; {program} rerun")
    one_line(done, "cannot tell which VMR is meant", "stand in its directory")
    plain = {**world.environment, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    world.stage("-1/größe", "true")
    until(lambda: world.row("-1/größe").get("state") == "exited", "it ran")
    done = subprocess.run([*program.split(), "status"], env=plain, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"") and b"gr\\xf6\\xdfe" in done.stdout


def test_what_a_vmr_prints_never_gets_into_a_socket(world: World) -> None:
    """Where standard output is closed the next descriptor would have its number: that of the control socket."""
    world.stage("-1/evil", """echo '{"verb": "hold"}'; echo err >&2; exit 3""")
    world.start_daemon()
    world.start_collector()
    world.complete("-1/evil")
    for program in ("vmr_agent.cli.start rerun", "vmr_agent.cli.host rerun Server"):
        for closed, status in ((">&-", 1), ("2>&-", 3), (">&- 2>&-", 1), ("<&- >&- 2>&-", 1)):
            command = f"{sys.executable} -m {program} -1/evil {closed}"
            done = subprocess.run(command, shell=True, env=world.environment, capture_output=True, timeout=60)
            assert done.returncode == status, (command, done)
            assert done.stdout == (b"" if status == 1 else b'{"verb": "hold"}\n')
            if closed == ">&-":
                one_line(done, "cannot write to standard output: Bad file descriptor")
    assert not (world.launch / ".hold").exists(), "a guest's output has become a request"
    done = subprocess.run(
        f"{sys.executable} -c 'import vmr_agent.cli.start as s, vmr_agent.errors as e\n"
        "def act():\n print(1)\n raise e.Problem(str(2))\nraise SystemExit(s.run(str(0), act))' >&-",
        shell=True,
        env=world.environment,
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (1, b"0: 2\n"), (
        "what can't be written at the end is no second error"
    )
    for verb in ("check", "diff -1/evil", "status"):
        for closed in (">&-", "2>&-", "<&- >&- 2>&-"):
            command = f"{sys.executable} -m vmr_agent.cli.start {verb} {closed}"
            done = subprocess.run(command, shell=True, env=world.environment, capture_output=True, timeout=60)
            assert b"Traceback" not in done.stderr, done


def test_a_daemon_without_streams_is_told_of_output_all_the_same(world: World) -> None:
    """Its fork server's socket for kicks would have the number of one, which each shim makes another thing of."""
    world.stage("-1/prints", "for i in {1..20}; do echo $i; sleep 0.05; done")
    command = [sys.executable, "-m", "vmr_agent.cli.start", "run"]
    closed = 'exec "$@" <&- >&- 2>&-'
    world.daemon = subprocess.Popen(["/bin/sh", "-c", closed, "sh", *command], env=world.environment)
    until(lambda: world.row("-1/prints").get("state") == "exited", "it ran")
    server = next(
        int(pid)
        for pid in os.listdir("/proc")
        if pid.isdecimal()
        and b"forkserver.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        and f"\nPPid:\t{world.daemon.pid}\n" in Path(f"/proc/{pid}/status").read_text()
    )
    assert os.readlink(f"/proc/{server}/fd/2") == "/dev/null"


def test_nothing_is_not_everything(world: World) -> None:
    world.start_collector()
    for verb in (["push", "", "Server", "/x"], ["pull", "", "Server", "x"], ["logs", "Server", ""]):
        one_line(world.host(*verb), "must not be empty", status=2)


def test_something_else_behind_the_control_socket_is_one_line(world: World) -> None:
    world.runtime.mkdir()
    path = world.runtime / "control"
    answers: Sequence[bytes] = (b"SSH-2.0\n", b"[]\n", b"\xff\n", b"")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        for answer in answers:
            asking = subprocess.Popen(
                [sys.executable, "-m", "vmr_agent.cli.start", "status"],
                env=world.environment,
                stderr=subprocess.PIPE,
            )
            sock, _ = listener.accept()
            with sock:
                sock.recv(4096)
                sock.sendall(answer)
            _, errors = asking.communicate(timeout=30)
            assert asking.returncode == 1 and len(errors.splitlines()) == 1, errors
            assert errors.startswith(b"vmr-agent: cannot ")
    path.unlink()
    path.write_text("")
    one_line(world.agent("status"), str(path))
