"""The loss of guessing, above which a run with a new head may be called diverged."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fulltune.tasks import LossSettings, Target, token_classification
from fulltune.tasks.classes import chance_loss, row_losses
from tests.unit.tasks.test_settings import summary


@pytest.mark.parametrize("weights", [None, (1.0, 1.0, 1.0), (10.0, 0.0, 0.5), (100 / 270, 100 / 27, 100 / 3)])
@pytest.mark.parametrize("kind", ["single_label", "multi_label"])
def test_chance_is_the_loss_of_logits_that_are_all_the_same(kind: Any, weights: tuple[float, ...] | None) -> None:
    data = summary({"a": 90, "b": 9, "c": 1}, problem_type=kind)
    classes = np.repeat([0, 1, 2], [90, 9, 1])
    labels = torch.tensor(classes if kind == "single_label" else np.eye(3, dtype=np.float32)[classes])
    losses = row_losses(torch.zeros(100, 3), labels, Target(kind, {}, data.labels), LossSettings(0.0, weights))
    assert chance_loss(data, weights) == pytest.approx(float(losses.mean()), rel=1e-4)


def test_tags_are_not_counted_and_the_largest_weight_bounds_it() -> None:
    assert token_classification.chance_loss(
        summary({"B-X": 1, "O": 9}, problem_type="tags"), (5.0, 1.0)
    ) == pytest.approx(5 * math.log(2))
