"""Both logs, whatever dies when: rendering is a function of journal and raw files, and each line is there once."""

from __future__ import annotations

import datetime
import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.host import said
from tests.host.said import ERR, OTHER, OUT, RUN, SECOND, T
from vmr_agent.host import vmlogs
from vmr_agent.host.firewheel_log import LINE_LIMIT
from vmr_agent.host.logstore import LogStore
from vmr_agent.host.renderer import Renderer, RendererProcess
from vmr_agent.host.vmlogs import VmLogs
from vmr_agent.runs import Ending, Stream

Tell = Callable[[LogStore], object]

WAIT = 20.0


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


def send(store: LogStore, data: bytes, stream: Stream = OUT, *, run: bytes = RUN, at: int = 0) -> None:
    """Output that follows what is held, ``at`` seconds later than T."""
    assert store._life is not None
    offset = store._life._runs[run].streams[stream].held
    for begin in range(0, len(data), 32_000):
        piece = data[begin : begin + 32_000]
        marks = ((len(piece), T + at * SECOND),)
        store.output(said.output(piece, offset + begin, stream, run=run, marks=marks))


def finish(store: LogStore, run: bytes = RUN, *, reason: str = "", **fields: Any) -> None:
    assert store._life is not None
    lengths = [held.held for held in store._life._runs[run].streams.values()]
    store.exit(said.exit(*lengths, run=run, **fields))
    store.sync()
    store.closed(said.closed(*lengths, run=run, reason=reason))


def render(log_dir: Path, *vms: str) -> None:
    """All of it, in this process."""
    reading, writing = os.pipe()
    os.close(writing)
    whole = Renderer(log_dir, vms or ("vm1",))
    try:
        whole.serve(reading)
    finally:
        whole.close()
        os.close(reading)


def log(log_dir: Path, vm: str = "vm1") -> list[str]:
    return [line.partition("] ")[2] for line in (log_dir / f"{vm}.log").read_text().splitlines()]


def rows(log_dir: Path, vm: str = "vm1") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (log_dir / f"{vm}.json").read_text().splitlines()]


def msgs(log_dir: Path) -> list[Any]:
    return [row.get("msg") for row in rows(log_dir)]


def told(log_dir: Path, *what: Tell) -> None:
    """One life in which these things were said, rendered."""
    with opened(log_dir) as store:
        store.run(said.run())
        for tell in what:
            tell(store)
        store.sync()
        render(log_dir)


def eventually(holds: Callable[[], bool]) -> None:
    """Files that aren't there yet count as not holding."""
    deadline = time.monotonic() + WAIT
    while True:
        with suppress(FileNotFoundError):
            if holds():
                return
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- what is shown


def test_a_run_from_its_start_to_its_end(tmp_path: Path) -> None:
    told(
        tmp_path,
        lambda store: send(store, b"first\nsecond\n"),
        lambda store: send(store, b"oops\n", ERR, at=1),
        lambda store: finish(store, value=1),
    )
    assert (tmp_path / "vm1.log").read_text() == (
        "[2024-06-06 00:43:06 GMT INFO] CALL ARGS: /var/launch/-4/compress.py/call_arguments.sh\n"
        "[2024-06-06 00:43:06 GMT INFO] PID returned: 1281\n"
        "[2024-06-06 00:43:06 GMT INFO] compress.py (1281) stdout: b'first\\nsecond\\n'\n"
        "[2024-06-06 00:43:07 GMT INFO] compress.py (1281) stderr: b'oops\\n'\n"
        "[2024-06-06 00:43:08 GMT WARNING] compress.py (1281) exited after 2.074975 seconds with code: 1\n"
    )
    keys = {"vmr": "-4/compress.py", "attempt": 1}
    assert rows(tmp_path) == [
        {"msg": "first", "timestamp": "2024-06-06 00:43:06", **keys, "stream": "stdout"},
        {"msg": "second", "timestamp": "2024-06-06 00:43:06", **keys, "stream": "stdout"},
        {"msg": "oops", "timestamp": "2024-06-06 00:43:07", **keys, "stream": "stderr"},
    ]


