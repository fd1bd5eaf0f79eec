"""What lives here: what the guest's verbs share: which VMR is meant, its runs, its output, words of our own.

It must not know: any verb.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence
from typing import Callable, Optional

from vmr_agent import control
from vmr_agent.cli import output
from vmr_agent.cli.start import PROGRAM
from vmr_agent.errors import Problem, show
from vmr_agent.guest import keepsakes
from vmr_agent.guest.settings import Settings
from vmr_agent.guest.spool import History, Run
from vmr_agent.runs import RunResult, Stream, timestamp
from vmr_agent.schedule import near, parse_start_time, parse_vmr

_PIECE = 256 * 1024
_LOOK_AGAIN = 0.2  # s; how often the spool is looked at when no daemon tells


# --- which VMR, which run ------------------------------------------------------------------------------------


def name(text: Optional[str], settings: Settings) -> bytes:
    """The VMR that somebody means, from a name, a path, or the directory he stands in."""
    launch = os.path.realpath(os.fsencode(settings.launch_dir))
    if text is not None:
        parsed = parse_vmr(os.fsencode(text))
        if parsed is not None:
            return parsed
    typed = os.fsencode(text) if text is not None else b"."
    try:
        path = os.path.realpath(os.path.join(os.getcwdb(), typed))
    except FileNotFoundError:
        raise Problem(
            "cannot tell where you are: the current directory has been removed", hint="cd /"
        ) from None
    inside = os.path.relpath(path, launch).split(b"/")
    is_vmr = len(inside) == 2 or (text is None and len(inside) > 2)
    if is_vmr and inside[0] != b".." and parse_start_time(inside[0]) is not None:
        return b"/".join(inside[:2])
    if text is None:
        raise Problem(
            "cannot tell which VMR is meant", hint="name one, as in -4/compress.py, or stand in its directory"
        )
    raise Problem(
        f"cannot tell which VMR {show(typed)} is",
        hint=f"a name is <start time>/<name>, a path is in {show(launch)}",
    )


def directory(vmr: bytes, settings: Settings) -> bytes:
    """Where the VMR lies."""
    return os.path.join(os.fsencode(settings.launch_dir), vmr)


def daemon(settings: Settings) -> control.Connection:
    """The daemon, to be asked. Raises Problem when it can't be."""
    return control.Connection(
        settings.runtime_dir / control.SOCKET,
        program="daemon",
        hint="systemctl start vmr-agent, or vmr-agent run",
    )


def runs_of(vmr: bytes, settings: Settings) -> list[Run]:
    """The runs of a VMR, oldest first, read from the spool: no daemon is needed. At least one, or a Problem."""
    history = History(settings.state_dir)
    try:
        runs = history.runs_of(vmr)
        known = [] if runs else history.names()
    except PermissionError:
        raise Problem(f"cannot read {settings.state_dir}: permission denied", hint="try as root") from None
    if runs:
        return runs
    if os.path.isdir(directory(vmr, settings)):
        raise Problem(
            f"cannot find a run of {show(vmr)}: it has not run yet", hint="vmr-agent status says why"
        )
    raise Problem(f"cannot find a run of {show(vmr)} in {settings.state_dir}", hint=near(vmr, known))


def say_what_to_pull(vmr: bytes, settings: Settings) -> None:
    """After a run that went well, on a terminal: how to bring home what was edited."""
    if sys.stderr.isatty():
        paths = History(settings.state_dir).edited(vmr, directory(vmr, settings))
        if paths:
            print(keepsakes.pull_hint(vmr, paths, os.uname().nodename), file=sys.stderr, flush=True)


def attempt_of(vmr: bytes, number: Optional[int], settings: Settings) -> Run:
    """One attempt of a VMR, the latest for None."""
    runs = runs_of(vmr, settings)
    if number is None:
        return runs[-1]
    for run in runs:
        if run.info.attempt == number:
            return run
    numbers = [run.info.attempt for run in runs]
    there = f"there is {numbers[0]}" if len(runs) == 1 else f"there are {numbers[0]} to {numbers[-1]}"
    raise Problem(f"cannot find attempt {number} of {show(vmr)}", hint=there)


# --- output --------------------------------------------------------------------------------------------------


