"""What lives here: which machine and boot this is, its clock and health, and what systemd is told.

It must not know: VMRs, runs, the host.
"""

from __future__ import annotations

import ctypes
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Optional

_CPUS = os.cpu_count() or 1  # once: it opens a file, and each idle moment would
_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


def boottime() -> float:
    """CLOCK_BOOTTIME in seconds: it goes on while the VM sleeps, and no one sets it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def machine_id() -> Optional[str]:
    """machine-id(5); None where an image was emptied of it, or never had one."""
    try:
        return Path("/etc/machine-id").read_text().strip()[:64] or None
    except (OSError, UnicodeDecodeError):
        return None


def health(state_dir: Path) -> dict[str, int]:
    """How the VM is doing, in whole numbers: it travels with each heartbeat. Memory and disk in bytes."""
    disk = os.statvfs(state_dir)
    memory = {}
    # psutil's virtual_memory() says the same for a megabyte of memory; it is loaded when a verb looks at processes.
    fd = os.open("/proc/meminfo", os.O_RDONLY | os.O_CLOEXEC)
    try:
        lines = os.read(fd, 512).split(b"\n", 3)[:3]
    finally:
        os.close(fd)
    for line in lines:
        name, _, value = line.partition(b":")
        memory[name] = int(value.split()[0]) * 1024  # "kB" there are KiB: proc_meminfo(5)
    return {
        "load_1m_milli": int(os.getloadavg()[0] * 1000),
        "cpus": _CPUS,
        "memory_total": memory[b"MemTotal"],
        "memory_available": memory[b"MemAvailable"],
        "disk_total": disk.f_blocks * disk.f_frsize,
        "disk_free": disk.f_bavail * disk.f_frsize,
    }


def notify(state: str) -> None:
    """Tell systemd; nothing where it doesn't ask (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock, suppress(OSError):
        sock.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)


def become_subreaper() -> None:
    """Have the orphans of this process fall to it (PR_SET_CHILD_SUBREAPER in prctl(2)), and not to init."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def go_first() -> None:
    """Have the priority that this process was given count also where the kernel groups by session, in which case it
    would count among this session's processes alone (autogroup in sched(7)). Nothing where there is no such thing."""
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    if nice < 0:
        with suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(nice))


def give_back_memory() -> None:
    """Return what the start has used and freed to the VM: 1.4 MB. Needs glibc (malloc_trim(3))."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
