"""What lives here: `vmr-host`, one function a verb.

It must not know: how a verb is done. What needs the collector asks it; output is read from the log directory. Over
400 lines: most of them are the words of `--help`, the manual and shell completion.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

from vmr_agent import __version__
from vmr_agent.cli import arguments, collected, output, pull, push, staging, start, tables
from vmr_agent.cli.arguments import Example
from vmr_agent.cli.collected import PROGRAM, remark
from vmr_agent.errors import Problem, show
from vmr_agent.host import view
from vmr_agent.runs import Stream

_PATIENCE = 1.0  # s
_TEXT = """\
Collects what vmr-agent ships from VMs, and talks to them.

The collector runs on the host, one for all VMs of an experiment; every other verb
asks it through its control socket. mix, list and logs also work without it, from its
log directory. A VMR's name is <start time>/<directory name>, as in -4/compress.py.

Exit status: 0, it is done; 1, it could not be done; 2, the command line can't be
understood; 130, stopped by Ctrl-C.
"""
_EXAMPLES = (
    Example("vmr-host collect --log-dir logs Server=/tmp/server.sock", "be the collector"),
    Example("vmr-host mix", "every VM and how its VMRs stand"),
    Example("vmr-host list Server", "every VMR of one VM"),
    Example("vmr-host rerun Server -4/compress.py", "again, where it lies"),
    Example("vmr-host start", "time zero, for all VMs"),
)


def main(argv: Optional[Sequence[str]] = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(arguments.mark(staging.mark_program(given)))
    return start.run(PROGRAM, lambda: int(args.act(args)))


def _default_control() -> Path:
    named = os.environ.get("VMR_HOST_CONTROL")
    if named:
        return Path(named)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime if os.geteuid() and runtime else "/run") / "vmr-host" / "control"


def _parser() -> arguments.Parser:
    top = arguments.parser(PROGRAM, _TEXT, *_EXAMPLES)
    top.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(name: str, act: Any, text: str, *examples: Example) -> arguments.Parser:
        added = arguments.verb(verbs, name, text, *examples)
        added.set_defaults(act=act)
        added.add_argument(
            "--control",
            type=Path,
            default=_default_control(),
            metavar="PATH",
            help="the collector's socket; default: $VMR_HOST_CONTROL, else /run/vmr-host/control, "
            "for users $XDG_RUNTIME_DIR/vmr-host/control",
        )
        return added

    def vm(added: argparse.ArgumentParser, **more: Any) -> None:
        more = {"help": "its name, as it was given to collect", **more}
        added.add_argument("vm", metavar="VM", type=arguments.name, **more)

    def vmr(added: argparse.ArgumentParser) -> None:
        vm(added)
        added.add_argument("vmr", metavar="VMR", type=arguments.name, help="as in -4/compress.py")

    collect = verb(
        "collect",
        _collect,
        """\
Be the collector: take frames from VMs and write their logs.

For each VM it connects to the socket of the chardev behind its port, again and again
until there is one. It stays in the foreground; SIGTERM ends it. What it has not
acknowledged the VMs keep, and send when a collector runs again.

Time zero is set by vmr-host start, or by itself with --expect, and only once: each
experiment takes a collector of its own, in the same log directory if you like.
""",
        Example("vmr-host collect --log-dir logs Server=/tmp/server.sock", "one VM"),
        Example(
            "vmr-host collect --log-dir logs --expect 2 A=a.sock B=b.sock",
            "two; when both are configured, the experiment starts 60 s later",
        ),
    )
    collect.add_argument("sources", nargs="*", metavar="VM=SOCKET", help="a VM and its chardev's socket")
    log_dir = os.environ.get("VMR_HOST_LOG_DIR")
    collect.add_argument(
        "--log-dir",
        type=Path,
        default=log_dir and Path(log_dir),
        required=not log_dir,
        metavar="DIR",
        help="where logs and raw output go; default: $VMR_HOST_LOG_DIR",
    )
    collect.add_argument(
        "--listen", action="append", default=[], metavar="VM=PATH", help="listen for a VM whose side connects"
    )
    collect.add_argument(
        "--expect", type=int, metavar="N", help="start the experiment by itself when N VMs are configured"
    )
    collect.add_argument(
        "--start-buffer",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="from then to time zero; default: 60",
    )
    collect.add_argument(
        "--quota",
        type=arguments.size,
        default="64G",  # 64 times the most that a VM's spool holds by itself: who gets there prints for ever
        metavar="SIZE",
        help="disk that one VM's output and logs may take, earlier lives included; a VM over it keeps its output, "
        "and sends it when there is room. 0: no bound; default: 64G",
    )
    mix = verb(
        "mix",
        _mix,
        """\
Show every VM and how its VMRs stand.

