"""The watcher, on real files, staged the ways people and FIREWHEEL do it.

Where time is made up, a second of it is much longer than a scan takes.
"""

from __future__ import annotations

import errno
import os
import select
import shutil
import stat
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmr_agent.guest import watcher
from vmr_agent.guest.watcher import Watcher
from vmr_agent.schedule import Staging

SETTLE = 1.0
SCRIPT = b"#!/bin/bash\necho hello\n"

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


class Scene:
    """A launch directory, its watcher with made-up time and without events, and what it logged."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log: list[str] = []
        self.now = 1000.0
        self.looks: list[tuple[float, float]] = []
        """When each scan began and ended: what it saw it saw between the two, however slow the machine."""
        self.watcher = Watcher(root, settle=SETTLE, log=self.log.append, events=False)
        self.watcher.start()

    def scan(self, after: float = 0.0, *, full: bool = False) -> None:
        self.now += after
        began = time.monotonic()
        self.watcher.scan(self.now, full=full)
        self.looks.append((self.now, self.now + time.monotonic() - began))

    def saw(self, at: Optional[float], look: int = -1) -> bool:
        """Whether this is the time of a look, of the last one unless said."""
        begin, end = self.looks[look]
        return at is not None and begin <= at <= end

    def settle(self) -> None:
        """Scan as often as a tree that nobody touches can take."""
        self.scan()
        for _ in range(3):
            self.scan(SETTLE + 0.5)

    def staging(self, name: bytes = b"-4/x") -> Optional[Staging]:
        vmr = self.watcher.vmrs.get(name)
        return None if vmr is None else vmr.staging

    def reason(self, name: bytes = b"-4/x") -> str:
        vmr = self.watcher.vmrs[name]
        assert vmr.staging is Staging.REFUSED
        return vmr.reason


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path / "launch")
    yield scene
    scene.watcher.close()


def stage(root: Path, name: str = "-4/x", *, mode: int = 0o755, script: bytes = SCRIPT) -> Path:
    directory = root / name
    directory.mkdir(parents=True)
    (directory / "data").write_bytes(b"data")
    (directory / "call_arguments.sh").write_bytes(script)
    (directory / "call_arguments.sh").chmod(mode)
    return directory


# --- complete or not


def test_staged_as_firewheel_does_it(scene: Scene) -> None:
    """In place, piece by piece, files 0666; the x bit on the script, last of all, is the commit."""
    directory = scene.root / "-4" / "compress.py"
    directory.mkdir(parents=True)
    seen = []

    def look() -> None:
        scene.settle()
        seen.append(scene.staging(b"-4/compress.py"))

    look()
    with (directory / "compress.py").open("wb") as data:
        for _ in range(3):
            data.write(b"x" * 1000)
            data.flush()
            look()
    (directory / "compress.py").chmod(0o777)
    look()
    (directory / "call_arguments.sh").write_bytes(SCRIPT)
    (directory / "call_arguments.sh").chmod(0o666)
    look()
    assert set(seen) == {Staging.STAGING}

    (directory / "call_arguments.sh").chmod(0o777)
    scene.scan()
    assert scene.staging(b"-4/compress.py") is Staging.SETTLING
    scene.scan(SETTLE / 2)
    assert scene.staging(b"-4/compress.py") is Staging.SETTLING
    scene.scan(SETTLE)
    assert scene.staging(b"-4/compress.py") is Staging.READY
    vmr = scene.watcher.vmrs[b"-4/compress.py"]
    info = (directory / "call_arguments.sh").stat()
    assert vmr.script == (info.st_dev, info.st_ino, info.st_ctime_ns)
    assert scene.saw(vmr.committed, -3)


def test_ready_takes_two_looks(scene: Scene) -> None:
    """What lies there complete at the first look may still be being written."""
    stage(scene.root)
    scene.scan()
    assert scene.staging() is Staging.SETTLING
    due = scene.watcher.next_due()
    assert due is not None and scene.saw(due - SETTLE)
    scene.now = due
    assert scene.watcher.due(due)
    scene.scan()
    assert scene.staging() is Staging.READY


def test_a_settled_directory_needs_no_scan(scene: Scene) -> None:
    stage(scene.root)
    scene.settle()
    assert scene.watcher.next_due() is None
    assert not scene.watcher.due(scene.now + 1e6)


def test_a_start_time_that_fails_to_be_looked_at_is_seen_later_and_keeps_nobody_awake(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage(scene.root)
    real = watcher._look_up
    monkeypatch.setattr(watcher, "_look_up", lambda name, at: None if name == b"-4" else real(name, at))
    scene.scan()
    scene.scan(1.0)
    assert not scene.watcher.vmrs and scene.watcher.next_due() is None
    monkeypatch.undo()
    scene.scan(1.0)
    assert b"-4/x" in scene.watcher.vmrs


def test_a_start_time_that_cannot_be_opened_keeps_nobody_awake(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mode forbids it, or the disk fails: nothing of what was due in it can be looked at."""
    stage(scene.root)
    scene.scan()
    assert scene.staging() is Staging.SETTLING
    real = os.open

    def failing(path: Any, *args: Any, **options: Any) -> int:
        if path == b"-4":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", failing)
    due = scene.watcher.next_due()
    while due is not None:
        assert due > scene.now, "what can't be looked at is due for ever"
        scene.now = due
        scene.scan()
        due = scene.watcher.next_due()
    assert scene.staging() is Staging.SETTLING
    monkeypatch.undo()
    scene.scan(30.0, full=True)
    scene.settle()
    assert scene.staging() is Staging.READY


