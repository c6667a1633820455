"""Rows that are mixed in by weight: prepared beside the splits, which they do not change, and never scored on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fulltune import data
from fulltune.errors import DataError, RecipeError
from fulltune.inference.store import MIXED, Rows, read_original_rows
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary
from fulltune.tasks import task_named
from tests import tiny
from tests.unit.data.stage import dropped

TEXTS = [{"text": f"a text about the number {number} " * 20} for number in range(20)]


def prepare(
    folder: Path,
    tokenizer: Any,
    task: str,
    rows: Sequence[Mapping[str, Any]],
    *mixed: tuple[Sequence[Mapping[str, Any]], float],
    packs: bool = False,
    **settings: Any,
) -> DataSummary:
    """Prepare task rows with other rows mixed in, each with its weight."""
    train: list[Any] = [str(tiny.write_jsonl(folder / "task.jsonl", rows))]
    for number, (others, weight) in enumerate(mixed, start=1):
        train.append({"path": str(tiny.write_jsonl(folder / f"other{number}.jsonl", others)), "weight": weight})
    recipe = Recipe.model_validate({"model": "x", "task": task, "data": {"train": train, **settings}})
    limits = data.Limits(tiny.POSITIONS, packing_obstacle=lambda: None if packs else "not here")
    return data.prepare(data.Stage(recipe, folder / "data", tokenizer, limits))


def test_splits_are_those_without_mixed_rows(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = tiny.topic_rows(80)
    others = [{**row, "text": f"{row['text']} indeed"} for row in rows]
    alone = prepare(tmp_path / "alone", encoder_tokenizer, "text-classification", rows, near_duplicates=0.7)
    both = prepare(
        tmp_path / "both", encoder_tokenizer, "text-classification", rows, (others, 0.2), near_duplicates=0.7
    )
    for name in alone.splits:
        one, other = (list(read_original_rows(tmp_path / folder / "data" / name)) for folder in ("alone", "both"))
        assert one == other
    assert both.splits == alone.splits
    assert (alone.mixed, (tmp_path / "alone" / "data" / MIXED).exists()) == ((), False)


def test_summary_says_of_each_source_what_an_epoch_takes_of_it(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = [{"text": f"number {number}", "label": "ab"[number % 2]} for number in range(100)]
    first = [{"text": f"first {number} " * 5, "label": "a"} for number in range(30)]
    second = [{"text": f"second {number}", "label": "b"} for number in range(200)]
    summary = prepare(tmp_path, encoder_tokenizer, "text-classification", rows, (first, 0.1), (second, 0.4))
    assert summary.splits["train"].rows == 80
    assert [(one.where, one.weight, one.rows_per_epoch, one.counts.rows) for one in summary.mixed] == [
        ("other1.jsonl", 0.1, 16, 30),
        ("other2.jsonl", 0.4, 64, 200),
    ]
    assert summary.rows_per_epoch == 160
    lengths = Rows(tmp_path / "data" / MIXED)["length"]
    assert [one.counts.tokens for one in summary.mixed] == [lengths[:30].sum(), lengths[30:].sum()]
    expected = summary.splits["train"].tokens + 16 * lengths[:30].mean() + 64 * lengths[30:].mean()
    assert summary.tokens_per_epoch == pytest.approx(expected)
    assert summary.mixed[0].times_read(epochs=6) == pytest.approx(6 * 16 / 30)
    assert summary.max_length == max(lengths.max(), Rows(tmp_path / "data" / "train")["length"].max())


def test_mixed_row_that_is_scored_on_is_left_out_and_listed(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = [{"text": f"number {number}", "label": "ab"[number % 2]} for number in range(100)]
    others = [{**row, "text": row["text"].upper() + " "} for row in rows]
    summary = prepare(tmp_path, encoder_tokenizer, "text-classification", rows, (others, 0.2))
    held_out = {
        name: {row["text"] for row in read_original_rows(tmp_path / "data" / name)}
        for name in ("train", "eval", "test")
    }
    left = {row["text"].strip().lower() for row in read_original_rows(tmp_path / "data" / MIXED)}
    assert left == held_out["train"]
    assert summary.dropped == {"also in test": 10, "also in eval": 10}
    assert (summary.mixed[0].counts.rows, summary.mixed[0].counts.dropped_rows) == (80, 20)
    for line in dropped(tmp_path):
        split = line["check"].removeprefix("also in ")
        assert (line["split"], line["row"]["text"].strip().lower() in held_out[split]) == ("mixed-1", True)
        assert line["place"].startswith("other1.jsonl:")


def test_near_duplicate_of_a_test_row_is_left_out(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = [
        {"text": f"this long sentence names {number * 7919} things", "label": "ab"[number % 2]} for number in range(60)
    ]
    others = [{**row, "text": row["text"] + "!"} for row in rows]
    summary = prepare(tmp_path, encoder_tokenizer, "text-classification", rows, (others, 0.2), near_duplicates=0.85)
    scored = sum(summary.splits[name].rows for name in ("eval", "test"))
    assert sum(summary.dropped.values()) >= scored


def test_questions_about_a_scored_passage_are_left_out_with_all_their_windows(
    tmp_path: Path, encoder_tokenizer: Any
) -> None:
    def questions(of: str) -> list[dict[str, str]]:
        passages = [" ".join([f"thing {number} of {word}" for word in "abcdefgh" * 3]) for number in range(30)]
        return [
            {"question": f"{of} {number}?", "context": passage, "answers": f"thing {number} of h"}
            for number, passage in enumerate(passages)
        ]

    summary = prepare(
        tmp_path, encoder_tokenizer, "question-answering", questions("what"), (questions("which"), 0.2), max_length=64
    )
    scored = {
        name: {row["context"] for row in read_original_rows(tmp_path / "data" / name)} for name in ("eval", "test")
    }
    lost = [line["row"]["context"] for line in dropped(tmp_path) if line["check"].startswith("also in")]
    assert sorted(lost) == sorted(scored["eval"] | scored["test"])
    left = list(read_original_rows(tmp_path / "data" / MIXED))
    assert len(left) > len({row["question"] for row in left}) == 30 - len(lost)
    # What only answers need is kept for the test rows alone.
    folders = [tmp_path / "data" / name for name in ("train", MIXED, "test")]
    train, mixed, test = (tuple(Rows(folder)[0]) for folder in folders)
    assert train == mixed != test
    assert summary.mixed[0].counts.rows == len(left)


def test_names_of_a_table_without_header_are_not_those_of_another_kind_of_file(
    tmp_path: Path, decoder_tokenizer: Any
) -> None:
    lines = "".join(f"name {number},it is {number}\n" for number in range(40))
    (tmp_path / "task.csv").write_text(lines)
    others = tiny.write_jsonl(tmp_path / "other.jsonl", tiny.chat_rows(20))
    block = {
        "train": [str(tmp_path / "task.csv"), {"path": str(others), "weight": 0.1}],
        "columns": ["prompt", "completion"],
    }
    recipe = Recipe.model_validate({"model": "x", "task": "causal-lm", "data": block})
    limits = data.Limits(tiny.POSITIONS)
    summary = data.prepare(data.Stage(recipe, tmp_path / "data", decoder_tokenizer, limits))
    assert [one.kind for one in summary.mixed] == ["chat"]


def test_label_that_the_task_lacks_is_dropped_and_listed(tmp_path: Path, encoder_tokenizer: Any) -> None:
    others = [{"text": f"other {number}", "label": ("food", "sport", "music")[number % 3]} for number in range(30)]
    summary = prepare(tmp_path, encoder_tokenizer, "text-classification", tiny.topic_rows(40), (others, 0.2))
    assert summary.labels == ("food", "weather")
    assert summary.dropped == {"label not in train": 20}
    assert summary.mixed[0].counts.label_counts == {"food": 10}
    assert {line["row"]["label"] for line in dropped(tmp_path)} == {"sport", "music"}


@pytest.mark.parametrize("kind", ["chat", "pairs", "text"])
def test_causal_lm_source_may_have_another_form(tmp_path: Path, decoder_tokenizer: Any, kind: str) -> None:
    forms = {"chat": tiny.chat_rows(60), "pairs": tiny.pair_rows(60), "text": TEXTS}
    others = [rows for name, rows in forms.items() if name != kind]
    summary = prepare(tmp_path, decoder_tokenizer, "causal-lm", forms[kind], *((rows, 0.2) for rows in others))
    kinds = {"chat": "chat", "pairs": "prompt and completion", "text": "raw text"}
    assert summary.form.kind == kinds.pop(kind)
    assert [one.kind for one in summary.mixed] == list(kinds.values())
    rows = Rows(tmp_path / "data" / "train", tmp_path / "data" / MIXED)
    assert tuple(rows[0]) == ("input_ids", "labels", "length")
    assert len(rows) == summary.splits["train"].rows + sum(one.counts.rows for one in summary.mixed)
    batch = task_named("causal-lm").collate([rows[0], rows[-1], rows[len(rows) // 2]], 0)
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    # Of raw text everything is trained but the first token, of the others only the answer.
    whole = [int((row["labels"] == -100).sum()) == 1 for row in rows]
    ends = np.cumsum([summary.splits["train"].rows, *(one.counts.rows for one in summary.mixed)])
    parts = np.split(np.array(whole), ends[:-1])
    expected = [summary.form.is_raw_text, *(one.kind == "raw text" for one in summary.mixed)]
    assert [bool(part.all()) for part in parts] == expected


def test_columns_that_the_recipe_names_count_where_they_are(tmp_path: Path, decoder_tokenizer: Any) -> None:
    rows = [{"ask": f"name {number}", "say": f"it is {number}"} for number in range(40)]
    settings = {"prompt": "ask", "completion": "say"}
    summary = prepare(
        tmp_path, decoder_tokenizer, "causal-lm", rows, (TEXTS, 0.1), (tiny.pair_rows(20), 0.1), **settings
    )
    assert [one.kind for one in summary.mixed] == ["raw text", "prompt and completion"]


def test_raw_text_beside_raw_text_is_packed_on_its_own(tmp_path: Path, decoder_tokenizer: Any) -> None:
    others = [{"text": f"other {number}"} for number in range(50)]
    summary = prepare(tmp_path, decoder_tokenizer, "causal-lm", TEXTS * 2, (others, 0.2), packs=True)
    assert summary.packed
    rows = Rows(tmp_path / "data" / "train", tmp_path / "data" / MIXED)
    assert "position_ids" in rows[0]
    assert summary.mixed[0].counts.rows < 50
    assert all(row["text"].startswith("other") for row in read_original_rows(tmp_path / "data" / MIXED))


def test_raw_text_beside_other_forms_is_not_packed(tmp_path: Path, decoder_tokenizer: Any) -> None:
    chat = (tiny.chat_rows(20), 0.2)
    summary = prepare(tmp_path, decoder_tokenizer, "causal-lm", TEXTS, chat, packs=True)
    assert not summary.packed
    assert any(note.startswith("packing is off because raw text is packed before") for note in summary.notes)
    with pytest.raises(RecipeError, match=r"data\.packing: impossible because raw text .* mixed in \(chat\)"):
        prepare(tmp_path / "asked", decoder_tokenizer, "causal-lm", TEXTS, chat, packs=True, packing=True)


@pytest.mark.parametrize(
    ("others", "weight", "expected"),
    [
        (
            [{"text": f"x {number}", "label": "sport"} for number in range(9)],
            0.1,
            r"no row can be mixed in \(9 x label",
        ),
        ([{"text": "x", "topic": "food"}], 0.1, "no column 'label' .data.label."),
        ([{"text": "x", "label": "food"}], 0.001, "a weight of 0.001 with 32 train rows selects no row"),
        ([{"text": "", "label": "food"}] * 9, 0.1, "9 of 9 rows cannot be used"),
    ],
)
def test_source_that_cannot_be_mixed_in_is_refused(
    tmp_path: Path, encoder_tokenizer: Any, others: list[dict[str, str]], weight: float, expected: str
) -> None:
    with pytest.raises(DataError, match=expected):
        prepare(tmp_path, encoder_tokenizer, "text-classification", tiny.topic_rows(40), (others, weight))


def test_source_of_only_scored_rows_is_refused(tmp_path: Path, encoder_tokenizer: Any) -> None:
    test = tiny.topic_rows(60)[40:]
    settings = {"test": str(tiny.write_jsonl(tmp_path / "test.jsonl", test))}
    with pytest.raises(DataError, match=r"other1\.jsonl: no row can be mixed in \(20 x also in test\)"):
        prepare(tmp_path, encoder_tokenizer, "text-classification", tiny.topic_rows(40), (test, 0.1), **settings)
