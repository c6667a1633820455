from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import PreTrainedModel
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


@torch.no_grad()
def save_in_parts(model: PreTrainedModel, folder: Path, read: Callable[[str], torch.Tensor]) -> None:
    """Save a model with the parameters' values that `read` returns by name, one file's tensors at a time."""
    parameters, tensors = dict(model.named_parameters()), tensors_to_save(model)
    model.save_pretrained(folder, state_dict={})  # config and generation config
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    write_safetensors(folder, shapes, lambda name: read(name) if name in parameters else tensors[name], FILE_BYTES)
