"""The rows that a recipe names, read once to find columns, target and numbers of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from fulltune.data.readers.by_name import refuse_held_out
from fulltune.data.readers.header import SEPARATED
from fulltune.data.readers.read import DataFiles, PlacedRow, locate
from fulltune.data.sampling import sample
from fulltune.errors import DataError
from fulltune.recipe.data import DataBlock
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.records.data import SplitName
from fulltune.tasks import PLACE, Target, Task
from fulltune.tasks.columns import is_whole, unreadable

Preprocess = Callable[[dict[str, Any]], dict[str, Any]]
_HEAD = 1000
_SAMPLE = 100


@dataclass(frozen=True)
class SourceRows:
    """The rows that a recipe names for a split."""

    where: str
    rows: Callable[[list[str] | None], Iterator[PlacedRow]]
    """Reads them anew; see `DataFiles.rows`."""


def find_files(recipe: Recipe) -> dict[SplitName, DataFiles]:
    """The files of each split that the recipe names.

    Raises:
        DataError: For every path without files, and what is wrong in the files of the other splits.
    """
    block = recipe.data
    paths: dict[SplitName, Sequence[str]] = {"train": recipe.train_files()}
    if block.eval:
        paths["eval"] = (block.eval,)
    if block.test:
        paths["test"] = (block.test,)
    files: dict[SplitName, DataFiles] = {}
    problems: list[str] = []
    for name, those in paths.items():
        try:
            if name == "train":
                refuse_held_out(those)
            files[name] = replace(
                locate(those, block.text_rows, block.columns),
                image_paths=FACTS[recipe.task].reads == "image",
                image_column=block.image,
            )
        except DataError as error:
            problems += error.problems
    if problems:
        for readable in files.values():  # may be broken, too: all problems at once
            for _ in readable.rows(problems):
                pass
        raise DataError(problems)
    return files


def read_rows(recipe: Recipe, files: DataFiles, preprocess: Preprocess | None) -> SourceRows:
    """Rows of files as the recipe wants them: at most `max_rows`, each through `preprocess`."""
    rows = files.rows
    most = recipe.data.max_rows
    count = sum(1 for _ in files.rows([])) if most else 0
    if most and count > most:
        wanted = set(sample(count, most, recipe.data.split_seed).tolist())

        def rows(problems: list[str] | None = None) -> Iterator[PlacedRow]:
            return (placed for number, placed in enumerate(files.rows(problems)) if number in wanted)

    if preprocess is None:
        return SourceRows(files.where, rows)
    problems: list[str] = []
    # A user's function expects whole cells; a row without them is listed as it is.
    held = [(place, preprocess(row) if is_whole(row) else row) for place, row in rows(problems)]
    if problems:
        raise DataError(problems)
    return SourceRows(files.where, lambda problems: iter(held))


def describe(
    block: DataBlock, task: Task, sources: Mapping[SplitName, SourceRows]
) -> tuple[Target, dict[SplitName, int]]:
    """Read everything once: find columns, problem type and labels, count the rows.

    Raises:
        DataError: For every broken file; else when columns are missing or nothing can be learned.
    """
    problems: list[str] = []
    counts: dict[SplitName, int] = {}
    columns: dict[SplitName, dict[str, None]] = {name: {} for name in sources}
    roles: dict[str, str] = {}
    train, refusal = sources["train"], None

    def usable(name: SplitName) -> Iterator[dict[str, Any]]:
        counts[name] = 0
        for place, row in sources[name].rows(problems):
            counts[name] += 1
            columns[name].update(dict.fromkeys(row))
            if unreadable(row, roles) is None:  # the others are listed when they are tokenised
                yield {**row, PLACE: place}

    first_columns, first_rows = _head(train)
    try:
        roles = task.find_columns(first_columns, first_rows, block, train.where)
        _refuse_row_as_header(roles, first_rows, train.where)
        target = task.find_target(usable("train"), roles, block, train.where)
    except DataError as error:
        # Broken files come first: what is missing may stand in them.
        refusal, roles = error, {}
    for name in sources:
        if name != "train" or name not in counts or problems:
            for _ in usable(name):
                pass
    if problems:
        raise DataError(list(dict.fromkeys(problems)))
    if len(columns["train"]) > len(first_columns):
        # Some columns appear only later, in a second file for example: the same again, with all of them.
        in_all = task.find_columns(tuple(columns["train"]), first_rows, block, train.where)
        if in_all != roles:
            roles, refusal = in_all, None
            target = task.find_target(usable("train"), roles, block, train.where)
    if refusal is not None:
        raise refusal
    missing = [
        f"{sources[name].where}: no column '{column}' (data.{role}), which train has; "
        f"columns here: {', '.join(columns[name])}"
        for name in sources
        for role, column in roles.items()
        if column not in columns[name]
    ]
    if missing:
        raise DataError(missing)
    return target, counts


def _head(source: SourceRows) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """The columns of the first thousand rows, and the first hundred whole ones of these: rows may be large."""
    columns: dict[str, None] = {}
    whole: list[dict[str, Any]] = []
    for _, row in islice(source.rows([]), _HEAD):
        columns.update(dict.fromkeys(row))
        if len(whole) < _SAMPLE and is_whole(row):
            whole.append(row)
    return tuple(columns), whole


def _refuse_row_as_header(roles: Mapping[str, str], rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """A label column that is called what a label is called: the file's first line is a row, and would be lost."""
    column = roles.get("label")
    if column is None or not where.lower().endswith(tuple(SEPARATED)):
        return
    if column in (str(row.get(column)) for row in rows):
        raise DataError(
            f"{where}:1: looks like a row, expected a header line with names of columns: '{column}' is the name of the "
            "label column and a value in it; write data.columns: [text, label], with a name for each column, or rename "
            "that one"
        )
