"""The state directory: what is found again after whatever happened to it. Files on a real disk."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import pytest

from tests.guest.rig import VMR
from vmr_agent.errors import Problem
from vmr_agent.guest import spool as spool_module
from vmr_agent.guest.spool import KEPT_TAIL, RECORD, History, Lengths, Run, Spool, TimeZero
from vmr_agent.runs import Ending, RunInfo, Stream, Trigger

MIB = 1 << 20


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def spool(state: Path) -> Iterator[Spool]:
    made = Spool(state)
    yield made
    made.close()


def reopen(spool: Spool, *, limit: Optional[int] = None) -> Spool:
    """The next daemon's spool. The first is done with; the fixture may close it once more."""
    spool.close()
    return Spool(spool.path, limit=limit)


def create(spool: Spool, vmr: bytes = VMR, *, now_ns: int = 5) -> Run:
    return spool.create(vmr, Trigger.SCHEDULE, boot_id="boot", now_ns=now_ns)


def begin(run: Run) -> None:
    process = {"pid": 1 << 22, "ticks": 1, "boot_id": "boot", "wall_ns": 10, "boottime_ns": 20}
    info = json.loads((run.path / "run.json").read_text())
    (run.path / "started").write_text(json.dumps({"run": info, "process": process}) + "\n")
    (run.path / "lock").touch()


def write(run: Run, stream: Stream, data: bytes, *, wall_ns: Optional[int] = None) -> None:
    """What a shim does on a read; without a time as if power failed before the index was written."""
    offset = run.path.joinpath(stream.filename).stat().st_size if (run.path / stream.filename).exists() else 0
    with (run.path / stream.filename).open("ab") as file:
        file.write(data)
    if wall_ns is not None:
        with (run.path / "index").open("ab") as file:
            file.write(RECORD.pack(offset, wall_ns, len(data), stream))


def finish(run: Run) -> None:
    begin(run)
    run.write_lost("test", stdout=run.lengths().stdout, stderr=run.lengths().stderr)


# -- the directory itself --


def test_it_is_private(spool: Spool) -> None:
    run = create(spool)
    assert spool.path.stat().st_mode & 0o777 == 0o700
    assert (run.path / "run.json").stat().st_mode & 0o777 == 0o600


def test_one_daemon_at_a_time(spool: Spool) -> None:
    with pytest.raises(Problem, match="another vmr-agent has it"):
        Spool(spool.path)


def test_a_dead_daemons_lock_is_free_even_if_its_children_live(state: Path) -> None:
    agent = Path(__file__).resolve().parents[2] / "agent"
    code = """
import subprocess, sys, pathlib
from vmr_agent.guest.spool import Spool
spool = Spool(pathlib.Path(sys.argv[1]))
child = subprocess.Popen(["sleep", "600"], close_fds=False)
print(child.pid, flush=True)
"""
    daemon = subprocess.Popen(
        [sys.executable, "-c", code, state],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.fspath(agent)},
    )
    assert daemon.stdout is not None
    child = int(daemon.stdout.readline())
    daemon.wait()
    daemon.stdout.close()
    try:
        Spool(state).close()
    finally:
        os.kill(child, 9)


@pytest.mark.parametrize("where", ["file/state", "file"])
def test_a_directory_that_cannot_be_used_is_a_problem(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Problem, match="cannot use"):
        Spool(tmp_path / where)


def test_a_read_only_file_system_is_a_problem(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounts a file system: needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path], check=True)
    try:
        with pytest.raises(Problem, match=r"cannot use .*Read-only"):
            Spool(tmp_path / "state")
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


# -- identity and facts --


def test_the_id_is_random_and_outlives_the_daemon(spool: Spool, tmp_path: Path) -> None:
    first = spool.id
    assert len(first) == 16
    assert reopen(spool).id == first
    assert Spool(tmp_path / "other").id != first


def test_a_torn_id_is_none(spool: Spool) -> None:
    first = spool.id
    (spool.path / "spool.json").write_bytes(b'{"id": "00')
    again = reopen(spool)
    assert len(again.id) == 16 and again.id != first


def test_time_zero_is_set_once(spool: Spool) -> None:
    assert spool.zero() is None
    zero = TimeZero("boot", 1, 2, "host")
    assert spool.set_zero(zero) == zero
    assert spool.set_zero(TimeZero("boot", 9, 9, "guest")) == zero
    assert reopen(spool).zero() == zero


def test_configured_stays(spool: Spool) -> None:
    assert not spool.configured()
    spool.set_configured()
    spool.set_configured()
    assert reopen(spool).configured()