def test_a_launch_directory_that_was_away_is_listed_again(scene: Scene) -> None:
    """What it lies in is moved away and back: it is as it was, to the nanosecond."""
    stage(scene.root)
    scene.settle()
    above = scene.root.parent
    away = above.with_name(f"{above.name} away")
    above.rename(away)
    scene.scan(1.0)
    assert not scene.watcher.vmrs
    away.rename(above)
    scene.scan(1.0)
    assert b"-4/x" in scene.watcher.vmrs


@pytest.mark.parametrize("what", ["grows", "same size", "new file", "deep", "removed", "script"])
def test_a_change_after_the_x_bit_puts_it_off(scene: Scene, what: str) -> None:
    directory = stage(scene.root)
    (directory / "sub" / "sub").mkdir(parents=True)
    scene.scan()
    time.sleep(0.02)  # past the kernel's clock tick
    if what == "grows":
        with (directory / "data").open("ab") as data:
            data.write(b"more")
    elif what == "same size":
        (directory / "data").write_bytes(b"atad")
    elif what == "new file":
        (directory / "more").touch()
    elif what == "deep":
        (directory / "sub" / "sub" / "file").touch()
    elif what == "removed":
        (directory / "data").unlink()
    else:
        (directory / "call_arguments.sh").write_bytes(SCRIPT + b"#")
    scene.scan(SETTLE + 0.5)
    assert scene.staging() is Staging.SETTLING
    changed = scene.watcher.vmrs[b"-4/x"].changed
    assert scene.saw(changed)
    scene.settle()
    assert scene.staging() is Staging.READY


def test_a_tree_written_to_for_ever_is_looked_at_less_and_less_often(scene: Scene) -> None:
    directory = stage(scene.root)
    scene.scan()
    waits = []
    for size in range(10):
        with (directory / "data").open("ab") as data:
            data.write(b"x" * (size + 1))
        before = scene.watcher.vmrs[b"-4/x"].changed
        # Other things fall due too (a directory that is listed once more), and show nothing of the tree.
        while (changed := scene.watcher.vmrs[b"-4/x"].changed) == before:
            due = scene.watcher.next_due()
            assert due is not None
            scene.now = due
            scene.scan()
            assert scene.staging() is Staging.SETTLING
        waits.append(changed - before)
    # A look takes time of its own: on a busy machine more than nothing.
    assert all(later > 0.9 * earlier for earlier, later in zip(waits, waits[1:]))
    assert 10 * SETTLE < waits[-1] < 60 * SETTLE


def test_a_change_to_what_is_ready_is_seen_when_everything_is_looked_at(scene: Scene) -> None:
    directory = stage(scene.root)
    scene.settle()
    scene.watcher.take_changes()
    (directory / "data").write_bytes(b"other data")
    scene.scan(full=True)
    assert scene.staging() is Staging.SETTLING
    assert scene.watcher.take_changes() == ({b"-4/x"}, set())


def test_reading_and_running_changes_nothing(scene: Scene) -> None:
    directory = stage(scene.root)
    scene.settle()
    scene.watcher.take_changes()
    subprocess.run([directory / "call_arguments.sh"], check=True, stdout=subprocess.DEVNULL)
    scene.scan(100, full=True)
    assert scene.staging() is Staging.READY
    assert scene.watcher.take_changes() == (set(), set())


def test_the_x_bit_taken_away_again(scene: Scene) -> None:
    directory = stage(scene.root)
    scene.settle()
    (directory / "call_arguments.sh").chmod(0o644)
    scene.scan(full=True)
    assert scene.staging() is Staging.STAGING
    assert scene.watcher.vmrs[b"-4/x"].committed is None


def test_without_x_bit_changes_are_told_all_the_same(scene: Scene) -> None:
    """The schedule waits for a tree to be quiet before the VM is configured."""
    directory = stage(scene.root, mode=0o644)
    scene.scan()
    scene.scan(5)
    assert scene.saw(scene.watcher.vmrs[b"-4/x"].changed, 0)
    (directory / "data").write_bytes(b"more data")
    scene.scan(5)
    assert scene.saw(scene.watcher.vmrs[b"-4/x"].changed)


