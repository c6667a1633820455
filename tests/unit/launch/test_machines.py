"""`4x 8x A100-80GB`: machines in front of what each has."""

from __future__ import annotations

import pytest

from fulltune.errors import RecipeError
from fulltune.plan.elsewhere.machines import machines_in


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("8x A100-80GB", (1, "8x A100-80GB")),
        ("A100-80GB", (1, "A100-80GB")),
        ("cpu", (1, "cpu")),
        ("4x 8x A100-80GB", (4, "8x A100-80GB")),
        (" 4 X 8 x A100-80GB, 1TB host", (4, "8 x A100-80GB, 1TB host")),
        ("2×1* RTX 4090", (2, "1* RTX 4090")),
        ("4x 3060", (1, "4x 3060")),
        ("4x 1x cpu, 16 cores", (4, "1x cpu, 16 cores")),
        ("", (1, "")),
    ],
)
def test_count_in_front_of_a_count_is_of_machines(words: str, found: tuple[int, str]) -> None:
    assert machines_in(words) == found


def test_no_machine_is_refused() -> None:
    with pytest.raises(RecipeError, match="'0x 8x A100' has no machine"):
        machines_in("0x 8x A100")


def test_three_counts_are_refused() -> None:
    with pytest.raises(RecipeError, match="'2x 4x 8x A100' has too many counts"):
        machines_in("2x 4x 8x A100")
