"""What lives here: what both commands do while a run's output passes by: whose bytes go where, when to stop, and
what its end is as an exit status.

It must not know: where the bytes lie, who is asked for them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Callable

from vmr_agent.errors import Problem
from vmr_agent.runs import Ending, Stream


def targets(streams: Sequence[Stream]) -> dict[Stream, int]:
    """The descriptor for each: stdout to stdout and stderr to stderr, one stream alone to stdout."""
    return {stream: int(stream) if len(streams) > 1 else 1 for stream in streams}


def put(target: int, data: bytes) -> None:
    """All of it, unchanged. Raises Problem where it can't be written; BrokenPipeError where nobody reads any more."""
    try:
        while data:
            data = data[os.write(target, data) :]
    except BrokenPipeError:
        raise
    except OSError as error:
        which = "output" if target == 1 else "error"
        raise Problem(f"cannot write to standard {which}: {error.strerror}") from None


def gap_remark(stream: Stream, offset: int, length: int, reason: str) -> str:
    return f"{length:,} bytes of {stream.filename} from byte {offset:,} on are missing: {reason}"


def follow(
    *,
    over: Callable[[], bool],
    pass_on: Callable[[bool], None],
    wait: Callable[[], None],
    enough: Callable[[], bool] = lambda: False,
) -> None:
    """Pass output on as it comes until the run is over, or it is ``enough``; ``pass_on(True)`` is the last time."""
    while True:
        # The order matters: what is there before the record says that it is all there.
        last = over()
        pass_on(last)
        if last or enough():
            return
        wait()


def exit_status(program: str, ending: Ending, value: int, text: str) -> int:
    """What a shell would say: the code, 128 + signal, 126 for a script that could not be executed; 1: nobody knows."""
    if ending is Ending.CODE:
        return value
    if ending is Ending.SIGNAL:
        return 128 + value
    remark(program, no_end(ending, text), always=True)
    return 1 if ending is Ending.LOST else 126


def no_end(ending: Ending, text: str) -> str:
    """Why a run has neither exit code nor signal; empty for one that has."""
    return {Ending.LOST: f"lost: {text}", Ending.ERRNO: text}.get(ending, "")


def remark(program: str, sentence: str, *, always: bool = False) -> None:
    """A word of our own, on a terminal only: the streams are the VMR's."""
    if always or sys.stderr.isatty():
        print(f"{program}: {sentence}", file=sys.stderr, flush=True)