# --- ways to stage


def test_a_tree_moved_in(scene: Scene) -> None:
    scene.scan()
    stage(scene.root.parent / "beside", "-7/moved")
    (scene.root.parent / "beside" / "-7").rename(scene.root / "-7")
    scene.settle()
    assert scene.staging(b"-7/moved") is Staging.READY


def test_copied_with_cp(scene: Scene, tmp_path: Path) -> None:
    stage(tmp_path / "src")
    subprocess.run(["cp", "-a", f"{tmp_path}/src/.", scene.root], check=True)
    scene.settle()
    assert scene.staging() is Staging.READY


def test_unpacked_from_tar(scene: Scene, tmp_path: Path) -> None:
    stage(tmp_path / "src")
    with tarfile.open(tmp_path / "src.tar", "w") as archive:
        archive.add(tmp_path / "src" / "-4", "-4")
    subprocess.run(["tar", "-x", "-f", tmp_path / "src.tar", "-C", scene.root], check=True)
    scene.settle()
    assert scene.staging() is Staging.READY


@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync isn't installed")
def test_copied_with_rsync_under_hold(scene: Scene, tmp_path: Path) -> None:
    (scene.root / ".hold").touch()
    stage(tmp_path / "src")
    subprocess.run(["rsync", "-a", f"{tmp_path}/src/", scene.root], check=True)
    scene.settle()
    assert scene.watcher.held
    assert scene.staging() is Staging.READY
    (scene.root / ".hold").unlink()
    scene.scan()
    assert not scene.watcher.held


def test_a_launch_directory_that_others_may_change_is_not_looked_at_without_end(scene: Scene) -> None:
    """What was due when that was seen stayed due, and the daemon's loop never slept."""
    (scene.root / "-4").mkdir()
    scene.scan()
    assert scene.watcher.next_due() is not None
    scene.root.chmod(0o777)
    scene.scan(1.0)
    assert scene.watcher.problem and scene.watcher.next_due() is None
    scene.root.chmod(0o755)
    stage(scene.root)
    scene.settle()
    assert scene.staging() is Staging.READY


def test_hold_may_be_anything(scene: Scene) -> None:
    (scene.root / ".hold").symlink_to("nowhere")
    scene.scan()
    assert scene.watcher.held


# --- names


@pytest.mark.parametrize(
    "name",
    [b"-4/a b", b"-4/new\nline", b"-4/\xff\xfe", b"-4/_1", b"10.5/x", b"-100000/mv", b"1/" + b"n" * 255]
    + [b"2.2250738585072014e-308/x", b"-4/-4", b"-4/call_arguments.sh", b"-4/%2E"],
)
def test_odd_names(scene: Scene, name: bytes) -> None:
    directory = os.path.join(os.fsencode(scene.root), name)
    os.makedirs(directory)
    script = os.path.join(directory, b"call_arguments.sh")
    with open(script, "wb") as file:  # noqa: PTH123
        file.write(SCRIPT)
    os.chmod(script, 0o755)
    scene.settle()
    assert list(scene.watcher.vmrs) == [name]
    assert scene.staging(name) is Staging.READY
    assert scene.log == []


@pytest.mark.parametrize("name", ["0", "1e999", "nan", "abc", "-04", "1_0", "lost+found"])
def test_what_is_no_start_time_is_named_once(scene: Scene, name: str) -> None:
    stage(scene.root, f"{name}/x")
    for _ in range(3):
        scene.scan(full=True)
    assert len(scene.log) == 1 and f"/{name}" in scene.log[0]
    assert not scene.watcher.vmrs


def test_a_name_in_the_log_can_not_forge_a_line(scene: Scene) -> None:
    (scene.root / "a\nb\x1b[31m").mkdir()
    scene.scan()
    assert "\n" not in scene.log[0] and "\x1b" not in scene.log[0]


def test_dot_names_are_passed_over(scene: Scene) -> None:
    stage(scene.root, ".cache/x")
    stage(scene.root, "-4/.x")
    scene.settle()
    assert not scene.watcher.vmrs and not scene.log


def test_a_file_where_a_directory_belongs_is_named_once(scene: Scene) -> None:
    (scene.root / "-5").touch()
    stage(scene.root)
    (scene.root / "-4" / "notes").touch()
    for _ in range(3):
        scene.scan(full=True)
    assert sorted(scene.log) == [
        f"cannot use {scene.root}/-4/notes: it is not a directory",
        f"cannot use {scene.root}/-5: it is not a directory",
    ]
    (scene.root / "-5").unlink()
    stage(scene.root, "-5/x")
    scene.settle()
    assert scene.staging(b"-5/x") is Staging.READY


