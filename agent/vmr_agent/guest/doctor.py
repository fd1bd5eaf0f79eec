"""What lives here: `vmr-agent check`: what can be wrong in a guest, each looked at by itself, with what to do about it.

It works without the daemon, and changes nothing. It must not know: how findings are shown.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

from vmr_agent import control
from vmr_agent.errors import Problem, show
from vmr_agent.guest import port
from vmr_agent.guest.settings import Settings
from vmr_agent.guest.watcher import Watcher
from vmr_agent.schedule import Staging, sort_key

UNIT = "vmr-agent.service"
NEEDED = {"psutil": (5, 8), "watchdog": (2, 1, 6), "msgpack": (1, 0, 3)}
"""The lower bounds in pyproject.toml."""

_ENOUGH = 64 << 20  # bytes free under the state directory; the shim leaves 32 MiB for the rest of the VM
_SANE_YEARS = range(2020, 2100)
_NAMED = 5  # of many alike; the rest is counted
_SYSTEMCTL_S = 10.0
_PATIENCE_S = 5.0  # for a daemon that hangs, which is when this is asked for


class Finding(NamedTuple):
    """One line: what was looked at, and what was found; ``remedy`` is not empty where something is wrong."""

    subject: str
    text: str
    remedy: str = ""


def examine(settings: Settings) -> Iterator[Finding]:
    """Look at everything, in the order in which it is of use."""
    status, problem = _ask(settings)
    looks: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("libraries", _libraries),
        ("unit", _unit),
        ("daemon", lambda: _daemon(status, problem)),
        ("port", lambda: _port(settings, status)),
        ("launch directory", lambda: _launch(settings)),
        ("events", lambda: _events(settings)),
        ("spool", lambda: _spool(settings)),
        ("runs", lambda: _runs(status)),
        ("clock", _clock),
    )
    for subject, look in looks:
        try:
            yield from look()
        except PermissionError as error:
            yield Finding(subject, f"cannot look at {error.filename}: permission denied", "try as root")
        except OSError as error:
            yield Finding(subject, f"cannot look: {error}", "look at it by hand")


def _ask(settings: Settings) -> tuple[Optional[dict[str, Any]], Optional[Problem]]:
    """What the daemon says of itself, or why it doesn't."""
    path, start = settings.runtime_dir / control.SOCKET, "systemctl start vmr-agent, or vmr-agent run"
    try:
        with control.Connection(path, program="daemon", hint=start, patience=_PATIENCE_S) as daemon:
            return daemon.ask("status"), None
    except Problem as problem:
        return None, problem


# --- the program ---------------------------------------------------------------------------------------------


def _libraries() -> Iterator[Finding]:
    found = [f"Python {platform.python_version()}"]
    for name, least in NEEDED.items():
        wanted = ".".join(map(str, least))
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("libraries", f"{name} is not installed", f"install {name} {wanted} or newer")
            continue
        found.append(f"{name} {version}")
        numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
        if numbers < least:
            yield Finding("libraries", f"{name} is {version}", f"install {wanted} or newer")
    yield Finding("libraries", ", ".join(found))


def _unit() -> Iterator[Finding]:
    if not Path("/run/systemd/system").is_dir() or shutil.which("systemctl") is None:
        yield Finding("unit", "systemd does not run here: something else has to start vmr-agent run")
        return
    enabled, active = _systemctl("is-enabled"), _systemctl("is-active")
    text = f"{UNIT} is {enabled}, {active}"
    if enabled in ("not-found", "", "masked"):
        yield Finding("unit", text, f"install it, or systemctl unmask {UNIT}")
    elif active != "active":
        yield Finding("unit", text, f"systemctl enable --now {UNIT}; journalctl -u {UNIT} says why it ended")
    elif enabled not in ("enabled", "enabled-runtime", "static", "indirect", "generated"):
        yield Finding("unit", text, f"systemctl enable {UNIT}, or it is gone after a reboot")
    else:
        yield Finding("unit", text)


def _systemctl(verb: str) -> str:
    try:
        done = subprocess.run(
            ["systemctl", verb, UNIT], capture_output=True, text=True, timeout=_SYSTEMCTL_S, check=False
        )
    except subprocess.TimeoutExpired:
        return "silent"
    return done.stdout.strip() or ("not-found" if done.returncode else "")


