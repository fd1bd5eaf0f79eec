"""Write the manual page of a command from its own help, so that the two never differ.

Usage: manual.py vmr-agent|vmr-host > PAGE, with the package on PYTHONPATH and nothing else installed.
"""

from __future__ import annotations

import argparse
import importlib
import sys

FILES = {
    "vmr-agent": [
        ("/var/launch/", "VM resources, as <start time>/<name>/call_arguments.sh"),
        ("/etc/vmr-agent.conf", "settings; an example is in /usr/share/doc/vmr-agent/examples"),
        ("/var/lib/vmr-agent/", "runs, and output that the host has not acknowledged"),
        ("/run/vmr-agent/control", "the socket of the verbs"),
    ],
    "vmr-host": [
        (
            "/etc/vmr-host.conf",
            "arguments of vmr-host.service; an example is in /usr/share/doc/vmr-host/examples",
        ),
        ("/run/vmr-host/control", "the socket of the verbs, of a collector that root runs"),
    ],
}


def roff(text: str) -> str:
    """The text as roff shows it literally."""
    lines = text.replace("\\", "\\e").replace("-", "\\-").splitlines()
    return "\n".join("\\&" + line if line[:1] in (".", "'") else line for line in lines)


def options(parser: argparse.ArgumentParser) -> list[str]:
    """Each option and argument of a parser, with its help."""
    lines = []
    for action in parser._actions:
        if isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)):
            continue
        value = action.metavar or action.dest
        words = [value] if isinstance(value, str) else list(value)
        if action.choices and action.metavar is None:
            words = ["{" + ",".join(map(str, action.choices)) + "}"]
        name = ", ".join(action.option_strings)
        if not name or action.nargs != 0:
            name = " ".join([name, *words] if name else words)
        lines += [".TP", f".B {roff(name)}"]
        # What the help is on this machine, in this environment, is not what it is on another.
        lines.append(roff(action.help or "").replace("%%", "%") or "\\&")
    return lines


def page(command: str) -> str:
    """The whole page."""
    module = importlib.import_module(f"vmr_agent.cli.{command.partition('-')[2]}")
    version = importlib.import_module("vmr_agent").__version__
    parser: argparse.ArgumentParser = module._parser()
    verbs = next(each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    assert verbs.choices is not None
    summary = (parser.description or "").rstrip(".")
    lines = [
        f'.TH {command.upper()} 1 "" "vmr\\-agent {version}"',
        *(".SH NAME", f"{roff(command)} \\- {roff(summary[:1].lower() + summary[1:])}"),
        *(".SH SYNOPSIS", f".B {roff(command)}", ".I VERB", "[\\fIoptions\\fR] ..."),
        *(".SH DESCRIPTION", roff(parser.description or "")),
        *(".PP", ".nf", roff((parser.epilog or "").rstrip()), ".fi"),
        ".SH VERBS",
    ]
    common: set[str] = set.intersection(
        *(set(verb._option_string_actions) for verb in verbs.choices.values())
    )
    for name, verb in verbs.choices.items():
        lines += [f".SS {roff(name)}", roff(verb.description or "")]
        own = argparse.ArgumentParser(add_help=False)
        own._actions = [each for each in verb._actions if not common & set(each.option_strings)]
        lines += options(own)
    first = next(iter(verbs.choices.values()))
    shared = argparse.ArgumentParser(add_help=False)
    shared._actions = [each for each in first._actions if common & set(each.option_strings)]
    lines += [".SH OPTIONS OF EACH VERB", *options(shared), ".SH FILES"]
    for path, what in FILES[command]:
        lines += [".TP", f".I {roff(path)}", roff(what)]
    other = next(each for each in FILES if each != command)
    lines += [".SH SEE ALSO", f".BR {roff(other)} (1)"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page(sys.argv[1]))
