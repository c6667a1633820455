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
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.data import cache, mix
from fulltune.data.check import notes, num_shared, refuse_new_labels, refuse_unusable, unmeasured
from fulltune.data.encode import Dropped, Encoded, Job, encode, join_near
from fulltune.data.length_share import explained_by_class, explained_by_value
from fulltune.data.limits import Limits, longest_row, packing
from fulltune.data.pack import pack
from fulltune.data.readers.read import DataFiles, content_hash
from fulltune.data.scale import far_off, scale_of
from fulltune.data.sources import (
    Preprocess,
    SourceName,
    SourceRows,
    describe,
    find_files,
    is_mixed,
    mixed_names,
    read_rows,
    targets_of,
)
from fulltune.data.split import SPLITS, Split, asked_rows, assign
from fulltune.errors import DataError, RecipeError, SetupError
from fulltune.inference.store import MIXED, Rows, RowWriter, batches, readable, save_clusters
from fulltune.models.processors import processor_identity
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.records.data import DataSummary, MixedSummary, Preview, SplitName, SplitSummary
from fulltune.records.events import Listener, RowsPrepared
from fulltune.tasks import Target, Task
from fulltune.text import counted, format_percent

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

SUMMARY = "summary.json"
DROPPED = "dropped.jsonl"
FORMAT = 6
"""Of the prepared rows: with another number, rows of an earlier version are made anew."""
_PROGRESS_SECONDS = 0.2


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
    files = find_files(recipe)
    fingerprint = _fingerprint(recipe, files, tokenizer, limits)
    if planned_for and planned_for != fingerprint:
        raise SetupError(
            f"{folder.parent}: the data files changed since this run was planned, so its checkpoints and scores belong "
            "to other rows; start a new run (--fresh)"
        )
    for abandoned in folder.parent.glob(f"{folder.name}.part-*"):
        shutil.rmtree(abandoned)
    # What a user's function does cannot be hashed, so rows that went through one are always made anew.
    if preprocess is None and (earlier := _earlier(folder, fingerprint)) is not None:
        return earlier
    cached = None
    # Rows of images are only their paths, which another run may have elsewhere.
    if preprocess is None and cache_folder is not None and FACTS[recipe.task].reads == "text":
        cached = cache_folder / fingerprint
        with cache.locked(cache_folder):
            if (earlier := _earlier(cached, fingerprint)) is not None:
                cache.link(cached, folder)
                return earlier
    whole = cached or folder
    part = whole.with_name(f"{whole.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        sources = {name: read_rows(recipe, those, preprocess) for name, those in files.items()}
        summary = _make(recipe, part, task, tokenizer, limits, sources, fingerprint, listener)
        if cached is None:
            cache.put(part, folder)
        else:
            with cache.locked(cached.parent):
                cache.put(part, cached)
                cache.link(cached, folder)
                cache.prune(cached.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return summary


def _make(
    recipe: Recipe,
    folder: Path,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    sources: Mapping[SourceName, SourceRows],
    fingerprint: str,
    listener: Listener,
) -> DataSummary:
    """The data stage itself, into an empty folder."""
    block = recipe.data
    target, counts = describe(block, task, sources)
    targets = targets_of(block, task, target, sources)
    limit, reason = longest_row(recipe, task, target, limits, tokenizer)
    packed, remarks = packing(recipe, target, limits, targets.values())
    job = Job(
        task=recipe.task,
        target=target,
        tokenizer=tokenizer,
        max_length=limit,
        split="train",
        split_seed=block.split_seed,
        drop_truncated=block.truncation_strategy == "drop",
        signs=block.near_duplicates < 1,
    )
    encoded = _encode(job, folder, sources, targets, counts, listener)
    refuse_unusable(recipe, encoded, sources)
    # What is mixed in does not change the splits.
    own = join_near({name: whole for name, whole in encoded.items() if not is_mixed(name)}, block.near_duplicates)
    splits = assign(recipe, own, sources)
    train, test = splits["train"], splits["test"]
    remarks += notes(splits, target, block.near_duplicates < 1)
    if target.labels:
        refuse_new_labels(splits)
        remarks += unmeasured(train, test)
    asked = asked_rows(recipe, splits) if target.labels else {}
    mixed, also_held_out = mix.mixed_rows(join_near(encoded, block.near_duplicates), sources, splits)
    _list(folder, also_held_out)
    summaries: dict[SplitName, SplitSummary] = {}
    without = getattr(task, "ONLY_FOR_TEST_ROWS", ())
    for name in SPLITS:
        split = splits[name]
        if not split.examples.any():
            raise DataError(f"{split.where}: no row of {name} is left: all are longer than data.max_length")
        parts = _examples(split, () if name == "test" else without)
        _write(folder / name, pack(parts, limit) if packed and name == "train" else parts)
        if name != "train":
            save_clusters(folder / name, split.source.groups[split.source.row_of][split.examples])
        summaries[name] = _summarise(split, Rows(folder / name)["length"], asked.get(name))
    drawn = mix.drawn_rows(recipe, summaries["train"].rows)
    counts_of = _write_mixed(folder / MIXED, mixed, without, limit if packed else None)
    for whole in encoded.values():
        shutil.rmtree(whole.folder)
    remarks += [_asked_note(name, splits[name].num_rows, few) for name, few in asked.items()]
    scale, explained, far = _of_target(target, train, folder / "train")
    remarks += far
    if packed:
        remarks.append(_packing_note(train, summaries["train"], limit))
    longest = max(whole.longest for whole in encoded.values())
    shrinks = not packed and not block.max_length and longest < limit
    off_train = f"split off {train.where} (seed {block.split_seed})"
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
        scale=scale,
        length_explained=explained,
        splits=summaries,
        sources={name: f"file {split.where}" if split.is_file else off_train for name, split in splits.items()},
        dropped=_dropped(encoded, also_held_out),
        notes=tuple(remarks),
        test_in_eval=num_shared(test, splits["eval"]) / max(1, test.num_rows),
        previews=_previews(task, target, tokenizer, folder / "train"),
        mixed=tuple(
            MixedSummary(
                where=mixed[name].where,
                weight=file.weight,
                rows_per_epoch=drawn[name],
                problem_type=targets[name].problem_type,
                counts=counts_of[name],
            )
            for name, file in mixed_names(recipe).items()
        ),
        fingerprint=fingerprint,
    )
    summary.save(folder / SUMMARY)  # last: a folder with a summary is whole
    return summary


def _encode(
    job: Job,
    folder: Path,
    sources: Mapping[SourceName, SourceRows],
    targets: Mapping[SourceName, Target],
    counts: Mapping[SourceName, int],
    listener: Listener,
) -> dict[SourceName, Encoded]:
    """Tokenise each source, and write down what is dropped."""
    encoded: dict[SourceName, Encoded] = {}
    total, told = sum(counts.values()), 0.0
    folder.mkdir(parents=True)
    with (folder / DROPPED).open("w", encoding="utf-8") as file:

        def drop(item: Dropped) -> None:
            file.write(_as_line(item))

        def progress(done_here: int) -> None:
            nonlocal told
            done = done_here + sum(whole.num_read for whole in encoded.values())
            now = time.monotonic()
            if now - told > _PROGRESS_SECONDS or done == total:
                told = now
                listener(RowsPrepared(name="tokenising", done=done, total=total))

        for name, source in sources.items():
            known = None if name == "train" else frozenset(encoded["train"].names)
            job = replace(job, split=name, target=targets[name], known_labels=known, drops_new_labels=is_mixed(name))
            encoded[name] = encode(job, source.rows(None), counts[name], folder / f"{name}-whole", progress, drop)
    return encoded


def _as_line(item: Dropped) -> str:
    return json.dumps(asdict(item), ensure_ascii=False, default=readable) + "\n"


def _list(folder: Path, items: Iterable[Dropped]) -> None:
    with (folder / DROPPED).open("a", encoding="utf-8") as file:
        file.writelines(map(_as_line, items))


def _dropped(encoded: Mapping[SourceName, Encoded], also_held_out: Iterable[Dropped]) -> dict[str, int]:
    """Number of rows, and of parts of rows, by the check that dropped them."""
    numbers = Counter(item.check for item in also_held_out)
    for whole in encoded.values():
        for loss, tally in whole.dropped.items():
            ending = " (part of a row)" if loss == "part" else ""
            numbers.update({f"{check}{ending}": count for check, count in tally.counts.items()})
    return dict(numbers)


def _earlier(folder: Path, fingerprint: str) -> DataSummary | None:
    """The summary of rows that are there already; None when they are others or another version's."""
    try:
        summary = DataSummary.load(folder / SUMMARY)
    except (OSError, SetupError):
        return None
    return summary if summary.fingerprint == fingerprint else None


# ---- writing ---------------------------------------------------------------------------------------------------


def _examples(split: Split, without: Collection[str]) -> Iterator[pa.RecordBatch]:
    """A split's examples, without some features."""
    import pyarrow as pa

    start = 0
    for batch in batches(split.source.folder):
        mask = split.examples[start : start + len(batch)]
        start += len(batch)
        if mask.any():
            batch = batch.select([feature for feature in batch.schema.names if feature not in without])
            yield batch if mask.all() else batch.filter(pa.array(mask))


def _write(folder: Path, parts: Iterator[pa.RecordBatch]) -> None:
    with RowWriter(folder) as writer:
        for part in parts:
            writer.write(part)


def _write_mixed(
    folder: Path, mixed: Mapping[SourceName, Split], without: Collection[str], packed_to: int | None
) -> dict[SourceName, SplitSummary]:
    """All mixed rows in one file, source after source; and what each source has.

    Args:
        folder: Of that file.
        mixed: The rows of each source.
        without: Features that are left out.
        packed_to: Tokens of a row that several texts share; None: they share none.
    """
    ends = [0]
    if mixed:
        with RowWriter(folder) as writer:
            for split in mixed.values():
                parts = _examples(split, without)
                ends.append(ends[-1])
                for part in parts if packed_to is None else pack(parts, packed_to):
                    writer.write(part)
                    ends[-1] += len(part)
    lengths = Rows(folder)["length"] if mixed else np.zeros(0)
    return {
        name: _summarise(split, lengths[start:end], None).model_copy(
            update={"dropped_rows": split.source.num_read - split.num_rows}
        )
        for (name, split), (start, end) in zip(mixed.items(), pairwise(ends), strict=True)
    }


def _summarise(split: Split, lengths: np.ndarray, asked: int | None) -> SplitSummary:
    whole, chosen = split.source, split.examples
    ordered = np.sort(lengths)
    labels = split.label_counts(np.bincount(whole.row_of[chosen], minlength=whole.num_rows))
    return SplitSummary(
        rows=len(ordered),
        tokens=int(ordered.sum()),
        trained_tokens=int(whole.trained_tokens[chosen].sum()),
        truncated_rows=int(whole.truncated[chosen].sum()),
        dropped_rows=whole.num_dropped if split.is_file else 0,
        length_percentiles={
            "p50": int(ordered[len(ordered) // 2]),
            "p95": int(ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]),
            "max": int(ordered[-1]),
        },
        label_counts=dict(sorted(labels.items(), key=lambda item: (-item[1], item[0]))),
        asked_rows=asked,
    )


def _asked_note(name: SplitName, num_rows: int, few: int) -> str:
    return (
        f"{counted(num_rows, f'{name} row')} where data.{name}_fraction asks for {few:,}: each label that has several "
        "texts gives at least one, with all rows that are equal to it or nearly so"
    )


def _packing_note(train: Split, summary: SplitSummary, limit: int) -> str:
    texts, pieces = train.num_rows, int(train.examples.sum())
    share = summary.tokens / max(1, summary.rows * limit)
    cut = f", cut into {pieces:,} pieces and" if pieces > texts else ""
    return (
        f"{counted(texts, 'train text')}{cut} packed into {counted(summary.rows, 'row')} of up to {limit} tokens, "
        f"{format_percent(share)} full"
    )


def _of_target(target: Target, train: Split, folder: Path) -> tuple[tuple[float, float] | None, float, list[str]]:
    """What follows from the train rows' targets: `scale` and `length_explained` of the summary, and notes."""
    whole, chosen = train.source, train.examples
    lengths = whole.lengths[chosen]
    if target.problem_type == "regression":
        values = np.asarray(Rows(folder)["labels"])
        scale = scale_of(values, train.where, target.columns["label"])
        return scale, explained_by_value(lengths, values), far_off(values, scale)
    if not target.labels:
        return None, 0.0, []
    numbers: dict[bytes, int] = {}  # of each set of labels
    sets = [
        numbers.setdefault(whole.label_numbers[start:end].tobytes(), len(numbers))
        for start, end in pairwise(whole.label_ends)
    ]
    return None, explained_by_class(lengths, np.array(sets)[whole.row_of[chosen]]), []


def _previews(task: Task, target: Target, tokenizer: Any, folder: Path) -> tuple[Preview, ...]:
    rows = (
        {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()}
        for row in Rows(folder)[:5]
    )
    return tuple(task.preview(row, target, tokenizer) for row in rows)


def _fingerprint(
    recipe: Recipe, files: Mapping[SourceName, DataFiles], tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> str:
    """Changes whenever the prepared rows could."""
    from importlib.metadata import version

    parts = {
        "format": FORMAT,
        "tokenizers": version("tokenizers"),
        "content": content_hash(files),
        "task": recipe.task,
        "data": recipe.data.model_dump(mode="json", exclude={"train", "eval", "test"}),
        "roles": [bool(recipe.data.eval), bool(recipe.data.test)],
        "processor": processor_identity(tokenizer),
        "limits": [limits.positions, tokenizer.model_max_length, limits.identity],
    }
    if limits.virtual:
        parts["virtual"] = limits.virtual
    if mixed := recipe.data.mixed_files:
        parts["weights"] = [one.weight for one in mixed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
