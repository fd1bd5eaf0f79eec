"""A real VM that reboots, loses power, stands still, is set back, begun anew, and whose clock is wrong.

Booting takes 10 to 20 s under emulation: each boot here serves several cases.
"""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

from tests.vm.disk import LossyDisk
from tests.vm.host import LAUNCH, VmWorld
from tests.vm.vm import BENCH_PORT, Vm

BOOTS_LIMIT = 500.0  # s; ends a hang
MakeWorld = Callable[..., VmWorld]
NewVm = Callable[..., Vm]


def _boot_ready(world: VmWorld) -> None:
    """As installed: on the disk, and started by itself at each boot."""
    world.vm.check("systemctl enable -q --now vmr-agent; sync")


def _attempts(world: VmWorld, vmr: str) -> list[dict[str, Any]]:
    """What the host has of a VMR's attempts, in order."""
    found = (world.logs / "Server" / vmr).glob("*/result.json")
    return [json.loads(path.read_bytes()) for path in sorted(found, key=lambda path: int(path.parent.name))]


@pytest.fixture
def lossy() -> Iterator[LossyDisk]:
    disk = LossyDisk()
    yield disk
    disk.close()


# --- reboots -------------------------------------------------------------------------------------------------

# What every script here does first, to tell how often it really ran.
_RAN = """\
echo "$VMR_NAME $VMR_ATTEMPT" >> /root/ran
cat /proc/sys/kernel/random/boot_id >> /root/boots
sync
echo "attempt $VMR_ATTEMPT"
"""
_ONCE = '[ "$VMR_ATTEMPT" = 1 ] || exit 0\n'
# The first time it does not come back: the power is cut then.
_REBOOT = """\
#!/bin/sh
mkdir /root/first 2>/dev/null; first=$?
echo x >> /root/reboots
sync
[ $first != 0 ] || exec sleep 1000
exec systemctl reboot
"""


