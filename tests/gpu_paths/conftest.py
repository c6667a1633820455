"""Cards that are not there, for a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gpu_paths.cards import Cards, a100, h100, t4


@pytest.fixture
def two_h100s() -> Iterator[Cards]:
    with Cards([h100(), h100()]).plugged_in() as cards:
        yield cards


@pytest.fixture
def an_a100_and_a_t4() -> Iterator[Cards]:
    """Of different kinds, the second one the current one."""
    with Cards([a100(), t4()], current=1).plugged_in() as cards:
        yield cards
