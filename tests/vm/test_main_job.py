"""The main job in a real VM: systemd, the real port, the guest agent that stages, a collector on QEMU's socket.

Each wait is bounded, and generous: emulated CPUs are slow. What is printed are measurements, never judged.
"""

from __future__ import annotations

import base64
import os
import re
import signal
import time
from typing import Any, Callable

from tests.vm.host import COUNTER, LAUNCH, LINE, VmWorld, counted
from tests.vm.vm import AGENT_PORT, Vm

# --- the tutorial's story ------------------------------------------------------------------------------------

COMPRESS = """\
#!/usr/bin/python3
import tarfile

with tarfile.open("/tmp/out.tgz", "w:gz") as tar:
    tar.add("/opt/file.txt", arcname=os.path.basename("/opt/file.txt"))
"""
SERVE = """\
#!/usr/bin/python3 -u
import http.server, threading, urllib.request

server = http.server.HTTPServer(("127.0.0.1", 8080), http.server.SimpleHTTPRequestHandler)
print("serving on 8080")
threading.Thread(target=server.serve_forever, daemon=True).start()
print(urllib.request.urlopen("http://127.0.0.1:8080/index.html").read().decode())
threading.Event().wait()
"""


def _execute(vm: Vm, path: str, *arguments: str) -> None:
    pid = vm.qga("guest-exec", path=path, arg=list(arguments))["pid"]
    while not (status := vm.qga("guest-exec-status", pid=pid))["exited"]:
        pass
    assert status["exitcode"] == 0


def _firewheel_stages(vm: Vm, vmr: str, command: str, files: dict[str, bytes]) -> None:
    """By the guest agent's own commands, in FIREWHEEL's order: data, what is executable, the script, its x bit."""

    def write(path: str, content: bytes) -> None:
        handle = vm.qga("guest-file-open", path=path, mode="w")
        while content:
            piece: dict[str, Any] = {"buf-b64": base64.b64encode(content[: 1 << 20]).decode()}
            content = content[vm.qga("guest-file-write", handle=handle, **piece)["count"] :]
        vm.qga("guest-file-close", handle=handle)

    where = f"{LAUNCH}/{vmr}"
    _execute(vm, "/bin/mkdir", "-p", where)
    for name, content in files.items():
        write(f"{where}/{name}", content)
        if content.startswith(b"#!"):
            _execute(vm, "/bin/chmod", "+x", f"{where}/{name}")
    script = f'#!/bin/bash\nCURRENT_DIR="$(dirname "$0")"\ncd {where}\n{command}'
    write(f"{where}/call_arguments.sh", script.encode())
    _execute(vm, "/bin/chmod", "+x", f"{where}/call_arguments.sh")


def test_the_tutorials_story(world: VmWorld) -> None:
    """compress.py fails, is repaired where it lies and run again; the host gets the exact bytes, at last."""
    vm = world.vm
    noise = b"\xef\x00\xff" + os.urandom(300_000)
    vm.check("rm /etc/vmr-agent.conf")  # as shipped
    start = time.monotonic()
    _firewheel_stages(vm, "-5/drop_file", "cp file.txt /opt/file.txt", {"file.txt": noise})
    _firewheel_stages(vm, "-4/compress.py", "./compress.py", {"compress.py": COMPRESS.encode()})
    _firewheel_stages(vm, "-3/tar", "tar -C /tmp -xvzf /tmp/out.tgz", {})
    _firewheel_stages(vm, "-2/head", "head -c 1000000 /tmp/file.txt", {})
    page = {"index.html": b"<p>served</p>", "serve.py": SERVE.encode()}
    _firewheel_stages(vm, "1/serve.py", "./serve.py", page)
    print(f"staged by the guest agent: {time.monotonic() - start:.1f} s")
    assert vm.check(f"stat -c %a {LAUNCH}/*/*/call_arguments.sh").split() == [b"777"] * 5
    world.start_collector("--expect", "1", "--start-buffer", "0")
    vm.check("systemctl start vmr-agent")

    assert world.complete("-5/drop_file")["exit_code"] == 0
    assert world.complete("-4/compress.py")["exit_code"] == 1
    assert world.complete("-2/head")["exit_code"] == 1
    world.wait(lambda: world.log().count("exited after") >= 4, "four exits in Server.log")
    log = world.log()
    assert "WARNING] compress.py (" in log and "with code: 1" in log
    # As Python shows bytes: with both quotes in them, or, where they came in two pieces, with one.
    assert re.search(r"NameError: name \\?'os\\?' is not defined", log)
    world.wait(lambda: b"served" in world.raw("1/serve.py"), "the page, after time zero")

    vm.check(f"sed -i 's/^import tarfile/import os, tarfile/' {LAUNCH}/-4/compress.py/compress.py")
    assert vm.run("cd / && vmr-agent rerun -4/compress.py") == (0, b"")
    assert vm.run(f"cd {LAUNCH}/-3 && vmr-agent rerun ./tar") == (0, b"file.txt\n")
    assert vm.run("vmr-agent rerun -2/head 2>/dev/null") == (0, noise)

    second = world.complete("-2/head", 2)
    assert (second["state"], second["exit_code"], second["trigger"]) == ("exited", 0, "rerun")
    assert world.raw("-2/head", attempt=2) == noise
    assert world.complete("-4/compress.py", 2)["exit_code"] == 0
    world.wait(lambda: world.log().count("exited after") == 7, "seven exits in Server.log")
    assert "\\xef\\x00\\xff" in world.log() and "file.txt" in [row["msg"] for row in world.rows()]
    assert vm.run("vmr-agent rerun -2/nothing")[0] == 1
    vm.check("vmr-agent kill 1/serve.py")
    assert world.complete("1/serve.py")["signal"] == "SIGTERM"


