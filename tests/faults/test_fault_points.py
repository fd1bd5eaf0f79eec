"""SIGKILL at every named step of shim, spool, log store and renderer; what was promised holds all the same.

The processes are the product's own, and the killing needs nothing in them, see hook/sitecustomize.py: a step is a
place in the source. That is simpler than `strace --inject`, which stops at system calls: it needs no tool that a
machine may lack, and it tells apart two syncs of one file. And it is as exact: before a call is before its line, after
it is before the next.

The tables below name every site of steps.py, and a test holds them against the source; so who adds a rename, or a
sync, is asked here what may come of it. Each test is one history: a process is killed at whichever of its steps it
reaches first, started again, killed at the next, until each was reached once.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Callable, Optional

import pytest

from tests.e2e.world import until
from tests.faults.once import KILLED, STREAMS, WITNESS, assert_all_is_there_once
from tests.faults.steps import Plan, find_sites, steps_of
from tests.faults.supervised import Supervised, Supervisor
from tests.host.scripted import Guest, Host, output, run
from vmr_agent.host.renderer import MANY
from vmr_agent.wire import messages

pytestmark = pytest.mark.timeout(600)

# --- the tables

ANY_SHIM = (
    "shim._write open",
    "shim._write write",
    "shim.Stream.open open",
    "shim.Shim.run open",
    "shim.Shim.run _remove",
    "shim.Shim.run rename",
    "shim.Shim.run write",
    "shim.Shim._open open",
    "shim.Shim._open open 2",
    "shim._take_block posix_fallocate",
    "shim.Shim._note_start _write",
    "shim.Shim._note_start fsync",
    "shim.Shim._note_start _sync_path",
    "shim.Shim._pump _sync",
    "shim.Shim._pump _remove",
    "shim.Shim._put write",
    "shim.Shim._note_in_index pwrite",
    "shim.Shim._exited _record",
    "shim.Shim._record open",
    "shim.Shim._record write",
    "shim.Shim._record ftruncate",
    "shim.Shim._record fsync",
    "shim.Shim._record rename",
    "shim.Shim._kick sendto",
    "shim._sync_path fsync",
)
"""In any run."""
LASTING_SHIM = (
    "shim.Shim._note_synced pwrite",
    "shim.Shim._sync fdatasync",
    "shim.Shim._sync write",
    "shim.Shim._sync_data sync",
    "shim.Stream.sync fdatasync",
)
"""In one that prints for so long that it syncs meanwhile, in a thread."""
LEAVING_SHIM = ("shim.Shim._pump _record",)
"""In one that leaves somebody behind who holds a pipe."""
BLOCKED_SHIM = (
    "shim._note _remove",
    "shim._note symlink",
    "shim._remove unlink",
    "shim.Shim._block _note",
    "shim.Shim._try_again _remove",
)
DROPPING_SHIM = (
    "shim.Shim._open_gaps open",
    "shim.Shim._pump _remove 2",
    "shim.Shim._drop fdatasync",
    "shim.Shim._drop sync",
    "shim.Shim._drop ftruncate",
    "shim.Shim._end_gap fdatasync",
    "shim.Shim._write_gap pwrite",
)
CHILD = ("shim.Shim._execute write",)
"""In the child, before it is the script."""
DAEMON = (
    "spool._write_durably open",
    "spool._write_durably write",
    "spool._write_durably ftruncate",
    "spool._write_durably fsync",
    "spool._write_durably rename",
    "spool._write_durably _sync",
    "spool._sync fsync",
    "spool._make_state_dir mkdir",
    "spool.Run.recover _sync",
    "spool.Run.recover _write_durably",
    "spool.Run.write_lost _write_durably",
    "spool.Run.write_closed _write_durably",
    "spool.Run._sync_streams pwrite",
    "spool.Run._sync_streams fdatasync",
    "spool.Run.remember open",
    "spool.Run.remember write",
    "spool.Run.remember fsync",
    "spool.Run.remember _sync",
    "spool.Spool.__init__ open",
    "spool.Spool.__init__ mkdir",
    "spool.Spool.__init__ mkdir 2",
    "spool.Spool.__init__ _sync",
    "spool.Spool._new_id _write_durably",
    "spool._write_once _write_durably",
    "spool.Spool.create _link",
    "spool.Spool.create mkdir",
    "spool.Spool.create mkdir 2",
    "spool.Spool.create open",
    "spool.Spool.create write",
    "spool.Spool.create _unlink",
    "spool.Spool.release _unlink",
    "spool.Spool.mark_gone _write_durably",
    "spool.Spool.mark_back _write_durably",
    "spool.Spool._link symlink_to",
    "spool.Spool._unlink unlink",
    "spool.Spool._repair_open rmtree",
    "spool.Spool._repair_open unlink",
    "runner.Runner._order send",
    "port.Port.write writev",
)
FULL_DAEMON = (
    "spool.Run.prune rmtree",
    "spool.Run.prune _punch",
    "spool.Run.prune _punch 2",
    "spool._punch fallocate",
    "spool.Run._note_pruned unlink",
    "spool.Run._note_pruned symlink",
    "spool.Run._note_pruned rename",
    "spool.Run._note_pruned _sync",
    "spool.Spool._mark touch",
    "spool.Spool._mark unlink",
)
COLLECTOR = (
    "logstore.LogStore.__init__ mkdir",
    "logstore.LogStore._take_lock open",
    "logstore.LogStore._take_lock ftruncate",
    "logstore.LogStore._take_lock write_all",
    "logstore.LogStore._begin_life mkdir",
    "logstore.LogStore._begin_life rename 2",
    "logstore.LogStore._settle sync",
    "logstore.Syncer.sync sync",
    "logstore.Syncer.sync _syncfs",
    "life.Sync.sync _sync",
    "life.Sync._sync_one sync",
    "life.Sync._sync_one open",
    "life.Sync._sync_one sync 2",
    "life.Life.create open",
    "life.Life.create _write_waiting",
    "life.Life._write_waiting write_all",
    "life.Life.begin_sync _write_waiting",
    "life.Life.finish_sync _write_waiting",
    "life.Life._stands write_all",
    "life.Life._write_again write_all",
    "life.Life._mend ftruncate",
    "life.Life.run _write_waiting",
    "life.Life.output write_all",
    "life.Life._raw open",
    "life.Life._make_directory mkdir",
    "life.Life._write_result replace_file",
    "journal.replace_file write_temporary",
    "journal.replace_file commit_temporary",
    "journal.write_temporary open",
    "journal.write_temporary write_all",
    "journal.commit_temporary rename",
    "journal.write_all write",
    "journal.write_all pwrite",
    "renderer.RendererProcess.wake write",
    "chardev.Chardev._send sendmsg",
    "chardev._listen unlink",
)
RARE_COLLECTOR = (
    "logstore.LogStore._begin_life rename",
    "logstore.LogStore._sync_now sync",
    "life.Life._append _write_waiting",
    "life.Life.finish_sync replace_file",
    "life.Life.seal fdatasync",
    "life.Life.recover ftruncate",
    "life.Life.recover _write_waiting",
    "life.Life.gap ftruncate",
    "life.Life._stands ftruncate",
    "chardev.Chardev.close unlink",
)
RENDERER = (
    "journal.write_temporary fdatasync",
    "vmlogs.VmLogs._begin open",
    "vmlogs.VmLogs._begin open 2",
    "vmlogs.VmLogs._begin sync_logs",
    "vmlogs.VmLogs._begin write_note",
    "vmlogs.VmLogs._take_note ftruncate",
    "vmlogs.VmLogs.sync_logs fdatasync",
    "vmlogs.VmLogs.sync_logs fdatasync 2",
    "vmlogs.VmLogs.write_note write_temporary",
    "vmlogs.VmLogs.commit_note commit_temporary",
    "vmlogs.VmLogs._write write",
    "renderer.Renderer.serve _note",
    "renderer.Renderer.serve _note 2",
    "renderer.Renderer._note sync_logs",
    "renderer.Renderer._note write_note",
    "renderer.Renderer._note commit_note",
)
MANY_VMS = (
    "vmlogs.VmLogs._begin commit_note",
    "vmlogs.VmLogs._begin fsync",
    "renderer.Renderer._note syncfs",
    "renderer.Renderer._note syncfs 2",
)
ELSEWHERE = {
    "shim.main _write": "before it has an order: test_runner kills shims that wait for one",
    "shim.Shim._fork fork": "before it has an order",
    "shim.Shim._child write": "what would be the script could not become one: as one that can't be executed",
    "shim.Shim._become_a_login _write": "before it has an order: test_runner, test_shim",
    "shim.hold _note": "no space to begin: test_spool and test_shim fill a disk; the run waits, with or without it",
    "shim.hold _note 2": "a mistake of ours: a last word, with or without it the run is lost",
    "shim.Shim._drop _sync_path": "the setting changed in mid-run",
    "shim.Shim._sync_apart _sync": "a VM without room for a thread: as at the run's end",
    "shim.Stream._write_again pwrite": "a disk that fails under a sync: tests/sim",
    "shim.Shim._note_start _remove": "a disk that fails under a sync: tests/sim",
    "spool._make_state_dir chmod": "done again at the next start",
    "spool.Run.prune unlink": "a file system without holes",
    "spool.Run._prune_index _punch": "times of bytes that the host has; done again when there is no room",
    "spool.Run.cut_unsynced ftruncate": "after a power cut: tests/sim; done again where it was interrupted",
    "spool.Run.cut_unsynced fdatasync": "after a power cut: tests/sim",
    "spool.Run._remove_note unlink": "a note of a run that is over, which its result outweighs",
    "spool._write_once unlink": "a disk that fails under a sync: tests/sim",
    "spool.Spool.new_life _link": "time travel: tests/sim, tests/vm",
    "spool.Spool.new_life _sync": "time travel: tests/sim, tests/vm",
    "spool.Spool.forget unlink": "reset, by hand and on purpose; again where it was interrupted",
    "spool.Spool.forget rmtree": "reset",
    "spool.Spool.forget mkdir": "reset",
    "spool.Spool.forget _sync": "reset",
    "spool.Spool.latest _link": "a link that the power took: tests/sim",
    "life.Life.run ftruncate": "bytes of a run that the journal lost: tests/sim, test_logstore",
    "life.Life._forget unlink": "a journal that lost records: tests/sim, test_logstore",
    "journal.replace_durably write_temporary": "the experiment's start: kept whole, or set once more by who sets it",
    "journal.replace_durably commit_temporary": "the experiment's start",
    "journal.replace_durably fsync": "the experiment's start",
    "runner.Runner.make_ready send": "only a hint, and who comes of it has nothing on a disk",
    "runner.Runner._clear_reboot unlink": "a reboot: tests/vm, tests/sim",
    "runner.sync_directory fsync": "a reboot, or a hold: tests/vm, tests/sim",
    "spool.Spool.create rmtree": "no space for run.json in the directory just made: test_spool, tests/sim",
    "life.Life._sync_directory fsync": "a journal that is cut back after a sync that failed: tests/sim",
}
"""Not here, and why."""

TABLES = (
    *(ANY_SHIM, LASTING_SHIM, LEAVING_SHIM, BLOCKED_SHIM, DROPPING_SHIM, CHILD, DAEMON, FULL_DAEMON),
    *(COLLECTOR, RARE_COLLECTOR, RENDERER, MANY_VMS),
)


def test_the_tables_name_every_site_there_is() -> None:
    named = [site for table in TABLES for site in table] + list(ELSEWHERE)
    assert len(named) == len(set(named))
    there = set(find_sites())
    assert there - set(named) == set(), "new: what if it is killed there?"
    assert set(named) - there == set(), "gone from the source"


# --- a guest and a host


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Supervised]:
    made = Supervised(
        tmp_path,
        collector_options=("--expect", "1", "--start-buffer", "0"),
        settings={"spool_limit": "2M", "quiet": "0.5"},
    )
    made.steps = Plan(tmp_path / "steps")
    yield made
    made.close()


def stage_leaving(world: Supervised, vmr: str, lines: int) -> None:
    """One whose background child prints on after its end, and ends by itself a moment later."""
    name = vmr.rpartition("/")[2]
    late = f"{name} 1 says the child\n"
    world.stage_talker(vmr, lines, end=f"(sleep 0.7; echo '{late.strip()}') &")
    before = world.printed[vmr]
    world.printed[vmr] = lambda stream: before(stream) + (late.encode() if stream == "stdout" else b"")


def plan_of(world: Supervised) -> Plan:
    assert world.steps is not None
    return world.steps


def assert_shims_left_what_they_had(world: Supervised, history: str) -> None:
    """All is there once; and what has become of each killed shim's run is what its directory said as it died."""
    taken = {row["vmr"]: row for row in plan_of(world).taken().values() if "vmr" in row}
    rows = assert_all_is_there_once(world, world.printed, killed=set(taken), history=history)
    for vmr, at in taken.items():
        what = f"{at}: {rows[vmr]}"
        if not at["started"]:
            assert rows[vmr]["complete"], f"it was not begun, so it is begun again: {what}"
        elif not at["ended"]:
            assert (rows[vmr]["state"], rows[vmr]["error"]) == ("lost", KILLED), what
            sizes = [rows[vmr][f"{stream}_bytes"] for stream in STREAMS]
            if at["apart"]:  # its other thread captured on until the signal came
                assert all(size >= had for size, had in zip(sizes, at["captured"])), what
            else:
                assert sizes == at["captured"], f"all that it had captured, and no more: {what}"
            if at["step"].startswith("after shim.Shim._note_start"):
                assert not (world.launch / vmr / WITNESS).exists(), f"it was not let go: {what}"
        else:
            assert rows[vmr]["exit_code"] == 0, f"its end was seen: {what}"


