"""A VM made from the Debian package, not from the source tree: first boots, upgrades, hot-plugged ports, purges.

What the daemon does when it is stopped and killed is tested from the source tree at length; here it is whether the
package's own scripts, units and rules keep to it.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import pytest

from tests.packaging.build import LATER, build, debs, export
from tests.vm.host import COUNTER, LAUNCH, VmWorld, counted
from tests.vm.vm import AGENT_PORT, Vm

NOT_NOW = {"/usr/sbin/policy-rc.d": b"#!/bin/sh\nexit 101\n"}
"""What keeps a package from starting its services: how images are made."""


def put_deb(vm: Vm, version: Optional[str] = None) -> str:
    """Copy the guest's package into the VM; its path there."""
    path = debs(version)["vmr-agent"]
    vm.put({f"/root/{path.name}": path.read_bytes()})
    return f"/root/{path.name}"


@pytest.fixture
def bare(vm_image: Path) -> Iterator[Vm]:
    """A VM with nothing of ours in it."""
    with Vm(vm_image) as machine:
        yield machine


@pytest.fixture(scope="module")
def installed(vm_image: Path) -> Iterator[Vm]:
    """A VM with the package installed, for tests that leave it as they found it."""
    with Vm(vm_image) as machine:
        machine.check(f"dpkg -i {put_deb(machine)}")
        yield machine


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[VmWorld]]:
    """Whatever a test appends is ended with it."""
    made: list[VmWorld] = []
    yield made
    for each in made:
        each.close()


def files_of(vm: Vm) -> set[str]:
    """Every path in the guest that a package could leave behind."""
    listed = vm.check(
        "find / -xdev -path /tmp -prune -o -path /var/log -prune -o -print;"
        " find /run/systemd/units /run/vmr-agent 2>/dev/null || true"
    )
    return set(listed.decode().splitlines())


@pytest.mark.long
@pytest.mark.timeout(900)
def test_what_is_baked_in_runs_at_the_first_boot_and_not_at_the_second(
    vm_image: Path, tmp_path: Path, hosts: list[VmWorld]
) -> None:
    disk = tmp_path / "disk.qcow2"
    with Vm(vm_image, disk=disk, files=NOT_NOW) as vm:
        vm.check(f"dpkg -i {put_deb(vm)} && rm /usr/sbin/policy-rc.d")
        assert vm.run("systemctl is-active vmr-agent")[1] == b"inactive\n"
        assert vm.check("systemctl is-enabled vmr-agent") == b"enabled\n"
        assert vm.check(f"stat -c '%a %U' {LAUNCH}") == b"755 root\n"
        (tmp_path / "baking").mkdir()
        host = VmWorld(tmp_path / "baking", vm)
        for vmr in ("-2/first", "-1/second"):
            host.guest_stage(vmr, f"echo {vmr} >> /root/ran; echo from {vmr}")
        host.close()
        vm.check("sync")
        vm.quit()
    with Vm(vm_image, disk=disk) as vm:
        (tmp_path / "host").mkdir()
        host = VmWorld(tmp_path / "host", vm)
        hosts.append(host)
        host.start_collector()
        assert host.complete("-1/second")["exit_code"] == 0
        assert host.raw("-2/first") == b"from -2/first\n"
        assert vm.check("cat /root/ran") == b"-2/first\n-1/second\n"
        host.wait(lambda: host.guest_status().get("configured"), "the VM is configured")
        first = vm.boot_id
        vm.check("sync")
        vm.reset()
        assert vm.boot_id != first
        host.wait(lambda: host.guest_status().get("configured"), "the VM is configured again")
        vm.check("systemctl is-active vmr-agent")
        assert vm.check("cat /root/ran") == b"-2/first\n-1/second\n"
        # udevd, journald and the rest were as busy at boot as on any other; the package must add no failed unit.
        assert vm.check("systemctl --failed --no-legend") == b""


def test_the_first_frame_comes_soon_after_the_units_start(installed: Vm) -> None:
    """Within three times what it takes Python to load the libraries there; each turn measures both."""
    loading = "TIMEFORMAT=%R; time python3 -c 'import psutil, watchdog, msgpack'"
    ratios = []
    with installed.connect(AGENT_PORT) as port:
        for _ in range(3):
            installed.check("systemctl stop vmr-agent")
            drain(port)
            reference = float(installed.check(loading))
            before = time.monotonic()
            installed.start("systemctl start vmr-agent")
            port.recv(1)
            taken = time.monotonic() - before
            print(f"the first frame after {taken:.2f} s; Python and its libraries {reference:.2f} s")
            ratios.append(taken / reference)
    assert min(ratios) < 3


