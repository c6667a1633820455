from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from fulltune.cli.readings import LABEL_KINDS, Column, Reading, describe_columns, leftover_texts, list_readings
from fulltune.data.readers.derived import DerivedColumns
from fulltune.data.readers.read import DataFiles, locate_data_files
from fulltune.data.readers.text_files import guess_encoding, guess_missing_header
from fulltune.data.sources import SourceRows, find_target_and_count_rows, list_unused_columns
from fulltune.errors import DataError, SetupError
from fulltune.recipe.data import UTF_8, DataBlock, codec_for_encoding
from fulltune.recipe.tasks import FACTS, READ_BY, TaskName
from fulltune.records.data import SplitName
from fulltune.tasks import Row, Target, task_named
from fulltune.tasks.causal_lm import raise_if_preference_data
from fulltune.tasks.columns import USUAL_NAMES, shown

_NO_TASK = (
    "its columns fit no task: expected columns text + label (classification), tokens + tags (entities), prompt + "
    "completion or messages (language model), question + context + answers, source + target, choices + label, image + "
    "label, or only text"
)
_HEAD, _SEARCHED, _STEP, _FEW = 500, 50_000, 100, 100
_MOST_SUGGESTED, _MOST_READ = 3, 6


@dataclass(frozen=True)
class Hints:
    """What the user says about the files."""

    task: TaskName | None = None
    roles: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    """`columns`, `encoding` and `tag_names`, if given."""
    held_out: Mapping[SplitName, Path] = field(default_factory=dict)
    """Files of eval and test rows."""

    def with_files(self, files: Mapping[SplitName, Path | None]) -> Hints:
        return replace(self, held_out={split: file for split, file in files.items() if file is not None})

    @property
    def named(self) -> list[str]:
        """The columns that have a role."""
        return [one for names in self.roles.values() for one in (names if isinstance(names, tuple) else (names,))]


NO_HINTS = Hints()


def parse_hints(task: str | None, role_options: Sequence[str], columns: str | None, **others: str | None) -> Hints:
    """Parse the options that help to infer the task, or raise `SetupError`. `role_options` are `ROLE=COLUMN`, `others`
    are `encoding` and `tag_names`."""
    if task is not None and task not in FACTS:
        raise SetupError(f"--task: expected one of {', '.join(FACTS)}, found '{task}'")
    usual, roles = [role for role in USUAL_NAMES if task is None or task in READ_BY[role]], dict[str, tuple[str, ...]]()
    for text in role_options:
        role, _, column = text.partition("=")
        if role not in usual or not column or (role in roles and role != "label"):
            raise SetupError(
                "--column: expected ROLE=COLUMN, such as label=intent (only label may have several columns, one for "
                f"each label), where ROLE is one of {', '.join(usual)}; found '{text}'"
            )
        roles[role] = (*roles.get(role, ()), column)
    settings: dict[str, object] = {name: text for name, text in {"columns": columns, **others}.items() if text}
    for name, what in (("columns", "column, such as text,label"), ("tag_names", "tag, such as O,B-PER,I-PER")):
        names = tuple(part.strip() for part in str(settings.get(name, "")).split(","))
        if name in settings and (not all(names) or len(set(names)) < len(names)):
            option = name.replace("_", "-")
            raise SetupError(f"--{option}: expected a distinct name for each {what}; found '{settings[name]}'")
        settings |= {name: names} if name in settings else {}
    try:
        codec_for_encoding(str(settings.get("encoding", "utf-8")))
    except ValueError as error:
        raise SetupError(f"--encoding: {error}") from None
    return Hints(task, {role: names[0] if len(names) == 1 else names for role, names in roles.items()}, settings)


@dataclass(frozen=True)
class Inferred:
    reading: Reading
    target: Target
    files: DataFiles
    num_rows: int
    settings: Mapping[str, object]
    """Settings of `data` beside the files."""
    is_guess: bool
    """True if it is only a guess that the header line is missing."""
    unused: str
    left: list[str]
    """Texts that are not read."""

    @property
    def task(self) -> TaskName:
        return self.reading.task


class UnclearColumnsError(DataError):
    """Columns suit several tasks, or no task reads all texts."""

    def __init__(self, problems: Sequence[str], readings: Sequence[Reading]) -> None:
        super().__init__(problems)
        self.readings = readings


def first_rows(files: DataFiles) -> tuple[tuple[str, ...], Sequence[Row]]:
    """Return the columns and some rows: the first ones, and others from far below, as files may be sorted."""
    numbered = enumerate(islice(files.rows(), _SEARCHED))
    head = [row for number, (_, row) in numbered if number < _HEAD or number % _STEP == 0]
    return tuple(dict.fromkeys(name for row in head for name in row)), head


