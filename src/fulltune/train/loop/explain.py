"""Why a loss or a gradient was not finite: the batch is looked at, then run again with hooks, without autocast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from fulltune.inference.selective_head import as_its_attention_can
from fulltune.tasks.padding import IGNORED, TRAINED


def explain(model: Any, batches: Sequence[Mapping[str, Any]]) -> str:
    """Say in words what the first thing is that is not finite in a step's micro batches; gradients are left alone."""
    try:
        return _why(model, batches)
    except Exception as error:  # a model that cannot be called without labels, or memory that runs out
        return f"where it came from could not be found ({type(error).__name__}: {str(error)[:80]})"


def _why(model: Any, batches: Sequence[Mapping[str, Any]]) -> str:
    for batch in batches:
        if bad := _bad_rows(model, batch):
            return bad
    labels = [batch.get("labels") for batch in batches]
    if all(isinstance(one, torch.Tensor) and not one.is_floating_point() and (one == IGNORED).all() for one in labels):
        return "all its labels are masked, so that there is nothing to learn from"
    ruined = next((name for name, one in model.named_parameters() if not bool(one.isfinite().all())), None)
    if ruined is not None:
        return f"the weights of {ruined} are not finite"
    kinds = sorted({str(one.dtype).removeprefix("torch.") for one in model.parameters()})
    computed = "in fp32" if kinds == ["float32"] else f"computed in {', '.join(kinds)}"
    for batch in batches:
        if found := _first_not_finite(model, batch):
            return f"with finite weights, {found} is the first module whose output is not finite {computed}"
    return f"each module's output is finite {computed}: it is the loss, the gradients, or a type with too small a range"


def _bad_rows(model: Any, batch: Mapping[str, Any]) -> str:
    """What is wrong with the rows themselves; empty: nothing that can be seen."""
    for name, values in batch.items():
        if isinstance(values, torch.Tensor) and values.is_floating_point() and values.dim():
            rows = (~values.reshape(len(values), -1).isfinite()).any(1).nonzero().flatten().tolist()
            if rows:
                return f"{name} of row {rows[0] + 1} of its batch is not finite"
    tokens = batch.get("input_ids")
    if isinstance(tokens, torch.Tensor):
        known = len(model.get_input_embeddings().weight)
        if rows := (tokens >= known).flatten(1).any(1).nonzero().flatten().tolist():
            return f"row {rows[0] + 1} of its batch has the token {int(tokens.max())}, and the model knows {known}"
    return ""


def _first_not_finite(model: Any, batch: Mapping[str, Any]) -> str:
    """The first module, in the order of the computation, whose output is not finite; empty: none is."""
    found: list[str] = []

    def look(name: str, module: Any) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            if not found and any(not bool(one.isfinite().all()) for one in _tensors(output)):
                found.append(f"{name or 'the model'} ({type(module).__name__})")

        return module.register_forward_hook(hook)

    device = next(model.parameters()).device
    tensors = {name: one for name, one in batch.items() if isinstance(one, torch.Tensor)}
    inputs = {name: one.to(device) for name, one in tensors.items() if name not in ("labels", TRAINED)}
    hooks = [look(name, module) for name, module in model.named_modules()]
    model.eval()  # without dropout, so that no random number is drawn
    try:
        with torch.no_grad(), as_its_attention_can(model, device.type):
            model(**inputs)
    finally:
        model.train()
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """The numbers in what a module gives; masks hold infinities on purpose, but no module gives a mask alone."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, (tuple, list)):
        for one in output:
            yield from _tensors(one)
