"""Weights and optimizer state of a checkpoint, whatever shared them out when it was written and when it is read.

Processes that share out a model write their parts as safetensors by tensor and offset (`torch.distributed.checkpoint`),
under the names of the model's parameters: `weights.NAME`, `optimizer.NAME.exp_avg`. Any number of processes reads them,
each what it needs; one that holds whole tensors reads whole ones. What processes with whole tensors write is the
Trainer's: `model.safetensors` and `optimizer.pt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as save_parts

from fulltune import methods
from fulltune.errors import SetupError
from fulltune.models import sharding

FOLDER = "shared"
"""In a checkpoint, of one whose tensors were shared out."""
_WEIGHTS, _OPTIMIZER = "weights.", "optimizer."


def is_in(checkpoint: Path) -> bool:
    """Whether a checkpoint was written by processes that shared out its tensors."""
    return (checkpoint / FOLDER).is_dir()


def save(model: Any, optimizer: torch.optim.Optimizer, checkpoint: Path, trained_only: bool = False) -> None:
    """Write what each process holds; all of them call it.

    Args:
        model: Its weights are shared out.
        optimizer: Of the model, without a wrapper.
        checkpoint: A folder that is there.
        trained_only: Leave out what stays as it was loaded.
    """
    sharding.free(model)
    state = _weights(model, trained_only)
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            # A number of steps has no axis, and a file of parts tells them by their offsets.
            state[f"{_OPTIMIZER}{name}.{kind}"] = value.reshape(1) if value.dim() == 0 else value
    save_parts(state, storage_writer=HuggingFaceStorageWriter(str(checkpoint / FOLDER), save_distributed=True))


def load_weights(model: Any, checkpoint: Path, trained_only: bool = False) -> None:
    """Put the weights of a shared-out checkpoint into a model, whole or shared out; arguments as for `save`.

    Raises:
        SetupError: When the tensors are not those of the model.
    """
    sharding.free(model)
    state = _weights(model, trained_only)
    known = {name: size for name, size in _sizes(checkpoint).items() if name.startswith(_WEIGHTS)}
    wrong = sorted(known.keys() ^ state.keys()) or [name for name, one in state.items() if one.shape != known[name]]
    if wrong:
        named = wrong[0].removeprefix(_WEIGHTS)
        raise SetupError(f"{checkpoint}: does not hold the model's tensors: {named} ({len(wrong)} such tensors)")
    _read(state, checkpoint)


def load_optimizer(model: Any, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Put a checkpoint's state into a new optimizer of the model; either side may be shared out.

    The groups' rates are not part of it: they follow from the schedule.
    """
    sharding.free(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    if is_in(checkpoint):
        state = _from_parts(model, checkpoint)
    else:
        saved = torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location="cpu", mmap=True)["state"]
        state = {ordered[index]: values for index, values in saved.items()}
    if not sharding.is_shared(model):
        # By the optimizer's own way: one of ours may keep its moments in another form.
        by_index = {index: state[name] for index, name in enumerate(ordered) if name in state}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": by_index})
        return
    parameters = dict(model.named_parameters())
    for name, values in state.items():
        optimizer.state[parameters[name]] = {kind: _placed(one, parameters[name]) for kind, one in values.items()}


def put_together(model: Any) -> dict[str, torch.Tensor]:
    """The whole tensors of a shared-out model on the first process's host, tensor by tensor; nothing in the others.

    Names that are tied have the same tensor, as in the model: it is saved once.
    """
    sharding.free(model)
    is_first, found, of = torch.distributed.get_rank() == 0, dict[str, torch.Tensor](), dict[int, str]()
    for name, values in model.state_dict(keep_vars=True).items():
        if (tied := of.setdefault(id(values), name)) != name:
            found |= {name: found[tied]} if is_first else {}
            continue
        one = sharding.whole(values.detach())
        if is_first:
            found[name] = one.cpu()
    return found


def _placed(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Whole values of a file, or those that are placed already, as the parameter is; numbers stay as they are."""
    if hasattr(value, "placements"):
        return value
    return sharding.like(value, parameter).clone() if value.shape == parameter.shape else value.clone()


def _from_parts(model: Any, checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    """By parameter and kind, what this process needs."""
    known, state = _sizes(checkpoint), dict[str, torch.Tensor]()
    for name, parameter in model.named_parameters():
        for key in (key for key in known if key.startswith(f"{_OPTIMIZER}{name}.")):
            if "." not in key.removeprefix(f"{_OPTIMIZER}{name}."):
                is_like = known[key] == parameter.shape
                state[key] = torch.empty_like(parameter.detach()) if is_like else torch.empty(known[key])
    _read(state, checkpoint)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        name, _, kind = key.removeprefix(_OPTIMIZER).rpartition(".")
        found.setdefault(name, {})[kind] = value.reshape(()) if kind == "step" else value
    return found


def _read(state: Mapping[str, torch.Tensor], checkpoint: Path) -> None:
    """Fill these tensors; where no processes were started, by this one alone."""
    reader = HuggingFaceStorageReader(str(checkpoint / FOLDER))
    alone = not torch.distributed.is_initialized()
    load(dict(state), storage_reader=reader, no_dist=alone)


def _sizes(checkpoint: Path) -> dict[str, torch.Size]:
    """Name to size of each tensor in the files."""
    metadata = HuggingFaceStorageReader(str(checkpoint / FOLDER)).read_metadata()
    return {name: one.size for name, one in metadata.state_dict_metadata.items() if hasattr(one, "size")}


def _weights(model: Any, trained_only: bool) -> dict[str, torch.Tensor]:
    """Each parameter once, however it is tied, and the buffers that are saved, by their names in the files."""
    found: dict[str, torch.Tensor] = dict(methods.trained(model) if trained_only else model.named_parameters())
    if not trained_only:
        kept = model.state_dict().keys()
        found |= {name: one for name, one in model.named_buffers() if name in kept}
    return {f"{_WEIGHTS}{name}": one.detach() for name, one in found.items()}
