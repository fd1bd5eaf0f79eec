"""What lives here: how a command begins, and how it ends: an exit status, and an error in one line.

The daemon, as systemd starts it, stays as long as its VM, so it is spared what understands command lines: 2 MB. It must
not know: any other verb.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, Callable, Optional

from vmr_agent.errors import Problem

if TYPE_CHECKING:
    from vmr_agent.guest.settings import Settings

PROGRAM = "vmr-agent"


def agent() -> int:
    """`vmr-agent`."""
    if sys.argv[1:] == ["run"]:
        return run(PROGRAM, daemon)
    from vmr_agent.cli.agent import main

    return main()


def daemon(settings: Optional[Settings] = None) -> int:
    """Be the daemon, until told to stop. Raises Problem."""
    from vmr_agent.guest import settings as guest_settings
    from vmr_agent.guest.daemon import Daemon  # heavy: the other verbs start without it

    Daemon(settings or guest_settings.load({}, environment=os.environ)).run()
    return 0


def run(program: str, act: Callable[[], int]) -> int:
    """Run a verb: a Problem is one line and exit status 1; a closed pipe, a full disk or Ctrl-C is no traceback."""
    _have_all_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a terminal may be set to less than a name can hold
    try:
        status = act()
        sys.stdout.flush()
        return status
    except Problem as problem:
        print(f"{program}: {problem}", file=sys.stderr)
        return _without_more(1)
    except KeyboardInterrupt:
        return _without_more(130)
    except BrokenPipeError:
        _abandon_stdout()
        return 1
    except OSError as error:
        what = f": {error.filename}" if error.filename is not None else ""
        print(f"{program}: cannot go on: {error.strerror or error}{what}", file=sys.stderr)
        _abandon_stdout()
        return 1


def _have_all_streams() -> None:
    """Have all three, whatever whoever started us has closed.

    Else the next descriptor has the number of one: a socket that is connected gets what a VMR printed, as requests.
    As gnulib's stdopen has it, what is written to an output that was closed fails, still; errors are for nobody then.
    """
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)  # it is `fd`, the lowest that is free
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)


def _without_more(status: int) -> int:
    """What was printed before is still to be written, if it can be."""
    try:
        sys.stdout.flush()
    except OSError:
        _abandon_stdout()
    return status


def _abandon_stdout() -> None:
    """Python would complain once more when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(agent())
