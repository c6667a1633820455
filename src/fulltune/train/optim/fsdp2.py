"""What FSDP2 shares out, in checkpoints and in the finished model: each process writes its part of the tensors, and any
number of processes reads them, sharded or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from fulltune import methods
from fulltune.errors import SetupError
from fulltune.files import write_json
from fulltune.models import sharding
from fulltune.train.optim.optimizers import AdamW, in_fp32

FOLDER = "shared"
"""In a checkpoint, of one whose tensors were shared out."""
WHOLE = "model.safetensors"
FILE_BYTES, MOST_FILES = 2**24, 64
"""Least bytes of a file, and most files of a process: each is put together in memory, twice (torch 2.13's writer and
safetensors), which of all tensors at once would be twice the process's part of weights and optimizer state."""
WEIGHTS = "weights."
OPTIMIZER = "optimizer."
"""Before a parameter's name, and `.step` or another kind after it."""
WHOLE_FILE_BYTES = 2**28
"""Most bytes of a file with whole tensors, unless one tensor has more."""


def is_in(checkpoint: Path) -> bool:
    """Whether a checkpoint was written by processes that shared out its tensors."""
    return (checkpoint / FOLDER).is_dir()


def save(model: Any, others: Mapping[str, torch.Tensor], checkpoint: Path, trained_only: bool = False) -> None:
    """Write each process's part of a sharded model's weights and of further tensors; all processes call it."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_parts

    state = {**_weights(model, trained_only), **others}
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


def load_weights(model: Any, checkpoint: Path, trained_only: bool = False) -> None:
    """Put a sharded checkpoint's weights into a model, whole or sharded; SetupError when they are not the model's."""
    state = _weights(model, trained_only)
    known = {name: size for name, (size, _) in kinds(checkpoint).items() if name.startswith(WEIGHTS)}
    wrong = sorted(known.keys() ^ state.keys()) or [name for name, one in state.items() if one.shape != known[name]]
    if wrong:
        named = wrong[0].removeprefix(WEIGHTS)
        raise SetupError(f"{checkpoint}: its tensors are not those of the model: {named} ({len(wrong)} such tensors)")
    read(state, checkpoint)


def read(state: Mapping[str, torch.Tensor], checkpoint: Path) -> None:
    """Fill tensors from a sharded checkpoint: sharded ones by all processes together, whole ones by each alone."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(checkpoint / FOLDER))
    together = any(hasattr(one, "placements") for one in state.values())
    load(dict(state), storage_reader=reader, no_dist=not together)