def infer_task(*paths: Path, hints: Hints = NO_HINTS, data: str = "", options: Sequence[str] = ()) -> Inferred:
    """Infer task, target and columns of data files from their rows. Raises a `DataError` with commands that settle what
    is unclear; `data` and `options` are part of them."""
    settings = {"encoding": guess_encoding(locate_data_files([str(paths[0])]).files[0]), **hints.settings}
    codec = codec_for_encoding(str(settings["encoding"]))
    # Naming columns of a file implies that it has a header.
    guessed = None if "columns" in settings or hints.roles else guess_missing_header(paths[0], codec)
    block = DataBlock.model_validate({"train": [*map(str, paths)], "columns": guessed, **settings})
    files = replace(locate_data_files(block.task_files, columns=block.columns), encoding=codec)
    names, head = first_rows(files)
    if not {"completion", "messages", "text"} & hints.roles.keys():
        raise_if_preference_data(names, head[:_FEW], files.where)
    columns = describe_columns(names, head)
    if missing := [name for name in hints.named if name not in [column.name for column in columns]]:
        raise DataError(f"{files.where}: no column '{missing[0]}' (--column); columns in the file: {shown(names)}")
    suitable, refusals = list[Inferred](), list[DataError]()
    for reading in _suitable_readings(columns, hints):
        try:
            inferred = _infer_as(reading, block, files, columns, guessed is not None)
        except DataError as refusal:
            refusals.append(refusal)  # another reading may fit
            continue
        is_sure = (reading.is_sure or reading.roles.items() <= hints.roles.items()) and not reading.num_tags
        if not suitable and is_sure and (hints.roles or not inferred.left):
            return inferred
        suitable.append(inferred)
        if sum(not one.left for one in suitable) == _MOST_SUGGESTED or len(suitable) == _MOST_READ:
            break
    if suitable:
        raise _unclear_columns(suitable, data or str(paths[0]), options)
    raise (refusals if hints.task else [DataError(f"{paths[0]}: {_NO_TASK}; columns in the file: {shown(names)}")])[0]


def _infer_as(
    reading: Reading, block: DataBlock, files: DataFiles, columns: Sequence[Column], is_guess: bool
) -> Inferred:
    """Let the reading's task find its target in all rows. Raises a `DataError` if the task refuses them."""
    roles = reading.block_settings([column.name for column in columns])
    block = block.model_copy(update=roles)
    files = replace(files, derived=DerivedColumns.of(block))
    source = SourceRows(files.where, files.rows)
    target, counts = find_target_and_count_rows(block, task_named(reading.task), {"train": source})
    unused = " ".join(shown(list_unused_columns(block, target.columns, source)).split())
    settings: dict[str, object] = {"encoding": block.encoding} if files.encoding != UTF_8 else {}
    settings |= {"columns": block.columns, **roles, "tag_names": block.tag_names}
    settings |= {role: name for role, name in target.columns.items() if role in DataBlock.model_fields}
    settings = {name: value for name, value in settings.items() if value is not None}
    left = leftover_texts(columns, [*target.columns.values(), *(block.label_columns or ())])
    return Inferred(reading, target, files, counts["train"], settings, is_guess, unused, left)


def _suitable_readings(columns: Sequence[Column], hints: Hints) -> Iterator[Reading]:
    """Yield what the columns suit, as far as the user's hints allow, and then the hints alone with usual names."""

    def is_excluded(column: Column) -> bool:  # who names the text, or the label, means no other
        return ("text" in hints.roles and column.is_text) or ("label" in hints.roles and column.kind in LABEL_KINDS)

    for reading in list_readings([one for one in columns if one.name in hints.named or not is_excluded(one)]):
        is_as_named = all(reading.roles.get(role) == name for role, name in hints.roles.items())
        if is_as_named and hints.task in (None, reading.task):
            yield replace(reading, num_tags=0) if "tag_names" in hints.settings else reading
    for task in FACTS if hints.task or hints.roles else ():
        if hints.task in (None, task) and all(task in READ_BY[role] for role in hints.roles):
            yield Reading(task, hints.roles)


def _unclear_columns(suitable: Sequence[Inferred], data: str, options: Sequence[str]) -> UnclearColumnsError:
    """Return an error with the commands of the likeliest readings, those first that leave no text."""
    by_command = dict[str, Reading]()
    for inferred in sorted(suitable, key=lambda fit: len(fit.left)):
        reading, more = inferred.reading, f"; not read: {shown(inferred.left)}" if inferred.left else ""
        more += "; --tag-names must name the numbers from 0 on, so correct it" if reading.num_tags else ""
        command = reading.command(data, options)
        by_command.setdefault(command, replace(reading, reason=f"{reading.task}: {reading.reason}{more}"))
    chosen = dict(islice(by_command.items(), _MOST_SUGGESTED))
    lines = [line for command, reading in chosen.items() for line in (f"  {command}", f"    {reading.reason}")]
    title = f"{data}: what is to be learned is not clear from the columns; choose:"
    return UnclearColumnsError([title, *lines], [*chosen.values()])