One row a VM: how many of its VMRs wait, run, and have ended which way.
""",
        Example("vmr-host mix --watch", "a table kept fresh"),
        Example("vmr-host mix --json", "for programs"),
    )
    mix.add_argument("--watch", action="store_true", help="show it again as it changes, until Ctrl-C")
    mix.keys = tables.VM_KEYS
    listing = verb(
        "list",
        _list,
        """\
Show the VMRs of a VM and what became of them.

In the order of the schedule, each with its latest attempt. Exit codes are shown,
never judged.
""",
        Example("vmr-host list Server", "a table"),
        Example("vmr-host list Server --json", "for programs"),
    )
    vm(listing)
    listing.keys = tables.VMR_KEYS
    for added, what in ((mix, "a VM"), (listing, "a VMR")):
        added.add_argument(
            "--json", action="store_true", help=f"one array, one object {what}; see below for its keys"
        )
    logs = verb(
        "logs",
        _logs,
        """\
Print what a VMR printed, byte for byte.

What has reached the log directory, stdout to stdout and stderr to stderr.
""",
        Example("vmr-host logs Server -4/compress.py", "the latest attempt"),
        Example("vmr-host logs Server 1/bash --follow --stream stdout", "a server, while it runs"),
    )
    vmr(logs)
    logs.add_argument("--attempt", type=int, metavar="N", help="default: the latest")
    logs.add_argument(
        "--stream", choices=[each.filename for each in Stream], help="default: both, each to its own"
    )
    logs.add_argument("--follow", action="store_true", help="go on until the run's pipes are closed")
    rerun = verb(
        "rerun",
        _rerun,
        """\
Run a VMR of a VM again in place, streaming its output.

Its stdout comes to stdout and its stderr to stderr, byte for byte. The exit status is
the script's own: 128 + the signal's number if a signal ended it, 126 if it could not
be executed, 1 if it is lost. Ctrl-C ends the watching (130), not the run.
""",
        Example("vmr-host rerun Server -4/compress.py", "and see what it prints"),
        Example("vmr-host rerun Server 1/bash --detach", "a server"),
    )
    vmr(rerun)
    rerun.add_argument("--detach", action="store_true", help="start it and return once it has begun")
    kill = verb(
        "kill",
        _kill,
        """\
Signal a VMR's whole process tree.

Children that made themselves a session of their own are found too, as long as the
script runs or somebody holds its pipes.
""",
        Example("vmr-host kill Server 1/bash", "TERM, to all of it"),
        Example("vmr-host kill Server 1/bash --signal KILL", "when it doesn't listen"),
    )
    vmr(kill)
    kill.add_argument(
        "--signal",
        default="TERM",
        metavar="SIGNAL",
        type=arguments.signal_number,
        help="name or number; default: TERM",
    )
    out = verb(
        "pull",
        pull.pull,
        """\
Copy a file or a directory out of a VM.

The digest is checked, and the destination is there whole or not at all; a file takes
a file's place, a directory nobody's. It goes on after a lost session. Bytes, times
and permissions are kept, but for set-uid bits.
""",
        Example("vmr-host pull -4/compress.py/compress.py Server .", "what was repaired in the VM"),
        Example("vmr-host pull /var/log Server ./server-log", "a directory"),
    )
    into = verb(
        "push",
        push.push,
        """\
Copy a file or a directory into a VM.

The digest is checked, and the destination is there whole or not at all; a file takes
a file's place, a directory nobody's. It goes on after a lost session.
""",
        Example("vmr-host push compress.py Server -4/compress.py/", "a repaired program"),
        Example("vmr-host push tools Server /opt/tools", "a directory"),
    )
    for added, file, destination in (
        (out, "in the VM", "on this host"),
        (into, "on this host", "in the VM"),
    ):
        launch = "; a relative path is from the launch directory"
        for name, where in (("file", file), ("vm", ""), ("destination", destination)):
            if name == "vm":
                vm(added)
            else:
                added.add_argument(
                    name,
                    metavar=name.upper(),
                    type=arguments.name,
                    help=where + launch * (where == "in the VM"),
                )
    stage = verb(
        "stage",
        staging.stage,
        """\
Put VMRs into a VM: a tree as /var/launch has it, or one program.

All of them or none, and in the order of their start times, so that an experiment can
be driven with no other agent in the image. With --at a VMR is made as FIREWHEEL makes
them: the program, if it is a file here, and the script that calls it; every word that
follows PROGRAM is an argument of it.
""",
        Example("vmr-host stage Server launch", "every launch/<start time>/<name>/"),
        Example("vmr-host stage Server --at -4 ./compress.py /opt", "one program of ours"),
        Example("vmr-host stage Server --at 10 --name addresses ip -brief address", "one of the VM's"),
    )
    vm(stage)
    stage.add_argument(
        "source", metavar="DIRECTORY|PROGRAM", type=arguments.name, help="a tree, or with --at a program"
    )
    stage.add_argument("arguments", metavar="ARG", nargs="*", type=arguments.word, help="of the program")
    stage.add_argument("--at", metavar="TIME", help="start time, to stage a program: as in -4 or 10.5, not 0")
    stage.add_argument("--name", metavar="NAME", help="of the VMR; default: the program's")
    start = verb(
        "start",
        _start,
        """\
