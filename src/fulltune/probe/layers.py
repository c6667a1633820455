"""The linear layers of a new head: the last one, which gives the logits, and a dense one before it, such as a pooler.

A pooler reads one position, such as the first token. What that position says of the mean over all tokens is linear to
a large part, and found without labels: a classifier on it needs fewer rows (docs/concepts/statistics.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.inference.run import logits_of
from fulltune.methods import head as heads
from fulltune.models.sharding import whole
from fulltune.probe.linear import LEAST_SPREAD, Linear, NoProbe, standard
from fulltune.recipe.tasks import TaskName

if TYPE_CHECKING:
    import torch

ACTIVATIONS = {"tanh": 0.0, "relu": 3.0, "gelu": 3.0, "gelu_new": 3.0, "silu": 3.0, "linear": 0.0}
"""What transformers puts between a head's dense layer and its last one, by the names of its `ACT2FN`, and around which
value it is nearly linear."""
SPREAD = 0.4
"""Of the values that a replaced dense layer gives, so that the activation after it is nearly linear."""
_RIDGE = tuple(10.0**power for power in range(-2, 6))
_COMPARED = 16
"""Items on which an activation is recognised."""


HeadLayers = tuple[str, str | None]
"""Names of a head's linear layers: the last one, which gives the logits, and the one dense layer that gives as many
features as it reads; None: there is none, or more than one."""


def head_layers(model: Any, task: TaskName, num_outputs: int) -> HeadLayers:
    """The layers of a loaded model whose items have `num_outputs` logits.

    Raises:
        NoProbe: When it has no such layers.
    """
    from torch.nn import Linear

    body_of(model)
    linears = {
        f"{name}.{inner}" if inner else name: module
        for name in heads.names_of(model, task, "")
        for inner, module in model.get_submodule(name).named_modules()
        if isinstance(module, Linear)
    }
    last = [name for name, module in linears.items() if module.out_features == num_outputs]
    if not last:
        raise NoProbe(f"the head of {type(model).__name__} does not end in a linear layer")
    width = linears[last[-1]].in_features
    square = [
        name
        for name, module in linears.items()
        if name != last[-1] and module.in_features == module.out_features == width
    ]
    return last[-1], square[0] if len(square) == 1 else None


def body_of(model: Any) -> Any:
    """The model without its head.

    Raises:
        NoProbe: When the model does not tell them apart.
    """
    body = getattr(model, model.base_model_prefix, None)
    if body is None:
        raise NoProbe(f"{type(model).__name__} does not tell its body from its head")
    return body


Seen = tuple["torch.Tensor", "torch.Tensor | None", "torch.Tensor | None"]
"""Float32 [..., hidden]: the body's last hidden states; what the last layer reads for each vector of logits, None where
it was not looked at; and what the dense layer reads in the same places."""


def see(model: Any, layers: HeadLayers | None, batch: Mapping[str, torch.Tensor]) -> Seen:
    """Run a batch without labels, and keep the hidden states and what the head's layers read.

    Raises:
        NoProbe: When the logits are not those of the last layer, or the body is not to be seen.
    """
    import torch

    modules = {"body": body_of(model)}
    if layers is not None:
        names = zip(("last", "dense"), layers, strict=True)
        modules |= {key: model.get_submodule(name) for key, name in names if name is not None}
    read: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    given: list[torch.Tensor] = []

    def keep(name: str, module: Any, inputs: Any, output: Any) -> None:
        read[name].append((output[0] if name == "body" else inputs[0]).float())
        if name == "last":
            given.append(output.float())

    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in modules.items()]
    try:
        outputs = model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    if len(read["body"]) != 1:
        raise NoProbe(f"{type(model).__name__} does not run its body once")
    [hidden] = read["body"]
    if layers is None:
        return hidden, None, None
    logits = logits_of(outputs).float()
    pick = _last_token if len(given) == 1 and given[0].numel() != logits.numel() else None
    shown = [one if pick is None else pick(model, batch, one) for one in given]
    is_all = len(shown) == 1 and shown[0].numel() == logits.numel()
    if not is_all or not torch.allclose(shown[0].flatten(), logits.flatten(), rtol=0, atol=0, equal_nan=True):
        raise NoProbe(f"the logits of {type(model).__name__} are not just those of its last layer")
    [last], dense = read["last"], read.get("dense", [])
    along = dense[0] if len(dense) == 1 and dense[0].shape[:-1] == last.shape[:-1] else None
    if pick is not None:
        last, along = pick(model, batch, last), None if along is None else pick(model, batch, along)
    return hidden, last, along


def _last_token(model: Any, batch: Mapping[str, torch.Tensor], states: torch.Tensor) -> torch.Tensor:
    """States of each row's last token that is no padding, as transformers' decoders classify."""
    import torch

    ids, pad = batch.get("input_ids"), model.config.get_text_config().pad_token_id
    if ids is None or states.shape[:-1] != ids.shape:
        return states
    is_text = torch.ones_like(ids) if pad is None else ids != pad
    at = (torch.arange(ids.shape[1], device=ids.device) * is_text).argmax(dim=1)
    return states[torch.arange(len(ids), device=ids.device), at]


def numbers(parameter: Any) -> np.ndarray:
    """A parameter's values, float32 and copied: numpy would keep FSDP2 from freeing what it has gathered."""
    return np.asarray(whole(parameter.detach()).float().cpu().clone().numpy())


