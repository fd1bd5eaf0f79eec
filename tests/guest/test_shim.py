"""One run: what a script sees, what is kept of it, how its end is told. Real scripts and pipes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pwd
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Union

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.guest.rig import (
    BOOT_ID,
    VMR,
    Rig,
    alive,
    eventually,
    everything,
    may_raise_priority,
    result,
)
from vmr_agent.guest.runner import Runner, fork_server_command
from vmr_agent.guest.shim import MUCH, MUCH_TOLD_S, OUTPUT, _find_prctl, to_json
from vmr_agent.guest.spool import RECORD, Run
from vmr_agent.runs import Ending, RunState, Stream, Trigger

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system: needs root")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.close()


# -- what is kept --


def test_both_streams_and_the_exit_code_are_kept(rig: Rig) -> None:
    run = rig.run("#!/bin/sh\necho out; echo err >&2; exit 3\n")
    assert (everything(run, Stream.STDOUT), everything(run, Stream.STDERR)) == (b"out\n", b"err\n")
    assert (result(run).ending, result(run).value) == (Ending.CODE, 3)
    assert (result(run).stdout, result(run).stderr) == (4, 4) == run.closed()
    assert run.close_reason() == ""
    assert result(run).boot_id == BOOT_ID
    assert 0 < result(run).duration_s < 20
    assert result(run).rusage.max_rss_bytes > 0


def test_no_byte_is_decoded_split_or_stripped(rig: Rig) -> None:
    data = bytes(range(256)) * 3 + b"\xef\r\n\r\0no newline at the end"
    (rig.base / "data").write_bytes(data)
    run = rig.run(f"#!/bin/sh\ncat {rig.base}/data\n")
    assert everything(run, Stream.STDOUT) == data


def test_ten_mebibytes_on_both_streams_at_once_arrive_byte_for_byte(rig: Rig) -> None:
    chunks = {name: random.Random(name).randbytes(10 << 20) for name in ("out", "err")}
    for name, data in chunks.items():
        (rig.base / name).write_bytes(data)
    run = rig.run(f"#!/bin/sh\ncat {rig.base}/out & cat {rig.base}/err >&2; wait\n")
    for stream, name in ((Stream.STDOUT, "out"), (Stream.STDERR, "err")):
        assert hashlib.sha256(everything(run, stream)).digest() == hashlib.sha256(chunks[name]).digest()
        marks = run.marks(stream, 0, 10 << 20)
        assert sum(length for length, _ in marks) == 10 << 20


def test_writing_to_dev_stderr_appends_as_on_a_terminal(rig: Rig) -> None:
    """With a file as stderr each `> /dev/stderr` would truncate it; with a socket it would fail."""
    run = rig.run(
        "#!/bin/sh\necho one >&2; echo two > /dev/stderr; echo three >&2; echo four > /dev/stdout\n"
    )
    assert everything(run, Stream.STDERR) == b"one\ntwo\nthree\n"
    assert everything(run, Stream.STDOUT) == b"four\n"


def test_reads_far_apart_have_times_of_their_own_and_near_ones_share_one(rig: Rig) -> None:
    run = rig.run("#!/bin/sh\nprintf a; printf b; sleep 0.3; printf cd\n")
    marks = run.marks(Stream.STDOUT, 0, 4)
    assert sum(length for length, _ in marks) == 4
    assert marks[-1][0] == 2
    assert marks[-1][1] - marks[0][1] > 200_000_000
    assert result(run).started_ns <= marks[0][1] <= marks[-1][1] <= result(run).ended_ns


def test_the_order_between_the_streams_is_in_the_index(rig: Rig) -> None:
    run = rig.run("#!/bin/sh\nfor i in 1 2 3; do echo o; sleep 0.05; echo e >&2; sleep 0.05; done\n")
    out, err = (run.marks(stream, 0, 6) for stream in Stream)
    times = sorted([(ns, "o") for _, ns in out] + [(ns, "e") for _, ns in err])
    assert "".join(name for _, name in times) == "oeoeoe"


def test_what_is_synced_is_noted_in_the_index(rig: Rig) -> None:
    run = rig.run("echo out; echo err >&2; sleep 1.5; echo more")

    def notes() -> list[tuple[int, int]]:
        rows = RECORD.iter_unpack((run.path / "index").read_bytes())
        return [(out, err) for out, err, length, number in rows if not length and not number]

    eventually(lambda: notes()[-1] == (9, 4))  # the last note is made after the result
    assert notes() == sorted(notes())


def test_the_daemon_is_told_of_start_output_and_end(rig: Rig) -> None:
    rig.stage("#!/bin/sh\nsleep 0.2; echo x; sleep 0.2\n")
    run = rig.start()
    rig.kicks.settimeout(20)
    seen = []
    while not run.closed():
        seen.append(rig.kicks.recv(64))
    assert seen.count(run.info.run + OUTPUT) == 1
    assert seen.count(run.info.run) >= 2
    assert set(seen) == {run.info.run, run.info.run + OUTPUT}


def test_what_prints_much_leaves_room_for_others_in_the_daemons_queue(rig: Rig) -> None:
    """It holds ten by default, and a flood that told of each read would have them all."""
    rig.stage("#!/bin/sh\nhead -c 200000000 /dev/zero\n")
    rig.kicks.settimeout(20)
    began, run, seen = time.monotonic(), rig.start(), 0
    while not run.closed():
        seen += rig.kicks.recv(64) == run.info.run + OUTPUT
    assert result(run).stdout == 200_000_000
    assert 1 <= seen <= (2 + (time.monotonic() - began) / MUCH_TOLD_S) * (1 + MUCH / 4096), (
        "of each 4 KiB read"
    )


@given(st.dictionaries(st.text("abc_"), st.text() | st.booleans() | st.integers() | st.floats(0, 1e12)))
def test_records_are_json(row: dict[str, Union[str, int, float]]) -> None:
    """Written without `json`, which would take a megabyte of each VM."""
    assert json.loads(to_json(row)) == row
    assert b"\n" not in to_json(row), "a line that ends is whole"


def test_a_daemon_that_is_slow_to_listen_hears_every_end(rig: Rig) -> None:
    """Its queue is short; a shim that has to go says so again until there is room."""
    vmrs = [b"-4/vmr %d" % number for number in range(40)]
    for vmr in vmrs:
        rig.stage("#!/bin/sh\necho\n", vmr)
    runs = {run.info.run: run for run in map(rig.start, vmrs)}
    eventually(lambda: sum(run.result() is not None for run in runs.values()) >= 20)
    heard_ended: set[bytes] = set()
    rig.kicks.settimeout(5)
    while len(heard_ended) < len(runs):
        said = rig.kicks.recv(64)
        if said in runs and runs[said].closed() is not None:  # one of output alone tells of no end
            heard_ended.add(said)


# -- how it ends --


def test_a_death_by_signal_is_a_signal_not_a_code(rig: Rig) -> None:
    run = rig.run("#!/bin/sh\nkill -SEGV $$\n")
    assert (result(run).ending, result(run).value) == (Ending.SIGNAL, 11)
    assert result(run).exit_code is None


def test_what_is_long_in_coming_is_told_of_meanwhile(rig: Rig) -> None:
    """A script that is open for writing can't be executed yet; its process is there."""
    script = rig.stage("#!/bin/sh\n")
    rig.kicks.settimeout(20)
    with script.open("ab"):
        run = rig.start()
        assert rig.kicks.recv(64) == run.info.run
        assert run.started() is not None and run.result() is None
    rig.wait(run, RunState.CLOSED)
    assert result(run).value == 0


