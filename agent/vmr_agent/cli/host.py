"""What lives here: `vmr-host`, one function a verb.

It must not know: how a verb is done. What needs the collector asks it; output is read from the log directory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

from vmr_agent import __version__, control
from vmr_agent.cli import arguments
from vmr_agent.errors import Problem

PROGRAM = "vmr-host"
_HINT = "vmr-host collect starts it"

_EXAMPLE = """\
examples:
  vmr-host collect --log-dir /scratch/vm_resource_logs Server=/tmp/minimega/4/virtio-serial1
  vmr-host mix                         every VM and how its VMRs stand
  vmr-host start                       time zero, for all VMs
"""


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = _parser().parse_args(arguments.mark(sys.argv[1:] if argv is None else argv))
    return arguments.run(PROGRAM, lambda: int(args.act(args)))


def _default_control() -> Path:
    named = os.environ.get("VMR_HOST_CONTROL")
    if named:
        return Path(named)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime if os.geteuid() and runtime else "/run") / "vmr-host" / "control"


def _parser() -> arguments.Parser:
    top = arguments.parser(PROGRAM, "Collects what vmr-agent ships from VMs, and talks to them.", _EXAMPLE)
    top.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(name: str, act: Any, summary: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=summary, description=summary)
        added.set_defaults(act=act)
        added.add_argument(
            "--control", type=Path, default=_default_control(), metavar="PATH", help="the collector's socket"
        )
        return added

    collect = verb("collect", _collect, "Be the collector: take frames from VMs and write their logs.")
    collect.add_argument("sources", nargs="*", metavar="VM=SOCKET", help="a VM and its chardev's socket")
    collect.add_argument(
        "--log-dir", type=Path, required=True, metavar="DIR", help="where logs and raw output go"
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
        metavar="S",
        help="seconds from then to time zero; default: 60",
    )
    mix = verb("mix", _mix, "Show every VM and how its VMRs stand.")
    mix.add_argument("--json", action="store_true", help="one array, one object a VM")
    start = verb("start", _start, "Set time zero, for all VMs or one.")
    start.add_argument("vm", nargs="?", metavar="VM")
    start.add_argument(
        "--in", dest="delay", type=float, default=0.0, metavar="S", help="so many seconds from now"
    )
    rerun = verb("rerun", _rerun, "Start a VMR of a VM again in place.")
    rerun.add_argument("vm", metavar="VM")
    rerun.add_argument("vmr", metavar="VMR", type=arguments.name)
    for name, act, summary in (
        ("hold", _hold, "Let nothing new start by schedule, in all VMs or one."),
        ("resume", _hold, "End hold."),
    ):
        added = verb(name, act, summary)
        added.set_defaults(verb=name)
        added.add_argument("vm", nargs="?", metavar="VM")
    return top


# --- verbs ---------------------------------------------------------------------------------------------------


def _collect(args: argparse.Namespace) -> int:
    from vmr_agent.host.collector import Collector, Source

    sources = [Source(*_source(each)) for each in args.sources]
    sources += [Source(*_source(each), listen=True) for each in args.listen]
    if not sources:
        raise Problem("cannot collect from no VM", hint="name some: VM=SOCKET")
    names = [source.vm for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise Problem(f"cannot collect from two VMs named {name}")
    _raise_nofile()

    async def collect() -> None:
        await Collector(
            args.log_dir,
            sources,
            control_path=args.control,
            expect=args.expect,
            start_buffer=args.start_buffer,
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
    with _collector(args) as collector:
        vms = collector.ask("mix")["vms"]
    if args.json:
        print(json.dumps(vms, indent=2))
        return 0
    states = ["waiting", "running", "exited", "killed", "lost"]
    rows = [["VM", "STATE", *(state.upper() for state in states), "OTHER"]]
    for vm in vms:
        counts = dict(vm["counts"])
        known = [str(counts.pop(state, 0) or "") for state in states]
        word = ("configured" if vm["configured"] else "configuring") if vm["online"] else "offline"
        rows.append([vm["vm"], word, *known, str(sum(counts.values()) or "")])
    print(arguments.table(rows, right=frozenset(range(2, len(rows[0])))))
    return 0


def _start(args: argparse.Namespace) -> int:
    with _collector(args) as collector:
        collector.ask("start", vm=args.vm, delay=args.delay)
    return 0


def _rerun(args: argparse.Namespace) -> int:
    with _collector(args) as collector:
        answer = collector.ask("rerun", vm=args.vm, vmr=args.vmr)
    print(f"attempt {answer['attempt']} of {args.vmr} is started on {args.vm}")
    return 0


def _hold(args: argparse.Namespace) -> int:
    with _collector(args) as collector:
        collector.ask(args.verb, vm=args.vm)
    return 0


def _collector(args: argparse.Namespace) -> control.Daemon:
    return control.Daemon(args.control, program="collector", hint=_HINT)


if __name__ == "__main__":
    raise SystemExit(main())
