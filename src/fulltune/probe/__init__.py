"""Linear classifiers on the pretrained model: the start of a new head, and a baseline without training.

A random head distorts the body in the first steps (Kumar et al. 2022, arXiv 2202.10054). So the head's last layer
starts as scikit-learn's classifier on the model's features; a dense layer before it, such as a pooler's, is kept or
replaced, whichever is best on held-out rows. Test rows are never used.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.files import replacing
from fulltune.methods.head import names_of
from fulltune.models.sharding import gathered_to_modify, like, needs_all_ranks, reshard
from fulltune.probe.features import EncodedRows, FeatureExtractor, Features, sample_rows, separators
from fulltune.probe.layers import HeadLayers, dense_replacements, head_layers, recognise_activation, to_numpy
from fulltune.probe.linear import (
    STRENGTHS,
    Items,
    LinearClassifier,
    NoProbe,
    centroids,
    error_rate,
    fits,
    loss,
    select_features,
)
from fulltune.records.probe import (
    LEAST_HELD_OUT,
    MOST_HELD_OUT,
    MOST_SOLVER_BYTES,
    PAIRS,
    FrozenBaseline,
    HeadStart,
    Pooling,
    Probe,
    solver_bytes,
)
from fulltune.system.memory import is_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SEED", "FeatureExtractor", "frozen_classifier", "load_or_fit", "predict", "put_head", "separators"]
FOLDER, RECORD = "probe", "probe.json"
HEAD, START, FROZEN = "head.safetensors", "start.safetensors", "frozen.safetensors"
SEED = 0
"""Seed of weights that the checkpoint lacks, the same for all trials."""
LOSS_TOLERANCE = 0.02
"""Largest excess of held-out loss, as a share of the best, for a more regularised probe."""
START_STRENGTH_DIVISOR = 8.0
"""Divisor of the best strength for the start of training: a head that already fits the train rows leaves no gradient
for the body (docs/concepts/statistics.md)."""
_USUAL_HIDDEN_SIZE = 1_024


# ---- in the run folder -------------------------------------------------------------------------------------------


def load_or_fit(
    folder: Path,
    extract: Callable[[], FeatureExtractor],
    rows: EncodedRows,
    eval_rows: EncodedRows,
    with_head: bool = True,
    together: bool = False,
) -> Probe:
    """Return the probe of a run folder, fitting it if it is missing; other processes wait.

    Args:
        folder: The run folder.
        extract: Creates the feature extractor.
        rows: The prepared train rows.
        eval_rows: The rows that select strength and features.
        with_head: False for a pretrained head, to fit only the baseline.
        together: True if all processes must run the model, as they shard its weights.
    """
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    if together:
        import torch.distributed as others

        is_first, missing = others.get_rank() == 0, [not (place / RECORD).exists()]
        others.broadcast_object_list(missing)  # the first one may be done before another has looked
        if missing[0]:
            _fit(place if is_first else None, extract, rows, eval_rows, with_head)
        others.barrier()
        return Probe.load(place / RECORD)
    with (place / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / RECORD).exists():
            _fit(place, extract, rows, eval_rows, with_head)
    return Probe.load(place / RECORD)


def _fit(
    folder: Path | None,
    extract: Callable[[], FeatureExtractor],
    rows: EncodedRows,
    eval_rows: EncodedRows,
    with_head: bool,
) -> None:
    """Fit the probe and save it, if a folder is given."""
    started = time.monotonic()
    probe, head, start, baseline = fit(extract(), rows, eval_rows, with_head)
    if folder is None:
        return
    _save(folder / HEAD, head)
    _save(folder / START, start)
    _save(folder / FROZEN, {"weight": baseline.weight, "bias": baseline.bias} if baseline else {})
    seconds = round(time.monotonic() - started, 3)
    probe.model_copy(update={"seconds": seconds}).save(folder / RECORD)


def _save(path: Path, arrays: HeadTensors) -> None:
    from safetensors.numpy import save_file

    with replacing(path) as part:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, part)


def put_head(model: PreTrainedModel, folder: Path, *, for_training: bool = False) -> None:
    """Set a loaded model's head to the run folder's probe, more regularised if `for_training`."""
    import torch
    from safetensors.torch import load_file

    values = load_file(folder / FOLDER / HEAD)
    if for_training:
        values |= load_file(folder / FOLDER / START)
    reshard(model)
    parameters = {name: model.get_parameter(name) for name in values}
    with torch.no_grad(), gathered_to_modify(list(parameters.values())):
        for name, parameter in parameters.items():
            parameter.copy_(like(values[name], parameter))


def frozen_classifier(folder: Path) -> LinearClassifier:
    """Load the baseline's classifier of a run."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / FOLDER / FROZEN)
    return LinearClassifier(tensors["weight"], tensors["bias"])


