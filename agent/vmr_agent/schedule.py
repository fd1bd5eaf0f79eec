"""What lives here: VMR names, the order of start times, and which VMRs start next. Pure functions.

It must not know: files, processes, clocks, the host. What they say comes in as values (:class:`Vmr`,
:class:`Past`, :class:`Now`), so every barrier rule is tested without a process.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple, Optional, Union

from vmr_agent.errors import show
from vmr_agent.runs import Trigger

StartTime = Union[int, float]

Identity = tuple[int, int, int]
"""(st_dev, st_ino, st_ctime_ns) of a ``call_arguments.sh``."""

MAX_START_TIME = 10**9
_MAX_TEXT = 32  # the longest str() of such a number has 24 characters; int() of a long text is quadratic
_NAME_MAX = 255  # Linux


def parse_start_time(text: bytes) -> Optional[StartTime]:
    """The start time that a directory name says, or None.

    FIREWHEEL writes ``str()`` of a number. Only exactly that is taken, so no two texts mean the same int or
    float: ``+4``, ``04``, ``1_0`` and ``nan`` are no start times. Zero is forbidden there and here.
    """
    if not text.isascii() or len(text) > _MAX_TEXT:
        return None
    word = text.decode("ascii")
    number: StartTime
    try:
        number = int(word)
    except ValueError:
        try:
            number = float(word)
        except ValueError:
            return None
    if number == 0 or not math.isfinite(number) or abs(number) > MAX_START_TIME or str(number) != word:
        return None
    return number


def is_vmr_directory(name: bytes) -> bool:
    """Whether a directory of this name below a start time is a VMR: any name Linux allows but dot names."""
    return 0 < len(name) <= _NAME_MAX and name[:1] != b"." and b"/" not in name and b"\0" not in name


def parse_vmr(text: bytes) -> Optional[bytes]:
    """The VMR name in what somebody typed or sent (one ``/`` at the end is forgiven), or None."""
    start_time, _, directory = text.partition(b"/")
    if directory.endswith(b"/"):
        directory = directory[:-1]
    if parse_start_time(start_time) is None or not is_vmr_directory(directory):
        return None
    return start_time + b"/" + directory


@lru_cache(maxsize=1 << 14)
def _number(text: bytes) -> StartTime:
    number = parse_start_time(text)
    if number is None:
        raise ValueError(f"no start time: {show(text)}")
    return number


def start_time_of(vmr: bytes) -> StartTime:
    """The start time of a VMR name; ValueError when it has none."""
    return _number(vmr[: vmr.find(b"/")])


def sort_key(vmr: bytes) -> tuple[StartTime, bytes]:
    """The order in which the schedule runs VMRs, and in which they are listed."""
    return (start_time_of(vmr), vmr)


def near(vmr: bytes, known: Iterable[bytes], *, otherwise: str = "vmr-agent status lists them") -> str:
    """A hint for somebody who named a VMR that there isn't: those he may have meant."""
    import difflib  # only for a name that was mistyped

    names, named = [show(each) for each in known], show(vmr)
    if named in names:
        return f"bytes shown as \\x.. or \\n are typed $'{named}'"  # bash's way to say any byte
    found = difflib.get_close_matches(named, names, n=3, cutoff=0.4)
    if not found:  # the same directory name at another time
        found = [each for each in names if each.rpartition("/")[2] == named.rpartition("/")[2]][:3]
    return f"did you mean {' or '.join(found)}?" if found else otherwise


class Staging(enum.Enum):
    """How far a VMR's directory is."""

    STAGING = "staging"
    """No script yet, or its owner x bit isn't set."""
    SETTLING = "settling"
    """The x bit is set, and something changed within ``settle``, or the script is being mended."""
    READY = "ready"
    REFUSED = "refused"


class Vmr(NamedTuple):
    """One VMR as staged."""

    name: bytes
    staging: Staging
    changed: float
    """CLOCK_BOOTTIME, s, when a change under it was last seen."""
    committed: Optional[float]
    """CLOCK_BOOTTIME, s, since when its x bit has been seen; None before."""
    script: Optional[Identity]
    reason: str = ""
    """Why it is refused."""


class Past(NamedTuple):
    """What the schedule must know of one VMR's runs. A *scheduled* attempt is one not started by a rerun."""

    attempts: int
    """Number of the latest attempt of any kind; 0: none."""
    running: bool
    """The latest scheduled attempt has not exited."""
    any_running: bool
    """Some attempt, also a rerun, has not exited."""
    holds: bool
    """The latest scheduled attempt holds its barrier."""
    asks_reboot: bool
    """The latest scheduled attempt has exited, or is lost, and asks for a reboot."""
    boot_id: str
    """The boot in which that attempt's result was made."""
    reboots: int
    """How many of the VMR's attempts were started for a reboot."""
    script: Optional[Identity]
    """The script's identity when the latest attempt was made."""
    gone: bool
    """The VMR was seen gone since the latest attempt."""


