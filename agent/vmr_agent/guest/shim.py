"""What lives here: the process that holds one run: its pipes, its files in the spool, its exit record.

It outlives the daemon and asks nobody anything: all it has to know comes with its order, and what it has to say lies
in the run directory. What takes long and needs no order is done before there is one. Standard library only and little
of it: `json`, `socket`, `signal`, `ctypes` and `typing` would take 2 MB of each VM, and a part of that again with each
run. It must not know: the wire, the schedule, any other room of ours. The spool reads what is written here.

It is one module, over the usual length, because a second one would be a second import.
"""

from __future__ import annotations

import _thread
import errno
import fcntl
import mmap
import os
import resource
import select
import struct
import sys
import time

TYPE_CHECKING = False  # as that of `typing`
if TYPE_CHECKING:
    import signal
    import socket
    from collections.abc import Callable
    from typing import Union

    Row = dict[str, Union[str, int, float]]
else:
    import _signal as signal  # what signal(7) is, without the enumerations

READ = 256 * 1024  # measured: 64 KiB reads cost a quarter of the throughput
PIPE = 1024 * 1024  # the most an unprivileged pipe may be; more lets the script run on while we are busy
JOIN_NS = 10_000_000  # adjacent reads closer than this share one record of the index
SYNC_S = 1.0  # from a byte's capture to the sync that takes it, or the end of one under way: a power cut may take it
RETRY_S = 0.2  # while blocked
START_TOLD_S = 0.1  # that it has begun is told with its first output or its end, if they come so soon
# What prints more than so much in so long is told of once in it: the daemon goes on with it until it has all there is,
# and its short queue is to have room for others.
MUCH, MUCH_TOLD_S = 64 * 1024, 0.05
KICK_RETRY_S = 0.005  # the daemon's queue holds 10 datagrams by default
LAST_SYNC_S = 30.0  # how long an end waits for a disk that fails to take the bytes it counts
OUTPUT = b"o"  # behind the run id, where a kick tells of nothing else
LAST_KICK_S = 2.0  # the end is worth some patience: unheard, it waits for the daemon's next look
ETXTBSY_S = 5.0  # how long the script may stay open for writing
CHECK_S, CHECK_BYTES = 0.25, 1024 * 1024  # how often free space is looked at: whichever comes first
REFUSED_S = 5.0  # the same, while dropping what the file system refused to take
RESERVE = 32 * 1024 * 1024  # left free for the rest of the VM, or 2 % of a small file system
BLOCK = (
    4096  # taken before the start for the exit record, and for gaps, so that no shortage can withhold them
)

# Offset, wall clock ns, length, stream. One of stream 0 and length 0 says how much is synced: of stdout, of stderr.
RECORD = struct.Struct("<QQIB3x")
# One stretch of dropped bytes: offset, length once it is over, wall clock ns, stream, GROWS or OVER, cause. While
# it grows all from its offset to the end of the stream's file is dropped: that file is made longer, takes no
# block for it, and is the count. The record is durable before its first byte is dropped, and that it is over before
# the next byte is written: so no crash makes the zeros of the hole pass for output, or output for dropped.
GAP = struct.Struct("<QQQBBB5x")
GROWS, OVER = 1, 2
OVER_LIMIT, NO_ROOM = 1, 2
_CAUSES = {OVER_LIMIT: "the spool is over its limit", NO_ROOM: "the file system is nearly full"}

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_F_SETPIPE_SZ, _F_GETPIPE_SZ = 1031, 1032  # in fcntl from Python 3.10 on
GO = b"\0go"  # ends the order that lets the script's process go: whatever comes without it is half of one
_PR_SET_CHILD_SUBREAPER = 36


def _find_prctl() -> Callable[[int, int], object]:
    try:
        import _ctypes  # what `ctypes` is made of

        at, call = _ctypes.dlsym(_ctypes.dlopen(None, 0), "prctl"), _ctypes.call_function  # type: ignore[arg-type]
        return lambda option, value: call(at, (option, value, 0, 0, 0))
    except (ImportError, AttributeError):  # it is private, and may change
        import ctypes

        prctl = ctypes.CDLL(None).prctl
        return lambda option, value: prctl(option, value, 0, 0, 0)


