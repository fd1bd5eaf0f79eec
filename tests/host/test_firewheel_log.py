"""FIREWHEEL's two formats, held against its own sample and against whatever a program may print."""

from __future__ import annotations

import ast
import io
import json
import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.host import said
from tests.host.said import ERR, OUT, SECOND, T
from vmr_agent.host import firewheel_log
from vmr_agent.host.firewheel_log import BLOCK_LIMIT, Origin
from vmr_agent.runs import Ending

ORIGIN = Origin(b"-4/compress.py", 1, 1281)
STAMP = "2024-06-06 00:43:06"
KEYS = {"timestamp": STAMP, "vmr": "-4/compress.py", "attempt": 1, "stream": "stdout"}


def rows(data: bytes, origin: Origin = ORIGIN) -> list[dict[str, Any]]:
    """The rows for some output, read as strictly as JSON can be read."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = firewheel_log.json_rows(T, origin, OUT, data).decode("ascii")
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.split("\n")[:-1]]


def msgs(data: bytes) -> list[Any]:
    return [row["msg"] for row in rows(data)]


def test_the_sample_of_firewheels_documentation_looks_the_same() -> None:
    traceback = (
        b"Traceback (most recent call last):\n"
        b'  File "/var/launch/-4/compress.py/compress.py", line 9, in <module>\n'
    )
    end = said.exit(value=1)
    log = (
        firewheel_log.start_lines(T, b"/var/launch/-4/compress.py/call_arguments.sh", 1281)
        + firewheel_log.exit_line(T + 2 * SECOND, ORIGIN, end)
        + firewheel_log.output_lines(T + 2 * SECOND, ORIGIN, ERR, traceback)
    )
    assert log.decode().splitlines() == [
        "[2024-06-06 00:43:06 GMT INFO] CALL ARGS: /var/launch/-4/compress.py/call_arguments.sh",
        "[2024-06-06 00:43:06 GMT INFO] PID returned: 1281",
        "[2024-06-06 00:43:08 GMT WARNING] compress.py (1281) exited after 2.074975 seconds with code: 1",
        "[2024-06-06 00:43:08 GMT INFO] compress.py (1281) stderr: b'Traceback (most recent call last):\\n"
        '  File "/var/launch/-4/compress.py/compress.py", line 9, in <module>\\n\'',
    ]


@pytest.mark.parametrize(
    ("ending", "line"),
    [
        ({"value": 0}, "INFO] compress.py (1281) exited after 2.074975 seconds with code: 0"),
        ({"value": 10}, "WARNING] compress.py (1281) exited after 2.074975 seconds with code: 10"),
        (
            {"ending": Ending.SIGNAL.value, "value": 9},
            "WARNING] compress.py (1281) exited after 2.074975 seconds with signal: SIGKILL",
        ),
        (
            {"ending": Ending.SIGNAL.value, "value": 40},
            "WARNING] compress.py (1281) exited after 2.074975 seconds with signal: SIGRTMIN+6",
        ),
        (
            {"ending": Ending.ERRNO.value, "value": 2, "text": "no interpreter '/bin/sh\\r'"},
            "WARNING] compress.py (1281) could not start: no interpreter '/bin/sh\\r'",
        ),
        (
            {"ending": Ending.LOST.value, "text": "the VM lost power\n[forged] line"},
            "WARNING] compress.py (1281) lost: the VM lost power\\n[forged] line",
        ),
    ],
)
def test_each_way_to_end_has_its_line(ending: dict[str, Any], line: str) -> None:
    text = firewheel_log.exit_line(T, ORIGIN, said.exit(**ending)).decode()
    assert text == f"[2024-06-06 00:43:06 GMT {line}\n"


def test_a_run_that_never_had_a_process_has_no_pid() -> None:
    origin = Origin(b"-4/compress.py", 1, 0)
    assert firewheel_log.start_lines(T, b"/x", 0).count(b"\n") == 1
    end = said.exit(ending=Ending.ERRNO.value, value=13, text="no permission")
    assert b"INFO" not in firewheel_log.exit_line(T, origin, end)
    assert b"] compress.py could not start: no permission\n" in firewheel_log.exit_line(T, origin, end)


def test_names_cannot_forge_lines() -> None:
    origin = Origin(b"5/x\n[2024-06-06 00:43:06 GMT INFO] \x1b[31m\xef", 1, 7)
    line = firewheel_log.output_lines(T, origin, OUT, b"\x1b[31m\n[forged\r")
    assert line.count(b"\n") == 1 and b"\x1b" not in line and b"\r" not in line
    (row,) = rows(b"x\n", origin)
    assert row["vmr"] == "5/x\\n[2024-06-06 00:43:06 GMT INFO] \\x1b[31m\\xef"


def test_much_output_is_split_between_lines() -> None:
    """A single line stays whole however long it is: the renderer cuts, not the format."""
    data = b"0123456789abcde\n" * 10_000 + b"x" * 100_000 + b"\nend\n"
    shown = firewheel_log.output_lines(T, ORIGIN, OUT, data).decode().splitlines()
    pieces = [ast.literal_eval(line.partition("stdout: ")[2]) for line in shown]
    assert b"".join(pieces) == data
    assert all(len(piece) <= BLOCK_LIMIT or piece.count(b"\n") == 1 for piece in pieces)
    assert all(piece.endswith(b"\n") for piece in pieces)


@pytest.mark.parametrize(
    ("line", "row"),
    [
        (b"plain words", {"msg": "plain words"}),
        (b"  padded\t", {"msg": "padded"}),
        (b"42", {"msg": 42}),
        (b"-1.5e3", {"msg": -1500.0}),
        (b"null", {"msg": None}),
        (b"true", {"msg": True}),
        (b"[1]", {"msg": [1]}),
        (b'"text"', {"msg": "text"}),
        (b'{"a":1}', {"a": 1}),
        (b'  {"a":1} ', {"a": 1}),
        (b'{"timestamp": "mine", "a": 1}', {"a": 1}),
        (b'{"vmr": "mine", "attempt": null, "stream": 3}', {"vmr": "mine", "attempt": None, "stream": 3}),
        (b'{"a": 1, "a": 2}', {"a": 2}),
        (b'{"a": NaN}', {"a": None}),
        (b'{"a": Infinity, "b": -Infinity}', {"a": "Infinity", "b": "-Infinity"}),
        (b"NaN", {"msg": "NaN"}),
        (b"Infinity", {"msg": "Infinity"}),
        (b"1e400", {"msg": "1e400"}),
        (b'{"a": 1e400}', {"a": "1e400"}),
        (b"9223372036854775807", {"msg": 2**63 - 1}),
        (b"9223372036854775808", {"msg": "9223372036854775808"}),
        (b"-9223372036854775808", {"msg": -(2**63)}),
        (b"9" * 5000, {"msg": "9" * 5000}),
        (b'{"a": ' + b"9" * 5000 + b"}", {"a": "9" * 5000}),
        (b'{"a": "\\ud800", "\\udc00b": 1}', {"a": "\\ud800", "\\udc00b": 1}),
        (b'{"a": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
        (b"caf\xc3\xa9", {"msg": "caf\u00e9"}),
        (b"not utf-8: \xef", {"msg": "not utf-8: \\xef"}),
        (b'{"a": "\xef"}', {"msg": '{"a": "\\xef"}'}),
        (b"\xef\xbb\xbf{}", {"msg": "\ufeff{}"}),
        (b"\x1b[31mred\x1b[0m", {"msg": "\x1b[31mred\x1b[0m"}),
        (b"nul \x00 and \x7f", {"msg": "nul \x00 and \x7f"}),
        (b'say "hi" \\ there', {"msg": 'say "hi" \\ there'}),
        (b"{not json}", {"msg": "{not json}"}),
        (b"[INFO] [not json]", {"msg": "[INFO] [not json]"}),
        (b"2024-01-01", {"msg": "2024-01-01"}),
        (b"007", {"msg": "007"}),
        (b"1_000", {"msg": "1_000"}),
        (b"a\x0bb\x0cc\x1cd\xc2\x85e\xe2\x80\xa8f", {"msg": "a\x0bb\x0cc\x1cd\x85e\u2028f"}),
        (b"[" * 100_000 + b"]" * 100_000, {"msg": "[" * 100_000 + "]" * 100_000}),
        (b"[" * 500 + b"]" * 500, {"msg": "[" * 500 + "]" * 500}),
    ],
)
def test_a_line_becomes_a_row(line: bytes, row: dict[str, Any]) -> None:
    """Each of these broke FIREWHEEL's own reader, or pandas, or looks like something it isn't."""
    assert rows(line + b"\n") == [{**KEYS, **row}]
    # Between plain lines, where a whole block might take the fast path, it means the same.
    assert rows(b"plain\n" + line + b"\nplain\n")[1] == {**KEYS, **row}


def test_blank_lines_make_no_row() -> None:
    assert rows(b"") == rows(b"\n") == rows(b" \t\n\r\n\r\n\n") == []
    assert msgs(b"a\n\nb\n \nc\n") == ["a", "b", "c"]


def test_lines_end_as_bytes_splitlines_ends_them() -> None:
    assert msgs(b"a\rb\r\nc\nd") == ["a", "b", "c", "d"]


@given(st.binary())
@example(b'{"\\ud800":1e999}\n')
@example(b"\r\n\r")
def test_whatever_is_printed_gives_valid_rows(data: bytes) -> None:
    for row in rows(data):
        assert row["timestamp"] == STAMP and "vmr" in row
    text = firewheel_log.output_lines(T, ORIGIN, OUT, data)
    assert text.count(b"\n") == 1 and text[:-1].decode("ascii").isprintable()
    assert ast.literal_eval(text.decode().partition("stdout: ")[2]) == data


_PLAIN_LINES = st.lists(st.text("ab1-.eE+[]tfn ul", max_size=6))


@given(_PLAIN_LINES)
def test_the_fast_path_and_the_other_agree(lines: list[str]) -> None:
    """One byte that isn't plain sends the same lines through the slow path."""
    data = "".join(f"{line}\n" for line in lines).encode()
    assert rows(data) == rows(data + "\u00e9\n".encode())[:-1]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), _JSON, max_size=5))