class Printer:
    """Passes a run's spooled bytes on, raw, in the order in which they came.

    stdout goes to stdout and stderr to stderr; one stream alone goes to stdout. With ``timestamps`` whole lines
    are passed on, each behind the time at which it began and its stream.
    """

    def __init__(self, run: Run, streams: Sequence[Stream], *, timestamps: bool = False) -> None:
        self._run = run
        self._place = 0
        self._offsets = {stream: max(0, run.pruned(stream)) for stream in streams}
        self._targets = output.targets(streams)
        self._timestamps = timestamps
        self._lines = {stream: b"" for stream in streams}
        self._began = {stream: 0 for stream in streams}
        for stream, offset in self._offsets.items():
            if offset:
                remark(_pruned(stream, 0, offset), always=True)

    def pass_on(self, *, last: bool) -> None:
        """Pass on what came; ``last``: also what the index doesn't know, and lines without an end."""
        lengths = self._run.lengths()
        while True:
            captures = self._run.captured(self._place)
            for capture in captures:
                self._place = capture.place
                if capture.stream in self._offsets and capture.length:
                    self._copy(capture.stream, capture.offset + capture.length, capture.wall_ns)
            if len(captures) < 2:
                break
        if last:
            for stream in self._offsets:
                self._copy(stream, lengths.of(stream), self._run.info.created_ns)
                if self._lines[stream]:
                    self._put(stream, b"\n", 0)

    def _copy(self, stream: Stream, end: int, wall_ns: int) -> None:
        while self._offsets[stream] < end:
            at = self._offsets[stream]
            gap = self._run.gap(stream, at, end)
            if gap is not None and gap.begin <= at:
                self._pass_over(stream, min(gap.end, end), gap.reason)
                continue
            until = end if gap is None else gap.begin
            data = self._run.read(stream, at, min(_PIECE, until - at))
            pruned = self._run.pruned(stream)  # after the reading: it is noted before a byte goes
            if at < pruned:
                self._offsets[stream] = pruned
                remark(_pruned(stream, at, pruned), always=True)
                continue
            if not data:
                return  # lost with the power, or with the tail of an index that says too much
            self._offsets[stream] += len(data)
            self._put(stream, data, wall_ns)

    def _pass_over(self, stream: Stream, end: int, why: str) -> None:
        at, self._offsets[stream] = self._offsets[stream], end
        if self._lines[stream]:
            self._put(stream, b"\n", 0)
        remark(output.gap_remark(stream, at, end - at, f"dropped, for {why}"))

    def _put(self, stream: Stream, data: bytes, wall_ns: int) -> None:
        if self._timestamps:
            if not self._lines[stream]:
                self._began[stream] = wall_ns
            lines = (self._lines[stream] + data).split(b"\n")
            self._lines[stream] = lines.pop()
            times = [self._began[stream]] + [wall_ns] * len(lines)
            self._began[stream] = times[len(lines)]
            data = b"".join(
                f"{timestamp(at)} {stream.filename} ".encode() + line + b"\n"
                for at, line in zip(times, lines)
            )
        output.put(self._targets[stream], data)


def _pruned(stream: Stream, begin: int, end: int) -> str:
    which = f"{end - begin:,} bytes from byte {begin:,} on" if begin else f"the first {end:,} bytes"
    return f"{which} of {stream.filename} are only on the host now"


def follow(
    run: Run,
    printer: Printer,
    *,
    daemon: Optional[control.Connection] = None,
    until_closed: bool = False,
    enough: Callable[[], bool] = lambda: False,
) -> Optional[RunResult]:
    """Pass output on as it comes, until the run has exited and is drained, or is closed, or it is ``enough``.

    The daemon's events say when to look; without it, or when it dies, the spool is looked at 5 times a second.
    """

    def wait() -> None:
        nonlocal daemon
        if daemon is None:
            select.select([], [], [], _LOOK_AGAIN)
        elif not heard(daemon, 1.0):
            daemon = None
            remark("the daemon went away; the run goes on", always=True)

    output.follow(
        over=lambda: (run.closed() if until_closed else run.result()) is not None,
        pass_on=lambda last: printer.pass_on(last=last),
        wait=wait,
        enough=enough,
    )
    return run.result()


def heard(daemon: control.Connection, timeout: float) -> bool:
    """Wait for the daemon to say something, or not; False: it is gone."""
    readable, _, _ = select.select([daemon], [], [], timeout)
    return not readable or daemon.drain()


def exit_status(result: RunResult) -> int:
    return output.exit_status(PROGRAM, result.ending, result.value, result.text)


def remark(sentence: str, *, always: bool = False) -> None:
    output.remark(PROGRAM, sentence, always=always)
