"""Runs of tiny models are planned by the rule of thumb, as in `tests/train`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.train.runs import without_tracing


@pytest.fixture(scope="module", autouse=True)
def _planned_by_rule_of_thumb() -> Iterator[None]:
    with without_tracing():
        yield
