"""Bad input: one line that says where, what and what to do; the right exit code; never a traceback."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fulltune import data as data_stage
from fulltune.records.training import Outcome
from fulltune.system import hardware
from tests import tiny, untraced_command
from tests.contract.command import Result, assert_same_facts, fulltune
from tests.train import runs

RECIPE, NO_FIT, DATA, INTERRUPTED = 2, 3, 4, 75
ROWS = tiny.topic_rows(40)
CSV = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS)


class Case:
    """A folder with a data file and a recipe, and `fulltune data` on it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model

    def write(self, content: str | bytes | Sequence[dict[str, Any]], name: str = "train.csv") -> Path:
        path = self.folder / name
        if isinstance(content, (str, bytes)):
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            return path
        return (tiny.write_csv if name.endswith("csv") else tiny.write_jsonl)(path, content)

    def recipe(self, name: str = "train.csv", model: Path | str | None = None, **blocks: Any) -> Path:
        return tiny.write_recipe(self.folder / "recipe.yaml", model or self.model, name, **blocks)

    def data(
        self,
        content: str | bytes | Sequence[dict[str, Any]] | None = None,
        name: str = "train.csv",
        command: str = "data",
        model: Path | str | None = None,
        **blocks: Any,
    ) -> Result:
        if content is not None:
            self.write(content, name)
        return fulltune(command, self.recipe(name, model, **blocks))

    def text(self, recipe: str) -> Result:
        path = self.folder / "recipe.yaml"
        path.write_text(recipe)
        return fulltune("data", path)


@pytest.fixture
def case(tmp_path: Path, tiny_encoder: Path) -> Case:
    return Case(tmp_path, tiny_encoder)


@pytest.fixture
def chat_case(tmp_path: Path, tiny_decoder: Path) -> Callable[..., Result]:
    here = Case(tmp_path, tiny_decoder)
    return lambda rows, **blocks: here.data(rows, name="train.jsonl", task="causal-lm", **blocks)


def refused(result: Result, code: int, *problems: str) -> None:
    """The command failed with this code and named these places, numbers and settings, one line for each problem."""
    assert "Traceback" not in result.err
    assert_same_facts(result.problems, problems)
    assert result.code == code


def accepted(result: Result) -> str:
    assert "Traceback" not in result.err
    assert result.code == 0, result.err
    return result.out


# ---- files -----------------------------------------------------------------------------------------------------


def test_data_file_misnamed_shows_what_is_there(case: Case) -> None:
    case.write(CSV, "trian.csv")
    refused(
        case.data(),
        DATA,
        f"{case.folder}/train.csv: no such file (in that folder: trian.csv); give the path of a data file",
    )


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("train.csv", "", ": the file is empty; choose another file, or write it again"),
        ("train.csv", "text,label\n", ": no rows; add rows, or choose another file"),
        (
            "train.csv",
            "text,text\na,b\n",
            ":1: column 'text' appears twice in the header; rename one",
        ),
        (
            "train.csv",
            CSV + "a,b,c\n",
            ":42: found 3 cells, but the header has 2; put a text with commas or line breaks in double quotes",
        ),
        (
            "train.csv",
            CSV + '"never closed,food\n',
            ":42: a double quote in this row is never closed; close it at the end of the cell",
        ),
        (
            "train.csv",
            CSV.replace(",", "\t"),
            ":1: its columns are separated by tabs, expected commas; save it with commas as .csv or with tabs as .tsv",
        ),
        (
            "train.csv",
            CSV.encode("utf-16"),
            ":1: contains NUL bytes (is it UTF-16?), but UTF-8 text was expected; save it as UTF-8, or set "
            "data.encoding",
        ),
        (
            "train.csv",
            CSV.encode() * 500 + "é,food\n".encode("latin-1"),
            ":20501: not UTF-8; save it as UTF-8, or set data.encoding",
        ),
        (
            "train.json",
            '{"a": 1}',
            ": found dict, expected a list of objects [{...}, ...]; write one object for each row",
        ),
        (
            "train.json",
            '[{"a": 1},\n{"a":}]',
            ":2: not valid JSON: Expecting value (column 6); repair it, or write it again",
        ),
        (
            "train.json",
            '{"a": 1}\n{"a": 2}\n',
            ":2: not valid JSON: Extra data (column 1); rename it to .jsonl",
        ),
        (
            "train.xlsx",
            "x",
            ": unknown file type '.xlsx'; expected .csv, .tsv, .jsonl, .ndjson, .json, .parquet, .arrow, .feather, "
            ".conll, .iob, .bio: save it as one of them",
        ),
    ],
)
def test_data_file_broken_names_file_and_line(case: Case, name: str, content: str | bytes, problem: str) -> None:
    refused(case.data(content, name), DATA, f"{case.folder}/{name}{problem}")