def test_a_shim_is_killed_at_each_of_its_steps(world: Supervised) -> None:
    plan = plan_of(world)
    kinds: tuple[tuple[tuple[str, ...], Callable[[str], None]], ...] = (
        (ANY_SHIM, lambda vmr: world.stage_talker(vmr, 60, every=20, pause=0.05)),
        (LASTING_SHIM, lambda vmr: world.stage_talker(vmr, 200, every=20, pause=0.2)),
        (LEAVING_SHIM, lambda vmr: stage_leaving(world, vmr, 20)),
    )
    for sites, stage in kinds:
        for step in steps_of(sites):
            vmr = f"-{9 if len(plan.steps) % 2 else 8}/r{len(plan.steps)}"
            plan.add(step, "shim", vmr=vmr)
            stage(vmr)
    plan.write()
    world.start()
    plan.wait()
    assert_shims_left_what_they_had(world, "a shim at each step")


def test_an_end_that_its_shim_did_not_live_to_tell_passes_its_barrier(world: Supervised) -> None:
    """The host learns of it from the spool, with the next Ack; so may the daemon's judgement come too late."""
    plan = plan_of(world)
    for number in range(12):
        vmr = f"-9/r{number}"
        plan.add("after shim.Shim._record rename", "shim", vmr=vmr, name=f"the end of {vmr}")
        world.stage_talker(vmr, 40 + 10 * number, every=10, pause=0.15)  # between the judgements, too
    world.stage_talker("-8/next", 20)
    plan.write()
    world.start()
    plan.wait()
    assert_shims_left_what_they_had(world, "at the end of each")


