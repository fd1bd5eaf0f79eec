"""Fixtures of the VM tests: the image, built once and cached, and fresh VMs with the product's packages in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Callable, Optional

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


# Files whose tests share a VM. Those of the others each have their own.
_OF_ONE_VM = ("test_verbs.py", "test_harness.py", "test_packages.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this directory needs a VM; what boots takes longest, and comes first."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("vm")
    items.sort(key=lambda item: item.path != here / "test_power.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile` only the tests that share a VM stay together: whole files would keep one worker long
    after the others have nothing left to do."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return path if path.endswith(_OF_ONE_VM) else nodeid

    return Scheduling(config, log)
