"""The rows that a recipe names, read once to find columns, target and numbers of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from fulltune.audit.texts import masked_text
from fulltune.data.contamination import known_files
from fulltune.data.groups import sample
from fulltune.data.patch import Patched
from fulltune.data.readers.files import refuse_held_out
from fulltune.data.readers.read import DataFiles, PlacedRow, locate
from fulltune.data.readers.text_files import SEPARATED
from fulltune.errors import DataError
from fulltune.recipe.data import DataBlock, MixedFile, codec_of
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.tasks import PLACE, Target, Task, task_named
from fulltune.tasks.columns import USUAL_NAMES, is_whole, second_text, shown, unreadable, windows
from fulltune.tasks.question_answering import IMPOSSIBLE
from fulltune.text import did_you_mean

Preprocess = Callable[[dict[str, Any]], dict[str, Any]]
_HEAD = 1000
_SAMPLE = 100

SourceName = str
"""A split's name; of files that are mixed into the train rows `mixed-1`, `mixed-2` ... in the order of the recipe."""


@dataclass(frozen=True)
class SourceRows:
    """The rows that a recipe names for a split, or to be mixed into the train rows."""

    where: str
    rows: Callable[[list[str] | None], Iterator[PlacedRow]]
    """Reads them anew; see `DataFiles.rows`."""
    patched: Patched | None = None
    """What a patch does to them."""
    notes: Mapping[str, None] = field(default_factory=dict)
    """What reading them showed."""


def mixed_names(recipe: Recipe) -> dict[SourceName, MixedFile]:
    """Of each file that is mixed in the source's name."""
    return {f"mixed-{number}": one for number, one in enumerate(recipe.data.mixed_files, start=1)}


def is_mixed(name: SourceName) -> bool:
    """Whether a source is no split's."""
    return name.startswith("mixed")


def find_files(recipe: Recipe) -> dict[SourceName, DataFiles]:
    """The files of each source that the recipe names, train first. Raises `DataError` for every path without files, and
    what is wrong in the files of the other sources and of `data.contamination`."""
    block = recipe.data
    paths: dict[SourceName, Sequence[str]] = {"train": recipe.data.task_files}
    paths |= {name: (path,) for name, path in (("eval", block.eval), ("test", block.test)) if path}
    paths |= {name: (one.path,) for name, one in mixed_names(recipe).items()}
    files: dict[SourceName, DataFiles] = {}
    problems: list[str] = []
    for name, those in paths.items():
        try:
            if name not in ("eval", "test"):
                refuse_held_out(those)
            # A mixed file may be of another kind than the task's, with names of its own.
            is_other = is_mixed(name) and not those[0].lower().endswith(tuple(SEPARATED))
            files[name] = replace(
                locate(those, block.text_rows, None if is_other else block.columns),
                encoding=codec_of(block.encoding),
                image_paths=FACTS[recipe.task].reads == "image",
                image_column=block.image,
            )
        except DataError as error:
            problems += error.problems
    try:
        known_files(recipe)
    except DataError as error:
        problems += error.problems
    if problems:
        for readable in files.values():  # may be broken, too: all problems at once
            for _ in readable.rows(problems):
                pass
        raise DataError(problems)
    return files


def wrong_files(recipe: Recipe, preprocess: Preprocess | None) -> Sequence[str]:
    """What is wrong with the recipe's files, or the columns of the first train rows: for one who repairs other things,
    too. Empty: nothing that is seen at once."""
    try:
        train = find_files(recipe)["train"]
        columns, rows = _head(SourceRows(train.where, train.rows))
        if preprocess is None:
            task_named(recipe.task).find_columns(_for_roles(recipe.data, columns), rows, recipe.data, train.where)
    except DataError as error:
        return [masked_text(problem) for problem in error.problems]
    return ()


def read_rows(
    recipe: Recipe, files: DataFiles, preprocess: Preprocess | None, patched: Patched | None = None
) -> SourceRows:
    """Rows of files as the recipe wants them: at most `max_rows`, patched, each through `preprocess`."""
    most, wanted = recipe.data.max_rows, None
    if most and len(labels := _labels(recipe, files)) > most:
        if (different := len({label for of_row in labels for label in of_row})) > most:
            raise DataError(f"{files.where}: {different} labels, and data.max_rows keeps only {most} rows; raise it")
        wanted = set(sample(labels, most, recipe.data.split_seed))

    def rows(problems: list[str] | None = None) -> Iterator[PlacedRow]:
        placed = enumerate(files.rows(problems))
        kept = (one for number, one in placed if wanted is None or number in wanted)
        return kept if patched is None else patched.rows(kept)

    if preprocess is None:
        return SourceRows(files.where, rows, patched, files.notes)
    problems: list[str] = []
    # A user's function expects whole cells; a row without them is listed as it is.
    held = [(place, preprocess(row) if is_whole(row) else row) for place, row in rows(problems)]
    if problems:
        raise DataError(problems)
    return SourceRows(files.where, lambda problems: iter(held), patched, files.notes)


def _labels(recipe: Recipe, files: DataFiles) -> list[list[str]]:
    """The labels of each row; none where the task has none, or where `describe` will say why they cannot be read."""
    task = task_named(recipe.task)
    try:
        target, _ = describe(recipe.data, task, {"train": SourceRows(files.where, files.rows)})
    except DataError:
        return [[] for _ in files.rows([])]

    def can_use(row: dict[str, Any]) -> bool:
        return bool(target.labels) and not unreadable(row, target.columns) and not task.refuse(row, target)

    return [task.row_labels(row, target) if can_use(row) else [] for _, row in files.rows([])]


