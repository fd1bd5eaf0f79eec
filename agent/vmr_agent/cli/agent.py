"""What lives here: `vmr-agent`, one function a verb.

It must not know: how a verb is done. What needs the daemon asks it; output is read from the spool. Over 400 lines:
most of them are the words of `--help`, the manual and shell completion.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from vmr_agent import __version__
from vmr_agent.cli import arguments, guest, output, start, status
from vmr_agent.cli.arguments import Example
from vmr_agent.cli.guest import remark
from vmr_agent.cli.start import PROGRAM
from vmr_agent.errors import Problem, show
from vmr_agent.guest import settings as guest_settings
from vmr_agent.guest.settings import Settings
from vmr_agent.guest.spool import Run
from vmr_agent.runs import Stream

_TEXT = """\
Runs FIREWHEEL's VM resources (VMRs) in this VM and ships what they print.

A VMR's name is <start time>/<directory name>, as in -4/compress.py. Its path,
./<name> from inside the start time's directory, and nothing at all from inside the
VMR's own directory mean the same.

Exit status: 0, it is done; 1, it could not be done; 2, the command line can't be
understood; 130, stopped by Ctrl-C.
"""
_EXAMPLES = (
    Example("vmr-agent status", "every VMR and what became of it"),
    Example("vmr-agent logs -4/compress.py", "what it printed, byte for byte"),
    Example("vmr-agent rerun -4/compress.py", "again, seen by the host too"),
    Example("vmr-agent rerun --help", "all about one verb"),
)


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = _parser().parse_args(arguments.mark(sys.argv[1:] if argv is None else argv))
    return start.run(PROGRAM, lambda: int(args.act(args, _settings(args))))


def _parser() -> arguments.Parser:
    top = arguments.parser(PROGRAM, _TEXT, *_EXAMPLES)
    top.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(name: str, act: Any, text: str, *examples: Example) -> arguments.Parser:
        added = arguments.verb(verbs, name, text, *examples)
        added.set_defaults(act=act)
        added.add_argument(
            "--config", metavar="FILE", help=f"the settings' file; default: {guest_settings.CONFIG}"
        )
        for path in guest_settings.PATHS:
            option = guest_settings.OPTIONS[path]
            added.add_argument(
                f"--{path.replace('_', '-')}",
                metavar=option.value,
                help=f"{option.help}; default: ${guest_settings.variable(path)}, else {option.default}",
            )
        return added

    def vmr(added: argparse.ArgumentParser) -> None:
        added.add_argument(
            "vmr",
            metavar="VMR",
            nargs="?",
            type=arguments.name,
            help="as in -4/compress.py; default: the one in whose directory you are",
        )

    verb(
        "run",
        _run,
        """\
Be the daemon: watch, execute, ship.

It stays in the foreground, as vmr-agent.service wants it. SIGTERM ends it; runs in
progress go on, and the next daemon takes them up again.
""",
        Example("vmr-agent run --port unix:/tmp/port", "a socket in the port's place"),
    )
    rerun = verb(
        "rerun",
        _rerun,
        """\
Run a VMR again in place, streaming its output.

The daemon runs it as the schedule would, as the next attempt, and the host sees it.
Its stdout comes to stdout and its stderr to stderr, byte for byte. The exit status is
the script's own: 128 + the signal's number if a signal ended it, 126 if it could not
be executed, 1 if it is lost. Ctrl-C ends the watching (130), not the run.

With --watch it is run again on each save, for ever. What a script writes beside
itself while it runs is no save.
""",
        Example("vmr-agent rerun -4/compress.py", "once"),
        Example("vmr-agent rerun --watch --restart 1/bash", "a server, anew on each save"),
        Example("vmr-agent rerun -2/head > head.out", "its stdout in a file"),
    )
    vmr(rerun)
    how = rerun.add_mutually_exclusive_group()
    how.add_argument("--detach", action="store_true", help="start it and return at once")
    how.add_argument("--watch", action="store_true", help="run it again on each save in its directory")
    rerun.add_argument("--restart", action="store_true", help="with --watch: a save ends a run in progress")
    added = verb(
        "status",
        _status,
        """\
Show every VMR and what became of it.

In the order of the schedule; below the table, how far the VM is and whether there is a
session with the host. Exit codes are shown, never judged.
""",
        Example("vmr-agent status --watch", "a table kept fresh"),
        Example("vmr-agent status --json", "for programs"),
    )
    how = added.add_mutually_exclusive_group()
    how.add_argument(
        "--json", action="store_true", help="one array, one object a VMR; see below for its keys"
    )
    how.add_argument("--watch", action="store_true", help="show it anew each second, until Ctrl-C")
    added.keys = status.KEYS
    logs = verb(
        "logs",
        _logs,
        """\
