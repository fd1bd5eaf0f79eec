"""Where a setting comes from, and what is said of one that can't be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vmr_agent.errors import Problem
from vmr_agent.guest.settings import Settings, load


def read(tmp_path: Path, text: str, **options: Any) -> Settings:
    config = tmp_path / "agent.conf"
    config.write_text(text)
    return load(options, environment={}, config=config)


def test_with_nothing_said_the_defaults_hold() -> None:
    assert load({}, environment={}, config=None) == Settings()


def test_an_option_beats_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    config = tmp_path / "agent.conf"
    config.write_text("[vmr-agent]\nlaunch_dir = /file\nstate_dir = /file\nruntime_dir = /file\n")
    environment = {
        "VMR_AGENT_CONFIG": str(config),
        "VMR_AGENT_STATE_DIR": "/env",
        "VMR_AGENT_RUNTIME_DIR": "/env",
    }
    found = load({"runtime_dir": "/option", "launch_dir": None}, environment=environment)
    assert [str(found.launch_dir), str(found.state_dir), str(found.runtime_dir)] == [
        "/file",
        "/env",
        "/option",
    ]


def test_every_option_is_read(tmp_path: Path) -> None:
    text = (
        "[vmr-agent]\nschedule = off\nstart = auto\nsettle = 0.1\nquiet = 3\nspool_limit = 2 MiB\n"
        "max_reboots = 4\nreboot_command = echo 'now then'\nport = unix:/run/p\n"
    )
    found = read(tmp_path, text)
    assert (found.schedule, found.start_auto, found.settle, found.quiet) == (False, True, 0.1, 3.0)
    assert (found.spool_limit, found.max_reboots) == (2 << 20, 4)
    assert (found.reboot_command, found.port) == (("echo", "now then"), "unix:/run/p")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[vmr-agent]\ncolour = red\n", ["unknown option 'colour'", "launch_dir"]),
        ("[agent]\nport = x\n", ["unknown section [agent]"]),
        ("port = x\n", ["cannot read"]),
        ("[vmr-agent]\nschedule = perhaps\n", ["schedule in", "must be on or off"]),
        ("[vmr-agent]\nquiet = nan\n", ["quiet"]),
        ("[vmr-agent]\nquiet = -1\n", ["quiet"]),
        ("[vmr-agent]\nspool_limit = lots\n", ["must be a size"]),
        ("[vmr-agent]\nlaunch_dir = launch\n", ["must be an absolute path"]),
        ("[vmr-agent]\nport = unix:\n", ["port"]),
        ("[vmr-agent]\nreboot_command = 'open\n", ["reboot_command"]),
        ("[vmr-agent]\nport = a\nport = b\n", ["cannot read"]),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(Problem) as caught:
        read(tmp_path, text)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.startswith("cannot ") and "agent.conf" in sentence
    assert all(word in sentence for word in words), sentence


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(Problem, match="cannot read"):
            load({}, environment={}, config=path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Problem, match="cannot read"):
        load({}, environment={}, config=tmp_path / "binary")