def describe(
    block: DataBlock, task: Task, sources: Mapping[SourceName, SourceRows]
) -> tuple[Target, dict[SourceName, int]]:
    """Read everything once, and the train rows again where columns appear late or something is wrong: find their
    columns, problem type and labels, count the rows. Raises `DataError` for every broken file; else when columns are
    missing or nothing can be learned."""
    problems: list[str] = []
    counts, columns = dict.fromkeys(sources, 0), {name: dict[str, None]() for name in sources}
    train, faults, read = sources["train"], Counter[str](), set[SourceName]()
    first_names, first_rows = _head(train)

    def rows_of(name: SourceName) -> Iterator[PlacedRow]:
        counts[name] = 0
        for place, row in sources[name].rows(problems):
            counts[name] += 1
            columns[name].update(dict.fromkeys(row))
            yield place, row
        read.add(name)

    def usable(roles: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        faults.clear()
        for place, row in rows_of("train"):
            if fault := unreadable(row, roles):  # is listed when the rows are tokenised
                faults[fault] += 1
            else:
                yield {**row, PLACE: place}

    def learned(names: tuple[str, ...]) -> tuple[dict[str, str], Target]:
        roles = task.find_columns(_for_roles(block, names), first_rows, block, train.where)
        _refuse_second_text(block, roles, names, first_rows, train.where)
        try:
            return roles, task.find_target(usable(roles), roles, block, train.where)
        except DataError:
            if not faults or faults.total() < counts["train"]:
                raise
            problem = f"{train.where}: no row can be used: {next(iter(faults))}; name another column or file"
            raise DataError(problem) from None

    found = None
    with suppress(DataError):  # what is wrong is said once all files are known to be whole, with all their columns
        found = learned(first_names)
    for name in sources:
        for _ in rows_of(name) if name not in read else ():
            pass
    if problems:
        raise DataError(list(dict.fromkeys(problems)))
    if found is None or len(columns["train"]) > len(first_names):
        found = learned(tuple(columns["train"]))
    roles, target = found
    missing = []
    for name, there in columns.items():
        needed = {} if is_mixed(name) and task.FACTS.has_forms else dict(roles)
        needed |= {"group": block.group} if block.group and not is_mixed(name) else {}
        needed |= {"time": block.time} if block.time and name == "train" else {}
        missing += [
            f"{sources[name].where}: no column '{column}' (data.{role}); "
            f"{did_you_mean(column, there) or 'columns here: ' + shown(there)}"
            for role, column in needed.items()
            if column not in there
        ]
    if missing:
        raise DataError(missing)
    return target, counts


def own_form(block: DataBlock, task: Task, source: SourceRows) -> Target:
    """What a mixed source holds: by the columns that the recipe names, if it has them, else by the usual names. Raises
    `DataError` when no form is found."""
    columns, rows = _head(source)
    columns = _for_roles(block, columns)
    try:
        roles = task.find_columns(columns, rows, block, source.where)
    except DataError:
        block = block.model_copy(update=dict.fromkeys(set(task.FACTS.data) & set(USUAL_NAMES)))
        roles = task.find_columns(columns, rows, block, source.where)
    return task.find_target(rows, roles, block, source.where)


def _for_roles(block: DataBlock, columns: Iterable[str]) -> tuple[str, ...]:
    """The columns that a task may look at: one named `conversation` that says whose a row is holds none."""
    named = {getattr(block, role) for role in USUAL_NAMES}
    return tuple(name for name in columns if name in named or name not in (block.group, block.time))


def _head(source: SourceRows) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """The columns of the first thousand rows, and the first hundred whole ones of these, or fewer large ones."""
    columns: dict[str, None] = {}

    def whole() -> Iterator[dict[str, Any]]:
        for _, row in islice(source.rows([]), _HEAD):
            columns.update(dict.fromkeys(row))
            if is_whole(row):
                yield row

    rest = windows(whole(), _SAMPLE)
    head = next(rest, [])
    for _ in rest:  # for their columns
        pass
    return tuple(columns), head


def unused_columns(block: DataBlock, roles: Mapping[str, str], source: SourceRows) -> list[str]:
    """Columns that play no role; those that appear only far down are not looked for."""
    return [name for name in _head(source)[0] if name not in {*roles.values(), block.group, block.time, IMPOSSIBLE}]


def _refuse_second_text(
    block: DataBlock, roles: Mapping[str, str], columns: Sequence[str], rows: Sequence[Mapping[str, Any]], where: str
) -> None:
    """Raises a `DataError` for a second column with texts where the recipe names none: it may be half of the task."""
    role = next((role for role in _READ_WITH if role in roles), "")
    # A raw text has no other half, and who names what is read, or which answers are learned, has decided.
    if not role or _READ_WITH[role] in roles or len(roles) == 1 or getattr(block, role) or block.completion:
        return
    if (second := second_text(roles[role], roles, _for_roles(block, columns), rows)) is not None:
        one, two = sorted((roles[role], second), key=columns.index) if role == "text" else (roles[role], second)
        beside = _READ_WITH[role]
        raise DataError(
            f"{where}: columns '{one}' and '{two}' both hold texts, and only one is read; write data.{role}: {one}"
            + (f", with data.{beside}: {two} to read both" if beside else "")
            + f" (init: --column {role}={one}{f' --column {beside}={two}' if beside else ''})"
        )


_READ_WITH = {"text": "text_pair", "prompt": "input", "source": ""}
"""Role of a column that is read to that of one that is read with it, where there is one."""
