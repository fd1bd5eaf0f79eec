"""A VM's disk that loses what was not flushed: an NBD server before a disk file, with a cache that a power cut empties.

QEMU killed by SIGKILL leaves what the guest wrote and did not flush in the host's page cache, as no power cut
would. Behind this server it is gone: only what a flush covered reaches the file. Knows nothing of VMs.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO

BLOCK = 4096
SIZE = 8 << 30  # bytes; what the disk's own format may grow to, sparse

# The protocol's fixed newstyle handshake: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
_GREETING = struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 0b11)
_OPTION = struct.Struct(">QII")
_REPLY = 0x3E889045565A9
_REQUEST = struct.Struct(">IHHQQI")
_ANSWER = struct.Struct(">IIQ")
_INFO, _GO = 6, 7
_ACK, _REP_INFO, _UNSUPPORTED = 1, 3, (1 << 31) + 1
_READ, _WRITE, _END, _FLUSH = range(4)
_FLAGS = 0b101  # there are flags; it can be flushed


class LossyDisk:
    """Serves ``file`` from :meth:`open` to :meth:`cut`."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="nbd-"))
        self._unflushed: dict[int, bytearray] = {}
        self.lost = 0
        """Bytes that the last cut took."""

    def open(self, file: Path) -> str:
        """What QEMU is to be given as the disk's file name."""
        path = self._directory / "socket"
        path.unlink(missing_ok=True)
        self._fd = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        os.ftruncate(self._fd, SIZE)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(os.fspath(path))
        self._listener.listen(1)
        self._listener.settimeout(60)  # s; for QEMU to connect
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return f"nbd+unix:///?socket={path}"

    def cut(self) -> None:
        """When QEMU is gone: forget what was not flushed."""
        self._thread.join()
        self.lost = len(self._unflushed) * BLOCK
        self._unflushed.clear()
        os.close(self._fd)

    def close(self) -> None:
        shutil.rmtree(self._directory)

    # --- inside ---

    def _serve(self) -> None:
        with self._listener, suppress(ConnectionError):
            client, _ = self._listener.accept()
            with client, client.makefile("rb") as file:
                if self._shake_hands(client, file):
                    while self._answer(client, file):
                        pass

    def _shake_hands(self, client: socket.socket, file: IO[bytes]) -> bool:
        client.sendall(_GREETING)
        _take(file, 4)
        while True:
            _, option, length = _OPTION.unpack(_take(file, _OPTION.size))
            _take(file, length)

            def reply(kind: int, data: bytes = b"", option: int = option) -> None:
                client.sendall(struct.pack(">QIII", _REPLY, option, kind, len(data)) + data)

            if option not in (_INFO, _GO):
                reply(_UNSUPPORTED)
                continue
            reply(_REP_INFO, struct.pack(">HQH", 0, SIZE, _FLAGS))
            reply(_ACK)
            if option == _GO:
                return True

    def _answer(self, client: socket.socket, file: IO[bytes]) -> bool:
        _, _, kind, handle, offset, length = _REQUEST.unpack(_take(file, _REQUEST.size))
        data = b""
        if kind == _READ:
            data = self._read(offset, length)
        elif kind == _WRITE:
            self._write(offset, _take(file, length))
        elif kind == _FLUSH:
            for number, block in self._unflushed.items():
                os.pwrite(self._fd, block, number * BLOCK)
            self._unflushed.clear()
        elif kind == _END:
            return False
        client.sendall(_ANSWER.pack(0x67446698, 0, handle) + data)
        return True

    def _read(self, offset: int, length: int) -> bytes:
        data = bytearray(os.pread(self._fd, length, offset))
        for number in range(offset // BLOCK, (offset + length - 1) // BLOCK + 1):
            block = self._unflushed.get(number)
            if block is not None:
                start, end = max(offset, number * BLOCK), min(offset + length, (number + 1) * BLOCK)
                data[start - offset : end - offset] = block[start - number * BLOCK : end - number * BLOCK]
        return bytes(data)

    def _write(self, offset: int, data: bytes) -> None:
        while data:
            number, within = divmod(offset, BLOCK)
            piece = data[: BLOCK - within]
            block = self._unflushed.get(number)
            if block is None:
                block = bytearray(os.pread(self._fd, BLOCK, number * BLOCK))
                self._unflushed[number] = block
            block[within : within + len(piece)] = piece
            offset, data = offset + len(piece), data[len(piece) :]


def _take(file: IO[bytes], length: int) -> bytes:
    data = file.read(length)
    if len(data) < length:
        raise ConnectionError
    return data
