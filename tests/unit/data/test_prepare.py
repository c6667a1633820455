"""The data stage as a whole: splits that never mix, an account of every row, trained end tokens."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fulltune import data
from fulltune.data.patch import save_patch
from fulltune.data.sources import SourceRows, find_target_and_count_rows
from fulltune.errors import DataError
from fulltune.inference.store import ROW_JSON, Rows, read_original_rows, read_record_batches, row_id
from fulltune.recipe.fields import Recipe
from fulltune.records.audit import Remedy, RowDecision
from fulltune.tasks import Target, question_answering, task_named
from tests import tiny
from tests.unit.data.stage import of_splits, prepare


def test_prepare_duplicates_stay_on_one_side(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = [{**row, "text": text} for row in tiny.topic_rows(60) for text in (row["text"], row["text"].upper() + " ")]
    summary = prepare(tmp_path, rows, encoder_tokenizer, "text-classification")
    splits = {
        name: {row["text"].strip().lower() for row in read_original_rows(tmp_path / "data" / name)}
        for name in summary.splits
    }
    assert not splits["train"] & splits["eval"]
    assert not splits["train"] & splits["test"]
    assert not splits["eval"] & splits["test"]
    assert sum(split.rows for split in summary.splits.values()) == 120
    assert {name: split.rows for name, split in summary.splits.items()} == {"train": 96, "eval": 12, "test": 12}


def test_long_texts_are_counted_as_texts_and_their_pieces_as_pieces(tmp_path: Path, decoder_tokenizer: Any) -> None:
    path = tiny.write_jsonl(
        tmp_path / "train.jsonl", [{"text": f"text {number} is long " * 40} for number in range(30)]
    )
    recipe = Recipe.model_validate({"model": "x", "task": "causal-lm", "data": {"train": str(path)}})
    limits = data.Limits(tiny.POSITIONS, packing_obstacle=lambda: None)
    notes = data.prepare(data.Stage(recipe, tmp_path / "data", decoder_tokenizer, limits)).notes
    assert any(note.startswith("only 3 eval rows,") for note in notes)
    assert any(note.startswith("24 train texts, cut into ") and " pieces and packed into " in note for note in notes)


@pytest.mark.parametrize(("rare", "is_noted"), [(12, True), (120, False)])
def test_class_with_hardly_any_test_row_is_noted(
    rare: int, is_noted: bool, tmp_path: Path, encoder_tokenizer: Any
) -> None:
    rows = [{"text": f"text {number}", "label": "rare" if number < rare else "usual"} for number in range(600)]
    notes = prepare(tmp_path, rows, encoder_tokenizer, "text-classification").notes
    remarks = [note for note in notes if "too few for a reliable score" in note]
    assert bool(remarks) == is_noted
    assert all(
        note.startswith("1 of 2 ") and " 5 of the 60 test rows" in note and "'rare' (1)" in note for note in remarks
    )


def test_class_of_which_no_row_can_be_used_is_noted(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = [*tiny.topic_rows(60), {"text": "too long " * 20, "label": "lost"}]
    notes = prepare(tmp_path, rows, encoder_tokenizer, truncation_strategy="drop", max_length=24).notes
    assert any("without a usable row, which cannot be learned: 'lost'; repair" in note for note in notes)


def test_rows_of_files_that_stand_in_another_split_are_noted(tmp_path: Path, encoder_tokenizer: Any) -> None:
    test, dev = (tiny.write_csv(tmp_path / f"{name}.csv", tiny.topic_rows(50)[40:]) for name in ("test", "dev"))
    notes = prepare(tmp_path, tiny.topic_rows(40), encoder_tokenizer, test=str(test), eval=str(dev)).notes
    assert "10 of 10 test rows have a text that also occurs in eval, which is used to choose the checkpoint" in notes


@pytest.mark.parametrize("pad", [None, "<|im_end|>", "<|pad|>"], ids=["no pad", "pad is end", "own pad"])
@pytest.mark.parametrize("rows", [tiny.pair_rows(), tiny.chat_rows()], ids=["pairs", "chat"])
def test_prepare_every_row_trains_its_end_token(tmp_path: Path, rows: list[dict[str, Any]], pad: str | None) -> None:
    tokenizer = tiny.decoder_tokenizer(pad=pad)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prepare(tmp_path, rows, tokenizer, "causal-lm")
    features = [dict(row) for row in Rows(tmp_path / "data" / "train")]
    end = tokenizer.eos_token_id
    for row in features:
        assert [label for label in row["labels"] if label != -100][-1] == end
    batch = task_named("causal-lm").collate(features, tokenizer.pad_token_id)
    # Padding with the end token must not hide the true one, nor train the padding.
    assert (batch["labels"] == end).sum() == len(features)
    assert not ((batch["labels"] != -100) & (batch["attention_mask"] == 0)).any()


def test_prepare_truncation_is_counted_and_lost_answers_are_left_out(tmp_path: Path, decoder_tokenizer: Any) -> None:
    rows = tiny.pair_rows(60)
    rows[7] = {"prompt": "rain " * 100, "completion": "never seen"}
    rows[8] = {"prompt": "town 8:", "completion": " soup" * 200}
    summary = prepare(tmp_path, rows, decoder_tokenizer, "causal-lm", max_length=32)
    assert summary.dropped == {"answer cut off": 1}
    assert sum(split.truncated_rows for split in summary.splits.values()) == 1
    assert max(split.length_percentiles["max"] for split in summary.splits.values()) == 32


def test_previews_show_the_first_train_rows_with_their_own_labels(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = [{"text": f"row {number}", "label": f"l{number % 3}"} for number in range(40)]
    summary = prepare(tmp_path, rows, encoder_tokenizer, "text-classification")
    first = list(read_original_rows(tmp_path / "data" / "train"))[:5]
    assert [preview.label for preview in summary.previews] == [row["label"] for row in first]
    assert len({row["label"] for row in first}) > 1


def test_rows_that_a_patch_drops_behind_the_first_thousand_are_counted(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = [{"text": f"row {number}", "label": "ab"[number % 2]} for number in range(1500)]
    dropped = [RowDecision(row=row_id(rows[number]), remedy=Remedy(action="drop")) for number in (10, 1400)]
    save_patch(tmp_path / "patch.jsonl", dropped)
    summary = prepare(tmp_path, rows, encoder_tokenizer, "text-classification", patch=str(tmp_path / "patch.jsonl"))
    assert summary.dropped == {"patch": 2}


def test_prepare_strategy_drop_leaves_long_rows_out(tmp_path: Path, decoder_tokenizer: Any) -> None:
    rows = tiny.pair_rows(40)
    rows[8] = {"prompt": "town 8:", "completion": " soup" * 200}
    summary = prepare(tmp_path, rows, decoder_tokenizer, "causal-lm", max_length=32, truncation_strategy="drop")
    assert summary.dropped == {"too long": 1}


@pytest.mark.parametrize("labels", [2, 30])
def test_more_held_out_rows_than_asked_for_are_told(labels: int, tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = [{"text": f"row {number}", "label": f"l{number % labels}"} for number in range(90)]
    summary = prepare(tmp_path, rows, encoder_tokenizer, "text-classification")
    size_notes = [note for note in summary.notes if "instead of the 9 that data." in note]
    if labels == 2:
        assert size_notes == []
    else:
        assert summary.splits["eval"].rows == 30
        assert [note.split(" instead ")[0] for note in size_notes] == ["30 eval rows", "30 test rows"]


def _passages(count: int, sentences: int) -> list[dict[str, Any]]:
    """Questions about long passages; each answer stands in its passage once."""
    rows = []
    for number in range(count):
        parts = [f"In the town of item{number}n{place} it rains. " for place in range(sentences)]
        answer = f"item{number}n{sentences // 2}"
        rows.append({"context": "".join(parts), "question": "where does it rain?", "answers": answer})
    return rows


def _words_bytes(folder: Path) -> int:
    return sum(
        batch.column(ROW_JSON).nbytes
        for split in ("train", "eval", "test")
        for batch in read_record_batches(folder / split)
    )


@pytest.mark.parametrize("packing", [True, False, None], ids=["packed", "not packed", "windows"])
def test_text_is_kept_once_however_many_examples_a_row_gives(tmp_path: Path, packing: bool | None) -> None:
    """Beside each window stood the whole row: the file grew with the square of the row's length."""
    rows = _passages(24, 100)
    if packing is None:
        task, tokenizer, settings = "question-answering", tiny.encoder_tokenizer(), {"stride": 8}
    else:
        rows = [{"text": row["context"]} for row in rows]
        task, tokenizer, settings = "causal-lm", tiny.decoder_tokenizer(pad="<|pad|>"), {}
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    given = {"train": str(path), "max_length": 64, **settings}
    recipe = Recipe.model_validate({"model": "x", "task": task, "data": given})
    limits = data.Limits(None, "", lambda: None if packing else "off")
    summary = data.prepare(data.Stage(recipe, tmp_path / "data", tokenizer, limits))
    assert sum(split.rows for split in summary.splits.values()) > 15 * len(rows)
    assert _words_bytes(tmp_path / "data") < 2 * path.stat().st_size


