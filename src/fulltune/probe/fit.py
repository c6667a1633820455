"""Fit the probe of a new head, and the rival that trains nothing, on the same features."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from fulltune.methods.head import names_of
from fulltune.models.sharding import runs_together, whole
from fulltune.probe import rivals
from fulltune.probe.dense import DenseLayer
from fulltune.probe.features import Features, sampled
from fulltune.probe.layers import HeadLayers, NoProbe, after_dense
from fulltune.probe.linear import Items, Linear, best_space, fits, loss
from fulltune.probe.looker import Looker
from fulltune.records.probe import LEAST_HELD_OUT, MOST_HELD_OUT, PAIRS, HeadStart, Probe
from fulltune.system.out_of_memory import is_out_of_memory

AS_GOOD = 0.02
"""Of the loss on held-out rows: the most regularised probe that is as good as the best but for this share is taken."""
EASED = 8.0
"""The start is fitted at the strength that held-out rows prefer over this: a head that fits the train rows as well as
it can leaves no gradient to the body (docs/quality.md)."""
_VALUES_AT_A_TIME, _USUAL_HIDDEN_SIZE = 4_096, 1_024
_TRIED = 16


@dataclass(frozen=True)
class Fitted:
    """What was found, and its values by their names in the model."""

    probe: Probe
    head: dict[str, np.ndarray] = field(default_factory=dict)
    """Of the whole head, its layers as the best classifier."""
    start: dict[str, np.ndarray] = field(default_factory=dict)
    """Of its last layer, as training starts with it; empty: the same."""
    rival: Linear | None = None


def fit(looker: Looker, rows: Any, eval_rows: Any, with_head: bool = True) -> Fitted:
    """Fit the probe, the head's start and the rival.

    Args:
        looker: Looks at rows.
        rows: Prepared train rows.
        eval_rows: Prepared eval rows.
        with_head: Whether the head is new; a kept one shows what it reads, and the rival alone is fitted.
    """
    layers, why_not = None, ""
    try:
        layers = HeadLayers.of(looker.model, looker.task_name, looker.num_outputs)
    except NoProbe as no:
        why_not = str(no)
    if layers is None and looker.kind == "span":  # a token has no mean
        return Fitted(Probe(head=None, frozen=None, why_not=why_not))
    width = round(_width(looker.model, layers) * (PAIRS if looker.separators else 1))
    chosen = sampled(rows, looker.kind, looker.target.num_choices, width)
    held = sampled(eval_rows, looker.kind, looker.target.num_choices, width, MOST_HELD_OUT)
    by_eval = len(eval_rows) >= LEAST_HELD_OUT
    try:
        try:
            train = looker.features(chosen, layers)
        except NoProbe as no:
            if layers is None or looker.kind == "span":
                raise
            layers, why_not = None, str(no)  # means may still be seen
            train = looker.features(chosen, layers)
        held_out = looker.features(held, layers) if by_eval else None
        with _no_probe_without_memory(looker.model):
            rival = rivals.best_rival(looker, train, held_out)
    except NoProbe as no:
        return Fitted(Probe(head=None, frozen=None, why_not=str(no)))
    head, values, start = None, dict[str, np.ndarray](), dict[str, np.ndarray]()
    if layers is not None and with_head:
        try:
            with _no_probe_without_memory(looker.model):
                head, values, start = _head(looker, layers, chosen, train, held_out)
        except NoProbe as no:
            why_not = str(no)
    found = Probe(
        head=head,
        frozen=rival[0] if rival else None,
        why_not=why_not,
        train_rows=len(chosen),
        of_rows=len(rows),
        held_out="eval rows" if by_eval else "cross-validation",
    )
    return Fitted(found, values, start, rival[1] if rival else None)


def _width(model: Any, layers: HeadLayers | None) -> int:
    """Values of what is kept of an item."""
    hidden = getattr(model.config.get_text_config(), "hidden_size", None) or 0
    read = 0 if layers is None else model.get_submodule(layers.last).in_features
    return max(hidden, read) or _USUAL_HIDDEN_SIZE


@contextlib.contextmanager
def _no_probe_without_memory(model: Any) -> Iterator[None]:
    """What scikit-learn cannot fit in this memory is not fitted; the training itself may well fit. Of processes that
    share out the model none goes on alone."""
    try:
        yield
    except Exception as error:
        if runs_together(model) or not is_out_of_memory(error):
            raise
        raise NoProbe("memory ran out while it was fitted") from error


def _head(
    looker: Looker, layers: HeadLayers, rows: Any, train: Features, held_out: Features | None
) -> tuple[HeadStart, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The best classifier as the head's layers, their values, and those of the last one at the start."""
    parameters = dict(looker.model.named_parameters())
    has_bias = f"{layers.last}.bias" in parameters
    options: dict[str | None, Linear | None] = {"kept" if layers.dense else None: None}
    after = _after(looker, layers, rows)
    if train.dense is not None and _follows(parameters, layers, train, after):
        layer = DenseLayer(f"{layers.dense}.bias" in parameters, after)
        options.update(layer.options(train.dense, train.mean))

    def read(of: Features, dense: Linear | None) -> Items:
        assert of.last is not None, "it was looked at"
        return looker.items(of.last if dense is None or of.dense is None else after(dense(of.dense)), of)

    spaces = {
        name: (read(train, dense), None if held_out is None else read(held_out, dense))
        for name, dense in options.items()
    }
    name, least, strength, last = best_space(spaces, partial(fits, has_bias=has_bias), loss, AS_GOOD)
    start: dict[str, np.ndarray] = {}
    if looker.kind != "regression":  # a ridge regression leaves enough
        [(_, eased)] = fits(spaces[name][0], has_bias, [strength / EASED])
        start = _tensors(layers.last, eased, has_bias)
    # The rest of the head may have been drawn, and the last layer belongs to it.
    inside = tuple(f"{one}." for one in names_of(looker.model, looker.task_name, ""))
    own = {one: values for one, values in parameters.items() if one.startswith(inside)}
    tensors = {one: _numbers(values) for one, values in own.items()}
    tensors |= _tensors(layers.last, last, has_bias)
    if (dense := options[name]) is not None:
        tensors |= _tensors(str(layers.dense), dense, f"{layers.dense}.bias" in parameters)
    return HeadStart.model_validate({"dense": name, "strength": strength, "loss": least}), tensors, start


