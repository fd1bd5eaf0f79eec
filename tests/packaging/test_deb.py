"""The Debian packages: clean by Debian's own judge, the same bytes each time, and no trace after a purge."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests import apt
from tests.packaging.build import LATER, REPOSITORY, build, debs, export, workplace


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long  # where it has to be installed first
def test_lintian_finds_nothing() -> None:
    debs()  # as root this brings apt's lists up to date where it needs to
    told = run(apt.need("lintian", "lintian"), "--allow-root", "--fail-on", "error,warning", *debs().values())
    assert told == ""


def test_built_twice_they_are_the_same(tmp_path: Path) -> None:
    tree = export(tmp_path / "elsewhere" / "source")
    (tree / "agent" / "vmr_agent" / "__pycache__").mkdir()
    (tree / "agent" / "vmr_agent" / "__pycache__" / "x.pyc").write_text("not a source")
    for path in build("build-deb", "--no-tests", "--out", str(tmp_path / "out"), tree=tree):
        assert path.read_bytes() == debs()[path.name.partition("_")[0]].read_bytes(), path.name


def test_the_two_share_no_file_and_hold_no_stranger() -> None:
    files = {}
    for name, path in debs().items():
        listed = run("dpkg-deb", "-c", path)
        rows = [line.split(None, 5) for line in listed.splitlines()]
        files[name] = {row[5] for row in rows if not row[0].startswith("d")}
        assert all(row[1] == "root/root" for row in rows)
        assert not [each for each in files[name] if "__pycache__" in each or "/tests/" in each]
    assert set(files) == {"vmr-agent", "vmr-host"}
    assert not files["vmr-agent"] & files["vmr-host"]
    assert not [each for each in files["vmr-agent"] if "/vmr_agent/host/" in each]
    assert not [each for each in files["vmr-host"] if "/vmr_agent/guest/" in each]


def test_each_has_all_that_its_command_imports(tmp_path: Path) -> None:
    """The other side's room is left out of each: nothing that is left may need it."""
    for name, path in debs().items():
        run("dpkg-deb", "-x", path, tmp_path / name)
        private = tmp_path / name / "usr" / "share" / name
        room = "guest" if name == "vmr-agent" else "host"
        code = (
            f"import sys, pkgutil, importlib; sys.path.insert(0, {str(private)!r})\n"
            f"import vmr_agent.{room}, vmr_agent.cli.{name[4:]}\n"
            f"for each in pkgutil.walk_packages(vmr_agent.{room}.__path__, 'vmr_agent.{room}.'):\n"
            "    each.name.endswith('.shim') or importlib.import_module(each.name)\n"
            "print(vmr_agent.__file__)"
        )
        assert run("/usr/bin/python3", "-IB", "-c", code).strip().startswith(str(private))


def test_a_version_without_its_entry_in_the_changelog_is_not_built(tmp_path: Path) -> None:
    tree = export(tmp_path / "source")
    init = tree / "agent" / "vmr_agent" / "__init__.py"
    init.write_text('__version__ = "7.0"\n')
    done = subprocess.run(
        [tree / "packaging" / "build-deb", "--no-tests", "--out", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "the package's version is 7.0" in done.stderr


def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd here")
    units = []
    for unit in sorted((REPOSITORY / "systemd").glob("*.service")):
        # The commands need not be installed where this is run.
        text = re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text())
        (tmp_path / unit.name).write_text(text)
        units.append(tmp_path / unit.name)
    assert run("systemd-analyze", "verify", "--man=no", *units) == ""


@pytest.mark.long
@pytest.mark.timeout(900)
def test_they_come_and_go_in_a_tree_without_a_running_systemd(tmp_path: Path) -> None:
    """How an image's tree is made: no processes, no /proc, and an upgrade before the first boot."""
    if os.geteuid() != 0 or shutil.which("mmdebstrap") is None:
        pytest.skip("needs root and mmdebstrap")
    root = Path(tempfile.mkdtemp(dir=workplace())) / "root"
    needed = "systemd,udev,python3-psutil,python3-watchdog,python3-msgpack"
    run("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={needed}", "bookworm", root)

    def install(*paths: Path) -> None:
        for path in paths:
            shutil.copy(path, root / "tmp")
        run("chroot", root, "dpkg", "-i", *(f"/tmp/{path.name}" for path in paths))
        for path in paths:
            (root / "tmp" / path.name).unlink()

    def listing() -> set[str]:
        return set(run("find", root, "-xdev").splitlines())

    (root / "var/log/dpkg.log").touch()
    before = listing()
    install(*debs().values())
    enabled = root / "etc/systemd/system/multi-user.target.wants"
    assert (enabled / "vmr-agent.service").is_symlink()
    assert run("chroot", root, "vmr-host", "--version") == run(
        "chroot", root, "vmr-agent", "--version"
    ).replace("agent", "host")
    launch = (root / "var/launch").stat()
    assert (launch.st_uid, launch.st_mode & 0o777) == (0, 0o755)
    assert (
        run("chroot", root, "systemd-analyze", "verify", "--man=no", "vmr-agent.service", "vmr-host.service")
        == ""
    )
    run("chroot", root, "systemctl", "disable", "vmr-agent")
    install(debs(LATER)["vmr-agent"])
    assert not (enabled / "vmr-agent.service").is_symlink(), "an upgrade must not enable what was disabled"
    assert run("chroot", root, "vmr-agent", "--version") == f"vmr-agent {LATER}\n"
    (root / "var/launch/-1").mkdir()
    (root / "etc/vmr-agent.conf").touch()
    (root / "var/lib/vmr-agent").mkdir()
    run("chroot", root, "dpkg", "-r", "vmr-agent", "vmr-host")
    assert (root / "var/lib/vmr-agent").exists() and (root / "etc/vmr-agent.conf").exists()
    run("chroot", root, "dpkg", "--purge", "vmr-agent", "vmr-host")
    assert (root / "var/launch/-1").exists(), "what others have staged is not ours"
    (root / "var/launch/-1").rmdir()
    (root / "var/launch").rmdir()
    assert {path for path in listing() - before if "/run/systemd" not in path} == set()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_build_runs_the_tests_with_debians_own_versions(tmp_path: Path) -> None:
    made = build("build-deb", "--out", str(tmp_path / "out"), tree=export(tmp_path / "source"))
    assert {path.read_bytes() for path in made} == {path.read_bytes() for path in debs().values()}
