"""From the user's files to three tokenised splits that never mix, with an account of every row.

The files are read twice, row by row: once to find columns and target, once to tokenise. What is kept in memory of a row
are a few numbers, so that the number of rows is bounded by the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.data import cache
from fulltune.data.check import Dropped
from fulltune.data.encode import Encoded, Job, encode, join_near
from fulltune.data.length_share import explained_by_class, explained_by_value
from fulltune.data.limits import Limits, longest_row, packing
from fulltune.data.pack import pack
from fulltune.data.readers.read import DataFiles, content_hash
from fulltune.data.sources import Preprocess, SourceRows, describe, find_files, read_rows
from fulltune.data.splits import (
    SPLITS,
    assign,
    check_labels,
    label_counts,
    more_than_asked,
    notes,
    num_in_eval,
    refuse_unusable,
    unmeasured,
)
from fulltune.errors import DataError, RecipeError, SetupError
from fulltune.inference.store import RowWriter, batches, load_split, readable, save_clusters
from fulltune.models.processors import processor_identity
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.records.data import DataSummary, Preview, SplitSummary
from fulltune.records.data import SplitName as Split
from fulltune.tasks import Target, Task

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

SUMMARY = "summary.json"
DROPPED = "dropped.jsonl"
FORMAT = 5
"""Of the prepared rows: with another number, rows of an earlier version are made anew."""
_PROGRESS_SECONDS = 0.2
Listener = Callable[[dict[str, Any]], None]


def prepare(
    recipe: Recipe,
    folder: Path,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    preprocess: Preprocess | None = None,
    planned_for: str | None = None,
    cache_folder: Path | None = None,
    listener: Listener = lambda event: None,
) -> DataSummary:
    """Read, check, split and tokenise; write the splits and their summary.

    Args:
        recipe: The checked recipe.
        folder: The run's `data` folder; a summary with the same fingerprint in it is used as it is.
        task: The task module.
        tokenizer: The model's tokenizer, or image processor.
        limits: Of the model.
        preprocess: Applied to each row after reading, before anything else; such rows are held in memory.
        planned_for: Fingerprint of the rows that the run's plan, checkpoints and scores belong to, when there are any.
        cache_folder: Where prepared rows are kept for other runs.
        listener: Told about progress.

    Returns:
        The summary, also written to `summary.json`.

    Raises:
        DataError: When the rows cannot be learned from; nothing of an earlier run is lost.
    """
    if FACTS[recipe.task].reads == "image" and recipe.data.near_duplicates < 1:
        raise RecipeError("data.near_duplicates: only texts can be nearly the same, not images; remove the setting")
    sources = find_files(recipe)
    fingerprint = _fingerprint(recipe, sources, tokenizer, limits)
    if planned_for and planned_for != fingerprint:
        raise SetupError(
            f"{folder.parent}: the data files changed since this run was planned, so its checkpoints and scores belong "
            "to other rows; start a new run (--fresh)"
        )
    # What a user's function does cannot be hashed, so rows that went through one are always made anew.
    reusable = preprocess is None
    for abandoned in folder.parent.glob(f"{folder.name}.part-*"):
        shutil.rmtree(abandoned)
    if reusable and (earlier := _earlier(folder, fingerprint)) is not None:
        return earlier
    # Rows of images are only their paths, which another run may have elsewhere.
    kept = None
    if reusable and cache_folder is not None and FACTS[recipe.task].reads == "text":
        kept = cache_folder / fingerprint
        with cache.locked(cache_folder):
            if (earlier := _earlier(kept, fingerprint)) is not None:
                cache.link(kept, folder)
                return earlier
    part = (kept or folder).with_name(f"{(kept or folder).name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        rows_of = {name: read_rows(recipe, source, preprocess) for name, source in sources.items()}
        summary = _make(recipe, part, task, tokenizer, limits, rows_of, fingerprint, listener)
        if kept is None:
            cache.put(part, folder)
        else:
            with cache.locked(kept.parent):
                cache.put(part, kept)
                cache.link(kept, folder)
                cache.prune(kept.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return summary


def _make(
    recipe: Recipe,
    folder: Path,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    rows_of: Mapping[Split, SourceRows],
    fingerprint: str,
    listener: Listener,
) -> DataSummary:
    """The data stage itself, into an empty folder."""
    target, counts = describe(recipe, task, rows_of)
    limit, reason = longest_row(recipe, task, target, limits, tokenizer)
    packed, remarks = packing(recipe, target, limits)
    encoded = _encode(recipe, folder, target, tokenizer, limit, rows_of, counts, listener)
    refuse_unusable(recipe, encoded, rows_of)
    join_near(list(encoded.values()), recipe.data.near_duplicates)
    split_of, sources = assign(recipe, encoded, rows_of)
    remarks += notes(encoded, split_of, target, recipe.data.near_duplicates < 1)
    if target.labels:
        check_labels(encoded, split_of, rows_of)
        remarks += unmeasured(encoded, split_of)
    summaries: dict[Split, SplitSummary] = {}
    for name in SPLITS:
        whole = encoded.get(name, encoded["train"])
        chosen = split_of[name][np.asarray(whole.row_of)]
        if not chosen.any():
            where = rows_of.get(name, rows_of["train"]).where
            raise DataError(f"{where}: no row of {name} is left: all are longer than data.max_length")
        parts = _chosen(whole.folder, chosen, () if name == "test" else getattr(task, "ONLY_FOR_TEST_ROWS", ()))
        _write(folder / name, pack(parts, limit) if packed and name == "train" else parts)
        if name != "train":
            save_clusters(folder / name, np.asarray(whole.groups)[np.asarray(whole.row_of)][chosen])
        dropped = whole.num_left_out if name in rows_of else 0
        summaries[name] = _summarise(whole, chosen, split_of[name], load_split(folder / name)["length"], dropped)
    for whole in encoded.values():
        shutil.rmtree(whole.folder)
    for name, asked in more_than_asked(recipe, rows_of, split_of).items() if target.labels else ():
        summaries[name] = summaries[name].model_copy(update={"asked_rows": asked})
        remarks.append(
            f"{int(split_of[name].sum()):,} {name} rows where data.{name}_fraction asks for {asked:,}: each label that "
            "has several texts gives at least one, with all rows that are equal to it or nearly so"
        )
    if packed:
        remarks.append(_packing_note(encoded["train"], split_of["train"], summaries["train"], limit))
    longest = max(whole.longest for whole in encoded.values())
    shrinks = not packed and not recipe.data.max_length and longest < limit
    summary = DataSummary(
        task=recipe.task,
        problem_type=target.problem_type,
        columns=dict(target.columns),
        labels=target.labels,
        joint=target.joint,
        num_choices=target.num_choices,
        packed=packed,
        max_length=longest if shrinks else limit,
        max_length_reason="the longest row" if shrinks else reason,
        limit=limit,
        length_explained=_length_explained(target, encoded["train"], split_of["train"], folder / "train"),
        splits=summaries,
        sources=sources,
        dropped=dict(sum((_left_out(whole) for whole in encoded.values()), Counter())),
        notes=tuple(remarks),
        test_in_eval=num_in_eval(encoded, split_of) / max(1, int(split_of["test"].sum())),
        previews=_previews(task, target, tokenizer, folder / "train"),
        fingerprint=fingerprint,
    )
    summary.save(folder / SUMMARY)  # last: a folder with a summary is whole
    return summary


def _encode(
    recipe: Recipe,
    folder: Path,
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    rows_of: Mapping[Split, SourceRows],
    counts: Mapping[Split, int],
    listener: Listener,
) -> dict[Split, Encoded]:
    """Tokenise each source, and write down what is left out."""
    progress = _Progress(listener, sum(counts.values()))
    drops = recipe.data.truncation_strategy == "drop"
    encoded: dict[Split, Encoded] = {}
    folder.mkdir(parents=True)
    with (folder / DROPPED).open("w", encoding="utf-8") as file:

        def leave_out(item: Dropped) -> None:
            file.write(json.dumps(asdict(item), ensure_ascii=False, default=readable) + "\n")

        for name, rows in rows_of.items():
            known = None if name == "train" else frozenset(encoded["train"].names)
            signs = recipe.data.near_duplicates < 1
            job = Job(recipe.task, target, tokenizer, limit, name, recipe.data.split_seed, drops, known, signs)
            place = folder / f"{name}-whole"
            encoded[name] = encode(job, rows.rows(None), counts[name], place, progress, leave_out)
            progress.before += counts[name]
    return encoded


def _left_out(whole: Encoded) -> Counter[str]:
    parts = Counter({f"{check} (part of a row)": count for check, count in whole.lost_parts.counts.items()})
    return whole.unusable.counts + whole.unfit.counts + parts


class _Progress:
    """Tells the listener how far tokenising is, a few times a second."""

    def __init__(self, listener: Listener, total: int) -> None:
        self.listener, self.total, self.before, self.last = listener, total, 0, 0.0

    def __call__(self, done_here: int) -> None:
        done, now = self.before + done_here, time.monotonic()
        if now - self.last > _PROGRESS_SECONDS or done == self.total:
            self.last = now
            self.listener({"kind": "progress", "name": "tokenising", "done": done, "total": self.total})


def _earlier(folder: Path, fingerprint: str) -> DataSummary | None:
    """The summary of rows that are there already; None when they are others or another version's."""
    try:
        summary = DataSummary.load(folder / SUMMARY)
    except (OSError, SetupError):
        return None
    return summary if summary.fingerprint == fingerprint else None