_prctl = _find_prctl()  # once, in the fork server


class Waits(Exception):
    """It can't begin for want of something; nothing has been started and the same order may be given again."""


def main(take: Callable[[], bytes], kicks: socket.socket) -> None:
    """Get ready, take an order, and hold the run that it names to its end; called in the forked process, never
    returns.

    `take` waits for the order, which is empty where none will come. `kicks` is an unbound datagram socket, which all
    shims may share.
    """
    try:
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.setsid()
        os.close(_write("/proc/self/comm", b"vmr-shim"))
        os.umask(0o077)
        shim = Shim(kicks)
        shim.prepare()
        order = take()
        if order:
            hold(shim, order.split(b"\0"))
    finally:
        os._exit(0)  # whoever is to be the script leaves with us, unless it was let go


def hold(shim: Shim, order: list[bytes]) -> None:
    try:
        os.chdir(order[1])
    except OSError:
        return  # the run's directory is gone: nothing is left to hold
    try:
        shim.run(order)
    except Waits as no:
        _note("blocked", str(no))
    except BaseException as bug:
        # The script is on its own now. The run becomes lost, with this as the reason.
        tb = bug.__traceback__
        while tb is not None and tb.tb_next is not None:
            tb = tb.tb_next
        where = f" (line {tb.tb_lineno})" if tb is not None else ""
        _note("failed", f"{type(bug).__name__}: {bug}{where}")


def _note(name: str, text: str) -> None:
    """Leave a word for the daemon, as the target of a link: that takes no block, so it can be left when there
    are none."""
    _remove(name)
    try:
        os.symlink(text.encode("utf-8", "backslashreplace")[:1000], name)
    except OSError:
        pass


# Small files by descriptor: what open() touches is no longer shared with the fork server, a megabyte a run.
def _write(name: str, data: bytes) -> int:
    """Write a small file, whole or not at all; its descriptor is returned for a sync."""
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    if os.write(fd, data) != len(data):
        os.close(fd)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return fd


def _read(name: str | bytes, most: int = 4096) -> bytes:
    fd = os.open(name, os.O_RDONLY)
    try:
        return os.read(fd, most)
    finally:
        os.close(fd)


def _take_block(fd: int, offset: int) -> None:
    """Take disk space now for what is to be written later. OSError when there is none."""
    try:
        os.posix_fallocate(fd, offset, BLOCK)
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise


def _remove(name: str) -> None:
    try:
        os.unlink(name)
    except OSError:
        pass


