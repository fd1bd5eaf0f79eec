"""What packaging/bake refuses: in one line, with the image as it was. That it bakes is tested with VMs, in tests/vm."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.build import CANNOT, REPOSITORY

AARCH64, X86_64 = 183, 62  # e_machine in <elf.h>


def bake(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(REPOSITORY / "packaging" / "bake"), *map(str, arguments)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def refused(image: Path, *arguments: object) -> str:
    """The one line with which this image is refused."""
    before = hashlib.sha256(image.read_bytes()).digest()
    done = bake(image, *arguments)
    if done.returncode == CANNOT:
        pytest.skip(done.stderr)
    assert done.returncode == 1, done.stderr
    # What it says before is what it is doing.
    *_, last = done.stderr.splitlines()
    assert last.startswith("bake: cannot "), done.stderr
    assert hashlib.sha256(image.read_bytes()).digest() == before
    return last.removeprefix("bake: ")


def qemu_img(*arguments: object) -> None:
    if shutil.which("qemu-img") is None:
        pytest.skip("no qemu-img here")
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    image = tmp_path / "guest.qcow2"
    missing = bake(image)
    assert (missing.returncode, missing.stderr) == (1, f"bake: cannot find {image}\n")
    image.write_bytes(b"")
    assert bake(image, "--live").returncode == 2
    assert f"cannot find {tmp_path / 'vmrs'}" in bake(image, "--stage", tmp_path / "vmrs").stderr


def test_an_image_in_use_is_left_alone(tmp_path: Path) -> None:
    """A VM's changes and ours would be mixed: what QEMU has open for writing is locked."""
    image = tmp_path / "guest.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    user = ["qemu-io", "-f", "qcow2", str(image)]
    with subprocess.Popen(user, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"read 0 512\n")
        process.stdin.flush()
        process.stdout.readline()
        assert refused(image) == f"cannot bake {image}: it is in use, by a VM most likely"
        process.stdin.close()


SECRET = ("--object", "secret,id=key,data=sesame")


def test_an_encrypted_image_is_left_alone(tmp_path: Path) -> None:
    image = tmp_path / "guest.qcow2"
    # The old cipher: LUKS takes seconds to make a key.
    qemu_img(
        *("create", "-q", "-f", "qcow2", *SECRET),
        *("-o", "encrypt.format=aes,encrypt.key-secret=key", image, "1M"),
    )
    assert refused(image) == f"cannot bake {image}: it is encrypted"


def elf(machine: int) -> bytes:
    """The head of a program for a machine: as much as anybody looks at to name it."""
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    return ident + struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 0, 0, 0, 64, 0, 0, 0, 0, 0)


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """As much of a Debian of this machine's kind as bake looks at."""
    root = tmp_path / "root"
    for each in ("etc", "bin", "usr/bin", "usr/lib/systemd", "var/lib/dpkg"):
        (root / each).mkdir(parents=True)
    (root / "etc/hosts").touch()
    (root / "etc/os-release").write_text('ID=debian\nPRETTY_NAME="Debian 12"\nVERSION_CODENAME=bookworm\n')
    (root / "usr/bin/env").write_bytes(elf(X86_64 if os.uname().machine == "x86_64" else AARCH64))
    (root / "usr/lib/systemd/systemd").touch()
    (root / "var/lib/dpkg/status").touch()
    yield root


def image_of(tree: Path) -> Path:
    image = tree.parent / "guest.raw"
    command = ["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(image), "16M"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return image


@pytest.mark.long
def test_an_image_without_a_system_is_left_alone(tmp_path: Path) -> None:
    image = tmp_path / "guest.raw"
    image.write_bytes(b"no system" + bytes(64 << 20))
    assert refused(image) == f"cannot bake {image}: no operating system is found in it"


@pytest.mark.long
def test_luks_over_all_of_an_image_or_a_partition_is_left_alone(tmp_path: Path) -> None:
    """It asks for no passphrase, terminal or not: a build has nobody to type it."""
    whole = tmp_path / "whole.luks"
    qemu_img("create", "-q", "-f", "luks", *SECRET, "-o", "key-secret=key,iter-time=10", whole, "1M")
    assert refused(whole) == f"cannot bake {whole}: it is encrypted"
    content = whole.read_bytes()
    table = bytes(446) + struct.pack("<4xB3xII", 0x83, 2048, len(content) // 512) + bytes(48) + b"\x55\xaa"
    image = tmp_path / "guest.raw"
    image.write_bytes(table.ljust(2048 * 512, b"\0") + content)
    assert refused(image) == f"cannot bake {image}: what is in it is encrypted"


@pytest.mark.long
def test_another_machines_system_is_left_alone(tree: Path) -> None:
    other = "aarch64" if os.uname().machine == "x86_64" else "x86_64"
    (tree / "usr/bin/env").write_bytes(elf(AARCH64 if other == "aarch64" else X86_64))
    said = refused(image_of(tree))
    assert said == f"cannot bake Debian 12: its programs are {other}, and this machine can't run them"


@pytest.mark.long
def test_a_system_without_systemd_is_left_alone(tree: Path) -> None:
    (tree / "usr/lib/systemd/systemd").unlink()
    said = refused(image_of(tree))
    assert said == "cannot bake Debian 12: it has no systemd, and nothing else of it would start the agent"


@pytest.mark.long
def test_a_system_that_is_no_debian_gets_no_deb(tree: Path) -> None:
    (tree / "etc/os-release").write_text('ID=fedora\nPRETTY_NAME="Fedora 40"\n')
    (tree / "var/lib/dpkg/status").unlink()
    said = refused(image_of(tree))
    assert said.startswith(
        "cannot install packages into Fedora 40: it isn't Debian or made from it. --bundle "
    )


@pytest.mark.long
def test_another_release_gets_none_of_this_machines_packages(tree: Path, tmp_path: Path) -> None:
    (tree / "etc/os-release").write_text('ID=debian\nPRETTY_NAME="Debian 99"\nVERSION_CODENAME=other\n')
    (tmp_path / "some.deb").touch()
    said = refused(image_of(tree), "--deb", tmp_path / "some.deb")
    assert said.startswith("cannot fetch what Debian 99 needs: this machine is ") and said.endswith(
        "--debs DIR"
    )
