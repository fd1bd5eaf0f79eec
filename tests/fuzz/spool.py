"""Target: the guest's spool, found on disk with anything in its files: what is recovered is the same each time.

Whatever a power cut, a failing disk or an administrator left there, the daemon must start, and what it sends of a
run must be a message.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tests.fuzz.given import Given
from vmr_agent.errors import Problem
from vmr_agent.guest.shim import GAP
from vmr_agent.guest.shipper import Shipper
from vmr_agent.guest.spool import RECORD, Lengths, Run, Spool
from vmr_agent.runs import RunState, Stream
from vmr_agent.wire import messages
from vmr_agent.wire.session import PROTOCOL, Role, Session

_RUN = "ab" * 16
_INFO: dict[str, Any] = {
    **{"run": _RUN, "vmr": "-4/a", "attempt": 1, "trigger": "schedule", "boot_id": "boot", "created_ns": 5},
    **{"request": "", "script": [1, 2, 3], "holds": True, "number": 0},
}
_PROCESS = {"pid": 4_194_304, "ticks": 9, "boot_id": "boot", "wall_ns": 10**18, "boottime_ns": 10**9}
_STARTED = {"process": _PROCESS, "run": _INFO}
_EXIT = {
    **{
        "ending": "code",
        "value": 0,
        "text": "",
        "started_ns": 10**18,
        "ended_ns": 10**18 + 5,
        "boot_id": "boot",
    },
    **{"started_boottime_ns": 10**9, "ended_boottime_ns": 2 * 10**9, "stdout": 6, "stderr": 0, "user_s": 0.5},
    **{"system_s": 0.25, "max_rss_bytes": 4_096, "asks_reboot": False, "closed": False},
}
_INDEX = RECORD.pack(0, 10**18, 4, 1) + RECORD.pack(0, 10**18, 3, 2) + RECORD.pack(4, 10**18, 2, 1)
_ZERO = {"boot_id": "boot", "boottime_ns": 5, "wall_ns": 10**18, "source": "host"}
_HERE = "runs/-4/a/1"
_FILES: dict[str, Any] = {
    f"{_HERE}/run.json": _INFO,
    f"{_HERE}/started": _STARTED,
    f"{_HERE}/stdout": b"out\nx\n",
    f"{_HERE}/stderr": b"err",
    f"{_HERE}/index": _INDEX,
    f"{_HERE}/exit.json": _EXIT,
    f"{_HERE}/closed": {"stdout": 6, "stderr": 3, "reason": "its shim was killed"},
    f"{_HERE}/starting": _STARTED,
    f"{_HERE}/exit.json.new": _EXIT,
    f"{_HERE}/files.json": {
        "at_ns": 5,
        "files": {"call_arguments.sh": [33_261, 0, 10, 7, 10**18, 10**18, "", "0"]},
    },
    f"{_HERE}/gaps": GAP.pack(1, 2, 10**18, 1, 1, 0),
    f"{_HERE}/notes": b'"kill 1"\n',
    "runs/-4/a/gone": {"after_attempt": 1},
    "spool.json": {"id": "cd" * 16},
    "zero.json": _ZERO,
    "configured": {},
    "full": b"",
}
_VALUES: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        7,
        2**31,
        2**63,
        10**30,
        1.5,
        1e308,
        float("inf"),
        float("nan"),
        "",
        "text",
        "\udcff",
    ),
    *(
        "\ud800",
        "../../../../outside",
        "-4/" + "n" * 4_096,
        "a\0b",
        "ab" * 16,
        [],
        [1, 2, 3],
        {},
        {"a": 1},
        "\x1b[m",
    ),
]
SEEDS = [b"", bytes(range(16)), b"\x02" * 16, b"\x01" * 7 + b"\x00" * 9, b"\x03\x05\x07" * 9]
_BASE = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where a sync costs nothing


def check(data: bytes) -> None:
    top = Path(tempfile.mkdtemp(prefix="vmr-fuzz-", dir=_BASE))
    try:
        outside = top / "outside"
        outside.mkdir()
        (outside / "precious").write_bytes(b"precious")
        state = top / "state"
        _make(state, Given(data))
        _recover(state)
        first = _recover(
            state
        )  # the first time puts back links that were missing, once it was asked for a run
        left = _tree(state)
        assert _recover(state) == first, "what is recovered is the same each time"
        assert _tree(state) == left, "recovery of what is recovered changes nothing"
        _acked_and_pruned(state)
        _recover(state)
        assert _tree(outside) == {"precious": b"precious"} and {"outside", "state"} == set(os.listdir(top))
    finally:
        shutil.rmtree(top)


def _make(state: Path, given: Given) -> None:
    (state / _HERE).mkdir(parents=True, mode=0o700)
    state.chmod(0o700)
    (state / "open").mkdir()
    (state / "lock").touch()
    target = given.pick((f"../{_HERE}", "../runs/-4/a/2", "../../outside", "..", "../runs", "x" * 300))
    with contextlib.suppress(OSError):
        (state / "open" / given.pick((_RUN, "ab", "ef" * 16))).symlink_to(target)
    for name, usual in _FILES.items():
        content = _content(given, usual)
        if content is not None:
            (state / name).write_bytes(content)
    for name in ("blocked", "failed", "pruned"):
        if given.byte() & 1:
            word = given.pick(
                ("4096 0", "-1 2", "99999999999999999999 0", given.text().replace("\0", "")[:99], "1")
            )
            (state / _HERE / name).symlink_to(word or "x")


def _content(given: Given, usual: Any) -> Any:
    """Cases: as it should be; not there; anything; cut; empty; a value that is not what it should be."""
    whole = usual if isinstance(usual, bytes) else json.dumps(usual).encode() + b"\n"
    act = given.byte() % 8
    if act < 2:
        return whole
    if act == 2:
        return None
    if act == 3:
        return given.blob()
    if act == 4:
        return whole[: given.byte()]
    if act == 5:
        return given.pick(
            (b"", b"[" * 200_000, b"\0" * 64, b"{}", b"null", b"\xff\xfe", b'{"a":' * 9_000, b"9" * 9_999)
        )
    if isinstance(usual, bytes):
        at = given.byte() % (len(usual) + 1)
        return usual[:at] + given.blob() + usual[at + given.byte() % 8 :]
    row: dict[str, Any] = json.loads(whole)
    inner = row
    if isinstance(row.get("process"), dict) and given.byte() & 1:
        inner = row["process"]
    key = given.pick([*inner, "other"])
    if given.byte() & 1:
        inner.pop(key, None)
    else:
        inner[key] = given.pick(_VALUES)
    return json.dumps(row).encode()


def _recover(state: Path) -> Any:
    """What a daemon finds, asked as it asks, and what it would send."""
    try:
        spool = Spool(state)
    except Problem as problem:
        return str(problem)
    try:
        runs = spool.open_runs()
        found: list[Any] = [spool.id, spool.zero(), spool.configured()]
        for run in runs:
            run.recover()
            if run.started() is not None and run.result() is None:
                run.write_lost("the VM went down before it was over", stdout=0, stderr=0)
            elif run.result() is not None and run.closed() is None:
                run.write_closed("its shim was killed")
            found.append(_asked(run))
        latest = spool.latest(b"-4/a")
        found += [spool.names(), spool.gone(b"-4/a"), latest and latest.info, spool.enforce({})]
        found += [[each.info for each in spool.runs_of(b"-4/a")], spool.edited(b"-4/a", b"/nowhere")]
        found.append(_sent(spool.open_runs()))
        return found
    finally:
        spool.close()


def _asked(run: Run) -> Any:
    lengths = run.lengths()
    answers: list[Any] = [run.info, run.started(), run.result(), run.closed(), run.close_reason(), lengths]
    for stream in Stream:
        size = lengths.of(stream)
        if size and (run.path / stream.filename).exists():
            marks = run.marks(stream, 0, size)
            assert sum(length for length, _ in marks) == size and all(length > 0 for length, _ in marks)
            later = run.marks(stream, size // 2, size - size // 2)
            assert sum(length for length, _ in later) == size - size // 2
            answers.append(run.read(stream, 0, size))
            assert len(answers[-1]) == size
        answers.append(run.pruned(stream))
    place = 0
    for capture in run.captured(0):
        assert capture.place >= place
        place = capture.place
    answers += [run.gaps(stream) for stream in Stream]
    return [
        *answers,
        run.dropped(),
        run.dropping(),
        run.blocked(),
        run.failure(),
        run.remembered("kill 1"),
        run.usage() >= 0,
        run.locked(),
    ]


def _sent(runs: list[Run]) -> list[messages.Message]:
    """All that a host, which holds nothing, would be told of them; it acknowledges everything."""
    shipper = Shipper(b"/var/launch")
    for run in runs:
        shipper.add(run)
    session, host = _connected()
    told: list[messages.Message] = []
    for _ in range(200):
        frames = shipper.next(session)
        if not frames:
            return told
        for frame in frames:
            (message,) = host.receive(frame, 0)
            told.append(message)  # type: ignore[arg-type]
            if isinstance(message, messages.Run):
                shipper.ack(messages.Ack(message.run, int(RunState.NONE), 0, 0, ((0, 0), (0, 0))))
    raise AssertionError("it is told without end")


def _connected() -> tuple[Session, Session]:
    def make(role: Role) -> Session:
        return Session(
            role,
            introduce=lambda own, peer: messages.Hello(
                own, peer, role.value, PROTOCOL, "1.0", 5, spool=b"s" * 16
            ),
            beat=lambda: messages.Heartbeat(wall=5),
            make_id=lambda: role.value.encode().ljust(8),
        )

    guest, host = make(Role.GUEST), make(Role.HOST)
    guest.connect(0)
    host.connect(0)
    for _ in range(3):
        for frame in guest.take():
            host.receive(frame, 0)
        for frame in host.take():
            guest.receive(frame, 0)
    assert guest.open and host.open
    return guest, host


def _acked_and_pruned(state: Path) -> None:
    """The host has it all, and room is wanted: nothing that is known of a run goes."""
    with contextlib.suppress(Problem):
        spool = Spool(state, limit=1)
        try:
            for run in spool.open_runs():
                final = run.closed()
                if final is not None:
                    run.prune(Lengths(min(final.stdout, 1 << 20), min(final.stderr, 1 << 20)), whole=False)
        finally:
            spool.close()


def _tree(directory: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(directory.rglob("*")):
        name = os.fspath(path.relative_to(directory))
        if path.is_symlink():
            found[name] = os.fsencode(os.readlink(path))
        elif path.is_file():
            found[name] = path.read_bytes()
    return found
