"""Another user of the VM: he stages nothing, reruns nothing, reads no output. And what scripts get from the daemon."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import unprivileged
from tests.e2e.unprivileged import NOBODY, needs_root
from tests.e2e.world import World, until


@pytest.fixture
def open_world() -> Iterator[World]:
    """A world to which every user finds the way, so that only its own modes keep him out."""
    path = Path(tempfile.mkdtemp(prefix="vmr-"))
    path.chmod(0o755)
    world = World(path)
    world.sockets.chmod(0o755)
    yield world
    world.close()
    shutil.rmtree(path)


def exited(world: World, vmr: str) -> dict[str, Any]:
    until(lambda: world.row(vmr).get("state") == "exited", f"{vmr} has run\n{world.tail()}")
    return world.row(vmr)


CONNECT = """
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
sock.sendall(b'{"verb": "rerun", "vmr": "-1/a"}\\n')
print(sock.recv(1000))
"""


@needs_root
def test_another_user_reaches_neither_the_daemon_nor_what_was_printed(open_world: World) -> None:
    world = open_world
    world.stage("-1/a", "echo secret")
    world.start_collector()
    world.start_daemon()
    world.complete("-1/a")
    control, kick = world.runtime / "control", world.runtime / "kick"
    assert b"PermissionError" in unprivileged.run(CONNECT, str(control)).stderr
    world.runtime.chmod(0o711)  # as when an administrator opens it: the sockets have modes of their own
    assert b"PermissionError" in unprivileged.run(CONNECT, str(control)).stderr
    poke = "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'x' * 16, sys.argv[1])"
    assert b"PermissionError" in unprivileged.run(poke, str(kick)).stderr
    control.chmod(0o666)  # and who asks is looked at besides
    done = unprivileged.run(CONNECT, str(control))
    assert done.stdout in (b"", b"b''\n") and world.row("-1/a")["attempt"] == 1
    control.chmod(0o600)
    for path in (world.spool, world.spool / "runs" / "-1" / "a" / "1" / "stdout"):
        look = "print(os.listdir(sys.argv[1]) if os.path.isdir(sys.argv[1]) else open(sys.argv[1]).read())"
        done = unprivileged.run(look, str(path))
        assert b"PermissionError" in done.stderr and b"secret" not in done.stdout
    for arguments, words in (
        (["status"], b"permission denied"),
        (["rerun", "-1/a"], b"permission denied"),
        (["logs", "-1/a"], b"permission denied"),
        (["reset"], b"cannot"),
    ):
        done = unprivileged.verb("agent", arguments, {**world.environment, "VMR_AGENT_CONFIG": ""})
        assert done.returncode == 1 and words in done.stderr.lower(), done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
    make = "os.makedirs(sys.argv[1])"
    assert b"PermissionError" in unprivileged.run(make, str(world.launch / "-1" / "mine")).stderr
    assert b"PermissionError" in unprivileged.run(make, str(world.launch / "-9" / "mine")).stderr
    assert world.row("-1/a")["attempt"] == 1


@needs_root
def test_what_others_could_change_is_refused_with_the_reason_and_holds_nothing_up(open_world: World) -> None:
    world = open_world
    theirs = world.stage("-9/theirs", "echo must not run")
    os.chown(theirs, NOBODY, NOBODY)
    os.chown(world.stage("-8/script-theirs", "echo must not run") / "call_arguments.sh", NOBODY, NOBODY)
    world.stage("-7/open", "echo must not run").chmod(0o777)
    elsewhere = world.path / "elsewhere"
    shutil.copytree(world.stage("-6/linked", "echo must not run"), elsewhere)
    shutil.rmtree(world.launch / "-6" / "linked")
    (world.launch / "-6" / "linked").symlink_to(elsewhere)
    script = world.stage("-5/script-linked", "true") / "call_arguments.sh"
    script.unlink()
    script.symlink_to(elsewhere / "call_arguments.sh")
    world.stage("-4/time-theirs", "echo must not run")
    os.chown(world.launch / "-4", NOBODY, NOBODY)
    fifo = world.stage("-3/fifo", "true") / "call_arguments.sh"
    fifo.unlink()
    os.mkfifo(fifo, 0o755)
    (world.launch / "-2").symlink_to(world.launch / "-6")
    world.stage("-1/fine", "echo fine")
    world.start_collector()
    world.start_daemon()
    exited(world, "-1/fine")
    until(lambda: world.ask("status")["configured"], "configured")
    table = world.agent("status").stdout.decode()
    for vmr, reason in (
        ("-9/theirs", "its directory belongs to user 65534"),
        ("-8/script-theirs", "call_arguments.sh belongs to user 65534"),
        ("-7/open", "its directory can be written to by others (mode 0777)"),
        ("-6/linked", "its directory is a link"),
        ("-5/script-linked", "call_arguments.sh is a link"),
        ("-4/time-theirs", "-4 belongs to user 65534"),
        ("-3/fifo", "call_arguments.sh is not a regular file"),
    ):
        row = world.row(vmr)
        assert (row["state"], row["error"], row["attempt"]) == ("refused", reason, 0), row
        assert world.daemon_log().count(f"refused {vmr}: {reason}") == 1
        assert reason in table
        done = world.agent("rerun", vmr)
        assert done.returncode == 1 and f"cannot rerun {vmr}: {reason}" in done.stderr.decode()
    assert f"cannot use {world.launch}/-2: it is a link" in world.daemon_log()
    assert "must not run" not in world.log()
    # Mended, each is one that comes late.
    os.chown(theirs, 0, 0)
    (world.launch / "-7" / "open").chmod(0o755)
    os.chown(world.launch / "-4", 0, 0)
    for vmr in ("-9/theirs", "-7/open", "-4/time-theirs"):
        assert exited(world, vmr)["attempt"] == 1


@needs_root
def test_a_launch_directory_on_a_way_that_others_own_is_refused(open_world: World) -> None:
    world = open_world
    way = world.path / "way"
    way.mkdir()
    os.chown(way, NOBODY, NOBODY)
    world.launch = way / "launch"
    world.launch.mkdir()
    world.stage("-1/a", "true")
    world.start_daemon()
    until(lambda: f"{way} belongs to user {NOBODY}" in world.daemon_log(), "a line in the log")
    assert f"{way} belongs to user {NOBODY}" in world.agent("status").stdout.decode()
    os.chown(way, 0, 0)
    exited(world, "-1/a")


def test_a_script_gets_a_logins_surroundings_whatever_the_daemon_has(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = world.stage("-1/a", "true") / "call_arguments.sh"
    script.write_text("""\