def test_json_lines_broken_names_each_line(case: Case) -> None:
    broken = '{"text": "a", "label": "x"}\n{"text": "b", "label"\n\n{"text": "c", "label": "y",}\n[1]\n'
    here = f"{case.folder}/train.jsonl"
    expected = "expected an object {...} on each line; repair or remove it"
    refused(
        case.data(broken, "train.jsonl"),
        DATA,
        f"{here}:2: not valid JSON: Expecting ':' delimiter (column 22); {expected}",
        f"{here}:4: not valid JSON: Expecting property name enclosed in double quotes (column 28); {expected}",
        f"{here}:5: found list, {expected}",
    )


# ---- columns and labels ----------------------------------------------------------------------------------------


def test_column_unknown_offers_near_name(case: Case) -> None:
    refused(case.data(CSV, data={"text": "txt"}), DATA, "train.csv: no column 'txt' (data.text); did you mean 'text'?")


def test_column_not_found_asks_for_it(case: Case) -> None:
    refused(
        case.data(CSV.replace("label", "b", 1)),
        DATA,
        "train.csv: no column found for data.label; set it in the recipe (columns in the file: text, b)",
    )


def test_column_missing_in_test_file_is_refused(case: Case) -> None:
    case.write("text,y\na,food\n", "test.csv")
    refused(
        case.data(CSV, data={"test": "test.csv"}),
        DATA,
        "test.csv: no column 'label' (data.label), which train has; columns in the file: text, y",
    )


def test_label_only_in_held_out_rows_is_refused(case: Case) -> None:
    case.write("text,label\nq,zebra\nr,food\ns,food\n", "test.csv")
    refused(
        case.data(CSV, data={"test": "test.csv"}),
        DATA,
        "test.csv: label 'zebra' (1 row of test) never occurs in train; add such rows to train, or remove these",
    )


def test_one_class_only_is_refused(case: Case) -> None:
    refused(
        case.data([{**row, "label": "food"} for row in ROWS]),
        DATA,
        "train.csv: every row has the label 'food'; a classifier needs at least two classes",
    )


def test_labels_all_different_are_refused(case: Case) -> None:
    refused(
        case.data([{"text": f"t {number}", "label": f"x{number}"} for number in range(200)]),
        DATA,
        "train.csv: column 'label' has 200 different labels in 200 rows; is it the right column? To predict numbers, "
        "set data.problem_type: regression",
    )


def test_labels_numbers_and_words_are_refused(case: Case) -> None:
    rows = [{**row, "label": "3" if number < 3 else row["label"]} for number, row in enumerate(ROWS)]
    refused(
        case.data(rows),
        DATA,
        "train.csv: column 'label' has both words ('food' in 19 rows, 'weather' in 18 rows) and numbers ('3' in 3 "
        "rows) as labels, first: train.csv:2. Expected only one of the two: rename the labels, or remove the "
        "wrong rows",
    )


@pytest.mark.parametrize(
    ("column", "check"), [("text", "no text"), ("label", "no label")], ids=["without text", "without label"]
)
def test_rows_empty_many_are_refused(case: Case, column: str, check: str) -> None:
    rows = [{**row, column: " " if number < 10 else row[column]} for number, row in enumerate(ROWS)]
    refused(
        case.data(rows),
        DATA,
        f"train.csv: 10 of 40 rows cannot be used ({check}: 10). The first is train.csv:2: column '{column}' is empty. "
        "Remove or repair these rows, or choose another column in the recipe",
    )


def test_two_rows_are_too_few(case: Case) -> None:
    refused(
        case.data("text,label\na,x\nb,y\n"),
        DATA,
        "train.csv: 2 rows of 2 labels: too few for three splits of at least 2 rows (eval has 0, test has "
        "0); add rows, at least 3 different ones of each label, or set data.eval and data.test",
    )


def test_test_file_with_one_row_is_refused(case: Case) -> None:
    case.write("text,label\nq,food\n", "test.csv")
    refused(case.data(CSV, data={"test": "test.csv"}), DATA, "test.csv: 1 usable row for test; expected at least 2")


