"""Whole tensors of a model that DeepSpeed's ZeRO shards; all processes call this."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fulltune.train import shared_state


def is_in_engine(parameter: Any) -> bool:
    """Whether DeepSpeed trains an fp32 copy of it."""
    return bool(parameter.requires_grad) and (hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping"))


def whole(parameter: Any) -> torch.Tensor:
    """A parameter or a buffer in its shape and in fp32: of half precision DeepSpeed's copy, which is trained."""
    import deepspeed

    if is_in_engine(parameter):
        return deepspeed.utils.safe_get_full_fp32_param(parameter)
    with deepspeed.zero.GatheredParameters([parameter]):  # frozen, or stage 3 before the optimizer exists
        values = parameter.detach().clone()
    return values.float() if values.is_floating_point() else values


def second_moment(parameter: Any) -> torch.Tensor:
    """AdamW's running mean of squared gradients, in the parameter's shape."""
    from deepspeed.utils import safe_get_full_optimizer_state

    return safe_get_full_optimizer_state(parameter, "exp_avg_sq")


def link(zero: Any) -> None:
    """DeepSpeed 0.19.8 (stages 1 and 2) looks for moments after the first group's first step, when the second group
    has none yet: look again. Delete this when it does so itself."""
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def holds(model: Any) -> bool:
    """Whether an engine trains the model, stage 1, 2 or 3."""
    return any(map(is_in_engine, model.parameters()))


def write_whole(model: Any, folder: Path) -> None:
    """Write the model's weights as plain safetensors in fp32, a tied one once; see `shared_state.write_by_file`."""
    kept = model.state_dict().keys()
    tensors: dict[str, Any] = dict(model.named_parameters())
    tensors |= {name: one for name, one in model.named_buffers() if name in kept}
    sizes = {
        name: (4 if one.is_floating_point() else one.element_size()) * getattr(one, "ds_numel", one.numel())
        for name, one in tensors.items()
    }
    shared_state.write_by_file(sizes, lambda name: whole(tensors[name]), folder)


def put_together(model: Any) -> None:
    """Have each process hold the trained parameters whole, few as they are; the model is not trained any more."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if is_in_engine(parameter):
                setattr(module, name, torch.nn.Parameter(whole(parameter)))


def put(parameter: Any, value: torch.Tensor) -> None:
    """Whole values into a trained parameter, for what is written after training."""
    import deepspeed

    if not hasattr(parameter, "ds_id"):
        deepspeed.utils.safe_set_full_fp32_param(parameter, value.to(torch.float32))
        return
    # Its own way for whole values (DeepSpeed 0.19.8) fails where they cannot be shared out evenly.
    size = parameter.partition_numel()
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    held = value.flatten()[rank * size : (rank + 1) * size].to(torch.float32)
    deepspeed.utils.safe_set_local_fp32_param(parameter, torch.nn.functional.pad(held, (0, size - len(held))))
