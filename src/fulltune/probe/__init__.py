"""Fit linear classifiers on the pretrained model's features, to initialise a new head and to serve as a baseline.

A random head distorts the body in the first steps (Kumar et al. 2022, arXiv 2202.10054). Test rows are never used.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.files import replace_atomically
from fulltune.methods.head import head_paths
from fulltune.models.sharding import free_gathered_weights, gathered_to_modify, needs_all_ranks, shard_like
from fulltune.probe.features import EncodedRows, FeatureExtractor, Features, sample_rows
from fulltune.probe.layers import HeadLayers, dense_replacements, find_head_layers, recognise_activation, to_numpy
from fulltune.probe.linear import (
    Items,
    LinearClassifier,
    NoProbe,
    error_rate,
    fit_at_strengths,
    mean_loss,
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

FOLDER, RECORD = "probe", "probe.json"
HEAD, START, FROZEN = "head.safetensors", "start.safetensors", "frozen.safetensors"
SEED = 0
"""Seed for weights that the checkpoint lacks, the same for all trials."""
LOSS_TOLERANCE = 0.02
"""Relative increase of the held-out loss that is accepted for a more regularised probe."""
START_STRENGTH_DIVISOR = 8.0
"""Divisor of the best strength for training's start, because a head that already fits leaves no gradient."""
_USUAL_HIDDEN_SIZE = 1_024


# ---- in the run folder -------------------------------------------------------------------------------------------


def load_or_fit_probe(
    folder: Path,
    extract: Callable[[], FeatureExtractor],
    rows: EncodedRows,
    eval_rows: EncodedRows,
    with_head: bool = True,
    on_all_ranks: bool = False,
) -> Probe:
    """Load a run folder's linear probe (classifiers on the model's features), or fit and save it while other processes
    wait.

    `extract` creates the feature extractor for a fit. Unless `with_head`, only the baseline is fitted. `on_all_ranks`
    is True if the weights are sharded, so that all processes must run the model.
    """
    probe_folder = folder / FOLDER
    probe_folder.mkdir(parents=True, exist_ok=True)
    if on_all_ranks:
        import torch.distributed as others

        is_first, missing = others.get_rank() == 0, [not (probe_folder / RECORD).exists()]
        others.broadcast_object_list(missing)  # rank 0 may have saved it before another rank looks
        if missing[0]:
            _fit_and_save(probe_folder if is_first else None, extract, rows, eval_rows, with_head)
        others.barrier()
        return Probe.load(probe_folder / RECORD)
    with (probe_folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (probe_folder / RECORD).exists():
            _fit_and_save(probe_folder, extract, rows, eval_rows, with_head)
    return Probe.load(probe_folder / RECORD)


def _fit_and_save(
    folder: Path | None,
    extract: Callable[[], FeatureExtractor],
    rows: EncodedRows,
    eval_rows: EncodedRows,
    with_head: bool,
) -> None:
    """Fit the probe, and save it unless `folder` is None because another rank saves it."""
    started = time.monotonic()
    probe, head, start, baseline = fit_probe(extract(), rows, eval_rows, with_head)
    if folder is None:
        return
    _save_tensors(folder / HEAD, head)
    _save_tensors(folder / START, start)
    _save_tensors(folder / FROZEN, {"weight": baseline.weight, "bias": baseline.bias} if baseline else {})
    seconds = round(time.monotonic() - started, 3)
    probe.model_copy(update={"seconds": seconds}).save(folder / RECORD)


def _save_tensors(path: Path, arrays: HeadTensors) -> None:
    from safetensors.numpy import save_file

    with replace_atomically(path) as part:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, part)


def initialise_head_from_probe(model: PreTrainedModel, folder: Path, *, for_training: bool = False) -> None:
    """Copy a run folder's probe into a loaded model's head. With `for_training`, copy a more regularised version."""
    import torch
    from safetensors.torch import load_file

    values = load_file(folder / FOLDER / HEAD)
    if for_training:
        values |= load_file(folder / FOLDER / START)
    free_gathered_weights(model)
    parameters = {name: model.get_parameter(name) for name in values}
    with torch.no_grad(), gathered_to_modify(list(parameters.values())):
        for name, parameter in parameters.items():
            parameter.copy_(shard_like(values[name], parameter))