def test_labels_objects_are_refused(case: Case) -> None:
    refused(
        case.data([{"text": f"t {n}", "label": {"name": "ab"[n % 2]}} for n in range(40)], "train.jsonl"),
        DATA,
        "train.jsonl: column 'label' holds objects ({'name': 'a'}, first: train.jsonl:1); expected a class name, a "
        "list of class names, or a number",
    )


def test_labels_several_as_single_label_are_refused(case: Case) -> None:
    rows = [{"text": f"t {n}", "label": ["a", "b"][: 1 + n % 2]} for n in range(40)]
    refused(
        case.data(rows, "train.jsonl", data={"problem_type": "single_label"}),
        DATA,
        "train.jsonl: column 'label' holds several labels in a row (['a', 'b'], first: train.jsonl:2); expected "
        "one, or set data.problem_type: multi_label",
    )


def test_regression_target_word_is_refused(case: Case) -> None:
    refused(
        case.data(CSV, data={"problem_type": "regression"}),
        DATA,
        "train.csv: column 'label' must hold numbers for regression, but 40 values cannot be read as one, such as "
        "'weather', first: train.csv:2; repair or remove these rows",
    )


# ---- conversations ---------------------------------------------------------------------------------------------


def conversation(number: int, *turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"question {number}"}, *turns]}


ANSWER = {"role": "assistant", "content": "yes"}


def test_messages_without_content_are_refused(chat_case: Callable[..., Result]) -> None:
    refused(
        chat_case([{"messages": [{"role": "user"}, ANSWER]}] * 20),
        DATA,
        "train.jsonl: 20 of 20 rows cannot be used (no conversation: 20). The first is "
        "train.jsonl:1: a message with role "
        "'user' has neither 'content' nor 'tool_calls'. Remove or repair these rows, or choose another column in the "
        "recipe",
    )


def test_answers_beyond_max_length_are_refused(chat_case: Callable[..., Result]) -> None:
    rows = [conversation(n, {"role": "user", "content": "rain " * 300}, ANSWER) for n in range(40)]
    result = chat_case(rows)
    first = result.problems[0].split("The first is ")[1].split(": ")[0]
    refused(
        result,
        DATA,
        f"train.jsonl: 40 of 40 rows cannot be used (answer cut off: 40). The first is {first}: the whole answer lies "
        "beyond data.max_length. Raise data.max_length, shorten these rows, or drop them with "
        "data.truncation_strategy: drop",
    )


def test_chat_template_missing_is_refused(case: Case, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "plain", "gpt2", tokenizer=tiny.decoder_tokenizer(None))
    refused(
        case.data(tiny.chat_rows(), "train.jsonl", model=model, task="causal-lm"),
        RECIPE,
        "the tokenizer has no chat template; use an instruct model, or set data.chat_template to a Jinja file",
    )


def test_chat_template_broken_is_refused(chat_case: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}\n{{ m.content }")
    refused(
        chat_case(tiny.chat_rows(), data={"chat_template": "bad.jinja"}),
        RECIPE,
        "the chat template is no valid Jinja: line 2: unexpected '}'",
    )


# ---- models ----------------------------------------------------------------------------------------------------


@pytest.fixture
def broken_model(tmp_path: Path, tiny_encoder: Path) -> Path:
    """A copy of the tiny encoder that a test may break."""
    import shutil

    return Path(shutil.copytree(tiny_encoder, tmp_path / "broken"))


def test_model_id_offline_is_refused(case: Case) -> None:
    refused(
        case.data(CSV, model="nobody/nothing"),
        RECIPE,
        "model: nobody/nothing: not found here or on the Hub (are you offline, or is the id wrong?); use a "
        "folder, a .gguf file, package:NAME/PATH or, offline, the id of a cached model",
    )


def test_model_file_and_column_that_are_missing_are_named_at_once(case: Case) -> None:
    model = f"model: {case.folder}/nowhere: no such file or folder"
    refused(
        case.data(model="./nowhere"),
        RECIPE,
        model,
        f"{case.folder}/train.csv: no such file; give the path of a data file",
    )
    result = case.data(CSV, model="./nowhere", data={"train": "train.csv", "text": "body"})
    assert result.code == RECIPE
    assert result.problems[0] == model
    assert "'body'" in result.problems[1]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    ("content", "said"), [("[1]", "expected a JSON object, found [1]"), ("{", "the file is not valid JSON")]
)
def test_model_file_that_is_damaged_is_named(
    case: Case, broken_model: Path, name: str, content: str, said: str
) -> None:
    (broken_model / name).write_text(content)
    problem = f"{broken_model}/{name}: {said}; copy, download or train the model again"
    refused(case.data(CSV, model=broken_model), RECIPE, problem)