Set time zero, for all VMs or one.

Positive times count from it. A VM that is offline or not yet configured is told when
it is back. It is set only once, also for VMs that are launched again: the next
experiment takes a new collector.
""",
        Example("vmr-host start", "now, for all VMs"),
        Example("vmr-host start --in 30", "in half a minute"),
    )
    start.add_argument(
        "--in", dest="delay", type=float, default=0.0, metavar="SECONDS", help="from now; default: 0"
    )
    hold = verb(
        "hold",
        _hold,
        """\
Let nothing new start by schedule, in all VMs or one.

Runs in progress go on, and rerun works.
""",
        Example("vmr-host hold", "all VMs"),
        Example("vmr-host hold Server", "one"),
    )
    resume = verb(
        "resume",
        _hold,
        """\
End hold, in all VMs or one.

The schedule goes on where it was.
""",
        Example("vmr-host resume", "all VMs"),
    )
    for word, added in (("start", start), ("hold", hold), ("resume", resume)):
        added.set_defaults(verb=word)
        vm(added, nargs="?", help="default: all of them")
    names = verb("names", _names, "Print the names that shell completion offers: VMs, or the VMRs of one.")
    vm(names, nargs="?")
    for added in (mix, listing, logs, names):
        added.add_argument(
            "--log-dir", type=Path, metavar="DIR", help="read only this log directory; ask no collector"
        )
    return top


# --- verbs ---------------------------------------------------------------------------------------------------


def _collect(args: argparse.Namespace) -> int:
    import asyncio

    from vmr_agent.host.collector import MAX_DELAY, Collector, Source

    sources = [Source(*_source(each)) for each in args.sources]
    sources += [Source(*_source(each), listen=True) for each in args.listen]
    if not sources:
        raise Problem("cannot collect from no VM", hint="name some: VM=SOCKET")
    names = [source.vm for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise Problem(f"cannot collect from two VMs named {name}")
    if args.expect is not None and not 1 <= args.expect <= len(names):
        which = "1" if len(names) == 1 else f"1 to {len(names)}"
        raise Problem(
            f"cannot wait for {args.expect} VMs to be configured", hint=f"--expect takes {which} here"
        )
    if not 0 <= args.start_buffer <= MAX_DELAY:
        hint = f"--start-buffer takes 0 to {MAX_DELAY:.0f}"
        raise Problem(f"cannot start the experiment after {args.start_buffer:g} s", hint=hint)
    _raise_nofile()

    async def collect() -> None:
        await Collector(
            args.log_dir,
            sources,
            control_path=args.control,
            expect=args.expect,
            start_buffer=args.start_buffer,
            quota=args.quota,
        ).run()

    asyncio.run(collect())
    return 0


def _source(text: str) -> tuple[str, Path]:
    vm, equals, path = text.partition("=")
    if not (vm and equals and path):
        raise Problem(f"cannot understand {text!r}", hint="a VM and its socket are written VM=SOCKET")
    return vm, Path(path)


def _raise_nofile() -> None:
    """Three files for each run in progress, times a thousand VMs: the usual 1,024 descriptors are too few."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _mix(args: argparse.Namespace) -> int:
    if args.watch and args.json:
        tables.changes(lambda: json.dumps(_vms(args)))
    elif args.watch:
        tables.watch(lambda: tables.mix(_vms(args)))
    elif args.json:
        print(json.dumps(_vms(args, aloud=True), indent=2))
    else:
        print(tables.mix(_vms(args, aloud=True)).text())
    return 0


def _vms(args: argparse.Namespace, *, aloud: bool = False) -> list[dict[str, Any]]:
    seen = collected.look(args, "mix", aloud=aloud)
    vms = []
    for vm in seen.answer["vms"] if seen.answer else map(collected.silent, view.vms(seen.log_dir)):
        state = ("configured" if vm["configured"] else "configuring") if vm["online"] else "offline"
        vms.append(
            {
                "vm": vm["vm"],
                "state": state if seen.answer else "unknown",
                "online": vm["online"],
                "reason": vm["reason"] if seen.answer else seen.why,
                "configured": vm["configured"],
                "time_zero": vm.get("time_zero"),  # a collector may be older than this
                "standstill": vm.get("standstill", ""),
                "vmrs": view.counts(seen.log_dir, vm["vm"], vm["states"]),
                "health": vm["health"],
                "disk": vm["disk"],
                "dropped": vm["dropped"],
            }
        )
    return vms


