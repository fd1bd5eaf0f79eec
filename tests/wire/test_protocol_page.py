"""PROTOCOL.md held against the code: its tables, its limits, its list of vectors."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import NamedTuple

import pytest

from vmr_agent import runs
from vmr_agent.wire import framing, messages, session

PAGE = (Path(messages.__file__).parent / "PROTOCOL.md").read_text()
FLAT = " ".join(PAGE.split())
VERSION = int(re.findall(r"^Version (\d+)\.", PAGE, re.M)[0])
HEADING = re.compile(r"### (\w+) \(`(\w+)`, ([GH ]+), since (\d+)\)")


class Section(NamedTuple):
    """One message of section 4."""

    title: str
    type: str
    sender: str
    since: int
    rows: list[tuple[str, str]]


def tables(text: str) -> list[list[list[str]]]:
    """The tables in a text, as rows of cells, without the line of dashes."""
    found: list[list[list[str]]] = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        assert all(set(cell) <= {"-"} for cell in rows[1])
        assert len({len(row) for row in rows}) == 1, rows
        found.append([rows[0], *rows[2:]])
    return found


def chapter(number: int) -> str:
    """A numbered section."""
    (text,) = re.findall(rf"^## {number}\. .*?(?=^## |\Z)", PAGE, re.M | re.S)
    return str(text)


def sections() -> list[Section]:
    """The messages of section 4."""
    found = []
    for part in chapter(4).split("\n### ")[1:]:
        match = HEADING.match("### " + part)
        assert match, part.splitlines()[0]
        table = tables(part)[0]
        assert table[0] == ["key", "kind", "meaning"]
        rows = [(row[0].strip("`"), row[1]) for row in table[1:]]
        found.append(Section(match[1], match[2], match[3], int(match[4]), rows))
    return found


SECTIONS = sections()


def number(pattern: str) -> int:
    """The number at `#` in the page's prose, which must be there just once."""
    found = re.findall(re.escape(pattern).replace(r"\#", r"([\d,]+)"), FLAT)
    assert len(found) == 1, f"{pattern!r} is in the page {len(found)} times"
    return int(found[0].replace(",", ""))


def test_messages_are_those_of_the_page_in_its_order() -> None:
    assert [section.type for section in SECTIONS] == list(messages.TYPES)
    assert [section.title for section in SECTIONS] == [cls.__name__ for cls in messages.TYPES.values()]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.type)
def test_fields_are_those_of_the_page_in_its_order(section: Section) -> None:
    fields = messages.FIELDS[messages.TYPES[section.type]]
    assert section.rows == [(name, kind + "?" * optional) for name, kind, optional, _ in fields]


def test_since_and_senders() -> None:
    assert VERSION == session.PROTOCOL
    assert all(1 <= section.since <= VERSION for section in SECTIONS)
    both = [section.type for section in SECTIONS if section.sender == "G H"]
    assert both == ["hello", "heartbeat", "piece"]
    assert {section.sender for section in SECTIONS} == {"G H", "G", "H"}
    protocol = re.findall(r"\| `protocol` \| uint \| (\d+) \|", PAGE)
    assert protocol == [str(VERSION)]


def test_the_envelope() -> None:
    table = tables(chapter(2))[0]
    assert [(row[0], row[1]) for row in table[1:]] == [("`to`", "bin8"), ("`n`", "uint")]


def test_kinds() -> None:
    prose = re.findall(r"Kinds: (.*?) `\?` after a kind", FLAT)[0]
    told = []
    for part in re.sub(r"\([^)]*\)", "", prose).split(";"):
        told += re.findall(r"`(\w+)`", part.split(" a ")[0].split(" an ")[0])
    assert told == list(messages.KINDS)
    assert {kind.rstrip("?") for section in SECTIONS for _, kind in section.rows} <= set(messages.KINDS)


@pytest.mark.parametrize(
    "pattern, value",
    [
        ("A whole frame is at most # bytes", framing.MAX_FRAME),
        ("so the payload is 1 to # bytes", framing.MAX_PAYLOAD),
        ("and `len` 8 to #.", framing.MAX_PAYLOAD + 7),
        ("`text` a `str` of at most # bytes", messages.MAX_TEXT),
        ("`bin` a `bin` of at most # bytes", messages.MAX_BIN),
        ("`name` a `bin` of 1 to # bytes", messages.MAX_TEXT),
        ("`map` a map of at most # keys", messages.MAX_MAP),
        ("`marks` an array of at most # `[uint, uint]`", messages.MAX_MARKS),
        ("the `size` bytes, at most #, of the Pieces", messages.MAX_WRITE),
        ("at least one; here at most #, so", messages.PIECE),
        ("an array of more than # items", messages.MAX_MARKS),
        ("a map of more than # keys", messages.MAX_MAP),
        ("A frame not whole # s after its first byte", int(session.HALF_FRAME)),
        ("| nothing received for # s |", int(session.SILENCE)),
        ("| # s since the last Heartbeat |", int(session.HEARTBEAT)),
        ("| # s since the last Hello sent |", int(session.HEARTBEAT)),
    ],
)
def test_limits(pattern: str, value: int) -> None:
    assert number(pattern) == value


def test_the_range_of_integers() -> None:
    assert "`uint` an integer from 0 to 2^63 \N{MINUS SIGN} 1;" in FLAT
    assert "`int` an integer from \N{MINUS SIGN}2^63 to 2^63 \N{MINUS SIGN} 1;" in FLAT
    assert messages.MAX_INT == 2**63 - 1
    assert messages.MAX_BIN == framing.MAX_PAYLOAD


def test_the_frame() -> None:
    rows = tables(chapter(1))[0][1:]
    assert [row[0] for row in rows] == ["1", "4", "4", "4", "len \N{MINUS SIGN} 7"]
    frame = framing.encode(b"payload")
    assert bytes.fromhex(rows[0][1].strip("`")) == frame[:1]
    assert struct.unpack(">I", frame[1:5])[0] == 7 + len(b"payload")
    magic = re.findall(r"`((?:[0-9A-F]{2} ){3}[0-9A-F]{2})`", rows[2][1])[0]
    assert bytes.fromhex(magic) == frame[5:9]
    assert framing.HEADER.size == 13


def test_values_are_those_of_the_code() -> None:
    def values(row: str) -> list[str]:
        (line,) = re.findall(rf"^\| `{row}` \|.*$", PAGE, re.M)
        return re.findall(r"`(\w+)`", line)[1:]

    assert values("trigger") == [trigger.value for trigger in runs.Trigger]
    assert sorted(set(values("ending"))) == sorted(ending.value for ending in runs.Ending)
    assert values("role") == ["guest", "host"] == [role.value for role in session.Role]
    states = ", ".join(f"{state.value} {state.name.lower()}" for state in runs.RunState)
    assert f"| `state` | uint | {states} |" in PAGE
    streams = ", ".join(f"{stream.value} {stream.name.lower()}" for stream in runs.Stream)
    assert PAGE.count(f"| `stream` | uint | {streams} |") == 2


def test_session_states() -> None:
    rows = tables(chapter(3))[0][1:]
    told = [row[0].strip("`") for row in rows]
    assert told == [state.value for state in session.State if state is not session.State.SHUT]
    for row in tables(chapter(3))[1][1:]:
        named = set(re.findall(r"`(\w+)`", row[1] + row[3])) - {"peer"}
        assert named <= set(told), row


def test_the_page_names_its_vectors() -> None:
    assert "`tests/wire/vectors/`" in PAGE
    assert "PROTOCOL.md" in (Path(__file__).parent / "vectors" / "README.md").read_text()
