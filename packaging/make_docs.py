#!/usr/bin/env python3
"""Manual pages, shell completion and the example of /etc/vmr-agent.conf, written from what the commands' own parsers
and the settings' table say, so that they can't disagree. What is written is committed.

Usage: make_docs.py            write what is out of date, and name it
       make_docs.py --check    only name it; exit status 1 if there is any

It needs what vmr-agent needs, and nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "agent"), str(ROOT / "packaging")]

COMMON = {"reboot_command": "systemctl reboot"}
"""Values for options that have no default."""

PROGRAMS = {"vmr-agent": "vmr_agent.cli.agent", "vmr-host": "vmr_agent.cli.host"}


@dataclass(frozen=True)
class Option:
    """An option or, without ``flags``, a positional argument."""

    flags: list[str]
    values: list[str]
    """A word for each value it takes."""
    help: str
    choices: list[str]
    repeats: bool
    needed: bool


@dataclass(frozen=True)
class Verb:
    name: str
    text: str
    """A sentence, and paragraphs that say more."""
    options: list[Option]
    arguments: list[Option]
    either: list[list[str]]
    """Options of which only one can be given."""
    examples: list[tuple[str, str]]
    keys: Mapping[str, str]

    @property
    def summary(self) -> str:
        return self.text.partition("\n\n")[0].strip()


@dataclass(frozen=True)
class Command:
    program: str
    text: str
    options: list[Option]
    verbs: list[Verb]
    examples: list[tuple[str, str]]
    common: list[Option] = field(default_factory=list)
    """The options that each verb has."""

    def own(self, verb: Verb) -> list[Option]:
        """The options that not each verb has."""
        common = [option.flags for option in self.common]
        return [option for option in verb.options if option.flags not in common]


def command(program: str) -> Command:
    """What a command's parser says."""
    for name in [name for name in os.environ if name.startswith(("VMR_", "XDG_"))]:
        del os.environ[name]  # what it says here is what it says where nothing is set
    module: ModuleType = importlib.import_module(PROGRAMS[program])
    parser: Any = module._parser()
    group = next(each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    shown = [action.dest for action in group._choices_actions]
    verbs = [_verb(name, group.choices[name]) for name in shown]
    flags = [[option.flags for option in verb.options] for verb in verbs]
    common = [option for option in verbs[0].options if all(option.flags in each for each in flags)]
    options = [option for option in map(_option, parser._actions) if option.flags]
    return Command(program, parser.description, options, verbs, _examples(parser), common)


def _verb(name: str, parser: Any) -> Verb:
    options = [_option(action) for action in parser._actions]
    return Verb(
        name=name,
        text=parser.description,
        options=[option for option in options if option.flags],
        arguments=[option for option in options if not option.flags],
        either=[
            [action.option_strings[-1] for action in group._group_actions]
            for group in parser._mutually_exclusive_groups
        ],
        examples=_examples(parser),
        keys=parser.keys,
    )


def _examples(parser: Any) -> list[tuple[str, str]]:
    return [(example.line, example.what) for example in parser.examples]


def _option(action: argparse.Action) -> Option:
    value = action.metavar or ("{" + ",".join(action.choices) + "}" if action.choices else action.dest)
    values = [value] if isinstance(value, str) else list(value)
    return Option(
        flags=sorted(action.option_strings),
        values=[] if action.nargs == 0 else values,
        help=(action.help or "").replace("%%", "%"),
        choices=list(action.choices or []) if not isinstance(action, argparse._SubParsersAction) else [],
        repeats=action.nargs in ("*", "+") or isinstance(action, argparse._AppendAction),
        needed=action.required or (not action.option_strings and action.nargs not in ("?", "*")),
    )


def example_of_settings() -> str:
    """The example of /etc/vmr-agent.conf: each option, off, with its default."""
    import textwrap

    import man_pages

    from vmr_agent.guest import settings

    lines = [
        f"# Copy to {settings.CONFIG} and take away the # where you want another value than the one",
        "# shown, the default. vmr-agent.conf(5) says more. Written by packaging/make_docs.py.",
        *("", "[vmr-agent]"),
    ]
    for name, option in settings.OPTIONS.items():
        lines += [
            "",
            *textwrap.wrap(man_pages.sentence(option.help), 98, initial_indent="# ", subsequent_indent="# "),
        ]
        lines.append(f"#{name} = {option.default or COMMON[name]}")
    return "\n".join(lines) + "\n"


def documents() -> Iterator[tuple[Path, str]]:
    """Each file that is written, and what is in it."""
    import completions
    import man_pages

    for program in PROGRAMS:
        said = command(program)
        yield ROOT / f"packaging/man/{program}.1", man_pages.of_command(said)
        yield ROOT / f"packaging/completion/bash/{program}", completions.script(said, "bash")
        yield ROOT / f"packaging/completion/zsh/_{program}", completions.script(said, "zsh")
        yield ROOT / f"packaging/completion/fish/{program}.fish", completions.script(said, "fish")
    yield ROOT / "packaging/man/vmr-agent.conf.5", man_pages.of_settings()
    yield ROOT / "packaging/examples/vmr-agent.conf", example_of_settings()


def main() -> int:
    check = sys.argv[1:] == ["--check"]
    if sys.argv[1:] and not check:
        print(__doc__, file=sys.stderr)
        return 2
    stale = [(path, text) for path, text in documents() if not path.exists() or path.read_text() != text]
    for path, text in stale:
        print(path.relative_to(ROOT))
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return 1 if stale and check else 0


if __name__ == "__main__":
    raise SystemExit(main())