# --- whom to trust


def test_a_script_others_may_write_to_is_mended(scene: Scene) -> None:
    directory = stage(scene.root, mode=0o4777)
    scene.scan()
    assert scene.staging() is Staging.SETTLING
    assert stat.S_IMODE((directory / "call_arguments.sh").stat().st_mode) == 0o4755
    assert stat.S_IMODE((directory / "data").stat().st_mode) & 0o200
    scene.settle()
    assert scene.staging() is Staging.READY


def test_mending_waits_for_the_x_bit(scene: Scene) -> None:
    directory = stage(scene.root, mode=0o666)
    scene.settle()
    assert stat.S_IMODE((directory / "call_arguments.sh").stat().st_mode) == 0o666


def test_a_script_opened_up_when_ready_is_mended_again(scene: Scene) -> None:
    directory = stage(scene.root)
    scene.settle()
    (directory / "call_arguments.sh").chmod(0o775)
    scene.scan(full=True)
    assert scene.staging() is Staging.SETTLING
    assert stat.S_IMODE((directory / "call_arguments.sh").stat().st_mode) == 0o755


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
@pytest.mark.parametrize("level", ["-4", "-4/x"])
def test_a_directory_others_may_write_to_is_refused(scene: Scene, level: str, mode: int) -> None:
    stage(scene.root)
    (scene.root / level).chmod(mode)
    scene.settle()
    assert f"can be written to by others (mode {mode:04o})" in scene.reason()
    (scene.root / level).chmod(0o755)
    scene.scan()
    assert scene.staging() is Staging.SETTLING
    scene.settle()
    assert scene.staging() is Staging.READY
    (scene.root / level).chmod(mode)
    scene.scan(full=True)
    assert scene.staging() is Staging.REFUSED


@as_root
@pytest.mark.parametrize("level", ["-4", "-4/x", "-4/x/call_arguments.sh"])
def test_what_belongs_to_somebody_else_is_refused(scene: Scene, level: str) -> None:
    stage(scene.root)
    os.chown(scene.root / level, 4242, 4242)
    scene.settle()
    assert "belongs to user 4242" in scene.reason()
    os.chown(scene.root / level, 0, 0)
    scene.settle()
    assert scene.staging() is Staging.READY


@as_root
def test_somebody_elses_script_is_not_mended(scene: Scene) -> None:
    directory = stage(scene.root, mode=0o777)
    os.chown(directory / "call_arguments.sh", 4242, 4242)
    scene.settle()
    assert stat.S_IMODE((directory / "call_arguments.sh").stat().st_mode) == 0o777


@as_root
def test_data_may_belong_to_anybody(scene: Scene) -> None:
    directory = stage(scene.root)
    os.chown(directory / "data", 4242, 4242)
    scene.settle()
    assert scene.staging() is Staging.READY


def test_a_linked_vmr_directory_is_refused(scene: Scene, tmp_path: Path) -> None:
    target = stage(tmp_path / "elsewhere")
    (scene.root / "-4").mkdir()
    (scene.root / "-4" / "x").symlink_to(target)
    scene.settle()
    assert scene.reason() == "its directory is a link"


def test_a_linked_script_is_refused_and_its_target_left_alone(scene: Scene, tmp_path: Path) -> None:
    directory = stage(scene.root)
    target = tmp_path / "target"
    target.write_bytes(SCRIPT)
    target.chmod(0o777)
    (directory / "call_arguments.sh").unlink()
    (directory / "call_arguments.sh").symlink_to(target)
    scene.settle()
    assert scene.reason() == "call_arguments.sh is a link"
    assert stat.S_IMODE(target.stat().st_mode) == 0o777


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_script_that_is_no_file_is_refused(scene: Scene, make: Callable[[Path], None]) -> None:
    directory = stage(scene.root)
    (directory / "call_arguments.sh").unlink()
    make(directory / "call_arguments.sh")
    scene.settle()
    assert scene.reason() == "call_arguments.sh is not a regular file"


def test_a_linked_start_time_is_named_once(scene: Scene, tmp_path: Path) -> None:
    stage(tmp_path / "elsewhere")
    (scene.root / "-4").symlink_to(tmp_path / "elsewhere" / "-4")
    scene.scan()
    scene.scan(full=True)
    assert not scene.watcher.vmrs
    assert scene.log == [f"cannot use {scene.root}/-4: it is a link"]


def test_links_inside_a_vmr_are_its_own_business(scene: Scene) -> None:
    directory = stage(scene.root)
    (directory / "nowhere").symlink_to("nowhere")
    (directory / "loop").symlink_to(directory)
    scene.settle()
    assert scene.staging() is Staging.READY


# --- the launch directory itself


