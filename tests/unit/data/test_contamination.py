"""Texts that must not be trained on: what is read, which rows hold one, and what is said."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from fulltune import data
from fulltune.data.contamination import (
    MAX_TEXTS,
    ForbiddenTexts,
    hash_forbidden_texts,
    list_forbidden_text_files,
    texts_in_cell,
)
from fulltune.errors import DataError
from fulltune.inference.store import read_original_rows
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary
from fulltune.tasks.columns import normalised
from tests import tiny
from tests.unit.data.stage import prepare as prepare_rows

TEN = "one two three four five six seven eight nine ten"


def known(folder: Path, *texts: str) -> ForbiddenTexts:
    path = tiny.write_jsonl(folder / "known.jsonl", [{"text": text} for text in texts])
    return hash_forbidden_texts({"data.contamination": str(path)}, files_of(path))


def files_of(path: Path) -> tuple[Path, ...]:
    block = {"train": "x", "contamination": str(path)}
    return list_forbidden_text_files(Recipe.model_validate({"model": "x", "task": "causal-lm", "data": block}))


def others(count: int, start: str = "w") -> str:
    return " ".join(f"{start}{number}" for number in range(count))


@pytest.mark.parametrize(
    ("text", "is_held"),
    [
        (TEN, True),
        (f"  {TEN.upper()}\n", True),
        (f"{others(50)} {TEN} {others(50, 'v')}", True),
        (f"{others(2)} one two three four five six seven eight nine {others(2, 'v')}", True),
        (f"{others(2)} one two three four five six seven eight {others(2, 'v')}", False),
        ("one two three four five six seven eight", True),
        ("one two three four five six seven", False),
        (f"one two three four five six seven {others(20)}", False),
        (others(30), False),
        ("", False),
    ],
)
def test_text_that_shares_a_run_of_8_words(tmp_path: Path, text: str, is_held: bool) -> None:
    assert known(tmp_path, TEN, others(3, "x")).occur_in(normalised(text), is_input=True) == is_held


def test_template_of_many_texts_says_nothing(tmp_path: Path) -> None:
    template = "choose the right one of the answers that stand here below :"
    few = known(tmp_path, *(f"{template} {others(3, f'x{number}')}" for number in range(MAX_TEXTS)))
    many = known(tmp_path, *(f"{template} {others(3, f'x{number}')}" for number in range(MAX_TEXTS + 1)))
    row = f"{template} {others(3, 'v')}"
    assert [texts.occur_in(row, is_input=True) for texts in (few, many)] == [True, False]
    assert many.occur_in(f"{template} {others(3, 'x7')}", is_input=True)


def test_short_texts_are_equal_as_questions_alone(tmp_path: Path) -> None:
    texts = known(tmp_path, "Where is my card?", "yes")
    assert [texts.occur_in("where is my card?", is_asked) for is_asked in (True, False)] == [True, False]


@pytest.mark.parametrize("seed", range(3))
def test_same_as_comparing_every_pair(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)

    def written(parts: int) -> list[str]:
        runs = [others(chance.randrange(4, 14), f"r{chance.randrange(12)}x") for _ in range(parts)]
        return " ".join(runs).split()

    texts, rows = ([written(chance.randrange(1, 6)) for _ in range(60)] for _ in range(2))
    forbidden = known(tmp_path, *(" ".join(text) for text in texts))

    def shares(row: list[str], text: list[str]) -> bool:
        one, other = ({tuple(words[place : place + 8]) for place in range(len(words) - 7)} for words in (row, text))
        return row == text or (bool(one & other) and 2 * len(one & other) >= min(len(one), len(other)))

    expected = [any(shares(row, text) for text in texts) for row in rows]
    assert [forbidden.occur_in(" ".join(row), is_input=True) for row in rows] == expected
    assert 0 < sum(expected) < len(rows)


# ---- what is read ----------------------------------------------------------------------------------------------


def test_every_text_of_a_folder_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    (folder / "inner").mkdir(parents=True)
    (folder / "lines.txt").write_text("first line\nsecond line\n", encoding="utf-8")
    (folder / "inner" / "paragraphs.txt").write_text("a paragraph\nof two lines\n\nanother\n", encoding="utf-8")
    tiny.write_csv(folder / "table.csv", [{"question": "why?", "answer": "because"}])
    nested = [
        {"q": "who?", "choices": ["the one", "the other"], "n": 3, "chat": [{"role": "user", "content": "hello you"}]}
    ]
    tiny.write_jsonl(folder / "rows.jsonl", nested)
    (folder / "README.md").write_text("not a text", encoding="utf-8")
    (folder / ".hidden.txt").write_text("not this", encoding="utf-8")
    texts = hash_forbidden_texts({"data.contamination": f"{folder}/"}, files_of(folder))
    assert texts.source.endswith("of bench (data.contamination)")
    expected = (
        "first line",
        "a paragraph of two lines",
        "another",
        "why?",
        "because",
        "who?",
        "the other",
        "hello you",
    )
    assert all(texts.occur_in(text, is_input=True) for text in expected)
    assert not any(texts.occur_in(text, is_input=True) for text in ("not a text", "not this", "3", "question"))
    assert texts.source == "11 texts of bench (data.contamination)"


def test_words_of_a_list_are_one_text() -> None:
    assert list(texts_in_cell(["the", "red", "house"])) == ["the red house"]
    assert list(texts_in_cell(["the red", "house", None, 3])) == ["the red", "house"]


@pytest.mark.parametrize(
    ("files", "fact"),
    [
        ({}, "no text file or table in this folder"),
        ({"notes.md": "text"}, "no text file or table in this folder"),
        ({"a.txt": ""}, "a.txt: no rows"),
        ({"a.jsonl": '{"number": 3}\n'}, "found no text"),
        ({"a.jsonl": "{broken\n"}, "a.jsonl:1: not valid JSON"),
    ],
    ids=["empty", "other kinds", "empty file", "numbers", "broken"],
)
def test_folder_without_texts_is_refused(
    tmp_path: Path, encoder_tokenizer: Any, files: dict[str, str], fact: str
) -> None:
    (tmp_path / "bench").mkdir()
    for name, text in files.items():
        (tmp_path / "bench" / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, tiny.topic_rows(60), encoder_tokenizer)
    [problem] = caught.value.problems
    assert problem.startswith("data.contamination: ")
    assert fact in problem


def test_missing_folder_and_missing_rows_are_refused_together(tmp_path: Path) -> None:
    block = {"train": str(tmp_path / "no.csv"), "contamination": str(tmp_path / "bench")}
    recipe = Recipe.model_validate({"model": "x", "task": "text-classification", "data": block})
    with pytest.raises(DataError) as caught:
        data.prepare(data.Stage(recipe, tmp_path / "data", None, data.Limits(None)))  # type: ignore[arg-type]  # not reached
    assert [problem.partition("; ")[0] for problem in caught.value.problems] == [
        f"{tmp_path}/no.csv: no such file",
        f"data.contamination: {tmp_path}/bench: no such file",
    ]


# ---- the data stage --------------------------------------------------------------------------------------------


def prepare(folder: Path, rows: list[dict[str, Any]], tokenizer: Any, **settings: Any) -> DataSummary:
    return prepare_rows(folder, rows, tokenizer, **{"contamination": str(folder / "bench"), **settings})


def notes(summary: DataSummary) -> list[str]:
    return [note for note in summary.notes if "data.contamination" in note]


def bench(folder: Path, *texts: str) -> None:
    (folder / "bench").mkdir(exist_ok=True)
    (folder / "bench" / "test.txt").write_text("\n".join(texts), encoding="utf-8")


def held_out(folder: Path) -> dict[str, str]:
    """Files for eval and test, so that every row of train is trained on."""
    rows = [{"text": f"held out {number}", "label": "food"} for number in range(4)]
    return {
        name: str(tiny.write_jsonl(folder / f"{name}.jsonl", rows[at : at + 2]))
        for name, at in (("eval", 0), ("test", 2))
    }


def test_planted_texts_are_counted_with_places_and_kept(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = tiny.topic_rows(60)
    bench(tmp_path, TEN, rows[3]["text"].upper(), "food")
    for number in (5, 9, 20):
        rows[number]["text"] = f"{rows[number]['text']} {TEN}"
    summary = prepare(tmp_path, rows, encoder_tokenizer, **held_out(tmp_path))
    [note] = notes(summary)
    assert note.startswith("4 of 60 train rows contain all or much of one of 3 texts of bench (data.contamination): ")
    assert "train.jsonl:4, train.jsonl:6, train.jsonl:10 and 1 more," in note
    assert summary.splits["train"].rows == 60


def test_train_rows_with_a_text_of_the_probe_are_named(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = tiny.topic_rows(60)
    probe = tmp_path / "generic.txt"
    probe.write_text("\n".join([TEN, rows[3]["text"], "something else"]), encoding="utf-8")
    summary = prepare_rows(tmp_path, rows, encoder_tokenizer, probe=probe, **held_out(tmp_path))
    [note] = [note for note in summary.notes if "preserve.probe" in note]
    assert note.startswith("1 of 60 train rows contain all or much of one of 3 texts of generic.txt (preserve.probe): ")
    assert "train.jsonl:4, so" in note


def test_rows_that_are_held_out_do_not_count_and_none_is_said(tmp_path: Path, encoder_tokenizer: Any) -> None:
    rows = tiny.topic_rows(60)
    bench(tmp_path, "held out 2", "held out 3", "something else")
    assert notes(prepare(tmp_path, rows, encoder_tokenizer, **held_out(tmp_path))) == [
        "none of the 60 train rows contains one of 3 texts of bench (data.contamination)"
    ]
    bench(tmp_path, *(row["text"] for row in rows))
    [note] = notes(prepare(tmp_path, rows, encoder_tokenizer))
    assert note.startswith("48 of 48 train rows contain all or much of one of 60 texts")


LONG = "it is because the water of the river runs down to the sea"
ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "prompt": ("causal-lm", {"prompt": "What is it?", "completion": "a b"}, {"prompt": "what  is IT?"}),
    "completion": ("causal-lm", {"prompt": "Why?", "completion": "b c"}, {"completion": LONG}),
    "message": (
        "causal-lm",
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
        {"messages": [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": LONG}]},
    ),
    "target": ("seq2seq", {"source": "a source", "target": "a target"}, {"target": LONG}),
    "question": (
        "question-answering",
        {"question": "Who?", "context": f"He said {LONG}", "answers": "He"},
        {"question": "what is it?"},
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_text_in_any_column_of_a_task_is_found(tmp_path: Path, case: str) -> None:
    task, usual, changed = ROWS[case]
    rows: list[dict[str, Any]] = []
    for number in range(60):
        row: dict[str, Any] = {
            key: f"{value} {number}" if isinstance(value, str) and key != "answers" else value
            for key, value in usual.items()
        }
        if "messages" in row:
            row["messages"] = [{**one, "content": f"{one['content']} {number}"} for one in row["messages"]]
        rows.append(row)
    rows += [{**rows[number], **changed} for number in range(1, 9)]
    bench(tmp_path, LONG, "What is it?", "He", "a target 3")
    tokenizer = tiny.encoder_tokenizer() if task == "question-answering" else tiny.decoder_tokenizer(tiny.CHATML)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    [note] = notes(prepare(tmp_path, rows, tokenizer, task=task))
    trained = list(read_original_rows(tmp_path / "data" / "train"))
    planted = [row for row in trained if all(row[key] == value for key, value in changed.items())]
    assert planted
    assert note.startswith(
        f"{len(planted)} of {len(trained)} train rows contain all or much of one of 4 texts of bench"
    )
