"""No room in the guest: over the spool's limit, the disk full, no inode left, and room again.

Nothing is lost in silence, nothing is killed, nothing has to be started again.
"""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.world import World, until
from tests.faults.disks import fill_blocks, read_only, small_disk, take_inodes

MIB = 1 << 20
LIMITED = {"spool_limit": "2M", "quiet": "0.5"}


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(**settings: str) -> World:
        worlds.append(World(tmp_path, settings=settings))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


def pattern(size: int) -> bytes:
    return b"".join(b"line %010d\n" % number for number in range(size // 16))


def fills(world: World, rest: str, *, code: int = 0) -> str:
    """A command that prints over the limit, waits until shims have been told, and prints ``rest``, a file's name."""
    return (
        f"cat first; until [ -e {world.spool}/full ]; do sleep 0.02; done; sleep 0.3; cat {rest}; exit {code}"
    )


# --- over the limit ------------------------------------------------------------------------------------------


def test_over_the_limit_with_the_host_away_scripts_wait_and_an_end_is_an_end(
    make_world: Callable[..., World],
) -> None:
    world = make_world(**LIMITED)
    data = pattern(5 * MIB)
    first, last, more = data[: 2 * MIB + 8192], data[2 * MIB + 8192 :][: MIB // 2], data
    # Its last words fit into the pipe: it ends, blocked or not, and the next start time may begin.
    world.stage("-3/ends", fills(world, "last", code=7), files={"first": first, "last": last})
    world.stage("-2/next", "echo next")
    world.stage("-1/waits", "cat more; echo end >&2; exit 3", files={"more": more})
    daemon = world.start_daemon()
    until(lambda: world.row("-3/ends").get("exit_code") == 7, "it has its record, though the spool is full")
    until(lambda: world.row("-2/next").get("state") == "exited", "its barrier passes")
    until(lambda: world.row("-1/waits").get("state") == "blocked", "one that prints on stands still")
    assert "over its limit" in world.row("-1/waits")["error"]
    shown = world.agent("status").stdout.decode()
    assert "blocked" in shown and "the spool is over its limit" in shown
    checked = world.agent("check")
    assert checked.returncode == 1
    assert "-1/waits stands still: the spool is over its limit" in checked.stdout.decode()
    assert world.row("-1/waits")["stdout_bytes"] < len(more)
    world.start_collector()
    assert world.complete("-3/ends")["exit_code"] == 7
    assert world.complete("-1/waits")["exit_code"] == 3
    assert world.raw("-3/ends") == first + last
    assert (world.raw("-1/waits"), world.raw("-1/waits", "stderr")) == (more, b"end\n")
    assert world.raw("-2/next") == b"next\n"
    until(lambda: not (world.spool / "full").exists(), "there is room again")
    assert daemon.poll() is None
    assert world.row("-1/waits")["dropped_bytes"] == 0


def test_with_overflow_drop_scripts_go_on_and_each_missing_byte_is_told(
    make_world: Callable[..., World],
) -> None:
    """In the guest, in the log, in the row; also by a daemon that was killed meanwhile."""
    world = make_world(**LIMITED, overflow="drop")
    first, rest = pattern(2 * MIB + 8192), pattern(9 * MIB)
    again = world.path / "again"
    world.stage(
        "-1/talks",
        f"{fills(world, 'rest')[: -len('; exit 0')]}; touch {world.path}/printed\n"
        f"until [ -e {again} ]; do sleep 0.02; done; echo; echo room again; echo on stderr >&2",
        files={"first": first, "rest": rest},
    )
    daemon = world.start_daemon()
    until((world.path / "printed").exists, "the script waits for nobody")
    size = len(first) + len(rest)
    row = until(
        lambda: (row := world.row("-1/talks")) and row["stdout_bytes"] == size and row, "all of it is counted"
    )
    assert row["state"] == "running" and 8 * MIB < row["dropped_bytes"] <= len(rest)
    assert "being dropped: the spool is over its limit" in row["error"]
    world.kill9(daemon)
    world.start_daemon()
    until(lambda: world.row("-1/talks").get("dropped_bytes") == row["dropped_bytes"], "it is known still")
    dropped = f"{row['dropped_bytes']:,} bytes dropped"
    assert dropped in world.agent("status").stdout.decode()
    checked = world.agent("check").stdout.decode()
    assert "it is full, output is dropped" in checked and dropped.replace(" dropped", " so far") in checked
    # What is printed of it is what was kept; a word about the rest is for terminals.
    shown = world.agent("logs", "-1/talks")
    kept = size - row["dropped_bytes"]
    assert (shown.stdout, shown.stderr) == ((first + rest)[:kept], b"")
    word = (
        f"{row['dropped_bytes']:,} bytes of stdout from byte {kept:,} on are missing: dropped, for the spool"
    )
    assert word in on_a_terminal(world, "agent", "logs", "-1/talks")

    world.start_collector()
    until(lambda: not (world.spool / "full").exists(), "there is room again")
    until(lambda: world.row("-1/talks")["error"] is None, "the shim has seen it")
    again.touch()
    result = until(lambda: (row := world.result("-1/talks")) and row["closed"] and row, "it is over")
    (gap,) = result["gaps"]
    assert not result["complete"] and result["exit_code"] == 0
    assert result["missing_bytes"] == gap["length"] == row["dropped_bytes"]
    assert (gap["stream"], gap["reason"]) == ("stdout", "dropped in the guest: the spool is over its limit")
    assert gap["offset"] + gap["length"] == size
    begin, end = gap["offset"], size
    tail = b"\nroom again\n"
    whole = first + rest + tail
    assert world.raw("-1/talks") == whole[:begin] + bytes(end - begin) + whole[end:]
    assert result["started"] < gap["time"] < result["ended"]

    # One line, in order with the output.
    missing = f"stdout: {gap['length']} bytes from byte {begin} on are missing: {gap['reason']}"
    until(lambda: "exited after" in world.log(), "the log is whole")
    log = world.log()
    assert log.count(missing) == log.count("are missing") == 1
    before, _, after = log.partition(missing)
    assert "room again" in after and "room again" not in before
    lines = whole[:begin].decode().split("\n")
    assert [r["msg"] for r in world.rows() if r["stream"] == "stdout"] == [
        *filter(None, lines),
        "room again",
    ]

    shown = world.host("logs", "Server", "-1/talks", "--follow")
    assert (shown.stdout, shown.stderr) == (whole[:begin] + tail, b"on stderr\n")
    word = f"{gap['length']:,} bytes of stdout from byte {begin:,} on are missing: {gap['reason']}"
    assert word in on_a_terminal(world, "host", "logs", "Server", "-1/talks", "--stream", "stdout")
    listed = json.loads(world.host("list", "Server", "--json").stdout)
    assert [each["missing_bytes"] for each in listed] == [gap["length"]]
    assert "missing" in world.host("list", "Server").stdout.decode()


def on_a_terminal(world: World, command: str, *arguments: str) -> str:
    """What a verb says on a terminal that is its standard error alone."""
    end, other = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-m", f"vmr_agent.cli.{command}", *arguments],
            env=world.environment,
            stdout=subprocess.DEVNULL,
            stderr=other,
        )
        assert done.returncode == 0
        return os.read(end, 65536).decode()
    finally:
        os.close(end)
        os.close(other)


# --- the disk ------------------------------------------------------------------------------------------------


def test_room_is_made_though_nothing_can_be_written_down(
    make_world: Callable[..., World], tmp_path: Path
) -> None:
    """Others have filled the disk for good, so that what was seen to go can't be noted; what the host has can go."""
    world = make_world(**LIMITED)
    data = pattern(6 * MIB)
    parts = {"first": data[: 2 * MIB + 8192], "rest": data[2 * MIB + 8192 :]}
    with small_disk(tmp_path / "disk", "size=16m") as disk:
        world.spool = disk / "state"
        world.stage("-3/goes", "echo ran")
        world.stage("-2/prints", fills(world, "rest", code=4), files=parts)
        world.start_daemon()
        until(lambda: world.row("-2/prints").get("state") == "blocked", "it stands still")
        fill_blocks(disk)
        shutil.rmtree(world.launch / "-3" / "goes")
        until(lambda: "cannot use" in world.daemon_log(), "it can't be noted")
        world.start_collector()
        assert world.complete("-2/prints")["exit_code"] == 4
        assert world.raw("-2/prints") == data
        world.close()


@contextmanager
def without(want: str, disk: Path) -> Iterator[None]:
    """A file system that lacks something."""
    if want == "a writable mount":
        with read_only(disk):
            yield
        return
    taken = [fill_blocks(disk)] if want == "blocks" else take_inodes(disk)
    yield
    for path in taken:
        path.unlink()


@pytest.mark.parametrize("want", ["blocks", "inodes", "a writable mount"])
def test_a_state_directory_without_room_is_waited_for(
    make_world: Callable[..., World], tmp_path: Path, want: str
) -> None:
    """What runs goes on, blocked if it must, and its end is recorded; what can't begin waits."""
    world = make_world()
    data = pattern(3 * MIB)
    with small_disk(tmp_path / "disk", "size=16m,nr_inodes=200") as disk:
        world.spool = disk / "state"
        world.stage(
            "-2/runs",
            f"echo begun; until [ -e {tmp_path}/go ]; do sleep 0.02; done; cat data; echo end >&2; exit 4",
            files={"data": data},
        )
        world.start_collector()
        daemon = world.start_daemon()
        until(lambda: world.raw("-2/runs") == b"begun\n", "it runs")
        with without(want, disk):
            world.stage("-100/late", "echo ran")  # a lower time runs at the next boundary
            world.stage("-2/beside", "echo ran")  # one of this time runs now, could it begin
            (tmp_path / "go").touch()
            if want == "blocks":
                until(lambda: world.row("-2/runs").get("state") == "blocked", "its script stands still")
                row = world.row("-2/runs")
                assert "nearly full" in row["error"] and row["stdout_bytes"] < len(data)
                until(lambda: blocked(world) == 1, "the host shows that it is blocked")
                assert "stands still" in world.agent("check").stdout.decode()
            else:
                until(lambda: world.row("-2/runs").get("exit_code") == 4, "its end is recorded")
            until(lambda: "cannot begin" in world.daemon_log(), "it is said why nothing begins")
            assert world.row("-2/beside")["exit_code"] is None
        assert world.complete("-2/runs")["exit_code"] == 4
        assert world.raw("-2/runs") == b"begun\n" + data
        assert world.raw("-2/runs", "stderr") == b"end\n"
        for vmr in ("-2/beside", "-100/late"):
            assert world.complete(vmr)["exit_code"] == 0
            assert world.raw(vmr) == b"ran\n"
        until(lambda: world.ask("status")["configured"], "the schedule goes on to its end")
        assert daemon.poll() is None
        assert "Traceback" not in world.daemon_log()
        world.close()  # what it has open is on the disk that goes


def blocked(world: World) -> int:
    (vm,) = json.loads(world.host("mix", "--json").stdout)
    return int(vm["vmrs"]["blocked"])
