"""Linear classifiers on the untouched model: the start of a new head, and a rival that trains nothing.

A new head that starts at random drags the body away in the first steps (Kumar et al. 2022, arXiv 2202.10054). So its
last layer starts as the linear classifier that scikit-learn finds on what the untouched model gives it, and a dense
layer before it, such as a pooler's, is kept or replaced by whichever gives the better classifier on held-out rows. The
model stays the plain class: only values of its head are set. Test rows are never looked at.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.files import replacing
from fulltune.methods.head import names_of
from fulltune.models.sharding import changed_for_all, free, like, runs_together
from fulltune.probe.features import Extractor, Features, sampled, separators
from fulltune.probe.layers import HeadLayers, after_dense, dense_options, head_layers, numbers
from fulltune.probe.linear import STRENGTHS, Items, Linear, NoProbe, best_space, centroids, fits, loss, wrong
from fulltune.records.probe import (
    LEAST_HELD_OUT,
    MOST_HELD_OUT,
    MOST_SOLVER_BYTES,
    PAIRS,
    FrozenRival,
    HeadStart,
    Pooling,
    Probe,
    solver_bytes,
)
from fulltune.system.memory import is_out_of_memory

__all__ = ["SEED", "Extractor", "fitted", "predicted", "put_head", "rival_of", "separators"]
FOLDER, RECORD = "probe", "probe.json"
HEAD, START, FROZEN = "head.safetensors", "start.safetensors", "frozen.safetensors"
SEED = 0
"""Of what the checkpoint lacks while rows are looked at: any trial of a comparison may be the one that fits."""
AS_GOOD = 0.02
"""Of the loss on held-out rows: the most regularised probe that is as good as the best but for this share is taken."""
EASED = 8.0
"""The start is fitted at the strength that held-out rows prefer over this: a head that fits the train rows as well as
it can leaves no gradient to the body (docs/concepts/statistics.md)."""
_USUAL_HIDDEN_SIZE = 1_024


# ---- in the run folder -------------------------------------------------------------------------------------------


def fitted(
    folder: Path,
    extract: Callable[[], Extractor],
    rows: Any,
    eval_rows: Any,
    with_head: bool = True,
    together: bool = False,
) -> Probe:
    """The probe of a run folder; it is fitted when it is not there, while others wait for it.

    Args:
        folder: The run folder.
        extract: Gives what runs rows through the model, when that is needed.
        rows: The prepared train rows.
        eval_rows: The eval rows, which choose strength and features.
        with_head: Whether the head is new; of a kept one the rival alone is fitted.
        together: Processes shard the model's weights, so that all of them run it, and fit alike.
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


def _fit(place: Path | None, extract: Callable[[], Extractor], rows: Any, eval_rows: Any, with_head: bool) -> None:
    """Fit it and write it there; None: another process writes it."""
    started = time.monotonic()
    probe, head, start, rival = fit(extract(), rows, eval_rows, with_head)
    if place is None:
        return
    _save(place / HEAD, head)
    _save(place / START, start)
    _save(place / FROZEN, {"weight": rival.weight, "bias": rival.bias} if rival else {})
    seconds = round(time.monotonic() - started, 3)
    probe.model_copy(update={"seconds": seconds}).save(place / RECORD)


def _save(path: Path, arrays: Values) -> None:
    from safetensors.numpy import save_file

    with replacing(path) as part:
        save_file({name: np.ascontiguousarray(one) for name, one in arrays.items()}, part)


def put_head(model: Any, folder: Path, *, eased: bool = False) -> None:
    """Set the values of a loaded model's head to those of the run folder's probe, before a method is applied; `eased`:
    to those that training starts with."""
    import torch
    from safetensors.torch import load_file

    values = load_file(folder / FOLDER / HEAD)
    if eased:
        values |= load_file(folder / FOLDER / START)
    free(model)
    parameters = {name: model.get_parameter(name) for name in values}
    with torch.no_grad(), changed_for_all(list(parameters.values())):
        for name, parameter in parameters.items():
            parameter.copy_(like(values[name], parameter))


