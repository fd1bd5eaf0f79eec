"""What lives here: starting runs, and telling from a run's directory what has become of it.

It owns the fork server: starts it, starts it again when it dies. A run's truth is its directory; nothing here
is needed to find it again. It must not know: the schedule, the wire; when to look is the daemon's business.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Callable, Optional

from vmr_agent.errors import Problem, show
from vmr_agent.guest import forkserver, processes
from vmr_agent.guest.spool import Lengths, Run, Spool
from vmr_agent.runs import RunState, Trigger

SCRIPT = b"call_arguments.sh"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # a root login's
_SEND_S = 2.0  # a fork server that takes no order for so long is stuck
NOTHING = Lengths(0, 0)
_AGAIN_S = 1.0  # between two orders of one run, and two starts of a fork server that dies at once


def fork_server_command() -> list[str]:
    if getattr(sys, "frozen", False):  # a bundle has no interpreter to name; see packaging/bundle/entry.py
        return [sys.executable, "fork-server"]
    # By path: -I -S leave no package to import it from, and -m would import ours.
    return [sys.executable, "-I", "-S", "-E", os.fspath(Path(forkserver.__file__).resolve())]


class Runner:
    def __init__(
        self,
        spool: Spool,
        *,
        kick_path: Path,
        launch_dir: Path,
        log: Callable[[str], None],
        boot_id: str,
        keep: Callable[[Run], None] = lambda _: None,
        command: Optional[Sequence[str]] = None,
    ) -> None:
        self._spool = spool
        self._kick_path = kick_path
        self._launch_dir = launch_dir
        self._log = log
        self._boot_id = boot_id
        self._keep = keep  # called with each new run before its script can touch anything; raises nothing
        self._command = list(command or fork_server_command())
        self._server: Optional[subprocess.Popen[bytes]] = None
        self._orders: Optional[socket.socket] = None
        self._server_started = -_AGAIN_S
        self._readied = -_AGAIN_S
        self._ordered: dict[bytes, float] = {}  # run id: when it was last ordered; until it is seen started
        self._start_server()

    # -- the fork server --

    def fileno(self) -> int:
        """Readable when the fork server died or has something to say; -1 while there is none.

        After :meth:`handle`, :meth:`start` and :meth:`judge` it may be another: look again.
        """
        return self._orders.fileno() if self._orders is not None else -1

    @property
    def server_pid(self) -> int:
        """The fork server's pid, which this room reaps itself; 0 while there is none."""
        return self._server.pid if self._server is not None else 0

    def handle(self) -> None:
        """Take what the fork server says; start another when it died."""
        if self._orders is None:
            return
        try:
            said = self._orders.recv(4096, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        if said:
            self._log(said.decode("utf-8", "replace"))  # the run is ordered again by judge()
            return
        status = self._stop_server()
        self._log(f"the fork server ended (status {status}); starting another")
        # One that dies as soon as it is started must not keep the daemon busy: judge() tries again later.
        if time.monotonic() - self._server_started >= _AGAIN_S:
            self._start_server()
            self._ordered.clear()  # whatever it had not begun is ordered again by judge()

    def _start_server(self) -> None:
        self._server_started = time.monotonic()
        ours: Optional[socket.socket] = None
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._server = subprocess.Popen(
                    self._command,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    cwd="/",
                    # What scripts get: a clean one, whatever the daemon was started with.
                    env={"PATH": _PATH, "LANG": os.environ.get("LANG", "C.UTF-8"), "HOME": _home()},
                )
        except OSError as error:
            if ours is not None:
                ours.close()
            self._log(f"cannot start the fork server: {error.strerror}")
            return
        ours.settimeout(_SEND_S)
        self._orders = ours

    def _stop_server(self) -> Optional[int]:
        if self._orders is not None:
            self._orders.close()
            self._orders = None
        server, self._server = self._server, None
        if server is None:
            return None
        try:
            return server.wait(timeout=_SEND_S)  # it ends when its socket does
        except subprocess.TimeoutExpired:
            server.kill()
            return server.wait()

    def close(self) -> None:
        """End the fork server. Shims and their scripts go on."""
        self._stop_server()

    # -- runs --

    def make_ready(self) -> None:
        """One will be started soon: have its shim made now. Only a hint; unused, the shim goes after a second."""
        now = time.monotonic()
        if self._orders is not None and now - self._readied >= forkserver.KEPT_S / 2:
            self._readied = now
            try:
                self._orders.send(forkserver.READY)
            except OSError as error:
                self._takes_no_orders(error)

    def start(
        self,
        vmr: bytes,
        trigger: Trigger,
        *,
        now_ns: int,
        script: tuple[int, int, int] = (0, 0, 0),
        holds: bool = False,
        number: int = 0,
        request: bytes = b"",
        clear_reboot: bool = False,
    ) -> Run:
        """Make the next run of a VMR and order its start. Problem when there is no space for it: it waits."""
        self.make_ready()  # while its directory is made
        if clear_reboot:
            self._clear_reboot(vmr)
        run = self._spool.create(
            vmr,
            trigger,
            boot_id=self._boot_id,
            now_ns=now_ns,
            request=request,
            script=script,
            holds=holds,
            number=number,
        )
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(run.held_back())
            except OSError as error:
                self._log(f"cannot keep the files of {show(vmr)}: {error.strerror}; it starts without")
                self._order(run)
            else:
                self._order(run)
                self._keep(run)  # while its shim begins, which takes a slow VM longer
        return run

    def _clear_reboot(self, vmr: bytes) -> None:
        """Remove the file `reboot`, durably: come back after a power cut it would ask for another. Raises Problem."""
        with contextlib.suppress(OSError):
            os.unlink(self._directory(vmr) + b"/reboot")
        try:
            sync_directory(self._directory(vmr))
        except (FileNotFoundError, NotADirectoryError):
            pass  # gone, and the file with it
        except OSError as error:
            raise Problem(f"cannot remove the file reboot of {show(vmr)}: {error.strerror}") from None

    def attach(self) -> list[Run]:
        """The runs that the host has not whole, as found on disk; judge() tells what has become of each."""
        return self._spool.open_runs()

    def judge(self, run: Run, *, acked: Lengths = NOTHING) -> RunState:
        """What has become of a run; what nobody else can do for it any more is done.

        `acked` is what the host holds: a lost run's lengths are the larger of that and the spool.
        """
        # The lock is asked first: whoever let go of it has written all that he had to say before. And once more where
        # what is found is acted on, with another look behind it: a shim may have begun, and ended, between the two.
        held = run.locked()
        recovered = held or run.closed() is not None or self._written(run, run.recover)
        result, started = run.result(), run.started()
        if not recovered:
            # What it left is not to be taken for nothing, and not to be written over.
            if result is not None:
                return RunState.EXITED
            return RunState.STARTED if started is not None else RunState.NONE
        if started is not None or result is not None:
            self._ordered.pop(run.info.run, None)
        # Seven cases. With a result: closed; a shim waits for the pipes' end; a shim died waiting for it.
        # Without: a shim has it; it never began; its script lives on without a shim; it is lost.
        if result is not None:
            if run.closed() is not None:
                return RunState.CLOSED
            if held or run.locked():
                return RunState.EXITED
            if run.closed() is not None:
                return RunState.CLOSED
            if not self._lost_no_power(run, result.boot_id, acked):
                return RunState.EXITED
            if not self._written(run, lambda: run.write_closed(self._why(run, result.boot_id))):
                return RunState.EXITED
            return RunState.CLOSED
        if held:
            return RunState.STARTED if started is not None else RunState.NONE
        if started is None:
            if time.monotonic() - self._ordered.get(run.info.run, -_AGAIN_S) >= _AGAIN_S:
                self._order(run)
            return RunState.NONE
        if not processes.gone(started, boot_id=self._boot_id) or run.locked():
            return RunState.STARTED
        if run.result() is not None:
            return RunState.EXITED
        if not self._lost_no_power(run, started.boot_id, acked):
            return RunState.STARTED
        spooled = run.lengths()
        stdout, stderr = max(spooled.stdout, acked.stdout), max(spooled.stderr, acked.stderr)
        why = self._why(run, started.boot_id)
        asks = os.path.lexists(self._directory(run.info.vmr) + b"/reboot")
        lost = self._written(run, lambda: run.write_lost(why, stdout=stdout, stderr=stderr, asks_reboot=asks))
        return RunState.CLOSED if lost else RunState.STARTED

    def _lost_no_power(self, run: Run, boot_id: str, acked: Lengths) -> bool:
        """Whether what is spooled is what was printed: at once, or now; False: not yet."""
        return boot_id == self._boot_id or self._written(run, lambda: run.cut_unsynced(acked))

    def _written(self, run: Run, write: Callable[[], object]) -> bool:
        """Write what judge() found out; where that fails (a full or failing disk) it is found out again."""
        try:
            write()
        except OSError as error:
            self._log(f"cannot record the end of {show(run.info.vmr)}: {error.strerror}")
            return False
        return True

    def _why(self, run: Run, boot_id: str) -> str:
        if boot_id != self._boot_id:
            return "the VM went down before it was over"
        failure = run.failure()
        return f"its shim failed: {failure}" if failure else "its shim was killed"

    def _directory(self, vmr: bytes) -> bytes:
        return os.fsencode(self._launch_dir) + b"/" + vmr

    def _order(self, run: Run) -> None:
        """Tell the fork server to start a run. An order that gets lost is given again by judge()."""
        now = time.monotonic()
        self._ordered.pop(run.info.run, None)
        self._ordered[run.info.run] = now  # the last of them
        while now - self._ordered[(first := next(iter(self._ordered)))] >= _AGAIN_S:
            del self._ordered[first]  # as good as none: short runs are over before anybody asks
        order = forkserver.pack_order(
            run=run.info.run,
            directory=os.fsencode(run.path.absolute()),
            script=self._directory(run.info.vmr) + b"/" + SCRIPT,
            vmr=run.info.vmr,
            attempt=run.info.attempt,
            boot_id=self._boot_id,
            state_dir=os.fsencode(self._spool.path.absolute()),
            kick_path=os.fsencode(self._kick_path.absolute()),
        )
        for _ in range(2):
            if self._orders is None and now - self._server_started >= _AGAIN_S:
                self._start_server()
            if self._orders is None:
                return
            self._readied = -_AGAIN_S
            try:
                self._orders.send(order)
                return
            except OSError as error:
                self._takes_no_orders(error)

    def _takes_no_orders(self, error: OSError) -> None:
        self._log(f"the fork server takes no orders ({error}); starting another")
        self._stop_server()


def sync_directory(path: bytes) -> None:
    """Make durable what is in a directory. Raises OSError; not where its file system has no sync for one."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)


def _home() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        return "/"