def test_model_folder_without_model_is_refused(case: Case) -> None:
    (case.folder / "docs").mkdir()
    (case.folder / "docs" / "readme.txt").touch()
    refused(
        case.data(CSV, model="./docs"),
        RECIPE,
        f"model: {case.folder}/docs: is not a model folder: config.json is missing (found: readme.txt)",
    )


def test_model_package_missing_is_refused(case: Case) -> None:
    refused(
        case.data(CSV, model="package:no_such_thing/model"),
        RECIPE,
        "model: package:no_such_thing/model: the Python package 'no_such_thing' is not installed; pip install "
        "no-such-thing",
    )


def test_model_weights_pickled_are_refused_unless_allowed(case: Case, broken_model: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(broken_model / "model.safetensors"), broken_model / "pytorch_model.bin")
    (broken_model / "model.safetensors").unlink()
    refused(
        case.data(CSV, model=broken_model),
        RECIPE,
        f"model: {broken_model}: the weights are pickled, and unpickling can run arbitrary code; convert them to "
        "safetensors or, if you trust their source, set model.allow_pickled_weights: true",
    )
    allowed = {"name": str(broken_model), "allow_pickled_weights": True}
    tiny.write_recipe(case.folder / "allowed.yaml", broken_model, "train.csv", model=allowed)
    accepted(fulltune("data", case.folder / "allowed.yaml"))


class _Foreign:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def test_pickle_with_foreign_code_is_refused_in_our_own_words(
    case: Case, broken_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    (broken_model / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(2), "more": _Foreign()}, broken_model / "pytorch_model.bin")
    monkeypatch.chdir(case.folder)
    allowed = {"name": str(broken_model), "allow_pickled_weights": True}
    with runs.in_this_process(), runs.without_tracing():
        recipe = tiny.write_recipe(case.folder / "r.yaml", broken_model, case.write(CSV), model=allowed)
        result = fulltune("run", recipe)
    assert not (case.folder / "ran").exists()
    assert result.code == RECIPE
    assert f"model: {broken_model}: the pickled weights were not loaded" in result.err
    assert "posix.mkdir" in result.err
    assert "weights_only" not in result.err


def test_model_code_is_never_run_unless_trusted(case: Case, broken_model: Path) -> None:
    config = json.loads((broken_model / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "mine.Config"}, "model_type": "mine"}
    (broken_model / "config.json").write_text(json.dumps(config))
    (broken_model / "mine.py").write_text(f"open({str(case.folder / 'ran')!r}, 'w')")
    refused(
        case.data(CSV, model=broken_model),
        RECIPE,
        f"model: {broken_model}: the model needs Python code from its repository; review the code, then set "
        "model.trust_remote_code: true in the recipe. predict, export and push cannot run it; transformers can",
    )
    assert not (case.folder / "ran").exists()


def test_model_weights_missing_are_named(case: Case, broken_model: Path) -> None:
    (broken_model / "model.safetensors").unlink()
    refused(
        case.data(CSV, model=broken_model),
        RECIPE,
        f"model: {broken_model}: no weights (*.safetensors) beside config.json",
    )


def test_model_weights_cut_short_are_refused(case: Case, broken_model: Path) -> None:
    weights = broken_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = case.data(CSV, model=broken_model)
    assert result.code == RECIPE
    assert result.problems[0].startswith(f"model: {broken_model}: model.safetensors is not a complete safetensors file")
    assert result.problems[0].endswith("); copy or download it again")


def test_model_tokenizer_missing_is_refused(case: Case, broken_model: Path) -> None:
    for file in broken_model.glob("tok*"):
        file.unlink()
    refused(
        case.data(CSV, model=broken_model),
        RECIPE,
        f"model: {broken_model}: the tokenizer has no vocabulary; check that the folder has "
        "tokenizer.json, vocab.txt or tokenizer.model",
    )


