from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.inference.run import extract_logits
from fulltune.methods import head as heads
from fulltune.models.sharding import full_tensor
from fulltune.probe.linear import LEAST_SPREAD, LinearClassifier, NoProbe, shift_and_scale
from fulltune.recipe.tasks import TaskName

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ACTIVATIONS = {"tanh": 0.0, "relu": 3.0, "gelu": 3.0, "gelu_new": 3.0, "silu": 3.0, "linear": 0.0}
"""Activations between the dense and the last layer (`ACT2FN`), each with an input around which it is nearly linear."""
SPREAD = 0.4
_RIDGE_ALPHAS = tuple(10.0**power for power in range(-2, 6))
_COMPARED_ITEMS = 16


HeadLayers = tuple[str, str | None]
"""Names of the head's last linear layer and of its only square dense layer (or None)."""


def find_head_layers(model: PreTrainedModel, task: TaskName, num_outputs: int) -> HeadLayers:
    """Return the names of a head's last linear layer and dense layer (or None). Raise `NoProbe` if there is none."""
    from torch.nn import Linear

    model_without_head(model)
    linears = {
        f"{name}.{inner}" if inner else name: module
        for name in heads.head_paths(model, task, "")
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


def model_without_head(model: PreTrainedModel) -> torch.nn.Module:
    """Return the model without its head. Raise `NoProbe` if the model's class does not separate head and body."""
    body = getattr(model, model.base_model_prefix, None)
    if body is None:
        raise NoProbe(f"{type(model).__name__} has no separate body")
    return body


HiddenStates = tuple["torch.Tensor", "torch.Tensor | None", "torch.Tensor | None"]
"""Last hidden states, and the inputs of the last and the dense layer, as float32 [..., hidden]."""


def run_and_read_hidden(
    model: PreTrainedModel, layers: HeadLayers | None, batch: Mapping[str, torch.Tensor]
) -> HiddenStates:
    """Run the model once. Return the hidden states, and the inputs of the head's last and dense layers (None if
    absent).

    Raises:
        NoProbe: If the logits are not the last layer's outputs, or the body does not run exactly once.
    """
    import torch

    modules = {"body": model_without_head(model)}
    if layers is not None:
        names = zip(("last", "dense"), layers, strict=True)
        modules |= {key: model.get_submodule(name) for key, name in names if name is not None}
    recorded: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    last_outputs: list[torch.Tensor] = []

    def record(name: str, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        """Record a module's inputs, or the body's output."""
        recorded[name].append((output[0] if name == "body" else inputs[0]).float())
        if name == "last":
            last_outputs.append(output.float())

    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(record, name)))
        outputs = model(**batch)
    if len(recorded["body"]) != 1:
        raise NoProbe(f"{type(model).__name__} does not run its body exactly once")
    [hidden] = recorded["body"]
    if layers is None:
        return hidden, None, None
    logits = extract_logits(outputs).float()
    pick = _select_last_token if len(last_outputs) == 1 and last_outputs[0].numel() != logits.numel() else None
    outputs_read = [output if pick is None else pick(model, batch, output) for output in last_outputs]
    is_all = len(outputs_read) == 1 and outputs_read[0].numel() == logits.numel()
    if not is_all or not torch.allclose(outputs_read[0].flatten(), logits.flatten(), rtol=0, atol=0, equal_nan=True):
        raise NoProbe(f"the logits of {type(model).__name__} are not the outputs of its last layer")
    [last], dense = recorded["last"], recorded.get("dense", [])
    dense_inputs = dense[0] if len(dense) == 1 and dense[0].shape[:-1] == last.shape[:-1] else None
    if pick is not None:
        last = pick(model, batch, last)
        dense_inputs = None if dense_inputs is None else pick(model, batch, dense_inputs)
    return hidden, last, dense_inputs


