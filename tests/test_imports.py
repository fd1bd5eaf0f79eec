"""Which rooms may know which: every import in the source, held against the rules of the house."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "agent"
PACKAGE = "vmr_agent"
TOP_LEVEL = {"pyproject.toml", "agent", "packaging", "systemd", "tests", "README.md", "LICENSE"}
MADE = {"dist", "build", "PKG-INFO"}  # by builds, never committed

PURE = {"schedule", "runs", "errors", "sizes", "wire.framing", "wire.messages", "wire.session"}
PURE_IMPORTS = {
    *("__future__", "collections", "dataclasses", "datetime", "difflib", "enum", "functools", "hashlib"),
    *("itertools", "math", "re", "signal", "string", "struct", "typing", "zlib"),
}
CLOCKS = {"now", "today", "utcnow", "time", "monotonic", "sleep", "localtime"}
IO_CALLS = {"open", "print", "input", "exec", "eval", "__import__"}

ONLY_IN = {
    "msgpack": {"wire.messages"},
    "psutil": {"guest.processes"},
    "watchdog": {"guest.events"},
    "rich": {"cli.host", "cli.progress", "cli.tables", "host"},
    "asyncio": {"cli.host", "host"},
}
"""Which rooms may import these; a package stands for all in it."""

IMPORTERS = {
    "guest.shim": {"guest.forkserver"},
    "guest.daemon": {"cli.start"},
    "guest.supervisor": {"guest.daemon", "guest.verbs"},
    "guest.link": {"guest.daemon", "guest.verbs"},
    "host.collector": {"cli.host"},
    "cli": {"cli"},
}
"""Who alone may import these rooms of ours."""

KNOWS = {
    "errors": set(),
    "runs": {"errors"},
    "schedule": {"errors", "runs"},
    "wire": {"errors", "runs", "wire"},
    "control": {"errors", "runs"},
    "contents": set(),
    "sizes": set(),
    "guest": {"errors", "runs", "schedule", "wire", "control", "contents", "sizes", "guest"},
    "guest.shim": set(),
    "guest.forkserver": {"guest.shim"},
    "host": {"errors", "runs", "schedule", "wire", "control", "sizes", "host"},
    "host.firewheel_log": {"errors", "runs", "wire.messages"},
    "cli.arguments": {"errors", "sizes"},
    "cli.output": {"errors", "runs"},
    "cli.start": {"errors", "guest.settings", "guest.daemon", "cli.agent"},
    "cli.tables": {"errors", "sizes", "cli.arguments"},
    "cli.collected": {"errors", "runs", "schedule", "control", "host", "cli.output"},
    "cli.progress": set(),
    "cli.remote": {"contents", "errors", "control", "wire.messages", "cli.collected", "cli.progress"},
    "cli.pull": {"contents", "errors", "wire.messages", "cli.progress", "cli.remote"},
    "cli.push": {"contents", "errors", "wire.messages", "cli.progress", "cli.remote"},
    "cli.staging": {"errors", "schedule", "cli.arguments", "cli.progress", "cli.push", "cli.remote"},
    "cli.guest": {"errors", "runs", "schedule", "control", "guest", "cli.output", "cli.start"},
    "cli.ps": {"errors", "guest", "sizes", "cli.arguments", "cli.guest"},
    "cli.status": {"errors", "guest", "sizes", "cli.arguments", "cli.guest", "cli.start"},
    "cli.watch": {"errors", "runs", "control", "guest", "cli.arguments", "cli.guest"},
    "cli.diff": {"errors", "guest", "cli.guest"},
    "cli.agent": {"errors", "runs", "schedule", "wire", "control", "guest", "cli"},
    "cli.host": {"errors", "runs", "schedule", "wire", "control", "host", "cli"},
}
"""What of ours each room may import; the longest entry that fits holds."""

REASON = re.compile(r"400 lines|one module|usual length")

_LIBRARY = Path(os.__file__).parent
STDLIB: frozenset[str] = getattr(sys, "stdlib_module_names", frozenset()) or frozenset(  # new in Python 3.10
    path.name.split(".")[0] for place in (_LIBRARY, _LIBRARY / "lib-dynload") for path in place.glob("*")
).union(sys.builtin_module_names)


class Import(NamedTuple):
    """One import: of what, where."""

    target: str
    line: int
    at_top: bool


class Room(NamedTuple):
    """One module of ours."""

    name: str
    path: Path
    tree: ast.Module
    imports: tuple[Import, ...]


def imports_in(name: str, tree: ast.Module) -> Iterator[Import]:
    """Every import, also in functions, by the absolute name of the module it brings in."""
    inside = {
        node
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(outer)
    }
    for node in ast.walk(tree):
        at_top = node not in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_top)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: a relative import"
            assert node.module
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield Import(whole if is_ours(whole) else node.module, node.lineno, at_top)


def is_ours(module: str) -> bool:
    """Whether it is a module in this repository."""
    path = SOURCE / Path(*module.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def load() -> dict[str, Room]:
    """All our modules but the `__init__` files, named without the package."""
    rooms = {}
    for path in sorted((SOURCE / PACKAGE).rglob("*.py")):
        if path.name == "__init__.py":
            continue
        name = ".".join(path.relative_to(SOURCE / PACKAGE).with_suffix("").parts)
        tree = ast.parse(path.read_text(), str(path))
        rooms[name] = Room(name, path, tree, tuple(imports_in(name, tree)))
    return rooms


ROOMS = load()
rooms = pytest.mark.parametrize("room", ROOMS.values(), ids=list(ROOMS))


def within(name: str, places: set[str]) -> bool:
    """Whether the module is one of these or in one of these packages."""
    return any(name == place or name.startswith(place + ".") for place in places)


def ours(room: Room) -> list[tuple[str, Import]]:
    """The room's imports of other rooms, named without the package (empty: the package itself)."""
    found = [item for item in room.imports if item.target.split(".")[0] == PACKAGE]
    return [(item.target[len(PACKAGE) + 1 :], item) for item in found]