def test_answers_are_found_in_all_windows_of_a_long_passage(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = _passages(40, 30)
    prepare(tmp_path, rows, encoder_tokenizer, "question-answering", max_length=64)
    folder = tmp_path / "data" / "test"
    windows, rows = Rows(folder), list(read_original_rows(folder))
    places = [row["fulltune:place"] for row in rows]
    assert len(set(places)) * 5 < len(places)
    labels = np.stack([row["labels"] for row in windows])
    scores = {
        "first": labels[:, question_answering.START],
        "last": labels[:, question_answering.END],
        "chance": np.where(labels[:, question_answering.START] > 0, -0.1, -9.0),
        "nowhere": np.where(labels[:, question_answering.START] > 0, -9.0, -0.1),
    }
    contexts = [row["context"] for row in rows]
    answers = question_answering.best_answers(scores, windows, places, contexts)
    assert {place: answer["answer"] for place, answer in answers.items()} == {
        row["fulltune:place"]: row["answers"] for row in rows
    }
    # Training reads no places of characters.
    assert set(Rows(folder)[0]) - set(Rows(tmp_path / "data" / "train")[0]) == {
        question_answering.STARTS,
        question_answering.ENDS,
    }


def test_few_rows_are_held_while_columns_are_looked_for() -> None:
    class Held(dict[str, Any]):
        pass

    alive: list[weakref.ref[Held]] = []

    def rows(problems: list[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
        for number in range(1000):
            row = Held({"text": "x", f"column{number}": 1})
            alive.append(weakref.ref(row))
            yield f"a:{number}", row

    def find_columns(columns: Any, *_: Any) -> dict[str, str]:
        assert len(columns) == 1001
        assert sum(ref() is not None for ref in alive) <= 101
        return {"text": "text"}

    def find_target(given: Any, *_: Any) -> Target:
        list(given)
        return Target("text", {"text": "text"})

    facts = task_named("causal-lm").FACTS
    task: Any = SimpleNamespace(find_columns=find_columns, find_target=find_target, FACTS=facts)
    recipe = Recipe.model_validate({"model": "x", "task": "causal-lm", "data": {"train": "a.jsonl"}})
    _, counts = find_target_and_count_rows(recipe.data, task, {"train": SourceRows("a", rows)})
    assert counts == {"train": 1000}


def test_address_is_masked_in_notes(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = [
        {"text": f"text {number}", "label": f"{'ab'[number % 2]}.miller@web-of-anna.de", "x@gmail.com": 1}
        for number in range(60)
    ]
    notes = prepare(tmp_path, rows, encoder_tokenizer, "text-classification").notes
    assert not any("web-of-anna" in note or "x@gmail" in note for note in notes)


@pytest.mark.parametrize(
    ("label", "column"),
    [("AKIA" + "QWERTY7ASDFG2ZXC", "text"), ("4539 1488 0343 6467", "text"), ("soup", "password: " + "Xk9#mQ2$vL")],
)
def test_secret_as_a_name_of_a_label_or_a_column_is_refused(
    tmp_path: Path, encoder_tokenizer: Any, label: str, column: str
) -> None:
    rows = [{column: f"text {number}", "label": label if number % 2 else "rain"} for number in range(60)]
    with pytest.raises(DataError, match=r"secrets or personal numbers: .*; rename them in the file") as refused:
        prepare(tmp_path, rows, encoder_tokenizer, "text-classification", text=column, label="label")
    assert not any(name in str(refused.value) for name in ("QWERTY7", "6467", "mQ2"))


@pytest.mark.parametrize("late", [False, True])
def test_train_rows_are_read_again_only_where_a_column_appears_late(late: bool) -> None:
    rows = [{"text": f"text {at}", "label": "ab"[at % 2]} for at in range(1500)]
    rows[-1] |= {"note": "only here"} if late else {}
    read = list[int]()

    def each(problems: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        for at, row in enumerate(rows):
            read.append(at)
            yield str(at), row

    recipe = Recipe.model_validate({"model": "m", "task": "text-classification", "data": {"train": "x.csv"}})
    description, counts = find_target_and_count_rows(
        recipe.data, task_named(recipe.task), {"train": SourceRows("x.csv", each)}
    )
    assert (description.labels, counts) == (("a", "b"), {"train": 1500})
    assert read.count(1499) == 1 + late


def test_rows_that_are_tokenised_are_not_told_chunk_by_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = list[Any]()
    monkeypatch.setattr("fulltune.data.encode.ROWS_PER_CHUNK", 5)
    # `fulltune.data.prepare` is the function; the module of that name is only in sys.modules.
    monkeypatch.setattr(sys.modules["fulltune.data.prepare"], "_PROGRESS_SECONDS", float("inf"))
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.topic_rows(40))
    recipe = Recipe.model_validate({"model": "m", "task": "text-classification", "data": {"train": str(path)}})
    limits = data.Limits(tiny.POSITIONS)
    data.prepare(data.Stage(recipe, tmp_path / "data", tiny.encoder_tokenizer(), limits, listener=events.append))
    assert [(one.done, one.total) for one in events if one.name == "tokenising"] == [(40, 40)]


def test_only_last_answers_are_trained_and_thinking_is_reported(tmp_path: Path) -> None:
    told = [{**row["messages"][1], "reasoning_content": "hm, let me see"} for row in tiny.chat_rows()]
    rows = [
        {"messages": [*row["messages"], *row["messages"][:1], last]}
        for row, last in zip(tiny.chat_rows(), told, strict=True)
    ]
    tokenizer = tiny.decoder_tokenizer(tiny.CHATML)
    every, last = (
        prepare(tmp_path / on, rows, tokenizer, "causal-lm", mixed=[{"text": "a b c d"}] * 9, train_on=on)
        for on in ("all", "last")
    )
    assert Target.of(last).train_on == "last"
    assert every.splits["train"].tokens == last.splits["train"].tokens
    assert every.splits["train"].trained_tokens == 2 * last.splits["train"].trained_tokens
    state = "thinking parts of answers: dropped by the chat template in 40 rows; to train these, set data.chat_template"
    assert every.notes.count(state) == last.notes.count(state) == 1
    with pytest.raises(DataError, match=r"data\.train_on: last needs chat messages, and these rows have none"):
        prepare(tmp_path / "pairs", tiny.pair_rows(), tokenizer, "causal-lm", train_on="last")


def test_condition_leaves_out_rows_of_train_eval_and_test_but_not_of_mixed_files(
    tmp_path: Path, encoder_tokenizer: Any
) -> None:
    rows = [{"text": f"rain {number}", "label": "ab"[number % 2], "year": number} for number in range(100)]
    mixed = [{**row, "text": f"snow {row['year']}"} for row in rows[70:]]
    summary = prepare(tmp_path, rows, encoder_tokenizer, mixed=mixed, eval=rows[50:], where="year < 60")
    splits = of_splits(tmp_path)
    assert {row["year"] for row in splits["train"]} | {row["year"] for row in splits["test"]} == {*range(60)}
    assert [row["year"] for row in splits["eval"]] == [*range(50, 60)]
    assert [source.counts.rows for source in summary.mixed] == [30]
    assert {"where: 60 of 100 rows of train.jsonl match", "where: 10 of 50 rows of eval-file.jsonl match"} <= {
        *summary.notes
    }
    other = prepare(tmp_path, rows, encoder_tokenizer, mixed=mixed, eval=rows[50:], where="year < 61")
    assert other.fingerprint != summary.fingerprint
    with pytest.raises(DataError, match=r"train.jsonl: none of its rows match where: year < 0; change the condition"):
        prepare(tmp_path, rows, encoder_tokenizer, where="year < 0")


@pytest.mark.parametrize("text", ["", "  ", None, ["a list"]])
def test_row_that_is_dropped_makes_no_class(text: Any, tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows: list[dict[str, Any]] = [*tiny.topic_rows(60), {"text": text, "label": "politics"}]
    summary = prepare(tmp_path, rows, encoder_tokenizer)
    assert summary.labels == ("food", "weather")
    assert summary.dropped == {"no text": 1}
    with pytest.raises(DataError, match="no row can be used: column 'text' "):
        prepare(tmp_path / "other", [{**row, "text": text} for row in rows], encoder_tokenizer, text="text")