def drain(port: socket.socket) -> None:
    """Take what an earlier daemon has left in the port."""
    port.settimeout(0.5)
    with contextlib.suppress(TimeoutError):
        while port.recv(1 << 16):
            pass
    port.settimeout(60)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_an_upgrade_in_mid_output_loses_no_byte_and_a_purge_leaves_nothing(
    bare: Vm, tmp_path: Path, hosts: list[VmWorld]
) -> None:
    before = files_of(bare)
    host = VmWorld(tmp_path, bare)
    hosts.append(host)
    old, new = put_deb(bare), put_deb(bare, LATER)
    bare.check(f"dpkg -i {old}")
    bare.check("systemctl is-active vmr-agent")
    host.start_collector()
    host.guest_stage("-1/counter", "exec ./counter.py", {"counter.py": COUNTER})
    host.wait(lambda: host.raw("-1/counter"), "some output on the host")
    script = host.result("-1/counter")["pid"]
    daemon = host.daemon_pid()

    bare.check(f"dpkg -i {new}")
    assert host.daemon_pid() != daemon
    assert bare.check("vmr-agent --version").decode() == f"vmr-agent {LATER}\n"
    host.more("-1/counter")
    bare.check("systemctl restart vmr-agent")
    host.more("-1/counter")
    bare.check("kill -9 $(systemctl show -p MainPID --value vmr-agent)")
    host.more("-1/counter")
    bare.check("systemctl stop vmr-agent; sleep 1; systemctl start vmr-agent")
    host.more("-1/counter")
    bare.check("touch /root/enough")
    row = host.complete("-1/counter")
    assert (row["pid"], row["exit_code"], row["gaps"]) == (script, 0, [])
    assert host.raw("-1/counter") == counted(1, row["stdout_bytes"])
    assert host.raw("-1/counter", "stderr") == counted(2, row["stderr_bytes"])
    assert not (host.logs / "Server/-1/counter/2").exists()

    bare.check(f"dpkg -r vmr-agent && test -d /var/lib/vmr-agent && rm -r {LAUNCH}/*")
    bare.check("! pgrep -f 'vmr[-_]agent'")
    bare.check("dpkg --purge vmr-agent && rm /root/*.deb /root/enough")
    left = {path for path in files_of(bare) - before if "/dpkg/" not in path and "/__pycache__" not in path}
    assert left == set()


