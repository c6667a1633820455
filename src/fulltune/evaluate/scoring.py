from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fulltune.audit.texts import masked_cells
from fulltune.errors import SetupError
from fulltune.evaluate import slices
from fulltune.files import append_line, replace_atomically
from fulltune.inference.own_metrics import label_words, own_metric_names, own_values, score_labels
from fulltune.inference.run import Batching, GenericText, ProgressCallback, model_batch, positions_by_length, run_rows
from fulltune.inference.selective_head import SelectiveHead, verify_selective_head
from fulltune.inference.store import CLUSTERS, IN_TRAIN, Rows, hash_rows, read_original_rows
from fulltune.methods import folder
from fulltune.models.base import Base, with_decoded_images
from fulltune.recipe.fields import Recipe
from fulltune.recipe.functions import describe_error, is_own
from fulltune.records.events import Listener, Message, RowsRead
from fulltune.records.plan import Plan
from fulltune.records.run import ACCESSES, COMPARISON, Access
from fulltune.records.scores import Answer, Scores
from fulltune.records.training import Outcome
from fulltune.stats.bootstrap import Resampled, bounds_of, resample_metrics
from fulltune.system.memory import run_with_smaller_batches
from fulltune.tasks import Predictions, Row, RowFeatures, Target, Task
from fulltune.tasks.padding import object_array

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UserMetrics = Callable[[Any, Any], Mapping[str, float]]
WORST = 25
Scored = tuple[Scores, Resampled | None]
"""A model's scores, and bootstrap resamples of its main metric (None if not computed)."""
MIN_UNSEEN = 20
"""Minimum number of groups for metrics on test rows that are not in train."""


