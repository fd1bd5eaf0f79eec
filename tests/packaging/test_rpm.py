"""The rpms, by rpm's own word: their files and needs, that they come and go, and the same bytes each time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.build import build, export


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def rpms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("rpm")
    made = build("build-rpm", "--out", str(place / "out"), tree=export(place / "source"))
    return {path.name.rpartition("-0")[0]: path for path in made}


def test_they_hold_what_they_should_and_ask_for_what_they_need(rpms: dict[str, Path]) -> None:
    assert set(rpms) == {"vmr-agent", "vmr-host"}
    files, needs = {}, {}
    for name, path in rpms.items():
        files[name] = set(run("rpm", "-qp", "--queryformat", "[%{FILENAMES}\\n]", path).split())
        needs[name] = {line.split()[0] for line in run("rpm", "-qp", "--requires", path).splitlines()}
        assert set(
            run("rpm", "-qp", "--queryformat", "[%{FILEUSERNAME}:%{FILEGROUPNAME}\\n]", path).split()
        ) == {"root:root"}
        assert f"/usr/bin/{name}" in files[name] and f"/usr/lib/systemd/system/{name}.service" in files[name]
        assert run("rpm", "-qp", "--queryformat", "%{ARCH}", path) == "noarch"
        assert run("rpm", "-qp", "--changelog", path).startswith("* ")
    assert not files["vmr-agent"] & files["vmr-host"]
    assert "/var/launch" in files["vmr-agent"]
    assert "/usr/share/vmr-agent/vmr_agent/guest/shim.py" in files["vmr-agent"]
    assert not [each for each in files["vmr-agent"] if "/vmr_agent/host" in each or "__pycache__" in each]
    assert not [each for each in files["vmr-host"] if "/vmr_agent/guest" in each or "__pycache__" in each]
    for name in rpms:
        assert f"/usr/share/man/man1/{name}.1.gz" in files[name]
        assert f"/usr/share/bash-completion/completions/{name}" in files[name]
    assert "/usr/share/man/man5/vmr-agent.conf.5.gz" in files["vmr-agent"]
    assert needs["vmr-agent"] >= {"python3", "python3-msgpack", "python3-psutil", "python3-watchdog"}
    assert needs["vmr-host"] & {"python3-psutil", "python3-watchdog"} == set()


def test_built_twice_they_are_the_same(rpms: dict[str, Path], tmp_path: Path) -> None:
    for path in build("build-rpm", "--out", str(tmp_path / "out"), tree=export(tmp_path / "a" / "source")):
        assert path.read_bytes() == rpms[path.name.rpartition("-0")[0]].read_bytes()


def test_they_come_and_go_in_an_empty_root(rpms: dict[str, Path], tmp_path: Path) -> None:
    """Without scripts, since nothing to run them is in it; both at once, and no file stays."""
    if os.geteuid() != 0 or shutil.which("rpm") is None:
        pytest.skip("only root can install")
    at = ["rpm", f"--root={tmp_path}", "--noscripts", "--nodeps"]
    run(*at, "-i", *rpms.values())
    assert (tmp_path / "var/launch").is_dir()
    for name in rpms:
        private = str(tmp_path / "usr/share" / name)
        # This Python has the libraries; the machine's own may not.
        code = f"import sys; sys.path.insert(0, {private!r}); import vmr_agent.cli.{name[4:]} as verbs"
        code += "; print(verbs.__file__)"
        assert run(sys.executable, "-IB", "-c", code).startswith(private)
    run(*at, "-e", *rpms)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {name for name in left if "/.rpmdb/" not in name and "lib/rpm/" not in name} == set()
