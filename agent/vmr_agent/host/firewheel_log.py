"""What lives here: FIREWHEEL's two log formats, bytes in, text out. Pure functions.

``<VM>.log`` gets lines for people, in which output stands as Python shows bytes, so no output can forge a
line or send an escape to a terminal. ``<VM>.json`` gets one JSON object per output line; pandas must load it.
It must not know: files, journals, when a line is complete.
"""

from __future__ import annotations

import json
import math
import re
import time
from functools import lru_cache
from typing import Any, Optional, Union

from vmr_agent.errors import show
from vmr_agent.runs import Ending, Stream, signal_name
from vmr_agent.wire import messages

INFO = "INFO"
WARNING = "WARNING"

BLOCK_LIMIT = 65_536
"""Most bytes of whole lines in one line of the log, so that a pager stays usable."""
LINE_LIMIT = 1_048_576
"""A line longer than this is cut in the logs: somebody printed a file, and a viewer must still open them."""

_LAST_SECOND = 253_402_300_799  # 9999-12-31: later years have no four digits, and a guest may claim any time


@lru_cache(maxsize=1024)
def _clock(second: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(min(max(second, 0), _LAST_SECOND)))


def stamp(ns: int) -> str:
    """``2024-06-06 00:43:06``, in UTC."""
    return _clock(ns // 1_000_000_000)


class Origin:
    """Whose lines they are, with what they say of it made once."""

    def __init__(self, vmr: bytes, attempt: int, pid: int) -> None:
        self.vmr = vmr
        self.attempt = attempt
        self.pid = pid
        name = show(vmr.partition(b"/")[2])
        self.who = f"{name} ({pid})" if pid else name
        """As FIREWHEEL writes it; a run that never had a process has only its name."""
        self.keys: dict[Stream, dict[str, Any]] = {
            stream: {"vmr": show(vmr), "attempt": attempt, "stream": stream.filename} for stream in Stream
        }
        self._tails = {stream: json.dumps(keys)[1:] + "\n" for stream, keys in self.keys.items()}

    def tail(self, stream: Stream, ns: int) -> str:
        """The end of a row with a ``msg`` and nothing else of the user's."""
        return f', "timestamp": "{stamp(ns)}", {self._tails[stream]}'


# --- <VM>.log -----------------------------------------------------------------------------------------------


def log_line(ns: int, level: str, message: str) -> bytes:
    """One line. ``message`` may hold only printable characters: names and sentences go through ``show``."""
    return f"[{stamp(ns)} GMT {level}] {message}\n".encode()


def safe(sentence: str) -> str:
    """A sentence that a guest sent, fit for a line."""
    return show(sentence.encode("utf-8", "backslashreplace"))


def start_lines(ns: int, script: bytes, pid: int) -> bytes:
    lines = log_line(ns, INFO, f"CALL ARGS: {show(script)}")
    if pid:
        lines += log_line(ns, INFO, f"PID returned: {pid}")
    return lines


def exit_line(ns: int, origin: Origin, message: messages.Exit) -> bytes:
    who = origin.who
    if message.ending == Ending.ERRNO.value:
        return log_line(ns, WARNING, f"{who} could not start: {safe(message.text)}")
    if message.ending == Ending.LOST.value:
        return log_line(ns, WARNING, f"{who} lost: {safe(message.text)}")
    seconds = max(0, message.ended_boottime - message.started_boottime) / 1e9
    if message.ending == Ending.SIGNAL.value:
        how = f"signal: {signal_name(message.value)}"
    else:
        how = f"code: {message.value}"
    good = message.ending == Ending.CODE.value and message.value == 0
    line = log_line(ns, INFO if good else WARNING, f"{who} exited after {seconds:05f} seconds with {how}")
    if message.asks_reboot:
        line += log_line(ns, INFO, f"{who} asks for a reboot")
    return line


def output_lines(ns: int, origin: Origin, stream: Stream, data: bytes) -> bytes:
    """Whole lines that arrived together, or a part of a line that is shown early."""
    start = f"[{stamp(ns)} GMT INFO] {origin.who} {stream.filename}: "
    if len(data) <= BLOCK_LIMIT:
        return f"{start}{data!r}\n".encode()
    return "".join(f"{start}{piece!r}\n" for piece in _pieces(data)).encode()


def _pieces(data: bytes) -> list[bytes]:
    pieces, begin, end = [], 0, 0
    for line in data.splitlines(keepends=True):
        if end > begin and end + len(line) - begin > BLOCK_LIMIT:
            pieces.append(data[begin:end])
            begin = end
        end += len(line)
    return [*pieces, data[begin:]]


def cut_line(ns: int, origin: Origin, stream: Stream, offset: int, path: str) -> bytes:
    note = f"{origin.who} {stream.filename}: a line is cut here; all of it is in {path} from byte {offset} on"
    return log_line(ns, INFO, note)


def gap_line(ns: int, origin: Origin, message: messages.Gap) -> bytes:
    stream = Stream(message.stream).filename
    text = f"{origin.who} {stream}: {message.length} bytes from byte {message.offset} on are missing"
    return log_line(ns, WARNING, f"{text}: {safe(message.reason)}")


def capture_ended_line(ns: int, origin: Origin, reason: str) -> bytes:
    return log_line(ns, WARNING, f"{origin.who} capture ended early: {safe(reason)}")


def life_line(ns: int, spool: bytes) -> bytes:
    return log_line(ns, INFO, f"a new life of this VM begins (spool {spool.hex()})")


def reboot_line(ns: int) -> bytes:
    return log_line(ns, INFO, "the VM has booted again")


# --- <VM>.json ----------------------------------------------------------------------------------------------

# The fast path takes a block whose bytes need no escape, none of whose lines is blank, begins or ends with a
# space, or could be a JSON value: an array, a number or a word. (Objects and strings are out by `{` and `"`.)
_PLAIN = bytes(byte for byte in range(0x20, 0x7F) if byte not in b'"\\{') + b"\n"
_NOT_PLAIN_LINE = re.compile(rb"\n(?:[ \n]|\[[^\n]*\]\n|-?[0-9][0-9.eE+-]*\n|(?:true|false|null)\n)")

_NUMBER = re.compile(r"-?[0-9][0-9.eE+-]*")
_WORDS = frozenset(("true", "false", "null"))
_CLOSING = {"{": "}", "[": "]", '"': '"'}
_MAX_DEPTH = 256
"""pandas stops at 1,024 and Python's recursion about there: a deeper value is text."""
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

_encode = json.JSONEncoder().encode


def json_rows(ns: int, origin: Origin, stream: Stream, data: bytes) -> bytes:
    """A row for each line of ``data`` that is not blank; lines end as ``bytes.splitlines`` ends them."""
    tail = origin.tail(stream, ns)
    if not data.translate(None, _PLAIN):
        block = data if data.endswith(b"\n") else data + b"\n"
        if b" \n" not in block and len(block) > 1 and not _NOT_PLAIN_LINE.search(b"\n" + block):
            end = b'"' + tail.encode()
            return b'{"msg": "' + block[:-1].replace(b"\n", end + b'{"msg": "') + end
    rows = []
    for line in data.splitlines():
        text = line.decode("utf-8", "backslashreplace").strip()
        if not text:
            continue
        if _may_be_json(text):
            rows.append(_row(text, ns, origin, stream, tail))
        else:
            rows.append(f'{{"msg": {_encode(text)}{tail}')
    return "".join(rows).encode()


def cut_row(ns: int, origin: Origin, stream: Stream, data: bytes, path: str) -> bytes:
    """The row for a line of which only the start is shown; ``cut`` names the file that has all of it."""
    text = data.decode("utf-8", "backslashreplace").strip()
    row = {"msg": text, "timestamp": stamp(ns), **origin.keys[stream], "cut": path}
    return (json.dumps(row) + "\n").encode()


def _may_be_json(text: str) -> bool:
    first = text[0]
    if first in _CLOSING:
        return text[-1] == _CLOSING[first]
    return text in _WORDS or (first in "-0123456789" and _NUMBER.fullmatch(text) is not None)


def _row(text: str, ns: int, origin: Origin, stream: Stream, tail: str) -> str:
    try:
        value = (_careful_decoder if _NEEDS_CARE.search(text) else _decoder).decode(text)
    except (ValueError, RecursionError):
        return f'{{"msg": {_encode(text)}{tail}'
    if text.count("{") + text.count("[") > _MAX_DEPTH and _deeper_than(value, _MAX_DEPTH):
        return f'{{"msg": {_encode(text)}{tail}'
    if "\\ud" in text or "\\uD" in text:
        value = _without_lone_surrogates(value)
    if not isinstance(value, dict):
        return f'{{"msg": {_encode(value)}{tail}'
    value["timestamp"] = stamp(ns)
    for key, item in origin.keys[stream].items():
        value.setdefault(key, item)
    return _encode(value) + "\n"


# Python reads more than JSON is, and more than pandas takes. NaN becomes null, which pandas reads as NaN;
# what no 64-bit reader can hold stays as the text it was.


def _integer(digits: str) -> Union[int, str]:
    if len(digits) > 20:  # int() of thousands of digits is slow, then an error
        return digits
    value = int(digits)
    return value if -(2**63) <= value < 2**63 else digits


def _real(digits: str) -> Union[float, str]:
    value = float(digits)
    return value if math.isfinite(value) else digits


def _constant(name: str) -> Optional[str]:
    return None if name == "NaN" else name


_decoder = json.JSONDecoder()
_careful_decoder = json.JSONDecoder(parse_int=_integer, parse_float=_real, parse_constant=_constant)
_NEEDS_CARE = re.compile("[0-9]{19}|[eE][+]?[0-9]{3}|NaN|Infinity")  # only these can make what the hooks mend


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            item
            for parent in level
            if isinstance(parent, (dict, list))
            for item in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return False
    return True


def _without_lone_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return _LONE_SURROGATE.sub(lambda match: f"\\u{ord(match.group()):04x}", value)
    if isinstance(value, list):
        return [_without_lone_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_lone_surrogates(key): _without_lone_surrogates(item) for key, item in value.items()}
    return value
