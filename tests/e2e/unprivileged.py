"""Code run as another user, for the tests: with the modules it needs imported before, since the interpreter may
lie where that user can't look. Knows no test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import pytest

from tests.e2e.world import AGENT, LIMIT

NOBODY = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user, or mount")

_DROP = f"""\
import os, socket, sys
{{imports}}
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
{{code}}
"""


def run(
    code: str,
    *arguments: str,
    imports: str = "",
    environment: Optional[Mapping[str, str]] = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run Python as the user nobody."""
    return subprocess.run(
        [sys.executable, "-c", _DROP.format(imports=imports, code=code), *arguments],
        env={**(environment or os.environ), "PYTHONPATH": str(AGENT)},
        cwd="/",
        capture_output=True,
        timeout=LIMIT,
    )


def start(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start Python as the user nobody."""
    return subprocess.Popen(
        [sys.executable, "-c", _DROP.format(imports="", code=code), *arguments],
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def verb(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Any:
    """One of the two commands as the user nobody; ``module`` is ``agent`` or ``host``."""
    return run(
        f"raise SystemExit({module}.main(sys.argv[1:]))",
        *arguments,
        imports=(
            f"from vmr_agent.cli import {module}\n"
            "import vmr_agent.guest.daemon, vmr_agent.host.collector, vmr_agent.guest.settings"
        ),
        environment=environment,
    )
