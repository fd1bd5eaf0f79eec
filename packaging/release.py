"""The one version and its date, for all builds: the version of the package, the entry of CHANGELOG.md.

Usage: release.py version | epoch | deb-changelog | rpm-changelog
Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
MAINTAINER = "vmr-agent maintainers <maintainers@vmr-agent.invalid>"
ENTRY = re.compile(r"## (\S+) \((\d{4}-\d\d-\d\d)\)")


class Release(NamedTuple):
    """One entry of the changelog."""

    version: str
    when: datetime
    changes: list[str]


def version() -> str:
    """The version in the package's `__init__.py`, which is where it is written."""
    text = (HERE.parent / "agent" / "vmr_agent" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise SystemExit("release.py: cannot find __version__ in agent/vmr_agent/__init__.py")
    return found[1]


def releases() -> list[Release]:
    """All entries, newest first; the newest must be of the package's version."""
    found: list[Release] = []
    for line in (HERE / "CHANGELOG.md").read_text().splitlines():
        entry = ENTRY.fullmatch(line)
        if line.startswith("## ") and entry is None:
            raise SystemExit(f"release.py: cannot read {line!r} in CHANGELOG.md: ## VERSION (YYYY-MM-DD)")
        if entry is not None:
            when = datetime.strptime(entry[2], "%Y-%m-%d").replace(tzinfo=timezone.utc)
            found.append(Release(entry[1], when, []))
        elif found and line.startswith("- "):
            found[-1].changes.append(line[2:])
        elif found and line.startswith("  "):
            found[-1].changes[-1] += " " + line.strip()
    if not found or found[0].version != version():
        newest = found[0].version if found else "missing"
        raise SystemExit(
            f"release.py: the newest entry of CHANGELOG.md is {newest}, and the package's version is {version()}"
        )
    return found


def deb_changelog() -> str:
    """debian/changelog."""
    parts = []
    for release in releases():
        changes = "".join(_item(change) for change in release.changes)
        date = release.when.strftime("%a, %d %b %Y %H:%M:%S +0000")
        parts.append(
            f"vmr-agent ({release.version}) unstable; urgency=medium\n\n{changes}\n -- {MAINTAINER}  {date}\n"
        )
    return "\n".join(parts)


def _item(change: str) -> str:
    lines, line = [], "  *"
    for word in change.split():
        if len(line) + 1 + len(word) > 78:
            lines.append(line)
            line = "   "
        line += " " + word
    return "\n".join([*lines, line]) + "\n"


def rpm_changelog() -> str:
    """The entries of %changelog."""
    parts = []
    for release in releases():
        changes = "".join(f"- {change}\n".replace("%", "%%") for change in release.changes)
        parts.append(
            f"* {release.when.strftime('%a %b %d %Y')} {MAINTAINER} - {release.version}-1\n{changes}"
        )
    return "\n".join(parts)


def main() -> None:
    what = {
        "version": version,
        "epoch": lambda: str(int(releases()[0].when.timestamp())),
        "deb-changelog": deb_changelog,
        "rpm-changelog": rpm_changelog,
    }
    print(what[sys.argv[1]]())


main()