def test_the_launch_directory_is_made(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "var" / "launch")
    assert stat.S_IMODE(scene.root.stat().st_mode) & 0o777 == 0o755
    scene.scan()
    assert scene.watcher.problem is None


def test_no_launch_directory(scene: Scene) -> None:
    stage(scene.root)
    scene.settle()
    shutil.rmtree(scene.root)
    scene.scan()
    assert scene.watcher.problem == f"cannot use {scene.root}: it does not exist"
    assert not scene.watcher.vmrs
    assert scene.watcher.take_changes()[1] == {b"-4/x"}
    stage(scene.root)
    scene.settle()
    assert scene.watcher.problem is None
    assert scene.staging() is Staging.READY


def test_the_launch_directory_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "launch").touch()
    scene = Scene(tmp_path / "launch")
    scene.scan()
    assert scene.watcher.problem == f"cannot use {scene.root}: it is not a directory"
    scene.root.unlink()
    stage(scene.root)
    scene.settle()
    assert scene.watcher.problem is None
    assert scene.staging() is Staging.READY


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
def test_others_may_write_to_the_launch_directory(scene: Scene, mode: int) -> None:
    """Sticky or not: anybody could stage in it."""
    stage(scene.root)
    scene.settle()
    scene.root.chmod(mode)
    scene.scan()
    assert (
        scene.watcher.problem == f"cannot use {scene.root}: it can be written to by others (mode {mode:04o})"
    )
    assert scene.reason() == scene.watcher.problem
    stage(scene.root, "-9/new")
    scene.settle()
    assert Staging.READY not in {vmr.staging for vmr in scene.watcher.vmrs.values()}
    scene.root.chmod(0o755)
    scene.settle()
    assert scene.watcher.problem is None
    assert {vmr.staging for vmr in scene.watcher.vmrs.values()} == {Staging.READY}
    assert scene.watcher.take_changes()[1] == set()


def test_others_may_write_to_a_parent(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "open" / "var" / "launch")
    stage(scene.root)
    (tmp_path / "open").chmod(0o777)
    scene.settle()
    assert scene.watcher.problem is not None
    assert f"{tmp_path}/open can be written to by others" in scene.watcher.problem
    (tmp_path / "open").chmod(0o1777)
    scene.settle()
    assert scene.watcher.problem is None, "the sticky bit keeps others from replacing what is there"
    assert scene.staging() is Staging.READY


def test_the_launch_directory_may_be_a_link(tmp_path: Path) -> None:
    stage(tmp_path / "data" / "launch")
    (tmp_path / "up").symlink_to("data/../data")
    (tmp_path / "launch").symlink_to("up/launch/")
    scene = Scene(tmp_path / "launch")
    scene.settle()
    assert scene.watcher.problem is None
    assert scene.staging() is Staging.READY
    (tmp_path / "data").chmod(0o777)
    scene.scan()
    assert scene.watcher.problem is not None and f"{tmp_path}/data " in scene.watcher.problem


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "launch").symlink_to("launch")
    scene = Scene(tmp_path / "launch")
    scene.scan()
    assert scene.watcher.problem is not None


@as_root
def test_somebody_elses_link_leads_nowhere(tmp_path: Path) -> None:
    stage(tmp_path / "data")
    (tmp_path / "launch").symlink_to("data")
    os.chown(tmp_path / "launch", 4242, 4242, follow_symlinks=False)
    scene = Scene(tmp_path / "launch")
    scene.settle()
    assert scene.watcher.problem is not None and "belongs to user 4242" in scene.watcher.problem


# --- gone, new, done


def test_gone(scene: Scene) -> None:
    directory = stage(scene.root)
    stage(scene.root, "-4/y")
    scene.settle()
    assert scene.watcher.take_changes() == ({b"-4/x", b"-4/y"}, set())
    shutil.rmtree(directory)
    scene.settle()
    assert scene.watcher.take_changes() == (set(), {b"-4/x"})
    shutil.rmtree(scene.root / "-4")
    scene.scan()
    assert scene.watcher.take_changes() == (set(), {b"-4/y"})
    assert not scene.watcher.vmrs


def test_moved_away_and_back(scene: Scene) -> None:
    directory = stage(scene.root)
    scene.settle()
    before = scene.watcher.vmrs[b"-4/x"].script
    scene.watcher.done(b"-4/x")
    directory.rename(scene.root.parent / "away")
    scene.settle()
    (scene.root.parent / "away").rename(directory)
    scene.settle()
    assert scene.watcher.take_changes() == ({b"-4/x"}, {b"-4/x"})
    assert scene.watcher.vmrs[b"-4/x"].script == before