def test_a_new_life_has_another_id_and_sends_every_run_again(spool: Spool) -> None:
    runs = [create(spool), create(spool), create(spool, b"10.5/b")]
    for run in runs:
        finish(run)
    spool.release(runs[0])
    spool.release(runs[2])
    first = spool.id
    spool.new_life()
    assert spool.id != first
    assert {run.info.run for run in spool.open_runs()} == {run.info.run for run in runs}
    again = reopen(spool)
    assert again.id == spool.id
    assert {run.info.run for run in again.open_runs()} == {run.info.run for run in runs}


def test_forget_leaves_it_as_before_the_first_start(spool: Spool) -> None:
    first = spool.id
    finish(create(spool))
    spool.set_configured()
    spool.set_zero(TimeZero("boot", 1, 2, "host"))
    spool.mark_gone(VMR, 1)
    spool.forget()
    assert not (spool.path / "spool.json").exists(), "images baked now must not share an id"
    assert spool.latest(VMR) is None
    assert (spool.open_runs(), spool.zero(), spool.configured(), spool.gone(VMR)) == ([], None, False, False)
    assert create(spool).info.attempt == 1
    assert spool.id != first


# -- runs --


def test_what_is_known_of_a_run_is_read_back_as_it_was(spool: Spool) -> None:
    vmr = b"-4/\xff\n%../caf\xc3\xa9"
    run = spool.create(
        vmr,
        Trigger.RERUN,
        boot_id="boot",
        now_ns=7,
        request=b"\0\1",
        script=(1, 2, 3),
        holds=True,
        number=2,
    )
    assert run.info == RunInfo(run.info.run, vmr, 1, Trigger.RERUN, "boot", 7, b"\0\1", (1, 2, 3), True, 2)
    again = reopen(spool).latest(vmr)
    assert again is not None and again.info == run.info
    assert spool.path in run.path.resolve().parents


def test_attempts_count_on_after_a_restart(spool: Spool) -> None:
    finish(create(spool))
    finish(create(spool))
    again = reopen(spool)
    latest = again.latest(VMR)
    assert latest is not None and latest.info.attempt == 2
    assert create(again).info.attempt == 3
    assert [run.info.attempt for run in again.runs_of(VMR)] == [1, 2, 3]
    assert again.runs_of(b"-4/never") == []
    assert again.latest(b"-4/never") is None


def test_the_reader_sees_runs_beside_the_daemon(spool: Spool) -> None:
    run = create(spool)
    write(run, Stream.STDOUT, b"hello")
    reader = History(spool.path)
    latest = reader.latest(VMR)
    assert latest is not None and latest.read(Stream.STDOUT, 1, 3) == b"ell"
    create(spool)
    assert [run.info.attempt for run in reader.runs_of(VMR)] == [1, 2]
    seen = reader.latest(VMR)
    assert seen is not None and seen.info.attempt == 2


def test_ten_thousand_attempts_cost_the_latest_nothing(spool: Spool) -> None:
    template = create(spool)
    finish(template)
    spool.release(template)
    row = json.loads((template.path / "run.json").read_text())
    for attempt in range(2, 10_001):
        path = template.path.parent / str(attempt)
        path.mkdir()
        (path / "run.json").write_text(json.dumps({**row, "attempt": attempt, "run": f"{attempt:032x}"}))
    again = reopen(spool)
    latest = again.latest(VMR)
    assert latest is not None and latest.info.attempt == 10_000
    # Asked again it looks at nothing on disk at all.
    moved = template.path.parent.rename(template.path.parent.with_name("moved"))
    assert again.latest(VMR) is latest
    moved.rename(template.path.parent)
    assert create(again).info.attempt == 10_001


@pytest.mark.parametrize("content", [None, b"", b"\0" * 300, b'{"run": "00'])
def test_a_half_made_run_never_started_and_is_dropped(spool: Spool, content: Optional[bytes]) -> None:
    """Power failed before the shim's sync: link and directory are there, run.json absent or torn."""
    finish(create(spool))
    run = create(spool)
    if content is None:
        (run.path / "run.json").unlink()
    else:
        (run.path / "run.json").write_bytes(content)
    again = reopen(spool)
    assert [found.info.attempt for found in again.open_runs()] == [1]
    assert not run.path.exists()
    assert create(again).info.attempt == 2


def test_a_link_to_nothing_is_dropped(spool: Spool) -> None:
    (spool.path / "open" / ("ab" * 16)).symlink_to("../runs/-4/a.sh/1")
    again = reopen(spool)
    assert again.open_runs() == []
    assert list((spool.path / "open").iterdir()) == []


def test_an_unfinished_run_whose_link_was_lost_gets_it_back(spool: Spool) -> None:
    run = create(spool)
    (spool.path / "open" / run.info.run.hex()).unlink()
    again = reopen(spool)
    assert again.open_runs() == []
    assert again.latest(VMR) is not None
    assert [found.info.run for found in again.open_runs()] == [run.info.run]
    assert [found.info.run for found in reopen(again).open_runs()] == [run.info.run]


