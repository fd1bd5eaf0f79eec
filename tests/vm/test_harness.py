"""The VM harness itself: what every other test here takes for granted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.build import debs
from tests.vm.disk import LossyDisk
from tests.vm.product import REPOSITORY
from tests.vm.vm import AGENT_PORT, BENCH_PORT, Vm, VmError

EVERY_BYTE = bytes(range(256))


@pytest.fixture(scope="module")
def bare(vm_image: Path) -> Iterator[Vm]:
    """One VM without the product for all tests that leave nothing behind."""
    start = time.monotonic()
    with Vm(vm_image, files={"/root/bytes": EVERY_BYTE}) as machine:
        print(f"start from the snapshot: {time.monotonic() - start:.2f} s")
        yield machine


def test_a_command_has_an_exit_code_and_output(bare: Vm) -> None:
    assert bare.run("echo out; echo err >&2; exit 3") == (3, b"out\nerr\n")
    assert bare.run("kill -9 $$") == (-signal.SIGKILL, b"")


def test_check_raises_for_a_command_that_fails_and_shows_what_it_wrote(bare: Vm) -> None:
    assert bare.check("echo fine") == b"fine\n"
    with pytest.raises(VmError, match=r"exit code 2.*the reason"):
        bare.check("echo the reason; exit 2")


def test_output_comes_byte_for_byte(bare: Vm) -> None:
    assert bare.run("cat /root/bytes") == (0, EVERY_BYTE)
    assert bare.run("for i in {1..40}; do cat /root/bytes; done") == (0, EVERY_BYTE * 40)


def test_kernel_messages_do_not_disturb_a_command(bare: Vm) -> None:
    command = 'for i in {1..20}; do echo "<0>noise $i" > /dev/kmsg; cat /root/bytes; done'
    assert bare.run(command) == (0, EVERY_BYTE * 20)
    assert "noise 20" in bare.console()


def test_a_background_process_does_not_hold_a_command_up(bare: Vm) -> None:
    start = time.monotonic()
    assert bare.run("sleep 100 & echo started") == (0, b"started\n")
    assert time.monotonic() - start < 60
    bare.check("pkill -f 'sleep 10[0]'")


def test_after_a_timeout_the_vm_is_still_usable(bare: Vm) -> None:
    with pytest.raises(VmError, match=r"killed after 1 s.*partial(.|\n)*end of the console"):
        bare.run("echo partial; sleep 1000", timeout=1)
    assert bare.run("echo well") == (0, b"well\n")


def test_a_command_sees_what_a_root_login_sees(bare: Vm) -> None:
    names = bare.check("env | sed 's/=.*//' | sort").decode().split()
    assert not {"INVOCATION_ID", "NOTIFY_SOCKET", "JOURNAL_STREAM"} & set(names)
    assert bare.run("umask; pwd; id -u; cat /proc/self/oom_score_adj") == (0, b"0022\n/root\n0\n0\n")


def test_files_are_put_into_a_running_vm(bare: Vm, tmp_path: Path) -> None:
    big = os.urandom(3 << 20)
    bare.put({"/root/put/script": b"#!/bin/sh\necho I run\n", "/root/put/big": big})
    assert bare.run("/root/put/script") == (0, b"I run\n")
    bare.put({"big": big[::-1]}, dest="/root/put")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "private").write_bytes(b"tree")
    (tmp_path / "sub" / "private").chmod(0o640)
    bare.put(tmp_path, dest="/root/put/tree")
    private = "/root/put/tree/sub/private"
    assert bare.check(f"cat {private}; stat -c %a:%U {private}") == b"tree640:root\n"
    bare.check("cp /root/put/big /root/put/copy")
    assert bare.check("tail -c 5000 /root/put/copy") == big[::-1][-5000:]


def test_the_guest_agent_answers(bare: Vm) -> None:
    assert bare.qga("guest-ping") == {}
    with pytest.raises(VmError, match="guest-file-open"):
        bare.qga("guest-file-open", path="/nowhere/at/all")
    assert bare.qga("guest-get-host-name") == {"host-name": "guest"}


@pytest.mark.parametrize("name", [AGENT_PORT, BENCH_PORT])
def test_a_port_carries_bytes_both_ways(bare: Vm, name: str) -> None:
    sent = EVERY_BYTE * 64
    with bare.connect(name) as host:
        host.sendall(sent)
        bare.check(f"exec 3<>/dev/virtio-ports/{name}; head -c {len(sent)} <&3 >&3")
        received = b""
        while len(received) < len(sent):
            received += host.recv(1 << 16)
    assert received == sent


def test_qmp_tells_of_a_port_opened_in_the_guest(bare: Vm) -> None:
    bare.check(f"true > /dev/virtio-ports/{BENCH_PORT}")
    assert bare.wait_event("VSERPORT_CHANGE", id=f"port-{BENCH_PORT}", open=True)
    assert bare.wait_event("VSERPORT_CHANGE", id=f"port-{BENCH_PORT}", open=False)


def test_a_port_is_plugged_in_and_out(bare: Vm) -> None:
    there = "udevadm settle; ls /dev/virtio-ports"
    bare.port_add("org.vmr_agent.extra.0")
    assert b"org.vmr_agent.extra.0" in bare.check(there)
    with bare.connect("org.vmr_agent.extra.0") as host:
        bare.check("echo hello > /dev/virtio-ports/org.vmr_agent.extra.0")
        assert host.recv(100) == b"hello\n"
    bare.port_del("org.vmr_agent.extra.0")
    assert b"org.vmr_agent.extra.0" not in bare.check(there)
    bare.port_add("org.vmr_agent.extra.0")
    assert b"org.vmr_agent.extra.0" in bare.check(there)
    bare.port_del("org.vmr_agent.extra.0")


def test_a_paused_vm_stands_still(bare: Vm) -> None:
    before = float(bare.check("cut -d' ' -f1 /proc/uptime"))
    bare.pause()
    paused = time.monotonic()
    assert bare.qmp("query-status")["status"] == "paused"
    time.sleep(3)
    stood = time.monotonic() - paused
    bare.resume()
    resumed = time.monotonic()
    after = float(bare.check("cut -d' ' -f1 /proc/uptime"))
    assert after - before < stood + time.monotonic() - resumed


def test_vms_of_one_snapshot_have_the_right_time_and_their_own_random_numbers(vm_image: Path) -> None:
    """Equal random numbers would make two guests draw the same ids, which no two real guests do."""
    drawn = []
    for _ in range(2):
        with Vm(vm_image) as machine:
            assert abs(float(machine.check("date +%s.%N")) - time.time()) < 10
            drawn.append(machine.check("head -c 16 /dev/urandom"))
    assert drawn[0] != drawn[1]


def test_a_saved_vm_is_restored_as_it_was(vm_image: Path) -> None:
    with Vm(vm_image) as machine:
        machine.check("echo before > /root/when; echo before > /dev/shm/when")
        machine.save("here")
        machine.check("echo after > /root/when; echo after > /dev/shm/when; sync")
        machine.restore("here")
        assert machine.check("cat /root/when /dev/shm/when") == b"before\nbefore\n"
        assert machine.qga("guest-ping") == {}


@pytest.mark.long  # test_power.py rests on it
def test_reset_boots_again_and_a_kept_disk_outlives_the_power_cut(vm_image: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    with Vm(vm_image, disk=disk) as machine:
        first = machine.boot_id
        machine.check("echo kept > /root/kept; sync; touch /dev/shm/forgotten")
        start = time.monotonic()
        machine.reset()
        print(f"reset: {time.monotonic() - start:.1f} s")
        assert machine.boot_id != first
        assert machine.run("cat /root/kept; ls /dev/shm") == (0, b"kept\n")
        machine.check("echo kept too > /root/kept; sync")
        machine.kill()
        assert not machine.alive
    start = time.monotonic()
    with Vm(vm_image, disk=disk) as machine:
        print(f"cold boot: {time.monotonic() - start:.1f} s")
        assert machine.cold
        assert machine.run("cat /root/kept") == (0, b"kept too\n")
        assert machine.qga("guest-ping", timeout=200) == {}


def test_a_lossy_disk_loses_what_the_guest_has_not_flushed(vm_image: Path, tmp_path: Path) -> None:
    """A write past the guest's cache reaches the disk, and is gone with the power all the same."""
    lossy = LossyDisk()
    try:
        with Vm(vm_image, disk=tmp_path / "disk.qcow2", through=lossy.open) as machine:
            machine.check("head -c 65536 /dev/zero > /root/file; sync; sleep 1")
            machine.check(
                "tr '\\0' x < /root/file | dd of=/root/file bs=65536 conv=notrunc oflag=direct iflag=fullblock"
            )
            assert machine.check("head -c 1 /root/file") == b"x"
            machine.kill()
        lossy.cut()
        assert lossy.lost >= 65536
    finally:
        lossy.close()