def test_a_script_killed_before_it_is_let_go_died_of_a_signal(rig: Rig) -> None:
    """Its process is there from before the syncs, and whatever kills processes may choose this one."""
    rig.stage("#!/bin/sh\necho never\n")
    for _ in range(300):  # until a shim is caught while it syncs
        run = rig.start()
        eventually(lambda run=run: (run.path / "starting").exists() or run.started(), "it begins")
        shim = run.holder()
        if shim is None:
            continue
        os.kill(shim, signal.SIGSTOP)
        children = Path(f"/proc/{shim}/task/{shim}/children").read_text().split()
        caught = (run.path / "starting").exists() and len(children) == 1
        if caught:
            os.kill(int(children[0]), signal.SIGKILL)
            eventually(lambda pid=int(children[0]): not alive(pid), "it is dead")
        os.kill(shim, signal.SIGCONT)
        rig.wait(run, RunState.CLOSED)
        if caught:
            break
    assert caught, "no shim was caught in time"
    assert (result(run).ending, result(run).value) == (Ending.SIGNAL, signal.SIGKILL)
    assert everything(run, Stream.STDOUT) == b""


def test_a_background_child_delays_closed_but_not_the_exit(rig: Rig) -> None:
    go = rig.base / "go"
    rig.stage(f"#!/bin/sh\n(while [ ! -e {go} ]; do sleep 0.05; done; echo late) &\necho early\n")
    run = rig.start()
    rig.wait(run, RunState.EXITED)
    assert run.closed() is None
    assert result(run).stdout == 6
    assert run.locked()
    go.touch()
    rig.wait(run, RunState.CLOSED)
    assert everything(run, Stream.STDOUT) == b"early\nlate\n"
    assert run.closed() == (11, 0)
    assert (result(run).stdout, run.close_reason()) == (6, "")