@pytest.mark.timeout(1200)
def test_who_asks_for_a_reboot_runs_again_after_it_and_nobody_else(
    vm_image: Path, new_vm: NewVm, tmp_path: Path, make_world: MakeWorld, lossy: LossyDisk
) -> None:
    """All ways of asking at one time; the power is cut before the reboot they ask for; then one that asks by exit
    code, beside one that asks for ever; then one that reboots the VM itself."""
    disk = tmp_path / "disk.qcow2"
    with new_vm(disk=disk, through=lossy.open) as vm:
        world = make_world(vm, {"quiet": "1", "max_reboots": "1", "reboot_command": "/root/reboot"})
        world.start_collector("--expect", "1", "--start-buffer", "0")
        vm.put({"/root/reboot": _REBOOT.encode()})
        world.guest_stage("-3/by-file", _RAN + _ONCE + "touch reboot")
        world.guest_stage("-3/killed", _RAN + _ONCE + "touch reboot; exec sleep 1000")
        world.guest_stage("-3/shimless", _RAN + _ONCE + "touch reboot; exec sleep 1001")
        world.guest_stage("-3/silent", _RAN)
        world.guest_stage("-2/for-ever", _RAN + "exit 10")
        world.guest_stage("-2/silent", _RAN)
        world.guest_stage("-1/self", _RAN + _ONCE + "touch reboot; systemctl reboot; exec sleep 1000")
        world.guest_stage("-1/beside", _RAN + "exec sleep 1000")
        world.guest_stage("1/timed", _RAN + "exit 10")
        _boot_ready(world)
        for vmr in ("-3/killed", "-3/shimless"):
            world.wait(lambda: world.raw(vmr), f"{vmr} runs")
        world.complete("-3/by-file")
        assert vm.run("test -e /root/reboots")[0] == 1, "not before all of that time have exited"
        vm.check("vmr-agent kill -3/killed")
        script = int(vm.check("pgrep -xf 'sleep 1001'"))
        vm.check(f"kill -9 $(ps -o ppid= {script}); kill -9 {script}")
        world.closed("-3/shimless")
        world.wait(lambda: vm.run("test -e /root/reboots")[0] == 0, "the reboot is asked for")
        vm.check(f"touch {LAUNCH}/.hold; sync")  # until we can look on
        vm.kill()
    lossy.cut()
    with Vm(vm_image, disk=disk) as vm:
        world.vm = vm
        world.stop(world.collector)
        world.start_collector("--expect", "1", "--start-buffer", "0")
        world.wait(lambda: world.guest_status(), "the daemon is back")
        assert vm.check("cat /root/ran").count(b"\n") == 4, "held"
        vm.start(f"rm {LAUNCH}/.hold")
        try:
            world.wait(
                lambda: (world.result("1/timed") or {}).get("closed"), "two boots later", limit=BOOTS_LIMIT
            )
        except AssertionError as error:  # the guest may not answer
            raise AssertionError(f"{error}\n{vm.console()[-4000:]}\n{world.log()[-4000:]}") from None
        time.sleep(2)  # a reboot too many would begin now
        ran = vm.check("sort /root/ran | uniq -c").decode().splitlines()
        assert [line.split() for line in ran] == [
            ["1", vmr, str(attempt)]
            for vmr, attempt in sorted(
                [
                    *(("-3/by-file", 1), ("-3/by-file", 2), ("-3/killed", 1), ("-3/killed", 2)),
                    *(("-3/shimless", 1), ("-3/shimless", 2), ("-3/silent", 1)),
                    *(("-2/for-ever", 1), ("-2/for-ever", 2), ("-2/silent", 1)),
                    *(("-1/self", 1), ("-1/self", 2), ("-1/beside", 1), ("1/timed", 1)),
                ]
            )
        ]
        assert vm.check("sort -u /root/boots | wc -l") == b"4\n", (
            "a power cut, a reboot by the command, one by a VMR"
        )
        assert vm.check("cat /root/reboots") == b"x\nx\n", "one for all who ask, none where it has happened"
        assert vm.run(f"ls {LAUNCH}/*/*/reboot")[0] != 0
        results = {
            vmr: [(row["trigger"], row["state"], row["exit_code"]) for row in _attempts(world, vmr)]
            for vmr in ("-3/by-file", "-3/killed", "-3/shimless", "-2/for-ever", "-1/self", "1/timed")
        }
        assert results["-3/by-file"] == [("schedule", "exited", 0), ("reboot", "exited", 0)]
        assert results["-3/killed"] == [("schedule", "killed", None), ("reboot", "exited", 0)]
        assert results["-3/shimless"] == [("schedule", "lost", None), ("reboot", "exited", 0)]
        assert results["-2/for-ever"] == [("schedule", "exited", 10), ("reboot", "exited", 10)]
        assert results["-1/self"][1:] == [("reboot", "exited", 0)]
        assert results["1/timed"] == [("schedule", "exited", 10)]
        assert b"-2/for-ever asked for a reboot and gets none" in vm.check("journalctl -o cat -u vmr-agent")
        assert world.guest_status()["configured"]
        assert not (world.logs / "Server~1").exists()


# --- resets and power cuts -----------------------------------------------------------------------------------

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


def test_a_power_cut_in_mid_run(
    vm_image: Path, new_vm: NewVm, tmp_path: Path, make_world: MakeWorld, lossy: LossyDisk
) -> None:
    """With all that its disk had not flushed; what was acknowledged the host has, and what is synced the guest."""
    disk = tmp_path / "disk.qcow2"
    with new_vm(disk=disk, through=lossy.open) as vm:
        world = make_world(vm)
        world.start_collector()
        _stage_one_that_runs_on(world)
        _boot_ready(world)
        world.wait(lambda: len(world.raw("-2/runs-on")) > 300, "output of the run")
        vm.kill()
    lossy.cut()
    with Vm(vm_image, disk=disk) as vm:
        world.vm = vm
        world.stop(world.collector)
        world.start_collector()
        _check_lost(world)


# A line each 10 ms, with its number and the time in ms, also to a port from which the test hears what was printed.
_TICKS = f"""\
#!/usr/bin/python3
import os, time
port = os.open("/dev/virtio-ports/{BENCH_PORT}", os.O_WRONLY)
number = 0
while True:
    line = b"%08d %012d\\n" % (number, time.clock_gettime(time.CLOCK_BOOTTIME) * 1000)
    os.write(1, line)
    os.write(port, line)
    number += 1
    time.sleep(0.01)
"""
_TICK = 22  # bytes of a line


