from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from fulltune.files import write_json
from fulltune.models import sharding

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
        on_writer.clear()  # before the next file's tensors are read
    if is_writer and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)


@torch.no_grad()
def save_in_parts(
    model: PreTrainedModel,
    folder: Path,
    read: Callable[[str], torch.Tensor],
    *,
    original_format: bool = True,
    is_writer: bool = True,
    in_fp32: bool = False,
) -> None:
    """Save a model with the parameters' values that `read` returns by name, one file's tensors at a time. All ranks
    must call this if `read` gathers; `in_fp32` is True if it converts to fp32."""
    sharding.free_gathered_weights(model)
    parameters, tensors = dict(model.named_parameters()), tensors_to_save(model)
    if is_writer:
        model.save_pretrained(folder, state_dict={})  # config and generation config
    shapes = {
        name: torch.empty(
            getattr(tensor, "ds_shape", tensor.shape),
            dtype=torch.float32 if in_fp32 and tensor.is_floating_point() else tensor.dtype,
            device="meta",
        )
        for name, tensor in tensors.items()
    }
    converted = {name: revert_weight_conversion(model, {name: one}) for name, one in shapes.items()}
    names = {key: name for name in converted for key in converted[name]}
    # If it would compute tensors from several ones, all keep their names, which transformers reads too.
    is_apart = original_format and sum(map(len, converted.values())) == len(names)
    is_apart = is_apart and names.keys() == revert_weight_conversion(model, shapes).keys()
    if not is_apart:
        converted, names = {name: {name: one} for name, one in shapes.items()}, {name: name for name in shapes}

    @lru_cache(1)  # what becomes of one tensor, such as a layer's experts, is written together
    def parts(name: str) -> Mapping[str, torch.Tensor]:
        values = {name: read(name) if name in parameters else tensors[name]}
        return revert_weight_conversion(model, values) if is_apart else values

    keyed = {key: one for by_key in converted.values() for key, one in by_key.items()}
    write_safetensors(folder, keyed, lambda key: parts(names[key])[key], FILE_BYTES, is_writer)
