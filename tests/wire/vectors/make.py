"""Makes the example conversations in this directory, from PROTOCOL.md alone.

It shares no code with the product, so the two can be held against each other: the MessagePack below is
written here, and nothing but the standard library is imported. `python make.py` writes the `.bin` files and
`vectors.json`; `python make.py --check` says whether they are up to date.

Over 400 lines: nearly all of it is the examples themselves, which are read together.
"""

from __future__ import annotations

import json
import struct
import sys
import zlib
from pathlib import Path
from typing import Any, Optional

HERE = Path(__file__).parent

# --- MessagePack, the shortest form of each value ---


class Raw(bytes):
    """Bytes that are MessagePack already."""


def pack(value: Any) -> bytes:
    """One value in MessagePack."""
    if isinstance(value, Raw):
        return bytes(value)
    if value is None:
        return b"\xc0"
    if value is True:
        return b"\xc3"
    if value is False:
        return b"\xc2"
    if isinstance(value, int):
        return pack_int(value)
    if isinstance(value, float):
        return b"\xcb" + struct.pack(">d", value)
    if isinstance(value, str):
        return pack_str(value.encode())
    if isinstance(value, bytes):
        return pack_bin(value)
    if isinstance(value, (list, tuple)):
        return head(len(value), 0x90, 15, 0xDC) + b"".join(pack(item) for item in value)
    if isinstance(value, dict):
        body = b"".join(pack(key) + pack(item) for key, item in value.items())
        return head(len(value), 0x80, 15, 0xDE) + body
    raise TypeError(value)


def pack_int(value: int) -> bytes:
    """An integer in its shortest form."""
    if 0 <= value <= 0x7F:
        return struct.pack(">B", value)
    if -32 <= value < 0:
        return struct.pack(">b", value)
    if value >= 0:
        for code, form, bits in ((0xCC, ">B", 8), (0xCD, ">H", 16), (0xCE, ">I", 32), (0xCF, ">Q", 64)):
            if value < 1 << bits:
                return bytes([code]) + struct.pack(form, value)
    for code, form, bits in ((0xD0, ">b", 8), (0xD1, ">h", 16), (0xD2, ">i", 32), (0xD3, ">q", 64)):
        if value >= -(1 << bits - 1):
            return bytes([code]) + struct.pack(form, value)
    raise ValueError(value)


def pack_str(text: bytes) -> bytes:
    """A str of these bytes, be they UTF-8 or not."""
    if len(text) < 32:
        return bytes([0xA0 | len(text)]) + text
    if len(text) < 256:
        return struct.pack(">BB", 0xD9, len(text)) + text
    return struct.pack(">BH", 0xDA, len(text)) + text


def pack_bin(data: bytes) -> bytes:
    """A bin."""
    if len(data) < 256:
        return struct.pack(">BB", 0xC4, len(data)) + data
    return struct.pack(">BH", 0xC5, len(data)) + data


def head(count: int, fix: int, most: int, code: int) -> bytes:
    """The head of an array or a map."""
    return bytes([fix | count]) if count <= most else struct.pack(">BH", code, count)


def wide(value: Any) -> Raw:
    """The same value in the longest form MessagePack has for it."""
    if value is None or isinstance(value, bool):
        return Raw(pack(value))
    if isinstance(value, int):
        return Raw(struct.pack(">BQ", 0xCF, value) if value >= 0 else struct.pack(">Bq", 0xD3, value))
    if isinstance(value, str):
        return Raw(struct.pack(">BI", 0xDB, len(value.encode())) + value.encode())
    if isinstance(value, bytes):
        return Raw(struct.pack(">BI", 0xC6, len(value)) + value)
    if isinstance(value, dict):
        body = b"".join(wide(key) + wide(item) for key, item in value.items())
        return Raw(struct.pack(">BI", 0xDF, len(value)) + body)
    return Raw(struct.pack(">BI", 0xDD, len(value)) + b"".join(wide(item) for item in value))


# --- frames, PROTOCOL.md section 1 ---


def frame(payload: bytes, *, crc: Optional[int] = None, length: Optional[int] = None) -> bytes:
    """A frame; `crc` and `length` replace what belongs there."""
    length = 7 + len(payload) if length is None else length
    crc = zlib.crc32(payload) if crc is None else crc
    return b"\xc9" + struct.pack(">I", length) + b"VMR1" + struct.pack(">I", crc) + payload


# --- the meaning of a file ---

Event = dict[str, Any]
Piece = tuple[bytes, Event]  # the bytes and what they mean