@dataclass(frozen=True)
class Scoring:
    """Loads a run's rows and models, and scores models on the test rows."""

    recipe: Recipe
    plan: Plan
    task: Task
    target: Target
    data: Path
    base: Base
    user_metrics: UserMetrics | None = None
    listener: Listener = lambda event: None
    class_weights: Sequence[float] | None = None
    slice_by: str | None = None
    """Column by whose values the metrics are also computed, or None."""

    def watch(self, name: str) -> ProgressCallback:
        """Return a callback that reports progress to the listener as `name`."""
        return lambda done, total, share: self.listener(RowsRead(name=name, done=done, total=total, share=share))

    def rows(self, split: str) -> Rows:
        return Rows(self.data / split)

    @property
    def texts(self) -> list[Row]:
        """The test rows in the user's own columns, with file and line."""
        return list(read_original_rows(self.data / "test"))

    def by_row(self, predictions: Predictions) -> Predictions:
        """Return predictions of which a part of the rows can be scored: ranks need all rows."""
        return self.task.row_scores(predictions, self.target) if self.task.FACTS.completes_rows else predictions

    def estimate_metrics(
        self,
        predictions: Mapping[str, np.ndarray],
        positions: Sequence[int] | None = None,
        metrics: Callable[[Predictions], Mapping[str, float]] | None = None,
    ) -> dict[str, Resampled]:
        """Compute `metrics` (default: the task's) on all test rows, or those at `positions`, on bootstrap resamples,
        and by value of `slice_by`. Return them by name."""
        predictions = self.by_row(predictions)
        scored = slice(None) if positions is None else np.asarray(positions, np.int64)
        clusters, in_train = (np.load(self.data / "test" / name)[scored] for name in (CLUSTERS, IN_TRAIN))
        most = self.recipe.evaluate.bootstrap_samples

        def resampled(rows: np.ndarray | slice, samples: int = most) -> dict[str, Resampled]:
            """Compute metrics by name on these rows and on bootstrap resamples of their clusters."""
            return resample_metrics(
                {name: values[rows] for name, values in predictions.items()},
                metrics or (lambda rows: self.task.metrics(rows, self.target)),
                samples=samples,
                clusters=clusters[rows],
            )

        estimates = resampled(slice(None))
        if self.slice_by is not None:
            names = slices.slice_names(self.texts, self.slice_by)[scored]
            by_value = {value: resampled(names == value, min(most, slices.SAMPLES)) for value in sorted(set(names))}
            for name, whole in estimates.items():
                # A metric may be undefined for a value, such as a correlation of equal labels.
                parts = {value: of[name] for value, of in by_value.items() if name in of}
                defined = {value: part for value, part in parts.items() if math.isfinite(part.value)}
                estimates[name] = replace(whole, slices=defined)
        if not in_train.any():
            return estimates
        unseen = resampled(~in_train) if len(np.unique(clusters[~in_train])) >= MIN_UNSEEN else {}
        count = int(in_train.sum())
        return {name: replace(one, num_seen=count, unseen=unseen.get(name)) for name, one in estimates.items()}

    def estimate_user_metrics(
        self, predictions: Any, references: Any, positions: Sequence[int] | None = None
    ) -> dict[str, Resampled]:
        """Return the user's metrics, from Python and from the recipe, with resamples. A function of the recipe that
        returns a value for each row is called once. `positions` are the scored test rows (default: all)."""
        names, call, plain = own_metric_names(self.recipe), self.user_metrics, isinstance(predictions, list)
        if not names and call is None:
            return {}
        texts = self.texts
        both = {"predicted": predictions, "true": references}
        arrays = {name: object_array(values) if plain else values for name, values in both.items()}
        arrays["rows"] = object_array(texts if positions is None else [texts[position] for position in positions])

        def own(name: str, drawn: Predictions) -> float | np.ndarray:
            answers, expected = (list(drawn[one]) if plain else label_words(drawn[one], self.target) for one in both)
            return own_values(name, answers, expected, list(drawn["rows"]))

        def metrics(drawn: Predictions) -> dict[str, float]:
            """Call the user's functions on these rows, or raise `SetupError`."""
            values = {name: float(np.mean(drawn[name] if name in drawn else own(name, drawn))) for name in names}
            predicted, true = (list(drawn[one]) if plain else drawn[one] for one in both)
            try:
                of_call = {} if call is None else call(predicted, true)
                return values | {str(name): float(value) for name, value in of_call.items()}
            except Exception as error:
                raise SetupError(
                    f"metrics: your function failed on {len(predicted)} rows with {describe_error(error)}. It must "
                    "return a dictionary of names and numbers for any selection of the test rows. Correct the function "
                    "and call again; the trained model is saved"
                ) from error

        own_by_name = {name: own(name, arrays) for name in names}
        of_rows = {name: values for name, values in own_by_name.items() if isinstance(values, np.ndarray)}
        return self.estimate_metrics(arrays | of_rows, positions, metrics)

    def make_scores(
        self,
        name: str,
        kind: Literal["baseline", "untouched", "trained"],
        rows: int,
        metrics: Mapping[str, Resampled],
        **fields: Any,
    ) -> Scored:
        """Make the `Scores` of a model or baseline, with a confidence interval for each metric. `rows` counts the
        scored rows; `fields` are other fields of `Scores`."""
        confidence, main = self.recipe.evaluate.confidence, metrics.get(self.plan.metric)
        for quoting in fields.keys() & {"worst", "answers"}:
            fields[quoting] = tuple(Answer.model_validate(masked_cells(one.model_dump())) for one in fields[quoting])
        scores = Scores(
            name=name,
            kind=kind,
            rows=rows,
            metrics={metric: value.estimate(confidence, bounds_of(metric)) for metric, value in metrics.items()},
            main_metric=self.plan.metric,
            greater_is_better=self.plan.greater_is_better,
            confidence=confidence,
            num_leaks=main.num_seen if main else 0,
            near_leaks=self.recipe.data.near_duplicates < 1,
            metric_without_leaks=main.unseen.estimate(confidence, bounds_of(self.plan.metric))
            if main and main.unseen
            else None,
            slice_by=self.slice_by,
            slices=slices.worst_first(metrics, self.plan.metric, 1 if self.plan.greater_is_better else -1, confidence),
            **fields,
        )
        return scores, main

    def predict_split(self, model: PreTrainedModel, processor: Any, split: str = "test") -> Predictions:
        """Run a model over a split, and return what the task's `reduce_logits` computes, for all rows."""
        rows, pad_token_id = with_decoded_images(self.rows(split), processor), processor.pad_token_id
        head = self.selective_head(model, pad_token_id, rows)
        # Scores do not depend on the batch size.
        return run_with_smaller_batches(
            "evaluation",
            self.plan.eval_batch_size,
            lambda batch_size: run_rows(
                model,
                rows,
                self.task,
                self.target,
                pad_token_id,
                Batching(batch_size, self.plan.precision, head, self.watch(f"scoring {split} rows")),
            ),
        )

    def selective_head(
        self, model: PreTrainedModel, pad_token_id: int, rows: Sequence[RowFeatures]
    ) -> SelectiveHead | None:
        """Return a head that computes no logits for prompts. Return None if there are no prompts, or if this would
        change the other logits."""
        if not self.task.FACTS.writes:
            return None
        batch = model_batch(model, self.task, [rows[positions_by_length(rows)[-1]]], pad_token_id)
        return verify_selective_head(
            model, self.task, {name: tensor.to(model.device) for name, tensor in batch.items()}
        )[0]

    def load_model_and_processor(self, model_folder: Path | None) -> tuple[PreTrainedModel, Any]:
        """Load a finished model (the pretrained model if `model_folder` is None) and its tokenizer or image
        processor."""
        from fulltune.stream.skeleton import load_within

        block, head_is_new = self.recipe.model, self.task.FACTS.head_is_new
        limit = self.plan.memory_limit_bytes if self.plan.placement == "stream" else None
        load = partial(load_within, device=self.plan.device, memory_limit=limit)
        if model_folder is None:
            processor = self.base.processor
            changes = self.task.config_changes(self.target, processor)
            return load(replace(self.base, block=block), changes, head_is_new=head_is_new), processor
        if folder.has_only_trained_parameters(model_folder):
            processor = folder.load_processor(model_folder)
            model: Any = folder.load_method_folder(model_folder, processor, replace(self.base, block=block)).model
            return model.to(self.plan.device), processor
        # Keeps what the recipe says about remote code and attention; the revision belongs to the pretrained model.
        block = block.model_copy(
            update={"name": str(model_folder), "revision": None, "new_tokens": (), "random_weights": False}
        )
        finished = Base.from_block(block, self.recipe.task)
        return load(finished, {}, head_is_new=False), finished.processor


