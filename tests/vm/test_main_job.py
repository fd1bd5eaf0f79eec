"""The main job in a real VM: systemd, the real port, the guest agent that stages, a collector on QEMU's socket.

Each wait is bounded, and generous: emulated CPUs are slow. What is printed are measurements, never judged.
"""

from __future__ import annotations

import base64
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.vm.host import COUNTER, LAUNCH, LINE, VmWorld, counted
from tests.vm.product import product_files
from tests.vm.vm import AGENT_PORT, BENCH_PORT, QGA_PORT, Vm


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[[Vm], VmWorld]]:
    worlds: list[VmWorld] = []

    def make(vm: Vm) -> VmWorld:
        path = tmp_path / f"host{len(worlds)}"
        path.mkdir()
        worlds.append(VmWorld(path, vm))
        return worlds[-1]

    yield make
    for each in worlds:
        each.close()


@pytest.fixture
def world(vm: Vm, make_world: Callable[[Vm], VmWorld]) -> VmWorld:
    """A VM with the product and a host, nothing started."""
    return make_world(vm)


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
    assert "NameError: name \\'os\\' is not defined" in log  # as Python shows bytes with both quotes
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


def test_the_port_comes_late_goes_and_comes_back(vm_image: Path, make_world: Callable[[Vm], VmWorld]) -> None:
    """The daemon goes on executing and spooling without it, hardly uses the CPU, and ships when it is there."""
    with Vm(vm_image, files=product_files(), ports=(QGA_PORT, BENCH_PORT)) as vm:
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
        vm.check("udevadm control --reload; systemctl stop vmr-agent")
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


# --- reboots, resets, power cuts -----------------------------------------------------------------------------


def _boot_ready(world: VmWorld) -> None:
    """As installed: on the disk, and started by itself at each boot."""
    world.vm.check("systemctl enable -q --now vmr-agent; sync")


def test_exit_code_10_reboots_once_and_runs_again(world: VmWorld) -> None:
    vm = world.vm
    world.start_collector("--expect", "1", "--start-buffer", "0")
    world.guest_stage("-3/before", "echo before; echo x >> /root/ran-before")
    world.guest_stage(
        "-2/kernel", "echo x >> ran; echo boot $(wc -l < ran); [ $(wc -l < ran) = 2 ] || exit 10"
    )
    world.guest_stage("-1/after", "echo after")
    world.guest_stage("1/timed", "echo timed")
    first = vm.boot_id
    _boot_ready(world)
    vm.wait_reboot()
    assert vm.boot_id != first
    assert world.complete("-2/kernel", 2)["exit_code"] == 0
    assert world.complete("1/timed")["exit_code"] == 0
    row = world.result("-2/kernel", 1)
    assert row is not None and (row["exit_code"], row["complete"]) == (10, True)
    again = world.result("-2/kernel", 2)
    assert again is not None and again["trigger"] == "reboot"
    assert world.raw("-2/kernel") == b"boot 1\n" and world.raw("-2/kernel", attempt=2) == b"boot 2\n"
    assert vm.check("cat /root/ran-before") == b"x\n"
    assert world.result("-3/before", 2) is None and world.result("-1/after", 2) is None
    assert world.complete("-1/after")["exit_code"] == 0
    assert not (world.logs / "Server~1").exists()


_RUNS_ON = "echo x >> /root/ran-runs-on; sync; for i in {1..9999}; do echo line $i of a run; sleep 0.05; done"


def _stage_one_that_runs_on(world: VmWorld) -> None:
    world.guest_stage("-3/before", "echo before; echo x >> /root/ran-before; sync")
    world.guest_stage("-2/runs-on", _RUNS_ON)
    world.guest_stage("-1/after", "echo after")