def plain(value: Any) -> Any:
    """The value for vectors.json: bytes become `{"hex": ...}`, or `{"hex": ..., "times": n}`."""
    if isinstance(value, bytes):
        if len(value) > 64 and value == value[:16] * (len(value) // 16) + value[: len(value) % 16]:
            return {"hex": value[:16].hex(), "length": len(value)}
        return {"hex": value.hex()}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def message(kind: str, **fields: Any) -> Piece:
    """A good frame and the message in it."""
    known = {"type": kind, **fields}
    return frame(pack(known)), {"message": plain(known)}


def extra(kind: str, more: dict[str, Any], **fields: Any) -> Piece:
    """A message with keys that nobody knows."""
    known = {"type": kind, **fields}
    return frame(pack({**more, **known})), {"message": plain(known)}


def garbage(data: bytes) -> Piece:
    """Bytes to be skipped."""
    return data, {"garbage": len(data)}


def unknown(kind: str, **fields: Any) -> Piece:
    """A type that nobody knows."""
    event = {"type": kind, "to": plain(fields.get("to")), "n": fields.get("n")}
    return frame(pack({"type": kind, **fields})), {"unknown": event}


def malformed(why: str, kind: str, **fields: Any) -> Piece:
    """A known type, addressed and counted, whose contents are wrong."""
    event = {"type": kind, "to": plain(fields["to"]), "n": fields["n"], "why": why}
    return frame(pack({"type": kind, **fields})), {"malformed": event}


def nameless(why: str, payload: bytes) -> Piece:
    """A good frame round a payload that can't be counted: it is as garbage."""
    return frame(payload), {"malformed": {"type": None, "to": None, "n": None, "why": why}}


# --- what the examples talk about ---

GUEST = bytes.fromhex("a1a2a3a4a5a6a7a8")
GUEST2 = bytes.fromhex("b1b2b3b4b5b6b7b8")
HOST = bytes.fromhex("0102030405060708")
SPOOL = bytes(range(0x50, 0x60))
RUN = bytes(range(0x10, 0x20))
RUN2 = bytes(range(0x20, 0x30))
ASK = bytes(range(0x70, 0x80))
BOOT = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"
WALL = 1_700_000_000_123_456_789
BOOTTIME = 61_234_567_890
MAX = 2**63 - 1
MIN = -(2**63)
COMPRESS = b"-4/compress.py"
BYTES = b"5/\xff\xfe\xc3\x28 \x0a.sh"  # no UTF-8, a blank, a newline


class Counted:
    """Messages to one receiver, counted from 0."""

    def __init__(self, to: bytes) -> None:
        self.to = to
        self.next = 0

    def address(self) -> dict[str, Any]:
        """`to` and `n` of the next frame."""
        self.next += 1
        return {"to": self.to, "n": self.next - 1}

    def say(self, kind: str, **fields: Any) -> Piece:
        """A good message."""
        return message(kind, **self.address(), **fields)

    def wrong(self, why: str, kind: str, **fields: Any) -> Piece:
        """A malformed one."""
        return malformed(why, kind, **self.address(), **fields)


def guest_hello(id_: bytes = GUEST, peer: Optional[bytes] = None) -> Piece:
    """The guest's Hello in full."""
    return message(
        "hello",
        id=id_,
        peer=peer,
        role="guest",
        protocol=1,
        version="1.0",
        wall=WALL,
        spool=SPOOL,
        boot=BOOT,
        machine="00112233445566778899aabbccddeeff",
        hostname=b"vm-7",
        boottime=BOOTTIME,
        configured=False,
        since_zero=-30_000_000_000,
        zero_by="host",
    )


def host_hello(peer: Optional[bytes] = None) -> Piece:
    """The host's Hello."""
    return message("hello", id=HOST, peer=peer, role="host", protocol=1, version="1.0", wall=WALL + 5)


def run_fields(**changes: Any) -> dict[str, Any]:
    """A Run's fields."""
    return {
        "run": RUN,
        "vmr": COMPRESS,
        "attempt": 1,
        "trigger": "schedule",
        "request": b"",
        "script": b"/var/launch/-4/compress.py/call_arguments.sh",
        "boot": BOOT,
        "pid": 412,
        "started": WALL + 10,
        **changes,
    }


def exit_fields(**changes: Any) -> dict[str, Any]:
    """An Exit's fields."""
    return {
        "run": RUN,
        "ending": "code",
        "value": 3,
        "text": "",
        "started": WALL + 10,
        "ended": WALL + 9_000,
        "started_boottime": BOOTTIME + 10,
        "ended_boottime": BOOTTIME + 9_000,
        "boot": BOOT,
        "stdout": 11,
        "stderr": 4,
        "user": 5_000_000,
        "system": 2_000_000,
        "max_rss": 9_437_184,
        "asks_reboot": False,
        **changes,
    }


def output_fields(**changes: Any) -> dict[str, Any]:
    """An Output's fields."""
    return {
        "run": RUN,
        "stream": 1,
        "offset": 0,
        "more": False,
        "marks": [[6, WALL + 20], [5, WALL + 90]],
        "data": b"hello\nworld",
        **changes,
    }


def vmr_fields(**changes: Any) -> dict[str, Any]:
    """A Vmr row's fields."""
    return {"vmr": COMPRESS, "state": "waiting", "attempt": 0, "reason": "", **changes}


def ack_fields(**changes: Any) -> dict[str, Any]:
    """An Ack's fields."""
    return {"run": RUN, "state": 1, "stdout": 11, "stderr": 4, **changes}


HEALTH = {
    "load1_milli": 1250,
    "memory_free": 402_653_184,
    "spool_used": 0,
    "swap_delta": -4096,
    "full": False,
}

# --- the files ---

File = dict[str, Any]
FILES: dict[str, tuple[bytes, File]] = {}


def add(name: str, sender: str, about: str, *pieces: Piece, late: Optional[list[Event]] = None) -> None:
    """One file: its pieces in order; `late`: what 2 s without another byte add."""
    events: list[Event] = []
    for _, event in pieces:
        if "garbage" in event and events and "garbage" in events[-1]:
            events[-1] = {"garbage": events[-1]["garbage"] + event["garbage"]}
        elif event:
            events.append(event)
    meaning: File = {"from": sender, "about": about, "events": events}
    if late:
        meaning["late"] = late
    FILES[name] = (b"".join(data for data, _ in pieces), meaning)


def each_message() -> None:
    """Every message once or more."""
    g = Counted(HOST)
    add(
        "guest",
        "guest",
        "every message a guest sends",
        guest_hello(),
        guest_hello(peer=HOST),
        g.say(
            "heartbeat",
            wall=WALL,
            boottime=BOOTTIME,
            configured=True,
            since_zero=-1,
            zero_by="guest",
            health=HEALTH,
        ),
        g.say("vmr", **vmr_fields()),
        g.say("vmr", **vmr_fields(vmr=b"5/late.sh", state="refused", reason="call_arguments.sh is empty")),
        g.say("vmr", **vmr_fields(state="exited", attempt=2, changed=True)),
        g.say("vmr", **vmr_fields(vmr=None, state="")),
        g.say("run", **run_fields()),
        g.say(
            "run", **run_fields(run=RUN2, attempt=2, trigger="rerun", request=ASK, pid=0, ended=WALL + 9_000)
        ),
        g.say("output", **output_fields()),
        g.say("output", **output_fields(stream=2, more=True, marks=[[4, WALL + 91]], data=b"\xef\x00\r\n")),
        g.say(
            "gap", run=RUN, stream=2, offset=4, length=1_000_000, reason="dropped: no room", wall=WALL + 95
        ),
        g.say("gap", run=RUN, stream=1, offset=10**12, length=1, reason="pruned in the guest"),
        g.say("exit", **exit_fields()),
        g.say(
            "exit",
            **exit_fields(
                run=RUN2,
                ending="errno",
                value=2,
                text="the interpreter /bin/bas is missing",
                stdout=0,
                stderr=0,
                user=0,
                system=0,
                max_rss=0,
            ),
        ),
        g.say("exit", **exit_fields(ending="signal", value=9, asks_reboot=True)),
        g.say("exit", **exit_fields(ending="lost", value=0, text="the power was cut")),
        g.say("closed", run=RUN, stdout=11, stderr=1_000_004, reason=""),
        g.say("reply", request=ASK, ok=True, error="", result={"run": RUN2, "attempt": 2}),
        g.say("reply", request=ASK, ok=False, error="There is no such VMR.", result={}),
        g.say("piece", request=ASK, at=31_744, data=b"\xff\x00\n"),
        g.say("reply", request=ASK, ok=True, error="", result={"at": 31_747}),
    )
    h = Counted(GUEST)
    add(
        "host",
        "host",
        "every message a host sends, every verb",
        host_hello(),
        host_hello(peer=GUEST),
        h.say("heartbeat", wall=WALL),
        h.say("ack", **ack_fields(state=0, stdout=0, stderr=0, tails=[[0, 0], [0, 0]])),
        h.say(
            "ack", **ack_fields(tails=[[zlib.crc32(b"hello\nworld"), 11], [zlib.crc32(b"\xef\x00\r\n"), 4]])
        ),
        h.say("ack", **ack_fields(state=3)),
        h.say("start", delay=30_000_000_000),
        h.say("start", delay=-1),
        h.say("request", request=ASK, verb="rerun", args={"vmr": COMPRESS}),
        h.say("request", request=ASK, verb="kill", args={"run": RUN, "signal": 15}),
        h.say("request", request=ASK, verb="hold", args={}),
        h.say("request", request=ASK, verb="resume", args={}),
        h.say("request", request=ASK, verb="diverged", args={"reason": "boottime went back"}),
        h.say("request", request=ASK, verb="write", args={"path": b"/x", "offset": 0, "size": 2}),
        h.say("piece", request=ASK, at=0, data=b"ab"),
    )


def values() -> None:
    """Optional keys, extremes, encodings, names."""
    nothing = dict.fromkeys(
        ("spool", "boot", "machine", "hostname", "boottime", "configured", "since_zero", "zero_by")
    )
    hello = {"id": GUEST, "role": "guest", "protocol": 1, "version": "1.0", "wall": WALL}
    g = Counted(HOST)
    add(
        "optional-nil",
        "guest",
        "each key that may be nil is nil",
        message("hello", **hello, peer=None, **nothing),
        g.say(
            "heartbeat", wall=WALL, boottime=None, configured=None, since_zero=None, zero_by=None, health=None
        ),
        g.say("vmr", **vmr_fields(vmr=None, state="", changed=None)),
        g.say("run", **run_fields(ended=None)),
    )
    g = Counted(HOST)
    bare = {"state": "", "attempt": 0, "reason": ""}
    add(
        "optional-absent",
        "guest",
        "each key that may be absent is",
        message("hello", **hello),
        g.say("heartbeat", wall=WALL),
        g.say("vmr", **bare),
        g.say("run", **run_fields()),
    )
    h = Counted(GUEST)
    add(
        "optional-host",
        "host",
        "Ack without tails: nil, then absent",
        h.say("ack", **ack_fields(tails=None)),
        h.say("ack", **ack_fields()),
    )
    long = "é" * 2048  # 4,096 bytes
    for name, number, low in (("least", 0, MIN), ("most", MAX, MAX)):
        each = {key: number for key in ("attempt", "pid", "started", "ended")}
        times = {
            key: number
            for key in ("value", "started", "ended", "started_boottime", "ended_boottime", "stdout", "stderr")
        }
        text = long if number else ""
        label = bytes(range(1, 256)) * 17 if number else b"/"
        label = label[:4096]
        g = Counted(HOST)
        g.next = number
        sent = [
            message(
                "heartbeat",
                to=HOST,
                n=number,
                wall=number,
                boottime=number,
                configured=bool(number),
                since_zero=low,
                zero_by=text,
                health={"a" * 40: low, "": number, "b": None, "c": True, "d": text, "e": b"\xff" * 300}
                if number
                else {},
            ),
            message(
                "run",
                to=HOST,
                n=number,
                **run_fields(
                    **each,
                    vmr=label,
                    script=label,
                    trigger=text,
                    boot=text,
                    request=b"\x00" * (300 if number else 0),
                ),
            ),
            message(
                "output",
                to=HOST,
                n=number,
                **output_fields(
                    stream=number,
                    offset=number,
                    marks=[] if not number else [[0, MAX]] * 999 + [[5, MAX]],
                    data=b"\xc9" * (5 if number else 0),
                ),
            ),
            message(
                "exit",
                to=HOST,
                n=number,
                **exit_fields(
                    **times,
                    user=number,
                    system=number,
                    max_rss=number,
                    text=text,
                    boot=text,
                    asks_reboot=bool(number),
                ),
            ),
        ]
        add(f"values-{name}", "guest", f"the {name} each kind can hold (not counted: n as it is)", *sent)
        add(
            f"values-{name}-host",
            "host",
            f"the {name} each kind can hold",
            message("start", to=GUEST, n=number, delay=low),
            message(
                "ack",
                to=GUEST,
                n=number,
                **ack_fields(state=number, stdout=number, stderr=number, tails=[[number, number]] * 2),
            ),
        )
    edges: list[Piece] = []
    bounds = {0, *(2**bits + step for bits in (5, 7, 8, 15, 16, 31, 32, 62) for step in (-1, 0, 1))}
    h = Counted(GUEST)
    for number in sorted(bounds):
        edges += [h.say("start", delay=number), h.say("start", delay=-number)]
    add("integers", "host", "delays round each edge between two MessagePack forms", *edges)
    g = Counted(HOST)
    add(
        "names",
        "guest",
        "names and output are bytes, not text",
        g.say("vmr", **vmr_fields(vmr=BYTES)),
        g.say("run", **run_fields(vmr=BYTES, script=b"/" + BYTES)),
        g.say("output", **output_fields(data=bytes(range(256)), marks=[[256, WALL]])),
    )
    known = {"type": "run", "to": HOST, "n": 0, **run_fields()}
    marked = {"type": "output", "to": HOST, "n": 1, **output_fields()}
    add(
        "wide",
        "guest",
        "the longest form of each value means the same",
        (frame(wide(known)), {"message": plain(known)}),
        (frame(wide(marked)), {"message": plain(marked)}),
    )
    backwards = dict(reversed(list(known.items())))
    add("order", "guest", "keys come in any order", (frame(pack(backwards)), {"message": plain(known)}))


def sizes() -> None:
    """The shortest and the longest frames, and those just outside."""
    add(
        "shortest",
        "guest",
        "len 8: a whole frame, whose payload is no message",
        nameless("no type", b"\x80"),
        nameless("no map", b"\x00"),
    )
    fields = {"type": "output", "to": HOST, "n": 0, **output_fields(marks=[])}
    room = 32_755 - len(pack({**fields, "data": b"x" * 32_000, "marks": [[32_000, WALL]]})) + 32_000
    data = (bytes(range(16)) * 3000)[:room]
    longest = {**fields, "data": data, "marks": [[room, WALL]]}
    payload = pack(longest)
    assert len(frame(payload)) == 32_768 and len(payload) == 32_755
    add(
        "longest",
        "guest",
        "len 32,762, twice",
        (frame(payload), {"message": plain(longest)}),
        (frame(payload), {"message": plain(longest)}),
    )
    heartbeat = message("heartbeat", to=HOST, n=0, wall=WALL)
    add(
        "too-short",
        "guest",
        "len 7 and less, then a good frame",
        garbage(frame(b"")),
        *(garbage(frame(b"", length=n)) for n in range(7)),
        heartbeat,
    )
    more = {**longest, "data": data + b"\xff", "marks": [[room + 1, WALL]]}
    add(
        "too-long",
        "guest",
        "len 32,763, its CRC right, then a good frame",
        garbage(frame(pack(more))),
        heartbeat,
    )


def other_things() -> None:
    """Unknown keys and types, malformed payloads."""
    g = Counted(HOST)
    more = {
        "x": 1,
        "": None,
        "y": [1, [2, {"z": b"\xff"}]],
        "half": 0.5,
        "big": 2**64 - 1,
        "strange": Raw(b"\xa2\xff\xfe"),
    }
    add(
        "unknown-keys",
        "guest",
        "keys nobody knows, with any value, are ignored",
        extra(
            "hello",
            {**more, "to": HOST, "n": 7},
            id=GUEST,
            role="guest",
            protocol=1,
            version="1.0",
            wall=WALL,
        ),
        extra("closed", more, **g.address(), run=RUN, stdout=1, stderr=2, reason=""),
        extra("heartbeat", {"run": 7, "data": "text"}, **g.address(), wall=WALL),
    )
    g = Counted(HOST)
    add(
        "unknown-types",
        "guest",
        "types nobody knows are skipped and use up their n",
        unknown("teleport", **g.address(), where=b"\xff"),
        g.say("heartbeat", wall=WALL),
        unknown("", **g.address()),
        unknown("HELLO", **g.address(), id=GUEST),
        unknown("é" * 300, **g.address(), deep=[[[[[]]]]]),
        g.say("heartbeat", wall=WALL),
    )
    g = Counted(HOST)
    no_pid = run_fields()
    del no_pid["pid"]
    none = {"wall": WALL}
    add(
        "malformed",
        "guest",
        "known types with a wrong content: skipped, but each uses up its n",
        g.wrong("pid is missing", "run", **no_pid),
        g.wrong("pid is nil", "run", **run_fields(pid=None)),
        g.wrong("pid is a bool", "run", **run_fields(pid=True)),
        g.wrong("pid is a float", "run", **run_fields(pid=1.0)),
        g.wrong("pid is negative", "run", **run_fields(pid=-1)),
        g.wrong("pid is 2^63", "run", **run_fields(pid=2**63)),
        g.wrong("pid is a str", "run", **run_fields(pid="1")),
        g.wrong("run has 15 bytes", "run", **run_fields(run=RUN[:15])),
        g.wrong("run has 17 bytes", "run", **run_fields(run=RUN + b"x")),
        g.wrong("run is a str", "run", **run_fields(run="0123456789abcdef")),
        g.wrong("vmr is a str", "run", **run_fields(vmr="-4/compress.py")),
        g.wrong("vmr is empty", "run", **run_fields(vmr=b"")),
        g.wrong("vmr has 4,097 bytes", "run", **run_fields(vmr=b"v" * 4097)),
        g.wrong("vmr is nil", "run", **run_fields(vmr=None)),
        g.wrong("boot is a bin", "run", **run_fields(boot=b"boot")),
        g.wrong("boot has 4,097 bytes", "run", **run_fields(boot="b" * 4097)),
        g.wrong("boot has 4,098 bytes in 2,049 characters", "run", **run_fields(boot="é" * 2049)),
        g.wrong("boot is no UTF-8", "run", **run_fields(boot=Raw(b"\xa3a\xffb"))),
        g.wrong("boot holds a surrogate in UTF-8", "run", **run_fields(boot=Raw(b"\xa3\xed\xb3\xbf"))),
        g.wrong("request is a str", "run", **run_fields(request="")),
        g.wrong("more is 1", "output", **output_fields(more=1)),
        g.wrong("marks are nil", "output", **output_fields(marks=None)),
        g.wrong("marks are a map", "output", **output_fields(marks={})),
        g.wrong("a mark of one", "output", **output_fields(marks=[[11]])),
        g.wrong("a mark of three", "output", **output_fields(marks=[[11, WALL, 0]])),
        g.wrong("a mark is an integer", "output", **output_fields(marks=[11, WALL])),
        g.wrong("a negative mark", "output", **output_fields(marks=[[11, -1]])),
        g.wrong("a mark with a bool", "output", **output_fields(marks=[[11, True]])),
        g.wrong("data is a str", "output", **output_fields(data="hello world")),
        g.wrong("boottime is a str", "heartbeat", **none, boottime="1"),
        g.wrong("configured is 0", "heartbeat", **none, configured=0),
        g.wrong("since_zero is 2^63", "heartbeat", **none, since_zero=2**63),
        g.wrong("zero_by is a bin", "heartbeat", **none, zero_by=b"host"),
        g.wrong("health is an array", "heartbeat", **none, health=[]),
        g.wrong("health holds an array", "heartbeat", **none, health={"a": []}),
        g.wrong("health holds a map", "heartbeat", **none, health={"a": {}}),
        g.wrong("health holds a float", "heartbeat", **none, health={"a": 0.5}),
        g.wrong("the mark's vmr is empty", "vmr", **vmr_fields(vmr=b"")),
        g.say("heartbeat", wall=WALL),
    )
    h = Counted(GUEST)
    add(
        "malformed-host",
        "host",
        "the same from the host",
        h.wrong("tails of one", "ack", **ack_fields(tails=[[0, 0]])),
        h.wrong("tails of three", "ack", **ack_fields(tails=[[0, 0]] * 3)),
        h.wrong("empty tails", "ack", **ack_fields(tails=[])),
        h.wrong("a tail of three", "ack", **ack_fields(tails=[[0, 0], [0, 0, 0]])),
        h.wrong("tails are a bin", "ack", **ack_fields(tails=b"\x00\x00")),
        h.wrong("state is a float", "ack", **ack_fields(state=1.0)),
        h.wrong("delay is 2^63", "start", delay=2**63),
        h.wrong("delay is nil", "start", delay=None),
        h.wrong("args are nil", "request", request=ASK, verb="hold", args=None),
        h.wrong("args hold an array", "request", request=ASK, verb="kill", args={"run": [RUN]}),
        h.wrong("request is empty", "request", request=b"", verb="hold", args={}),
        h.wrong("a piece at 2^63", "piece", request=ASK, at=2**63, data=b"x"),
        h.wrong("a piece of nothing", "piece", request=ASK, at=0, data=None),
        h.say("heartbeat", wall=WALL),
    )
    row = {"type": "heartbeat", "wall": WALL}
    good = {**row, "to": HOST, "n": 0}
    add(
        "uncountable",
        "guest",
        "good frames whose payload has no n to count: as garbage",
        nameless("an array", pack([1, 2])),
        nameless("nil", b"\xc0"),
        nameless("an integer", b"\x2a"),
        nameless("an ext", b"\xd4\x05\x00"),
        nameless("no MessagePack: the unused byte C1", b"\xc1"),
        nameless("a map cut short", pack(good)[:-3]),
        nameless("a map and a byte more", pack(good) + b"\x00"),
        nameless("two maps", pack(good) * 2),
        nameless("an empty map", b"\x80"),
        nameless("no type", pack({"to": HOST, "n": 0, "wall": WALL})),
        nameless("type is an integer", pack({**good, "type": 1})),
        nameless("type is a bin", pack({**good, "type": b"heartbeat"})),
        nameless("type is nil", pack({**good, "type": None})),
        nameless("type is no UTF-8", pack({**good, "type": Raw(b"\xa2\xff\xfe")})),
        nameless("type has 4,097 bytes", pack({**good, "type": "t" * 4097})),
        nameless("no n", pack({**row, "to": HOST})),
        nameless("no to", pack({**row, "n": 0})),
        nameless("to has 7 bytes", pack({**good, "to": HOST[:7]})),
        nameless("n is negative", pack({**good, "n": -1})),
        nameless("n is a bool", pack({**good, "n": False})),
        nameless("n is 2^63", pack({**good, "n": 2**63})),
        nameless("a type nobody knows, no n", pack({"type": "teleport", "to": HOST})),
        nameless("the key type is a bin", pack({b"type": "heartbeat", "to": HOST, "n": 0, "wall": WALL})),
        message("heartbeat", to=HOST, n=0, wall=WALL),
    )


def damage() -> None:
    """Garbage, damaged frames, false ones."""
    g = Counted(HOST)
    beat = [g.say("heartbeat", wall=WALL + n) for n in range(12)]
    login = b"\r\nDebian GNU/Linux 12 vm-7 hvc0\r\n\r\nvm-7 login: "
    add(
        "garbage",
        "guest",
        "garbage before, between and after frames",
        garbage(login),
        beat[0],
        garbage(b"\xc9"),
        beat[1],
        garbage(b"\xc9" * 9),
        beat[2],
        garbage(b"VMR1"),
        beat[3],
        garbage(b"\xc9VMR1"),
        beat[4],
        garbage(b"\xc9\x00\x00\x00\x20VMR2" + bytes(40)),
        beat[5],
        garbage(bytes(range(256))),
        beat[6],
        garbage(b"\x00"),
        beat[7],
        garbage(login),
    )
    payload = pack({"type": "closed", "to": HOST, "n": 5, "run": RUN, "stdout": 1, "stderr": 2, "reason": ""})
    whole = frame(payload)
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    add(
        "bad-crc",
        "guest",
        "a wrong CRC, a flipped bit, good frames between",
        beat[0],
        garbage(frame(payload, crc=0)),
        beat[1],
        garbage(flipped),
        garbage(flipped),
        beat[2],
        garbage(frame(payload, crc=zlib.crc32(payload) ^ 0x80000000)),
        beat[3],
    )
    filler = bytes(200)
    add(
        "bad-len",
        "guest",
        "a len too small, too large by far, off by one; good frames between",
        beat[0],
        garbage(frame(payload, length=0)),
        beat[1],
        garbage(frame(payload, length=0xFFFFFFFF)),
        beat[2],
        garbage(frame(payload, length=7 + len(payload) - 1)),
        beat[3],
        garbage(frame(payload, length=7 + len(payload) + 1)),
        beat[4],
        garbage(frame(payload, length=7 + len(payload) + 150)),
        garbage(filler),
        beat[5],
    )
    inner = frame(
        pack(
            {
                "type": "gap",
                "to": HOST,
                "n": 1,
                "run": RUN,
                "stream": 1,
                "offset": 0,
                "length": 9,
                "reason": "forged",
            }
        )
    )
    false = b"\xc9\x00\x00\x00\x30VMR1\x00\x00\x00\x00" + b"tail" * 3
    g = Counted(HOST)
    add(
        "false-header",
        "guest",
        "output that looks like frames, and is a whole frame: all of it is data",
        g.say("output", **output_fields(data=false, marks=[[len(false), WALL]])),
        g.say("output", **output_fields(offset=len(false), data=inner, marks=[[len(inner), WALL]])),
        g.say(
            "output",
            **output_fields(offset=0, data=false * 9 + inner, marks=[[9 * len(false) + len(inner), WALL]]),
        ),
        g.say("heartbeat", wall=WALL),
    )
    outer = frame(
        pack({"type": "output", "to": HOST, "n": 0, **output_fields(data=inner, marks=[[len(inner), WALL]])})
    )
    at = outer.index(inner)
    gap = {
        "type": "gap",
        "to": HOST,
        "n": 1,
        "run": RUN,
        "stream": 1,
        "offset": 0,
        "length": 9,
        "reason": "forged",
    }
    broken = outer[:20] + bytes([outer[20] ^ 0xFF]) + outer[21:]
    after = broken[at + len(inner) :]
    add(
        "damaged-outer",
        "guest",
        "a whole frame in the data of a damaged one is found: the search goes on a byte on",
        garbage(broken[:at]),
        (inner, {"message": plain(gap)}),
        *([garbage(after)] if after else []),
        beat[4],
    )
    big = frame(
        pack({"type": "output", "to": HOST, "n": 0, **output_fields(data=b"\x55" * 300, marks=[[300, WALL]])})
    )
    add(
        "truncated",
        "guest",
        "a frame cut short (the writer was killed), then whole ones that fill its len",
        garbage(big[:100]),
        *beat[:10],
    )
    add(
        "truncated-head",
        "guest",
        "frames cut within the head, each followed by a whole one",
        *(piece for cut in range(1, 10) for piece in (garbage(big[:cut]), beat[cut])),
        *beat,
    )
    add(
        "begins-inside", "guest", "a reader that comes in the middle of a frame", garbage(big[40:]), *beat[:2]
    )
    add(
        "unfinished",
        "guest",
        "a frame that never gets whole: garbage after 2 s",
        beat[0],
        (big[:50], {}),
        late=[{"garbage": 50}],
    )
    claim = b"\xc9" + struct.pack(">I", 32_762) + b"VMR1" + bytes(4)
    add(
        "held-back",
        "guest",
        "a false head holds back two whole frames, for 2 s",
        (claim, {}),
        (beat[0][0], {}),
        (beat[1][0], {}),
        late=[{"garbage": len(claim)}, beat[0][1], beat[1][1]],
    )
    own = frame(
        pack(
            {
                "type": "hello",
                "id": GUEST,
                "peer": 7,
                "role": "guest",
                "protocol": 1,
                "version": "",
                "wall": 0,
            }
        )
    )
    add(
        "bad-hello",
        "guest",
        "a Hello whose peer is no bin8, then one whose role is the receiver's own",
        (own, {"malformed": {"type": "hello", "to": None, "n": None, "why": "peer is an integer"}}),
        host_hello(),
    )


def conversation() -> None:
    """A session from both sides, its end, and the next one; a file for each side."""
    out, err = b"hello\nworld", b"\xef\x00\r\n"
    g, h = Counted(HOST), Counted(GUEST)
    g2, h2 = Counted(HOST), Counted(GUEST2)
    held = [[zlib.crc32(out), 11], [zlib.crc32(err), 4]]
    talk: list[tuple[str, Piece]] = [
        ("guest", guest_hello()),
        ("host", host_hello()),
        ("guest", guest_hello(peer=HOST)),
        ("host", host_hello(peer=GUEST)),
        ("guest", g.say("vmr", **vmr_fields(state="running", attempt=1))),
        ("guest", g.say("vmr", **vmr_fields(vmr=BYTES))),
        ("guest", g.say("vmr", **vmr_fields(vmr=None, state=""))),
        ("guest", g.say("run", **run_fields())),
        ("host", h.say("ack", **ack_fields(state=1, stdout=0, stderr=0, tails=[[0, 0], [0, 0]]))),
        ("guest", g.say("output", **output_fields(data=out[:6], marks=[[6, WALL + 20]], more=True))),
        (
            "guest",
            g.say("output", **output_fields(offset=6, data=out[6:], marks=[[2, WALL + 90], [3, WALL + 91]])),
        ),
        ("guest", g.say("output", **output_fields(stream=2, data=err, marks=[[4, WALL + 92]]))),
        ("host", h.say("ack", **ack_fields())),
        ("guest", g.say("exit", **exit_fields())),
        ("host", h.say("ack", **ack_fields(state=2))),
        ("guest", g.say("vmr", **vmr_fields(state="exited", attempt=1))),
        (
            "guest",
            g.say(
                "heartbeat",
                wall=WALL,
                boottime=BOOTTIME,
                configured=False,
                since_zero=None,
                zero_by=None,
                health=HEALTH,
            ),
        ),
        ("host", h.say("heartbeat", wall=WALL + 5)),
        ("host", h.say("start", delay=30_000_000_000)),
        # The guest ends the session by itself: a new id, counts from 0, whatever wasn't acknowledged again.
        ("guest", guest_hello(GUEST2, HOST)),
        ("host", host_hello(peer=GUEST2)),
        ("guest", g2.say("vmr", **vmr_fields(state="exited", attempt=1))),
        ("guest", g2.say("vmr", **vmr_fields(vmr=None, state=""))),
        ("guest", g2.say("run", **run_fields())),
        ("host", h2.say("ack", **ack_fields(state=2, tails=held))),
        ("guest", g2.say("closed", run=RUN, stdout=11, stderr=4, reason="")),
        ("host", h2.say("ack", **ack_fields(state=3))),
        ("host", h2.say("request", request=ASK, verb="rerun", args={"vmr": COMPRESS})),
        ("guest", g2.say("run", **run_fields(run=RUN2, attempt=2, trigger="rerun", request=ASK, pid=433))),
        ("guest", g2.say("reply", request=ASK, ok=True, error="", result={"run": RUN2, "attempt": 2})),
        ("host", h2.say("ack", **ack_fields(run=RUN2, stdout=0, stderr=0, tails=[[0, 0], [0, 0]]))),
        (
            "guest",
            g2.say("gap", run=RUN2, stream=1, offset=0, length=65_536, reason="dropped: the spool is full"),
        ),
        ("guest", g2.say("exit", **exit_fields(run=RUN2, ending="signal", value=9, stdout=65_536, stderr=0))),
        (
            "guest",
            g2.say("closed", run=RUN2, stdout=65_536, stderr=0, reason="a daemonized child held the pipe"),
        ),
        ("host", h2.say("ack", **ack_fields(run=RUN2, state=3, stdout=65_536, stderr=0))),
    ]
    for side in ("guest", "host"):
        add(
            f"conversation-{side}",
            side,
            "one side of a conversation of two sessions",
            *(piece for who, piece in talk if who == side),
        )
        FILES[f"conversation-{side}"][1]["turns"] = [i for i, (who, _) in enumerate(talk) if who == side]


def build() -> dict[str, bytes]:
    """All files by name."""
    FILES.clear()
    for part in (each_message, values, sizes, other_things, damage, conversation):
        part()
    made = {f"{name}.bin": data for name, (data, _) in FILES.items()}
    index = {f"{name}.bin": meaning for name, (_, meaning) in FILES.items()}
    lines = [f"{json.dumps(name)}: {entry_text(entry)}" for name, entry in index.items()]
    made["vectors.json"] = ("{\n" + ",\n".join(lines) + "\n}\n").encode()
    return made


def entry_text(entry: File) -> str:
    """One file's meaning, an event a line."""
    parts = []
    for key, value in entry.items():
        if key in ("events", "late"):
            items = ",\n".join("    " + json.dumps(event) for event in value)
            parts.append(f'  "{key}": [\n{items}\n  ]' if value else f'  "{key}": []')
        else:
            parts.append(f'  "{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}"


def main() -> int:
    """Writes or checks the files."""
    made = build()
    if "--check" in sys.argv[1:]:
        stale = sorted(name for name, data in made.items() if not same(HERE / name, data))
        stale += sorted(path.name for path in HERE.glob("*.bin") if path.name not in made)
        print("\n".join(stale) or "up to date")
        return 1 if stale else 0
    for name, data in made.items():
        (HERE / name).write_bytes(data)
    return 0


def same(path: Path, data: bytes) -> bool:
    """Whether the file holds these bytes."""
    return path.exists() and path.read_bytes() == data


if __name__ == "__main__":
    sys.exit(main())
