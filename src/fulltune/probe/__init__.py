"""Linear classifiers on the untouched model: the start of a new head, and a rival that trains nothing.

A new head that starts at random drags the body away in the first steps (Kumar et al. 2022, arXiv 2202.10054). So its
last layer starts as the linear classifier that scikit-learn finds on what the untouched model gives it, and a dense
layer before it, such as a pooler's, is kept or replaced by whichever gives the better classifier on held-out rows. The
model stays the plain class: only values of its head are set. Test rows are never looked at.

The result lies in the run folder, so that all attempts of a run, all trials of a comparison and the baselines share it.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fulltune.files import replacing
from fulltune.inference.run import Watch
from fulltune.methods.head import names_of
from fulltune.models.checkpoint_head import put_together
from fulltune.probe.dense import DenseLayer
from fulltune.probe.features import Features, joined, passes, sampled
from fulltune.probe.layers import HeadLayers, NoProbe, after_dense
from fulltune.probe.linear import STRENGTHS, Items, Linear, best_space, centroids, fits, loss, wrong
from fulltune.recipe.tasks import ProblemType, TaskName
from fulltune.records.probe import LEAST_HELD_OUT, MOST_HELD_OUT, FrozenRival, HeadStart, Pooling, Probe
from fulltune.system.out_of_memory import with_smaller_batches
from fulltune.tasks import Target, Task, task_named

FOLDER, RECORD = "probe", "probe.json"
HEAD, START, FROZEN = "head.safetensors", "start.safetensors", "frozen.safetensors"
SEED = 0
"""Of what the checkpoint lacks while rows are looked at: any trial of a comparison may be the one that fits."""
AS_GOOD = 0.02
"""Of the loss on held-out rows: the most regularised probe that is as good as the best but for this share is taken."""
EASED = 8.0
"""The start is fitted at the strength that held-out rows prefer over this: a head that fits the train rows as well as
it can leaves no gradient to the body (docs/quality.md)."""
_VALUES_AT_A_TIME, _USUAL_HIDDEN_SIZE = 4_096, 1_024
_TRIED = 16


@dataclass(frozen=True)
class Looker:
    """How rows go through the untouched model."""

    model: Any
    """As it was loaded, on its device, before a method was applied."""
    task_name: TaskName
    target: Target
    pad_token_id: int
    batch_size: int
    precision: str
    class_weights: Sequence[float] | None = None
    watch: Watch = lambda done, total, share: None

    @property
    def task(self) -> Task:
        return task_named(self.task_name)

    @property
    def kind(self) -> ProblemType:
        return self.target.problem_type

    @property
    def num_outputs(self) -> int:
        """Logits of an item."""
        return {"choice": 1, "regression": 1, "span": 2}.get(self.kind, len(self.target.labels))

    def passes(self, rows: Any, layers: HeadLayers | None, batch_size: int) -> Iterator[Features]:
        """The features of each batch."""
        return passes(
            self.model,
            layers,
            rows,
            self.task,
            self.kind,
            self.pad_token_id,
            batch_size=batch_size,
            precision=self.precision,
            watch=self.watch,
        )

    def features(self, rows: Any, layers: HeadLayers | None) -> Features:
        """Of all these rows, in smaller batches when memory runs out."""
        return with_smaller_batches(
            "linear probe", self.batch_size, lambda size: joined(self.passes(rows, layers, size))
        )

    def items(self, features: np.ndarray, of: Features) -> Items:
        """What a classifier is fitted on."""
        return Items(self.kind, features, of.labels, of.rows, self.num_outputs, self.class_weights)


def fitted(folder: Path, look: Callable[[], Looker], rows: Any, eval_rows: Any) -> Probe:
    """The probe of a run folder; it is fitted when it is not there, while others wait for it.

    Args:
        folder: The run folder.
        look: Gives what looks at rows, when that is needed.
        rows: The prepared train rows.
        eval_rows: The eval rows, which choose strength and features.
    """
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    with (place / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / RECORD).exists():
            started = time.monotonic()
            found = fit(look(), rows, eval_rows)
            _save(place / HEAD, found.head)
            _save(place / START, found.start)
            _save(place / FROZEN, {"weight": found.rival.weight, "bias": found.rival.bias} if found.rival else {})
            seconds = round(time.monotonic() - started, 3)
            found.probe.model_copy(update={"seconds": seconds}).save(place / RECORD)
    return Probe.load(place / RECORD)


@dataclass(frozen=True)
class Fitted:
    """What was found, and its values by their names in the model."""

    probe: Probe
    head: dict[str, np.ndarray] = field(default_factory=dict)
    """Of the whole head, its layers as the best classifier."""
    start: dict[str, np.ndarray] = field(default_factory=dict)
    """Of its last layer, as training starts with it; empty: the same."""
    rival: Linear | None = None


def fit(looker: Looker, rows: Any, eval_rows: Any) -> Fitted:
    """Fit the probe, the head's start and the rival."""
    layers, why_not = None, ""
    try:
        layers = HeadLayers.of(looker.model, looker.task_name, looker.num_outputs)
    except NoProbe as no:
        why_not = str(no)
    if layers is None and looker.kind == "span":  # a token has no mean
        return Fitted(Probe(head=None, frozen=None, why_not=why_not))
    hidden_size = getattr(looker.model.config.get_text_config(), "hidden_size", None) or _USUAL_HIDDEN_SIZE
    chosen = sampled(rows, looker.kind, looker.target.num_choices, hidden_size)
    held = sampled(eval_rows, looker.kind, looker.target.num_choices, hidden_size, MOST_HELD_OUT)
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
        rival = _rival(looker, train, held_out)
        head, values, start = (None, {}, {}) if layers is None else _head(looker, layers, chosen, train, held_out)
    except NoProbe as no:
        return Fitted(Probe(head=None, frozen=None, why_not=str(no)))
    found = Probe(
        head=head,
        frozen=rival[0] if rival else None,
        why_not=why_not,
        train_rows=len(chosen),
        of_rows=len(rows),
        held_out="eval rows" if by_eval else "cross-validation",
    )
    return Fitted(found, values, start, rival[1] if rival else None)


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
    tensors = {one: values.detach().float().cpu().numpy() for one, values in own.items()}
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
    values = train.dense[:_TRIED] @ weight.detach().float().cpu().numpy().T
    try:
        found = after(values if bias is None else values + bias.detach().float().cpu().numpy())
    except NoProbe:
        return False
    wanted = train.last[:_TRIED]
    return bool(np.abs(found - wanted).max() <= 0.05 * np.abs(wanted).max())  # bf16 has three digits


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


