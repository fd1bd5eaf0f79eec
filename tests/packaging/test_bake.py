"""What packaging/bake refuses before it touches anything; that it bakes is tested with VMs, in tests/vm."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.packaging.build import CANNOT, REPOSITORY


def bake(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(REPOSITORY / "packaging" / "bake"), *map(str, arguments)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    image = tmp_path / "guest.qcow2"
    missing = bake(image)
    assert (missing.returncode, missing.stderr) == (1, f"bake: cannot find {image}\n")
    image.write_bytes(b"")
    assert bake(image, "--live").returncode == 2
    assert f"cannot find {tmp_path / 'vmrs'}" in bake(image, "--stage", tmp_path / "vmrs").stderr


@pytest.mark.long
def test_an_image_without_a_system_is_left_alone(tmp_path: Path) -> None:
    image = tmp_path / "guest.raw"
    image.write_bytes(b"no system" + bytes(64 << 20))
    before = image.read_bytes()
    done = bake(image)
    if done.returncode == CANNOT:
        pytest.skip(done.stderr)
    assert done.returncode == 1
    assert "cannot look into the image: no operating system is found in it" in done.stderr
    assert image.read_bytes() == before
