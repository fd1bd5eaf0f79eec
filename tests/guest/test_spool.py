"""The state directory: what is found again after whatever happened to it. Files on a real disk."""

from __future__ import annotations

import json
import os
import random
import struct
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
from vmr_agent.wire import messages

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


NOBODYS = bytes(300)


@pytest.mark.parametrize(
    ("printed", "synced", "acked", "left"),
    [
        (b"line\n", 0, 0, b"line\n"),
        (b"line\n", 5, 0, b"line\n"),
        (b"a\0\0", 0, 0, b"a"),  # not synced, so not beyond doubt
        (b"a\0\0", 3, 0, b"a\0\0"),
        (b"a\0\0", 0, 2, b"a\0"),
        (b"\0\0", 2, 0, b"\0\0"),
        (b"a" * 70_000 + bytes(70_000), 100_000, 0, b"a" * 70_000 + bytes(30_000)),
        (b"", 0, 0, b""),
    ],
)
def test_what_a_power_cut_makes_of_a_streams_end_is_no_output(
    spool: Spool, printed: bytes, synced: int, acked: int, left: bytes
) -> None:
    """ext4 makes a file's new size durable before its bytes, if another file is synced: NULs are at its end then."""
    run = create(spool)
    begin(run)
    write(run, Stream.STDOUT, printed + NOBODYS, wall_ns=100)
    with (run.path / "index").open("ab") as index:
        index.write(RECORD.pack(min(synced, 1), 0, 0, 0) + RECORD.pack(synced, 0, 0, 0) + bytes(RECORD.size))
    run.cut_unsynced(Lengths(acked, 0))
    assert run.read(Stream.STDOUT, 0, 200_000) == left
    assert run.lengths() == Lengths(len(left), 0)


def test_bytes_that_an_exit_counts_are_never_cut(spool: Spool) -> None:
    run = create(spool)
    begin(run)
    write(run, Stream.STDERR, b"abc" + NOBODYS)
    run.write_lost("test", stdout=0, stderr=100)
    run.cut_unsynced(Lengths(0, 0))
    assert run.read(Stream.STDERR, 0, 1000) == b"abc" + bytes(97)


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
    vmr = b"-4/\xff\n%..caf\xc3\xa9"
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
    request = (b"\0\1", (1, 2, 3), True, 2)
    assert run.info == RunInfo(
        run.info.run, vmr, 1, Trigger.RERUN, "boot", 7, *request, scheduled=0, reboots=2
    )
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


def test_what_says_how_a_vmr_stands_is_found_without_reading_all_its_runs(spool: Spool) -> None:
    triggers = [Trigger.SCHEDULE, Trigger.RERUN, Trigger.REBOOT, Trigger.RERUN, Trigger.HOST, Trigger.RERUN]
    for attempt, trigger in enumerate(triggers, 1):
        number = 1 if trigger is Trigger.REBOOT else 0
        run = spool.create(VMR, trigger, boot_id="boot", now_ns=attempt, number=number)
        if attempt != 4:
            finish(run)
    assert [run.info.scheduled for run in spool.runs_of(VMR)] == [1, 1, 3, 3, 3, 3]
    assert [run.info.reboots for run in spool.runs_of(VMR)] == [0, 0, 1, 1, 1, 1]
    again = reopen(spool)
    # The one that the schedule started last, the one without an end, the latest.
    assert [run.info.attempt for run in again.standing(VMR)] == [3, 4, 6]
    assert again.standing(b"-4/never") == []


@pytest.mark.parametrize("lost", [{}, {"scheduled": None}, {"scheduled": 9}])
def test_where_the_latest_run_does_not_know_all_are_read(spool: Spool, lost: dict[str, object]) -> None:
    for trigger in (Trigger.SCHEDULE, Trigger.RERUN, Trigger.RERUN):
        run = spool.create(VMR, trigger, boot_id="boot", now_ns=1)
        finish(run)
    path = run.path / "run.json"
    row = json.loads(path.read_bytes())
    for key in ("scheduled", "reboots"):
        del row[key]
    path.write_text(json.dumps({**row, **lost}))
    again = reopen(spool)
    assert [run.info.attempt for run in again.standing(VMR)] == [1, 2, 3]
    assert create(again).info.scheduled == (4 if lost.get("scheduled") else None)


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


