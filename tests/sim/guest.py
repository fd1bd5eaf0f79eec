"""What lives here: a VM: the guest's real daemon and its real shims on a simulated kernel, and the scripts they run.

The daemon's own methods are called in the order of its loop; each shim is `guest.shim`'s own code in a task, and
the thread of its syncs in another. Played are what is below or beside them: the fork server (an order in, a shim
out), the scripts, inotify, the port.
"""

from __future__ import annotations

import fcntl as real_fcntl
import json
import os as real_os
import resource as real_resource
import stat
import types
from collections.abc import Container, Mapping
from contextlib import suppress
from typing import Any, Callable, Optional

from tests.sim import tasks
from tests.sim.channel import Channel, Port
from tests.sim.disk import Directory, Disk, File
from tests.sim.kernel import Killed, Locks, Pipe, Process, make_path, rmtree
from tests.sim.tasks import SECOND, Task, Time
from vmr_agent.errors import Problem
from vmr_agent.guest import (
    daemon,
    forkserver,
    gaps,
    link,
    machine,
    reboot,
    runner,
    runtime,
    shim,
    spool,
    supervisor,
    watcher,
)
from vmr_agent.guest.events import Hints
from vmr_agent.guest.settings import Settings
from vmr_agent.runs import Stream

STATE, LAUNCH = "/var/state", "/var/launch"
KICKS = 10  # datagrams a socket's queue holds by default

_the: dict[str, Process] = {}
Path: Any = make_path(lambda: _the["daemon"])


class Script:
    """The script's process, and what it really wrote: the truth all is compared with."""

    def __init__(self, vm: Vm, shim_task: Shim, pid: int, pipes: list[Pipe]) -> None:
        self.vm = vm
        self.world = vm.world
        self.shim = shim_task
        self.pid = pid
        self.go, self.failed = pipes[2], pipes[3]
        self.pipes = {Stream.STDOUT: pipes[0], Stream.STDERR: pipes[1]}
        self.vmr, self.attempt, self.run = shim_task.vmr, shim_task.attempt, shim_task.run
        self.alive = True
        self.executes = False
        self.boot = vm.boot
        self.timeline = vm.timeline
        self.written = {Stream.STDOUT: bytearray(), Stream.STDERR: bytearray()}
        self.steps: list[tuple[Any, ...]] = []
        self._waits = False
        for pipe in (*self.pipes.values(), self.failed):
            pipe.writers += 1
        self.go.readers += 1

    def look(self) -> None:
        """Whether it is let go, or has to give up."""
        if not self.alive or self.executes:
            return
        if self.go.data.endswith(shim.GO):
            number = self.world.goes_on(self) if self.shim.script_pid else self.world.executed(self)
            if number:
                self.failed.data += number.to_bytes(4, "little")
                self._end(127 << 8)
            else:
                self.executes = True
                self.world.clock.after(self.world.dice.random() * 0.002, self._step)
            self._drop(self.failed)
            self.shim.task.wake()
        elif not self.go.writers:
            self._end(0)

    def _drop(self, pipe: Pipe) -> None:
        pipe.writers -= 1

    def kill(self, number: int) -> None:
        if self.alive and self.executes:
            self._end(number)
        elif self.alive:
            self.alive = False

    def gone(self) -> None:
        """With its VM."""
        self.alive = False

    def poke(self) -> None:
        """There is room in a pipe."""
        if self._waits:
            self._waits = False
            self.world.clock.after(self.world.dice.random() * 0.001, self._step)

    def _step(self) -> None:
        if not self.alive:
            return
        if not self.steps:
            self._end(0)
            return
        what, *args = self.steps[0]
        if what == "write":
            stream, data = args
            pipe = self.pipes[stream]
            if not pipe.readers:
                self._end(13)  # SIGPIPE
                return
            taken = data[: max(0, pipe.capacity - len(pipe.data))]
            pipe.data += taken
            self.written[stream] += taken
            if taken:
                self.shim.task.wake()
            if len(taken) < len(data):
                self.steps[0] = ("write", stream, data[len(taken) :])
                self._waits = True
                return
            self.steps.pop(0)
            self.world.clock.after(self.world.dice.random() * 0.002, self._step)
            return
        self.steps.pop(0)
        if what == "sleep":
            self.world.clock.after(args[0], self._step)
        elif what == "reboot file":
            with suppress(FileNotFoundError):  # its directory is gone
                self.vm.put(f"{LAUNCH}/{real_os.fsdecode(self.vmr)}/reboot", b"")
            self.world.clock.after(0.001, self._step)
        elif what == "leave":
            self._leave(*args)
        elif what == "exit":
            self._end(args[0] << 8)

    def _leave(self, seconds: float, data: bytes) -> None:
        """Leave a child behind that holds stdout, and writes to it before it ends."""
        pipe = self.pipes[Stream.STDOUT]
        pipe.writers += 1
        powered = self.vm.powered

        def end() -> None:
            if self.vm.powered == powered and pipe.writers:
                if pipe.readers:
                    taken = data[: max(0, pipe.capacity - len(pipe.data))]
                    pipe.data += taken
                    self.written[Stream.STDOUT] += taken
                pipe.writers -= 1
                self.shim.task.wake()

        self.world.clock.after(seconds, end)
        self.world.clock.after(0, self._step)

    def _end(self, status: int) -> None:
        self.alive = False
        for pipe in self.pipes.values():
            self._drop(pipe)
        if self.executes:
            self.world.ended(self, status)
        self.shim.process.child_ended(self.pid, status)
        self.shim.task.wake()


