"""What must be true of a world when all is over: every byte, every line and every result once. Knows no fault.

Files are read piece by piece, so that it holds for gigabytes too.
"""

from __future__ import annotations

import ast
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

from tests.e2e.world import World, until

STREAMS = ("stdout", "stderr")
KILLED = "its shim was killed"
WITNESS = "executed"
"""A script leaves a line here each time it is executed, in its own directory."""
_OUTPUT = re.compile(r"^\[.{23} INFO\] (\S+) \(\d+\) (stdout|stderr): (b['\"].*)$")
_START = re.compile(r"^\[.{23} INFO\] (CALL ARGS: .*/(\S+)/call_arguments\.sh|PID returned: (\d+))$")
_END = re.compile(r"^\[.{23} (?:INFO|WARNING)\] (\S+) \(\d+\) (exited after|lost:)")

Printed = Mapping[str, Callable[[str], bytes]]
"""For each VMR, what its script prints on a stream when it comes to its end. Names must differ in their last part."""


def assert_all_is_there_once(
    world: World, printed: Printed, *, history: str, killed: Optional[set[str]] = None, limit: float = 120.0
) -> dict[str, dict[str, Any]]:
    """Wait until the host has every run closed, then look at everything. Returns the rows of the runs.

    ``killed`` are the VMRs whose shim was killed: only these may be lost, or lack what came after their end; then
    what came is the beginning of what was printed, to the last byte that was captured.
    """

    def closed() -> Optional[dict[str, dict[str, Any]]]:
        found = {vmr: world.result(vmr) for vmr in printed}
        return found if all(row and row["closed"] for row in found.values()) else None  # type: ignore[return-value]

    try:
        rows: dict[str, dict[str, Any]] = until(closed, "every run closed on the host", limit)
    except AssertionError as error:
        missing = [vmr for vmr in printed if not (world.result(vmr) or {}).get("closed")]
        raise AssertionError(f"{error}: {missing}\n{history}\n{world.tail()}") from None
    for vmr, text in printed.items():
        _check_run(world, vmr, rows[vmr], text, killed or set(), history)
    attempts = {str(path.parent.relative_to(world.logs)) for path in world.logs.glob("*/*/*/*/result.json")}
    assert attempts == {f"Server/{vmr}/1" for vmr in printed}, f"one life, one run each: {history}"
    Logs(world, printed, rows, history).check()
    return rows


def _check_run(
    world: World, vmr: str, row: dict[str, Any], text: Callable[[str], bytes], killed: set[str], history: str
) -> None:
    executed = world.launch / vmr / WITNESS
    times = executed.read_text().count("\n") if executed.exists() else 0
    what = f"{vmr}: {row}\n{history}"
    assert row["gaps"] == [], what
    cut = not row["complete"]
    if cut:
        assert vmr in killed and row["error"] == KILLED, what
        assert row["state"] == "lost" or (row["state"], row["exit_code"]) == ("exited", 0), what
        assert times <= 1, what
    else:
        assert (row["state"], row["exit_code"], times) == ("exited", 0, 1), what
    for stream in STREAMS:
        raw = (world.logs / "Server" / vmr / "1" / stream).read_bytes()
        assert row[f"{stream}_bytes"] == len(raw), what
        if cut:
            assert text(stream).startswith(raw), f"{stream} of {what}"
            captured = world.spool / "runs" / vmr / "1" / stream
            assert len(raw) == (captured.stat().st_size if captured.exists() else 0), f"{stream} of {what}"
        else:
            assert raw == text(stream), f"{stream} of {what}"


class Counted:
    """The lines of a log that match, counted as it grows; a renderer that begins again cuts it first."""

    def __init__(self, path: Path, pattern: Optional[re.Pattern[str]] = None) -> None:
        self.found = 0
        self._path, self._pattern = path, pattern
        self._position = 0

    def look(self) -> int:
        """Count on; returns the size."""
        size = self._path.stat().st_size if self._path.exists() else 0
        if size < self._position:
            self.found = self._position = 0
        if size:
            with self._path.open("rb") as lines:
                lines.seek(self._position)
                for line in lines:
                    if not line.endswith(b"\n"):
                        break
                    self._position += len(line)
                    self.found += self._pattern is None or bool(self._pattern.match(line.decode()))
        return size


