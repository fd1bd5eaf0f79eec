"""What the doctor finds, on directories made ill in one way each."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmr_agent.guest import doctor
from vmr_agent.guest.doctor import Finding
from vmr_agent.guest.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    """A guest without a daemon, otherwise well."""
    port = Path(tempfile.mkdtemp(prefix="vmr-")) / "port"  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.fspath(port))
        (tmp_path / "launch").mkdir(mode=0o755)
        (tmp_path / "state").mkdir(mode=0o700)
        yield Settings(
            launch_dir=tmp_path / "launch",
            port=f"unix:{port}",
            state_dir=tmp_path / "state",
            runtime_dir=tmp_path / "run",
        )


def wrong(settings: Settings, *but: str) -> list[Finding]:
    """What is wrong, but for the daemon and the unit, which a test's machine may have or not."""
    return [
        each
        for each in doctor.examine(settings)
        if each.remedy and each.subject not in ("daemon", "unit", *but)
    ]


def stage(settings: Settings, name: str, *, mode: int = 0o755) -> Path:
    directory = settings.launch_dir / name
    directory.mkdir(parents=True)
    (directory / "call_arguments.sh").write_text("#!/bin/sh\n")
    (directory / "call_arguments.sh").chmod(0o755)
    directory.chmod(mode)
    return directory


def test_a_guest_that_is_well_but_has_no_daemon(settings: Settings) -> None:
    stage(settings, "-4/x")
    assert wrong(settings) == []
    findings = list(doctor.examine(settings))
    (daemon,) = [each for each in findings if each.subject == "daemon"]
    assert "it isn't running" in daemon.text and daemon.remedy
    subjects = {"libraries", "unit", "daemon", "port", "launch directory", "events", "spool", "clock"}
    assert {each.subject for each in findings} == subjects


def test_a_daemon_that_hangs_is_named_and_the_rest_looked_at(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_PATIENCE_S", 0.2)
    settings.runtime_dir.mkdir(exist_ok=True)
    with socket.socket(socket.AF_UNIX) as hangs:
        hangs.bind(str(settings.runtime_dir / "control"))
        hangs.listen()
        findings = list(doctor.examine(settings))
    (daemon,) = [each for each in findings if each.subject == "daemon"]
    assert "it doesn't answer" in daemon.text and daemon.remedy
    assert {each.subject for each in findings} >= {"daemon", "port", "spool"}


def test_a_missing_port_names_those_there_are(settings: Settings) -> None:
    (found,) = wrong(settings._replace(port="org.example.none"))
    assert found.subject == "port" and "the VM's ports: " in found.text
    assert "virtserialport named org.example.none" in found.remedy
    Path(settings.port[len("unix:") :]).unlink()
    (found,) = wrong(settings)
    assert "no such socket" in found.text


def test_a_launch_directory_that_is_missing_or_open_to_others(settings: Settings) -> None:
    settings.launch_dir.chmod(0o777)
    (found,) = wrong(settings)
    assert found.subject == "launch directory" and "can be written to by others (mode 0777)" in found.text
    settings.launch_dir.rmdir()
    (found,) = wrong(settings)
    assert "does not exist" in found.text and found.remedy.startswith("mkdir -p ")


def test_refused_vmrs_are_named_and_the_rest_counted(settings: Settings) -> None:
    for number in range(8):
        stage(settings, f"{number + 1}/x", mode=0o777)
    found = wrong(settings)
    assert len(found) == 6 and found[0].text.startswith("1/x is refused: its directory can be written to")
    assert found[0].remedy == "chmod go-w what it names; umask 022 makes it so"
    assert found[-1].text == "3 more are refused"


def test_what_is_passed_over_is_named(settings: Settings) -> None:
    """Nothing in it is ever a VMR, and nothing else says so but the daemon's log."""
    for name in ("0/zero", "05/x", "abc/x", "+4/x", "-4/good"):
        stage(settings, name)
    found = wrong(settings)
    assert {each.text.rpartition("/")[2] for each in found} == {
        f"{name}: it is no start time" for name in ("0", "05", "abc", "+4")
    }
    assert all(each.subject == "launch directory" and "-4/compress.py" in each.remedy for each in found)


def test_a_spool_that_is_full_or_open_to_others(settings: Settings) -> None:
    (settings.state_dir / "full").touch()
    settings.state_dir.chmod(0o755)
    found = wrong(settings)
    assert [each.subject for each in found] == ["spool", "spool"]
    assert "mode 0755" in found[0].text and "it is full" in found[1].text
    (settings.state_dir / "full").unlink()
    settings.state_dir.rmdir()
    assert wrong(settings) == [], "the daemon makes it"


def test_it_changes_nothing(settings: Settings) -> None:
    directory = stage(settings, "-4/x")
    script = directory / "call_arguments.sh"
    script.chmod(0o777)  # a daemon would mend it

    def all_there_is() -> tuple[int, int, list[str]]:
        return script.stat().st_mode, directory.stat().st_ctime_ns, sorted(os.listdir(settings.state_dir))

    before = all_there_is()
    list(doctor.examine(settings))
    assert before == all_there_is()


def test_the_lower_bounds_are_the_declared_ones() -> None:
    declared = re.findall(r'"(\w+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    bounds = {name: tuple(map(int, version.split("."))) for name, version in declared}
    assert {name: bounds[name] for name in doctor.NEEDED} == doctor.NEEDED
