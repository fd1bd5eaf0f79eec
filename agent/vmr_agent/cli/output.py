"""What lives here: what both commands do while a run's output passes by: whose bytes go where, when to stop, and
what its end is as an exit status.

It must not know: where the bytes lie, who is asked for them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Callable

from vmr_agent.runs import Ending, Stream


def targets(streams: Sequence[Stream]) -> dict[Stream, int]:
    """The descriptor for each: stdout to stdout and stderr to stderr, one stream alone to stdout."""
    return {stream: int(stream) if len(streams) > 1 else 1 for stream in streams}


def put(target: int, data: bytes) -> None:
    """All of it, unchanged."""
    while data:
        data = data[os.write(target, data) :]


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
    print(f"{program}: {'lost: ' if ending is Ending.LOST else ''}{text}", file=sys.stderr)
    return 1 if ending is Ending.LOST else 126


def remark(program: str, sentence: str, *, always: bool = False) -> None:
    """A word of our own, on a terminal only: the streams are the VMR's."""
    if always or sys.stderr.isatty():
        print(f"{program}: {sentence}", file=sys.stderr, flush=True)