def test_prctl_is_found_also_where_the_short_way_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for way in ("short", "long"):
        prctl = _find_prctl()
        assert prctl(_PR_SET_PDEATHSIG, 0) == 0, way
        assert prctl(_PR_SET_PDEATHSIG, 4711) == -1, way
        found.append(prctl.__code__)
        monkeypatch.delattr("_ctypes.call_function", raising=False)
    assert found[0] is not found[1]


def test_children_in_sessions_of_their_own_are_adopted_and_reaped(rig: Rig) -> None:
    rig.stage("#!/bin/sh\n(setsid sleep 0.2 & echo $!)\nsetsid sleep 1000 & echo $!\n")
    run = rig.start()
    rig.wait(run, RunState.EXITED)
    short, long = (int(line) for line in everything(run, Stream.STDOUT).split())
    eventually(lambda: not Path(f"/proc/{short}").exists(), "the reaping")
    assert alive(long) and run.locked()
    os.kill(long, 9)
    rig.wait(run, RunState.CLOSED)
    assert result(run).value == 0


@pytest.mark.parametrize(
    ("script", "number", "words"),
    [
        ("#!/bin/sh\r\necho\r\n", errno.ENOENT, "CR LF"),
        ("#!/no/such/interpreter -x\n", errno.ENOENT, "/no/such/interpreter"),
        ("#!/etc/passwd\n", errno.EACCES, "/etc/passwd"),
    ],
)
def test_what_could_not_start_says_why(rig: Rig, script: str, number: int, words: str) -> None:
    run = rig.run(script)
    assert (result(run).ending, result(run).value) == (Ending.ERRNO, number)
    assert words in result(run).text
    assert run.closed() == (0, 0)


def test_a_script_that_vanished_or_lost_its_x_bit_says_so(rig: Rig) -> None:
    rig.stage("#!/bin/sh\n").chmod(0o644)
    run = rig.start()
    rig.wait(run, RunState.CLOSED)
    assert (result(run).value, "not executable" in result(run).text) == (errno.EACCES, True)
    (rig.launch / "-4/a.sh/call_arguments.sh").unlink()
    run = rig.start()
    rig.wait(run, RunState.CLOSED)
    assert (result(run).value, "vanished" in result(run).text) == (errno.ENOENT, True)


