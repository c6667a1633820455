"""A split by time: the newest rows are scored on, and nothing that is scored on was seen before."""

from __future__ import annotations

import random
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fulltune.data.split import split_by_time
from fulltune.errors import DataError, RecipeError
from fulltune.recipe.file import check_recipe
from fulltune.records.data import DataSummary
from tests.unit.data.stage import dropped, of_splits
from tests.unit.data.stage import prepare as prepare_rows

SPLITS = ("train", "eval", "test")


@pytest.mark.parametrize(
    ("times", "sides", "wanted", "expected"),
    [
        ([1, 2, 3, 4, 5, 6], "abcdef", (1, 1), "ttttET"),
        ([6, 5, 4, 3, 2, 1], "abcdef", (2, 1), "TTEttt"),
        ([1, 2, 3, 4, 5, 5], "abcdef", (1, 1), "tttETT"),
        ([1, 2, 3, 4, 4, 5], "abcdef", (2, 2), "tttEET"),
        ([1, 1, 1, 2, 2, 3], "abcdef", (1, 1), "tttEET"),
        ([1, 2, 3, 4, 5, 6], "abcdea", (1, 1), "tttET-"),
        ([1, 2, 3, 4, 5, 6], "abcded", (1, 1), "tttET-"),
        ([1, 2, 3, 4, 5, 6], "abcaea", (1, 1), "ttE-T-"),
        ([1, 1, 1], "abc", (1, 1), "ttt"),
        ([1, 2, 3], "aaa", (1, 1), "ttt"),
        ([1, 2, 2], "abc", (1, 1), "tTT"),
        ([], "", (1, 1), ""),
    ],
    ids=[
        *("one each", "any order", "equal newest times", "a time too large", "a large time alone"),
        *("a group from train to test", "from eval to test", "a group in all", "one time", "one group", "two times"),
        "none",
    ],
)
def test_boundaries(times: list[float], sides: str, wanted: tuple[int, int], expected: str) -> None:
    numbers = np.array([ord(side) for side in sides], np.uint64)
    splits = split_by_time(np.array(times, float), numbers, {"test": wanted[0], "eval": wanted[1]})
    marks = np.full(len(times), "-")
    for mark, name in zip("tET", SPLITS, strict=True):
        assert (marks[splits[name]] == "-").all()  # type: ignore[index]  # of this type
        marks[splits[name]] = mark  # type: ignore[index]  # of this type
    assert "".join(marks) == expected


# ---- the data stage --------------------------------------------------------------------------------------------

START = date(2026, 1, 1)


def prepare(folder: Path, rows: list[dict[str, Any]] | Path, tokenizer: Any, **settings: Any) -> DataSummary:
    return prepare_rows(folder, rows, tokenizer, **{"time": "day", **settings})