class ShimProcess(Process):
    """A shim's `os`."""

    shim: Shim

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pipes: list[Pipe] = []
        self.wakeup_fd = -1
        self.zombies: list[tuple[int, int]] = []
        self.script: Optional[Script] = None

    def pipe(self) -> tuple[int, int]:
        self.enter()
        stream = len(self.pipes) in (1, 2)
        pipe = Pipe(self.shim.vm.pipe_capacity if stream else 65_536)
        self.pipes.append(pipe)
        return self.give_pipe(pipe)

    def fork(self) -> int:
        self.enter()
        _, stdout, stderr, go, failed = self.pipes
        pid = self.shim.script_pid or self.shim.vm.next_pid()
        self.script = Script(self.shim.vm, self.shim, pid, [stdout, stderr, go, failed])
        self.shim.vm.scripts[self.script.pid] = self.script
        return self.script.pid

    def read_pipe(self, pipe: Pipe, most: int) -> bytes:
        while pipe is self.pipes[-1] and not pipe.data and pipe.writers:
            self.shim.task.block()  # `failed`, the only one that blocks
        data = super().read_pipe(pipe, most)
        if self.script is not None:
            self.script.poke()
        return data

    def write(self, fd: int, data: Any) -> int:
        self.shim.preempt()
        count = super().write(fd, data)
        self._tell_script()
        if fd == self.wakeup_fd:
            self.shim.task.wake()
        return count

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        self.shim.preempt()
        count = super().pwrite(fd, data, offset)
        if self._fd(fd).node is self.cwd.names.get("index"):
            stdout, stderr, length, number = shim.RECORD.unpack(data)
            if not length and not number:
                self._says_durable("its note", stdout, stderr)
        return count

    def rename(self, old: Any, new: Any, **more: Any) -> None:
        super().rename(old, new, **more)
        if new == "exit.json":
            row = json.loads(self.cwd.names[new].content)  # type: ignore[union-attr]
            self._says_durable("its end", row["stdout"], row["stderr"])

    def _says_durable(self, what: str, stdout: int, stderr: int) -> None:
        world, name = self.shim.vm.world, self.shim.vmr.decode()
        world.durable(self.cwd, f"{name}: {what}", {Stream.STDOUT: stdout, Stream.STDERR: stderr})

    def fdatasync(self, fd: int) -> None:
        """In a thread it takes its time: what was written before it began is durable then, what comes meanwhile
        may be."""
        if not self.shim.preempt():
            super().fdatasync(fd)
            return
        self.enter()
        node = self._fd(fd).node
        assert isinstance(node, File)
        dice, begun = self.shim.vm.world.dice, node.made
        try:
            self.shim.let_others_go_on(self.shim.vm.world.plan.sync_takes)
        except Killed:
            # The kernel may go on with it. Should it fail nobody is told.
            if self.shim.vm.up and dice.random() < 0.5:
                with suppress(OSError):
                    node.sync(dice.randint(begun, node.made))
            raise
        node.sync(dice.randint(begun, node.made))

    def close(self, fd: int) -> None:
        super().close(fd)
        self._tell_script()

    def die(self) -> None:
        super().die()
        for task in self.shim.tasks:
            task.wake()
        self._tell_script()
        if self.script is not None:
            self.script.poke()  # to SIGPIPE

    def _tell_script(self) -> None:
        if self.script is not None and not self.script.executes:
            self.script.look()

    def flock(self, fd: int, how: int) -> None:
        while True:
            try:
                return super().flock(fd, how)
            except BlockingIOError:
                self.shim.pause(0.001)  # whoever holds it works, or dies

    def child_ended(self, pid: int, status: int) -> None:
        self.zombies.append((pid, status))
        opened = self.fds.get(self.wakeup_fd)
        if opened is not None and isinstance(opened.node, Pipe):
            opened.node.data += b"\x11"

    def wait4(self, pid: int, options: int) -> tuple[int, int, Any]:
        self.enter()
        usage = types.SimpleNamespace(ru_utime=0.25, ru_stime=0.125, ru_maxrss=1234)
        if not self.zombies:
            return 0, 0, usage
        return (*self.zombies.pop(0), usage)

    def waitpid(self, pid: int, options: int) -> tuple[int, int]:
        self.enter()
        return pid, 0


