"""The limit that throughput is held against: pipe → socket → file with a sync each MiB, as little as Python can do.

`limits.py relay` reads its standard input and writes to the socket that is its standard output; `limits.py sink FILE
[SIZE]` reads the socket that is its standard input, to its end or so many bytes, and ends when all of it is durable: a
VM's port has no end. Each is one process, on two cores.
Standard library only: it runs with -S -E.
"""

import fcntl
import os
import socket
import sys

PIECE = 256 * 1024
SYNC_EACH = 1 << 20
F_SETPIPE_SZ = 1031


def relay():
    try:
        fcntl.fcntl(0, F_SETPIPE_SZ, 1 << 20)
    except OSError:
        pass  # a file
    out = socket.socket(fileno=1)
    buffer = memoryview(bytearray(PIECE))
    while True:
        count = os.readv(0, [buffer])
        if not count:
            return
        out.sendall(buffer[:count])


def sink(path, size=None):
    buffer = memoryview(bytearray(PIECE))
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    unsynced = total = 0
    while True:
        count = os.readv(0, [buffer]) if total != size else 0
        if count:
            os.write(file, buffer[:count])
            unsynced += count
            total += count
        if unsynced >= SYNC_EACH or (unsynced and not count):
            os.fdatasync(file)
            unsynced = 0
        if not count:
            return


if __name__ == "__main__":
    relay() if sys.argv[1] == "relay" else sink(sys.argv[2], *map(int, sys.argv[3:]))
