"""What DeepSpeed's ZeRO shards, in the form of checkpoints that every placement reads; all processes call this."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fulltune import files, methods
from fulltune.errors import SetupError
from fulltune.train import checkpoints, shared_state
from fulltune.train.optim.optimizers import in_fp32

LOSS_SCALE = "loss_scale.json"
"""Of fp16: how DeepSpeed scales the loss."""
MOMENTS = ("exp_avg", "exp_avg_sq")


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


def moment(parameter: Any, kind: str) -> torch.Tensor:
    """One of AdamW's two moments, in the parameter's shape."""
    from deepspeed.utils import safe_get_full_optimizer_state

    return safe_get_full_optimizer_state(parameter, kind)


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
    tensors = _tensors(model)
    shared_state.write_by_file(_sizes(tensors), lambda name: whole(tensors[name]), folder)


def put_together(model: Any) -> None:
    """Have each process hold the trained parameters whole, few as they are; the model is not trained any more."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if is_in_engine(parameter):
                setattr(module, name, torch.nn.Parameter(whole(parameter)))


def save(model: Any, engine: Any, checkpoint: Path, trained_only: bool = False) -> None:
    """Write a checkpoint's tensors from DeepSpeed's engine (stage 1, 2 or 3), one after the other."""
    zero = engine.optimizer
    steps = {
        parameter: float(state["step"])
        for flat, parameters in _flats(zero)
        if (state := zero.optimizer.state.get(flat))
        for parameter in parameters
    }
    if steps:
        link(zero)
    making: dict[str, Callable[[], torch.Tensor]] = {}
    sizes: dict[str, int] = {}
    tensors = _tensors(model, trained_only)
    for name, size in _sizes(tensors).items():
        making[f"{shared_state.WEIGHTS}{name}"] = partial(whole, tensors[name])
        sizes[f"{shared_state.WEIGHTS}{name}"] = size
        if tensors[name] in steps:
            called = f"{shared_state.OPTIMIZER}{name}."
            making |= {f"{called}{kind}": partial(moment, tensors[name], kind) for kind in MOMENTS}
            making[f"{called}step"] = partial(torch.tensor, [steps[tensors[name]]])
            sizes |= {f"{called}{kind}": size for kind in MOMENTS} | {f"{called}step": 4}
    folder = checkpoint / shared_state.FOLDER
    folder.mkdir(exist_ok=True, parents=True)
    shared_state.write_by_file(sizes, lambda name: making[name](), folder)
    if (scaler := getattr(zero, "loss_scaler", None)) is not None and scaler.dynamic and shared_state.is_first():
        numbers = {name: value for name, value in vars(scaler).items() if type(value) in (int, float)}
        files.write_json(checkpoint / LOSS_SCALE, numbers)


def _tensors(model: Any, trained_only: bool = False) -> dict[str, torch.Tensor]:
    """Each parameter once, however it is tied, and the buffers that are saved."""
    if trained_only:
        return dict(methods.trained(model))
    kept = model.state_dict().keys()
    return dict(model.named_parameters()) | {name: one for name, one in model.named_buffers() if name in kept}


def _sizes(tensors: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of what `whole` gives."""
    return {
        name: (4 if one.is_floating_point() else one.element_size()) * getattr(one, "ds_numel", one.numel())
        for name, one in tensors.items()
    }


def load(
    model: Any,
    engine: Any,
    checkpoint: Path,
    ordered: list[str],
    weights_only: bool = False,
    trained_only: bool = False,
    config: Any = None,
) -> None:
    """Put a checkpoint of any placement into DeepSpeed's engine; `ordered` names what is trained in the order of the
    optimizer's groups, which a whole optimizer's file numbers."""
    zero = engine.optimizer
    if hasattr(zero, "checkpoint_event_prologue"):
        zero.checkpoint_event_prologue()  # stage 3 takes back what is whole between steps
    if not weights_only:
        for flat, _ in _flats(zero):  # optimizers make their moments only in the first step
            zero.optimizer.state[flat] = {kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS}
        link(zero)
    tensors: dict[str, Any] = _tensors(model, trained_only)
    missing = {*tensors}
    steps: dict[str, float] = {}
    if shared_state.is_in(checkpoint):
        found = _parts(checkpoint, weights_only)
    else:
        found = _wholes(model, checkpoint, [] if weights_only else ordered, trained_only, config)
    for key, value in found:
        if key.startswith(shared_state.WEIGHTS):
            name = key.removeprefix(shared_state.WEIGHTS)
            one = tensors.get(name)
            if one is None or value.shape != getattr(one, "ds_shape", one.shape):
                raise SetupError(f"{checkpoint}: does not hold the model's tensors: {name}")
            put(one, value)
            missing.discard(name)
            continue
        name, _, kind = key.removeprefix(shared_state.OPTIMIZER).rpartition(".")
        if kind == "step":
            steps[name] = float(value)
        elif kind in MOMENTS:
            put(tensors[name], value, kind)
    if missing:
        raise SetupError(f"{checkpoint}: does not hold the model's tensors: {min(missing)} ({len(missing)} such)")
    if not weights_only:
        _set_steps(zero, {tensors[name]: step for name, step in steps.items()})
        _set_loss_scale(zero, checkpoint)
    _compute_with(zero)


def _flats(zero: Any) -> list[tuple[torch.Tensor, list[Any]]]:
    """This process's parts of the fp32 weights, as its optimizer has them, each with the parameters it is of."""
    if _is_stage_3(zero):
        return list(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True))
    return list(zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True))


