"""A model that DeepSpeed's ZeRO shards: what its engine needs before, whole tensors after; all processes call this."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fulltune.errors import SetupError
from fulltune.train.optim import fsdp2


def connect(arguments: Any) -> None:
    """Let DeepSpeed know the other processes: on a CPU transformers 5.24 connects them and does not tell it."""
    import deepspeed

    # Its calls of renamed functions of torch would fill the log.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    backend = "gloo" if arguments.use_cpu else None
    if arguments.world_size > 0:  # asking for it connects them
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def build_extensions(on_cpu: bool, offload_optimizer: bool, phase: Callable[[str], None]) -> None:
    """Compile what is missing of DeepSpeed's extensions that a run needs, in the first process for all."""
    from deepspeed.accelerator import get_accelerator
    from torch.utils import cpp_extension

    names = [*(["ShareMemCommBuilder"] if on_cpu else []), *(["CPUAdamBuilder"] if offload_optimizer else [])]
    for name in names:
        builder: Any = get_accelerator().create_op_builder(name)
        if builder is None or not hasattr(builder, "jit_load") or not builder.is_compatible(verbose=False):
            continue  # DeepSpeed does without it, or says itself what is missing
        folder = Path(cpp_extension._get_build_directory(builder.name, verbose=False))
        if (lock := folder / "lock").exists():  # torch waits for it, without a word and for ever
            phase(f"waiting for {lock}: {builder.name} is being compiled; if nothing compiles, delete this file")
        if not (folder / f"{builder.name}.so").exists():
            phase(f"compiling DeepSpeed's {builder.name}, once: about a minute")
        try:
            builder.load(verbose=False)
        except (RuntimeError, OSError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise SetupError(
                f"DeepSpeed's {builder.name} cannot be compiled: {reason}; it needs a C++ compiler (such as g++) and "
                f"ninja; compiled parts lie in {folder}"
            ) from error


def give_one_type(model: Any) -> None:
    """Have what a method added to a model that DeepSpeed's stage 3 shares out the type of the rest: its engine
    (DeepSpeed 0.19.8) takes such a model as it is."""
    kinds = [one.dtype for one in model.parameters() if hasattr(one, "ds_id")]
    for one in model.parameters() if kinds else ():
        if not hasattr(one, "ds_id"):
            one.data = one.data.to(kinds[0])


def forget_unused_conversions(model: Any) -> None:
    """Have tensors saved under the model's own names.

    transformers 5.24 forgets renamings that no tensor of the checkpoint needed, but not when DeepSpeed shares out
    the weights: then it would save every `LayerNorm.weight` as `LayerNorm.gamma`. Delete this when it does.
    """
    found = getattr(model, "_weight_conversions", None)
    if found:
        model._weight_conversions = [conversion for conversion in found if conversion.was_used()]


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
    """Write the model's weights as plain safetensors in fp32, a tied one once; see `fsdp2.write_by_file`."""
    kept = model.state_dict().keys()
    tensors: dict[str, Any] = dict(model.named_parameters())
    tensors |= {name: one for name, one in model.named_buffers() if name in kept}
    shapes = {
        name: torch.empty(
            getattr(one, "ds_shape", one.shape),
            dtype=torch.float32 if one.is_floating_point() else one.dtype,
            device="meta",
        )
        for name, one in tensors.items()
    }
    fsdp2.write_by_file(shapes, lambda name: whole(tensors[name]), folder)


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


def load_weights(engine: Any, checkpoint: Path) -> None:
    """Put a checkpoint that the engine wrote back into it."""
    from transformers.integrations.deepspeed import deepspeed_load_checkpoint

    deepspeed_load_checkpoint(engine, str(checkpoint))
