from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import yaml
from rich.markup import escape
from rich.prompt import Prompt

from fulltune.cli.inferred import (
    NO_HINTS,
    Hints,
    Inferred,
    UnclearColumnsError,
    first_rows,
    infer_task,
    parse_hints,
)
from fulltune.cli.readings import Reading, is_title, likely_tag_names
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
from fulltune.data.readers.read import locate_data_files
from fulltune.data.readers.text_files import guess_missing_header
from fulltune.data.remote.fetch import fetch
from fulltune.data.remote.hub import find_splits
from fulltune.errors import DataError, SetupError
from fulltune.files import write_text
from fulltune.recipe.address import HUB, HUB_NAME, address_problem, expand_short_form, is_address, is_fetched, scheme_of
from fulltune.records.data import SplitName
from fulltune.system.run_folder import explain_os_errors
from fulltune.tasks import Target
from fulltune.tasks.columns import shown
from fulltune.text import counted, to_yaml

_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


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
    chosen = {file.resolve() for file in given.values()}
    splits = splits or group_files_by_split([file for file in list_data_files(path) if file.resolve() not in chosen])
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
    files = replace(inferred.files, files=locate_data_files([str(file)]).files)
    if files.columns:
        names = guess_missing_header(files.files[0], files.encoding)
        alike = names is not None and len(names) == len(files.columns)
        return None if alike else f"{file.name}: has a header line, or its columns differ from the train file's"
    columns, rows = first_rows(files)
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
        raise SetupError("--eval, --test: DATA is an address, so write data.eval and data.test in the recipe")
    given: dict[str, object] = {"output": recipe_file, "model": model, **dict(hints.held_out.items()), **hints.settings}
    texts = {name: ",".join(value) if isinstance(value, tuple) else str(value or "") for name, value in given.items()}
    options = [f"--{name.replace('_', '-')}={text}" for name, text in texts.items() if text not in ("", "recipe.yaml")]
    try:
        inferred = infer_task(*paths, hints=hints, data=str(data_path), options=options + ["--force"] * force)
    except UnclearColumnsError as unclear:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise
        inferred = infer_task(*paths, hints=_ask_user(unclear.readings, hints))
    # Official test rows often come without labels: a held-out file without a needed column is not used.
    problems = {split: _column_mismatch(file, inferred) for split, file in files.items()}
    if wrong := [problem for split, problem in problems.items() if problem and split in hints.held_out]:
        raise DataError(wrong)
    held_out = {split: file for split, file in files.items() if problems[split] is None}
    not_used = (*unused, *filter(None, problems.values()))
    metric, template = inferred.target.form.metrics[0], str(_TABLE["template"])
    train = [_yaml_source(sources.get("train", file), recipe_file) for file in (paths[:1] if sources else paths)]
    held_out_paths = {split: _yaml_source(sources.get(split, file), recipe_file) for split, file in held_out.items()}
    text = template.format(
        file=data_path if sources else Path(data_path).name,
        recipe=recipe_file.name,
        model=_model_lines(model, inferred),
        task=inferred.task,
        data="\n  ".join(_data_lines(inferred, train, held_out_paths, not_used)),
        evaluate="baselines: true               # also score models that need no training on the test rows"
        if "text_pair" in inferred.target.columns and not _reads_title(inferred)  # apart, the loss chooses
        else f"metric: {metric}   # chooses the checkpoint on eval rows; test rows are for the report",
    )
    with explain_os_errors(recipe_file):
        write_text(recipe_file, text)
    return inferred, (paths, held_out, not_used)


def _ask_user(readings: Sequence[Reading], hints: Hints) -> Hints:
    """Let the user choose a reading in the terminal, and name its tags if they are numbers."""
    err.print("What is to be learned is not clear from the columns:")
    for number, reading in enumerate(readings, start=1):
        err.print(f"  {number}  {escape(reading.reason)}")
    numbers = [str(number) for number in range(1, len(readings) + 1)]
    chosen = readings[int(Prompt.ask("Which", console=err, choices=numbers, default="1")) - 1]
    settings = dict(hints.settings)
    if chosen.num_tags:
        usual = ",".join(likely_tag_names(chosen.num_tags))
        names = Prompt.ask("Names of the tags, in the order of the numbers from 0", console=err, default=usual)
        settings |= parse_hints(None, (), None, tag_names=names).settings
    return replace(hints, task=chosen.task, roles=chosen.roles, settings=settings)