def _names(args: argparse.Namespace) -> int:
    """For shell completion: one a line, nothing where nothing is known; no name that is shown otherwise."""

    def give_up(*_: object) -> None:
        raise Problem("cannot wait any longer")

    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, _PATIENCE)  # somebody waits for his Tab
    with suppress(Problem, OSError):
        seen = collected.look(args, "mix" if args.vm is None else "list")
        if args.vm is not None:
            names = [row["vmr"] for row in collected.vmrs(seen, args.vm)]
        elif seen.answer is not None:
            names = [vm["vm"] for vm in seen.answer["vms"]]
        else:
            names = view.vms(seen.log_dir)
        shown = [name for name in names if "\\" not in name and view.text(name) == name]
        print("".join(f"{name}\n" for name in shown), end="")
    return 0


def _list(args: argparse.Namespace) -> int:
    seen = collected.look(args, "list", aloud=True)
    rows = collected.vmrs(seen, args.vm)
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    offline = ""
    if seen.answer and not seen.answer["online"]:
        offline = f"{view.text(args.vm)} is offline: {view.text(seen.answer['reason'])}"
    print(tables.vmrs(rows, below=offline).text())
    return 0


def _logs(args: argparse.Namespace) -> int:
    vmr = collected.vmr(args)
    run = collected.attempt(collected.look(args, "list"), args.vm, vmr, args.attempt)
    streams = [each for each in Stream if args.stream in (None, each.filename)]
    if args.follow:
        collected.follow(run, streams, until_closed=True)
    else:
        collected.Printer(run, streams).pass_on()
    row = run.row() or {}
    if row.get("state") in ("lost", "failed to start"):
        ending, _, why = view.ending(row)
        remark(output.no_end(ending, why))
    return 0


def _rerun(args: argparse.Namespace) -> int:
    vmr = collected.vmr(args)
    named = f"{show(vmr)} on {view.text(args.vm)}"
    follow = f"vmr-host logs --follow {view.text(args.vm)} {show(vmr)}"
    stopped = f"stopped before {view.text(args.vm)} answered; vmr-host list {view.text(args.vm)} shows whether it runs"
    with collected.collector(args) as collector:
        try:
            began = collector.ask("rerun", vm=args.vm, vmr=os.fsdecode(vmr))
            run = view.LoggedRun(Path(began["log_dir"]), args.vm, vmr, began["attempt"])
            stopped = f"stopped watching; {named} goes on: {follow}"
            if args.detach:
                # It waits, since what is typed next would be about the attempt before.
                so_far = (
                    "is started" if collected.begins(run) else "is ordered, and has not been seen to begin"
                )
                remark(f"attempt {began['attempt']} of {named} {so_far}; {follow}")
                return 0
            remark(f"attempt {began['attempt']} of {named}")
            row = collected.follow(run, list(Stream), watch=collected.Watch(collector, args.vm))
        except KeyboardInterrupt:
            remark(stopped, always=True)
            return 130
    return output.exit_status(PROGRAM, *view.ending(row))


def _kill(args: argparse.Namespace) -> int:
    vmr = collected.vmr(args)
    with collected.collector(args) as collector:
        killed = collector.ask("kill", vm=args.vm, vmr=os.fsdecode(vmr), signal=int(args.signal))
    which = f"attempt {killed['attempt']} of " if "attempt" in killed else ""
    ended = f": {view.text(str(killed['processes']))}" if "processes" in killed else ""
    print(f"{args.signal.name} sent to {which}{show(vmr)} on {view.text(args.vm)}{ended}")
    return 0


def _start(args: argparse.Namespace) -> int:
    with collected.collector(args) as collector:
        answer = collector.ask("start", vm=args.vm, delay=args.delay)
    print(f"time zero is {f'in {args.delay:g} s' if args.delay else 'now'} {_on(args.vm, answer['done'])}")
    for vm, why in answer["failed"].items():
        print(f"{view.text(vm)} {view.text(why)}; it is told when it comes back")
    return 0


def _hold(args: argparse.Namespace) -> int:
    with collected.collector(args) as collector:
        answer = collector.ask(args.verb, vm=args.vm)
    if answer["done"]:
        print(f"{'held' if args.verb == 'hold' else 'resumed'} {_on(args.vm, answer['done'])}")
    for vm, why in answer["failed"].items():
        print(f"{PROGRAM}: cannot {args.verb} {view.text(vm)}: it {view.text(why)}", file=sys.stderr)
    return 1 if answer["failed"] else 0


def _on(vm: Optional[str], count: int) -> str:
    return f"on {view.text(vm)}" if vm is not None else f"on {count} VM{'s' * (count != 1)}"


if __name__ == "__main__":
    raise SystemExit(main())
