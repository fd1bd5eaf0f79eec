"""What lives here: the host: the real collector and the real renderer on a simulated kernel and event loop.

Played are asyncio's loop, the chardev's socket and the renderer's process; the coroutines are the product's own.
"""

from __future__ import annotations

import os as real_os
import types
from collections.abc import Generator, Iterable
from typing import Any, Callable, Optional

from tests.sim import tasks
from tests.sim.channel import Channel, Chardev
from tests.sim.disk import Directory, Disk
from tests.sim.guest import fcntl_of
from tests.sim.kernel import Killed, Locks, Opened, Pipe, Process, make_path
from tests.sim.tasks import Task, Time
from vmr_agent.errors import Problem
from vmr_agent.host import collector, journal, life, logstore, quota, renderer, vmlogs

LOGS = "/logs"
VM = "vm"

_the: dict[str, Process] = {}
Path: Any = make_path(lambda: _the["host"])


class Future:
    def __init__(self) -> None:
        self.done = False
        self.value: Any = None
        self.act: Optional[Callable[[], None]] = None

    def finish(self, value: Any = None) -> None:
        self.done, self.value = True, value
        if self.act is not None:
            self.act()

    def __await__(self) -> Generator[Future, None, Any]:
        if not self.done:
            yield self
        return self.value


class Event:
    """`asyncio.Event`."""

    def __init__(self) -> None:
        self._set = False
        self._waits: list[Future] = []

    def set(self) -> None:
        self._set = True
        waits, self._waits = self._waits, []
        for future in waits:
            future.finish()

    def clear(self) -> None:
        self._set = False

    async def wait(self) -> bool:
        while not self._set:
            future = Future()
            self._waits.append(future)
            await future
        return True


