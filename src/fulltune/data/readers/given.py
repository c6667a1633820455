"""The rows that a recipe names, read once to find columns, target and numbers of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from fulltune.data.readers.by_name import refuse_held_out
from fulltune.data.readers.header import SEPARATED
from fulltune.data.readers.read import PlacedRow, Source, locate
from fulltune.data.split import sample
from fulltune.errors import DataError
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.records.run import SplitName as Split
from fulltune.tasks import PLACE, Target, Task
from fulltune.tasks.columns import is_whole, unreadable

Preprocess = Callable[[dict[str, Any]], dict[str, Any]]
_HEAD = 1000
_SAMPLE = 100


@dataclass(frozen=True)
class Given:
    """The rows that a recipe names for a split."""

    where: str
    rows: Callable[[list[str] | None], Iterator[PlacedRow]]
    """Reads them anew; see `Source.rows`."""


def find_sources(recipe: Recipe) -> dict[Split, Source]:
    paths: dict[Split, Sequence[str]] = {"train": recipe.train_files()}
    if recipe.data.eval:
        paths["eval"] = (recipe.data.eval,)
    if recipe.data.test:
        paths["test"] = (recipe.data.test,)
    sources: dict[Split, Source] = {}
    problems: list[str] = []
    for name, files in paths.items():
        try:
            if name == "train":
                refuse_held_out(files)
            found = locate(files, recipe.data.text_rows, recipe.data.columns)
            sources[name] = replace(
                found, image_paths=FACTS[recipe.task].reads == "image", image_column=recipe.data.image
            )
        except DataError as error:
            problems += error.problems
            # The files of this split that can be read may be broken, too: all problems at once.
    if problems:
        for source in sources.values():
            for _ in source.rows(problems):
                pass
        raise DataError(problems)
    return sources


def rows_given(recipe: Recipe, source: Source, preprocess: Preprocess | None) -> Given:
    """A source as the recipe wants it: at most `max_rows`, each through `preprocess`."""
    rows = source.rows
    most = recipe.data.max_rows
    count = sum(1 for _ in source.rows([])) if most else 0
    if most and count > most:
        wanted = set(sample(count, most, recipe.data.split_seed).tolist())

        def rows(problems: list[str] | None = None) -> Iterator[PlacedRow]:
            return (placed for number, placed in enumerate(source.rows(problems)) if number in wanted)

    if preprocess is None:
        return Given(source.where, rows)
    problems: list[str] = []
    # A user's function expects whole cells; a row without them is listed as it is.
    held = [(place, preprocess(row) if is_whole(row) else row) for place, row in rows(problems)]
    if problems:
        raise DataError(problems)
    return Given(source.where, lambda problems: iter(held))


def describe(recipe: Recipe, task: Task, rows_of: Mapping[Split, Given]) -> tuple[Target, dict[Split, int]]:
    """Read everything once: find columns, problem type and labels, count the rows.

    Raises:
        DataError: For every broken file; else when columns are missing or nothing can be learned.
    """
    problems: list[str] = []
    counts: dict[Split, int] = {}
    columns: dict[Split, dict[str, None]] = {name: {} for name in rows_of}

    def counted(name: Split) -> Iterator[dict[str, Any]]:
        counts[name] = 0
        for place, row in rows_of[name].rows(problems):
            counts[name] += 1
            columns[name].update(dict.fromkeys(row))
            if unreadable(row, roles) is None:  # the others are listed when they are tokenised
                yield {**row, PLACE: place}

    roles: dict[str, str] = {}
    train, refusal = rows_of["train"], None
    seen, first = _head(train)
    try:
        roles = task.find_columns(seen, first, recipe.data, train.where)
        _refuse_row_as_header(roles, first, train.where)
        target = task.find_target(counted("train"), roles, recipe.data, train.where)
    except DataError as error:
        # Broken files come first: what is missing may stand in them.
        refusal, roles = error, {}
    for name in rows_of:
        if name != "train" or name not in counts or problems:
            for _ in counted(name):
                pass
    if problems:
        raise DataError(list(dict.fromkeys(problems)))
    if len(columns["train"]) > len(seen):
        # Some columns appear only later, in a second file for example: the same again, with all of them.
        found = task.find_columns(tuple(columns["train"]), first, recipe.data, train.where)
        if found != roles:
            roles, refusal = found, None
            target = task.find_target(counted("train"), roles, recipe.data, train.where)
    if refusal is not None:
        raise refusal
    missing = [
        f"{rows_of[name].where}: no column '{column}' (data.{role}), which train has; "
        f"columns here: {', '.join(columns[name])}"
        for name in rows_of
        for role, column in roles.items()
        if column not in columns[name]
    ]
    if missing:
        raise DataError(missing)
    return target, counts


def _head(given: Given) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """The columns of the first thousand rows, and the first hundred whole ones of these: rows may be large."""
    columns: dict[str, None] = {}
    sample: list[dict[str, Any]] = []
    for _, row in islice(given.rows([]), _HEAD):
        columns.update(dict.fromkeys(row))
        if len(sample) < _SAMPLE and is_whole(row):
            sample.append(row)
    return tuple(columns), sample


def _refuse_row_as_header(roles: Mapping[str, str], sample: Sequence[Mapping[str, Any]], where: str) -> None:
    """A label column that is called what a label is called: the file's first line is a row, and would be lost."""
    column = roles.get("label")
    if column is None or not where.lower().endswith(tuple(SEPARATED)):
        return
    if column in (str(row.get(column)) for row in sample):
        raise DataError(
            f"{where}:1: looks like a row, expected a header line with names of columns: '{column}' is the name of the "
            "label column and a value in it; write data.columns: [text, label], with a name for each column, or rename "
            "that one"
        )