@pytest.mark.long  # test_power.py rests on it
def test_a_guest_that_reboots_by_itself_is_met_again(vm_image: Path) -> None:
    with Vm(vm_image) as machine:
        first = machine.boot_id
        machine.start("systemctl reboot")
        machine.wait_reboot()
        assert machine.boot_id != first


def test_qemu_does_not_outlive_a_killed_test(vm_image: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from tests.vm.vm import Vm\n"
        "with Vm(Path(sys.argv[1])) as vm:\n"
        "    print(vm.pid, vm.directory, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, vm_image], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert killed.returncode == -signal.SIGKILL
    pid, directory = killed.stdout.split()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}/exe").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    subprocess.run(["rm", "-r", directory], check=True)


def test_the_product_is_installed(vm: Vm) -> None:
    """By dpkg, from the packages of this very checkout, and not yet started."""
    for name, package in debs().items():
        vm.put({f"/root/{name}.deb": package.read_bytes()})
        vm.check(f"dpkg --verify {name} && dpkg -x /root/{name}.deb /root/{name}")
        vm.check(f"diff -r -x __pycache__ /root/{name}/usr/share/{name} /usr/share/{name}")
        assert vm.check(f"{name} --version").startswith(name.encode())
    assert vm.run("systemctl is-active vmr-agent vmr-host")[1] == b"inactive\ninactive\n"
    vm.check("! test -e /var/lib/vmr-agent && ! test -e /usr/sbin/policy-rc.d")
