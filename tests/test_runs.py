"""The names that files get, and the exit record's map."""

from __future__ import annotations

import json
import signal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vmr_agent.runs import (
    Ending,
    RunResult,
    Rusage,
    path_segment,
    result_from_json,
    result_to_json,
    run_path,
    signal_name,
    timestamp,
)

NAMES = st.one_of(st.binary(max_size=300), st.text(".%~-a/", max_size=300).map(str.encode))
INTEGERS = st.integers(0, 2**63 - 1)
RESULTS = st.builds(
    RunResult,
    ending=st.sampled_from(Ending),
    value=st.integers(0, 255),
    text=st.text(),
    started_ns=INTEGERS,
    ended_ns=INTEGERS,
    started_boottime_ns=INTEGERS,
    ended_boottime_ns=INTEGERS,
    boot_id=st.text(),
    stdout=INTEGERS,
    stderr=INTEGERS,
    rusage=st.builds(Rusage, st.floats(0, 1e9), st.floats(0, 1e9), INTEGERS),
    asks_reboot=st.booleans(),
)


@given(NAMES, NAMES)
def test_two_names_get_two_segments(one: bytes, other: bytes) -> None:
    assume(one != other)
    assert path_segment(one) != path_segment(other)


@given(st.binary(min_size=1, max_size=300))
def test_a_name_gets_another_segment_than_its_encoded_self(name: bytes) -> None:
    segment = path_segment(name)
    assert segment.encode() == name or path_segment(segment.encode()) != segment


@given(NAMES.filter(bool))
def test_a_segment_is_one_path_component_on_any_file_system(name: bytes) -> None:
    segment = path_segment(name)
    assert segment.isascii()
    assert segment not in ("", ".", "..")
    assert len(segment) <= 200
    assert not set(segment) & set('/\\\0:*?"<>| \n')


@pytest.mark.parametrize(
    ("name", "segment"),
    [
        (b"-4", "-4"),
        (b"compress.py", "compress.py"),
        (b"a b", "a%20b"),
        (b"\xff", "%FF"),
        (b"50%", "50%25"),
        (b".", "%2E"),
        (b"..", "%2E%2E"),
        (b"...", "..."),
        (b"x" * 200, "x" * 200),
    ],
)
def test_segments(name: bytes, segment: str) -> None:
    assert path_segment(name) == segment


def test_a_long_name_is_cut_and_keeps_its_digest() -> None:
    segment = path_segment(b"x" * 201)
    assert segment[:162] == "x" * 160 + "%~"
    assert len(segment) == 194


def test_run_path_has_three_segments_whatever_the_name() -> None:
    assert run_path(b"-4/compress.py", 2) == "-4/compress.py/2"
    assert run_path(b"10.5/..\n", 1) == "10.5/..%0A/1"


@given(RESULTS)
def test_a_result_survives_the_exit_record(result: RunResult) -> None:
    assert result_from_json(json.loads(json.dumps(result_to_json(result)))) == result


@given(RESULTS, st.data())
def test_a_map_that_lacks_a_field_is_no_result(result: RunResult, data: st.DataObject) -> None:
    row = result_to_json(result)
    del row[data.draw(st.sampled_from(sorted(row)))]
    with pytest.raises((KeyError, TypeError, ValueError)):
        result_from_json(row)


@given(RESULTS)
def test_a_duration_is_never_negative(result: RunResult) -> None:
    assert result.duration_s >= 0
    assert (result.exit_code is not None) == (result.ending is Ending.CODE)


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (signal.SIGTERM, "SIGTERM"),
        (signal.SIGRTMIN, "SIGRTMIN"),
        (signal.SIGRTMIN + 6, "SIGRTMIN+6"),
        (signal.SIGRTMAX, "SIGRTMAX"),
        (signal.SIGRTMAX + 1, f"signal {signal.SIGRTMAX + 1}"),
        (0, "signal 0"),
    ],
)
def test_each_signal_has_a_name(number: int, name: str) -> None:
    assert signal_name(number) == name


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (1_717_634_586 * 10**9 + 5_999, "2024-06-06T00:43:06.000005Z"),
        (0, "1970-01-01T00:00:00.000000Z"),
        (-1, "1969-12-31T23:59:59.999999Z"),
        (-(2**80), "0001-01-01T00:00:00."),
        (2**80, "9999-12-31T23:59:59."),
    ],
)
def test_a_time_has_six_digits_whatever_a_guest_claims(ns: int, text: str) -> None:
    assert timestamp(ns).startswith(text) and len(timestamp(ns)) == 27