def test_a_script_is_killed_before_it_executes(world: Supervised) -> None:
    plan = plan_of(world)
    for step in steps_of(CHILD):
        vmr = f"-9/r{len(plan.steps)}"
        plan.add(step, "script", vmr=vmr)
        (world.stage(vmr, "") / "call_arguments.sh").write_text("#!/no/such/interpreter\n")
    plan.write()
    world.start()
    plan.wait()
    for step, at in plan.taken().items():
        row = world.complete(at["vmr"])
        told = step.startswith("after")
        assert row["state"] == ("failed to start" if told else "killed"), f"{at}: {row}"
        assert row["attempt"] == 1


def test_the_daemon_is_killed_at_each_of_its_steps(world: Supervised) -> None:
    plan = plan_of(world)
    for step in steps_of(DAEMON):
        # Not with the spool's id, or nobody would get to the end of making one.
        plan.add(step, "daemon", visit=2 if "spool._write_durably" in step else 1)
    # Shims that leave the daemon something to do.
    for step, vmr in (
        ("after shim.Shim._put write", "-8/lost"),
        ("after shim.Shim._note_start fsync", "-8/starting"),
        ("after shim.Shim._record fsync", "-8/ended"),
        ("after shim.Shim._record rename", "-8/leaving"),
    ):
        plan.add(step, "shim", vmr=vmr)
        if vmr == "-8/leaving":
            stage_leaving(world, vmr, 20)
        else:
            world.stage_talker(vmr, 60, every=20, pause=0.05)
    for number in range(4):
        world.stage_talker(f"-{7 - number}/plain{number}", 40, every=10, pause=0.05)
    world.stage_talker("-1/planted", 20)
    world.stage_talker("1/late", 20)
    plan.write()
    world.start()
    # A run that can't be made, for its directory is a file, until it isn't.
    until(lambda: (world.spool / "runs").exists(), "the spool is there")
    (world.spool / "runs" / "-1").mkdir()
    (world.spool / "runs" / "-1" / "planted").write_text("in the way")
    plan.wait("create _unlink")
    (world.spool / "runs" / "-1" / "planted").unlink()
    until(lambda: (world.result("1/late") or {}).get("closed"), "time zero came")
    killed_by_host(world, plan)
    away_and_back(world, plan)
    plan.wait()
    assert_shims_left_what_they_had(world, f"the daemon at each step: {list(plan.taken())}")


