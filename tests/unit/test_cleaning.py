"""Cleaning steps from what an audit found, and how runs with and without them are compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fulltune.cleaning import (
    CleaningStep,
    _compare_runs,
    _fit_and_compare,
    _leaves_enough,
    check_proofs_possible,
    cleaning_steps,
    row_ids,
)
from fulltune.data.patch import load_patch, save_patch
from fulltune.errors import RecipeError
from fulltune.inference.store import row_id
from fulltune.probe.linear import MIDDLE, Items
from fulltune.recipe.fields import Recipe
from fulltune.records.audit import LabelErrors, Proof, Proofs, Remedy, RowDecision, RowIssue
from fulltune.records.data import DataSummary, SplitSummary
from fulltune.report.run.data_page import describe_label_errors
from fulltune.stats.bootstrap import ResamplableMetric
from fulltune.tasks import Predictions
from tests import tiny
from tests.unit.data.stage import prepare

DROP = Remedy(action="drop")


def issue(check: str, row: str, remedy: Remedy = DROP, split: str = "train") -> RowIssue:
    return RowIssue.model_validate(
        {"check": check, "split": split, "place": f"a.csv:{row}", "row": row, "reason": "r", "text": "t"}
        | {"remedy": remedy}
    )


def test_each_check_gives_a_step_that_drops_and_one_that_changes_where_something_is_proposed() -> None:
    other = Remedy(action="replace", column="label", value="b")
    issues = [
        issue("label error", "1", other),
        issue("label error", "2"),
        issue("label error", "3", other, split="eval"),
        issue("leak", "1"),
        issue("high loss", "1"),
        issue("markup", "2"),
    ]
    steps = cleaning_steps(issues)
    assert [(one.check, one.action, len(one.issues)) for one in steps] == [
        ("label error", "drop", 2),
        ("label error", "replace", 1),
        ("markup", "drop", 1),
    ]
    assert {one.remedy.action for one in steps[0].decisions} == {"drop"}
    assert [one.remedy for one in steps[1].decisions] == [other]


def test_a_row_whose_equal_twin_a_patch_dropped_keeps_its_number(tmp_path: Path) -> None:
    rows = [{"text": f"row {number}", "label": "ab"[number % 2]} for number in range(40)]
    rows.append(rows[5])
    twin = RowDecision(row=row_id(rows[5]), source="train", place="a.csv:7", check="patch", remedy=DROP)
    save_patch(tmp_path / "patch.jsonl", [twin])
    tokenizer = tiny.encoder_tokenizer()
    prepare(tmp_path, rows, tokenizer, "text-classification", patch=str(tmp_path / "patch.jsonl"))
    splits = [tmp_path / "data" / split for split in ("train", "eval", "test")]
    numbered = {name for split in splits for name in row_ids(split, load_patch(tmp_path / "patch.jsonl"))}
    assert f"{twin.row}-2" in numbered
    assert twin.row not in numbered


def _accuracy() -> ResamplableMetric:
    def row_terms(kept: object) -> np.ndarray:
        right = np.asarray(kept["right"], np.float64)  # type: ignore[index]  # of any kind here
        return np.stack([right, np.ones(len(right))], axis=1)

    return ResamplableMetric(
        name="accuracy",
        greater_is_better=True,
        compute=lambda kept: float(kept["right"].mean()),
        row_terms=row_terms,
        from_sums=lambda sums: sums[..., 0] / sums[..., 1],
    )


def _rows(ids: np.ndarray, right: np.ndarray) -> Predictions:
    return {"row_ids": ids, "row_clusters": np.arange(len(ids)), "right": right}


def test_runs_are_compared_on_the_rows_that_all_have_held_out_in_whatever_order() -> None:
    drawn, names = np.random.default_rng(0), np.array([f"{number:04}" for number in range(1200)])
    hard = drawn.random(1200)  # of each row; a run answers what is easier than its level

    def method(level: float, kept: slice) -> list[Predictions]:
        found = []
        for seed in range(3):
            order = np.random.default_rng(seed).permutation(np.arange(1200)[kept])
            noise = np.random.default_rng(seed).normal(0, 0.01, 1200)
            found.append(_rows(names[order], (hard + noise < level)[order]))
        return found

    steps = [CleaningStep("a", "drop", ()), CleaningStep("b", "drop", ())]
    methods = [method(0.7, slice(0, 1100)), method(0.8, slice(100, 1200)), method(0.7, slice(0, 1200))]
    (better, same), rows = _compare_runs(_accuracy(), steps, ["a", "b"], methods)
    assert rows == 1000
    expected = float((hard[100:1100] < 0.8).mean() - (hard[100:1100] < 0.7).mean())
    assert better.difference == pytest.approx(expected, abs=0.02)
    assert 0.05 < better.low < better.difference < better.high < 0.2
    assert same.difference == pytest.approx(0.0, abs=1e-9)
    assert same.low < 0 < same.high


@pytest.mark.parametrize(
    ("metric", "greater", "low", "high", "verdict"),
    [
        ("accuracy", True, 0.01, 0.02, "helps"),
        ("accuracy", True, -0.02, -0.01, "hurts"),
        ("accuracy", True, -0.01, 0.01, "no difference found"),
        ("loss", False, -0.2, -0.1, "helps"),
        ("loss", False, 0.1, 0.2, "hurts"),
    ],
)
def test_a_verdict_knows_which_way_is_better(metric: str, greater: bool, low: float, high: float, verdict: str) -> None:
    proof = Proof(check="markup", action="drop", rows=1, before=0.5, difference=(low + high) / 2, low=low, high=high)
    proofs = Proofs(
        fingerprint="f",
        eval_rows=9,
        repetitions=3,
        proofs=(proof,),
        source="trainings",
        metric=metric,
        greater_is_better=greater,
    )
    assert proofs.verdict(proof) == verdict


@pytest.mark.parametrize(
    ("dropped", "labels", "enough"), [(40, "ab", True), (60, "ab", False), (3, "b", False), (2, "b", True)]
)
def test_a_step_leaves_most_rows_and_each_label(dropped: int, labels: str, enough: bool) -> None:
    counts = {"a": 97, "b": 3}
    split = SplitSummary.model_construct(rows=100, label_counts=counts)
    summary = DataSummary.model_construct(splits={"train": split})
    of_b = min(dropped, 2 if len(labels) > 1 else 3)
    given = ["b"] * of_b + ["a"] * (dropped - of_b)
    issues = [issue("markup", str(at)).model_copy(update={"label": label}) for at, label in enumerate(given)]
    drop, change = (CleaningStep("markup", action, tuple(issues)) for action in ("drop", "replace"))
    assert _leaves_enough(drop, summary) is enough
    assert _leaves_enough(change, summary)


def test_a_row_with_two_faults_of_a_kind_is_one_row() -> None:
    both = [issue("markup", "1", Remedy(action="replace", column=name, value="x")) for name in ("text_a", "text_b")]
    drop, change = cleaning_steps(both)
    assert len(drop.issues) == len(change.issues) == 1
    assert change.decisions[0].remedy.column == "text_a"


def test_too_few_eval_rows_are_refused() -> None:
    recipe = Recipe.model_validate({"model": "m", "task": "text-classification", "data": {"train": "a.csv"}})
    summary = DataSummary.model_construct(
        problem_type="single_label", splits={"eval": SplitSummary.model_construct(rows=43)}
    )
    with pytest.raises(RecipeError, match="--prove: 43 eval rows are too few, expected at least 50"):
        check_proofs_possible(recipe, summary, True, False)


def test_no_row_that_differs_is_no_proof_that_none_would() -> None:
    drawn = np.random.default_rng(0)

    def rows(count: int) -> Items:
        labels = np.arange(count) % 2
        features = np.column_stack([10.0 * labels - 5, drawn.normal(size=count)]).astype(np.float32)
        return Items("single_label", features, labels, np.arange(count), 2)

    [step] = cleaning_steps([issue("markup", "1")])
    without_the_first = (step, np.arange(200) > 0, np.arange(200) % 2)
    [proof] = _fit_and_compare(rows(200), rows(86), [without_the_first], MIDDLE, [])
    assert proof.difference == 0
    assert -3.7 / 86 < proof.low < -2.5 / 86
    assert 2.5 / 86 < proof.high < 3.7 / 86


@pytest.mark.parametrize(
    ("rows", "suspects", "precision", "said"),
    [
        (192, 2, 1.0, "Of the 2 suspects, between 0 and 2 are wrong: correct labels can"),
        (100_000, 1_900, 0.8, "between 0 and 1,900 are wrong: correct labels can"),
        (192, 60, 0.8, "Of the 60 suspects, about 80% (39 to 57 rows) are mislabelled by the same estimate"),
    ],
)
def test_share_of_wrong_suspects_is_said_with_an_interval_or_not_at_all(
    rows: int, suspects: int, precision: float, said: str
) -> None:
    found = LabelErrors(
        judged_rows=rows,
        agreement=0.9,
        suspects=suspects,
        planted=50,
        recall=0.9,
        precision=precision,
        estimated_errors=5.0,
    )
    told = describe_label_errors(found, rows)
    assert said in told
    assert "45 of these wrong labels would be flagged" in told
    assert ("labels in total" in told) == (suspects == 60)
