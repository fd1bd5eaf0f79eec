"""What lives here: time, what happens when, and code that blocks: a thread that runs only while the world waits for it.

It must not know: what is simulated.
"""

from __future__ import annotations

import _thread
import contextlib
import heapq
import math
import random
import select as real_select
import time as real_time
import types
from typing import Any, Callable, Optional

from tests.sim.kernel import Killed, Pipe, Process

SECOND = 10**9


class Clock:
    """Simulated time, and what is to happen in it. Two things never happen at once, and never in another order."""

    def __init__(self, dice: random.Random) -> None:
        self.now = 0  # ns
        self.dice = dice
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._number = 0
        self.tasks: list[Task] = []

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._heap, (self.now + max(0, math.ceil(seconds * SECOND)), self._number, act))

    def step(self) -> bool:
        if not self._heap:
            return False
        at, _, act = heapq.heappop(self._heap)
        self.now = max(self.now, at)
        act()
        return True

    def close(self) -> None:
        """End every task's thread."""
        for task in list(self.tasks):
            task.process.die()
            with contextlib.suppress(BaseException):
                task.resume()


class Task:
    """A process whose code blocks: the product's own, in a thread. One thread runs at a time, so it is a coroutine.

    Or a thread of such a process, whose end is not the process's.
    """

    def __init__(
        self, clock: Clock, process: Process, activate: Callable[[], None], *, thread: bool = False
    ) -> None:
        self.clock = clock
        self.process = process
        self._is_thread = thread
        self.done = False
        self.waits = False
        self.failure: Optional[BaseException] = None
        self._activate = activate
        self._go, self._back = _thread.allocate_lock(), _thread.allocate_lock()
        self._go.acquire()
        self._back.acquire()
        self._wakes = 0
        clock.tasks.append(self)

    def start(self, body: Callable[[], None]) -> None:
        _thread.start_new_thread(self._main, (body,))
        self.clock.after(0, self.resume)

    def _main(self, body: Callable[[], None]) -> None:
        self._go.acquire()
        try:
            body()
        except Killed:
            pass
        except BaseException as error:
            self.failure = error
        if not self._is_thread:
            self.process.die()
        self.done = True
        self._back.release()

    # --- from the world

    def resume(self) -> None:
        if not self.done:
            self._activate()
            self._go.release()
            self._back.acquire()
            if self.done:
                self.clock.tasks.remove(self)
                if self.failure is not None:
                    raise self.failure

    def wake(self, after: float = 0.0) -> None:
        """End a :meth:`block`, if it is in one."""
        if self.waits and not self.done:
            self.waits = False
            self.clock.after(after, self.resume)

    # --- from its own code

    def block(self, seconds: Optional[float] = None) -> None:
        """Wait to be woken, or until so many seconds have passed."""
        self._wakes += 1
        mine, self.waits = self._wakes, True
        if seconds is not None:
            self.clock.after(seconds, lambda: self.wake() if self._wakes == mine else None)
        self.pause()

    def sleep(self, seconds: float) -> None:
        """Not to be woken."""
        self.clock.after(seconds, self.resume)
        self.pause()

    def pause(self) -> None:
        self._back.release()
        self._go.acquire()
        if self.process.dead:
            raise Killed


class Lock:
    """What `_thread.allocate_lock` makes, for the tasks of one process."""

    def __init__(self, running: Callable[[], Task]) -> None:
        self._running = running
        self._held = False
        self._waiting: list[Task] = []

    def acquire(self) -> None:
        while self._held:
            task = self._running()
            self._waiting.append(task)
            task.block()
        self._held = True

    def release(self) -> None:
        assert self._held
        self._held = False
        waiting, self._waiting = self._waiting, []
        for task in waiting:
            task.wake()

    def locked(self) -> bool:
        return self._held

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Time:
    """The module `time`, as one process of one machine sees it."""

    CLOCK_BOOTTIME = real_time.CLOCK_BOOTTIME
    gmtime = staticmethod(real_time.gmtime)
    strftime = staticmethod(real_time.strftime)

    def __init__(self, clock: Clock, machine: Any, task: Optional[Task] = None) -> None:
        self._clock, self._machine, self._task = clock, machine, task

    def monotonic(self) -> float:
        return self._clock.now / SECOND

    def time_ns(self) -> int:
        return int(self._machine.wall_ns())

    def time(self) -> float:
        return self.time_ns() / SECOND

    def clock_gettime_ns(self, which: int) -> int:
        return int(self._machine.boottime_ns())

    def clock_gettime(self, which: int) -> float:
        return self.clock_gettime_ns(which) / SECOND

    def sleep(self, seconds: float) -> None:
        if self._task is not None:
            self._task.sleep(seconds)


class Poll:
    """`select.poll`, of pipes, in a task."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._fds: dict[int, None] = {}

    def register(self, fd: int, events: int) -> None:
        self._fds[fd] = None

    def unregister(self, fd: int) -> None:
        del self._fds[fd]

    def poll(self, timeout_ms: Optional[float]) -> list[tuple[int, int]]:
        deadline = None
        if timeout_ms is not None:  # no time is too short to pass, or a float's rounding would spin
            deadline = self._task.clock.now + (max(1000, int(timeout_ms * 1e6)) if timeout_ms > 0 else 0)
        while True:
            self._task.process.enter()
            ready = [(fd, real_select.POLLIN) for fd in self._fds if readable(self._task.process, fd)]
            left = None if deadline is None else (deadline - self._task.clock.now) / SECOND
            if ready or (left is not None and left <= 0):
                return ready
            self._task.block(left)


def readable(process: Process, fd: int) -> bool:
    opened = process.fds.get(fd)
    return (
        opened is not None
        and isinstance(opened.node, Pipe)
        and bool(opened.node.data or not opened.node.writers)
    )


def select_module(task: Task) -> types.SimpleNamespace:
    """The module `select`."""

    def select(reads: list[int], writes: list[int], others: list[int], timeout: Optional[float]) -> Any:
        poll = Poll(task)
        for fd in reads:
            poll.register(fd, real_select.POLLIN)
        return [fd for fd, _ in poll.poll(None if timeout is None else timeout * 1000)], [], []

    return types.SimpleNamespace(
        poll=lambda: Poll(task), POLLIN=real_select.POLLIN, PIPE_BUF=real_select.PIPE_BUF, select=select
    )
