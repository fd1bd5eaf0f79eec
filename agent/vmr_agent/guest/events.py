"""What lives here: watchdog: its observer and threads, and what they told of as hints that there is something to scan.

Events get lost (a full queue, a tree moved in, a file system changed from its other side), and their threads can
die; so nothing here need be true. It must not know: what a VMR is but that its name is `<start time>/<directory>`.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Container
from typing import Any, NamedTuple, Union

_MAX_HINTS = 10_000  # VMRs named by events between two scans; more mean: look at everything
_KINDS = frozenset({"created", "modified", "closed", "moved", "deleted", "attrib"})
_COMES_OR_GOES = frozenset({"created", "moved", "deleted"})


class Hints(NamedTuple):
    """What events told of since the last scan. Nothing in it need be true still."""

    touched: frozenset[bytes]
    """VMRs in which something changed."""
    vanished: frozenset[bytes]
    """VMRs and start times whose directory went away; there may be another by now."""
    everything: bool
    """Too much was told to be kept."""


class Events:
    """watchdog's observer, and what its threads told of: all that other threads touch is in here."""

    def __init__(self) -> None:
        self.heard = False
        self.ignored: set[bytes] = set()
        """VMRs whose contents mean nothing any more; a script that writes beside itself must not keep us awake."""
        self.observed: frozenset[bytes] = frozenset()
        """VMRs of which somebody wants to hear all the same."""
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._lock = threading.Lock()
        self._closed = False
        self._rung = False
        self._touched: set[bytes] = set()
        self._vanished: set[bytes] = set()
        self._everything = False
        self._unnamed = False
        self._observer: Any = None
        self._threads: list[threading.Thread] = []

    def fileno(self) -> int:
        return self._read

    def start(self, path: bytes) -> None:
        """Watch the tree at ``path``; raises whatever watchdog does."""
        # Imported here, as it takes 43 ms that a verb must not pay.
        import watchdog.events as kinds
        from watchdog.observers.inotify import InotifyObserver

        # 7.1 warns of watches it made twice, at length.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"watchdog\.")
        if not logging.getLogger("watchdog").handlers:
            logging.getLogger("watchdog").addHandler(logging.NullHandler())
        prefix = path.rstrip(b"/") + b"/"
        hear = self._hear

        class Handler(kinds.FileSystemEventHandler):
            def dispatch(self, event: kinds.FileSystemEvent) -> None:
                hear(prefix, event.event_type, event.src_path, getattr(event, "dest_path", ""))

        before = set(threading.enumerate())
        observer: Any = InotifyObserver()
        # Newer ones tell of each open and close too: our own scans would make a storm of events.
        names = ["FileClosedEvent"]
        names += [f"{what}{kind.title()}Event" for what in ("File", "Dir") for kind in _KINDS - {"closed"}]
        wanted = [getattr(kinds, name) for name in names if hasattr(kinds, name)]
        place = {"path": os.fsdecode(path), "recursive": True}
        try:
            try:
                observer.schedule(Handler(), **place, event_filter=wanted)
            except TypeError:  # before watchdog 4, which has no such argument
                observer.schedule(Handler(), **place)
            observer.start()
        except BaseException:
            _stop(observer)
            raise
        self._observer = observer
        # There are two or three, and each can die alone, of a KeyError in watchdog.
        self._threads = [thread for thread in threading.enumerate() if thread not in before]

    def alive(self) -> bool:
        return self._observer is not None and all(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        if self._observer is not None:
            _stop(self._observer)
            self._observer = None

    def close(self) -> None:
        self.stop()
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._read)
                os.close(self._write)

    def only(self, vmrs: Container[bytes]) -> bool:
        """Whether what was heard is of these VMRs alone, as far as can be told."""
        with self._lock:
            named = bool(self._touched) and not (self._vanished or self._everything or self._unnamed)
            return named and all(name in vmrs for name in self._touched)

    def hush(self) -> None:
        """Be no longer readable for what was heard so far; it is kept for :meth:`take`."""
        with self._lock:
            self._hush()

    def take(self) -> Hints:
        with self._lock:
            hints = Hints(frozenset(self._touched), frozenset(self._vanished), self._everything)
            self._touched.clear()
            self._vanished.clear()
            self._everything = self._unnamed = False
            self._hush()
            self.heard = False
        return hints

    def _hush(self) -> None:
        if self._rung and not self._closed:
            os.read(self._read, 1)
        self._rung = False

    def _hear(self, prefix: bytes, kind: str, source: Union[str, bytes], target: Union[str, bytes]) -> None:
        # In watchdog's thread, which an exception would end.
        try:
            if kind not in _KINDS:
                return
            touched: set[bytes] = set()
            vanished: set[bytes] = set()
            relevant = False
            for path, goes in ((source, kind in ("deleted", "moved")), (target, False)):
                raw = os.fsencode(path or "")
                parts = raw[len(prefix) :].split(b"/", 2) if raw.startswith(prefix) else []
                name = b"/".join(parts[:2])
                if len(parts) > 1:
                    unheard = name in self.ignored and name not in self.observed
                    if unheard and (len(parts) > 2 or kind not in _COMES_OR_GOES):
                        continue
                    touched.add(name)
                if goes and len(parts) in (1, 2):
                    vanished.add(name)
                relevant = relevant or bool(raw)
            if relevant:
                self._note(touched, vanished)
        except Exception:
            self._note(set(), set(), everything=True)

    def _note(self, touched: set[bytes], vanished: set[bytes], *, everything: bool = False) -> None:
        with self._lock:
            self._everything = self._everything or everything
            self._unnamed = self._unnamed or not touched
            if len(self._touched) + len(self._vanished) < _MAX_HINTS:
                self._touched |= touched
                self._vanished |= vanished
            else:
                self._everything = True
            self.heard = True
            if not self._rung and not self._closed:
                self._rung = True
                os.write(self._write, b"!")


def _stop(observer: Any) -> None:
    # It joins its threads, and one that hangs in watchdog must not take the daemon along.
    thread = threading.Thread(target=observer.stop, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # there can be no more threads; it is left behind
        return
    thread.join(1.0)