def _reads_title(inferred: Inferred) -> bool:
    """Return whether one of two texts is the other's title. Both are then read in one sequence."""
    columns = inferred.target.columns
    return "text_pair" in columns and any(is_title(columns[role]) for role in ("text", "text_pair"))


def _model_lines(name: str | None, inferred: Inferred) -> str:
    models, comment = _TABLE["models"].get(inferred.task, _TABLE["models"]["text"]), ""
    if name is None:
        here = next(filter(_is_here, models), None)
        name = here or next(model for model, size in models.items() if size)
        what = "is already here" if here else f"has {models[name]} MB to download"
        comment = f"   # small, and {what}; any Hub id, folder or GGUF file works"
    if not _reads_title(inferred):
        return f"model: {_yaml_scalar(name)}{comment}"
    return f"model:\n  name: {_yaml_scalar(name)}{comment}\n  pairs: joint   # the title is read with its text"


def _is_here(model: str) -> bool:
    """Return whether a model is in an installed package, or in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    if not model.startswith("package:"):
        return isinstance(try_to_load_from_cache(model, "model.safetensors"), str)
    modules = [model.removeprefix("package:").partition("/")[0], *["gguf"] * model.endswith(".gguf")]
    return all(map(find_spec, modules))


def _data_lines(
    inferred: Inferred, train: Sequence[str], held_out: Mapping[SplitName, str], not_used: Sequence[str]
) -> list[str]:
    """Return the lines of the recipe's block `data`."""
    labels = inferred.target.labels
    some = f": {', '.join(labels[:5])}{' ...' if len(labels) > 5 else ''}" if labels else ""
    return [
        f"train: {train[0]}" if len(train) == 1 else "\n    - ".join(["train:", *train]),
        *(f"# not used: {reason}" for reason in not_used),
        *(
            f"{split}: {held_out[split]}" if split in held_out else f"# {split} rows are split off from train"
            for split in ("eval", "test")
        ),
        *(
            f"{name}: {_yaml_value(value)}{'   # the file has no header line' if name == 'columns' else ''}"
            for name, value in inferred.settings.items()
        ),
        *([f"# columns not used: {inferred.unused}"] if inferred.unused else []),
        f"# contents: {counted(inferred.num_rows, 'row')}, {_target_in_words(inferred.target)}{' '.join(some.split())}",
    ]


def _yaml_value(value: object) -> str:
    return f"[{', '.join(map(_yaml_scalar, value))}]" if isinstance(value, tuple) else _yaml_scalar(str(value))


def describe_inferred_data(inferred: Inferred, files: SplitFiles) -> list[str]:
    """Describe the inferred files, columns and rows, one line each."""
    _, held_out, not_used = files
    output: list[str] = []
    if inferred.is_guess:
        output += [
            f"{inferred.files.where}: no header line, because the first line looks like a row",
            f"columns: {', '.join(inferred.files.columns or ())}; to rename them: --columns NAME,NAME",
            "if the first line is a header, name one of its columns, such as --column label=NAME",
        ]
    rows = f"{counted(inferred.num_rows, 'row')}, {inferred.task} ({_target_in_words(inferred.target)})"
    output.append(f"train: {inferred.files.where}: {rows}")
    output.append(f"reads: {shown(f'{name} ({role})' for role, name in inferred.target.columns.items())}")
    for split in ("eval", "test"):
        file = held_out.get(split)
        output.append(f"{split}:  {file.name if file else 'rows are split off from train'}")
    output += [f"not used: {reason}" for reason in not_used]
    if encoding := inferred.settings.get("encoding"):
        output.append(f"encoding: {encoding}; if letters look wrong, name another with --encoding")
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
