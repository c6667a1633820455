"""Functions for models sharded by DeepSpeed's ZeRO; all ranks must call them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from fulltune.errors import SetupError


def init_process_group(arguments: TrainingArguments) -> None:
    """Initialise DeepSpeed's process group, which transformers 5.24 does not do on a CPU."""
    import deepspeed

    # DeepSpeed calls renamed functions of torch, whose warnings would fill the log.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    backend = "gloo" if arguments.use_cpu else None
    if arguments.world_size > 0:  # reading it connects the processes
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def build_extensions(on_cpu: bool, offload_optimizer: bool, report: Callable[[str], None]) -> None:
    """Compile missing DeepSpeed extensions for the CPU or for offloading, on rank 0 for all ranks."""
    from deepspeed.accelerator import get_accelerator
    from torch.utils import cpp_extension

    names = [*(["ShareMemCommBuilder"] if on_cpu else []), *(["CPUAdamBuilder"] if offload_optimizer else [])]
    for name in names:
        builder: Any = get_accelerator().create_op_builder(name)
        if builder is None or not hasattr(builder, "jit_load") or not builder.is_compatible(verbose=False):
            continue  # DeepSpeed works without it, or reports what is missing
        folder = Path(cpp_extension._get_build_directory(builder.name, verbose=False))
        if (lock := folder / "lock").exists():  # torch would wait for it silently and for ever
            report(
                f"waiting for {lock}: {builder.name} is being compiled; if no process is compiling, delete this file"
            )
        if not (folder / f"{builder.name}.so").exists():
            report(f"compiling DeepSpeed's {builder.name} once, which takes about a minute")
        try:
            builder.load(verbose=False)
        except (RuntimeError, OSError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise SetupError(
                f"DeepSpeed's {builder.name} cannot be compiled: {reason}; it needs ninja and a C++ compiler, such as "
                f"g++; partial results are in {folder}"
            ) from error


def cast_to_model_dtype(model: PreTrainedModel) -> None:
    """Cast a method's new parameters to the model's dtype in ZeRO stage 3, as DeepSpeed 0.19.8 does not."""
    dtypes = [parameter.dtype for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    for parameter in model.parameters() if dtypes else ():
        if not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtypes[0])


def remove_unused_conversions(model: PreTrainedModel) -> None:
    """Remove name conversions that no tensor of the checkpoint needed. Under DeepSpeed, transformers 5.24 keeps them
    and would save every `LayerNorm.weight` as `LayerNorm.gamma`."""
    conversions: list[Any] | None = getattr(model, "_weight_conversions", None)
    if conversions:
        vars(model)["_weight_conversions"] = [conversion for conversion in conversions if conversion.was_used()]


def is_in_engine(parameter: torch.Tensor) -> bool:
    return bool(parameter.requires_grad) and (hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping"))


def gather_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """Gather a parameter or buffer in fp32; for a trained parameter, from DeepSpeed's fp32 master copy."""
    import deepspeed

    if is_in_engine(parameter):
        return deepspeed.utils.safe_get_full_fp32_param(parameter)
    with deepspeed.zero.GatheredParameters([parameter]):  # frozen, or stage 3 before the optimizer exists
        values = parameter.detach().clone()
    return values.float() if values.is_floating_point() else values


def link_moments(zero: Any) -> None:
    """Link all groups' moments to their parameters, as DeepSpeed 0.19.8 (stages 1, 2) does only for the first."""
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def is_in_use(model: PreTrainedModel) -> bool:
    return any(map(is_in_engine, model.parameters()))


def set_values(parameter: Any, value: torch.Tensor) -> None:
    """Set a trained parameter's values in DeepSpeed's fp32 master copy, from which checkpoints are saved."""
    import deepspeed

    if not hasattr(parameter, "ds_id"):
        deepspeed.utils.safe_set_full_fp32_param(parameter, value.to(torch.float32))
        return
    # DeepSpeed 0.19.8 has a function for gathered values, which fails if they cannot be split evenly.
    size = parameter.partition_numel()
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    shard = value.flatten()[rank * size : (rank + 1) * size].to(torch.float32)
    deepspeed.utils.safe_set_local_fp32_param(parameter, torch.nn.functional.pad(shard, (0, size - len(shard))))
