"""Measures the product and what it is held against, side by side, and prints one table.

python -m tests.bench                       every row
python -m tests.bench throughput latency    these
python -m tests.bench --vm                  every row in a VM, next to qemu-ga; or, with names, these
python -m tests.bench --quick               small sizes, one round: whether each row works, no figures to keep
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "agent"), str(ROOT)]

from tests.bench.rig import Bench, Row  # noqa: E402

ROWS = (
    *("throughput", "lines", "latency", "turnaround", "schedule", "footprint", "start", "transfer"),
    *("scale", "history", "syncing"),
)
VM_ROWS = ("throughput", "latency", "turnaround", "schedule", "footprint", "start", "transfer")


def machine() -> str:
    """What it was measured on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = int(Path("/proc/meminfo").read_text().split()[1]) >> 20
    return (
        f"{os.cpu_count()} x {model}, {memory} GiB; Linux {platform.release()}, Python {platform.python_version()}; "
        f"load {os.getloadavg()[0]:.1f}"
    )


def number(value: Optional[float]) -> str:
    if value is None:
        return ""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 or value == 0 else f"{value:.1e}"


def table(rows: Sequence[Row]) -> str:
    head = ("what", "limit or peer", "its figure", "ours", "unit", "ratio", "goal", "")
    cells = [head]
    for row in rows:
        reached = {None: "", True: "yes", False: "NO"}[row.reached]
        ratio = number(row.ratio)
        cells.append(
            (row.what, row.against, number(row.limit), number(row.ours), row.unit, ratio, row.goal, reached)
        )
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    right = {2, 3, 5}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in cells
    )


def module(name: str, *, vm: bool) -> Any:
    """Where a row is measured: its `rows`, given a Bench, yields lines of the table."""
    return importlib.import_module(f"tests.bench.in_vm.{name}" if vm else f"tests.bench.{name}")


def has_vm(bench: Bench) -> bool:
    """Get all that VMs are made of, which isn't measured; where there can be none, say why."""
    from tests.bench.vm_rig import new_vm
    from tests.vm.guests import NoImage

    began = time.monotonic()
    bench.say("the VM's image, and the packages in it ...")
    try:
        new_vm()
    except NoImage as why:
        print(f"no rows in a VM: {why}")
        return False
    bench.say(f"took {time.monotonic() - began:.0f} s")
    return True


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="tests/run --bench", description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; default: all")
    parser.add_argument("--vm", action="store_true", help=f"in a VM: of {', '.join(VM_ROWS)}")
    parser.add_argument("--rounds", type=int, help="of which the median is taken; default: 5, with --quick 1")
    parser.add_argument("--quick", action="store_true", help="small sizes: only to see that each row works")
    parser.add_argument("--work", type=Path, default=Path("/var/tmp"), help="on the disk to be measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures, for programs")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends with it
    known = VM_ROWS if args.vm else ROWS
    unknown = set(args.rows) - set(known)
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    bench = Bench(args.work, rounds=args.rounds or (1 if args.quick else 5), quick=args.quick, vm=args.vm)
    print(machine(), flush=True)
    if args.vm and not has_vm(bench):
        return 1
    found: list[Row] = []
    failed = False
    for name in args.rows or known:
        began = time.monotonic()
        bench.say(f"{name} ...")
        try:
            for row in module(name, vm=args.vm).rows(bench):
                found.append(row)
                bench.say(table([row]).splitlines()[1])
        except Exception:
            failed = True
            traceback.print_exc()
        bench.say(f"{name} took {time.monotonic() - began:.0f} s")
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps([row._asdict() for row in found], indent=1))
    for path in args.work.glob("lines-*"):
        path.unlink()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
