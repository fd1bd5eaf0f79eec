"""What the log store holds, in real files: after Acks, after crashes, after a full disk, from guests that lie."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Optional

import pytest

from tests.host import said
from tests.host.said import ERR, OTHER, OUT, RUN, SECOND, T
from vmr_agent.errors import Problem
from vmr_agent.host import life, logstore
from vmr_agent.host.journal import JOURNAL, MARK, Kind, pack_record, records
from vmr_agent.host.life import BadGuest, Diverged
from vmr_agent.host.logstore import LogStore, Syncer
from vmr_agent.runs import Ending, RunState
from vmr_agent.wire import messages

PATH = "-4/compress.py/1"


def ignore(_: str) -> None:
    pass


@contextmanager
def opened(log_dir: Path, vm: str = "vm1", *, greet: bool = True) -> Iterator[LogStore]:
    store = LogStore(log_dir, vm, log=ignore)
    try:
        if greet:
            store.life(said.hello(), T)
        yield store
    finally:
        store.close()


def crash(store: LogStore) -> None:
    """End as a killed process does: its descriptors close, and nothing else happens."""
    assert store._life is not None
    store._life._write_waiting()
    store._life.close()
    store._life = None
    store._release()


def result(log_dir: Path, path: str = PATH) -> dict[str, Any]:
    row = json.loads((log_dir / "vm1" / path / "result.json").read_bytes())
    assert isinstance(row, dict)
    return row


def kinds(log_dir: Path) -> str:
    data = (log_dir / "vm1" / JOURNAL).read_bytes()
    return "".join(chr(kind) for _, kind, _ in records(data))


# --- what is held, and what is said of it


def test_bytes_are_acknowledged_once_they_are_durable(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        assert store.run(said.run()) == messages.Ack(RUN, RunState.NONE, 0, 0, ((0, 0), (0, 0)))
        store.output(said.output(b"hello\n"))
        store.output(said.output(b"oops\n", 0, ERR))
        assert store.dirty() and store.unsynced_bytes() == 11
        assert store.run(said.run()).stdout == 0
        assert store.sync() == [messages.Ack(RUN, RunState.STARTED, 6, 5)]
        assert not store.dirty() and store.unsynced_bytes() == 0
        assert store.run(said.run()) == messages.Ack(
            RUN, RunState.STARTED, 6, 5, ((zlib.crc32(b"hello\n"), 6), (zlib.crc32(b"oops\n"), 5))
        )
    assert (tmp_path / "vm1" / PATH / "stdout").read_bytes() == b"hello\n"
    assert (tmp_path / "vm1" / PATH / "stderr").read_bytes() == b"oops\n"


@pytest.mark.parametrize("ending", [Ending.LOST, Ending.CODE])
def test_a_vm_that_lost_with_its_power_what_is_not_durable_here_yet_was_not_set_back(
    tmp_path: Path, ending: Ending
) -> None:
    """The sync of the log directory takes longer than the VM's boot: what it lost is here, and it can't know."""
    reason = "" if ending is Ending.LOST else "the VM went down before it was over"
    with opened(tmp_path) as store:
        store.run(said.run())
        store.output(said.output(b"it had this, and lost this"))
        assert not store.life(said.hello(boot="second boot", boottime=5 * said.SECOND), said.T)
        assert store.run(said.run()).stdout == 0
        store.output(said.output(b"it had this"))
        store.exit(said.exit(11, ending=ending.value))
        assert store.closed(said.closed(11, reason=reason)) is None
        assert store.sync() == [messages.Ack(RUN, RunState.CLOSED, 26, 0)]
        assert store.closed(said.closed(11, reason=reason)) == messages.Ack(RUN, RunState.CLOSED, 11, 0)
    row = result(tmp_path)
    assert (row["stdout_bytes"], row["gaps"], row["closed"]) == (26, [], True)
    assert (tmp_path / "vm1" / PATH / "stdout").read_bytes() == b"it had this, and lost this"


def test_tails_cover_the_last_64_kib(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(100_000)
    with opened(tmp_path) as store:
        store.run(said.run())
        for at in range(0, len(data), 30_000):
            store.output(said.output(data[at : at + 30_000], at))
        store.sync()
        assert store.run(said.run()).tails == ((zlib.crc32(data[-65_536:]), 65_536), (0, 0))


def test_the_journal_has_marks_behind_what_is_durable(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        store.output(said.output(b"a"))
        store.sync()
        store.output(said.output(b"b", 1))
        store.exit(said.exit(2))
        store.closed(said.closed(2))
        store.sync()
    assert kinds(tmp_path) == "LHROMOXCM"


def test_a_record_stays_within_one_second(tmp_path: Path) -> None:
    marks = (
        (3, T + SECOND - 2),
        (0, T + SECOND - 1),
        (3, T + SECOND),
        (2, T + SECOND + 5),
        (1, T + 3 * SECOND),
    )
    with opened(tmp_path) as store:
        store.run(said.run())
        store.output(said.output(b"abcdefghi", marks=marks))
    assert kinds(tmp_path).count("O") == 3


def test_doubles_change_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        store.output(said.output(b"abcdef"))
        store.output(said.output(b"abc"))
        store.output(said.output(b"defgh", 3, marks=((1, T), (3, T), (1, T))))
        store.exit(said.exit(8))
        store.exit(said.exit(8))
        store.closed(said.closed(8))
        assert store.sync() == [messages.Ack(RUN, RunState.CLOSED, 8, 0)]
        store.output(said.output(b"defgh", 3))
        store.exit(said.exit(8))
        store.closed(said.closed(8))
        assert store.sync() == []
    assert (tmp_path / "vm1" / PATH / "stdout").read_bytes() == b"abcdefgh"
    assert kinds(tmp_path) == "LHROOXCM"


def test_what_comes_again_is_acknowledged_again(tmp_path: Path) -> None:
    """A sync may end between a session's first Ack of a run and what the guest sends again in it."""
    with opened(tmp_path) as store:
        store.run(said.run())
        store.output(said.output(b"abcdef"))
        store.gap(said.gap(0, 10, ERR))
        ack = messages.Ack(RUN, RunState.STARTED, 6, 10)
        assert store.sync() == [ack]
        store.output(said.output(b"def", 3))
        assert store.sync() == [ack]
        store.gap(said.gap(4, 6, ERR))
        assert store.sync() == [ack]
        assert store.sync() == []


