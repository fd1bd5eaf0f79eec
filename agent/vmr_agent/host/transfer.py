"""What lives here: the collector's part in a transfer: requests about files passed to one VM, its replies passed back.

It must not know: what is transferred, or how far it is. The command that transfers knows that: it opens the user's
files with the user's permissions, so that neither a path nor a slow disk of a user's is ever the collector's. It
also asks again what a session's end leaves unanswered.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Callable, NamedTuple

from vmr_agent import control
from vmr_agent.errors import Problem, show
from vmr_agent.wire import framing, messages

Answer = Callable[..., None]
"""Tells the command: a row, and the bytes of a file that follow it, in one part or several."""

VERBS = frozenset(
    ("stat", "list", "read", "digest", "write", "place", "mkdir", "link", "rename", "remove", "sync", "stage")
)


class _Asked(NamedTuple):
    answer: Answer
    client: object


class Relay:
    """What commands have asked of one VM and it hasn't answered.

    What one command asks at once may lie unread before a VM, what two ask ends its session. So what comes while there
    is no room is held back here: a command asks no more before it is answered.
    """

    def __init__(
        self,
        send: Callable[[messages.Message], bool],
        send_pieces: Callable[[bytes, int, bytes], object],
        full: Callable[[], bool],
    ) -> None:
        """``send_pieces``: sends what a request, by its id, has of a file from an offset on. ``full``: whether a
        request should wait; :meth:`go_on` is to be called when that has changed."""
        self._send, self._send_pieces, self._full = send, send_pieces, full
        self._asked: dict[bytes, _Asked] = {}
        self._held: dict[bytes, tuple[messages.Request, bytes]] = {}
        """Those of them that are not sent yet, in their order, with what they are to write."""
        self._pieces: list[messages.Piece] = []
        """Of one request, one following the other, not passed back yet."""
        self._size = 0

    def ask(
        self, row: Mapping[str, Any], data: bytes, answer: Answer, offline: str, *, client: object = None
    ) -> None:
        """Pass a ``client``'s request on; ``offline`` says why that can't be when it can't.

        ``row`` has the request's ``id`` in hex digits, so that asking again is the same request, ``ask``, the verb,
        and ``args``, in which text stands for bytes, by `os.fsdecode`.
        """
        request = _request(row, data)
        before = self._asked.get(request.request)
        if before is not None and before.client is not client:
            # Who asked lost his connection to us and has another; the old one is owed an answer.
            before.answer(
                {"id": row["id"], "ok": False, "again": True, "error": "asked over another connection"}
            )
        self._asked[request.request] = _Asked(answer, client)
        if self._held or self._full():
            self._held[request.request] = (request, data)
        elif not self._pass_on(request, data) and self._asked.pop(request.request, None) is not None:
            # Else the session has ended meanwhile, and it is answered already.
            answer({"id": row["id"], "ok": False, "again": True, "error": offline})

    def go_on(self) -> None:
        """There is room again, for some."""
        while self._held and not self._full():
            self._pass_on(*self._held.pop(next(iter(self._held))))

    def piece(self, piece: messages.Piece) -> None:
        """Bytes of a file, which :meth:`flush` passes back with those that follow them."""
        if piece.request not in self._asked:
            return
        if self._pieces:
            last = self._pieces[-1]
            follows = (last.request, last.at + len(last.data)) == (piece.request, piece.at)
            if not follows or self._size > control.MAX_DATA - messages.PIECE:
                self.flush()
        self._pieces.append(piece)
        self._size += len(piece.data)

    def flush(self) -> None:
        """To be called when all that has come by now is taken."""
        if self._pieces:
            pieces, self._pieces, self._size = self._pieces, [], 0
            first = pieces[0]
            row = {"id": first.request.hex(), "ok": True, "follows": True, "at": first.at}
            self._asked[first.request].answer(row, *(each.data for each in pieces))

    def take(self, reply: messages.Reply) -> bool:
        """Pass a reply back; False when it answers nothing of this."""
        asked = self._asked.get(reply.request)
        if asked is None:
            return False
        self.flush()
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
        }
        asked.answer(row, data if isinstance(data, bytes) else b"")
        return True

    def ended(self, reason: str) -> None:
        """The session is over: what it hasn't answered is to be asked again."""
        self.flush()
        self._held.clear()
        asked, self._asked = self._asked, {}
        for request, each in asked.items():
            each.answer({"id": request.hex(), "ok": False, "again": True, "error": reason})

    def _pass_on(self, request: messages.Request, data: bytes) -> bool:
        if not self._send(request):
            return False
        offset = request.args.get("offset")
        if data and request.verb == "write" and isinstance(offset, int):
            self._send_pieces(request.request, offset, data)
        return True


def _request(row: Mapping[str, Any], data: bytes) -> messages.Request:
    verb, given = row.get("ask"), row.get("args")
    if not isinstance(verb, str) or verb not in VERBS or not isinstance(given, dict):
        raise Problem("cannot read the request: no verb about files, or no arguments")
    try:
        args: dict[str, messages.Scalar] = {
            key: os.fsencode(value) if isinstance(value, str) else value for key, value in given.items()
        }
        if verb == "write":
            args["size"] = len(data)
            offset = args.get("offset")
            if type(offset) is not int or not 0 <= offset <= messages.MAX_INT - len(data):
                raise Problem("cannot read the request: no offset to write at")
        request = messages.Request(request=bytes.fromhex(str(row.get("id"))), verb=verb, args=args)
        size = len(messages.pack(request, to=bytes(8), n=messages.MAX_INT))
    except ValueError as error:
        raise Problem(f"cannot read the request: {error}") from None
    if size > framing.MAX_PAYLOAD:
        raise Problem("cannot read the request: it fits into no frame")
    return request