@pytest.mark.parametrize("config", ["{}", '{"model_type": "nobody_knows"}'])
def test_model_config_broken_is_refused(case: Case, broken_model: Path, config: str) -> None:
    (broken_model / "config.json").write_text(config)
    result = case.data(CSV, model=broken_model)
    assert result.code == RECIPE
    assert "Traceback" not in result.err
    assert result.problems[0].startswith(f"model: {broken_model}: the config cannot be read: ")


def test_model_that_cannot_write_is_refused_for_causal_lm(case: Case) -> None:
    refused(
        case.data(tiny.pair_rows(), task="causal-lm"),
        RECIPE,
        f"model: {case.model}: a 'bert' model cannot generate text; use a decoder (GPT- or Llama-like)",
    )


def test_max_length_over_the_models_limit_is_refused(case: Case) -> None:
    refused(
        case.data(CSV, data={"max_length": 500}),
        RECIPE,
        "data.max_length: 500 tokens, but the model accepts at most 128; set data.max_length: 128 or less",
    )


# ---- recipe ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "problem"),
    [
        ("- a\n", ": expected settings such as 'model: ...', found a list"),
        ("model: x\ndata:\n\ttrain: a\n", ":3  not valid YAML: found character '\\t' that cannot start any token"),
        (
            "model: !!python/object/apply:os.system [x]\n",
            ":1  not valid YAML: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object/apply:os.system'",
        ),
        (
            "model: x\ntask: causal-lm\ndata: {train: a}\ntask: causal-lm\n",
            ":4  task: set twice; keep only one of the lines",
        ),
        (
            "model: x\ntask: causal-lm\ndata: {train: '${NO_SUCH_NAME}/a'}\n",
            ":3  data.train: environment variable NO_SUCH_NAME is not set",
        ),
        ("model: x\ntask: causal-lm\ndata: {train: []}\n", ":3  data.train: no file is given"),
        (
            "model: x\ntask: causal-lm\ndata:\n  train: a\n  test: a\n",
            ":5  data.test: also in train, but a model must not be scored on train rows; use another file",
        ),
    ],
)
def test_recipe_broken_names_line(case: Case, recipe: str, problem: str) -> None:
    refused(case.text(recipe), RECIPE, f"{case.folder}/recipe.yaml{problem}")


def test_recipe_missing_is_refused(tmp_path: Path) -> None:
    refused(
        fulltune("run", tmp_path / "no.yaml"),
        RECIPE,
        f"{tmp_path}/no.yaml: no such file; write a recipe with 'fulltune init DATA'",
    )


def test_recipe_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes("model: x".encode("utf-16"))
    refused(
        fulltune("run", tmp_path / "r.yaml"),
        RECIPE,
        f"{tmp_path}/r.yaml: expected a recipe (YAML), found a file that is not UTF-8 text (byte 0)",
    )


def test_plan_impossible_is_refused(case: Case) -> None:
    cores = hardware.num_cores()
    refused(
        case.data(CSV, command="plan", train={"num_processes": 5000, "global_batch_size": 5000}),
        RECIPE,
        f"train.num_processes: 5000, but this machine has {cores} CPU cores available; set at most {cores}, or "
        "train.oversubscribe: true to try anyway",
    )


def test_images_that_cannot_be_decoded_are_listed_and_left_out_only_when_asked(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="the extra images is not installed")
    case = Case(tmp_path, tiny.save_image_model(tmp_path / "tiny-vit"))
    images = tiny.write_images(tmp_path / "images", 40)
    for number in range(11):
        (images / "same" / f"broken{number:02}.png").write_bytes(b"no image")
    result = case.data(name="images", task="image-classification")
    assert result.code == DATA
    assert "Traceback" not in result.err
    assert [line.partition(" ")[0] for line in result.problems[:10]] == [
        f"same/broken{number:02}.png:" for number in range(10)
    ]
    assert result.problems[10:] == [
        "images: 11 images cannot be decoded; repair or remove the files above, or set data.undecodable_images: drop"
    ]
    accepted(case.data(name="images", task="image-classification", data={"undecodable_images": "drop"}))
    dropped = next(tmp_path.glob("runs/[!.]*/data/dropped.jsonl")).read_text().splitlines()
    assert len(dropped) == 11


def test_output_below_a_file_is_refused(case: Case) -> None:
    result = case.data(CSV, output="train.csv/runs")
    assert result.code == RECIPE
    assert "Traceback" not in result.err
    assert result.problems[0].startswith(f"{case.folder}/train.csv/runs/recipe-")
    assert result.problems[0].endswith(": cannot be written (not a directory); choose another folder")