def _follows(
    parameters: Mapping[str, Any], layers: HeadLayers, train: Features, after: Callable[[np.ndarray], np.ndarray]
) -> bool:
    """Whether what the last layer reads follows from what the dense one gives, by some items: a pooler may be there and
    not be read, or not alone."""
    assert train.last is not None, "it was looked at"
    assert train.dense is not None, "asked before"
    weight, bias = (parameters.get(f"{layers.dense}.{part}") for part in ("weight", "bias"))
    assert weight is not None, "it is linear"
    values = train.dense[:_TRIED] @ _numbers(weight).T
    try:
        found = after(values if bias is None else values + _numbers(bias))
    except NoProbe:
        return False
    wanted = train.last[:_TRIED]
    return bool(np.abs(found - wanted).max() <= 0.05 * np.abs(wanted).max())  # bf16 has three digits


def _numbers(parameter: Any) -> np.ndarray:
    """float32, copied: numpy would keep FSDP2 from freeing what it has put together."""
    return np.asarray(whole(parameter.detach()).float().cpu().clone().numpy())


def _after(looker: Looker, layers: HeadLayers, rows: Any) -> Callable[[np.ndarray], np.ndarray]:
    """What the last layer reads when the dense one gives these values, some at a time."""
    batch = looker.task.collate([rows[0]], looker.pad_token_id)
    batch = {name: one.to(looker.model.device) for name, one in batch.items() if name != "labels"}

    def after(values: np.ndarray) -> np.ndarray:
        parts = range(0, len(values), _VALUES_AT_A_TIME)
        run = partial(after_dense, looker.model, layers, batch, precision=looker.precision)
        return np.concatenate([run(values[start : start + _VALUES_AT_A_TIME]) for start in parts])

    return after


def _tensors(layer: str, values: Linear, has_bias: bool) -> dict[str, np.ndarray]:
    return {f"{layer}.weight": values.weight} | ({f"{layer}.bias": values.bias} if has_bias else {})
