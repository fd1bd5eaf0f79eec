"""What a guest says, as messages with all that a test doesn't care about filled in."""

from __future__ import annotations

from typing import Any

from vmr_agent.runs import Ending, Stream
from vmr_agent.wire import messages

SECOND = 1_000_000_000
T = 1_717_634_586 * SECOND  # 2024-06-06 00:43:06
RUN = b"r" * 16
OTHER = b"o" * 16
SPOOL = b"s" * 16
OUT, ERR = Stream.STDOUT, Stream.STDERR


def hello(**fields: Any) -> messages.Hello:
    given = {"spool": SPOOL, "boot": "first boot", "boottime": 60 * SECOND, **fields}
    return messages.Hello(
        id=b"i" * 8, peer=b"p" * 8, role="guest", protocol=1, version="1.0", **{"wall": T, **given}
    )


def run(vmr: bytes = b"-4/compress.py", **fields: Any) -> messages.Run:
    given = {
        "run": RUN,
        "vmr": vmr,
        "attempt": 1,
        "trigger": "schedule",
        "request": b"",
        "script": b"/var/launch/" + vmr + b"/call_arguments.sh",
        "boot": "first boot",
        "pid": 1281,
        "started": T,
    }
    return messages.Run(**{**given, **fields})


def output(data: bytes, offset: int = 0, stream: Stream = OUT, **fields: Any) -> messages.Output:
    given = {"run": RUN, "more": False, "marks": ((len(data), T),) if data else (), **fields}
    return messages.Output(stream=int(stream), offset=offset, data=data, **given)


def gap(offset: int, length: int, stream: Stream = OUT, **fields: Any) -> messages.Gap:
    given = {"run": RUN, "reason": "the spool was full", **fields}
    return messages.Gap(stream=int(stream), offset=offset, length=length, **given)


def exit(stdout: int = 0, stderr: int = 0, **fields: Any) -> messages.Exit:
    given: dict[str, Any] = {
        "run": RUN,
        "ending": Ending.CODE.value,
        "value": 0,
        "text": "",
        "started": T,
        "ended": T + 2 * SECOND,
        "started_boottime": 100 * SECOND,
        "ended_boottime": 102 * SECOND + 74_975_000,
        "boot": "first boot",
        "user": SECOND // 2,
        "system": SECOND // 4,
        "max_rss": 4096,
        "asks_reboot": False,
    }
    return messages.Exit(stdout=stdout, stderr=stderr, **{**given, **fields})


def closed(stdout: int = 0, stderr: int = 0, **fields: Any) -> messages.Closed:
    return messages.Closed(stdout=stdout, stderr=stderr, **{"run": RUN, "reason": "", **fields})