@root_only
def test_a_noexec_mount_is_named(rig: Rig) -> None:
    directory = rig.stage("#!/bin/sh\n").parent
    subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec", "tmpfs", directory], check=True)
    try:
        run = rig.run("#!/bin/sh\n")
        assert (result(run).value, "noexec" in result(run).text) == (errno.EACCES, True)
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


@pytest.mark.parametrize("script", ["echo hi; exit 4\n", "\necho hi\nexit 4\n"])
def test_without_a_shebang_it_is_a_shell_script(rig: Rig, script: str) -> None:
    run = rig.run(script)
    assert (everything(run, Stream.STDOUT), result(run).value) == (b"hi\n", 4)


def test_an_empty_script_succeeds(rig: Rig) -> None:
    assert result(rig.run("")).exit_code == 0


def test_a_script_still_open_for_writing_is_waited_for(rig: Rig) -> None:
    script = rig.stage("#!/bin/sh\necho ran\n")
    writer = os.open(script, os.O_WRONLY)
    run = rig.start()
    rig.wait(run, RunState.STARTED)
    time.sleep(0.1)
    assert run.result() is None
    os.close(writer)
    rig.wait(run, RunState.CLOSED)
    assert everything(run, Stream.STDOUT) == b"ran\n"


@pytest.mark.parametrize(
    ("script", "asks"),
    [
        ("exit 10", True),
        ('cd "$(dirname "$0")"; touch reboot; exit 1', True),
        ("exit 1", False),
        ("kill -10 $$", False),
    ],
)
def test_exit_10_or_a_reboot_file_asks_for_a_reboot(rig: Rig, script: str, asks: bool) -> None:
    assert result(rig.run(f"#!/bin/sh\n{script}\n")).asks_reboot is asks


# -- a disk that takes its time --


@pytest.fixture
def slow(rig: Rig) -> Path:
    """The gate of `slow_disk.py`, shut: where it is made, syncs are done."""
    gate = rig.base / "gate"
    rig.runner.close()
    *interpreter, program = fork_server_command()
    rig.runner = Runner(
        rig.spool,
        kick_path=rig.base / "kick",
        launch_dir=rig.launch,
        log=rig.logged.append,
        boot_id=rig.boot_id,
        command=[*interpreter, os.fspath(Path(__file__).with_name("slow_disk.py")), os.fspath(gate), program],
    )
    return gate


def test_what_is_printed_during_a_long_sync_comes_at_once_and_the_end_waits_for_it(
    rig: Rig, slow: Path
) -> None:
    rig.stage("#!/bin/sh\necho one; sleep 1.5; echo two; sleep 0.2; echo three\n")
    run = rig.start()
    eventually(lambda: everything(run, Stream.STDOUT) == b"one\ntwo\nthree\n")
    eventually(lambda: not alive(run.started().pid))  # type: ignore[union-attr]
    time.sleep(0.3)
    assert run.result() is None, "an end counts only what is durable"
    slow.touch()
    rig.wait(run, RunState.CLOSED)
    assert (result(run).stdout, run.close_reason()) == (14, "")


def test_a_sync_that_fails_beside_the_output_is_said_and_done_again(rig: Rig, slow: Path) -> None:
    fails = slow.with_name("gate.fails")
    fails.touch()
    slow.touch()
    rig.stage(
        '#!/bin/sh\necho one; while [ ! -e "$(dirname "$0")"/over ]; do sleep 0.1; echo on; done; exit 3\n'
    )
    run = rig.start()
    for _ in range(3):  # for as long as it fails, each time for a while
        eventually(lambda: "cannot be synced" in run.blocked())
        eventually(lambda: not run.blocked())
    (rig.launch / os.fsdecode(VMR) / "over").touch()
    eventually(lambda: not alive(run.started().pid))  # type: ignore[union-attr]
    time.sleep(0.5)
    assert run.result() is None, "an end counts only what is durable"
    fails.unlink()
    rig.wait(run, RunState.CLOSED)
    assert everything(run, Stream.STDOUT).startswith(b"one\non\n") and result(run).value == 3
    assert result(run).stdout == len(everything(run, Stream.STDOUT))
    eventually(lambda: not run.blocked())


