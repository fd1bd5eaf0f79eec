"""A verb at a terminal: started on a pty, typed at, and read. Used by the tests, knows no test."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
from types import TracebackType
from typing import Optional

from tests.e2e.world import LIMIT, World, until


class Terminal:
    """`vmr-agent` on a terminal of its own."""

    def __init__(self, world: World, *arguments: str, lines: int = 24, columns: int = 80) -> None:
        self._end, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        # The size of the screen is the terminal's alone.
        environment = {k: v for k, v in world.environment.items() if k not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vmr_agent.cli.start", *arguments],
            env=environment,
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
        )
        os.close(other)
        self._seen = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._end, 65536)
            except OSError:  # EIO: nobody has the other end any more
                return
            if not data:
                return
            self._seen += data

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: Optional[type[BaseException]], value: Optional[BaseException], tb: Optional[TracebackType]
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(5)
        os.close(self._end)

    @property
    def text(self) -> str:
        """All that was shown so far, lines ended as programs end them."""
        return self._seen.decode("utf-8", "backslashreplace").replace("\r\n", "\n")

    def shows(self, words: str, *, times: int = 1, limit: float = LIMIT) -> None:
        """Wait until it has shown something so often."""
        try:
            until(lambda: self.text.count(words) >= times, f"{words!r} is shown {times} times", limit)
        except AssertionError as failure:
            raise AssertionError(f"{failure}\n{self.text}") from None

    def interrupt(self) -> int:
        """Ctrl-C; the exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.end()

    def end(self) -> int:
        status = self.process.wait(LIMIT)
        self._reader.join(5)
        return status