class Stream:
    """One of the two: a pipe on one side, a file of the spool on the other."""

    def __init__(self, number: int, name: str) -> None:
        self.number = number
        self.pipe, self.script_end = os.pipe()
        os.set_blocking(self.pipe, False)
        try:
            fcntl.fcntl(self.pipe, _F_SETPIPE_SZ, PIPE)
        except OSError:
            pass  # a user's pipes are limited in sum
        self.name = name
        self.file = -1
        self.synced = 0  # bytes; of those behind it a sync failed, where `failed`
        self.failed = False
        self.spooled = 0
        self.held: list[tuple[bytes, int]] = []  # read, with the wall ns; the file system refused it so far
        self.dirty = False
        self.gap = (0, 0, 0, 0)  # the last one: offset, wall ns, cause, place of its record
        self.gap_end = -1  # where it ended; -1: there was none
        self.grows = False  # it is not over
        self.noted = False  # that it grows is durable, and stands there

    def open(self) -> None:
        self.file = os.open(self.name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    @property
    def length(self) -> int:
        return self.spooled + sum(len(data) for data, _ in self.held)

    def sync(self) -> None:
        """Make durable what there is; more may come meanwhile. OSError where it can't be, for now."""
        spooled = self.spooled
        self.dirty = False
        try:
            # The kernel tells once that it could not write, and calls the pages clean: another sync alone would lie.
            if self.failed:
                self._write_again(spooled)
            self.failed = True
            os.fdatasync(self.file)
        except BaseException:
            self.dirty = True
            raise
        self.failed, self.synced = False, spooled

    def _write_again(self, end: int) -> None:
        fd = os.open(self.name, os.O_RDWR)
        try:
            at = self.synced
            while at < end:
                try:
                    at = os.lseek(fd, at, os.SEEK_DATA)  # a hole stays one
                except OSError:
                    break  # no more data
                data = os.pread(fd, 65_536, at)
                if not data:
                    break
                at += os.pwrite(fd, data, at)
        finally:
            os.close(fd)

    def close_pipe(self) -> None:
        os.close(self.pipe)
        self.pipe = -1


class Shim:
    def __init__(self, kicks: socket.socket) -> None:
        self.kicks = kicks
        self.kick_owed: bytes | None = None  # OUTPUT, or empty where more than that is to be told
        self.kick_due = 0.0
        self.counted = (0.0, 0)  # since when, and bytes: see MUCH
        self.record_at = -RECORD.size  # where the index's last record lies
        self.record = (0, 0, 0, 0)
        self.sync_due = 0.0  # 0: nothing to sync
        self.syncing = _thread.allocate_lock()  # held while it is done
        self.sync_failure = ""
        self.blocked = ""
        self.dropping = 0  # the cause, while it drops
        self.gaps = -1
        self.next_gap = 0  # where in `gaps`
        self.check_due = 0.0
        self.unchecked = 0
        self.pid = 0
        self.exec_errno = 0
        self.status: int | None = None
        self.closed_at_exit = False
        self.unready = ""  # why it could not get ready

    # -- the start --

    def prepare(self) -> None:
        """All that can be done without an order, as far as the script's process, which waits until it is let go."""
        try:
            self.buffer = memoryview(mmap.mmap(-1, READ))  # takes memory only as far as reads fill it
            self._listen_for_deaths()
            self._adopt()
            self.streams = (Stream(1, "stdout"), Stream(2, "stderr"))
            self._fork()
        except (OSError, MemoryError) as error:
            self.unready = getattr(error, "strerror", None) or repr(error)  # there is no run yet to say it of

    def accept(self, order: list[bytes]) -> None:
        run, self.directory, self.script, self.vmr, attempt, boot_id, self.state_dir, self.kick_path = order
        self.run_id = bytes.fromhex(run.decode())
        self.attempt = int(attempt)
        self.boot_id = boot_id.decode()

    def run(self, order: list[bytes]) -> None:
        self.accept(order)
        if self.unready:
            raise Waits(f"cannot begin: {self.unready}")
        # A record lock, not flock: the daemon can ask who holds it (F_GETLK) without taking it, so its
        # question never makes a shim that is just starting believe that another one is there. Closing *any*
        # descriptor of the file would drop it: nothing here opens `lock` again.
        try:
            lock = os.open("lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise Waits(f"cannot begin: {error.strerror}") from error
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return
        if os.path.lexists("started") or os.path.lexists("exit.json") or _whole("starting"):
            return
        try:
            self._open()
            _await_files()
            self._note_start()
        except OSError as error:
            raise Waits(f"cannot begin: {error.strerror}") from error
        _remove("blocked")
        os.rename("starting", "started")  # no sync: either name, whole, says that it may have run
        try:
            os.write(self.go, b"\0".join(order) + GO)
        except BrokenPipeError:
            pass  # it was killed while it waited, and its status says so
        os.close(self.go)
        self.kick_owed, self.kick_due = b"", time.monotonic() + START_TOLD_S
        poll = select.poll()
        poll.register(self.failed, select.POLLIN)
        if not poll.poll(START_TOLD_S * 1000):  # an interpreter that is long in coming
            self._kick()
        failure = os.read(self.failed, 4)  # end of file: the script is executing
        os.close(self.failed)
        self.exec_errno = struct.unpack("=i", failure)[0] if failure else 0
        self._pump()

    def _listen_for_deaths(self) -> None:
        # Not a pidfd: children that the script left behind end up here too, and are to be reaped as they die.
        self.wake, self.wake_end = os.pipe()
        os.set_blocking(self.wake, False)
        os.set_blocking(self.wake_end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.wake_end, warn_on_full_buffer=False)

    @staticmethod
    def _adopt() -> None:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def _open(self) -> None:
        for stream in self.streams:
            stream.open()
        self.index = os.open("index", os.O_WRONLY | os.O_CREAT, 0o600)
        fd = os.open("exit.json.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            _take_block(fd, 0)
        finally:
            os.close(fd)
        if self._may_drop():
            self._open_gaps()

    def _open_gaps(self) -> None:
        fd = os.open("gaps", os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            _take_block(fd, 0)
        except OSError:
            os.close(fd)
            raise
        self.gaps = fd

    def _fork(self) -> None:
        go_end, self.go = os.pipe()
        self.failed, failed_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.go)
            self._child(go_end, failed_end)
        for fd in (go_end, failed_end, *(stream.script_end for stream in self.streams)):
            os.close(fd)

    def _note_start(self) -> None:
        """Make durable all that says that the script may have run from here on."""
        self.started_ns = time.time_ns()
        self.started_boottime_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        row: Row = {
            "pid": self.pid,
            "ticks": start_ticks(self.pid),
            "boot_id": self.boot_id,
            "wall_ns": self.started_ns,
            "boottime_ns": self.started_boottime_ns,
        }
        try:
            # With run.json's content in it, whose own sync is thereby saved.
            data = b'{"run": %s, "process": %s}\n' % (_read("run.json").strip(), to_json(row))
            fd = _write("starting", data)
            # The price of "nothing runs twice after a power cut": one journal commit for the file, then the
            # directories that name it, and the link in open/. Those above are new only with attempt 1.
            os.fsync(fd)
            os.close(fd)
            above = ("../..", "../../..") if self.attempt == 1 else ()
            for path in (".", "..", os.path.join(os.fsdecode(self.state_dir), "open"), *above):
                _sync_path(path)
        except OSError:
            os.close(self.go)  # the child leaves at end of file
            os.waitpid(self.pid, 0)
            _remove("starting")
            raise

    # -- the script's process --

    def _child(self, go: int, failed: int) -> None:
        try:
            self._become_a_login()
            order = b""
            while part := os.read(go, 65_536):
                order += part
            if order.endswith(GO):
                self._execute(order[: -len(GO)].split(b"\0"), failed)
        except BaseException as error:
            os.write(failed, struct.pack("=i", getattr(error, "errno", None) or errno.EIO))
            os._exit(127)
        finally:
            os._exit(0)  # the shim died, or had no run, before its start was durable: it must not run

    def _execute(self, order: list[bytes], failed: int) -> None:
        code = errno.EIO
        try:
            code = self._exec(script=order[2], vmr=order[3], attempt=order[4])
        except OSError as error:
            code = error.errno or errno.EIO
        finally:
            os.write(failed, struct.pack("=i", code))
            os._exit(127)

    def _become_a_login(self) -> None:
        """Undo what a daemon is and a root login isn't. Every descriptor above 2 is close-on-exec."""
        os.setsid()
        os.dup2(self.streams[0].script_end, 1)
        os.dup2(self.streams[1].script_end, 2)
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # dispositions: the fork server saw to them
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY or soft > 1024:
            resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        try:
            os.close(_write("/proc/self/oom_score_adj", b"0"))
        except OSError:
            pass
        os.umask(0o022)
        os.chdir("/")

    def _exec(self, *, script: bytes, vmr: bytes, attempt: bytes) -> int:
        env = {os.fsencode(k): os.fsencode(v) for k, v in os.environ.items() if k in ("PATH", "LANG", "HOME")}
        env[b"VMR_NAME"] = vmr
        env[b"VMR_START_TIME"] = vmr.partition(b"/")[0]
        env[b"VMR_ATTEMPT"] = attempt
        deadline = time.monotonic() + ETXTBSY_S
        while True:
            try:
                os.execve(script, [script], env)
            except OSError as error:
                if error.errno == errno.ENOEXEC:  # no shebang: as execvp does
                    os.execve(b"/bin/sh", [b"/bin/sh", script], env)
                if error.errno != errno.ETXTBSY or time.monotonic() >= deadline:
                    return error.errno or errno.EIO
            time.sleep(0.02)

    # -- the pump --

    def _pump(self) -> None:
        poll = select.poll()
        poll.register(self.wake, select.POLLIN)
        watched: set[int] = set()
        while self.status is None or any(s.pipe >= 0 or s.held for s in self.streams):
            # While blocked a pipe is not watched at all: hang-up can't be masked and would spin.
            wanted = set() if self.blocked else {s.pipe for s in self.streams if s.pipe >= 0}
            for fd in watched - wanted:
                poll.unregister(fd)
            for fd in wanted - watched:
                poll.register(fd, select.POLLIN)
            watched = wanted
            ready = {fd for fd, _ in poll.poll(self._timeout())}
            for stream in self.streams:
                if stream.pipe in ready:
                    self._take(stream, READ)
            if self.wake in ready:
                self._reap()
            if self.blocked:
                self._try_again()
            elif self.dropping and time.monotonic() >= self.check_due:
                self._check_space()
            self._take_sync_failure()  # behind _try_again(): that it is blocked is to stand for a while
            if self.sync_due and time.monotonic() >= self.sync_due and not self.syncing.locked():
                self._sync_apart()
            if self.kick_owed is not None and time.monotonic() >= self.kick_due:
                self._kick(self.kick_owed)
        self._await_sync()
        if self.sync_due:
            self.syncing.acquire()
            self._sync(self._place_for_note())
            self._take_sync_failure()
        if not self.closed_at_exit:
            stdout, stderr = (stream.length for stream in self.streams)
            self._record("closed", {"stdout": stdout, "stderr": stderr, "reason": ""})
        _remove("blocked")
        if self.gaps >= 0 and not self.next_gap:
            _remove("gaps")
        give_up = time.monotonic() + LAST_KICK_S
        while self.kick_owed is not None and time.monotonic() < give_up:
            time.sleep(KICK_RETRY_S)
            self._kick(self.kick_owed)

    def _timeout(self) -> float | None:
        waits = []
        if self.sync_due and not self.syncing.locked():  # its end wakes us
            waits.append(max(0.0, self.sync_due - time.monotonic()))
        if self.blocked:
            waits.append(RETRY_S)
        elif self.dropping:
            waits.append(max(0.0, self.check_due - time.monotonic()))
        if self.kick_owed is not None:
            waits.append(max(0.0, self.kick_due - time.monotonic()))
        return min(waits) * 1000 + 1 if waits else None

    def _take(self, stream: Stream, most: int) -> int:
        """Read once from a pipe and spool it; 0 when there is nothing, and at its end, where it is closed."""
        try:
            count = os.readv(stream.pipe, [self.buffer[:most]])
        except BlockingIOError:
            return 0
        if count == 0:
            stream.close_pipe()
            return 0
        self._put(stream, self.buffer[:count], time.time_ns())
        self.unchecked += count
        now = time.monotonic()
        if not self.sync_due:
            self.sync_due = now + SYNC_S
        if now >= self.check_due or (self.unchecked >= CHECK_BYTES and not self.dropping):
            self._check_space()
        since, printed = self.counted
        since, printed = (since, printed + count) if now < since + MUCH_TOLD_S else (now, 0)
        self.counted = (since, printed)
        if printed < MUCH:
            self._kick(OUTPUT)
        elif self.kick_owed is None:
            self.kick_owed, self.kick_due = OUTPUT, since + MUCH_TOLD_S
        return count

    def _put(self, stream: Stream, data: memoryview, wall_ns: int) -> None:
        while data:
            if not stream.held:
                try:
                    if self.dropping:
                        self._drop(stream, len(data), wall_ns)
                        return
                    self._end_gap(stream)
                    count = os.write(stream.file, data)
                except OSError as error:
                    if error.errno in _NO_SPACE and not self.dropping and self._may_drop():
                        # For a while, whatever the file system says is free: a quota may be at its end.
                        self.dropping, self.check_due = NO_ROOM, time.monotonic() + REFUSED_S
                        continue
                    self._block(f"the spool cannot be written: {error.strerror}")
                else:
                    stream.dirty = True
                    self._note_in_index(stream, count, wall_ns)
                    stream.spooled += count
                    data = data[count:]
                    continue
            stream.held.append((bytes(data), wall_ns))
            return

    def _note_in_index(self, stream: Stream, count: int, wall_ns: int) -> None:
        offset, since, length, number = self.record
        follows = number == stream.number and offset + length == stream.spooled
        if follows and 0 <= wall_ns - since < JOIN_NS and length + count < 1 << 32:
            self.record = (offset, since, length + count, number)
        else:
            self.record_at += RECORD.size
            self.record = (stream.spooled, wall_ns, count, stream.number)
        try:
            os.pwrite(self.index, RECORD.pack(*self.record), self.record_at)
        except OSError:
            pass  # no byte is lost by it, only its time; a hole reads as zeros and is skipped

    def _sync_apart(self) -> None:
        """In a thread: beside others who write much it takes a second, and what is printed meanwhile goes on."""
        self.syncing.acquire()
        place = self._place_for_note()
        try:
            _thread.start_new_thread(self._sync, (place,))
        except (RuntimeError, MemoryError):  # the VM has no room for one
            self._sync(place)

    def _place_for_note(self) -> int:
        self.sync_due = 0.0
        self.record_at += RECORD.size
        self.record = (0, 0, 0, 0)
        return self.record_at

    def _sync(self, place: int) -> None:
        """Data, then index, while `syncing` is held. In a thread, so of what is the pump's it changes `sync_failure`
        alone, and of a stream what :meth:`Stream.sync` does."""
        try:
            self._sync_data()
            # A file's new size can come to the disk before its bytes, by the sync of another file: see cut_unsynced().
            self._note_synced(place)
            os.fdatasync(self.index)
        except Exception as error:  # whatever it is: nobody else would hear of it
            self.sync_failure = getattr(error, "strerror", None) or repr(error)
        finally:
            self.syncing.release()
        try:
            os.write(self.wake_end, b"s")
        except BlockingIOError:
            pass  # full: it wakes all the same

    def _sync_data(self) -> None:
        for stream in self.streams:
            if stream.dirty:
                stream.sync()

    def _note_synced(self, place: int) -> None:
        try:
            stdout, stderr = self.streams
            os.pwrite(self.index, RECORD.pack(stdout.synced, stderr.synced, 0, 0), place)
        except OSError:
            pass  # after a power cut fewer bytes are beyond doubt

    def _await_sync(self) -> None:
        with self.syncing:
            pass
        self._take_sync_failure()

    def _take_sync_failure(self) -> None:
        if self.sync_failure and not self.syncing.locked():
            failure, self.sync_failure = self.sync_failure, ""
            self.sync_due = time.monotonic() + SYNC_S
            self._block(f"the spool cannot be synced: {failure}")

    # -- want of space --

    def _no_space(self) -> int:
        """The cause, 0 for none."""
        if os.path.exists(os.path.join(self.state_dir, b"full")):
            return OVER_LIMIT
        fs = os.statvfs(".")
        return NO_ROOM if fs.f_bavail < min(RESERVE // fs.f_frsize, fs.f_blocks // 50) else 0

    def _may_drop(self) -> bool:
        """Whether the daemon, this one or the last, was told to drop (`overflow`)."""
        return os.path.exists(os.path.join(self.state_dir, b"drop"))

    def _check_space(self) -> int:
        """Look for want of space; its cause, 0 for none."""
        self.unchecked, self.check_due = 0, time.monotonic() + CHECK_S
        cause = self._no_space()
        self.dropping = cause if self._may_drop() else 0
        if not self.dropping:
            self._end_gaps()
            if cause:
                self._block(_CAUSES[cause])
        return cause

    def _drop(self, stream: Stream, count: int, wall_ns: int) -> None:
        """Count bytes as dropped. OSError where that can't be noted: then they are not."""
        if not stream.noted:
            if self.gaps < 0:
                self._open_gaps()
                _sync_path(".")
            if not stream.grows and stream.gap_end != stream.spooled:  # else it is the last one still
                if self.next_gap and self.next_gap % BLOCK == 0:
                    _take_block(self.gaps, self.next_gap)
                stream.gap = (stream.spooled, wall_ns, self.dropping, self.next_gap)
            self._write_gap(stream, 0, GROWS)
            self.next_gap = max(self.next_gap, stream.gap[3] + GAP.size)
            stream.grows = True
            os.fdatasync(self.gaps)
            # A file's new size may come to the disk before the bytes below it, which were zeros then.
            with self.syncing:
                stream.sync()
            stream.noted = True
            self._kick()
        os.ftruncate(stream.file, stream.spooled + count)
        stream.spooled += count
        stream.dirty = True

    def _end_gap(self, stream: Stream) -> None:
        if stream.grows:
            stream.noted = False
            self._write_gap(stream, stream.spooled - stream.gap[0], OVER)
            os.fdatasync(self.gaps)
            stream.grows, stream.gap_end = False, stream.spooled
            self._kick()

    def _end_gaps(self) -> None:
        try:
            for stream in self.streams:
                self._end_gap(stream)
        except OSError as error:
            self._block(f"the spool cannot be written: {error.strerror}")

    def _write_gap(self, stream: Stream, length: int, state: int) -> None:
        offset, wall_ns, cause, place = stream.gap
        os.pwrite(self.gaps, GAP.pack(offset, length, wall_ns, stream.number, state, cause), place)

    def _block(self, reason: str) -> None:
        if reason and reason != self.blocked:
            self.blocked = reason
            _note("blocked", reason)
            self._kick()

    def _try_again(self) -> None:
        cause = self._check_space()
        if not cause or self.dropping or self.status is not None:
            # After the exit the rest goes into the reserve too: it is bounded by the pipes' size.
            for stream in self.streams:
                held, stream.held = stream.held, []
                for data, wall_ns in held:
                    self._put(stream, memoryview(data), wall_ns)
                if held and not stream.held:
                    self.sync_due = self.sync_due or time.monotonic() + SYNC_S
                    self._kick()
        stuck = any(stream.held or (stream.grows and not self.dropping) for stream in self.streams)
        if not stuck and (not cause or self.dropping):
            self.blocked = ""
            _remove("blocked")
            self._kick()

    # -- the end --

    def _reap(self) -> None:
        try:
            os.read(self.wake, 4096)
        except BlockingIOError:
            pass
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.pid and self.status is None:
                self.status = status
                self._exited(status, usage)

    def _exited(self, status: int, usage: resource.struct_rusage) -> None:
        ended_ns = time.time_ns()
        ended_boottime_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        for stream in self.streams:
            # What the pipe holds now is the script's; what comes later is a background child's.
            left = fcntl.fcntl(stream.pipe, _F_GETPIPE_SZ) if stream.pipe >= 0 else 0
            while stream.pipe >= 0 and left > 0:
                count = self._take(stream, min(READ, left))
                if not count:
                    break
                left -= count
        if self.blocked:
            self._try_again()
        # Four cases: it could not start; a signal; a code; in each the pipes may be open still.
        text = ""
        if self.exec_errno:
            ending, value, text = "errno", self.exec_errno, explain(self.exec_errno, self.script)
        elif os.WIFSIGNALED(status):
            ending, value = "signal", os.WTERMSIG(status)
        else:
            ending, value = "code", os.WEXITSTATUS(status)
        self.closed_at_exit = all(stream.pipe < 0 and not stream.held for stream in self.streams)
        asks = (ending, value) == ("code", 10) or os.path.lexists(
            os.path.join(os.path.dirname(self.script), b"reboot")
        )
        row: Row = {
            "ending": ending,
            "value": value,
            "text": text,
            "started_ns": self.started_ns,
            "ended_ns": ended_ns,
            "started_boottime_ns": self.started_boottime_ns,
            "ended_boottime_ns": ended_boottime_ns,
            "boot_id": self.boot_id,
            "stdout": self.streams[0].length,
            "stderr": self.streams[1].length,
            "user_s": usage.ru_utime,
            "system_s": usage.ru_stime,
            "max_rss_bytes": usage.ru_maxrss * 1024,
            "asks_reboot": asks,
            "closed": self.closed_at_exit,
        }
        # Only data, since the barrier waits for it, and what is under way: `sync_due` stays set.
        self._await_sync()
        give_up = time.monotonic() + LAST_SYNC_S
        while any(stream.dirty for stream in self.streams) and time.monotonic() < give_up:
            try:
                self._sync_data()
            except OSError as error:
                self.sync_due = time.monotonic() + SYNC_S
                self._block(f"the spool cannot be synced: {error.strerror}")
                time.sleep(RETRY_S)
        self._record("exit.json", row)

    def _record(self, name: str, row: Row) -> None:
        """Write a record durably, however long the file system refuses it; then tell the daemon.

        Who sees the name sees what is durable. The rename itself is not synced: should a power cut undo it, the
        daemon finds the record, whole, under its first name.
        """
        data = to_json(row) + b"\n"
        while True:
            try:
                for stream in self.streams:
                    self._end_gap(stream)
                fd = os.open(f"{name}.new", os.O_WRONLY | os.O_CREAT, 0o600)
                try:
                    if os.write(fd, data) != len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.ftruncate(fd, len(data))  # only now: exit.json.new has its block since the start
                    os.fsync(fd)
                finally:
                    os.close(fd)
                os.rename(f"{name}.new", name)
                break
            except FileNotFoundError:
                return  # the run was removed, as `reset` does: nobody will ask
            except OSError as error:
                self._block(f"the spool cannot be written: {error.strerror}")
                time.sleep(RETRY_S)
        self._kick()

    def _kick(self, news: bytes = b"") -> None:
        """Tell the daemon that there is something new: OUTPUT alone, or it looks at all there is."""
        if self.kick_owed is not None:
            news = min(news, self.kick_owed)
        self.kick_owed = None
        try:
            self.kicks.sendto(self.run_id + news, self.kick_path)
        except BlockingIOError:
            self.kick_owed, self.kick_due = news, time.monotonic() + KICK_RETRY_S
        except OSError:
            pass  # no daemon; it reads everything when it comes


def _whole(name: str) -> bool:
    """Whether a one-line record is there and not torn. Torn means: power failed before its sync was over."""
    try:
        return _read(name).endswith(b"}\n")
    except FileNotFoundError:
        return False


def _sync_path(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _await_files() -> None:
    """Until the daemon has kept the VMR's files as they lie there now, or has died: see Run.held_back()."""
    fd = os.open(".", os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


_ESCAPES = {**{number: f"\\u{number:04x}" for number in range(32)}, ord('"'): '\\"', ord("\\"): "\\\\"}


def to_json(row: Row) -> bytes:
    """A JSON object of finite numbers, booleans and texts (RFC 8259), as `json` reads it."""
    parts = []
    for key, value in row.items():
        if isinstance(value, str):
            shown = f'"{value.translate(_ESCAPES)}"'
        else:
            shown = repr(value).lower()  # true, false, 1e-05
        parts.append(f'"{key}": {shown}')
    return "{{{}}}".format(", ".join(parts)).encode("utf-8", "backslashreplace")


def start_ticks(pid: int) -> int:
    """Field 22 of /proc/<pid>/stat; the name before it may hold blanks and parentheses. OSError where the process is
    dead."""
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    if fields[0] in (b"Z", b"X"):
        raise OSError(errno.ESRCH, "the script's process was killed before it had an order")
    return int(fields[19])


def _shown(name: bytes) -> str:
    """A name for people's eyes; names and first lines hold whatever their writer liked."""
    text = name[:300].decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def explain(number: int, script: bytes) -> str:
    """Why a script could not be executed: the cause behind the errno, which alone misleads (a missing
    interpreter is "No such file or directory", with the script in plain sight)."""
    path = _shown(script)
    try:
        first = _read(script).partition(b"\n")[0]
    except FileNotFoundError:
        return f"{path} has vanished"
    except OSError:
        first = b""
    words = first[2:].split() if first.startswith(b"#!") else []
    interpreter = _shown(words[0]) if words else ""
    if number == errno.ENOENT and words and first.endswith(b"\r"):
        return f"the first line of {path} ends in CR LF, so that no interpreter of that name exists"
    if number == errno.ENOENT and words:
        return f"the interpreter of {path} is missing: {interpreter}"
    if number == errno.EACCES:
        try:
            if os.statvfs(script).f_flag & os.ST_NOEXEC:
                return f"{path} lies on a file system mounted noexec"
            if not os.stat(script).st_mode & 0o111:
                return f"{path} is not executable"
        except OSError:
            pass
        if words and (os.path.isdir(words[0]) or not os.access(words[0], os.X_OK)):
            return f"the interpreter of {path} may not be executed: {interpreter}"
        return f"no permission to execute {path}"
    if number == errno.ETXTBSY:
        return f"{path} is still open for writing"
    return f"{os.strerror(number)}: {path}"


if __name__ == "__main__":
    sys.exit("vmr-agent: the shim is started by its fork server")