class Now(NamedTuple):
    """The moment: what the clock, the host, the settings and ``.hold`` say."""

    boottime: float
    """CLOCK_BOOTTIME, s, as are all times here."""
    boot_id: str
    held: bool
    enabled: bool
    """The setting ``schedule``."""
    configured: bool
    """Recorded as configured, durably."""
    zero: Optional[float]
    since: float
    """``quiet`` counts from here at the earliest: the daemon's start, the last run's end, the hold's end."""
    quiet: float = 10.0
    max_reboots: int = 10
    can_reboot: bool = True


class Start(NamedTuple):
    vmr: bytes
    trigger: Trigger
    clear_reboot: bool
    """Remove the file ``reboot`` first: the reboot it asked for has happened."""
    holds: bool
    """The barrier of its start time waits for this run."""


class Decision(NamedTuple):
    start: tuple[Start, ...]
    configured: bool
    """When this is news, record it and decide again: nothing starts on the strength of it before."""
    reboot: tuple[bytes, ...]
    """Who asks for the reboot to be done now; empty: none is to be done."""
    given_up: tuple[bytes, ...]
    """Who asked for a reboot and gets none; their results stand. Named in each decision."""
    wake: Optional[float]
    """When deciding again can change something though nothing has happened."""


class _Survey:
    """The VMRs sorted by what the schedule can do with them; made in one pass, for there may be thousands."""

    def __init__(self, *, still: float) -> None:
        self.holding: list[bytes] = []
        """Runs that a barrier waits for."""
        self.negative: list[tuple[StartTime, bytes]] = []
        """READY, and nothing but its turn is missing; also those that start again after a reboot."""
        self.positive: list[tuple[StartTime, bytes]] = []
        self.own_run: list[bytes] = []
        """As ``negative`` and ``positive``, but an earlier attempt is still in progress."""
        self.settling: list[tuple[StartTime, bytes, float]] = []
        """Negative, and until when a start time waits for it."""
        self.staging: list[bytes] = []
        """Not READY, and has not run."""
        self.again: set[bytes] = set()
        """Those of ``negative`` and ``own_run`` that start because the reboot they asked for has happened."""
        self.asking: list[bytes] = []
        """Ask for a reboot of this boot, and are to get it."""
        self.given_up: list[bytes] = []
        self.still = still
        """When all that has not run will have been unchanged for ``quiet``, if nothing changes any more."""


def _survey(vmrs: Mapping[bytes, Vmr], past: Mapping[bytes, Past], now: Now) -> _Survey:
    found = _Survey(still=now.since + now.quiet)
    changed = now.since
    for name, vmr in vmrs.items():
        before = past.get(name)
        if before is not None and not _is_new(vmr, before):
            continue
        if vmr.staging is Staging.REFUSED:
            continue
        if vmr.changed > changed:
            changed = vmr.changed
        if vmr.staging is Staging.READY:
            if before is not None and before.any_running:
                found.own_run.append(name)
            elif (start_time := start_time_of(name)) < 0:
                found.negative.append((start_time, name))
            else:
                found.positive.append((start_time, name))
            continue
        found.staging.append(name)
        if vmr.staging is Staging.SETTLING:
            _note_settling(found, vmr, now)
    found.still = max(found.still, changed + now.quiet)
    for name, before in past.items():
        if before.running:
            if before.holds:
                found.holding.append(name)
        elif before.asks_reboot:
            _survey_asker(found, name, before, vmrs.get(name), now)
    return found


def _is_new(vmr: Vmr, before: Past) -> bool:
    """Whether what is staged has yet to run; an edit, or moving it away and back, makes nothing new."""
    return before.attempts == 0 or (before.gone and vmr.script != before.script)


def _note_settling(found: _Survey, vmr: Vmr, now: Now) -> None:
    # Counted from the x bit, not from the last change: a file written to for ever must not stop the schedule.
    deadline = (vmr.changed if vmr.committed is None else vmr.committed) + now.quiet
    start_time = start_time_of(vmr.name)
    if start_time < 0 and now.boottime < deadline:
        found.settling.append((start_time, vmr.name, deadline))


def _survey_asker(found: _Survey, name: bytes, before: Past, vmr: Optional[Vmr], now: Now) -> None:
    # The cases, for a VMR whose latest scheduled attempt asks for a reboot:
    #   positive time, or staged anew since          the question is moot
    #   VM configured, or asked too often            it gets none
    #   this boot, and a reboot can be done          reboot, even if the VMR itself has vanished since
    #   this boot, and none can be done              it gets none
    #   another boot: it has happened, by whomever   the next attempt, when it is READY
    # No other state is kept, so an asker that got none starts again if the VM is rebooted all the same.
    start_time = start_time_of(name)
    if start_time > 0 or (vmr is not None and _is_new(vmr, before)):
        return
    same_boot = before.boot_id == now.boot_id
    if now.configured or before.reboots >= now.max_reboots or (same_boot and not now.can_reboot):
        found.given_up.append(name)
    elif same_boot:
        found.asking.append(name)
    elif vmr is not None and vmr.staging is Staging.READY:
        found.again.add(name)
        if before.any_running:
            found.own_run.append(name)
        else:
            found.negative.append((start_time, name))
    elif vmr is not None and vmr.staging is not Staging.REFUSED:
        found.still = max(found.still, vmr.changed + now.quiet)
        found.staging.append(name)
        if vmr.staging is Staging.SETTLING:
            _note_settling(found, vmr, now)


