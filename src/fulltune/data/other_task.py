"""The rows of another task of the user's that a budget for forgetting holds for as well: read, checked, shared out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from fulltune.audit import masked_text
from fulltune.data.sources import describe, find_files, read_rows
from fulltune.errors import DataError, RecipeError, SetupError
from fulltune.forgetting.generic_text import beginning, parts
from fulltune.recipe.fields import Recipe
from fulltune.recipe.file import load_recipe
from fulltune.records.forgetting import OTHER_TASK, LabelledText, OtherTask
from fulltune.tasks import task_named
from fulltune.tasks.columns import as_text, unreadable
from fulltune.text import counted

LEAST_SEALED, MOST_SEALED = 100, 1_000
"""Rows of a quarter: a fall of a hundredth on fewer cannot be told from none, and more are read again and again."""


def other_task(recipe: Recipe) -> OtherTask | None:
    """The rows of `preserve.task`, shared out; None: the recipe names none.

    Raises:
        RecipeError: When it is no recipe for text-classification.
        DataError: When its rows are not classified by one label each, too few, or replayed as generic text.
    """
    if (file := recipe.preserve.task) is None:
        return None
    try:
        found = _shared_out(file, *_labelled(file))
    except (RecipeError, DataError) as error:
        raise type(error)([f"preserve.task: {problem}" for problem in error.problems]) from None
    replayed = {beginning(text) for text in parts(recipe.preserve).replayed}
    if twice := [text for text, _ in found.rows if beginning(text) in replayed]:
        raise DataError(
            f"preserve.task: {file}: {counted(len(twice), 'row')} have a text that is replayed as generic text "
            f"('{masked_text(twice[0])[:60]}'), so that they say nothing about forgetting; name other texts in "
            "preserve.probe or preserve.replay"
        )
    return found


def keep(found: OtherTask, folder: Path) -> None:
    """Keep the rows in a run folder.

    Raises:
        SetupError: They are others than those that its run was planned with.
    """
    file = folder / "data" / OTHER_TASK
    if file.exists() and any((folder / "plan").glob("*.json")) and OtherTask.load(file) != found:
        raise SetupError(
            f"preserve.task: {found.source}: the rows changed since this run began, so what it measured belongs to "
            "other ones; put the old file back, or start a new run (--fresh)"
        )
    found.save(file)


def _labelled(file: str) -> tuple[dict[str, set[str]], dict[str, str], int]:
    """Of each text its labels; the text itself; and how many rows have no text or no label."""
    other = load_recipe(file)
    if other.task != "text-classification":
        raise RecipeError(f"{file}: task: expected text-classification, found {other.task}; name a recipe of that task")
    task, block = task_named(other.task), other.data.model_copy(update={"eval": None, "test": None})
    other = other.model_copy(update={"data": block})
    source = read_rows(other, find_files(other)["train"], None)
    target, _ = describe(block, task, {"train": source})
    if not target.form.one_label or "text_pair" in target.columns:
        kind = "pairs of texts" if "text_pair" in target.columns else target.form.words
        raise DataError(
            f"{source.where}: expected a text and one label in each row, found {kind} (columns "
            f"{', '.join(target.columns.values())}); name data.text and data.label of another recipe"
        )
    labels, texts, unusable = dict[str, set[str]](), dict[str, str](), 0
    for _, row in source.rows(None):
        if unreadable(row, target.columns) is not None or task.refuse(row, target) is not None:
            unusable += 1
            continue
        text = as_text(row[target.columns["text"]])
        labels.setdefault(beginning(text), set()).update(task.row_labels(row, target))
        texts.setdefault(beginning(text), text)
    return labels, texts, unusable


def _shared_out(file: str, labels: Mapping[str, set[str]], texts: Mapping[str, str], unusable: int) -> OtherTask:
    """A quarter of the texts is for selection, a quarter is sealed, the rest fits the head: always alike, in an order
    that says nothing about them. What has several labels has no right one."""
    clear = [key for key, names in labels.items() if len(names) == 1]
    each = min(MOST_SEALED, len(clear) // 4)
    if each < LEAST_SEALED:
        raise DataError(
            f"{file}: its rows hold {len(clear):,} different texts that have one label each; it takes at least "
            f"{4 * LEAST_SEALED} ({2 * LEAST_SEALED} to fit a head, {LEAST_SEALED} for selection, {LEAST_SEALED} "
            "sealed): add rows"
        )
    drawn = sorted(clear, key=lambda key: hashlib.sha256(key.encode()).digest())[: 4 * MOST_SEALED]
    names = sorted({next(iter(labels[key])) for key in drawn})
    rows: list[LabelledText] = [(texts[key], names.index(next(iter(labels[key])))) for key in drawn]
    fitting = rows[2 * each :]
    if len({label for _, label in fitting}) < 2:
        raise DataError(f"{file}: all rows that fit a head have one label ('{names[fitting[0][1]]}'); add other rows")
    return OtherTask(
        source=str(file),
        labels=tuple(names),
        fitting=tuple(fitting),
        choosing=tuple(rows[:each]),
        sealed=tuple(rows[each : 2 * each]),
        left_out=unusable + len(labels) - len(clear),
    )
