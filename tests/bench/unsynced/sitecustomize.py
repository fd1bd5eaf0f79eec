"""Takes every sync out of the processes it is loaded into, to see what syncing costs. Knows no test.

Python loads a module of this name at its start, so daemon, collector and renderer do when this directory is on
their PYTHONPATH; the fork server, which runs with -I -S -E, is started through it by the daemon's copy. The product
has no switch for this: what it promises it can't keep so.
"""

import ctypes
import os
import subprocess
import sys


def take_out() -> None:
    os.fsync = os.fdatasync = lambda fd: None  # type: ignore[assignment]
    os.sync = lambda: None
    find = ctypes.CDLL.__getattr__

    def found(library, name):
        return (lambda fd: 0) if name == "syncfs" else find(library, name)

    ctypes.CDLL.__getattr__ = found  # type: ignore[method-assign]


def pass_on() -> None:
    """To the fork server too, which takes nothing from its environment."""
    start = subprocess.Popen.__init__

    def started(self, args, *more, **named):
        if isinstance(args, list) and "-I" in args:
            at = args.index("-E") + 1
            args = [*args[:at], os.path.abspath(__file__), *args[at:]]
        start(self, args, *more, **named)

    subprocess.Popen.__init__ = started  # type: ignore[method-assign]


take_out()
if __name__ == "__main__":
    import runpy

    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    pass_on()
