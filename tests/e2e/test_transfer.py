"""`pull`, `push` and `stage` with real processes: whatever is in a file, whoever dies while it is on its way."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional, Union

import pytest

from tests.e2e.relay import Relay
from tests.e2e.world import World, until

MIB = 1 << 20
DAY = 86_400_000_000_000


@pytest.fixture
def up(world: World) -> World:
    """A guest and a host that talk."""
    world.start_collector()
    world.start_daemon()
    online(world)
    return world


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """Where the files are that travel: in memory if it can be, for here it is not the disk that is tested."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="vmr-", dir=memory if os.access(memory, os.W_OK) else tmp_path))
    yield path
    shutil.rmtree(path)


def online(world: World) -> None:
    until(world.online, "a session")


def done(world: World, *arguments: Union[str, bytes, Path]) -> str:
    """What a verb says that must succeed."""
    ended = world.host(*(os.fspath(each) for each in arguments))
    assert ended.returncode == 0, ended.stderr.decode()
    return str(ended.stdout.decode())


def refused(world: World, *arguments: Union[str, bytes, Path]) -> str:
    """What a verb says that can't be done: one line."""
    ended = world.host(*(os.fspath(each) for each in arguments))
    said: str = ended.stderr.decode()
    assert ended.returncode == 1 and said.count("\n") == 1 and said.startswith("vmr-host: cannot "), said
    return said


