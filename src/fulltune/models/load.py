from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulltune.errors import SetupError
from fulltune.models import new_tokens, sharding
from fulltune.models.base import Base, check_weights, from_pretrained_arguments, load_with_advice
from fulltune.models.experts import expert_modules
from fulltune.recipe.model import ModelBlock
from fulltune.text import first_few

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

_log = logging.getLogger(__name__)
_GENERIC = re.compile(r"LABEL_\d+")


@dataclass(frozen=True)
class HeadOrigin:
    """Where the weights of a model's head come from."""

    order: tuple[int | None, ...] | None
    """For each label, its row in the checkpoint's head or None for a new row; empty for a head without labels; None for
    a new head."""
    why: str
    missing: tuple[str, ...] = ()
    known_rows: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """By parameter, the rows of known labels, if other labels are new or dropped."""

    @property
    def has_new_rows(self) -> bool:
        return self.order is None or None in self.order

    @property
    def description(self) -> str:
        return f"new, randomly initialised: {self.why}" if self.order is None else f"kept from the checkpoint{self.why}"


_MISSING = HeadOrigin(None, "the checkpoint has no head for this task")
_AS_IT_IS = HeadOrigin((), "")


def load_model(
    base: Base,
    config_changes: Mapping[str, Any],
    *,
    head_is_new: bool,
    before_weights: Callable[[], None] = lambda: None,
    on_head: Callable[[HeadOrigin], None] = lambda head: None,
    num_ranks: int = 1,
    loader: Callable[..., tuple[PreTrainedModel, Mapping[str, object]]] | None = None,
) -> PreTrainedModel:
    """Load a model with the task's head, in `weights_dtype` and evaluation mode.

    Args:
        head_is_new: Initialise a head that the checkpoint lacks or has with other labels; if False, raise instead.
        before_weights: Called before the weights take memory.
        on_head: Called with the head's origin if `head_is_new`.
        num_ranks: Number of ranks that shard the weights; all must call this.
        loader: Called instead of `from_pretrained`, with its arguments.

    Raises:
        SetupError: The weights cannot be read, or parameters below the head are missing.
    """
    block = base.block
    if loader is None:
        check_weights(base)
    config = base.copy_config(config_changes, block.dropout)
    if base.new_tokens:
        config.get_text_config().vocab_size = base.config.get_text_config().vocab_size
    keywords = from_pretrained_arguments(block, base.path) | {
        "dtype": torch_dtype(block.weights_dtype),
        "config": config,
    }
    if block.attn_implementation:
        keywords["attn_implementation"] = block.attn_implementation
    # A head for other classes is replaced; tensors of the body with other shapes are refused below.
    keywords["ignore_mismatched_sizes"] = head_is_new
    if "gguf_file" not in keywords:
        keywords["use_safetensors"] = None if block.allow_pickled_weights else True
    if (module := type(config).__module__).startswith("transformers.models."):
        # Otherwise the model's code would be imported, and take memory, while weights are read.
        importlib.import_module(module.replace(".configuration_", ".modeling_"))
    if num_ranks > 1:
        shared, keywords["distributed_config"] = sharding.sharded_model_class(base.auto_model_class, config, num_ranks)
        loader = shared.from_pretrained
    load = loader or base.auto_model_class.from_pretrained
    before_weights()
    with _silenced_transformers():
        model, info = load_with_advice(block, "model", lambda: load(output_loading_info=True, **keywords))
    if loader is None and expert_modules(model):
        # Experts were put together from the file, which stays mapped as long as any other weight is a part of it.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    missing = _missing_parameters(model, info, block, head_is_new)
    if head_is_new:
        head = predict_head_origin(base.config, type(model).__name__, config_changes)
        if head.order and {*head.order} != {*range(len(base.config.id2label or ()))}:
            head = _read_known_rows(model, base, head)
        head = arrange_head(model, missing, head, "id2label" in config_changes)
        missing |= head.known_rows.keys()
        on_head(replace(head, missing=tuple(name for name, _ in model.named_parameters() if name in missing)))
    if base.new_tokens:
        new_tokens.add_to_model(model, base.new_tokens)
    _clear_gguf_attributes(model)
    return model


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype for "fp32" or "bf16"."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def _missing_parameters(
    model: PreTrainedModel, loading_info: Mapping[str, Any], block: ModelBlock, head_is_new: bool
) -> set[str]:
    """Return the parameters that the checkpoint lacks; raise `SetupError` unless all belong to a new head."""
    prefix = model.base_model_prefix
    missing = set(loading_info["missing_keys"]) | {key for key, *_ in loading_info.get("mismatched_keys", ())}
    body = {key for key in missing if key.startswith(f"{prefix}.") and not key.startswith(f"{prefix}.pooler")}
    refused = sorted(body if head_is_new else missing)
    if refused:
        raise SetupError(
            f"model: {block.name}: the weights do not fit {type(model).__name__}: {len(refused)} tensors are missing, "
            f"for example {refused[0]}; check that the model suits the task"
        )
    if missing:
        _log.info("weights initialised at random: %s", ", ".join(sorted(missing)))
    return missing