def load_baseline_classifier(folder: Path) -> LinearClassifier:
    """Load the linear classifier that serves as a run's baseline."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / FOLDER / FROZEN)
    return LinearClassifier(tensors["weight"], tensors["bias"])


# ---- fitting -----------------------------------------------------------------------------------------------------


HeadTensors = dict[str, np.ndarray]


def fit_probe(
    extractor: FeatureExtractor, rows: EncodedRows, eval_rows: EncodedRows, with_head: bool = True
) -> tuple[Probe, HeadTensors, HeadTensors, LinearClassifier | None]:
    """Fit the head and the baseline on features of `rows`, and select the best fits on `eval_rows` or by
    cross-validation.

    Returns:
        The record, the head's weights, the last layer's weights for the start of training (if they differ), and the
        baseline's classifier (or None).
    """
    layers, failure = None, None
    try:
        layers = find_head_layers(extractor.model, extractor.task_name, extractor.num_outputs)
    except NoProbe as error:
        failure = str(error)
    if layers is None and extractor.kind == "span":  # single tokens have no mean
        return Probe(head=None, baseline=None, failure=failure), {}, {}, None
    hidden = getattr(extractor.model.config.get_text_config(), "hidden_size", None) or 0
    last_layer: Any = None if layers is None else extractor.model.get_submodule(layers[0])
    width = max(hidden, 0 if last_layer is None else last_layer.in_features) or _USUAL_HIDDEN_SIZE
    width = round(width * (PAIRS if extractor.pair_separators and not extractor.task.FACTS.reads_texts_apart else 1))
    train_rows = sample_rows(rows, extractor.kind, extractor.target.num_choices, width)
    try:
        try:
            train = extractor.features(train_rows, layers)
        except NoProbe as error:
            if layers is None or extractor.kind == "span":
                raise
            layers, failure = None, str(error)  # means can still be extracted
            train = extractor.features(train_rows, layers)
        held_out = None
        if len(eval_rows) >= LEAST_HELD_OUT:
            sample = sample_rows(eval_rows, extractor.kind, extractor.target.num_choices, width, MOST_HELD_OUT)
            held_out = extractor.features(sample, layers)
        with _out_of_memory_as_no_probe(extractor.model):
            baseline = fit_best_baseline(extractor, train, held_out)
    except NoProbe as error:
        return Probe(head=None, baseline=None, failure=str(error)), {}, {}, None
    head, values, start = None, HeadTensors(), HeadTensors()
    if layers is not None and with_head:
        try:
            with _out_of_memory_as_no_probe(extractor.model):
                head, values, start = _fit_head(extractor, layers, train, held_out)
        except NoProbe as error:
            failure = str(error)
    record = Probe(
        head=head,
        baseline=baseline[0] if baseline else None,
        failure=failure,
        train_rows=len(train_rows),
        available_rows=len(rows),
    )
    return record, values, start, baseline[1] if baseline else None


@contextlib.contextmanager
def _out_of_memory_as_no_probe(model: PreTrainedModel) -> Iterator[None]:
    """Raise `NoProbe` in the block instead of out-of-memory errors, unless all processes must fail together."""
    try:
        yield
    except Exception as error:
        if needs_all_ranks(model) or not is_out_of_memory(error):
            raise
        raise NoProbe("memory ran out while fitting the linear probe") from error


def _fit_head(
    extractor: FeatureExtractor, layers: HeadLayers, train: Features, held_out: Features | None
) -> tuple[HeadStart, HeadTensors, HeadTensors]:
    """Fit the head's last linear layer, and replace the dense layer before it if that lowers the loss.

    Returns:
        The record, all weights of the head, and the last layer's weights for the start of training.
    """
    parameters = dict(extractor.model.named_parameters())
    last_layer, dense_layer = layers
    has_bias, dense_has_bias = (f"{layer}.bias" in parameters for layer in layers)
    options: dict[str | None, LinearClassifier | None] = {"loaded" if dense_layer else None: None}
    after = None
    if train.dense is not None and train.last is not None and not extractor.keeps_dense:
        after = recognise_activation(extractor.model, str(dense_layer), train.dense, train.last)
    if train.dense is not None and after is not None:
        options.update(dense_replacements(train.dense, train.mean, dense_has_bias, after[0]))

    def last_inputs(features: Features, dense: LinearClassifier | None) -> Items:
        """Return the last layer's inputs after the dense layer is replaced by `dense`."""
        assert features.last is not None, "extracted with `layers`"
        if dense is None or features.dense is None or after is None:
            return extractor.items(features.last, features, extractor.task.FACTS.reads_texts_apart)
        return extractor.items(after[1](dense(features.dense)), features)

    spaces = {
        name: (last_inputs(train, dense), None if held_out is None else last_inputs(held_out, dense))
        for name, dense in options.items()
    }
    name, least, strength, last = select_features(
        spaces, partial(fit_at_strengths, has_bias=has_bias), mean_loss, LOSS_TOLERANCE
    )
    start = HeadTensors()
    # A ridge regression still leaves a gradient, and pairs read apart may keep their start.
    if extractor.kind != "regression" and not extractor.task.FACTS.reads_texts_apart:
        [(_, at_start)] = fit_at_strengths(spaces[name][0], has_bias, [strength / START_STRENGTH_DIVISOR])
        start = _layer_tensors(last_layer, at_start, has_bias)
    # The rest of the head is saved too: it may be random, and the last layer was fitted on it.
    inside = tuple(f"{module}." for module in head_paths(extractor.model, extractor.task_name, ""))
    tensors = {path: to_numpy(values) for path, values in parameters.items() if path.startswith(inside)}
    tensors |= _layer_tensors(last_layer, last, has_bias)
    if (dense := options[name]) is not None:
        tensors |= _layer_tensors(str(dense_layer), dense, dense_has_bias)
    return HeadStart.model_validate({"dense": name, "loss": least}), tensors, start


