"""What lives here: the words for one run (its name, its streams, how it ended) and the names its files get.

Guest and host both speak them. It must not know: where anything is stored, or how it travels; no I/O.
"""

from __future__ import annotations

import datetime
import enum
import signal
import string
from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

RunId = bytes
"""16 random bytes, made with the run's directory; names the run on the wire and for ever."""


class Stream(enum.IntEnum):
    """One of a run's two streams. The values are on the wire and in the spool's index."""

    STDOUT = 1
    STDERR = 2

    @property
    def filename(self) -> str:
        return "stdout" if self is Stream.STDOUT else "stderr"


class RunState(enum.IntEnum):
    """How much of a run the host holds durably. The order is the order in which a run gets there."""

    NONE = 0
    STARTED = 1
    EXITED = 2
    CLOSED = 3


class Trigger(enum.Enum):
    """Why a run was started."""

    SCHEDULE = "schedule"
    RERUN = "rerun"
    HOST = "host"
    REBOOT = "reboot"


SCHEDULED = (Trigger.SCHEDULE, Trigger.REBOOT)
"""Those by which the schedule starts runs; the others are people's."""


class Ending(enum.Enum):
    """Which of the four ways a run can end; exactly one field of :class:`RunResult` belongs to each."""

    CODE = "code"
    SIGNAL = "signal"
    ERRNO = "errno"
    LOST = "lost"


class RunInfo(NamedTuple):
    """What is known of a run before it starts; the content of ``run.json``."""

    run: RunId
    vmr: bytes
    attempt: int
    trigger: Trigger
    boot_id: str
    created_ns: int
    """Wall clock, ns."""
    request: bytes = b""
    """The id of the request that asked for it, empty when none did."""
    script: tuple[int, int, int] = (0, 0, 0)
    """(device, inode, ctime ns) of ``call_arguments.sh`` when the run was made: tells a new VMR from an edited one."""
    holds: bool = False
    """Whether the barrier of its start time waits for this run."""
    number: int = 0
    """The how-manieth run of this VMR asked for by a reboot (0: none); bounds reboot loops."""
    scheduled: Optional[int] = None
    """The attempt that the schedule started last, this one counted; 0: none; None: whoever made it didn't know."""
    reboots: int = 0
    """The largest ``number`` up to this one, where ``scheduled`` is known."""

    def after(self, latest: Optional[RunInfo]) -> RunInfo:
        """The same, with what it has from the VMR's run before it; None: from none that can be read."""
        known = self.attempt == 1 if latest is None else latest.scheduled is not None
        if not known:
            return self
        before, reboots = (0, 0) if latest is None else (latest.scheduled, latest.reboots)
        return self._replace(
            scheduled=self.attempt if self.trigger in SCHEDULED else before,
            reboots=max(reboots, self.number),
        )


class Started(NamedTuple):
    """The script's process, written before it is let go; the content of ``started``."""

    pid: int
    ticks: int
    """Start time of the process in clock ticks since boot, field 22 of ``/proc/<pid>/stat``."""
    boot_id: str
    wall_ns: int
    boottime_ns: int


class Rusage(NamedTuple):
    user_s: float = 0.0
    system_s: float = 0.0
    max_rss_bytes: int = 0


class RunResult(NamedTuple):
    """How a run ended: exit code *or* signal *or* could-not-start errno *or* lost with a reason."""

    ending: Ending
    value: int
    """The exit code, the signal's number or the errno; 0 for a lost run."""
    text: str
    """The sentence that names the cause, for ``ERRNO`` and ``LOST``; else empty."""
    started_ns: int
    ended_ns: int
    """Wall clock, ns."""
    started_boottime_ns: int
    ended_boottime_ns: int
    """CLOCK_BOOTTIME, ns: what durations are made of, since the wall clock may be set in mid-run."""
    boot_id: str
    stdout: int
    stderr: int
    """Bytes of each stream counted when the process had exited and its pipes were drained."""
    rusage: Rusage = Rusage()
    asks_reboot: bool = False

    @property
    def duration_s(self) -> float:
        return max(0, self.ended_boottime_ns - self.started_boottime_ns) / 1e9

    @property
    def exit_code(self) -> Optional[int]:
        return self.value if self.ending is Ending.CODE else None


