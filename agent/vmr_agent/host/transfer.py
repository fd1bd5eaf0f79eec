"""What lives here: the collector's part in a transfer: requests about files passed to one VM, its replies passed back.

It must not know: what is transferred, or how far it is. The command that transfers knows that: it opens the user's
files with the user's permissions, so that neither a path nor a slow disk of a user's is ever the collector's. It
also asks again what a session's end leaves unanswered.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Callable

from vmr_agent.errors import Problem, show
from vmr_agent.wire import framing, messages

Answer = Callable[[Mapping[str, Any], bytes], None]
"""Tells the command: a row, and the bytes of a file that follow it."""

VERBS = frozenset(
    ("stat", "list", "read", "digest", "write", "place", "mkdir", "link", "rename", "remove", "sync", "stage")
)


class Relay:
    """What commands have asked of one VM and it hasn't answered.

    What one command asks at once may lie unread before a VM, what two ask ends its session. So what comes while there
    is no room is held back here: a command asks no more before it is answered.
    """

    def __init__(self, send: Callable[[messages.Message], bool], full: Callable[[], bool]) -> None:
        """``full``: whether a request should wait; :meth:`go_on` is to be called when that has changed."""
        self._send, self._full = send, full
        self._asked: dict[bytes, Answer] = {}
        self._held: dict[bytes, messages.Request] = {}
        """Those of them that are not sent yet, in their order."""

    def ask(self, row: Mapping[str, Any], data: bytes, answer: Answer, offline: str) -> None:
        """Pass a request on; ``offline`` says why that can't be when it can't.

        ``row`` has the request's ``id`` in hex digits, so that asking again is the same request, ``ask``, the verb,
        and ``args``, in which text stands for bytes, by `os.fsdecode`.
        """
        request = _request(row, data)
        if self._held or self._full():
            self._held[request.request] = request
        elif not self._send(request):
            answer({"id": row["id"], "ok": False, "again": True, "error": offline}, b"")
            return
        self._asked[request.request] = answer

    def go_on(self) -> None:
        """There is room again, for some."""
        while self._held and not self._full():
            self._send(self._held.pop(next(iter(self._held))))

    def take(self, reply: messages.Reply) -> bool:
        """Pass a reply back; False when it answers nothing of this."""
        answer = self._asked.get(reply.request)
        if answer is None:
            return False
        follows = reply.ok and reply.result.get("follows") is True
        if not follows:
            del self._asked[reply.request]
        data = reply.result.get("data")
        result = {
            key: os.fsdecode(value) if isinstance(value, bytes) else value
            for key, value in reply.result.items()
            if key != "data"
        }
        row = {
            "id": reply.request.hex(),
            "ok": reply.ok,
            "error": show(reply.error.encode()),
            "result": result,
            "follows": follows,
        }
        answer(row, data if isinstance(data, bytes) else b"")
        return True

    def ended(self, reason: str) -> None:
        """The session is over: what it hasn't answered is to be asked again."""
        self._held.clear()
        asked, self._asked = self._asked, {}
        for request, answer in asked.items():
            answer({"id": request.hex(), "ok": False, "again": True, "error": reason}, b"")


def _request(row: Mapping[str, Any], data: bytes) -> messages.Request:
    verb, given = row.get("ask"), row.get("args")
    if not isinstance(verb, str) or verb not in VERBS or not isinstance(given, dict):
        raise Problem("cannot read the request: no verb about files, or no arguments")
    try:
        args: dict[str, messages.Scalar] = {
            key: os.fsencode(value) if isinstance(value, str) else value for key, value in given.items()
        }
        if verb == "write":
            args["data"] = data
        request = messages.Request(request=bytes.fromhex(str(row.get("id"))), verb=verb, args=args)
        size = len(messages.pack(request, to=bytes(8), n=messages.MAX_INT))
    except ValueError as error:
        raise Problem(f"cannot read the request: {error}") from None
    if size > framing.MAX_PAYLOAD:
        raise Problem("cannot read the request: it fits into no frame")
    return request