def _clear_gguf_attributes(model: PreTrainedModel) -> None:
    """Remove quantization attributes from a model loaded from GGUF; raise `SetupError` for other quantized models.

    transformers 5.24 refuses `save_pretrained` with these attributes. Delete this function once transformers
    removes them.
    """
    if getattr(getattr(model.config, "quantization_config", None), "quant_method", None) is None:
        return
    if model.config.quantization_config.quant_method != "gguf":
        raise SetupError(
            f"model: {model.name_or_path}: the model is quantized "
            f"({model.config.quantization_config.quant_method}), but full fine-tuning needs unquantized weights"
        )
    del model.config.quantization_config
    for mark in ("is_quantized", "quantization_method", "hf_quantizer"):
        if mark in vars(model):
            delattr(model, mark)


@contextlib.contextmanager
def _silenced_transformers() -> Iterator[None]:
    from transformers import logging as theirs

    verbosity, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(verbosity)
        if bars:
            theirs.enable_progress_bar()


# ---- the head of a checkpoint ----------------------------------------------------------------------------------


def predict_head_origin(
    checkpoint_config: PretrainedConfig, model_class: str, config_changes: Mapping[str, Any]
) -> HeadOrigin:
    """Predict from configs alone whether the checkpoint's head is kept, reordered or replaced."""
    if checkpoint_config.architectures and model_class not in checkpoint_config.architectures:
        return _MISSING
    if "id2label" not in config_changes:
        return _AS_IT_IS
    return head_origin_by_labels(
        _labels_by_row(checkpoint_config.id2label or {}), _labels_by_row(config_changes["id2label"])
    )


def _labels_by_row(id2label: Mapping[Any, str]) -> tuple[str, ...]:
    """Return label names sorted by row number, because a config file may have the order 0, 1, 10, 11, 2."""
    return tuple(id2label[row] for row in sorted(id2label, key=int))


def head_origin_by_labels(checkpoint_labels: tuple[str, ...], task_labels: tuple[str, ...]) -> HeadOrigin:
    """Return the origin of a head: labels keep the rows that have their names, unless generic names differ."""
    if len(checkpoint_labels) == len(task_labels) == 1:
        return HeadOrigin((0,), "")  # regression heads have one row
    known = set(checkpoint_labels) & set(task_labels)
    are_distinct = len(set(checkpoint_labels)) == len(checkpoint_labels)
    are_generic = all(_GENERIC.fullmatch(name) for name in checkpoint_labels)
    if known and are_distinct and (not are_generic or known == {*checkpoint_labels, *task_labels}):
        rows = tuple(checkpoint_labels.index(name) if name in known else None for name in task_labels)
        others = {"new": task_labels, "dropped": checkpoint_labels}
        lists = {change: [name for name in names if name not in known] for change, names in others.items()}
        changes = "".join(f"; {change}: {first_few(names, 5)}" for change, names in lists.items() if names)
        return HeadOrigin(rows, f" for {len(known)} of {len(task_labels)} labels{changes}")
    why = "have no names" if are_generic else "are different"
    named = ", ".join(checkpoint_labels[:3]) + (" ..." if len(checkpoint_labels) > 3 else "")
    return HeadOrigin(None, f"the checkpoint's {len(checkpoint_labels)} labels {why} ({named})")


def arrange_head(model: PreTrainedModel, missing: Iterable[str], head: HeadOrigin, task_has_labels: bool) -> HeadOrigin:
    """Reorder or reinitialise a loaded head's rows in place as planned in `head`, and return the actual origin.
    `missing` names the parameters that the checkpoint lacks."""
    import torch

    above = [name for name in missing if not name.startswith(f"{model.base_model_prefix}.")]
    if head.known_rows:
        initialise_missing(model, replace(head, missing=tuple(head.known_rows)))
        return head
    if above:
        return head if head.order is None else _MISSING
    if not task_has_labels:
        return _AS_IT_IS
    if head.order is not None and head.order == tuple(range(len(head.order))):
        return head
    rows = find_label_axes(model)
    if not rows:
        raise SetupError(
            f"model: {model.name_or_path}: the rows of {type(model).__name__}'s head cannot be matched to labels; "
            "use a checkpoint without a head"
        )
    parameters = {name: model.get_parameter(name) for name in rows}
    with torch.no_grad(), sharding.gathered_to_modify(list(parameters.values())):
        if head.order is None:
            _initialise_parameters(model, parameters)
        else:
            for name, axis in rows.items():
                values = sharding.full_tensor(parameters[name])
                values = values.index_select(axis, torch.tensor(head.order, device=values.device))
                parameters[name].copy_(sharding.shard_like(values, parameters[name]))
    return head


