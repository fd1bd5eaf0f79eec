"""Many VMRs in a VM: a hundred start times, two hundred at one, against bare starts of the same scripts there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.bench.in_vm.turnaround import SCRIPT
from tests.bench.rig import Bench, Row, interleaved
from tests.bench.vm_rig import VmRig, vm_rig
from tests.vm.host import LAUNCH


def rows(bench: Bench) -> Iterator[Row]:
    many, more = bench.size(100, 20), bench.size(200, 40)
    yield from compare(bench, f"{many} VMRs at {many} negative times in a VM", [-n - 1 for n in range(many)])
    yield from compare(bench, f"{more} VMRs at one time in a VM", [-1] * more)


def compare(bench: Bench, what: str, times: list[int]) -> Iterator[Row]:
    names = [f"{start_time}/true{number}" for number, start_time in enumerate(times)]
    found: dict[str, list[float]] = {"bare": [], "ours": []}
    for _ in range(min(bench.rounds, 3)):
        with vm_rig(bench, ready=False) as rig:
            stage(rig, names)
            rig.start_collector()
            rig.vm.check("systemctl start vmr-agent")
            rig.wait_ready(configured=False)
            rig.wait(lambda: rig.guest_row(names[-1]), "they are seen")
            once = interleaved(1, bare=lambda: bare(rig, names, times), ours=lambda: released(rig, names))
            for name, seconds in once.items():
                found[name].append(seconds)
    median = {name: sorted(each)[len(each) // 2] for name, each in found.items()}
    yield Row(f"{what} → all results", median["ours"], "s", "bare Popens", median["bare"], "≤ 4")


def stage(rig: VmRig, names: list[str]) -> None:
    """All under `.hold`, as a baker does it."""
    with tempfile.TemporaryDirectory() as tree:
        (Path(tree) / ".hold").touch()
        for name in names:
            directory = Path(tree) / name
            directory.mkdir(parents=True)
            (directory / "call_arguments.sh").write_text(SCRIPT)
            (directory / "call_arguments.sh").chmod(0o755)
        Path(tree).chmod(0o755)
        rig.vm.put(Path(tree), LAUNCH)


def bare(rig: VmRig, names: list[str], times: list[int]) -> float:
    paths = [f"{LAUNCH}/{name}/call_arguments.sh" for name in names]
    seconds: float = rig.order("popen", paths=paths, at_once=len(set(times)) == 1)
    return seconds


def released(rig: VmRig, names: list[str]) -> float:
    began = rig.send("unlink", path=f"{LAUNCH}/.hold")
    rig.reply()
    return rig.ended(names, 0.005) - began
