"""What lives here: a VM's files as a verb sees them: requests through the collector, many under way at once.

It must not know: which files, or what for. The one place that knows how far a transfer is, so the one that goes on
after a lost session, a VM that rebooted, a collector that was started again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import select
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Callable, Optional

from vmr_agent import control
from vmr_agent.cli.collected import collector
from vmr_agent.cli.progress import Progress
from vmr_agent.contents import DIGESTS
from vmr_agent.errors import Problem, show
from vmr_agent.wire.messages import PIECE

# Bytes of files under way; with one request more, less than what the collector keeps for us unread.
WINDOW = 2 << 20
PATIENCE = 300.0  # s without any answer: longer than a slow VM's reboot
_AGAIN = 0.3  # s
_FAREWELL = 2.0  # s; for tidying up in the VM when all else has failed

Answered = Callable[[Mapping[str, Any], bytes], None]
Came = Callable[[int, memoryview], None]


def _nothing(result: Mapping[str, Any], data: bytes) -> None:
    pass


@dataclass
class Ask:
    """One request, what to do with its answer, and an id that stays when it is asked again."""

    verb: str
    args: Mapping[str, Any]
    """Bytes are bytes on the wire, in the guest and here."""
    data: bytes = b""
    answered: Answered = _nothing
    came: Optional[Came] = None
    """Takes the bytes of a file that come before the answer, from their offset on."""
    size: int = PIECE
    """How many bytes of files it has under way, if it is a large one."""
    id: str = field(default_factory=lambda: os.urandom(16).hex())

    def ask_again(self) -> None:
        """Where bytes come it is another request: some for the first may still be on their way."""
        if self.came is not None:
            self.id = os.urandom(16).hex()


class Remote:
    """One VM. Raises Problem for what can't be done; OSError never."""

    def __init__(
        self, connect: Callable[[], control.Connection], vm: str, verb: str, *, waiting: Callable[[str], None]
    ) -> None:
        """``waiting`` is told what is waited for, and with nothing that it came."""
        self.vm = vm
        self.digest = DIGESTS[0]
        """The kind of digest that the VM is fastest at, once it has answered a `stat`."""
        self._connect, self._verb, self._waiting = connect, verb, waiting
        self._collector = connect()
        self._answered_once = False
        self._lost: Optional[float] = None  # since when nobody has answered

    def ask(self, verb: str, **args: Any) -> tuple[Mapping[str, Any], bytes]:
        """Ask one thing and wait for its answer."""
        found: list[tuple[Mapping[str, Any], bytes]] = []
        self.all(iter([Ask(verb, args, answered=lambda result, data: found.append((result, data)))]))
        return found[0]

    def all(self, asks: Iterator[Ask]) -> None:
        """Ask all of it, in this order, with :data:`WINDOW` and less than one request more under way.

        The VM takes them in this order too: after a lost session all that had no answer are asked again, the
        earliest first.
        """
        flying: dict[str, Ask] = {}
        while True:
            while sum(ask.size for ask in flying.values()) < WINDOW:
                ask = next(asks, None)
                if ask is None:
                    break
                flying[ask.id] = ask
                self._send(ask)
            if not flying:
                return
            try:
                row, data = self._collector.hear()
            except OSError:
                self._go_on(flying, "the collector went away")
                continue
            self._take(row, data, flying)

    def leave(self, verb: str, **args: Any) -> None:
        """Ask one last thing if it can be had soon; whatever comes of it is fine."""
        with suppress(Problem, OSError), self._connect() as collector:
            collector.say(self._row(Ask(verb, args)))
            select.select([collector], [], [], _FAREWELL)

    # --- inside ---

    def _take(self, row: Mapping[str, Any], data: memoryview, flying: dict[str, Ask]) -> None:
        if row.get("again"):
            if not self._answered_once:
                raise Problem(f"cannot {self._verb}: {row['error']}")
            self._go_on(flying, str(row["error"]))
            return
        if "id" not in row:
            raise Problem(str(row.get("error")), hint=row.get("hint"))
        ask = flying.get(str(row["id"]))
        if ask is None:
            return  # to what was given up
        self._answered_once = True
        if self._lost is not None:
            self._lost = None
            self._waiting("")
        if row.get("follows"):
            if ask.came is None:
                raise self.nonsense("it sends bytes where none were asked for")
            ask.came(self.number(row, "at"), data)
            return
        del flying[ask.id]
        if not row.get("ok"):
            raise Problem(f"cannot {self._verb} {self.vm}:{row.get('error')}")
        if ask.verb == "stat" and row["result"].get("digest") in DIGESTS:
            self.digest = row["result"]["digest"]
        ask.answered(row["result"], bytes(data))

    def _go_on(self, flying: dict[str, Ask], reason: str) -> None:
        """Ask again what has no answer, when there is somebody to ask."""
        self._waiting(reason)
        self._lost = self._lost or time.monotonic()
        while True:
            if time.monotonic() - self._lost > PATIENCE:
                raise Problem(f"cannot {self._verb}: {reason}, and nothing was heard for {PATIENCE:.0f} s")
            time.sleep(_AGAIN)
            with suppress(Problem, OSError):
                self._collector.close()
                self._collector = self._connect()
                unanswered = list(flying.values())
                flying.clear()
                for ask in unanswered:
                    ask.ask_again()
                    flying[ask.id] = ask
                for ask in unanswered:
                    self._collector.say(self._row(ask), ask.data)
                return

    def _send(self, ask: Ask) -> None:
        with suppress(OSError):  # heard of when its answer is waited for
            self._collector.say(self._row(ask), ask.data)

    def _row(self, ask: Ask) -> dict[str, Any]:
        args = {
            key: os.fsdecode(value) if isinstance(value, bytes) else value for key, value in ask.args.items()
        }
        return {"verb": "files", "vm": self.vm, "id": ask.id, "ask": ask.verb, "args": args}

    # --- what a VM says is checked ---

    def number(self, facts: Mapping[str, Any], key: str, least: int = 0) -> int:
        value = facts.get(key)
        if type(value) is not int or not least <= value < 2**63:
            raise self.nonsense(f"{key} is {value!r}")
        return value

    def bytes(self, facts: Mapping[str, Any], key: str) -> bytes:
        value = facts.get(key)
        if not isinstance(value, str):
            raise self.nonsense(f"{key} is {value!r}")
        try:
            return os.fsencode(value)
        except UnicodeEncodeError:
            raise self.nonsense(f"{key} is {value!r}") from None

    def nonsense(self, what: str) -> Problem:
        return Problem(f"cannot {self._verb}: {self.vm} says what can't be: {show(what.encode())[:200]}")


def remote_of(args: argparse.Namespace, verb: str, progress: Progress) -> Remote:
    """The VM that a verb's arguments name. From here on an end by a signal tidies up, too."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    return Remote(lambda: collector(args), args.vm, verb, waiting=progress.note)


def part_name(name: bytes, word: bytes) -> bytes:
    """What ``name`` is called while half of it is there: a dot name, the same for the same ``word``."""
    return b"." + name[:100] + b"." + hashlib.sha256(word).hexdigest()[:16].encode() + b".part"


def kind(facts: Mapping[str, Any]) -> str:
    """What a path is in the VM, a word fit to be shown."""
    return show(str(facts.get("kind")).encode("utf-8", "backslashreplace"))[:40]


def _leave(*_: object) -> None:
    raise SystemExit(143)