class Shim:
    """One shim: `guest.shim`'s code, in a task, and the thread of a sync in another."""

    script_pid = 0
    """The script's, where it runs already."""

    def __init__(self, vm: Vm, order: list[bytes]) -> None:
        self.vm = vm
        self.order = order
        self.run = bytes.fromhex(order[0].decode())
        self.vmr, self.attempt = order[3], int(order[4])
        self.process = ShimProcess(vm.disk, vm.locks, pid=vm.next_pid(), urandom=vm.world.random_bytes)
        self.process.shim = self
        self.tasks: list[Task] = []
        self.running = self.task = self._make_task()
        self._modules = {
            "os": self.process,
            "time": Time(vm.world.clock, vm, self.task),
            "select": tasks.select_module(self.task),
            "fcntl": fcntl_of(self.process),
            "signal": types.SimpleNamespace(
                SIGCHLD=17, signal=lambda *_: None, set_wakeup_fd=self._wakeup_fd, SIG_SETMASK=2
            ),
            "resource": real_resource,
            "_thread": types.SimpleNamespace(
                allocate_lock=lambda: tasks.Lock(lambda: self.running), start_new_thread=self._start_thread
            ),
        }
        vm.world.maybe_trap(self.process, "shim", self.pause)
        self.task.start(self._main)

    def _wakeup_fd(self, fd: int, *, warn_on_full_buffer: bool = True) -> None:
        self.process.wakeup_fd = fd

    def _make_task(self, *, thread: bool = False) -> Task:
        def activate() -> None:
            self.running = task
            vars(shim).update(self._modules)

        task = Task(self.vm.world.clock, self.process, activate, thread=thread)
        self.tasks.append(task)
        return task

    def _start_thread(self, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if self.vm.world.dice.random() < 0.02:
            raise RuntimeError("can't start new thread")
        thread = self._make_task(thread=True)

        def body() -> None:
            work(*arguments)
            self.tasks.remove(thread)

        thread.start(body)

    def pause(self, seconds: float) -> None:
        self.running.sleep(seconds)

    def preempt(self) -> bool:
        """Let others go on before a thread's next step; whether this is one's."""
        if self.running is self.task:
            return False
        self.let_others_go_on(0.001)
        return True

    def let_others_go_on(self, seconds: float) -> None:
        """For so long at the most; to be ended by a kill."""
        self.running.block(self.vm.world.dice.random() * seconds)

    def _main(self) -> None:
        """As shim.main(), without what a process does to itself."""
        made = shim.Shim(self.vm.kicks)  # type: ignore[arg-type]
        made.prepare()
        try:
            self.process.chdir(self.order[1])
        except OSError:
            return
        try:
            self._hold(made)
        except shim.Waits as no:
            shim._note("blocked", str(no))
        except Exception as bug:
            if not isinstance(bug, OSError):
                raise
            self.vm.world.say(f"a shim failed: {bug!r}")
            shim._note("failed", f"{type(bug).__name__}: {bug}")

    def _hold(self, made: shim.Shim) -> None:
        made.run(self.order)

    def kill(self) -> None:
        self.process.die()


class RestoredShim(Shim):
    """One that a snapshot caught in mid-run. It goes on, and its script does, and says something else than before."""

    def __init__(self, vm: Vm, order: list[bytes], script_pid: int) -> None:
        self.script_pid = script_pid
        super().__init__(vm, order)
        self._trap, self.process.trap = self.process.trap, 1 << 60

    def _hold(self, made: shim.Shim) -> None:
        """As Shim.run(), with what that found out or made long ago."""
        os = self.process
        made.accept(self.order)
        lock = os.open("lock", real_os.O_RDWR)
        os.lockf(lock, real_fcntl.LOCK_EX | real_fcntl.LOCK_NB)
        made._open()
        for stream in made.streams:
            stream.spooled = os.fstat(stream.file).st_size
        made.record_at = (
            os.fstat(made.index).st_size // shim.RECORD.size * shim.RECORD.size - shim.RECORD.size
        )
        process = json.loads(shim._read("started"))["process"]
        made.started_ns, made.started_boottime_ns = process["wall_ns"], process["boottime_ns"]
        os.write(made.go, shim.GO)
        os.close(made.go)
        os.close(made.failed)
        os.trap = os.calls + self._trap  # not before: it was there all the time
        made._pump()


def fcntl_of(process: Process) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        flock=process.flock,
        lockf=process.lockf,
        fcntl=process.fcntl,
        **{name: getattr(real_fcntl, name) for name in dir(real_fcntl) if name.startswith(("LOCK_", "F_"))},
    )


