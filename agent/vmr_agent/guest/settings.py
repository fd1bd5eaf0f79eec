"""What lives here: the guest's settings, where each comes from, and what each may be.

Every path has a default, an option and an environment variable; `/etc/vmr-agent.conf` (INI, one section
`[vmr-agent]`) may set anything. Option beats environment beats file beats default. It must not know: the rooms.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

from vmr_agent import sizes
from vmr_agent.errors import Problem

CONFIG = Path("/etc/vmr-agent.conf")
_ENVIRONMENT = "VMR_AGENT_"


class Settings(NamedTuple):
    """Times in seconds, sizes in bytes."""

    launch_dir: Path = Path("/var/launch")
    port: str = "org.vmr_agent.0"
    state_dir: Path = Path("/var/lib/vmr-agent")
    runtime_dir: Path = Path("/run/vmr-agent")
    schedule: bool = True
    """Off: nothing starts by itself, for guests where something else executes the schedule."""
    start_auto: bool = False
    """Whether time zero is set here as soon as the VM is configured; else the host sets it."""
    settle: float = 0.02
    quiet: float = 10.0
    spool_limit: int = 0
    """0: 1 GiB or a tenth of the file system, the smaller."""
    overflow_drop: bool = False
    """Over the limit, or on a file system nearly full, drop output and say so; else its script waits."""
    keep_files: int = 1 << 20
    """Files up to this size are kept with each attempt, for `diff`; 0: none."""
    max_reboots: int = 10
    reboot_command: Optional[tuple[str, ...]] = None
    """None: `systemctl reboot`, and only where the port is a VM's."""


def _path(text: str) -> Path:
    path = Path(text)
    if "\0" in text:
        raise ValueError("must not hold a NUL byte")
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise ValueError("must be a number of seconds") from None
    if not 0 <= seconds <= 86_400:
        raise ValueError("must be 0 to 86400 seconds")
    return seconds


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = -1
    if count < 0:
        raise ValueError("must be a whole number, 0 or more")
    return count


def _command(text: str) -> tuple[str, ...]:
    words = tuple(shlex.split(text))
    if not words:
        raise ValueError("must be a command")
    return words


def _one_of(**words: Any) -> Any:
    def parse(text: str) -> Any:
        if text not in words:
            raise ValueError("must be " + " or ".join(words))
        return words[text]

    return parse


def _port(text: str) -> str:
    path = text[len("unix:") :] if text.startswith("unix:") else text
    if not path:
        raise ValueError("must be a port's name, a device's path or unix:PATH")
    if "/" in path or text.startswith("unix:"):
        _path(path)
    return text


class Option(NamedTuple):
    """One option of the file. What is written here is all that the manual, the example and `--help` say of it."""

    field: str
    parse: Callable[[str], Any]
    value: str
    """What may stand there, in a word."""
    default: str
    """As it would be written; empty: not set."""
    help: str


OPTIONS: Mapping[str, Option] = {
    "launch_dir": Option("launch_dir", _path, "DIR", "/var/launch", "where VMRs are staged"),
    "port": Option(
        "port",
        _port,
        "PORT",
        "org.vmr_agent.0",
        "the virtio-serial port to the host: its name, a device's path or, to connect to a socket, unix:PATH",
    ),
    "state_dir": Option(
        "state_dir", _path, "DIR", "/var/lib/vmr-agent", "runs, and output until the host has it"
    ),
    "runtime_dir": Option("runtime_dir", _path, "DIR", "/run/vmr-agent", "sockets"),
    "schedule": Option(
        "schedule",
        _one_of(on=True, off=False),
        "on|off",
        "on",
        "off: nothing starts by itself. Set it where FIREWHEEL's own handler executes the schedule, or each VMR "
        "runs twice",
    ),
    "start": Option(
        "start_auto",
        _one_of(host=False, auto=True),
        "host|auto",
        "host",
        "who sets time zero. auto: it is set as soon as the VM is configured, without a host",
    ),
    "settle": Option(
        "settle",
        _seconds,
        "SECONDS",
        "0.02",
        "for so many seconds nothing in a VMR may change before it starts",
    ),
    "quiet": Option(
        "quiet",
        _seconds,
        "SECONDS",
        "10",
        "the VM is configured when no negative time is left and nothing has changed for so many seconds in VMRs "
        "that have not run",
    ),
    "spool_limit": Option(
        "spool_limit",
        sizes.parse,
        "SIZE",
        "0",
        "output kept in the VM, at most; a script that prints more waits until the host has some of it. 0: 1 GiB "
        "or a tenth of the file system, the smaller",
    ),
    "overflow": Option(
        "overflow_drop",
        _one_of(block=False, drop=True),
        "block|drop",
        "block",
        "what happens to output that spool_limit, or a file system nearly full, leaves no room for. block: the "
        "script waits. drop: it doesn't, and what is dropped is counted, logged and listed, byte for byte",
    ),
    "keep_files": Option(
        "keep_files",
        sizes.parse,
        "SIZE",
        "1M",
        "files up to this size are kept with each attempt, for vmr-agent diff. 0: none",
    ),
    "max_reboots": Option("max_reboots", _count, "N", "10", "reboots that one VMR may ask for"),
    "reboot_command": Option(
        "reboot_command",
        _command,
        "COMMAND",
        "",
        "how the VM is rebooted. Not set: systemctl reboot, and only where the port is a VM's",
    ),
}
"""By the name in the file."""

