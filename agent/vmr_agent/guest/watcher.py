"""What lives here: the launch directory: which VMRs are staged, completely or not, changed, refused or gone.

The scan is the truth; events are hints. Everything is looked at through descriptors of directories, without
following links, so what was checked is what is used, whatever is swapped meanwhile. It must not know: what has run
(but for :meth:`Watcher.done`), the schedule, the clock: times come in as CLOCK_BOOTTIME seconds.

One module of over 400 lines: the scan and its checks share one idea of what a name is and what counts as a change.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Mapping
from typing import Any, Callable, Optional, Union

from vmr_agent.errors import show
from vmr_agent.guest.events import Events, Hints
from vmr_agent.schedule import Identity, Staging, Vmr, is_vmr_directory, parse_start_time

SCRIPT = "call_arguments.sh"
HOLD = ".hold"

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_NEVER = float("inf")
_MAX_LINKS = 40  # Linux's own limit

# A VMR's tree is walked to see whether anything in it changed. What is deeper, or comes after so many files,
# isn't looked at: 10,000 files take some 20 ms, and the walk stops the daemon.
_MAX_DEPTH = 16
_MAX_FILES = 10_000

# Without x bit nothing waits for a VMR but `quiet` (seconds), so its tree is walked seldom, and more seldom when
# it was left alone for long.
_WALK_S = 1.0
_WALK_STALE_S = 30.0

_JOIN_S = 0.02  # for what settles within that time what is heard of it waits, to be looked at with it
_TICK_S = 0.02  # more than the kernel's clock tick, by which it says when a directory was changed
_MAX_DOUBLINGS = 5  # of `settle`, for a tree that is written to after its x bit was set
_MAX_NAMED = 1000  # lines in the log about what isn't a VMR
# Between two tries to get events; twice as long after each, for each that fails costs watchdog 2 an inotify instance.
_RETRY_S = 30.0
_MOST_RETRY_S = 3_600.0


class Watcher:
    """What is staged in one launch directory.

    :meth:`scan` looks; ``vmrs``, ``held`` and ``problem`` say what it saw.
    """

    def __init__(
        self,
        launch_dir: Union[str, bytes, os.PathLike[Any]],
        *,
        settle: float = 0.02,
        log: Callable[[str], None],
        events: bool = True,
        mend: bool = True,
    ) -> None:
        self._path = os.path.abspath(os.fsencode(launch_dir))
        self._settle = settle
        self._log = log
        self._trusted = frozenset({0, os.geteuid()})
        self._held = False
        self._problem: Optional[str] = None
        self._starts: dict[bytes, _StartTime] = {}
        self._listed = _Listed()
        self._vmrs: dict[bytes, Vmr] = {}
        self._unready: dict[bytes, _Entry] = {}
        self._changed: set[bytes] = set()
        self._gone: set[bytes] = set()
        self._stirred: set[bytes] = set()
        self._named: set[bytes] = set()
        self._now = self._tick = 0.0
        self._due = _NEVER
        self._events = Events()
        self._want_events = events
        self._mends = mend
        self._watched: Optional[tuple[int, int]] = None
        self._tried: Optional[tuple[int, int]] = None
        self._next_try = 0.0
        self._wait = _RETRY_S
        self._complaint = ""

    # --- what was seen ---

    @property
    def vmrs(self) -> Mapping[bytes, Vmr]:
        return self._vmrs

    @property
    def held(self) -> bool:
        """``.hold`` is there."""
        return self._held

    @property
    def settling(self) -> bool:
        """A VMR is complete, and will be ready in a moment if nothing in it changes."""
        return any(entry.staging is Staging.SETTLING for entry in self._unready.values())

    @property
    def problem(self) -> Optional[str]:
        """Why nothing can be ready: "cannot use /var/launch: …"."""
        return self._problem

    def take_changes(self) -> tuple[set[bytes], set[bytes]]:
        """Names that appeared or changed, and names seen gone, since the last call.

        A name in both was replaced: first gone, then there again.
        """
        changed, self._changed = self._changed, set()
        gone, self._gone = self._gone, set()
        return changed, gone

    def done(self, name: bytes) -> None:
        """This VMR runs, or has run: what changes in its directory means nothing now, only a new VMR does."""
        start_time, _, directory = name.partition(b"/")
        start = self._starts.get(start_time)
        entry = start.entries.get(directory) if start is not None else None
        if entry is not None:
            entry.done = True
            self._events.ignored.add(name)

    def forget(self) -> None:
        """No VMR has run: history was forgotten. All of them are told again."""
        for start in self._starts.values():
            for entry in start.entries.values():
                entry.done = False
        self._events.ignored.clear()
        self._changed |= self._vmrs.keys()

    def observe(self, names: Iterable[bytes]) -> None:
        """Listen for what happens in these VMRs also when they have run: somebody waits for it."""
        self._events.observed = frozenset(names)

    def take_stirred(self) -> set[bytes]:
        """Observed VMRs in which something seems to have happened since the last call."""
        stirred, self._stirred = self._stirred, set()
        return stirred

    # --- when to look ---

    def start(self) -> None:
        """Make the launch directory if there is none, and begin to listen."""
        try:
            os.makedirs(self._path, mode=0o755, exist_ok=True)
        except OSError:
            pass  # the scan says what is wrong, for as long as it is
        root = self._open_root()
        if root is not None:
            os.close(root)

    def fileno(self) -> int:
        """Readable when an event has hinted at a change since the last scan, until :meth:`hush`."""
        return self._events.fileno()

    def hush(self) -> None:
        """What is hinted at so far was heard: :meth:`due` and :meth:`next_due` tell when to look."""
        self._events.hush()

    def next_due(self) -> Optional[float]:
        """When a scan can see something new though nothing happens: what is unchanged will have settled."""
        return None if self._due == _NEVER else self._due

    def due(self, now: float) -> bool:
        """Whether there is cause to scan: a time that has come, or an event.

        Those of a VMR that will have settled in a moment are none, for one change makes several.
        """
        if self._due <= now or not self._events.heard:
            return self._due <= now
        soon = {name for name, entry in self._unready.items() if entry.due <= now + _JOIN_S}
        return not (soon and self._events.only(soon))

    def alive(self) -> bool:
        """Whether events come in as far as they can be had; if not, the next scan sees to it."""
        return self._watched is None or self._events.alive()

    def close(self) -> None:
        self._watched = None
        self._events.close()

    # --- the scan ---

    def scan(self, now: float, *, full: bool = False) -> None:
        """Look at what is not ready and at what may have changed; with ``full`` at everything."""
        self._now, self._tick = now, time.monotonic()
        hints = self._events.take()
        observed = self._events.observed
        self._stirred |= observed if hints.everything else observed & (hints.touched | hints.vanished)
        if full:
            hints = hints._replace(everything=True)
        root = self._open_root()
        if root is None:
            self._held = False
            self._listed = _Listed()
            for start in list(self._starts.values()):
                self._forget_start(start)
        else:
            try:
                self._held = _look_up(HOLD, root) is not None
                if self._problem is None:
                    self._scan_root(root, hints)
                else:
                    for start in self._starts.values():
                        for entry in start.entries.values():
                            self._refuse(entry, self._problem)
            except OSError as error:  # nothing that vanishes raises, so the file system itself fails
                self._problem = f"cannot use {show(self._path)}: {error.strerror}"
            finally:
                os.close(root)
        waiting: tuple[Union[_Entry, _Listed], ...] = (
            *self._unready.values(),
            *self._starts.values(),
            self._listed,
        )
        # With a problem nothing was looked at, and what is due would stay so; it is looked for each second anyway.
        self._due = _NEVER if self._problem else min((one.due for one in waiting), default=_NEVER)

    def _at(self) -> float:
        # The time of this very look: with thousands of VMRs a scan takes longer than `settle`.
        return self._now + (time.monotonic() - self._tick)

    def _open_root(self) -> Optional[int]:
        """The launch directory, listened to from here on; None when there is none. Sets ``problem``."""
        real, wrong = _trace(self._path, self._trusted)
        root: Optional[int] = None
        identity = None
        try:
            root = os.open(real, _DIRECTORY)
        except FileNotFoundError:
            wrong = "it does not exist"
        except NotADirectoryError:
            wrong = "it is not a directory"
        except OSError as error:
            wrong = str(error.strerror)
        else:
            info = os.fstat(root)
            identity = (info.st_dev, info.st_ino)
            wrong = wrong or _distrust(info, "it", self._trusted)
        self._listen(real, identity)
        self._problem = None if wrong is None else f"cannot use {show(self._path)}: {wrong}"
        return root

    def _listen(self, path: bytes, identity: Optional[tuple[int, int]]) -> None:
        """Have events of what is now the launch directory. Before it is looked at, so nothing falls between."""
        if not self._want_events:
            return
        if self._watched is not None and not (self._watched == identity and self._events.alive()):
            self._watched = None
            self._events.stop()
        if identity is None or self._watched is not None:
            return
        if identity == self._tried and self._now < self._next_try:
            return
        self._wait = _RETRY_S if identity != self._tried else min(2 * self._wait, _MOST_RETRY_S)
        self._tried, self._next_try = identity, self._now + self._wait
        try:
            self._events.start(path)
        except Exception as error:  # of whatever kind: events only save time
            complaint = f"cannot get events from {show(path)}: {error}; looking now and then instead"
            if complaint != self._complaint:
                self._complaint = complaint
                self._log(complaint)
        else:
            self._watched = identity

    def _scan_root(self, root: int, hints: Hints) -> None:
        wanted: dict[bytes, set[bytes]] = {}
        for name in hints.touched.union(hints.vanished, self._unready):
            start_time, _, directory = name.partition(b"/")
            wanted.setdefault(start_time, set()).add(directory)
        present = self._start_times(root, hints)
        for start in [start for name, start in self._starts.items() if name not in present]:
            self._forget_start(start)
        for name, key in present.items():
            start = self._starts.setdefault(name, _StartTime(name))
            listing = self._to_be_listed(start, key, hints)
            if listing or name in wanted:
                self._scan_start_time(
                    root, start, hints, wanted.get(name, set()), listing=key if listing else None
                )

    def _to_be_listed(self, directory: _Listed, key: tuple[int, ...], hints: Hints) -> bool:
        # A listing made within the kernel's clock tick of a change can lack the change and yet bear its
        # mtime, so one is believed only when made a while after that mtime was first seen.
        return hints.everything or key != directory.key or directory.due <= self._now

    def _was_listed(self, directory: _Listed, key: tuple[int, ...]) -> None:
        if key != directory.key:
            # Behind what will have settled by then, which it must not hold up. Some file systems know seconds only.
            wait = 2.0 if key[2] % 10**9 == 0 else max(2 * self._settle, _TICK_S)
            directory.key, directory.due = key, self._at() + wait
        elif directory.due <= self._now:
            directory.due = _NEVER

    def _start_times(self, root: int, hints: Hints) -> dict[bytes, tuple[int, ...]]:
        """The start-time directories, each with what tells whether something came or went in it."""
        found: dict[bytes, tuple[int, ...]] = {}
        key = _changes(os.fstat(root))
        listing = self._to_be_listed(self._listed, key, hints)
        names = [os.fsencode(text) for text in os.listdir(root)] if listing else list(self._starts)
        if listing:
            self._was_listed(self._listed, key)
        for name in names:
            if name.startswith(b"."):
                continue
            if name not in self._starts and parse_start_time(name) is None:
                self._name_once(name, "it is no start time")
                continue
            info = _look_up(name, root)
            if info is None:
                self._listed = (
                    _Listed()
                )  # it may come back without a change here: each scan lists, and none for this
                continue
            if stat.S_ISDIR(info.st_mode):
                found[name] = _changes(info)
            else:
                self._name_once(
                    name, "it is a link" if stat.S_ISLNK(info.st_mode) else "it is not a directory"
                )
        return found

    def _name_once(self, name: bytes, why: str) -> None:
        if name not in self._named and len(self._named) < _MAX_NAMED:
            self._named.add(name)
            self._log(f"cannot use {show(self._path + b'/' + name)}: {why}")

    def _scan_start_time(
        self,
        root: int,
        start: _StartTime,
        hints: Hints,
        wanted: set[bytes],
        *,
        listing: Optional[tuple[int, ...]],
    ) -> None:
        """``listing``: what says that it has changed, where it is to be listed."""
        try:
            fd = os.open(start.name, _DIRECTORY, dir_fd=root)
        except OSError:
            # Vanished, or swapped, just now: the next scan sees what it is. Or it can't be opened, for as long as that
            # may be: what was due here must not keep us awake, and each full scan tries again.
            start.due = _NEVER
            for unseen in start.entries.values():
                unseen.due = _NEVER
            return
        try:
            reason = _distrust(os.fstat(fd), show(start.name), self._trusted)
            if listing is not None:
                wanted = wanted | self._list(fd, start)
                self._was_listed(start, listing)
            everything = hints.everything or reason is not None or start.name in hints.vanished
            for directory in list(start.entries) if everything else wanted:
                entry = start.entries.get(directory)
                if entry is not None and reason is not None:
                    self._refuse(entry, reason)
                elif entry is not None:
                    self._scan_vmr(fd, start, entry, hints)
        finally:
            os.close(fd)

    def _list(self, fd: int, start: _StartTime) -> set[bytes]:
        """Note which VMR directories came and went; the names of those that came."""
        found: dict[bytes, int] = {}
        with os.scandir(fd) as items:
            for item in items:
                name = os.fsencode(item.name)
                if not is_vmr_directory(name):
                    continue
                if item.is_symlink() or item.is_dir(follow_symlinks=False):
                    found[name] = item.inode()
                else:
                    self._name_once(start.name + b"/" + name, "it is not a directory")
        for entry in list(start.entries.values()):
            if found.get(entry.directory) != entry.inode:
                self._forget(start, entry)
        came = found.keys() - start.entries.keys()
        for name in came:
            start.entries[name] = _Entry(start.name, name, found[name])
        return came

    def _scan_vmr(self, parent: int, start: _StartTime, entry: _Entry, hints: Hints) -> None:
        # The cases:
        #   an event told of its end, and its script is another   a new one, even if it was never seen missing:
        #                                                         what is made next often gets the same inode
        #   done, script as it was, or not all is looked at       nothing to see
        #   anything else                                         look
        vanished = entry.name in hints.vanished or start.name in hints.vanished
        if vanished or (entry.done and hints.everything):
            info = _look_up(entry.directory + b"/" + os.fsencode(SCRIPT), parent)
            changed = info is not None and _identity(info) != entry.script
            if vanished and changed:
                self._forget(start, entry)
                entry = start.entries[entry.directory] = _Entry(start.name, entry.directory, entry.inode)
            elif entry.done and not changed:
                return
        elif entry.done and entry.staging is Staging.READY:
            return
        if entry.staging is not Staging.SETTLING or hints.everything or entry.due <= self._at():
            self._look(parent, entry, hints)

    def _look(self, parent: int, entry: _Entry, hints: Hints) -> None:
        at = self._at()
        try:
            fd = os.open(entry.directory, _DIRECTORY, dir_fd=parent)
        except FileNotFoundError:
            return  # the next listing lacks it
        except OSError as error:
            info = _look_up(entry.directory, parent)
            is_link = info is not None and stat.S_ISLNK(info.st_mode)
            self._refuse(entry, "its directory is a link" if is_link else f"its directory: {error.strerror}")
            return
        try:
            reason = self._look_inside(fd, entry, at, touched=entry.name in hints.touched)
        finally:
            os.close(fd)
        if reason is not None:
            self._refuse(entry, reason)

    def _look_inside(self, fd: int, entry: _Entry, at: float, *, touched: bool) -> Optional[str]:
        """See how far it is, or say why it is refused. Ready is what two looks, ``settle`` apart, saw the same."""
        info, script = os.fstat(fd), _look_up(SCRIPT, fd)
        reason = _distrust(info, "its directory", self._trusted)
        if reason is None and script is not None:
            reason = _distrust_script(script, self._trusted)
        if reason is not None:
            return reason
        complete = script is not None and bool(script.st_mode & stat.S_IXUSR)
        if script is not None and complete and script.st_mode & _OTHERS_WRITE and self._mends:
            reason = _mend(fd, self._trusted)
            if reason is not None:
                return reason
            script = _look_up(SCRIPT, fd)

        surface = (_signature(info), _signature(script) if script is not None else None)
        contents = entry.contents
        idle = at - entry.changed
        if complete or at - entry.walked >= (_WALK_S if idle < _WALK_STALE_S else _WALK_STALE_S):
            rows: list[tuple[object, ...]] = []
            _walk(fd, rows)
            contents, entry.walked = hash(tuple(rows)), at
        differs = (surface, contents) != (entry.surface, entry.contents) or entry.staging is Staging.REFUSED
        if differs or (touched and not complete):
            entry.changed = at
        entry.surface, entry.contents = surface, contents
        entry.script = None if script is None else _identity(script)
        entry.reason = ""
        if not complete:
            entry.staging, entry.committed, entry.restarts, entry.due = Staging.STAGING, None, 0, _NEVER
        else:
            if entry.committed is None:
                entry.committed = at
            # A tree still written to after its x bit was set is walked less and less often.
            entry.restarts = entry.restarts + 1 if differs and entry.staging is Staging.SETTLING else 0
            entry.due = entry.changed + self._settle * 2 ** min(entry.restarts, _MAX_DOUBLINGS)
            ready = not differs and at >= entry.due
            entry.staging = Staging.READY if ready else Staging.SETTLING
        self._publish(entry)
        return None

    def _refuse(self, entry: _Entry, reason: str) -> None:
        if entry.staging is not Staging.REFUSED:
            entry.changed = self._at()
        entry.staging, entry.reason, entry.due, entry.committed = Staging.REFUSED, reason, _NEVER, None
        self._publish(entry)

    def _publish(self, entry: _Entry) -> None:
        name = entry.name
        vmr = Vmr(name, entry.staging, entry.changed, entry.committed, entry.script, entry.reason)
        if self._vmrs.get(name) != vmr:
            self._vmrs[name] = vmr
            self._changed.add(name)
        if entry.staging is Staging.READY:
            entry.due = _NEVER
            self._unready.pop(name, None)
        else:
            self._unready[name] = entry

    def _forget(self, start: _StartTime, entry: _Entry) -> None:
        del start.entries[entry.directory]
        self._unready.pop(entry.name, None)
        self._changed.discard(entry.name)
        self._events.ignored.discard(entry.name)
        if self._vmrs.pop(entry.name, None) is not None:
            self._gone.add(entry.name)

    def _forget_start(self, start: _StartTime) -> None:
        for entry in list(start.entries.values()):
            self._forget(start, entry)
        del self._starts[start.name]


class _Listed:
    """A directory as last listed."""

    def __init__(self) -> None:
        self.key: tuple[int, ...] = ()
        self.due = _NEVER
        """When it must be listed again though its mtime stays."""


class _StartTime(_Listed):
    def __init__(self, name: bytes) -> None:
        super().__init__()
        self.name = name
        self.entries: dict[bytes, _Entry] = {}


class _Entry:
    """A VMR's directory as last looked at."""

    __slots__ = (
        "changed", "committed", "contents", "directory", "done", "due", "inode", "name", "reason", "restarts",
        "script", "staging", "surface", "walked",
    )  # fmt: skip

    def __init__(self, start_time: bytes, directory: bytes, inode: int) -> None:
        self.name = start_time + b"/" + directory
        self.directory = directory
        self.inode = inode
        self.staging = Staging.STAGING
        self.changed = 0.0
        self.committed: Optional[float] = None
        self.script: Optional[Identity] = None
        self.reason = ""
        self.done = False
        self.due = _NEVER
        self.restarts = 0
        """How often a change was seen since the x bit was."""
        self.surface: object = None
        """What can be seen without a walk."""
        self.contents = 0
        self.walked = -_NEVER


