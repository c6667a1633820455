"""Which weights are kept where the model before step 1 was a good one already."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from fulltune.train.worker.best import load_best_weights

ACCURACY = {0: 0.9, 5: 0.92, 10: 0.92}


class Weights:
    """Weights before step 1 that note that they came back, and a trainer that notes which checkpoint it loads."""

    step: int | None = None

    def __init__(self, metric: str, greater_is_better: bool) -> None:
        self.args = SimpleNamespace(metric_for_best_model=metric, greater_is_better=greater_is_better)
        self.model = None

    def restore(self, model: Any) -> None:
        self.step = 0

    def agreed(self, problem: str | None) -> str | None:
        return None

    def load_weights(self, folder: Any) -> None:
        self.step = int(folder.name.partition("-")[2])


@pytest.mark.parametrize(
    ("chooser", "losses", "best", "kept", "without_start"),
    [
        ("loss", (0.5, 0.5, 0.6), 5, 0, 5),
        ("loss", (0.5, 0.4, 0.6), 5, 5, 5),
        ("loss", (0.5, 0.4, 0.3), 10, 10, 10),
        ("accuracy", (0.5, 0.5, 0.6), 5, 10, 10),  # more accurate than the start, the last as accurate as the best
    ],
)
def test_a_good_start_is_kept_unless_later_weights_are_better(
    chooser: str, losses: tuple[float, ...], best: int, kept: int, without_start: int, tmp_path: Any
) -> None:
    inputs: Any = SimpleNamespace(
        recipe=SimpleNamespace(train=SimpleNamespace(load_best_model_at_end=True)),
        plan=SimpleNamespace(metric="accuracy", lr_scheduler_type="linear", total_steps=10),
        summary=SimpleNamespace(
            splits={"eval": SimpleNamespace(rows=100)}, form=SimpleNamespace(row_shares=("accuracy",))
        ),
        request=SimpleNamespace(checkpoints=tmp_path),
        is_main=False,
    )
    values = {"loss": dict(zip(ACCURACY, losses, strict=True)), "accuracy": ACCURACY}
    history = [{"step": step, **{f"eval_{name}": values[name][step] for name in values}} for step in ACCURACY]
    state: Any = SimpleNamespace(
        global_step=10, best_global_step=best, best_metric=values[chooser][best], log_history=history
    )
    for start, step in ((True, kept), (False, without_start)):
        weights = Weights(chooser, chooser != "loss")
        fields = load_best_weights(inputs, cast("Any", weights), state, cast("Any", weights) if start else None)
        assert fields["best_step"] == step == (10 if weights.step is None else weights.step)
        assert fields["best_metric"] == ACCURACY[step]
        if chooser == "loss":
            assert fields["weights_reason"] == "the loss on the eval rows was lowest"