class Kicks:
    """The daemon's datagram socket."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.queue: list[bytes] = []

    def sendto(self, data: bytes, path: bytes) -> None:
        if self.vm.daemon is None:
            raise ConnectionRefusedError(111, "Connection refused")
        if len(self.queue) >= KICKS:
            raise BlockingIOError(11, "full")
        self.queue.append(data)
        self.vm.wake()

    def recv(self, most: int) -> bytes:
        if not self.queue:
            raise BlockingIOError(11, "empty")
        return self.queue.pop(0)


class Events:
    """`guest.events.Events`: told by the world, which may forget to."""

    vm: Vm

    def __init__(self) -> None:
        self.heard = False
        self.ignored: set[bytes] = set()
        self.observed: frozenset[bytes] = frozenset()
        self.touched: set[bytes] = set()
        self.vanished: set[bytes] = set()
        Events.vm.events = self

    def fileno(self) -> int:
        return -1

    def start(self, path: bytes) -> None:
        pass

    def alive(self) -> bool:
        return True

    def stop(self) -> None:
        pass

    close = stop

    def only(self, vmrs: Container[bytes]) -> bool:
        return bool(self.touched) and not self.vanished and all(name in vmrs for name in self.touched)

    def take(self) -> Hints:
        hints = Hints(frozenset(self.touched), frozenset(self.vanished), False)
        self.touched, self.vanished, self.heard = set(), set(), False
        return hints


class SimRunner(runner.Runner):
    """The runner, with a fork server that is played."""

    vm: Vm

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, command=["fork server"])

    def _start_server(self) -> None:
        vm = SimRunner.vm
        self._server_started = runner.time.monotonic()
        self._orders = ForkServer(vm)  # type: ignore[assignment]

    def _stop_server(self) -> Optional[int]:
        self._orders = None
        return 0

    def _order(self, run: Any) -> None:
        super()._order(run)
        world = SimRunner.vm.world
        if world.plan.busy and world.dice.random() < world.plan.busy:  # a run's whole life long
            SimRunner.vm.deschedule(world.dice.choice((0.02, 0.08)))


class ForkServer:
    """The daemon's end of it. Its orders wait in a queue, and are taken one after the other."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self._busy_until = 0

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        pass

    def send(self, order: bytes) -> None:
        if order == forkserver.READY:
            return  # a shim that waits for its order has nothing on any disk
        world = self.vm.world
        powered = self.vm.powered
        if world.dice.random() < world.plan.lost_orders:
            return  # it was killed with the order in its queue

        def fork() -> None:
            if self.vm.powered == powered and self.vm.up:
                self.vm.shims.append(Shim(self.vm, order.split(b"\0")))

        now = world.clock.now
        self._busy_until = max(self._busy_until, now)
        if world.dice.random() < 0.1:  # so slow that the order is given again
            self._busy_until += int(world.dice.random() * 2.5 * SECOND)
        world.clock.after((self._busy_until - now) / SECOND + world.dice.random() * 0.01, fork)