def dated_rows(count: int = 200, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of different days, in any order; some texts come again, some users as well."""
    chance = random.Random(seed)
    rows = [
        {
            "text": f"text {chance.randrange(3 * count)}",
            "label": chance.choice("ab"),
            "day": (START + timedelta(days=day // 2)).isoformat(),
            "user": f"u{chance.randrange(3 * count)}",
        }
        for day in range(count)
    ]
    chance.shuffle(rows)
    return rows


@pytest.mark.parametrize("group", [None, "user"])
@pytest.mark.parametrize("seed", range(3))
def test_test_is_newer_than_eval_is_newer_than_train_and_no_group_is_on_two_sides(
    tmp_path: Path, encoder_tokenizer: Any, seed: int, group: str | None
) -> None:
    rows = dated_rows(seed=seed)
    summary = prepare(tmp_path, rows, encoder_tokenizer, group=group)
    splits = of_splits(tmp_path)
    days = {name: sorted(row["day"] for row in rows) for name, rows in splits.items()}
    assert days["train"][-1] < days["eval"][0] <= days["eval"][-1] < days["test"][0]
    for column in ("text", *([group] if group else [])):
        values = [{row[column] for row in rows} for rows in splits.values()]
        assert not values[0] & values[1] | values[0] & values[2] | values[1] & values[2]
    late = [item for item in dropped(tmp_path) if item["check"] == "also in an earlier split"]
    assert 0 < len(late) == summary.dropped["also in an earlier split"] == summary.splits["train"].dropped_rows
    assert len(late) + sum(map(len, splits.values())) == len(rows)
    places = {f"train.jsonl:{number}": row for number, row in enumerate(rows, start=1)}
    assert all(places[item["place"]] == item["row"] for item in late)
    if group is None:
        days_of = {row["text"]: row["day"] for name in ("train", "eval") for row in splits[name]}
        assert all(days_of[item["row"]["text"]] <= item["row"]["day"] for item in late)
    assert all(18 <= len(splits[name]) <= 20 for name in ("eval", "test"))
    [note] = [note for note in summary.notes if note.startswith("split by 'day': ")]
    assert f"train {days['train'][0]} to {days['train'][-1]}, eval {days['eval'][0]} to " in note
    assert f"{len(late)} of 200 rows were dropped because the same text" in note
    assert ("'user'" in note) == bool(group)
    assert summary.sources["test"] == "split off from train.jsonl by 'day'"


def test_given_files_are_not_split_and_need_no_times(tmp_path: Path, encoder_tokenizer: Any) -> None:
    test = [{"text": f"test {number}", "label": "ab"[number % 2]} for number in range(8)]
    prepare(tmp_path, dated_rows(), encoder_tokenizer, test=test)
    splits = of_splits(tmp_path)
    assert len(splits["test"]) == 8
    assert max(row["day"] for row in splits["train"]) < min(row["day"] for row in splits["eval"])


def test_class_of_the_newest_rows_alone_is_refused_in_words_of_time(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = dated_rows()
    newest = sorted(rows, key=lambda row: row["day"])[-3:]
    for row in newest:
        row.update(label="new", text=f"new {row['text']}")
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, rows, encoder_tokenizer)
    [problem] = caught.value.problems
    assert "train.jsonl: label 'new' (3 rows of test) never occurs in train: all its rows were held out" in problem
    assert "'day' (data.time)" in problem


def test_times_with_faults_are_refused_at_once_with_places(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = dated_rows()
    rows[0]["day"], rows[4]["day"], rows[5]["day"] = "soon", None, "2026-01-05 10:00"
    rows[9]["user"] = ""
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, rows, encoder_tokenizer, group="user")
    message = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    assert "column 'day' (data.time) contains no time in 1 of 200 rows (train.jsonl:1: 'soon')" in message
    assert "column 'day' (data.time) is empty in 1 of 200 rows (train.jsonl:5)" in message
    assert "date in 197 rows (train.jsonl:2) and date-time in 1 row (train.jsonl:6)" in message
    assert "column 'user' (data.group) is empty in 1 of 200 rows (train.jsonl:10)" in message


@pytest.mark.parametrize(
    ("change", "facts"),
    [({"day": 7}, ("eval has 0", "test has 0")), ({"user": "u"}, ("(1 group;", "test has 0"))],
)
def test_rows_that_no_boundary_parts_are_refused(
    tmp_path: Path, encoder_tokenizer: Any, change: dict[str, Any], facts: tuple[str, ...]
) -> None:
    rows = [{**row, **change} for row in dated_rows()]
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, rows, encoder_tokenizer, group="user")
    [problem] = caught.value.problems
    assert all(fact in problem for fact in (*facts, "200 rows of ", "'day' (data.time)"))


def test_nothing_to_split_is_refused_by_the_recipe() -> None:
    block = {"train": "a.csv", "eval": "b.csv", "test": "c.csv", "time": "day"}
    with pytest.raises(RecipeError, match=r"data\.time: has no effect if both eval and test are files"):
        check_recipe({"model": "x", "task": "causal-lm", "data": block}, Path("recipe.yaml"))
