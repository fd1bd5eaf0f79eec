"""What the host's tables and `logs` are made of, read from a log directory as a collector leaves it."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.host import said
from vmr_agent import control
from vmr_agent.cli import arguments, tables
from vmr_agent.errors import Problem
from vmr_agent.host import collector, view
from vmr_agent.host.logstore import LogStore
from vmr_agent.runs import Ending, Stream

COMPRESS = b"-4/compress.py"


def logged(log_dir: Path, vm: str = "vm1", *, spool: bytes = said.SPOOL, **ended: Any) -> None:
    """One run with one line of output, ended if it is said how."""
    store = LogStore(log_dir, vm, log=lambda _: None)
    store.life(said.hello(spool=spool), said.T)
    store.run(said.run())
    store.output(said.output(b"line\n"))
    if ended:
        store.exit(said.exit(5, **ended))
    store.close()


def row(vmr: bytes, state: str, attempt: int = 0, reason: str = "") -> dict[str, Any]:
    """What the collector passes on of a guest's row."""
    return {"vmr": os.fsdecode(vmr), "state": state, "attempt": attempt, "reason": reason}


def test_vms_are_those_with_logs_by_their_own_names_and_once(tmp_path: Path) -> None:
    names = ["vm1", "lab server~1", "b\u00fcro", "42", "~7"]
    for vm in names:
        logged(tmp_path, vm, value=0)
        logged(tmp_path, vm, spool=b"t" * 16, value=0)
    (tmp_path / "somebody's").mkdir()
    (tmp_path / "notes.txt").touch()
    assert (tmp_path / "vm1~1").is_dir()
    assert sorted(view.vms(tmp_path)) == sorted(names)
    with pytest.raises(Problem, match=r"cannot read .*none"):
        view.vms(tmp_path / "none")


@pytest.mark.parametrize(
    ("wanted", "hint"),
    [
        ("vm", "did you mean vm1?"),
        ("quite another", "the VMs are vm1"),
        ("vm1~2", "the files of an earlier life of vm1 are in the log directory, for you to read"),
        ("vm9~2", "did you mean vm1?"),
    ],
)
def test_who_names_no_vm_is_told_which_there_are(wanted: str, hint: str) -> None:
    assert view.near(wanted, ["vm1"]) == hint


def test_what_has_not_run_comes_from_the_guest_and_what_has_from_the_files(tmp_path: Path) -> None:
    logged(tmp_path)
    rows = view.vmrs(
        tmp_path,
        "vm1",
        [
            row(b"5/later", "waiting"),
            row(COMPRESS, "blocked", 1, "the spool is full"),
            row(b"-9/bad", "refused", 0, "others may write to it"),
            row(b"-1/odd \xff", "exited", 3),
        ],
    )
    assert [each["vmr"] for each in rows] == ["-9/bad", "-4/compress.py", "-1/odd \\xff", "5/later"]
    assert [each["state"] for each in rows] == ["refused", "blocked", "exited", "waiting"]
    assert [each["attempt"] for each in rows] == [0, 1, 3, 0]
    assert [each["error"] for each in rows] == ["others may write to it", "the spool is full", None, None]
    assert {frozenset(each) for each in rows} == {frozenset(rows[1])}, "one shape"
    assert rows[1]["stdout_bytes"] == 5
    counts = view.counts(tmp_path, "vm1", {"waiting": 1, "refused": 1, "blocked": 1, "exited": 1})
    assert {key: count for key, count in counts.items() if count} == {
        "waiting": 1,
        "refused": 1,
        "blocked": 1,
    }


def test_a_blocked_row_of_an_earlier_attempt_says_nothing_of_this_one(tmp_path: Path) -> None:
    logged(tmp_path, value=0)
    (each,) = view.vmrs(tmp_path, "vm1", [row(COMPRESS, "blocked", 1)])
    assert each["state"] == "exited"


@pytest.mark.parametrize(
    ("ended", "expected"),
    [
        ({"value": 7}, (Ending.CODE, 7, "")),
        ({"ending": Ending.SIGNAL.value, "value": 9}, (Ending.SIGNAL, 9, "")),
        (
            {"ending": Ending.SIGNAL.value, "value": signal.SIGRTMIN + 3},
            (Ending.SIGNAL, signal.SIGRTMIN + 3, ""),
        ),
        ({"ending": Ending.ERRNO.value, "value": 2, "text": "no\x1b[2J"}, (Ending.ERRNO, 0, "no\\x1b[2J")),
        ({"ending": Ending.LOST.value, "text": "power"}, (Ending.LOST, 0, "power")),
    ],
)
def test_an_end_survives_its_way_through_the_row(
    tmp_path: Path, ended: dict[str, Any], expected: Any
) -> None:
    logged(tmp_path, **ended)
    found = view.LoggedRun(tmp_path, "vm1", COMPRESS, 1).row()
    assert found is not None and view.ending(found) == expected


