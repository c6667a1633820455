"""From the user's files to three tokenised splits that never mix, with an account of every row."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulltune.data.check import Dropped, labels_only_held_out, refuse_if_many, usable
from fulltune.data.length_share import explained_by_class, explained_by_value
from fulltune.data.read import Table, content_hash, read
from fulltune.data.split import sample, split_off
from fulltune.errors import DataError, RecipeError, SetupError
from fulltune.recipe import Recipe
from fulltune.records import DataSummary, Preview, SplitSummary
from fulltune.records import SplitName as Split
from fulltune.store import save_split
from fulltune.tasks import Example, Target, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUMMARY = "summary.json"
DROPPED = "dropped.jsonl"
SPLITS: tuple[Split, ...] = ("train", "eval", "test")
FEW_EVAL_ROWS = 50
HELD_OUT: tuple[Split, ...] = ("eval", "test")
Preprocess = Callable[[dict[str, Any]], dict[str, Any]]


def prepare(
    recipe: Recipe,
    folder: Path,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    position_limit: int | None,
    preprocess: Preprocess | None = None,
    planned_for: str | None = None,
) -> DataSummary:
    """Read, check, split and tokenise; write the splits and their summary.

    Args:
        recipe: The checked recipe.
        folder: The run's `data` folder; a summary with the same fingerprint in it is used as it is.
        task: The task module.
        tokenizer: The model's tokenizer.
        position_limit: Longest sequence the model takes, in tokens.
        preprocess: Applied to each row after reading, before anything else.
        planned_for: Fingerprint of the rows that the run's plan, checkpoints and scores belong to, when there are any.

    Returns:
        The summary, also written to `summary.json`.

    Raises:
        DataError: When the rows cannot be learned from; nothing of an earlier run is lost.
    """
    fingerprint = _fingerprint(recipe, tokenizer)
    if planned_for and planned_for != fingerprint:
        raise SetupError(
            f"{folder.parent}: the data files changed since this run was planned, so its checkpoints and scores belong "
            "to other rows; start a new run (--fresh)"
        )
    # What a user's function does cannot be hashed, so rows that went through one are always made anew.
    if preprocess is None and (folder / SUMMARY).exists():
        earlier = _earlier(folder / SUMMARY)
        if earlier is not None and earlier.fingerprint == fingerprint:
            return earlier
    tables = _read(recipe, preprocess)
    target, notes = describe(recipe, task, tables)
    splits, sources, dropped = _split(recipe, task, tables, target, notes)
    _check_labels(task, target, splits, {name: tables.get(name, tables["train"]).where for name in SPLITS})
    tokenised = {name: _encode(task, table, target, tokenizer) for name, table in splits.items()}
    max_length, reason = _max_length(recipe, task, tokenised, position_limit, tokenizer)
    if folder.exists():
        shutil.rmtree(folder)
    summaries: dict[Split, SplitSummary] = {}
    previews: tuple[Preview, ...] = ()
    length_explained = 0.0
    for name in SPLITS:
        # Encoded a second time only when something has to be cut: most data sets fit.
        longest = max((len(e.features["input_ids"]) for row in tokenised[name] for e in row), default=0)
        rows = tokenised[name]
        if longest > max_length:
            rows = _encode(task, splits[name], target, tokenizer, max_length)
        examples, kept, left_out = _fit_length(recipe, name, splits[name], rows)
        dropped += left_out
        features = [dict(example.features) for example in examples]
        save_split(folder / name, features, ({"place": splits[name].places[i], **splits[name].rows[i]} for i in kept))
        labels = Counter(label for i in kept for label in task.row_labels(splits[name].rows[i], target))
        summaries[name] = _summarise(examples, labels, sum(item.split == name for item in dropped))
        if name == "train":
            length_explained = _length_explained(task, target, splits[name], examples, kept)
            previews = tuple(task.preview(row, target, tokenizer) for row in features[:5])
    _write_dropped(folder, dropped)
    summary = DataSummary(
        task=recipe.task,
        problem_type=target.problem_type,
        columns=dict(target.columns),
        labels=target.labels,
        joint=target.joint,
        max_length=max_length,
        max_length_reason=reason,
        length_explained=length_explained,
        splits=summaries,
        sources=sources,
        dropped=dict(Counter(item.check for item in dropped)),
        notes=tuple(notes),
        previews=previews,
        fingerprint=fingerprint,
    )
    summary.save(folder / SUMMARY)
    return summary


def _earlier(path: Path) -> DataSummary | None:
    """The summary of an earlier run; None when it is damaged or another version's, and the rows are made anew."""
    try:
        return DataSummary.load(path)
    except (OSError, SetupError):
        return None


