"""What packages, units, rules and baked images do by themselves: first boots, upgrades, hot-plugged ports, purges.

All VM tests have the packages in their guests (see conftest.py); here it is how they come there, and go.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import pytest

from tests.packaging.build import LATER, REPOSITORY, build, debs, export
from tests.vm.host import COUNTER, LAUNCH, VmWorld, counted
from tests.vm.product import install, put_packages
from tests.vm.vm import AGENT_PORT, Vm, drain


def put_deb(vm: Vm, version: Optional[str] = None) -> str:
    """Copy the guest's package into the VM; its path there."""
    return put_packages(vm, [debs(version)["vmr-agent"]])


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
    """And the second boot is one without a port, which is plugged in when it is over."""
    disk = tmp_path / "disk.qcow2"
    with Vm(vm_image, disk=disk) as vm:
        install(vm, [debs()["vmr-agent"]])
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
        vm.port_del(AGENT_PORT)
        vm.check(f"touch {LAUNCH}/.hold")
        host.guest_stage("-1/late", "echo from -1/late")
        vm.check("sync")
        vm.reset()
        assert vm.boot_id != first
        # Nothing waits for a port that isn't there.
        vm.check("systemctl is-system-running --wait")
        host.wait(lambda: host.guest_status().get("configured"), "the VM is configured again")
        vm.check("systemctl is-active vmr-agent")
        vm.check(f"rm {LAUNCH}/.hold")
        host.wait(lambda: host.guest_row("-1/late").get("state") == "exited", "it runs without a port")
        assert host.guest_status()["port_state"] == "missing"
        vm.port_add(AGENT_PORT)
        assert host.complete("-1/late")["exit_code"] == 0
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


OURS, THEIRS = "vmr[-_]agent", "qemu[-]ga"
"""What the two agents' processes have in their command lines."""


@pytest.mark.long
@pytest.mark.timeout(900)
def test_footprint(vm: Vm, tmp_path: Path, hosts: list[VmWorld]) -> None:
    """Prints what the table in README.md says, of both agents in one VM; judges only what would be a leak."""

    def of_all(pattern: str, file: str, program: str) -> float:
        """A sum over the processes of an agent, by awk, of one of their files in /proc."""
        command = f"for each in $(pgrep -f '{pattern}'); do cat /proc/$each/{file}; done 2>/dev/null"
        return float(vm.check(f"{{ {command} || true; }} | awk '{program} END {{ print n + 0 }}'"))

    def pss() -> str:
        return ", ".join(
            f"{name} {of_all(pattern, 'smaps_rollup', '/^Pss:/ { n += $2 }') / 1024:.1f} MiB"
            for name, pattern in (("vmr-agent", OURS), ("qemu-ga", THEIRS))
        )

    def ticks() -> list[float]:
        return [of_all(pattern, "stat", "{ n += $14 + $15 }") for pattern in (OURS, THEIRS)]

    print()
    for path in debs().values():
        installed = vm.check(
            f"du -skc $(dpkg -L {path.name.partition('_')[0]} | xargs -d'\n' ls -d -1p | grep -v /$)"
        )
        print(
            f"{path.name}: {path.stat().st_size / 1e6:.2f} MB, installed {installed.split()[-2].decode()} kB"
        )
    print("qemu-guest-agent:", vm.check("dpkg-query -Wf '${Installed-Size}' qemu-guest-agent").decode(), "kB")
    with vm.connect(AGENT_PORT) as port:
        reference = float(vm.check("TIMEFORMAT=%R; time python3 -c 'import psutil, watchdog, msgpack'"))
        began = time.monotonic()
        vm.start("systemctl start vmr-agent")
        port.recv(1)
        first = time.monotonic() - began
    vm.check("systemctl stop qemu-guest-agent")
    began = time.monotonic()
    vm.start("systemctl start qemu-guest-agent")
    vm.qga("guest-ping")
    print(f"started, and heard after: vmr-agent {first:.1f} s, qemu-ga {time.monotonic() - began:.1f} s;")
    print(f"Python with the three libraries alone {reference:.1f} s")

    host = VmWorld(tmp_path, vm)
    hosts.append(host)
    host.start_collector()
    host.wait(lambda: "session open" in (tmp_path / "collector.log").read_text(), "a session")
    vm.check("sleep 5")
    print(f"PSS, idle: {pss()}")
    idle = of_all(OURS, "smaps_rollup", "/^Pss:/ { n += $2 }") / 1024
    before, since = ticks(), time.monotonic()
    time.sleep(60)
    after, seconds = ticks(), time.monotonic() - since
    used = [
        f"{each - was:.0f} ms a minute"
        for each, was in zip((10 * n for n in after), (10 * n for n in before))
    ]
    print(f"idle CPU over {seconds:.0f} s: vmr-agent {used[0]}, qemu-ga {used[1]}")
    vm.put({f"{LAUNCH}/-1/sleeper{n}/call_arguments.sh": b"#!/bin/sh\nexec sleep 600\n" for n in range(10)})
    for _ in range(10):
        vm.qga("guest-exec", path="/bin/sleep", arg=["600"], **{"capture-output": True})
    host.wait(lambda: all(host.result(f"-1/sleeper{each}") for each in range(10)), "ten runs on the host")
    vm.check("sleep 2")
    print(f"PSS with 10 runs each: {pss()}")
    busy = of_all(OURS, "smaps_rollup", "/^Pss:/ { n += $2 }") / 1024
    assert busy < idle + 10 * 4