def test_a_run_is_read_as_it_comes_and_is_known_to_be_over_with_its_life(tmp_path: Path) -> None:
    run = view.LoggedRun(tmp_path, "vm1", COMPRESS, 1)
    assert (run.row(), run.read(Stream.STDOUT, 0, 100), run.set_aside()) == (None, b"", False)
    logged(tmp_path)
    assert run.read(Stream.STDOUT, 2, 100) == b"ne\n" and run.read(Stream.STDERR, 0, 100) == b""
    found = run.row()
    assert found is not None and found["state"] == "running" and not run.set_aside()
    logged(tmp_path, spool=b"t" * 16)
    assert run.set_aside() and run.read(Stream.STDOUT, 0, 100) == b"line\n"
    assert view.attempts(tmp_path, "vm1", COMPRESS) == [1]
    assert view.attempts(tmp_path, "vm1", b"-4/none") == []


def test_the_word_left_beside_the_socket(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd \xff\n name"))
    assert view.word_left(tmp_path / "control") is None
    view.leave_word(tmp_path / "control", odd)
    assert view.word_left(tmp_path / "control") == odd
    (tmp_path / "control.log-dir").write_bytes(b"/half of a na")
    assert view.word_left(tmp_path / "control") is None


ZERO = "2026-11-30T12:00:07.123456Z"


@pytest.mark.parametrize(
    ("zeros", "said"),
    [
        ([None, None], ""),
        ([ZERO, ZERO], "; time zero 2026-11-30 12:00:07 UTC"),
        ([ZERO, None], "; time zero is not the same for all"),
        ([ZERO, ZERO.replace("7", "8")], "; time zero is not the same for all"),
        ([], ""),
    ],
)
def test_when_the_experiment_starts_is_said_where_it_is_one(zeros: list[Any], said: str) -> None:
    blank = {"vm": "a", "state": "offline", "reason": "", "standstill": "", "disk": {}}
    counts = dict.fromkeys(view.COUNTS, 0)
    table = tables.mix([{**blank, "vmrs": counts, "time_zero": each} for each in zeros])
    assert table.below.endswith(f"{len(zeros)} offline{said}" if zeros else "0 VMs")


def test_one_long_name_moves_no_other_row() -> None:
    lines = arguments.table([["VMR", "STATE"], ["x" * 200, "exited"], ["-4/a", "waiting"]]).splitlines()
    assert lines[0].index("STATE") == lines[2].index("waiting") == len("-4/a") + 2
    assert lines[1] == "x" * 200 + "  exited"


def test_what_a_guest_says_is_safe_on_a_terminal(tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07[red]\nforged  exited"
    rows = view.vmrs(tmp_path, "vm1", [row(b"-1/\x1b[2J\n", evil, 0, evil), row(b"-1/\xff", "waiting")])
    text = tables.vmrs(rows, below="").text()
    assert all(each.isprintable() or each == "\n" for each in text)
    assert len(text.splitlines()) == 3


def test_a_guest_that_does_not_answer_is_said_within_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.host.scripted import Guest

    monkeypatch.setattr(collector, "_REPLY", 0.3)
    answers: list[str] = []
    sockets = Path(tempfile.mkdtemp(prefix="vmr-"))  # a socket's path has 107 bytes, pytest's are longer

    def ask() -> None:
        guest = Guest(sockets / "vm1").open()
        try:
            with control.Connection(sockets / "control", program="collector", hint="") as asked:
                asked.ask("rerun", vm="vm1", vmr="-4/compress.py")
        except Problem as problem:
            answers.append(str(problem))
        finally:
            guest.close()
            os.kill(os.getpid(), signal.SIGTERM)

    async def collect() -> None:
        source = collector.Source("vm1", sockets / "vm1", listen=True)
        await collector.Collector(tmp_path / "logs", [source], control_path=sockets / "control").run()

    thread = threading.Thread(target=ask)
    thread.start()
    asyncio.run(collect())
    thread.join(20)
    assert len(answers) == 1 and answers[0].startswith("cannot rerun on vm1: no answer within"), answers