def _daemon(status: Optional[Mapping[str, Any]], problem: Optional[Problem]) -> Iterator[Finding]:
    if problem is not None:
        yield Finding("daemon", problem.args[0], problem.hint or f"systemctl restart {UNIT}")
    if status is None:
        return
    held = ", held (vmr-agent resume)" if status["held"] else ""
    off = ", schedule is off" if status["schedule"] == "off" else ""
    where = "configured" if status["configured"] else "not yet configured"
    yield Finding("daemon", f"answers; {len(status['vmrs'])} VMRs, {where}{held}{off}")
    dropped = {reason: count for reason, count in status["dropped"].items() if count}
    if dropped:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        yield Finding("daemon", f"frames dropped since it started: {counts}")


# --- the port ------------------------------------------------------------------------------------------------


def _port(settings: Settings, status: Optional[Mapping[str, Any]]) -> Iterator[Finding]:
    spec = settings.port
    if spec.startswith("unix:"):
        text, missing = f"{spec}, which stands in for a VM's port", not Path(spec[len("unix:") :]).exists()
        if missing:
            yield Finding("port", f"{text}: there is no such socket", "start what listens there")
    else:
        try:
            device = port.device(spec)
            missing = not device.exists()
        except FileNotFoundError:
            device, missing = Path(spec), True
        if missing:
            names = ", ".join(sorted(_port_names())) or "none"
            remedy = f"give the VM a virtserialport named {spec}, or set port in /etc/vmr-agent.conf"
            yield Finding("port", f"there is no {spec}; the VM's ports: {names}", remedy)
        else:
            users = port.users_of(device)
            text = f"{spec} is {os.path.realpath(device)}, held by {', '.join(users) or 'nobody'}"
            strangers = [user for user in users if not user.startswith(("vmr-agent ", "python"))]
            if strangers:
                yield Finding("port", text, f"end {strangers[0]}: a port has one user")
                return
    if missing:
        return
    if status is None:
        yield Finding("port", f"{text}; whether the host is there only the daemon can tell")
    elif status["session"]:
        yield Finding("port", f"{text}; the host is there, in session")
    elif status["port_state"] == "up":
        reason = status["port_reason"] or "it has not said Hello"
        yield Finding(
            "port", f"{text}; no session: {reason}", "on the host: vmr-host collect, on this VM's socket"
        )
    else:
        reason = status["port_reason"] or status["port_state"]
        yield Finding("port", f"{text}; {reason}", "on the host: vmr-host collect, on this VM's socket")


def _port_names() -> Iterator[str]:
    for path in Path("/sys/class/virtio-ports").glob("*/name"):
        try:
            name = path.read_text().strip()
        except OSError:
            continue
        if name:
            yield name


# --- the launch directory ------------------------------------------------------------------------------------


def _launch(settings: Settings) -> Iterator[Finding]:
    launch = settings.launch_dir
    passed_over: list[str] = []
    watcher = Watcher(launch, log=passed_over.append, events=False, mend=False)
    watcher.scan(0.0, full=True)
    if watcher.problem is not None:
        remedy = "its owner must be root, and nobody else may write to it or to what is above it"
        if not launch.exists():
            remedy = f"mkdir -p {launch}, or set launch_dir in /etc/vmr-agent.conf"
        yield Finding("launch directory", watcher.problem, remedy)
        return
    info = launch.stat()
    text = f"{launch}, mode {stat.S_IMODE(info.st_mode):04o}, {len(watcher.vmrs)} VMRs"
    yield Finding("launch directory", text + (", .hold is there" if watcher.held else ""))
    if os.statvfs(launch).f_flag & os.ST_NOEXEC:
        yield Finding(
            "launch directory", "its file system is mounted noexec", f"mount -o remount,exec {_mount(launch)}"
        )
    refused = [vmr for vmr in watcher.vmrs.values() if vmr.staging is Staging.REFUSED]
    refused.sort(key=lambda vmr: sort_key(vmr.name))
    for vmr in refused[:_NAMED]:
        yield Finding("VMR", f"{show(vmr.name)} is refused: {vmr.reason}", _remedy(vmr.reason))
    if len(refused) > _NAMED:
        yield Finding("VMR", f"{len(refused) - _NAMED} more are refused", "vmr-agent status lists them")
    for line in passed_over[:_NAMED]:
        yield Finding(
            "launch directory", line, "it has <start time>/<name>/, as in -4/compress.py; 0 is no time"
        )
    if len(passed_over) > _NAMED:
        yield Finding("launch directory", f"{len(passed_over) - _NAMED} more like it", f"ls {launch}")


def _remedy(refused: str) -> str:
    if "belongs to user" in refused:
        return "chown root what it names" if os.geteuid() == 0 else "it must be yours or root's"
    if "written to by others" in refused:
        return "chmod go-w what it names; umask 022 makes it so"
    return "put a regular file there"


