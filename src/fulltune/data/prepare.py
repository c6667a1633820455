from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from fulltune.audit.texts import masked_text
from fulltune.data.check import (
    IN_EARLIER_SPLIT,
    note_forbidden_texts,
    note_queries_without_relevant,
    note_rarely_tested_classes,
    note_split_problems,
    notes_on_splitting,
    notes_on_texts,
    num_shared,
    refuse_labels_not_in_train,
    refuse_secrets_in_names,
    refuse_unusable_rows,
    rows_dropped_by_time_split,
    rows_in_no_split,
)
from fulltune.data.contamination import ForbiddenTexts, hash_forbidden_texts, list_forbidden_text_files
from fulltune.data.encode import DroppedRow, EncodedSource, Job, encode_source, join_groups_of_sources
from fulltune.data.limits import Limits, can_pack, length_limit
from fulltune.data.patch import PatchedRows, load_patch, note_on_patch, refuse_unmatched_decisions
from fulltune.data.readers.files import file_state, raise_if_files_change
from fulltune.data.readers.read import DataFiles, hash_files
from fulltune.data.remote.fetch import fetch_sources
from fulltune.data.sources import (
    Preprocess,
    SourceName,
    SourceRows,
    find_mixed_target,
    find_source_files,
    find_target_and_count_rows,
    is_mixed,
    list_unused_columns,
    read_source_rows,
)
from fulltune.data.split import Split, assign_splits
from fulltune.data.written import (
    DROPPED,
    dropped_row_as_json_line,
    exclude_held_out_rows,
    make_previews,
    target_statistics,
    write_mixed_in_rows,
    write_splits,
)
from fulltune.errors import DataError, RecipeError, SetupError
from fulltune.files import create_private_file, find_damage, write_checksums
from fulltune.models.base import processor_fingerprint
from fulltune.recipe.data import DataBlock, codec_for_encoding
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.records.data import DataSummary, SplitSummary
from fulltune.records.events import Listener, Message, RowsRead
from fulltune.tasks import Target, task_named
from fulltune.tasks.columns import shown
from fulltune.tasks.padding import texts_per_row
from fulltune.text import counted, format_percent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUMMARY = "summary.json"
FORMAT = 11
MAX_CACHED = 5
_ABANDONED_SECONDS = 24 * 3600
_PROGRESS_SECONDS = 0.2
_CACHE_ENTRY = re.compile(r"[0-9a-f]{16}(\.part-\d+)?")


@dataclass(frozen=True)
class Stage:
    """Inputs for preparing the data of a run."""

    recipe: Recipe
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    limits: Limits
    preprocess: Preprocess | None = None
    planned_fingerprint: str | None = None
    cache_folder: Path | None = None
    listener: Listener = lambda event: None


