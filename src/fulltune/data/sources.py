from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fulltune.audit.texts import masked_text
from fulltune.data.contamination import list_forbidden_text_files
from fulltune.data.groups import sample_by_label
from fulltune.data.patch import PatchedRows
from fulltune.data.readers.derived import DerivedColumns
from fulltune.data.readers.files import refuse_held_out_files
from fulltune.data.readers.read import DataFiles, LocatedRow, locate_data_files
from fulltune.data.readers.text_files import SEPARATED
from fulltune.errors import DataError, SetupError
from fulltune.recipe.address import HUB, hub_place, hub_settings, is_fetched, scheme_of
from fulltune.recipe.data import DataBlock, MixedFile, codec_for_encoding
from fulltune.recipe.fields import Recipe
from fulltune.recipe.selection import Selection, slice_of_files
from fulltune.recipe.tasks import FACTS
from fulltune.records.data import RemoteSource
from fulltune.system.memory import call_own
from fulltune.tasks import PLACE, Row, Target, Task, task_named
from fulltune.tasks.columns import USUAL_NAMES, is_whole, shown, similar_column, why_unreadable
from fulltune.tasks.question_answering import IMPOSSIBLE
from fulltune.text import did_you_mean

Preprocess = Callable[[dict[str, Any]], dict[str, Any]]
_HEAD = 1000
_SAMPLE = 100

SourceName = str
"""`train`, `eval`, `test`, or for mixed-in files `mixed-1`, `mixed-2` ..., numbered in the recipe's order."""


@dataclass(frozen=True)
class SourceRows:
    """The rows of a split's files, or of a mixed-in file."""

    where: str
    rows: Callable[[list[str] | None], Iterator[LocatedRow]]
    patched: PatchedRows | None = None
    notes: Mapping[str, None] = field(default_factory=dict)


def mixed_names(recipe: Recipe) -> dict[SourceName, MixedFile]:
    return {f"mixed-{number}": file for number, file in enumerate(recipe.data.mixed_files, start=1)}


def is_mixed(name: SourceName) -> bool:
    return name.startswith("mixed")


def find_source_files(recipe: Recipe, remote: Mapping[str, RemoteSource]) -> dict[SourceName, DataFiles]:
    """Return the files of each source, train first; `remote` holds the local copies by address. Raises a `DataError`
    that lists all problems."""
    block = recipe.data
    paths: dict[SourceName, Sequence[str]] = {"train": recipe.data.task_files}
    paths |= {name: (path,) for name, path in (("eval", block.eval), ("test", block.test)) if path}
    paths |= {name: (file.path,) for name, file in mixed_names(recipe).items()}
    files: dict[SourceName, DataFiles] = {}
    problems: list[str] = []
    for name, addresses in paths.items():
        source_paths = [file for path in addresses for file in (remote[path].files if path in remote else (path,))]
        try:
            if name not in ("eval", "test"):
                # What a split of the Hub holds is its author's word.
                unsure = [path for path in addresses if scheme_of(path) != HUB or hub_place(path)[2]]
                refuse_held_out_files(unsure, {path: remote[path].files for path in unsure if path in remote})
            files[name] = replace(
                locate_as_in_recipe(recipe, source_paths, is_mixed(name)),
                notes=dict.fromkeys(note for path in addresses if path in remote for note in remote[path].notes),
            )
            for path in addresses:
                if path in remote and (selected := _selections(path, remote[path], files[name])):
                    files[name] = replace(files[name], selections={**files[name].selections, **selected})
            if block.where and not is_mixed(name):
                files[name] = _only_matching(files[name], block.where)
        except DataError as error:
            problems += error.problems
    try:
        list_forbidden_text_files(recipe)
    except DataError as error:
        problems += error.problems
    if problems:
        for readable in files.values():  # reports problems inside these files as well
            for _ in readable.rows(problems):
                pass
        raise DataError(problems)
    return files


def locate_as_in_recipe(recipe: Recipe, paths: Sequence[str], may_differ: bool) -> DataFiles:
    """Find the files at these paths, to be read as the recipe says. If they `may_differ` in format, its column names
    are only those of tables."""
    block = recipe.data
    is_other = may_differ and not paths[0].lower().endswith(tuple(SEPARATED))
    return replace(
        locate_data_files(paths, block.text_rows, None if is_other else block.columns),
        encoding=codec_for_encoding(block.encoding),
        has_relative_image_paths=FACTS[recipe.task].reads == "image",
        image_column=block.image,
        derived=DerivedColumns.of(block),
        lists=tuple(filter(None, (block.text, block.label))) if recipe.task == "reranking" else (),
    )


