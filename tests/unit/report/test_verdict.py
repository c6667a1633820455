"""The headline: what it claims follows from the numbers alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fulltune.records.scores import Answer, Estimate, Scores
from fulltune.report.run.verdict import judge_scores

BASELINE = "nearest centroid"


def pair(
    kit: SimpleNamespace,
    trained: float,
    bar: float,
    bounds: tuple[float, float],
    metric: str = "accuracy",
    kind: str = "baseline",
) -> list[Scores]:
    """A trained model and what needs no training, with the interval of their difference."""
    greater = metric != "loss"
    found = Estimate(value=trained - bar, low=bounds[0], high=bounds[1])
    return [
        kit.scores(BASELINE, kind, bar, 0.07, metric, greater),
        kit.scores("full-seed42", "trained", trained, 0.07, metric, greater, differences={BASELINE: found}),
    ]


@pytest.mark.parametrize(
    ("metric", "trained", "bar", "bounds", "kind", "said"),
    [
        ("accuracy", 0.92, 0.81, (0.08, 0.14), "better", "is +11.0 points (95% interval: +8.0 to +14.0)."),
        # Each alone is known to 7 points: the intervals overlap.
        ("accuracy", 0.635, 0.765, (-0.195, -0.065), "worse", "-19.5 to -6.5), and the baseline needs no training."),
        ("accuracy", 0.78, 0.75, (-0.008, 0.069), "unresolved", "is +3.0 points (95% interval: -0.8 to +6.9); these"),
        ("accuracy", 0.81, 0.81, (0.0, 0.0), "unresolved", "is +0.0 points (95% interval: +0.0 to +0.0); their scores"),
        ("loss", 1.2, 2.3, (-1.2, -1.05), "better", "the difference in loss is -1.1 (95% interval: -1.2 to -1.05)."),
        ("loss", 2.3, 1.2, (1.05, 1.2), "worse", "is +1.1 (95% interval: +1.05 to +1.2), and the baseline needs no"),
    ],
)
def test_interval_of_the_difference_on_the_same_rows_decides_and_is_said(
    kit: SimpleNamespace, metric: str, trained: float, bar: float, bounds: tuple[float, float], kind: str, said: str
) -> None:
    verdict = judge_scores(pair(kit, trained, bar, bounds, metric))
    assert verdict.kind == kind
    assert said in verdict.sentence
    assert ("Worse than the best baseline" in verdict.label) == (kind == "worse")


@pytest.mark.parametrize(
    ("before", "copied", "after", "generated", "kind", "said"),
    [
        (0.2, 0.3, 0.4, "an answer", "better", ""),
        (
            0.1,
            0.3,
            0.2,
            "an answer",
            "contested",
            "answers are no better: rougeL 0.2 [0.2, 0.2], against 0.3 [0.3, 0.3] for copy.",
        ),
        # Nothing says that they are worse, or better.
        (0.0, 0.0, 0.0, "an answer", "loss-only", "not measured: rougeL is 0 with and without training. Add a"),
        (0.0, 0.0, 0.0, " ", "contested", "answers are all empty: rougeL 0 [0, 0], against 0 [0, 0] for"),
    ],
)
def test_loss_alone_is_not_called_better_than_answers_say(
    kit: SimpleNamespace, before: float, copied: float, after: float, generated: str, kind: str, said: str
) -> None:
    pretrained, trained = pair(kit, 1.2, 2.3, (-1.2, -1.05), "loss", "untouched")
    copy = kit.scores("copy", "baseline", copied, 0.0, "rougeL")
    answers = (Answer(text="a question", expected="an answer", predicted=generated),)
    rows = [
        row.model_copy(update={"metrics": row.metrics | {"rougeL": Estimate(value=value, low=value, high=value)}})
        for row, value in ((pretrained, before), (trained.model_copy(update={"answers": answers}), after))
    ]
    verdict = judge_scores([*rows, copy])
    assert verdict.kind == kind
    assert said in verdict.sentence
    assert "is -1.1" in verdict.sentence
    assert ("Better" in verdict.label) == (kind == "better")


def test_loss_without_any_answers_says_how_to_measure_them_where_the_model_writes_some(kit: SimpleNamespace) -> None:
    rows = pair(kit, 1.2, 2.3, (-1.2, -1.05), "loss", "untouched")
    verdict = judge_scores(rows, writes_answers=True)
    assert (verdict.kind, verdict.label) == ("loss-only", "Lower loss; answers not measured")
    assert "set evaluate.generate_rows above 0" in verdict.sentence
    assert "evaluate.metric: exact_match" in verdict.sentence
    assert judge_scores(rows).kind == "better"  # raw text has no answers
    assert judge_scores(pair(kit, 0.92, 0.81, (0.08, 0.14), "exact_match"), writes_answers=True).kind == "better"


def test_verdict_without_a_paired_difference_claims_none(kit: SimpleNamespace) -> None:
    """Intervals far apart are still not a difference that was measured."""
    rows = [kit.scores("majority class", "baseline", 0.3), kit.scores("full-seed42", "trained", 0.9)]
    verdict = judge_scores(rows)
    assert verdict.kind == "unpaired"
    assert verdict.sentence.endswith("Their difference on the same rows was not measured.")


def test_bar_is_the_best_untrained_row_in_the_metric_s_direction(kit: SimpleNamespace) -> None:
    rows = [
        kit.scores("high", "baseline", 3.0, 0.02, "loss", False),
        kit.scores("low", "baseline", 1.5, 0.02, "loss", False),
        kit.scores("before training", "untouched", 2.0, 0.02, "loss", False),
        kit.scores("full-seed42", "trained", 1.2, 0.02, "loss", False),
    ]
    assert "for the best baseline, low." in judge_scores(rows).sentence
    assert "for the pretrained model." in judge_scores([rows[0], *rows[2:]]).sentence


def test_verdict_metric_not_finite_is_none(kit: SimpleNamespace) -> None:
    rows = [kit.scores("full-seed42", "trained", float("nan")), kit.scores("majority class", "baseline", 0.3)]
    assert judge_scores(rows).kind == "none"


def test_sentence_loss_says_its_direction_and_who_lost(kit: SimpleNamespace) -> None:
    pretrained = judge_scores(pair(kit, 2.3, 1.2, (1.0, 1.2), "loss", "untouched"))
    assert "loss 2.3 [2.23, 2.37] (smaller is better) on" in pretrained.sentence
    assert pretrained.sentence.endswith(", and training made it worse.")
