"""The layers of a new head: the last one, which gives the logits, and a dense one before it, such as a pooler's."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune.inference.run import autocast, logits_of
from fulltune.methods import head as heads
from fulltune.models import sharding
from fulltune.recipe.tasks import TaskName
from fulltune.system.out_of_memory import is_out_of_memory

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
    """The body's last hidden states, or those in its middle."""
    last: torch.Tensor | None = None
    """What the last layer reads for each logit, or each vector of logits: [..., hidden]; None: not looked at."""
    dense: torch.Tensor | None = None
    """What the dense layer reads, in the same places."""


def see(model: Any, layers: HeadLayers | None, batch: Mapping[str, torch.Tensor], middle: bool = False) -> Seen:
    """Run a batch, without labels, and find out what the head reads for each of its logits.

    Models pick what they read in ways of their own: the first token, the last one that is no padding, one vector for
    each choice. In the place of the last layer's values stand therefore their numbers; what the model makes of them
    says where its logits come from.

    With `middle` the states are those of the layer in the middle, where words are told apart best.

    Raises:
        NoProbe: When the logits are no selection of the last layer's values, or the body is not to be seen.
    """
    import torch

    body = getattr(model, model.base_model_prefix, None)
    if body is None:
        raise NoProbe(f"{type(model).__name__} does not tell its body from its head")
    parts = {"body": body}
    if layers is not None:
        parts |= {"last": model.get_submodule(layers.last)}
        parts |= {} if layers.dense is None else {"dense": model.get_submodule(layers.dense)}
    read: dict[str, list[torch.Tensor]] = {name: [] for name in parts}

    def keep(name: str, module: Any, inputs: Any, output: Any) -> torch.Tensor | None:
        read[name].append(output[0] if name == "body" else inputs[0])
        if name != "last":
            return None
        return torch.arange(output.numel(), dtype=torch.float64, device=output.device).reshape(output.shape)

    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in parts.items()]
    try:
        outputs = model(**batch, output_hidden_states=True) if middle else model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    if len(read["body"]) != 1:
        raise NoProbe(f"{type(model).__name__} does not run its body once")
    hidden = read["body"][0].float()
    if middle:
        if not (states := outputs.get("hidden_states")) or states[len(states) // 2].shape != hidden.shape:
            raise NoProbe(f"{type(model).__name__} does not show what is between its layers")
        hidden = states[len(states) // 2].float()
    if layers is None:
        return Seen(hidden)
    places = _places(logits_of(outputs), parts["last"].out_features)
    last, dense = (_once(read.get(name, [])) for name in ("last", "dense"))
    if places is None or last is None or not 0 <= int(places.min()) <= int(places.max()) < len(last):
        raise NoProbe(f"the logits of {type(model).__name__} are not just those of its last layer")
    return Seen(hidden, last[places], dense[places] if dense is not None and len(dense) == len(last) else None)


def _once(read: list[torch.Tensor]) -> torch.Tensor | None:
    """What a layer has read, float32 [items, hidden]; None: it was not called once."""
    return read[0].float().flatten(0, -2) if len(read) == 1 else None


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

    Raises:
        NoProbe: When it reads other things as well.
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
        with torch.no_grad(), autocast(model, precision), contextlib.suppress(_Enough):
            model(**batch)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise NoProbe(f"{layers.last} reads more than what {layers.dense} gives ({error})") from error
    finally:
        for hook in hooks:
            hook.remove()
        if sharding.is_shared(model):  # FSDP2 waits for the end of a pass that was left
            with torch.no_grad():
                model(**batch)
        model.train(was_training)
    flat = [one.float().flatten(0, -2) for one in read]
    if len(flat) != 1 or len(flat[0]) != len(values):
        raise NoProbe(f"{layers.last} does not read what {layers.dense} gives")
    return flat[0].cpu().numpy()
