"""How long after its start the daemon says its first frame, against the interpreter's own start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

from tests.bench.rig import Bench, Rig, Row, interleaved


def rows(bench: Bench) -> Iterator[Row]:
    found = interleaved(bench.rounds * 2, bare=bare, ours=lambda: first_frame(bench))
    yield Row(
        "start → first frame, beyond the interpreter's own start",
        1000 * (found["ours"] - found["bare"]),
        "ms",
        goal="≤ 300",
    )
    yield Row("  the interpreter's own start", 1000 * found["bare"], "ms")


def first_frame(bench: Bench) -> float:
    with bench.place() as path:
        rig = Rig(path)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.fspath(rig.port))
            listener.listen(1)
            listener.settimeout(60)
            began = time.monotonic()
            rig.start_daemon()
            try:
                with listener.accept()[0] as port:
                    port.settimeout(60)
                    assert port.recv(1)
                    return time.monotonic() - began
            finally:
                rig.close()


def bare() -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return time.monotonic() - began