# ---- fitting -----------------------------------------------------------------------------------------------------


HeadTensors = dict[str, np.ndarray]
"""Values of parameters by their names in the model."""


def fit(
    extractor: FeatureExtractor, rows: EncodedRows, eval_rows: EncodedRows, with_head: bool = True
) -> tuple[Probe, HeadTensors, HeadTensors, LinearClassifier | None]:
    """Fit a probe.

    Returns:
        The record, the head's values, the last layer's at the start of training if they differ, and the
            baseline.
    """
    layers, failure = None, None
    try:
        layers = head_layers(extractor.model, extractor.task_name, extractor.num_outputs)
    except NoProbe as error:
        failure = str(error)
    if layers is None and extractor.kind == "span":  # a token has no mean
        return Probe(head=None, baseline=None, failure=failure), {}, {}, None
    width = round(_width(extractor.model, layers) * (PAIRS if extractor.separators else 1))
    train_rows = sample_rows(rows, extractor.kind, extractor.target.num_choices, width)
    by_eval = len(eval_rows) >= LEAST_HELD_OUT
    try:
        try:
            train = extractor.features(train_rows, layers)
        except NoProbe as error:
            if layers is None or extractor.kind == "span":
                raise
            layers, failure = None, str(error)  # means may still be read
            train = extractor.features(train_rows, layers)
        held_out = None
        if by_eval:
            sample = sample_rows(eval_rows, extractor.kind, extractor.target.num_choices, width, MOST_HELD_OUT)
            held_out = extractor.features(sample, layers)
        with _no_probe_without_memory(extractor.model):
            baseline = best_baseline(extractor, train, held_out)
    except NoProbe as error:
        return Probe(head=None, baseline=None, failure=str(error)), {}, {}, None
    head, values, start = None, HeadTensors(), HeadTensors()
    if layers is not None and with_head:
        try:
            with _no_probe_without_memory(extractor.model):
                head, values, start = _head(extractor, layers, train, held_out)
        except NoProbe as error:
            failure = str(error)
    record = Probe(
        head=head,
        baseline=baseline[0] if baseline else None,
        failure=failure,
        train_rows=len(train_rows),
        available_rows=len(rows),
        selected_on="eval rows" if by_eval else "cross-validation",
    )
    return record, values, start, baseline[1] if baseline else None


def _width(model: PreTrainedModel, layers: HeadLayers | None) -> int:
    hidden = getattr(model.config.get_text_config(), "hidden_size", None) or 0
    head: Any = None if layers is None else model.get_submodule(layers[0])
    return max(hidden, 0 if head is None else head.in_features) or _USUAL_HIDDEN_SIZE


@contextlib.contextmanager
def _no_probe_without_memory(model: PreTrainedModel) -> Iterator[None]:
    """Turn exhausted memory into `NoProbe`, unless processes share the weights and must fail together."""
    try:
        yield
    except Exception as error:
        if needs_all_ranks(model) or not is_out_of_memory(error):
            raise
        raise NoProbe("memory ran out while it was fitted") from error


