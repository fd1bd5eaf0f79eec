"""What is kept of a VMR's files: what differs, what costs nothing, what is left alone."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Optional

import pytest

from vmr_agent.guest import keepsakes
from vmr_agent.guest.keepsakes import Snapshot, changes, edited, kept

ME = frozenset({os.geteuid()})
MIB = 1 << 20


class Vmr:
    """A VMR's directory and the run directories of its attempts."""

    def __init__(self, base: Path) -> None:
        self.path = base / "compress.py"
        self.path.mkdir()
        self.runs = base / "runs"
        self.runs.mkdir()

    def write(self, name: str, data: bytes = b"data\n") -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def keep(
        self, attempt: int, *, each: int = MIB, room: int = 100 * MIB, trusted: frozenset[int] = ME
    ) -> Path:
        run = self.runs / str(attempt)
        run.mkdir()
        earlier: Optional[Path] = self.runs / str(attempt - 1)
        if earlier is not None and not earlier.exists():
            earlier = None
        keepsakes.keep(run, os.fsencode(self.path), previous=earlier, each=each, room=room, trusted=trusted)
        return run

    def now(self) -> Snapshot:
        return keepsakes.now(os.fsencode(self.path))


@pytest.fixture
def vmr(tmp_path: Path) -> Vmr:
    return Vmr(tmp_path)


def snapshot(run: Path) -> Snapshot:
    found = kept(run)
    assert found is not None
    return found


def differing(before: Snapshot, after: Snapshot) -> list[bytes]:
    return [change.path for change in changes(before, after)]


def save_by_rename(path: Path, data: bytes) -> None:
    beside = path.with_name(path.name + "~new")
    beside.write_bytes(data)
    beside.chmod(path.stat().st_mode & 0o7777)
    beside.rename(path)


def test_an_edit_in_place_a_rename_a_removal_and_a_new_file_are_seen(vmr: Vmr) -> None:
    for name in ("same", "edited", "renamed", "removed", "sub/deep"):
        vmr.write(name)
    run = vmr.keep(1)
    vmr.write("edited", b"DATA\n")  # the same size
    save_by_rename(vmr.path / "renamed", b"longer data\n")
    (vmr.path / "removed").unlink()
    vmr.write("sub/new")
    assert differing(snapshot(run), vmr.now()) == [b"edited", b"removed", b"renamed", b"sub/new"]
    assert edited(snapshot(run), vmr.now()) == [b"edited", b"removed", b"renamed"]
    assert snapshot(run).read(b"edited", MIB) == b"data\n"
    assert vmr.now().read(b"edited", MIB) == b"DATA\n"


def test_touched_or_written_anew_with_the_same_content_is_no_change(vmr: Vmr) -> None:
    touched, rewritten = vmr.write("touched"), vmr.write("rewritten")
    run = vmr.keep(1)
    os.utime(touched, (1, 1))
    save_by_rename(rewritten, b"data\n")
    assert differing(snapshot(run), vmr.now()) == []


def test_a_mode_and_a_links_target_are_changes(vmr: Vmr) -> None:
    script = vmr.write("script")
    (vmr.path / "link").symlink_to("script")
    run = vmr.keep(1)
    script.chmod(0o755)
    (vmr.path / "link").unlink()
    (vmr.path / "link").symlink_to("/etc/passwd")
    assert differing(snapshot(run), vmr.now()) == [b"link", b"script"]
    assert snapshot(run).read(b"link", MIB) is None and vmr.now().read(b"link", MIB) is None


def test_unchanged_files_cost_nothing_and_edits_leave_the_copy_alone(vmr: Vmr) -> None:
    vmr.write("same")
    vmr.write("edited")
    time.sleep(0.1)
    first = vmr.keep(1)
    vmr.write("edited", b"other\n")
    second = vmr.keep(2)
    one, two = snapshot(first).files, snapshot(second).files
    same = os.stat(first / "files" / one[b"same"].kept)
    assert os.path.samestat(same, os.stat(second / "files" / two[b"same"].kept)) and same.st_nlink == 2
    assert snapshot(first).read(b"edited", MIB) == b"data\n"
    assert snapshot(second).read(b"edited", MIB) == b"other\n"
    assert differing(snapshot(first), snapshot(second)) == [b"edited"]


