"""What lives here: one history: a VM and its host, what goes wrong and when, all by the dice of one seed.

It must not know: what must hold (that is in checks).
"""

from __future__ import annotations

import errno
import gc
import random
from dataclasses import dataclass, field
from typing import Any, Callable, Optional

from tests.sim.channel import Channel
from tests.sim.checks import Checks
from tests.sim.disk import Directory
from tests.sim.guest import LAUNCH, RestoredShim, Script, Vm
from tests.sim.host import Host
from tests.sim.kernel import Killed, Process
from tests.sim.tasks import SECOND, Clock
from vmr_agent.errors import Problem
from vmr_agent.guest import shim, shipper, spool
from vmr_agent.host import collector, life, quota
from vmr_agent.runs import Stream, Trigger
from vmr_agent.wire import framing, messages

WALL = 1_717_634_586 * SECOND
HEAL = 240.0
"""Seconds in which all must be well once nothing goes wrong any more."""
STEPS = 200_000
CHUNK = shipper._CHUNK

FAULTS = (
    "kill daemon",
    "kill collector",
    "stop collector",
    "kill shim",
    "kill renderer",
    "reset",
    "power cut",
    "host power cut",
    "disconnect",
    "stall",
    "damage",
    "lose frames",
    "guest disk full",
    "host disk full",
    "host sync fails",
    "guest sync fails",
    "time travel",
    "clock",
    "rerun",
    "kill run",
    "restage",
    "hold",
)


PAIRS = (
    ("guest sync fails", "power cut"),
    ("host sync fails", "host power cut"),
    ("host sync fails", "stop collector"),
    ("host sync fails", "time travel"),
    ("guest disk full", "power cut"),
    ("guest disk full", "disconnect"),
    ("host disk full", "host power cut"),
    ("time travel", "kill daemon"),
    ("time travel", "power cut"),
    ("kill shim", "kill daemon"),
    ("rerun", "kill daemon"),
)
"""What is worse together, so that it comes together often."""


@dataclass
class Plan:
    """What kind of history a seed makes."""

    length: float
    faults: dict[str, float]
    """Of each kind, how many in ten seconds."""
    traps: dict[str, float]
    """Of each kind of process, how probable it is that one dies in mid-call."""
    vmrs: list[str]
    late: list[str]
    quiet: float
    spool_limit: int
    drop: bool
    lost_orders: float
    lost_events: float
    syncfs: Optional[Callable[[int], None]]
    sockets: bool
    buffer: float
    size: int
    quota: int
    """Bytes that the VM may take on the host; 0: no bound."""
    slow: float
    """How probable it is that a script sleeps after a write."""
    busy: float = 0.0
    """How probable it is that a run's whole life passes before the daemon that began it goes on."""
    sync_takes: float = 0.001
    """How long a shim's sync takes at the most, in its thread."""
    punch_unit: int = 256
    latency: float = 0.0005
    constants: dict[str, Any] = field(default_factory=dict)