def test_replaced_between_two_scans(scene: Scene) -> None:
    """Never seen missing, yet another: the directory has another inode."""
    stage(scene.root.parent / "beside")
    directory = stage(scene.root)
    scene.settle()
    scene.watcher.done(b"-4/x")
    scene.watcher.take_changes()
    directory.rename(scene.root.parent / "away")
    (scene.root.parent / "beside" / "-4" / "x").rename(directory)
    scene.settle()
    assert scene.watcher.take_changes() == ({b"-4/x"}, {b"-4/x"})
    assert scene.staging() is Staging.READY


def test_done_what_it_writes_beside_itself_means_nothing(scene: Scene) -> None:
    directory = stage(scene.root)
    scene.settle()
    scene.watcher.done(b"-4/x")
    scene.watcher.take_changes()
    (directory / "result").write_bytes(b"42")
    scene.scan(100, full=True)
    assert scene.watcher.take_changes() == (set(), set())
    assert scene.watcher.next_due() is None


def test_done_and_edited(scene: Scene) -> None:
    """Its script's identity must be the present one: it is recorded with the next attempt."""
    directory = stage(scene.root)
    scene.settle()
    before = scene.watcher.vmrs[b"-4/x"].script
    scene.watcher.done(b"-4/x")
    time.sleep(0.02)
    (directory / "call_arguments.sh").write_bytes(SCRIPT + b"#")
    scene.scan(100, full=True)
    scene.settle()
    assert scene.staging() is Staging.READY
    assert scene.watcher.vmrs[b"-4/x"].script != before
    assert scene.watcher.take_changes() == ({b"-4/x"}, set())


def test_done_of_what_is_not_there_is_nothing(scene: Scene) -> None:
    scene.watcher.done(b"-4/x")
    scene.watcher.done(b"nonsense")


def test_vanishing_under_the_scan(scene: Scene) -> None:
    """Trees come and go, the launch directory too, while it is looked at."""
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            for start_time in ("-3", "-2", "-1"):
                shutil.rmtree(scene.root, ignore_errors=True)
                for name in ("a", "b", "c"):
                    try:
                        stage(scene.root, f"{start_time}/{name}/deep/deeper")
                        stage(scene.root, f"{start_time}/{name}_1")
                    except OSError:
                        pass

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(300):
            scene.scan(0.1, full=True)
            scene.scan(0.1)
    finally:
        stop.set()
        thread.join()
    shutil.rmtree(scene.root, ignore_errors=True)
    stage(scene.root)
    scene.settle()
    assert dict(scene.watcher.vmrs).keys() == {b"-4/x"}
    assert scene.staging() is Staging.READY


# --- any order of events against what lies there in the end

STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["stage", "x", "no x", "write", "remove", "away", "back", "link", "open", "close", "scan", "full"]
        ),
        st.sampled_from(["-4/x", "-4/y", "7/x"]),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_in_the_end_it_says_what_lies_there(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str]]
) -> None:
    base = tmp_path_factory.mktemp("any")
    scene = Scene(base / "launch")
    try:
        for step, name in steps:
            directory, script = scene.root / name, scene.root / name / "call_arguments.sh"
            away = base / name.replace("/", "~")
            try:
                if step == "stage":
                    stage(scene.root, name, mode=0o644)
                elif step in ("x", "no x"):
                    script.chmod(0o777 if step == "x" else 0o644)
                elif step == "write":
                    (directory / "data").write_bytes(os.urandom(8))
                elif step == "remove":
                    shutil.rmtree(directory)
                elif step == "away":
                    directory.rename(away)
                elif step == "back":
                    away.rename(directory)
                elif step == "link":
                    script.unlink()
                    script.symlink_to("data")
                elif step in ("open", "close"):
                    directory.chmod(0o777 if step == "open" else 0o755)
                else:
                    scene.scan(0.3, full=step == "full")
            except OSError:
                pass
        scene.scan(full=True)
        for _ in range(8):
            scene.scan(40 * SETTLE)
        seen = {name: vmr.staging for name, vmr in scene.watcher.vmrs.items()}
        assert seen == {os.fsencode(f"{d.parent.name}/{d.name}"): truth(d) for d in scene.root.glob("*/*")}
        assert scene.watcher.next_due() is None
    finally:
        scene.watcher.close()
        shutil.rmtree(base)


def truth(directory: Path) -> Staging:
    script = directory / "call_arguments.sh"
    if directory.stat().st_mode & 0o022 or script.is_symlink():
        return Staging.REFUSED
    return Staging.READY if script.exists() and script.stat().st_mode & 0o100 else Staging.STAGING


# --- events