# ---- what a dense layer may become -------------------------------------------------------------------------------


After = Callable[[np.ndarray], np.ndarray]
"""From what a dense layer gives to what the last layer reads; both [items, hidden]."""


def after_dense(model: Any, name: str, reads: np.ndarray, last: np.ndarray) -> tuple[float, After] | None:
    """What stands between a dense layer and the last one, behind the value around which it is nearly linear; None where
    that is nothing transformers usually has: a pooler may be there and not be read, or not alone.

    Args:
        model: The model.
        name: Of the dense layer.
        reads: What it reads, [items, hidden].
        last: What the last layer reads, [items, hidden].
    """
    layer, holder = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    norm = getattr(holder, "norm", None)
    values = reads[:_COMPARED] @ numbers(layer.weight).T
    values = values if layer.bias is None else values + numbers(layer.bias)
    wanted = last[:_COMPARED]
    errors = {name: float(np.abs(_after(name, norm, values) - wanted).max()) for name in ACTIVATIONS}
    best = min(errors, key=lambda name: errors[name])
    if errors[best] > 0.05 * float(np.abs(wanted).max()):  # bf16 has three digits
        return None
    return ACTIVATIONS[best], partial(_after, best, norm)


def dense_options(reads: np.ndarray, mean: np.ndarray | None, has_bias: bool, middle: float) -> dict[str, Linear]:
    """What may take a dense layer's place: the identity, scaled, or the mean over all tokens of each item, [items,
    hidden]."""
    shift = middle if has_bias else 0.0
    centre, scale = standard(reads, has_bias)
    options = {"scaled": _linear(np.diag(SPREAD * scale), shift - SPREAD * scale * centre)}
    if mean is not None and mean.shape == reads.shape:
        options["mean"] = _towards(reads, mean, has_bias, shift)
    return options


def _after(activation: str, norm: Any, values: np.ndarray) -> np.ndarray:
    """The activation of the values, and a layer norm of it where the head has one."""
    import torch
    from transformers.activations import ACT2FN

    with torch.no_grad():
        result = ACT2FN[activation](torch.from_numpy(values))
        if isinstance(norm, torch.nn.LayerNorm):
            weight, bias = (None if one is None else torch.from_numpy(numbers(one)) for one in (norm.weight, norm.bias))
            result = torch.nn.functional.layer_norm(result, norm.normalized_shape, weight, bias, norm.eps)
    return np.asarray(result.numpy())


def _towards(reads: np.ndarray, wanted: np.ndarray, has_bias: bool, shift: float) -> Linear:
    """The ridge regression of `wanted`, scaled to the layer's spread."""
    from sklearn.linear_model import RidgeCV

    centre, scale = standard(reads, has_bias)
    middle = wanted.mean(axis=0) if has_bias else np.zeros(wanted.shape[1])
    size = LEAST_SPREAD**2 * float((wanted**2).mean())
    spread = math.sqrt(max(float(((wanted - middle) ** 2).mean()), size, 1e-30))
    model = RidgeCV(alphas=_RIDGE, fit_intercept=False)
    model.fit((reads - centre) * scale, (wanted - middle) * (SPREAD / spread))
    weight = model.coef_ * scale
    return _linear(weight, shift - weight @ centre)


def _linear(weight: np.ndarray, bias: np.ndarray) -> Linear:
    return Linear(weight.astype(np.float32), np.asarray(bias, np.float32))