def _read_known_rows(model: PreTrainedModel, base: Base, head: HeadOrigin) -> HeadOrigin:
    """Read the checkpoint's rows of known labels, which transformers drops if the head's size differs."""
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    axes, rows = find_label_axes(model), dict[str, Any]()
    order = [row for row in head.order or () if row is not None]
    folder = base.path or Path(str(cached_file(base.block.name, "config.json", revision=base.block.revision))).parent
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            for name in axes.keys() & set(stored.keys()):
                rows[name] = stored.get_tensor(name).movedim(axes[name], 0)[order]
    if not rows or rows.keys() != axes.keys():
        return HeadOrigin(None, "the checkpoint's *.safetensors lack the rows of its head")
    return replace(head, known_rows=rows)


def restore_known_rows(model: PreTrainedModel, head: HeadOrigin) -> None:
    """Set the rows of known labels to the checkpoint's, and scale the new rows to the same mean norm."""
    import torch

    if not head.known_rows:
        return
    sharding.free_gathered_weights(model)
    axes, parameters = find_label_axes(model), {name: model.get_parameter(name) for name in head.known_rows}
    is_known = torch.tensor([row is not None for row in head.order or ()])
    with torch.no_grad(), sharding.gathered_to_modify(list(parameters.values())):
        rows = {name: sharding.full_tensor(one).movedim(axes[name], 0).clone() for name, one in parameters.items()}
        weight = max(rows, key=lambda name: rows[name].dim())
        both = head.known_rows[weight], rows[weight][~is_known]
        known, new = (float(some.flatten(1).norm(dim=1).mean()) for some in both)
        for name, parameter in parameters.items():
            # Smaller rows would give smaller logits, so that new labels would hardly be predicted.
            rows[name] *= known / new if new > 0 else 1.0
            rows[name][is_known] = head.known_rows[name].to(rows[name])
            parameter.copy_(sharding.shard_like(rows[name].movedim(0, axes[name]), parameter))


def find_label_axes(model: PreTrainedModel) -> dict[str, int]:
    """Map the names of parameters that have a row per label to the axis of these rows."""
    import torch

    larger: Any = copy.deepcopy(model.config)
    larger.num_labels += 1
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        same_size, one_more = (type(model)(config) for config in (copy.deepcopy(model.config), larger))
    shapes = {name: parameter.shape for name, parameter in one_more.named_parameters()}
    return {
        name: next(
            axis for axis, (few, more) in enumerate(zip(parameter.shape, shapes[name], strict=True)) if few != more
        )
        for name, parameter in same_size.named_parameters()
        if parameter.shape != shapes[name]
    }


def _initialise_parameters(model: PreTrainedModel, parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Reinitialise parameters as transformers would, on an unsharded copy."""
    import torch

    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        empty = type(model)(copy.deepcopy(model.config))
    above = set()
    for name, parameter in parameters.items():
        path, _, own = name.rpartition(".")
        room = torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
        setattr(empty.get_submodule(path), own, room)
        names = path.split(".")
        above |= {empty.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)}
    # Children first, as in transformers: in some models (ModernBERT), a parent draws for its children.
    empty.apply(lambda module: empty._init_weights(module) if module in above else None)
    for name, parameter in parameters.items():
        parameter.copy_(sharding.shard_like(empty.get_parameter(name), parameter))


def initialise_missing(model: PreTrainedModel, head: HeadOrigin) -> None:
    """Randomly initialise the parameters that the checkpoint lacks."""
    import torch

    sharding.free_gathered_weights(model)
    parameters = {name: model.get_parameter(name) for name in head.missing}
    with torch.no_grad(), sharding.gathered_to_modify(list(parameters.values())):
        _initialise_parameters(model, parameters)
    restore_known_rows(model, head)


def initialise_missing_from_seed(model: PreTrainedModel, head: HeadOrigin, seed: int) -> None:
    """Initialise the parameters that the checkpoint lacks from `seed`, without changing torch's random state."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        initialise_missing(model, head)
