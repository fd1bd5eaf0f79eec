"""A channel between a guest and its host that a test can cut at the wrong moment. Knows no test."""

from __future__ import annotations

import select
import socket
import threading
from contextlib import suppress
from pathlib import Path


class Relay:
    """Listens for the guest, connects to the host, and passes bytes on; what the guest says can be swallowed."""

    def __init__(self, guest: Path, host: Path) -> None:
        self.swallowing = threading.Event()
        self._cut = threading.Event()
        self._ended = threading.Event()
        self._host = host
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(guest))
        self._listener.listen(1)
        self._listener.settimeout(0.1)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """End this connection, and let the next one be a good one."""
        self._cut.set()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while not self._ended.is_set():
            with suppress(OSError):
                near, _ = self._listener.accept()
                with near, socket.socket(socket.AF_UNIX) as far:
                    far.connect(str(self._host))
                    self._pass(near, far)

    def _pass(self, guest: socket.socket, host: socket.socket) -> None:
        self._cut.clear()
        while not (self._cut.is_set() or self._ended.is_set()):
            readable, _, _ = select.select([guest, host], [], [], 0.02)
            for sock in readable:
                data = sock.recv(1 << 16)
                if not data:
                    return
                if sock is host:
                    guest.sendall(data)
                elif not self.swallowing.is_set():
                    host.sendall(data)
        self.swallowing.clear()
