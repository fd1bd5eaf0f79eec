"""What lives here: what the host's verbs share: the collector or, without it, its log directory; which VMR is meant;
its output as it was collected.

It must not know: any verb.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

from vmr_agent import control
from vmr_agent.cli import output
from vmr_agent.errors import Problem, show
from vmr_agent.host import view
from vmr_agent.runs import Stream
from vmr_agent.schedule import near, parse_vmr

PROGRAM = "vmr-host"
_PIECE = 256 * 1024
_LOOK_AGAIN = 0.05  # s; how often the log directory is looked at for what came
_BEGINS = 10.0  # s; in which a run that was asked for is in the log directory
_WATCH = 1.0  # s; how often the collector is asked whether a VM is there

# --- the collector, and doing without ------------------------------------------------------------------------


def collector(args: argparse.Namespace) -> control.Connection:
    return control.Connection(args.control, program="collector", hint="vmr-host collect starts it")


class Seen(NamedTuple):
    """What the collector says, or None and why it says nothing; where its logs are."""

    log_dir: Path
    answer: Optional[dict[str, Any]]
    why: str = ""


def look(args: argparse.Namespace, verb: str, *, aloud: bool = False) -> Seen:
    """Ask the collector what it knows of all VMs, or of the one that is named; where it can't be, find its logs.

    ``aloud``: say that it can't.
    """
    vm: Optional[str] = getattr(args, "vm", None)
    seen = Seen(args.log_dir, None, "no collector was asked") if args.log_dir else None
    if seen is None:
        try:
            asked = collector(args)
        except Problem as problem:
            seen = _left(args, problem)
            if aloud:
                remark(f"{seen.why}; this is from {seen.log_dir}", always=True)
        else:
            with asked:
                answer = asked.ask(verb, vm=vm)
            return Seen(Path(answer["log_dir"]), answer)
    there = view.vms(seen.log_dir)
    if vm is not None and vm not in there:
        raise Problem(f"cannot find a VM {view.text(vm)} in {seen.log_dir}", hint=view.near(vm, there))
    return seen


def _left(args: argparse.Namespace, problem: Problem) -> Seen:
    """Where the collector's logs are when it can't be asked. Raises Problem when nobody knows."""
    named = os.environ.get("VMR_HOST_LOG_DIR")
    log_dir = Path(named) if named else view.word_left(args.control)
    if log_dir is None:
        hint = f"{problem.hint}, --log-dir DIR does without" if problem.hint else "--log-dir DIR does without"
        raise Problem(problem.args[0], hint=hint)
    return Seen(log_dir, None, problem.args[0])


def silent(vm: str) -> dict[str, Any]:
    """What a collector says of a VM, where there is none to say it."""
    return {
        "vm": vm,
        "online": False,
        "reason": "",
        "configured": None,
        "time_zero": None,
        "standstill": "",
        "states": {},
        "health": {},
        "disk": {},
        "dropped": {},
    }


# --- a VMR and its output ------------------------------------------------------------------------------------


def vmr(args: argparse.Namespace) -> bytes:
    """The VMR that is meant. Raises Problem, with what may be meant, for what is no name of one."""
    typed = os.fsencode(args.vmr)
    parsed = parse_vmr(typed)
    if parsed is not None:
        return parsed
    parts = typed.split(b"/")
    inside = [found for pair in zip(parts, parts[1:]) if (found := parse_vmr(b"/".join(pair)))]
    if parse_vmr(os.fsencode(args.vm)) is not None:
        hint = "the VM comes first, then the VMR"
    elif inside:
        hint = f"did you mean {show(inside[-1])}?"
    else:
        hint = "a name is <start time>/<name>, as in -4/compress.py"
    raise Problem(f"cannot tell which VMR {show(typed)} is", hint=hint)


def vmrs(seen: Seen, vm: str) -> list[dict[str, Any]]:
    """One row per VMR of a VM."""
    return view.vmrs(seen.log_dir, vm, seen.answer["vmrs"] if seen.answer else ())


def attempt(seen: Seen, vm: str, vmr: bytes, number: Optional[int]) -> view.LoggedRun:
    """One attempt of a VMR, the latest for None. Raises Problem when nothing of it is held."""
    there = view.attempts(seen.log_dir, vm, vmr)
    if not there:
        names = {str(row["vmr"]): row["attempt"] for row in vmrs(seen, vm)}
        if names.get(show(vmr)) == 0:
            raise Problem(f"cannot find a run of {show(vmr)}: it has not run on {view.text(vm)} yet")
        hint = near(vmr, map(os.fsencode, names), otherwise=f"vmr-host list {view.text(vm)} lists them")
        raise Problem(f"cannot find a VMR {show(vmr)} on {view.text(vm)}", hint=hint)
    chosen = there[-1] if number is None else number
    if chosen not in there:
        hint = f"there is {there[0]}" if len(there) == 1 else f"there are {there[0]} to {there[-1]}"
        raise Problem(f"cannot find attempt {chosen} of {show(vmr)}", hint=hint)
    return view.LoggedRun(seen.log_dir, vm, vmr, chosen)


class Printer:
    """Passes a run's bytes on, raw, as they are in the log directory. Gaps are passed over."""

    def __init__(self, run: view.LoggedRun, streams: Sequence[Stream]) -> None:
        self._run = run
        self._offsets = dict.fromkeys(streams, 0)
        self._targets = output.targets(streams)

    def pass_on(self) -> None:
        for stream, target in self._targets.items():
            while data := self._run.read(stream, self._offsets[stream], _PIECE):
                # Only then: a gap is in the row before there is anything behind its first byte.
                gap = self._next_gap(stream) if b"\0" in data else None
                if gap is None or gap["offset"] > self._offsets[stream]:
                    data = data[: gap["offset"] - self._offsets[stream] if gap else None]
                    self._offsets[stream] += len(data)
                    output.put(target, data)
                    continue
                end = gap["offset"] + gap["length"]
                missing = output.gap_remark(
                    stream, self._offsets[stream], end - self._offsets[stream], view.text(gap["reason"])
                )
                remark(missing)
                self._offsets[stream] = end

    def _next_gap(self, stream: Stream) -> Optional[dict[str, Any]]:
        """The first gap of a stream that isn't behind us."""
        gaps = (self._run.row() or {}).get("gaps", [])
        ahead = (gap for gap in gaps if gap["stream"] == stream.filename)
        return next((gap for gap in ahead if gap["offset"] + gap["length"] > self._offsets[stream]), None)


