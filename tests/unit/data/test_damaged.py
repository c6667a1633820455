"""Damaged cells, rows and files: what is whole is used, the rest is listed row by row or refused with a way out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from fulltune import data
from fulltune.data.readers.files import list_images
from fulltune.data.readers.read import hash_files, locate_data_files, resolve_image_paths
from fulltune.data.sources import find_source_files
from fulltune.errors import DataError, SetupError
from fulltune.inference.store import read_original_rows
from fulltune.models import base as model_base
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary
from fulltune.tasks import PLACE, Target, question_answering
from tests import tiny
from tests.unit.data.readers.table import read

ROWS = tiny.topic_rows(40)
SURROGATE = "\ud83d"
"""Half of an emoji."""


class Prepared:
    """What the data stage made of a file."""

    def __init__(self, folder: Path, file: Path, tokenizer: Any, task: str = "text-classification", **settings: Any):
        recipe = Recipe.model_validate({"model": "x", "task": task, "data": {"train": str(file), **settings}})
        stage = data.Stage(recipe, folder / "data", tokenizer, data.Limits(tiny.POSITIONS))
        self.summary: DataSummary = data.prepare(stage)
        splits = [list(read_original_rows(folder / "data" / name)) for name in ("train", "eval", "test")]
        self.rows = {row.pop(PLACE): row for rows in splits for row in rows}
        lines = (folder / "data" / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
        self.dropped = {item["place"]: item["reason"] for item in map(json.loads, lines)}


@pytest.fixture
def prepare(tmp_path: Path, encoder_tokenizer: Any) -> Callable[..., Prepared]:
    return lambda file, **settings: Prepared(tmp_path, file, encoder_tokenizer, **settings)


def json_lines(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")
    return path


def table(folder: Path, columns: dict[str, Any], metadata: dict[bytes, bytes] | None = None) -> Path:
    parquet.write_table(pa.table(columns).replace_schema_metadata(metadata), folder / "a.parquet")
    return folder / "a.parquet"


def columns_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def refusal(paths: str | Path | list[str]) -> str:
    with pytest.raises(DataError) as caught:
        read(paths if isinstance(paths, list) else [str(paths)])
    return str(caught.value)


# ---- cells of JSON ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["text", "label"])
def test_row_with_half_a_character_in_a_used_column_is_listed(
    tmp_path: Path, prepare: Callable[..., Prepared], column: str
) -> None:
    rows = [*ROWS[:20], {**ROWS[20], column: f"bad {SURROGATE} one"}, *ROWS[21:]]
    summary = prepare(json_lines(tmp_path, rows))
    assert list(summary.dropped) == ["a.jsonl:21"]
    assert "half a character" in summary.dropped["a.jsonl:21"]
    assert len(summary.rows) == 39
    assert summary.summary.labels == ("food", "weather")


def test_half_a_character_in_an_unused_column_or_name_costs_no_row(
    tmp_path: Path, prepare: Callable[..., Prepared]
) -> None:
    rows: list[dict[str, Any]] = [{**row, "note": "😀"} for row in ROWS]
    rows[3] |= {"note": SURROGATE, f"n{SURROGATE}": 1}
    rows[4] |= {"note": {"a": [SURROGATE]}}
    summary = prepare(json_lines(tmp_path, rows))
    assert not summary.dropped
    assert {place: row["text"] for place, row in summary.rows.items()} == {
        f"a.jsonl:{number}": row["text"] for number, row in enumerate(ROWS, start=1)
    }
    assert summary.rows["a.jsonl:1"]["note"] == "😀"
    assert summary.rows["a.jsonl:4"] == {**ROWS[3], "note": "\\ud83d", "n\\ud83d": 1}


def test_deep_json_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + "[" * 100_000 + "\n")
    assert refusal(path).startswith(f"{path}:2: not valid JSON: its lists or objects are nested too deeply")
    path = path.rename(tmp_path / "a.json")
    path.write_text("[" * 100_000 + "]" * 100_000)
    assert refusal(path).startswith(f"{path}:1: not valid JSON: its lists or objects are nested too deeply")


def test_place_in_a_json_list_is_told_from_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},\n\n3]')
    assert refusal(path).startswith(f"{path}:2: found int in the list, expected a list of objects")


# ---- tables of other programs ----------------------------------------------------------------------------------


def test_binary_columns_are_read_as_text(tmp_path: Path, prepare: Callable[..., Prepared]) -> None:
    columns = {name: [value.encode() for value in values] for name, values in columns_of(ROWS).items()}
    columns["text"][2] = b"caf\xe9"
    summary = prepare(table(tmp_path, columns))
    assert summary.summary.labels == ("food", "weather")
    assert summary.rows["a.parquet:1"] == ROWS[0]
    assert list(summary.dropped) == ["a.parquet:3"]


def test_class_names_that_datasets_keeps_beside_numbers_are_the_labels(
    tmp_path: Path, prepare: Callable[..., Prepared]
) -> None:
    kind = {"_type": "ClassLabel", "names": ["bad", "good"]}
    known = json.dumps({"info": {"features": {"label": kind, "text": {"dtype": "string", "_type": "Value"}}}})
    numbers = [-1, *(number % 2 for number in range(1, 40))]
    summary = prepare(table(tmp_path, {**columns_of(ROWS), "label": numbers}, {b"huggingface": known.encode()}))
    assert summary.summary.labels == ("bad", "good")
    assert summary.rows["a.parquet:2"]["label"] == "good"
    assert list(summary.dropped) == ["a.parquet:1"]  # -1: without a class


@pytest.mark.parametrize("is_whole", [True, False])
def test_arrow_stream_that_was_cut_between_batches_is_refused(tmp_path: Path, is_whole: bool) -> None:
    whole, path = pa.Table.from_pylist(ROWS), tmp_path / "a.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, whole.schema) as writer:
        writer.write_table(whole, max_chunksize=10)
    if is_whole:
        path.write_bytes(path.read_bytes() + bytes(64))  # what stands behind the end mark is nobody's
        assert len(read([str(path)]).rows) == 40
        return
    with pa.OSFile(str(path), "rb") as file, pa.ipc.open_stream(file) as reader:
        reader.read_next_batch()
        reader.read_next_batch()
        cut = file.tell()
    path.write_bytes(path.read_bytes()[:cut])
    assert "a.arrow: not a valid arrow file: truncated after 20 rows: the end-of-stream marker is missing" in refusal(
        path
    )


def test_folder_that_datasets_saved_is_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert read([str(tmp_path / "one")]).rows == ROWS
    DatasetDict({"test": Dataset.from_list(ROWS), "train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "two")
    assert f"for example data.train: {tmp_path}/two/train" in refusal(tmp_path / "two")


# ---- labels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["1e39", "inf", "1e999", 10**400, "nan", float("inf")])
def test_target_beyond_32_bits_is_listed_with_its_row(
    tmp_path: Path, prepare: Callable[..., Prepared], wrong: Any
) -> None:
    rows: list[dict[str, Any]] = [{**row, "label": number + 0.5} for number, row in enumerate(ROWS)]
    rows[7]["label"] = wrong
    summary = prepare(json_lines(tmp_path, rows))
    assert summary.summary.problem_type == "regression"
    assert list(summary.dropped) == ["a.jsonl:8"]
    assert "expected a number of at most 32 bits" in summary.dropped["a.jsonl:8"]


@pytest.mark.parametrize("token", ["Infinity", "-Infinity", "NaN"])
@pytest.mark.parametrize("classes", [("a", "b", "c"), (0, 1, 2)])
def test_json_number_without_an_end_is_no_class(
    tmp_path: Path, prepare: Callable[..., Prepared], token: str, classes: tuple[Any, ...]
) -> None:
    rows = [{**row, "label": classes[number % 3]} for number, row in enumerate(ROWS)]
    rows[7]["label"] = float(token)
    summary = prepare(json_lines(tmp_path, rows))
    assert summary.summary.labels == tuple(map(str, classes))
    assert list(summary.dropped) == ["a.jsonl:8"]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([[0.1, 0.9], [0.8, 0.2]], r"soft or one-hot: \[0.1, 0.9\], first: a.jsonl:1\).*expected the names"),
        (["[0.1, 0.9]", "[1, 0]"], r"soft or one-hot: \[0.1, 0.9\], first: a.jsonl:1\).*expected the names"),
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], r"soft or one-hot: \[1, 0, 0\], first: a.jsonl:1\).*expected the names"),
        ([[1.0, 0.0], [1.0, 1.0]], r"soft or one-hot: \[1.0, 0.0\], first: a.jsonl:1\).*expected the names"),
        ([[["a"]], [["b"], "a"]], r"no row has a label in column 'label': .*first: a.jsonl:1"),
    ],
)
def test_lists_that_name_no_labels_are_refused(
    tmp_path: Path, prepare: Callable[..., Prepared], values: list[Any], problem: str
) -> None:
    rows = [{**row, "label": values[number % len(values)]} for number, row in enumerate(ROWS)]
    with pytest.raises(DataError, match=problem):
        prepare(json_lines(tmp_path, rows))


def test_few_rows_of_a_file_have_every_label(tmp_path: Path, prepare: Callable[..., Prepared]) -> None:
    labels = [f"l{number % 12 if number < 36 else 0}" for number in range(200)]
    path = json_lines(tmp_path, [{"text": f"a text {n} to read", "label": label} for n, label in enumerate(labels)])
    summary = prepare(path, max_rows=40)
    assert len(summary.rows) == 40
    assert len(summary.summary.labels) == len(summary.summary.splits["train"].label_counts) == 12
    with pytest.raises(DataError, match=r"a.jsonl: 12 labels, but data.max_rows allows only 11 rows; raise it"):
        prepare(path, max_rows=11)


def test_questions_as_squad_publishes_them_are_read(tmp_path: Path, prepare: Callable[..., Prepared]) -> None:
    def question(number: int) -> dict[str, Any]:
        answers = [{"text": f"smith {number}", "answer_start": 10}] if number % 8 else []
        return {"question": "by whom ?", "id": f"q{number}", "answers": answers, "is_impossible": number % 4 == 0}

    passages = [{"context": f"made by a smith {n} .", "qas": [question(n), question(n)]} for n in range(40)]
    articles = [{"title": "a", "paragraphs": passages[:25]}, {"title": "b", "paragraphs": passages[25:]}]
    (tmp_path / "a.json").write_text(json.dumps({"version": "v2.0", "data": articles}), encoding="utf-8")
    summary = prepare(tmp_path / "a.json", task="question-answering")
    assert (len(summary.rows), summary.dropped) == (80, {})
    assert "columns not used: id" in summary.summary.notes
    target = Target.of(summary.summary)
    answered = [bool(question_answering.accepted_answers(row, target)) for row in summary.rows.values()]
    assert answered.count(True) == 60


def test_times_as_labels_are_refused(tmp_path: Path, prepare: Callable[..., Prepared]) -> None:
    times = [datetime(2020, 1, 1 + number % 3) for number in range(40)]
    with pytest.raises(DataError, match=r"holds dates or times \(2020-01-01 00:00:00, first: a.parquet:1\)"):
        prepare(table(tmp_path, {**columns_of(ROWS), "label": times}))


def test_answer_start_that_is_no_number_leaves_the_row_out(
    tmp_path: Path, decoder_tokenizer: Any, prepare: Callable[..., Prepared]
) -> None:
    rows: list[dict[str, Any]] = [
        {"context": f"{row['text']}.", "question": "what?", "answers": {"text": ["the"], "answer_start": [0]}}
        for row in ROWS
    ]
    rows[7]["answers"]["answer_start"] = ["a"]
    summary = prepare(json_lines(tmp_path, rows), task="question-answering")
    assert summary.dropped == {"a.jsonl:8": "answer_start is 'a', expected a position in characters"}


# ---- columns ---------------------------------------------------------------------------------------------------


def test_column_names_that_differ_in_case_only_are_refused(tmp_path: Path, prepare: Callable[..., Prepared]) -> None:
    rows = [{"Text": row["text"], "TEXT": "", "label": row["label"]} for row in ROWS]
    with pytest.raises(DataError, match="columns 'Text' and 'TEXT' differ only in case or spaces"):
        prepare(tiny.write_csv(tmp_path / "a.csv", rows))


# ---- files and folders -----------------------------------------------------------------------------------------


def test_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, who reads everything."""
    path = tiny.write_csv(tmp_path / "a.csv", ROWS)
    source = locate_data_files([str(path)])

    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a\.csv: cannot be read \(Permission denied\).*change its permissions"):
        hash_files({"train": source})
    monkeypatch.setattr(Path, "iterdir", refuse)
    recipe = Recipe.model_validate({"model": "x", "task": "text-classification", "data": {"train": str(tmp_path)}})
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
        find_source_files(recipe, {})