def _selections(address: str, copies: RemoteSource, files: DataFiles) -> dict[Path, Selection]:
    """Return what an address on the Hub selects of its files by `split`, `columns` and `where`."""
    named, paths = hub_settings(address), [*map(Path, copies.files)]
    columns = tuple(unquote(name) for name in named.get("columns", "").split(",") if name)
    _, bracket, bounds = named.get("split", "").partition("[")
    try:
        rows = slice_of_files(paths, bracket + bounds, files.num_rows) if bracket else {}
        selection = Selection(columns=columns)
        selection = selection.narrowed(named["where"]) if "where" in named else selection
    except ValueError as error:
        raise DataError(f"{address}: {error}") from None
    return {path: replace(selection, rows=rows.get(path)) for path in paths if selection != Selection() or rows}


def _only_matching(files: DataFiles, where: str) -> DataFiles:
    if files.image_folder is not None:
        raise DataError(f"{files.where}: data.where: a folder of images has no columns; remove data.where")
    selections = {file: files.selections.get(file, Selection()).narrowed(where) for file in files.files}
    return replace(files, selections=selections)


def file_problems(recipe: Recipe, preprocess: Preprocess | None) -> list[str]:
    """Return error messages about the recipe's files and first train rows."""
    try:
        if any(map(is_fetched, recipe.data.task_files)):
            return []
        train = find_source_files(recipe, {})["train"]
        columns, rows = _read_first_rows(SourceRows(train.where, train.rows))
        if preprocess is None:
            task_named(recipe.task).find_columns(
                columns_for_roles(recipe.data, columns), rows, recipe.data, train.where
            )
    except DataError as error:
        return [masked_text(problem) for problem in error.problems]
    return []


def read_source_rows(
    recipe: Recipe, files: DataFiles, preprocess: Preprocess | None, patched: PatchedRows | None = None
) -> SourceRows:
    """Return a source's rows, patched and preprocessed, or a sample of `data.max_rows` if there are more."""
    most, wanted = recipe.data.max_rows, None
    if most and len(labels := _row_labels(recipe, files)) > most:
        if (different := len({label for row_labels in labels for label in row_labels})) > most:
            raise DataError(f"{files.where}: {different} labels, but data.max_rows allows only {most} rows; raise it")
        wanted = set(sample_by_label(labels, most, recipe.data.split_seed))

    def rows(problems: list[str] | None = None) -> Iterator[LocatedRow]:
        sampled = (row for number, row in enumerate(files.rows(problems)) if wanted is None or number in wanted)
        return sampled if patched is None else patched.rows(sampled)

    if preprocess is None:
        return SourceRows(files.where, rows, patched, files.notes)
    problems: list[str] = []
    # A user's function expects readable cells; a row with others is reported unchanged.
    preprocessed = [
        (place, _changed(preprocess, place, row) if is_whole(row) else row) for place, row in rows(problems)
    ]
    if problems:
        raise DataError(problems)
    return SourceRows(files.where, lambda problems: iter(preprocessed), patched, files.notes)


def _changed(preprocess: Preprocess, place: str, row: Row) -> dict[str, Any]:
    """Return what the user's function makes of a row; raise `SetupError` if it fails or returns no dictionary."""
    changed: Any = call_own(f"{place}: your preprocess function", preprocess, dict(row))
    if not isinstance(changed, dict):
        raise SetupError(f"{place}: your preprocess function returned {changed!r:.60}; it must return the changed row")
    return changed


def _row_labels(recipe: Recipe, files: DataFiles) -> list[list[str]]:
    """Return each row's labels, or an empty list for an unusable row."""
    task = task_named(recipe.task)
    try:
        target, _ = find_target_and_count_rows(recipe.data, task, {"train": SourceRows(files.where, files.rows)})
    except DataError:
        return [[] for _ in files.rows([])]

    def can_use(row: Row) -> bool:
        return bool(target.labels) and not why_unreadable(row, target.columns) and not task.why_unusable(row, target)

    return [task.row_labels(row, target) if can_use(row) else [] for _, row in files.rows([])]