@pytest.mark.parametrize("target", ["../..", "../../outside", "/etc/nowhere/x/1", "x" * 300])
def test_a_damaged_link_removes_nothing_of_anybodys(spool: Spool, tmp_path: Path, target: str) -> None:
    (tmp_path / "outside").mkdir()
    finish(create(spool))
    (spool.path / "open" / ("ab" * 16)).symlink_to(target)
    assert len(reopen(spool).open_runs()) == 1
    assert (tmp_path / "outside").exists() and len(list((spool.path / "open").iterdir())) == 1


DAMAGE: list[object] = [
    *(b"[" * 200_000, b'{"attempt": Infinity', b"null", b"\xff\xfe"),
    # Good JSON, all of it, that no message can hold.
    *({"attempt": 1e999}, {"vmr": "-4/../x"}, {"run": "ab"}, {"process": {"pid": "x"}}, {"stdout": -1}),
    *(
        {"value": 2**64},
        {"user_s": float("nan")},
        {"boot_id": "\ud800"},
        {"after_attempt": None},
        {"at_ns": 1e999},
    ),
]


@pytest.mark.parametrize("name", ["run.json", "started", "exit.json", "closed", "../gone", "files.json"])
def test_a_record_that_a_failing_disk_damaged_is_none(spool: Spool, name: str) -> None:
    """The daemon starts, and holds nothing of the run that no message could hold."""
    run = create(spool)
    finish(run)
    (run.path / "closed").write_text('{"stdout": 0, "stderr": 0, "reason": ""}')
    path = run.path / name
    whole = path.read_bytes() if path.exists() else b"{}"
    for damage in DAMAGE:
        if isinstance(damage, dict):
            damage = json.dumps({**json.loads(whole), **damage}).encode()
        assert isinstance(damage, bytes)
        path.write_bytes(damage)
        spool = reopen(spool)
        for found in spool.open_runs():
            found.recover()
            for value in (found.started(), found.result(), found.closed(), found.info.attempt):
                assert not any(wrong in str(value) for wrong in ("inf", "nan", "-1", str(2**64))), value
        spool.latest(VMR)
        spool.gone(VMR)
        spool.edited(VMR, b"/nowhere")
    spool.close()


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
    run.close_fds()
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


def test_the_tails_of_runs_under_way_stay_and_count_for_nothing(state: Path) -> None:
    """The host compares them after time travel; scripts must not wait on their account either."""
    spool = Spool(state, limit=KEPT_TAIL * 8)
    runs = fill(spool, 12, KEPT_TAIL * 3)
    assert spool.enforce({run.info.run: Lengths(0, 0) for run in runs}), "of none of it may be taken"
    assert {run.pruned(Stream.STDOUT) for run in runs} == {0}
    acked = {run.info.run: Lengths(KEPT_TAIL * 3 - 5_000, 0) for run in runs}
    assert not spool.enforce(acked)
    assert {run.pruned(Stream.STDOUT) for run in runs} <= {0, KEPT_TAIL * 2 - 8_192}
    assert max(run.pruned(Stream.STDOUT) for run in runs) > 0