def test_times_are_the_hosts(tmp_path: Path) -> None:
    """The guest's clock is a day slow; what it stamped is moved by the difference at Hello."""
    with opened(tmp_path, greet=False) as store:
        store.life(said.hello(wall=T), T + 86_400 * SECOND)
        store.run(said.run())
        send(store, b"line\n", at=1)
        store.sync()
    render(tmp_path)
    assert (tmp_path / "vm1.log").read_text().startswith("[2024-06-07 00:43:06 GMT INFO]")
    assert rows(tmp_path)[0]["timestamp"] == "2024-06-07 00:43:07"


def test_a_silent_run_has_its_start_and_its_end(tmp_path: Path) -> None:
    told(tmp_path, finish)
    assert [line.split(" ")[0] for line in log(tmp_path)] == ["CALL", "PID", "compress.py"]
    assert rows(tmp_path) == []


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        ((b"no newline",), ["b'no newline'"]),
        ((b"two ", b"halves\n"), [r"b'two halves\n'"]),
        ((b"one\ntwo ", b"halves\nthree\n"), [r"b'one\n'", r"b'two halves\n'", r"b'three\n'"]),
        ((b"crlf\r", b"\nnext\n"), [r"b'crlf\r\n'", r"b'next\n'"]),
        ((b"cr\r", b"next\n"), [r"b'cr\r'", r"b'next\n'"]),
        ((b"10%\r", b"20%\r", b"30%\r", b"\n"), [r"b'10%\r'", r"b'20%\r'", r"b'30%\r\n'"]),
        ((b"cr\r", b"\r", b"\r\n"), [r"b'cr\r'", r"b'\r'", r"b'\r\n'"]),
        ((b"in the middle\rof", b" it\n"), [r"b'in the middle\r'", r"b'of it\n'"]),
        ((b"last\r",), [r"b'last\r'"]),
        ((b"a", b"b", b"c\rd", b"\n\n"), [r"b'abc\r'", r"b'd\n'", r"b'\n'"]),
        ((b"\xef\n",), [r"b'\xef\n'"]),
        ((b"\x1b[31m'\"\n",), [r"""b'\x1b[31m\'"\n'"""]),
    ],
)
def test_lines_are_shown_whole(tmp_path: Path, pieces: tuple[bytes, ...], shown: list[str]) -> None:
    def all_pieces(store: LogStore) -> None:
        for piece in pieces:
            send(store, piece)

    told(tmp_path, all_pieces, finish)
    assert [line.partition(": ")[2] for line in log(tmp_path)[2:-1]] == shown
    split = b"".join(pieces).splitlines()
    assert msgs(tmp_path) == [line.decode("utf-8", "backslashreplace") for line in split if line.strip()]


def test_the_streams_of_a_run_and_two_runs_do_not_mix(tmp_path: Path) -> None:
    def tell(store: LogStore) -> None:
        store.run(said.run(b"-4/other", run=OTHER, pid=5))
        send(store, b"out ")
        send(store, b"err ", ERR)
        send(store, b"other ", run=OTHER)
        send(store, b"1\n")
        send(store, b"2\n", ERR)
        send(store, b"3\n", run=OTHER)

    told(tmp_path, tell)
    assert msgs(tmp_path) == ["out 1", "err 2", "other 3"]
    assert log(tmp_path)[-1] == r"other (5) stdout: b'other 3\n'"


