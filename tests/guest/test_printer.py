"""A run's output as it is passed on, from spools that are not as they should be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.rig import Rig
from vmr_agent.cli.guest import Printer
from vmr_agent.guest.spool import RECORD, Run
from vmr_agent.runs import Stream

SCRIPT = "#!/bin/sh\nfor i in 1 2 3; do echo out $i; sleep 0.03; echo err $i >&2; sleep 0.03; done\n"
BOTH = b"out 1\nerr 1\nout 2\nerr 2\nout 3\nerr 3\n"


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.close()


def shown(run: Run, path: Path, **options: bool) -> bytes:
    """What is passed on where both streams go to one file."""
    saved = os.dup(1), os.dup(2)
    with path.open("wb") as file:
        try:
            for target in (1, 2):
                os.dup2(file.fileno(), target)
            Printer(run, list(Stream), **options).pass_on(last=True)
        finally:
            for target, copy in zip((1, 2), saved):
                os.dup2(copy, target)
                os.close(copy)
    return path.read_bytes()


def test_both_streams_in_the_order_in_which_they_came(rig: Rig, tmp_path: Path) -> None:
    assert shown(rig.run(SCRIPT), tmp_path / "shown") == BOTH


def test_what_no_index_knows_is_passed_on_all_the_same(rig: Rig, tmp_path: Path) -> None:
    """The order is lost with the index, never a byte."""
    run = rig.run(SCRIPT)
    index = (run.path / "index").read_bytes()
    for length in range(0, len(index), 7):
        (run.path / "index").write_bytes(index[:length])
        assert sorted(shown(run, tmp_path / "shown").splitlines()) == sorted(BOTH.splitlines())
    (run.path / "index").write_bytes(bytes(RECORD.size) + index[RECORD.size :])  # one could not be written
    assert sorted(shown(run, tmp_path / "shown").splitlines()) == sorted(BOTH.splitlines())
    (run.path / "index").unlink()
    assert sorted(shown(run, tmp_path / "shown").splitlines()) == sorted(BOTH.splitlines())


def test_an_index_that_says_more_than_there_is(rig: Rig, tmp_path: Path) -> None:
    """A power cut can take bytes that the index tells of."""
    run = rig.run(SCRIPT)
    with (run.path / "stdout").open("r+b") as file:
        file.truncate(8)
    run.close_fds()
    assert shown(run, tmp_path / "shown") == b"out 1\nerr 1\nouerr 2\nerr 3\n"


def test_lines_in_pieces_have_the_time_of_their_first(rig: Rig, tmp_path: Path) -> None:
    run = rig.run("#!/bin/sh\nprintf a; sleep 0.1; printf 'b\\nc\\n\\nd'; sleep 0.1; printf e\n")
    lines = shown(run, tmp_path / "shown", timestamps=True).decode().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["ab", "c", "", "de"]
    times = [line.split(" ")[0] for line in lines]
    assert times[0] < times[1] == times[2] == times[3]
    assert {line.split(" ")[1] for line in lines} == {"stdout"}
