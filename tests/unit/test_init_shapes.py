"""What `init` infers from the shapes of public data sets, and that each command it suggests does what it says."""

from __future__ import annotations

import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from fulltune.cli.inferred import UnclearColumnsError, infer_task
from fulltune.cli.init import write_recipe
from fulltune.cli.readings import describe_columns, leftover_texts, list_readings
from fulltune.data.readers.derived import DerivedColumns
from fulltune.errors import DataError
from fulltune.recipe.data import DataBlock
from fulltune.recipe.file import load_recipe
from fulltune.recipe.tasks import READ_BY
from tests.contract.command import fulltune
from tests.unit.init_shapes import EACH_SHAPE, SHAPES, Shape


@EACH_SHAPE
def test_shape_is_read_as_what_it_is_or_asked_about(tmp_path: Path, shape: Shape) -> None:
    data, recipe = shape.write(tmp_path), tmp_path / "recipe.yaml"
    if shape.task == "refuse":
        with pytest.raises(DataError, match="DPOTrainer"):
            infer_task(data)
        return
    if shape.task == "ask":
        with pytest.raises(UnclearColumnsError) as asked:
            infer_task(data)
        first = asked.value.readings[0]
        assert (first.task, {**first.roles, **shape.roles}) == (shape.first, dict(first.roles))
        return
    if shape.task == "reranking" and "reranking" not in READ_BY["label"]:  # until it reads labelled candidates
        columns = describe_columns([*shape.cells], shape.rows())
        reading = list_readings(columns)[0]
        assert (reading.task, dict(reading.roles)) == (shape.task, shape.roles)
        assert not leftover_texts(columns, [str(one) for one in reading.roles.values()])
        return
    write_recipe(data, recipe, None, False)
    loaded = load_recipe(recipe)
    assert loaded.task == shape.task
    label = shape.roles.get("label")
    expected = shape.roles | ({"label": "labels", "label_columns": label} if isinstance(label, tuple) else {})
    assert {role: getattr(loaded.data, role) for role in expected} == expected
    assert loaded.data.encoding == shape.encoding


def test_shapes_are_many_and_few_are_asked_about() -> None:
    assert len(SHAPES) >= 40
    assert sum(shape.task == "ask" for shape in SHAPES) <= 7


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.task == "ask"], ids=lambda shape: shape.name)
def test_each_command_that_is_suggested_leads_to_its_task(tmp_path: Path, shape: Shape) -> None:
    data = shape.write(tmp_path)
    refused = fulltune("init", data, "--output", tmp_path / "recipe.yaml")
    assert refused.code == 4
    commands = [shlex.split(line) for line in refused.err.splitlines() if line.startswith("  fulltune init ")]
    assert len(commands) in (1, 2, 3)
    for number, command in enumerate(commands):
        task = command[command.index("--task") + 1]
        columns = dict(part.split("=") for option, part in pairwise(command) if option == "--column")
        recipe = tmp_path / f"{number}.yaml"
        done = fulltune(*[part.replace(str(tmp_path / "recipe.yaml"), str(recipe)) for part in command[1:]])
        assert done.code == 0, done.err
        loaded = load_recipe(recipe)
        assert loaded.task == task
        assert {role: getattr(loaded.data, role) for role in columns} == columns


@pytest.mark.parametrize(
    ("name", "answers", "expected"),
    [
        ("WMT", ["2"], {"prompt": "translation.fr", "completion": "translation.en"}),
        ("CoNLL with numbers", ["1", "O,B-A,I-A,B-B,I-B,B-C,I-C,B-D,I-D"], {"tags": "ner_tags", "tag_names": "O,B-A"}),
    ],
)
def test_terminal_is_asked_for_a_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, answers: list[str], expected: dict[str, str]
) -> None:
    data = next(shape for shape in SHAPES if shape.name == name).write(tmp_path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("fulltune.cli.init.Prompt.ask", lambda *texts, **options: answers.pop(0))
    write_recipe(data, tmp_path / "recipe.yaml", None, False)
    block = load_recipe(tmp_path / "recipe.yaml").data
    for setting, value in expected.items():
        written = getattr(block, setting)
        assert (",".join(written) if isinstance(written, tuple) else written).startswith(value)


@pytest.mark.parametrize(
    ("settings", "row", "added"),
    [
        ({"label": "labels", "label_columns": ["a", "b"]}, {"a": 1, "b": "0"}, {"labels": ["a"]}),
        ({"label": "labels", "label_columns": ["a", "b"]}, {"a": False, "b": 0.0}, {"labels": []}),
        ({"label": "labels", "label_columns": ["a", "b"]}, {"a": -1, "b": -1}, {}),
        ({"tags": "t", "tag_names": ["O", "B-X"]}, {"t": [0, 1, 5]}, {"t": ["O", "B-X", 5]}),
        ({"tags": "t", "tag_names": ["O", "B-X"]}, {"t": "0 1"}, {"t": ["O", "B-X"]}),
        ({"prompt": "t.en"}, {"t": {"en": "a", "fr": "b"}}, {"t.en": "a"}),
        ({"prompt": "t.en"}, {"t.en": "own", "t": "{}"}, {}),
    ],
)
def test_columns_are_made_of_others(
    settings: dict[str, object], row: dict[str, object], added: dict[str, object]
) -> None:
    derived = DerivedColumns.of(DataBlock.model_validate({"train": "t.csv", **settings}))
    assert derived.added_to(row) == {**row, **added}