def test_a_part_of_a_line_waits_until_it_is_to_be_shown(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        send(store, b"password: ")
        store.sync()
        render(tmp_path)
        assert msgs(tmp_path) == []
        store.flush_line(RUN, OUT)
        store.sync()
        render(tmp_path)
        assert msgs(tmp_path) == ["password:"]
        send(store, b"ok\n")
        finish(store)
        store.sync()
        render(tmp_path)
    assert msgs(tmp_path) == ["password:", "ok"]
    assert [line.partition(": ")[2] for line in log(tmp_path)[2:4]] == ["b'password: '", r"b'ok\n'"]


def test_an_exit_waits_for_the_bytes_it_counts(tmp_path: Path) -> None:
    told(
        tmp_path,
        lambda store: send(store, b"before\n"),
        lambda store: store.exit(said.exit(13, 5)),
        lambda store: send(store, b"late", ERR),
        lambda store: send(store, b"after\n"),
        lambda store: send(store, b"r", ERR),
        lambda store: send(store, b"from a daemon left behind\n"),
    )
    assert [line.split(" ", 2)[2][:12] for line in log(tmp_path)[2:]] == [
        "stdout: b'be",
        "stdout: b'af",
        "stderr: b'la",
        "exited after",
        "stdout: b'fr",
    ]
    assert "later" in msgs(tmp_path)


@pytest.mark.parametrize("ending", list(Ending))
def test_an_end_of_capture_is_said_once(tmp_path: Path, ending: Ending) -> None:
    """A lost run's exit line has said it, also when the logs were noted in between."""
    with opened(tmp_path) as store:
        store.run(said.run())
        store.exit(said.exit(ending=ending.value, value=1, text="its shim died"))
        store.sync()
        render(tmp_path)
        store.closed(said.closed(reason="its shim died"))
        store.sync()
    render(tmp_path)
    said_so = [line for line in log(tmp_path) if "capture ended early" in line]
    assert len(said_so) == (0 if ending is Ending.LOST else 1)


def test_a_gap_is_named(tmp_path: Path) -> None:
    told(
        tmp_path,
        lambda store: send(store, b"cut he"),
        lambda store: store.gap(said.gap(6, 1000)),
        lambda store: send(store, b"re\n"),
        finish,
    )
    assert log(tmp_path)[2:-1] == [
        "compress.py (1281) stdout: b'cut he'",
        "compress.py (1281) stdout: 1000 bytes from byte 6 on are missing: the spool was full",
        r"compress.py (1281) stdout: b're\n'",
    ]


def test_a_gap_bears_the_time_at_which_it_began(tmp_path: Path) -> None:
    """Not that of the last line before it, which may be an hour old."""
    told(
        tmp_path,
        lambda store: send(store, b"before\n"),
        lambda store: store.gap(said.gap(7, 1000, wall=said.T + 3600 * said.SECOND)),
        lambda store: store.exit(said.exit(1007, ended=said.T + 7200 * said.SECOND)),
        lambda store: store.closed(said.closed(1007)),
    )
    lines = (tmp_path / "vm1.log").read_text().splitlines()
    stamps = [line[1:20] for line in lines if "before" in line or "missing" in line or "exited" in line]
    first, second, third = (datetime.datetime.strptime(each, "%Y-%m-%d %H:%M:%S") for each in stamps)
    assert (second - first, third - first) == (datetime.timedelta(hours=1), datetime.timedelta(hours=2))


def test_a_line_too_long_is_cut_once_and_says_where_the_rest_is(tmp_path: Path) -> None:
    size = 3 * LINE_LIMIT + 17
    told(
        tmp_path,
        lambda store: send(store, b"before\n" + b"x" * size + b"\nafter\n"),
        lambda store: send(store, b"y" * (LINE_LIMIT + 1)),
        finish,
    )
    lines = log(tmp_path)
    notes = [line for line in lines if "a line is cut here" in line]
    path = "vm1/-4/compress.py/1/stdout"
    assert [note.partition("in ")[2] for note in notes] == [
        f"{path} from byte 7 on",
        f"{path} from byte {7 + size + 7} on",
    ]
    assert [len(line) for line in lines if "b'xx" in line] == [
        LINE_LIMIT + len("compress.py (1281) stdout: b''")
    ]
    assert [row["msg"][:6] for row in rows(tmp_path)] == ["before", "xxxxxx", "after", "yyyyyy"]
    assert [row.get("cut") for row in rows(tmp_path)] == [None, path, None, path]


def test_a_line_as_long_as_may_be_is_whole(tmp_path: Path) -> None:
    told(tmp_path, lambda store: send(store, b"x" * (LINE_LIMIT - 1) + b"\n"), finish)
    assert [len(row["msg"]) for row in rows(tmp_path)] == [LINE_LIMIT - 1]
    assert "cut" not in rows(tmp_path)[0]


def test_more_output_than_firewheel_could_take(tmp_path: Path) -> None:
    lines = [f"line {number} of a program that says much" for number in range(250_000)]
    data = "".join(f"{line}\n" for line in lines).encode()
    assert len(data) > 7.5 * 2**20
    told(tmp_path, lambda store: send(store, data), finish)
    assert msgs(tmp_path) == lines
    shown = [line.partition("stdout: b'")[2][:-1] for line in log(tmp_path) if "stdout: " in line]
    assert "".join(shown).replace("\\n", "\n").encode() == data


def test_reboots_and_new_lives_are_named(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        send(store, b"left open")
        store.life(said.hello(boot="second boot"), T)
        store.life(said.hello(boot="second boot", boottime=90 * SECOND), T)
        store.life(said.hello(spool=b"2" * 16), T + SECOND)
        store.run(said.run())
        send(store, b"new\n")
        store.sync()
        render(tmp_path)
    starts = ["CALL ARGS: /var/launch/-4/compress.py/call_arguments.sh", "PID returned: 1281"]
    assert log(tmp_path) == [
        *starts,
        "the VM has booted again",
        "compress.py (1281) stdout: b'left open'",
        f"a new life of this VM begins (spool {'32' * 16})",
        *starts,
        r"compress.py (1281) stdout: b'new\n'",
    ]


def test_what_is_not_durable_is_not_shown(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        send(store, b"durable\n")
        sync = store.begin_sync()
        assert sync is not None
        send(store, b"not yet\n")
        sync.sync()
        store.finish_sync(sync)
        render(tmp_path)
        assert msgs(tmp_path) == ["durable"]
        store.sync()
        render(tmp_path)
        assert msgs(tmp_path) == ["durable", "not yet"]


def test_logs_that_were_there_before_stay(tmp_path: Path) -> None:
    (tmp_path / "vm1.log").write_text("of an earlier experiment\n")
    (tmp_path / "vm1.json").write_text('{"msg": "earlier"}\n')
    told(tmp_path, lambda store: send(store, b"line\n"))
    assert (tmp_path / "vm1.log").read_text().startswith("of an earlier experiment\n[2024-")
    assert msgs(tmp_path) == ["earlier", "line"]


def test_a_raw_file_removed_hurts_no_other_line(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        store.run(said.run(b"-4/other", run=OTHER))
        send(store, b"gone\n")
        send(store, b"here\n", run=OTHER)
        finish(store)
        store.sync()
        (tmp_path / "vm1" / "-4" / "compress.py" / "1" / "stdout").unlink()
        render(tmp_path)
    assert msgs(tmp_path) == ["here"]
    assert "exited after" in log(tmp_path)[-1]


# --- exactly once


def experiment(log_dir: Path, seed: int) -> None:
    """Two lives of what guests do, with marks here and there."""
    chance = random.Random(seed)
    pieces = [
        b"x",
        b"plain line\n",
        b"\r",
        b"\n",
        b"\r\n",
        b"a\rb\n",
        b"42\n",
        b'{"a": 1}\n',
        b"\xef",
        b"y" * 700,
    ]
    with opened(log_dir) as store:
        for spool in (said.SPOOL, b"2" * 16):
            store.life(said.hello(spool=spool), T)
            live = []
            for number in range(4):
                run = bytes((number,)) * 16
                store.run(said.run(b"-4/%d" % number, run=run))
                live.append(run)
                for _ in range(chance.randrange(15)):
                    each, stream = chance.choice(live), chance.choice(list(Stream))
                    act = chance.random()
                    assert store._life is not None
                    held = store._life._runs[each].streams[stream].held
                    if act < 0.7:
                        data = b"".join(chance.choices(pieces, k=chance.randrange(1, 9)))
                        send(store, data, stream, run=each, at=chance.randrange(3))
                    elif act < 0.8:
                        store.flush_line(each, stream)
                    elif act < 0.85:
                        store.gap(said.gap(held, 5, stream, run=each))
                    elif act < 0.9 and len(live) > 1:
                        ending = chance.choice(list(Ending))
                        finish(store, live.pop(live.index(each)), ending=ending.value, reason="its shim died")
                    if chance.random() < 0.3:
                        store.sync()
            store.sync()


def both(log_dir: Path) -> tuple[bytes, bytes]:
    return (log_dir / "vm1.log").read_bytes(), (log_dir / "vm1.json").read_bytes()


class Stopped(Exception):
    pass


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_a_rendering_stopped_anywhere_ends_as_one_that_was_not(
    tmp_path_factory: pytest.TempPathFactory, seed: int, data: st.DataObject
) -> None:
    """Killed after some record or in the middle of a write; what was not synced may be gone, in any length."""
    whole, stopped = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("stopped")
    experiment(whole, seed)
    shutil.copytree(whole, stopped, dirs_exist_ok=True)
    render(whole)
    for _ in range(data.draw(st.integers(1, 5))):
        stopping = Renderer(stopped, ["vm1"])
        part = stopping._logs["vm1"]
        budget = data.draw(st.integers(0, 60))
        real, count = part._record, 0

        def record(
            kind: int, content: bytes, part: Any = part, budget: int = budget, real: Any = real
        ) -> None:
            nonlocal count
            if count == budget:
                part._write()
                raise Stopped
            count += 1
            real(kind, content)

        part._record = record  # type: ignore[method-assign]
        try:
            while part.step():
                if not part.waiting and data.draw(st.booleans()):
                    part.sync_logs()
                    part.write_note(sync=True)
                    part.commit_note()
        except Stopped:
            pass
        stopping.close()
        note = json.loads((stopped / ".vm1.rendered").read_bytes())
        for name, synced in (("vm1.log", note["log"]), ("vm1.json", note["json"])):
            size = (stopped / name).stat().st_size
            os.truncate(stopped / name, data.draw(st.integers(synced, max(size, synced))))
    render(stopped)
    assert both(stopped) == both(whole)


@pytest.mark.parametrize("size", [1, 100, 5000])
def test_rendering_in_small_turns_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    whole, turns = tmp_path / "whole", tmp_path / "turns"
    experiment(whole, 1)
    shutil.copytree(whole, turns)
    render(whole)
    monkeypatch.setattr(vmlogs, "SLICE", size)
    render(turns)
    assert both(turns) == both(whole)


def test_a_renderer_killed_again_and_again_shows_each_line_once(tmp_path: Path) -> None:
    chance = random.Random(5)
    lines = 0
    with opened(tmp_path) as store:
        store.run(said.run())
        process = RendererProcess(tmp_path, ["vm1"])
        for _ in range(6):
            for _ in range(20):
                more = chance.randrange(1, 300)
                send(store, b"".join(b"line %d\n" % number for number in range(lines, lines + more)))
                lines += more
                store.sync()
                process.wake()
                time.sleep(chance.random() * 0.02)
            os.kill(process.pid, signal.SIGKILL)
            eventually(lambda: not process.alive())
            process.restart()
        finish(store)
        store.sync()
        assert process.close(WAIT)
    assert msgs(tmp_path) == [f"line {number}" for number in range(lines)]
    shown = [line.partition("stdout: b'")[2][:-1] for line in log(tmp_path) if "stdout: " in line]
    assert "".join(shown).split("\\n")[:-1] == [f"line {number}" for number in range(lines)]
    assert len(log(tmp_path)) == len(shown) + 3


# --- the process


def test_what_is_marked_is_shown_soon(tmp_path: Path) -> None:
    with opened(tmp_path, "vm1") as one, opened(tmp_path, "vm2") as two:
        process = RendererProcess(tmp_path, ["vm1", "vm2"])
        try:
            for wake in ([], ["vm2"], ["vm1", "vm2"]):
                for store in (one, two):
                    run = os.urandom(16)
                    store.run(said.run(b"5/%s" % run.hex().encode(), run=run))
                    send(store, run.hex().encode() + b" shown\n", run=run)
                    store.sync()
                process.wake(wake)
                eventually(lambda: run.hex() in (tmp_path / "vm2.log").read_text())
        finally:
            assert process.close(WAIT)
    assert not process.alive()
    assert len(msgs(tmp_path)) == 3, "at its end it looks at every VM"


def test_wakes_never_block_and_none_is_lost(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        process = RendererProcess(tmp_path, ["vm1", "vm2"])
        store.run(said.run())
        send(store, b"line\n")
        try:
            os.kill(process.pid, signal.SIGSTOP)
            for _ in range(100_000):
                process.wake(["vm2"])
            store.sync()
            process.wake(["vm1"])
            os.kill(process.pid, signal.SIGCONT)
            eventually(lambda: len(rows(tmp_path)) == 1)
        finally:
            os.kill(process.pid, signal.SIGCONT)
            assert process.close(WAIT)


def test_what_lies_in_the_working_directory_is_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collector is started anywhere, as root even, and says where its logs and modules are as seen from there."""
    anywhere = tmp_path / "anywhere"
    (anywhere / "lib").mkdir(parents=True)
    for name in ("json", "vmr_agent", "lib/sitecustomize"):
        (anywhere / f"{name}.py").write_text(f"open({str(tmp_path)!r} + '/' + {name[-4:]!r}, 'w')\n")
    monkeypatch.chdir(anywhere)
    monkeypatch.setenv("PYTHONPATH", "lib")
    with opened(Path("logs")) as store:
        process = RendererProcess(Path("logs"), ["vm1"])
        store.run(said.run())
        send(store, b"line\n")
        store.sync()
        assert process.close(WAIT)
    assert (tmp_path / "mize").exists(), "it is where the caller said that modules are"
    assert not (tmp_path / "json").exists() and not (tmp_path / "gent").exists()
    assert msgs(anywhere / "logs") == ["line"]


def test_an_idle_renderer_sleeps(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        store.sync()
        process = RendererProcess(tmp_path, ["vm1"])
        try:
            eventually(lambda: len(log(tmp_path)) == 2)
            eventually(lambda: json.loads((tmp_path / ".vm1.rendered").read_bytes())["log"] > 0)

            def switches() -> int:
                status = Path(f"/proc/{process.pid}/status").read_text()
                return sum(int(line.split()[1]) for line in status.splitlines() if "ctxt_switches" in line)

            before = switches()
            time.sleep(2.5)
            assert switches() - before <= 2
        finally:
            assert process.close(WAIT)


def test_signals_meant_for_the_collector_do_not_end_it_early(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.run(said.run())
        send(store, b"first\n")
        store.sync()
        process = RendererProcess(tmp_path, ["vm1"])
        eventually(lambda: len(rows(tmp_path)) == 1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(process.pid, number)
        send(store, b"last\n")
        store.sync()
        assert process.close(WAIT)
    assert msgs(tmp_path) == ["first", "last"]


def test_a_new_renderer_waits_for_the_old_one(tmp_path: Path) -> None:
    """After a collector was killed its renderer goes on to the end, while a new collector starts another."""
    with opened(tmp_path) as store:
        store.run(said.run())
        send(store, b"first\n")
        store.sync()
        old = RendererProcess(tmp_path, ["vm1"])
        eventually(lambda: len(rows(tmp_path)) == 1)
        os.kill(old.pid, signal.SIGSTOP)
        new = RendererProcess(tmp_path, ["vm1"])
        try:
            send(store, b"second\n")
            store.sync()
            new.wake()
            time.sleep(0.3)
            assert msgs(tmp_path) == ["first"]
            os.kill(old.pid, signal.SIGCONT)
            assert old.close(WAIT)
            eventually(lambda: msgs(tmp_path) == ["first", "second"])
        finally:
            os.kill(old.pid, signal.SIGCONT) if old.alive() else None
            assert new.close(WAIT)
    assert msgs(tmp_path) == ["first", "second"]


def test_logs_that_cannot_be_written_wait_for_room(tmp_path: Path) -> None:
    lines = [f"line {number}" for number in range(5000)]
    with opened(tmp_path) as store:
        store.run(said.run())
        process = RendererProcess(tmp_path, ["vm1"])
        limits = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            send(store, "".join(f"{line}\n" for line in lines).encode())
            finish(store)
            store.sync()
            process.wake()
            eventually(lambda: (tmp_path / "vm1.json").stat().st_size >= 10_000)
            time.sleep(1.2)
            assert process.alive() and (tmp_path / "vm1.json").stat().st_size == 10_000
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
        finally:
            assert process.close(WAIT)
    assert msgs(tmp_path) == lines
    assert "exited after" in log(tmp_path)[-1]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_logs_whose_sync_failed_are_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The kernel says so once and calls them clean; file systems that take space late say it only here."""
    sync = VmLogs.sync_logs
    failures = [number]

    def fails_once(logs: VmLogs) -> None:
        if failures and b"two" in (tmp_path / "vm1.log").read_bytes():
            # What the page cache has and the disk will never have.
            for kind in ("log", "json"):
                size = (tmp_path / f"vm1.{kind}").stat().st_size
                (tmp_path / f"vm1.{kind}").write_bytes(b"\0" * size)
            raise OSError(failures.pop(), "it failed")
        sync(logs)

    monkeypatch.setattr(VmLogs, "sync_logs", fails_once)
    told(tmp_path, lambda store: send(store, b"one\ntwo\n"), finish)
    assert failures == [] and "one" in msgs(tmp_path) and "two" in msgs(tmp_path)


def test_one_vm_with_damaged_files_hurts_no_other(tmp_path: Path) -> None:
    with opened(tmp_path, "vm1") as one, opened(tmp_path, "vm2") as two:
        for store in (one, two):
            store.run(said.run())
            send(store, b"line\n")
            store.sync()
        (tmp_path / ".vm1.rendered").write_bytes(b"{")
        process = RendererProcess(tmp_path, ["vm1", "vm2"])
        try:
            eventually(lambda: len(rows(tmp_path, "vm2")) == 1)
            (tmp_path / ".vm1.rendered").unlink()
            eventually(lambda: len(rows(tmp_path, "vm1")) == 1)
        finally:
            assert process.close(WAIT)


def test_many_vms_share_their_syncs(tmp_path: Path) -> None:
    vms = [f"vm{number}" for number in range(40)]
    for vm in vms:
        with opened(tmp_path, vm) as store:
            store.run(said.run())
            send(store, b"line\n")
            store.sync()
    render(tmp_path, *vms)
    for vm in vms:
        note = json.loads((tmp_path / f".{vm}.rendered").read_bytes())
        assert note["json"] == (tmp_path / f"{vm}.json").stat().st_size > 0


def test_a_rolled_back_store_and_its_renderer_agree(tmp_path: Path) -> None:
    """After a failed sync the journal is cut to its last mark and goes on from there with other records."""
    with opened(tmp_path) as store:
        store.run(said.run())
        process = RendererProcess(tmp_path, ["vm1"])
        try:
            send(store, b"durable\n")
            store.sync()
            process.wake()
            eventually(lambda: len(rows(tmp_path)) == 1)
            for number in range(20):
                send(store, b"lost %d\n" % number)
            raw = tmp_path / "vm1" / "-4" / "compress.py" / "1" / "stdout"
            sync = store.begin_sync()
            assert sync is not None
            raw.rename(raw.with_name("elsewhere"))
            sync.sync()
            raw.with_name("elsewhere").rename(raw)
            with pytest.raises(OSError):
                store.finish_sync(sync)
            process.wake()
            store.life(said.hello(), T)
            send(store, b"sent again\n")
            finish(store)
            store.sync()
        finally:
            assert process.close(WAIT)
    assert msgs(tmp_path) == ["durable", "sent again"]
