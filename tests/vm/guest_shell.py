"""The guest's half of ``Vm.run``: a command server on the second serial port (/dev/ttyS1).

Baked into the image by packaging/vm-image and started by systemd; the host's half is vm.py. Standard library
only, and nothing of the product: a broken product must not take the harness with it. The console proper
(ttyS0) carries kernel and boot messages and a root login; this port carries nothing but the conversation.

One JSON object a line, ASCII, both ways. The host sends ``{"id": n, ...}`` with any of:

    command   text for ``bash -c``, in its own session, with a root login's environment, stdin /dev/null
    timeout   seconds; then the command's process group is killed and ``timed_out`` is true
    clock     seconds since the epoch: set the wall clock
    entropy   hex digits: reseed the kernel's random numbers

and gets ``{"id": n, "code": exit code or -signal, "output": base64 of stdout and stderr, "timed_out": bool,
"boot": boot id}``.
A line that is no such object is dropped: a boot or a new host client may leave half a line.
"""

import base64
import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import tty
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "LOGNAME": "root",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "SHELL": "/bin/bash",
    "TERM": "dumb",
    "USER": "root",
}
RNDADDENTROPY = 0x40085203  # linux/random.h
RNDRESEEDCRNG = 0x5207


def run(command: str, timeout: float) -> tuple[int, bytes, bool]:
    process = subprocess.Popen(
        ["/bin/bash", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=ENVIRONMENT,
        cwd="/root",
        start_new_session=True,
    )
    assert process.stdout is not None
    out = process.stdout.fileno()
    exited = os.pidfd_open(process.pid)
    os.set_blocking(out, False)
    output = bytearray()
    timed_out = False
    deadline = time.monotonic() + timeout
    open_ends = [out, exited]
    # A process left in the background may hold the pipe: the end is the command's exit, not the pipe's.
    while exited in open_ends:
        ready, _, _ = select.select(open_ends, [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            timed_out = True
            os.killpg(process.pid, signal.SIGKILL)
            deadline = time.monotonic() + 60
        if exited in ready:
            open_ends.remove(exited)
        if out in open_ends:
            while True:
                try:
                    piece = os.read(out, 1 << 16)
                except BlockingIOError:
                    break
                if not piece:
                    open_ends.remove(out)
                    break
                output += piece
    os.close(exited)
    process.stdout.close()
    return process.wait(), bytes(output), timed_out


def reseed(entropy: bytes) -> None:
    """Make this VM's random numbers its own: all VMs restored from one snapshot would draw the same ones."""
    with Path("/dev/urandom").open("wb", buffering=0) as pool:
        request = struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy
        fcntl.ioctl(pool, RNDADDENTROPY, request)
        fcntl.ioctl(pool, RNDRESEEDCRNG)


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def answer(request: dict[str, Any]) -> dict[str, Any]:
    if "clock" in request:
        time.clock_settime(time.CLOCK_REALTIME, request["clock"])
    if "entropy" in request:
        reseed(bytes.fromhex(request["entropy"]))
    code, output, timed_out = 0, b"", False
    if "command" in request:
        code, output, timed_out = run(request["command"], request["timeout"])
    encoded = base64.b64encode(output).decode("ascii")
    return {"id": request["id"], "code": code, "output": encoded, "timed_out": timed_out, "boot": boot_id()}


def main() -> int:
    port = os.open(sys.argv[1], os.O_RDWR | os.O_NOCTTY)
    tty.setraw(port)
    termios.tcflush(port, termios.TCIOFLUSH)
    received = b""
    while True:
        received += os.read(port, 4096)
        *lines, received = received.split(b"\n")
        for line in lines:
            try:
                request = json.loads(line)
                request["id"]
            except (ValueError, TypeError, KeyError):
                continue
            reply = json.dumps(answer(request)).encode("ascii") + b"\n"
            while reply:
                reply = reply[os.write(port, reply) :]


if __name__ == "__main__":
    raise SystemExit(main())