def _layer_tensors(layer: str, values: LinearClassifier, has_bias: bool) -> HeadTensors:
    return {f"{layer}.weight": values.weight} | ({f"{layer}.bias": values.bias} if has_bias else {})


# ---- the baseline ------------------------------------------------------------------------------------------------


def fit_best_baseline(
    extractor: FeatureExtractor, train: Features, held_out: Features | None
) -> tuple[FrozenBaseline, LinearClassifier] | None:
    """Fit classifiers on pooled embeddings. Return the record and classifier of the best one on held-out rows, or in
    cross-validation if `held_out` is None. Return None if there are no embeddings."""
    if not _pooled_embeddings(train):
        return None
    selection = None if held_out is None else _pooled_embeddings(held_out)
    spaces = {
        name: (
            extractor.items(features, train, name == "pair"),
            None if selection is None or held_out is None else extractor.items(selection[name], held_out),
        )
        for name, features in _pooled_embeddings(train).items()
        if name != "pair"  # four times as wide as the others
        or solver_bytes(extractor.kind, len(features), extractor.num_outputs, features.shape[1]) <= MOST_SOLVER_BYTES
    }
    pooling, least, _, classifier = select_features(spaces, fit_at_strengths, error_rate)
    kind = "ridge regression" if extractor.kind == "regression" else "logistic regression"
    return FrozenBaseline.model_validate({"pooling": pooling, "kind": kind, "loss": least}), classifier


def _pooled_embeddings(features: Features) -> dict[Pooling, np.ndarray]:
    """Map the available kinds of pooling to their embeddings [items, hidden]."""
    embeddings: dict[Pooling, np.ndarray] = {} if features.mean is None else {"mean": features.mean}
    position = features.last if features.dense is None else features.dense
    if position is not None and features.mean is not None:  # the head of pairs reads the features of pairs
        embeddings["head"] = position / np.maximum(np.linalg.norm(position, axis=1, keepdims=True), 1e-12)
    if features.pair is not None:
        embeddings["pair"] = features.pair
    return embeddings


def predict_baseline(
    extractor: FeatureExtractor, rows: EncodedRows, baseline: FrozenBaseline, classifier: LinearClassifier
) -> list[tuple[int, np.ndarray]]:
    """Return (row index, the classifier's outputs [items, num_outputs]) for each row that has items."""
    layers = (
        None
        if baseline.pooling != "head"
        else find_head_layers(extractor.model, extractor.task_name, extractor.num_outputs)
    )

    def predict_in_batches(size: int) -> list[tuple[int, np.ndarray]]:
        row_outputs: list[tuple[int, np.ndarray]] = []
        for features in extractor.batches(rows, layers, size, with_pairs=baseline.pooling == "pair"):
            if not len(features.rows):  # none of these rows' words has a token
                continue
            numbers, begins = np.unique(features.rows, return_index=True)
            order = np.argsort(begins)
            outputs = np.split(classifier(_pooled_embeddings(features)[baseline.pooling]), np.sort(begins)[1:])
            row_outputs += zip(numbers[order].tolist(), outputs, strict=True)
        return row_outputs

    return extractor.retry_with_smaller_batches(predict_in_batches)
