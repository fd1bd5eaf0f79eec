"""What lives here: a fuzzer's bytes, read as choices. It must not know: what is fuzzed.

Bytes that have run out read as zeros, so that any input is a whole one and a short one stays short.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from vmr_agent.wire import messages

T = TypeVar("T")

_INTEGERS = (0, 1, 2, 3, 8, 64, 255, 4_096, 65_536, 2**31, 2**32, 2**40, 2**62, 2**63 - 1)
_TEXTS = (
    *("", "code", "signal", "errno", "lost", "gone", "guest", "host", "schedule", "exited", "x" * 4_096),
    *("\x1b[31m\r\n[2024-06-06 00:43:06 GMT INFO] fake", "é\u2028\u202e", "line\nline\n"),
)


class Given:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return max(0, len(self._data) - self._at)

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def take(self, size: int) -> bytes:
        """So many bytes, or as many as there are."""
        taken = self._data[self._at : self._at + size]
        self._at += len(taken)
        return taken

    def rest(self) -> bytes:
        return self.take(self.left)

    def pick(self, options: Sequence[T]) -> T:
        return options[self.byte() % len(options)]

    def blob(self) -> bytes:
        """At most 255 bytes of the input, or up to 20 KiB of one byte."""
        size = self.byte()
        return self.take(size) if size < 250 else bytes((self.byte(),)) * (1 << (9 + size - 250))

    def integer(self) -> int:
        kind = self.byte()
        if kind < 128:
            return kind
        return int.from_bytes(self.take(8), "big") % 2**63 if kind > 250 else self.pick(_INTEGERS)

    def text(self) -> str:
        kind = self.byte()
        return _TEXTS[kind] if kind < len(_TEXTS) else self.blob().decode("utf-8", "ignore")

    def value(self, kind: str) -> Any:
        """Something of a kind of the wire's."""
        if kind == "uint":
            return self.integer()
        if kind == "int":
            return self.integer() * self.pick((1, -1))
        if kind == "bool":
            return bool(self.byte() & 1)
        if kind == "text":
            return self.text()
        if kind in ("bin", "name"):
            return self.blob() or b"-4/a"
        if kind in ("bin8", "bin16"):
            return bytes((self.byte(),)) * int(kind[3:])
        if kind == "map":
            made = {self.text(): self.pick((None, True, 7, "text", b"\xff")) for _ in range(self.byte() % 4)}
            return made
        if kind == "tails":
            return ((self.integer(), self.integer()), (self.integer(), self.integer()))
        assert kind == "marks", kind
        return tuple((self.integer(), self.integer()) for _ in range(self.byte() % 5))

    def message(self, cls: Any, **known: Any) -> messages.Message:
        """A message of a class, its fields of the right kinds; those that are known are not chosen."""
        values = dict(known)
        for name, kind, optional, _ in messages.FIELDS[cls]:
            if name not in known:
                absent = optional and self.byte() & 1
                values[name] = None if absent else self.value(kind)
        made: messages.Message = cls(**values)
        return made
