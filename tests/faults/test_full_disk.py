"""The log directory's disk fills up and is freed again: nothing is acknowledged too early, nothing is restarted."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.world import World, until
from tests.faults.disks import small_disk, take_inodes
from tests.host.scripted import Guest, Host, output, run

PATH = "-4/a.sh/1"
RUN = (1).to_bytes(16, "big")
LINES = 100_000
DATA = b"".join(b"line %06d of a run that fills the disk\n" % number for number in range(LINES))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system for the logs."""
    with small_disk(tmp_path / "logs", "size=2M") as path:
        yield path


def grow(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=200M", disk], check=True)


def full(disk: Path) -> bool:
    there = os.statvfs(disk)
    return there.f_bavail * there.f_frsize < 64 * 1024


def send_all(guest: Guest, host: Host) -> bool:
    """One session's worth: from where the host stands to the end, or until it hangs up. True when all is acked."""
    guest.open()
    guest.events.clear()
    try:
        guest.say(run(started=5))
        guest.hear(lambda: guest.acks(RUN), "the Ack of a Run", limit=5.0)
        at = guest.acks(RUN)[0].stdout
        while at < len(DATA):
            guest.say(output(DATA[at : at + 20_000], at))
            at += 20_000
            guest.hear(lambda: True)
            time.sleep(0.01)  # slow enough for some sweeps before the disk is full
            assert_acked_is_stored(guest, host)
        guest.hear(lambda: guest.acks(RUN)[-1].stdout == len(DATA), "all is acked", limit=5.0)
        return True
    except OSError:
        return False
    finally:
        assert_acked_is_stored(guest, host)
        guest.close()


def assert_acked_is_stored(guest: Guest, host: Host) -> None:
    for ack in guest.acks(RUN)[-3:]:
        assert host.raw("good", PATH)[: ack.stdout] == DATA[: ack.stdout]


@pytest.mark.parametrize("killed", [False, True], ids=["it goes on", "killed while full"])
def test_a_full_log_disk_is_waited_for_and_nothing_is_acknowledged_too_early(
    tmp_path: Path, disk: Path, killed: bool
) -> None:
    host = Host(tmp_path, vms=("good",))
    host.start()
    try:
        guest = Guest(host.socket("good"))
        assert not send_all(guest, host)
        until(lambda: full(disk), "the disk is full")
        acked = max(ack.stdout for ack in guest.acks(RUN))
        assert 0 < acked < len(DATA)
        for _ in range(2):  # it is heard once a second, and says no more than before
            try:
                assert not send_all(guest, host)
            except AssertionError as error:
                assert "no session" in str(error)
        assert host.alive()
        if killed:
            host.kill()
            host.start()
        grow(disk)
        until(lambda: send_all(guest, host), "all of it is acknowledged", 30.0)
        assert min(ack.stdout for ack in guest.acks(RUN)) >= acked, "what was acknowledged is kept"
        assert host.raw("good", PATH) == DATA
        until(lambda: host.log("good", "json").count("\n") >= LINES, "every line is shown")
        time.sleep(0.5)
        assert [line.split('"')[3] for line in host.log("good", "json").splitlines()] == (
            DATA.decode().splitlines()
        )
        assert "Traceback" not in host.said()
        assert len(host.said()) < 20_000
    finally:
        host.stop()


def test_the_main_job_goes_on_when_the_log_disk_is_freed(tmp_path: Path, disk: Path) -> None:
    world = World(tmp_path)
    try:
        world.stage("-2/fills", "cat data", files={"data": DATA})
        world.stage("-1/next", "echo next")
        world.start_collector()
        world.start_daemon()
        until(lambda: full(disk), "the disk is full")
        until(lambda: world.state("-1/next") == "exited", "the schedule goes on in the guest")
        time.sleep(3.0)
        assert world.status()["-2/fills"]["delivered"] != "yes"
        grow(disk)
        assert world.complete("-2/fills")["exit_code"] == 0
        assert world.complete("-1/next")["exit_code"] == 0
        assert world.raw("-2/fills") == DATA
        until(lambda: len(world.rows()) >= LINES + 1, "every line is shown")
        until(lambda: world.log().count("exited after") == 2, "both exits are shown")
        shown = [row["msg"] for row in world.rows() if row["vmr"] == "-2/fills"]
        assert shown == DATA.decode().splitlines()
        assert world.collector is not None and world.collector.poll() is None
    finally:
        world.close()


def test_a_log_directory_without_an_inode_is_waited_for(tmp_path: Path) -> None:
    """A run in progress, one that begins meanwhile, one that ends: all of it comes, once there are inodes."""
    with small_disk(tmp_path / "logs", "size=64M,nr_inodes=100") as disk:
        world = World(tmp_path)
        try:
            go, more = tmp_path / "go", b"more\n" * 100_000
            waits = f"until [ -e {go} ]; do sleep 0.02; done"
            world.stage("-2/runs", f"echo begun; {waits}; cat more; exit 4", files={"more": more})
            world.stage("-1/begins", "echo ran")
            collector = world.start_collector()
            world.start_daemon()
            until(lambda: world.raw("-2/runs") == b"begun\n", "it runs")
            until(lambda: world.row("-2/runs")["delivered"] == "so far", "the host has what there is of it")
            taken = take_inodes(disk)
            go.touch()
            until(lambda: world.row("-1/begins").get("exit_code") == 0, "the schedule goes on in the guest")
            until(
                lambda: "nothing is acknowledged" in world.collector_log(), "it is said why nothing arrives"
            )
            time.sleep(2.0)  # for some more tries
            assert {world.row(vmr)["delivered"] for vmr in ("-2/runs", "-1/begins")}.isdisjoint({"yes"})
            assert world.result("-1/begins") is None
            for path in taken:
                path.unlink()
            assert world.complete("-2/runs")["exit_code"] == 4
            assert world.complete("-1/begins")["exit_code"] == 0
            assert world.raw("-2/runs") == b"begun\n" + more
            assert world.raw("-1/begins") == b"ran\n"
            until(lambda: world.log().count("exited after") == 2, "both exits are shown")
            until(lambda: len(world.rows()) == 100_002, "every line is shown")
            assert collector.poll() is None
            assert "Traceback" not in world.collector_log()
        finally:
            world.close()
