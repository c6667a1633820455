"""`fulltune predict`: every task, every kind of file, rows that cannot be answered, stdin, in bounded memory.

The models are random and never trained: what they answer is not looked at, only that it is theirs.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fulltune import predict
from fulltune.cli import predict as cli_predict
from fulltune.errors import DataError, InterruptedRun, SetupError
from fulltune.tasks import Target, task_named
from tests import tiny
from tests.contract.command import fulltune

pytestmark = pytest.mark.slow

TEMPERATURE = 2.5
KINDS: dict[str, tuple[str, str, dict[str, str], list[str]]] = {
    # problem type: kind of model, task, columns, labels
    "single_label": ("bert", "text-classification", {"text": "text", "label": "label"}, ["no", "yes", "who knows"]),
    "multi_label": ("bert", "text-classification", {"text": "text", "label": "label"}, ["a", "b"]),
    "regression": ("bert", "text-classification", {"text": "text", "label": "label"}, []),
    "choice": ("bert", "multiple-choice", {"question": "question", "choices": "choices", "label": "label"}, []),
    "tags": ("bert", "token-classification", {"tokens": "tokens", "tags": "tags"}, ["O", "B-LOC", "I-LOC"]),
    "span": (
        *("bert", "question-answering"),
        {"context": "context", "question": "question", "answers": "answers"},
        [],
    ),
    "prompt_completion": ("llama", "causal-lm", {"prompt": "prompt", "completion": "completion"}, []),
    "chat": ("llama", "causal-lm", {"messages": "messages"}, []),
    "source_target": ("t5", "seq2seq", {"source": "source", "target": "target"}, []),
}


def made(folder: Path, problem_type: str) -> Path:
    """A model folder such as training leaves, of a model with random weights."""
    kind, task, columns, labels = KINDS[problem_type]
    tokenizer = tiny.usual_tokenizer(kind)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = "<|pad|>"
    choices = 2 if problem_type == "choice" else 0
    target = Target(problem_type, columns, tuple(labels), "\n", choices)  # type: ignore[arg-type]  # of this type
    changes = task_named(task).config_changes(target, tokenizer)  # type: ignore[arg-type]  # of this type
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        auto = getattr(transformers, task_named(task).FACTS.auto_class)  # type: ignore[arg-type]  # of this type
        model = auto.from_config(tiny.config(kind, tokenizer, initializer_range=0.5, **changes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    notes = {"task": task, "problem_type": problem_type, "columns": columns, "labels": labels, "joint": "\n"}
    notes |= {"num_choices": choices, "stride": None, "max_length": 24, "temperature": TEMPERATURE}
    (folder / "fulltune.json").write_text(json.dumps(notes), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder for each kind of problem."""
    folder = tmp_path_factory.mktemp("models")
    return {kind: made(folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def classifier(models: dict[str, Path]) -> Path:
    return models["single_label"]


def read(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(file).to_pylist()
    with file.open(encoding="utf-8", newline="") as stream:
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in stream]
        return list(csv.DictReader(stream, delimiter="\t" if file.suffix == ".tsv" else ","))


@pytest.mark.parametrize(
    ("content", "said"), [("null", "expected a JSON object, found null"), ("{", "the file is not valid JSON")]
)
def test_notes_of_a_model_that_are_damaged_are_named(content: str, said: str, classifier: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(classifier, tmp_path / "run" / "models" / "full")
    (folder / "fulltune.json").write_text(content)
    result = fulltune("predict", tmp_path / "run", "a text")
    assert result.problems == [f"{folder}/fulltune.json: {said}; copy, download or train the model again"]
    assert result.code == 2


def test_notes_without_what_training_wrote_are_named(classifier: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(classifier, tmp_path / "run" / "models" / "full")
    (folder / "fulltune.json").write_text("{}")
    result = fulltune("predict", tmp_path / "run", "a text")
    lacking = "task, problem_type, columns, labels, joint"
    advice = "copy it again from where you trained"
    assert result.problems == [f"{folder}/fulltune.json: lacks {lacking}; {advice}"]
    assert result.code == 2


def test_labels_that_are_not_the_models_are_refused(classifier: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(classifier, tmp_path / "model")
    notes = json.loads((folder / "fulltune.json").read_text(encoding="utf-8"))
    (folder / "fulltune.json").write_text(json.dumps({**notes, "labels": notes["labels"][::-1]}), encoding="utf-8")
    result = fulltune("predict", folder, "a text")
    said = "its labels are not those of config.json (id2label); write the same in both"
    assert result.problems == [f"{folder}/fulltune.json: {said}"]
    assert result.code == 2


def test_model_of_an_earlier_version_lacks_some_notes(classifier: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(classifier, tmp_path / "model")
    notes = json.loads((folder / "fulltune.json").read_text(encoding="utf-8"))
    del notes["num_choices"], notes["stride"]
    (folder / "fulltune.json").write_text(json.dumps(notes), encoding="utf-8")
    assert fulltune("predict", folder, "a text").code == 0


# ---- files -----------------------------------------------------------------------------------------------------


ROWS = [
    {"id": "a1", "text": 'the sun shines, and\n"we" cook soup', "label": "yes"},
    {"id": "a2", "text": " ", "label": "no"},
    {"id": "a3", "text": "rain", "label": "no"},
]
ADDED = ["predicted_label", "predicted_probability"]
ADDED += ["predicted_probability_no", "predicted_probability_yes", "predicted_probability_who knows"]
ADDED += ["predicted_error"]


@pytest.mark.parametrize(
    ("given", "suffix"), [("csv", "tsv"), ("csv", "jsonl"), ("parquet", "csv"), ("parquet", "parquet")]
)
def test_file_keeps_the_rows_own_columns_and_adds_label_and_all_probabilities(
    given: str, suffix: str, classifier: Path, tmp_path: Path
) -> None:
    file = tiny.write_csv(tmp_path / "in.csv", ROWS)
    if given == "parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(ROWS), file := tmp_path / "in.parquet")
    output = tmp_path / f"out.{suffix}"
    said = fulltune("predict", classifier, "--file", file, "-o", output)
    assert said.code == 0, said.err
    found = read(output)
    assert [{name: row[name] for name in ("id", "text", "label")} for row in found] == ROWS
    assert list(found[0]) == ["id", "text", "label", *ADDED]

    plain = predict.load_predictor(classifier).predict([{"text": row["text"]} for row in ROWS if row["text"].strip()])
    for row, answer in zip((found[0], found[2]), plain, strict=True):
        assert row["predicted_label"] == answer["label"]
        for name, chance in answer["probabilities"].items():
            assert float(row[f"predicted_probability_{name}"]) == pytest.approx(chance, rel=1e-5)
        assert not row["predicted_error"]
    assert found[1]["predicted_error"] == "column 'text' is empty"
    assert not any(found[1][name] for name in ADDED[:-1])
    place = "in.csv:4" if given == "csv" else "in.parquet:2"
    assert f"{place}: column 'text' is empty" in said.err
    assert (
        "1 of 3 rows got no answer; their new columns are empty except 'predicted_error', which gives the reason"
        in said.err
    )
    assert list(tmp_path.glob("*.part")) == []


ASKED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "single_label": ({"text": "sun"}, ADDED[:-1]),
    "multi_label": (
        {"text": "sun"},
        ["predicted_labels", "predicted_probability_a", "predicted_probability_b"],
    ),
    "regression": ({"text": "sun"}, ["predicted_value"]),
    "choice": (
        {"question": "what?", "choices": ["sun", "rain"]},
        [
            *("predicted_index", "predicted_text", "predicted_probability"),
            *("predicted_probability_0", "predicted_probability_1"),
        ],
    ),
    "tags": ({"tokens": ["sun", "rain"]}, ["predicted_tokens", "predicted_tags", "predicted_entities"]),
    "span": (
        {"question": "what shines?", "context": "the sun shines"},
        ["predicted_answer", "predicted_start", "predicted_probability"],
    ),
    "prompt_completion": ({"prompt": "what?"}, ["predicted_answer"]),
    "chat": ({"messages": [{"role": "user", "content": "what?"}]}, ["predicted_answer"]),
    "source_target": ({"source": "sun"}, ["predicted_answer"]),
}


def alike(one: Any, other: Any) -> bool:
    """Equal, or numbers (also as text) but for their last digits: two batches may add up in another order."""
    try:
        return math.isclose(float(one), float(other), rel_tol=1e-4, abs_tol=1e-6)
    except (TypeError, ValueError):
        return bool(one == other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_every_task_has_its_columns_and_a_bad_row_does_not_stop_the_others(
    kind: str, suffix: str, models: dict[str, Path], tmp_path: Path
) -> None:
    good, columns = ASKED[kind]
    bad = {name: [] if isinstance(value, list) else "" for name, value in good.items()}
    file = tiny.write_jsonl(tmp_path / "in.jsonl", [good, bad, good])
    output = tmp_path / f"out.{suffix}"
    said = fulltune("predict", models[kind], "--file", file, "-o", output, "--max-new-tokens", 4)
    assert said.code == 0, said.err
    assert "in.jsonl:2: " in said.err
    found = read(output)
    assert list(found[0]) == [*good, *columns, "predicted_error"]
    assert all(alike(found[0][name], found[2][name]) for name in columns)
    assert found[0][columns[0]] is not None
    assert [bool(row["predicted_error"]) for row in found] == [False, True, False]
    assert not any(found[1][name] for name in columns)


def test_columns_that_are_there_already_are_kept_and_the_new_ones_get_another_name(
    classifier: Path, tmp_path: Path
) -> None:
    file = tiny.write_csv(tmp_path / "in.csv", [{"text": "sun", "predicted_label": "mine", "probability": "0.5"}])
    once, twice = tmp_path / "once.csv", tmp_path / "twice.csv"
    assert fulltune("predict", classifier, "--file", file, "-o", once).code == 0
    assert fulltune("predict", classifier, "--file", once, "-o", twice).code == 0
    [row] = read(twice)
    assert (row["predicted_label"], row["probability"]) == ("mine", "0.5")
    assert row["predicted2_label"] == row["predicted3_label"]


HEADERLESS = [["a1", "the sun, again", "yes"], ["a2", "rain", "no"]]


@pytest.fixture(scope="module")
def trained_without_header(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of a recipe with `data.columns: [id, text, label]`."""
    folder = shutil.copytree(models["single_label"], tmp_path_factory.mktemp("headerless") / "model")
    notes = json.loads((folder / "fulltune.json").read_text(encoding="utf-8"))
    notes["table_columns"] = ["id", "text", "label"]
    (folder / "fulltune.json").write_text(json.dumps(notes), encoding="utf-8")
    return folder


@pytest.mark.parametrize("num_cells", [3, 2])
def test_table_without_header_has_the_names_of_the_recipe_and_loses_no_row(
    num_cells: int, trained_without_header: Path, tmp_path: Path
) -> None:
    with (tmp_path / "in.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([cells[:num_cells] for cells in HEADERLESS])
    output = tmp_path / "out.csv"
    said = fulltune("predict", trained_without_header, "--file", tmp_path / "in.csv", "-o", output)
    assert said.code == 0, said.err
    names = ["id", "text", "label"][:num_cells]
    assert f"in.csv: has no header line, so the columns of the train file are used: {', '.join(names)}" in said.err
    found = read(output)
    assert [[row[name] for name in names] for row in found] == [cells[:num_cells] for cells in HEADERLESS]
    assert list(found[0]) == [*names, *ADDED]
    assert all(row["predicted_label"] for row in found)


def test_table_without_header_and_with_other_cells_than_in_training_is_refused(
    trained_without_header: Path, tmp_path: Path
) -> None:
    (tmp_path / "in.csv").write_text("sun\nrain\n", encoding="utf-8")
    said = fulltune("predict", trained_without_header, "--file", tmp_path / "in.csv")
    assert said.code == DataError.exit_code
    assert "in.csv:1: found 1 cell, but data.columns has 3" in said.err


def test_types_of_a_parquet_file_stay_and_columns_of_others_are_text(classifier: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    mixed = [{"text": "sun", "n": 1}, {"text": "rain", "n": "two", "late": [1]}]
    file = tiny.write_jsonl(tmp_path / "in.jsonl", mixed)
    output = tmp_path / "out.parquet"
    assert fulltune("predict", classifier, "--file", file, "-o", output).code == 0
    assert [(row["n"], row["late"]) for row in read(output)] == [("1", None), ("two", "[1]")]

    typed = pa.table({"text": ["sun"], "small": pa.array([3], pa.int16())})
    parquet.write_table(typed, tmp_path / "typed.parquet")
    assert fulltune("predict", classifier, "--file", tmp_path / "typed.parquet", "-o", output, "--force").code == 0
    assert parquet.read_schema(output).field("small").type == pa.int16()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("there.csv", "there.csv: already exists; name another file, or replace it with --force"),
        ("out.xlsx", "out.xlsx: cannot be written as '.xlsx'; expected one of .csv, .tsv, .jsonl, .ndjson, .parquet"),
        ("nowhere/out.csv", "does not exist"),
    ],
)
def test_output_that_cannot_or_must_not_be_written_is_refused(
    name: str, message: str, classifier: Path, tmp_path: Path
) -> None:
    (tmp_path / "there.csv").write_text("mine", encoding="utf-8")
    said = fulltune("predict", classifier, "sun", "-o", tmp_path / name)
    assert said.code == SetupError.exit_code
    assert message in said.err
    assert (tmp_path / "there.csv").read_text(encoding="utf-8") == "mine"


def test_interrupted_output_leaves_no_file_and_keeps_the_one_it_would_replace(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tiny.write_csv(tmp_path / "in.csv", ROWS)
    output = tmp_path / "out.csv"
    output.write_text("before", encoding="utf-8")
    cells = cli_predict.make_added_cells

    def interrupt(new: Any, answer: Any, reason: Any) -> Any:
        if answer is None:
            raise KeyboardInterrupt
        return cells(new, answer, reason)

    monkeypatch.setattr(cli_predict, "make_added_cells", interrupt)
    said = fulltune("predict", classifier, "--file", file, "-o", output, "--force")
    assert said.code == InterruptedRun.exit_code
    assert "was not written" in said.err
    assert output.read_text(encoding="utf-8") == "before"
    assert [path.name for path in tmp_path.iterdir() if path.name != "in.csv"] == ["out.csv"]


def test_broken_file_is_refused_before_a_row_is_answered(classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text,id\nsun,1\nrain\n", encoding="utf-8")
    said = fulltune("predict", classifier, "--file", tmp_path / "in.csv", "-o", tmp_path / "out.csv")
    assert said.code == DataError.exit_code
    assert "in.csv:3: found 1 cell, but the header has 2" in said.err
    assert not (tmp_path / "out.csv").exists()


def test_file_without_any_usable_row_is_refused_and_nothing_is_written(classifier: Path, tmp_path: Path) -> None:
    file = tiny.write_csv(tmp_path / "in.csv", [{"text": " ", "id": number} for number in range(8)])
    said = fulltune("predict", classifier, "--file", file, "-o", tmp_path / "out.csv")
    assert said.code == DataError.exit_code
    assert "in.csv: no row could be answered (8 rows)" in said.err
    assert "... and 3 more" in said.err
    assert not (tmp_path / "out.csv").exists()


# ---- texts, lines and JSON -------------------------------------------------------------------------------------


def test_json_is_the_same_for_texts_stdin_and_files_but_for_the_place(classifier: Path, tmp_path: Path) -> None:
    texts = ["the sun", "", "rain"]
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(texts), encoding="utf-8")
    table = tiny.write_csv(tmp_path / "table.csv", [{"id": number, "text": text} for number, text in enumerate(texts)])
    said = {
        "text ": fulltune("predict", classifier, *texts, "--json"),
        "stdin:": fulltune("predict", classifier, "-", "--json", stdin="\n".join(texts)),
        "lines.txt:": fulltune("predict", classifier, "--file", lines, "--json"),
        "table.csv:": fulltune("predict", classifier, "--file", table, "--json"),
    }
    answers = {}
    for place, one in said.items():
        assert one.code == 0, one.err
        rows = [json.loads(line) for line in one.out.splitlines()]
        first = 2 if place == "table.csv:" else 1
        assert [row.pop("place") for row in rows] == [f"{place}{number}" for number in range(first, first + 3)]
        assert set(rows[1]) == {"error"}
        answers[place] = [rows[0], rows[2]]
    assert all(one == answers["text "] for one in answers.values())
    first = answers["text "][0]
    assert set(first["probabilities"]) == {"no", "yes", "who knows"}
    assert sum(first["probabilities"].values()) == pytest.approx(1)
    assert first["probability"] == max(first["probabilities"].values()) == first["probabilities"][first["label"]]


def test_row_that_cannot_be_answered_is_an_error_from_python(classifier: Path) -> None:
    with pytest.raises(
        DataError, match=r"predict: 1 row cannot be answered; the first is row 2: column 'text' is empty"
    ):
        predict.load_predictor(classifier).predict([{"text": "sun"}, {"text": ""}])


@pytest.mark.parametrize("problem_type", ["single_label", "tags", "prompt_completion", "chat", "source_target"])
def test_text_is_a_row_from_python_where_the_model_reads_one(problem_type: str, models: dict[str, Path]) -> None:
    predictor = predict.load_predictor(models[problem_type])
    row = predict.row_from_text("the sun shines", predictor.notes)
    assert predictor.predict(["the sun shines"], max_new_tokens=4) == predictor.predict([row], max_new_tokens=4)


@pytest.mark.parametrize(("problem_type", "columns"), [("span", "context, question"), ("choice", "question, choices")])
def test_text_for_a_model_that_reads_several_columns_is_refused_with_their_names(
    problem_type: str, columns: str, models: dict[str, Path]
) -> None:
    with pytest.raises(DataError, match=f"with the columns {columns}"):
        predict.load_predictor(models[problem_type]).predict(["the sun shines"])


def test_text_in_place_of_a_list_is_no_list_of_letters(classifier: Path) -> None:
    with pytest.raises(DataError, match=r"write predict\(\[text\]\)"):
        predict.load_predictor(classifier).predict("the sun shines")


# ---- many rows -------------------------------------------------------------------------------------------------


def test_answers_come_in_order_while_only_a_window_of_rows_has_been_read(classifier: Path) -> None:
    read_so_far = 0

    def rows() -> Iterator[dict[str, str]]:
        nonlocal read_so_far
        for number in range(5000):
            read_so_far = number + 1
            yield {"text": "sun" if number % 2 else "the rain in the town" * (number % 3)}

    answers = predict.load_predictor(classifier).answer_each(rows())
    first = [next(answers) for _ in range(12)]
    assert read_so_far <= 2049
    assert [one.refused is not None for one in first[::2]] == [True, False, False] * 2
    assert first[1] == first[3] == first[11]