def begin(world: World, *arguments: Union[str, bytes, Path]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "vmr_agent.cli.host", *(os.fspath(each) for each in arguments)]
    return subprocess.Popen(command, env=world.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def end(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, (out + err).decode()


def parts(directory: Path) -> list[Path]:
    return list(directory.glob(".*.part"))


def half_there(directory: Path, size: int) -> Callable[[], bool]:
    """Whether a file is on its way into a directory, with so many bytes."""

    def holds() -> bool:
        try:
            return any(part.stat().st_blocks * 512 >= size for part in parts(directory))
        except FileNotFoundError:
            return False

    return holds


def made(directory: Path, name: str = "file", size: int = 96 * MIB) -> Path:
    path = directory / name
    block = os.urandom(MIB)
    with path.open("wb") as file:
        for number in range(size // MIB):
            file.write(number.to_bytes(8, "big") + block[8:])
    return path


def same(one: Path, other: Path) -> bool:
    return subprocess.run(["cmp", "-s", one, other]).returncode == 0


def directory(path: Path) -> Path:
    path.mkdir()
    return path


# --- what comes and goes whole ---


def test_a_files_bytes_mode_and_time_come_home(up: World, room: Path) -> None:
    vmr = up.stage("-4/compress.py", "exit 1", files={"compress.py": b"\x00\xff fixed\n"})
    os.utime(vmr / "compress.py", ns=(DAY, DAY))
    home = directory(room / "home")
    said = done(up, "pull", "-4/compress.py/compress.py", "Server", home)
    assert said.startswith("compress.py  100%  9  ") and said.count("\n") == 1
    status = (home / "compress.py").stat()
    assert (home / "compress.py").read_bytes() == b"\x00\xff fixed\n"
    assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (0o777, DAY)
    done(up, "pull", vmr / "compress.py", "Server", home / "other name")
    assert (home / "other name").read_bytes() == b"\x00\xff fixed\n"
    (home / "other name").write_bytes(b"edited")
    done(up, "push", home / "other name", "Server", "-4/compress.py/compress.py")
    assert (vmr / "compress.py").read_bytes() == b"edited"
    assert parts(home) == parts(vmr) == []


def test_files_of_every_shape_there_and_back(up: World, room: Path) -> None:
    home = directory(room / "home")
    empty, odd, big, sparse = (room / name for name in ("empty", "odd\n\udcff -x", "big", "sparse"))
    empty.touch()
    odd.write_bytes(b"o" * 31744 + b"d")
    made(room, "big", 50 * MIB)
    with sparse.open("wb") as file:
        for at in (0, 512 * MIB + 5, 700 * MIB):
            file.seek(at)
            file.write(b"data" * 1000)
        file.truncate(1 << 30)
    for path in (empty, odd, big, sparse):
        done(up, "pull", path, "Server", home)
        there = home / path.name
        assert there.stat().st_size == path.stat().st_size and same(there, path)
        done(up, "push", there, "Server", room / "back")
        assert same(room / "back", path)
        for copy in (there, room / "back"):
            assert copy.stat().st_blocks * 512 < path.stat().st_blocks * 512 + MIB  # holes are holes


def test_a_tree_comes_and_goes_with_all_that_is_in_it(up: World, room: Path) -> None:
    tree = directory(room / "tree")
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "b" / "deep").write_bytes(b"deep")
    (tree / "empty").mkdir()
    (tree / "odd \n\udcff").write_bytes(b"odd")
    (tree / "link").symlink_to("a/b")
    (tree / "broken").symlink_to(b"/no/\xfe".decode("utf-8", "surrogateescape"))
    os.mkfifo(tree / "pipe")
    for number in range(300):
        (tree / "empty" / f"{number:0200}").write_bytes(b"x" * number)
    (tree / "a" / "b" / "deep").chmod(0o400)
    (tree / "a").chmod(0o500)
    for path in (tree / "a" / "b" / "deep", tree / "a", tree):
        os.utime(path, ns=(DAY, DAY))

    def shape(top: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in [top, *top.rglob("*")]:
            status = path.lstat()
            content: object = os.readlink(path) if path.is_symlink() else None
            content = path.read_bytes() if stat.S_ISREG(status.st_mode) else content
            time_of = None if path.is_symlink() else status.st_mtime_ns
            found[os.fspath(path.relative_to(top))] = (status.st_mode, time_of, content)
        found.pop("pipe", None)
        return found

    ended = up.host("pull", str(tree), "Server", str(room / "home"))
    assert ended.returncode == 0 and ended.stderr == b"skipped pipe: a named pipe\n"
    assert ended.stdout.startswith(b"tree  100%  307 entries  ")
    assert shape(room / "home") == shape(tree)
    done(up, "push", room / "home", "Server", room / "back")
    assert shape(room / "back") == shape(tree)
    for verb in ("pull", "push"):
        into = directory(room / f"into {verb}")
        done(up, verb, tree / "empty", "Server", into)
        assert len(list((into / "empty").iterdir())) == 300
        assert "is there already" in refused(up, verb, tree / "empty", "Server", into)
        assert parts(into) == []
    assert parts(room) == []


# --- whoever dies ---


@pytest.mark.parametrize("who", ["daemon", "collector"])
@pytest.mark.parametrize("verb", ["pull", "push"])
def test_a_transfer_goes_on_after_a_disconnect(up: World, verb: str, who: str, room: Path) -> None:
    source, target = made(room), directory(room / "target")
    process = begin(up, verb, source, "Server", target)
    until(half_there(target, 10 * MIB), "it is on its way")
    if who == "daemon":
        up.kill9(up.daemon)
        time.sleep(0.2)
        assert process.poll() is None
        up.start_daemon()
    else:
        up.kill9(up.collector)
        time.sleep(0.2)
        assert process.poll() is None
        up.start_collector()
    code, said = end(process)
    assert code == 0, said
    assert same(target / "file", source) and parts(target) == []


@pytest.mark.parametrize("lost", [False, True], ids=["cut", "said and not heard"])
@pytest.mark.parametrize("verb", ["pull", "push"])
def test_a_transfer_goes_on_after_several_sessions_cut_at_any_moment(
    world: World, verb: str, lost: bool, room: Path
) -> None:
    """Bytes come again, answers never came, and there is a hole in the middle."""
    source, target = made(room, size=40 * MIB), directory(room / "target")
    with source.open("r+b") as file:
        file.truncate(60 * MIB)
        file.seek(80 * MIB)
        file.write(os.urandom(10 * MIB))
    relay = Relay(world.sockets / "relay", world.port)
    try:
        world.start_collector()
        until(world.port.exists, "the collector listens")
        world.start_daemon("--port", f"unix:{world.sockets / 'relay'}")
        online(world)
        process = begin(world, verb, source, "Server", target)
        for size in (1, 9, 20, 33, 43):
            until(half_there(target, size * MIB), f"{size} MiB are there")
            if lost:
                relay.swallowing.set()
                time.sleep(0.05)
            relay.cut()
        code, said = end(process)
        assert code == 0, said
    finally:
        relay.close()
    assert same(target / "file", source) and parts(target) == []
    assert (target / "file").stat().st_blocks * 512 < 52 * MIB


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("verb", ["pull", "push"])
def test_stopped_half_way_nothing_is_left(up: World, verb: str, number: signal.Signals, room: Path) -> None:
    source, target = made(room), directory(room / "target")
    (target / "file").write_bytes(b"the old one")
    process = begin(up, verb, source, "Server", target)
    until(half_there(target, 10 * MIB), "it is on its way")
    process.send_signal(number)
    code, said = end(process)
    assert code == 128 + number and said == ""
    until(lambda: not parts(target), "it is tidied up", 5)
    assert (target / "file").read_bytes() == b"the old one"


@pytest.mark.parametrize("what", ["grows", "vanishes"])
@pytest.mark.parametrize("verb", ["pull", "push"])
def test_a_file_that_changes_on_the_way_is_an_error(up: World, verb: str, what: str, room: Path) -> None:
    source, target = made(room), directory(room / "target")
    process = begin(up, verb, source, "Server", target)
    until(half_there(target, 10 * MIB), "it is on its way")
    if what == "grows":
        with source.open("ab") as file:
            file.write(b"more")
    else:
        source.unlink()
    code, said = end(process)
    if (verb, what) == ("push", "vanishes"):
        assert code == 0  # it is open here: its name doesn't matter any more
        return
    assert code == 1 and said.count("\n") == 1, said
    assert ("changed meanwhile" if what == "grows" else "No such file") in said
    until(lambda: os.listdir(target) == [], "nothing is left", 5)


def test_a_pull_and_a_flood_both_go_on(up: World, room: Path) -> None:
    source, target = made(room, size=32 * MIB), directory(room / "target")
    up.stage("-1/flood", "yes $(printf %03000d 1) | head -c 60000000")
    until(lambda: len(up.raw("-1/flood")) > MIB, "the flood comes")
    before = (up.logs / "Server" / "-1" / "flood" / "1" / "stdout").stat().st_size
    process = begin(up, "pull", source, "Server", target)
    until(half_there(target, 8 * MIB), "the file comes, too")
    code, said = end(process)
    after = (up.logs / "Server" / "-1" / "flood" / "1" / "stdout").stat().st_size
    assert code == 0, said
    assert same(target / "file", source)
    assert after - before > 4 * MIB
    assert up.complete("-1/flood")["stdout_bytes"] == 60_000_000


def test_two_pulls_at_once_do_not_meet(up: World, room: Path) -> None:
    target = directory(room / "target")
    sources = [made(room, f"f{n}", 32 * MIB) for n in range(3)]
    running = [begin(up, "pull", source, "Server", target) for source in sources]
    assert [end(each)[0] for each in running] == [0, 0, 0]
    assert all(same(target / source.name, source) for source in sources)


# --- what can't be ---


def test_errors_are_one_line_and_name_the_thing(up: World, room: Path) -> None:
    here = directory(room / "here")
    (here / "dir").mkdir()
    (here / "file").touch()
    os.mkfifo(here / "pipe")
    none = "No such file or directory"
    for source, target, words in (
        ("/no/such", here, f"Server:/no/such: {none}"),
        ("-4/nothing", here, f"Server:{up.launch}/-4/nothing: {none}"),
        ("/dev/null", here, "Server:/dev/null: is a device"),
        (here / "pipe", here, "is a named pipe"),
        (here / "file", "/dev/stdout", "cannot pull to /dev/stdout: it replaces a file in one step"),
        (here / "file", room / "no" / "where", f"there is no directory {room}/no"),
        (here / "file", f"{room}/new/", "there is no such directory"),
        (here / "file", "/dev/null", "a device or the like"),
        (here / "file", "/proc/self/nothing", "cannot write /proc/self/nothing"),
        ("/", here, "give the name"),
    ):
        assert words in refused(up, "pull", source, "Server", target)
    for source, target, words in (
        (here / "none", here, none),
        ("/dev/null", here, "neither a file nor a directory"),
        (here / "file", room / "no" / "where", none),
        (here / "file", f"{room}/new/", "there is no such directory"),
        (here / "file", "/dev/null", "a device is there already"),
        (here / "file", "/proc/self", "/proc/"),
        (here / "dir", here / "file", "a file is there already"),
    ):
        assert words in refused(up, "push", source, "Server", target)
    assert "did you mean Server" in refused(up, "pull", here / "file", "Servr", here)
    assert sorted(os.listdir(here)) == ["dir", "file", "pipe"]


def test_vm_offline_and_collector_down(up: World, room: Path) -> None:
    up.stop(up.daemon)
    home = directory(room / "home")
    until(lambda: "Server is offline" in refused(up, "pull", "/etc/passwd", "Server", home), "it is")
    assert "Server is offline" in refused(up, "push", "/etc/passwd", "Server", "/tmp/")
    assert "Server is offline" in refused(up, "stage", "Server", "--at", "-4", "true")
    up.stop(up.collector)
    for arguments in (("pull", "/x", "Server", home), ("push", "/etc/passwd", "Server", "/x")):
        assert "cannot reach the collector" in refused(up, *arguments)
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("verb", ["pull", "push"])
def test_a_full_disk_is_said_and_nothing_is_left(up: World, verb: str, room: Path) -> None:
    small = directory(room / "small")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user can't mount")
    try:
        said = refused(up, verb, made(room, size=8 * MIB), "Server", small)
        assert "No space left on device" in said and f"{small}/file" in said
        until(lambda: list(small.iterdir()) == [], "nothing is left", 5)
    finally:
        subprocess.run(["umount", small], check=True)


# --- staging ---


def tree_of(path: Path, *vmrs: str, body: str = "echo here", mode: int = 0o775) -> Path:
    for vmr in vmrs:
        (path / vmr).mkdir(parents=True, mode=0o775)
        (path / vmr).chmod(0o775)
        script = path / vmr / "call_arguments.sh"
        script.write_text(f'#!/bin/bash\ncd "$(dirname "$0")"\n{body}\n')
        script.chmod(mode)
    return path


def test_a_staged_tree_runs_in_the_order_of_its_times(up: World, room: Path) -> None:
    """Many low times come last in the directory's order, and its files are large: none may be overtaken."""
    vmrs = [f"-{time}/v" for time in range(1, 13)]
    order = room / "order"
    tree = tree_of(room / "tree", *vmrs, body=f'echo "$VMR_NAME" >> "{order}"')
    (tree / "-12" / "v" / "data").write_bytes(os.urandom(8 * MIB))
    (tree / ".hold").touch()
    said = done(up, "stage", "Server", tree).splitlines()
    assert said == [f"-{time}/v is staged on Server" for time in range(12, 0, -1)]
    until(lambda: order.exists() and len(order.read_text().splitlines()) == 12, "all have run")
    assert order.read_text().splitlines() == [f"-{time}/v" for time in range(12, 0, -1)]
    assert sorted(os.listdir(up.launch)) == sorted(f"-{time}" for time in range(1, 13))
    assert up.complete("-1/v")["exit_code"] == 0


def test_one_program_is_staged_as_firewheel_does_it(up: World, room: Path) -> None:
    program = room / "greet.py"
    program.write_text("#!/usr/bin/env python3\nimport sys\nprint(sys.argv[1:])\n")
    assert done(up, "stage", "Server", "--at", "-4", program, "a b", "--name", "-x", "$HOME") == (
        "-4/greet.py is staged on Server\n"
    )
    done(up, "stage", "--at=-3", "--name", "say", "Server", "echo", "-e", "it's")
    assert up.complete("-4/greet.py")["exit_code"] == 0
    assert up.raw("-4/greet.py") == b"['a b', '--name', '-x', '$HOME']\n"
    up.complete("-3/say")
    assert up.raw("-3/say") == b"it's\n"
    where = up.launch / "-4" / "greet.py"
    assert (where / "call_arguments.sh").read_text() == (
        f'#!/bin/bash\nCURRENT_DIR="$(dirname "$0")"\ncd {where}\n'
        f"{where}/greet.py 'a b' --name -x '$HOME'\n"
    )


def test_a_launch_directory_is_made_where_there_is_none(world: World) -> None:
    world.launch.rmdir()
    world.start_collector()
    world.start_daemon()
    online(world)
    world.launch.rmdir() if world.launch.exists() else None
    done(world, "stage", "Server", "--at", "-1", "echo", "first")
    world.complete("-1/echo")


def test_what_would_not_run_is_not_staged(up: World, room: Path) -> None:
    done(up, "stage", "Server", "--at", "5", "true")
    program = room / "call_arguments.sh"
    program.touch()
    for number, (vmrs, spoil, words) in enumerate(
        (
            (["-4/a", "5/true"], None, "5/true: Server has it already (push replaces its files)"),
            (["-4/a", "04/b"], None, "no start time"),
            (["-4/a"], lambda top: (top / "file").touch(), "no start time"),
            (["-4/a"], lambda top: (top / "-4" / "file").touch(), "no VMR's directory"),
            (["-4/a"], lambda top: (top / "-4" / "b").mkdir(), "has no call_arguments.sh"),
            (["-4/a"], lambda top: (top / "-4" / "a" / "call_arguments.sh").chmod(0o644), "chmod +x"),
            ([], lambda top: top.mkdir(), "no VMR in it"),
            ([], None, "No such file"),
        )
    ):
        spoiled: Optional[Callable[[Path], object]] = spoil
        tree = tree_of(room / f"tree{number}", *vmrs)
        if spoiled is not None:
            spoiled(tree)
        assert words in refused(up, "stage", "Server", tree)
    for arguments, words in (
        (["--at", "-4", "no/such"], "no such file"),
        (["--at", "-4", room], "it is no file"),
        (["--at", "0", "true"], "no start time"),
        (["--at", "soon", "true"], "no start time"),
        (["--at", "-4", "--name", "a/b", "true"], "--name"),
        (["--at", "-4", program], "call_arguments.sh"),
        (["--at", "5", "true"], "5/true: Server has it already (--name gives another)"),
        ([room, "more"], "without --at"),
    ):
        assert words in refused(up, "stage", "Server", *arguments)
    assert os.listdir(up.launch) == ["5"]


def test_stage_stopped_half_way_stages_nothing(up: World, room: Path) -> None:
    tree = tree_of(room / "tree", "-4/a", "-10/b")
    made(tree / "-4" / "a")
    process = begin(up, "stage", "Server", tree)
    until(lambda: any(part.is_dir() for part in parts(up.launch)), "it is on its way")
    process.send_signal(signal.SIGINT)
    assert end(process)[0] == 130
    until(lambda: os.listdir(up.launch) == [], "nothing is left", 5)


# --- what people see ---


@pytest.mark.parametrize("rich", [True, False])
def test_on_a_terminal_the_line_moves(up: World, rich: bool, room: Path) -> None:
    source, target = made(room), directory(room / "target")
    environment = dict(up.environment, TERM="xterm", COLUMNS="120")
    if not rich:
        hide = directory(room / "hide")
        (hide / "rich.py").write_text("raise ImportError")
        environment["PYTHONPATH"] = f"{hide}:{environment['PYTHONPATH']}"
    ours, theirs = os.openpty()
    seen: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(ours, 65536):
                seen.append(data)
        except OSError:
            pass

    reader = threading.Thread(target=read)
    reader.start()
    command = [sys.executable, "-m", "vmr_agent.cli.host", "pull", str(source), "Server", str(target)]
    ended = subprocess.run(command, env=environment, stdout=theirs, stderr=theirs, timeout=60)
    os.close(theirs)
    reader.join(20)
    os.close(ours)
    text = b"".join(seen).decode()
    assert ended.returncode == 0, text
    assert "%" in text.partition("100%")[0] and "file  100%  96.0M" in text
    if not rich:
        assert "left" in text
