"""Where VMs with the product begin: the image, built once and cached, and a guest in which dpkg has installed it.

For the tests and for the benchmark. Where something can't be had it says why in one line.
"""

from __future__ import annotations

import functools
import subprocess
import warnings
from pathlib import Path
from typing import Callable

import pytest

from tests.packaging.build import debs
from tests.vm.product import REPOSITORY, installed, product_files
from tests.vm.vm import Vm, ensure_snapshot

CANNOT_BUILD = 3  # packaging/vm-image: not on this host; anything else is a fault of ours


class NoImage(Exception):
    """There can be no VM on this host; why, in one line."""


def image() -> Path:
    """The directory of the VM image, with a snapshot to start from. Raises NoImage, or RuntimeError for a fault."""
    built = subprocess.run([REPOSITORY / "packaging" / "vm-image"], capture_output=True, text=True)
    lines = built.stderr.strip().splitlines() or ["packaging/vm-image said nothing"]
    if built.returncode == CANNOT_BUILD:
        raise NoImage(lines[-1])
    if built.returncode != 0:
        raise RuntimeError("\n".join([f"packaging/vm-image: exit code {built.returncode}", *lines[-20:]]))
    path = Path(built.stdout.strip())
    ensure_snapshot(path)
    return path


def with_product(image: Path) -> Callable[..., Vm]:
    """``Vm`` for a guest in which dpkg has installed this checkout's packages, kept once as a snapshot.

    What they bring is enabled, and nothing of it runs yet.
    """
    try:
        packages = list(debs().values())
    except pytest.skip.Exception as why:
        warnings.warn(f"the guests have this checkout's files, not its packages: {why}", stacklevel=1)
        return functools.partial(Vm, image, files=product_files())
    return functools.partial(Vm, image, snapshot=installed(image, packages))