# -- what a script sees --


def test_the_environment_is_exactly_a_clean_one(rig: Rig) -> None:
    vmr = b"10.5/a\xff b"
    run = rig.run(
        f"#!{sys.executable} -IS\nimport os; os.write(1, open('/proc/self/environ', 'rb').read())\n", vmr
    )
    env = dict(entry.split(b"=", 1) for entry in everything(run, Stream.STDOUT).split(b"\0") if entry)
    env.pop(b"LC_CTYPE", None)  # the interpreter's own, PEP 538
    assert env == {
        b"PATH": b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        b"LANG": os.environ.get("LANG", "C.UTF-8").encode(),
        b"HOME": pwd.getpwuid(os.geteuid()).pw_dir.encode(),
        b"VMR_NAME": vmr,
        b"VMR_START_TIME": b"10.5",
        b"VMR_ATTEMPT": b"1",
    }
    assert everything(rig.run("#!/bin/sh\necho $VMR_ATTEMPT\n", vmr), Stream.STDOUT) == b"2\n"


def test_descriptors_are_0_1_2_and_nothing_else(rig: Rig) -> None:
    run = rig.run("#!/bin/sh\nexec ls -l /proc/self/fd\n")
    lines = everything(run, Stream.STDOUT).decode().splitlines()[1:]
    targets = {line.split()[-3]: line.split()[-1] for line in lines}
    targets.pop("3")  # the directory that ls lists
    assert targets.keys() == {"0", "1", "2"}
    assert targets["0"] == "/dev/null"
    assert targets["1"].startswith("pipe:") and targets["2"].startswith("pipe:")


def test_a_script_finds_what_a_login_finds(rig: Rig) -> None:
    script = """#!/bin/sh
echo "$#" "$0"; pwd; umask; ulimit -n; cat /proc/self/oom_score_adj
grep -E 'Sig(Blk|Ign)' /proc/self/status
cut -d' ' -f 6 /proc/$$/stat; echo $$
"""
    lines = everything(rig.run(script), Stream.STDOUT).decode().split("\n")
    assert lines[0] == f"0 {rig.launch}/-4/a.sh/call_arguments.sh"
    assert lines[1:3] == ["/", "0022"]
    assert int(lines[3]) <= 1024
    assert lines[4] == "0"
    assert [line.split()[1] for line in lines[5:7]] == ["0" * 16] * 2
    assert lines[7] == lines[8], "the script leads a session of its own"


@pytest.mark.skipif(not may_raise_priority(), reason="a priority is raised, which is not allowed here")
@pytest.mark.parametrize("nice", [-5, 5])
def test_a_script_has_the_priority_of_a_login_whatever_the_daemon_has(tmp_path: Path, nice: int) -> None:
    os.setpriority(os.PRIO_PROCESS, 0, nice)
    try:
        rig = Rig(tmp_path)
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    assert everything(rig.run("#!/bin/sh\nnice\n"), Stream.STDOUT) == b"0\n"
    rig.close()


def test_a_broken_pipe_ends_a_writer_as_everywhere(rig: Rig) -> None:
    """Python ignores SIGPIPE; a script that inherits that writes for ever, or reports errors."""
    run = rig.run("#!/bin/sh\nyes | head -n 1; echo done\n")
    assert (everything(run, Stream.STDOUT), everything(run, Stream.STDERR)) == (b"y\ndone\n", b"")


# -- what may go wrong --


def test_ordering_one_attempt_again_runs_it_once(rig: Rig) -> None:
    rig.stage(f"#!/bin/sh\necho ran >> {rig.base}/log; sleep 0.3\n")
    run = rig.start()
    for _ in range(3):
        rig.runner._order(run)
    rig.wait(run, RunState.CLOSED)
    for _ in range(3):
        rig.runner._order(run)
    rig.run("#!/bin/sh\n", b"-4/behind those orders")
    assert (rig.base / "log").read_text() == "ran\n"
    assert result(run).value == 0