def others(room: Room) -> list[tuple[str, Import]]:
    """The top package of each import that isn't ours."""
    found = [(item.target.split(".")[0], item) for item in room.imports]
    return [(top, item) for top, item in found if top != PACKAGE]


def entry(name: str) -> str:
    """The entry of KNOWS that holds for a module."""
    fitting = [place for place in KNOWS if within(name, {place})]
    assert fitting, f"{name} is a new room: say in KNOWS what it may import"
    return max(fitting, key=len)


@rooms
def test_a_room_knows_only_what_it_may(room: Room) -> None:
    for target, item in ours(room):
        if target:  # the package itself holds the version alone
            assert within(target, KNOWS[entry(room.name)]), f"{room.path}:{item.line}: imports {target}"


@rooms
def test_guest_and_host_are_strangers(room: Room) -> None:
    side = room.name.split(".")[0]
    for target, item in ours(room):
        if side in ("guest", "host", "wire"):
            strangers = {"guest", "host"} - {side}
            assert not within(target, strangers), f"{room.path}:{item.line}: imports {target}"


@rooms
def test_rooms_with_one_door(room: Room) -> None:
    for target, item in ours(room):
        for closed, importers in IMPORTERS.items():
            if within(target, {closed}):
                assert within(room.name, importers), f"{room.path}:{item.line}: imports {target}"


@rooms
def test_who_may_use_which_library(room: Room) -> None:
    for top, item in others(room):
        assert top in STDLIB | set(ONLY_IN), f"{room.path}:{item.line}: a new library, {top}"
        if top in ONLY_IN:
            assert within(room.name, ONLY_IN[top]), f"{room.path}:{item.line}: {top} is for {ONLY_IN[top]}"