@pytest.mark.parametrize("quiet", [False, True])
def test_the_index_of_a_run_under_way_goes_as_far_as_the_host_has_its_bytes(state: Path, quiet: bool) -> None:
    """Else a script that says a line now and then for days would wait for ever, with nothing left to prune."""
    spool = Spool(state, limit=1)
    run = create(spool)
    begin(run)
    (run.path / "stdout").write_bytes(b"x" * 40_000)
    with (run.path / "index").open("wb") as file:
        if quiet:
            (run.path / "stderr").write_bytes(b"once")
            file.write(RECORD.pack(0, 7, 4, Stream.STDERR))
        for number in range(40_000):
            file.write(RECORD.pack(number, 1_000 + number, 1, Stream.STDOUT))
    before = (run.path / "index").stat().st_blocks
    acked = 30_000
    spool.enforce({run.info.run: Lengths(acked, 4 if quiet else 0)})
    assert (run.path / "index").stat().st_blocks < before // 2
    spool.close()
    for at in (acked, acked + 5_000, 39_999):
        again = Run.load(run.path)
        assert again is not None and again.marks(Stream.STDOUT, at, 1) == [(1, 1_000 + at)]
    again = Run.load(run.path)
    assert again is not None and again.captured(0)[1].offset > 10_000


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
    assert run.pruned(Stream.STDOUT) == MIB - KEPT_TAIL
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
    records = 6 * spool_module._SMALL_FILES  # of the released ones: nothing gives these back
    assert again.usage() == sum(run.usage() for run in again.runs_of(VMR)) - records
    assert again.usage() <= MIB
    again.close()


