"""What has run, and what goes on, of each VMR: real runs in a real spool."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.rig import BOOT_ID, VMR, Rig
from vmr_agent.guest.roster import Roster


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_run_that_ended_before_its_maker_looked_is_under_way_until_that_is_acted_on(
    rig: Rig, attempts: int
) -> None:
    """Else nobody would decide what comes next."""
    roster = Roster(rig.spool, BOOT_ID)
    for _ in range(attempts):
        run = rig.run("#!/bin/sh\n")
        roster.made(run)
        entry = roster.get(VMR)
        assert entry is not None and list(entry.unfinished.values()) == [run]
        _, past = roster.for_schedule()
        assert past[VMR].running and past[VMR].attempts == run.info.attempt
        roster.exited(run)
        assert entry.unfinished == {}
        assert not roster.for_schedule()[1][VMR].running