def _mount(path: Path) -> Path:
    path = path.resolve()
    while not path.is_mount():
        path = path.parent
    return path


def _events(settings: Settings) -> Iterator[Finding]:
    directories = sum(1 for _ in os.walk(settings.launch_dir))
    watches = int(Path("/proc/sys/fs/inotify/max_user_watches").read_text())
    instances = int(Path("/proc/sys/fs/inotify/max_user_instances").read_text())
    text = f"{directories} directories to watch, {watches} inotify watches allowed"
    if directories >= watches:
        remedy = f"sysctl fs.inotify.max_user_watches={2 * directories}; until then changes are seen late"
        yield Finding("events", text, remedy)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_CLOEXEC)
    if fd < 0:
        text = f"no inotify instance is to be had: {os.strerror(ctypes.get_errno())}"
        remedy = f"sysctl fs.inotify.max_user_instances={2 * instances}; until then changes are seen late"
        yield Finding("events", text, remedy)
        return
    os.close(fd)
    yield Finding("events", text)


# --- the spool and the runs ----------------------------------------------------------------------------------


def _spool(settings: Settings) -> Iterator[Finding]:
    state = settings.state_dir
    if not state.exists():
        yield Finding("spool", f"{state} does not exist yet: the daemon makes it")
        return
    info, fs = state.stat(), os.statvfs(state)
    if info.st_uid not in (0, os.geteuid()) or stat.S_IMODE(info.st_mode) & 0o077:
        mode = f"{state} belongs to user {info.st_uid}, mode {stat.S_IMODE(info.st_mode):04o}"
        yield Finding(
            "spool", f"{mode}: others can read what VMRs print", f"chown root {state}; chmod 0700 {state}"
        )
    used = 0
    for path, _, files in os.walk(state):
        for name in files:
            try:
                used += os.lstat(os.path.join(path, name)).st_blocks * 512
            except OSError:
                continue  # a run went on meanwhile
    total, free = fs.f_blocks * fs.f_frsize, fs.f_bavail * fs.f_frsize
    limit = settings.spool_limit or min(1 << 30, total // 10)
    text = f"{state} takes {_mib(used)} of {_mib(limit)}; {_mib(free)} free"
    then = "output is dropped" if settings.overflow_drop else "scripts stand still"
    if os.statvfs(state).f_flag & os.ST_RDONLY:
        yield Finding(
            "spool", f"{state} is on a file system mounted read-only", f"mount -o remount,rw {_mount(state)}"
        )
    elif (state / "full").exists():
        yield Finding("spool", f"{text}; it is full, {then}", "start vmr-host collect, or raise spool_limit")
    elif free < min(_ENOUGH, total // 20):
        yield Finding("spool", text, f"make room: with less, {then}")
    else:
        yield Finding("spool", text)


def _mib(count: int) -> str:
    return f"{count / (1 << 20):,.1f} MiB"


def _runs(status: Optional[Mapping[str, Any]]) -> Iterator[Finding]:
    if status is None:
        return
    blocked = [row for row in status["vmrs"] if row["state"] == "blocked"]
    for row in blocked[:_NAMED]:
        yield Finding(
            "VMR", f"{row['vmr']} stands still: {row['error']}", "make room, or let the host collect"
        )
    dropping = [row for row in status["vmrs"] if row["state"] == "running" and row["error"]]
    for row in dropping[:_NAMED]:
        text = f"{row['vmr']}: {row['error']}; {row['dropped_bytes']:,} bytes so far"
        yield Finding("VMR", text, "make room, or let the host collect")
    lost = [row["vmr"] for row in status["vmrs"] if row["state"] == "lost"]
    if lost:
        names = ", ".join(lost[:_NAMED]) + (f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else "")
        yield Finding("VMR", f"lost: {names}; they do not run again by themselves")


# --- the clock -----------------------------------------------------------------------------------------------


def _clock() -> Iterator[Finding]:
    now = time.gmtime()
    text = time.strftime("%Y-%m-%d %H:%M:%S UTC", now)
    if now.tm_year not in _SANE_YEARS:
        yield Finding("clock", text, "set it: date -u -s ..., or let the hypervisor give the VM an RTC")
    elif Path("/run/systemd/timesync/synchronized").exists():
        yield Finding("clock", f"{text}, kept by NTP")
    else:
        yield Finding("clock", f"{text}, by itself; the host's logs have the host's time all the same")
