"""What lives here: guarantees broken on purpose, one line each: a simulation that finds none of them proves nothing.

It must not know: how they are found.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from operator import attrgetter
from types import ModuleType
from typing import Any, Callable, NamedTuple

from vmr_agent import schedule
from vmr_agent.guest import roster, runner, shim, shipper, spool, supervisor
from vmr_agent.host import collector, life, logstore, renderer, vmlogs
from vmr_agent.wire import framing, session


class Mutant(NamedTuple):
    """In ``place`` the text ``old`` becomes ``new``, wherever it stands there."""

    module: ModuleType
    place: str
    old: str
    new: str
    seeds: int = 200
    """Within so many it is found."""
    needs: Callable[[Any], object] = lambda _: True
    """Of what kind a history, by its plan, must be to find it: no others are tried."""


def _with(*faults: str) -> Callable[[Any], object]:
    """A history in which all of these go wrong."""
    return lambda plan: all(kind in plan.faults for kind in faults)


def _drops(plan: Any) -> object:
    return plan.drop and plan.spool_limit and (plan.traps["shim"] or "power cut" in plan.faults)


def _fills(plan: Any) -> object:
    return plan.spool_limit and not plan.drop


MUTANTS: dict[str, Mutant] = {
    # Not found in thousands of histories, for each needs two rare things in one moment, and so not here: no sync at an
    # end that a failed sync held up, a new life before its links are durable, a gap before what is below it is, runs
    # that a failing disk kept from being followed, a row before the journal has its run, dropping that begins beside a
    # sync, of which two one is told that the disk fails, a note of what is pruned that no sync has seen. A gap without
    # its hole: test_logstore.py; a run that ends before its daemon looks, now that it begins so late: test_roster.py.
    # the guest's disk
    "a script runs before its start is synced": Mutant(shim, "Shim._note_start", "os.fsync(fd)", "pass"),
    "a script runs before its start's names are synced": Mutant(
        shim, "Shim._note_start", "_sync_path(path)", "pass"
    ),
    "an end has its name before it is durable": Mutant(shim, "Shim._record", "os.fsync(fd)", "pass"),
    "an end counts bytes that are not durable": Mutant(
        shim,
        "Shim._exited",
        "self._await_sync()\n    give_up = time.monotonic() + LAST_SYNC_S",
        "give_up = 0.0",
    ),
    "an end does not await the sync under way": Mutant(shim, "Shim._exited", "self._await_sync()", "pass"),
    "what is written during a sync counts as synced": Mutant(
        shim,
        "Stream.sync",
        "self.failed, self.synced = False, spooled",
        "self.failed, self.synced, self.dirty = False, spooled, False",
    ),
    "what is written during a sync is noted as synced": Mutant(
        shim,
        "Stream.sync",
        "self.failed, self.synced = False, spooled",
        "self.failed, self.synced = False, self.spooled",
    ),
    "a failed sync of output is believed the second time": Mutant(
        shim, "Stream.sync", "if self.failed:", "if False:"
    ),
    "what a power cut made of a stream's end is taken for output": Mutant(
        runner, "Runner._lost_no_power", "run.cut_unsynced(acked)", "None", 400
    ),
    "a shim asks for no lock": Mutant(
        shim, "Shim.run", "except OSError:\n        return", "except OSError:\n        pass", 400
    ),
    "a shim starts what was started": Mutant(
        shim,
        "Shim.run",
        'if os.path.lexists("started")',
        'if False and os.path.lexists("started")',
        20_000,
        lambda plan: plan.traps["shim"] or "kill shim" in plan.faults,
    ),
    "the daemon's records are not synced": Mutant(spool, "_write_durably", "os.fsync(fd)", "pass"),
    "the names of the daemon's records are not synced": Mutant(
        spool, "_write_durably", "_sync(path.parent)", "pass"
    ),
    "nobody syncs open/ and runs/": Mutant(
        spool, "Spool.__init__", "for directory in (state_dir, state_dir.parent):", "for directory in ():"
    ),
    "what a killed shim wrote is believed": Mutant(
        spool,
        "Run.recover",
        "_write_durably(self.path / name, row, temporary=path)",
        "path.rename(self.path / name)",
        4000,
    ),
    "bytes are pruned that the host has not": Mutant(spool, "Run.prune", "(held - tail)", "(held + tail)"),
    "bytes are pruned before that is noted": Mutant(
        spool, "Run._note_pruned", "_sync(self.path)", "pass", 20_000, _fills
    ),
    "tails stay for ever": Mutant(
        spool, "Spool._prune", "self._prune_settled(excess, tails=True)", "pass", needs=_fills
    ),
    "dropped bytes are told as output": Mutant(
        shipper,
        "Shipper._output",
        "gap = delivery.run.gap(stream, offset, spooled[stream])",
        "gap = None",
        2000,
    ),
    "bytes are dropped before that is noted": Mutant(
        shim, "Shim._drop", "os.fdatasync(self.gaps)", "pass", 20_000, _drops
    ),
    "bytes are written before the end of a gap is noted": Mutant(
        shim, "Shim._end_gap", "os.fdatasync(self.gaps)", "pass", 20_000, _drops
    ),
    # what runs
    "a barrier waits for nobody": Mutant(schedule, "_survey", "if before.holds:", "if False:"),
    "a time starts beside a lower one": Mutant(schedule, "decide", "if start_time == turn]", "if True]"),
    "positive times do not wait for their time": Mutant(
        schedule, "decide", "if due <= now.boottime:", "if True:"
    ),
    ".hold holds nothing": Mutant(
        schedule, "decide", "if not now.enabled or now.held:", "if not now.enabled:", 1000
    ),
    "who asks for a reboot starts again without": Mutant(
        schedule, "_survey_asker", "same_boot = before.boot_id == now.boot_id", "same_boot = False"
    ),
    "configured is acted on before it is durable": Mutant(
        spool,
        "Spool.set_configured",
        '_write_once(self.path / "configured", {})',
        '(self.path / "configured").touch()',
        1000,
    ),
    "time zero is acted on before it is durable": Mutant(
        spool,
        "Spool.set_zero",
        '_write_once(self.path / "zero.json", zero._asdict())',
        '(self.path / "zero.json").touch()',
        400,
    ),
    "the removal of the file reboot is not synced": Mutant(
        runner,
        "Runner._clear_reboot",
        "sync_directory(self._directory(vmr))",
        "pass",
        20_000,
        _with("power cut"),
    ),
    "a restarted daemon forgets what has run": Mutant(
        roster, "Roster._entry", "for run in self._spool.standing(name):", "for run in ():"
    ),
    "a run is lost while its script lives": Mutant(
        runner, "Runner.judge", "if not processes.gone(started, boot_id=self._boot_id) or", "if"
    ),
    "a rerun asked twice runs twice": Mutant(
        supervisor, "Supervisor.rerun", "if request and run.info.request == request:", "if False:", 2000
    ),
    # the wire
    "a damaged frame passes": Mutant(
        framing,
        "Decoder._parse",
        "if zlib.crc32(payload) != crc:",
        "if False:",
        2000,
        _with("damage"),
    ),
    "a missing frame is not missed": Mutant(
        session, "Session._item", "elif n > self._due:", "elif False:", 1000
    ),
    "a stale frame is taken": Mutant(
        session,
        "Session._item",
        "if to != self.id or self.state is State.DEAF:",
        "if self.state is State.DEAF:",
        2000,
    ),
    "a run is let go when it has exited": Mutant(
        shipper,
        "Shipper.ack",
        "if delivery.state is RunState.CLOSED:",
        "if delivery.state >= RunState.EXITED:",
    ),
    "the window is not kept": Mutant(
        shipper, "Shipper._output", "if self._in_flight + _CHUNK > window:", "if False:"
    ),
    "an end is told before its bytes": Mutant(
        shipper,
        "Shipper._frames",
        "if output:\n        # What",
        "if output and result is None:\n        # What",
    ),
    "the guest does not see that it was set back": Mutant(
        shipper,
        "Shipper._check",
        "if start < end and _crc(run, stream, start, end) != crc:",
        "if False:",
        2000,
    ),
    # the host's disk
    "an Ack before the sync": Mutant(life, "Sync._sync", "try:", "return\n    try:"),
    "an Ack before the names are synced": Mutant(
        life, "Sync._sync", "for name in sorted(self.directories, reverse=True):", "for name in ():"
    ),
    "an Ack before the journal is synced": Mutant(
        life, "Sync._sync", "for name in sorted(self.files):", "for name in sorted(self.files - {JOURNAL}):"
    ),
    "what comes twice is not acknowledged twice": Mutant(
        life, "Life.output", "self._touched[run_id] = run", "pass", 20_000, _with("disconnect")
    ),
    "a mark before the sync": Mutant(
        life,
        "Life.begin_sync",
        "self._write_waiting()",
        "self._waiting += pack_record(Kind.MARK, MARK.pack(self._size + len(self._waiting)))\n"
        "    self._write_waiting()",
        400,
    ),
    "bytes that come twice are stored twice": Mutant(
        life,
        "Life.output",
        "if held.held > offset:",
        "offset = held.held; end = offset + len(data)\n    if False:",
        2000,
    ),
    "what is behind the last mark is not checked": Mutant(
        life, "Life._stands", "if zlib.crc32(data) != crc:", "if False:", 2000
    ),
    "the journal is not cut at its first bad record": Mutant(
        life, "Life.recover", "os.ftruncate(self._journal, self._size)", "pass", 400
    ),
    "what the journal lost keeps its row": Mutant(
        life,
        "Life._forget",
        'os.unlink(f"{path}/result.json", dir_fd=self._directory)',
        "pass",
        20_000,
        _with("host sync fails", "time travel"),
    ),
    "a checkpoint forgets what is over": Mutant(
        life,
        "Life._checkpoint",
        "self._finished.pack()",
        "b''",
        2000,
    ),
    # Not here: that LogStore.life() trusts the page cache after a failed sync. What stands behind the last mark is
    # then compared, written again and synced, as after a kill: dropping it instead is only the shorter way.
    # Nor that LogStore._sync_now() does again what failed in flight: too rare here; test_logstore.py has it.
    "a failed sync is not heard of": Mutant(
        logstore, "LogStore.finish_sync", "if sync.error is not None:", "if False:", 400
    ),
    "a mark may be in the page cache alone": Mutant(life, "Life._write_again", "if data:", "if False:", 2000),
    "what was recovered is not made durable": Mutant(
        logstore, "LogStore._find_life", "and trust:", "and False:", 2000
    ),
    "a life loses its first record": Mutant(life, "Life.recover", "if not self._size:", "if False:", 400),
    "a directory that was there counts as durable": Mutant(
        life, "Life._make_directory", "if name in self._named:", "if True:", 400
    ),
    "another run under a known label is taken": Mutant(
        life, "Life.run", "if self._run_of(label) is not None:", "if False:", 400
    ),
    "a run executed at another time is the same": Mutant(
        life, "Life.run", "if not same:", "if False:", 20_000, _with("time travel")
    ),
    "a collector counts from nothing": Mutant(
        collector,
        "Guest.start",
        "self.measure()",
        "self.measure()\n        self._connect()",
        20_000,
        lambda plan: plan.quota,
    ),
    "the quota is not kept": Mutant(
        life, "Life.output", "if self._quota.over:", "if False:", 20_000, lambda plan: plan.quota
    ),
    "what follows refused output is taken": Mutant(
        collector,
        "Guest._take",
        "and event.run in self._withheld",
        "and False",
        20_000,
        lambda plan: plan.quota,
    ),
    "an Ack goes to whoever did not ask": Mutant(
        collector, "Guest.acknowledge", "if ack.run in self._announced:", "if False:"
    ),
    "a run that began and ended between two looks had no process": Mutant(
        shipper,
        "Shipper._announcement",
        "result, started = run.result(), run.started()",
        "started, result = run.started(), run.result()",
        5_000,
        lambda plan: plan.busy,
    ),
    # the logs
    "the logs are not cut back": Mutant(
        vmlogs, "VmLogs._take_note", "if os.fstat(fd).st_size > size:", "if False:"
    ),
    "the note is written before the logs are durable": Mutant(
        renderer, "Renderer._note", "logs.sync_logs()", "pass", 400
    ),
    "the renderer believes a failed sync the second time": Mutant(
        renderer,
        "Renderer._doubt",
        "logs.reset()",
        "pass",
        20_000,
        _with("host sync fails", "host power cut"),
    ),
    "what is not durable is rendered": Mutant(
        vmlogs,
        "VmLogs._look_for_mark",
        "if kind == Kind.MARK:\n                self._durable = max(self._durable, MARK.unpack(content)[0])",
        "self._durable = last",
        400,
    ),
}


def broken(mutant: Mutant) -> str:
    """Its place's code, with the guarantee broken."""
    source = textwrap.dedent(inspect.getsource(attrgetter(mutant.place)(mutant.module)))
    old = textwrap.dedent(mutant.old)
    if old not in source:
        raise ValueError(f"{mutant.place} has no {old!r}:\n{source}")
    return source.replace(old, mutant.new)


def apply(mutant: Mutant) -> None:
    """Break it, in this process."""
    above, _, name = mutant.place.rpartition(".")
    owner: Any = attrgetter(above)(mutant.module) if above else mutant.module
    was = getattr(owner, name)
    namespace: dict[str, Any] = {}
    source = broken(mutant).replace("super()", f"super({above}, self)" if above else "")
    code = compile(source, mutant.module.__file__ or "", "exec")
    exec(code, vars(mutant.module), namespace)
    setattr(owner, name, namespace[name])
    for module in list(sys.modules.values()):  # those that took it by its name
        if module.__name__.startswith("vmr_agent.") and vars(module).get(name) is was:
            setattr(module, name, namespace[name])
