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

from fulltune.errors import SetupError
from fulltune.models import sharding

FOLDER = "shared"
"""In a checkpoint, of one whose tensors were shared out."""
_WEIGHTS, _OPTIMIZER = "weights.", "optimizer."
FILE_BYTES, MOST_FILES = 2**24, 64
"""Least bytes of a file, and most files of a process: each is put together in memory, twice (torch 2.13's writer and
safetensors), which of all tensors at once would be twice the process's part of weights and optimizer state."""


def is_in(checkpoint: Path) -> bool:
    """Whether a checkpoint was written by processes that shared out its tensors."""
    return (checkpoint / FOLDER).is_dir()


def save(model: Any, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Write what each process holds; all of them call it."""
    sharding.free(model)
    state: dict[str, torch.Tensor] = {f"{_WEIGHTS}{name}": one.detach() for name, one in _tensors(model).items()}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            # A number of steps has no axis, and a file of parts tells them by their offsets.
            state[f"{_OPTIMIZER}{name}.{kind}"] = value.reshape(1) if value.dim() == 0 else value
    writer = HuggingFaceStorageWriter(str(checkpoint / FOLDER), _files(state), save_distributed=True)
    save_parts(state, storage_writer=writer)


def _files(state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Which file each tensor is written into, the first being 1: as many as keep the files small."""
    sizes = {name: sharding.local(values).nbytes for name, values in state.items()}
    most = max(FILE_BYTES, sum(sizes.values()) // MOST_FILES)
    number, size, found = 1, 0, dict[str, int]()
    for name, mine in sizes.items():
        if size and size + mine > most:
            number, size = number + 1, 0
        found[name], size = number, size + mine
    return found


def load_weights(model: Any, checkpoint: Path) -> None:
    """Put the weights of a shared-out checkpoint into a model, whole or shared out.

    Raises:
        SetupError: When the tensors are not those of the model.
    """
    sharding.free(model)
    state = {f"{_WEIGHTS}{name}": one.detach() for name, one in _tensors(model).items()}
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
    """The whole tensors of a shared-out model on the first process's host, tensor by tensor; nothing in the others."""
    sharding.free(model)
    is_first, found = torch.distributed.get_rank() == 0, dict[str, torch.Tensor]()
    for name, values in model.state_dict().items():
        one = sharding.whole(values)
        if is_first:
            found[name] = one.cpu()
    return found


def _placed(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Whole values, or those that are placed already, as the parameter is; numbers stay as they are."""
    is_part = hasattr(value, "placements")
    return value if is_part or value.shape != parameter.shape else sharding.like(value, parameter)


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


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    """Each parameter once, whatever names it is tied to, and the buffers that are saved."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters())
    kept = model.state_dict().keys()
    return found | {name: one for name, one in model.named_buffers() if name in kept}
