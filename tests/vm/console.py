"""A root login on a VM's serial console (ttyS0), typed at and read as a person would.

Knows the image's console and bash; nothing of the product. The guest's command server (``Vm.run``) can be used
beside it.
"""

from __future__ import annotations

import re
import select
import time
from types import TracebackType
from typing import Callable, Optional

from tests.vm.vm import Vm

PATIENCE = 60.0  # s; ends a hang, measures nothing
CTRL_C = "\x03"
_PROMPT = re.compile(r"\[(\d+)\]guest# $")
_PASTE = re.compile(r"\x1b\[\?2004[hl]\r?")  # bash tells the terminal when it reads a line
_SETUP = "stty cols {}; PS1='[$?]guest# '"


class Console:
    """The shell of a login that is there already: the image logs root in by itself."""

    def __init__(self, vm: Vm, columns: int = 200) -> None:
        self._socket = vm.connect("console")
        self._raw = b""
        self._setup = _SETUP.format(columns)  # a line that wraps would be echoed in pieces
        self.fresh()

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], value: Optional[BaseException], tb: Optional[TracebackType]
    ) -> None:
        self._socket.close()

    def fresh(self) -> None:
        """A prompt, whatever was left running in the foreground."""
        self._raw = b""
        self._send(CTRL_C)
        self._wait(lambda: self._seen.endswith("# "), "a prompt", PATIENCE)
        self.begin(f"cd; {self._setup}; echo at a $((1))st prompt")
        self.shows("at a 1st prompt\n")  # not that of Ctrl-C, which may come late
        self.end()

    @property
    def _seen(self) -> str:
        return _PASTE.sub("", self._raw.decode("utf-8", "backslashreplace"))

    @property
    def text(self) -> str:
        """All that was shown since the last line was typed, that line's echo included."""
        return self._seen.replace("\r\n", "\n")

    def type(self, line: str, limit: float = PATIENCE) -> tuple[int, str]:
        """Type a command and wait for the next prompt; its exit status and what it wrote."""
        self.begin(line)
        return self.end(limit)

    def begin(self, line: str) -> None:
        """Type a command and do not wait."""
        self._raw = b""
        self._send(line + "\r")

    def key(self, key: str) -> None:
        """Press a key, such as `CTRL_C`."""
        self._send(key)

    def shows(self, words: str, *, times: int = 1, limit: float = PATIENCE) -> None:
        """Wait until it has shown something so often since the last line was typed."""
        self._wait(lambda: self.text.count(words) >= times, f"{words!r}, {times} times", limit)

    def end(self, limit: float = PATIENCE) -> tuple[int, str]:
        """Wait for the prompt; the last command's exit status and what it wrote."""
        self._wait(lambda: _PROMPT.search(self._seen) is not None, "a prompt", limit)
        shown = self._seen
        prompt = _PROMPT.search(shown)
        assert prompt is not None
        _, _, written = shown[: prompt.start()].partition("\r\n")
        return int(prompt[1]), written.replace("\r\n", "\n")

    def _send(self, text: str) -> None:
        self._socket.sendall(text.encode())

    def _wait(self, holds: Callable[[], bool], what: str, limit: float) -> None:
        deadline = time.monotonic() + limit
        while not holds():
            left = deadline - time.monotonic()
            if left <= 0:
                raise AssertionError(f"gave up after {limit:.0f} s: {what}; the console showed:\n{self.text}")
            if select.select([self._socket], [], [], left)[0]:
                piece = self._socket.recv(65536)
                if not piece:
                    raise AssertionError(f"the console ended before {what}:\n{self.text}")
                self._raw += piece