def prepare(stage: Stage) -> DataSummary:
    """Prepare the data files' rows in `stage.folder`, or reuse rows prepared earlier from the same inputs. If preparing
    fails, earlier rows stay in place."""
    recipe, folder = stage.recipe, stage.folder
    is_image = FACTS[recipe.task].reads == "image"
    if is_image and recipe.data.near_duplicates < 1:
        raise RecipeError(
            "data.near_duplicates: near duplicates are detected in texts only, not in images; remove the setting"
        )
    decisions = load_patch(Path(recipe.data.patch)) if recipe.data.patch else None
    remote = fetch_sources(recipe, folder.parent, stage.listener)
    files = find_source_files(recipe, remote)
    of_forbidden = list_forbidden_text_files(recipe)
    before = {file: file_state(file) for file in chain(of_forbidden, *(source.files for source in files.values()))}
    fingerprint = _fingerprint_inputs(stage, files, of_forbidden)
    if stage.planned_fingerprint and stage.planned_fingerprint != fingerprint:
        changed = "the data files or the texts of preserve.probe" if recipe.preserve.probe else "the data files"
        raise SetupError(
            f"{folder.parent}: {changed} changed since this run was planned, so its checkpoints and scores no longer "
            "match the data; restore the files, or start a new run (--fresh)"
        )
    for abandoned in folder.parent.glob(f"{folder.name}.part-*"):
        shutil.rmtree(abandoned)
    # A user's function cannot be hashed, so its rows are always prepared again.
    is_hashed = stage.preprocess is None
    if is_hashed and (earlier := _load_earlier_summary(folder, fingerprint, stage.listener)) is not None:
        return earlier
    # Image rows contain only paths, which may differ in another run.
    cached = stage.cache_folder / fingerprint if is_hashed and stage.cache_folder and not is_image else None
    if cached is not None:
        with lock_cache(cached.parent):
            if (earlier := _load_earlier_summary(cached, fingerprint, stage.listener)) is not None:
                link_cached_rows(cached, folder)
                return earlier
    target = cached or folder
    part = target.with_name(f"{target.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with raise_if_files_change(before):
            forbidden = hash_forbidden_texts(recipe.excluded_text_paths, of_forbidden) if of_forbidden else None
            patched = {name: None if decisions is None else PatchedRows(decisions, name) for name in files}
            sources = {
                name: read_source_rows(recipe, source, stage.preprocess, patched[name])
                for name, source in files.items()
            }
            summary = prepare_sources(replace(stage, folder=part), sources, forbidden, fingerprint)
        write_checksums(part)
        if cached is None:
            replace_folder(part, folder)
        else:
            with lock_cache(cached.parent):
                replace_folder(part, cached)
                link_cached_rows(cached, folder)
                delete_old_data_sets(cached.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return summary


def prepare_sources(
    stage: Stage, sources: Mapping[SourceName, SourceRows], forbidden: ForbiddenTexts | None, fingerprint: str
) -> DataSummary:
    """Read, check, split, tokenise and write all rows, and return their summary."""
    recipe, block, folder, task = stage.recipe, stage.recipe.data, stage.folder, task_named(stage.recipe.task)
    target, counts = find_target_and_count_rows(block, task, sources, recipe.evaluate.slice_by)
    target = replace(target, positive_label=recipe.evaluate.positive_label)
    if block.patch:
        patched = [source.patched for source in sources.values() if source.patched]
        refuse_unmatched_decisions(block.patch, patched, not block.max_rows)
    targets = {
        name: find_mixed_target(block, task, source) if is_mixed(name) and task.FACTS.has_forms else target
        for name, source in sources.items()
    }
    limit, reason = length_limit(recipe, task, target, stage.limits, stage.tokenizer)
    if block.train_on == "last" and "messages" not in target.columns:
        raise DataError("data.train_on: last needs chat messages, and these rows have none; remove it")
    refuse_secrets_in_names(target, sources["train"].where)
    packed, remarks = can_pack(recipe, target, stage.limits, targets.values())

    job = Job(recipe.task, block, target, stage.tokenizer, limit, forbidden=forbidden)
    # This comes first because reading rows resets `patched`.
    unused = list_unused_columns(block, {**target.columns, "slice": recipe.evaluate.slice_by}, sources["train"])
    encoded = _encode_sources(stage, job, sources, targets, counts)
    refuse_unusable_rows(recipe, encoded)
    # Mixed-in rows do not change the splits.
    own = {name: source for name, source in encoded.items() if not is_mixed(name)}
    splits = assign_splits(recipe, join_groups_of_sources(own, block.near_duplicates))
    if target.labels:
        refuse_labels_not_in_train(block, splits)
        remarks += note_rarely_tested_classes(splits["train"], splits["test"])
    remarks += [*chain(*(source.notes for source in sources.values())), *notes_on_splitting(recipe, splits)]
    remarks += note_split_problems(splits, target, block.near_duplicates < 1)
    remarks += [f"columns not used: {shown(unused)}"] if unused else []
    remarks += notes_on_texts(encoded.values())
    remarks += note_on_patch(block.patch, (source.patched for source in sources.values()))

    late = rows_in_no_split(splits)
    mixed, also_held_out = exclude_held_out_rows(recipe, encoded, splits)
    dropped_later = chain(rows_dropped_by_time_split(block, splits["train"].source, late), also_held_out)
    with (folder / DROPPED).open("a", encoding="utf-8") as file:
        file.writelines(map(dropped_row_as_json_line, dropped_later))
    written = write_splits(folder, job, splits, packed, int(late.sum()))
    mixed_in = write_mixed_in_rows(recipe, folder, job, mixed, packed)
    remarks += note_queries_without_relevant(folder) if target.form.ranks_rows else []
    remarks += note_forbidden_texts(forbidden, splits["train"], mixed)
    for source in encoded.values():
        shutil.rmtree(source.folder)
    scale, explained = target_statistics(target, splits["train"], folder / "train")
    remarks += [_note_on_packing(splits["train"], written["train"], limit)] if packed else []
    longest = max(source.longest for source in encoded.values())
    if (texts := texts_per_row(task, target)) > 1:  # rows may have been completed with longer texts
        longest = max(longest, *(split.length_percentiles["max"] // texts for split in written.values()))
    shrinks = not packed and not block.max_length and longest < limit
    summary = DataSummary(
        task=recipe.task,
        **target.in_summary(),
        packed=packed,
        max_length=longest if shrinks else limit,
        max_length_reason="the longest row" if shrinks else reason,
        limit=limit,
        scale=scale,
        length_explained=explained,
        splits=written,
        sources={name: _describe_split_origin(block, name, split) for name, split in splits.items()},
        dropped=_count_dropped(encoded, sources, also_held_out, int(late.sum())),
        notes=tuple(map(masked_text, remarks)),
        test_share_in_eval=num_shared(splits["test"], splits["eval"]) / max(1, splits["test"].num_rows),
        previews=make_previews(folder / "train", task, target, stage.tokenizer, range(written["train"].rows), 5),
        mixed=mixed_in,
        fingerprint=fingerprint,
    )
    summary.save(folder / SUMMARY)  # last: a folder with a summary is complete
    return summary


def _encode_sources(
    stage: Stage,
    job: Job,
    sources: Mapping[SourceName, SourceRows],
    targets: Mapping[SourceName, Target],
    num_rows: Mapping[SourceName, int],
) -> dict[SourceName, EncodedSource]:
    """Tokenise and return all sources, and write their dropped rows to `dropped.jsonl`."""
    encoded: dict[SourceName, EncodedSource] = {}
    total, reported, folder = sum(num_rows.values()), 0.0, stage.folder
    folder.mkdir(parents=True)
    create_private_file(folder / DROPPED)
    with (folder / DROPPED).open("w", encoding="utf-8") as file:

        def drop(item: DroppedRow) -> None:
            file.write(dropped_row_as_json_line(item))

        def report_progress(num_done: int) -> None:
            nonlocal reported
            done = num_done + sum(source.num_read for source in encoded.values())
            if time.monotonic() - reported > _PROGRESS_SECONDS or done == total:
                reported = time.monotonic()
                stage.listener(RowsRead(name="tokenising", done=done, total=total))

        for name, source in sources.items():
            is_train = name == "train"
            source_job = replace(
                job,
                source=name,
                where=source.where,
                target=targets[name],
                is_mixed=is_mixed(name),
                known_labels=None if is_train else frozenset(encoded["train"].names),
                forbidden=job.forbidden if is_train or is_mixed(name) else None,
            )
            path = folder / f"{name}-whole"
            encoded[name] = encode_source(source_job, source.rows(None), num_rows[name], path, report_progress, drop)
            for item in source.patched.dropped if source.patched else ():
                drop(item)
    return encoded


def _describe_split_origin(block: DataBlock, name: str, split: Split) -> str:
    """Describe for the report which file a split comes from."""
    if split.has_own_file:
        return f"file {split.source.where}"
    column = block.time or block.group
    by = f" by '{column}'" if column else ""
    if block.folds and name == "test":
        return f"fold {block.fold or 1} of {block.folds} of {split.source.where}{by} (seed {block.split_seed})"
    return f"split off from {split.source.where}{by}{f' (seed {block.split_seed})' if block.time is None else ''}"


def _count_dropped(
    encoded: Mapping[SourceName, EncodedSource],
    sources: Mapping[SourceName, SourceRows],
    dropped_mixed: Iterable[DroppedRow],
    num_late: int,
) -> dict[str, int]:
    """Return how many rows each check dropped, including `num_late` rows dropped by a time split."""
    by_patch = (source.patched.dropped for source in sources.values() if source.patched)
    numbers = Counter(item.check for item in chain(dropped_mixed, *by_patch))
    for tally in (source.tally for source in encoded.values()):
        numbers += tally.of("unusable") + tally.of("unfit")
        numbers += Counter({f"{check} (part of a row)": count for check, count in tally.of("part").items()})
    return dict(numbers + Counter({IN_EARLIER_SPLIT: num_late}))


def _load_earlier_summary(folder: Path, fingerprint: str, listener: Listener) -> DataSummary | None:
    """Return the summary of the rows prepared earlier, or None if they are missing, damaged (with a warning), or have
    another fingerprint."""
    try:
        summary = DataSummary.load(folder / SUMMARY)
    except (OSError, SetupError):
        return None
    if summary.fingerprint != fingerprint:
        return None
    if damage := find_damage(folder):
        listener(Message(text=f"{folder}: {damage}; preparing the rows again from the data files", level="warning"))
        return None
    return summary


def _note_on_packing(train: Split, summary: SplitSummary, max_length: int) -> str:
    """Return a note on how full the packed rows are."""
    texts, pieces = train.num_rows, int(train.examples.sum())
    share = summary.tokens / max(1, summary.rows * max_length)
    cut = f", cut into {pieces:,} pieces and" if pieces > texts else ""
    return (
        f"{counted(texts, 'train text')}{cut} packed into {counted(summary.rows, 'row')} of up to {max_length} tokens, "
        f"{format_percent(share)} full"
    )


def _fingerprint_inputs(stage: Stage, files: Mapping[SourceName, DataFiles], forbidden: tuple[Path, ...]) -> str:
    """Hash all inputs that determine the prepared rows."""
    from importlib.metadata import version

    block, limits, slice_by = stage.recipe.data, stage.limits, stage.recipe.evaluate.slice_by
    parts = (
        *(FORMAT, version("tokenizers"), stage.recipe.task, codec_for_encoding(block.encoding), hash_files(files)),
        block.model_dump(mode="json", exclude={"train", "eval", "test", "contamination", "patch", "encoding", "where"}),
        *(slice_by, bool(block.eval), bool(block.test), [file.weight for file in block.mixed_files]),
        block.patch and hashlib.sha256(Path(block.patch).read_bytes()).hexdigest(),
        hash_files({"contamination": DataFiles(forbidden, "")}),
        processor_fingerprint(stage.tokenizer),
        *(limits.max_positions, stage.tokenizer.model_max_length, limits.model_fingerprint, limits.num_virtual_tokens),
        *filter(None, [stage.recipe.evaluate.positive_label]),
    )
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# ---- the cache of prepared rows: a folder per content, linked into each run that uses it -----------------------------


@contextlib.contextmanager
def lock_cache(folder: Path) -> Iterator[None]:
    """Lock the cache against other runs inside the context."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def replace_folder(new: Path, old: Path) -> None:
    """Rename the folder `new` to `old`, replacing `old`."""
    if old.exists():
        shutil.rmtree(old)
    new.rename(old)


def link_cached_rows(cached: Path, folder: Path) -> None:
    """Hard-link the cached files into a run's folder, or copy them if it is on another file system."""
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        shutil.copytree(cached, part, copy_function=_hard_link_or_copy)
        replace_folder(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    os.utime(cached)  # pruned last


def _hard_link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def delete_old_data_sets(folder: Path) -> None:
    """Delete data sets beyond the `MAX_CACHED` most recently used, and unfinished data sets older than a day."""
    entries = [path for path in folder.iterdir() if _CACHE_ENTRY.fullmatch(path.name)]
    parts = [path for path in entries if ".part-" in path.name]
    complete = sorted({*entries} - {*parts}, key=lambda path: path.stat().st_mtime, reverse=True)
    abandoned = [path for path in parts if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS]
    for path in [*complete[MAX_CACHED:], *abandoned]:
        shutil.rmtree(path)