def test_libraries_are_those_declared() -> None:
    declared = re.findall(r'"(\w+)>=', (ROOT / "pyproject.toml").read_text().partition("[tool")[0])
    used = {top for room in ROOMS.values() for top, _ in others(room)} - STDLIB
    assert used <= set(declared)


@rooms
def test_pure_rooms_do_no_io(room: Room) -> None:
    if room.name not in PURE:
        return
    for top, item in others(room):
        allowed = top in PURE_IMPORTS or room.name in ONLY_IN.get(top, set())
        assert allowed, f"{room.path}:{item.line}: {top} in a pure room"
    assert not list(impure_calls(room))


def test_the_formats_of_firewheel_are_pure() -> None:
    """They may format a time, not read a clock."""
    room = ROOMS["host.firewheel_log"]
    strangers = {top for top, _ in others(room)} - PURE_IMPORTS - {"json", "signal", "time"}
    assert not strangers
    assert not list(impure_calls(room))


def impure_calls(room: Room) -> Iterator[str]:
    """Calls that read a clock or touch a file."""
    for node in ast.walk(room.tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            owner, _, name = called.rpartition(".")
            clock = owner.rpartition(".")[2] in ("time", "datetime", "date") and name in CLOCKS
            if clock or called in IO_CALLS:
                yield f"{room.path}:{node.lineno}: {called}()"


@pytest.mark.parametrize("name", ["guest.shim", "guest.forkserver"])
def test_what_each_run_pays_for_is_the_standard_library(name: str) -> None:
    room = ROOMS[name]
    assert {top for top, _ in others(room)} <= STDLIB


def test_what_each_run_pays_for_is_little() -> None:
    """Much of it is memory of each VM, and a part of that of each run."""
    script = (
        f"import sys; sys.path.append({str(SOURCE)!r})\n"
        "import vmr_agent.guest.forkserver, vmr_agent.guest.shim\n"
        "print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-I", "-S", "-E", "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {
        "collections",
        "ctypes",
        "enum",
        "json",
        "logging",
        "pathlib",
        "re",
        "signal",
        "socket",
        "subprocess",
        "typing",
    }
    assert "vmr_agent.guest.shim" in loaded and not heavy & set(loaded)


def test_no_circles() -> None:
    """Of imports that run when a module is loaded."""
    knows = {
        name: {target for target, item in ours(room) if item.at_top and target in ROOMS}
        for name, room in ROOMS.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " imports ".join((*path, name))
        if name not in done:
            for target in sorted(knows[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in knows:
        visit(name, ())


def test_init_files_are_empty_but_for_the_version() -> None:
    files = sorted((SOURCE / PACKAGE).rglob("__init__.py"))
    assert {path.parent.name for path in files} == {PACKAGE, "wire", "guest", "host", "cli"}
    for path in files:
        body = ast.parse(path.read_text()).body
        if path.parent.name == PACKAGE:
            assert [ast.unparse(node).split(" = ")[0] for node in body] == ["__version__"]
        else:
            assert path.read_text() == "", path


@rooms
def test_a_header_says_what_lives_here(room: Room) -> None:
    header = ast.get_docstring(room.tree) or ""
    assert header.startswith("What lives here: "), room.path
    lines = len(room.path.read_text().splitlines())
    assert lines <= 400 or REASON.search(header), f"{room.path} has {lines} lines; its header doesn't say why"


def test_the_top_level_is_the_agreed_list() -> None:
    there = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    there -= MADE | {name for name in there if name.endswith(".egg-info")}
    assert there == TOP_LEVEL


def test_loading_the_wire_loads_nothing_else() -> None:
    """Not through what it imports either, but for the few modules it names and what those load."""
    script = (
        f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n"
        "import __future__, collections, dataclasses, enum, struct, typing, zlib, msgpack\n"
        "before = set(sys.modules)\n"
        "import vmr_agent.wire.session\n"
        "print(*set(sys.modules) - before)"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert [name for name in loaded.stdout.split() if not within(name, {PACKAGE})] == []