_SYNCS = b"""import os, time
fd = os.open("/root/other", os.O_RDWR | os.O_CREAT)
while True:
    os.write(fd, b"x")
    os.fsync(fd)
    time.sleep(0.02)
"""


def _ticks(bench: socket.socket) -> bytes:
    """All that was printed, when QEMU is gone: the socket holds what it had passed on."""
    heard = b""
    while True:
        try:
            piece = bench.recv(1 << 16)
        except ConnectionError:
            piece = b""
        if not piece:
            return heard[: len(heard) // _TICK * _TICK]
        heard += piece


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_power_cut_costs_the_last_second_at_the_most(
    vm_image: Path, new_vm: NewVm, tmp_path: Path, make_world: MakeWorld, lossy: LossyDisk
) -> None:
    """The host away while a script prints, the power cut with all that the disk had not flushed."""
    rng = random.Random(5)
    costs = []
    for number in range(6):
        disk = tmp_path / f"disk{number}.qcow2"
        with new_vm(disk=disk, through=lossy.open) as vm:
            world = make_world(vm)
            world.guest_stage("-1/ticks", "exec ./ticks", {"ticks": _TICKS})
            with vm.connect(BENCH_PORT) as bench:
                _boot_ready(world)
                if number % 2:
                    # Its syncs commit the sizes of all files, and none of our bytes.
                    vm.put({"/root/syncs.py": _SYNCS})
                    vm.check("python3 /root/syncs.py > /dev/null 2>&1 < /dev/null &")
                assert bench.recv(1, socket.MSG_PEEK)
                time.sleep(3 + rng.random() * 3)
                vm.kill()
                printed = _ticks(bench)
        lossy.cut()
        with Vm(vm_image, disk=disk) as vm:
            world.vm = vm
            world.start_collector()
            row = world.closed("-1/ticks")
            world.stop(world.collector)
        kept = world.raw("-1/ticks")
        assert (row["state"], row["gaps"]) == ("lost", []) and len(kept) > 50 * _TICK
        assert printed.startswith(kept) or kept.startswith(printed)
        last, survived = (data[: len(data) // _TICK * _TICK].split()[-1] for data in (printed, kept))
        costs.append(max(0, int(last) - int(survived)))
        lines = len(printed) // _TICK, len(kept) // _TICK
        print(f"cut {number + 1}: {lines[0]} lines printed, {lines[1]} kept, {costs[-1]} ms lost")
    print(f"ms of output lost by a cut: {sorted(costs)}")
    # A sync begins a second after the first byte it is for, and takes its time: that is the slack.
    assert max(costs) <= 2000


# --- standing still, other clocks ----------------------------------------------------------------------------


@pytest.mark.long
def test_the_vm_stands_still_for_a_minute(world: VmWorld) -> None:
    world.start_collector()
    world.guest_stage("-1/ticks", "until [ -e /root/enough ]; do echo tick $((++n)); sleep 0.05; done")
    world.vm.check("systemctl start vmr-agent")
    world.more("-1/ticks")
    world.vm.pause()
    time.sleep(60)
    world.vm.resume()
    since = time.monotonic()
    world.more("-1/ticks")
    print(f"stood still for 60 s: output again after {time.monotonic() - since:.2f} s")
    world.vm.check("touch /root/enough")
    row = world.complete("-1/ticks")
    text = b"".join(b"tick %d\n" % number for number in range(1, row["stdout_bytes"]))
    assert text.startswith(world.raw("-1/ticks")) and row["exit_code"] == 0
    assert not (world.logs / "Server~1").exists()


_UPTIME = "cut -d' ' -f1 /proc/uptime"


def test_the_clock_is_set_back_and_ahead_by_a_year_in_mid_run(world: VmWorld) -> None:
    """Durations stay right, nothing waits for the wall clock or fires by it; and a pause counts for nothing."""
    vm = world.vm
    world.start_collector("--expect", "1", "--start-buffer", "6")
    world.guest_stage("-2/spans", f"{_UPTIME}; until [ -e /root/go ]; do sleep 0.1; done; {_UPTIME}")
    world.guest_stage("-1/next", f"{_UPTIME}")
    world.guest_stage("3/timed", f"{_UPTIME}")
    vm.check("systemctl start vmr-agent")
    world.wait(lambda: world.raw("-2/spans"), "it runs")
    vm.check('date -s "1 year ago"')
    world.guest_stage("-2/joins", "echo staged in the past")
    world.complete("-2/joins")
    vm.pause()
    time.sleep(3)
    vm.resume()
    vm.check("touch /root/go")
    spans = world.complete("-2/spans")
    began, ended = map(float, world.raw("-2/spans").split())
    assert spans["duration_s"] == pytest.approx(ended - began, abs=1.5) and spans["duration_s"] > 0
    world.complete("-1/next")
    assert float(world.raw("-1/next")) >= ended - 0.05
    world.wait(lambda: world.guest_status().get("since_zero_s") is not None, "time zero is set")
    since_zero = world.guest_status()["since_zero_s"]
    zero = float(vm.check(_UPTIME)) - since_zero
    vm.check('date -s "2 years"')
    assert not world.raw("3/timed"), "two years ahead is not yet time"
    timed = world.complete("3/timed")
    late = float(world.raw("3/timed")) - zero - 3
    print(f"a positive time, {late:.2f} s late by the clock that counts")
    assert -1.0 < late < 30, "zero is read, and the uptime asked for, up to a second apart"
    assert timed["duration_s"] < 30
    assert vm.run("vmr-agent rerun -1/next 2>/dev/null")[0] == 0
    again = world.complete("-1/next", 2)
    assert again["duration_s"] < 30 and again["started"] > spans["started"]
    log = world.log()
    order = ["spans (", "joins (", "next (", "timed ("]
    assert [log.index(name) for name in order] == sorted(log.index(name) for name in order)
    assert vm.check("journalctl -o cat -u vmr-agent | grep -c 'session open'") == b"1\n"


# --- the same names again ------------------------------------------------------------------------------------


def test_what_the_host_has_is_never_needed_again_and_a_fresh_disk_begins_a_new_life(
    new_vm: NewVm, make_world: MakeWorld
) -> None:
    """The output is deleted in the guest once it is acknowledged; then the experiment is launched again, same names."""
    with new_vm() as vm:
        world = make_world(vm)
        world.start_collector()
        world.guest_stage("-1/words", "seq 40000; seq 5 >&2")
        vm.check("systemctl start vmr-agent")
        first = world.complete("-1/words")
        kept = {stream: world.raw("-1/words", stream) for stream in ("stdout", "stderr")}
        assert kept["stdout"] == b"".join(b"%d\n" % number for number in range(1, 40001))
        world.wait(lambda: world.guest_row("-1/words")["delivered"] == "yes", "the guest knows")
        vm.check(
            "systemctl stop vmr-agent; find /var/lib/vmr-agent/runs -name std* -o -name index | xargs rm"
        )
        world.stop(world.collector)
        world.start_collector()
        vm.check("systemctl start vmr-agent")
        world.wait(lambda: world.guest_status().get("session"), "a session")
        world.guest_stage("-1/later", "echo later")
        world.complete("-1/later")
        assert world.result("-1/words") == first
        assert {stream: world.raw("-1/words", stream) for stream in kept} == kept
        assert not (world.logs / "Server~1").exists()
    with new_vm() as vm:
        world.vm = vm
        vm.put({"/etc/vmr-agent.conf": b"[vmr-agent]\nquiet = 1\n"})
        world.stop(world.collector)
        world.start_collector()
        world.guest_stage("-1/words", "echo again")
        vm.check("systemctl start vmr-agent")
        world.wait((world.logs / "Server~1").exists, "another life")
        world.complete("-1/words")
        assert world.raw("-1/words") == b"again\n"
        old = world.logs / "Server~1" / "-1/words/1"
        assert json.loads((old / "result.json").read_bytes()) == first
        assert {stream: (old / stream).read_bytes() for stream in kept} == kept
        world.wait(
            lambda: world.log().count("words (") >= 3 and "b'again\\n'" in world.log(), "both in Server.log"
        )
        assert not (world.logs / "Server~2").exists()


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