def killed_by_host(world: Supervised, plan: Plan) -> None:
    """Signals that the host asks for are remembered with the run."""
    while plan.missing("remember"):
        number = len(world.printed)
        world.stage_talker(f"2/signalled{number}", 400, every=10, pause=0.05)
        until(lambda: world.result(f"2/signalled{number}"), "it runs")
        world.host("kill", "Server", f"2/signalled{number}", "--signal", "CONT")


def away_and_back(world: Supervised, plan: Plan) -> None:
    """A VMR is moved away, and back: each is noted."""
    here, there = world.launch / "-7/plain0", world.path / "away"
    while plan.missing("mark_", "_write_durably"):
        here.rename(there)
        with suppress(AssertionError):  # where no daemon was there to see it, nobody will say so
            until(lambda: not world.row("-7/plain0").get("staged", True), "it is seen gone", 3.0)
        there.rename(here)
        with suppress(AssertionError):
            until(lambda: world.row("-7/plain0").get("staged"), "it is seen back", 3.0)


def test_a_full_spool_under_kills(world: Supervised) -> None:
    plan = plan_of(world)
    for step in steps_of(FULL_DAEMON):
        plan.add(step, "daemon")
    for step in steps_of(BLOCKED_SHIM):
        vmr = f"-9/r{len(plan.steps)}"
        plan.add(step, "shim", vmr=vmr)
        world.stage_talker(vmr, every=10, pause=0.05)
    world.stage_talker("-9/fills", 18_000, every=100, pause=0.001)
    plan.write()
    world.start_guest()
    plan.wait("touch", "shim.Shim._block", "shim._note")  # what comes before it is full, and what of it
    world.start_host()
    plan.wait("_remove", "_mark")
    world.enough()
    world.stage_talker("-8/fills-again", 14_000, every=50, pause=0.002)
    plan.wait()
    assert_shims_left_what_they_had(world, f"a full spool: {list(plan.taken())}")


