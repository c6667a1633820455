"""From the user's files to three tokenised splits that never mix, with an account of every row."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from fulltune.audit.texts import masked_text
from fulltune.data import cache, mix
from fulltune.data.check import (
    STANDS_EARLIER,
    late_rows,
    listed_late,
    note_on_flaws,
    notes,
    notes_apart,
    notes_on_known,
    num_shared,
    refuse_new_labels,
    refuse_secret_names,
    refuse_unusable,
    unmeasured,
)
from fulltune.data.contamination import KnownTexts, files_of, read_texts
from fulltune.data.encode import Dropped, Encoded, Job, encode, join_near, join_values
from fulltune.data.limits import Limits, longest_row, packing
from fulltune.data.patch import Patched, load_patch, patched_in_words, refuse_foreign
from fulltune.data.readers.files import state, unchanged
from fulltune.data.readers.read import DataFiles, content_hash
from fulltune.data.sources import (
    Preprocess,
    SourceName,
    SourceRows,
    describe,
    find_files,
    is_mixed,
    read_rows,
    targets_of,
    unused_columns,
)
from fulltune.data.split import Split, asked_rows, assign
from fulltune.data.targets import of_target
from fulltune.data.written import DROPPED, as_line, list_dropped, previews, write_splits
from fulltune.errors import DataError, RecipeError, SetupError
from fulltune.files import flaw, make_private, seal
from fulltune.models.base import processor_identity
from fulltune.recipe.data import UTF_8, DataBlock, codec_of
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.records.data import DataSummary, MixedSummary, SplitName, SplitSummary
from fulltune.records.events import Listener, RowsPrepared, Warned
from fulltune.tasks import Target, Task
from fulltune.tasks.columns import shown
from fulltune.text import counted, format_percent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUMMARY = "summary.json"
FORMAT = 8
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
    """Read, check, split and tokenise; write the splits and their summary. Raises `DataError` when the rows cannot be
    learned from; nothing of an earlier run is lost."""
    if FACTS[recipe.task].reads == "image" and recipe.data.near_duplicates < 1:
        raise RecipeError("data.near_duplicates: only texts can be nearly the same, not images; remove the setting")
    decisions = load_patch(Path(recipe.data.patch)) if recipe.data.patch else None
    files, forbidden = _find(recipe)
    before = {file: state(file) for file in chain(forbidden, *(those.files for those in files.values()))}
    fingerprint = _fingerprint(recipe, files, forbidden, tokenizer, limits)
    if planned_for and planned_for != fingerprint:
        raise SetupError(
            f"{folder.parent}: the data files changed since this run was planned, so its checkpoints and scores belong "
            "to other rows; start a new run (--fresh)"
        )
    for abandoned in folder.parent.glob(f"{folder.name}.part-*"):
        shutil.rmtree(abandoned)
    # What a user's function does cannot be hashed, so rows that went through one are always made anew.
    if preprocess is None and (earlier := _earlier(folder, fingerprint, listener)) is not None:
        return earlier
    cached = None
    # Rows of images are only their paths, which another run may have elsewhere.
    if preprocess is None and cache_folder is not None and FACTS[recipe.task].reads == "text":
        cached = cache_folder / fingerprint
        with cache.locked(cache_folder):
            if (earlier := _earlier(cached, fingerprint, listener)) is not None:
                cache.link(cached, folder)
                return earlier
    whole = cached or folder
    part = whole.with_name(f"{whole.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with unchanged(before):
            known = read_texts(str(recipe.data.contamination), forbidden) if forbidden else None
            sources = {
                name: read_rows(recipe, those, preprocess, None if decisions is None else Patched(decisions, name))
                for name, those in files.items()
            }
            work = _Work(recipe, part, task, tokenizer, limits, sources, known, listener)
            summary = _make(work, fingerprint)
        seal(part)
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


@dataclass(frozen=True)
class _Work:
    """What every step of making the rows reads."""

    recipe: Recipe
    folder: Path
    task: Task
    tokenizer: PreTrainedTokenizerBase
    limits: Limits
    sources: Mapping[SourceName, SourceRows]
    known: KnownTexts | None
    listener: Listener


@dataclass(frozen=True)
class _Described:
    """What the first pass over the files showed."""

    target: Target
    targets: Mapping[SourceName, Target]
    counts: Mapping[SourceName, int]
    limit: int
    reason: str
    packed: bool
    notes: list[str]


@dataclass(frozen=True)
class _Written:
    """What was written of the splits and of the rows that are mixed in."""

    splits: dict[SplitName, SplitSummary]
    mixed: tuple[MixedSummary, ...]
    also_held_out: list[Dropped]
    late: int
    notes: list[str]


def _make(work: _Work, fingerprint: str) -> DataSummary:
    """The data stage itself, into an empty folder: describe, encode, split, write."""
    rows = _describe(work)
    job = _job(work, rows)
    encoded = _encode(work, rows, job)
    splits, notes_on_splits = _split(work, rows.target, encoded)
    written = _write(work, rows, job, encoded, splits)
    for whole in encoded.values():
        shutil.rmtree(whole.folder)
    scale, explained, far = of_target(rows.target, splits["train"], work.folder / "train")
    packing_note = [_packing_note(splits["train"], written.splits["train"], rows.limit)] if rows.packed else []
    longest = max(whole.longest for whole in encoded.values())
    shrinks = not rows.packed and not work.recipe.data.max_length and longest < rows.limit
    summary = DataSummary(
        task=work.recipe.task,
        **rows.target.in_summary(),
        packed=rows.packed,
        max_length=longest if shrinks else rows.limit,
        max_length_reason="the longest row" if shrinks else rows.reason,
        limit=rows.limit,
        scale=scale,
        length_explained=explained,
        splits=written.splits,
        sources={name: _origin(work.recipe.data, split) for name, split in splits.items()},
        dropped=_dropped(encoded, work.sources, written),
        notes=tuple(map(masked_text, [*rows.notes, *notes_on_splits, *written.notes, *far, *packing_note])),
        test_in_eval=num_shared(splits["test"], splits["eval"]) / max(1, splits["test"].num_rows),
        previews=previews(
            work.folder / "train", work.task, rows.target, work.tokenizer, range(written.splits["train"].rows), 5
        ),
        mixed=written.mixed,
        fingerprint=fingerprint,
    )
    summary.save(work.folder / SUMMARY)  # last: a folder with a summary is whole
    return summary


def _describe(work: _Work) -> _Described:
    """Columns, target and numbers of rows, and how long a row may be."""
    block, sources = work.recipe.data, work.sources
    target, counts = describe(block, work.task, sources)
    if block.patch:
        refuse_foreign(block.patch, [one.patched for one in sources.values() if one.patched], not block.max_rows)
    targets = targets_of(block, work.task, target, sources)
    limit, reason = longest_row(work.recipe, work.task, target, work.limits, work.tokenizer)
    packed, remarks = packing(work.recipe, target, work.limits, targets.values())
    remarks += refuse_secret_names(target, sources["train"].where)
    return _Described(target, targets, counts, limit, reason, packed, remarks)


def _job(work: _Work, rows: _Described) -> Job:
    """What the workers that tokenise are told, before it is made each source's own."""
    block = work.recipe.data
    return Job(
        task=work.recipe.task,
        target=rows.target,
        tokenizer=work.tokenizer,
        max_length=rows.limit,
        split="train",
        split_seed=block.split_seed,
        drop_truncated=block.truncation_strategy == "drop",
        signs=block.near_duplicates < 1,
        group=block.group,
        time=block.time,
        known=work.known,
    )