def _read(recipe: Recipe, preprocess: Preprocess | None) -> dict[Split, Table]:
    places: dict[Split, Sequence[str]] = {"train": recipe.train_files()}
    if recipe.data.eval:
        places["eval"] = (recipe.data.eval,)
    if recipe.data.test:
        places["test"] = (recipe.data.test,)
    tables: dict[Split, Table] = {}
    problems: list[str] = []
    for name, paths in places.items():
        try:
            table = read(paths)
        except DataError as error:
            problems += error.problems
            continue
        if recipe.data.max_rows and len(table.rows) > recipe.data.max_rows:
            table = _take(table, sample(len(table.rows), recipe.data.max_rows, recipe.data.split_seed))
        if preprocess is not None:
            rows = [preprocess(row) for row in table.rows]
            table = Table(rows, tuple(dict.fromkeys(key for row in rows for key in row)), table.places, table.where)
        tables[name] = table
    if problems:
        raise DataError(problems)
    return tables


def describe(recipe: Recipe, task: Task, tables: Mapping[Split, Table]) -> tuple[Target, list[str]]:
    """Find columns, problem type and labels; the other splits must have the same columns."""
    train = tables["train"]
    columns = task.find_columns(train.columns, train.rows[:100], recipe.data, train.where)
    problems = [
        f"{table.where}: no column '{column}' (data.{role}), which train has; columns here: {', '.join(table.columns)}"
        for table in tables.values()
        for role, column in columns.items()
        if column not in table.columns
    ]
    if problems:
        raise DataError(problems)
    return task.find_target(train.rows, columns, recipe.data, train.where), []


def _split(
    recipe: Recipe, task: Task, tables: Mapping[Split, Table], target: Target, notes: list[str]
) -> tuple[dict[Split, Table], dict[Split, str], list[Dropped]]:
    """Give each split its rows: from its own file, or split off train."""
    splits: dict[Split, Table] = {}
    dropped: list[Dropped] = []
    for name, table in tables.items():
        kept, left_out = usable(table, name, task, target)
        splits[name] = _take(table, kept)
        dropped += left_out
    sources = {name: f"file {table.where}" for name, table in tables.items()}
    fractions: dict[Split, float] = {"test": recipe.data.test_fraction, "eval": recipe.data.eval_fraction}
    whole = len(splits["train"].rows)
    for name, fraction in fractions.items():
        if name in splits:
            continue
        train = splits["train"]
        groups = [task.group_key(row, target) for row in train.rows]
        named = [task.row_labels(row, target) for row in train.rows]
        counts = Counter(label for labels in named for label in labels)
        # With several labels the rarest one decides: combinations would be too many to share out.
        strata = [min(labels, key=counts.__getitem__, default="") for labels in named]
        # The second split takes its share of all rows, not of those that the first one left.
        share = min(0.5, fraction * whole / max(1, len(train.rows)))
        held_out = split_off(groups, strata, share, recipe.data.split_seed)
        splits[name] = _take(train, [i for i, out in enumerate(held_out) if out])
        splits["train"] = _take(train, [i for i, out in enumerate(held_out) if not out])
        sources[name] = f"split off {train.where} (seed {recipe.data.split_seed})"
    given = [
        f"{table.where}: {len(splits[name].rows)} usable rows for {name}; expected at least 2"
        for name, table in tables.items()
        if len(splits[name].rows) < 2 and name != "train"
    ]
    if given:
        raise DataError(given)
    small = [f"{name} has {len(splits[name].rows)}" for name in SPLITS if len(splits[name].rows) < 2]
    if small:
        different = len({task.group_key(row, target) for row in tables["train"].rows})
        raise DataError(
            f"{tables['train'].where}: {len(tables['train'].rows)} rows, {different} of them different, are too few "
            f"for three splits of at least 2 rows ({', '.join(small)}); give more rows, or files for eval and test"
        )
    if (count := len(splits["eval"].rows)) < FEW_EVAL_ROWS:
        notes.append(
            f"only {count} eval rows: which checkpoint is best is close to chance; more rows would tell better"
        )
    notes += _overlaps(task, splits, target)
    return splits, sources, dropped


def _overlaps(task: Task, splits: Mapping[Split, Table], target: Target) -> list[str]:
    keys = {name: [task.group_key(row, target) for row in table.rows] for name, table in splits.items()}
    train = set(keys["train"])
    notes = []
    if repeated := len(keys["train"]) - len(train):
        notes.append(f"{repeated} of {len(keys['train'])} train rows repeat another train row")
    for name in ("eval", "test"):
        if shared := sum(key in train for key in keys[name]):
            notes.append(
                f"{shared} of {len(keys[name])} {name} rows also stand in train: their scores flatter the model"
            )
    chosen_on = set(keys["eval"])
    if shared := sum(key in chosen_on for key in keys["test"]):
        notes.append(f"{shared} of {len(keys['test'])} test rows also stand in eval, which chooses the checkpoint")
    return notes


def _take(table: Table, positions: Sequence[int]) -> Table:
    return Table([table.rows[i] for i in positions], table.columns, [table.places[i] for i in positions], table.where)


def _check_labels(task: Task, target: Target, splits: Mapping[Split, Table], where: dict[Split, str]) -> None:
    """Every class that is scored must occur in train."""
    if not target.labels:
        return
    counts = {
        name: Counter(label for row in table.rows for label in task.row_labels(row, target))
        for name, table in splits.items()
    }
    labels_only_held_out(counts["train"], {name: counts[name] for name in HELD_OUT}, where)


