"""The schedule: names, one case for each rule, and any order of events against what must always hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from vmr_agent.runs import Trigger
from vmr_agent.schedule import (
    Decision,
    Identity,
    Now,
    Past,
    Staging,
    Vmr,
    decide,
    explain,
    is_vmr_directory,
    parse_start_time,
    parse_vmr,
    sort_key,
    start_time_of,
)

# --- names


@given(
    st.one_of(
        st.integers(-(10**9), 10**9),
        st.floats(-1e9, 1e9, allow_nan=False, allow_infinity=False),
    ).filter(bool)
)
def test_what_str_gives_for_a_number_is_a_start_time(number: float) -> None:
    parsed = parse_start_time(str(number).encode())
    assert parsed == number
    assert type(parsed) is type(number)


@given(st.one_of(st.binary(max_size=12), st.from_regex(rb"[-+0-9._eE \n]{1,12}")))
def test_a_start_time_has_one_spelling(text: bytes) -> None:
    parsed = parse_start_time(text)
    if parsed is not None:
        assert str(parsed).encode() == text


@pytest.mark.parametrize(
    "text", [b"-4", b"10.5", b"-100000", b"2.2250738585072014e-308", b"1000000000.0", b"5e-324"]
)
def test_start_times(text: bytes) -> None:
    assert parse_start_time(text) == float(text)


@pytest.mark.parametrize(
    "text",
    [b"", b"0", b"-0", b"0.0", b"-0.0", b"+4", b"04", b"4.", b".5", b"1_0", b" 4", b"4\n", b"1e3", b"1E-05"]
    + [b"nan", b"inf", b"-inf", b"1e999", b"1000000001", b"-1000000000.5", b"9" * 10_000]
    + [b"abc", b"\xd9\xa4", b"\xff", b"0x4"],
)  # fmt: skip
def test_not_start_times(text: bytes) -> None:
    assert parse_start_time(text) is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (b"-4/compress.py", b"-4/compress.py"),
        (b"-4/compress.py/", b"-4/compress.py"),
        (b"10.5/a b\n\xff", b"10.5/a b\n\xff"),
        (b"1/_1", b"1/_1"),
        (b"1/" + b"x" * 255, b"1/" + b"x" * 255),
        (b"1/" + b"x" * 256, None),
        (b"-4", None),
        (b"-4/", None),
        (b"-4/a/b", None),
        (b"-4//", None),
        (b"-4/.", None),
        (b"-4/..", None),
        (b"-4/.hidden", None),
        (b"-4/a\0b", None),
        (b"0/a", None),
        (b"/-4/a", None),
        (b"", None),
    ],
)
def test_vmr_names(text: bytes, name: Optional[bytes]) -> None:
    assert parse_vmr(text) == name


def test_order_is_by_number_then_name() -> None:
    names = [b"10/a", b"9.5/a", b"-4/b", b"-4/a", b"-100000/z", b"-4.5/a", b"5e-324/a"]
    assert sorted(names, key=sort_key) == [
        b"-100000/z", b"-4.5/a", b"-4/a", b"-4/b", b"5e-324/a", b"9.5/a", b"10/a",
    ]  # fmt: skip
    with pytest.raises(ValueError):
        start_time_of(b"0/a")


# --- one case for each rule

SCRIPT: Identity = (1, 2, 3)
OTHER: Identity = (1, 5, 9)
NOW = Now(
    boottime=1000.0,
    boot_id="this",
    held=False,
    enabled=True,
    configured=False,
    zero=None,
    since=0.0,
    quiet=10.0,
    max_reboots=3,
)


def staged(
    name: bytes, staging: Staging = Staging.READY, *, changed: float = 100.0, script: Identity = SCRIPT
) -> Vmr:
    committed = None if staging is Staging.STAGING else changed
    return Vmr(name, staging, changed, committed, None if staging is Staging.STAGING else script)


def settling(name: bytes, *, changed: float = 999.0, committed: float = 999.0) -> Vmr:
    return Vmr(name, Staging.SETTLING, changed, committed, SCRIPT)


def ran(**changes: Any) -> Past:
    done = Past(
        attempts=1,
        running=False,
        any_running=False,
        holds=True,
        asks_reboot=False,
        boot_id="this",
        reboots=0,
        script=SCRIPT,
        gone=False,
    )
    return done._replace(**changes)


RUNNING = ran(running=True, any_running=True)
RERUNNING = ran(any_running=True)
ASKS = ran(asks_reboot=True)
HAS_REBOOTED = ran(asks_reboot=True, boot_id="earlier")

Case = tuple[str, list[Vmr], dict[bytes, Past], dict[str, Any], dict[str, Any]]

CASES: list[Case] = [
    # (the rule, what is staged, what has run, how the moment differs from NOW, what the decision must say)
    ("negative times in ascending order",
     [staged(b"-4/a"), staged(b"-10/b"), staged(b"-9.5/c"), staged(b"3/d")], {}, {}, {"start": [b"-10/b"]}),
    ("all VMRs of one time run concurrently",
     [staged(b"-4/a"), staged(b"-4/b"), staged(b"-4.0/c"), staged(b"-3/d")], {}, {},
     {"start": [b"-4.0/c", b"-4/a", b"-4/b"]}),
    ("the next time starts when each of them has exited: not yet",
     [staged(b"-3/d")], {b"-4/a": RUNNING, b"-4/b": ran()}, {}, {"start": [], "wake": None}),
    ("the next time starts when each of them has exited: now",
     [staged(b"-3/d")], {b"-4/a": ran(), b"-4/b": ran()}, {}, {"start": [b"-3/d"]}),
    ("what has run doesn't run again", [staged(b"-4/a")], {b"-4/a": ran()}, {"since": 995.0}, {"start": []}),
    ("an edited one doesn't run again",
     [staged(b"-4/a", script=OTHER)], {b"-4/a": ran()}, {"since": 995.0}, {"start": []}),
    ("one moved away and back doesn't run again",
     [staged(b"-4/a")], {b"-4/a": ran(gone=True)}, {"since": 995.0}, {"start": []}),
    ("a new one runs again",
     [staged(b"-4/a", script=OTHER)], {b"-4/a": ran(gone=True)}, {}, {"start": [b"-4/a"]}),
    ("a new one waits for the run of the one it replaced",
     [staged(b"-4/a", script=OTHER)], {b"-4/a": RUNNING._replace(gone=True)}, {}, {"start": []}),

    # What is still arriving
    ("a start time waits for a lower VMR that is settling",
     [staged(b"-4/a"), settling(b"-5/b")], {}, {}, {"start": [], "wake": 1009.0}),
    ("a start time waits for an equal VMR that is settling",
     [staged(b"-4/a"), settling(b"-4/b")], {}, {}, {"start": [], "wake": 1009.0}),
    ("at most `quiet`, counted from its x bit",
     [staged(b"-4/a"), settling(b"-5/b", committed=990.0)], {}, {}, {"start": [b"-4/a"]}),
    ("not for a higher one", [staged(b"-4/a"), settling(b"-3/b")], {}, {}, {"start": [b"-4/a"]}),
    ("not for one without x bit",
     [staged(b"-4/a"), staged(b"-5/b", Staging.STAGING, changed=999.9)], {}, {}, {"start": [b"-4/a"]}),
    ("a refused one holds nothing up",
     [staged(b"-4/a"), staged(b"-5/b", Staging.REFUSED, changed=999.9)], {}, {}, {"start": [b"-4/a"]}),
    ("a refused one doesn't keep the VM from being configured",
     [staged(b"-5/b", Staging.REFUSED, changed=999.9)], {}, {}, {"start": [], "configured": True}),
    ("a VMR arriving at the current time starts now, settling ones or not",
     [staged(b"-4/b"), settling(b"-5/c")], {b"-4/a": RUNNING}, {}, {"start": [b"-4/b"]}),
    ("a lower one waits for the next boundary", [staged(b"-5/b")], {b"-4/a": RUNNING}, {}, {"start": []}),
    ("a lower one runs at the next boundary",
     [staged(b"-5/b"), staged(b"-3/c")], {b"-4/a": ran()}, {}, {"start": [b"-5/b"]}),
    ("one arriving after `configured` runs at once, beside others",
     [staged(b"-100000/mv"), staged(b"-4/b")], {b"-5/a": RUNNING}, {"configured": True},
     {"start": [b"-100000/mv", b"-4/b"], "holds": False}),
    ("a lost run whose process lives stays in its barrier",
     [staged(b"-3/b")], {b"-4/a": RUNNING}, {}, {"start": []}),
    ("two barriers at once can't be; nothing joins either",
     [staged(b"-5/c")], {b"-4/a": RUNNING, b"-5/b": RUNNING}, {}, {"start": []}),

    # .hold
    ("`.hold`: nothing new starts", [staged(b"-4/a"), staged(b"-5/b")], {}, {"held": True},
     {"start": [], "wake": None}),
    ("`.hold`: not even in the current barrier",
     [staged(b"-4/a")], {b"-4/b": RUNNING}, {"held": True}, {"start": []}),
    ("`.hold`: not after time zero", [staged(b"4/a")], {}, {"held": True, "configured": True, "zero": 1.0},
     {"start": [], "configured": True}),
    ("`.hold`: not configured", [staged(b"4/a")], {}, {"held": True}, {"configured": False, "wake": None}),
    ("`.hold`: no reboot",
     [staged(b"-4/a")], {b"-4/a": ASKS}, {"held": True}, {"reboot": [], "given_up": []}),

    # Configured
    ("configured when no negative VMR is left and all is quiet",
     [staged(b"4/a", changed=990.0)], {b"-4/a": ran()}, {"since": 990.0},
     {"configured": True, "wake": 1000.0}),
    ("not configured within `quiet` of a change under a VMR",
     [staged(b"4/a", changed=995.0)], {}, {}, {"configured": False, "wake": 1005.0}),
    ("not configured while one without x bit is fresh",
     [staged(b"4/a", Staging.STAGING, changed=995.0)], {}, {}, {"configured": False, "wake": 1005.0}),
    ("one without x bit, and forgotten, doesn't keep the VM from being configured",
     [staged(b"-4/a", Staging.STAGING, changed=5.0)], {}, {}, {"configured": True}),
    ("a change under one that has run counts for nothing",
     [staged(b"-4/a", changed=999.0)], {b"-4/a": ran()}, {}, {"configured": True}),
    ("not configured within `quiet` of the last run's end",
     [], {b"-4/a": ran()}, {"since": 995.0}, {"configured": False, "wake": 1005.0}),
    ("not configured while a negative VMR settles", [settling(b"-4/a")], {}, {},
     {"configured": False, "wake": 1009.0}),
    ("not configured while a barrier is open",
     [], {b"-4/a": RUNNING}, {}, {"configured": False, "wake": None}),
    ("not configured while nothing was ever staged", [], {}, {}, {"configured": False, "wake": None}),
    ("configured when everything staged has been removed", [], {b"-4/a": ran()}, {}, {"configured": True}),
    ("configured stays so", [staged(b"-4/a")], {}, {"configured": True}, {"configured": True}),
    ("a rerun holds no barrier",
     [staged(b"-3/b")], {b"-4/a": RERUNNING}, {}, {"start": [b"-3/b"]}),
    ("a rerun doesn't keep the VM from being configured", [], {b"-4/a": RERUNNING}, {}, {"configured": True}),

    # Time zero
    ("positive: nothing before zero is set", [staged(b"4/a")], {}, {"configured": True},
     {"start": [], "wake": None}),
    ("positive: at zero + t",
     [staged(b"4/a"), staged(b"5/b"), staged(b"7/c")], {}, {"configured": True, "zero": 996.0},
     {"start": [b"4/a"], "wake": 1001.0}),
    ("positive: however late", [staged(b"4/a")], {}, {"configured": True, "zero": 1.0}, {"start": [b"4/a"]}),
    ("positive: no barrier among them",
     [staged(b"5/b")], {b"4/a": RUNNING._replace(holds=False)}, {"configured": True, "zero": 1.0},
     {"start": [b"5/b"], "holds": False}),
    ("positive: not before the VM is configured",
     [staged(b"4/a")], {b"-4/b": RUNNING}, {"zero": 1.0}, {"start": []}),
    ("positive: not in the decision that calls the VM configured, for that isn't durable yet",
     [staged(b"4/a")], {}, {"zero": 1.0}, {"start": [], "configured": True, "wake": 1000.0}),

    # Reboots
    ("reboot when all of that time have exited: not yet",
     [staged(b"-4/a"), staged(b"-3/c")], {b"-4/a": ASKS, b"-4/b": RUNNING}, {}, {"start": [], "reboot": []}),
    ("reboot when all of that time have exited: now",
     [staged(b"-4/a"), staged(b"-4/b"), staged(b"-3/c")], {b"-4/a": ASKS, b"-4/b": ran()}, {},
     {"start": [], "reboot": [b"-4/a"], "configured": False}),
    ("a VMR that joins the time first runs", [staged(b"-4/a"), staged(b"-4/b")], {b"-4/a": ASKS}, {},
     {"start": [b"-4/b"], "reboot": []}),
    ("one that is about to join it is waited for",
     [staged(b"-4/a"), settling(b"-4/b")], {b"-4/a": ASKS}, {}, {"start": [], "reboot": [], "wake": 1009.0}),
    ("a lower one waits for the reboot",
     [staged(b"-4/a"), staged(b"-5/b")], {b"-4/a": ASKS}, {}, {"start": [], "reboot": [b"-4/a"]}),
    ("a rerun doesn't put the reboot off",
     [staged(b"-4/a")], {b"-4/a": ASKS, b"-5/b": RERUNNING}, {}, {"reboot": [b"-4/a"]}),
    ("another boot: the next attempt, and only of those that asked",
     [staged(b"-4/a"), staged(b"-4/b"), staged(b"-3/c")],
     {b"-4/a": HAS_REBOOTED, b"-4/b": ran(boot_id="earlier")}, {},
     {"start": [b"-4/a"], "trigger": Trigger.REBOOT, "clear_reboot": True,
      "holds": True, "configured": False}),
    ("another boot, though no reboot could have been done from here",
     [staged(b"-4/a")], {b"-4/a": HAS_REBOOTED}, {"can_reboot": False}, {"start": [b"-4/a"]}),
    ("another boot, and it is being edited",
     [settling(b"-4/a"), staged(b"-3/c")], {b"-4/a": HAS_REBOOTED}, {},
     {"start": [], "wake": 1009.0}),
    ("another boot, and it has vanished: nothing is held up",
     [staged(b"-3/c")], {b"-4/a": HAS_REBOOTED}, {}, {"start": [b"-3/c"]}),
    ("only before `configured`", [staged(b"-4/a")], {b"-4/a": ASKS}, {"configured": True},
     {"reboot": [], "given_up": [b"-4/a"]}),
    ("only at negative times", [staged(b"4/a")], {b"4/a": ASKS}, {}, {"reboot": [], "given_up": []}),
    ("at most so many times, then its result stands",
     [staged(b"-4/a"), staged(b"-3/c")], {b"-4/a": ASKS._replace(reboots=3)}, {},
     {"start": [b"-3/c"], "reboot": [], "given_up": [b"-4/a"]}),
    ("at most so many times, in another boot too",
     [staged(b"-4/a"), staged(b"-3/c")], {b"-4/a": HAS_REBOOTED._replace(reboots=3)}, {},
     {"start": [b"-3/c"], "given_up": [b"-4/a"]}),
    ("where no reboot is done, the result stands",
     [staged(b"-4/a"), staged(b"-3/c")], {b"-4/a": ASKS}, {"can_reboot": False},
     {"start": [b"-3/c"], "reboot": [], "given_up": [b"-4/a"]}),
    ("one staged anew has asked for nothing",
     [staged(b"-4/a", script=OTHER)], {b"-4/a": ASKS._replace(gone=True)}, {},
     {"start": [b"-4/a"], "trigger": Trigger.SCHEDULE, "clear_reboot": False, "reboot": []}),
    ("another boot, and a rerun of it is in progress: then after that",
     [staged(b"-4/a")], {b"-4/a": HAS_REBOOTED._replace(any_running=True)}, {},
     {"start": [], "configured": False, "wake": None}),
    ("one staged anew has asked for nothing, even before it is complete",
     [staged(b"-4/a", Staging.STAGING), staged(b"-3/c")], {b"-4/a": ASKS._replace(gone=True)}, {},
     {"start": [b"-3/c"], "reboot": []}),
    ("one that vanished after it asked gets the reboot",
     [], {b"-4/a": ASKS._replace(gone=True)}, {},
     {"reboot": [b"-4/a"]}),

    # schedule = off
    ("`schedule = off`: nothing starts by itself",
     [staged(b"-4/a"), staged(b"4/b")], {}, {"enabled": False, "zero": 1.0},
     {"start": [], "configured": False}),
    ("`schedule = off`: the VM isn't called configured, nor rebooted",
     [], {b"-4/a": ASKS, b"-5/b": ran()}, {"enabled": False},
     {"reboot": [], "given_up": [], "configured": False}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("vmrs", "past", "moment", "wanted"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_rule(
    vmrs: list[Vmr], past: dict[bytes, Past], moment: dict[str, Any], wanted: dict[str, Any]
) -> None:
    decision = decide({v.name: v for v in vmrs}, past, NOW._replace(**moment))
    for key, value in wanted.items():
        if key == "start":
            assert [start.vmr for start in decision.start] == value
        elif key in ("trigger", "clear_reboot", "holds"):
            assert {getattr(start, key) for start in decision.start} == {value}
        elif key in ("reboot", "given_up"):
            assert list(getattr(decision, key)) == value
        else:
            assert getattr(decision, key) == value


WHY: list[tuple[str, list[Vmr], dict[bytes, Past], dict[str, Any]]] = [
    ("waits for -5/drop_file", [staged(b"-4/x")], {b"-5/drop_file": RUNNING}, {}),
    ("waits for -5/drop_file", [staged(b"-4/x"), staged(b"-5/drop_file")], {}, {}),
    ("waits for -5/drop_file", [staged(b"-4/x"), settling(b"-5/drop_file")], {}, {}),
    ("waits for a reboot", [staged(b"-4/x")], {b"-5/drop_file": ASKS}, {}),
    ("waits for its earlier run to exit",
     [staged(b"-4/x", script=OTHER)], {b"-4/x": RUNNING._replace(gone=True)}, {}),
    ("about to start", [staged(b"-4/x")], {b"-4/y": RUNNING}, {}),
    ("about to start", [staged(b"-4/x")], {b"-5/y": RUNNING}, {"configured": True}),
    ("settling", [settling(b"-4/x")], {}, {}),
    ("being staged", [staged(b"-4/x", Staging.STAGING)], {}, {}),
    ("held", [staged(b"-4/x")], {}, {"held": True}),
    ("schedule is off", [staged(b"4/x")], {}, {"enabled": False, "held": True}),
    ("waits for the VM to be configured", [staged(b"4/x")], {}, {"zero": 1.0}),
    ("waits for time zero", [staged(b"4/x")], {}, {"configured": True}),
    ("at 12.5 s after time zero", [staged(b"12.5/x")], {}, {"configured": True, "zero": 999.0}),
    ("about to start", [staged(b"12.5/x")], {}, {"configured": True, "zero": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("phrase", "vmrs", "past", "moment"), WHY)
def test_why_a_vmr_is_not_running(
    phrase: str, vmrs: list[Vmr], past: dict[bytes, Past], moment: dict[str, Any]
) -> None:
    assert explain({v.name: v for v in vmrs}, past, NOW._replace(**moment))[vmrs[0].name] == phrase


def test_nothing_is_said_of_what_has_run_or_is_refused() -> None:
    vmrs = [staged(b"-4/done"), staged(b"-4/refused", Staging.REFUSED)]
    assert explain({v.name: v for v in vmrs}, {b"-4/done": ran()}, NOW) == {}


# --- any order of events

NAMES = [b"-100000/mv", b"-5/a", b"-5/b", b"-4/c", b"-4.0/d", b"1.5/e"]
QUIET = 10.0
MAX_REBOOTS = 2


@dataclasses.dataclass
class Attempt:
    trigger: Trigger
    holds: bool
    script: Identity
    boot: int
    running: bool = True
    asks: bool = False
    leaves_file: bool = False


class World(RuleBasedStateMachine):
    """A VM as the schedule sees it. What is asserted at each start is what no order of events may break."""

    @initialize(can_reboot=st.booleans(), names=st.sets(st.sampled_from(NAMES)))
    def begin(self, can_reboot: bool, names: set[bytes]) -> None:
        self.clock = 5.0
        self.boot = 1
        self.can_reboot = can_reboot
        self.held = False
        self.configured = False
        self.zero: Optional[float] = None
        self.since = self.clock
        self.vmrs: dict[bytes, Vmr] = {}
        self.attempts: dict[bytes, list[Attempt]] = {}
        self.gone: set[bytes] = set()
        self.fresh: set[bytes] = set()  # staged, or staged anew, and not started since
        self.identities = 0
        self.wake: Optional[float] = None
        for name in sorted(names):
            self.commit(name, Staging.READY)
        self.pump()

    # What happens to the VM

    @precondition(lambda self: len(self.vmrs) < len(NAMES))
    @rule(data=st.data(), settled=st.booleans())
    def move_in(self, data: st.DataObject, settled: bool) -> None:
        name = data.draw(st.sampled_from([name for name in NAMES if name not in self.vmrs]))
        self.commit(name, Staging.READY if settled else Staging.SETTLING)
        self.pump()

    @precondition(lambda self: len(self.vmrs) < len(NAMES))
    @rule(data=st.data())
    def make_directory(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([name for name in NAMES if name not in self.vmrs]))
        self.vmrs[name] = Vmr(name, Staging.STAGING, self.clock, None, None)
        self.pump()

    @precondition(lambda self: self.those(Staging.STAGING))
    @rule(data=st.data())
    def set_x_bit(self, data: st.DataObject) -> None:
        self.commit(data.draw(st.sampled_from(self.those(Staging.STAGING))), Staging.SETTLING)
        self.pump()

    @precondition(lambda self: self.those(Staging.SETTLING))
    @rule(data=st.data(), after=st.sampled_from([Staging.READY, Staging.READY, Staging.REFUSED]))
    def settle(self, data: st.DataObject, after: Staging) -> None:
        name = data.draw(st.sampled_from(self.those(Staging.SETTLING)))
        self.vmrs[name] = self.vmrs[name]._replace(staging=after)
        self.pump()

    @precondition(lambda self: self.those(Staging.READY))
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.those(Staging.READY)))
        self.vmrs[name] = self.vmrs[name]._replace(staging=Staging.SETTLING, changed=self.clock)
        self.pump()

    @precondition(lambda self: self.vmrs)
    @rule(data=st.data(), back=st.sampled_from(["", "same", "new"]))
    def move_away(self, data: st.DataObject, back: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.vmrs)))
        vmr = self.vmrs.pop(name)
        was_fresh = name in self.fresh
        self.fresh.discard(name)
        self.gone.add(name)
        self.pump()
        if back == "same":
            self.vmrs[name] = vmr._replace(changed=self.clock)
            # Edited since it ran, and then seen gone: nothing tells that from a new one.
            if was_fresh or (name in self.attempts and self.attempts[name][-1].script != vmr.script):
                self.fresh.add(name)
        elif back == "new":
            self.commit(name, Staging.READY)
        self.pump()

    def those(self, staging: Staging) -> list[bytes]:
        return sorted(name for name, vmr in self.vmrs.items() if vmr.staging is staging)

    def commit(self, name: bytes, staging: Staging) -> None:
        self.identities += 1
        self.vmrs[name] = Vmr(name, staging, self.clock, self.clock, (1, self.identities, 0))
        self.fresh.add(name)

    @precondition(lambda self: self.those(Staging.READY))
    @rule(data=st.data())
    def edit(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.those(Staging.READY)))
        was_fresh = name in self.fresh
        self.commit(name, Staging.READY)
        if not was_fresh and name not in self.gone:
            self.fresh.discard(name)
        self.pump()

    @precondition(lambda self: any(self.running()))
    @rule(data=st.data(), asks=st.booleans())
    def exit(self, data: st.DataObject, asks: bool) -> None:
        name, attempt = data.draw(st.sampled_from(sorted(self.running(), key=lambda row: row[0])))
        self.end(name, attempt, asks=asks)
        self.pump()

    def end(self, name: bytes, attempt: Attempt, *, asks: bool) -> None:
        attempt.running = False
        attempt.asks = asks and start_time_of(name) < 0 and attempt.trigger is not Trigger.RERUN
        self.since = self.clock

    @precondition(lambda self: self.can_rerun())
    @rule(data=st.data())
    def rerun(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.can_rerun()))
        script = self.vmrs[name].script
        assert script is not None
        self.attempts[name].append(Attempt(Trigger.RERUN, False, script, self.boot))
        self.pump()

    def can_rerun(self) -> list[bytes]:
        return [
            name
            for name, vmr in sorted(self.vmrs.items())
            if vmr.script is not None
            and (past := self.past(name)) is not None
            and not (past.any_running or past.gone)
        ]

    @rule()
    def toggle_hold(self) -> None:
        self.held = not self.held
        if not self.held:
            self.since = self.clock
        self.pump()

    @rule(after=st.floats(-100, 100))
    def set_zero(self, after: float) -> None:
        if self.zero is None:
            self.zero = self.clock + after
        self.pump()

    @rule(seconds=st.floats(0, 4))
    def wait(self, seconds: float) -> None:
        self.clock += seconds
        self.pump()

    @precondition(lambda self: self.wake is not None)
    @rule()
    def wait_until_due(self) -> None:
        assert self.wake is not None
        self.clock = max(self.clock, self.wake)
        self.pump()

    @rule(leaves_file=st.booleans())
    def power_cut(self, leaves_file: bool) -> None:
        self.reboot(leaves_file)
        self.pump()

    @rule()
    def daemon_restart(self) -> None:
        self.look_afresh()
        self.pump()

    def reboot(self, leaves_file: bool = False) -> None:
        for name, attempt in list(self.running()):  # each is lost; its record carries its own boot
            self.end(name, attempt, asks=leaves_file)
        self.boot += 1
        if self.zero is not None:
            self.zero -= self.clock + 15
        self.clock = 3.0
        self.look_afresh()

    def look_afresh(self) -> None:
        self.since = self.clock
        for name, vmr in self.vmrs.items():
            committed = None if vmr.committed is None else self.clock
            self.vmrs[name] = vmr._replace(changed=self.clock, committed=committed)

    # What the daemon does

    def running(self) -> Iterator[tuple[bytes, Attempt]]:
        for name, attempts in self.attempts.items():
            for attempt in attempts:
                if attempt.running:
                    yield name, attempt

    def past(self, name: bytes) -> Optional[Past]:
        attempts = self.attempts.get(name)
        if not attempts:
            return None
        scheduled = [a for a in attempts if a.trigger is not Trigger.RERUN][-1]
        return Past(
            attempts=len(attempts),
            running=scheduled.running,
            any_running=any(a.running for a in attempts),
            holds=scheduled.holds,
            asks_reboot=scheduled.asks,
            boot_id=str(scheduled.boot),
            reboots=sum(a.trigger is Trigger.REBOOT for a in attempts),
            script=attempts[-1].script,
            gone=name in self.gone,
        )

    def now(self) -> Now:
        return Now(
            boottime=self.clock,
            boot_id=str(self.boot),
            held=self.held,
            enabled=True,
            configured=self.configured,
            zero=self.zero,
            since=self.since,
            quiet=QUIET,
            max_reboots=MAX_REBOOTS,
            can_reboot=self.can_reboot,
        )

    def pump(self) -> None:
        """Decide until there is nothing more to do, as the daemon does after each event."""
        for _ in range(20):
            past = {name: p for name in self.attempts if (p := self.past(name)) is not None}
            done = {n for n, p in past.items() if not p.gone and not p.any_running and not p.asks_reboot}
            decision = decide(self.vmrs, past, self.now())
            slim = {name: vmr for name, vmr in self.vmrs.items() if name not in done}
            assert decide(slim, past, self.now()) == decision, "done VMRs may be left out"
            explain(self.vmrs, past, self.now())
            self.wake = decision.wake
            if not self.obey(decision, past):
                return
        raise AssertionError("deciding doesn't come to an end")

    def obey(self, decision: Decision, past: dict[bytes, Past]) -> bool:
        assert decision.configured >= self.configured, "configured stays so"
        assert not (decision.start and decision.reboot)
        for start in decision.start:
            self.start(start.vmr, start.trigger, start.holds, past)
        if decision.reboot:
            assert not self.held and not self.configured and self.can_reboot
            assert not any(a.holds for _, a in self.running()), "a reboot cuts no barrier short"
            assert all(past[name].reboots < MAX_REBOOTS for name in decision.reboot)
            self.reboot()
        became_configured = decision.configured and not self.configured
        if became_configured:
            self.check_configured(past)
            self.configured = True
        return bool(decision.start or decision.reboot or became_configured)

    def start(self, name: bytes, trigger: Trigger, holds: bool, past: dict[bytes, Past]) -> None:
        vmr, start_time = self.vmrs[name], start_time_of(name)
        assert not self.held
        assert vmr.staging is Staging.READY and vmr.script is not None
        assert name not in past or not past[name].any_running, "one attempt at a time"
        assert holds == (not self.configured)
        if start_time > 0:
            assert self.configured and self.zero is not None and self.clock >= self.zero + start_time
        elif not self.configured:
            others = {start_time_of(other) for other, a in self.running() if a.holds}
            assert others <= {start_time}, "a barrier is broken"
        if trigger is Trigger.REBOOT:
            before = past[name]
            assert before.asks_reboot and before.boot_id != str(self.boot) and not self.configured
            assert before.reboots < MAX_REBOOTS, "reboots are bounded"
        else:
            assert trigger is Trigger.SCHEDULE
            assert name in self.fresh, "runs twice without cause"
            self.fresh.discard(name)
        self.gone.discard(name)
        self.attempts.setdefault(name, []).append(Attempt(trigger, holds, vmr.script, self.boot))

    def check_configured(self, past: dict[bytes, Past]) -> None:
        assert not self.held
        assert self.clock >= self.since + QUIET
        assert not any(a.holds for _, a in self.running())
        assert self.vmrs or past
        for name, vmr in self.vmrs.items():
            if name in self.fresh and vmr.staging is not Staging.REFUSED:
                assert self.clock >= vmr.changed + QUIET
                assert start_time_of(name) > 0 or vmr.staging is not Staging.READY, "a negative VMR is left"

    def teardown(self) -> None:
        """Nothing is forgotten: left alone, everything staged runs, and the VM is configured."""
        if not hasattr(self, "vmrs"):
            return
        self.held, self.since = False, self.clock
        if self.zero is None:
            self.zero = self.clock
        for name in self.those(Staging.STAGING):
            self.commit(name, Staging.READY)
        for name in self.those(Staging.SETTLING):
            self.vmrs[name] = self.vmrs[name]._replace(staging=Staging.READY)
        for _ in range(20 * len(NAMES)):
            self.pump()
            running = list(self.running())
            for name, attempt in running:
                self.end(name, attempt, asks=False)
            if not running:
                if self.wake is None:
                    break
                self.clock = max(self.clock, self.wake)
        else:
            raise AssertionError("the schedule doesn't come to an end")
        assert not self.fresh.intersection(self.those(Staging.READY)), "forgotten"
        if self.vmrs or self.attempts:
            assert self.configured


TestAnyOrderOfEvents = World.TestCase
TestAnyOrderOfEvents.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def test_no_vmr_directory_is_a_dot_name() -> None:
    assert not is_vmr_directory(b".hold")
    assert is_vmr_directory(b"_1")
