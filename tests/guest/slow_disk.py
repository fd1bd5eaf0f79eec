"""The fork server on a disk that syncs when it is let: `slow_disk.py GATE FORKSERVER`.

While there is no file GATE a sync takes its time; while there is GATE.fails it fails.
"""

import errno
import os
import runpy
import sys
import time

gate, program = sys.argv[1:]
fdatasync = os.fdatasync


def when_let(fd):
    while not os.path.exists(gate):
        time.sleep(0.01)
    if os.path.exists(gate + ".fails"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    fdatasync(fd)


os.fdatasync = when_let
sys.argv[:] = [program]
runpy.run_path(program, run_name="__main__")