def _is_stage_3(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")


def _set_steps(zero: Any, steps: dict[Any, float]) -> None:
    """All parameters of a part have one number; without any, the optimizer begins."""
    base = zero.optimizer
    if not steps:
        base.state.clear()
        return
    group = base.param_groups[0]
    for flat, parameters in _flats(zero):
        # A tensor that has not had a gradient yet counts none in other placements; here it counts with its part.
        step = max(steps.get(parameter, 0.0) for parameter in parameters)
        device = flat.device if group.get("fused") or group.get("capturable") else "cpu"
        # DeepSpeed's own AdamW for the host counts in whole numbers.
        is_torch = isinstance(base, torch.optim.Adam | torch.optim.AdamW)
        base.state[flat]["step"] = torch.tensor(step, device=device) if is_torch else int(step)


def _set_loss_scale(zero: Any, checkpoint: Path) -> None:
    scaler = getattr(zero, "loss_scaler", None)
    if scaler is None or not scaler.dynamic:
        return
    if (checkpoint / LOSS_SCALE).exists():
        vars(scaler).update(json.loads((checkpoint / LOSS_SCALE).read_text(encoding="utf-8")))
    elif (checkpoint / "scaler.pt").exists():  # of the Trainer without DeepSpeed
        scaler.cur_scale = torch.load(checkpoint / "scaler.pt", weights_only=True)["scale"]


def put(one: Any, value: torch.Tensor, kind: str | None = None) -> None:
    """Whole values into a tensor, or into one of its moments; passes go on with the old ones: see `_compute_with`."""
    import deepspeed

    if not is_in_engine(one):
        with torch.no_grad(), deepspeed.zero.GatheredParameters([one], modifier_rank=0):
            one.copy_(value)
    elif hasattr(one, "ds_id"):
        # Its own way for whole values (DeepSpeed 0.19.8) fails where they cannot be shared out evenly.
        size = one.partition_numel()
        rank = torch.distributed.get_rank(one.ds_process_group)
        held = value.flatten()[rank * size : (rank + 1) * size].to(torch.float32)
        held = torch.nn.functional.pad(held, (0, size - len(held)))
        if kind is None:
            deepspeed.utils.safe_set_local_fp32_param(one, held)
        else:
            deepspeed.utils.safe_set_local_optimizer_state(one, held, kind)
    elif kind is None:
        deepspeed.utils.safe_set_full_fp32_param(one, value.to(torch.float32))
    else:
        deepspeed.utils.safe_set_full_optimizer_state(one, value.to(torch.float32), kind)


def _compute_with(zero: Any) -> None:
    """The weights that passes compute with follow from the fp32 ones."""
    if not _is_stage_3(zero):
        zero.update_lp_params()
        return
    for number in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(number)
    zero.checkpoint_event_epilogue()


def _parts(checkpoint: Path, weights_only: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole tensors of the files, with those of about one file in memory."""
    known = shared_state.kinds(checkpoint)
    wanted = {
        name: size.numel() * dtype.itemsize
        for name, (size, dtype) in known.items()
        if not weights_only or name.startswith(shared_state.WEIGHTS)
    }
    for names in shared_state.in_files(wanted):
        state = {name: torch.empty(known[name][0], dtype=known[name][1]) for name in names}
        shared_state.read(state, checkpoint)
        yield from state.items()


def _wholes(
    model: Any, checkpoint: Path, ordered: list[str], trained_only: bool, config: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of `model.safetensors`, and of `optimizer.pt` where names are given."""
    from transformers.integrations import deepspeed as theirs

    if trained_only:
        tensors = load_file(checkpoint / shared_state.WHOLE)
    else:
        theirs.unset_hf_deepspeed_config()  # or stage 3 would share out, in half precision, what is only read
        try:
            tensors = _tensors(checkpoints.loaded(model, checkpoint, torch.float32))
        finally:
            if config is not None:
                theirs.set_hf_deepspeed_config(config)
    for name, one in tensors.items():
        yield f"{shared_state.WEIGHTS}{name}", one.detach()
    if not ordered:
        return
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location="cpu", mmap=True)["state"]
    for index, values in saved.items():
        name = ordered[index]
        if values["exp_avg"].shape != tensors[name].shape:  # as an optimizer of ours keeps it
            values = in_fp32(values, tensors[name].shape)
        for kind in (*MOMENTS, "step"):
            yield f"{shared_state.OPTIMIZER}{name}.{kind}", values[kind]