def test_what_is_long_or_too_many_or_not_ours_is_noted_without_content(vmr: Vmr) -> None:
    vmr.write("long", b"x" * 2000)
    for number in range(keepsakes.MAX_KEPT + 5):
        vmr.write(f"many/{number}")
    run = vmr.keep(1, each=1000)
    files = snapshot(run).files
    assert len(files) == keepsakes.MAX_KEPT + 6
    assert sum(bool(file.kept) for file in files.values()) == keepsakes.MAX_KEPT
    assert files[b"long"].kept == "" and files[b"long"].size == 2000
    vmr.write("long", b"y" * 2000)
    assert differing(snapshot(run), vmr.now()) == [b"long"]
    other = vmr.keep(9, trusted=frozenset({os.geteuid() + 1}))
    assert not any(file.kept for file in snapshot(other).files.values())


def test_no_room_and_the_setting_0_keep_no_content(vmr: Vmr) -> None:
    vmr.write("a")
    vmr.write("empty", b"")
    assert [file.kept for file in snapshot(vmr.keep(1, each=0)).files.values()] == ["", ""]
    assert snapshot(vmr.keep(3, room=-5)).files[b"a"].kept == ""
    assert edited(snapshot(vmr.runs / "1"), vmr.now()) == []


def test_links_fifos_and_devices_are_never_opened(vmr: Vmr, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (vmr.path / "link").symlink_to(secret)
    (vmr.path / "directory").symlink_to(tmp_path)
    os.mkfifo(vmr.path / "fifo")
    run = vmr.keep(1)
    files = snapshot(run).files
    assert set(files) == {b"link", b"directory", b"fifo"}
    assert not (run / "files").exists()
    assert files[b"link"].target == str(secret)


def test_names_of_any_bytes(vmr: Vmr) -> None:
    name = b"odd \n\xff"
    Path(os.fsdecode(os.path.join(os.fsencode(vmr.path), name))).write_bytes(b"one")
    run = vmr.keep(1)
    assert snapshot(run).read(name, MIB) == b"one"


def test_a_torn_note_or_none_is_none(vmr: Vmr) -> None:
    vmr.write("a")
    run = vmr.keep(1)
    text = (run / "files.json").read_bytes()
    for cut in (0, 1, len(text) // 2, len(text) - 2):
        (run / "files.json").write_bytes(text[:cut])
        assert kept(run) is None
    (run / "files.json").write_bytes(b'{"at_ns": 1, "files": {"a": [1]}}')
    assert kept(run) is None
    (run / "files.json").unlink()
    assert kept(run) is None


def test_a_tree_of_thousands_of_files_is_cut(vmr: Vmr) -> None:
    for directory in range(3):
        (vmr.path / str(directory)).mkdir()
        for number in range(500):
            (vmr.path / str(directory) / str(number)).touch()
    assert len(vmr.now().files) == keepsakes.MAX_SURVEYED


def test_what_can_not_be_kept_whole_leaves_nothing(vmr: Vmr) -> None:
    vmr.write("a")
    run = vmr.runs / "1"
    run.mkdir()
    (run / "files.json").mkdir()
    with pytest.raises(OSError):
        keepsakes.keep(run, os.fsencode(vmr.path), previous=None, each=MIB, room=MIB, trusted=ME)
    assert not (run / "files").exists()


def test_files_that_can_not_be_read_do_not_keep_others_from_being_kept(
    vmr: Vmr, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that vanishes between the look and the copy."""
    vmr.write("gone", b"1")
    vmr.write("there", b"22")
    present = vmr.now()
    (vmr.path / "gone").unlink()
    monkeypatch.setattr(keepsakes, "now", lambda _: present)
    run = vmr.keep(1)
    assert [bool(file.kept) for _, file in sorted(snapshot(run).files.items())] == [False, True]


def test_what_is_too_long_to_be_kept_is_not_read(vmr: Vmr) -> None:
    """A script that touches its 300 MiB of data had the daemon read all of it."""
    data = vmr.write("data", b"x" * 5_000)
    before = snapshot(vmr.keep(1, each=1_000))
    os.utime(data)
    present = vmr.now()
    opened: list[bytes] = []

    def watched(path: bytes) -> int:
        opened.append(path)
        return os.open(vmr.path / os.fsdecode(path), os.O_RDONLY)

    assert differing(before, Snapshot(present.files, watched)) == [b"data"]
    assert opened == []


def test_where_not_all_files_were_looked_at_a_missing_one_means_nothing(
    vmr: Vmr, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keepsakes, "MAX_SURVEYED", 10)
    for number in range(15):
        vmr.write(f"f{number}")
    before = snapshot(vmr.keep(1))
    for number in range(15, 40):
        vmr.write(f"f{number}")
    assert edited(before, vmr.now()) == []
