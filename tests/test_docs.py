"""Help, manual, completion and the settings' example: written from one source, true, and fit for a terminal."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import apt
from vmr_agent.cli import agent, arguments, host, staging
from vmr_agent.guest import settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "packaging" / "man").glob("*.[15]"))
SCRIPTS = sorted(path for path in (ROOT / "packaging" / "completion").glob("*/*vmr-*"))
PARSERS = {"vmr-agent": agent._parser, "vmr-host": host._parser}


def verbs() -> Iterator[tuple[str, str, arguments.Parser]]:
    """Program, verb and parser of each verb; the programs themselves have no verb."""
    for program, make in PARSERS.items():
        parser = make()
        yield program, "", parser
        (group,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
        for name, verb in group.choices.items():
            yield program, name, verb


VERBS = list(verbs())
each_verb = pytest.mark.parametrize(
    ("program", "verb", "parser"), VERBS, ids=[f"{program} {verb}".strip() for program, verb, _ in VERBS]
)


def test_what_is_committed_is_what_the_commands_say() -> None:
    command = [sys.executable, str(ROOT / "packaging" / "make_docs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout == "", "run packaging/make_docs.py: " + done.stdout


@each_verb
def test_help_fits_80_columns(
    program: str, verb: str, parser: arguments.Parser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    long = [line for line in parser.format_help().splitlines() if len(line) > 79]
    assert not long, "\n".join(long)


@each_verb
def test_help_is_a_sentence_a_paragraph_and_examples(
    program: str, verb: str, parser: arguments.Parser
) -> None:
    if (program, verb) == ("vmr-host", "names"):
        return  # for scripts alone; no help lists it
    assert parser.description and parser.examples
    summary, _, more = parser.description.partition("\n\n")
    assert re.fullmatch(r"[A-Z][^\n]*\.", summary) and more.strip().endswith(".")
    assert "example" in parser.format_help()


@each_verb
def test_examples_can_be_typed_as_they_stand(program: str, verb: str, parser: arguments.Parser) -> None:
    for example in parser.examples:
        assert example.line.startswith(program) and f" {verb}" in example.line
        for command in re.split(r" (?:&&|\||>) ", example.line):
            words = shlex.split(command)
            if words[0] != program:
                continue
            if "--help" in words:
                continue
            given = staging.mark_program(words[1:]) if program == "vmr-host" else words[1:]
            PARSERS[program]().parse_args(arguments.mark(given))  # exits with 2 where it can't be understood


@each_verb
def test_each_option_says_what_it_is_and_its_default(
    program: str, verb: str, parser: arguments.Parser
) -> None:
    for action in parser._actions:
        if isinstance(action, (argparse._HelpAction, argparse._VersionAction, argparse._SubParsersAction)):
            continue
        assert action.help, action
        assert not action.help.endswith("."), action.help
        if action.option_strings and action.default not in (None, False, []):
            assert "default: " in action.help, action.help


def test_the_defaults_that_are_told_are_those_in_force(tmp_path: Path) -> None:
    for name, option in settings.OPTIONS.items():
        default = getattr(settings.Settings(), option.field)
        if option.default:
            assert option.parse(option.default) == default, name
        else:
            assert default is None, name


def test_the_example_of_settings_holds_each_option_and_can_be_read(tmp_path: Path) -> None:
    example = (ROOT / "packaging" / "examples" / "vmr-agent.conf").read_text()
    assert re.findall(r"^#(\w+) = ", example, re.MULTILINE) == list(settings.OPTIONS)
    assert settings.load({}, environment={}, config=ROOT / "packaging" / "examples" / "vmr-agent.conf") == (
        settings.Settings()
    )
    whole = tmp_path / "whole.conf"
    whole.write_text(re.sub(r"^#(?=\w+ = )", "", example, flags=re.MULTILINE))
    loaded = settings.load({}, environment={}, config=whole)
    assert loaded.reboot_command == ("systemctl", "reboot")


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_manual_pages_are_good_roff(page: Path) -> None:
    done = subprocess.run(
        [apt.need("mandoc", "mandoc"), "-Tlint", "-W", "style", page], capture_output=True, text=True
    )
    assert done.stdout + done.stderr == ""
    done = subprocess.run(
        [apt.need("groff", "groff"), "-ww", "-man", "-Tutf8", page], capture_output=True, text=True
    )
    assert done.stderr == ""
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m|.\x08", "", done.stdout).splitlines())) <= 80


def test_units_name_pages_that_there_are() -> None:
    for unit in (ROOT / "systemd").glob("*.service"):
        for name, section in re.findall(r"^Documentation=man:(\S+)\((\d)\)", unit.read_text(), re.MULTILINE):
            assert (ROOT / "packaging" / "man" / f"{name}.{section}").exists(), unit


@pytest.mark.parametrize("script", SCRIPTS, ids=[str(path.relative_to(path.parents[1])) for path in SCRIPTS])
def test_completion_scripts_are_good_shell(script: Path) -> None:
    shell = script.parent.name
    done = subprocess.run([apt.need(shell, shell), "-n", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_page_on_reliability_names_tests_that_there_are() -> None:
    page = (ROOT / "tests" / "faults" / "RELIABILITY.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^ *def (test_\w+)\(", path.read_text(), re.MULTILINE)
    }
    assert len(named) > 40
    assert sorted(named - there) == []
    for path in re.findall(r"`(tests/[\w/.]+)`", page):
        assert (ROOT / path).exists(), path
