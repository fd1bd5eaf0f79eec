"""A run's output as it is passed on, from spools that are not as they should be."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.rig import Rig
from vmr_agent.cli.guest import Printer
from vmr_agent.guest.spool import RECORD, Lengths, Run
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


def test_what_was_dropped_is_passed_over(rig: Rig, tmp_path: Path) -> None:
    """No zero of the hole is passed on, and off a terminal no word."""
    run = rig.run(SCRIPT)
    stdout = (run.path / "stdout").read_bytes()
    (run.path / "stdout").write_bytes(stdout[:8] + bytes(1_000_000) + stdout[8:])
    (run.path / "gaps").write_bytes(struct.pack("<QQQBBB5x", 8, 1_000_000, 1, 1, 2, 1))
    index = list(RECORD.iter_unpack((run.path / "index").read_bytes()))
    assert index[2][0] == 6 and index[2][3] == Stream.STDOUT
    moved = [(at + 1_000_000 * (number == 1), ns, size, number) for at, ns, size, number in index[3:]]
    cut = [(6, index[2][1], 2, 1), (1_000_008, index[2][1], 4, 1)]
    (run.path / "index").write_bytes(b"".join(RECORD.pack(*record) for record in (*index[:2], *cut, *moved)))
    assert shown(run, tmp_path / "shown") == BOTH
    lines = shown(run, tmp_path / "shown", timestamps=True).splitlines()
    texts = sorted(line.split(b" ", 2)[2] for line in lines)
    assert texts == sorted([b"out 1", b"ou", b"t 2", b"out 3", b"err 1", b"err 2", b"err 3"])


def test_what_goes_while_it_is_being_passed_on_is_not_passed_on_as_zeros(
    rig: Rig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whoever reads slowly, in a pager, may come behind what the host has and the spool gives up."""
    data = os.urandom(300_000)
    (rig.base / "data").write_bytes(data)
    run = rig.run(f"#!/bin/sh\ncat {rig.base}/data\n")
    printer = Printer(run, list(Stream))
    run.prune(Lengths(len(data), 0), whole=False)
    pruned = run.pruned(Stream.STDOUT)
    assert pruned > 0
    saved = os.dup(1)
    with (tmp_path / "shown").open("wb") as file:
        try:
            os.dup2(file.fileno(), 1)
            printer.pass_on(last=True)
        finally:
            os.dup2(saved, 1)
            os.close(saved)
    assert (tmp_path / "shown").read_bytes() == data[pruned:]
    assert f"the first {pruned:,} bytes of stdout are only on the host now" in capfd.readouterr().err


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
