"""What `init` infers from the shapes of public data sets, and that each command it suggests does what it says."""

from __future__ import annotations

import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from fulltune.cli.inferred import UnclearColumnsError, infer_task
from fulltune.cli.init import write_recipe
from fulltune.cli.readings import describe_columns, leftover_texts, list_readings
from fulltune.errors import DataError
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
        assert (first.task, {**first.roles} | {**shape.roles}) == (shape.first, {**first.roles})
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
    assert sum(shape.task == "ask" for shape in SHAPES) <= 6


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