#!/bin/sh
ls -l /proc/$$/fd
pwd; env
grep -E '^(SigIgn|SigBlk|Umask):' /proc/self/status
echo "files $(ulimit -n)"
cut -d' ' -f6 /proc/$$/stat; echo $$
""")
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "LISTEN_FDS", "INVOCATION_ID", "LD_LIBRARY_PATH", "FOO"):
        monkeypatch.setenv(name, "/nowhere")
    world.start_daemon(
        before=["sh", "-c", 'trap "" HUP PIPE USR1; umask 077; exec 7</dev/null; cd /tmp; exec "$@"', "sh"]
    )
    exited(world, "-1/a")
    said = world.agent("logs", "-1/a").stdout.decode().splitlines()
    fds = dict(line.split()[-3::2] for line in said if " -> " in line)
    script_fd = {fd for fd, target in fds.items() if target == str(script)}  # the shell's own
    assert fds.keys() - script_fd == {"0", "1", "2"} and fds["0"] == "/dev/null", fds
    assert fds["1"].startswith("pipe:") and fds["2"].startswith("pipe:") and fds["1"] != fds["2"]
    names = {line.partition("=")[0] for line in said if "=" in line}
    assert names - {"PWD", "OLDPWD"} == {
        *("HOME", "LANG", "PATH", "VMR_ATTEMPT", "VMR_NAME", "VMR_START_TIME")
    }
    assert {"VMR_NAME=-1/a", "VMR_START_TIME=-1", "VMR_ATTEMPT=1", "/"} <= set(said)
    assert {"SigIgn:\t" + 16 * "0", "SigBlk:\t" + 16 * "0", "Umask:\t0022"} <= set(said)
    assert int(next(line for line in said if line.startswith("files ")).split()[1]) <= 1024
    assert said[-1] == said[-2], "it leads a session of its own"


RACE = """
launch, mine, until = sys.argv[1], sys.argv[2], time.time() + float(sys.argv[3])
libc = ctypes.CDLL(None, use_errno=True)
tries = done = 0
vmr = launch + '/-1/a'
while time.time() < until:
    for act in (
        lambda: os.rename(vmr, vmr + '.aside'),
        lambda: os.rename(mine, launch + '/-1/b'),
        lambda: os.symlink(mine, launch + '/-1/c'),
        lambda: os.replace(mine + '/call_arguments.sh', vmr + '/call_arguments.sh'),
        lambda: os.link(mine + '/call_arguments.sh', vmr + '/other'),
        lambda: os.rename(launch + '/-1', launch + '/-2'),
        lambda: os.rename(launch, launch + '.aside'),
        lambda: os.symlink(mine, launch + '.new'),
        lambda: os.rmdir(launch + '/-1'),
        lambda: open(vmr + '/call_arguments.sh', 'r+'),
        lambda: os.chmod(vmr, 0o777),
        lambda: os.mkdir(launch + '/-7'),
        lambda: libc.renameat2(-100, vmr.encode(), -100, mine.encode(), 2) and exec('raise OSError'),
    ):
        tries += 1
        try:
            act()
        except OSError:
            continue
        done += 1
