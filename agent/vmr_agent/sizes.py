"""What lives here: numbers of bytes as people write and read them.

It must not know: what is counted.
"""

from __future__ import annotations

import re

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse(text: str) -> int:
    """Bytes, from `512M` or `2 GiB`. Raises ValueError with what it must be."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None:
        raise ValueError("must be a size such as 512M or 2G")
    return int(match[1]) * _UNITS[match[2].upper()]


def shown(count: int) -> str:
    """A number of bytes for people: 512 B, 1.2 MiB."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 1024 or unit == "TiB":
            break
    return f"{value:.1f} {unit}"