def _rival(looker: Looker, train: Features, held_out: Features | None) -> tuple[FrozenRival, Linear] | None:
    """The best simple classifier on pooled embeddings; None where items have none."""
    if train.mean is None:
        return None
    usual = "ridge regression" if looker.kind == "regression" else "logistic regression"

    def candidates(items: Items, strengths: Sequence[float] = STRENGTHS) -> Iterator[tuple[tuple[str, float], Linear]]:
        yield from (((usual, strength), one) for strength, one in fits(items, strengths=strengths))
        if looker.kind in ("single_label", "tags"):
            yield ("nearest centroid", 0.0), centroids(items)

    held = None if held_out is None else _pooled(held_out)
    spaces = {
        name: (
            looker.items(features, train),
            None if held is None or held_out is None else looker.items(held[name], held_out),
        )
        for name, features in _pooled(train).items()
    }
    pooling, least, (kind, _), classifier = best_space(spaces, candidates, wrong)
    return FrozenRival.model_validate({"pooling": pooling, "kind": kind, "loss": least}), classifier


def _pooled(features: Features) -> dict[Pooling, np.ndarray]:
    """Embeddings of length 1, [items, hidden] each."""
    found: dict[Pooling, np.ndarray] = {} if features.mean is None else {"mean": features.mean}
    position = features.last if features.dense is None else features.dense
    if position is not None:
        found["head"] = position / np.maximum(np.linalg.norm(position, axis=1, keepdims=True), 1e-12)
    return found


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    with replacing(path) as part:
        save_file({name: np.ascontiguousarray(one) for name, one in arrays.items()}, part)


def put_head(model: Any, folder: Path, *, eased: bool = False) -> None:
    """Set the values of a loaded model's head to those of the run folder's probe; no method is applied yet.

    Args:
        model: As it was loaded.
        folder: The run folder.
        eased: For training to start with.
    """
    import torch
    from safetensors.torch import load_file

    values = load_file(folder / FOLDER / HEAD)
    if eased:
        values |= load_file(folder / FOLDER / START)
    parameters = {name: model.get_parameter(name) for name in values}
    with torch.no_grad(), put_together(list(parameters.values())):
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def rival_of(folder: Path) -> Linear:
    """The classifier behind a run folder's `frozen`."""
    from safetensors.numpy import load_file

    found = load_file(folder / FOLDER / FROZEN)
    return Linear(found["weight"], found["bias"])


def predicted(looker: Looker, rows: Any, rival: FrozenRival, found: Linear) -> list[tuple[int, np.ndarray]]:
    """What the rival gives: for each row its number, and the outputs of its items, [items, outputs]."""
    layers = None if rival.pooling == "mean" else HeadLayers.of(looker.model, looker.task_name, looker.num_outputs)

    def run(size: int) -> list[tuple[int, np.ndarray]]:
        answers: list[tuple[int, np.ndarray]] = []
        for part in looker.passes(rows, layers, size):
            if not len(part.rows):  # no word of these rows has a token
                continue
            numbers, begins = np.unique(part.rows, return_index=True)
            order = np.argsort(begins)
            outputs = np.split(found(_pooled(part)[rival.pooling]), np.sort(begins)[1:])
            answers += zip(numbers[order].tolist(), outputs, strict=True)
        return answers

    return with_smaller_batches("linear probe", looker.batch_size, run)
