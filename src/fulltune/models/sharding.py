"""Weights that the processes of a training shard with PyTorch's FSDP2, by transformers' `DistributedConfig`."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fulltune.errors import SetupError
from fulltune.records.base import Record

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

_FREED = "free_full_weight"
"""transformers' word: whole during the block's own pass alone."""
OLDEST = (5, 24)
"""Version of transformers whose own FSDP2 does all that a run needs."""
_NUMBER = re.compile(r"\.\d+(?=\.|$)")
"""Of a layer, in the path of a module."""


class Units(Record):
    """Parameters that FSDP2 puts together at a time; one with several names lies in the root, once."""

    root: int
    """Outside of all units: whole from the forward to the end of the backward pass."""
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
        return self.root + self.kept + 2 * self.freed

    @property
    def reduced(self) -> int:
        """Of which gradients are sent."""
        return self.root + self.kept + self.freed


def shared_over(auto_class: Any, config: PretrainedConfig, num_processes: int) -> tuple[Any, Any]:
    """The class to load from, and how it is to be shared out over so many processes: transformers'
    `DistributedConfig`."""
    import torch
    import transformers
    from transformers.distributed.configuration_utils import DistributedConfig

    if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise SetupError(
            f"train.placement: fsdp2 needs transformers {needed} or newer, found {transformers.__version__}"
        )
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = auto_class.from_config(copy.deepcopy(config))
    # transformers 5.24 gives every model a plan of `embed_tokens`, `layers.*` and `norm`, whether it has modules of
    # these names or not: without its blocks BERT, GPT-2 or T5 would be put together as a whole in each pass.
    own = model.fsdp_plan or {}
    lacking = {rule: style for rule, style in blocks_of(model).items() if rule not in own}
    return tied_first(type(model)), DistributedConfig(fsdp_size=num_processes, fsdp_plan=lacking or None)


def tied_first(model_class: Any) -> Any:
    """A class of the same name whose models are shared out with a tensor that has several names as one.

    transformers 5.24 ties names after it has shared the model out: FSDP2 then takes the tensor for several and, where
    the processes' parts are not equally large (GPT-2's 50,257 tokens over two), puts some together from a copy that is
    never trained. Delete this when it ties them first.
    """

    def maybe_distribute_model(cls: Any, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        if mesh_manager is not None:
            model.tie_weights()
            model.fsdp_plan = without_shared(model, model.fsdp_plan)
        return model_class.maybe_distribute_model(model, distributed_config, mesh_manager)

    of_class = {"maybe_distribute_model": classmethod(maybe_distribute_model), "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), of_class)


def without_shared(model: Any, plan: Mapping[str, str]) -> dict[str, str]:
    """A plan without the modules that share a tensor with another one: it is gathered with the rest, once."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = [several for several in names.values() if len(several) > 1]

    def has_parted(path: str) -> bool:
        return any(len({name.startswith(f"{path}.") for name in several}) > 1 for several in tied)

    return {path: style for path, style in plan.items() if not has_parted(path)}


def blocks_of(model: Any) -> dict[str, str]:
    """A plan of a model's repeated blocks, such as `bert.encoder.layer.*`: the outermost lists of modules."""
    from torch.nn.modules.batchnorm import _BatchNorm

    if any(isinstance(one, _BatchNorm) for one in model.modules()):
        raise SetupError(
            f"train.placement: fsdp2: {type(model).__name__} has running statistics (batch normalization), which are "
            "not shared out; take ddp"
        )
    paths = lists_of_blocks(model)
    if not paths:
        raise SetupError(
            f"train.placement: fsdp2: {type(model).__name__} has no repeated blocks (no torch.nn.ModuleList with "
            "weights) to share out one by one; take ddp, or zero3"
        )
    return {f"{path}.*": _FREED for path in paths}


def lists_of_blocks(model: Any) -> list[str]:
    """Paths of the outermost lists of modules with weights, such as `bert.encoder.layer`."""
    import torch

    paths: list[str] = []
    for path, module in model.named_modules():
        has_weights = isinstance(module, torch.nn.ModuleList) and any(True for _ in module.parameters())
        if has_weights and not any(path.startswith(f"{outer}.") for outer in paths):
            paths.append(path)
    return paths