def result_to_json(result: RunResult) -> dict[str, Any]:
    """The map in ``exit.json`` (:func:`result_from_json` reads it back)."""
    return {
        "ending": result.ending.value,
        "value": result.value,
        "text": result.text,
        "started_ns": result.started_ns,
        "ended_ns": result.ended_ns,
        "started_boottime_ns": result.started_boottime_ns,
        "ended_boottime_ns": result.ended_boottime_ns,
        "boot_id": result.boot_id,
        "stdout": result.stdout,
        "stderr": result.stderr,
        "user_s": result.rusage.user_s,
        "system_s": result.rusage.system_s,
        "max_rss_bytes": result.rusage.max_rss_bytes,
        "asks_reboot": result.asks_reboot,
    }


def result_from_json(row: Mapping[str, Any]) -> RunResult:
    """Read what :func:`result_to_json` wrote.

    Raises KeyError, TypeError or ValueError when the map is not one.
    """
    return RunResult(
        ending=Ending(row["ending"]),
        value=whole(row["value"]),
        text=word(row["text"]),
        started_ns=whole(row["started_ns"]),
        ended_ns=whole(row["ended_ns"]),
        started_boottime_ns=whole(row["started_boottime_ns"]),
        ended_boottime_ns=whole(row["ended_boottime_ns"]),
        boot_id=word(row["boot_id"], most=256),
        stdout=whole(row["stdout"]),
        stderr=whole(row["stderr"]),
        rusage=Rusage(_seconds(row["user_s"]), _seconds(row["system_s"]), whole(row["max_rss_bytes"])),
        asks_reboot=bool(row["asks_reboot"]),
    )


def started_from_json(row: Mapping[str, Any]) -> Started:
    """The map ``process`` in ``started``. Raises KeyError, TypeError or ValueError when it is none."""
    return Started(
        pid=whole(row["pid"]),
        ticks=whole(row["ticks"]),
        boot_id=word(row["boot_id"], most=256),
        wall_ns=whole(row["wall_ns"]),
        boottime_ns=whole(row["boottime_ns"]),
    )


# What a damaged disk makes of a record may still be JSON. What comes of it is sent: a number or a text that no
# message can hold must not get that far.


def whole(value: Any) -> int:
    """A count or a time read from a file. Raises ValueError for what is none."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("no count")
    return value


def word(value: Any, *, most: int = 1 << 20) -> str:
    """A text read from a file. Raises ValueError for what is none, is longer, or has halves of surrogate pairs."""
    if type(value) is not str or len(value.encode()) > most:
        raise ValueError("no text")
    return value


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not 0 <= seconds <= 10**9:
        raise ValueError("no time")
    return seconds


# DESIGN "Names": what a path segment may hold unescaped. Everything else, and "%" itself, is written %XX, so
# the map from names to segments is one to one.
_PLAIN = frozenset((string.ascii_letters + string.digits + "._-+@=,").encode())
_MAX_SEGMENT = 200  # NAME_MAX is 255; the rest is room for suffixes of temporary files
_KEPT = 160


def path_segment(name: bytes) -> str:
    """A name as one path segment, safe on every file system and one to one.

    ``.`` and ``..`` become ``%2E`` and ``%2E%2E``; a segment over 200 bytes becomes its first 160, ``%~`` and
    32 hex digits of its SHA-256.
    """
    if name in (b".", b".."):
        return "%2E" * len(name)
    segment = "".join(chr(b) if b in _PLAIN else f"%{b:02X}" for b in name)
    if len(segment) > _MAX_SEGMENT:
        import hashlib  # half a megabyte of memory, for names hardly anybody gives

        segment = segment[:_KEPT] + "%~" + hashlib.sha256(segment.encode()).hexdigest()[:32]
    return segment


def run_path(vmr: bytes, attempt: int) -> str:
    """``<start time>/<name>/<attempt>``, each encoded: where a run lies in the spool and in the log directory."""
    start_time, _, name = vmr.partition(b"/")
    return f"{path_segment(start_time)}/{path_segment(name)}/{attempt}"


def signal_name(number: int) -> str:
    """A signal as every row and log has it: SIGTERM, SIGRTMIN+6; signal 0, for a number that is none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        # Python names only the ends of the real-time range.
        if signal.SIGRTMIN < number < signal.SIGRTMAX:
            return f"SIGRTMIN+{number - signal.SIGRTMIN}"
        return f"signal {number}"


def timestamp(wall_ns: int) -> str:
    """A wall-clock time as every ``--json`` writes it: UTC, always six digits.

    A guest may claim any time; one that no calendar has is shown as the nearest there is.
    """
    seconds, ns = divmod(wall_ns, 10**9)
    seconds = min(max(seconds, -62_135_596_800), 253_402_300_799)  # the years 1 to 9999
    moment = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=seconds)
    return f"{moment.isoformat(timespec='seconds')}.{ns // 1000:06d}Z"
