"""Checkpoints of sharded models, which any world size can read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from fulltune import methods
from fulltune.errors import SetupError
from fulltune.models import sharding
from fulltune.models.save import tensors_to_save
from fulltune.train.optim.optimizers import AdamW, to_torch_state

FOLDER = "shared"
MIN_FILE_BYTES, MAX_FILES = 2**24, 64
WEIGHTS = "weights."
OPTIMIZER = "optimizer."


def is_sharded_checkpoint(checkpoint: Path) -> bool:
    return (checkpoint / FOLDER).is_dir()


def save_sharded_checkpoint(
    model: PreTrainedModel, other_tensors: Mapping[str, torch.Tensor], checkpoint: Path, trained_only: bool = False
) -> None:
    """Write this rank's shards of the model's weights and of `other_tensors`; all ranks must call this."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_parts

    state = {**_weights_by_key(model, trained_only), **other_tensors}
    writer = HuggingFaceStorageWriter(str(checkpoint / FOLDER), _assign_files(state), save_distributed=True)
    save_parts(state, storage_writer=writer)


def _assign_files(state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return a file number for each tensor, so that files stay below a size limit."""
    sizes = {name: sharding.local_tensor(values).nbytes for name, values in state.items()}
    limit = max(MIN_FILE_BYTES, sum(sizes.values()) // MAX_FILES)
    number, file_size, files = 1, 0, dict[str, int]()
    for name, size in sizes.items():
        if file_size and file_size + size > limit:
            number, file_size = number + 1, 0
        files[name], file_size = number, file_size + size
    return files


def load_weights(model: PreTrainedModel, checkpoint: Path, trained_only: bool = False) -> None:
    """Load a sharded checkpoint's weights into a sharded or unsharded model; raise `SetupError` if tensors differ."""
    state = _weights_by_key(model, trained_only)
    sizes = {name: size for name, (size, _) in tensor_types(checkpoint).items() if name.startswith(WEIGHTS)}
    other_shape = [name for name, tensor in state.items() if tensor.shape != sizes.get(name, tensor.shape)]
    if mismatched := sorted(sizes.keys() ^ state.keys()) or other_shape:
        name, count = mismatched[0].removeprefix(WEIGHTS), len(mismatched)
        raise SetupError(f"{checkpoint}: its tensors differ from the model's, for example {name} ({count} in all)")
    read_into_tensors(state, checkpoint)


def read_into_tensors(state: Mapping[str, torch.Tensor], checkpoint: Path) -> None:
    """Fill tensors in place from a sharded checkpoint; if they are sharded, all ranks must call this."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(checkpoint / FOLDER))
    is_sharded = any(hasattr(tensor, "placements") for tensor in state.values())
    load(dict(state), storage_reader=reader, no_dist=not is_sharded)


def tensor_types(checkpoint: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the shape and dtype of each tensor in a sharded checkpoint, by checkpoint key."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = HuggingFaceStorageReader(str(checkpoint / FOLDER)).read_metadata().state_dict_metadata
    tensors = {name: entry for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}
    return {name: (entry.size, entry.properties.dtype) for name, entry in tensors.items()}


def _weights_by_key(model: PreTrainedModel, trained_only: bool) -> dict[str, torch.Tensor]:
    """Return the parameters (tied ones once) and saved buffers, or only trained parameters, by checkpoint key."""
    sharding.free_gathered_weights(model)
    tensors = methods.trainable_parameters(model) if trained_only else tensors_to_save(model)
    return {f"{WEIGHTS}{name}": tensor.detach() for name, tensor in tensors.items()}


# ---- the optimizer's state ----------------------------------------------------------------------------------------


def sharded_optimizer_state(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return a sharded model's optimizer state by checkpoint key, with each tensor sharded like its parameter."""
    sharding.free_gathered_weights(model)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        state: dict[str, torch.Tensor] = optimizer.state.get(parameter, {})
        if state and isinstance(optimizer, AdamW):
            local = to_torch_state(state, sharding.local_tensor(parameter).shape)
            state = {
                kind: v if kind == "step" else sharding.dtensor_from_shard(v, parameter) for kind, v in local.items()
            }
        for kind, value in state.items():
            # A sharded file identifies shards by offsets, and a scalar has none.
            tensors[f"{OPTIMIZER}{name}.{kind}"] = value.reshape(1) if value.dim() == 0 else value
    return tensors


def load_optimizer(model: PreTrainedModel, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Load a checkpoint's optimizer state, sharded or not, into a new optimizer, which keeps its learning rates."""
    sharding.free_gathered_weights(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    if is_sharded_checkpoint(checkpoint):
        state = _read_sharded_state(model, checkpoint)
    else:
        saved = torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location="cpu", mmap=True)["state"]
        state = {ordered[index]: values for index, values in saved.items()}
    if sharding.is_fsdp2_sharded(model):
        parameters = dict(model.named_parameters())
        state = {name: _shard_optimizer_state(values, parameters[name]) for name, values in state.items()}
        if isinstance(optimizer, AdamW):
            for name, values in state.items():
                local = {kind: sharding.local_tensor(value) for kind, value in values.items()}
                optimizer.load_parameter_state(local, parameters[name])
            return
    # The optimizer loads the state: it may store moments in another format, or steps on the device.
    by_index = {index: state[name] for index, name in enumerate(ordered) if name in state}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": by_index})


def _shard_optimizer_state(values: dict[str, torch.Tensor], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a parameter's state with unsharded tensors sharded like the parameter."""
    if "exp_avg" in values and values["exp_avg"].shape != parameter.shape:  # fulltune's AdamW, unsharded
        values = to_torch_state(values, parameter.shape)
    placed = {}
    for kind, value in values.items():
        is_whole = value.shape == parameter.shape and not hasattr(value, "placements")
        # A copy, out of the mapped file.
        placed[kind] = sharding.shard_like(value, parameter).clone() if is_whole else value
    return placed


def _read_sharded_state(model: PreTrainedModel, checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Read this rank's optimizer state in the saved dtypes: {parameter name: {state name: tensor}}."""
    parameters, state = dict(model.named_parameters()), dict[str, torch.Tensor]()
    for key, (size, dtype) in tensor_types(checkpoint).items():
        if key.startswith(OPTIMIZER):
            parameter = parameters[key.removeprefix(OPTIMIZER).rpartition(".")[0]].detach()
            has_same_shape = size == parameter.shape
            state[key] = torch.empty_like(parameter, dtype=dtype) if has_same_shape else torch.empty(size)
    read_into_tensors(state, checkpoint)
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        name, _, kind = key.removeprefix(OPTIMIZER).rpartition(".")
        by_name.setdefault(name, {})[kind] = value.reshape(()) if kind == "step" else value
    return by_name