PATHS = ("launch_dir", "port", "state_dir", "runtime_dir")
assert {option.field for option in OPTIONS.values()} == set(Settings._fields)


def variable(name: str) -> str:
    """The environment variable for one of :data:`PATHS`, or for the path of the file (``config``)."""
    return _ENVIRONMENT + name.upper()


def load(
    options: Mapping[str, Optional[str]], *, environment: Mapping[str, str], config: Optional[Path] = None
) -> Settings:
    """The settings in force. ``options`` are the command line's, None where not given.

    Raises Problem for a file that can't be read, an option nobody knows, a value that can't be.
    """
    explicit = config if config is not None else _from_environment(environment)
    path = explicit or CONFIG
    values: dict[str, Any] = {}
    for name, text in _read(path, must_exist=explicit is not None).items():
        values.update(_parse(name, text, f"{name} in {path}"))
    for name in PATHS:
        named = variable(name)
        if environment.get(named):
            values.update(_parse(name, environment[named], named))
    for name, option in options.items():
        if option is not None:
            if name != "port" and not option.startswith("/"):
                option = os.path.abspath(option)  # a person's shell knows where it is; a file does not
            elif option.startswith("unix:"):
                option = "unix:" + os.path.abspath(option[len("unix:") :])
            elif "/" in option:
                option = os.path.abspath(option)
            values.update(_parse(name, option, "--" + name.replace("_", "-")))
    return Settings(**values)


def _from_environment(environment: Mapping[str, str]) -> Optional[Path]:
    named = environment.get(variable("config"))
    return Path(named) if named else None


def _parse(name: str, text: str, source: str) -> dict[str, Any]:
    option = OPTIONS[name]
    try:
        return {option.field: option.parse(text)}
    except ValueError as error:
        raise Problem(f"cannot use {source} = {text!r}: {error}") from None


def _read(path: Path, *, must_exist: bool) -> Mapping[str, str]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if must_exist:
            raise Problem(f"cannot read {path}: there is no such file") from None
        return {}
    except PermissionError:
        raise Problem(f"cannot read {path}: permission denied", hint="try as root") from None
    except OSError as error:
        raise Problem(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise Problem(f"cannot read {path}: {error}") from None
    import configparser  # only where there is a file: a third of a megabyte

    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), default_section="")
    try:
        parser.read_string(text, source=os.fspath(path))
    except configparser.Error as error:
        sentence = " ".join(str(error).split())
        raise Problem(f"cannot read {path}: {sentence}") from None
    for section in parser.sections():
        if section != "vmr-agent":
            raise Problem(
                f"cannot use {path}: unknown section [{section}]", hint="the section is [vmr-agent]"
            )
    if not parser.has_section("vmr-agent"):
        return {}
    found = dict(parser["vmr-agent"])
    for name in found:
        if name not in OPTIONS:
            raise Problem(
                f"cannot use {path}: unknown option {name!r}", hint="options: " + ", ".join(sorted(OPTIONS))
            )
    return found