def _look_up(name: Union[str, bytes], parent: int) -> Optional[os.stat_result]:
    """What is there, unfollowed; None when nothing is, or nothing that can be seen."""
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except OSError:
        return None


def _changes(directory: os.stat_result) -> tuple[int, ...]:
    """What tells whether something came or went in it."""
    return (directory.st_dev, directory.st_ino, directory.st_mtime_ns, directory.st_ctime_ns)


def _identity(script: os.stat_result) -> Identity:
    return (script.st_dev, script.st_ino, script.st_ctime_ns)


def _signature(info: os.stat_result) -> tuple[int, ...]:
    return (info.st_ino, info.st_mode, info.st_uid, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


def _walk(fd: int, rows: list[tuple[object, ...]], depth: int = 0) -> None:
    """Append a row for each file below, such that any change changes a row."""
    try:
        with os.scandir(fd) as items:
            for item in items:
                if len(rows) >= _MAX_FILES:
                    return
                info = _look_up(item.name, fd)
                if info is None:
                    continue
                rows.append((depth, item.name, _signature(info)))
                if stat.S_ISDIR(info.st_mode) and depth < _MAX_DEPTH:
                    below = os.open(item.name, _DIRECTORY, dir_fd=fd)
                    try:
                        _walk(below, rows, depth + 1)
                    finally:
                        os.close(below)
    except OSError:
        rows.append((depth, None))  # vanished under the walk, or not to be read


def _distrust(info: os.stat_result, what: str, trusted: frozenset[int]) -> Optional[str]:
    """Why others than those trusted could change what is in a directory, if they could."""
    if info.st_uid not in trusted:
        return f"{what} belongs to user {info.st_uid}"
    if info.st_mode & _OTHERS_WRITE:
        return f"{what} can be written to by others (mode {stat.S_IMODE(info.st_mode):04o})"
    return None


def _distrust_script(script: os.stat_result, trusted: frozenset[int]) -> Optional[str]:
    if stat.S_ISLNK(script.st_mode):
        return f"{SCRIPT} is a link"
    if not stat.S_ISREG(script.st_mode):
        return f"{SCRIPT} is not a regular file"
    if script.st_uid not in trusted:
        return f"{SCRIPT} belongs to user {script.st_uid}"
    return None


def _mend(fd: int, trusted: frozenset[int]) -> Optional[str]:
    """Take the script from the hands of others (qemu-ga makes files 0666); why not, if it can't be done.

    Only the script: it is what root runs. What else others may write to is the VMR's own business.
    """
    try:
        # Non-blocking, for it could be a FIFO by now.
        script = os.open(SCRIPT, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
    except OSError as error:
        return f"{SCRIPT} can be written to by others: {error.strerror}"
    try:
        info = os.fstat(script)
        reason = _distrust_script(info, trusted)
        if reason is None:
            os.fchmod(script, stat.S_IMODE(info.st_mode) & ~_OTHERS_WRITE)
        return reason
    except OSError as error:
        return f"{SCRIPT} can be written to by others: {error.strerror}"
    finally:
        os.close(script)


def _trace(path: bytes, trusted: frozenset[int]) -> tuple[bytes, Optional[str]]:
    """Where a path leads, link by link, and why the way can't be trusted, if it can't.

    Whoever may write to a directory on the way may put another in the place of the next.
    """
    real, todo, links, wrong = b"/", path.split(b"/")[::-1], 0, None
    while todo:
        part = todo.pop()
        if part in (b"", b"."):
            continue
        if part == b"..":
            real = os.path.dirname(real)
            continue
        here = os.path.join(real, part)
        try:
            info = os.lstat(here)
            target = os.readlink(here) if stat.S_ISLNK(info.st_mode) else None
        except OSError:
            return os.path.join(here, *todo[::-1]), wrong  # opening it says what it is
        if target is None:
            sticky = stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX
            if todo and not (sticky and info.st_uid in trusted):
                wrong = wrong or _distrust(info, show(here), trusted)
            real = here
        elif links == _MAX_LINKS:
            return path, wrong  # as above
        else:
            links += 1
            if info.st_uid not in trusted:
                wrong = wrong or f"{show(here)} belongs to user {info.st_uid}"
            if target.startswith(b"/"):
                real = b"/"
            todo += target.split(b"/")[::-1]
    return real, wrong