# ---- writing ---------------------------------------------------------------------------------------------------


def _chosen(folder: Path, chosen: np.ndarray, left_out: Collection[str]) -> Iterator[pa.RecordBatch]:
    """The chosen examples of a tokenised source, without some features."""
    import pyarrow as pa

    start = 0
    for batch in batches(folder):
        mask = chosen[start : start + len(batch)]
        start += len(batch)
        if mask.any():
            batch = batch.select([feature for feature in batch.schema.names if feature not in left_out])
            yield batch if mask.all() else batch.filter(pa.array(mask))


def _write(folder: Path, parts: Iterator[pa.RecordBatch]) -> None:
    with RowWriter(folder) as writer:
        for part in parts:
            writer.write(part)


def _summarise(whole: Encoded, chosen: np.ndarray, rows: np.ndarray, lengths: np.ndarray, dropped: int) -> SplitSummary:
    ordered = np.sort(lengths)
    examples_of_row = np.bincount(np.asarray(whole.row_of)[chosen], minlength=len(rows))
    labels = label_counts(whole, examples_of_row)
    return SplitSummary(
        rows=len(ordered),
        tokens=int(ordered.sum()),
        trained_tokens=int(np.asarray(whole.trained_tokens)[chosen].sum()),
        truncated_rows=int(np.asarray(whole.truncated)[chosen].sum()),
        dropped_rows=dropped,
        length_percentiles={
            "p50": int(ordered[len(ordered) // 2]),
            "p95": int(ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]),
            "max": int(ordered[-1]),
        },
        label_counts=dict(sorted(labels.items(), key=lambda item: (-item[1], item[0]))),
    )


def _packing_note(whole: Encoded, rows: np.ndarray, made: SplitSummary, limit: int) -> str:
    texts, pieces = int(rows.sum()), int(rows[np.asarray(whole.row_of)].sum())
    share = made.tokens / max(1, made.rows * limit)
    cut = f", cut into {pieces:,} pieces and" if pieces > texts else ""
    return f"{texts:,} train texts{cut} packed into {made.rows:,} rows of up to {limit} tokens, {share:.1%} full"


def _length_explained(target: Target, whole: Encoded, rows: np.ndarray, folder: Path) -> float:
    row_of = np.asarray(whole.row_of)
    chosen = rows[row_of]
    lengths = np.asarray(whole.lengths)[chosen]
    if target.problem_type == "regression":
        return explained_by_value(lengths, load_split(folder)["labels"])
    if not target.labels:
        return 0.0
    return explained_by_class(lengths, np.asarray(whole.combinations)[row_of[chosen]])


def _previews(task: Task, target: Target, tokenizer: Any, folder: Path) -> tuple[Preview, ...]:
    previews = []
    for row in load_split(folder)[:5]:
        plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()}
        previews.append(task.preview(plain, target, tokenizer))
    return tuple(previews)


def _fingerprint(
    recipe: Recipe, sources: Mapping[Split, DataFiles], tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> str:
    """Changes whenever the prepared rows could."""
    from importlib.metadata import version

    parts = {
        "format": FORMAT,
        "tokenizers": version("tokenizers"),
        "content": content_hash(sources),
        "task": recipe.task,
        "data": recipe.data.model_dump(mode="json", exclude={"train", "eval", "test"}),
        "roles": [bool(recipe.data.eval), bool(recipe.data.test)],
        "processor": processor_identity(tokenizer),
        "limits": [limits.positions, tokenizer.model_max_length, limits.identity],
    }
    if limits.virtual:
        parts["virtual"] = limits.virtual
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