def find_target_and_count_rows(
    block: DataBlock, task: Task, sources: Mapping[SourceName, SourceRows], slice_by: str | None = None
) -> tuple[Target, dict[SourceName, int]]:
    """Return the target and each source's number of rows. Raises `DataError` for broken files or missing columns, or if
    nothing can be learned."""
    problems: list[str] = []
    counts, columns = dict.fromkeys(sources, 0), {name: dict[str, None]() for name in sources}
    train, faults, read = sources["train"], Counter[str](), set[SourceName]()
    first_names, first_rows = _read_first_rows(train)

    def read_and_count(name: SourceName) -> Iterator[LocatedRow]:
        counts[name] = 0
        for place, row in sources[name].rows(problems):
            counts[name] += 1
            columns[name].update(dict.fromkeys(row))
            yield place, row
        read.add(name)

    def readable_train_rows(roles: Mapping[str, str]) -> Iterator[Row]:
        faults.clear()
        for place, row in read_and_count("train"):
            if not (fault := why_unreadable(row, roles)) and task.FACTS.has_classes:  # a dropped row makes no class
                refused = task.why_unusable(row, Target("single_label", roles))
                fault = refused.reason if refused and refused.check in ("no text", "no image") else None
            if fault:  # listed when the rows are tokenised
                faults[fault] += 1
            else:
                yield {**row, PLACE: place}

    def find_roles_and_target(names: tuple[str, ...]) -> tuple[dict[str, str], Target]:
        roles = task.find_columns(columns_for_roles(block, names), first_rows, block, train.where)
        _refuse_second_text_column(block, roles, names, first_rows, train.where)
        try:
            return roles, task.find_target(readable_train_rows(roles), roles, block, train.where)
        except DataError:
            if not faults or faults.total() < counts["train"]:
                raise
            problem = f"{train.where}: no row can be used: {next(iter(faults))}; choose another column or file"
            raise DataError(problem) from None

    description = None
    with suppress(DataError):  # raised below, once all files are known to be readable, with all their columns
        description = find_roles_and_target(first_names)
    for name in sources:
        for _ in read_and_count(name) if name not in read else ():
            pass
    if problems:
        raise DataError(list(dict.fromkeys(problems)))
    if description is None or len(columns["train"]) > len(first_names):
        description = find_roles_and_target(tuple(columns["train"]))
    roles, target = description
    missing = []
    for name, present in columns.items():
        needed = {} if is_mixed(name) and task.FACTS.has_forms else dict(roles)
        needed |= {"group": block.group} if block.group and not is_mixed(name) else {}
        needed |= {"time": block.time} if block.time and name == "train" else {}
        has_test_rows = name == ("test" if "test" in sources else "train")
        needed |= {"slice_by": slice_by} if slice_by and has_test_rows else {}
        missing += [
            f"{sources[name].where}: no column '{column}' ({'evaluate' if role == 'slice_by' else 'data'}.{role}); "
            f"{did_you_mean(column, present) or 'columns in the file: ' + shown(present)}"
            for role, column in needed.items()
            if column not in present
        ]
    if missing:
        raise DataError(missing)
    return target, counts


def find_mixed_target(block: DataBlock, task: Task, source: SourceRows) -> Target:
    """Return a mixed-in source's target, from the recipe's columns or else from columns with common names. Raises
    `DataError` if no columns fit."""
    columns, rows = _read_first_rows(source)
    columns = columns_for_roles(block, columns)
    try:
        roles = task.find_columns(columns, rows, block, source.where)
    except DataError:
        block = block.model_copy(update=dict.fromkeys(set(task.FACTS.data) & set(USUAL_NAMES)))
        roles = task.find_columns(columns, rows, block, source.where)
    return task.find_target(rows, roles, block, source.where)


def columns_for_roles(block: DataBlock, columns: Iterable[str]) -> tuple[str, ...]:
    named = {getattr(block, role) for role in USUAL_NAMES}
    return tuple(name for name in columns if name in named or name not in (block.group, block.time))


def _read_first_rows(source: SourceRows) -> tuple[tuple[str, ...], list[Row]]:
    """Return the columns of the first thousand rows, and up to a hundred readable rows."""
    columns, head = dict[str, None](), list[Row]()
    for _, row in islice(source.rows([]), _HEAD):
        columns.update(dict.fromkeys(row))
        if len(head) < _SAMPLE and is_whole(row):
            head.append(row)
    return tuple(columns), head


def list_unused_columns(block: DataBlock, roles: Mapping[str, str | None], source: SourceRows) -> list[str]:
    """List columns that occur in the first thousand rows but have no role."""
    used = {*filter(None, roles.values()), *(block.label_columns or ()), block.group, block.time, IMPOSSIBLE}
    used |= {name.partition(".")[0] for name in used if name}
    return [name for name in _read_first_rows(source)[0] if name not in used]


def _refuse_second_text_column(
    block: DataBlock, roles: Mapping[str, str], columns: Sequence[str], rows: Sequence[Row], file_name: str
) -> None:
    """Raise `DataError` if a second column seems to belong to the input, but the recipe does not name it."""
    role = next((role for role in _SECOND_ROLE if role in roles), "")
    # Raw text has no second half, and a recipe that names the column or the answers is unambiguous.
    if not role or _SECOND_ROLE[role] in roles or len(roles) == 1 or getattr(block, role) or block.completion:
        return
    if (second := similar_column(roles[role], roles, columns_for_roles(block, columns), rows)) is not None:
        first, last = sorted((roles[role], second), key=columns.index) if role == "text" else (roles[role], second)
        beside = _SECOND_ROLE[role]
        raise DataError(
            f"{file_name}: columns '{first}' and '{last}' contain texts, but only one is read; set data.{role}: {first}"
            + (f", and data.{beside}: {last} to read both" if beside else "")
            + f" (init: --column {role}={first}{f' --column {beside}={last}' if beside else ''})"
        )


_SECOND_ROLE = {"text": "text_pair", "prompt": "input", "source": ""}
