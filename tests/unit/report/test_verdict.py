"""The headline: what it claims follows from the numbers alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fulltune.report.verdict import judge


@pytest.mark.parametrize(
    ("metric", "greater", "trained", "baseline", "kind"),
    [
        ("accuracy", True, 0.92, 0.81, "better"),
        ("accuracy", True, 0.70, 0.81, "worse"),
        ("accuracy", True, 0.83, 0.81, "unresolved"),
        ("loss", False, 1.2, 2.3, "better"),
        ("loss", False, 2.3, 1.2, "worse"),
        ("loss", False, 1.21, 1.2, "unresolved"),
    ],
)
def test_verdict_intervals_and_direction_decide(
    kit: SimpleNamespace, metric: str, greater: bool, trained: float, baseline: float, kind: str
) -> None:
    rows = [
        kit.scores("majority class", "baseline", baseline, 0.02, metric, greater),
        kit.scores("full-seed42", "trained", trained, 0.02, metric, greater),
    ]
    verdict = judge(rows)
    assert verdict.kind == kind
    assert ("not resolved by this many rows" in verdict.sentence) == (kind == "unresolved")
    assert ("are apart" in verdict.sentence) == (kind != "unresolved")


def test_sentence_intervals_apart_has_both_values_and_the_number_of_rows(kit: SimpleNamespace) -> None:
    rows = [
        kit.scores("nearest centroid", "baseline", 0.812),
        kit.scores("full-seed42", "trained", 0.921, 0.016),
    ]
    assert judge(rows).sentence == (
        "full-seed42 has accuracy 92.1% [90.5%, 93.7%] on 1,000 test rows, against 81.2% [79.2%, 83.2%] for the best "
        "baseline, nearest centroid; the 95% intervals are apart."
    )


def test_bar_several_baselines_is_the_best_one_in_the_metric_s_direction(kit: SimpleNamespace) -> None:
    rows = [
        kit.scores("high", "baseline", 3.0, 0.02, "loss", False),
        kit.scores("low", "baseline", 1.5, 0.02, "loss", False),
        kit.scores("before training", "untouched", 2.0, 0.02, "loss", False),
        kit.scores("full-seed42", "trained", 1.2, 0.02, "loss", False),
    ]
    assert "for the best baseline, low;" in judge(rows).sentence


def test_bar_best_untrained_row_is_the_untouched_model_names_it(kit: SimpleNamespace) -> None:
    rows = [kit.scores("before training", "untouched", 0.5), kit.scores("full-seed42", "trained", 0.9)]
    assert "for the model before training;" in judge(rows).sentence


def test_headline_several_trials_takes_the_first_by_name_and_says_so(kit: SimpleNamespace) -> None:
    rows = [
        kit.scores("full-seed2", "trained", 0.95),
        kit.scores("full-seed1", "trained", 0.90),
        kit.scores("majority class", "baseline", 0.3),
    ]
    verdict = judge(rows)
    assert verdict.sentence.startswith("full-seed1 has accuracy 90.0%")
    assert "first of 2 trained trials by name" in verdict.note


def test_verdict_no_baseline_claims_nothing(kit: SimpleNamespace) -> None:
    verdict = judge([kit.scores("full-seed42", "trained", 0.9)])
    assert verdict.kind == "alone"
    assert "no baseline was scored" in verdict.sentence


def test_verdict_no_trained_row_gives_the_reason(kit: SimpleNamespace) -> None:
    verdict = judge([kit.scores("majority class", "baseline", 0.3)], "training ended as 'crashed'.")
    assert verdict.kind == "none"
    assert verdict.sentence.endswith("training ended as 'crashed'.")


def test_verdict_metric_not_finite_is_none(kit: SimpleNamespace) -> None:
    rows = [kit.scores("full-seed42", "trained", float("nan")), kit.scores("majority class", "baseline", 0.3)]
    assert judge(rows).kind == "none"


def test_sentence_loss_says_its_direction_and_who_lost(kit: SimpleNamespace) -> None:
    trained = kit.scores("full-seed42", "trained", 2.3, 0.02, "loss", False)
    untouched = judge([kit.scores("before training", "untouched", 1.2, 0.02, "loss", False), trained])
    assert "loss 2.3 [2.28, 2.32] (smaller is better) on" in untouched.sentence
    assert untouched.sentence.endswith("are apart, and training made it worse.")
    baseline = judge([kit.scores("a rule", "baseline", 1.2, 0.02, "loss", False), trained])
    assert baseline.sentence.endswith("are apart, and the baseline needs no training.")