Print what a VMR printed, byte for byte.

In the order in which it was captured, stdout to stdout and stderr to stderr. It is
read from the disk of this VM: no daemon is needed. What the host has may be removed
here to make room; then the first line says so. Output that was dropped for want of
space is passed over, with a word on a terminal; see overflow in vmr-agent.conf(5).
""",
        Example("vmr-agent logs -4/compress.py", "both streams"),
        Example("vmr-agent logs -4/compress.py --stream stderr", "one, to stdout"),
        Example("vmr-agent logs -2/head --attempt 1 | xxd", "of the first attempt, in hexadecimal"),
    )
    vmr(logs)
    logs.add_argument("--attempt", type=int, metavar="N", help="default: the latest")
    logs.add_argument(
        "--stream", choices=[each.filename for each in Stream], help="default: both, each to its own"
    )
    logs.add_argument(
        "--timestamps", action="store_true", help="begin each line with its UTC time and its stream"
    )
    logs.add_argument("--follow", action="store_true", help="go on until the run's pipes are closed")
    kill = verb(
        "kill",
        _kill,
        """\
Signal a VMR's whole process tree.

Children that made themselves a session of their own are found too, as long as the
script runs or somebody holds its pipes. It names the processes that got the signal,
and does not wait for their end.
""",
        Example("vmr-agent kill 1/bash", "TERM, to all of it"),
        Example("vmr-agent kill 1/bash --signal KILL", "when it doesn't listen"),
    )
    vmr(kill)
    _signal(kill)
    ps = verb(
        "ps",
        _ps,
        """\
Show a VMR's processes, and who holds its pipes.

As a tree, with CPU, memory and I/O. A process that holds a pipe keeps the run's
output open, even when the script itself has exited.
""",
        Example("vmr-agent ps 1/bash", "what a server is doing"),
    )
    vmr(ps)
    diff = verb(
        "diff",
        _diff,
        """\
Show what changed in a VMR's files since it was staged, or between two attempts.

Text as diff -u has it; of other files sizes and digests; of those too large to be kept
(the setting keep_files) sizes alone. No daemon is needed.
""",
        Example("vmr-agent diff -4/compress.py", "what was staged, and what is there now"),
        Example("vmr-agent diff -4/compress.py --attempt 1 3", "what attempts 1 and 3 ran with"),
    )
    vmr(diff)
    diff.add_argument("--attempt", nargs=2, type=int, metavar=("A", "B"), help="compare these two attempts")
    verb(
        "check",
        _check,
        """\
Look for what is wrong, and say what to do about it.

One line for each thing that it looks at: libraries, unit, daemon, port and host,
launch directory, events, space, clock. It works without the daemon and changes
nothing. The exit status is 1 if anything is wrong.
""",
        Example("vmr-agent check", "when nothing runs, or nothing arrives"),
        Example("vmr-agent check | grep ^wrong", "only what needs a hand"),
    )
    verb(
        "start",
        _start,
        """\
Set time zero now: positive times count from here.

For a VM without a host; else the host sets it, for all VMs at once. It is set only
once, until reset.
""",
        Example("vmr-agent start", ""),
    )
    verb(
        "hold",
        _hold,
        """\
Let nothing new start by schedule.

It makes .hold in the launch directory. Runs in progress go on, and rerun works.
""",
        Example("vmr-agent hold", "before more is staged by hand"),
    )
    verb(
        "resume",
        _resume,
        """\
End hold.

It removes .hold from the launch directory; the schedule goes on where it was.
""",
        Example("vmr-agent resume", ""),
    )
    verb(
        "reset",
        _reset,
        """\
Forget all runs and the spool's id, before an image is baked.