class Live:
    """A watcher with events and real time, scanned when it says so, as the daemon does."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log: list[str] = []
        self.gone: set[bytes] = set()
        self.scans = 0
        self.watcher = Watcher(root, log=self.log.append)
        self.watcher.start()
        self.scan()

    def scan(self) -> None:
        self.scans += 1
        self.watcher.scan(boottime())
        self.gone |= self.watcher.take_changes()[1]

    def until(self, happened: Callable[[], bool]) -> None:
        """Scan on events and when due, never on a tick, until it happens."""
        deadline = time.monotonic() + 20
        while not happened():
            due = self.watcher.next_due()
            wait = deadline - time.monotonic()
            assert wait > 0, "no event told of it"
            if due is not None:
                wait = min(wait, max(0.0, due - boottime()))
            if select.select([self.watcher], [], [], wait)[0]:
                self.watcher.hush()
            if self.watcher.due(boottime()):
                self.scan()

    def is_ready(self, name: bytes = b"-4/x") -> bool:
        vmr = self.watcher.vmrs.get(name)
        return vmr is not None and vmr.staging is Staging.READY

    def quiet(self) -> None:
        """Until no event has come in for a while; they come from another thread."""
        while select.select([self.watcher], [], [], 0.7)[0] or self.watcher.next_due() is not None:
            self.scan()


def boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    live = Live(tmp_path / "launch")
    yield live
    live.watcher.close()


def test_an_event_tells_of_each_step(live: Live) -> None:
    directory = live.root / "-4" / "x"
    directory.mkdir(parents=True)
    live.until(lambda: b"-4/x" in live.watcher.vmrs)
    (directory / "call_arguments.sh").write_bytes(SCRIPT)
    live.until(lambda: live.watcher.vmrs[b"-4/x"].script is not None)
    live.quiet()
    (directory / "call_arguments.sh").chmod(0o777)
    live.until(live.is_ready)


def test_an_event_tells_of_names_that_are_no_text(live: Live) -> None:
    directory = os.path.join(os.fsencode(live.root), b"-4", b"\xff\n")
    os.makedirs(directory)
    script = os.path.join(directory, b"call_arguments.sh")
    Path(os.fsdecode(script)).write_bytes(SCRIPT)
    os.chmod(script, 0o755)
    live.until(lambda: live.is_ready(b"-4/\xff\n"))
    live.quiet()
    Path(os.fsdecode(script)).write_bytes(SCRIPT + b"#")
    live.until(lambda: not live.is_ready(b"-4/\xff\n"))


def test_an_event_tells_of_a_tree_moved_in(live: Live) -> None:
    stage(live.root.parent / "beside", "-7/moved")
    (live.root.parent / "beside" / "-7").rename(live.root / "-7")
    live.until(lambda: live.is_ready(b"-7/moved"))


def test_an_event_tells_of_a_change_to_what_is_ready(live: Live) -> None:
    directory = stage(live.root)
    live.until(live.is_ready)
    live.quiet()
    (directory / "data").write_bytes(b"other data")
    live.until(lambda: not live.is_ready())
    live.until(live.is_ready)


def test_an_event_tells_of_the_hold(live: Live) -> None:
    (live.root / ".hold").touch()
    live.until(lambda: live.watcher.held)
    (live.root / ".hold").unlink()
    live.until(lambda: not live.watcher.held)


def test_what_is_heard_of_what_settles_in_a_moment_waits_for_that(live: Live) -> None:
    """One look for both: events come several at a time, and the last of them just before the first has settled."""
    directory = stage(live.root, mode=0o644)
    live.until(lambda: b"-4/x" in live.watcher.vmrs)
    live.quiet()
    (directory / "call_arguments.sh").chmod(0o755)
    live.until(lambda: live.watcher.settling)
    due = live.watcher.next_due()
    assert due is not None
    for _ in range(2):
        (directory / "data").write_bytes(b"other data")
        heard = select.select([live.watcher], [], [], 20)[0]
        while heard:  # each time, for it may be of another; and one change is told of in pieces
            live.watcher.hush()
            heard = select.select([live.watcher], [], [], 0.5)[0]
        assert not live.watcher.due(due - 0.01), "looked at what had not settled"
        assert live.watcher.due(due - 1) and live.watcher.due(due) and live.watcher.next_due() == due
    stage(live.root, "-4/other")
    while not live.watcher.due(due - 0.01):
        assert select.select([live.watcher], [], [], 20)[0], "another has a time of its own"
        live.watcher.hush()
    live.until(lambda: live.is_ready() and live.is_ready(b"-4/other"))
    live.quiet()
    stage(live.root, "-3/third")
    live.until(lambda: live.is_ready(b"-3/third"))


def test_scans_make_no_events_of_their_own(live: Live) -> None:
    """Newer versions of watchdog tell of files and directories opened and closed."""
    directory = stage(live.root)
    (directory / "sub").mkdir()
    live.until(live.is_ready)
    live.quiet()
    for _ in range(5):
        live.watcher.scan(boottime(), full=True)
    assert select.select([live.watcher], [], [], 0.5)[0] == []
    assert not live.watcher.due(boottime())


def test_a_run_that_writes_beside_itself_wakes_nobody(live: Live) -> None:
    directory = stage(live.root)
    live.until(live.is_ready)
    live.watcher.done(b"-4/x")
    live.quiet()
    (directory / "result").write_bytes(b"42")
    (directory / "sub").mkdir()
    assert select.select([live.watcher], [], [], 0.5)[0] == []


def test_who_observes_a_vmr_hears_of_each_change_in_it(live: Live) -> None:
    directory = stage(live.root)
    stage(live.root, "-4/other")
    live.until(live.is_ready)
    for name in (b"-4/x", b"-4/other"):
        live.watcher.done(name)
    live.watcher.observe([b"-4/x"])
    live.quiet()
    live.watcher.take_stirred()
    (directory / "data").write_bytes(b"edited")
    live.until(lambda: live.watcher.take_stirred() == {b"-4/x"})
    (directory / "new").write_bytes(b"edited")
    (directory / "new").rename(directory / "data")
    live.until(lambda: live.watcher.take_stirred() == {b"-4/x"})
    live.watcher.observe([])
    live.quiet()
    (directory / "data").write_bytes(b"again")
    assert select.select([live.watcher], [], [], 0.5)[0] == []


def test_removed_and_made_again_at_once(live: Live) -> None:
    """How people stage anew. The inode is often the same, and no scan need have seen it missing."""
    directory = stage(live.root)
    live.until(live.is_ready)
    before = live.watcher.vmrs[b"-4/x"].script
    live.watcher.done(b"-4/x")
    live.quiet()
    shutil.rmtree(directory)
    stage(live.root)
    live.until(lambda: b"-4/x" in live.gone)
    live.until(live.is_ready)
    assert live.watcher.vmrs[b"-4/x"].script != before


def test_the_launch_directory_removed_and_made_again(live: Live) -> None:
    """A VMR of FIREWHEEL's removes it; its helpers make it again."""
    stage(live.root)
    live.until(live.is_ready)
    shutil.rmtree(live.root)
    live.until(lambda: live.gone == {b"-4/x"})
    live.scan()
    assert live.watcher.alive(), "there is nothing to listen to, which is as it should be"
    stage(live.root, "-3/y")
    live.scan()  # the tick: nobody can listen to what isn't there
    live.until(lambda: live.is_ready(b"-3/y"))
    live.quiet()
    stage(live.root, "-2/z")
    live.until(lambda: live.is_ready(b"-2/z"))
    assert live.watcher.alive()