class Logs:
    """The two logs against the raw files, which are known to be right."""

    def __init__(
        self, world: World, printed: Printed, rows: Mapping[str, dict[str, Any]], history: str
    ) -> None:
        self.world = world
        self.rows = rows
        self.history = history
        self.names = {vmr.rpartition("/")[2]: vmr for vmr in printed}
        assert len(self.names) == len(printed), "the log names a run by the last part of its VMR"

    def check(self) -> None:
        log, rows = (self.world.logs / f"Server.{kind}" for kind in ("log", "json"))
        self._settle(log, rows)
        self._check_log(log)
        self._check_json(rows)

    def _settle(self, log: Path, rows: Path) -> None:
        """Wait for the last end and the last row, and until nothing has come for a moment: what came twice would
        come late."""
        lines = sum(1 for vmr in self.rows for stream in STREAMS for _ in self._lines(self._raw(vmr, stream)))
        ends, told = Counted(log, _END), Counted(rows)
        sizes = [-1]

        def settled() -> bool:
            nonlocal sizes
            time.sleep(0.3)
            before, sizes = sizes, [ends.look(), told.look()]
            return ends.found >= len(self.rows) and told.found >= lines and sizes == before

        what = f"{len(self.rows)} ends and {lines} rows in the logs"
        try:
            until(settled, what, 120.0)
        except AssertionError as error:
            raise AssertionError(f"{error}; {ends.found} and {told.found}: {self.history}") from None

    def _raw(self, vmr: str, stream: str) -> Path:
        return self.world.logs / "Server" / vmr / "1" / stream

    def _check_log(self, log: Path) -> None:
        shown: dict[tuple[str, str], int] = {}
        said: dict[str, list[str]] = {name: [] for name in self.names}
        begun = ""
        with log.open() as lines:
            for line in lines:
                if found := _OUTPUT.match(line):
                    name, stream, data = found[1], found[2], ast.literal_eval(found[3])
                    at = shown.get((name, stream), 0)
                    with self._raw(self.names[name], stream).open("rb") as raw:
                        raw.seek(at)
                        same = raw.read(len(data)) == data
                    assert same, f"{name} {stream} from {at} on, in Server.log: {self.history}"
                    shown[name, stream] = at + len(data)
                    said[name].append("output")
                elif found := _START.match(line):
                    # The two lines of a start stand together.
                    if found[2]:
                        begun = found[2]
                    said[begun].append("script" if found[2] else "pid")
                elif found := _END.match(line):
                    said[found[1]].append("end")
        for name, vmr in self.names.items():
            for stream in STREAMS:
                size = self._raw(vmr, stream).stat().st_size
                assert shown.get((name, stream), 0) == size, f"{vmr} {stream} in Server.log: {self.history}"
            words = said[name]
            assert [word for word in words if word != "output"] == ["script", "pid", "end"], (
                f"{vmr} has {words} in Server.log: {self.history}"
            )
            assert words[:2] == ["script", "pid"], f"{vmr} printed before its start: {self.history}"

    def _check_json(self, log: Path) -> None:
        left: dict[tuple[str, str], Iterator[bytes]] = {}
        for vmr in self.rows:
            for stream in STREAMS:
                left[vmr, stream] = self._lines(self._raw(vmr, stream))
        with log.open() as lines:
            for line in lines:
                row = json.loads(line)
                key = row["vmr"], row["stream"]
                due = next(left[key], None)
                assert row["attempt"] == 1 and due is not None and row["msg"] == due.decode(), (
                    f"{key}: {row} where {due!r} was due: {self.history}"
                )
        for key, lines_left in left.items():
            assert next(lines_left, None) is None, f"{key} is not whole in Server.json: {self.history}"

    @staticmethod
    def _lines(path: Path) -> Iterator[bytes]:
        with path.open("rb") as lines:
            for line in lines:
                yield line.rstrip(b"\n")
