"""File systems made read-only under files that are open for writing, as ext4 does after an error, and writable again.

A VM of its own, for nothing but the kernel's emergency remount does that: mount(8) finds such a file system busy.
The collector runs in the VM too, on another file system, so that its logs meet the same.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.vm.host import LAUNCH, VmWorld
from tests.vm.vm import Vm

PORT, LOGS, CONTROL = "/run/port", "/mnt/logs", "/run/host-control"
SETTINGS = {"quiet": "1", "start": "auto", "port": f"unix:{PORT}"}
LINES = 40_000
PRINTS = f"echo begun; until [ -e /run/go ]; do sleep 0.1; done; seq -w {LINES}; echo end >&2; exit 4"


def result(vm: Vm, vmr: str) -> dict[str, Any]:
    code, content = vm.run(f"cat {LOGS}/Server/{vmr}/1/result.json")
    return json.loads(content) if code == 0 else {}


def digest(vm: Vm, path: str) -> bytes:
    return vm.check(f"sha256sum < {path}").split()[0]


@pytest.mark.long
def test_read_only_in_mid_run_and_writable_again(vm: Vm, tmp_path: Path) -> None:
    began = time.monotonic()
    world = VmWorld(tmp_path, vm, SETTINGS)
    vm.check(
        f"truncate -s 64M /run/logs.img && mkfs.ext4 -q /run/logs.img && mkdir -p {LOGS} &&"
        f" mount -o loop /run/logs.img {LOGS}"
    )
    world.guest_stage("1/prints", PRINTS)
    world.guest_stage("30/later", "echo ran")
    vm.check(
        f"systemd-run -q --unit=collect vmr-host collect --log-dir {LOGS} --listen Server={PORT} --control {CONTROL}"
    )
    vm.check("systemctl start vmr-agent")
    world.wait(
        lambda: vm.run(f"grep -q begun {LOGS}/Server/1/prints/1/stdout")[0] == 0, "the host has its start"
    )
    pids = vm.check("systemctl show -p MainPID vmr-agent collect")

    vm.check("echo u > /proc/sysrq-trigger")
    for mount in ("/", LOGS):
        world.wait(lambda mount=mount: vm.run(f"findmnt -nO ro {mount}")[0] == 0, f"{mount} is read-only")
    vm.check("touch /run/go")
    world.wait(lambda: world.guest_row("1/prints").get("state") == "blocked", "it is said to stand still")
    assert "read-only" in world.guest_row("1/prints")["error"]
    assert b"mounted read-only" in vm.run("vmr-agent check")[1]
    journal = "journalctl -b -o cat -u vmr-agent -u collect"
    world.wait(
        lambda: b"cannot begin a run of 30/later: Read-only" in vm.check(journal), "what can't begin waits"
    )
    assert world.guest_row("30/later")["exit_code"] is None
    assert world.guest_row("1/prints")["exit_code"] is None

    # The guest first: it goes on to its end, and the host acknowledges none of it.
    vm.check("mount -o remount,rw /")
    world.wait(lambda: world.guest_row("1/prints").get("exit_code") == 4, "its end is recorded")
    world.wait(lambda: world.guest_row("30/later").get("exit_code") == 0, "what waited has run")
    world.wait(lambda: b"nothing is acknowledged" in vm.check(journal), "the host says that it can't write")
    assert world.guest_row("1/prints")["delivered"] != "yes" != world.guest_row("30/later")["delivered"]

    vm.check(f"mount -o remount,rw {LOGS}")
    for vmr, code in (("1/prints", 4), ("30/later", 0)):
        world.wait(lambda vmr=vmr: result(vm, vmr).get("complete"), f"{vmr} is whole on the host")
        assert result(vm, vmr)["exit_code"] == code
    expected = vm.check(f"(echo begun; seq -w {LINES}) | sha256sum").split()[0]
    assert digest(vm, f"{LOGS}/Server/1/prints/1/stdout") == expected
    assert vm.check(f"cat {LOGS}/Server/1/prints/1/stderr {LOGS}/Server/30/later/1/stdout") == b"end\nran\n"
    world.wait(
        lambda: int(vm.check(f"grep -c '' {LOGS}/Server.json")) == LINES + 3, "each line is in the log once"
    )
    assert vm.check("systemctl show -p MainPID vmr-agent collect") == pids, "nothing was started again"
    assert b"Traceback" not in vm.check(journal)
    assert vm.check(f"ls -A {LAUNCH}").split() == [b"1", b"30"]
    print(f"all of it: {time.monotonic() - began:.0f} s")
