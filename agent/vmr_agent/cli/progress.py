"""What lives here: how far a transfer is, for people: a bar on a terminal, in the end one line in scp's manner.

It must not know: what is transferred, or how.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Optional

LONG = 1 << 26  # bytes that take a while to check, so that people wonder
_EVERY = 0.1  # s between two looks of the line


class Progress:
    """A bar by rich where it is installed, a line that rewrites itself where not, nothing where nobody looks."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._total = self._done = 0
        self._began = self._shown = time.monotonic()
        self._note = ""
        self._bar: Any = None
        self._task: Any = None
        self._on_terminal = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._on_terminal and self._shown != self._began:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def begin(self, total: int) -> None:
        """``total`` bytes are to come."""
        self._total, self._began = total, time.monotonic()
        self._shown = self._began
        if self._on_terminal:
            self._bar = _rich_bar()
            if self._bar is not None:
                self._task = self._bar.add_task(self._label, total=total, note="")
                self._bar.start()

    def add(self, count: int) -> None:
        self._done += count
        self._show(at_once=self._done == self._total)

    def note(self, note: str) -> None:
        """Say what takes long meanwhile; empty: nothing does."""
        if note != self._note:
            self._note = note
            self._show(at_once=True)

    def line(self, count: str = "") -> str:
        """What remains of it: name, percent, bytes, rate, time."""
        took = time.monotonic() - self._began
        rate = _short(self._done / took) if took > 0 else "-"
        what = f"{self._label}  100%  " + (f"{count}  " if count else "")
        return f"{what}{_short(self._done)}  {rate}B/s  {_clock(took)}"

    def _show(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if not self._on_terminal or (now - self._shown < _EVERY and not at_once):
            return
        self._shown = now
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, note=self._note)
            return
        share = 100 * self._done // self._total if self._total else 100
        took = now - self._began
        rate = self._done / took if took > 0 else 0.0
        left = _clock((self._total - self._done) / rate) if rate else "--:--"
        line = (
            f"{self._label}  {share:3d}%  {_short(self._done)}  {_short(rate)}B/s  {left} left  {self._note}"
        )
        print(f"\r{line.rstrip()}\x1b[K", end="", file=sys.stderr, flush=True)


def _rich_bar() -> Any:
    """rich's bar, or None where rich isn't installed."""
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None
    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
        transient=True,
    )


def _short(count: float) -> str:
    """As scp shows sizes: 226, 765.5K, 1.2G."""
    units = iter("KMGTPE")
    unit = ""
    while count >= 1024 and unit != "E":
        count, unit = count / 1024, next(units)
    return f"{count:.1f}{unit}" if unit else f"{count:.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(min(seconds, 359_999)), 60)
    return f"{minutes:02d}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
