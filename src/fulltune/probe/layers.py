"""The layers of a new head: the last one, which gives the logits, and a dense one before it, such as a pooler's."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.inference.run import autocast, logits_of
from fulltune.methods import head as heads
from fulltune.recipe.tasks import TaskName

if TYPE_CHECKING:
    import torch


class NoProbe(Exception):
    """Why no probe can be fitted: the head then starts at random, and says so."""


@dataclass(frozen=True)
class HeadLayers:
    """By their names in the model."""

    last: str
    """Linear: it gives the logits."""
    dense: str | None
    """Linear, from the features of the body to as many; None: there is none, or more than one."""

    @classmethod
    def of(cls, model: Any, task: TaskName, num_outputs: int) -> HeadLayers:
        """Of a model as it was loaded.

        Args:
            model: Of a class with a head for the task.
            task: What it is for.
            num_outputs: Logits of an item.

        Raises:
            NoProbe: When it has no such layers.
        """
        from torch.nn import Linear

        if getattr(model, model.base_model_prefix, None) is None:
            raise NoProbe(f"{type(model).__name__} does not tell its body from its head")
        found = {
            f"{name}.{inner}" if inner else name: module
            for name in heads.names_of(model, task, "")
            for inner, module in model.get_submodule(name).named_modules()
            if isinstance(module, Linear)
        }
        last = [name for name, module in found.items() if module.out_features == num_outputs]
        if not last:
            raise NoProbe(f"the head of {type(model).__name__} does not end in a linear layer")
        width = found[last[-1]].in_features
        square = [
            name
            for name, module in found.items()
            if name != last[-1] and module.in_features == module.out_features == width
        ]
        return cls(last[-1], square[0] if len(square) == 1 else None)


@dataclass(frozen=True)
class Seen:
    """What a pass of a batch showed, float32."""

    hidden: torch.Tensor
    """The body's last hidden states."""
    last: torch.Tensor | None = None
    """What the last layer reads for each logit, or each vector of logits: [..., hidden]; None: not looked at."""
    dense: torch.Tensor | None = None
    """What the dense layer reads, in the same places."""


def see(model: Any, layers: HeadLayers | None, batch: Mapping[str, torch.Tensor]) -> Seen:
    """Run a batch, without labels, and find out what the head reads for each of its logits.

    Models pick what they read in ways of their own: the first token, the last one that is no padding, one vector for
    each choice. In the place of the last layer's values stand therefore their numbers; what the model makes of them
    says where its logits come from.

    Raises:
        NoProbe: When the logits are no selection of the last layer's values.
    """
    import torch

    body = getattr(model, model.base_model_prefix, model)
    if layers is None:
        return Seen(body(**batch)[0].float())
    read: dict[str, torch.Tensor] = {}
    last_layer = model.get_submodule(layers.last)

    def numbered(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        read["last"] = inputs[0]
        return torch.arange(output.numel(), dtype=torch.float64, device=output.device).reshape(output.shape)

    def states(module: Any, inputs: Any, output: Any) -> None:
        read["hidden"] = output[0]

    hooks = [
        last_layer.register_forward_hook(numbered),
        body.register_forward_hook(states),
    ]
    if layers.dense is not None:
        dense_layer = model.get_submodule(layers.dense)
        hooks.append(dense_layer.register_forward_hook(lambda module, inputs, output: read.update(dense=inputs[0])))
    try:
        numbers = logits_of(model(**batch))
    finally:
        for hook in hooks:
            hook.remove()
    flat = {name: values.float().flatten(0, -2) for name, values in read.items() if name != "hidden"}
    places = _places(numbers, last_layer.out_features)
    if places is None or "last" not in flat or int(places.max()) >= len(flat["last"]):
        raise NoProbe(f"the logits of {type(model).__name__} are not just those of its last layer")
    in_same_places = "dense" in flat and len(flat["dense"]) == len(flat["last"])
    return Seen(read["hidden"].float(), flat["last"][places], flat["dense"][places] if in_same_places else None)


def _places(numbers: torch.Tensor, num_outputs: int) -> torch.Tensor | None:
    """Which row of the last layer's input each vector of logits comes from; None: from no single one."""
    import torch

    whole = numbers.round().long()
    if not torch.equal(whole.to(numbers.dtype), numbers):
        return None
    if num_outputs == 1 and numbers.shape[-1] > 1:  # one for each choice
        return whole
    places = whole // num_outputs
    outputs = torch.arange(num_outputs, device=numbers.device)
    if not torch.equal(whole, places[..., :1] * num_outputs + outputs):
        return None
    return places[..., 0]


class _Enough(Exception):
    """Ends a pass when the last layer has its input."""


def after_dense(
    model: Any, layers: HeadLayers, batch: Mapping[str, torch.Tensor], values: np.ndarray, *, precision: str
) -> np.ndarray:
    """What the last layer reads when the dense one gives these values: an activation and more may stand between.

    Args:
        model: The model.
        layers: With a dense one.
        batch: Any small one; what it holds does not matter.
        values: float32 [items, hidden].
        precision: Of the computations.

    Returns:
        float32 [items, hidden].
    """
    import torch

    dense_layer, last_layer = model.get_submodule(str(layers.dense)), model.get_submodule(layers.last)
    read: list[torch.Tensor] = []

    def given(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        tensor = torch.from_numpy(values).to(output)
        return tensor.reshape(len(values), *[1] * (output.dim() - 2), output.shape[-1])

    def enough(module: Any, inputs: Any) -> None:
        read.append(inputs[0])
        raise _Enough

    hooks = [dense_layer.register_forward_hook(given), last_layer.register_forward_pre_hook(enough)]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(model.device.type, precision), contextlib.suppress(_Enough):
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    model.train(was_training)
    return read[0].float().reshape(len(values), -1).cpu().numpy()
