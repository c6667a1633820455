"""Weights that the processes of a training share out with PyTorch's FSDP2, as transformers loads them.

`from_pretrained` with a `DistributedConfig` builds the model without values, shares its modules out by a plan (which
modules are put together and freed again) and reads only this process's part of each tensor. transformers' own plan
names the blocks of newer classes; for the others (BERT, GPT-2, T5) its rules match nothing, and the whole model would
be one unit: all get a rule for their repeated blocks.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from fulltune.errors import SetupError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

_FREED = "free_full_weight"
"""transformers' word: whole during the block's own pass alone."""


def shared_over(auto_class: Any, config: PretrainedConfig, num_processes: int) -> Any:
    """How transformers is to share a model out over so many processes: its `DistributedConfig`.

    Raises:
        SetupError: When the model has no repeated blocks.
    """
    import torch
    from transformers.distributed.configuration_utils import DistributedConfig

    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = auto_class.from_config(copy.deepcopy(config))
    return DistributedConfig(fsdp_size=num_processes, fsdp_plan=blocks_of(model))


def blocks_of(model: Any) -> dict[str, str]:
    """A plan of a model's repeated blocks, such as `bert.encoder.layer.*`: the outermost lists of modules.

    Raises:
        SetupError: When there are none.
    """
    import torch

    paths: list[str] = []
    for path, module in model.named_modules():
        has_weights = isinstance(module, torch.nn.ModuleList) and any(True for _ in module.parameters())
        if has_weights and not any(path.startswith(f"{outer}.") for outer in paths):
            paths.append(path)
    if not paths:
        raise SetupError(
            f"train.placement: fsdp2: {type(model).__name__} has no repeated blocks (no torch.nn.ModuleList with "
            "weights) to share out one by one; take ddp, or zero3"
        )
    return {f"{path}.*": _FREED for path in paths}


def is_shared(model: Any) -> bool:
    """Whether its weights are shared out."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def free(model: Any) -> None:
    """Have each process hold its own part alone: after a pass without gradients the last modules are still whole, and
    what is then read or changed is not what is trained."""
    if not is_shared(model):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(values: torch.Tensor) -> torch.Tensor:
    """The whole tensor, in its shape; of one that is shared out all processes have to ask."""
    return values.full_tensor() if hasattr(values, "full_tensor") else values


def local(values: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    return values.to_local() if hasattr(values, "to_local") else values


def like(values: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Whole values as the parameter is placed: the same tensor, or this process's part of it."""
    if not hasattr(parameter, "placements"):
        return values
    from torch.distributed.tensor import distribute_tensor

    placed: Any = parameter
    # All processes have the values: nothing is sent.
    return distribute_tensor(values.to(placed.device), placed.device_mesh, placed.placements, src_data_rank=None)