def _split(
    work: _Work, target: Target, encoded: Mapping[SourceName, Encoded]
) -> tuple[dict[SplitName, Split], list[str]]:
    """Which rows each split has, and what is worth knowing about it."""
    block, sources = work.recipe.data, work.sources
    refuse_unusable(work.recipe, encoded, sources)
    # What is mixed in does not change the splits.
    own = join_near({name: whole for name, whole in encoded.items() if not is_mixed(name)}, block.near_duplicates)
    splits = assign(work.recipe, join_values(own), sources)
    remarks = [*chain(*(one.notes for one in sources.values())), *notes_apart(block, splits)]
    remarks += notes(splits, target, block.near_duplicates < 1)
    unused = unused_columns(block, target.columns, sources["train"])
    remarks += [f"columns not used: {shown(unused)}"] * bool(unused)
    if target.labels:
        refuse_new_labels(block, splits)
        remarks += unmeasured(splits["train"], splits["test"])
    remarks += note_on_flaws(encoded.values())
    return splits, [*remarks, *patched_in_words(block.patch, (source.patched for source in sources.values()))]


def _write(
    work: _Work,
    rows: _Described,
    job: Job,
    encoded: Mapping[SourceName, Encoded],
    splits: Mapping[SplitName, Split],
) -> _Written:
    """Each split and what is mixed in into a folder of its own; rows that are in no split are listed."""
    recipe, folder, train = work.recipe, work.folder, splits["train"]
    of_late = late_rows(splits)
    list_dropped(folder, listed_late(recipe.data, train.source, of_late))
    late = int(of_late.sum())
    # Whole times, and whole groups, say themselves what they come to.
    plain = rows.target.labels and recipe.data.time is None and recipe.data.group is None
    asked = asked_rows(recipe, splits) if plain else {}
    summaries = write_splits(folder, work.task, splits, asked, rows.limit if rows.packed else None, late)
    mixed, also_held_out = mix.mix_in(recipe, folder, job, encoded, work.sources, rows.targets, splits, rows.packed)
    remarks = notes_on_known(work.known, train, encoded, work.sources, also_held_out)
    remarks += [_asked_note(name, splits[name].num_rows, few) for name, few in asked.items()]
    return _Written(summaries, mixed, also_held_out, late, remarks)


