"""The wheel: the package, its manual and nothing else, the same bytes each time, and all that a venv needs."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.packaging.build import export, sources


def make(tree: Path, out: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-cache-dir",
        "-w",
        str(out),
        str(tree),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    return make(export(place / "source"), place / "out")


def test_it_holds_the_package_its_manual_and_completion_and_nothing_else(wheel: Path) -> None:
    package = sources() / "agent"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name and not name.startswith(".")}
    assert all(name.endswith(".py") or name.endswith(("/py.typed", "/PROTOCOL.md")) for name in files)
    version = wheel.name.split("-")[1]
    info = f"vmr_agent-{version}.dist-info"
    about = {"METADATA", "WHEEL", "entry_points.txt", "licenses/LICENSE", "RECORD"}
    pages = {"man/man1/vmr-agent.1", "man/man1/vmr-host.1", "man/man5/vmr-agent.conf.5"}
    for name in ("vmr-agent", "vmr-host"):
        pages |= {f"bash-completion/completions/{name}", f"zsh/site-functions/_{name}"}
        pages.add(f"fish/vendor_completions.d/{name}.fish")
    shared = f"vmr_agent-{version}.data/data/share"
    with zipfile.ZipFile(wheel) as archive:
        found = set(archive.namelist())
    assert found == files | {f"{info}/{name}" for name in about} | {f"{shared}/{name}" for name in pages}


def test_built_twice_it_is_the_same(wheel: Path, tmp_path: Path) -> None:
    again = make(export(tmp_path / "elsewhere" / "source"), tmp_path / "out")
    assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(wheel.read_bytes()).digest()


def test_an_empty_venv_is_enough(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    programs = tmp_path / "venv" / "bin"
    done = subprocess.run([programs / "pip", "install", "-q", wheel], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version = wheel.name.split("-")[1]
    for command in ("vmr-agent", "vmr-host"):
        said = subprocess.run([programs / command, "--version"], capture_output=True, text=True, cwd="/")
        assert said.stdout == f"{command} {version}\n"