# ---- folders, disk, memory -------------------------------------------------------------------------------------


def test_run_folder_with_other_files_is_refused(case: Case) -> None:
    case.write(CSV)
    refused(
        fulltune("data", case.recipe(), "--run-folder", case.folder),
        RECIPE,
        f"{case.folder}: is neither empty nor a run folder; choose another folder",
    )


def test_run_folder_of_another_recipe_is_refused(case: Case) -> None:
    run = case.folder / "mine"
    case.write(CSV)
    path = case.recipe()
    accepted(fulltune("data", path, "--run-folder", run))
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    refused(
        fulltune("data", path, "--run-folder", run, "--set", "train.seed=1"),
        RECIPE,
        f"{run}: belongs to a run with other settings (train.seed); choose another folder, or omit --run-folder to "
        "start a new run",
    )
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_data_file_changed_after_the_plan_is_refused(case: Case) -> None:
    """Plan, checkpoints and scores would belong to other rows."""
    run = case.folder / "mine"
    file = case.write(CSV)
    path = case.recipe()
    accepted(fulltune("plan", path, "--run-folder", run))
    prepared = {item: item.read_bytes() for item in (run / "data").rglob("*") if item.is_file()}
    file.write_text(CSV.replace("sun", "moon", 1))
    problem = (
        f"{run}: the data files changed since this run was planned, so its checkpoints and scores belong to other "
        "rows; start a new run (--fresh)"
    )
    for command in ("data", "train", "evaluate"):
        refused(fulltune(command, path, "--run-folder", run), RECIPE, problem)
    assert {item: item.read_bytes() for item in (run / "data").rglob("*") if item.is_file()} == prepared
    file.write_text(CSV)
    accepted(fulltune("data", path, "--run-folder", run))


def test_run_folder_in_use_is_refused(case: Case) -> None:
    from fulltune.system.run_folder import lock_folder

    run = case.folder / "mine"
    case.write(CSV)
    path = case.recipe()
    accepted(fulltune("data", path, "--run-folder", run))
    with lock_folder(run):
        refused(
            fulltune("data", path, "--run-folder", run),
            RECIPE,
            f"{run}: another fulltune command is using this run folder",
        )