print(tries, done)
"""


@needs_root
@pytest.mark.parametrize("sticky", [False, True], ids=["own", "in a sticky directory"])
def test_nobody_else_can_put_his_script_where_one_is_about_to_run(open_world: World, sticky: bool) -> None:
    """Between the look at a directory and the exec of its script nothing on the way can be swapped but by root."""
    world = open_world
    if sticky:
        way = world.path / "way"
        way.mkdir()
        way.chmod(0o1777)
        world.launch = way / "launch"
        world.launch.mkdir()
    mine = Path(tempfile.mkdtemp(prefix="vmr-"))
    (mine / "call_arguments.sh").write_text("#!/bin/sh\necho must not run\n")
    (mine / "call_arguments.sh").chmod(0o755)
    os.chown(mine, NOBODY, NOBODY)
    world.stage("-1/a", "echo fine")
    world.start_daemon()
    exited(world, "-1/a")
    results: list[Any] = []
    arguments = (str(world.launch), str(mine), "4")
    thread = threading.Thread(
        target=lambda: results.append(unprivileged.run(RACE, *arguments, imports="import ctypes, time"))
    )
    thread.start()
    attempts = 1
    while thread.is_alive():
        done = world.agent("rerun", "-1/a")
        attempts += 1
        assert (done.returncode, done.stdout) == (0, b"fine\n"), done.stderr
    thread.join()
    shutil.rmtree(mine)
    tries, succeeded = map(int, results[0].stdout.split())
    # In a sticky directory he may make what is his own; it is no part of the way.
    assert tries > 1_000 and succeeded <= (1 if sticky else 0), results
    assert attempts > 2 and world.row("-1/a")["attempt"] == attempts
    assert "must not run" not in world.daemon_log()
    assert set(world.status()) == {"-1/a"}


HOLD = """
script = open(sys.argv[1], 'r+')
print('open', flush=True)
sys.stdin.readline()
"""


@needs_root
def test_a_script_that_another_user_holds_open_for_writing_does_not_run(open_world: World) -> None:
    """qemu-ga makes files that all may write. Who opened one before it was mended can write into it still."""
    world = open_world
    directory = world.stage("-1/a", "echo fine", commit=False)
    script = directory / "call_arguments.sh"
    with unprivileged.start(HOLD, str(script)) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        assert holder.stdout.readline() == b"open\n"
        world.start_daemon()
        script.chmod(0o777)
        until(lambda: script.stat().st_mode & 0o777 == 0o755, "it is mended")
        until(lambda: world.row("-1/a").get("attempt") == 1, "it is about to run")
        assert world.row("-1/a")["state"] != "exited"
        holder.stdin.write(b"\n")
        holder.stdin.close()
        holder.wait()
    until(lambda: world.row("-1/a").get("state") in ("exited", "failed to start"), "it is over")
    assert world.agent("logs", "-1/a").stdout in (b"fine\n", b"")


@needs_root
def test_what_belongs_to_root_tells_another_user_nothing(open_world: World) -> None:
    """Neither the processes' environment and descriptors, nor their memory; and he can signal none."""
    world = open_world
    world.stage("-1/a", "sleep 60")
    daemon = world.start_daemon()
    until(lambda: world.row("-1/a").get("pid"), "it runs")
    pids = [daemon.pid, int(world.row("-1/a")["pid"])]
    children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
    for pid in [*pids, *map(int, children)]:
        for code in (
            f"print(os.listdir('/proc/{pid}/fd'))",
            f"print(open('/proc/{pid}/environ').read())",
            f"os.kill({pid}, 15)",
            f"open('/proc/{pid}/mem', 'r+b')",
        ):
            done = unprivileged.run(code)
            assert b"PermissionError" in done.stderr and not done.stdout, (pid, code, done)
    assert world.row("-1/a")["state"] == "running"
    world.agent("kill", "-1/a")


def test_a_script_started_by_hand_and_its_background_children_have_three_descriptors(world: World) -> None:
    """As those of the schedule; and nobody in its tree gets the port, the spool or the sockets."""
    world.stage("-1/a", "ls -l /proc/self/fd; (ls -l /proc/self/fd) & wait; sh -c 'ls -l /proc/$$/fd'")
    world.start_collector()
    world.start_daemon()
    exited(world, "-1/a")
    for said in (world.agent("logs", "-1/a").stdout, world.agent("rerun", "-1/a").stdout):
        targets = [line.rpartition(" -> ")[2] for line in said.decode().splitlines() if " -> " in line]
        own = [
            target
            for target in targets
            if target.startswith("/proc/") or target.endswith("call_arguments.sh")
        ]
        assert len(targets) >= 9 and {target.split(":")[0] for target in targets if target not in own} <= {
            "/dev/null",
            "pipe",
        }, targets
        assert str(world.spool).encode() not in said and b"socket" not in said
