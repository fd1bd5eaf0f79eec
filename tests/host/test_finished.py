"""The runs that are over, against a dict of them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vmr_agent.host.finished import Finished, Over, digest_of

RUNS = [number.to_bytes(1, "big") * 16 for number in range(0, 256, 9)]
LABELS = [(b"-4/a.sh", attempt) for attempt in range(1, 20)] + [
    (b"14/a.sh", 1),
    (b"4/a.sh", 1),
    (b"1/4/a.sh", 1),
]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(RUNS), st.sampled_from(["add", "add", "add", "pack", "reopen"])),
        max_size=40,
    )
)
def test_it_knows_what_was_put_into_it(acts: list[tuple[bytes, str]]) -> None:
    finished = Finished()
    runs: dict[bytes, tuple[tuple[bytes, int], int]] = {}
    for number, (run, act) in enumerate(acts):
        if act == "add" and len(runs) < len(LABELS):
            if run not in runs:
                runs[run] = (LABELS[len(runs)], number << 58 | number)
            finished.add(run, *runs[run])  # and again: no harm
        elif act == "pack":
            finished.pack()
        else:
            finished = Finished(finished.pack())
    assert len(finished) == len(runs)
    labels = {label: run for run, (label, _) in runs.items()}
    for run in RUNS:
        label, when = runs.get(run, (LABELS[0], 0))
        assert finished.get(run) == (Over(digest_of(label), when) if run in runs else None)
        assert (run in finished) == (run in runs)
    for label in LABELS:
        assert finished.run_of(label) == labels.get(label)


def test_no_two_labels_are_taken_for_one() -> None:
    assert len({digest_of(label) for label in LABELS}) == len(LABELS)
