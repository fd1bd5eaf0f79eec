"""What lives here: the local socket's verbs, at the daemon's end: who asks, what is done for it, what it is told.

It must not know: how anything is done; the supervisor does it. Host and guest ask for the same things in other
words; the host's are in daemon.py.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Callable, Union

from vmr_agent import control
from vmr_agent.errors import Problem, show
from vmr_agent.guest import machine, roster
from vmr_agent.guest.link import Link
from vmr_agent.guest.roster import Entry
from vmr_agent.guest.settings import Settings
from vmr_agent.guest.shipper import Shipper
from vmr_agent.guest.supervisor import Killed, News, Supervisor
from vmr_agent.runs import RunId, RunState, Trigger


class Verbs:
    """All who have connected to the local socket. It registers them with the loop's selector by itself."""

    def __init__(
        self,
        listener: socket.socket,
        selector: selectors.BaseSelector,
        *,
        settings: Settings,
        supervisor: Supervisor,
        shipper: Shipper,
        link: Link,
    ) -> None:
        self._listener = listener
        self._selector = selector
        self._settings = settings
        self._supervisor = supervisor
        self._shipper = shipper
        self._link = link
        self._clients: set[control.Client] = set()

    def fileno(self) -> int:
        """Readable when somebody wants to connect."""
        return self._listener.fileno()

    def close(self) -> None:
        for client in list(self._clients):
            self._drop(client)
        self._listener.close()

    def accept(self) -> None:
        """Take one who connects; the listening socket is readable."""
        with suppress(OSError):
            sock, _ = self._listener.accept()
            if not control.may_ask(sock) or len(self._clients) >= control.MAX_CLIENTS:
                sock.close()
                return
            client = control.Client(sock)
            self._clients.add(client)
            self._selector.register(client, selectors.EVENT_READ, lambda: self._serve(client))

    def tell(self, news: Iterable[tuple[News, Union[bytes, RunId]]]) -> None:
        """Tell those who want to hear of it that there is something to look at."""
        for kind, subject in news:
            for client in list(self._clients):
                if subject == (client.observing if kind is News.TOUCHED else client.watching):
                    client.nudge({"event": kind.value})
                    self._attend(client)

    # --- clients ---

    def _serve(self, client: control.Client) -> None:
        client.flush()
        for request in client.read():
            client.say(self._answer(client, request))
        self._attend(client)

    def _attend(self, client: control.Client) -> None:
        """Wait for what the client may do next, or let it go."""
        if client not in self._clients:
            return
        if not client.events:
            self._drop(client)
        elif self._selector.get_key(client).events != client.events:
            self._selector.modify(client, client.events, lambda: self._serve(client))

    def _drop(self, client: control.Client) -> None:
        self._clients.discard(client)
        self._selector.unregister(client)
        client.sock.close()
        self._observe()

    def _observe(self) -> None:
        self._supervisor.watcher.observe(each.observing for each in self._clients if each.observing)

    def _answer(self, client: control.Client, request: Mapping[str, Any]) -> dict[str, Any]:
        verbs: dict[str, Callable[[control.Client, Mapping[str, Any]], dict[str, Any]]] = {
            "rerun": self._rerun,
            "observe": self._watch_directory,
            "status": self._status,
            "start": self._start,
            "kill": self._kill,
            "hold": self._hold,
            "resume": self._resume,
            "reset": self._reset,
        }
        verb = verbs.get(request["verb"])
        try:
            if verb is None:
                raise Problem(
                    f"cannot do {request['verb']!r}: unknown verb", hint="verbs: " + ", ".join(verbs)
                )
            return {"ok": True, **verb(client, request)}
        except Problem as problem:
            return {"ok": False, "error": problem.args[0], "hint": problem.hint}
        except OSError as error:
            return {"ok": False, "error": f"cannot do {request['verb']!r}: {error}", "hint": None}

    # --- one function a verb ---

    def _rerun(self, client: control.Client, request: Mapping[str, Any]) -> dict[str, Any]:
        run = self._supervisor.rerun(_name(request), Trigger.RERUN, _request_id(request))
        client.watching = run.info.run
        return {
            "run": run.info.run.hex(),
            "attempt": run.info.attempt,
            "path": os.fspath(run.path.absolute()),
        }

    def _watch_directory(self, client: control.Client, request: Mapping[str, Any]) -> dict[str, Any]:
        client.observing = self._supervisor.known(_name(request)).name
        self._observe()
        return {}

    def _status(self, client: control.Client, request: Mapping[str, Any]) -> dict[str, Any]:
        supervisor, link = self._supervisor, self._link
        now = machine.boottime()
        why = supervisor.waiting(now)
        rows = []
        for name in supervisor.roster.names():
            entry = supervisor.roster.get(name)
            assert entry is not None
            delivered = self._delivered(entry)
            rows.append(roster.row(entry, waiting=why.get(name, ""), delivered=delivered, now=now))
        since, by = supervisor.since_zero()
        return {
            "vmrs": rows,
            "configured": supervisor.configured(),
            "held": supervisor.held,
            "schedule": "on" if self._settings.schedule else "off",
            "since_zero_s": since / 1e9 if since is not None else None,
            "zero_by": by,
            "problem": supervisor.problem,
            "port": self._settings.port,
            "port_state": link.state.value,
            "port_reason": link.reason,
            "session": link.open,
            "dropped": link.dropped,
        }

    def _delivered(self, entry: Entry) -> str:
        run = entry.latest
        if run is None:
            return ""
        delivered = self._shipper.acked(run.info.run)
        if delivered is None:
            return "yes"
        lengths = run.lengths()
        total, held = lengths.stdout + lengths.stderr, delivered[1] + delivered[2]
        if held >= total and delivered[0] >= RunState.STARTED:
            return "so far" if run.closed() is None else "almost"
        return f"{100 * held // total} %" if held else "no"

    def _start(self, client: control.Client, request: Mapping[str, Any]) -> dict[str, Any]:
        if not self._supervisor.start(0, "guest"):
            raise Problem("cannot start: time zero is set already", hint="vmr-agent status shows when")
        return {"configured": self._supervisor.configured()}

    def _kill(self, client: control.Client, request: Mapping[str, Any]) -> dict[str, Any]:
        number = signal_number(request.get("signal", signal.SIGTERM.value))
        killed = self._supervisor.kill(_name(request), number)
        return {"attempt": killed.attempt, "processes": killed_rows(killed)}

    def _hold(self, client: control.Client, request: Mapping[str, Any]) -> dict[str, Any]:
        self._supervisor.hold()
        return {}

    def _resume(self, client: control.Client, request: Mapping[str, Any]) -> dict[str, Any]:
        self._supervisor.resume()
        return {}

    def _reset(self, client: control.Client, request: Mapping[str, Any]) -> dict[str, Any]:
        self._supervisor.forget()
        self._link.renew("reset")
        return {}


def signal_number(value: object) -> int:
    """A signal's number, as a request gives it. Raises Problem."""
    if type(value) is not int or not 0 < value < signal.NSIG:
        raise Problem("cannot read the request: signal must be a signal's number")
    return value


def killed_rows(killed: Killed) -> list[dict[str, Union[int, str]]]:
    return [{"pid": pid, "name": show(os.fsencode(name))} for pid, name in killed.processes.items()]


def _name(request: Mapping[str, Any]) -> bytes:
    name = request.get("vmr")
    if not isinstance(name, str):
        raise Problem('cannot read the request: "vmr" must be a VMR name')
    try:
        return os.fsencode(name)
    except UnicodeEncodeError:
        raise Problem('cannot read the request: "vmr" holds half of a surrogate pair') from None


def _request_id(request: Mapping[str, Any]) -> bytes:
    try:
        return bytes.fromhex(str(request.get("request", "")))[:16]
    except ValueError:
        raise Problem('cannot read the request: "request" must be hex digits') from None
