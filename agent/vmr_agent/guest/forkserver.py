"""What lives here: a small process that forks a shim for each order.

Forked from here a run costs a third of an interpreter's start, and shares its memory. A shim may be asked for ahead of
its order: by the time it comes, all that takes long is done. Executed by path, as ``python -I -S -E forkserver.py``,
with the orders' socket as stdin and no other descriptor. It ends when the daemon's end closes; shims live on, but for
one that has no order. It must not know: anything but orders.
"""

from __future__ import annotations

import gc
import os
import sys

TYPE_CHECKING = False  # as that of `typing`, which would load much
if TYPE_CHECKING:
    import signal
    import socket
else:  # without what makes them comfortable: see shim.py
    import _signal as signal
    import _socket as socket

MAX_ORDER = 64 * 1024  # eight fields, four of them paths
READY = b"ready"  # instead of an order: one will come soon
KEPT_S = 1.0  # how long a shim waits for its order: an idle VM has none, and its memory for itself


def pack_order(
    *,
    run: bytes,
    directory: bytes,
    script: bytes,
    vmr: bytes,
    attempt: int,
    boot_id: str,
    state_dir: bytes,
    kick_path: bytes,
) -> bytes:
    """One datagram: the fields in this order with NUL between them, which none of them can hold."""
    number, run_id, boot = b"%d" % attempt, run.hex().encode(), boot_id.encode()
    return b"\0".join((run_id, directory, script, vmr, number, boot, state_dir, kick_path))


def main() -> None:
    # -I -S leave only the standard library on the path; ours comes behind it, so it can shadow nothing.
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    from vmr_agent.guest import shim  # noqa: F401 - before anything is forked

    orders = socket.socket(fileno=0)
    kicks = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    kicks.setblocking(False)
    # Shims, and this process, outlive every signal that can be blocked: only the daemon's end ends it.
    # Blocked, not ignored: scripts would inherit what is ignored (SIGPIPE, by Python itself).
    every = signal.valid_signals()
    signal.pthread_sigmask(signal.SIG_SETMASK, every - {signal.SIGCHLD})
    for number in every - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps shims
    try:
        os.setpriority(os.PRIO_PROCESS, 0, 0)  # a login's: the daemon may go before what it starts
    except PermissionError:
        pass
    gc.disable()
    gc.freeze()  # a collection would write to every object, and so copy every page that shims share
    waiting: socket.socket | None = None  # the way to a shim that has no order yet
    while True:
        orders.settimeout(None if waiting is None else KEPT_S)
        try:
            order = orders.recv(MAX_ORDER)
        except socket.timeout:
            if waiting is not None:
                waiting.close()  # it goes
            waiting = None
            continue
        if not order:
            return
        try:
            if waiting is None:
                waiting = _fork(orders, kicks)
            if order == READY:
                continue
            if not _give(waiting, order):  # it has died waiting
                _give(_fork(orders, kicks), order)
        except OSError as error:
            if order != READY:  # else it was only a hint
                _say(orders, f"cannot fork a shim: {error.strerror}")
        waiting = None


def _fork(orders: socket.socket, kicks: socket.socket) -> socket.socket:
    from vmr_agent.guest import shim

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        pid = os.fork()
        if pid == 0:
            orders.detach()
            ours.close()
            shim.main(lambda: _taken(theirs), kicks)
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    return ours


def _taken(theirs: socket.socket) -> bytes:
    try:
        return theirs.recv(MAX_ORDER)
    finally:
        theirs.close()


def _say(orders: socket.socket, words: str) -> None:
    try:
        orders.send(words.encode())
    except OSError:
        pass  # the daemon is gone, or doesn't listen; the run is ordered again by whoever comes


def _give(shim: socket.socket, order: bytes) -> bool:
    try:
        shim.send(order)
    except OSError:
        return False
    finally:
        shim.close()
    return True


if __name__ == "__main__":
    main()
