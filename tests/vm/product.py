"""The product as files for a guest: this checkout's code where Debian's package would put it.

Knows where things are in the repository and in the guest; nothing of QEMU.
"""

from __future__ import annotations

import py_compile
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
GUEST_PYTHON = (3, 11)
LIBRARY = "/usr/lib/python3/dist-packages"


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