def log_test_access(folder: Path, listener: Listener, outcome: Outcome | None = None) -> None:
    """Log, next to the run folder, that a trained model (a comparison if `outcome` is None) used the test rows."""
    folder = folder.resolve()
    access = Access(
        time=datetime.now().astimezone().isoformat(timespec="seconds"),
        run=folder.name,
        trial=COMPARISON if outcome is None else outcome.trial,
        model="" if outcome is None else hashlib.sha256(outcome.model_dump_json().encode()).hexdigest()[:16],
        rows=hash_rows(folder / "data" / "test"),
    )
    try:
        append_line(folder.parent / ACCESSES, access.model_dump(mode="json"))
    except OSError as error:
        reason = str(error.strerror or error).lower()
        text = f"{folder.parent / ACCESSES}: cannot be written ({reason}), so later runs will not count this scoring"
        listener(Message(text=text, level="warning"))


# ---- predictions for each row, for comparisons -------------------------------------------------------------------


def compute_outputs(
    scoring: Scoring,
    model_folder: Path | None,
    texts: Sequence[str],
    most_tokens: int,
    splits: Sequence[str] = ("eval", "test"),
) -> tuple[dict[str, Predictions], float]:
    """Run a model over the rows of the splits and, except for images, over generic texts truncated to `most_tokens`.

    Returns:
        Predictions by split, with those of generic texts under `generic`, and the last split's seconds per row.
    """
    model, processor = scoring.load_model_and_processor(model_folder)
    by_split: dict[str, Predictions] = {}
    seconds = 0.0
    for split in splits:
        began = time.monotonic()
        outputs = scoring.predict_split(model, processor, split)
        if is_own(scoring.plan.metric):
            outputs = {**outputs, **score_labels(scoring.recipe, outputs, scoring.target, scoring.data / split)}
        by_split[split] = outputs
        seconds = (time.monotonic() - began) / max(1, len(scoring.rows(split)))
    if texts and scoring.task.FACTS.reads == "text":
        form, precision = scoring.target.form, scoring.plan.precision
        head = scoring.selective_head(model, processor.pad_token_id, scoring.rows("eval"))
        read = GenericText.tokenise(texts, processor, form.reads_any_text, precision, most_tokens).measure(model, head)
        by_split["generic"] = {"generic": read}
    return by_split, seconds


def save_outputs(path: Path, predictions: Predictions) -> None:
    """Save the numeric arrays of predictions as `.npz`."""
    numbers: dict[str, Any] = {name: array for name, array in predictions.items() if array.dtype != object}
    with replace_atomically(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **numbers)


def load_outputs(path: Path) -> Predictions:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
