"""What lives here: `vmr-agent`, one function a verb.

It must not know: how a verb is done. What needs the daemon asks it; output is read from the spool.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from vmr_agent import __version__
from vmr_agent.cli import arguments, guest, status
from vmr_agent.cli.guest import PROGRAM, remark
from vmr_agent.errors import Problem, show
from vmr_agent.guest import settings as guest_settings
from vmr_agent.guest.settings import Settings
from vmr_agent.guest.spool import Run
from vmr_agent.runs import Stream

_EXAMPLE = """\
examples:
  vmr-agent status                     every VMR and what became of it
  vmr-agent logs -4/compress.py        what it printed, byte for byte
  vmr-agent rerun -4/compress.py       run it again where it lies, seen by the host too

A VMR's name is <start time>/<directory name>. Its path, ./<name> from inside the start time's directory, and
nothing at all from inside the VMR's own directory mean the same. Settings: /etc/vmr-agent.conf.
"""


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = _parser().parse_args(arguments.mark(sys.argv[1:] if argv is None else argv))
    return arguments.run(PROGRAM, lambda: int(args.act(args, _settings(args))))


def _parser() -> arguments.Parser:
    top = arguments.parser(
        PROGRAM, "Runs FIREWHEEL's VM resources (VMRs) in this VM and ships what they print.", _EXAMPLE
    )
    top.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(name: str, act: Any, summary: str, example: str = "") -> argparse.ArgumentParser:
        text = f"example:\n  {example}\n" if example else None
        added = verbs.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(act=act)
        added.add_argument("--config", metavar="FILE", help="instead of /etc/vmr-agent.conf")
        for path in guest_settings.PATHS:
            default = getattr(Settings(), path)
            added.add_argument(f"--{path.replace('_', '-')}", metavar="PATH", help=f"default: {default}")
        return added

    def vmr(added: argparse.ArgumentParser) -> None:
        added.add_argument("vmr", metavar="VMR", nargs="?", type=arguments.name, help="as in -4/compress.py")

    verb("run", _run, "Be the daemon: watch, execute, ship.", "vmr-agent run --port unix:/tmp/port")
    rerun = verb(
        "rerun", _rerun, "Run a VMR again in place, streaming its output.", "vmr-agent rerun -4/compress.py"
    )
    vmr(rerun)
    how = rerun.add_mutually_exclusive_group()
    how.add_argument("--detach", action="store_true", help="start it and return at once")
    how.add_argument("--watch", action="store_true", help="run it again on each save in its directory")
    rerun.add_argument("--restart", action="store_true", help="with --watch: a save ends a run in progress")
    added = verb("status", _status, "Show every VMR and what became of it.", "vmr-agent status --json")
    how = added.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="one array, one object a VMR")
    how.add_argument("--watch", action="store_true", help="show it anew each second, until Ctrl-C")
    keys = "".join(f"  {key:<13} {meaning}\n" for key, meaning in status.KEYS.items())
    added.epilog = f"{added.epilog}\nkeys of --json:\n{keys}"
    logs = verb(
        "logs",
        _logs,
        "Print what a VMR printed, byte for byte.",
        "vmr-agent logs -4/compress.py --stream stderr",
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
        "kill", _kill, "Signal a VMR's whole process tree.", "vmr-agent kill -4/compress.py --signal KILL"
    )
    vmr(kill)
    kill.add_argument(
        "--signal", default="TERM", type=arguments.signal_number, help="name or number; default: TERM"
    )
    vmr(verb("ps", _ps, "Show a VMR's processes, and who holds its pipes.", "vmr-agent ps -4/compress.py"))
    diff = verb(
        "diff",
        _diff,
        "Show what changed in a VMR's files since it was staged, or between two attempts.",
        "vmr-agent diff -4/compress.py --attempt 1 3",
    )
    vmr(diff)
    diff.add_argument("--attempt", nargs=2, type=int, metavar=("A", "B"), help="compare these two attempts")
    verb("check", _check, "Look for what is wrong, and say what to do about it.", "vmr-agent check")
    verb("start", _start, "Set time zero now: positive times count from here.")
    verb("hold", _hold, "Let nothing new start by schedule (makes .hold in the launch directory).")
    verb("resume", _resume, "End hold.")
    verb("reset", _reset, "Forget all runs and the spool's id, before an image is baked.")
    return top


def _settings(args: argparse.Namespace) -> Settings:
    options = {name: getattr(args, name) for name in guest_settings.PATHS}
    config = Path(args.config) if args.config else None
    return guest_settings.load(options, environment=os.environ, config=config)


# --- verbs ---------------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace, settings: Settings) -> int:
    from vmr_agent.guest.daemon import Daemon  # heavy: the other verbs start without it

    Daemon(settings).run()
    return 0


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
        spool = Spool(settings.state_dir)  # refuses while a daemon has it
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