def follow(
    run: view.LoggedRun,
    streams: Sequence[Stream],
    *,
    until_closed: bool = False,
    watch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Pass output on as it comes, until the run has exited or is closed; its row."""
    reader = Printer(run, streams)
    row: dict[str, Any] = {}

    def over() -> bool:
        row.update(run.row() or {})
        if row.get("closed") or (row.get("state", "running") != "running" and not until_closed):
            return True
        if run.set_aside():
            raise Problem(f"cannot follow {run.path}: a new life of its VM began")
        return False

    def wait() -> None:
        time.sleep(_LOOK_AGAIN)
        watch()

    output.follow(over=over, pass_on=lambda _: reader.pass_on(), wait=wait)
    return row


def begins(run: view.LoggedRun) -> bool:
    """Wait until the collector holds a run that a VM was told to start, but not for long; whether it does."""
    due = time.monotonic() + _BEGINS
    with suppress(Problem):  # what can't be read here is no failure of what was done there
        while run.row() is None:
            if time.monotonic() >= due:
                return False
            time.sleep(_LOOK_AGAIN)
        return True
    return False


class Watch:
    """Says when, for a while, nothing can come: the VM is offline, or nobody collects."""

    def __init__(self, collector: control.Connection, vm: str) -> None:
        self._collector = collector
        self._vm = vm
        self._due = time.monotonic() + _WATCH
        self._online = True

    def __call__(self) -> None:
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + _WATCH
        try:
            (vm,) = self._collector.ask("mix", vm=self._vm)["vms"]
        except Problem:
            self._due = float("inf")
            remark(
                "the collector went away; the run goes on, its output comes when one runs again", always=True
            )
            return
        if vm["online"] != self._online:
            self._online = vm["online"]
            state = "is back" if self._online else f"is offline: {view.text(vm['reason'])}; waiting for it"
            remark(f"{view.text(self._vm)} {state}", always=True)


def remark(sentence: str, *, always: bool = False) -> None:
    output.remark(PROGRAM, sentence, always=always)
