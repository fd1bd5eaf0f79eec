"""What lives here: what both commands do alike: VMR names that begin with a dash, help, errors in one line, tables.

What a parser holds is all that `--help`, the manual pages and shell completion say of a command. It must not know:
any verb.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Optional

from vmr_agent import sizes
from vmr_agent.errors import show

# argparse takes `-4/compress.py` for an option. A token of this form is marked with a character that no argument
# can hold, and unmarked when it has been parsed.
_NEGATIVE = re.compile(r"-\d[^/]*/.")
_MARK = "\0"
_WIDE = 60  # characters of a cell that its column is made wide for


def mark(arguments: Sequence[str]) -> list[str]:
    """The arguments with VMR names that look like options marked; :func:`name` takes the mark away."""
    return [protect(each) if _NEGATIVE.match(each) else each for each in arguments]


def protect(argument: str) -> str:
    """An argument as one that is no option, whatever it begins with."""
    return _MARK + argument


def name(text: str) -> str:
    """argparse's ``type`` for a VMR's name or any path. Not empty: a shell's variable that is not set names nothing."""
    if not word(text):
        raise argparse.ArgumentTypeError("it must not be empty")
    return word(text)


def word(text: str) -> str:
    """argparse's ``type`` for what may be anything."""
    return text.lstrip(_MARK)


def signal_number(text: str) -> signal.Signals:
    """argparse's ``type`` for a signal, by name or number."""
    word = text.upper()
    try:
        return (
            signal.Signals(int(word))
            if word.isdigit()
            else signal.Signals["SIG" + word.replace("SIG", "", 1)]
        )
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"there is no signal {text!r}") from None


def size(text: str) -> int:
    """argparse's ``type`` for a number of bytes."""
    try:
        return sizes.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from None


class Example(NamedTuple):
    """A command line and what it is good for."""

    line: str
    what: str


class _Help(argparse.HelpFormatter):
    """Paragraphs are filled to the terminal's width; what holds an indented line stays as it is written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = []
        for part in text.strip("\n").split("\n\n"):
            if not any(line[:1] == " " for line in part.splitlines()):
                part = textwrap.fill(part, width, break_on_hyphens=False)
            parts.append(part)
        return "\n\n".join(parts)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """argparse with errors in our form: one line, exit status 2."""

    examples: Sequence[Example] = ()
    keys: Mapping[str, str] = {}
    """What `--json` prints: each key and its meaning."""

    def error(self, message: str) -> NoReturn:
        sentence = show(os.fsencode(message.replace(_MARK, "")))  # it quotes what was typed
        self.exit(2, f"{self.prog}: cannot understand that: {sentence}\n")

    def format_help(self) -> str:
        parts = []
        if self.examples:
            parts.append(f"example{'s' * (len(self.examples) > 1)}:\n{_table(self.examples)}")
        if self.keys:
            parts.append(f"keys of --json:\n{_glossary(self.keys)}")
        self.epilog = "\n\n".join(parts)
        return super().format_help()


def _table(examples: Sequence[Example]) -> str:
    """What each is good for beside it, or, where there is no room, below it."""
    pad = max(len(each.line) for each in examples) + 2
    if pad + max(len(each.what) for each in examples) < 78:
        lines = [f"  {each.line.ljust(pad)}{each.what}" for each in examples]
    else:
        lines = [f"  {each.line}\n      {each.what}" for each in examples]
    return "\n".join(line.rstrip() for line in lines)


def _glossary(words: Mapping[str, str]) -> str:
    pad = max(map(len, words)) + 4
    lines = []
    for word, meaning in words.items():
        lines += textwrap.wrap(
            meaning,
            79,
            initial_indent=f"  {word}".ljust(pad),
            subsequent_indent=" " * pad,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def parser(program: str, text: str, *examples: Example) -> Parser:
    """A command's parser. ``text``: a sentence, and paragraphs that say more."""
    made = Parser(prog=program, description=text, formatter_class=_Help)
    made.examples = examples
    return made


def verb(verbs: Any, name: str, text: str, *examples: Example) -> Parser:
    """A verb's parser. ``text``: a sentence, and paragraphs that say more. At least one example, or it is hidden."""
    summary = {"help": text.partition("\n\n")[0]} if examples else {}
    added: Parser = verbs.add_parser(name, description=text, formatter_class=_Help, **summary)
    added.examples = examples
    return added


def table(rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset()) -> str:
    """Rows as a table that lines up, but for cells so long that the others would be far away; the columns in ``right``
    are set to the right."""
    widths = [
        max((len(row[column]) for row in rows if len(row[column]) <= _WIDE), default=0)
        for column in range(len(rows[0]))
    ]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def duration(seconds: Optional[float]) -> str:
    """A time span for people: 0.03 s, 2 min 5 s, 3 h 10 min."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
