"""Completion scripts for bash, zsh and fish: the templates beside them, filled with what a command's parser says.

A script works alone: without the daemon or collector it offers less, and it never prints an error.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from make_docs import Command, Option, Verb

TEMPLATES = Path(__file__).resolve().parent / "completion"
GENERATED = "Written by packaging/make_docs.py; change packaging/completion/template.{shell} instead."

KINDS = {
    **dict.fromkeys(("FILE", "PATH", "PORT", "DESTINATION", "DIRECTORY|PROGRAM", "ARG"), "file"),
    **dict.fromkeys(("N", "A", "B", "SECONDS", "SIZE", "TIME", "NAME"), "none"),
    **dict.fromkeys(("VM=SOCKET", "VM=PATH"), "source"),
    "DIR": "directory",
    "VMR": "vmr",
    "VM": "vm",
    "SIGNAL": "signal",
}
"""What each word for a value stands for. A word that isn't here is a KeyError: say here what it is."""

IN_THE_VM = {("pull", "FILE"), ("push", "DESTINATION")}
"""Files that this machine doesn't know."""

SIGNALS = ("TERM", "KILL", "INT", "HUP", "QUIT", "USR1", "USR2", "STOP", "CONT", "ABRT")


def script(command: Command, shell: str) -> str:
    """One command's script for one shell."""
    prefix = "_" + command.program.replace("-", "_")
    text = (TEMPLATES / f"template.{shell}").read_text()
    side = "guest" if command.program == "vmr-agent" else "host"
    text = re.sub(r"(?ms)^#@(guest|host)\n(.*?)^#@end\n", lambda m: m[2] if m[1] == side else "", text)
    words = {
        "generated": GENERATED.format(shell=shell),
        "program": command.program,
        "prefix": prefix,
        "signals": " ".join(SIGNALS),
        "tables": {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](command),
    }
    if side == "guest":
        from vmr_agent.guest import settings

        words["launch_dir"] = settings.OPTIONS["launch_dir"].default
        words["config"] = str(settings.CONFIG)
    text = re.sub(r"@(\w+)@", lambda m: words[m[1]], text)
    return text


# --- what the templates are filled with ----------------------------------------------------------------------


def _kinds(verb: Verb, option: Option) -> str:
    """A word for each value: what may stand there; a * behind the last: any number of them."""
    if option.choices:
        return "=" + ",".join(option.choices)
    kinds = ["none" if (verb.name, each) in IN_THE_VM else KINDS[each] for each in option.values]
    return " ".join(kinds) + ("*" if option.repeats and not option.flags else "")


def _places(verb: Verb) -> str:
    return " ".join(_kinds(verb, each) for each in verb.arguments)


def _valued(verb: Verb) -> list[tuple[str, str]]:
    """Each option that takes a value, as typed behind its verb, and what may stand there."""
    return [(f"{verb.name} {each.flags[0]}", _kinds(verb, each)) for each in verb.options if each.values]


def _options(verb: Verb) -> list[tuple[str, str]]:
    """Each option in its long form, with a * where it may be given again, and what it is."""
    return [(each.flags[0] + "*" * each.repeats, _short(each.help)) for each in verb.options]


def _short(help: str) -> str:
    return "show help and exit" if help.startswith("show this help") else help


def _bash(command: Command) -> str:
    lines = [f"    local verbs='{' '.join(verb.name for verb in command.verbs)}'", "    options=("]
    for verb in command.verbs:
        lines.append(f"        [{verb.name}]='{' '.join(flag for flag, _ in _options(verb))}'")
    lines += ["    )", "    values=("]
    lines += [f"        ['{typed}']='{kinds}'" for verb in command.verbs for typed, kinds in _valued(verb)]
    lines += ["    )", "    places=("]
    lines += [f"        [{verb.name}]='{_places(verb)}'" for verb in command.verbs if verb.arguments]
    return "\n".join([*lines, "    )"])


def _zsh(command: Command) -> str:
    def described(pairs: list[tuple[str, str]]) -> list[str]:
        return [shlex.quote(f"{name}:{what}") for name, what in pairs]

    lines = ["    verbs=("]
    lines += [f"        {each}" for each in described([(verb.name, verb.summary) for verb in command.verbs])]
    lines += ["    )", "    case $verb in"]
    for verb in command.verbs:
        lines += [f"        {verb.name})", "            options=("]
        lines += [f"                {each}" for each in described(_options(verb))]
        lines += ["            )", "            ;;"]
    lines += ["    esac", "    values=("]
    lines += [f"        '{typed}' '{kinds}'" for verb in command.verbs for typed, kinds in _valued(verb)]
    lines += ["    )", "    places=("]
    lines += [f"        {verb.name} '{_places(verb)}'" for verb in command.verbs if verb.arguments]
    return "\n".join([*lines, "    )"])


def _fish(command: Command) -> str:
    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    prefix = "__" + command.program.replace("-", "_")
    lines = [f"function {prefix}_verbs"]
    lines += [f"    printf '%s\\t%s\\n' {verb.name} {quoted(verb.summary)}" for verb in command.verbs]
    lines += ["end", "", f"function {prefix}_options", "    switch $argv[1]"]
    for verb in command.verbs:
        lines.append(f"        case {verb.name}")
        lines += [f"            printf '%s\\t%s\\n' '{flag}' {quoted(what)}" for flag, what in _options(verb)]
    lines += ["    end", "end", "", f"function {prefix}_values", "    switch $argv[1]"]
    for verb in command.verbs:
        for typed, kinds in _valued(verb):
            lines += [f"        case '{typed}'", *(f"            echo '{kind}'" for kind in kinds.split())]
    lines += ["    end", "end", "", f"function {prefix}_places", "    switch $argv[1]"]
    for verb in command.verbs:
        if verb.arguments:
            lines.append(f"        case {verb.name}")
            lines += [f"            echo '{kind}'" for kind in _places(verb).split()]
    return "\n".join([*lines, "    end", "end"])