def rival_of(folder: Path) -> Linear:
    """The classifier behind a run folder's `frozen`."""
    from safetensors.numpy import load_file

    found = load_file(folder / FOLDER / FROZEN)
    return Linear(found["weight"], found["bias"])


# ---- fitted ------------------------------------------------------------------------------------------------------


Values = dict[str, np.ndarray]
"""Of parameters, by their names in the model."""


def fit(
    extractor: Extractor, rows: Any, eval_rows: Any, with_head: bool = True
) -> tuple[Probe, Values, Values, Linear | None]:
    """Fit the probe: see `fitted`.

    Returns:
        What was found; the values of the whole head, its layers as the best classifier; those of its last layer, as
        training starts with it (empty: the same); the rival.
    """
    layers, failure = None, None
    try:
        layers = head_layers(extractor.model, extractor.task_name, extractor.num_outputs)
    except NoProbe as no:
        failure = str(no)
    if layers is None and extractor.kind == "span":  # a token has no mean
        return Probe(head=None, frozen=None, failure=failure), {}, {}, None
    width = round(_width(extractor.model, layers) * (PAIRS if extractor.separators else 1))
    chosen = sampled(rows, extractor.kind, extractor.target.num_choices, width)
    by_eval = len(eval_rows) >= LEAST_HELD_OUT
    try:
        try:
            train = extractor.features(chosen, layers)
        except NoProbe as no:
            if layers is None or extractor.kind == "span":
                raise
            layers, failure = None, str(no)  # means may still be seen
            train = extractor.features(chosen, layers)
        held_out = None
        if by_eval:
            sample = sampled(eval_rows, extractor.kind, extractor.target.num_choices, width, MOST_HELD_OUT)
            held_out = extractor.features(sample, layers)
        with _no_probe_without_memory(extractor.model):
            rival = best_rival(extractor, train, held_out)
    except NoProbe as no:
        return Probe(head=None, frozen=None, failure=str(no)), {}, {}, None
    head, values, start = None, Values(), Values()
    if layers is not None and with_head:
        try:
            with _no_probe_without_memory(extractor.model):
                head, values, start = _head(extractor, layers, train, held_out)
        except NoProbe as no:
            failure = str(no)
    found = Probe(
        head=head,
        frozen=rival[0] if rival else None,
        failure=failure,
        train_rows=len(chosen),
        available_rows=len(rows),
        held_out="eval rows" if by_eval else "cross-validation",
    )
    return found, values, start, rival[1] if rival else None


def _width(model: Any, layers: HeadLayers | None) -> int:
    """Values of what is kept of an item."""
    hidden = getattr(model.config.get_text_config(), "hidden_size", None) or 0
    read = 0 if layers is None else model.get_submodule(layers[0]).in_features
    return max(hidden, read) or _USUAL_HIDDEN_SIZE


@contextlib.contextmanager
def _no_probe_without_memory(model: Any) -> Iterator[None]:
    """What scikit-learn cannot fit in this memory is not fitted; the training itself may well fit. Of processes that
    shard the model none goes on alone."""
    try:
        yield
    except Exception as error:
        if runs_together(model) or not is_out_of_memory(error):
            raise
        raise NoProbe("memory ran out while it was fitted") from error


