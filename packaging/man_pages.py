"""The manual pages in roff: what a command's parser and the settings' table say, with what only a manual says."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from make_docs import Command, Option, Verb

HERE = Path(__file__).resolve().parent
GENERATED = '.\\" Written by packaging/make_docs.py, from what the commands say of themselves.'

NAMES = {
    "vmr-agent": "run VM resources inside a VM and ship what they print",
    "vmr-agent.conf": "settings of vmr-agent",
    "vmr-host": "collect what VM resources print, and talk to their VMs",
}

SEE_ALSO = {
    "vmr-agent": ("vmr-agent.conf (5)", "vmr-host (1)", "systemctl (1)"),
    "vmr-agent.conf": ("vmr-agent (1)", "systemd.syntax (7)"),
    "vmr-host": ("vmr-agent (1)", "systemctl (1)"),
}

SCHEDULE = """\
VMRs with a negative start time run in ascending order, those of one time together, and the next time waits until each
of them has exited. When no negative time is left and nothing has changed for a while, the VM is configured. Positive
times count in seconds from time zero, which the host sets for all VMs. Exit codes decide nothing. A VMR of a negative
time that exits with 10, or leaves a file reboot in its directory, has the VM rebooted and runs again.

A VMR is ready when its call_arguments.sh is executable: the x bit is the commit. Directories must belong to root and be
writable by nobody else; what isn't is refused, with the reason in vmr-agent status and on the host.

Scripts outlive the daemon. Their output lies on the VM's disk until the host has it on its own."""

LOGS = """\
Guests are not trusted: what they send is bounded, and nothing is written outside a VM's own files. <VM>.log and
<VM>.json are rendered from the raw files by a process of their own; they may lag behind, and hold each line once. In
the path of a raw file each byte of a name but letters, digits and ._-+@=, is written %XX."""

FILES = {
    "vmr-agent": {
        "/var/launch/<start time>/<name>/": "a VMR; call_arguments.sh in it is what is run",
        "/var/launch/.hold": "while it is there, nothing new starts by schedule",
        "/etc/vmr-agent.conf": "settings; see vmr-agent.conf(5)",
        "/var/lib/vmr-agent/": "runs, and output until the host has it",
        "/run/vmr-agent/control": "the socket of the verbs: one JSON object a line",
    },
    "vmr-agent.conf": {"/etc/vmr-agent.conf": "the settings"},
    "vmr-host": {
        "<log dir>/<VM>.log": "starts, output as Python shows bytes, and exits, in FIREWHEEL's format",
        "<log dir>/<VM>.json": "one JSON object for each line of output, with timestamp, vmr, attempt and stream",
        "<log dir>/<VM>/<start time>/<name>/<attempt>/": "stdout and stderr, the exact bytes; and result.json, whose "
        "keys are those of list --json",
        "<log dir>/<VM>~1/": "an earlier life of the VM: its disk was another, or it came back from a snapshot",
        "/run/vmr-host/control": "the socket of the verbs: one JSON object a line",
        "/etc/vmr-host.conf": "arguments of vmr-host.service",
    },
}

EXIT_STATUS = {
    "0": "it is done",
    "1": "it could not be done; one line says why",
    "2": "the command line can't be understood",
    "130": "stopped by Ctrl-C",
    "other": "rerun: that of the script; 128 + the signal's number if a signal ended it; 126 if it could not be "
    "executed",
}


