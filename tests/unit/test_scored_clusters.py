"""Scores of a run rest on the clusters of its test rows: those of labels, of some rows' answers and of questions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fulltune import evaluate
from fulltune.evaluate import classifiers, spans
from fulltune.evaluate.scoring import Scoring
from fulltune.inference.store import CLUSTERS, IN_TRAIN, make_record_batch, row_as_json, write_rows
from fulltune.records.scores import Answer, Scores
from fulltune.stats.bootstrap import resample_metrics
from fulltune.stats.intervals import paired_difference
from fulltune.tasks import PLACE, Target, task_named, written

RECIPE: Any = SimpleNamespace(
    evaluate=SimpleNamespace(bootstrap_samples=100, confidence=0.95, metric=None, metrics=()),
    data=SimpleNamespace(near_duplicates=1.0),
)
PLAN: Any = SimpleNamespace(metric="accuracy", greater_is_better=True, trial="full-seed42")
LABELS = Target("single_label", {"text": "text", "label": "label"}, ("a", "b"))
TEST = [place // 10 % 2 for place in range(120)]
"""Labels of 12 texts with 10 rows each."""


def bench(folder: Path, clusters: Any, target: Target = LABELS, task: str = "text-classification") -> Scoring:
    texts = [row_as_json(f"t.csv:{place // 2}", {"text": "x", "question": "?"}) for place in range(len(TEST))]
    for split, labels in (("train", [1, 1, 0]), ("test", TEST)):
        write_rows(folder / split, [make_record_batch([{"labels": label} for label in labels], texts[: len(labels)])])
    np.save(folder / "test" / CLUSTERS, clusters)
    np.save(folder / "test" / IN_TRAIN, np.zeros(len(TEST), bool))
    return Scoring(RECIPE, PLAN, task_named(task), target, folder, None)  # type: ignore[arg-type]  # a stand-in


TENS = [place // 10 for place in range(120)]


def test_scores_rest_on_clusters(tmp_path: Path) -> None:
    grouped, alone = (
        classifiers.score_majority_class(bench(tmp_path / str(number), clusters))
        for number, clusters in enumerate((TENS, range(120)))
    )
    one, other = grouped[0].metrics["accuracy"], alone[0].metrics["accuracy"]
    assert (one.rows, one.clusters) == (120, 12)
    assert (other.rows, other.clusters) == (120, 120)
    assert one.high - one.low > 2 * (other.high - other.low)


def test_difference_in_a_run_rests_on_clusters(tmp_path: Path) -> None:
    """One model has eight of twelve texts right and the other four, ten rows each."""
    of = np.array(TENS)
    run = bench(tmp_path / "data", TENS)
    for name, kind, right in (("before-training", "untouched", of < 4), ("full-seed42", "trained", of < 8)):
        kept = {"right": right.astype(float)}
        found = run.estimate_metrics(kept, metrics=lambda rows: {"accuracy": float(rows["right"].mean())})
        scored = run.make_scores(name, kind, 120, found)  # type: ignore[arg-type]  # of this type
        evaluate._load_or_score(tmp_path / "scores" / f"{name}.json", lambda scored=scored: scored)
    mine = Scores.load(tmp_path / "scores" / "full-seed42.json")
    ahead = evaluate.save_differences(tmp_path, mine, partial(paired_difference, span=1.0, confidence=0.95))
    found = ahead.differences["before-training"]
    assert found.low < 0 < found.value < found.high


def test_answers_to_some_rows_rest_on_the_clusters_of_these(tmp_path: Path) -> None:
    target = Target("prompt_completion", {"prompt": "p", "completion": "c"})
    run = bench(tmp_path, TENS, target, "causal-lm")
    found = run.estimate_metrics(written.score_answers(["a", "b", "a"], ["a", "a", "a"]), [3, 7, 100])["exact_match"]
    assert (found.num_rows, found.num_clusters) == (3, 2)


def test_questions_rest_on_the_clusters_of_their_windows(tmp_path: Path) -> None:
    run = bench(tmp_path, TENS, Target("spans", {}), "question-answering")
    questions = {row[PLACE] for row in run.texts}
    scores = {name: np.linspace(0, 1, len(questions)) for name in ("f1", "exact_match")}
    found = run.estimate_metrics(scores, spans._first_windows(run.texts))["f1"]
    assert (found.num_rows, found.num_clusters) == (60, 12)


def test_more_cluster_numbers_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="a cluster for each of 3 rows, found 2"):
        resample_metrics({"x": np.ones(3)}, lambda rows: {"a": 1.0}, samples=2, clusters=np.array([0, 1]))


# ---- rows that stand in train ----------------------------------------------------------------------------------


def right(rows: Any) -> dict[str, float]:
    return {"accuracy": float(rows["right"].mean())}


def test_metrics_without_rows_that_stand_in_train_are_those_of_the_others(tmp_path: Path) -> None:
    """Rows of the first 15 of 40 texts stand in train, and are right; of the others every second one is."""
    run = bench(tmp_path, [place // 3 for place in range(120)])
    seen = np.arange(120) < 45
    np.save(tmp_path / "test" / IN_TRAIN, seen)
    kept = {"right": np.where(seen, 1.0, np.arange(120) % 2)}
    scores = run.make_scores("full-seed42", "trained", 120, run.estimate_metrics(kept, metrics=right))[0]
    found = scores.metric_without_leaks
    assert scores.num_leaks == 45
    assert found is not None
    assert (found.rows, found.clusters) == (75, 25)
    assert found.value == pytest.approx(38 / 75)
    assert found.low < 38 / 75 < found.high < scores.metrics["accuracy"].value
    whole = bench(tmp_path / "other", [place // 3 for place in range(120)])
    plain = whole.make_scores("full-seed42", "trained", 120, whole.estimate_metrics(kept, metrics=right))[0]
    assert plain.metrics == scores.metrics, "the scores of all rows stay as they are"
    assert (plain.num_leaks, plain.metric_without_leaks) == (0, None)


@pytest.mark.parametrize("first_unseen", [120, 110, 30], ids=["none", "one text", "nine texts"])
def test_hardly_any_row_that_train_does_not_have_gives_no_metric(tmp_path: Path, first_unseen: int) -> None:
    run = bench(tmp_path, TENS)
    np.save(tmp_path / "test" / IN_TRAIN, np.arange(120) < first_unseen)
    scores = run.make_scores("x", "trained", 120, run.estimate_metrics({"right": np.ones(120)}, metrics=right))[0]
    assert (scores.num_leaks, scores.metric_without_leaks) == (first_unseen, None)


def test_user_metric_is_asked_without_them_too(tmp_path: Path) -> None:
    run = bench(tmp_path, range(120))
    np.save(tmp_path / "test" / IN_TRAIN, np.arange(120) < 60)
    mine = replace(run, user_metrics=lambda predicted, true: {"same": float((predicted == true).mean())})
    found = mine.estimate_user_metrics(np.arange(120) < 60, np.ones(120, bool))["same"]
    assert found.value == 0.5
    assert found.unseen is not None
    assert found.unseen.value == 0.0


def test_texts_of_mistakes_and_answers_are_kept_without_what_is_private() -> None:
    mail = "jane.miller" + "@mail-of-jane.net"
    row = Answer(text=f"write to {mail}", expected="yes", predicted=f"I did: {mail}")
    given: Any = SimpleNamespace(recipe=RECIPE, plan=PLAN, slice_by=None)
    found = Scoring.make_scores(given, "full", "trained", 1, {}, worst=(row,), answers=(row,))[0]
    for one in (*found.worst, *found.answers):
        assert (one.text, one.expected, one.predicted) == ("write to [EMAIL]", "yes", "I did: [EMAIL]")
