"""What lives here: what is held of one run, and its row: ``result.json``, and each line of a ``--json``.

It must not know: files, the journal, how any of it came.
"""

from __future__ import annotations

from typing import Any, Optional

from vmr_agent.errors import show
from vmr_agent.runs import Ending, RunState, Stream, run_path, signal_name, timestamp
from vmr_agent.wire import messages

STATES = {
    Ending.CODE.value: "exited",
    Ending.SIGNAL.value: "killed",
    Ending.ERRNO.value: "failed to start",
    Ending.LOST.value: "lost",
}


_GAP = 256  # bytes that a gap takes in memory, without its reason


class HeldStream:
    """One stream of one run."""

    __slots__ = ("durable", "gap_end", "held", "more", "name", "unfinished")

    def __init__(self, name: str) -> None:
        self.name = name
        """Of its file, in the life's directory."""
        self.held = 0
        self.durable = 0
        self.gap_end = 0
        self.more = False
        self.unfinished = False
        """Its last byte was no newline, and nothing has shown that part of a line yet."""


class HeldRun:
    """One run that isn't durably closed."""

    def __init__(self, message: messages.Run, started_ns: int) -> None:
        self.message = message
        self.started_ns = started_ns
        self.state = RunState.STARTED
        self.durable = RunState.NONE
        self.exit: Optional[messages.Exit] = None
        self.ended_ns = 0
        self.closed: Optional[messages.Closed] = None
        self.gaps: list[dict[str, Any]] = []
        self.missing = 0
        """Bytes in all gaps, also those that are not listed for there are too many."""
        self.size = len(pack(message))
        """Bytes that it keeps in memory, about."""
        self.label = (message.vmr, message.attempt)
        self.path = run_path(message.vmr, message.attempt)
        self.streams: dict[int, HeldStream] = {
            stream: HeldStream(f"{self.path}/{stream.filename}") for stream in Stream
        }
        self.stdout, self.stderr = self.streams.values()

    def take_exit(self, message: messages.Exit) -> int:
        """Returns by how much :attr:`size` grew."""
        self.exit = message
        return self._grow(len(pack(message)))

    @staticmethod
    def gap_row(message: messages.Gap, skew_ns: int) -> dict[str, Any]:
        return {
            "stream": Stream(message.stream).filename,
            "offset": message.offset,
            "length": message.length,
            "reason": message.reason,
            "time": timestamp(message.wall + skew_ns) if message.wall is not None else None,
        }

    def list_gap(self, gap: dict[str, Any]) -> int:
        """Returns by how much :attr:`size` grew."""
        self.gaps.append(gap)
        return self._grow(_GAP + len(gap["reason"]))

    def _grow(self, by: int) -> int:
        self.size += by
        return by

    def row(self) -> dict[str, Any]:
        """``result.json``."""
        start_time, _, name = self.message.vmr.partition(b"/")
        row: dict[str, Any] = {
            "vmr": show(self.message.vmr),
            "start_time": show(start_time),
            "name": show(name),
            "attempt": self.message.attempt,
            "trigger": self.message.trigger,
            "state": "running",
            "pid": self.message.pid,
            "started": timestamp(self.started_ns),
            "ended": None,
            "duration_s": None,
            "exit_code": None,
            "signal": None,
            "error": None,
            "stdout_bytes": self.streams[Stream.STDOUT].held,
            "stderr_bytes": self.streams[Stream.STDERR].held,
            "closed": self.closed is not None,
            "complete": False,
            "gaps": self.gaps,
            "missing_bytes": self.missing,
            "rusage": None,
        }
        ended = self.exit
        if ended is not None:
            row["ended"] = timestamp(self.ended_ns) if ended.ended else None
            row["state"] = STATES.get(ended.ending, "lost")
            if ended.ending in (Ending.CODE.value, Ending.SIGNAL.value):
                row["duration_s"] = max(0, ended.ended_boottime - ended.started_boottime) / 1e9
            if ended.ending == Ending.CODE.value:
                row["exit_code"] = ended.value
            elif ended.ending == Ending.SIGNAL.value:
                row["signal"] = signal_name(ended.value)
            row["error"] = ended.text or None
            row["rusage"] = {
                "user_s": ended.user / 1e9,
                "system_s": ended.system / 1e9,
                "max_rss_bytes": ended.max_rss,
            }
        if self.closed is not None:
            row["complete"] = not self.missing and not self.closed.reason
            row["error"] = row["error"] or self.closed.reason or None
        return row

    def to_json(self) -> dict[str, Any]:
        return {
            "run": to_hex(self.message),
            "started_ns": self.started_ns,
            "exit": to_hex(self.exit) if self.exit else None,
            "ended_ns": self.ended_ns,
            "closed": to_hex(self.closed) if self.closed else None,
            "gaps": self.gaps,
            "missing": self.missing,
            "streams": [
                [held.held, held.gap_end, held.more, held.unfinished] for held in self.streams.values()
            ],
        }

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> HeldRun:
        run = cls(from_hex(row["run"]), row["started_ns"])
        if row["exit"]:
            run.take_exit(from_hex(row["exit"]))
            run.state, run.ended_ns = RunState.EXITED, row["ended_ns"]
        if row["closed"]:
            run.state, run.closed = RunState.CLOSED, from_hex(row["closed"])
        for gap in row["gaps"]:
            run.list_gap(gap)
        run.missing = row["missing"]
        for held, values in zip(run.streams.values(), row["streams"]):
            held.held, held.gap_end, held.more, held.unfinished = values
        return run


def pack(message: messages.Message) -> bytes:
    """A message as the journal holds it."""
    if isinstance(message, messages.Hello):
        return messages.pack(message)
    return messages.pack(message, to=bytes(8), n=0)


def to_hex(message: messages.Message) -> str:
    return pack(message).hex()


def from_hex(text: str) -> Any:
    return messages.unpack(bytes.fromhex(text)).message