# --- whatever dies in mid-output -----------------------------------------------------------------------------


def _start_counter(world: VmWorld) -> int:
    """A run that prints until it is told that it is enough; the script's pid."""
    world.guest_stage("-1/counter", "exec ./counter.py", {"counter.py": COUNTER})
    world.vm.check("systemctl start vmr-agent")
    world.wait(lambda: world.raw("-1/counter"), "some output on the host")
    row = world.result("-1/counter")
    assert row is not None
    return int(row["pid"])


def _check_counter(world: VmWorld, pid: int) -> None:
    """The run that was begun is the one that ended, and each byte and each line is there once."""

    def rows_of_it() -> list[dict[str, Any]]:
        return [row for row in world.rows() if row["vmr"] == "-1/counter"]

    world.vm.check("touch /root/enough")
    row = world.complete("-1/counter")
    assert (row["exit_code"], row["attempt"], row["pid"], row["gaps"]) == (0, 1, pid, [])
    size = row["stdout_bytes"]
    print(f"2 x {size:,} bytes in {row['duration_s']:.1f} s")
    expected = {"stdout": counted(1, size), "stderr": counted(2, size)}
    for stream, content in expected.items():
        assert world.raw("-1/counter", stream) == content
    assert row["stderr_bytes"] == size and size % LINE == 0 and size >= 20_000 * LINE
    world.wait(lambda: f"counter ({pid}) exited" in world.log(), "the exit in Server.log")
    world.wait(lambda: len(rows_of_it()) >= 2 * size // LINE, "every line in Server.json")
    assert world.logged("-1/counter") == expected
    rows = rows_of_it()
    for stream, content in expected.items():
        assert [row["msg"] for row in rows if row["stream"] == stream] == content.decode().splitlines()
    assert world.log().count("CALL ARGS: /var/launch/-1/counter/") == 1
    assert world.log().count(f"counter ({pid}) exited after") == 1
    assert not (world.logs / "Server~1").exists()


def test_the_host_is_killed_in_mid_output(world: VmWorld) -> None:
    """QEMU drops its whole ring, up to 4 MiB, when its client goes; a host that stood still filled it before."""
    world.start_collector()
    pid = _start_counter(world)
    for still in (0.0, 2.0, 0.0, 2.0):
        world.more("-1/counter")
        assert world.collector is not None
        if still:
            os.kill(world.collector.pid, signal.SIGSTOP)
            time.sleep(still)
        world.kill9(world.collector)
        time.sleep(0.5)
        world.start_collector()
    world.more("-1/counter")
    _check_counter(world, pid)
    assert world.log().count("PID returned") == 1


def test_the_daemon_is_killed_and_restarted_in_mid_output(world: VmWorld) -> None:
    vm = world.vm
    world.start_collector()
    pid = _start_counter(world)
    for end in (
        "kill -9 {}",
        "systemctl restart vmr-agent",
        "systemctl stop vmr-agent; sleep 1",
        "kill -9 {}",
    ):
        world.more("-1/counter")
        daemon = world.daemon_pid()
        vm.check(end.format(daemon))
        if "stop" in end:
            assert world.daemon_pid() == 0
            vm.check(f"test -d /proc/{pid}")
            vm.check("systemctl start vmr-agent")
        world.wait(lambda: world.daemon_pid() not in (0, daemon), "another daemon")
    world.more("-1/counter")
    assert world.guest_row("-1/counter")["pid"] == pid
    _check_counter(world, pid)
    vm.check("systemctl is-active vmr-agent")


# --- the port ------------------------------------------------------------------------------------------------


def test_the_port_comes_late_goes_and_comes_back(vm: Vm, make_world: Callable[[Vm], VmWorld]) -> None:
    """The daemon goes on executing and spooling without it, hardly uses the CPU, and ships when it is there."""
    vm.port_del(AGENT_PORT)
    world = make_world(vm)
    world.guest_stage("-2/early", "echo early")
    vm.check("systemctl start vmr-agent")
    world.wait(lambda: world.guest_row("-2/early").get("state") == "exited", "it runs with no port")
    assert world.guest_status()["port_state"] == "missing"
    print(f"CPU, no port: {100 * world.guest_cpu(8):.2f} %")
    vm.port_add(AGENT_PORT)
    world.start_collector()
    assert world.complete("-2/early")["exit_code"] == 0
    assert world.raw("-2/early") == b"early\n"

    pid = _start_counter(world)
    for _ in range(2):
        world.more("-1/counter")
        vm.port_del(AGENT_PORT)
        world.wait(lambda: world.guest_status().get("port_state") == "missing", "the port is missed")
        vm.port_add(AGENT_PORT)
    world.more("-1/counter")
    _check_counter(world, pid)

    # The rule for udev: a port that is plugged in starts the service where nothing else has.
    vm.check("systemctl stop vmr-agent")
    vm.port_del(AGENT_PORT)
    vm.port_add(AGENT_PORT)
    world.wait(world.daemon_pid, "the service, started by the port")


def test_the_port_is_busy_and_the_host_away(world: VmWorld) -> None:
    vm = world.vm
    vm.check(f"sleep 10000 <> /dev/virtio-ports/{AGENT_PORT} > /dev/null 2>&1 &")
    holder = int(vm.check("pgrep -x sleep"))
    world.guest_stage("-1/a", "echo one")
    vm.check("systemctl start vmr-agent")
    world.wait(lambda: world.guest_row("-1/a").get("state") == "exited", "it runs while the port is busy")
    assert f"sleep ({holder}) has it open" in world.guest_status()["port_reason"]
    assert f"sleep ({holder})".encode() in vm.check("vmr-agent status")
    busy = world.guest_cpu(5)
    vm.check(f"kill {holder}")
    world.wait(lambda: world.guest_status()["port_state"] == "away", "the port is open, the host away")
    away = world.guest_cpu(20)
    print(f"CPU, port busy: {100 * busy:.2f} %; host away: {100 * away:.2f} %")
    assert away < 0.05
    world.start_collector()
    assert world.complete("-1/a")["exit_code"] == 0
    world.stop(world.collector)
    world.wait(lambda: world.guest_status()["port_state"] == "away", "the host is away again")
    world.wait(lambda: world.guest_cpu(4) < 0.05, "hardly any CPU, after a moment")


# --- what a script inherits ----------------------------------------------------------------------------------

_SEEN = """\
#!/bin/bash
ulimit -Sa
ulimit -Ha
umask
nice
chrt -p $$ | sed 's/.*: //'
ionice -p $$
grep -E '^(Uid|Gid|Umask|SigBlk|SigIgn|SigCgt|Cap|NoNewPrivs|Seccomp|Spec|Cpus|Mems|THP)' /proc/self/status
grep . /proc/self/{oom_score_adj,coredump_filter,personality,timerslack_ns}
readlink /proc/self/root /proc/self/ns/*
"""
_OWN = """
exec > /root/own
pwd
readlink /proc/$$/fd/0
[ $(cut -d' ' -f6 /proc/$$/stat) = $$ ] && echo a session of its own
python3 -ISc 'import os
print(*sorted(fd for fd in os.listdir("/proc/self/fd") if os.path.lexists("/proc/self/fd/" + fd)))'
python3 -ISc 'import os; print(*sorted(os.environ), os.environ["PATH"])'
"""


def test_a_script_inherits_what_a_root_login_has(world: VmWorld) -> None:
    """Nothing of the daemon's, or of systemd's services: FIREWHEEL's scripts were written for a login."""
    vm = world.vm
    script = _SEEN + _OWN
    vm.put({"/root/seen": _SEEN.encode(), f"{LAUNCH}/-1/seen/call_arguments.sh": script.encode()})
    vm.check(
        'script -qec "login -f root" /dev/null <<< "/root/seen > /root/login; echo $PATH > /root/path; exit"'
    )
    world.start_collector()
    vm.check("systemctl start vmr-agent")
    assert world.complete("-1/seen")["exit_code"] == 0
    login = vm.check("cat /root/login").decode().splitlines()
    assert len(login) > 60
    assert world.raw("-1/seen").decode().splitlines() == login
    cwd, stdin, session, descriptors, environment = vm.check("cat /root/own").decode().splitlines()
    assert (cwd, stdin, session) == ("/", "/dev/null", "a session of its own")
    assert descriptors == "0 1 2"
    names = {"PATH", "LANG", "HOME", "VMR_NAME", "VMR_ATTEMPT", "VMR_START_TIME", "PWD", "SHLVL", "_"}
    *found, path = environment.split()
    assert set(found) <= names and {"PATH", "LANG", "HOME"} <= set(found)
    assert path.encode() == vm.check("cat /root/path").strip()