class _Selector:
    def register(self, *_: Any) -> None:
        pass

    def get_map(self) -> Mapping[int, Any]:
        return {}


class _Listener:
    def close(self) -> None:
        pass


class Reboot:
    """The command that reboots: it takes a moment, and then there is no daemon to see its status."""

    pid = 0

    def __init__(self, vm: Vm) -> None:
        vm.world.say("the daemon reboots the VM")
        vm.world.reboots_wanted += 1
        powered = vm.powered
        vm.world.clock.after(0.5, lambda: vm.reboot("asked for") if vm.powered == powered and vm.up else None)

    def poll(self) -> Optional[int]:
        return None


class Vm:
    """A VM: what its disk holds, what runs in it, and when."""

    def __init__(self, world: Any, channel: Channel) -> None:
        self.world = world
        self.channel = channel
        self.skew = 0
        self.disk = Disk("guest", self.wall_ns)
        self.locks = Locks()
        self.kicks = Kicks(self)
        self.events: Optional[Events] = None
        self.daemon: Optional[daemon.Daemon] = None
        self.process: Optional[Process] = None
        self.shims: list[Shim] = []
        self.scripts: dict[int, Script] = {}
        self.boot = ""
        self.booted = 0
        self.timeline = 0
        self.up = False
        self.pipe_capacity = world.dice.choice((512, 4096, 65_536))
        self._pid = 100
        self.powered = 0  # how often: a boot that was restored is another
        self._next_turn = 0
        self._port_woke = False
        self.away = False
        """The daemon is in the middle of something, and others go on."""
        self.settings = Settings(
            launch_dir=Path(LAUNCH),
            port="simulated",
            state_dir=Path(STATE),
            runtime_dir=Path("/run/vmr"),
            settle=0.02,
            quiet=world.plan.quiet,
            spool_limit=world.plan.spool_limit,
            overflow_drop=world.plan.drop,
            keep_files=0,
            max_reboots=3,
            reboot_command=("reboot",),
        )
        channel.wake_guest = self.port_wakes
        stager = self.stager = Process(self.disk, Locks(), pid=1, urandom=world.random_bytes)
        for path in ("/var", LAUNCH, "/run", "/run/vmr"):
            stager.mkdir(path, 0o755)
        self.disk.sync_all("/")

    # --- the machine

    def wall_ns(self) -> int:
        return int(self.world.wall + self.world.clock.now + self.skew)

    def boottime_ns(self) -> int:
        return int(self.world.clock.now - self.booted)

    def next_pid(self) -> int:
        self._pid += 1
        return self._pid

    def power_on(self, *, boot: str = "", booted: Optional[int] = None) -> None:
        self.powered += 1
        self.boot = boot or f"boot-{self.powered}"
        self.booted = self.world.clock.now - 5 * SECOND if booted is None else booted
        self.up = True
        self.world.say(f"the VM boots ({self.boot})")
        self.start_daemon_in(self.world.dice.random() * 0.5)

    def power_off(self, *, lose: bool) -> None:
        """The power goes; or, without `lose`, the VM is reset and its disk's cache, the host's, stays whole."""
        self.up = False
        for script in self.scripts.values():
            script.gone()
        for process in (self.process, *(each.process for each in self.shims)):
            if process is not None:
                process.die()
        for each in self.shims:
            each.kill()
        self.shims.clear()
        self.scripts.clear()
        self.daemon = self.process = self.events = None
        self.kicks.queue.clear()
        self.locks.flocks.clear()
        self.locks.records.clear()
        self.channel.reset()
        if lose:
            self.disk.lose_power(self.world.dice)

    def reboot(self, why: str, *, lose: bool = False) -> None:
        self.world.say(f"the VM goes down: {why}")
        if not lose:
            self.disk.sync_all("/")
        self.power_off(lose=lose)
        self.world.clock.after(0.3, self.power_on)

    # --- the daemon

    def start_daemon_in(self, seconds: float) -> None:
        powered = self.powered

        def start() -> None:
            if self.up and self.powered == powered and self.daemon is None:
                self._start_daemon()

        self.world.clock.after(seconds, start)

    def _activate(self) -> None:
        assert self.process is not None
        if _the.get("daemon") is self.process:
            return
        _the["daemon"] = self.process
        for module in (machine, daemon, link, reboot, supervisor, spool, gaps, runner, watcher):
            vars(module)["os"] = self.process
            if "time" in vars(module):
                vars(module)["time"] = Time(self.world.clock, self)

    def _start_daemon(self) -> None:
        self.process = process = Process(
            self.disk, self.locks, pid=self.next_pid(), urandom=self.world.random_bytes
        )
        Events.vm = SimRunner.vm = self
        _patch(self, process)
        self.world.maybe_trap(process, "daemon", self.deschedule if self.world.plan.busy else None)
        self._activate()
        self.kicks.queue.clear()
        spool._with_fds.clear()
        self._next_turn = 0
        self.world.say("the daemon starts")
        try:
            try:
                made = daemon.Daemon(self.settings, log=self._log)
                made.begin()
            except Killed:
                if self.process is process:
                    self._daemon_died()
                return
            except Problem as problem:
                self.world.say(f"the daemon can't start: {problem}")
                process.die()
                self.process = None
                self.start_daemon_in(1.0)
                return
            except OSError as error:
                # As the real one: it ends, and systemd starts it again.
                self.world.say(f"the daemon ends: {error!r}")
                process.die()
                self.process = None
                self.start_daemon_in(1.0)
                return
        finally:
            pass
        self.daemon = made
        self.wake()

    def _log(self, line: str) -> None:
        self.world.say(f"daemon: {line}")

    def wake(self, after: Optional[float] = None) -> None:
        """Have the daemon's loop turn, soon."""
        if self.daemon is None:
            return
        if after is None:
            after = self.world.dice.random() * 0.001
        at = self.world.clock.now + int(after * SECOND)
        if self._next_turn and self._next_turn <= at:
            return
        self._next_turn = at
        self.world.clock.after(after, lambda: self._turn(at))

    def port_wakes(self) -> None:
        self._port_woke = True
        self.wake()

    def _turn(self, at: int) -> None:
        """One turn of Daemon.run()'s loop."""
        running, process = self.daemon, self.process
        if running is None or self._next_turn != at:
            return
        self._next_turn = 0
        self._activate()
        running._link.untold, self._port_woke = not self._port_woke, False
        try:
            if self.kicks.queue:
                running._try(running.take_kicks)
            running.turn()
            timeout = running.timeout()
        except Killed:
            if self.process is process:  # else everybody knows: it was descheduled when it died
                self._daemon_died()
            return
        self.world.check_daemon(running)
        if self.kicks.queue:
            timeout = 0.0
        self.wake(max(timeout, 0.0002))

    def deschedule(self, seconds: float) -> None:
        """A busy machine lets all others go on here, for so long, before the daemon does. Raises Killed if it dies."""
        clock, process = self.world.clock, self.process
        assert process is not None
        end = clock.now + int(seconds * SECOND)
        turn, self._next_turn, self.away = self._next_turn, 1, True  # no turn within this one
        clock.after(seconds, lambda: None)
        while clock.now < end:
            clock.step()
        self.away = False
        if process.dead:
            raise Killed
        self._next_turn = 0
        if turn:
            self.wake()
        self._activate()

    def _daemon_died(self) -> None:
        if self.process is not None:
            self.process.die()
            self.world.say("the daemon is killed")
        self.daemon = self.process = self.events = None
        self.channel.guest_closed()
        self.world.trap_sprung(self)
        if self.up:
            self.start_daemon_in(0.1 + self.world.dice.random())

    def kill_daemon(self) -> None:
        if self.process is not None:
            self._daemon_died()

    def under_way(self) -> list[tuple[list[bytes], int]]:
        """(order, pid of the script) of each shim that has its script running, and has dropped nothing."""
        found = []
        for each in self.shims:
            script = each.process.script
            if any(self.disk.content(f"{real_os.fsdecode(each.order[1])}/gaps") or b""):
                continue
            if not each.process.dead and script is not None and script.executes and script.alive:
                found.append((each.order, script.pid))
        return found

    def kill_shim(self) -> None:
        live = [each for each in self.shims if not each.process.dead]
        if live:
            victim = self.world.dice.choice(live)
            self.world.say(f"the shim of {victim.vmr.decode()} is killed")
            victim.kill()

    # --- staging

    def put(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Write a file, at once durable: what a power cut takes of staging is not what is looked at here.

        Nor is a disk without room for it.
        """
        full, self.disk.full = self.disk.full, False
        fd = self.stager.open(path, real_os.O_WRONLY | real_os.O_CREAT | real_os.O_TRUNC, mode)
        self.stager.write(fd, content)
        self.stager.fchmod(fd, mode)
        self.stager.close(fd)
        self.disk.sync_all(path)
        self.disk.full = full

    def stage(self, vmr: str, *, executable: bool = True) -> None:
        full, self.disk.full = self.disk.full, False
        start_time, _, name = vmr.partition("/")
        for path in (f"{LAUNCH}/{start_time}", f"{LAUNCH}/{start_time}/{name}"):
            with suppress(FileExistsError):
                self.stager.mkdir(path, 0o755)
            self.disk.sync_all(path)
        self.put(f"{LAUNCH}/{vmr}/call_arguments.sh", b"#!/bin/sh\n", 0o755 if executable else 0o644)
        self.disk.full = full
        self.hint(vmr)

    def unstage(self, vmr: str) -> None:
        rmtree(self.stager, f"{LAUNCH}/{vmr}", ignore_errors=True)
        self.disk.sync_all(f"{LAUNCH}/{vmr.partition('/')[0]}")
        self.hint(vmr, vanished=True)

    def hint(self, vmr: str, *, vanished: bool = False) -> None:
        if self.events is None or self.world.dice.random() < self.world.plan.lost_events:
            return
        self.events.touched.add(vmr.encode())
        if vanished:
            self.events.vanished.add(vmr.encode())
        self.events.heard = True
        self.wake()

    def staged(self) -> list[str]:
        found = []
        top = self.disk.find(LAUNCH)
        if isinstance(top, Directory):
            for start_time, directory in top.names.items():
                if isinstance(directory, Directory):
                    for name, vmr in directory.names.items():
                        script = vmr.names.get("call_arguments.sh") if isinstance(vmr, Directory) else None
                        if isinstance(script, File) and script.mode & stat.S_IXUSR:
                            found.append(f"{start_time}/{name}")
        return found


class Processes:
    """`guest.processes`, of a VM."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm

    def gone(self, started: Any, *, boot_id: str) -> bool:
        if started.boot_id != boot_id:
            return True
        script = self._vm.scripts.get(started.pid)
        return script is None or not script.alive

    def kill(self, run: Any, number: int) -> dict[int, str]:
        started = run.started()
        script = self._vm.scripts.get(started.pid) if started is not None else None
        if script is None or not script.alive:
            return {}
        self._vm.world.clock.after(0.001, lambda: script.kill(int(number)))
        return {script.pid: "script"}


class Files:
    """`guest.files.Files`: transfers are no part of this."""

    def __init__(self, launch: bytes) -> None:
        pass

    def knows(self, verb: str) -> bool:
        return False

    def go(self) -> None:
        pass

    def forget(self) -> None:
        pass


def _patch(vm: Vm, process: Process) -> None:
    """Put the simulation in the place of what the guest's modules import."""
    shim._prctl = lambda *_: 0  # type: ignore[assignment]
    shim.start_ticks = lambda pid: pid  # type: ignore[assignment]
    shim.mmap = types.SimpleNamespace(mmap=lambda _, size: bytearray(size))  # type: ignore[assignment]
    shim.explain = lambda number, script: f"errno {number}"  # type: ignore[assignment]
    modules: Any = types.SimpleNamespace(
        machine=machine,
        runtime=runtime,
        daemon=daemon,
        link=link,
        reboot=reboot,
        supervisor=supervisor,
        spool=spool,
        runner=runner,
        watcher=watcher,
    )
    modules.spool.fcntl = fcntl_of(process)
    modules.spool.Path = Path
    modules.spool.shutil = types.SimpleNamespace(
        rmtree=lambda path, ignore_errors=False: rmtree(process, path, ignore_errors)
    )
    modules.spool._punch = lambda path, upto: _punch(vm, process, path, upto)
    modules.watcher.Events = Events
    modules.runner.Path = Path
    modules.runner.processes = modules.supervisor.processes = Processes(vm)
    modules.supervisor.Runner = SimRunner
    modules.supervisor.Supervisor._keep_files = lambda self, run: None
    modules.supervisor.socket = types.SimpleNamespace(gethostname=lambda: "vm")
    modules.daemon.Files = Files
    modules.daemon.selectors = types.SimpleNamespace(DefaultSelector=_Selector, EVENT_READ=1)
    modules.daemon.socket = types.SimpleNamespace(gethostname=lambda: "vm")
    modules.link.Port = lambda spec: Port(vm.channel, vm.world.guest_sent)
    modules.machine.boot_id = lambda: vm.boot
    modules.machine.health = lambda path: {}
    modules.machine.machine_id = lambda: "machine"
    modules.machine.notify = lambda state: None
    modules.runtime.make = lambda path: path
    modules.runtime.lock = lambda path: -1
    modules.runtime.kick_socket = lambda path: vm.kicks
    modules.runtime.control_socket = lambda path: _Listener()
    modules.reboot.subprocess = types.SimpleNamespace(Popen=lambda *_, **__: Reboot(vm), DEVNULL=-3)


def _punch(vm: Vm, process: Process, path: Any, upto: int) -> None:
    """As spool._punch(), whose call of the C library no module here can be."""
    upto -= upto % vm.world.plan.punch_unit
    if upto > 0:
        vm.world.pruned(str(path), upto)
        process.punch(path, upto)


Log = Callable[[str], None]
