"""Fixtures of the VM tests: the image, built once and cached, and a fresh VM with the product in it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm.product import REPOSITORY, product_files
from tests.vm.vm import Vm, ensure_snapshot

CANNOT_BUILD = 3  # packaging/vm-image: not on this host; anything else is a fault of ours


@pytest.fixture(scope="session")
def vm_image() -> Path:
    """The directory of the VM image, with a snapshot to start from; skips where none can be built."""
    built = subprocess.run([REPOSITORY / "packaging" / "vm-image"], capture_output=True, text=True)
    lines = built.stderr.strip().splitlines() or ["packaging/vm-image said nothing"]
    if built.returncode == CANNOT_BUILD:
        pytest.skip(lines[-1])
    if built.returncode != 0:
        pytest.fail("\n".join([f"packaging/vm-image: exit code {built.returncode}", *lines[-20:]]))
    image = Path(built.stdout.strip())
    ensure_snapshot(image)
    return image


@pytest.fixture
def vm(vm_image: Path) -> Iterator[Vm]:
    """A VM from the snapshot with the product installed; nothing of it runs yet."""
    with Vm(vm_image, files=product_files()) as machine:
        yield machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this directory needs a VM."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("vm")
