"""A line printed in the VM → in the host's raw file, and in `<VM>.log`, against the echo of the same line.

The two clocks need not agree: the host says the line, with its own time in it, into a port that the script reads, and
the script prints what it has read. The echo comes back over a second port from a program just like it.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator

from tests.bench.rig import Bench, Row, helper, quantile, ready, said
from tests.bench.vm_rig import PROGRAM, TRIGGER_PORT, VmRig, vm_rig
from tests.vm.vm import BENCH_PORT

PAUSE = 0.05  # s; between a line and an echo


def rows(bench: Bench) -> Iterator[Row]:
    for floods in (0, 1):
        raw: list[float] = []
        log: list[float] = []
        echo: list[float] = []
        for _ in range(min(bench.rounds, 3)):
            with vm_rig(bench) as rig:
                for every, found in zip((raw, log, echo), measure(bench, rig, floods, bench.size(150, 30))):
                    every += found
        beside = ", one flooding beside it" if floods else ""
        for share, name, goal, log_goal in (
            (0.5, "p50", "≤ 5", "" if floods else "≤ 50"),
            (0.99, "p99", "", ""),
        ):
            limit = quantile(echo, share)
            what = f"a line in a VM → raw file, {name}{beside}"
            yield Row(what, quantile(raw, share), "ms", "its echo", limit, goal)
            yield Row(f"a line in a VM → <VM>.log, {name}{beside}", quantile(log, share), "ms", goal=log_goal)


def measure(
    bench: Bench, rig: VmRig, floods: int, count: int
) -> tuple[list[float], list[float], list[float]]:
    """Milliseconds of each line to the raw file and to the log, and of each echo, in turns."""
    rig.runs("-1/prints", f"exec {PROGRAM} print {TRIGGER_PORT}")
    echoing = rig.order("spawn", command=f"exec {PROGRAM} echo {BENCH_PORT}")
    raw, log = rig.logs / "Server/-1/prints/1/stdout", rig.logs / "Server.log"
    rig.wait(lambda: raw.exists() and log.exists(), "the files are there")
    watch = helper("watch.py", str(raw), str(log), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    try:
        assert ready(watch) == b"ready\n"
        for number in range(floods):
            rig.runs(f"-1/flood{number}", "exec yes 'as much of this as there can be, and no end of it'")
        with rig.vm.connect(TRIGGER_PORT) as trigger, rig.vm.connect(BENCH_PORT) as bench_port:
            echo_once(bench_port, -1)  # both have begun when the first answer is here
            time.sleep(1.0)
            echoes = []
            for number in range(count):
                trigger.sendall(line(number))
                time.sleep(PAUSE)
                echoes.append(echo_once(bench_port, number))
                time.sleep(PAUSE)
            trigger.sendall(b"end\n")
            bench_port.sendall(b"end\n")
            rig.wait(lambda: (rig.result("-1/prints") or {}).get("ended"), "it has printed")
        for number in range(floods):
            rig.order("control", line={"verb": "kill", "vmr": f"-1/flood{number}", "signal": 9})
        rig.wait(lambda: f"line {count - 1} @" in rig.log(), "the last line is in the log")
        assert rig.order("wait", pid=echoing, limit=60) == 0
        found = said(watch)
    finally:
        watch.kill()
        watch.wait()
    delays = [[each / 1000 for each in found[os.fspath(path)]] for path in (raw, log)]
    if floods:
        flooded = sum(each.stat().st_size for each in rig.logs.glob("Server/-1/flood*/1/stdout"))
        bench.say(f"{floods} flooding brought {flooded >> 20:,} MiB meanwhile")
    if len(delays[0]) < count or len(delays[1]) < count:
        bench.say(f"of {count} lines {len(delays[0])} were seen in the raw file, {len(delays[1])} in the log")
    return delays[0], delays[1] or [float("inf")], echoes


def line(number: int) -> bytes:
    return b"line %d @%d@\n" % (number, time.monotonic_ns())


def echo_once(port: socket.socket, number: int) -> float:
    sent = line(number)
    began = time.monotonic()
    port.sendall(sent)
    received = b""
    while len(received) < len(sent):
        received += port.recv(4096)
    took = time.monotonic() - began
    assert received == sent
    return took * 1000
