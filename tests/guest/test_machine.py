"""What the daemon does to its own process. Real processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.guest.rig import may_raise_priority

GOES_FIRST = """
import os, sys
from vmr_agent.guest import machine
os.setpriority(os.PRIO_PROCESS, 0, int(sys.argv[1]))
machine.go_first()
print(open("/proc/self/autogroup").read().rpartition(" ")[2])
"""


@pytest.mark.skipif(not may_raise_priority(), reason="a priority is raised, which is not allowed here")
@pytest.mark.skipif(not os.path.exists("/proc/self/autogroup"), reason="this kernel doesn't group by session")
@pytest.mark.parametrize(("nice", "of_the_session"), [(-5, -5), (0, 0), (5, 0)])
def test_a_priority_above_a_logins_counts_for_the_session_too(nice: int, of_the_session: int) -> None:
    command = [sys.executable, "-c", GOES_FIRST, str(nice)]
    done = subprocess.run(command, start_new_session=True, capture_output=True, text=True, check=True)
    assert int(done.stdout) == of_the_session
