"""x bit set in the VM → result on the host, against guest-exec of the same, asked at once again and each 2 s."""

from __future__ import annotations

import time
from collections.abc import Iterator

from tests.bench.rig import Bench, Row, interleaved, quantile
from tests.bench.turnaround import SETTLE
from tests.bench.vm_rig import PLACE, GuestAgent, VmRig, vm_rig
from tests.vm.host import LAUNCH

SCRIPT = "#!/bin/sh\nexec /bin/true\n"
POLL = 2.0  # s; FIREWHEEL's
TURNS = ("ours", "peer")


def rows(bench: Bench) -> Iterator[Row]:
    count = bench.size(40, 5)
    with vm_rig(bench) as rig, GuestAgent(rig.vm) as peer:
        rig.vm.put({f"{PLACE}/true": SCRIPT.encode()})
        for what, staged, path in (
            ("/bin/true", {"program": "/bin/true"}, "/bin/true"),
            ("a script that executes it", {"script": SCRIPT}, f"{PLACE}/true"),
        ):
            times: dict[str, list[float]] = {name: [] for name in TURNS}

            def ours(staged: dict[str, str] = staged, times: dict[str, list[float]] = times) -> float:
                times["ours"].append(turnaround(rig, staged))
                return times["ours"][-1]

            def theirs(path: str = path, times: dict[str, list[float]] = times) -> float:
                times["peer"].append(executed(peer, path))
                return times["peer"][-1]

            interleaved(3, ours=ours, peer=theirs)
            for each in times.values():
                each.clear()
            interleaved(count, ours=ours, peer=theirs)
            ms = {name: [1000 * each for each in found] for name, found in times.items()}
            settle = 1000 * SETTLE
            for share, name, goal in ((0.5, "p50", "≤ 1.5"), (0.9, "p90", "")):
                yield Row(
                    f"x bit in a VM → result, {what}, less settle, {name}",
                    quantile(ms["ours"], share) - settle,
                    "ms",
                    "guest-exec, busy-polled",
                    quantile(ms["peer"], share),
                    goal,
                )
        polled = [executed(peer, "/bin/true", POLL) for _ in range(bench.size(5, 1))]
        yield Row(
            "  the same, settle included",
            1000 * quantile(times["ours"], 0.5),
            "ms",
            "guest-exec, asked each 2 s",
            1000 * quantile(polled, 0.5),
        )
        yield from counted(bench, rig, peer)


def turnaround(rig: VmRig, staged: dict[str, str]) -> float:
    """Seconds from the order to set the x bit until result.json says that it has ended."""
    vmr = f"-1/true{rig.number()}"
    rig.order("stage", vmr=vmr, mode=0o666, **staged)
    time.sleep(0.3)
    began = rig.send("chmod", path=f"{LAUNCH}/{vmr}/call_arguments.sh", mode=0o777)
    ended = rig.ended([vmr], 0.0005)
    rig.reply()
    return ended - began


def executed(peer: GuestAgent, path: str, pause: float = 0.0) -> float:
    began = time.monotonic()
    peer.execute(path, pause=pause)
    took = time.monotonic() - began
    time.sleep(0.1)
    return took


def counted(bench: Bench, rig: VmRig, peer: GuestAgent) -> Iterator[Row]:
    """What a run costs the guest: processes and threads started, flushes of its disk."""
    count = bench.size(20, 5)
    found = {}
    for name, once in (
        ("ours", lambda: turnaround(rig, {"script": SCRIPT})),
        ("peer", lambda: executed(peer, f"{PLACE}/true")),
    ):
        time.sleep(2.0)
        before = rig.order("counts")
        for _ in range(count):
            once()
        time.sleep(2.0)
        after = rig.order("counts")
        found[name] = {key: (after[key] - before[key]) / count for key in before}
    for key, what in (
        ("processes", "processes and threads started"),
        ("flushes", "flushes of the guest's disk"),
    ):
        yield Row(f"  {what}, each run", found["ours"][key], "", "guest-exec", found["peer"][key] or None)
