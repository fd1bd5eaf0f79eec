"""Every verb in a real VM, spelled as people spell it: the guest's typed at the serial console, the host's over the
real port.

One VM for all, and the tests go by its story: each begins where the one before ended. What a verb does in each odd
case is held by the e2e tests; here it is seen to work where it will be used.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from tests.vm.console import CTRL_C, Console
from tests.vm.host import LAUNCH, VmWorld
from tests.vm.vm import Vm

COMPRESS = """\
#!/usr/bin/python3
import tarfile

with tarfile.open("/tmp/out.tgz", "w:gz") as tar:
    tar.add("/etc/hostname", arcname=os.path.basename("/etc/hostname"))
"""
FIX = f"sed -i 's/^import tarfile/import os, tarfile/' {LAUNCH}/-4/compress.py/compress.py"
# Attempt 1 is the schedule's and holds a barrier; later ones go on until they are told.
TICKS = 'echo tick 1; [ "$VMR_ATTEMPT" = 1 ] || until [ -e /root/enough ]; do sleep 0.2; done; echo last tick'
TREE = "setsid sleep 4321 & echo up; echo oops >&2; sleep 1234; exit 3"
BOTH = "echo to stdout; echo to stderr >&2; exit 7"


@pytest.fixture(scope="module")
def world(new_vm: Callable[..., Vm], tmp_path_factory: pytest.TempPathFactory) -> Iterator[VmWorld]:
    """One VM and a host, their VMRs staged, the daemon not yet started."""
    began = time.monotonic()
    with new_vm() as vm:
        world = VmWorld(tmp_path_factory.mktemp("verbs"), vm, {"quiet": "1"})
        world.guest_stage("-4/compress.py", "./compress.py", {"compress.py": COMPRESS})
        world.guest_stage("-3/both", BOTH)
        world.guest_stage("-1/ticks", TICKS)
        world.guest_stage("1/tree", TREE)
        world.start_collector()
        yield world
        world.close()
    print(f"all of it: {time.monotonic() - began:.0f} s")


@pytest.fixture(scope="module")
def login(world: VmWorld) -> Iterator[Console]:
    with Console(world.vm) as console:
        yield console


@pytest.fixture
def console(login: Console) -> Console:
    """At a prompt, in /root, whatever the test before has left behind."""
    login.fresh()
    return login


def test_without_the_daemon_status_and_check_say_what_to_do(console: Console) -> None:
    code, text = console.type("vmr-agent status")
    assert (code, text.count("\n")) == (1, 1), text
    assert text.startswith("vmr-agent: cannot ") and "systemctl start vmr-agent" in text
    code, text = console.type("vmr-agent check")
    assert code == 1 and "systemctl" in text and "ok     port" in text, text


def test_logs_of_what_failed(world: VmWorld, console: Console) -> None:
    assert console.type("systemctl enable -q --now vmr-agent")[0] == 0
    assert world.complete("-4/compress.py")["exit_code"] == 1
    world.complete("-1/ticks")
    code, whole = console.type("vmr-agent logs -4/compress.py")
    assert code == 0 and whole.endswith("NameError: name 'os' is not defined\n")
    assert console.type("cd /var/launch/-4; vmr-agent logs ./compress.py --stream stderr") == (0, whole)
    assert console.type("cd /var/launch/-4/compress.py; vmr-agent logs --stream stdout") == (0, "")
    code, text = console.type("vmr-agent logs -3/both --attempt 1 --timestamps")
    assert code == 0
    lines = sorted(line.split(" ", 2)[1:] for line in text.splitlines())
    assert lines == [["stderr", "to stderr"], ["stdout", "to stdout"]]


def test_edited_run_again_and_compared(world: VmWorld, console: Console) -> None:
    assert console.type("vmr-agent diff -4/compress.py")[1].startswith("vmr-agent: nothing differs")
    assert console.type(FIX) == (0, "")
    code, text = console.type("vmr-agent rerun -4/compress.py")
    assert code == 0 and "attempt 2 of -4/compress.py" in text
    assert "vmr-host pull -4/compress.py/compress.py" in text
    code, text = console.type("vmr-agent diff -4/compress.py")
    assert "-import tarfile" in text and "+import os, tarfile" in text
    code, table = console.type("vmr-agent status")
    assert code == 0 and all(len(line) <= 80 for line in table.splitlines()[:6]), table
    compress = next(line for line in table.splitlines() if line.startswith("-4/compress.py")).split()
    assert compress[:4] == ["-4/compress.py", "2", "exited", "0"] and compress[-2:] == ["yes", "yes"]
    code, text = console.type("vmr-agent status --json")
    rows = {row["vmr"]: row for row in json.loads(text)}
    assert [*rows] == ["-4/compress.py", "-3/both", "-1/ticks", "1/tree"]
    assert rows["-3/both"]["exit_code"] == 7 and rows["-4/compress.py"]["changed"] is True
    assert rows["1/tree"]["attempt"] == 0 and rows["1/tree"]["waiting"]
    assert console.type("vmr-agent rerun -3/both 2>/dev/null; echo $?") == (0, "to stdout\n7\n")
    assert world.complete("-4/compress.py", 2)["exit_code"] == 0


def test_run_again_on_each_save(world: VmWorld, console: Console) -> None:
    console.begin("vmr-agent rerun -4/compress.py --watch")
    console.shows("waiting for a save")
    world.vm.check(f"echo 'print(\"saved\")' >> {LAUNCH}/-4/compress.py/compress.py")
    console.shows("compress.py changed")
    console.shows("saved\n")
    console.shows("waiting for a save", times=2)
    console.key(CTRL_C)
    code, text = console.end()
    assert code == 130 and "stopped watching -4/compress.py" in text


def test_started_shown_and_killed_with_its_setsid_child(world: VmWorld, console: Console) -> None:
    assert console.type("vmr-agent start")[0] == 0
    world.wait(lambda: world.raw("1/tree") == b"up\n", "the positive time runs after start")
    code, text = console.type("vmr-agent ps 1/tree")
    assert code == 0 and "sleep 4321" in text and "sleep 1234" in text and "holds" in text
    code, text = console.type("vmr-agent kill 1/tree")
    assert (
        code == 0 and text.startswith("SIGTERM sent to attempt 1 of 1/tree: ") and text.count("sleep (") == 2
    )
    assert world.complete("1/tree")["signal"] == "SIGTERM"
    assert world.vm.run("pgrep -x sleep") == (1, b"")


def test_followed_until_it_ends(world: VmWorld, console: Console) -> None:
    assert console.type("vmr-agent rerun --detach -1/ticks")[0] == 0
    console.begin("vmr-agent logs -1/ticks --follow")
    console.shows("tick 1\n")
    world.vm.check("touch /root/enough")
    assert console.end() == (0, "tick 1\nlast tick\n")


def test_held_and_resumed(world: VmWorld, console: Console) -> None:
    assert console.type("vmr-agent hold") == (0, "")
    world.guest_stage("2/late", "echo late")
    world.wait(lambda: "held" in (world.guest_row("2/late").get("waiting") or ""), "it is held")
    assert console.type("vmr-agent resume") == (0, "")
    assert world.complete("2/late")["exit_code"] == 0


def test_check_finds_nothing_wrong(console: Console) -> None:
    code, text = console.type("vmr-agent check")
    assert code == 0 and all(line.startswith("ok ") for line in text.splitlines()), text


@pytest.mark.long
@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("vmr-agent logs -4/compress", 1, "did you mean -4/compress.py"),
        ("vmr-agent rerun -4/compres.py", 1, "did you mean -4/compress.py"),
        ("vmr-agent rerun compress.py", 1, "a name is <start time>/<name>"),
        ("vmr-agent rerun", 1, "cannot tell which VMR is meant"),
        ("vmr-agent logs -4/compress.py --attempt 99", 1, "cannot find attempt 99"),
        ("vmr-agent kill -4/compress.py", 1, "cannot kill"),
        ("vmr-agent kill -4/compress.py --signal NONSENSE", 2, "there is no signal"),
        ("vmr-agent ps -4/compress.py", 1, "cannot show processes"),
        ("vmr-agent diff -4/compress.py --attempt 1 99", 1, "cannot find attempt 99"),
        ("vmr-agent reset", 1, "cannot reset"),
        ("vmr-agent frobnicate", 2, "cannot understand"),
    ],
)
def test_bad_input_is_one_line(console: Console, line: str, code: int, words: str) -> None:
    status, text = console.type(line)
    assert (status, text.count("\n")) == (code, 1) and text.startswith("vmr-agent"), text
    assert words in text


# --- from the host -------------------------------------------------------------------------------------------


def _host(world: VmWorld, *arguments: str, code: int = 0) -> str:
    done = world.host(*arguments)
    assert done.returncode == code, (done.stdout, done.stderr)
    if code:
        assert done.stderr.startswith(b"vmr-host: cannot ") and done.stderr.count(b"\n") == 1, done.stderr
        return str(done.stderr.decode())
    return str(done.stdout.decode())


def test_the_host_looks(world: VmWorld) -> None:
    assert "Server  configured" in _host(world, "mix")
    (vm,) = json.loads(_host(world, "mix", "--json"))
    assert (vm["vm"], vm["state"], vm["online"]) == ("Server", "configured", True)
    assert "-4/compress.py" in _host(world, "list", "Server")
    rows = {row["vmr"]: row for row in json.loads(_host(world, "list", "Server", "--json"))}
    assert rows["1/tree"]["signal"] == "SIGTERM" and rows["-3/both"]["exit_code"] == 7
    assert "NameError" in _host(
        world, "logs", "Server", "-4/compress.py", "--attempt", "1", "--stream", "stderr"
    )


def test_the_host_runs_again_and_kills(world: VmWorld) -> None:
    done = world.host("rerun", "Server", "-3/both")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"to stdout\n", b"to stderr\n")
    _host(world, "rerun", "--detach", "Server", "1/tree")
    attempt = json.loads(_host(world, "list", "Server", "--json"))[-2]["attempt"]
    assert attempt == 2
    world.wait(lambda: world.raw("1/tree", attempt=2) == b"up\n", "it runs")
    assert "SIGTERM sent to" in _host(world, "kill", "Server", "1/tree")
    assert world.complete("1/tree", 2)["signal"] == "SIGTERM"
    assert "did you mean" in _host(world, "rerun", "Server", "-4/compress", code=1)
    assert "Server" in _host(world, "rerun", "Sever", "-4/compress.py", code=1)


def test_the_host_holds_resumes_and_starts(world: VmWorld) -> None:
    assert _host(world, "hold") == "held on 1 VM\n"
    world.vm.check(f"test -e {LAUNCH}/.hold")
    assert _host(world, "resume", "Server") == "resumed on Server\n"
    world.vm.check(f"test ! -e {LAUNCH}/.hold")
    done = world.host("start")  # its zero is set: `vmr-agent start` was first
    assert done.returncode in (0, 1) and done.stdout + done.stderr


def test_files_come_and_go(world: VmWorld, tmp_path: Path) -> None:
    vm = world.vm
    big = os.urandom(1 << 20)
    vm.check("mkdir -p /root/out/sub; : > /root/out/empty; echo inside > /root/out/sub/file")
    vm.put({"/root/big": big})
    there = tmp_path / "there"
    there.mkdir()
    _host(world, "pull", "/root/big", "Server", str(there))
    assert (there / "big").read_bytes() == big
    _host(world, "pull", "/root/out/empty", "Server", str(there / "nothing"))
    assert (there / "nothing").read_bytes() == b""
    _host(world, "pull", "-4/compress.py/compress.py", "Server", str(tmp_path / "compress.py"))
    assert (tmp_path / "compress.py").read_text().startswith("#!/usr/bin/python3\nimport os, tarfile\n")
    assert os.access(tmp_path / "compress.py", os.X_OK)
    _host(world, "pull", "/root/out", "Server", str(there))
    assert sorted(each.name for each in (there / "out").iterdir()) == ["empty", "sub"]
    assert (there / "out/sub/file").read_text() == "inside\n"
    assert "No such file" in _host(world, "pull", "/root/none", "Server", str(there), code=1)

    _host(world, "push", str(there / "big"), "Server", "/root/again")
    _host(world, "push", str(there / "out"), "Server", "/root/tree")
    vm.check("cmp /root/big /root/again && cmp /root/out/sub/file /root/tree/sub/file")


def test_vmrs_are_staged_from_the_host(world: VmWorld, tmp_path: Path) -> None:
    """Both before time zero: the VM is configured already, so they run as they come."""
    script = tmp_path / "tree/-2/from-tree/call_arguments.sh"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/sh\ncat /var/launch/-2/from-tree/data\n")
    script.chmod(0o755)
    (script.parent / "data").write_text("staged\n")
    assert _host(world, "stage", "Server", str(tmp_path / "tree")) == "-2/from-tree is staged on Server\n"
    assert _host(world, "stage", "Server", "--at", "-4", "--name", "said", "echo", "a  word", "--at")
    assert world.complete("-2/from-tree")["exit_code"] == 0
    world.complete("-4/said")
    assert world.raw("-2/from-tree") == b"staged\n" and world.raw("-4/said") == b"a  word --at\n"
    assert "has it already" in _host(world, "stage", "Server", str(tmp_path / "tree"), code=1)


# --- the end: nobody there -----------------------------------------------------------------------------------


def test_the_daemon_is_stopped(world: VmWorld, console: Console) -> None:
    assert console.type("systemctl stop vmr-agent")[0] == 0
    code, text = console.type("vmr-agent rerun -4/compress.py")
    assert (code, text.count("\n")) == (1, 1) and "systemctl start vmr-agent" in text
    code, text = console.type("vmr-agent logs -4/compress.py --attempt 1")
    assert code == 0 and "NameError" in text
    world.wait(lambda: "offline" in _host(world, "mix"), "the host knows")
    assert "offline" in _host(world, "rerun", "Server", "-4/compress.py", code=1)
    assert console.type("systemctl start vmr-agent")[0] == 0
    world.wait(lambda: "configured" in _host(world, "mix"), "it is back")


def test_the_collector_is_down(world: VmWorld) -> None:
    """What lies in the log directory can still be read."""
    world.stop(world.collector)
    done = world.host("mix")
    assert done.returncode == 0 and b"Server" in done.stdout and b"cannot" in done.stderr
    assert b"NameError" in world.host("logs", "Server", "-4/compress.py", "--attempt", "1").stderr
    assert "vmr-host collect" in _host(world, "rerun", "Server", "-4/compress.py", code=1)
    world.start_collector()
    world.wait(lambda: "configured" in world.host("mix").stdout.decode(), "it is back")


@pytest.mark.long
def test_reset_begins_a_new_life(world: VmWorld, console: Console) -> None:
    assert console.type("vmr-agent hold && vmr-agent reset") == (0, "")
    world.wait(lambda: (world.logs / "Server~1").exists(), "a new life on the host")
    rows = world.guest_status()["vmrs"]
    assert rows and {row["attempt"] for row in rows} == {0}


def test_the_vm_stands_still_and_is_gone(world: VmWorld) -> None:
    world.vm.pause()
    world.wait(lambda: "offline" in _host(world, "mix"), "a paused VM is offline")
    assert "offline" in _host(world, "rerun", "Server", "-4/compress.py", code=1)
    world.vm.kill()
    assert "offline" in _host(world, "pull", "/etc/hostname", "Server", str(world.path / "x"), code=1)
    assert not (world.path / "x").exists()