def test_a_port_plugged_in_later_starts_the_unit(installed: Vm) -> None:
    installed.check("systemctl start vmr-agent")
    installed.port_del(AGENT_PORT)
    installed.check("sleep 1; systemctl is-active vmr-agent")  # a port that goes ends nothing
    installed.check("systemctl stop vmr-agent")
    installed.port_add(AGENT_PORT)
    with installed.connect(AGENT_PORT) as port:
        assert port.recv(1)
    installed.check("systemctl is-active vmr-agent")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_clones_of_a_baked_image_are_two_agents(
    vm_image: Path, tmp_path: Path, hosts: list[VmWorld]
) -> None:
    """packaging/bake on the tests' own image, with VMRs in it; each clone runs them once, as somebody of its own."""
    baked = tmp_path / "baked"
    baked.mkdir()
    shutil.copyfile(vm_image / "image.qcow2", baked / "image.qcow2")
    for part in ("vmlinuz", "initrd"):
        (baked / part).symlink_to(vm_image / part)
    vmr = tmp_path / "stage" / "-1" / "who"
    vmr.mkdir(parents=True)
    (vmr / "call_arguments.sh").write_text("#!/bin/sh\necho once >> /root/ran\ncat /etc/machine-id\n")
    (vmr / "call_arguments.sh").chmod(0o777)
    (tmp_path / "conf").write_text("[vmr-agent]\nquiet = 1\n")
    deb = debs()["vmr-agent"]
    arguments = [
        "--deb",
        str(deb),
        "--conf",
        str(tmp_path / "conf"),
        "--stage",
        str(tmp_path / "stage"),
        "--live",
    ]
    build("bake", str(baked / "image.qcow2"), *arguments)
    identities, spools = set(), set()
    for clone in ("one", "two"):
        with Vm(baked, cold=True) as vm:
            (tmp_path / clone).mkdir()
            host = VmWorld(tmp_path / clone, vm, {"quiet": "1"})
            hosts.append(host)
            host.start_collector()
            assert host.complete("-1/who")["attempt"] == 1
            identity = host.raw("-1/who").strip()
            assert len(identity) == 32 and identity == vm.check("cat /etc/machine-id").strip()
            identities.add(identity)
            spools.add(vm.check("cat /var/lib/vmr-agent/spool.json"))
            assert vm.check(
                "cat /root/ran; stat -c '%a %U' /var/launch/-1/who/call_arguments.sh; ls /var/tmp"
            ) == (b"once\n755 root\n")
            host.close()
    assert len(identities) == len(spools) == 2


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_bundle_in_a_vm_is_upgraded_in_mid_output(bare: Vm, tmp_path: Path, hosts: list[VmWorld]) -> None:
    """Its modules lie in the program's own files: those of a version with runs in progress must stay."""
    (archive,) = build("build-bundle", "--out", str(tmp_path / "out"), tree=export(tmp_path / "source"))
    bare.put({"/root/bundle.tar.gz": archive.read_bytes()})
    bare.check(
        "mkdir /root/b && tar -C /root/b --strip-components=1 -xzf /root/bundle.tar.gz && /root/b/install.sh"
    )
    host = VmWorld(tmp_path, bare)
    hosts.append(host)
    host.start_collector()
    host.guest_stage("-1/counter", "exec ./counter.py", {"counter.py": COUNTER})
    host.wait(lambda: host.raw("-1/counter"), "some output on the host")
    script = host.result("-1/counter")["pid"]
    environment = bare.check(f"tr '\\0' '\\n' < /proc/{script}/environ")
    assert b"LD_LIBRARY_PATH" not in environment and b"_PYI" not in environment
    bare.check("echo 99-other > /root/b/VERSION && /root/b/install.sh")
    assert bare.check("readlink /usr/bin/vmr-agent") == b"/opt/vmr-agent/99-other/vmr-agent\n"
    assert len(bare.check("ls /opt/vmr-agent").split()) == 2
    host.more("-1/counter")
    bare.check("touch /root/enough")
    row = host.complete("-1/counter")
    assert (row["pid"], row["exit_code"], row["gaps"]) == (script, 0, [])
    assert host.raw("-1/counter") == counted(1, row["stdout_bytes"])
    bare.check("/root/b/install.sh && /root/b/install.sh --uninstall")
    bare.check(
        "! test -e /opt/vmr-agent/99-other && ! test -e /usr/bin/vmr-agent && ! systemctl cat vmr-agent"
    )


@pytest.mark.long
def test_footprint(bare: Vm, tmp_path: Path, hosts: list[VmWorld]) -> None:
    """Prints what the table in packaging/README.md says; judges only what would be a leak."""
    bare.check(f"dpkg -i {put_deb(bare)}")
    host = VmWorld(tmp_path, bare)
    hosts.append(host)
    host.start_collector()

    def pss(pattern: str) -> float:
        """MiB of all processes whose command line has it."""
        command = f"for each in $(pgrep -f '{pattern}'); do cat /proc/$each/smaps_rollup; done 2>/dev/null"
        lines = bare.check(f"{command} || true").decode().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024

    ours, theirs = "vmr[-_]agent", "qemu[-]ga"
    host.wait(lambda: "session open" in (tmp_path / "collector.log").read_text(), "a session")
    bare.check("sleep 5")
    idle = pss(ours)
    print(f"PSS, MiB: vmr-agent idle {idle:.1f}, qemu-ga {pss(theirs):.1f}")
    print(f"idle CPU with a session: {100 * host.guest_cpu(20):.2f} %")
    sleepers = {
        f"{LAUNCH}/-1/sleeper{each}/call_arguments.sh": b"#!/bin/sh\nexec sleep 600\n" for each in range(10)
    }
    bare.put(sleepers)
    host.wait(lambda: all(host.result(f"-1/sleeper{each}") for each in range(10)), "ten runs on the host")
    bare.check("sleep 2")
    busy = pss(ours)
    print(f"PSS with 10 runs: {busy:.1f} MiB")
    assert busy < idle + 10 * 4
