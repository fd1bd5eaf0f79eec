"""The product in a guest: the packages, installed by dpkg, which is what tests want; or this checkout as files.

The files are for who has no time to build packages (the demo). Knows where things are in the repository and in the
guest; of QEMU no more than that a VM can be kept as a snapshot.
"""

from __future__ import annotations

import hashlib
import py_compile
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.vm.vm import Vm, ensure_snapshot

REPOSITORY = Path(__file__).resolve().parents[2]
GUEST_PYTHON = (3, 11)
LIBRARY = "/usr/lib/python3/dist-packages"


NOT_NOW = "printf '#!/bin/sh\\nexit 101\\n' > /usr/sbin/policy-rc.d; chmod +x /usr/sbin/policy-rc.d"
"""What keeps a package from starting its services: how images are made."""


def put_packages(vm: Vm, packages: Sequence[Path]) -> str:
    """Copy packages into the guest; their paths there, with a blank between them."""
    vm.put({f"/root/{path.name}": path.read_bytes() for path in packages})
    return " ".join(f"/root/{path.name}" for path in packages)


def install(vm: Vm, packages: Sequence[Path]) -> None:
    """Install packages as into an image: what they bring is enabled, and nothing of it runs."""
    paths = put_packages(vm, packages)
    vm.check(f"{NOT_NOW}; dpkg -i {paths} && rm /usr/sbin/policy-rc.d {paths} && sync")


def installed(image: Path, packages: Sequence[Path]) -> Path:
    """The snapshot of a guest in which these packages are installed."""
    contents = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(packages))).hexdigest()
    return ensure_snapshot(image, key=contents[:16], prepare=lambda vm: install(vm, packages))


def product_files() -> dict[str, bytes]:
    """Paths in the guest and their contents, for ``Vm(files=...)`` or ``Vm.put``."""
    files: dict[str, bytes] = {}
    package = REPOSITORY / "agent" / "vmr_agent"
    for path in sorted(package.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            name = f"{LIBRARY}/vmr_agent/{path.relative_to(package).as_posix()}"
            files[name] = path.read_bytes()
            if path.suffix == ".py":
                files.update(_compiled(path, name))
    for command, module in (("vmr-agent", "agent"), ("vmr-host", "host")):
        files[f"/usr/bin/{command}"] = (
            f"#!/usr/bin/python3\nfrom vmr_agent.cli.{module} import main\nraise SystemExit(main())\n"
        ).encode("ascii")
    for unit in sorted((REPOSITORY / "systemd").glob("*.service")):
        files[f"/lib/systemd/system/{unit.name}"] = unit.read_bytes()
    for rule in sorted((REPOSITORY / "systemd").glob("*.rules")):
        files[f"/lib/udev/rules.d/{rule.name}"] = rule.read_bytes()
    return files


def _compiled(path: Path, name: str) -> dict[str, bytes]:
    """What a package's installation would compile, if this Python's bytecode is the guest's.

    Each fresh VM would otherwise compile every module at its first use, ten times slower than the host.
    """
    if sys.version_info[:2] != GUEST_PYTHON:
        return {}
    with tempfile.NamedTemporaryFile(suffix=".pyc") as compiled:
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        try:
            py_compile.compile(
                str(path), cfile=compiled.name, dfile=name, doraise=True, invalidation_mode=mode
            )
        except py_compile.PyCompileError:
            return {}  # the guest will say so, in a test
        content = Path(compiled.name).read_bytes()
    directory, _, base = name.rpartition("/")
    return {f"{directory}/__pycache__/{base[:-3]}.cpython-{GUEST_PYTHON[0]}{GUEST_PYTHON[1]}.pyc": content}