def _origin(block: DataBlock, split: Split) -> str:
    """Where a split's rows come from, in words."""
    if split.is_file:
        return f"file {split.where}"
    if block.time is not None:
        return f"split off {split.where} by '{block.time}'"
    by = f" by '{block.group}'" if block.group is not None else ""
    return f"split off {split.where}{by} (seed {block.split_seed})"


def _encode(work: _Work, rows: _Described, job: Job) -> dict[SourceName, Encoded]:
    """Tokenise each source, and write down what is dropped. Only train has times, and only what is trained
    on may hold no known text."""
    encoded: dict[SourceName, Encoded] = {}
    total, told, folder = sum(rows.counts.values()), 0.0, work.folder
    folder.mkdir(parents=True)
    make_private(folder / DROPPED)
    with (folder / DROPPED).open("w", encoding="utf-8") as file:

        def drop(item: Dropped) -> None:
            file.write(as_line(item))

        def progress(done_here: int) -> None:
            nonlocal told
            done = done_here + sum(whole.num_read for whole in encoded.values())
            now = time.monotonic()
            if now - told > _PROGRESS_SECONDS or done == total:
                told = now
                work.listener(RowsPrepared(name="tokenising", done=done, total=total))

        for name, source in work.sources.items():
            is_train = name == "train"
            labels = None if is_train else frozenset(encoded["train"].names)
            here = replace(job, split=name, target=rows.targets[name], known_labels=labels, is_mixed=is_mixed(name))
            here = replace(
                here, time=job.time if is_train else None, known=job.known if is_train or here.is_mixed else None
            )
            encoded[name] = encode(here, source.rows(None), rows.counts[name], folder / f"{name}-whole", progress, drop)
            for item in source.patched.dropped if source.patched else ():
                drop(item)
    return encoded


def _dropped(
    encoded: Mapping[SourceName, Encoded], sources: Mapping[SourceName, SourceRows], written: _Written
) -> dict[str, int]:
    """Number of rows, and of parts of rows, by the check that dropped them."""
    by_patch = (source.patched.dropped for source in sources.values() if source.patched)
    numbers = Counter(item.check for item in chain(written.also_held_out, *by_patch))
    for whole in encoded.values():
        for loss, tally in whole.dropped.items():
            ending = " (part of a row)" if loss == "part" else ""
            numbers.update({f"{check}{ending}": count for check, count in tally.counts.items()})
    if written.late:
        numbers[STANDS_EARLIER] = written.late
    return dict(numbers)


def _earlier(folder: Path, fingerprint: str, listener: Listener) -> DataSummary | None:
    """The summary of rows that are there already; None when they are others or, which is said, damaged."""
    try:
        summary = DataSummary.load(folder / SUMMARY)
    except (OSError, SetupError):
        return None
    if summary.fingerprint != fingerprint:
        return None
    if damage := flaw(folder):
        listener(Warned(text=f"{folder}: {damage}; the rows are prepared anew from the data files"))
        return None
    return summary


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


def _find(recipe: Recipe) -> tuple[dict[SourceName, DataFiles], tuple[Path, ...]]:
    """The files of each source, and those of texts that must not be trained on."""
    problems: list[str] = []
    forbidden: tuple[Path, ...] = ()
    try:
        forbidden = files_of(recipe.data.contamination) if recipe.data.contamination is not None else ()
    except DataError as error:
        problems += error.problems
    try:
        files = find_files(recipe)
    except DataError as error:
        raise DataError([*error.problems, *problems]) from None
    if problems:
        raise DataError(problems)
    return files, forbidden


def _fingerprint(
    recipe: Recipe,
    files: Mapping[SourceName, DataFiles],
    forbidden: tuple[Path, ...],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
) -> str:
    """Changes whenever the prepared rows could."""
    from importlib.metadata import version

    # Where they are not set, rows of a version that did not know these settings are the same ones.
    unset = {name for name in ("group", "time") if getattr(recipe.data, name) is None}
    unset |= {"encoding"} if codec_of(recipe.data.encoding) == UTF_8 else set()
    parts = {
        "format": FORMAT,
        "tokenizers": version("tokenizers"),
        "content": content_hash(files),
        "task": recipe.task,
        "data": recipe.data.model_dump(
            mode="json", exclude={"train", "eval", "test", "contamination", "patch", *unset}
        ),
        "roles": [bool(recipe.data.eval), bool(recipe.data.test)],
        "processor": processor_identity(tokenizer),
        "limits": [limits.positions, tokenizer.model_max_length, limits.identity],
    }
    if recipe.data.patch:
        parts["patch"] = hashlib.sha256(Path(recipe.data.patch).read_bytes()).hexdigest()
    if limits.virtual:
        parts["virtual"] = limits.virtual
    if forbidden:
        parts["contamination"] = content_hash({"contamination": DataFiles(forbidden, "")})
    if mixed := recipe.data.mixed_files:
        parts["weights"] = [one.weight for one in mixed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