def _check_lost(world: VmWorld) -> None:
    """What has a result does not run again, what has none is lost and not repeated, the schedule goes on."""
    assert world.complete("-1/after")["exit_code"] == 0
    row = world.closed("-2/runs-on")
    assert (row["state"], row["attempt"], row["complete"]) == ("lost", 1, False)
    assert "went down" in row["error"]
    text = b"".join(b"line %d of a run\n" % number for number in range(1, 10000))
    got = world.raw("-2/runs-on")
    assert len(got) > 100 and text.startswith(got)
    assert (row["stdout_bytes"], row["gaps"]) == (len(got), [])
    assert world.vm.check("cat /root/ran-before /root/ran-runs-on") == b"x\nx\n"
    rows = world.guest_status()["vmrs"]
    assert {each["vmr"]: (each["state"], each["attempt"]) for each in rows} == {
        "-3/before": ("exited", 1),
        "-2/runs-on": ("lost", 1),
        "-1/after": ("exited", 1),
    }
    world.wait(lambda: "after (" in world.log() and ") lost: " in world.log(), "all in Server.log")
    assert world.log().count("CALL ARGS") == 3
    assert not (world.logs / "Server~1").exists()
    assert world.vm.run("vmr-agent rerun --detach -2/runs-on")[0] == 0


def test_the_reset_button_in_mid_run(world: VmWorld) -> None:
    """The host's connection stays, as QEMU does: the first Hello of another boot has to make itself heard."""
    world.start_collector()
    _stage_one_that_runs_on(world)
    _boot_ready(world)
    world.wait(lambda: len(world.raw("-2/runs-on")) > 300, "output of the run")
    world.vm.reset()
    _check_lost(world)


def test_a_power_cut_in_mid_run(vm_image: Path, tmp_path: Path, make_world: Callable[[Vm], VmWorld]) -> None:
    """QEMU is killed, and a VM started on the disk it left; the host may hold more than that disk does."""
    disk = tmp_path / "disk.qcow2"
    with Vm(vm_image, files=product_files(), disk=disk) as vm:
        world = make_world(vm)
        world.start_collector()
        _stage_one_that_runs_on(world)
        _boot_ready(world)
        world.wait(lambda: len(world.raw("-2/runs-on")) > 300, "output of the run")
        vm.kill()
    with Vm(vm_image, disk=disk) as vm:
        world.vm = vm
        world.stop(world.collector)
        world.start_collector()
        _check_lost(world)


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


# --- time travel ---------------------------------------------------------------------------------------------


def test_a_vm_set_back_in_time_begins_a_new_life(world: VmWorld) -> None:
    """What the host got before the VM was restored is kept beside what it gets afterwards, under equal labels."""
    vm = world.vm
    world.start_collector()
    vm.check("echo one > /root/word")
    world.guest_stage("-3/word", "cat /root/word")
    world.guest_stage("-2/live", "until [ -e /root/enough ]; do date +%N; sleep 0.05; done")
    vm.check("systemctl start vmr-agent")
    assert world.complete("-3/word")["exit_code"] == 0
    world.wait(lambda: len(world.raw("-2/live")) > 100, "output of the run")
    start = time.monotonic()
    vm.save("here")
    saved = time.monotonic()
    vm.check("echo before > /root/word; vmr-agent rerun -3/word")
    assert world.complete("-3/word", 2)["exit_code"] == 0
    world.more("-2/live")
    restoring = time.monotonic()
    vm.restore("here")
    print(f"save {saved - start:.1f} s, restore {time.monotonic() - restoring:.1f} s")
    early = world.logs / "Server~1"
    world.wait(early.exists, "a new life")
    assert vm.run("echo after > /root/word; vmr-agent rerun -3/word; touch /root/enough") == (0, b"after\n")
    assert world.complete("-3/word", 2)["exit_code"] == 0
    assert world.complete("-2/live")["exit_code"] == 0

    assert (early / "-3/word/2/stdout").read_bytes() == b"before\n"
    assert world.raw("-3/word", attempt=2) == b"after\n"
    assert (early / "-3/word/1/stdout").read_bytes() == world.raw("-3/word") == b"one\n"
    # One run, told twice: the same beginning, then each life's own.
    old, new = (early / "-2/live/1/stdout").read_bytes(), world.raw("-2/live")
    assert old[:100] == new[:100] and old != new[: len(old)]
    assert new == vm.check("vmr-agent logs -2/live")
    assert not (world.logs / "Server~2").exists()
    world.wait(lambda: "b'after\\n'" in world.log(), "the second life in Server.log")
    assert "b'before\\n'" in world.log()