def make_plan(dice: random.Random) -> Plan:
    """A history has a few kinds of fault, often many of one; the calm ones are as needed as the wild ones."""
    kinds = list(dice.choice(PAIRS)) if dice.random() < 0.3 else []
    kinds += dice.sample([each for each in FAULTS if each not in kinds], dice.choice((0, 1, 2, 3, 4, 8)))
    times = dice.sample((-100, -4, -3, -1.5, -1), dice.choice((1, 2, 2, 3)))
    names = [f"{at}/v{number}" for at in times for number in range(dice.choice((1, 1, 2)))]
    if dice.random() < 0.6:
        names.append(f"{dice.choice((1, 2.5, 10))}/p")
    late = [name for name in names if dice.random() < 0.2]
    wild = dice.random() < 0.5
    return Plan(
        length=dice.choice((8.0, 15.0, 30.0)),
        faults={kind: dice.choice((0.5, 1.0, 3.0)) for kind in kinds},
        traps={
            kind: dice.choice((0.0, 0.0, 0.3, 0.8)) if wild else 0.0
            for kind in ("daemon", "collector", "renderer", "shim")
        },
        vmrs=[name for name in names if name not in late],
        late=late,
        quiet=dice.choice((0.5, 2.0)),
        spool_limit=dice.choice((0, 0, 12_000, 20_000, 50_000)),
        drop=dice.random() < 0.4,
        lost_orders=dice.choice((0.0, 0.0, 0.2)),
        lost_events=dice.choice((0.0, 0.0, 0.5)),
        syncfs=None,
        sockets=dice.random() < 0.3,
        buffer=dice.choice((0.5, 3.0)),
        size=dice.choice((300, 3000, 3000, 20_000)),
        quota=dice.choice((0, 0, 0, 60_000, 120_000)),
        slow=dice.choice((0.1, 0.1, 0.3)),
        latency=dice.choice((0.0002, 0.001, 0.02)),
        busy=dice.choice((0.0, 0.0, 0.3)),
        constants={
            "chunk": dice.choice((200, 1000, CHUNK)),
            "window": dice.choice((2500, 20_000, shipper.WINDOW)),
            "tail": dice.choice((512, 4096)),
            "sync_s": dice.choice((0.05, 1.0)),
        },
        sync_takes=dice.choice((0.001, 0.1, 3.0)),
    )