def test_another_launch_directory_moved_into_its_place(live: Live) -> None:
    stage(live.root)
    live.until(live.is_ready)
    stage(live.root.parent / "other", "-3/y")
    live.root.rename(live.root.parent / "old")
    (live.root.parent / "other").rename(live.root)
    live.scan()
    live.until(lambda: live.is_ready(b"-3/y"))
    assert live.gone == {b"-4/x"}
    stage(live.root, "-2/z")
    live.until(lambda: live.is_ready(b"-2/z"))


def test_events_begin_again_when_their_thread_has_died(live: Live) -> None:
    live.quiet()
    for thread in threading.enumerate():
        if type(thread).__name__ == "InotifyEmitter":
            thread.stop()  # type: ignore[attr-defined]
            thread.join(10)
    assert not live.watcher.alive()
    live.watcher.scan(boottime() + 60)
    assert live.watcher.alive()
    stage(live.root)
    live.until(live.is_ready)


def test_without_watchdog_the_scan_does_it_all(tmp_path: Path) -> None:
    (tmp_path / "broken" / "watchdog").mkdir(parents=True)
    (tmp_path / "broken" / "watchdog" / "__init__.py").write_text("raise ImportError('not today')\n")
    stage(tmp_path / "launch")
    program = textwrap.dedent("""
        import sys
        from vmr_agent.guest.watcher import Watcher
        log = []
        watcher = Watcher(sys.argv[1], settle=1.0, log=log.append)
        watcher.start()
        for now in (100.0, 102.0, 200.0):
            watcher.scan(now)
        assert [vmr.staging.value for vmr in watcher.vmrs.values()] == ["ready"]
        assert len(log) == 1 and "not today" in log[0], log
        assert watcher.alive()
        watcher.close()
    """)
    agent = Path(__file__).parents[2] / "agent"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}/broken:{agent}"}
    subprocess.run([sys.executable, "-c", program, tmp_path / "launch"], check=True, env=environment)


def test_closing_twice_does_no_harm(tmp_path: Path) -> None:
    watcher = Watcher(tmp_path / "launch", log=lambda _: None)
    watcher.start()
    watcher.close()
    watcher.close()


def test_verbs_do_not_pay_for_watchdog() -> None:
    program = "import sys, vmr_agent.guest.watcher; assert 'watchdog' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "agent")}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
