"""SIGKILL to whatever of ours is killable, at random moments, alone and together: every byte and line once."""

from __future__ import annotations

import ast
import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import pytest

from tests.e2e.world import World, until

VICTIMS = ("daemon", "collector", "renderer", "forkserver")
SMALL = [f"-{9 - number}/small{number}" for number in range(5)]
LARGE = ["-2/large0", "-2/large1"]
LINE = re.compile(r"^\[.{23} INFO\] (\S+) \(\d+\) (stdout|stderr): (b['\"].*)$")

TALKER = """\
import os, sys, time
name, lines, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
for number in range(lines):
    for fd in (1, 2):
        line = b"%s %d %07d and so on and on until the line is as long as lines are\\n"
        os.write(fd, line % (name.encode(), fd, number))
    if number % 200 == 0:
        time.sleep(pause)
"""


def expected(name: str, fd: int, lines: int) -> bytes:
    line = b"%s %d %07d and so on and on until the line is as long as lines are\n"
    return b"".join(line % (name.encode(), fd, number) for number in range(lines))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


def child(parent: int, word: bytes) -> Optional[int]:
    """The child process whose command line holds a word; no shim, which falls to the daemon as an orphan."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) != parent or (process / "comm").read_text() == "vmr-shim\n":
                continue
            if word in (process / "cmdline").read_bytes():
                return int(process.name)
        except OSError:
            continue
    return None


class Killer:
    """Kills, by pid, what a world has running, and starts it again as systemd would."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world = world
        self.rng = rng
        self.said: list[str] = []

    def strike(self) -> None:
        world, rng = self.world, self.rng
        victims = rng.sample(VICTIMS, rng.choice((1, 1, 1, 2, 2, 3, 4)))
        assert world.daemon is not None and world.collector is not None
        pids = {
            "daemon": world.daemon.pid,
            "collector": world.collector.pid,
            "renderer": child(world.collector.pid, b"vmr_agent.host.renderer"),
            "forkserver": child(world.daemon.pid, b"forkserver"),
        }
        for victim in victims:
            pid = pids[victim]
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
        self.said.append("+".join(victims))
        again = [victim for victim in victims if victim in ("daemon", "collector")]
        rng.shuffle(again)
        for victim in again:
            process = world.daemon if victim == "daemon" else world.collector
            process.wait()
            time.sleep(rng.choice((0.0, 0.05, 0.3)))
            world.start_daemon() if victim == "daemon" else world.start_collector()


def run_under_kills(world: World, seed: int, *, lines: int, strikes: int, pause: float) -> None:
    rng = random.Random(seed)
    for vmr in SMALL:
        world.stage(vmr, f"echo {vmr}; echo to stderr >&2")
    for vmr in LARGE:
        name = vmr.partition("/")[2]
        world.stage(
            vmr, f"exec {sys.executable} talker.py {name} {lines} {pause}", files={"talker.py": TALKER}
        )
    world.start_collector()
    world.start_daemon()
    killer = Killer(world, rng)
    for _ in range(strikes):
        time.sleep(rng.uniform(0.05, 1.0))
        killer.strike()
    history = ", ".join(killer.said)
    for vmr in [*SMALL, *LARGE]:
        try:
            row = world.complete(vmr)
        except AssertionError as error:
            assert world.daemon is not None and world.collector is not None
            ended = f"daemon {world.daemon.poll()}, collector {world.collector.poll()}"
            raise AssertionError(f"{history}; ended: {ended}; {error}") from None
        assert (row["exit_code"], row["attempt"], row["gaps"]) == (0, 1, []), history
        assert not (world.logs / "Server" / vmr / "2").exists(), f"it ran twice: {history}"
    texts = {(vmr, 1): f"{vmr}\n".encode() for vmr in SMALL}
    texts.update({(vmr, 2): b"to stderr\n" for vmr in SMALL})
    for vmr in LARGE:
        texts.update({(vmr, fd): expected(vmr.partition("/")[2], fd, lines) for fd in (1, 2)})
    for (vmr, fd), text in texts.items():
        assert world.raw(vmr, "stdout" if fd == 1 else "stderr") == text, f"{vmr} {fd}: {history}"
    check_logs(world, texts, history)
    assert sorted(path.name for path in world.logs.iterdir() if path.name[0] != ".") == [
        "Server",
        "Server.json",
        "Server.log",
    ], f"one life: {history}"


def check_logs(world: World, texts: dict[tuple[str, int], bytes], history: str) -> None:
    """Each output line once and in order in both logs, one start and one end for each run."""
    runs = {vmr for vmr, _ in texts}
    until(lambda: world.log().count("exited after") >= len(runs), f"all ends in Server.log: {history}")
    wanted = sum(text.count(b"\n") for text in texts.values())
    until(lambda: (world.logs / "Server.json").read_bytes().count(b"\n") >= wanted, "all rows")
    log = world.log()
    assert log.count("exited after") == log.count("PID returned") == log.count("CALL ARGS") == len(runs)
    shown: dict[tuple[str, int], bytes] = {}
    names = {vmr.partition("/")[2]: vmr for vmr, _ in texts}
    for line in log.splitlines():
        found = LINE.match(line)
        if found:
            key = names[found[1]], 1 if found[2] == "stdout" else 2
            shown[key] = shown.get(key, b"") + ast.literal_eval(found[3])
    for key, text in texts.items():
        assert shown.get(key) == text, f"{key} in Server.log: {history}"
    rows: dict[tuple[str, int], list[str]] = {}
    for row in world.rows():
        rows.setdefault((row["vmr"], 1 if row["stream"] == "stdout" else 2), []).append(row["msg"])
    for key, text in texts.items():
        assert rows.get(key) == text.decode().splitlines(), f"{key} in Server.json: {history}"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kills_at_random(world: World, seed: int) -> None:
    run_under_kills(world, seed, lines=17_000, strikes=7, pause=0.04)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 106))
def test_kills_at_random_long(world: World, seed: int) -> None:
    run_under_kills(world, seed, lines=170_000, strikes=60, pause=0.03)
