"""The guest's half of the benchmark in a VM: does at once, and without starting a program for it, what the host says.

in_guest.py serve PORT    one JSON object a line, both ways: {"do": a verb, ...} → {"ok": ...} or {"error": text}
in_guest.py echo PORT     what comes in at the port goes out at it
in_guest.py print PORT    what comes in at the port is printed; both end at a line `end`

Standard library only: it runs with -I -S -E. It must not know what is measured.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

PORTS = "/dev/virtio-ports"
OPEN = "/var/lib/vmr-agent/open"
CONTROL = "/run/vmr-agent/control"

_gates: dict[str, int] = {}
_started: dict[int, subprocess.Popen[bytes]] = {}


# --- files ---


def stage(vmr: str, mode: int, script: str = "", program: str = "") -> None:
    """A VMR whose script is a text, or a copy of a program."""
    directory = Path("/var/launch", vmr)
    directory.mkdir(parents=True)
    path = directory / "call_arguments.sh"
    if program:
        shutil.copyfile(program, path)
    else:
        path.write_text(script)
    path.chmod(mode)


def chmod(path: str, mode: int) -> None:
    os.chmod(path, mode)


def unlink(path: str) -> None:
    os.unlink(path)


def size(path: str) -> int:
    return os.stat(path).st_size


# --- programs ---


def mkfifo(path: str) -> None:
    os.mkfifo(path)


def hold(path: str) -> None:
    """Until somebody reads from the pipe; then it can be let go."""
    _gates[path] = os.open(path, os.O_WRONLY)


def go(path: str) -> None:
    fd = _gates.pop(path)
    os.write(fd, b"go\n")
    os.close(fd)


def spawn(command: str) -> int:
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    _started[process.pid] = process
    return process.pid


def wait(pid: int, limit: float) -> int:
    return _started.pop(pid).wait(limit)


def popen(paths: list[str], at_once: bool) -> float:
    """Seconds until all these programs, started the plain way, have ended."""
    began = time.monotonic()
    if at_once:
        for process in [subprocess.Popen([path]) for path in paths]:
            process.wait()
    else:
        for path in paths:
            subprocess.run([path], check=True)
    return time.monotonic() - began


# --- what there is to see ---


def control(line: dict[str, Any]) -> Any:
    """What the daemon answers to a verb."""
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.settimeout(30)
        daemon.connect(CONTROL)
        daemon.sendall(json.dumps(line).encode() + b"\n")
        return json.loads(daemon.makefile("rb").readline())


def delivered(vmr: str, attempt: int, limit: float) -> None:
    """Until the daemon has heard that all of a run is durable on the host, which is when its link is gone."""
    end = f"/runs/{vmr}/{attempt}"
    deadline = time.monotonic() + limit
    while any(link.endswith(end) for link in map(_target, os.listdir(OPEN))):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{vmr} is not delivered")
        time.sleep(0.005)


def _target(name: str) -> str:
    try:
        return os.readlink(f"{OPEN}/{name}")
    except FileNotFoundError:
        return ""


def counts() -> dict[str, int]:
    """Since boot: processes and threads started, and flushes of the disk."""
    stat = Path("/proc/stat").read_text().splitlines()
    started = next(line for line in stat if line.startswith("processes "))
    return {
        "processes": int(started.split()[1]),
        "flushes": int(Path("/sys/block/vda/stat").read_text().split()[15]),
    }


def look(unit: str) -> dict[str, Any]:
    """A unit's CPU so far, and its processes: PSS and how often each has gone to sleep."""
    group = Path("/sys/fs/cgroup/system.slice", f"{unit}.service")
    usage = dict(line.split() for line in (group / "cpu.stat").read_text().splitlines())
    processes = []
    for pid in (group / "cgroup.procs").read_text().split():
        process = Path("/proc", pid)
        try:
            processes.append(
                {
                    "name": (process / "comm").read_text().strip(),
                    "pss": _number(process / "smaps_rollup", "Pss:") * 1024,
                    "woken": sum(
                        _number(task / "status", "voluntary_ctxt_switches:")
                        for task in (process / "task").iterdir()
                    ),
                }
            )
        except (FileNotFoundError, ProcessLookupError):
            continue
    return {"cpu_s": int(usage["usage_usec"]) / 1e6, "processes": processes}


def _number(path: Path, key: str) -> int:
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(key))


VERBS: dict[str, Callable[..., Any]] = {
    verb.__name__: verb
    for verb in (
        *(stage, chmod, unlink, size, mkfifo, hold, go, spawn, wait, popen),
        *(control, delivered, counts, look),
    )
}


# --- the port ---


def receive(port: int) -> bytes:
    while True:
        data = os.read(port, 4096)
        if data:
            return data
        time.sleep(0.05)  # the host is away: that is no end


def serve(port: int) -> None:
    received = b""
    while True:
        received += receive(port)
        *lines, received = received.split(b"\n")
        for line in lines:
            order = json.loads(line)
            try:
                reply = {"ok": VERBS[order.pop("do")](**order)}
            except Exception as error:
                reply = {"error": repr(error)}
            data = json.dumps(reply).encode() + b"\n"
            while data:
                data = data[os.write(port, data) :]


def repeat(port: int, to: int) -> None:
    while True:
        data = receive(port)
        if data.endswith(b"end\n"):
            return
        os.write(to, data)


if __name__ == "__main__":
    end = os.open(f"{PORTS}/{sys.argv[2]}", os.O_RDWR | os.O_CLOEXEC)
    if sys.argv[1] == "serve":
        serve(end)
    else:
        repeat(end, 1 if sys.argv[1] == "print" else end)