def _encode(
    task: Task, table: Table, target: Target, tokenizer: PreTrainedTokenizerBase, max_length: int = 10**9
) -> list[list[Example]]:
    return task.encode(table.rows, target, tokenizer, max_length) if table.rows else []


def _max_length(
    recipe: Recipe,
    task: Task,
    tokenised: Mapping[Split, list[list[Example]]],
    position_limit: int | None,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[int, str]:
    longest = max(len(e.features["input_ids"]) for rows in tokenised.values() for row in rows for e in row)
    limits = [limit for limit in (position_limit, tokenizer.model_max_length) if limit and limit < 10**9]
    model_limit = min(limits, default=None)
    wanted = recipe.data.max_length
    if wanted is not None:
        if model_limit is not None and wanted > model_limit:
            raise RecipeError(
                f"data.max_length: {wanted} tokens, but the model takes at most {model_limit}; "
                f"set data.max_length: {model_limit} or less"
            )
        return wanted, "from the recipe"
    bounds = {longest: "the longest row", task.LENGTH_CAP: f"the usual bound for {recipe.task}"}
    if model_limit is not None:
        bounds[model_limit] = "the model's limit"
    return min(bounds), bounds[min(bounds)]


def _fit_length(
    recipe: Recipe, split: Split, table: Table, rows: Sequence[Sequence[Example]]
) -> tuple[list[Example], list[int], list[Dropped]]:
    """Apply the truncation strategy; a row without a trained token is left out whatever the strategy."""
    kept, positions, dropped, too_long = [], [], [], 0
    for position, examples in enumerate(rows):
        for example in examples:
            reason = None
            if example.truncated:
                too_long += 1
                if recipe.data.truncation_strategy == "drop":
                    reason = ("too long", "longer than data.max_length")
            if example.refused is not None:
                reason = (example.refused.check, example.refused.reason)
            elif example.trained_tokens == 0:
                cut = "the whole answer lies beyond data.max_length" if example.truncated else "no token is trained"
                reason = ("answer cut off" if example.truncated else "nothing to train", cut)
            if reason is not None:
                dropped.append(Dropped(split, table.places[position], *reason, table.rows[position]))
            else:
                kept.append(example)
                positions.append(position)
    if recipe.data.truncation_strategy == "error" and too_long:
        raise DataError(
            f"{table.where}: {too_long} rows of {split} are longer than data.max_length; raise it, or set "
            "data.truncation_strategy to truncate or drop"
        )
    # Rows that the user asked to leave out are not held against the file.
    wanted_out = ("too long", "answer cut off") if recipe.data.truncation_strategy == "drop" else ()
    refuse_if_many([item for item in dropped if item.check not in wanted_out], len(rows), table.where)
    if not kept:
        raise DataError(f"{table.where}: no row of {split} is left: all are longer than data.max_length")
    return kept, positions, dropped


def _length_explained(
    task: Task, target: Target, table: Table, examples: Sequence[Example], kept: Sequence[int]
) -> float:
    lengths = [len(example.features["input_ids"]) for example in examples]
    if target.problem_type == "regression":
        return explained_by_value(lengths, [example.features["labels"] for example in examples])
    return explained_by_class(lengths, ["|".join(task.row_labels(table.rows[i], target)) for i in kept])


def _summarise(examples: Sequence[Example], labels: Counter[str], dropped: int) -> SplitSummary:
    lengths = sorted(len(example.features["input_ids"]) for example in examples)
    return SplitSummary(
        rows=len(examples),
        tokens=sum(lengths),
        trained_tokens=sum(example.trained_tokens for example in examples),
        truncated_rows=sum(example.truncated for example in examples),
        dropped_rows=dropped,
        length_percentiles={
            "p50": lengths[len(lengths) // 2],
            "p95": lengths[min(len(lengths) - 1, len(lengths) * 95 // 100)],
            "max": lengths[-1],
        },
        label_counts=dict(sorted(labels.items(), key=lambda item: (-item[1], item[0]))),
    )


def _write_dropped(folder: Path, dropped: Sequence[Dropped]) -> None:
    with (folder / DROPPED).open("w", encoding="utf-8") as file:
        for item in dropped:
            line = {
                "split": item.split,
                "place": item.place,
                "check": item.check,
                "reason": item.reason,
                "row": item.row,
            }
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")


def _fingerprint(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes whenever the prepared rows could."""
    held_out = [path for path in (recipe.data.eval, recipe.data.test) if path]
    parts = {
        "content": content_hash([*recipe.train_files(), *held_out]),
        "task": recipe.task,
        "data": recipe.data.model_dump(mode="json", exclude={"train", "eval", "test"}),
        "roles": [bool(recipe.data.eval), bool(recipe.data.test)],
        "vocabulary": hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest(),
        "template": str(tokenizer.chat_template),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
