"""The steps at which a process may be killed: found in the source, so that none can be forgotten. Knows no test.

A *site* is a call that makes, changes, names, syncs or removes something on a disk, or says something to another
process. Its name is the function it stands in and what is called, as in `shim.Shim._record rename`. Between two
sites nothing happens that a SIGKILL could halve, so there is one *step* after each of them and one before the first of
each function.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.e2e.world import until

AGENT = Path(__file__).resolve().parents[2] / "agent" / "vmr_agent"
HOOK = Path(__file__).resolve().parent / "hook"

_OS = {
    *(
        "write",
        "writev",
        "pwrite",
        "fsync",
        "fdatasync",
        "rename",
        "replace",
        "link",
        "symlink",
        "unlink",
        "mkdir",
        "rmdir",
    ),
    *("ftruncate", "truncate", "posix_fallocate", "fork", "chmod"),
}
_OTHERS = {
    *("symlink_to", "rmtree", "fallocate", "syncfs", "_syncfs", "sync", "sendto"),
    # Our own, at each place where they are used:
    *("_write_durably", "_sync", "_sync_path", "_punch", "_link", "_unlink", "_note", "_remove", "_record"),
    *("write_all", "replace_file", "write_temporary", "commit_temporary", "_write_waiting"),
    *("sync_logs", "write_note", "commit_note"),
}
_OF_PATHS = {"rename", "unlink", "mkdir", "chmod", "touch"}  # methods of a Path

MODULES = {
    **{name: f"guest/{name}.py" for name in ("shim", "spool", "runner", "shipper", "port")},
    **{name: f"host/{name}.py" for name in ("logstore", "life", "journal", "vmlogs", "renderer", "chardev")},
}


class Site(NamedTuple):
    file: str
    function: str
    line: int
    """Where the function begins."""
    first: int
    last: int
    """The lines of the statement, without what a compound one holds."""
    opening: bool
    """The first of its function."""


def _durable(call: ast.Call) -> bool:
    function = call.func
    if isinstance(function, ast.Name):
        return function.id in _OTHERS or function.id == "_write"
    if not isinstance(function, ast.Attribute):
        return False
    name, owner = function.attr, ast.unparse(function.value)
    if ast.unparse(function) == "self._record" and len(call.args) == 2 and "kind" in ast.unparse(call):
        return False  # the renderer's, of the same name
    if owner == "os":
        creates = name == "open" and ("O_CREAT" in ast.unparse(call) or "flags" in ast.unparse(call))
        return name in _OS or creates
    if name in ("send", "sendmsg"):
        return owner.endswith(("_orders", "_sock"))
    if name in _OF_PATHS:
        return owner != "self" and "directory" not in owner.split(".")[-1:]
    return name in _OTHERS


def find_sites() -> dict[str, Site]:
    found: dict[str, Site] = {}
    for module, file in MODULES.items():
        tree = ast.parse((AGENT / file).read_text())
        _walk(tree, [module], None, None, file, found)
    return found


def _walk(
    node: ast.AST, names: list[str], function: Any, statement: Any, file: str, found: dict[str, Site]
) -> None:
    for child in ast.iter_child_nodes(node):
        inner = names
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            inner = [*names, child.name]
        if isinstance(child, ast.stmt):
            statement = child
        if isinstance(child, ast.Call) and function is not None and _durable(child):
            called = ast.unparse(child.func).rpartition(".")[2]
            base = f"{'.'.join(names)} {called}"
            name, count = base, 1
            while name in found:
                count += 1
                name = f"{base} {count}"
            body = getattr(statement, "body", None)
            last = body[0].lineno - 1 if body else statement.end_lineno
            line = min([function.lineno, *(each.lineno for each in function.decorator_list)])
            opening = not any(site.file == file and site.line == line for site in found.values())
            found[name] = Site(file, function.name, line, statement.lineno, last, opening)
        _walk(child, inner, child if isinstance(child, ast.FunctionDef) else function, statement, file, found)


def steps_of(sites: Iterable[str]) -> list[str]:
    """The names of the steps at these sites."""
    known = find_sites()
    found = []
    for site in sites:
        if known[site].opening:
            found.append(f"before {site}")
        found.append(f"after {site}")
    return found


class Plan:
    """Which steps kill whom, and which have; see hook/sitecustomize.py."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: dict[str, dict[str, Any]] = {}
        self._sites = find_sites()

    def add(self, step: str, role: str, *, vmr: str = "", visit: int = 1, name: str = "") -> None:
        """Kill a process in this role (of shims, that of a VMR) the ``visit``-th time that it comes there.

        Each step once, unless it is given another name.
        """
        when, _, where = step.partition(" ")
        site = self._sites[where]
        self.steps[name or step] = {
            "role": role,
            "vmr": vmr,
            "file": str(AGENT / site.file),
            "function": site.function,
            "line": site.line,
            "first": site.first,
            "last": site.last,
            "after": when == "after",
            "visit": visit,
        }

    def write(self) -> None:
        self.path.write_text(json.dumps(self.steps))

    @property
    def environment(self) -> Mapping[str, str]:
        return {"VMR_TEST_STEPS": str(self.path), "PYTHONPATH": f"{HOOK}{os.pathsep}{AGENT.parent}"}

    def taken(self) -> dict[str, dict[str, Any]]:
        """What was said at each step at which something was killed."""
        try:
            rows = [json.loads(line) for line in Path(f"{self.path}.taken").read_text().splitlines()]
        except FileNotFoundError:
            return {}
        found = {row["step"]: row for row in rows}
        assert len(found) == len(rows), "each is taken once"
        return found

    def wait(self, *words: str, limit: float = 240.0) -> None:
        """Until each step, or each in whose name one of these words stands, has been reached."""
        try:
            until(lambda: not self.missing(*words), "", limit)
        except AssertionError:
            raise AssertionError(f"steps that nobody reached: {self.missing()}") from None

    def missing(self, *words: str) -> list[str]:
        left = sorted(self.steps.keys() - self.taken().keys())
        return [step for step in left if not words or any(word in step for word in words)]