def keep_running(
    world: Supervised,
    plan: Plan,
    *,
    but: str = "",
    most: Optional[float] = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> None:
    """Until each step but one has been reached runs begin and end, a dozen at a time: so many syncs are joined.

    Or for so many seconds at the most, where not each can be.
    """
    world.stage_talker("-9/goes-on", every=5, pause=0.1)
    world.start()
    deadline = time.monotonic() + (most or 240.0)
    while set(plan.missing()) - {but}:
        if time.monotonic() > deadline:
            assert most is not None, f"steps that nobody reached: {plan.missing()}"
            break
        number = len(world.printed)
        vmrs = [f"-9/r{number + each}" for each in range(12)]
        for vmr in vmrs:
            world.stage_talker(vmr, 40, every=10, pause=0.05)
        meanwhile()
        until(lambda: all((world.result(vmr) or {}).get("closed") for vmr in vmrs), "they are over", 200.0)
    world.enough()


@pytest.mark.parametrize("part", range(3))
def test_the_collector_is_killed_at_each_of_its_steps(world: Supervised, part: int) -> None:
    plan = plan_of(world)
    for step in steps_of(COLLECTOR)[part::3]:
        plan.add(step, "collector")
    plan.write()
    rng = random.Random(part)

    def kill() -> None:
        """Recovery has more to do after some moments than others: bytes without a record, records without a mark."""
        time.sleep(rng.uniform(0.2, 0.8))
        assert world.collector is not None
        world.collector.kill()

    keep_running(world, plan, meanwhile=kill)
    assert_all_is_there_once(
        world, world.printed, history=f"the collector at each step: {list(plan.taken())}"
    )


def test_the_renderer_is_killed_at_each_of_its_steps(world: Supervised) -> None:
    plan = plan_of(world)
    last = "after renderer.Renderer.serve _note 2"  # what it does at its collector's end
    for step in steps_of(RENDERER):
        # Not with the first note, which is written before there is anything to render.
        inner = step.startswith(("after vmlogs.VmLogs.commit_note", "after vmlogs.VmLogs.write_note"))
        plan.add(step, "renderer", visit=2 if inner else 1)
    plan.write()
    keep_running(world, plan, but=last)
    while plan.missing():
        assert world.collector is not None
        world.collector.send_signal(signal.SIGTERM)
        world.collector.wait()
        time.sleep(1.0)
    assert_all_is_there_once(world, world.printed, history=f"the renderer at each step: {list(plan.taken())}")


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_all_of_them_are_killed_at_later_visits(world: Supervised, seed: int) -> None:
    """Alone and together, at a random one of the times that each comes to a step."""
    plan = plan_of(world)
    rng = random.Random(seed)
    for table, role in ((DAEMON, "daemon"), (COLLECTOR, "collector"), (RENDERER, "renderer")):
        for step in steps_of(table):
            plan.add(step, role, visit=rng.randint(1, 8))
    for step in steps_of(ANY_SHIM):
        plan.add(step, "shim", vmr=f"-9/r{len(plan.steps) % 37 + 1}", visit=rng.randint(1, 3))
    plan.write()
    keep_running(world, plan, most=90.0)
    print(f"seed {seed}: {len(plan.taken())} of {len(plan.steps)} steps, {len(world.printed)} runs")
    assert_shims_left_what_they_had(world, f"seed {seed}: {list(plan.taken())}")
    assert len(plan.taken()) > 20


def test_a_shim_that_drops_is_killed_at_each_of_its_steps(world: Supervised) -> None:
    """What is dropped is told byte for byte, whoever dies; all else is what was printed."""
    plan = plan_of(world)
    world.settings["overflow"] = "drop"
    world.write_config()
    for step in steps_of(DROPPING_SHIM):
        vmr = f"-9/r{len(plan.steps)}"
        plan.add(step, "shim", vmr=vmr)
        if "_remove" in step:
            world.stage_talker(vmr, 20)  # it ends before there is anything to drop
        else:
            world.stage_talker(vmr, every=10, pause=0.05)
    world.stage_talker("-9/fills", 18_000, every=100, pause=0.001)
    plan.write()
    world.start_guest()
    plan.wait("_drop", "_write_gap")
    world.start_host()
    plan.wait()
    world.enough()
    whole = "every run closed on the host"
    until(lambda: all((world.result(vmr) or {}).get("closed") for vmr in world.printed), whole, 120.0)
    killed = {row["vmr"] for row in plan.taken().values() if row["started"] and not row["ended"]}
    dropped = 0
    for vmr, text in world.printed.items():
        row = world.result(vmr)
        assert row is not None and row["state"] == ("lost" if vmr in killed else "exited"), row
        for stream in STREAMS:
            raw = bytearray(world.raw(vmr, stream))
            printed = text(stream)
            for gap in row["gaps"]:
                if gap["stream"] == stream:
                    begin, end = gap["offset"], gap["offset"] + gap["length"]
                    assert raw[begin:end] == bytes(end - begin), f"{vmr} {gap}"
                    raw[begin:end] = printed[begin:end]
                    dropped += gap["length"]
            assert raw == (printed[: len(raw)] if vmr in killed else printed), f"{vmr} {stream}: {row}"
    assert dropped


# --- guests by script


def keep(host: Host) -> Supervisor:
    host.start()
    return Supervisor(lambda: host.process, host.start)


def lines(number: int, first: int, count: int) -> list[bytes]:
    return [b"run %d says line %07d\n" % (number, each) for each in range(first, first + count)]


class Teller:
    """A guest that tells one run's output from wherever its host stands, in small pieces."""

    def __init__(self, guest: Guest, number: int) -> None:
        self.guest = guest
        self.number = number
        self.id = number.to_bytes(16, "big")
        self.text = b""
        self.acked = 0

    def tell(self, count: int, *, wait: bool = True) -> None:
        """So many lines more, a message each; until all is acknowledged, whoever dies meanwhile."""
        self.text += b"".join(lines(self.number, self.text.count(b"\n"), count))
        deadline = time.monotonic() + 60.0
        while self.acked < len(self.text):
            assert time.monotonic() < deadline, f"run {self.number} is not acknowledged"
            try:
                self._tell_once(wait)
            except (OSError, AssertionError):
                self.guest.close()
                continue
            if not wait:
                return

    def _tell_once(self, wait: bool, upto: Optional[int] = None) -> None:
        guest = self.guest
        if guest.sock is None or not guest.session.open:
            guest.open()
            guest.events.clear()
        if not guest.acks(self.id):
            guest.say(run(self.number, vmr=b"-4/r%d" % self.number, started=5))
            guest.hear(lambda: guest.acks(self.id), "the Ack of a Run", limit=5.0)
        at = guest.acks(self.id)[0].stdout if not self.acked else self._stands()
        rest = self.text[at:upto].splitlines(keepends=True)
        for begin in range(0, len(rest), 50):
            said = []
            for line in rest[begin : begin + 50]:
                said.append(output(line, at, number=self.number))
                at += len(line)
            guest.say(*said)
            guest.hear(lambda: True)
        if wait:
            guest.hear(lambda: self._stands() == len(self.text), "all is acknowledged", limit=5.0)

    def gaps(self) -> None:
        """Twenty at once, told at such length that their records are written before the sync that waits for them."""
        begin = len(self.text)

        def say() -> None:
            rest = range(max(begin, self._stands()), begin + 20)
            self.guest.say(*[messages.Gap(self.id, 1, at, 1, "x" * 4_000) for at in rest])

        self._lack(20, say)

    def gap(self, host: Optional[Host] = None) -> None:
        """Bytes that are no more, acknowledged. With a host it is killed when it has just written that down."""
        gap = messages.Gap(self.id, 1, len(self.text), 10, "gone")

        def say() -> None:
            if host is None:
                self.guest.say(gap)
                return
            journal = host.logs / "g" / ".journal"
            time.sleep(0.5)  # all that was said before it has its mark
            size, looked = journal.stat().st_size, time.monotonic() + 1.0
            self.guest.say(gap)
            while journal.stat().st_size == size and time.monotonic() < looked:
                pass  # its own comes some milliseconds later
            host.kill()

        self._lack(10, say)

    def _lack(self, count: int, say: Callable[[], None]) -> None:
        """So many bytes that are no more, until they are acknowledged, whoever dies meanwhile."""
        begin = len(self.text)
        self.text += bytes(count)
        deadline = time.monotonic() + 60.0
        while self.acked < len(self.text):
            assert time.monotonic() < deadline, f"a gap in run {self.number} is not acknowledged"
            try:
                self._tell_once(wait=False, upto=begin)
                say()
                self.guest.hear(
                    lambda: self._stands() == len(self.text), "the gap is acknowledged", limit=5.0
                )
            except (OSError, AssertionError):
                self.guest.close()

    def _stands(self) -> int:
        acks = self.guest.acks(self.id)
        self.acked = acks[-1].stdout if acks else self.acked
        return self.acked


def raw_lines(host: Host, vm: str) -> list[str]:
    """Every line stored, life by life."""
    lives = sorted(path for path in host.logs.glob(f"{vm}~*"))
    lives.sort(key=lambda path: int(path.name.partition("~")[2]))
    found = []
    for life in [*lives, host.logs / vm]:
        for path in sorted(life.glob("*/*/*/stdout")):
            said = [line.lstrip(b"\0").decode() for line in path.read_bytes().splitlines()]
            found += [line for line in said if line]  # gaps are zeros
    return found


def shown_lines(host: Host, vm: str) -> list[str]:
    return [line.split('"msg": "')[1].split('"')[0] for line in host.log(vm, "json").splitlines()]


def test_a_collector_is_killed_where_it_seldom_is(tmp_path: Path) -> None:
    """Many records, a journal that lost its end, gaps, lives one after the other, its orderly end."""
    plan = Plan(tmp_path / "steps")
    for step in steps_of(RARE_COLLECTOR):
        plan.add(step, "collector")
    plan.write()
    host = Host(tmp_path, vms=("g",), environment=plan.environment)
    supervisor = keep(host)
    try:
        tellers = []
        number = 0

        def life() -> Teller:
            nonlocal number
            number += 1
            tellers.append(Teller(Guest(host.socket("g"), spool=number.to_bytes(16, "big")), number))
            return tellers[-1]

        deadline = time.monotonic() + 240.0
        while plan.missing():
            assert time.monotonic() < deadline, f"steps that nobody reached: {plan.missing()}"
            teller = life()
            teller.tell(5_000 if plan.missing("finish_sync replace_file") else 20)
            if plan.missing("append"):
                teller.gaps()
            for _ in range(8 if plan.missing("gap", "_stands") else 0):
                teller.gap(host if plan.missing("_stands") else None)
            if plan.missing("recover"):
                host.kill()
                with (host.logs / "g" / ".journal").open("ab") as journal:
                    journal.write(b"torn")
            if plan.missing("_sync_now", "close unlink"):
                teller.tell(5, wait=False)
                assert host.process is not None
                host.process.send_signal(signal.SIGTERM)
                host.process.wait()
            teller.tell(5, wait=False)  # which the next life finds unsynced
            teller.guest.close()
        for teller in tellers:
            raw = host.raw("g" if teller is tellers[-1] else f"g~{teller.number}", f"-4/r{teller.number}/1")
            assert teller.text.startswith(raw) and len(raw) >= teller.acked, f"life {teller.number}"
        until(lambda: len(shown_lines(host, "g")) >= len(raw_lines(host, "g")), "every line is shown", 60.0)
        time.sleep(0.5)
        assert shown_lines(host, "g") == raw_lines(host, "g")
    finally:
        supervisor.stop()
        host.stop()


def test_a_renderer_of_many_vms_is_killed_where_it_joins_their_syncs(tmp_path: Path) -> None:
    plan = Plan(tmp_path / "steps")
    vms = tuple(f"g{number}" for number in range(MANY + 10))
    for step in steps_of(MANY_VMS):
        plan.add(step, "renderer")
    # And between two VMs of one turn.
    plan.add("after renderer.Renderer._note write_note", "renderer", visit=7)
    plan.add("after renderer.Renderer._note commit_note", "renderer", visit=9)
    plan.write()
    host = Host(tmp_path, vms=vms, environment=plan.environment)
    supervisor = keep(host)
    try:
        tellers = [Teller(Guest(host.socket(vm)), 1) for vm in vms]
        deadline = time.monotonic() + 240.0
        while plan.missing():
            assert time.monotonic() < deadline, f"steps that nobody reached: {plan.missing()}"
            for teller in tellers:
                teller.tell(3, wait=False)
            for teller in tellers:
                teller.tell(0)
            time.sleep(0.2)
        for vm, teller in zip(vms, tellers):
            wanted = teller.text.decode().splitlines()
            until(lambda: len(shown_lines(host, vm)) >= len(wanted), f"every line of {vm} is shown", 60.0)
        time.sleep(0.5)
        for vm, teller in zip(vms, tellers):
            assert host.raw(vm, "-4/r1/1") == teller.text
            assert shown_lines(host, vm) == teller.text.decode().splitlines()
    finally:
        supervisor.stop()
        host.stop()