def test_a_torn_started_record_means_it_never_ran(rig: Rig) -> None:
    """Power failed in the middle of the sync that comes before the script: it runs now."""
    rig.stage("#!/bin/sh\necho ran\n")
    run = rig.spool.create(VMR, Trigger.SCHEDULE, boot_id=BOOT_ID, now_ns=1)
    (run.path / "starting").write_bytes(b'{"run": ')
    rig.wait(run, RunState.CLOSED)
    assert everything(run, Stream.STDOUT) == b"ran\n"


def test_a_shim_outlives_the_signals_that_end_daemons(rig: Rig) -> None:
    rig.stage(f"#!/bin/sh\nwhile [ ! -e {rig.base}/go ]; do sleep 0.05; done; echo after\n")
    run = rig.start()
    rig.wait(run, RunState.STARTED)
    shim = run.holder()
    assert shim is not None
    for number in (1, 2, 3, 10, 12, 13, 14, 15, 20):
        os.kill(shim, number)
    (rig.base / "go").touch()
    rig.wait(run, RunState.CLOSED)
    assert (result(run).value, everything(run, Stream.STDOUT)) == (0, b"after\n")


def test_a_run_that_was_removed_is_left_when_its_pipes_end(rig: Rig) -> None:
    rig.stage(f"#!/bin/sh\n(while [ ! -e {rig.base}/go ]; do sleep 0.02; done) &\n")
    run = rig.start()
    rig.wait(run, RunState.EXITED)
    shim = run.holder()
    assert shim is not None
    shutil.rmtree(run.path)
    (rig.base / "go").touch()
    eventually(lambda: not alive(shim), "the end of the shim")


def test_while_the_spool_is_full_the_script_waits_and_nothing_is_lost(rig: Rig) -> None:
    (rig.state / "full").touch()
    size = 4 << 20
    rig.stage(f"#!/bin/sh\nhead -c {size} /dev/zero; echo end\n")
    run = rig.start()
    eventually(lambda: run.blocked(), "blocking")
    assert "limit" in run.blocked()
    time.sleep(0.5)
    assert run.result() is None
    assert run.lengths().stdout < size
    (rig.state / "full").unlink()
    rig.wait(run, RunState.CLOSED)
    assert everything(run, Stream.STDOUT) == b"\0" * size + b"end\n"
    assert run.blocked() == ""


