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
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

_FREED = "free_full_weight"
OLDEST_TRANSFORMERS = (5, 24)
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


class Units(Record):
    """Parameter counts of the units that FSDP2 gathers one at a time. Tied parameters count once, in the root."""

    root: int
    """Parameters outside of all units."""
    persistent: int
    """Parameters of units that stay gathered from forward to backward pass."""
    freed: int
    """Parameters of units that are freed after the forward pass and gathered again for the backward pass."""
    block: int
    apart: int
    """Parameters of the largest freed unit that is not a repeated block, or 0."""

    @property
    def gathered(self) -> int:
        return self.root + self.persistent + 2 * self.freed

    @property
    def reduced(self) -> int:
        return self.root + self.persistent + self.freed


def sharded_model_class(auto_class: Any, config: PretrainedConfig, num_processes: int) -> tuple[Any, Any]:
    """Return a model class that FSDP2 shards while loading, and its `DistributedConfig`; raise `SetupError` if it
    cannot be sharded."""
    import torch
    import transformers
    from transformers.distributed.configuration_utils import DistributedConfig

    if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST_TRANSFORMERS:
        needed = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise SetupError(
            f"train.placement: fsdp2 needs transformers {needed} or newer, found {transformers.__version__}"
        )
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = auto_class.from_config(copy.deepcopy(config))
    # transformers 5.24 gives every model a plan of `embed_tokens`, `layers.*` and `norm`, even without such modules:
    # BERT, GPT-2 or T5 would be gathered as a whole in each pass.
    own = model.fsdp_plan or {}
    lacking = {rule: style for rule, style in block_sharding_plan(model).items() if rule not in own}
    return tie_before_sharding(type(model)), DistributedConfig(fsdp_size=num_processes, fsdp_plan=lacking or None)


