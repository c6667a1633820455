from __future__ import annotations

import copy
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from fulltune.errors import DoesNotFitError, SetupError
from fulltune.models.base import Base
from fulltune.models.load import HeadOrigin, find_label_axes, load_model, torch_dtype
from fulltune.models.shapes import measure_shapes
from fulltune.stream.executor import Executor, install
from fulltune.stream.files import JoinedTensor, ReadAhead, StoredTensor, tensors_in_files
from fulltune.stream.units import find_units, placeholder, use_placeholders
from fulltune.system.hardware import total_and_free_memory
from fulltune.system.memory import status_bytes
from fulltune.text import format_bytes

_log = logging.getLogger(__name__)
_NOT_FOR_GENERATION = ("generation_config", "from_auto_class", "from_pipeline", "cache_dir", "proxies", "token")
_INITIALISED = "_is_hf_initialized"


@dataclass(frozen=True)
class Skeleton:
    """A model whose parameters are placeholders, and where their values are."""

    model: PreTrainedModel
    stored: Mapping[str, StoredTensor | JoinedTensor]
    """By parameter; empty for random weights."""
    new: Mapping[str, torch.Tensor]
    """Values of parameters that the files lack, or have for labels in another order."""

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return parameters' values in the model's data type."""
        if not self.stored:
            return draw(self.model, tuple(names))
        dtypes = {name: self.model.get_parameter(name).dtype for name in names}
        return {
            name: self.new[name] if name in self.new else self.stored[name].read().to(dtype)
            for name, dtype in dtypes.items()
        }


def skeleton(
    base: Base,
    config_changes: Mapping[str, object],
    *,
    head_is_new: bool,
    on_head: Callable[[HeadOrigin], None] = lambda head: None,
) -> Skeleton:
    """Load a model as `load_model` does, with the same random state afterwards, but without weights. With
    `model.random_weights`, no file is read and no head is new."""
    if base.new_tokens:
        raise SetupError(f"model.new_tokens: {base.block.name} cannot be streamed with new tokens; save it with them")
    stored = dict[str, StoredTensor | JoinedTensor]()
    reorders = head_is_new and "id2label" in config_changes

    def from_placeholders(
        config: PretrainedConfig, dtype: torch.dtype, **keywords: object
    ) -> tuple[PreTrainedModel, Mapping[str, object]]:
        name, revision = str(keywords.pop("pretrained_model_name_or_path")), keywords.pop("revision", None)
        own_code = keywords.pop("trust_remote_code")
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            empty = base.auto_model_class.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=own_code)
        parameters = dict(empty.named_parameters(remove_duplicate=False))
        state = {name: placeholder(one.shape, one.dtype) for name, one in empty.named_parameters()}
        if not base.block.random_weights:
            stored.update(tensors_in_files(base, empty))
            state = {
                name: placeholder(tensor.shape, parameters[name].dtype) if name in parameters else tensor.read()
                for name, tensor in stored.items()
            }
        del keywords["use_safetensors"]
        # transformers maps, ties and initialises placeholders as it would the weights in the files.
        model, info = type(empty).from_pretrained(None, config=config, dtype=dtype, state_dict=state, **keywords)
        for mismatched, *_ in info["mismatched_keys"]:
            del stored[mismatched]
        for rows in (find_label_axes(model).keys() if reorders else set()) & stored.keys():
            model.get_parameter(rows).data = stored.pop(rows).read().to(dtype)
        vars(model)["_weight_conversions"] = getattr(empty, "_weight_conversions", None)
        model.name_or_path = model.config.name_or_path = name
        if model.can_generate():
            where = {"pretrained_model_name_or_path": name, "revision": revision, "subfolder": ""}
            where |= {"force_download": False, "local_files_only": False, "trust_remote_code": own_code}
            model.adjust_generation_fn(**dict.fromkeys(_NOT_FOR_GENERATION), **where)
        return model, info

    head_is_new = head_is_new and not base.block.random_weights
    model = load_model(base, config_changes, head_is_new=head_is_new, on_head=on_head, loader=from_placeholders)
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    aliases = {name: first_names[id(one)] for name, one in model.named_parameters(remove_duplicate=False)}
    by_parameter = {aliases[name]: tensor for name, tensor in stored.items() if name in aliases}
    new = {name: one.data for name, one in model.named_parameters() if stored and name not in by_parameter}
    use_placeholders(model)
    return Skeleton(model, by_parameter, new)


def draw(model: PreTrainedModel, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Return initial values of parameters as transformers draws them, which depend on nothing but these names."""
    parameters = dict(model.named_parameters())
    absent = {name: parameters[name].data for name in names}
    for name, parameter in parameters.items():
        vars(parameter)[_INITIALISED] = name not in absent
        if name in absent:
            parameter.data = torch.zeros(parameter.shape, dtype=parameter.dtype)
    for module in model.modules():
        vars(module).pop(_INITIALISED, None)
    for target in model.all_tied_weights_keys:  # or a head would be drawn over the embedding
        tied = model.get_submodule(target.rpartition(".")[0])
        vars(tied)[_INITIALISED] = len(list(tied.parameters(recurse=False))) == 1
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(zlib.crc32(f"{names[:1]}".encode()))
        model.initialize_weights()
    values = {name: parameters[name].data for name in names}
    for name, nothing in absent.items():
        parameters[name].data = nothing
    return values


def load_within(
    base: Base,
    config_changes: Mapping[str, object],
    *,
    head_is_new: bool,
    device: str = "cpu",
    memory_limit: int | None = None,
) -> PreTrainedModel:
    """Load a model onto a device if its weights take at most 80 % of what is free or what this process, within
    `memory_limit` bytes, may still take. Otherwise its weights are read from their files in each pass."""
    free = total_and_free_memory()[1]
    if memory_limit is not None:
        free = min(free, memory_limit - status_bytes("VmRSS"))
    if device == "cuda":
        free = min(free, torch.cuda.mem_get_info()[0])
    with torch.random.fork_rng(devices=[]):
        count = measure_shapes(base, config_changes).num_parameters
    needed = count * torch_dtype(base.block.weights_dtype).itemsize
    if needed <= 0.8 * free and not base.block.random_weights:
        return load_model(base, config_changes, head_is_new=head_is_new).to(device)  # type: ignore[arg-type]  # wrapped
    sizes = f"the weights take {format_bytes(needed)} and {format_bytes(max(0, free))} of memory are free"
    try:
        source = skeleton(base, config_changes, head_is_new=head_is_new)
        model, units = source.model, find_units(source.model)
    except SetupError as error:
        raise DoesNotFitError(f"model: {base.block.name}: {sizes}, but they cannot be streamed: {error}") from None
    if source.stored:
        _log.warning("model: %s: %s, so they are read from the disk in each pass", base.block.name, sizes)
    streamed, parameters = units, dict(model.named_parameters())
    if model.get_output_embeddings() is None:  # head and pooler are small, and a probe may replace them
        body = re.compile(rf"{model.base_model_prefix}\.(?!pooler)")
        streamed = tuple(unit for unit in units if body.match(unit.path))
    use_placeholders(model, device)
    for unit in set(units) - set(streamed):
        for name, values in source.read(unit.names).items():
            parameters[name].data = values.to(device)
    install(model, Executor(model, streamed, ReadAhead(lambda unit: source.read(streamed[unit].names))))
    return model