@pytest.mark.parametrize("elsewhere", [False, True])
def test_disk_too_small_is_refused_before_training(
    case: Case, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The place to free is the one that was measured: the run folder's, not always the recipe's output."""
    measured: list[Path] = []
    monkeypatch.setattr(hardware, "disk_free_bytes", lambda path: measured.append(path) or 1_000_000)
    place = case.folder / "another disk" / "run"
    case.write(CSV)
    result = fulltune("run", case.recipe(), *(["--run-folder", place] if elsewhere else []))
    assert result.code == NO_FIT
    assert (measured[-1] == place) == elsewhere
    short, *ways = result.problems[-4:]
    assert re.fullmatch(
        f"{re.escape(str(measured[-1]))}: checkpoints and the model need [\\d.]+ MiB on disk "
        r"\(4 checkpoints of [\d.]+ MiB, and [\d.]+ MiB for the model\), but only 977 KiB is free",
        short,
    )
    assert re.match(
        rf"enough: free [\d.]+ MiB on the disk of {re.escape(str(measured[-1]))}, or choose another folder",
        ways[0],
    )
    assert [way.split(": frees")[0] for way in ways[1:]] == [
        "not enough alone: train.save_total_limit: 1",
        "not enough alone: train.optim: adamw_8bit",
    ]
    assert not list(case.folder.glob("runs/*/attempts"))


def test_disk_full_while_writing_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    # `fulltune.data.prepare` is the function; the module of that name is only in sys.modules.
    monkeypatch.setattr(sys.modules["fulltune.data.prepare"], "write_splits", full)
    result = case.data(CSV)
    run = next(case.folder.glob("runs/recipe-*"))
    refused(result, NO_FIT, f"{run}: the disk is full; free some space, then run the same command again")
    monkeypatch.undo()
    accepted(fulltune("data", case.folder / "recipe.yaml"))
    assert list(case.folder.glob("runs/recipe-*")) == [run]


# ---- interruption ----------------------------------------------------------------------------------------------


def test_interrupt_while_reading_data_is_resumable(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data_stage, "prepare", interrupted)
        refused(case.data(CSV), INTERRUPTED, "interrupted; run the same command to resume")
    monkeypatch.setattr("fulltune.audit.stage.audit_rows", interrupted)
    refused(case.data(CSV), INTERRUPTED, "auditing the rows", "interrupted; run the same command to resume")


def test_sigterm_before_the_training_ends_a_command_wherever_it_is(tmp_path: Path) -> None:
    """Also where what a handler raises would be lost."""
    (tmp_path / "recipe.yaml").write_text("model: x\n")
    code = (
        "import signal, sys, time\nfrom fulltune.cli import app\nfrom fulltune.recipe import file\n"
        "class Held:\n    def __del__(self):\n        signal.raise_signal(signal.SIGTERM)\n"
        "def load(*_):\n    Held()\n    sys.exit('went on')\n"
        "file.load_recipe = load\nsys.argv = ['fulltune', 'run', 'recipe.yaml']\napp.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == INTERRUPTED, done.stderr
    assert done.stderr == "stopped by a signal; run the same command to resume or start again\n"


@pytest.mark.long
def test_interrupt_while_training_is_resumable(case: Case) -> None:
    case.write(tiny.topic_rows(64))
    train = {"max_steps": 60, "eval_strategy": "steps", "eval_steps": 30, "logging_steps": 1}
    command = [sys.executable, "-P", untraced_command.__file__, "train", str(case.recipe(train=train))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        lines = "".join(file.read_text() for file in case.folder.glob("runs/*/attempts/*/metrics.jsonl"))
        if '"step":3' in lines.replace(" ", ""):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == INTERRUPTED, err
    assert "Traceback" not in err
    assert "run the same command to resume" in err
    saved = list(case.folder.glob("runs/*/**/checkpoint-*"))
    assert saved, "an interrupted run leaves a checkpoint"

    with runs.in_this_process():
        again = fulltune("train", case.folder / "recipe.yaml")
    assert again.code == 0, again.err
    assert "continuing from the checkpoint of step" in again.err
    assert len(list(case.folder.glob("runs/recipe-*"))) == 1
    assert again.out.startswith("60 steps")


IN_A_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


@pytest.mark.long
@pytest.mark.parametrize(("nohup", "processes", "code"), [(False, 2, INTERRUPTED), (True, 1, 0)])
def test_a_terminal_that_is_closed_has_the_run_saved_unless_that_is_ignored(
    nohup: bool, processes: int, code: int, case: Case
) -> None:
    case.write(tiny.topic_rows(64))
    train = {
        "max_steps": 60 if nohup else 5000,
        "logging_steps": 1,
        "num_processes": processes,
        "oversubscribe": processes > hardware.num_cores(),
    }
    command = [sys.executable, "-P", untraced_command.__file__, "train", str(case.recipe(train=train))]
    here, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL, *(("/usr/bin/env", "nohup") if nohup else ()), *command],
        **dict.fromkeys(("stdin", "stdout", "stderr"), terminal),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        cwd=case.folder,
    )
    os.close(terminal)
    os.set_blocking(here, False)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        lines = "".join(file.read_text() for file in case.folder.glob("runs/*/attempts/*/metrics.jsonl"))
        if '"step":3' in lines.replace(" ", ""):
            break
        with contextlib.suppress(OSError):  # nothing to read, or nobody writes there any more
            os.read(here, 65536)
        time.sleep(0.05)
    os.close(here)
    assert process.wait(300) == code
    (outcome,) = (Outcome.load(file) for file in case.folder.glob("runs/*/attempts/*/outcome.json"))
    assert outcome.status == ("done" if nohup else "interrupted")


# ---- predict ---------------------------------------------------------------------------------------------------


def test_predict_without_model_is_refused(tmp_path: Path) -> None:
    refused(
        fulltune("predict", tmp_path, "a text"),
        RECIPE,
        f"{tmp_path}: no finished model here; expected a run folder with models/full, or a model folder with "
        "fulltune.json",
    )


def test_message_shows_neither_what_is_private_nor_signs_that_steer_a_terminal(tmp_path: Path) -> None:
    data = tmp_path / "rows.csv"
    data.write_text("my mail anna.miller@web-of-anna.de rain 0,w\x1b[2J\n" * 20, encoding="utf-8")
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", "MODEL", data)
    said = fulltune("init", data, "--task", "text-classification", "--column", "label=w", "-o", tmp_path / "new.yaml")
    said = said if said.code else fulltune("data", recipe)
    assert said.code
    assert "anna.miller" not in said.err
    assert "\x1b[2J" not in said.err