def test_while_the_spool_is_full_an_exit_is_told_with_all_the_pipes_held(rig: Rig) -> None:
    (rig.state / "full").touch()
    rig.stage("#!/bin/sh\necho one; sleep 0.1; head -c 50000 /dev/zero; exit 7\n")
    run = rig.start()
    rig.wait(run, RunState.EXITED)
    assert (result(run).value, result(run).stdout) == (7, 50004)
    rig.wait(run, RunState.CLOSED)
    assert run.closed() == (50004, 0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@root_only
def test_a_file_system_that_fills_up_and_is_freed_loses_nothing(tmp_path: Path, small_disk: Path) -> None:
    rig = Rig(tmp_path, state=small_disk / "state")
    try:
        data = random.Random(1).randbytes(3 << 20)
        (tmp_path / "data").write_bytes(data)
        rig.stage(
            f"#!/bin/sh\ntouch {tmp_path}/begun; sleep 0.5; cat {tmp_path}/data; echo end >&2; exit 5\n"
        )
        run = rig.start()
        eventually((tmp_path / "begun").exists)
        ballast = small_disk / "ballast"
        with ballast.open("wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(b"\0" * 4096)
        eventually(lambda: result(run) if run.result() else run.blocked(), "blocking")
        time.sleep(0.5)
        assert run.lengths().stdout < len(data)
        ballast.unlink()
        rig.wait(run, RunState.CLOSED)
        assert everything(run, Stream.STDOUT) == data
        assert everything(run, Stream.STDERR) == b"end\n"
        assert (result(run).value, run.closed()) == (5, (len(data), 4))
    finally:
        rig.close()


@root_only
def test_a_full_file_system_withholds_no_exit(tmp_path: Path, small_disk: Path) -> None:
    rig = Rig(tmp_path, state=small_disk / "state")
    try:
        rig.stage(f"#!/bin/sh\nwhile [ ! -e {tmp_path}/go ]; do sleep 0.05; done; echo last words; exit 9\n")
        run = rig.start()
        rig.wait(run, RunState.STARTED)
        ballast = small_disk / "ballast"
        with ballast.open("wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(b"\0" * 4096)
        (tmp_path / "go").touch()
        rig.wait(run, RunState.EXITED)
        assert (result(run).value, result(run).stdout) == (9, 11)
        ballast.unlink()
        rig.wait(run, RunState.CLOSED)
        assert everything(run, Stream.STDOUT) == b"last words\n"
    finally:
        rig.close()


@root_only
def test_a_run_that_cannot_begin_for_want_of_space_begins_later(tmp_path: Path, small_disk: Path) -> None:
    """The directory was made; the shim finds no blocks for the exit record it must be able to write."""
    rig = Rig(tmp_path, state=small_disk / "state")
    try:
        rig.stage("#!/bin/sh\necho ran\n")
        run = rig.spool.create(VMR, Trigger.SCHEDULE, boot_id=BOOT_ID, now_ns=1)
        ballast = small_disk / "ballast"
        with ballast.open("wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(b"\0" * 4096)
        assert rig.runner.judge(run) is RunState.NONE
        eventually(lambda: not run.locked() and (run.path / "lock").exists())
        assert run.started() is None
        ballast.unlink()
        rig.wait(run, RunState.CLOSED)
        assert everything(run, Stream.STDOUT) == b"ran\n"
    finally:
        rig.close()


# -- overflow = drop --


def pattern(size: int) -> bytes:
    return b"".join(b"%07d\n" % number for number in range(size // 8))


def assert_kept_or_dropped(run: Run, stream: Stream, data: bytes) -> int:
    """Each byte is what was printed, or in a gap; returns how many are in gaps."""
    spooled = bytearray(everything(run, stream))
    gaps = run.gaps(stream)
    for gap, following in zip(gaps, [*gaps[1:], None]):
        assert gap.begin < gap.end and (following is None or gap.end <= following.begin)
        assert spooled[gap.begin : gap.end] == bytes(gap.end - gap.begin)
        spooled[gap.begin : gap.end] = data[gap.begin : gap.end]
    assert spooled == data
    return sum(gap.end - gap.begin for gap in gaps)


def test_while_the_spool_is_full_output_is_dropped_and_counted_to_the_byte(rig: Rig) -> None:
    for name in ("drop", "full"):
        (rig.state / name).touch()
    (rig.base / "data").write_bytes(pattern(4 << 20))
    rig.stage(
        f"#!/bin/sh\ncat {rig.base}/data; echo a >&2; touch {rig.base}/printed\n"
        f"while [ ! -e {rig.base}/go ]; do sleep 0.02; done; echo end\n"
    )
    run = rig.start()
    eventually((rig.base / "printed").exists, "the script, which waits for nobody,")
    eventually(lambda: run.lengths() == (4 << 20, 2))
    assert "limit" in run.dropping() and run.blocked() == ""
    assert run.gap(Stream.STDOUT, 0, 4 << 20).growing  # type: ignore[union-attr]
    (rig.state / "full").unlink()
    eventually(lambda: not run.dropping(), "the end of the dropping")
    (rig.base / "go").touch()
    rig.wait(run, RunState.CLOSED)
    data = pattern(4 << 20) + b"end\n"
    assert run.closed() == (len(data), 2)
    (gap,) = run.gaps(Stream.STDOUT)
    assert assert_kept_or_dropped(run, Stream.STDOUT, data) == gap.end - gap.begin == (4 << 20) - gap.begin
    assert everything(run, Stream.STDOUT).endswith(b"\0end\n")
    assert assert_kept_or_dropped(run, Stream.STDERR, b"a\n") == 2
    started = run.started()
    assert started is not None and result(run).ended_ns > gap.wall_ns > started.wall_ns


def test_a_gigabyte_dropped_is_one_gap_and_takes_no_disk(rig: Rig) -> None:
    for name in ("drop", "full"):
        (rig.state / name).touch()
    run = rig.run("#!/bin/sh\nhead -c 1073741824 /dev/zero\n")
    (gap,) = run.gaps(Stream.STDOUT)
    first = gap.begin  # what came before the first look at the free space
    assert (gap.end, run.closed()) == (1 << 30, (1 << 30, 0)) and first <= 2 << 20
    assert (run.path / "gaps").stat().st_size <= 4096
    assert run.usage() < first + 100_000


def test_a_shim_killed_while_it_drops_leaves_the_exact_count(rig: Rig) -> None:
    for name in ("drop", "full"):
        (rig.state / name).touch()
    rig.stage(f"#!/bin/sh\ncat {rig.base}/data; while [ ! -e {rig.base}/go ]; do sleep 0.02; done\n")
    (rig.base / "data").write_bytes(pattern(4 << 20))
    run = rig.start()
    eventually(lambda: run.lengths().stdout == 4 << 20)
    holder, started = run.holder(), run.started()
    assert holder is not None and started is not None
    os.kill(holder, 9)
    os.kill(started.pid, 9)
    rig.wait(run, RunState.CLOSED)
    assert result(run).ending is Ending.LOST
    (gap,) = run.gaps(Stream.STDOUT)
    assert (gap.end, run.closed(), run.dropping()) == (4 << 20, (4 << 20, 0), "")
    assert assert_kept_or_dropped(run, Stream.STDOUT, pattern(4 << 20)) == gap.end - gap.begin
    assert run.gap(Stream.STDOUT, 0, 4 << 20) == gap


def test_a_daemon_told_otherwise_changes_what_its_shims_do(rig: Rig) -> None:
    """Blocked, then dropping, then blocked: each byte is in a gap or in its place."""
    (rig.state / "full").touch()
    size = 12 << 20
    (rig.base / "data").write_bytes(pattern(size))
    rig.stage(
        f"#!/bin/sh\nhead -c {size // 2} {rig.base}/data; while [ ! -e {rig.base}/go ]; do sleep 0.02; done\n"
        f"tail -c {size // 2} {rig.base}/data\n"
    )
    run = rig.start()
    eventually(lambda: run.blocked(), "blocking")
    (rig.state / "drop").touch()
    eventually(lambda: run.lengths().stdout == size // 2, "dropping")
    assert run.blocked() == ""
    (rig.state / "drop").unlink()
    eventually(lambda: not run.dropping(), "the end of the dropping")
    (rig.base / "go").touch()
    eventually(lambda: run.blocked(), "blocking again")
    (rig.state / "full").unlink()
    rig.wait(run, RunState.CLOSED)
    assert 0 < assert_kept_or_dropped(run, Stream.STDOUT, pattern(size)) <= size // 2


@root_only
def test_a_full_file_system_drops_and_goes_on(tmp_path: Path, small_disk: Path) -> None:
    rig = Rig(tmp_path, state=small_disk / "state")
    try:
        (rig.state / "drop").touch()
        data = pattern(12 << 20)
        (tmp_path / "data").write_bytes(data)
        rig.stage(f"#!/bin/sh\ncat {tmp_path}/data; echo end >&2; exit 5\n")
        run = rig.start()
        rig.wait(run, RunState.CLOSED)
        assert (result(run).value, run.closed()) == (5, (len(data), 4))
        assert assert_kept_or_dropped(run, Stream.STDOUT, data) > 4 << 20
        assert "nearly full" in run.gaps(Stream.STDOUT)[0].reason
    finally:
        rig.close()