All that is staged then runs as if for the first time, and the host begins a new life
of the VM. Refused while a run is in progress, and by a daemon that isn't held, for it
would run everything at once.
""",
        Example("vmr-agent hold && vmr-agent reset", "before the image is taken"),
    )
    return top


def _signal(added: argparse.ArgumentParser) -> None:
    added.add_argument(
        "--signal",
        default="TERM",
        metavar="SIGNAL",
        type=arguments.signal_number,
        help="name or number; default: TERM",
    )


def _settings(args: argparse.Namespace) -> Settings:
    options = {name: getattr(args, name) for name in guest_settings.PATHS}
    config = Path(args.config) if args.config else None
    return guest_settings.load(options, environment=os.environ, config=config)


# --- verbs ---------------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace, settings: Settings) -> int:
    return start.daemon(settings)


def _rerun(args: argparse.Namespace, settings: Settings) -> int:
    name = guest.name(args.vmr, settings)
    if args.restart and not args.watch:
        raise Problem("cannot use --restart without --watch")
    if args.watch:
        from vmr_agent.cli.watch import watch

        return watch(name, settings, restart=args.restart)
    with guest.daemon(settings) as daemon:
        began = daemon.ask("rerun", vmr=os.fsdecode(name), request=os.urandom(16).hex())
        run = Run.load(Path(began["path"]))
        if run is None:
            raise Problem(f"cannot read the run of {show(name)} in {began['path']}")
        if args.detach:
            remark(
                f"attempt {run.info.attempt} of {show(name)} is started; vmr-agent logs --follow {show(name)}"
            )
            return 0
        remark(f"attempt {run.info.attempt} of {show(name)}")
        try:
            result = guest.follow(run, guest.Printer(run, list(Stream)), daemon=daemon)
        except KeyboardInterrupt:
            remark(
                f"stopped watching; {show(name)} goes on: vmr-agent logs --follow {show(name)}", always=True
            )
            return 130
        assert result is not None
        if result.exit_code == 0:
            guest.say_what_to_pull(name, settings)
        return guest.exit_status(result)


def _status(args: argparse.Namespace, settings: Settings) -> int:
    return status.status(settings, as_json=args.json, watch=args.watch)


def _logs(args: argparse.Namespace, settings: Settings) -> int:
    name = guest.name(args.vmr, settings)
    run = guest.attempt_of(name, args.attempt, settings)
    streams = [each for each in Stream if args.stream in (None, each.filename)]
    printer = guest.Printer(run, streams, timestamps=args.timestamps)
    if args.follow:
        guest.follow(run, printer, until_closed=True)
    else:
        printer.pass_on(last=True)
    result = run.result()
    if result is not None and (why := output.no_end(result.ending, result.text)):
        remark(why)
    return 0


def _kill(args: argparse.Namespace, settings: Settings) -> int:
    name = guest.name(args.vmr, settings)
    with guest.daemon(settings) as daemon:
        killed = daemon.ask("kill", vmr=os.fsdecode(name), signal=int(args.signal))
    ended = ", ".join(f"{each['name']} ({each['pid']})" for each in killed["processes"])
    print(
        f"{args.signal.name} sent to attempt {killed['attempt']} of {show(name)}: {ended or 'nobody is left'}"
    )
    return 0


def _ps(args: argparse.Namespace, settings: Settings) -> int:
    from vmr_agent.cli.ps import ps

    return ps(guest.name(args.vmr, settings), settings)


def _diff(args: argparse.Namespace, settings: Settings) -> int:
    from vmr_agent.cli.diff import diff

    return diff(guest.name(args.vmr, settings), settings, args.attempt)


def _check(args: argparse.Namespace, settings: Settings) -> int:
    from vmr_agent.guest import doctor

    wrong = 0
    colours = sys.stdout.isatty()
    for finding in doctor.examine(settings):
        line = f"{finding.subject}: {finding.text}"
        if finding.remedy:
            wrong += 1
            mark = "\x1b[1;31mwrong\x1b[m" if colours else "wrong"
            print(f"{mark}  {line} -> {finding.remedy}", flush=True)
        else:
            print(f"ok     {line}", flush=True)
    return 1 if wrong else 0


def _start(args: argparse.Namespace, settings: Settings) -> int:
    with guest.daemon(settings) as daemon:
        started = daemon.ask("start")
    if not started["configured"]:
        print("time zero is set; positive times start when the VM is configured")
    return 0


def _hold(args: argparse.Namespace, settings: Settings) -> int:
    with guest.daemon(settings) as daemon:
        daemon.ask("hold")
    return 0


def _resume(args: argparse.Namespace, settings: Settings) -> int:
    with guest.daemon(settings) as daemon:
        daemon.ask("resume")
    return 0


def _reset(args: argparse.Namespace, settings: Settings) -> int:
    from vmr_agent.guest.spool import Spool

    try:
        daemon = guest.daemon(settings)
    except Problem:
        spool = Spool(settings.state_dir, drop=settings.overflow_drop)  # refuses while a daemon has it
        if any(run.locked() for run in spool.open_runs()):
            raise Problem("cannot reset: a run is in progress") from None
        spool.forget()
        spool.close()
        return 0
    with daemon:
        daemon.ask("reset")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