def _turn(found: _Survey) -> Optional[StartTime]:
    """Before the VM is configured: the negative time whose turn it is; None when none has anything to do."""
    # A time that asks for a reboot keeps its turn: a lower one that came meanwhile would else be rebooted
    # away, or put the reboot off.
    for names in (found.holding, found.asking):
        if names:
            return min(map(start_time_of, names))
    return min(found.negative)[0] if found.negative else None


def decide(vmrs: Mapping[bytes, Vmr], past: Mapping[bytes, Past], now: Now) -> Decision:
    """What to do now.

    ``vmrs`` are those staged; ones that are done (have run, don't run, don't ask) may be left out.
    """
    found = _survey(vmrs, past, now)
    start: list[bytes] = []
    reboot: list[bytes] = []
    configured = now.configured
    wake: Optional[float] = None

    if not now.enabled or now.held:
        # Switched off, something else executes the schedule, and only that knows when the VM is configured;
        # the host would start the experiment on our word. Held, more is about to come. No reboot either: it
        # would cut short whatever goes on under the hold.
        pass
    elif now.configured:
        start += [name for _, name in found.negative]
        if now.zero is not None:
            for start_time, name in found.positive:
                due = now.zero + start_time
                if due <= now.boottime:
                    start.append(name)
                elif wake is None or due < wake:
                    wake = due
    elif (turn := _turn(found)) is not None:
        awaited = [until for start_time, _, until in found.settling if start_time <= turn]
        if found.holding:
            # One joins the barrier of its own time; a barrier of two times can't be, and nothing joins it.
            if all(start_time_of(name) == turn for name in found.holding):
                start += [name for start_time, name in found.negative if start_time == turn]
        elif awaited:
            wake = max(awaited)
        else:
            start += [name for start_time, name in found.negative if start_time == turn]
            if not start:
                reboot = found.asking
    elif not vmrs and not past:
        # FIREWHEEL stages seconds to minutes after boot: a VM that called itself configured while nothing was
        # ever staged would then run its negative times with no barrier.
        pass
    elif not any(start_time_of(name) < 0 for name in found.own_run):
        if found.still <= now.boottime:
            configured = True
            wake = now.boottime
        else:
            wake = found.still

    return Decision(
        start=tuple(
            Start(
                vmr=name,
                trigger=Trigger.REBOOT if name in found.again else Trigger.SCHEDULE,
                clear_reboot=name in found.again,
                holds=not now.configured,
            )
            for name in sorted(start, key=sort_key)
        ),
        configured=configured,
        reboot=tuple(sorted(reboot, key=sort_key)),
        given_up=tuple(sorted(found.given_up, key=sort_key)),
        wake=wake,
    )


def explain(vmrs: Mapping[bytes, Vmr], past: Mapping[bytes, Past], now: Now) -> Mapping[bytes, str]:
    """For each VMR that has yet to run (or to run again after a reboot), why it isn't running, in a phrase.

    Apart from :func:`decide`, which is called after each exit and has no use for the words.
    """
    found = _survey(vmrs, past, now)
    why: dict[bytes, str] = {}
    for name in found.staging:
        why[name] = "settling" if vmrs[name].staging is Staging.SETTLING else "being staged"
    for name in found.own_run:
        why[name] = "waits for its earlier run to exit"
    turn = None if now.configured else _turn(found)
    if turn is None:
        why.update((name, "about to start") for _, name in found.negative)
    else:
        awaited = [] if found.holding else [name for at, name, _ in found.settling if at <= turn]
        ahead = found.holding or awaited
        if not ahead and found.asking:
            obstacle = "waits for a reboot"
        else:
            obstacle = "waits for " + show(min(ahead or (name for _, name in found.negative), key=sort_key))
        for start_time, name in found.negative:
            why[name] = "about to start" if start_time == turn and not awaited else obstacle
    for start_time, name in found.positive:
        if not now.configured:
            why[name] = "waits for the VM to be configured"
        elif now.zero is None:
            why[name] = "waits for time zero"
        elif now.boottime < now.zero + start_time:
            why[name] = f"at {start_time} s after time zero"
        else:
            why[name] = "about to start"
    if standstill(held=now.held, enabled=now.enabled):
        word = standstill(held=now.held, enabled=now.enabled)
        for name in (name for _, name in found.negative + found.positive):
            why[name] = word
    return why


def standstill(*, held: bool, enabled: bool) -> str:
    """Why nothing at all is started, in a phrase; empty when something may be."""
    if not enabled:
        return "schedule is off"
    return "held" if held else ""