def tie_before_sharding(model_class: Any) -> Any:
    """Return a subclass that ties weights before sharding.

    transformers 5.24 ties them afterwards, so FSDP2 may gather a tied weight from a copy that is never trained. Delete
    this once transformers ties weights first.
    """

    def maybe_distribute_model(cls: Any, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """Tie the weights, then call the base class's method."""
        if mesh_manager is not None:
            model.tie_weights()
            model.fsdp_plan = remove_tied_modules(model, model.fsdp_plan)
        return model_class.maybe_distribute_model(model, distributed_config, mesh_manager)

    of_class = {"maybe_distribute_model": classmethod(maybe_distribute_model), "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), of_class)


def remove_tied_modules(model: nn.Module, fsdp_plan: Mapping[str, str]) -> dict[str, str]:
    """Return a sharding plan without modules that share weights with others, because FSDP2 must gather these with the
    root."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = [several for several in names.values() if len(several) > 1]

    def has_parted(path: str) -> bool:
        return any(len({name.startswith(f"{path}.") for name in several}) > 1 for several in tied)

    return {path: style for path, style in fsdp_plan.items() if not has_parted(path)}


def block_sharding_plan(model: nn.Module) -> dict[str, str]:
    """Return a sharding plan for all repeated blocks, such as `bert.encoder.layer.*`, or raise `SetupError` if they
    cannot be sharded."""
    from torch.nn.modules.batchnorm import _BatchNorm

    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise SetupError(
            f"train.placement: fsdp2: {type(model).__name__} has running statistics (batch normalization), which "
            "cannot be sharded; use ddp"
        )
    paths = block_list_paths(model)
    if not paths:
        raise SetupError(
            f"train.placement: fsdp2: {type(model).__name__} has no repeated blocks (no torch.nn.ModuleList with "
            "weights) to shard; use ddp or zero3"
        )
    return {f"{path}.*": _FREED for path in paths}


def block_list_paths(model: nn.Module) -> list[str]:
    """Return the paths of the outermost module lists with weights, such as `bert.encoder.layer`."""
    import torch

    paths: list[str] = []
    for path, module in model.named_modules():
        has_weights = isinstance(module, torch.nn.ModuleList) and any(True for _ in module.parameters())
        if has_weights and not any(path.startswith(f"{outer}.") for outer in paths):
            paths.append(path)
    return paths


def count_unit_parameters(model: PreTrainedModel) -> Units:
    """Count the parameters in each unit that FSDP2 would gather."""
    blocks = block_sharding_plan(model)
    rules = remove_tied_modules(model, (model.fsdp_plan or {}) | blocks)
    styles = {
        path: style for path, _ in model.named_modules() if (style := rules.get(_NUMBER.sub(".*", path))) is not None
    }
    # transformers 5.24 shards inner modules before outer ones, and freed ones first.
    order = sorted(styles, key=lambda name: (styles[name] != _FREED, -name.count(".")))
    counted: set[int] = set()
    sizes: dict[str, int] = {}
    for name in [*order, ""]:
        own = {id(one): one.numel() for one in model.get_submodule(name).parameters() if id(one) not in counted}
        sizes[name] = sum(own.values())
        counted |= own.keys()
    freed = [name for name in order if styles[name] == _FREED]
    repeated = tuple(path.removesuffix("*") for path in blocks)
    return Units(
        root=sizes[""],
        persistent=sum(sizes[name] for name in order if styles[name] != _FREED),
        freed=sum(sizes[name] for name in freed),
        block=max((sizes[name] for name in freed if name.startswith(repeated)), default=0),
        apart=max((sizes[name] for name in freed if not name.startswith(repeated)), default=0),
    )


def is_fsdp2_sharded(model: nn.Module) -> bool:
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def needs_all_ranks(model: nn.Module) -> bool:
    """Return True if FSDP2 or DeepSpeed's stage 3 shards the weights, so that no rank can run the model alone."""
    return is_fsdp2_sharded(model) or any(hasattr(one, "ds_id") for one in model.parameters())


def gathered_to_modify(parameters: list[Any]) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which ZeRO-3's sharded tensors are gathered; at its end, rank 0's changes reach all ranks."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


@contextlib.contextmanager
def callable_before_engine(model: nn.Module) -> Iterator[None]:
    """Make a model sharded by ZeRO-3 callable inside the context, before DeepSpeed's engine exists.

    Each repeated block is gathered for its own pass; other weights stay gathered.
    """
    if is_fsdp2_sharded(model) or not needs_all_ranks(model):
        yield
        return
    import deepspeed

    paths = block_list_paths(model)
    inside = tuple(f"{path}." for path in paths)
    outside = {
        id(tensor): tensor
        for name, tensor in model.named_parameters(remove_duplicate=False)
        if not name.startswith(inside)
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(deepspeed.zero.GatheredParameters(list(outside.values())))
        for block in [block for path in paths for block in model.get_submodule(path).children()]:
            own = deepspeed.zero.GatheredParameters([one for one in block.parameters() if id(one) not in outside])
            before = block.register_forward_pre_hook(lambda *_, own=own: own.__enter__())
            after = block.register_forward_hook(lambda *_, own=own: own.__exit__(None, None, None), always_call=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield


def free_gathered_weights(model: nn.Module) -> None:
    """Free the weights that FSDP2 keeps gathered in the last modules after a pass without gradients."""
    if not is_fsdp2_sharded(model):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def unsharded_while_copied(model: nn.Module, modules: Sequence[str]) -> Iterator[None]:
    """Gather FSDP2's parameters of some modules inside the context, so that a method can copy the modules."""
    from torch.nn import Parameter

    free_gathered_weights(model)
    sharded = [
        (module, name, parameter)
        for path in (modules if is_fsdp2_sharded(model) else ())
        for module in model.get_submodule(path).modules()
        for name, parameter in list(module.named_parameters(recurse=False))
    ]
    for module, name, parameter in sharded:
        setattr(module, name, Parameter(full_tensor(parameter.detach())))
    try:
        yield
    finally:
        for module, name, parameter in sharded:
            setattr(module, name, parameter.requires_grad_(False))  # the copies are trained


def full_tensor(values: torch.Tensor) -> torch.Tensor:
    """Gather a sharded tensor, which all ranks must do together; return other tensors unchanged."""
    return values.full_tensor() if hasattr(values, "full_tensor") else values


def local_tensor(values: torch.Tensor) -> torch.Tensor:
    return values.to_local() if hasattr(values, "to_local") else values


def dtensor_from_shard(shard: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Wrap this rank's `shard` in a tensor sharded like the parameter, or return `shard` for unsharded parameters."""
    if not hasattr(parameter, "placements"):
        return shard
    from torch.distributed.tensor import DTensor

    placed: Any = parameter
    return DTensor.from_local(
        shard, placed.device_mesh, placed.placements, run_check=False, shape=placed.shape, stride=placed.stride()
    )


def shard_like(values: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Shard `values`, which all ranks have in full, like the parameter."""
    if not hasattr(parameter, "placements"):
        return values
    from torch.distributed.tensor import distribute_tensor

    placed: Any = parameter
    # All ranks have the values, so nothing is sent.
    return distribute_tensor(values.to(placed.device), placed.device_mesh, placed.placements, src_data_rank=None)
