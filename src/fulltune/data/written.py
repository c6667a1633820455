from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from itertools import chain, islice, pairwise, starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.audit.texts import masked_cells, masked_text
from fulltune.data.encode import DroppedRow, EncodedSource, Job, join_groups_of_sources
from fulltune.data.limits import pack_texts
from fulltune.data.sources import SourceName, is_mixed, mixed_names
from fulltune.data.split import HELD_OUT, SPLITS, Split
from fulltune.errors import DataError
from fulltune.inference.store import (
    CLUSTERS,
    FILE,
    IN_TRAIN,
    MIXED,
    ROW_JSON,
    Rows,
    make_record_batch,
    read_original_rows,
    read_record_batches,
    to_json_value,
    write_rows,
)
from fulltune.recipe.data import rows_per_epoch
from fulltune.recipe.fields import Recipe
from fulltune.records.data import MixedSummary, Preview, SplitName, SplitSummary
from fulltune.tasks import PLACE, IncompleteRows, Target, Task, Tokenizer, task_named
from fulltune.tasks.columns import in_batches
from fulltune.tasks.padding import TEXT_LENGTHS, texts_per_row
from fulltune.text import counted

if TYPE_CHECKING:
    import pyarrow as pa

DROPPED = "dropped.jsonl"
_MAX_PREVIEWED = 200


def dropped_row_as_json_line(item: DroppedRow) -> str:
    """Return a line for `dropped.jsonl`, with secrets masked."""
    return (
        json.dumps(masked_cells(json.loads(json.dumps(asdict(item), default=to_json_value))), ensure_ascii=False) + "\n"
    )


def iterate_stored_rows(source: EncodedSource, is_wanted: np.ndarray) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield index, location and cells of each source row that `is_wanted` marks, in order."""
    if not is_wanted.any():  # a source without rows has no files
        return
    first = np.diff(source.row_of, prepend=-1) > 0  # the row's cells are stored with its first example
    start = 0
    for batch in read_record_batches(source.folder):
        row_of, is_first = source.row_of[start : start + len(batch)], first[start : start + len(batch)]
        start += len(batch)
        for place in np.flatnonzero(is_wanted[row_of] & is_first):
            row = json.loads(batch.column(ROW_JSON)[int(place)].as_py())
            yield int(row_of[place]), row.pop(PLACE), row


def iterate_examples(split: Split, task: Task, with_test_features: bool = False) -> Iterator[pa.RecordBatch]:
    """Yield batches of a split's examples, without features that only test needs unless `with_test_features`."""
    import pyarrow as pa

    without = () if with_test_features else getattr(task, "ONLY_FOR_TEST_ROWS", ())
    start = 0
    for batch in read_record_batches(split.source.folder):
        mask = split.examples[start : start + len(batch)]
        start += len(batch)
        if mask.any():
            batch = batch.select([feature for feature in batch.schema.names if feature not in without])
            yield batch if mask.all() else batch.filter(pa.array(mask))