def of_command(command: Command) -> str:
    """The page in section 1."""
    program = command.program
    lines = [*_head(program, 1), ".SH SYNOPSIS"]
    for verb in command.verbs:
        lines += [".br"] * (verb is not command.verbs[0])
        lines.append(_usage(command, verb))
    text, _, _ = command.text.partition("\n\nExit status")
    lines += [".SH DESCRIPTION", *_paragraphs(text)]
    lines += [".PP", *_paragraphs(SCHEDULE if program == "vmr-agent" else LOGS)]
    lines.append(".SH VERBS")
    for verb in command.verbs:
        lines += [f".SS {program_word(verb.name)}", *_paragraphs(verb.text)]
        lines += _definitions(verb.arguments + command.own(verb))
        lines += [".PP", f"Example{'s' * (len(verb.examples) > 1)}:"]
        for line, what in verb.examples:
            lines += [".PP", ".RS 4", ".nf", _literal(line), ".fi"]
            lines += [".RS 4", *_filled(what), ".RE"] * bool(what) + [".RE"]
    lines += [".SH OPTIONS OF EVERY VERB", *_definitions(command.common)]
    lines += [
        ".SH OPTIONS WITHOUT A VERB",
        *_definitions([o for o in command.options if "--help" not in o.flags]),
    ]
    for verb in command.verbs:
        if verb.keys:
            lines += [f".SH KEYS OF {verb.name.upper()} \\-\\-JSON"]
            lines += _filled(
                f"{program} {verb.name} --json prints one array of objects. Keys may be added; none is removed, "
                "renamed or given another meaning."
            )
            lines += _glossary(verb.keys)
    lines += [".SH EXIT STATUS", *_glossary(EXIT_STATUS)]
    lines += [".SH ENVIRONMENT", *_glossary(_environment(program))]
    lines += [".SH FILES", *_glossary(FILES[program], italic=True)]
    lines += [".SH EXAMPLES", *_session(program), *_see_also(program)]
    return "\n".join(lines) + "\n"


def of_settings() -> str:
    """vmr-agent.conf(5)."""
    from vmr_agent.guest import settings

    lines = [
        *_head("vmr-agent.conf", 5),
        ".SH SYNOPSIS",
        f".I {_literal(str(settings.CONFIG))}",
        ".SH DESCRIPTION",
    ]
    lines += _paragraphs(
        "What vmr-agent does by itself can be set here, in an INI file with one section, [vmr-agent]. A line that "
        "begins with # or ; says nothing. An option or a section that nobody knows is an error, so nothing is "
        "misspelt unseen.\n\nA command's option comes before the environment, the environment before this file, and "
        "this file before the default. The daemon reads it when it starts; the verbs read it too, to find the daemon."
    )
    lines.append(".SH OPTIONS")
    for name, option in settings.OPTIONS.items():
        lines += [".TP", f'.BR {name} " = \\fI{_literal(option.value)}\\fR"']
        lines += _filled(f"{sentence(option.help)}")
        if option.default:
            lines += _filled(f"Default: {option.default}")
    lines += [
        ".PP",
        *_paragraphs(
            "A SIZE is a number of bytes, or one with K, M, G or T behind it, which count by 1024. DIR is an absolute "
            "path. SECONDS may have a decimal point."
        ),
    ]
    lines += [".SH EXAMPLES"]
    lines += _filled("Beside FIREWHEEL's own handler, with little room on the disk:")
    lines += _block("[vmr-agent]\nschedule = off\nspool_limit = 256M")
    lines.append(".PP")
    lines += _filled("An image that is used without a host, and never rebooted:")
    lines += _block("[vmr-agent]\nstart = auto\nmax_reboots = 0")
    lines += [".SH FILES", *_glossary(FILES["vmr-agent.conf"], italic=True), *_see_also("vmr-agent.conf")]
    return "\n".join(lines) + "\n"


# --- parts of pages ------------------------------------------------------------------------------------------


def _head(name: str, section: int) -> list[str]:
    date = time.strftime("%Y-%m-%d", time.gmtime(int(_release("epoch"))))
    title = f'.TH {_literal(name.upper())} {section} {date} "vmr\\-agent {_release("version")}"'
    return [GENERATED, title, ".SH NAME", f"{_literal(name)} \\- {NAMES[name]}"]


def _release(what: str) -> str:
    """From the changelog, as all builds have it."""
    command = [sys.executable, str(HERE / "release.py"), what]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def program_word(name: str) -> str:
    return _literal(name)