HOST_LOGS = "/scratch/vm_resource_logs"  # as in packaging/examples/vmr-host.conf


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_hosts_unit_collects_and_an_end_of_it_costs_no_byte(
    vm: Vm, tmp_path: Path, hosts: list[VmWorld]
) -> None:
    """Host and guest in one VM, since systemd runs there; they find each other by a socket."""
    vm.check("systemctl enable --now vmr-host")
    assert vm.run("systemctl is-active vmr-host")[1] == b"inactive\n", "no settings, no collector, no failure"
    assert vm.check("systemctl --failed --no-legend") == b""
    world = VmWorld(tmp_path, vm, {"quiet": "1", "port": "unix:/run/port"})
    hosts.append(world)
    example = (REPOSITORY / "packaging/examples/vmr-host.conf").read_text()
    settings, arguments = example.rsplit("VMR_HOST_ARGUMENTS=", 1)
    assert f"VMR_HOST_LOG_DIR={HOST_LOGS}\n" in settings and arguments.startswith("--expect 2 ")
    settings += "VMR_HOST_ARGUMENTS=--expect 1 --start-buffer 1 --quota 1G --listen Server=/run/port\n"
    vm.put({"/etc/vmr-host.conf": settings.encode()})
    world.guest_stage("-1/counter", "exec ./counter.py", {"counter.py": COUNTER})
    world.guest_stage("1/timed", "echo timed")
    vm.check("systemctl restart vmr-host && systemd-analyze verify --man=no vmr-host.service")
    vm.check("systemctl start vmr-agent")

    def result(vmr: str) -> dict[str, Any]:
        code, content = vm.run(f"cat {HOST_LOGS}/Server/{vmr}/1/result.json")
        return json.loads(content) if code == 0 else {}

    def digest(stream: str) -> bytes:
        return vm.check(f"sha256sum < {HOST_LOGS}/Server/-1/counter/1/{stream}").split()[0]

    def size() -> int:
        return int(vm.run(f"stat -c %s {HOST_LOGS}/Server/-1/counter/1/stdout 2>/dev/null")[1] or 0)

    for end in (
        "true",
        "systemctl restart vmr-host",
        "kill -9 $(systemctl show -p MainPID --value vmr-host)",
        "systemctl stop vmr-host; sleep 1; systemctl start vmr-host",
    ):
        vm.check(end)
        before = size()
        world.wait(lambda: size() > before, f"more output after {end}")
    vm.check("touch /root/enough")
    for vmr in ("-1/counter", "1/timed"):
        world.wait(lambda: result(vmr).get("complete"), f"{vmr} is whole on the host")
    row = result("-1/counter")
    assert (row["exit_code"], row["gaps"]) == (0, [])
    for number, stream in ((1, "stdout"), (2, "stderr")):
        expected = hashlib.sha256(counted(number, row[f"{stream}_bytes"])).hexdigest()
        assert digest(stream) == expected.encode()
    assert vm.check("vmr-host logs Server 1/timed") == b"timed\n"

    assert {each["vmr"] for each in json.loads(vm.check("vmr-host list Server --json"))} == {
        "-1/counter",
        "1/timed",
    }
    assert vm.run("vmr-host rerun Server 1/timed 2>/dev/null") == (0, b"timed\n")
    log = f"{HOST_LOGS}/Server.log"
    world.wait(lambda: vm.run(f"grep -c 'exited after' {log}")[1] == b"3\n", "three exits in Server.log")
    assert vm.check("systemctl --failed --no-legend") == b""
    assert b"Traceback" not in vm.check("journalctl -o cat -u vmr-host -u vmr-agent")