def test_history_never_fills_the_spool(state: Path) -> None:
    """What can't be pruned isn't counted: 50,000 small runs would else make every script wait for good."""
    spool = Spool(state, limit=MIB // 2)
    for run in fill(spool, 80, 3000) + fill(spool, 2, 300_000):
        spool.release(run)
    for _ in range(5):
        full = spool.enforce({})
    assert not full and spool.usage() <= MIB // 2
    again = reopen(spool, limit=MIB // 2)
    for _ in range(5):
        assert not again.enforce({})
    assert again.usage() == spool.usage()
    assert sum(run.usage() for run in again.runs_of(VMR)) > MIB // 2
    again.close()


def test_where_holes_cannot_be_punched_the_oldest_whole_runs_go(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(path: Path, upto: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(spool_module, "_punch", cannot)
    spool = Spool(state, limit=2 * MIB - 2 * KEPT_TAIL)
    old, new = fill(spool, 2, MIB)
    spool.release(old)
    assert not spool.enforce({new.info.run: Lengths(MIB, 0)})
    assert not (old.path / "stdout").exists()
    assert (old.lengths(), old.pruned(Stream.STDOUT)) == ((MIB, 0), MIB)
    assert old.result() is not None
    assert new.pruned(Stream.STDOUT) == 0
    spool.close()


def test_what_is_pruned_is_a_fact_of_its_own(spool: Spool) -> None:
    """File systems that make holes of zeros (ZFS does) would have printed zeros pass for pruned."""
    run = create(spool)
    write(run, Stream.STDOUT, b"")
    os.truncate(run.path / "stdout", MIB)  # as if that many zeros had been printed
    write(run, Stream.STDOUT, b"end")
    assert run.pruned(Stream.STDOUT) == 0
    finish(run)
    spool.release(run)
    run.prune(Lengths(MIB // 2, 0), whole=False)
    assert run.pruned(Stream.STDOUT) == MIB // 2 - KEPT_TAIL
    again = reopen(spool).latest(VMR)
    assert again is not None and again.pruned(Stream.STDOUT) == MIB // 2 - KEPT_TAIL
    again.prune(Lengths(MIB // 4, 0), whole=False)
    assert again.pruned(Stream.STDOUT) == MIB // 2 - KEPT_TAIL, "it never goes back"


def test_bytes_are_noted_as_pruned_before_they_go(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    run = create(spool)
    write(run, Stream.STDOUT, b"x" * MIB)

    def power_cut(path: Path, upto: int) -> None:
        noted = Run.load(run.path)
        assert noted is not None and noted.pruned(Stream.STDOUT) == upto == MIB - KEPT_TAIL
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(spool_module, "_punch", power_cut)
    with pytest.raises(OSError):
        run.prune(Lengths(MIB, 0), whole=False)


def test_where_holes_cannot_be_punched_nothing_is_said_to_be_pruned(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def cannot(path: Path, upto: int) -> None:
        tried.append(path)
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(spool_module, "_punch", cannot)
    run = create(spool)
    write(run, Stream.STDOUT, b"x" * MIB)
    for _ in range(3):
        run.prune(Lengths(MIB, 0), whole=False)
    assert (run.pruned(Stream.STDOUT), len(tried)) == (0, 1)


# -- gaps --


def note_gap(run: Run, place: int, *fields: int) -> None:
    """What a shim notes: offset, length, wall ns, stream, 1 grows or 2 over, cause."""
    path = run.path / "gaps"
    if not path.exists():
        path.write_bytes(bytes(4096))
    with path.open("r+b") as file:
        file.seek(place * 32)
        file.write(struct.pack("<QQQBBB5x", *fields))


def test_a_directory_that_another_attempt_left_is_not_taken_away(spool: Spool) -> None:
    """Its records are damaged, so nobody knows it; what it captured is there all the same."""
    first = create(spool)
    finish(first)
    spool.release(first)
    other = first.path.with_name("2")
    other.mkdir()
    (other / "stdout").write_bytes(b"all there is")
    with pytest.raises(Problem):
        create(spool)
    assert (other / "stdout").read_bytes() == b"all there is"
    assert create(spool).info.attempt == 3


def test_the_time_of_a_damaged_gap_can_be_told(spool: Spool) -> None:
    run = create(spool)
    begin(run)
    write(run, Stream.STDOUT, b"a" * 30)
    note_gap(run, 0, 0, 20, 2**64 - 1, 1, 2, 1)
    gap = run.gap(Stream.STDOUT, 0, 30)
    assert gap is not None
    messages.pack(messages.Gap(run.info.run, 1, 0, 20, "dropped", gap.wall_ns), to=bytes(8), n=0)


def test_a_gap_grows_with_the_file_until_it_is_over(spool: Spool) -> None:
    run = create(spool)
    begin(run)
    assert (run.gap(Stream.STDOUT, 0, 100), run.dropping(), run.dropped()) == (None, "", 0)
    write(run, Stream.STDOUT, b"a" * 10)
    note_gap(run, 0, 10, 0, 7, 1, 1, 1)
    os.truncate(run.path / "stdout", 30)
    gap = run.gap(Stream.STDOUT, 0, 30)
    assert gap is not None and (gap.begin, gap.growing, gap.wall_ns) == (10, True, 7)
    assert (run.dropped(), "limit" in run.dropping()) == (20, True)
    assert run.gap(Stream.STDERR, 0, 30) is None
    assert run.gap(Stream.STDOUT, 0, 10) is None
    note_gap(run, 0, 10, 20, 7, 1, 2, 1)
    write(run, Stream.STDOUT, b"b" * 5)
    note_gap(run, 1, 35, 0, 9, 1, 1, 2)
    os.truncate(run.path / "stdout", 50)
    found = [run.gap(Stream.STDOUT, at, 50) for at in (0, 10, 29, 30, 35, 49)]
    assert [gap and (gap.begin, gap.growing) for gap in found] == [(10, False)] * 3 + [(35, True)] * 3
    assert found[0] is not None and found[0].end == 30
    assert (run.dropped(), "nearly full" in run.dropping()) == (35, True)
    # The power fails: what was dropped is what the file says, and no more comes.
    run.write_lost("test", stdout=50, stderr=0)
    last = run.gap(Stream.STDOUT, 40, 50)
    assert last is not None and (last.begin, last.end, run.dropping()) == (35, 50, "")


def test_many_gaps_of_both_streams_are_found_whenever_they_are_asked_for(spool: Spool) -> None:
    chance = random.Random(5)
    run = create(spool)
    begin(run)
    lengths = {stream: 0 for stream in Stream}
    expected: dict[Stream, list[tuple[int, int]]] = {stream: [] for stream in Stream}
    for place in range(700):  # several blocks
        stream = chance.choice(list(Stream))
        if place == 0:
            stream = Stream.STDERR
        if stream is Stream.STDERR and place > 300:
            stream = Stream.STDOUT  # the other's last one is far back
        offset = lengths[stream] + chance.randrange(1, 9)
        note_gap(run, place, offset, 0, 1, stream, 1, 1)
        length = chance.randrange(9)
        lengths[stream] = offset + length
        (run.path / stream.filename).touch()
        os.truncate(run.path / stream.filename, lengths[stream])
        if chance.random() < 0.5:
            run.gap(stream, 0, 1)
        note_gap(run, place, offset, length, 1, stream, 2, 1)
        if length:
            expected[stream].append((offset, offset + length))
    for stream in Stream:
        assert [(gap.begin, gap.end) for gap in run.gaps(stream)] == expected[stream]
        for _ in range(300):
            at = chance.randrange(lengths[stream])
            gap = run.gap(stream, at, lengths[stream])
            assert (gap and (gap.begin, gap.end)) == next((g for g in expected[stream] if g[1] > at), None)


# -- telling the shims --


def test_the_mode_and_the_limit_are_told_again_where_they_could_not_be(state: Path) -> None:
    """No inode was left, the file system read-only, or somebody tidied up."""
    Spool(state, drop=True).close()
    assert (state / "drop").exists()
    spool = Spool(state, limit=MIB, drop=True)
    fill(spool, 2, MIB)
    (state / "drop").unlink()
    assert spool.enforce({})
    assert (state / "drop").exists()
    (state / "full").unlink()
    assert spool.enforce({})
    assert (state / "full").exists()
    spool.close()
    Spool(state).close()
    assert not (state / "drop").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounts a file system: needs root")
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def fill_disk(disk: Path) -> Path:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    return ballast


def test_on_a_disk_that_others_filled_what_the_host_has_goes_before_scripts_wait(small_disk: Path) -> None:
    """Under its limit as the spool is: it would have been blocked by bytes that nobody needs."""
    spool = Spool(small_disk / "state", limit=1 << 30)
    whole, live = fill(spool, 2, 2 * MIB)
    spool.release(whole)
    fill_disk(small_disk)
    assert not spool.enforce({live.info.run: Lengths(MIB, 0)})
    fs = os.statvfs(small_disk)
    assert fs.f_bavail > fs.f_blocks // 50
    assert whole.pruned(Stream.STDOUT) >= MIB
    assert live.pruned(Stream.STDOUT) == 0
    spool.close()


def test_what_could_not_be_pruned_is_pruned_later(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that was read-only for a while."""
    runs = fill(spool, 4, MIB)
    for run in runs:
        spool.release(run)
    spool.limit = 2 * MIB

    def read_only(path: Path, upto: int) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(spool_module, "_punch", read_only)
        for _ in range(3):
            assert spool.enforce({})
    for _ in range(3):
        full = spool.enforce({})
    assert not full and spool.usage() < 2 * MIB


def test_where_no_note_can_be_left_it_is_said_all_the_same(small_disk: Path) -> None:
    spool = Spool(small_disk / "state")
    begun, waits = create(spool), create(spool, b"-4/waits")
    begin(begun)
    spool.close()
    assert (begun.blocked(), waits.blocked()) == ("", "")
    used = os.statvfs(small_disk).f_files - os.statvfs(small_disk).f_ffree
    subprocess.run(["mount", "-o", f"remount,nr_inodes={used}", small_disk], check=True)
    assert begun.blocked() == "" and "inode" in waits.blocked()
    begun.close_fds()
    subprocess.run(["mount", "-o", "remount,ro,nr_inodes=1000", small_disk], check=True)
    assert "read-only" in begun.blocked() and "read-only" in waits.blocked()
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert (begun.blocked(), waits.blocked()) == ("", "")
