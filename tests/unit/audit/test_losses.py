"""Rows of the highest loss: split by split, whole rows where one gave several examples, without what was decided."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fulltune.audit import stage
from fulltune.audit.stage import write_losses
from fulltune.data.patch import save_patch
from fulltune.inference.store import read_original_rows, row_id
from fulltune.recipe.fields import Recipe
from fulltune.records.audit import Audit, Remedy, RowDecision
from fulltune.records.data import DataSummary
from fulltune.tasks import PLACE
from tests.unit.audit.test_stage import CLEAN, audited, cannot, prepared


def looked_at(folder: Path, rows: Sequence[Mapping[str, Any]], *task: str, **settings: Any) -> Any:
    """The recipe and the summary of rows after their data stage and an audit."""
    summary = prepared(folder, rows, *task, **settings)
    audited(folder, summary)
    return Recipe.model_validate_json((folder / "recipe.json").read_text(encoding="utf-8")), summary


def listed(folder: Path, recipe: Recipe, summary: DataSummary, **of: Any) -> tuple[Audit, list[dict[str, Any]]]:
    """What is listed for losses[examples, 2] by split, and what the model says."""
    losses = {split: (counts, ["a"] * len(counts)) for split, counts in of.items()}
    audit = write_losses(recipe, folder / "data", summary, losses)  # type: ignore[arg-type]  # a fake
    return audit, [one.model_dump() for one in stage.load_issues(folder / "data") if one.check == "high loss"]


def counts(count: int, **high: float) -> np.ndarray:
    values = np.linspace(0.01, 0.02, count)
    for at, loss in high.items():
        values[int(at[1:])] = loss
    return np.stack([values, np.ones(count)], axis=1)


def test_highest_losses_of_each_split_are_listed_with_what_is_usual(tmp_path: Path) -> None:
    recipe, summary = looked_at(tmp_path, CLEAN)
    sizes = {split: summary.splits[split].rows for split in ("train", "eval")}
    audit, issues = listed(
        tmp_path, recipe, summary, train=counts(sizes["train"], p3=4.0, p7=5.0), eval=counts(sizes["eval"], p1=9.0)
    )
    rows = {split: list(read_original_rows(tmp_path / "data" / split)) for split in sizes}
    assert [one["row"] for one in issues[:3]] == [
        row_id(rows["eval"][1]),
        row_id(rows["train"][7]),
        row_id(rows["train"][3]),
    ]
    assert len([one for one in issues if one["split"] == "train"]) == -(-sizes["train"] // 10)
    assert "loss 9, median of the eval rows 0.01" in issues[0]["reason"]
    assert issues[0]["reason"].endswith("the model predicts 'a'")
    assert list(audit.checks)[-1] == "high loss"
    lines = [json.loads(line) for line in (tmp_path / "data" / "losses.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(one["split"], one["row"]) for one in lines] == [
        (split, row_id(row)) for split, them in rows.items() for row in them
    ]
    assert (lines[7]["loss"], lines[7]["items"], lines[7]["place"]) == (5.0, 1, str(rows["train"][7][PLACE]))


def test_another_audit_of_the_same_rows_keeps_the_list(tmp_path: Path) -> None:
    recipe, summary = looked_at(tmp_path, [CLEAN[0], *CLEAN])
    _, issues = listed(tmp_path, recipe, summary, train=counts(summary.splits["train"].rows, p3=4.0))
    folder = tmp_path / "data"
    result, _ = audited(tmp_path, summary, lambda: cannot("asked now"))
    assert result.not_run["label error"] == "asked now"
    assert list(result.checks)[-1] == "high loss"
    assert [one.model_dump() for one in stage.load_issues(folder) if one.check == "high loss"] == issues


def test_rows_that_were_decided_about_are_not_listed_again(tmp_path: Path) -> None:
    recipe, summary = looked_at(tmp_path, CLEAN)
    row = row_id(list(read_original_rows(tmp_path / "data" / "train"))[3])
    save_patch(tmp_path / "patch.jsonl", [RowDecision(row=row, remedy=Remedy(action="keep"))])
    patched = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"patch": str(tmp_path / "patch.jsonl")})}
    )
    _, issues = listed(tmp_path, patched, summary, train=counts(summary.splits["train"].rows, p3=4.0, p7=5.0))
    assert row not in {one["row"] for one in issues}
    assert len(issues) == -(-summary.splits["train"].rows // 10) - 1


def test_second_of_two_equal_rows_is_told_apart(tmp_path: Path) -> None:
    recipe, summary = looked_at(tmp_path, [CLEAN[0], *CLEAN])
    for split in ("train", "eval"):
        rows = [row_id(row) for row in read_original_rows(tmp_path / "data" / split)]
        again = [at for at, row in enumerate(rows) if row in rows[:at]]
        if again:
            high = {f"p{again[0]}": 3.0}
            _, issues = listed(tmp_path, recipe, summary, **{split: counts(len(rows), **high)})
            assert issues[0]["row"] == f"{rows[again[0]]}-2"
            return
    pytest.fail("equal rows stay in one split")


def test_row_that_gave_several_examples_has_their_mean_by_token(tmp_path: Path) -> None:
    rows = [{"text": f"text {at}: " + "many words of a long text, " * (40 if at == 5 else 1)} for at in range(40)]
    recipe, summary = looked_at(tmp_path, rows, "causal-lm", packing=False)
    folder = tmp_path / "data" / "train"
    places = [str(row[PLACE]) for row in read_original_rows(folder)]
    long = next((one for one in places if places.count(one) > 1), None)
    assert long is not None, "the long row is cut into pieces"
    of = np.array([[6.0, 2.0] if place == long else [1.0, 4.0] for place in places])
    _, issues = listed(tmp_path, recipe, summary, train=of)
    assert issues[0]["place"] == long
    assert issues[0]["score"] == pytest.approx(3.0)
    lines = [json.loads(line) for line in (tmp_path / "data" / "losses.jsonl").read_text(encoding="utf-8").splitlines()]
    [line] = [one for one in lines if one["place"] == long]
    assert line["items"] == 2 * places.count(long)
    assert len(lines) == len(set(places))