def test_a_finished_run_is_acknowledged_again(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        store.output(said.output(b"abc"))
        store.exit(said.exit(3))
        store.closed(said.closed(3))
        store.sync()
        again = messages.Ack(RUN, RunState.CLOSED, 3, 0, ((zlib.crc32(b"abc"), 3), (0, 0)))
        assert store.run(said.run()) == again
    with opened(tmp_path) as store:
        assert store.run(said.run()) == again
        assert not store.dirty() or store.sync() == []


def test_gaps_keep_the_offsets_behind_them(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        store.output(said.output(b"abc"))
        store.gap(said.gap(3, 1000))
        store.output(said.output(b"def", 1003))
        store.gap(said.gap(1006, 10))
        store.sync()
        tails = store.run(said.run()).tails
        assert tails == ((0, 0), (0, 0)), "zeros are no bytes of the guest's"
        store.exit(said.exit(1016))
        store.closed(said.closed(1016))
        assert store.sync() == [messages.Ack(RUN, RunState.CLOSED, 1016, 0)]
    row = result(tmp_path)
    assert (tmp_path / "vm1" / PATH / "stdout").read_bytes() == b"abc" + bytes(1000) + b"def" + bytes(10)
    assert not row["complete"] and row["stdout_bytes"] == 1016
    assert [(gap["stream"], gap["offset"], gap["length"]) for gap in row["gaps"]] == [
        ("stdout", 3, 1000),
        ("stdout", 1006, 10),
    ]
    assert row["missing_bytes"] == 1010


def test_a_gap_is_in_the_row_before_its_hole_is_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads along would take the hole for output."""
    seen = []
    truncate = os.ftruncate

    def look(fd: int, length: int) -> None:
        if length == 1003:
            seen.append(result(tmp_path)["gaps"])
        truncate(fd, length)

    with opened(tmp_path) as store:
        store.run(said.run())
        store.output(said.output(b"abc"))
        monkeypatch.setattr(os, "ftruncate", look)
        store.gap(said.gap(3, 1000, wall=said.T))
        store.sync()
    (gap,) = result(tmp_path)["gaps"]
    assert seen == [[gap]]
    assert gap == {
        "stream": "stdout",
        "offset": 3,
        "length": 1000,
        "reason": "the spool was full",
        "time": "2024-06-06T00:43:06.000000Z",
    }


def test_more_gaps_than_are_listed_are_counted_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = 100
    monkeypatch.setattr(life, "MAX_GAPS_LISTED", listed)
    with opened(tmp_path) as store:
        store.run(said.run())
        for number in range(listed + 5):
            store.gap(said.gap(10 * number, 9))
            store.output(said.output(b"x", 10 * number + 9))
        store.sync()
        store._sync_now(checkpoint=True)
    with opened(tmp_path) as store:
        end = 10 * (listed + 5)
        store.exit(said.exit(end))
        store.closed(said.closed(end))
        store.sync()
    row = result(tmp_path)
    assert (len(row["gaps"]), row["missing_bytes"], row["complete"]) == (
        listed,
        9 * (listed + 5),
        False,
    )


def test_unfinished_lines_are_those_to_show_early(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        store.output(said.output(b"whole\n"))
        assert store.unfinished_lines(RUN) == []
        store.output(said.output(b"more to come", 6, more=True))
        assert store.unfinished_lines(RUN) == []
        store.output(said.output(b" >", 18))
        assert store.unfinished_lines(RUN) == [OUT] and store.unfinished_lines(OTHER) == []
        store.sync()
        store.flush_line(RUN, OUT)
        assert store.unfinished_lines(RUN) == [] and store.dirty()
        store.sync()
        store.flush_line(RUN, OUT)
        assert not store.dirty()
        store.output(said.output(b"dots..", 20))
        store.sync()
    with opened(tmp_path) as store:
        assert store.unfinished_lines(RUN) == [OUT]
        store.exit(said.exit(26))
        assert store.unfinished_lines(RUN) == []
    assert kinds(tmp_path).count("F") == 1


# --- result.json


def test_a_result_has_every_key_from_the_start(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.life(said.hello(wall=T), T + 5 * SECOND)
        store.run(said.run(started=T + 123_456_789))
        row = result(tmp_path)
        assert row == {
            "vmr": "-4/compress.py",
            "start_time": "-4",
            "name": "compress.py",
            "attempt": 1,
            "trigger": "schedule",
            "state": "running",
            "pid": 1281,
            "started": "2024-06-06T00:43:11.123456Z",
            "ended": None,
            "duration_s": None,
            "exit_code": None,
            "signal": None,
            "error": None,
            "stdout_bytes": 0,
            "stderr_bytes": 0,
            "closed": False,
            "complete": False,
            "gaps": [],
            "missing_bytes": 0,
            "rusage": None,
        }
        store.output(said.output(b"abc"))
        store.exit(said.exit(3, value=7))
        assert result(tmp_path) == {
            **row,
            "state": "exited",
            "ended": "2024-06-06T00:43:13.000000Z",
            "duration_s": 2.074975,
            "exit_code": 7,
            "stdout_bytes": 3,
            "rusage": {"user_s": 0.5, "system_s": 0.25, "max_rss_bytes": 4096},
        }
        store.closed(said.closed(3))
        assert result(tmp_path)["complete"] is True


@pytest.mark.parametrize(
    ("ending", "row"),
    [
        (
            {"ending": Ending.SIGNAL.value, "value": 9},
            {"state": "killed", "signal": "SIGKILL", "exit_code": None},
        ),
        (
            {"ending": Ending.ERRNO.value, "value": 2, "text": "no interpreter"},
            {"state": "failed to start", "error": "no interpreter", "duration_s": None},
        ),
        (
            {"ending": Ending.LOST.value, "text": "power cut", "ended": 0},
            {"state": "lost", "error": "power cut", "ended": None, "duration_s": None},
        ),
    ],
)
def test_each_way_to_end_has_its_state(tmp_path: Path, ending: dict[str, Any], row: dict[str, Any]) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        store.exit(said.exit(**ending))
    assert row.items() <= result(tmp_path).items()


def test_a_capture_cut_short_is_not_complete(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        store.exit(said.exit())
        store.closed(said.closed(reason="its shim was killed"))
    assert result(tmp_path)["complete"] is False
    assert result(tmp_path)["error"] == "its shim was killed"


def test_rows_are_the_latest_attempts_in_the_order_of_the_schedule(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run(b"10.5/late", run=b"1" * 16))
        store.run(said.run(b"-4/b", run=b"2" * 16))
        store.run(said.run(b"-100000/a\xef\n", run=b"3" * 16))
        store.run(said.run(b"-4/b", run=b"4" * 16, attempt=10))
        store.run(said.run(b"-4/b", run=b"5" * 16, attempt=9))
        store.output(said.output(b"abc", run=b"4" * 16))
        rows = logstore.rows(tmp_path, "vm1")
        assert store.latest(b"-4/b") == b"4" * 16 and store.latest(b"-4/c") is None
    assert [(row["vmr"], row["attempt"]) for row in rows] == [
        ("-100000/a\\xef\\n", 1),
        ("-4/b", 10),
        ("10.5/late", 1),
    ]
    assert rows[1]["stdout_bytes"] == 3, "of a running one as well"
    assert logstore.rows(tmp_path, "vm2") == []


def test_what_somebody_left_among_the_runs_is_in_nobodys_way(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
    for name in (
        "notes.txt",
        "-4/notes.txt",
        "-4/compress.py/notes.txt",
        "-4/compress.py/²",
        "-4/compress.py/2",
    ):
        (tmp_path / "vm1" / name).touch()
    (tmp_path / "vm1" / "-5").symlink_to("gone")
    assert [row["attempt"] for row in logstore.rows(tmp_path, "vm1")] == [1]


def test_a_new_life_that_begins_while_rows_are_read_costs_only_rows(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
    program = "import os, sys\nwhile True: os.rename(*sys.argv[1:3]); os.rename(*sys.argv[2:0:-1])"
    names = (str(tmp_path / "vm1"), str(tmp_path / "vm1~1"))
    renames = subprocess.Popen([sys.executable, "-c", program, *names])
    try:
        deadline = time.monotonic() + 20
        while not (tmp_path / "vm1~1").exists():
            assert time.monotonic() < deadline
        counts = {len(logstore.rows(tmp_path, "vm1")) for _ in range(3_000)}
    finally:
        renames.kill()
        renames.wait()
    assert counts <= {0, 1}


# --- lives


def test_another_spool_begins_another_life(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        store.output(said.output(b"first\n"))
        assert store.life(said.hello(), T) is False
        assert store.life(said.hello(spool=b"2" * 16), T) is True
        assert store.run(said.run()).state == RunState.NONE
        store.output(said.output(b"second\n"))
    with opened(tmp_path, greet=False) as store:
        assert store.life(said.hello(spool=b"2" * 16, wall=T + SECOND), T) is False
        assert store.run(said.run()).stdout == 7
        assert store.life(said.hello(spool=b"3" * 16), T) is True
    texts = [(tmp_path / name / PATH / "stdout").read_bytes() for name in ("vm1~1", "vm1~2")]
    assert texts == [b"first\n", b"second\n"]
    assert not (tmp_path / "vm1" / "-4").exists()


def test_the_first_life_is_no_new_one(tmp_path: Path) -> None:
    with opened(tmp_path, greet=False) as store:
        assert store.last_hello is None
        assert store.life(said.hello(), T) is False


def test_that_a_vm_had_nothing_here_is_true_once(tmp_path: Path) -> None:
    with opened(tmp_path, greet=False) as store:
        store.begins_anew({"another"})
        assert store.life(said.hello(), T) is False
        assert store.life(said.hello(spool=b"2" * 16), T) is True
    with opened(tmp_path, greet=False) as store:
        store.begins_anew({"another", "vm1"})
        assert store.life(said.hello(spool=b"3" * 16), T) is True
    assert sorted(path.name for path in tmp_path.glob("vm1*")) == ["vm1", "vm1~1", "vm1~2"]


def test_what_came_there_since_is_put_aside(tmp_path: Path) -> None:
    with opened(tmp_path, greet=False) as store:
        store.begins_anew(set())
        (tmp_path / "vm1").mkdir()
        (tmp_path / "vm1" / "notes").write_text("mine")
        store.life(said.hello(), T)
    assert (tmp_path / "vm1~1" / "notes").read_text() == "mine"


def test_a_life_never_takes_a_number_again(tmp_path: Path) -> None:
    """Somebody may remove what is old, and the renderer's note must not take a new life for one it has shown."""
    with opened(tmp_path) as store:
        store.life(said.hello(spool=b"2" * 16), T)
        shutil.rmtree(tmp_path / "vm1~1")
        store.life(said.hello(spool=b"3" * 16), T)
        assert (tmp_path / "vm1~2").exists() and not (tmp_path / "vm1~1").exists()


def test_a_sync_that_failed_after_a_new_life_began_fails_the_store(tmp_path: Path) -> None:
    """The kernel tells of a failed write-back once: whoever heard of it must not keep it to himself."""
    with opened(tmp_path) as store:
        store.run(said.run())
        store.output(said.output(b"first"))
        sync = store.begin_sync()
        assert sync is not None
        store.life(said.hello(spool=b"2" * 16), T)
        sync.error = OSError(errno.EIO, "broken")
        with pytest.raises(OSError, match="broken"):
            store.finish_sync(sync)
        with pytest.raises(OSError, match="broken"):
            store.run(said.run())
        assert store.life(said.hello(spool=b"2" * 16), T) is False
        store.run(said.run())


def test_a_sync_in_flight_when_a_new_life_begins_marks_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        store.output(said.output(b"first"))
        sync = store.begin_sync()
        assert sync is not None and store.begin_sync() is None
        store.life(said.hello(spool=b"2" * 16), T)
        store.run(said.run())
        sync.sync()
        assert store.finish_sync(sync) == []
        assert store.sync() == [messages.Ack(RUN, RunState.STARTED, 0, 0)]


# --- a guest set back in time


def test_another_run_under_a_known_label_is_time_travel(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        with pytest.raises(Diverged):
            store.run(said.run(run=OTHER))


@pytest.mark.parametrize("finished", [False, True])
def test_a_known_run_under_another_label_is_time_travel(tmp_path: Path, finished: bool) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        if finished:
            store.exit(said.exit())
            store.closed(said.closed())
            store.sync()
        with pytest.raises(Diverged):
            store.run(said.run(attempt=2))


def test_other_bytes_than_before_are_time_travel(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        store.output(said.output(b"abcdef"))
        with pytest.raises(Diverged):
            store.output(said.output(b"xyz", 3))


def test_another_end_than_before_is_time_travel(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        store.exit(said.exit())
        with pytest.raises(Diverged):
            store.exit(said.exit(value=1))


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    "other", [{"started": T + 1}, {"ended": T + SECOND}, {"started": T + 1, "ended": None}]
)
def test_a_run_executed_at_another_time_is_time_travel(
    tmp_path: Path, finished: bool, other: dict[str, Optional[int]]
) -> None:
    """Even one that wrote nothing: its bytes can't tell."""
    says = {"ended": T + 2 * SECOND, **other}
    with opened(tmp_path) as store:
        store.run(said.run())
        store.exit(said.exit())
        if finished:
            store.closed(said.closed())
            store.sync()
        with pytest.raises(Diverged):
            store.run(said.run(**says))
    with opened(tmp_path) as store:
        store.run(said.run(ended=T + 2 * SECOND))
        with pytest.raises(Diverged):
            store.run(said.run(**says))


def test_a_clock_that_goes_back_within_a_boot_is_time_travel(tmp_path: Path) -> None:
    with opened(tmp_path):
        pass
    with opened(tmp_path, greet=False) as store:
        assert store.life(said.hello(boottime=1, boot="second boot"), T) is False
    with opened(tmp_path, greet=False) as store:
        with pytest.raises(Diverged):
            store.life(said.hello(boottime=0, boot="second boot"), T)
        # Its new life may fail for want of space, and after a reboot no clock tells any more.
        with pytest.raises(Diverged):
            store.life(said.hello(boottime=9, boot="third boot"), T)
        assert store.life(said.hello(boottime=9, boot="third boot", spool=b"2" * 16), T) is True


def test_what_the_journal_lost_of_another_future_is_cut_for_good(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        (tmp_path / "vm1" / PATH).mkdir(parents=True)
        (tmp_path / "vm1" / PATH / "stderr").write_bytes(b"of a run whose record no sync has seen")
        store.run(said.run())
        sync = store.begin_sync()
        assert sync is not None and f"{PATH}/stderr" in sync.files
        sync.sync()
        store.finish_sync(sync)
    assert (tmp_path / "vm1" / PATH / "stderr").read_bytes() == b""


def test_after_time_travel_nothing_is_believed_before_the_new_life(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        store.output(said.output(b"abc"))
        with pytest.raises(Diverged):
            store.run(said.run(run=OTHER))
        store.output(said.output(b"def", 3))
        store.exit(said.exit(6))
        with pytest.raises(Diverged):
            store.run(said.run())
        store.life(said.hello(spool=b"2" * 16), T)
        store.run(said.run(run=OTHER))
    assert (tmp_path / "vm1~1" / PATH / "stdout").read_bytes() == b"abc"


# --- guests that lie


@pytest.mark.parametrize(
    "lie",
    [
        lambda store: store.output(said.output(b"x", 1)),
        lambda store: store.output(said.output(b"x", run=OTHER)),
        lambda store: store.output(said.output(b"x", marks=())),
        lambda store: store.output(said.output(b"x", marks=((2, T),))),
        lambda store: store.output(messages.Output(RUN, 3, 0, False, ((1, T),), b"x")),
        lambda store: store.gap(said.gap(1, 1)),
        lambda store: store.gap(said.gap(0, 2**53 + 1)),
        lambda store: store.gap(said.gap(0, 2**53)),
        lambda store: store.gap(messages.Gap(RUN, 0, 0, 1, "")),
        lambda store: store.exit(said.exit(run=OTHER)),
        lambda store: store.exit(said.exit(ending="boredom")),
        lambda store: store.closed(said.closed()),
        lambda store: (store.exit(said.exit(5)), store.closed(said.closed(5))),
        lambda store: (
            store.exit(said.exit()),
            store.closed(said.closed()),
            store.output(said.output(b"x")),
        ),
        lambda store: store.run(said.run(b"../../etc", run=OTHER)),
        lambda store: store.run(said.run(b".journal/x", run=OTHER)),
        lambda store: store.run(said.run(b"-4/.", run=OTHER)),
        lambda store: store.run(said.run(b"-4", run=OTHER)),
        lambda store: store.run(said.run(b"-4/a/b", run=OTHER)),
        lambda store: store.run(said.run(run=OTHER, attempt=0)),
        lambda store: store.life(said.hello(spool=None), T),
    ],
)
def test_what_no_guest_says_is_refused(tmp_path: Path, lie: Callable[[LogStore], object]) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        with pytest.raises(BadGuest):
            lie(store)
        # And what it said before is kept.
        assert store.run(said.run()).run == RUN


def test_a_guest_that_says_nothing_first_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path, greet=False) as store, pytest.raises(BadGuest):
        store.run(said.run())


@pytest.mark.parametrize("name", [b"a b", b"\xef\n", b"n" * 255, b"%2E", b"~1", b"result.json"])
def test_odd_names_stay_inside(tmp_path: Path, name: bytes) -> None:
    with opened(tmp_path) as store:
        store.run(said.run(b"-4/" + name))
        store.output(said.output(b"here"))
    assert [path.read_bytes() for path in tmp_path.glob("vm1/-4/*/1/stdout")] == [b"here"]


@pytest.mark.parametrize("place", [f"{PATH}/stdout", f"{PATH}/result.json.tmp", "-4", "-4/compress.py"])
def test_a_planted_link_leads_nowhere(tmp_path: Path, place: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    victim = outside / "victim"
    victim.write_bytes(b"precious")
    logs = tmp_path / "logs"
    with opened(logs) as store:
        link = logs / "vm1" / place
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(outside if place.startswith("-4") and place.count("/") < 2 else victim)
        with pytest.raises(OSError):
            store.run(said.run())
    assert victim.read_bytes() == b"precious" and list(outside.iterdir()) == [victim]


# --- starting again


@pytest.mark.parametrize("tidy", [False, True])
def test_what_was_held_is_held_after_a_start(tmp_path: Path, tidy: bool) -> None:
    store = LogStore(tmp_path, "vm1", log=ignore)
    store.life(said.hello(), T)
    store.run(said.run())
    store.output(said.output(b"abc\nde"))
    store.sync()
    store.gap(said.gap(6, 10))
    store.output(said.output(b"xyz", 16))
    store.exit(said.exit(19))
    store.run(said.run(b"5/other", run=OTHER))
    store.close() if tidy else crash(store)
    with opened(tmp_path) as store:
        assert store.last_hello == said.hello()
        ack = store.run(said.run())
        assert (ack.state, ack.stdout) == (RunState.EXITED, 19), "what stood behind the last mark was synced"
        assert store.run(said.run(b"5/other", run=OTHER)).state == RunState.STARTED
        assert store.run(said.run()).tails == ((zlib.crc32(b"xyz"), 3), (0, 0))
    assert result(tmp_path)["state"] == "exited" and len(result(tmp_path)["gaps"]) == 1


def test_the_journal_is_cut_where_the_raw_bytes_are_not_those_it_says(tmp_path: Path) -> None:
    """As a power cut leaves it: any of what was not synced may be missing."""
    store = LogStore(tmp_path, "vm1", log=ignore)
    store.life(said.hello(), T)
    store.run(said.run())
    store.output(said.output(b"durable"))
    store.sync()
    store.output(said.output(b"kept", 7))
    store.output(said.output(b"torn", 11))
    store.output(said.output(b"whole, but behind it", 0, ERR))
    store.exit(said.exit(15, 20))
    crash(store)
    raw = tmp_path / "vm1" / PATH / "stdout"
    raw.write_bytes(b"durablekept\0\0rn")
    with opened(tmp_path) as store:
        ack = store.run(said.run())
        assert (ack.state, ack.stdout, ack.stderr) == (RunState.STARTED, 11, 0)
        assert raw.read_bytes() == b"durablekept"
        assert (tmp_path / "vm1" / PATH / "stderr").read_bytes() == b""
        assert result(tmp_path)["state"] == "running"
        store.output(said.output(b"again", 11))
    assert raw.read_bytes() == b"durablekeptagain"


def test_a_gap_is_in_the_raw_file_again_after_a_power_cut(tmp_path: Path) -> None:
    """The journal's record may have come to the disk before the file's new size."""
    store = LogStore(tmp_path, "vm1", log=ignore)
    store.life(said.hello(), T)
    store.run(said.run())
    store.output(said.output(b"durable"))
    store.sync()
    store.gap(said.gap(7, 100))
    crash(store)
    raw = tmp_path / "vm1" / PATH / "stdout"
    raw.write_bytes(b"durable")
    with opened(tmp_path) as store:
        assert store.run(said.run()).stdout == 107
        assert raw.read_bytes() == b"durable" + bytes(100)


def test_what_the_journal_lost_has_no_row(tmp_path: Path) -> None:
    """Its guest, set back in time, may never say again that it was."""
    with opened(tmp_path) as store:
        store.run(said.run())
        store.sync()
        store.run(said.run(b"5/other", run=OTHER))
        sync = store.begin_sync()
        assert sync is not None
        sync.sync()
        sync.error = OSError(errno.EIO, "failed")
        with pytest.raises(OSError):
            store.finish_sync(sync)
        store.life(said.hello(), T)
        assert [row["vmr"] for row in logstore.rows(tmp_path, "vm1")] == ["-4/compress.py"]
        store.run(said.run(b"5/other", run=OTHER))
        assert [row["vmr"] for row in logstore.rows(tmp_path, "vm1")] == ["-4/compress.py", "5/other"]


@pytest.mark.parametrize("seed", range(30))
def test_a_journal_cut_anywhere_behind_its_last_mark_is_taken_up(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    store = LogStore(tmp_path, "vm1", log=ignore)
    store.life(said.hello(), T)
    store.run(said.run())
    text, acked = b"", 0
    for _ in range(chance.randrange(1, 30)):
        piece = chance.randbytes(chance.randrange(1, 500))
        store.output(said.output(piece, len(text)))
        text += piece
        if chance.random() < 0.3:
            (ack,) = store.sync()
            acked = ack.stdout
    crash(store)
    journal = tmp_path / "vm1" / JOURNAL
    data = journal.read_bytes()
    marks = [behind for behind, kind, _ in records(data) if kind == Kind.MARK]
    cut = chance.randrange(marks[-1] if marks else 200, len(data) + 1)
    journal.write_bytes(data[:cut] + chance.randbytes(chance.choice((0, 0, 5, 100))))
    with opened(tmp_path) as store:
        ack = store.run(said.run())
        assert ack.stdout >= acked
        store.output(said.output(text[ack.stdout :], ack.stdout))
        store.sync()
        assert store.run(said.run()).stdout == len(text)
    assert (tmp_path / "vm1" / PATH / "stdout").read_bytes() == text


def test_a_long_journal_is_not_read_from_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life, "CHECKPOINT_RECORDS", 10)
    store = LogStore(tmp_path, "vm1", log=ignore)
    store.life(said.hello(), T)
    store.run(said.run(b"5/done", run=OTHER))
    store.exit(said.exit(run=OTHER))
    store.closed(said.closed(run=OTHER))
    store.run(said.run())
    for at in range(25):
        store.output(said.output(b"x", at))
        store.sync()
    crash(store)
    journal = tmp_path / "vm1" / JOURNAL
    data = bytearray(journal.read_bytes())
    second = [behind for behind, _, _ in records(bytes(data))][2]
    data[second + 20] ^= 1  # nobody looks there any more
    journal.write_bytes(data)
    with opened(tmp_path) as store:
        assert store.run(said.run()).stdout == 25
        assert store.run(said.run(b"5/done", run=OTHER)).state == RunState.CLOSED


@pytest.mark.parametrize("damage", [b"", b"{}", b"\0" * 500])
def test_a_damaged_checkpoint_only_costs_time(tmp_path: Path, damage: bytes) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        store.output(said.output(b"abc"))
    checkpoint = tmp_path / "vm1" / ".checkpoint"
    assert checkpoint.exists()
    checkpoint.write_bytes(damage)
    with opened(tmp_path) as store:
        assert store.run(said.run()).stdout == 3


def test_an_earlier_versions_checkpoint_only_costs_time(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        finish(store, 1)
    state = {"life": 1, "journal": 200, "hello": None, "skew": 0, "runs": [], "over": []}
    (tmp_path / "vm1" / ".checkpoint").write_bytes(pack_record(0, json.dumps(state).encode()))
    with opened(tmp_path) as store:
        assert store.run(said.run(b"-4/a.sh", run=b"\1" * 16)).state == RunState.CLOSED


def finish(store: LogStore, attempt: int) -> None:
    """A whole run, from its start to its last Ack."""
    run = bytes((attempt,)) * 16
    store.run(said.run(b"-4/a.sh", run=run, attempt=attempt))
    store.output(said.output(b"abc")._replace(run=run))
    store.exit(said.exit(3)._replace(run=run))
    store.closed(said.closed(3)._replace(run=run))
    assert store.sync()[-1] == messages.Ack(run, RunState.CLOSED, 3, 0)


@pytest.mark.parametrize("every", [1, 7, 4_096])
def test_a_start_knows_all_runs_that_are_over_and_touches_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """However often a checkpoint was written, the collector was killed and what is over was tidied up."""
    monkeypatch.setattr(life, "CHECKPOINT_RECORDS", every)
    count = 12
    inodes = {}
    for attempt in range(1, count + 1):
        store = LogStore(tmp_path, "vm1", log=ignore)
        store.life(said.hello(), T)
        finish(store, attempt)
        crash(store)
        row = tmp_path / "vm1/-4/a.sh" / str(attempt) / "result.json"
        inodes[row] = row.stat().st_ino
    assert (tmp_path / "vm1/.checkpoint").exists() == (every < 100), "what others left to replay counts, too"
    shutil.rmtree(tmp_path / "vm1/-4/a.sh/1")
    store = LogStore(tmp_path, "vm1", log=ignore)
    assert store._life is not None and len(store._life._finished) == count and not store._life._runs
    assert [row for row in inodes if row.exists() and row.stat().st_ino == inodes[row]] == list(inodes)[1:]
    assert store.latest(b"-4/a.sh") == bytes((count,)) * 16
    tails = ((zlib.crc32(b"abc"), 3), (0, 0))
    for attempt in range(1, count + 1):
        run = bytes((attempt,)) * 16
        ack = store.run(said.run(b"-4/a.sh", run=run, attempt=attempt))
        gone = attempt == 1
        assert ack == messages.Ack(
            run, RunState.CLOSED, 0 if gone else 3, 0, ((0, 0), (0, 0)) if gone else tails
        )
        store.output(said.output(b"abc")._replace(run=run))
        assert store.closed(said.closed(3)._replace(run=run)) == messages.Ack(run, RunState.CLOSED, 3, 0)
        for other in (
            said.run(b"-4/a.sh", run=bytes(16), attempt=attempt),
            said.run(b"-4/a.sh", run=run, attempt=count + 1),
            said.run(b"-4/b.sh", run=run, attempt=attempt),
            said.run(b"-4/a.sh", run=run, attempt=attempt, started=said.T + 1),
        ):
            with pytest.raises(Diverged):
                store._life.run(other)
    with pytest.raises(BadGuest):
        store._life.output(said.output(b"abc")._replace(run=bytes(16)))
    store.close()


def test_a_killed_collector_keeps_all_it_acknowledged(tmp_path: Path) -> None:
    """A real process, killed while it writes; what it acknowledged is told over its stdout."""
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.host import said\n"
        "from vmr_agent.host.logstore import LogStore\n"
        "store = LogStore(Path(sys.argv[1]), 'vm1', log=print)\n"
        "store.life(said.hello(), said.T)\n"
        "at = store.run(said.run()).stdout\n"
        "while True:\n"
        "    for _ in range(7):\n"
        "        store.output(said.output(b'%09d\\n' % at, at))\n"
        "        at += 10\n"
        "    for ack in store.sync():\n"
        "        print(ack.stdout, flush=True)\n"
    )
    acked = 0
    chance = random.Random(3)
    for _ in range(4):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(
            [sys.executable, "-c", script, os.fspath(tmp_path)],
            stdout=subprocess.PIPE,
            env=environment,
            cwd=Path(__file__).parent.parent.parent,
        )
        assert process.stdout is not None
        with process.stdout:
            for _ in range(chance.randrange(3, 40)):
                acked = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().split(b"\n")
            acked = max([acked, *(int(line) for line in rest[:-1] if line)])
        process.wait(10)
        with opened(tmp_path) as store:
            ack = store.run(said.run())
            store.sync()
            assert ack.stdout >= acked
    text = (tmp_path / "vm1" / PATH / "stdout").read_bytes()
    assert text == b"".join(b"%09d\n" % at for at in range(0, len(text), 10))


# --- disks that fail


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """A full disk that needs no disk: writes beyond ``size`` fail, in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_a_session_and_no_byte(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        store.output(said.output(b"a" * 3000))
        store.sync()
        store.output(said.output(b"b" * 500, 3000))
        with files_no_larger_than(4000), pytest.raises(OSError):
            store.output(said.output(b"c" * 1000, 3500))
        with pytest.raises(OSError):
            store.output(said.output(b"c" * 1000, 3500))
        assert not store.dirty() and store.begin_sync() is None
        store.life(said.hello(), T)
        assert store.run(said.run()).stdout == 3000
        store.output(said.output(b"b" * 500 + b"c" * 1000, 3000))
        assert store.sync() == [messages.Ack(RUN, RunState.STARTED, 4500, 0)]
    assert (tmp_path / "vm1" / PATH / "stdout").read_bytes() == b"a" * 3000 + b"b" * 500 + b"c" * 1000


def test_a_journal_that_cannot_grow_is_no_ack(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        store.sync()
        size = (tmp_path / "vm1" / JOURNAL).stat().st_size
        for at in range(50):
            store.output(said.output(b"x", at))
        with files_no_larger_than(size + 30), pytest.raises(OSError):
            store.sync()
        store.life(said.hello(), T)
        assert store.run(said.run()).stdout == 0
        store.output(said.output(b"x" * 50))
        assert store.sync()[0].stdout == 50
    with opened(tmp_path) as store:
        assert store.run(said.run()).stdout == 50


def test_a_failed_sync_is_no_ack_and_is_not_trusted_later(tmp_path: Path) -> None:
    """The kernel reports a lost write once, then calls the pages clean: only the guest has those bytes."""
    with opened(tmp_path) as store:
        store.run(said.run())
        store.output(said.output(b"durable"))
        store.sync()
        store.output(said.output(b"lost", 7))
        sync = store.begin_sync()
        assert sync is not None
        raw = tmp_path / "vm1" / PATH / "stdout"
        raw.rename(raw.with_name("elsewhere"))  # the thread can't open what it is to sync
        sync.sync()
        raw.with_name("elsewhere").rename(raw)
        with pytest.raises(OSError):
            store.finish_sync(sync)
        store.life(said.hello(), T)
        assert raw.read_bytes() == b"durable"
        assert store.run(said.run()).stdout == 7
        store.output(said.output(b"lost", 7))
        assert store.sync()[0].stdout == 11


def test_an_end_takes_over_what_a_sync_in_flight_was_to_do(tmp_path: Path) -> None:
    """A collector that is told to end has its renderer show all that came, then."""
    with opened(tmp_path) as store:
        store.run(said.run())
        store.output(said.output(b"first"))
        sync = store.begin_sync()
        assert sync is not None
        store.run(said.run(b"5/other", run=OTHER))
        store.output(said.output(b"more", run=OTHER))
        acks = {ack.run: ack.stdout for ack in store.sync()}
        assert acks == {RUN: 5, OTHER: 4}
        *_, (_, kind, mark) = records((tmp_path / "vm1" / JOURNAL).read_bytes())
        assert kind == Kind.MARK and not store.dirty()
        sync.sync()
        assert store.finish_sync(sync) == [] and store.sync() == []
        *_, (end, kind, again) = records((tmp_path / "vm1" / JOURNAL).read_bytes())
        assert again == mark and MARK.unpack(mark)[0] == end - len(pack_record(Kind.MARK, mark))


@pytest.mark.parametrize("another_life", [False, True])
def test_a_sync_that_failed_in_flight_is_not_done_again(tmp_path: Path, another_life: bool) -> None:
    """When a collector is told to end, or a guest begins anew, before its thread's error has been heard of."""
    with opened(tmp_path) as store:
        store.run(said.run())
        store.sync()
        store.output(said.output(b"lost"))
        sync = store.begin_sync()
        assert sync is not None
        before = kinds(tmp_path)
        raw = tmp_path / "vm1" / PATH / "stdout"
        raw.rename(raw.with_name("elsewhere"))
        sync.sync()
        raw.with_name("elsewhere").rename(raw)
        if another_life:
            with pytest.raises(OSError):
                store.life(said.hello(spool=b"2" * 16), T)
    assert kinds(tmp_path) == before and before.count("M") == 1


def test_an_unusable_log_directory_is_a_problem_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Problem, match=r"^cannot write to "):
        LogStore(tmp_path / "file" / "logs", "vm1", log=ignore)


@pytest.mark.parametrize("name", ["", ".vm", "vm.log", "vm.json"])
def test_a_vm_name_that_would_clash_is_a_problem(tmp_path: Path, name: str) -> None:
    with pytest.raises(Problem, match=r"^cannot "):
        LogStore(tmp_path, name, log=ignore)


def test_a_second_collector_is_told_who_is_there(tmp_path: Path) -> None:
    with opened(tmp_path):
        with pytest.raises(Problem, match=str(os.getpid())):
            LogStore(tmp_path, "vm1", log=ignore)
        with opened(tmp_path, "vm2"):
            pass
    with opened(tmp_path):
        pass


# --- syncing beside the loop


def test_the_loop_goes_on_while_a_thread_syncs(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        at = 0
        acked = 0
        for _ in range(30):
            sync = store.begin_sync()
            thread = None
            if sync is not None:
                thread = threading.Thread(target=sync.sync)
                thread.start()
            covered = at
            for number in range(40):  # more files than are kept open, so descriptors come and go meanwhile
                run = bytes((number,)) * 16
                if at == 0:
                    store.run(said.run(b"5/r%d" % number, run=run))
                store.output(said.output(b"x", at, run=run))
            at += 1
            if sync is not None and thread is not None:
                thread.join(10)
                assert not thread.is_alive()
                acks = {ack.run: ack for ack in store.finish_sync(sync)}
                if bytes(16) in acks:
                    acked = acks[bytes(16)].stdout
                    assert acked == covered
        assert acked
    assert logstore.rows(tmp_path, "vm1")[-1]["stdout_bytes"] == at


@pytest.mark.parametrize("vms", [1, 12])
def test_many_vms_sync_in_one_go(tmp_path: Path, vms: int) -> None:
    stores = [LogStore(tmp_path, f"vm{number}", log=ignore) for number in range(vms)]
    for store in stores:
        store.life(said.hello(), T)
        store.run(said.run())
        store.output(said.output(b"abc"))
    syncs = [sync for sync in (store.begin_sync() for store in stores) if sync is not None]
    Syncer().sync(syncs)
    for store, sync in zip(stores, syncs):
        assert store.finish_sync(sync)[0].stdout == 3
        store.close()