def _head(
    extractor: Extractor, layers: HeadLayers, train: Features, held_out: Features | None
) -> tuple[HeadStart, Values, Values]:
    """The best classifier as the head's layers, their values, and those of the last one at the start."""
    parameters = dict(extractor.model.named_parameters())
    last_layer, dense_layer = layers
    has_bias, dense_has_bias = (f"{layer}.bias" in parameters for layer in layers)
    options: dict[str | None, Linear | None] = {"loaded" if dense_layer else None: None}
    after = None
    if train.dense is not None and train.last is not None:
        after = after_dense(extractor.model, str(dense_layer), train.dense, train.last)
    if train.dense is not None and after is not None:
        options.update(dense_options(train.dense, train.mean, dense_has_bias, after[0]))

    def read(of: Features, dense: Linear | None) -> Items:
        assert of.last is not None, "it was looked at"
        if dense is None or of.dense is None or after is None:
            return extractor.items(of.last, of)
        return extractor.items(after[1](dense(of.dense)), of)

    spaces = {
        name: (read(train, dense), None if held_out is None else read(held_out, dense))
        for name, dense in options.items()
    }
    name, least, strength, last = best_space(spaces, partial(fits, has_bias=has_bias), loss, AS_GOOD)
    start = Values()
    if extractor.kind != "regression":  # a ridge regression leaves enough
        [(_, eased)] = fits(spaces[name][0], has_bias, [strength / EASED])
        start = _tensors(last_layer, eased, has_bias)
    # The rest of the head may have been drawn, and the last layer belongs to it.
    inside = tuple(f"{one}." for one in names_of(extractor.model, extractor.task_name, ""))
    own = {one: values for one, values in parameters.items() if one.startswith(inside)}
    tensors = {one: numbers(values) for one, values in own.items()}
    tensors |= _tensors(last_layer, last, has_bias)
    if (dense := options[name]) is not None:
        tensors |= _tensors(str(dense_layer), dense, dense_has_bias)
    return HeadStart.model_validate({"dense": name, "strength": strength, "loss": least}), tensors, start


def _tensors(layer: str, values: Linear, has_bias: bool) -> Values:
    return {f"{layer}.weight": values.weight} | ({f"{layer}.bias": values.bias} if has_bias else {})


# ---- the rival ---------------------------------------------------------------------------------------------------


def best_rival(extractor: Extractor, train: Features, held_out: Features | None) -> tuple[FrozenRival, Linear] | None:
    """The best simple classifier on pooled embeddings; None where items have none."""
    if train.mean is None:
        return None
    usual = "ridge regression" if extractor.kind == "regression" else "logistic regression"

    def candidates(items: Items, strengths: Sequence[float] = STRENGTHS) -> Iterator[tuple[tuple[str, float], Linear]]:
        yield from (((usual, strength), one) for strength, one in fits(items, strengths=strengths))
        if extractor.kind in ("single_label", "tags"):
            yield ("nearest centroid", 0.0), centroids(items)

    held = None if held_out is None else _pooled(held_out)
    spaces = {
        name: (
            extractor.items(features, train),
            None if held is None or held_out is None else extractor.items(held[name], held_out),
        )
        for name, features in _pooled(train).items()
        if name != "pair"  # twice as wide as the others
        or solver_bytes(extractor.kind, len(features), extractor.num_outputs, features.shape[1]) <= MOST_SOLVER_BYTES
    }
    pooling, least, (kind, _), classifier = best_space(spaces, candidates, wrong)
    return FrozenRival.model_validate({"pooling": pooling, "kind": kind, "loss": least}), classifier


def _pooled(features: Features) -> dict[Pooling, np.ndarray]:
    """Embeddings of length 1, [items, hidden] each, and how those of a pair's texts differ."""
    found: dict[Pooling, np.ndarray] = {} if features.mean is None else {"mean": features.mean}
    position = features.last if features.dense is None else features.dense
    if position is not None:
        found["head"] = position / np.maximum(np.linalg.norm(position, axis=1, keepdims=True), 1e-12)
    if features.apart is not None:
        found["pair"] = features.apart
    return found


def predicted(extractor: Extractor, rows: Any, rival: FrozenRival, found: Linear) -> list[tuple[int, np.ndarray]]:
    """What the rival gives: for each row its number, and the outputs of its items, [items, outputs]."""
    layers = (
        None if rival.pooling != "head" else head_layers(extractor.model, extractor.task_name, extractor.num_outputs)
    )

    def run(size: int) -> list[tuple[int, np.ndarray]]:
        answers: list[tuple[int, np.ndarray]] = []
        for part in extractor.passes(rows, layers, size, apart=rival.pooling == "pair"):
            if not len(part.rows):  # no word of these rows has a token
                continue
            numbers, begins = np.unique(part.rows, return_index=True)
            order = np.argsort(begins)
            outputs = np.split(found(_pooled(part)[rival.pooling]), np.sort(begins)[1:])
            answers += zip(numbers[order].tolist(), outputs, strict=True)
        return answers

    return extractor.within_memory(run)
