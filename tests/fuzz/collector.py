"""Target: the collector's end of one VM: bytes and messages in any order, syncs, restarts of either side.

Whatever comes: only its own errors; nothing outside the VM's directory; what it acknowledged is in the files, stays
there, and is known again after a restart; both logs can be rendered, and no line in them is forged.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any, Optional

from tests.fuzz.given import Given
from vmr_agent.host import collector
from vmr_agent.host.logstore import LogStore
from vmr_agent.host.vmlogs import RawFiles, VmLogs
from vmr_agent.runs import RunState
from vmr_agent.wire import framing, messages
from vmr_agent.wire.session import PROTOCOL

_BASE = "/dev/shm" if Path("/dev/shm").is_dir() else None
_RUNS = [bytes((number,)) * 16 for number in range(4)]
_VMRS = [
    b"-4/a",
    b"1/b",
    b"-4/..",
    b"-4/a/b",
    b"2.5/\n\x1b[31m[2024-06-06 00:43:06 GMT INFO] fake",
    b"-4/" + b"n" * 250,
]
_SPOOLS = [b"s" * 16, b"t" * 16]
_KINDS: list[Any] = [
    *(
        messages.Run,
        messages.Output,
        messages.Output,
        messages.Output,
        messages.Gap,
        messages.Exit,
        messages.Closed,
    ),
    *(messages.Vmr, messages.Heartbeat, messages.Reply),
]
_LINE = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S+ (INFO|WARNING)\] [^\x00-\x1f\x7f]*")
QUOTA = 256 * 1024  # little enough to get there
SEEDS = [
    b"",
    b"\x00\x00" + bytes((2, 0, 0, 0)) * 20 + b"\x05\x06\x00",
    b"\x00\x00\x02\x00\x00\x00\x02\x01\x00\x01\x00\x05hello\x03\x02\x05\x00\x01\x06\x07" * 3,
    b"\x01\x7f" + b"\xc9\x00\x00" * 9,
]


def check(data: bytes) -> None:
    top = Path(tempfile.mkdtemp(prefix="vmr-fuzz-", dir=_BASE))
    loop = asyncio.new_event_loop()
    said: list[str] = []
    say, collector.say = collector.say, said.append
    try:
        loop.run_until_complete(_drive(top, Given(data)))
        for line in said:
            assert "Traceback" not in line, line
            assert line.isprintable(), line
        _render(top / "logs")
        assert os.listdir(top) == ["logs"]
        for name in os.listdir(top / "logs"):
            assert re.fullmatch(r"vm|vm~\d+|vm\.(log|json)|\.vm\.(lock|rendered)", name), name
    finally:
        collector.say = say
        loop.close()
        shutil.rmtree(top)


async def _drive(top: Path, given: Given) -> None:
    played = _Played(top / "logs")
    try:
        for _ in range(100):
            if not given.left:
                break
            played.act(given)
        played.sync()
        played.restart(clean=True)
        played.compare()
    finally:
        played.close()


class _Played:
    """One VM's guest, who may say anything, and the host's state from the outside."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.theirs: Optional[socket.socket] = None
        self.n = 0
        self.offset = 0
        self.acked: dict[bytes, messages.Ack] = {}
        self.stored: dict[bytes, tuple[bytes, bytes]] = {}
        self.paths: dict[tuple[int, bytes], str] = {}
        self.life = 0
        self.start()

    def start(self) -> None:
        self.made = collector.Collector(self.logs, [], control_path=self.logs / "control")
        self.store = LogStore(self.logs, "vm", log=collector.say, limit=QUOTA)
        source = collector.Source("vm", self.logs / "socket")
        self.guest = self.made.guests["vm"] = collector.Guest(source, self.store, self.made)

    def close(self) -> None:
        self.disconnect()
        self.guest.chardev.close()
        self.store.close()

    def act(self, given: Given) -> None:
        act = given.byte() % 16
        if act == 0:
            self.hello(given)
        elif act == 1:
            self.say(given.blob())
        elif act == 2:
            self.disconnect()
        elif act in (3, 6, 7):
            self.sync()
            self.compare()
        elif act == 4:
            self.restart(clean=bool(given.byte() & 1))
        elif act == 8:
            quota = self.store.quota
            quota.limit = given.pick((QUOTA, QUOTA, 1))  # somebody changes his mind
            self.guest._measured(quota.measure(), quota.disk)
            if self.theirs is not None:
                self.hear()
        elif act == 5:
            self.guest._held_lines.update(dict.fromkeys(self.guest._held_lines, 0.0))  # a second goes by
            self.guest._show_lines()
        else:
            self.message(given)

    def connect(self) -> None:
        if self.theirs is None:
            ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            ours.setblocking(False)
            self.theirs.setblocking(False)
            self.guest._sessions = collector._Budget(collector.SESSIONS)  # a second goes by, too
            self.guest.chardev._take(ours)
            self.hear()

    def disconnect(self) -> None:
        if self.theirs is not None:
            self.theirs.close()
            self.theirs = None
            if self.guest.chardev._sock is not None:
                self.guest.chardev._lost("the test")

    def say(self, data: bytes) -> None:
        self.connect()
        assert self.theirs is not None
        self.theirs.sendall(data)
        while not self._drained():
            self.guest.chardev._read()
        self.hear()

    def _drained(self) -> bool:
        sock = self.guest.chardev._sock
        if sock is None:
            return True
        try:
            return not sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True

    def hear(self) -> None:
        """What the host says: each Ack must be true."""
        assert self.theirs is not None
        heard = b""
        while True:
            try:
                data = self.theirs.recv(1 << 18)
            except BlockingIOError:
                break
            if not data:
                break
            heard += data
        for payload in framing.Decoder().feed(heard):
            assert isinstance(payload, bytes), "the host says garbage"
            message = messages.unpack(payload).message
            if isinstance(message, messages.Ack):
                self.believe(message)
        if self.guest.chardev._sock is None:
            self.disconnect()

    def believe(self, ack: messages.Ack) -> None:
        self.notice_life()
        key = ack.run
        before = self.acked.get(key)
        if before is not None:
            assert ack.state >= before.state, (before, ack)
            assert ack.stdout >= before.stdout and ack.stderr >= before.stderr, (before, ack)
        self.acked[key] = ack
        where = self.where(ack.run)
        if where is None:
            return
        out, err = (self.raw(where, name) for name in ("stdout", "stderr"))
        assert len(out) >= ack.stdout and len(err) >= ack.stderr, "acknowledged is stored"
        was = self.stored.get(key, (b"", b""))
        assert out.startswith(was[0]) and err.startswith(was[1]), "what is acknowledged never changes"
        if ack.stdout < 1 << 20 and ack.stderr < 1 << 20:
            self.stored[key] = (out[: ack.stdout], err[: ack.stderr])

    def where(self, run: bytes) -> Optional[str]:
        life = self.store._life
        if life is None:
            return None
        known = life._runs.get(run)
        if known is not None:
            self.paths[life.number, run] = known.path
        return self.paths.get((life.number, run))

    def raw(self, where: str, name: str) -> Any:
        path = self.logs / "vm" / where / name
        if path.stat().st_size > 1 << 20:  # a gap's
            return _Long(path.stat().st_size)
        return path.read_bytes()

    def hello(self, given: Given) -> None:
        self.connect()
        kind = given.byte()
        session = self.guest._session
        fields: dict[str, Any] = {}
        if kind & 8:
            fields = {"since_zero": given.value("int"), "zero_by": given.pick(("host", "guest", None))}
        hello = messages.Hello(
            id=bytes((given.byte() % 4,)) * 8,
            peer=session.id if not kind & 1 or kind & 6 else None,
            role="guest",
            protocol=PROTOCOL,
            version=given.text() if kind & 16 else "1.0",
            wall=given.integer() if kind & 32 else 10**18,
            spool=given.pick(_SPOOLS) if kind & 64 else _SPOOLS[0],
            boot="boot",
            boottime=given.integer() if kind & 128 else None,
            **fields,
        )
        try:
            payload = messages.pack(hello)
        except messages.Malformed:
            return
        self.n = 0
        self.say(framing.encode(payload))

    def notice_life(self) -> None:
        """In another life nothing said before is about what lies there now."""
        life = self.store._life.number if self.store._life is not None else 0
        if life != self.life:
            self.life = life
            self.acked.clear()
            self.stored.clear()

    def message(self, given: Given) -> None:
        cls = given.pick(_KINDS)
        if not self.guest.online and given.byte() & 7:
            self.hello(Given(b""))
        known: dict[str, Any] = {}
        fields = {name for name, _, _, _ in messages.FIELDS[cls]}
        if "run" in fields:
            known["run"] = given.pick(
                _RUNS if cls is messages.Run or given.byte() & 15 == 0 else self.announced()
            )
        if "stream" in fields:
            known["stream"] = given.pick((*(1, 2) * 7, 0, 3))
        if cls is messages.Run:
            known["vmr"] = given.pick(_VMRS if given.byte() & 7 == 0 else _VMRS[:2])
            known["attempt"] = 1 + given.byte() % 2
            known["request"], known["script"] = b"", b"/s"
        if cls is messages.Vmr:
            known["vmr"] = given.pick([*_VMRS, None] if given.byte() & 7 == 0 else [*_VMRS[:2], None])
        held = self.held(known.get("run", b""), known.get("stream", 1))
        if "offset" in fields:
            known["offset"] = held if given.byte() & 15 else given.integer()
        if cls is messages.Output:
            data = given.blob()
            known.update(data=data, more=bool(given.byte() & 1))
            if given.byte() & 15:
                known["marks"] = ((len(data), 10**18),)
        if cls is messages.Gap:
            known["length"] = given.byte() * 1_000 if given.byte() & 7 else given.integer()
        if cls is messages.Exit and given.byte() & 15:
            known["ending"] = given.pick(("code", "signal", "errno", "lost"))
        if cls in (messages.Exit, messages.Closed) and given.byte() & 15:
            known.update(
                {name: self.held(known["run"], number) for name, number in (("stdout", 1), ("stderr", 2))}
            )
        message = given.message(cls, **known)
        session = self.guest._session
        try:
            payload = messages.pack(message, to=session.id or bytes(8), n=self.n)
        except messages.Malformed:
            return
        if len(payload) > framing.MAX_PAYLOAD:
            return
        self.n += 1
        self.say(framing.encode(payload))

    def announced(self) -> list[bytes]:
        life = self.store._life
        return list(life._runs) if life is not None and life._runs else _RUNS

    def held(self, run: bytes, stream: int) -> int:
        life = self.store._life
        known = life._runs.get(run) if life is not None else None
        if known is None:
            return 0
        for each, held in known.streams.items():
            if int(each) == stream:
                return held.held
        return 0

    def sync(self) -> None:
        """A sweep, as the collector's."""
        try:
            sync = self.store.begin_sync()
            if sync is not None:
                sync.sync()
                self.guest.acknowledge(self.store.finish_sync(sync))
        except OSError as failed:
            raise AssertionError(f"the disk has not failed: {failed}") from failed
        if self.theirs is not None:
            self.hear()

    def restart(self, *, clean: bool) -> None:
        self.disconnect()
        self.guest.chardev.close()
        if clean:
            self.store.close()
        else:  # killed: nothing is synced, nothing written that waited to be
            if self.store._life is not None:
                self.store._life.close()
                self.store._life = None
            self.store.close()
        self.start()

    def compare(self) -> None:
        """What was acknowledged is known, also by a collector that was started again."""
        self.notice_life()
        life = self.store._life
        if life is None:
            return
        for run, ack in self.acked.items():
            held = life._runs.get(run)
            if held is None:
                assert run in life._finished or ack.state == RunState.NONE, run
            else:
                assert held.streams[1].held >= ack.stdout and held.streams[2].held >= ack.stderr  # type: ignore[index]


class _Long(bytes):
    """A file too long to be read: only its length is looked at."""

    def __new__(cls, size: int) -> _Long:
        made = super().__new__(cls)
        made.size = size
        return made

    size: int

    def __len__(self) -> int:
        return self.size

    def startswith(self, *_: Any) -> bool:
        return True


def _render(logs: Path) -> None:
    root = os.open(logs, os.O_RDONLY | os.O_DIRECTORY)
    try:
        rendered = VmLogs(root, "vm", RawFiles())
        for _ in range(1_000):
            if not rendered.step():
                break
        else:
            raise AssertionError("rendering has no end")
        assert rendered.trouble is None
        rendered.reset()
    finally:
        os.close(root)
    for line in (logs / "vm.log").read_text().splitlines():
        assert _LINE.fullmatch(line), line
    for line in (logs / "vm.json").read_bytes().splitlines():
        assert isinstance(json.loads(line), dict)