# --- measured, not judged ------------------------------------------------------------------------------------

_BENCH = f"""\
#!/usr/bin/python3
import os, subprocess, time
port = os.open("/dev/virtio-ports/{BENCH_PORT}", os.O_RDWR)
while True:
    order = os.read(port, 4096)
    word, _, rest = order.decode().strip().partition(" ")
    if word == "echo":
        os.write(port, order)
    elif word == "print":
        os.write(1, order)
    elif word == "x":
        os.chmod(rest, 0o755)
    elif word == "run":
        subprocess.Popen(rest.split())
    elif word == "end":
        break
    else:
        time.sleep(0.01)
"""


def _soon(holds: Callable[[], Any]) -> float:
    """Seconds until it holds, looked at closely."""
    start = time.perf_counter()
    while not holds():
        assert time.perf_counter() - start < 60
        time.sleep(0.0003)
    return time.perf_counter() - start


def _ms(times: list[float]) -> str:
    ordered = sorted(times)
    middle, late = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
    return f"p50 {1000 * middle:.1f} ms, p99 {1000 * late:.1f} ms of {len(ordered)}"


@pytest.mark.long
def test_figures(world: VmWorld) -> None:
    """Orders go in over the bench port, whose echo is printed beside the rest."""
    vm = world.vm
    vm.put({"/root/bench": _BENCH.encode()})
    vm.check("/root/bench > /dev/null 2>&1 < /dev/null &")
    with vm.connect(BENCH_PORT) as bench, vm.connect(AGENT_PORT) as raw:
        bench.sendall(b"echo warm\n")
        assert bench.recv(100) == b"echo warm\n"
        start = time.perf_counter()
        bench.sendall(b"run systemctl start vmr-agent\n")
        assert raw.recv(1)
        print(f"\nfirst frame after `systemctl start`: {time.perf_counter() - start:.2f} s")
        bench.sendall(b"end\n")
    world.start_collector()
    world.guest_stage("-1/bench", "exec ./bench", {"bench": _BENCH})
    trues = [f"-1/true{number}" for number in range(8)]
    for vmr in trues:
        vm.put({f"{LAUNCH}/{vmr}/call_arguments.sh": b"/bin/true\n"})  # no x bit without a shebang
    world.wait(lambda: (world.result("-1/bench") or {}).get("pid"), "the bench runs")
    raw_file = world.logs / "Server/-1/bench/1/stdout"
    with vm.connect(BENCH_PORT) as bench:
        echoes, lines, results = [], [], []
        for number in range(60):
            start = time.perf_counter()
            bench.sendall(b"echo %d\n" % number)
            bench.recv(100)
            echoes.append(time.perf_counter() - start)
            time.sleep(0.03)
        for number in range(60):
            size = raw_file.stat().st_size if raw_file.exists() else 0
            bench.sendall(b"print %d\n" % number)
            lines.append(_soon(lambda: raw_file.exists() and raw_file.stat().st_size > size))
            time.sleep(0.05)
        for vmr in trues:
            bench.sendall(f"x {LAUNCH}/{vmr}/call_arguments.sh\n".encode())
            results.append(_soon(lambda: (world.result(vmr) or {}).get("state") == "exited"))
            time.sleep(0.5)
        bench.sendall(b"end\n")
    print(f"an echo over the other port: {_ms(echoes)}\na line in its raw file: {_ms(lines)}")
    print(f"x bit to result on the host, /bin/true: {_ms(results)}")
    agent = []
    for _ in trues:
        start = time.perf_counter()
        _execute(vm, "/bin/true")
        agent.append(time.perf_counter() - start)
    print(f"the guest agent, polled at once: {_ms(agent)}")
    pid = world.daemon_pid()
    rollups = (
        f"cat /proc/{pid}/smaps_rollup /proc/$(pgrep -P {pid})/smaps_rollup | awk '/^Pss:/ {{ print $2 }}'"
    )
    daemon, server = map(int, vm.check(rollups).split())
    print(f"PSS: daemon {daemon / 1024:.1f} MiB, fork server {server / 1024:.1f} MiB")
    print(f"idle CPU with a session: {100 * world.guest_cpu(10):.2f} %")