def _head(
    extractor: FeatureExtractor, layers: HeadLayers, train: Features, held_out: Features | None
) -> tuple[HeadStart, HeadTensors, HeadTensors]:
    """Fit the head's layers; return their values, and the last layer's at the start of training."""
    parameters = dict(extractor.model.named_parameters())
    last_layer, dense_layer = layers
    has_bias, dense_has_bias = (f"{layer}.bias" in parameters for layer in layers)
    options: dict[str | None, LinearClassifier | None] = {"loaded" if dense_layer else None: None}
    after = None
    if train.dense is not None and train.last is not None:
        after = recognise_activation(extractor.model, str(dense_layer), train.dense, train.last)
    if train.dense is not None and after is not None:
        options.update(dense_replacements(train.dense, train.mean, dense_has_bias, after[0]))

    def last_inputs(features: Features, dense: LinearClassifier | None) -> Items:
        assert features.last is not None, "extracted with `layers`"
        if dense is None or features.dense is None or after is None:
            return extractor.items(features.last, features)
        return extractor.items(after[1](dense(features.dense)), features)

    spaces = {
        name: (last_inputs(train, dense), None if held_out is None else last_inputs(held_out, dense))
        for name, dense in options.items()
    }
    name, least, strength, last = select_features(spaces, partial(fits, has_bias=has_bias), loss, LOSS_TOLERANCE)
    start = HeadTensors()
    if extractor.kind != "regression":  # a ridge regression leaves enough
        [(_, at_start)] = fits(spaces[name][0], has_bias, [strength / START_STRENGTH_DIVISOR])
        start = _tensors(last_layer, at_start, has_bias)
    # The rest of the head may be random, and the last layer depends on it.
    inside = tuple(f"{module}." for module in names_of(extractor.model, extractor.task_name, ""))
    tensors = {path: to_numpy(values) for path, values in parameters.items() if path.startswith(inside)}
    tensors |= _tensors(last_layer, last, has_bias)
    if (dense := options[name]) is not None:
        tensors |= _tensors(str(dense_layer), dense, dense_has_bias)
    return HeadStart.model_validate({"dense": name, "strength": strength, "loss": least}), tensors, start


def _tensors(layer: str, values: LinearClassifier, has_bias: bool) -> HeadTensors:
    return {f"{layer}.weight": values.weight} | ({f"{layer}.bias": values.bias} if has_bias else {})


# ---- the baseline ------------------------------------------------------------------------------------------------


def best_baseline(
    extractor: FeatureExtractor, train: Features, held_out: Features | None
) -> tuple[FrozenBaseline, LinearClassifier] | None:
    """Fit the best simple classifier on pooled embeddings; None if items have none."""
    if train.mean is None:
        return None
    usual = "ridge regression" if extractor.kind == "regression" else "logistic regression"

    def candidates(
        items: Items, strengths: Sequence[float] = STRENGTHS
    ) -> Iterator[tuple[tuple[str, float], LinearClassifier]]:
        yield from (((usual, strength), classifier) for strength, classifier in fits(items, strengths=strengths))
        if extractor.kind in ("single_label", "tags"):
            yield ("nearest centroid", 0.0), centroids(items)

    selection = None if held_out is None else _pooled(held_out)
    spaces = {
        name: (
            extractor.items(features, train),
            None if selection is None or held_out is None else extractor.items(selection[name], held_out),
        )
        for name, features in _pooled(train).items()
        if name != "pair"  # twice as wide as the others
        or solver_bytes(extractor.kind, len(features), extractor.num_outputs, features.shape[1]) <= MOST_SOLVER_BYTES
    }
    pooling, least, (kind, _), classifier = select_features(spaces, candidates, error_rate)
    return FrozenBaseline.model_validate({"pooling": pooling, "kind": kind, "loss": least}), classifier


def _pooled(features: Features) -> dict[Pooling, np.ndarray]:
    embeddings: dict[Pooling, np.ndarray] = {} if features.mean is None else {"mean": features.mean}
    position = features.last if features.dense is None else features.dense
    if position is not None:
        embeddings["head"] = position / np.maximum(np.linalg.norm(position, axis=1, keepdims=True), 1e-12)
    if features.pair is not None:
        embeddings["pair"] = features.pair
    return embeddings


def predict(
    extractor: FeatureExtractor, rows: EncodedRows, baseline: FrozenBaseline, classifier: LinearClassifier
) -> list[tuple[int, np.ndarray]]:
    """Return each row's index with the baseline's outputs, [items, outputs]."""
    layers = (
        None if baseline.pooling != "head" else head_layers(extractor.model, extractor.task_name, extractor.num_outputs)
    )

    def run(size: int) -> list[tuple[int, np.ndarray]]:
        answers: list[tuple[int, np.ndarray]] = []
        for part in extractor.batches(rows, layers, size, with_pairs=baseline.pooling == "pair"):
            if not len(part.rows):  # no word of these rows has a token
                continue
            numbers, begins = np.unique(part.rows, return_index=True)
            order = np.argsort(begins)
            outputs = np.split(classifier(_pooled(part)[baseline.pooling]), np.sort(begins)[1:])
            answers += zip(numbers[order].tolist(), outputs, strict=True)
        return answers

    return extractor.within_memory(run)
