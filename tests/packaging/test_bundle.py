"""The bundle: an agent with a Python of its own, that nothing it starts can tell from any other."""

from __future__ import annotations

import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.build import build, export

pytestmark = pytest.mark.long  # PyInstaller from PyPI, and its build


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked tarball."""
    place = tmp_path_factory.mktemp("bundle")
    (archive,) = build("build-bundle", "--out", str(place / "out"), tree=export(place / "source"))
    with tarfile.open(archive) as tar:
        assert {(member.uid, member.gid) for member in tar} == {(0, 0)}
        tar.extractall(place)
    return place / archive.name[: -len(".tar.gz")]


def test_a_script_sees_a_clean_environment_and_the_systems_own_libraries(
    bundle: Path, tmp_path: Path
) -> None:
    vmr = tmp_path / "launch" / "-1" / "env"
    vmr.mkdir(parents=True)
    (vmr / "call_arguments.sh").write_text("#!/bin/sh\ncat /proc/$$/environ\n")
    (vmr / "call_arguments.sh").chmod(0o755)
    program = bundle / "program" / "vmr-agent"
    paths = [f"--{name}-dir={tmp_path / name}" for name in ("launch", "state", "runtime")]
    with daemon(program, *paths, f"--port=unix:{tmp_path / 'port'}") as pid:
        out = tmp_path / "state/runs/-1/env/1/stdout"
        deadline = time.monotonic() + 60
        while not (out.parent / "exit.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        variables = [each for each in out.read_bytes().split(b"\0") if b"=" in each]
        names = {each.partition(b"=")[0].decode() for each in variables}
        assert names == {"PATH", "LANG", "HOME", "VMR_NAME", "VMR_ATTEMPT", "VMR_START_TIME"}
        # What else the daemon may start, such as the reboot command, would get the environment of now.
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert len(children) == 1, "the fork server alone"
        logs = subprocess.run([program, "logs", "-1/env", *paths], capture_output=True)
        assert logs.stdout == out.read_bytes()
        check = subprocess.run([program, "check", *paths], capture_output=True, text=True)
        assert "is not installed" not in check.stdout


class daemon:
    """The bundled agent, for as long as the block lasts; its pid."""

    def __init__(self, *command: object) -> None:
        self._command = [str(command[0]), "run", *map(str, command[1:])]

    def __enter__(self) -> int:
        self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL, cwd="/")
        return self._process.pid

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)


def test_it_says_what_it_needs(bundle: Path) -> None:
    assert (bundle / "NEEDS").read_text().startswith("glibc 2.")
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    assert size < 30 << 20


def test_it_is_installed_into_a_tree_and_taken_out_again(bundle: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "usr").mkdir(parents=True)
    before = set(walk(root))
    install = [str(bundle / "install.sh"), "--root", str(root)]
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    version = (bundle / "VERSION").read_text().strip()
    assert os.readlink(root / "usr/bin/vmr-agent") == f"/opt/vmr-agent/{version}/vmr-agent"
    said = subprocess.run(
        [root / f"opt/vmr-agent/{version}/vmr-agent", "--version"], capture_output=True, text=True
    )
    assert said.stdout == f"vmr-agent {version.partition('-')[0]}\n"
    assert (root / "etc/systemd/system/multi-user.target.wants/vmr-agent.service").exists()
    assert (root / "var/launch").is_dir()
    for each in (
        "man/man1/vmr-agent.1",
        "man/man5/vmr-agent.conf.5",
        "bash-completion/completions/vmr-agent",
        "zsh/site-functions/_vmr-agent",
        "fish/vendor_completions.d/vmr-agent.fish",
    ):
        assert (root / "usr/local/share" / each).stat().st_size > 100
    # An upgrade: another version takes the command's place, and nobody uses the old one.
    (root / f"opt/vmr-agent/{version}").rename(root / "opt/vmr-agent/0.0-old")
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    assert [path.name for path in (root / "opt/vmr-agent").iterdir()] == [version]
    subprocess.run([*install, "--uninstall"], check=True, stdout=subprocess.DEVNULL)
    left = {
        path for path in set(walk(root)) - before if (root / path).is_file() or (root / path).is_symlink()
    }
    assert left == set()


def walk(root: Path) -> Iterator[str]:
    for path in root.rglob("*"):
        yield path.relative_to(root).as_posix()