def test_model_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SetupError, match=r"model.safetensors is not a complete safetensors file \(Permission denied\)"):
        model_base._check_safetensors_header(tmp_path / "model.safetensors", "m")


# ---- images ----------------------------------------------------------------------------------------------------


def test_images_that_are_broken_links_are_rows(tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "i", 4)
    (tmp_path / "i" / "moved").mkdir()
    (tmp_path / "i" / "moved" / "a.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "i" / "same" / "b.png").symlink_to("b.png")
    labels = {place: row["label"] for place, row in locate_data_files([str(tmp_path / "i")]).rows()}
    assert len(labels) == 6
    assert labels["moved/a.png"] == "moved"
    assert hash_files({"train": locate_data_files([str(tmp_path / "i")])})


def test_image_names_that_are_not_utf8_are_listed_and_folders_refused(tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "i", 4)
    (tmp_path / "i" / "same" / "000.png").rename(tmp_path / "i" / "same" / "b\udce4r.png")
    (place, row), *_ = [one for one in locate_data_files([str(tmp_path / "i")]).rows() if "xe4" in one[0]]
    assert place == "same/b\\xe4r.png"
    assert "not UTF-8" in row["image"].reason
    assert hash_files({"train": locate_data_files([str(tmp_path / "i")])})
    (tmp_path / "i" / "same").rename(tmp_path / "i" / "k\udce4fer")
    with pytest.raises(DataError, match=r"i/k\\xe4fer: the folder name is not UTF-8"):
        list_images(tmp_path / "i")


def test_address_of_an_image_is_no_path(tmp_path: Path) -> None:
    row = resolve_image_paths({"image": "https://example.com/a.png", "label": "x"}, tmp_path, None)
    assert "images are not downloaded" in row["image"].reason