def test_what_the_host_has_whole_is_not_asked_again(spool: Spool) -> None:
    run = create(spool)
    finish(run)
    spool.release(run)
    spool.release(run)
    assert spool.open_runs() == []
    again = reopen(spool)
    latest = again.latest(VMR)
    assert latest is not None and latest.result() is not None
    assert again.open_runs() == []


@pytest.mark.parametrize("content", [b"", b"\0" * 400, b'{"ending": "code", "value": 0', b"[]", b"{}"])
def test_a_torn_exit_record_is_no_record(spool: Spool, content: bytes) -> None:
    run = create(spool)
    begin(run)
    (run.path / "exit.json").write_bytes(content)
    assert (run.result(), run.closed()) == (None, None)
    lost = run.write_lost("why", stdout=1, stderr=2, asks_reboot=True)
    assert run.result() == lost
    assert (lost.ending, lost.text, lost.boot_id, lost.asks_reboot) == (Ending.LOST, "why", "boot", True)
    assert run.closed() == (1, 2)


def test_seen_gone_counts_until_the_next_attempt(spool: Spool) -> None:
    finish(create(spool))
    assert not spool.gone(VMR)
    spool.mark_gone(VMR, 1)
    assert spool.gone(VMR)
    again = reopen(spool)
    assert again.gone(VMR)
    finish(create(again))
    assert not again.gone(VMR)
    again.mark_gone(b"-4/never ran", 0)
    assert not again.gone(b"-4/never ran")


def test_a_run_remembers_what_was_done_to_it(spool: Spool) -> None:
    run = create(spool)
    run.remember("kill ab")
    run.remember("kill\ncd")
    again = reopen(spool).latest(VMR)
    assert again is not None
    assert again.remembered("kill ab") and again.remembered("kill\ncd")
    assert not again.remembered("kill") and not again.remembered("cd")


# -- bytes and times --


def test_marks_give_each_read_its_time(spool: Spool) -> None:
    run = create(spool)
    write(run, Stream.STDOUT, b"aaaa", wall_ns=100)
    write(run, Stream.STDERR, b"ee", wall_ns=150)
    write(run, Stream.STDOUT, b"bb", wall_ns=200)
    write(run, Stream.STDOUT, b"cccccc", wall_ns=300)
    assert run.marks(Stream.STDOUT, 0, 12) == [(4, 100), (2, 200), (6, 300)]
    assert run.marks(Stream.STDERR, 0, 2) == [(2, 150)]
    assert run.marks(Stream.STDOUT, 3, 4) == [(1, 100), (2, 200), (1, 300)]
    assert run.marks(Stream.STDOUT, 0, 1) == [(1, 100)]  # back again: after a new session
    assert run.marks(Stream.STDOUT, 12, 0) == []


def test_marks_see_a_record_that_grew_since(spool: Spool) -> None:
    run = create(spool)
    write(run, Stream.STDOUT, b"aaaa", wall_ns=100)
    assert run.marks(Stream.STDOUT, 0, 4) == [(4, 100)]
    write(run, Stream.STDOUT, b"bb")
    (run.path / "index").write_bytes(RECORD.pack(0, 100, 6, Stream.STDOUT))
    assert run.marks(Stream.STDOUT, 4, 2) == [(2, 100)]


def test_bytes_the_index_does_not_know_have_the_files_time(spool: Spool) -> None:
    run = create(spool)
    write(run, Stream.STDOUT, b"aaaa", wall_ns=100)
    write(run, Stream.STDOUT, b"bb")
    os.utime(run.path / "stdout", ns=(7, 7))
    assert run.marks(Stream.STDOUT, 0, 6) == [(4, 100), (2, 7)]
    (run.path / "index").unlink()
    assert run.marks(Stream.STDOUT, 1, 5) == [(5, 7)]
    (run.path / "index").write_bytes(b"\0" * 24 + RECORD.pack(2, 100, 99, Stream.STDOUT) + b"torn")
    assert run.marks(Stream.STDOUT, 0, 6) == [(2, 7), (4, 100)]