def _usage(command: Command, verb: Verb) -> str:
    """One line of the synopsis: the options of each verb are left out."""
    words = [f"\\fB{_literal(command.program)} {_literal(verb.name)}\\fR"]
    own = command.own(verb)
    shown: list[list[str]] = []
    for option in own:
        group = next((each for each in verb.either if option.flags[0] in each), [option.flags[0]])
        if group in shown:
            continue
        shown.append(group)
        text = " | ".join(_with_value(each, roman=False) for each in own if each.flags[0] in group)
        text = text if option.needed else f"[{text}]"
        words.append(text + (" ..." if option.repeats else ""))
    for option in verb.arguments:
        text = f"\\fI{_literal(' '.join(option.values))}\\fR" + (" ..." if option.repeats else "")
        words.append(text if option.needed else f"[{text}]")
    return " ".join(words)


def _with_value(option: Option, *, roman: bool) -> str:
    flags = ", ".join(f"\\fB{_literal(each)}\\fR" for each in (option.flags if roman else option.flags[:1]))
    values = " ".join(
        _literal(each) if each[:1] == "{" else f"\\fI{_literal(each)}\\fR" for each in option.values
    )
    return f"{flags} {values}".strip()


def _definitions(options: Iterable[Option]) -> list[str]:
    lines = []
    for option in options:
        if option.flags and option.flags[0] in ("--help",):
            continue
        lines += [".TP", _with_value(option, roman=True), *_filled(option.help)]
    return lines


def _glossary(words: Mapping[str, str], *, italic: bool = False) -> list[str]:
    lines = []
    for word, meaning in words.items():
        lines += [".TP", f'.{"I" if italic else "B"} "{_literal(word)}"', *_filled(meaning)]
    return lines


def _environment(program: str) -> dict[str, str]:
    if program == "vmr-agent":
        from vmr_agent.guest import settings

        found = {settings.variable("config"): "as --config"}
        for name in settings.PATHS:
            found[settings.variable(name)] = f"as --{name.replace('_', '-')}"
        return found
    return {
        "VMR_HOST_CONTROL": "as --control",
        "VMR_HOST_LOG_DIR": "as --log-dir of collect; and where mix, list and logs look when no collector can be asked",
        "XDG_RUNTIME_DIR": "where users have the control socket, below vmr-host",
    }


def _session(program: str) -> list[str]:
    """A recorded session: paragraphs, and in between what was typed and shown, indented."""
    lines: list[str] = []
    for part in (HERE / f"man/{program}.session").read_text().strip("\n").split("\n\n"):
        if part.startswith("    "):
            lines += _block("\n".join(line[4:] for line in part.splitlines()))
        else:
            lines += [".PP"] * bool(lines) + _filled(part)
    return lines


def _see_also(name: str) -> list[str]:
    pages = [f".BR {_literal(each)}" for each in SEE_ALSO[name]]
    return [".SH SEE ALSO", *(f"{page}," for page in pages[:-1]), pages[-1]]


# --- roff ----------------------------------------------------------------------------------------------------


def _literal(text: str) -> str:
    """The text as roff shows it."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    text = text.replace("^", "\\(ha").replace("~", "\\(ti").replace('"', "\\(dq")
    return "\\&" + text if text[:1] == "." else text


def _filled(text: str) -> list[str]:
    """A paragraph, a sentence a line at most."""
    sentences = re.split(r"(?<=[.:?]) (?=\S)", " ".join(text.split()))
    return [
        _literal(line)
        for sentence in sentences
        for line in textwrap.wrap(sentence, 72, break_on_hyphens=False, break_long_words=False)
    ]


def _paragraphs(text: str) -> list[str]:
    lines: list[str] = []
    for part in text.strip().split("\n\n"):
        lines += [".PP"] * bool(lines) + _filled(part)
    return lines


def _block(text: str) -> list[str]:
    """Lines as they are, indented."""
    shown = [_literal(line) or "\\&" for line in text.splitlines()]
    return [".PP", ".RS 4", ".nf", *shown, ".fi", ".RE"]


def sentence(text: str) -> str:
    """A help text as one; a value that it begins by explaining stays as it is written."""
    return (text if re.match(r"\S+:", text) else text[:1].upper() + text[1:]) + "."
