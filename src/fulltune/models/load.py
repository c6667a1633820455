"""Load a pretrained model's weights into a model with the task's head."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fulltune.errors import SetupError
from fulltune.models import checkpoint_head, sharding
from fulltune.models.base import Base, check_weights, reading, source_of
from fulltune.models.checkpoint_head import Head
from fulltune.recipe.model import ModelBlock

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)


def load(
    base: Base,
    config_changes: Mapping[str, Any],
    *,
    head_is_new: bool,
    block: ModelBlock | None = None,
    before_weights: Callable[[], None] = lambda: None,
    on_head: Callable[[Head], None] = lambda head: None,
    shared_by: int = 1,
) -> PreTrainedModel:
    """Load the weights, in `weights_dtype`, into a model with the task's head, in evaluation mode.

    Args:
        base: The pretrained model.
        config_changes: Values set on the config, for example `id2label`.
        head_is_new: A head that the checkpoint lacks, or that has other labels, is drawn at random.
        block: Has the dropout, weights' type and attention to load with; default: the base's own.
        before_weights: Called when the libraries are loaded: what memory is taken later is the model's.
        on_head: Called with what became of the head, where it may be new.
        shared_by: Processes that shard the weights; all of them call this.

    Raises:
        SetupError: When the weights cannot be read or leave other parameters than the head's uninitialised.
    """
    block = block or base.block
    check_weights(base)
    config = base.configured(config_changes, block.dropout)
    keywords = source_of(block, base.path) | {"dtype": torch_dtype(block.weights_dtype), "config": config}
    if block.attn_implementation:
        keywords["attn_implementation"] = block.attn_implementation
    # A head for other classes is replaced by a new one; tensors of the body that do not fit are refused below.
    keywords["ignore_mismatched_sizes"] = head_is_new
    if "gguf_file" not in keywords:
        keywords["use_safetensors"] = None if block.allow_pickled_weights else True
    loader = base.model_class.from_pretrained
    if (module := type(config).__module__).startswith("transformers.models."):
        # Else the model's code would be imported, and take memory, while the weights are read.
        importlib.import_module(module.replace(".configuration_", ".modeling_"))
    if shared_by > 1:
        shared, keywords["distributed_config"] = sharding.shared_over(base.model_class, config, shared_by)
        loader = shared.from_pretrained
    before_weights()
    with _quiet():
        model, info = reading(block, "model", lambda: loader(output_loading_info=True, **keywords))
    missing = _check_loaded(model, info, block, head_is_new)
    if head_is_new:
        head = checkpoint_head.expected_head(base.config, type(model).__name__, config_changes)
        found = checkpoint_head.put_in_order(model, missing, head, "id2label" in config_changes)
        on_head(replace(found, drawn=tuple(name for name, _ in model.named_parameters() if name in missing)))
    _forget_gguf(model)
    return model


def torch_dtype(name: str) -> Any:
    """A recipe's `fp32` or `bf16` as torch's type."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def _check_loaded(model: PreTrainedModel, info: Mapping[str, Any], block: ModelBlock, head_is_new: bool) -> set[str]:
    """Names of the parameters that were drawn at random; refused where the body is one, which nobody would notice."""
    prefix = model.base_model_prefix
    missing = set(info["missing_keys"]) | {key for key, *_ in info.get("mismatched_keys", ())}
    body = {key for key in missing if key.startswith(f"{prefix}.") and not key.startswith(f"{prefix}.pooler")}
    refused = sorted(body if head_is_new else missing)
    if refused:
        raise SetupError(
            f"model: {block.name}: its weights do not fit {type(model).__name__}: {len(refused)} tensors are missing, "
            f"for example {refused[0]}; is it a model for another task?"
        )
    if missing:
        _log.info("new weights, drawn at random: %s", ", ".join(sorted(missing)))
    return missing


def _forget_gguf(model: PreTrainedModel) -> None:
    """Drop the marks of quantization from a model that was dequantised on loading.

    transformers 5.24 refuses `save_pretrained` on them although the weights are plain tensors; delete this when it
    clears them itself.
    """
    if getattr(getattr(model.config, "quantization_config", None), "quant_method", None) is None:
        return
    if model.config.quantization_config.quant_method != "gguf":
        raise SetupError(
            f"model: {model.name_or_path}: is quantized ({model.config.quantization_config.quant_method}); "
            "full fine-tuning needs plain weights"
        )
    del model.config.quantization_config
    for mark in ("is_quantized", "quantization_method", "hf_quantizer"):
        if mark in vars(model):
            delattr(model, mark)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' load report and progress bars, which we replace by our own checks and lines."""
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
