"""Fixtures of the VM tests: the image, built once and cached, and fresh VMs with the product's packages in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Callable, Optional

import pytest

from tests.vm import guests
from tests.vm.host import VmWorld
from tests.vm.vm import Vm


@pytest.fixture(scope="session")
def vm_image() -> Path:
    """The directory of the VM image, with a snapshot to start from; skips where none can be built."""
    try:
        return guests.image()
    except guests.NoImage as why:
        pytest.skip(str(why))
    except RuntimeError as error:
        pytest.fail(str(error))


@pytest.fixture(scope="session")
def new_vm(vm_image: Path) -> Callable[..., Vm]:
    """``Vm`` for a guest with this checkout's packages in it."""
    return guests.with_product(vm_image)


@pytest.fixture
def vm(new_vm: Callable[..., Vm]) -> Iterator[Vm]:
    """One such VM."""
    with new_vm() as machine:
        yield machine


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., VmWorld]]:
    worlds: list[VmWorld] = []

    def make(vm: Vm, settings: Optional[Mapping[str, str]] = None) -> VmWorld:
        path = tmp_path / f"host{len(worlds)}"
        path.mkdir()
        worlds.append(VmWorld(path, vm, settings))
        return worlds[-1]

    yield make
    for each in worlds:
        each.close()


@pytest.fixture
def world(vm: Vm, make_world: Callable[..., VmWorld]) -> VmWorld:
    """A VM with the product and a host, nothing started."""
    return make_world(vm)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this directory needs a VM."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("vm")