def kinds(checkpoint: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name to size and type of each tensor in the files."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = HuggingFaceStorageReader(str(checkpoint / FOLDER)).read_metadata().state_dict_metadata
    return {
        name: (one.size, one.properties.dtype) for name, one in found.items() if isinstance(one, TensorStorageMetadata)
    }


def write_whole(model: Any, folder: Path, most_bytes: int = WHOLE_FILE_BYTES) -> None:
    """Write a sharded model's weights as plain safetensors; all processes call it."""
    tensors = {name.removeprefix(WEIGHTS): one for name, one in _weights(model, trained_only=False).items()}
    shapes = {name: torch.empty(one.shape, dtype=one.dtype, device="meta") for name, one in tensors.items()}
    write_by_file(shapes, lambda name: sharding.whole(tensors[name]), folder, most_bytes)


def write_by_file(
    shapes: Mapping[str, torch.Tensor],
    whole: Callable[[str], torch.Tensor],
    folder: Path,
    most_bytes: int = WHOLE_FILE_BYTES,
) -> None:
    """Write plain safetensors with an index while no process holds more than a file's tensors, of which `shapes` has
    those without values; all processes call it."""
    split = split_torch_state_dict_into_shards(dict(shapes), max_shard_size=most_bytes)
    for file, names in split.filename_to_tensors.items():
        each = ((name, whole(name)) for name in names)
        tensors = {name: one.detach().cpu().contiguous() for name, one in each if is_first()}
        if is_first():
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if is_first() and split.is_sharded:
        write_json(folder / f"{WHOLE}.index.json", {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def is_first() -> bool:
    """Whether this is the first of the processes."""
    return torch.distributed.get_rank() == 0


def whole_state(model: Any, whole: Callable[[Any], torch.Tensor] = sharding.whole) -> dict[str, torch.Tensor]:
    """The whole tensors of a sharded model on the first process's host, tied ones once; nothing in the others."""
    sharding.free(model)
    found: dict[str, torch.Tensor] = {}
    first_name: dict[int, str] = {}
    for name, values in model.state_dict(keep_vars=True).items():
        if (tied := first_name.setdefault(id(values), name)) != name:
            found |= {name: found[tied]} if is_first() else {}
            continue
        with torch.no_grad():
            one = whole(values)
        if is_first():
            found[name] = one.detach().cpu()
    return found


def _weights(model: Any, trained_only: bool) -> dict[str, torch.Tensor]:
    """Each parameter once, however it is tied, and the buffers that are saved, by their names in the files."""
    sharding.free(model)
    found: dict[str, torch.Tensor] = dict(methods.trained(model) if trained_only else model.named_parameters())
    if not trained_only:
        kept = model.state_dict().keys()
        found |= {name: one for name, one in model.named_buffers() if name in kept}
    return {f"{WEIGHTS}{name}": one.detach() for name, one in found.items()}


# ---- the optimizer's state ----------------------------------------------------------------------------------------


def state_of(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state of a shared-out model's optimizer, by parameter and kind, each tensor placed as its parameter is."""
    sharding.free(model)
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        state: dict[str, torch.Tensor] = optimizer.state.get(parameter, {})
        if state and isinstance(optimizer, AdamW):
            held = in_fp32(state, sharding.local(parameter).shape)
            state = {kind: one if kind == "step" else sharding.part(one, parameter) for kind, one in held.items()}
        for kind, value in state.items():
            # A number of steps has no axis, and a file of parts tells them by their offsets.
            found[f"{OPTIMIZER}{name}.{kind}"] = value.reshape(1) if value.dim() == 0 else value
    return found


def load_optimizer(model: Any, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Put a checkpoint's state into a new optimizer of the model, sharded or not; rates follow from the schedule."""
    sharding.free(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    if is_in(checkpoint):
        state = _from_parts(model, checkpoint)
    else:
        saved = torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location="cpu", mmap=True)["state"]
        state = {ordered[index]: values for index, values in saved.items()}
    if sharding.is_shared(model):
        parameters = dict(model.named_parameters())
        state = {name: _parts_of(values, parameters[name]) for name, values in state.items()}
        if isinstance(optimizer, AdamW):
            for name, values in state.items():
                optimizer.take_over({kind: sharding.local(one) for kind, one in values.items()}, parameters[name])
            return
    # By the optimizer's own way: one of ours may keep its moments in another form, others want steps on the device.
    by_index = {index: state[name] for index, name in enumerate(ordered) if name in state}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": by_index})


def _parts_of(values: dict[str, torch.Tensor], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """A parameter's state, whole or in parts, placed as the parameter is; numbers stay as they are."""
    if "exp_avg" in values and values["exp_avg"].shape != parameter.shape:  # of one of ours, as one process keeps it
        values = in_fp32(values, parameter.shape)
    placed = {}
    for kind, one in values.items():
        is_whole = one.shape == parameter.shape and not hasattr(one, "placements")
        placed[kind] = sharding.like(one, parameter).clone() if is_whole else one  # not in the file's own memory
    return placed


def _from_parts(model: Any, checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    """By parameter and kind, what this process needs: a moment of a 16-bit weight may be fp32."""
    parameters, state = dict(model.named_parameters()), dict[str, torch.Tensor]()
    for key, (size, dtype) in kinds(checkpoint).items():
        if key.startswith(OPTIMIZER):
            parameter = parameters[key.removeprefix(OPTIMIZER).rpartition(".")[0]].detach()
            is_like = size == parameter.shape
            state[key] = torch.empty_like(parameter, dtype=dtype) if is_like else torch.empty(size)
    read(state, checkpoint)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        name, _, kind = key.removeprefix(OPTIMIZER).rpartition(".")
        found.setdefault(name, {})[kind] = value.reshape(()) if kind == "step" else value
    return found
