"""Runs of tiny models are planned by the rule of thumb, as in `tests/train`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.forked_ranks import Forks
from tests.train.runs import without_tracing


@pytest.fixture(scope="module", autouse=True)
def _planned_by_rule_of_thumb() -> Iterator[None]:
    with without_tracing():
        yield


@pytest.fixture(scope="module")
def forked_ranks(forks: Forks) -> Iterator[None]:
    """Runs of a module start no Python: `test_one_of_two.py` shows that torchrun's processes end the same."""
    with forks.instead_of_torchrun():
        yield
