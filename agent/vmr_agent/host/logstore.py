"""What lives here: one VM's part of the log directory but the two logs: its lives, and what is durable.

The order of writes is the promise: raw bytes at their offset, then the journal, then both synced, then a
*mark* in the journal, then the Ack. So an Ack says what would survive a power cut, and a renderer that reads
the journal up to the last mark never shows what could be taken back.

Where a write or a sync fails OSError comes out, and from then on what isn't durable counts as not held: the
caller ends the session and, a moment later, begins another, so that the guest sends it again.
It must not know: sockets, sessions, log lines, when to sync. Just over 400 lines, most of them the lives' beginnings.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, Callable, Optional

from vmr_agent.errors import Problem
from vmr_agent.host.held import pack
from vmr_agent.host.journal import (
    NO_LINK,
    SYNCFS_FROM,
    TIME,
    Kind,
    find_syncfs,
    lives,
    read_life,
    rendered,
    vm_segment,
    write_all,
)
from vmr_agent.host.life import BadGuest, Diverged, Life, OverQuota, Sync
from vmr_agent.host.quota import Quota
from vmr_agent.runs import Stream
from vmr_agent.wire import messages

_LOCK_TRIES = 10  # 0.1 s each: a collector that was told to end needs a moment
_SYNCFS_SLOW = 1.0
"""Seconds after which ``syncfs`` is given up: it also writes what others left, such as images of disks."""


class _Writing:
    """``with`` it something is written: not when a write has failed before, and what goes wrong is remembered. A class,
    for it is gone through with each line, and a generator takes four times as long."""

    def __init__(self, store: LogStore) -> None:
        self._store = store
        self.failed: Optional[OSError] = None
        self.set_back: Optional[bytes] = None
        """The spool that contradicted what is held; also after its VM's reboot, until it begins a new life. This is
        known to this collector only."""

    def __enter__(self) -> None:
        if self.failed is not None:
            raise OSError(self.failed.errno, self.failed.strerror)

    def __exit__(self, kind: object, error: Optional[BaseException], traceback: object) -> None:
        if isinstance(error, OSError):
            self.failed = error
        elif isinstance(error, Diverged):
            self.set_back = self._store.spool or self.set_back


class LogStore:
    """One VM's. All but :meth:`Sync.sync` belongs to one thread.

    Whatever takes a guest's message may raise BadGuest, Diverged, OverQuota or OSError.
    """

    def __init__(self, log_dir: Path, vm: str, *, log: Callable[[str], None], limit: int = 0) -> None:
        """``limit``: the VM's quota in bytes; 0: none."""
        self.log_dir = log_dir
        self.vm = vm
        self.last_hello: Optional[messages.Hello] = None
        """The last one journaled, also of an earlier collector: what time travel is judged by."""
        self._log = log
        self._segment = vm_segment(vm)
        self.quota = Quota(log_dir, self._segment, limit)
        self._writing = _Writing(self)
        self._life: Optional[Life] = None
        self._in_flight: Optional[Sync] = None
        self._new = False
        self._known = 0
        """Up to here the journal is known to be durable, mark or not."""
        self._root = -1
        self._lock = -1
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            self._root = os.open(log_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._lock = self._take_lock()
            self._life = self._find_life(trust=True)
            if self._life is not None and limit:
                note = rendered(self._root, self._segment)
                same = note.life == self._life.number
                self._life.reckon(note.place if same else 0, note.runs if same else ())
        except OSError as error:
            self._release()
            raise Problem(f"cannot write to {log_dir}: {_reason(error)}") from None
        except Problem:
            self._release()
            raise

    def begins_anew(self, listed: Container[str]) -> None:
        """``listed``: the segments of the VMs that have lives in the log directory now. With a thousand VMs it is long,
        and each would read it."""
        self._new = self._segment not in listed

    def _take_lock(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | NO_LINK
        fd = os.open(f".{self._segment}.lock", flags, 0o644, dir_fd=self._root)
        for attempt in range(_LOCK_TRIES):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt < _LOCK_TRIES - 1:
                    time.sleep(0.1)
        else:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            os.close(fd)
            raise Problem(
                f"cannot keep logs of {self.vm} in {self.log_dir}: process {holder or 'unknown'} does",
                hint="one collector per VM and log directory",
            )
        os.ftruncate(fd, 0)
        write_all(fd, f"{os.getpid()}\n".encode(), 0)
        return fd

    def _release(self) -> None:
        for fd in (self._lock, self._root):
            if fd >= 0:
                os.close(fd)
        self._lock = self._root = -1

    def close(self) -> None:
        """Make durable what can be, and let go of the log directory. No sync may be in flight."""
        if self._root < 0:
            return
        try:
            if self._life is not None and self._writing.failed is None:
                self._sync_now(checkpoint=True)
        except OSError as error:
            self._log(f"{self.vm}: cannot sync: {_reason(error)}")
        finally:
            if self._life is not None:
                self._life.close()
                self._life = None
            self._release()

    # --- lives and recovery

    def life(self, hello: messages.Hello, host_wall_ns: int) -> bool:
        """A session was opened. True when it begins a new life of a VM that had one before."""
        if hello.spool is None:
            raise BadGuest("its Hello names no spool")
        if self._writing.failed is not None:
            if self._life is not None:
                self._life.close()
            self._life = self._in_flight = None
            self._life = self._find_life(trust=False)
            self._writing.failed = None
        if self.quota.exhausted:
            raise OverQuota
        with self._writing:
            self._judge(hello)
            self._writing.set_back = None
            known = False
            if self._life is None or self._life.spool != hello.spool:
                known = self._begin_life(hello.spool, host_wall_ns)
            self._current.append(Kind.HELLO, TIME.pack(host_wall_ns) + pack(hello))
            self._current.apply_hello(hello, host_wall_ns)
            self.last_hello = hello
            return known

    def _judge(self, hello: messages.Hello) -> None:
        if hello.spool == self._writing.set_back:
            raise Diverged("it has not begun a new life since")
        last = self.last_hello
        if last is None or (last.spool, last.boot) != (hello.spool, hello.boot):
            return
        if hello.boottime is not None and last.boottime is not None and hello.boottime < last.boottime:
            raise Diverged("the clock of one boot went backwards")

    def _find_life(self, *, trust: bool) -> Optional[Life]:
        try:
            directory = os.open(self._segment, os.O_RDONLY | os.O_DIRECTORY | NO_LINK, dir_fd=self._root)
        except FileNotFoundError:
            return None
        begun = read_life(directory)
        if begun is None:
            os.close(directory)
            return None
        os.close(begun[0])
        life = Life(directory, begun[1], begun[2], self._log, self.quota)
        try:
            if life.recover(trust=trust, known=self._known) and trust:
                self._settle(life)
        except BaseException:
            life.close()
            raise
        self.last_hello = life.hello
        return life

    def _begin_life(self, spool: bytes, wall_ns: int) -> bool:
        if self._life is not None:
            self._sync_now(checkpoint=True)
            self._life.seal()
            self._life.close()
            self._life = None
        self._known = 0
        found = {} if self._is_new() else lives(self._root, self._segment)
        number = max([rendered(self._root, self._segment).life, *found.values()])
        if self._segment in found:
            aside = self._aside(found)
            number = max(number, aside[1])
            os.rename(self._segment, aside[0], src_dir_fd=self._root, dst_dir_fd=self._root)
        # Under another name until its first record is there, so that a life never lacks its beginning.
        coming = f".{self._segment}.new"
        with contextlib.suppress(FileExistsError):
            os.mkdir(coming, 0o755, dir_fd=self._root)
        directory = os.open(coming, os.O_RDONLY | os.O_DIRECTORY | NO_LINK, dir_fd=self._root)
        self._life = Life(directory, number + 1, spool, self._log, self.quota)
        self._life.create(wall_ns)
        os.rename(coming, self._segment, src_dir_fd=self._root, dst_dir_fd=self._root)
        return number > 0

    def _is_new(self) -> bool:
        """Whether there is nothing of this VM, as :meth:`begins_anew` was told and nobody has changed since."""
        new, self._new = self._new, False
        try:
            os.stat(self._segment, dir_fd=self._root, follow_symlinks=False)
        except FileNotFoundError:
            return new
        return False

    def _aside(self, found: dict[str, int]) -> tuple[str, int]:
        """The name the current directory gets: its own life's number, or the next that is free."""
        directory = os.open(self._segment, os.O_RDONLY | os.O_DIRECTORY | NO_LINK, dir_fd=self._root)
        try:
            begun = read_life(directory)
            number = 1
            if begun is not None:
                os.close(begun[0])
                number = begun[1]
            while number in found.values():
                number += 1
            return f"{self._segment}~{number}", number
        finally:
            os.close(directory)

    def _settle(self, life: Life) -> None:
        """Make durable what an earlier collector left, before anything new comes to it.

        It may have been acknowledged, on a mark that was lost with the power; so a sync that fails later must
        not put it in doubt.
        """
        sync = life.begin_sync(self._root)
        sync.sync()
        sync.close()
        if sync.error is not None:
            raise sync.error
        self._known = sync.covers
        try:
            life.finish_sync(sync)
        except OSError as error:  # no room for a mark
            self._writing.failed = error

    @property
    def _current(self) -> Life:
        if self._life is None:
            raise BadGuest("a message before its Hello")
        return self._life

    # --- what the guest says. Once it diverged nothing is believed before its new life: what it still sends
    # is of another past.

    def run(self, message: messages.Run) -> messages.Ack:
        """What is durably held of this run."""
        if self._writing.set_back is not None:
            raise Diverged("it was set back in time")
        with self._writing:
            return self._current.run(message)

    def output(self, message: messages.Output) -> None:
        if self._writing.set_back is None:
            with self._writing:
                self._current.output(message)

    def gap(self, message: messages.Gap) -> None:
        if self._writing.set_back is None:
            with self._writing:
                self._current.gap(message)

    def exit(self, message: messages.Exit) -> None:
        if self._writing.set_back is None:
            with self._writing:
                self._current.exit(message)

    def closed(self, message: messages.Closed) -> Optional[messages.Ack]:
        """The Ack, where all of the run is durable already."""
        if self._writing.set_back is not None:
            return None
        with self._writing:
            return self._current.end(message)

    def flush_line(self, run: bytes, stream: int) -> None:
        """Show the part of a line held back now. Journaled, so that rendering depends on nothing else."""
        with self._writing:
            self._current.flush_line(run, Stream(stream))

    def unfinished_lines(self, run: bytes) -> list[int]:
        """A run's streams whose last byte was no newline, not shown yet, and of which the guest held no more."""
        unfinished = set() if self._life is None or self._writing.failed else self._life.unfinished
        return [int(stream) for stream in Stream if (run, int(stream)) in unfinished]

    @property
    def spool(self) -> Optional[bytes]:
        """The id of the spool whose life is the current one."""
        return None if self._life is None else self._life.spool

    def latest(self, vmr: bytes) -> Optional[bytes]:
        """The run of a VMR's latest attempt in this life."""
        return None if self._life is None else self._life.latest(vmr)

    # --- durability

    def dirty(self) -> bool:
        return self._life is not None and self._writing.failed is None and self._life.dirty()

    def unsynced_bytes(self) -> int:
        """Bytes of output since the last :meth:`begin_sync`."""
        return 0 if self._life is None else self._life.unsynced

    def begin_sync(self) -> Optional[Sync]:
        """In the loop. None when nothing is to be done, or a sync is still in flight."""
        if self._in_flight is not None or not self.dirty():
            return None
        with self._writing:
            self._in_flight = self._current.begin_sync(self._root)
        return self._in_flight

    def finish_sync(self, sync: Sync) -> list[messages.Ack]:
        """In the loop, when the work is done: the mark, then what may be acknowledged."""
        sync.close()
        if sync is not self._in_flight:
            # A new life began meanwhile, or the store was read anew. That something failed is told once: to this one.
            if sync.error is not None:
                with self._writing:
                    raise sync.error
            return []
        self._in_flight = None
        with self._writing:
            if sync.error is not None:
                # The kernel reports a failed write-back once, then calls the pages clean: a second sync
                # would lie.
                raise sync.error
            return self._current.finish_sync(sync)

    def sync(self) -> list[messages.Ack]:
        """All three in one go, for whoever has no loop to keep; also what a sync in flight was to do."""
        if self._life is None or self._writing.failed is not None:
            return []
        return self._sync_now(checkpoint=False)

    def _sync_now(self, *, checkpoint: bool) -> list[messages.Ack]:
        in_flight, self._in_flight = self._in_flight, None
        life = self._current
        if in_flight is not None:
            with in_flight.busy, self._writing:
                if in_flight.error is not None:
                    raise in_flight.error  # as in finish_sync()
            life.take_back(in_flight)
        if not life.dirty():
            return []
        with self._writing:
            sync = life.begin_sync(self._root, checkpoint=checkpoint)
            self._in_flight = sync
            sync.sync()
        return self.finish_sync(sync)


class Syncer:
    """Does the syncs of many VMs at once; one per collector, used by one thread at a time."""

    def __init__(self) -> None:
        self._syncfs = find_syncfs()

    def sync(self, syncs: Sequence[Sync]) -> None:
        if self._syncfs is None or sum(map(len, syncs)) < SYNCFS_FROM:
            for sync in syncs:
                sync.sync()
            return
        begun = time.monotonic()
        by_device: dict[int, list[Sync]] = {}
        for sync in syncs:
            by_device.setdefault(sync.life.device, []).append(sync)
        for group in by_device.values():
            # With little in between, and no call that lets the loop in: for each such it would have to be waited for.
            for sync in group:
                sync.busy.acquire()
            try:
                self._syncfs(group[0].life.fd)
            except OSError as error:
                for sync in group:
                    sync.error = error
            finally:
                for sync in group:
                    sync.busy.release()
        if time.monotonic() - begun > _SYNCFS_SLOW:
            self._syncfs = None


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


# --- reading without a collector ----------------------------------------------------------------------------


def rows(log_dir: Path, vm: str) -> list[dict[str, Any]]:
    """One row per VMR of the VM's current life, its latest attempt, in the schedule's order.

    Reads files alone, so it works with no collector running, and in another thread.
    """
    found = []
    for start_time in _listed(log_dir / vm_segment(vm)):
        for directory in () if start_time.name.startswith(".") else _listed(start_time):
            attempts = [int(entry.name) for entry in _listed(directory) if entry.name.isdecimal()]
            for attempt in sorted(attempts, reverse=True):
                row = _read_row(directory / str(attempt))
                if row is not None:
                    found.append(row)
                    break
    return sorted(found, key=row_order)


def _listed(directory: Path) -> list[Path]:
    """What is in it; nothing where it is no directory but somebody's notes, or has another name by now: a new life."""
    try:
        return list(directory.iterdir())
    except OSError:
        return []


def _read_row(directory: Path) -> Optional[dict[str, Any]]:
    try:
        row = json.loads((directory / "result.json").read_bytes())
        if not isinstance(row, dict):
            return None
        if not row.get("closed"):  # its streams have grown since it was written
            for stream in Stream:
                row[f"{stream.filename}_bytes"] = (directory / stream.filename).stat().st_size
    except (OSError, ValueError, KeyError):
        return None
    return row


def row_order(row: dict[str, Any]) -> tuple[float, str]:
    """The schedule's order."""
    vmr = str(row.get("vmr", ""))
    try:
        return float(vmr.partition("/")[0]), vmr
    except ValueError:
        return 0.0, vmr
