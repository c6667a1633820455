"""Over- and under-fitting, told from curves that are given."""

from __future__ import annotations

import pytest

from fulltune.stats.curves import Curves, judge_curves

STEPS = (10, 20, 30, 40)


def curves(train: list[float], held_out: list[float], metric: list[float] | None = None, **changes: object) -> Curves:
    """With an evaluation every ten steps, and train losses in the middle between them."""
    name = "accuracy" if metric else "loss"
    given: dict[str, object] = {
        "train_loss": tuple((step - 5, value) for step, value in zip(STEPS, train, strict=False)),
        "eval_loss": tuple(zip(STEPS, held_out, strict=False)),
        "metric": tuple(zip(STEPS, metric or held_out, strict=False)),
        "metric_name": name,
        "greater_is_better": bool(metric),
        "eval_rows": 400,
        "epochs_per_step": 0.1,
    }
    return Curves(**{**given, **changes})  # type: ignore[arg-type]  # of this type


@pytest.mark.parametrize(
    ("given", "kind", "turn"),
    [
        (curves([2.0, 1.0, 0.4, 0.1], [1.5, 1.2, 1.5, 1.9]), "over-fitted", 20),
        (curves([2.0, 1.0, 0.4, 0.1], [1.5, 1.2, 1.5, 1.9], [0.5, 0.6, 0.6, 0.6]), "over-confident", 20),
        (curves([2.0, 1.0, 0.4, 0.1], [1.5, 1.2, 1.5, 1.9], [0.5, 0.7, 0.6, 0.5]), "over-fitted", 20),
        # Within two standard errors of 400 rows: 4.9 points.
        (curves([2.0, 1.0, 0.4, 0.1], [1.5, 1.2, 1.5, 1.9], [0.5, 0.60, 0.58, 0.56]), "over-confident", 20),
        (curves([2.0, 1.0, 0.4, 0.1], [1.5, 1.2, 1.22, 1.25]), "sound", None),  # a rise of 4 %
        (curves([2.0, 2.0, 2.0, 2.0], [1.5, 1.2, 1.5, 1.9]), "got worse", 20),  # nothing was learned meanwhile
        (curves([1.0, 1.0, 2.0, 8.0], [1.5, 1.2, 5.0, 9.0], [0.5, 0.7, 0.3, 0.1]), "got worse", 20),
        # Answers that got worse while the loss fell: the metric is what is asked for.
        (curves([2.0, 1.5, 1.0, 0.7], [2.0, 1.6, 1.2, 1.0], [0.5, 0.7, 0.6, 0.5]), "over-fitted", 20),
        (curves([2.0, 1.8, 1.7, 1.6], [2.0, 1.8, 1.7, 1.6]), "under-fitted", None),
        (curves([2.0, 1.5, 1.0, 0.7], [2.0, 1.6, 1.2, 1.0]), "sound", None),  # the train rows are known better
        (curves([2.0, 1.99, 1.98, 1.98], [2.0, 1.99, 1.985, 1.98]), "under-fitted", None),  # it had hardly begun
        (curves([2.0, 1.8, 1.8, 1.8], [2.0, 1.8, 1.8, 1.8]), "sound", None),  # nothing is left to learn
        (curves([2.0, 1.0], [1.5, 1.9]), "not known", None),
        # Before step 1 it was better than ever after: from a linear probe, say.
        (curves([2.6, 2.2], [5.3, 2.2], [0.23, 0.21], before=0.54), "got worse", 0),
        (curves([2.6, 1.8, 1.7, 1.6], [2.0, 1.8, 1.7, 1.6], [0.2, 0.3, 0.4, 0.5], before=0.54), "under-fitted", None),
        (curves([2.0, 1.0, 0.9, 0.8], [2.0, 1.9, 1.95, 1.9], before=1.2), "got worse", 0),
        (curves([2.0, 1.0, 0.4, 0.1], [1.5, float("nan"), 1.5, float("nan")]), "not known", None),
        (curves([2.0, 1.0, 0.4, 0.1], [1.5, 1.2, 1.5, 1.9], [float("nan")] * 4), "over-fitted", 20),
    ],
)
def test_kind_follows_from_the_curves(given: Curves, kind: str, turn: int | None) -> None:
    verdict = judge_curves(given)
    assert (verdict.kind, verdict.turn) == (kind, turn)
    assert verdict.sentence.startswith(kind.capitalize())


def test_level_of_a_loss_of_mixed_rows_says_nothing() -> None:
    unfinished = judge_curves(curves([2.0, 1.8, 1.7, 1.6], [2.0, 1.8, 1.7, 1.6], is_mixed=True))
    assert unfinished.kind == "not known"
    assert "including mixed-in rows" in unfinished.details
    assert judge_curves(curves([2.0, 1.0, 0.4, 0.1], [1.5, 1.2, 1.5, 1.9], is_mixed=True)).kind == "over-fitted"


@pytest.mark.parametrize(
    ("metric", "rows", "name", "facts"),
    [
        ([0.6, 0.833, 0.75, 0.708], 24, "accuracy", ["step 20 (epoch 2) with 83.3% and ended at 70.8%", "24", "15.5"]),
        ([0.5, 0.6, 0.55, 0.59], 0, "accuracy", ["1,000 (assumed)", "3.1 points"]),
        ([0.5, 0.6, 0.6, 0.595], 24, "matthews_correlation", ["with 0.6 and ended at 0.595", "up to 0.012"]),
    ],
)
def test_answers_that_are_not_surely_worse_are_not_called_as_good(
    metric: list[float], rows: int, name: str, facts: list[str]
) -> None:
    losses = [2.0, 1.0, 0.4, 0.1], [1.5, 1.2, 1.5, 1.9]
    verdict = judge_curves(curves(*losses, metric, eval_rows=rows, metric_name=name))
    assert verdict.kind == "over-confident"
    assert [fact for fact in facts if fact not in verdict.evidence] == []


def test_over_fitted_run_is_told_with_its_numbers() -> None:
    for kept, where in ((20, "this step (20)"), (10, "an earlier step (10)"), (40, "a later step (40)")):
        verdict = judge_curves(curves([2.0, 1.0, 0.4, 0.1], [1.5, 1.2, 1.5, 1.9], [0.5, 0.7, 0.6, 0.5], kept_step=kept))
        assert f"The saved weights are from {where}." in verdict.details
    text = f"{verdict.sentence} {verdict.details}"
    assert "accuracy on the eval rows was best at step 20 (epoch 2) with 70.0% and ended at 50.0%" in text
    assert "0.1 on train rows (with dropout) and 1.9 on eval rows" in text
