from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from fulltune.errors import SetupError
from fulltune.models.base import Base, check_weights, read_json_object

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
_DIGEST_VALUES = 1024


@dataclass(frozen=True)
class StoredTensor:
    """Place of a tensor in a safetensors file."""

    file: Path
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> torch.Tensor:
        """Read the tensor into new memory, so that no page of the file stays in memory."""
        values = torch.empty(self.shape, dtype=self.dtype)
        with self.file.open("rb") as stream:
            stream.seek(self.begin)
            if stream.readinto(values.reshape(-1).view(torch.uint8).numpy().data) < values.nbytes:
                raise SetupError(f"{self.file}: the file ended while it was read; copy or download it again")
        return values


@dataclass(frozen=True)
class JoinedTensor:
    """A tensor that transformers computes from several `parts` in the files: by key, what matched it and its tensor."""

    name: str
    shape: tuple[int, ...]
    converter: WeightConverter
    model: PreTrainedModel
    parts: dict[str, tuple[str, StoredTensor]] = field(default_factory=dict)

    def read(self) -> torch.Tensor:
        converter = copy.deepcopy(self.converter)
        for key, (pattern, part) in self.parts.items():
            converter.add_tensor(self.name, key, pattern, part.read())  # type: ignore[arg-type]  # no future is needed
        [values] = converter.convert(self.name, model=self.model, config=self.model.config).values()
        return values[0] if isinstance(values, list) else values


def files_digest(tensors: Mapping[str, StoredTensor | JoinedTensor]) -> str:
    """Return a hash of tensors' names, types and shapes, and of each tensor's first values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        for part in [tensor] if isinstance(tensor, StoredTensor) else (part for _, part in tensor.parts.values()):
            first = replace(part, shape=(min(_DIGEST_VALUES, math.prod(part.shape)),)).read()
            digest.update(f"{name} {part.dtype} {part.shape}".encode() + first.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def tensors_in_files(base: Base, empty: PreTrainedModel) -> dict[str, StoredTensor | JoinedTensor]:
    """Find a model's parameters and buffers in its safetensors by their names in `empty`, the model on the meta device,
    or raise `SetupError` if they cannot be read one by one."""
    conversions, expected = get_model_conversion_mapping(empty), empty.state_dict()
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    tensors = dict[str, StoredTensor | JoinedTensor]()
    for key, tensor in sorted(read_headers(base).items(), key=lambda item: dot_natural_key(item[0])):
        name, pattern = rename_source_key(key, renamings, converters, empty.base_model_prefix, expected)
        if name not in expected and key in expected:
            name, pattern = key, None
        if name in expected and pattern is not None:
            if len(by_pattern[pattern].target_patterns) > 1:
                advice = "save the model once with save_pretrained(folder, save_original_format=False)"
                raise _refused(base, f"transformers computes several tensors from {key}; {advice}")
            joined = JoinedTensor(name, tuple(expected[name].shape), by_pattern[pattern], empty)
            cast("JoinedTensor", tensors.setdefault(name, joined)).parts[key] = pattern, tensor
        elif name in expected:
            tensors[name] = tensor
    # What transformers keeps for saving.
    vars(empty)["_weight_conversions"] = [entry for entry in conversions if entry.was_used()]
    for target, origin in empty.all_tied_weights_keys.items():
        # As in transformers, weights that the files have twice are tied only if they are equal.
        if target in tensors and origin in tensors and torch.equal(tensors[target].read(), tensors[origin].read()):
            del tensors[target]
    return tensors


def read_headers(base: Base) -> dict[str, StoredTensor]:
    """Return all tensors of a model's safetensors by key, or raise `SetupError` if the model has others."""
    if getattr(base.config, "quantization_config", None) is not None or (base.path and base.path.is_file()):
        raise _refused(base, "quantized weights and GGUF files cannot be read in parts; use the model's plain weights")
    check_weights(base)
    locate = partial(cached_file, revision=base.block.revision, _raise_exceptions_for_missing_entries=False)
    where, names, tensors = str(base.path or base.block.name), [SAFE_WEIGHTS_NAME], dict[str, StoredTensor]()
    if not locate(where, SAFE_WEIGHTS_NAME) and (index := locate(where, SAFE_WEIGHTS_INDEX_NAME)):
        names = sorted(set(read_json_object(Path(index))["weight_map"].values()))
    for name in names:
        if (file := locate(where, name)) is None:
            raise _refused(base, f"there is no {name}; load the model once and save it with save_pretrained")
        with Path(file).open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        for key, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise _refused(base, f"{key} in {name} has type {entry['dtype']}; use the model's plain weights")
            begin = 8 + size + entry["data_offsets"][0]
            tensors[key] = StoredTensor(Path(file), begin, tuple(entry["shape"]), _DTYPES[entry["dtype"]])
    return tensors


def _refused(base: Base, why: str) -> SetupError:
    return SetupError(f"model: {base.block.name}: the weights cannot be streamed from their files: {why}")


class ReadAhead:
    """Provides units' weights to a model that runs forward only: reads them in the background, and keeps at most two
    units."""

    def __init__(self, read: Callable[[int], Mapping[str, torch.Tensor]]) -> None:
        self._read = read
        self._pool = ThreadPoolExecutor(1)
        self._units: dict[int, Future[Mapping[str, torch.Tensor]]] = {}
        self._in_use: set[int] = set()

    def prefetch(self, unit: int) -> None:
        """Begin to read a unit, unless two are in memory."""
        if unit not in self._units and len(self._units) < 2:
            self._units[unit] = self._pool.submit(self._read, unit)

    def weights(self, unit: int) -> Mapping[str, torch.Tensor]:
        """Return a unit's weights, which are in memory until `release`."""
        if unit not in self._units:
            for unused in self._units.keys() - self._in_use:
                self._units.pop(unused).exception()  # waits, so that a third unit is not read beside two
            self._units[unit] = self._pool.submit(self._read, unit)
        self._in_use.add(unit)
        return self._units[unit].result()

    def release(self, unit: int) -> None:
        """Free a unit's weights."""
        self._units.pop(unit, None)
        self._in_use.discard(unit)