def summarise_split(split: Split, lengths: np.ndarray, dropped_rows: int) -> SplitSummary:
    """Return a split's counts, with length percentiles of its examples or packed rows."""
    source, in_split = split.source, split.examples
    ordered, trained = np.sort(lengths), source.trained_tokens[in_split]
    labels = split.label_counts(np.bincount(source.row_of[in_split], minlength=source.num_rows))
    return SplitSummary(
        rows=len(ordered),
        tokens=int(ordered.sum()),
        trained_tokens=int(trained.sum()),
        trained_p95=int(np.percentile(trained, 95)),
        truncated_rows=int(source.truncated[in_split].sum()),
        dropped_rows=dropped_rows,
        length_percentiles={
            "p50": int(ordered[len(ordered) // 2]),
            "p95": int(ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]),
            "max": int(ordered[-1]),
        },
        label_counts=dict(sorted(labels.items(), key=lambda item: (-item[1], item[0]))),
    )


def write_splits(
    folder: Path, job: Job, splits: Mapping[SplitName, Split], packed: bool, num_dropped_by_time: int
) -> dict[SplitName, SplitSummary]:
    """Write each split, and return the summaries; train rows are packed if `packed` is set."""
    task, summaries = task_named(job.task), dict[SplitName, SplitSummary]()
    for name in SPLITS:
        split, source = splits[name], splits[name].source
        if not split.examples.any():
            raise DataError(f"{source.where}: all rows of {name} are longer than data.max_length; raise it")
        parts = iterate_examples(split, task, with_test_features=name == "test")
        write_rows(folder / name, pack_texts(parts, job.max_length) if packed and name == "train" else parts)
        if task.FACTS.completes_rows and not job.target.form.ranks_rows:
            _complete_rows(folder / name, job, f"{source.where}: {name}")
        if name != "train":
            clusters = np.unique(source.split_groups[source.row_of][split.examples], return_inverse=True)[1]
            np.save(folder / name / CLUSTERS, clusters.astype(np.int64))
        if name == "test":
            groups = source.groups[source.row_of][split.examples]
            np.save(folder / name / IN_TRAIN, np.isin(groups, splits["train"].groups))
        dropped = source.num_dropped if split.has_own_file else 0
        if split.has_own_file and name == "train":
            dropped += num_dropped_by_time
        rows = Rows(folder / name)
        lengths = rows["length"]
        if name == "train":  # training may add negatives
            lengths = lengths * texts_per_row(task, job.target) // len(rows[0].get(TEXT_LENGTHS, (1,)))
        summaries[name] = summarise_split(split, lengths, dropped)
    return summaries


def _complete_rows(folder: Path, job: Job, where: str) -> None:
    own, train = (partial(read_original_rows, path) for path in (folder, folder.with_name("train")))
    split = IncompleteRows(Rows(folder), own, train, job.target, job.tokenizer, job.max_length, where)
    if (joined := task_named(job.task).complete_rows(split)) is None:
        return
    stored = chain.from_iterable(batch.column(ROW_JSON).to_pylist() for batch in read_record_batches(folder))
    parts = (zip(*part, strict=True) for part in in_batches(zip(joined, stored, strict=True)))
    write_rows(folder / "part", starmap(make_record_batch, parts))
    (folder / "part" / FILE).replace(folder / FILE)  # the old one stays mapped until now
    (folder / "part").rmdir()


def make_previews(
    folder: Path, task: Task, target: Target, tokenizer: Tokenizer, span: range, max_previews: int
) -> tuple[Preview, ...]:
    """Return up to `max_previews` rows in the range `span` as the model reads them, without rows that hold private
    data."""
    rows, shown = Rows(folder), list[Preview]()
    for position, words in enumerate(
        islice(read_original_rows(folder), span.start, min(span.stop, span.start + _MAX_PREVIEWED))
    ):
        if len(shown) == max_previews:
            break
        row = rows[span.start + position]
        plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()}
        preview = task.preview(plain, target, tokenizer)
        cells = json.dumps(words, ensure_ascii=False, default=to_json_value)
        if all(masked_text(text) == text for text in (cells, "".join(segment.text for segment in preview.segments))):
            shown.append(preview)
    return tuple(shown)


# ---- rows that are mixed in ------------------------------------------------------------------------------------


def exclude_held_out_rows(
    recipe: Recipe, encoded: Mapping[SourceName, EncodedSource], splits: Mapping[SplitName, Split]
) -> tuple[dict[SourceName, Split], list[DroppedRow]]:
    """Return the mixed-in rows that no held-out split contains, and the dropped rows. Raises `DataError` if no row
    remains."""
    mixed, lost, problems = dict[SourceName, Split](), list[DroppedRow](), list[str]()
    if not recipe.data.mixed_files:
        return mixed, lost
    encoded, group = join_groups_of_sources(encoded, recipe.data.near_duplicates), recipe.data.group
    same = f"its input, its text, or its '{group}'," if group else "its input, or its text,"
    for name in filter(is_mixed, encoded):
        source = encoded[name]
        scored_in = np.full(source.num_rows, -1)
        for number, split in enumerate(HELD_OUT):
            groups = encoded[split if splits[split].has_own_file else "train"].groups[splits[split].rows]
            scored_in[np.isin(source.groups, groups)] = number
            if group is not None:  # all scored rows have a value; mixed-in rows without one match none
                scored_in[np.isin(source.group_values, splits[split].group_values)] = number
        mixed[name] = Split(source, scored_in < 0, has_own_file=True)
        checks = source.tally.of("unusable") + source.tally.of("unfit") + source.tally.of("part")
        for number, place, row in iterate_stored_rows(source, scored_in >= 0):
            in_split = HELD_OUT[scored_in[number]]
            reason = f"{same} also occurs in {in_split}, which is never trained on"
            lost.append(DroppedRow(name, place, f"also in {in_split}", reason, row))
            checks[lost[-1].check] += 1
        if not mixed[name].examples.any():
            reasons = ", ".join(f"{count:,} x {check}" for check, count in checks.most_common())
            problems.append(
                f"{source.where}: no row can be mixed in ({reasons}), expected at least one; use other rows, or remove "
                "the file from data.train"
            )
    if problems:
        raise DataError(problems)
    return mixed, lost


