"""Runs of tiny models are planned by the rule of thumb; what tracing finds has tests of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fulltune import footprint

_TRACED = footprint._traced

TRACED = ("test_dry_run", "test_footprint", "test_recovery")
"""Modules that are about what tracing finds."""


@pytest.fixture(scope="module", autouse=True)
def _planned_by_rule_of_thumb(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tracing a tiny model takes two to ten seconds, and each method of each task is another model."""
    if request.module.__name__.endswith(TRACED):
        yield
        return

    def untraced(*given: Any, **named: Any) -> Any:
        raise ValueError("left out by a test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(footprint, "_traced", untraced)
        patch.setattr(footprint, "_FOUND", {})
        yield


@pytest.fixture
def really_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one test among others."""
    monkeypatch.setattr(footprint, "_traced", _TRACED)
    monkeypatch.setattr(footprint, "_FOUND", {})