class Handle:
    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """The event loop of one collector."""

    def __init__(self, host: Host, process: Process) -> None:
        self._host, self._process = host, process

    def call_later(self, seconds: float, act: Callable[..., Any], *args: Any) -> Handle:
        handle = Handle()

        def call() -> None:
            if not handle.cancelled:
                self._host.call(self._process, lambda: act(*args))

        self._host.world.clock.after(seconds, call)
        return handle

    def run_in_executor(self, _: Any, act: Callable[..., Any], *args: Any) -> Future:
        """In its time: the loop goes on meanwhile."""
        future = Future()

        def work() -> None:
            self._host.call(self._process, lambda: act(*args))
            delay = self._host.world.dice.random() * 0.01
            self._host.world.clock.after(delay, lambda: self._host.call(self._process, future.finish))

        slow = self._host.world.dice.choice((0.001, 0.01, 0.2))
        self._host.world.clock.after(self._host.world.dice.random() * slow, work)
        return future

    def in_background(self, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """As Collector.in_background()."""
        self.call_later(self._host.world.dice.random() * 0.05, lambda: self.call_later(0.001, then, work()))

    def drive(self, coroutine: Any) -> None:
        """As a task."""

        def step() -> None:
            try:
                future = coroutine.send(None)
            except StopIteration:
                return
            future.act = lambda: self.call_later(0, step)

        step()

    async def sleep(self, seconds: float) -> None:
        future = Future()
        self.call_later(seconds, future.finish)
        await future


class SimRenderer:
    """`host.renderer.RendererProcess`: its other end is a task."""

    def __init__(self, host: Host, log_dir: Any, vms: Iterable[str]) -> None:
        self._host = host
        self._vms = list(vms)
        self._start()

    def _start(self) -> None:
        self.pipe = Pipe()
        self.pipe.writers = 1
        self.task = self._host.start_renderer(self.pipe, self._vms)

    def alive(self) -> bool:
        return not self.task.process.dead

    def restart(self) -> None:
        self._start()

    def wake(self, vms: Iterable[str] = ()) -> None:
        self.pipe.data += b"".join(b"%d\n" % self._vms.index(vm) for vm in vms) or b"\n"
        self.task.wake(0.0001)

    def close(self) -> bool:
        self.let_go()
        return True

    def let_go(self) -> None:
        self.pipe.writers = 0
        self.task.wake()


class Host:
    def __init__(self, world: Any, channel: Channel) -> None:
        self.world = world
        self.channel = channel
        self.skew = 0
        self.disk = Disk("host", self.wall_ns)
        self.locks = Locks()
        self.process: Optional[Process] = None
        self.collector: Optional[collector.Collector] = None
        self.renderers: list[Task] = []
        self.stopping = False
        self._pid = 10_000
        self._starts = 0
        Process(self.disk, self.locks, pid=1, urandom=world.random_bytes).mkdir(LOGS)
        self.disk.sync_all("/")

    # --- the machine

    def wall_ns(self) -> int:
        return int(self.world.wall + self.world.clock.now + self.skew)

    def boottime_ns(self) -> int:
        return int(self.world.clock.now)

    def power_cut(self) -> None:
        self.world.say("the host loses power")
        for task in self.renderers:
            task.process.die()
        self._collector_died(restart=2.0)
        self.locks.flocks.clear()
        self.disk.lose_power(self.world.dice)

    # --- the collector

    def start(self) -> None:
        if self.process is not None:
            return
        self._pid += 1
        process = Process(self.disk, self.locks, pid=self._pid, urandom=self.world.random_bytes)
        self.process = process
        self.stopping = False
        self.world.maybe_trap(process, "collector", None)
        self.world.say("the collector starts")
        loop = Loop(self, process)
        _patch(self, process, loop)
        self.call(process, lambda: self._run(loop))

    def _run(self, loop: Loop) -> None:
        """As Collector.run()."""
        source = collector.Source(VM, Path("/chardev"))
        made = collector.Collector(
            Path(LOGS),
            [source],
            control_path=Path("/control"),
            expect=1,
            start_buffer=self.world.plan.buffer,
            quota=0 if self.world.healing else self.world.plan.quota,
        )
        made.in_background = loop.in_background  # type: ignore[method-assign]
        try:
            made.guests[VM] = collector.Guest(source, made._store(VM), made)
        except Problem as problem:
            self.world.say(f"the collector can't start: {problem}")
            self._collector_died(restart=1.0)
            return
        made._start_renderer()
        self.collector = made
        made.guests[VM].start()
        loop.drive(made._tick())
        loop.drive(made._sweeps())

    def call(self, process: Process, act: Callable[[], Any]) -> None:
        """Run code of a collector, if it still lives."""
        if process.dead:
            return
        self._activate(process)
        try:
            act()
        except Killed:
            self._collector_died(restart=0.2)

    def _activate(self, process: Process) -> None:
        for module in (collector, logstore, life, journal, quota):
            vars(module)["os"] = process
        _the["host"] = process
        clock = Time(self.world.clock, self)
        collector.time = logstore.time = clock  # type: ignore[assignment]

    def _collector_died(self, *, restart: float) -> None:
        process, made = self.process, self.collector
        if process is None:
            return
        self.world.say("the collector is gone")
        process.die()
        self.process = self.collector = None
        if self.channel.chardev is not None:
            self.channel.disconnect()
        if made is not None and made._renderer is not None:
            made._renderer.let_go()  # type: ignore[attr-defined]
        self.world.trap_sprung(self)
        self.world.clock.after(restart + self.world.dice.random(), self.start)

    def kill(self) -> None:
        if self.process is not None:
            self._collector_died(restart=0.2)

    def stop(self) -> None:
        """SIGTERM: as Collector._shut_down()."""
        made, process = self.collector, self.process
        if made is None or process is None:
            return
        self.world.say("the collector is told to end")

        def shut_down() -> None:
            for guest in made.guests.values():
                guest.chardev.close()
            for guest in made.guests.values():
                try:
                    guest.store.sync()
                except OSError as error:
                    collector.say(f"cannot sync: {error}")
            if made._renderer is not None:
                made._renderer.wake()
                made._renderer.close()
            for guest in made.guests.values():
                guest.store.close()

        self.call(process, shut_down)
        if self.process is process:
            self._collector_died(restart=0.5)

    @property
    def guest(self) -> Optional[collector.Guest]:
        return None if self.collector is None else self.collector.guests.get(VM)

    # --- the renderer

    def start_renderer(self, pipe: Pipe, vms: list[str]) -> Task:
        self._pid += 1
        process = Process(self.disk, self.locks, pid=self._pid, urandom=self.world.random_bytes)
        fd = process._give(Opened(pipe, 0))
        pipe.readers = 1
        modules: dict[str, Any] = {}

        def activate() -> None:
            for module in (renderer, vmlogs, journal):
                vars(module)["os"] = process
            vars(renderer).update(time=modules["time"], select=modules["select"])
            vars(vmlogs)["fcntl"] = modules["fcntl"]

        task = Task(self.world.clock, process, activate)
        modules.update(
            time=Time(self.world.clock, self, task),
            select=tasks.select_module(task),
            fcntl=fcntl_of(process),
        )
        self.world.maybe_trap(process, "renderer", task.sleep)

        def body() -> None:
            made = renderer.Renderer(Path(LOGS), vms)
            made.serve(fd)
            made.close()

        self.renderers = [each for each in self.renderers if not each.done]
        self.renderers.append(task)
        task.start(body)
        return task

    def kill_renderer(self) -> None:
        for task in self.renderers:
            if not task.done and not task.process.dead:
                self.world.say("the renderer is killed")
                task.process.die()
                task.wake()
                return

    # --- for who checks

    def lives(self) -> list[str]:
        top = self.disk.find(LOGS)
        assert isinstance(top, Directory)
        names = [name for name in top.names if name == VM or name.startswith(VM + "~")]
        return sorted(names, key=lambda name: int(name.partition("~")[2] or 10**9))


def _patch(host: Host, process: Process, loop: Loop) -> None:
    asyncio = types.SimpleNamespace(Event=Event, get_running_loop=lambda: loop, sleep=loop.sleep)
    modules: Any = types.SimpleNamespace(collector=collector, logstore=logstore, renderer=renderer)
    modules.collector.asyncio = asyncio
    modules.collector.Chardev = lambda path, listen, **callbacks: Chardev(
        host.channel, lambda act: host.call(process, act), host.world.host_sent, **callbacks
    )
    modules.collector.RendererProcess = lambda log_dir, vms: SimRenderer(host, log_dir, vms)
    modules.collector.say = lambda line: host.world.host_says(line)
    modules.logstore.fcntl = fcntl_of(process)
    modules.logstore.find_syncfs = modules.renderer.find_syncfs = lambda: host.world.plan.syncfs
    modules.logstore.SYNCFS_FROM = 3
    modules.renderer.SYNCFS_FROM = 1
    modules.renderer.print = lambda *args, **_: host.world.host_says(" ".join(map(str, args)))
    modules.renderer.traceback = types.SimpleNamespace(
        print_exc=lambda: host.world.violated("the renderer fails: " + collector.traceback.format_exc())
    )


Fd = real_os.PathLike
