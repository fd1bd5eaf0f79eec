"""What holds for every test."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# A busy machine takes its time; what a test asserts is behaviour, never speed.
settings.register_profile("any-speed", deadline=None)
settings.load_profile("any-speed")

# Those that take far longer than most, up to a minute: many histories, many kills, a long silence.
_LONG = (
    *("tests/sim/test_sim.py::test_a_thousand_histories", "tests/sim/test_offsets.py", "tests/faults/"),
    "tests/e2e/test_bad_host.py::test_a_host_that_reads_nothing",
)


@pytest.hookimpl(trylast=True)  # when it is known which are run
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each of the workers that run tests beside each other has its share of the long ones, and begins with it.

    What is left to the end is short then, and no worker is long the last. Workers begin with equal stretches of the
    list (pytest-xdist's `worksteal`).
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        long = [item for item in items if item.nodeid.startswith(_LONG)]
        short = [item for item in items if not item.nodeid.startswith(_LONG)]
        left = len(items)
        if len(long) < left // workers:
            items.clear()
            for number in range(workers):
                share = long[number::workers]
                room = left // (workers - number) - len(share)
                left -= room + len(share)
                items += [*share, *short[:room]]
                del short[:room]