class World:
    def __init__(self, seed: int, *, verbose: bool = False) -> None:
        self.seed = seed
        self.dice = random.Random(seed)
        self.clock = Clock(self.dice)
        self.wall = WALL
        self.history: list[str] = []
        self.violations: list[str] = []
        self.verbose = verbose
        self.plan = make_plan(self.dice)
        self.healing = False
        self.steps = 0
        self.stagings: dict[bytes, int] = {}
        self.staged_first: set[bytes] = set()
        self.reruns_asked: dict[bytes, int] = {}
        self.asked_reboot: dict[bytes, int] = {}
        self.reboots_wanted = 0
        self.held_since: Optional[int] = None  # by the guest's wall clock
        self.happened: dict[str, int] = {}
        self._power_cut: Optional[Any] = None
        self._snapshot: Optional[tuple[Any, ...]] = None
        self._set_constants()
        self.channel = Channel(self.clock)
        self.channel.sockets = self.plan.sockets
        self.channel.latency = self.plan.latency
        self.vm = Vm(self, self.channel)
        self.host = Host(self, self.channel)
        self.checks = Checks(self)
        if self.dice.random() < 0.3:
            self.plan.syncfs = lambda fd: self.host.disk.sync_all("/")

    def _set_constants(self) -> None:
        """Small, so that little output meets every limit."""
        constants = self.plan.constants
        shipper._CHUNK = constants["chunk"]  # type: ignore[misc]
        shipper.Shipper.__init__.__kwdefaults__["window"] = max(constants["window"], constants["chunk"])
        shipper.TAIL = life.TAIL = spool.KEPT_TAIL = constants["tail"]
        spool._PUNCH_UNIT = spool._SMALL_FILES = 256
        spool.Run.prune.__kwdefaults__["tail"] = spool.KEPT_TAIL
        shim.READ = 16_384
        shim.CHECK_BYTES = 2_000
        shim.MUCH = 500
        shim.SYNC_S = constants["sync_s"]
        life.CHECKPOINT_RECORDS = 40
        collector.SWEEP_BYTES = 8_000
        collector.MEASURE = 1.0
        quota.RESERVE = 40_000
        life.BLOCK, life.RUN = 512, 2_560
        quota._LOOK_EVERY = 5_000

    # --- what the parts tell

    def say(self, line: str) -> None:
        if self.verbose:
            print(f"{self.clock.now / SECOND:11.6f} {line}", flush=True)
        self.history.append(line)

    def violated(self, what: str) -> None:
        self.say(f"VIOLATED: {what}")
        self.violations.append(what)

    def host_says(self, line: str) -> None:
        self.say(f"host: {line}")
        if "cannot take what it says" in line:
            self.violated("the collector has a bug: " + line)
        elif "sends what can't be" in line and not self._damaged and "too often" not in line:
            self.violated(line)

    @property
    def _damaged(self) -> bool:
        return self.happened.get("damage", 0) > 0

    def random_bytes(self, count: int) -> bytes:
        return self.dice.randbytes(count)

    def guest_sent(self, payload: bytes) -> None:
        self.checks.guest_sent(payload)

    def host_sent(self, frame: bytes) -> None:
        self.checks.host_sent(frame)

    def pruned(self, path: str, upto: int) -> None:
        self.checks.pruned(path, upto)

    def durable(self, directory: Directory, what: str, lengths: dict[Stream, int]) -> None:
        self.checks.durable(directory, what, lengths)

    def check_daemon(self, running: Any) -> None:
        window = running._shipper._window
        # A gap is counted, and takes no room; one may wait for the port.
        link = running._link
        waiting = any(b"\xa4type\xa3gap" in bytes(each) for each in link._outbox)
        may_skip = self.checks.gaps or waiting or link._port._taken.pending
        if running._shipper._in_flight > window and not may_skip:
            self.violated(f"{running._shipper._in_flight} bytes are in flight, more than the window")
        if len(running._link._session._decoder._buffer) > framing.MAX_FRAME:
            self.violated("the session keeps more than a frame")
        if len(running._link._outbox) > 10:
            self.violated(f"{len(running._link._outbox)} frames wait for the port")

    # --- scripts

    def executed(self, script: Script) -> int:
        """A script is let go: an errno when it can't be executed."""
        self.checks.executed(script)
        if self.dice.random() < 0.05:
            return 8
        script.steps = self._steps(script)
        return 0

    def goes_on(self, script: Script) -> int:
        """A script goes on that was under way when a snapshot was taken."""
        self.checks.goes_on(script)
        script.steps = self._steps(script)
        return 0

    def _steps(self, script: Script) -> list[tuple[Any, ...]]:
        """What a script is to do."""
        dice = self.dice
        steps: list[tuple[Any, ...]] = []  # no word is a number: as JSON 7.10 would be shown as 7.1
        number = 0
        left = dice.randrange(self.plan.size + 1)
        # Another one in each future, which would else be the same for longer than a tail, 512 bytes here.
        letter = b"%c" % (ord("a") + script.timeline % 26)
        while left > 0:
            stream = dice.choice((Stream.STDOUT, Stream.STDOUT, Stream.STDERR))
            end = dice.choice((b"\n", b"\n", b"\n", b"\r\n", b"\r", b""))
            word = b"p%d.%d.%d.%s" % (
                script.pid,
                script.timeline,
                number,
                letter * dice.choice((0, 10, 60, 900)),
            )
            steps.append(("write", stream, word + b" " + end))
            left -= len(word)
            number += 1
            if dice.random() < self.plan.slow:
                steps.append(("sleep", dice.choice((0.005, 0.3, 2.0))))
        if dice.random() < 0.1:
            steps.append(("leave", dice.choice((0.1, 3.0)), b"a child's last word \n"))
        reboots = self.asked_reboot.get(script.vmr, 0)
        code = dice.choice((0, 0, 0, 1, 10)) if reboots < 2 else 0
        if code == 10 or dice.random() < 0.02:
            self.asked_reboot[script.vmr] = reboots + 1
            if code != 10:
                steps.append(("reboot file",))
        steps.append(("exit", code))
        return steps

    def ended(self, script: Script, status: int) -> None:
        self.say(f"{script.vmr.decode()} attempt {script.attempt} ends ({status})")

    # --- processes that die in mid-call

    def maybe_trap(self, process: Process, kind: str, pause: Optional[Callable[[float], None]]) -> None:
        dice = self.dice

        def sprung() -> None:
            if self.healing:
                return
            if pause is not None and (not dies or dice.random() < 0.7):
                process.trap = process.calls + dice.randrange(1, 60)
                pause(dice.choice((0.0001, 0.001, 0.02)))
                return
            what = dice.choice(("kill", "power cut"))
            self._count(f"{kind} dies in mid-call: {what}")
            self.say(f"{kind} in mid-call: {what}")
            if what == "power cut":
                machine = self.vm if kind in ("daemon", "shim") else self.host
                if kind in ("daemon", "collector"):
                    self._power_cut = machine
                else:
                    self.clock.after(0, lambda: self._cut_power(machine))
            process.die()

        dies = dice.random() < self.plan.traps[kind] and not self.healing
        if dies or pause is not None:
            process.trap = dice.randrange(1, 40 if pause is not None else 1500)
            process.trapped = sprung

    def trap_sprung(self, machine: Any) -> None:
        if self._power_cut is machine:
            self._power_cut = None
            self.clock.after(0, lambda: self._cut_power(machine))

    def _cut_power(self, machine: Any) -> None:
        if machine is self.vm:
            if self.vm.up:
                self.vm.reboot("power cut", lose=True)
        else:
            self.host.power_cut()

    # --- what goes wrong

    def _count(self, what: str) -> None:
        self.happened[what] = self.happened.get(what, 0) + 1

    def _schedule_faults(self) -> None:
        for kind, rate in self.plan.faults.items():
            at = self.dice.expovariate(rate / 10)
            while at < self.plan.length:
                self.clock.after(at, lambda kind=kind: self._fault(kind))  # type: ignore[misc]
                at += self.dice.expovariate(rate / 10)

    def _fault(self, kind: str) -> None:
        if self.healing:
            return
        self._count(kind)
        dice, vm, host, channel = self.dice, self.vm, self.host, self.channel
        if kind == "kill daemon":
            vm.kill_daemon()
        elif kind == "kill collector":
            host.kill()
        elif kind == "stop collector":
            host.stop()
        elif kind == "kill shim":
            vm.kill_shim()
        elif kind == "kill renderer":
            host.kill_renderer()
        elif kind in ("reset", "power cut"):
            if vm.up:
                vm.reboot(kind, lose=kind == "power cut")
        elif kind == "host power cut":
            host.power_cut()
        elif kind == "disconnect":
            if channel.chardev is not None and host.process is not None:
                self.say("the channel is cut")
                chardev = channel.chardev
                chardev._retry = dice.choice((0.0001, 0.1, 1.0))  # so fast that the guest may not see it
                host.call(host.process, lambda: chardev.lost("cut"))
        elif kind == "stall":
            channel.stall(dice.choice((0.5, 3.0, 20.0)))
        elif kind == "damage":
            channel.damage = dice.choice((0.01, 0.1))
            self.clock.after(dice.choice((0.2, 2.0)), lambda: setattr(channel, "damage", 0.0))
        elif kind == "lose frames":
            lost = dice.choice((1, 1, 3))
            if dice.random() < 0.6:
                channel.lose_to_host = lost
            else:
                channel.lose_to_guest = lost
        elif kind in ("guest disk full", "host disk full"):
            disk = vm.disk if kind.startswith("guest") else host.disk
            self.say(kind)
            disk.full = True
            self.clock.after(dice.choice((0.2, 3.0)), lambda: setattr(disk, "full", False))
        elif kind in ("host sync fails", "guest sync fails"):
            self.say(kind)
            disk = vm.disk if kind.startswith("guest") else host.disk
            disk.sync_failures = dice.choice((1, 1, 3))
            disk.sync_errno = dice.choice((errno.EIO, errno.EIO, errno.ENOSPC))
        elif kind == "time travel":
            self._time_travel()
        elif kind == "clock":
            step = dice.choice((-1, 1)) * dice.choice((3600, 365 * 86_400)) * SECOND
            self.say(f"the guest's clock is set by {step // SECOND} s")
            vm.skew = step if vm.skew == 0 else 0
        elif kind == "rerun":
            self._rerun()
        elif kind == "kill run":
            self._kill_run()
        elif kind == "restage":
            self._restage()
        elif kind == "hold":
            self._hold()

    def _time_travel(self) -> None:
        vm = self.vm
        if self._snapshot is None:
            self.say("a snapshot is taken")
            executed = [each for each in self.checks.executions if each.timeline == vm.timeline]
            counts = (dict(self.stagings), dict(self.asked_reboot))  # a rerun is asked for again by the host
            under_way = vm.under_way()
            boot = vm.boot if vm.up else ""  # of one that was down there is no boot to go on with
            self._snapshot = (vm.disk.snapshot(), boot, vm.boottime_ns(), executed, counts, under_way)
            return
        if not vm.up:
            return
        snapshot, boot, boottime, executed, counts, under_way = self._snapshot
        self._snapshot = None
        live = self.dice.random() < 0.5 and boot != ""
        self.say(f"the snapshot is restored{' in its boot' if live else ''}")
        vm.power_off(lose=False)
        vm.disk.restore(snapshot)
        vm.stager.cwd = vm.disk.root
        vm.timeline += 1
        self.held_since = None
        for dictionary, was in zip((self.stagings, self.asked_reboot), counts):
            dictionary.clear()
            dictionary.update(was)
        # What had been executed when it was taken has been executed in this timeline too.
        for script in executed:
            script.timeline = vm.timeline
        vm.power_on(boot=boot if live else "", booted=self.clock.now - boottime if live else None)
        if live:
            vm.shims += [RestoredShim(vm, order, pid) for order, pid in under_way]

    def _rerun(self) -> None:
        names = self.vm.staged()
        if not names:
            return
        vmr = self.dice.choice(names).encode()
        guest = self.host.guest
        if self.dice.random() < 0.5 and guest is not None and self.host.process is not None:
            self.say(f"vmr-host rerun {vmr.decode()}")
            self.reruns_asked[vmr] = self.reruns_asked.get(vmr, 0) + 1
            asked = guest

            def ask() -> None:
                asked.request(
                    "rerun", {"vmr": vmr}, lambda reply: self.say(f"reply: {reply.ok} {reply.error}")
                )

            self.host.call(self.host.process, ask)
        elif self.vm.daemon is not None:
            self.say(f"vmr-agent rerun {vmr.decode()}")
            self.reruns_asked[vmr] = self.reruns_asked.get(vmr, 0) + 1
            running = self.vm.daemon
            request = self.random_bytes(16)
            self._verb(lambda: running._supervisor.rerun(vmr, Trigger.RERUN, request))

    def _verb(self, act: Callable[[], Any]) -> None:
        """A verb of somebody in the guest, as Daemon._answer() takes it."""
        if self.vm.away:
            self.clock.after(0.01, lambda: self._verb(act))
            return
        if self.vm.process is None:
            return
        self.vm._activate()
        process = self.vm.process
        try:
            act()
        except Killed:
            if self.vm.process is process:
                self.vm._daemon_died()
        except (OSError, Problem) as error:
            self.say(f"no: {error}")
        self.vm.wake()

    def _kill_run(self) -> None:
        live = [script for script in self.vm.scripts.values() if script.alive and script.executes]
        guest = self.host.guest
        if not live or guest is None or self.host.process is None:
            return
        script = self.dice.choice(live)
        args: dict[str, messages.Scalar] = {"vmr": script.vmr, "run": script.run, "signal": 9}
        self.host.call(
            self.host.process,
            lambda: guest.request("kill", args, lambda reply: self.say(f"reply: {reply.ok} {reply.error}")),
        )

    def _restage(self) -> None:
        names = self.vm.staged()
        if not names or not self.vm.up:
            return
        vmr = self.dice.choice(names)
        self.say(f"{vmr} is staged anew")
        self.staged_first.discard(vmr.encode())
        self.vm.unstage(vmr)
        self.clock.after(self.dice.choice((0.001, 0.5)), lambda: self._stage(vmr))

    def _hold(self) -> None:
        path = f"{LAUNCH}/.hold"
        self.say("held")
        self.vm.put(path, b"")
        if self.held_since is None:
            self.held_since = self.vm.wall_ns()
        self.vm.hint("x/.hold")

        def resume() -> None:
            if self.vm.disk.find(path) is not None:
                self.vm.stager.unlink(path)
                self.vm.disk.sync_all(LAUNCH)
                self.held_since = None
                self.vm.hint("x/.hold")

        self.clock.after(self.dice.choice((0.5, 5.0)), resume)

    def _stage(self, vmr: str) -> None:
        self.say(f"{vmr} is staged")
        self.stagings[vmr.encode()] = self.stagings.get(vmr.encode(), 0) + 1
        if self.dice.random() < 0.7:
            self.vm.stage(vmr)
        else:
            self.vm.stage(vmr, executable=False)
            timeline = self.vm.timeline

            def commit() -> None:
                if self.vm.timeline == timeline:
                    self.vm.stage(vmr)

            self.clock.after(self.dice.choice((0.01, 1.0)), commit)

    # --- the whole of it

    def run(self) -> bool:
        """Whether all that must hold held."""
        try:
            return self._run()
        finally:
            self.clock.close()

    def _run(self) -> bool:
        for vmr in self.plan.vmrs:
            self.stagings[vmr.encode()] = 1
            self.staged_first.add(vmr.encode())
            self.vm.stage(vmr)
        for vmr in self.plan.late:
            self.clock.after(self.dice.random() * self.plan.length / 2, lambda vmr=vmr: self._stage(vmr))  # type: ignore[misc]
        self.vm.power_on()
        self.clock.after(self.dice.random(), self.host.start)
        self._schedule_faults()
        if not self._until(self.plan.length, lambda: False):
            return False
        self._heal()
        left = ""

        def well() -> bool:
            nonlocal left
            left = self.checks.delivered()
            return not left

        if not self._until(HEAL, well):
            return False
        if left and self.checks.full_of_history():
            self.say(f"the spool's limit is less than its history: {left}")
            return not self.violations
        if left:
            self.violated(f"{HEAL:.0f} s after the last fault: {left}")
            return False
        self.checks.at_the_end()
        return not self.violations

    def _until(self, seconds: float, well: Callable[[], bool]) -> bool:
        """Go on for so long, or till all is well; False when something is violated."""
        end = self.clock.now + int(seconds * SECOND)
        look = 0
        while self.clock.now < end and self.clock.step():
            self.steps += 1
            if self.violations:
                return False
            if self.steps > STEPS:
                self.violated(f"more than {STEPS} steps: somebody spins")
                return False
            if self.clock.now >= look:
                look = self.clock.now + SECOND
                self.checks.quota()
                if well():
                    break
        return not self.violations

    def _heal(self) -> None:
        self.say("from here on nothing goes wrong")
        self.healing = True
        self.plan.lost_orders = 0.0
        self.channel.damage = 0.0
        self.channel.lose_to_host = self.channel.lose_to_guest = 0
        self.vm.disk.full = self.host.disk.full = False
        self.vm.disk.sync_failures = self.host.disk.sync_failures = 0
        for process in (self.vm.process, self.host.process):
            if process is not None:
                process.trap = 1 << 60
        if self.vm.disk.find(f"{LAUNCH}/.hold") is not None:
            self.vm.stager.unlink(f"{LAUNCH}/.hold")
            self.vm.disk.sync_all(LAUNCH)
            self.held_since = None
        for vmr in self.plan.vmrs + self.plan.late:
            if vmr not in self.vm.staged():
                self._stage(vmr)
        self.vm.channel.stalled_until = 0
        if self.plan.quota:
            self.host.stop()  # and starts without


def run(seed: int, *, verbose: bool = False) -> World:
    gc.disable()
    world = World(seed, verbose=verbose)
    try:
        world.run()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        import traceback

        world.violated("".join(traceback.format_exception(type(error), error, error.__traceback__)))
    return world
