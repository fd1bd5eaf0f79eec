"""What lives here: the guest's settings, where each comes from, and what each may be.

Every path has a default, an option and an environment variable; `/etc/vmr-agent.conf` (INI, one section
`[vmr-agent]`) may set anything. Option beats environment beats file beats default. It must not know: the rooms.
"""

from __future__ import annotations

import configparser
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Optional

from vmr_agent.errors import Problem

CONFIG = Path("/etc/vmr-agent.conf")
_ENVIRONMENT = "VMR_AGENT_"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class Settings:
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


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError("must be a size such as 512M or 2G")
    return int(match[1]) * _UNITS[match[2].upper()]


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


# The name in the file, the field, and how its text is read.
_OPTIONS: Mapping[str, tuple[str, Any]] = {
    "launch_dir": ("launch_dir", _path),
    "port": ("port", _port),
    "state_dir": ("state_dir", _path),
    "runtime_dir": ("runtime_dir", _path),
    "schedule": ("schedule", _one_of(on=True, off=False)),
    "start": ("start_auto", _one_of(host=False, auto=True)),
    "settle": ("settle", _seconds),
    "quiet": ("quiet", _seconds),
    "spool_limit": ("spool_limit", _size),
    "keep_files": ("keep_files", _size),
    "max_reboots": ("max_reboots", _count),
    "reboot_command": ("reboot_command", _command),
}
PATHS = ("launch_dir", "port", "state_dir", "runtime_dir")
assert {field for field, _ in _OPTIONS.values()} == {field.name for field in fields(Settings)}


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
        variable = _ENVIRONMENT + name.upper()
        if environment.get(variable):
            values.update(_parse(name, environment[variable], variable))
    for name, option in options.items():
        if option is not None:
            if name != "port" and not option.startswith("/"):
                option = os.path.abspath(option)  # a person's shell knows where it is; a file does not
            elif option.startswith("unix:"):
                option = "unix:" + os.path.abspath(option[len("unix:") :])
            elif "/" in option:
                option = os.path.abspath(option)
            values.update(_parse(name, option, "--" + name.replace("_", "-")))
    return replace(Settings(), **values)


def _from_environment(environment: Mapping[str, str]) -> Optional[Path]:
    named = environment.get(_ENVIRONMENT + "CONFIG")
    return Path(named) if named else None


def _parse(name: str, text: str, source: str) -> dict[str, Any]:
    field, parse = _OPTIONS[name]
    try:
        return {field: parse(text)}
    except ValueError as error:
        raise Problem(f"cannot use {source} = {text!r}: {error}") from None


def _read(path: Path, *, must_exist: bool) -> Mapping[str, str]:
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), default_section="")
    try:
        with path.open(encoding="utf-8") as file:
            parser.read_file(file)
    except FileNotFoundError:
        if must_exist:
            raise Problem(f"cannot read {path}: there is no such file") from None
        return {}
    except PermissionError:
        raise Problem(f"cannot read {path}: permission denied", hint="try as root") from None
    except OSError as error:
        raise Problem(f"cannot read {path}: {error.strerror}") from None
    except (configparser.Error, UnicodeDecodeError) as error:
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
        if name not in _OPTIONS:
            raise Problem(
                f"cannot use {path}: unknown option {name!r}", hint="options: " + ", ".join(sorted(_OPTIONS))
            )
    return found
