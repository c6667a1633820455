"""What verdicts before more time was given have taken of the chance of a wrong answer."""

from __future__ import annotations

import pytest

from fulltune.comparing.more_time import spent
from tests import comparisons


def test_spent_counts_each_verdict_once_also_of_trials_with_the_same_names() -> None:
    (first,) = comparisons.openings(1)  # at 0.025
    second = first.model_copy(update={"alpha": 0.0125, "time": "later"})  # other rates, the same names
    again = second.model_copy(update={"time": "later still"})  # the same verdict, which was interrupted
    assert spent([]) == 0.0
    assert spent([first]) == pytest.approx(0.025)
    assert spent([first, second]) == spent([first, second, again]) == pytest.approx(0.0375)
