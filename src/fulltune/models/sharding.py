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
from fulltune.records.base import Record

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

_FREED = "free_full_weight"
"""transformers' word: whole during the block's own pass alone."""


class Units(Record):
    """Parameters that FSDP2 puts together at a time. A tied head counts again: transformers 5.24 ties it when all is
    shared out, and FSDP2 goes on putting both together."""

    root: int
    """Outside of all units: whole from the forward to the end of the backward pass."""
    tied: int
    """Of a unit that embeddings make with the last norm where a head is tied to them: whole as long as the root."""
    kept: int
    """Of units that stay whole from their forward to their own backward pass: a language model's head."""
    freed: int
    """Of all units that are whole in their own passes alone."""
    block: int
    """Of the largest repeated block, which is freed."""
    apart: int
    """Of the largest other unit that is freed: the embeddings of newer classes; 0: there is none."""

    @property
    def gathered(self) -> int:
        """Put together in a forward and a backward pass."""
        return self.root + self.tied + self.kept + 2 * self.freed

    @property
    def reduced(self) -> int:
        """Of which gradients are sent."""
        return self.root + self.tied + self.kept + self.freed


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


def units_of(model: Any) -> Units:
    """The units of a model, by transformers' own rules and `blocks_of`.

    Args:
        model: Of the class that is trained; its tensors need no values.

    Raises:
        SetupError: When it has no repeated blocks.
    """
    from transformers.distributed.fsdp import _resolve_tied_embed_lm_head_plan

    blocks = blocks_of(model)
    rules = _resolve_tied_embed_lm_head_plan(model.fsdp_plan | blocks, model)
    styles: dict[str, str] = model._expand_parallel_plan(rules)
    # Inner modules before those around them, those that are freed first: as transformers 5.24 shares them out.
    order = sorted(styles, key=lambda name: (styles[name] != _FREED, -name.count(".")))
    seen: set[str] = set()
    sizes: dict[str, int] = {}
    for name in [*order, ""]:
        inside = model.get_submodule(name).named_parameters(prefix=name, remove_duplicate=False)
        own = {path: one.numel() for path, one in inside if path not in seen}
        sizes[name] = sum(own.values())
        seen |= own.keys()
    freed = [name for name in order if styles[name] == _FREED]
    kept = [name for name in order if styles[name] != _FREED]
    repeated = tuple(path.removesuffix("*") for path in blocks)
    # Embeddings have no input with a gradient, which would end their backward pass.
    is_tied = any(model.get_submodule(name) is model.get_input_embeddings() for name in kept)
    size_of_kept = sum(sizes[name] for name in kept)
    return Units(
        root=sizes[""],
        tied=size_of_kept if is_tied else 0,
        kept=0 if is_tied else size_of_kept,
        freed=sum(sizes[name] for name in freed),
        block=max((sizes[name] for name in freed if name.startswith(repeated)), default=0),
        apart=max((sizes[name] for name in freed if not name.startswith(repeated)), default=0),
    )


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