def write_mixed_in_rows(
    recipe: Recipe, folder: Path, job: Job, mixed: Mapping[SourceName, Split], packed: bool
) -> tuple[MixedSummary, ...]:
    """Write the rows of all mixed-in sources, and return a summary of each source. Raises `DataError` if a weight is
    too small to select a row."""
    if not mixed:
        return ()
    task, summaries, ends = task_named(job.task), list[MixedSummary](), [0]
    files, num_train_rows = mixed_names(recipe), len(Rows(folder / "train"))
    drawn = dict(zip(files, rows_per_epoch(num_train_rows, [one.weight for one in files.values()]), strict=True))
    none = [
        f"data.train: {file.path}: a weight of {file.weight:g} with {counted(num_train_rows, 'train row')} selects no "
        "row; raise the weight, or remove the file"
        for name, file in files.items()
        if not drawn[name]
    ]
    if none:
        raise DataError(none)

    def batches_of_all_sources() -> Iterator[pa.RecordBatch]:
        for split in mixed.values():
            ends.append(ends[-1])
            parts = iterate_examples(split, task)
            for part in pack_texts(parts, job.max_length) if packed else parts:
                yield part
                ends[-1] += len(part)

    write_rows(folder / MIXED, batches_of_all_sources())
    lengths = Rows(folder / MIXED)["length"]
    for (name, split), (start, end) in zip(mixed.items(), pairwise(ends), strict=True):
        source = split.source
        summaries.append(
            MixedSummary(
                where=source.where,
                weight=files[name].weight,
                rows_per_epoch=drawn[name],
                kind=source.target.form.kind,
                counts=summarise_split(split, lengths[start:end], source.num_read - split.num_rows),
                previews=make_previews(folder / MIXED, task, source.target, job.tokenizer, range(start, end), 1),
            )
        )
    return tuple(summaries)


# ---- statistics of the train rows' targets ---------------------------------------------------------------------


def target_mean_and_std(targets: np.ndarray, file_name: str, column: str) -> tuple[float, float]:
    """Return the targets' mean and standard deviation. Raises `DataError` if all targets are equal in fp32."""
    mean, spread = float(targets.mean()), float(targets.std())
    if spread < float(np.spacing(np.float32(abs(mean)))):
        raise DataError(
            f"{file_name}: all {len(targets):,} train rows have the target {mean:g} in column '{column}', or targets "
            "that 32-bit numbers cannot distinguish from it; there is nothing to learn: add rows with other targets "
            f"(data.train), choose another column (data.label), or subtract {mean:.3g} from all targets"
        )
    return mean, spread


def length_explained_by_class(lengths: np.ndarray, classes: np.ndarray) -> float:
    """Compute the share of the lengths' variance that the classes explain, corrected for chance (epsilon squared,
    Kelley 1935)."""
    counts, total = np.bincount(classes), float(len(lengths) * np.var(lengths))
    num_groups = int((counts > 0).sum())
    if total == 0 or len(lengths) <= num_groups:
        return 0.0
    means = np.bincount(classes, weights=lengths) / np.maximum(counts, 1)
    within = float(((lengths - means[classes]) ** 2).sum())
    return max(0.0, 1 - (within / (len(lengths) - num_groups)) / (total / (len(lengths) - 1)))


def length_explained_by_value(lengths: np.ndarray, values: np.ndarray) -> float:
    """Compute the squared correlation of length and target, or 0 if either is constant."""
    if np.ptp(lengths) == 0 or np.ptp(values) == 0:
        return 0.0
    return float(np.corrcoef(lengths, values)[0, 1]) ** 2


def target_statistics(target: Target, train: Split, folder: Path) -> tuple[tuple[float, float] | None, float]:
    """Return the mean and standard deviation of numeric targets (else None), and the share of the row lengths' variance
    that the targets explain."""
    source, in_split = train.source, train.examples
    lengths = source.lengths[in_split]
    if target.form.is_number:
        values = np.asarray(Rows(folder)["labels"])
        scale = target_mean_and_std(values, source.where, target.columns["label"])
        return scale, length_explained_by_value(lengths, values)
    return None, length_explained_by_class(lengths, source.labels[source.row_of[in_split]]) if target.labels else 0.0
