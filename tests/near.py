"""Answers and records that are the same but for rounding: a product's last digit depends on its shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from fulltune.records.training import ParameterChanges


def near(value: Any) -> Any:
    """Return what equals `value` if each of its fractional numbers is within 1e-5."""
    if isinstance(value, Mapping):
        return {name: near(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(near(one) for one in value)
    return pytest.approx(value, abs=1e-5) if isinstance(value, float) else value


def assert_same_changes(one: ParameterChanges | None, other: ParameterChanges | None) -> None:
    """The same tensors were trained; single values may stay by rounding alone."""
    assert one is not None
    assert other is not None
    assert one.model_copy(update={"num_values_changed": 0}) == other.model_copy(update={"num_values_changed": 0})
    assert one.num_values_changed == pytest.approx(other.num_values_changed, rel=1e-3)
