"""Runs of tiny models are planned by the rule of thumb; what tracing finds has tests of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fulltune.footprint import trace
from tests.train.runs import without_tracing

_TRACED = trace.trace_footprint
ABOUT_TRACING = ("test_compare", "test_dry_run", "test_footprint", "test_recovery")


@pytest.fixture(scope="module", autouse=True)
def _planned_by_rule_of_thumb(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.module.__name__.endswith(ABOUT_TRACING):
        yield
        return
    with without_tracing():
        yield


@pytest.fixture
def really_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one test among others."""
    monkeypatch.setattr(trace, "trace_footprint", _TRACED)
    monkeypatch.setattr(trace, "_TRACED", {})
