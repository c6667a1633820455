from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from fulltune.files import write_json

FILE_BYTES = 2**28


def tensors_to_save(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the parameters, tied ones once, and the saved buffers."""
    saved = model.state_dict().keys()
    return {**dict(model.named_parameters()), **{name: one for name, one in model.named_buffers() if name in saved}}


def write_safetensors(
    folder: Path,
    shapes: Mapping[str, torch.Tensor],
    read: Callable[[str], torch.Tensor],
    file_bytes: int,
    is_writer: bool = True,
) -> None:
    """Write tensors, which `read` returns by name, with those of one file in memory at a time. All ranks must call this
    if `read` gathers; `shapes` are on the meta device."""
    split = split_torch_state_dict_into_shards(dict(shapes), max_shard_size=file_bytes)
    for file, names in split.filename_to_tensors.items():
        values = ((name, read(name)) for name in names)
        on_writer = {name: tensor.cpu().contiguous() for name, tensor in values if is_writer}
        if is_writer:
            save_file(on_writer, folder / file, metadata={"format": "pt"})
    if is_writer and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)


def names_by_key(model: PreTrainedModel) -> dict[str, str]:
    """Return the name of each saved tensor by its key in files, as `save_pretrained` chooses it."""
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors_to_save(model).items()}
    names = {id(tensor): name for name, tensor in shapes.items()}
    keys = {key: names.get(id(tensor), "") for key, tensor in revert_weight_conversion(model, shapes).items()}
    # If it would compute tensors from several ones, all keep their names, which transformers reads too.
    return keys if all(keys.values()) else {name: name for name in shapes}


@torch.no_grad()
def save_in_parts(model: PreTrainedModel, folder: Path, read: Callable[[str], torch.Tensor]) -> None:
    """Save a model with the parameters' values that `read` returns by name, one file's tensors at a time."""
    parameters, tensors, names = dict(model.named_parameters()), tensors_to_save(model), names_by_key(model)
    model.save_pretrained(folder, state_dict={})  # config and generation config
    shapes = {key: torch.empty_like(tensors[name], device="meta") for key, name in names.items()}

    def values(key: str) -> torch.Tensor:
        return read(names[key]) if names[key] in parameters else tensors[names[key]]

    write_safetensors(folder, shapes, values, FILE_BYTES)