@pytest.mark.parametrize("stretch", [2, 400])
def test_marks_in_any_order_agree_with_the_whole(spool: Spool, stretch: int) -> None:
    """However it is cut, a range's marks are the whole's: the cursor is only a shortcut."""
    chance = random.Random(3)
    run = create(spool)
    times: dict[Stream, list[int]] = {Stream.STDOUT: [], Stream.STDERR: []}
    stream = Stream.STDOUT
    for wall_ns in range(1, 2000):
        length = chance.randrange(1, 9)
        if chance.randrange(stretch) == 0:
            stream = Stream.STDERR if stream is Stream.STDOUT else Stream.STDOUT
        write(run, stream, b"x" * length, wall_ns=wall_ns)
        times[stream] += [wall_ns] * length
    for _ in range(500):
        if chance.random() < 0.3:
            run.close_fds()  # forgets the cursor too: found by bisection
        stream = chance.choice(list(Stream))
        offset = chance.randrange(len(times[stream]))
        size = chance.randrange(1, 200)
        size = min(size, len(times[stream]) - offset)
        marks = run.marks(stream, offset, size)
        assert [ns for length, ns in marks for _ in range(length)] == times[stream][offset : offset + size]


def test_reading_beyond_the_end_or_without_a_file_gives_nothing(spool: Spool) -> None:
    run = create(spool)
    assert (run.lengths(), run.read(Stream.STDOUT, 0, 9), run.pruned(Stream.STDOUT)) == ((0, 0), b"", 0)
    write(run, Stream.STDOUT, b"abc")
    assert run.read(Stream.STDOUT, 2, 9) == b"c"
    assert run.read(Stream.STDOUT, 3, 9) == b""
    assert run.lengths() == Lengths(3, 0)


# -- space --


def fill(spool: Spool, count: int, size: int) -> list[Run]:
    runs = []
    for number in range(count):
        run = create(spool, now_ns=number + 1)
        write(run, Stream.STDOUT, random.Random(number).randbytes(size), wall_ns=1)
        finish(run)
        runs.append(run)
    return runs


def test_under_the_limit_nothing_is_touched(spool: Spool) -> None:
    runs = fill(spool, 2, MIB)
    spool.release(runs[0])
    assert not spool.enforce({})
    assert [run.pruned(Stream.STDOUT) for run in runs] == [0, 0]


def test_the_tails_of_what_the_host_has_whole_go_too_before_scripts_wait_for_ever(state: Path) -> None:
    spool = Spool(state, limit=KEPT_TAIL * 8)
    for run in fill(spool, 12, KEPT_TAIL):
        spool.release(run)
    for _ in range(3):
        full = spool.enforce({})
    assert not full and spool.usage() < KEPT_TAIL * 8


def test_over_the_limit_the_oldest_acked_bytes_go_first(state: Path) -> None:
    spool = Spool(state, limit=3 * MIB)
    runs = fill(spool, 4, MIB)
    for run in runs:
        spool.release(run)
    assert not spool.enforce({})
    pruned = [run.pruned(Stream.STDOUT) for run in runs]
    assert pruned[0] == MIB - KEPT_TAIL and pruned[-1] == 0
    assert spool.usage() < 3 * MIB
    for number, run in enumerate(runs):
        data = random.Random(number).randbytes(MIB)
        assert run.lengths().stdout == MIB, "an offset never changes"
        assert run.read(Stream.STDOUT, pruned[number], MIB) == data[pruned[number] :]
        assert run.result() is not None


def test_bytes_not_acked_are_never_pruned_and_the_spool_is_full_instead(state: Path) -> None:
    spool = Spool(state, limit=2 * MIB)
    run, other = fill(spool, 2, 2 * MIB)
    acked = {run.info.run: Lengths(MIB, 0)}
    assert spool.enforce(acked)
    assert (state / "full").exists()
    assert run.pruned(Stream.STDOUT) == MIB
    assert other.pruned(Stream.STDOUT) == 0
    assert spool.enforce(acked)
    spool.release(run)
    spool.release(other)
    assert not spool.enforce({})
    assert not (state / "full").exists()


def test_a_daemon_counts_what_it_found(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "_SURVEY_STEP", 3)
    spool = Spool(state)
    runs = fill(spool, 8, 200_000)
    for run in runs[:6]:
        spool.release(run)
    again = reopen(spool, limit=MIB)
    before = again.latest(VMR)
    assert before is not None
    for _ in range(10):
        full = again.enforce({run.info.run: Lengths(200_000, 0) for run in again.open_runs()})
    assert not full
    assert again.usage() == sum(run.usage() for run in again.runs_of(VMR))
    assert again.usage() <= MIB
    again.close()


def test_where_holes_cannot_be_punched_the_oldest_whole_runs_go(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(path: Path, upto: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(spool_module, "_punch", cannot)
    spool = Spool(state, limit=2 * MIB)
    old, new = fill(spool, 2, MIB)
    spool.release(old)
    assert not spool.enforce({new.info.run: Lengths(MIB, 0)})
    assert not (old.path / "stdout").exists()
    assert (old.lengths(), old.pruned(Stream.STDOUT)) == ((MIB, 0), MIB)
    assert old.result() is not None
    assert new.pruned(Stream.STDOUT) == 0
    spool.close()