def _select_last_token(model: PreTrainedModel, batch: Mapping[str, torch.Tensor], states: torch.Tensor) -> torch.Tensor:
    """Return each row's state [rows, hidden] at its last real token, as transformers' decoders classify."""
    import torch

    ids, pad = batch.get("input_ids"), model.config.get_text_config().pad_token_id
    if ids is None or states.shape[:-1] != ids.shape:
        return states
    is_text = torch.ones_like(ids) if pad is None else ids != pad
    last_positions = (torch.arange(ids.shape[1], device=ids.device) * is_text).argmax(dim=1)
    return states[torch.arange(len(ids), device=ids.device), last_positions]


def to_numpy(parameter: torch.Tensor) -> np.ndarray:
    """Return a float32 copy of a parameter. A view would keep FSDP2 from freeing the gathered tensor."""
    return np.asarray(full_tensor(parameter.detach()).float().cpu().clone().numpy())


# ---- what a dense layer may become -------------------------------------------------------------------------------


Activation = Callable[[np.ndarray], np.ndarray]


def recognise_activation(
    model: PreTrainedModel, name: str, dense_inputs: np.ndarray, last_inputs: np.ndarray
) -> tuple[float, Activation] | None:
    """Find which of `ACTIVATIONS` maps the outputs of the dense layer `name` to `last_inputs`.

    Returns:
        The input around which the function is nearly linear, and the function, or None if no function fits.
    """
    norm = getattr(model.get_submodule(name.rpartition(".")[0]), "norm", None)
    parameters = dict(model.get_submodule(name).named_parameters())
    values = dense_inputs[:_COMPARED_ITEMS] @ to_numpy(parameters["weight"]).T
    values = values + to_numpy(parameters["bias"]) if "bias" in parameters else values
    expected = last_inputs[:_COMPARED_ITEMS]
    errors = {name: float(np.abs(_apply_activation(name, norm, values) - expected).max()) for name in ACTIVATIONS}
    best = min(errors, key=lambda name: errors[name])
    if errors[best] > 0.05 * float(np.abs(expected).max()):  # bf16 has about three digits
        return None
    return ACTIVATIONS[best], partial(_apply_activation, best, norm)


def dense_replacements(
    dense_inputs: np.ndarray, mean: np.ndarray | None, has_bias: bool, middle: float
) -> dict[str, LinearClassifier]:
    """Fit replacements of a dense layer by name: a `scaled` identity and, if possible, a map to the `mean` over tokens.

    `middle` is the input around which the activation is nearly linear.
    """
    shift = middle if has_bias else 0.0
    centre, scale = shift_and_scale(dense_inputs, has_bias)
    options = {"scaled": _linear_classifier(np.diag(SPREAD * scale), shift - SPREAD * scale * centre)}
    if mean is not None and mean.shape == dense_inputs.shape:
        from sklearn.linear_model import RidgeCV

        usual = mean.mean(axis=0) if has_bias else np.zeros(mean.shape[1])
        size = LEAST_SPREAD**2 * float((mean**2).mean())
        spread = math.sqrt(max(float(((mean - usual) ** 2).mean()), size, 1e-30))
        model = RidgeCV(alphas=_RIDGE_ALPHAS, fit_intercept=False)
        model.fit((dense_inputs - centre) * scale, (mean - usual) * (SPREAD / spread))
        weight = model.coef_ * scale
        options["mean"] = _linear_classifier(weight, shift - weight @ centre)
    return options


def _apply_activation(activation: str, norm: torch.nn.Module | None, values: np.ndarray) -> np.ndarray:
    """Apply a named activation, and the layer norm if there is one."""
    import torch
    from transformers.activations import ACT2FN

    with torch.no_grad():
        result = ACT2FN[activation](torch.from_numpy(values))
        if isinstance(norm, torch.nn.LayerNorm):
            weight, bias = (
                None if values is None else torch.from_numpy(to_numpy(values)) for values in (norm.weight, norm.bias)
            )
            result = torch.nn.functional.layer_norm(result, norm.normalized_shape, weight, bias, norm.eps)
    return np.asarray(result.numpy())


def _linear_classifier(weight: np.ndarray, bias: np.ndarray) -> LinearClassifier:
    return LinearClassifier(weight.astype(np.float32), np.asarray(bias, np.float32))