def test_an_object_keeps_its_keys(value: dict[str, Any]) -> None:
    def finite(item: Any) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            return None if math.isnan(item) else ("Infinity" if item > 0 else "-Infinity")
        if isinstance(item, list):
            return [finite(each) for each in item]
        return {key: finite(each) for key, each in item.items()} if isinstance(item, dict) else item

    (row,) = rows(json.dumps(value).encode() + b"\n")
    assert row == {**KEYS, **finite(value), "timestamp": STAMP}


def test_pandas_loads_the_rows() -> None:
    pandas = pytest.importorskip("pandas")
    data = b"\n".join(
        (
            b"plain",
            b"42",
            b"null",
            b"[1]",
            b'{"a": 1}',
            b'{"a": NaN, "timestamp": 5}',
            b"99999999999999999999",
            b'{"a": 99999999999999999999, "b": 1e999, "c": "\\ud800"}',
            b"[" * 2000 + b"]" * 2000,
            b"\xef\x00\x1b",
        )
    )
    text = firewheel_log.json_rows(T, ORIGIN, OUT, data).decode()
    frame = pandas.read_json(io.StringIO(text), lines=True)
    assert len(frame) == 10
    assert str(frame["timestamp"].iloc[0]) == STAMP and frame["timestamp"].notna().all()
    assert set(frame["stream"]) == {"stdout"}


@pytest.mark.parametrize("ns", [-(2**70), -1, 0, 2**63 - 1, 2**70])
def test_a_guests_clock_may_say_anything(ns: int) -> None:
    assert len(firewheel_log.stamp(ns)) == len(STAMP)