def units_of(model: Any) -> Units:
    """The units of a model, by transformers' own plan and `blocks_of`."""
    blocks = blocks_of(model)
    rules = without_shared(model, (model.fsdp_plan or {}) | blocks)
    found = {path: rules.get(_NUMBER.sub(".*", path)) for path, _ in model.named_modules()}
    styles = {path: style for path, style in found.items() if style is not None}
    # Inner modules before those around them, those that are freed first: as transformers 5.24 shares them out.
    order = sorted(styles, key=lambda name: (styles[name] != _FREED, -name.count(".")))
    seen: set[int] = set()
    sizes: dict[str, int] = {}
    for name in [*order, ""]:
        own = {id(one): one.numel() for one in model.get_submodule(name).parameters() if id(one) not in seen}
        sizes[name] = sum(own.values())
        seen |= own.keys()
    freed = [name for name in order if styles[name] == _FREED]
    repeated = tuple(path.removesuffix("*") for path in blocks)
    return Units(
        root=sizes[""],
        kept=sum(sizes[name] for name in order if styles[name] != _FREED),
        freed=sum(sizes[name] for name in freed),
        block=max((sizes[name] for name in freed if name.startswith(repeated)), default=0),
        apart=max((sizes[name] for name in freed if not name.startswith(repeated)), default=0),
    )


def is_shared(model: Any) -> bool:
    """Whether its weights are shared out."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def runs_together(model: Any) -> bool:
    """Whether no process can run it alone: FSDP2 or DeepSpeed's stage 3 has shared out its weights."""
    return is_shared(model) or any(hasattr(one, "ds_id") for one in model.parameters())


def changed_for_all(parameters: list[Any]) -> contextlib.AbstractContextManager[Any]:
    """Inside, whole tensors where ZeRO's stage 3 has shared them out; the first process changes them for all."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


@contextlib.contextmanager
def read_by_block(model: Any) -> Iterator[None]:
    """Inside, processes can run a model together whose weights DeepSpeed's stage 3 has shared out before its engine
    exists: each repeated block is put together for its own pass, what lies outside of all blocks until the end."""
    if is_shared(model) or not runs_together(model):
        yield
        return
    import deepspeed

    paths = lists_of_blocks(model)
    inside = tuple(f"{path}." for path in paths)
    outside = {
        id(one): one for name, one in model.named_parameters(remove_duplicate=False) if not name.startswith(inside)
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(deepspeed.zero.GatheredParameters(list(outside.values())))
        for block in (one for path in paths for one in model.get_submodule(path)):
            own = deepspeed.zero.GatheredParameters([one for one in block.parameters() if id(one) not in outside])
            before = block.register_forward_pre_hook(lambda *_, own=own: own.__enter__())
            after = block.register_forward_hook(lambda *_, own=own: own.__exit__(None, None, None), always_call=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield


def free(model: Any) -> None:
    """Have each process hold its own part alone: after a pass without gradients the last modules are still whole, and
    what is then read or changed is not what is trained."""
    if not is_shared(model):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def whole_while_copied(model: Any, modules: Sequence[str]) -> Iterator[None]:
    """Inside, these modules hold whole parameters: a method copies them, and trains copies that all processes hold. The
    Trainer averages the gradients of such tensors over the processes."""
    from torch.nn import Parameter

    free(model)
    kept = [
        (module, name, parameter)
        for path in (modules if is_shared(model) else ())
        for module in model.get_submodule(path).modules()
        for name, parameter in list(module.named_parameters(recurse=False))
    ]
    for module, name, parameter in kept:
        setattr(module, name, Parameter(whole(parameter.detach())))
    try:
        yield
    finally:
        for module, name, parameter in kept:
            setattr(module, name, parameter.requires_grad_(False))  # the copies are trained


def whole(values: torch.Tensor) -> torch.Tensor:
    """The whole tensor, in its shape; of one that is shared out all processes have to ask."""
    return values.full_tensor() if hasattr(values, "full_tensor") else values


def local(values: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    return values.to_local() if hasattr(values, "to_local") else values


def part(held: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that is placed as the parameter is."""
    if not hasattr(parameter, "placements"):
        return held
    from torch.distributed.tensor import DTensor

    placed: Any = parameter
    return DTensor.from_local(
        held, placed.device_mesh, placed.placements, run_check=False, shape=placed.shape, stride=placed.stride()
    )


def like(values: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Whole values as the parameter is placed: the same tensor, or this process's part of it."""
    if not hasattr(parameter, "placements"):
        return values
    from torch.distributed.tensor import distribute_tensor

    placed: Any = parameter
    # All processes have the values: nothing is sent.
    return distribute_tensor(values.to(placed.device), placed.device_mesh, placed.placements, src_data_rank=None)
