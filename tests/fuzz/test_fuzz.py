"""The fuzzing targets without a fuzzer: the corpus it left, every input that ever failed, and hypothesis."""

from __future__ import annotations

import importlib
from typing import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.run import CORPUS, MAX_LEN, TARGETS

EXAMPLES = {"frames": 200, "payloads": 500, "spool": 40, "collector": 150, "control": 100}


def target(name: str) -> Callable[[bytes], None]:
    found: Callable[[bytes], None] = importlib.import_module(f"tests.fuzz.{name}").check
    return found


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_is_still_good(name: str) -> None:
    check = target(name)
    inputs = sorted((CORPUS / name).iterdir())
    assert inputs, "an empty corpus proves nothing"
    for path in inputs:
        try:
            check(path.read_bytes())
        except Exception as error:
            raise AssertionError(f"{path} fails: {error}") from error


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_comes(name: str) -> None:
    check = target(name)

    @settings(max_examples=EXAMPLES[name], suppress_health_check=list(HealthCheck), database=None)
    @given(st.binary(max_size=MAX_LEN))
    def whatever(data: bytes) -> None:
        check(data)

    whatever()
