from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fulltune.errors import SetupError
from fulltune.models import sharding
from fulltune.models.base import Base, load_with_advice
from fulltune.models.encoders import is_decoder, saved_as
from fulltune.models.experts import expert_modules, routers, why_no_deepspeed
from fulltune.models.load import predict_head_origin
from fulltune.models.sharding import Units
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS, TaskFacts
from fulltune.records.base import Record

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


NOT_COUNTED = "train.placement: stream: the sizes of this model's blocks are unknown"


class Shapes(Record):
    """Dimensions and properties of a model that a plan needs."""

    model_type: str
    is_decoder: bool
    num_parameters: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    position_limit: int | None
    can_recompute: bool = True
    num_all_parameters: int | None = None
    num_trainable: int | None = None
    trains_head: bool = False
    """True if some parameters are frozen, but not the language model's head."""
    head_is_kept: bool = False
    head_note: str = ""
    """Which labels keep their rows of the checkpoint's head; empty if none do."""
    plain_logits: bool = True
    """True if no config field scales or caps logits after the head; verified before step 1."""
    pooling: tuple[str, str] | None = None
    """How texts that are read apart are pooled, and why."""
    has_experts: bool = False
    units: Units | None = None
    unit_sizes: dict[str, int] = Field(default_factory=dict)
    """Parameters of each unit by its path; empty if the model cannot be streamed."""
    no_units: str = NOT_COUNTED
    cached_values: int = 0
    """Numbers that generation keeps per token of a row: keys and values of all (decoder) layers."""


def measure_shapes(
    base: Base,
    config_changes: Mapping[str, Any],
    apply_method: Callable[[Any], object] | None = None,
    unit_sizes: Callable[[nn.Module], dict[str, int]] | None = None,
) -> Shapes:
    """Return a model's dimensions, measured on the meta device. `apply_method` is called with the model to count the
    parameters that a method adds and trains, `unit_sizes` to count those of each streamed unit."""
    import torch

    config = base.copy_config(config_changes)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = load_with_advice(base.block, "model", lambda: base.auto_model_class.from_config(config))
    text = config.get_text_config()
    count = sum(parameter.numel() for parameter in model.parameters())
    num_all = trained = units = lm_head = None
    counted, no_units = dict[str, int](), NOT_COUNTED
    if apply_method is not None:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            apply_method(model)
        num_all = sum(parameter.numel() for parameter in model.parameters())
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        lm_head = model.get_output_embeddings()
    else:
        with contextlib.suppress(SetupError):  # it cannot be sharded
            units = sharding.count_unit_parameters(model)
        try:
            counted = unit_sizes(model) if unit_sizes else {}
        except SetupError as error:
            no_units = str(error)
    head = predict_head_origin(base.config, type(model).__name__, config_changes)
    return Shapes(
        model_type=config.model_type,
        is_decoder=is_decoder(config),
        num_parameters=count,
        num_layers=getattr(text, "num_hidden_layers", 1) or 1,
        hidden_size=getattr(text, "hidden_size", 0) or 0,
        vocab_size=getattr(text, "vocab_size", 0) or 0,
        position_limit=position_limit(config),
        num_all_parameters=num_all,
        num_trainable=trained,
        trains_head=lm_head is not None and lm_head.weight.requires_grad,
        can_recompute=bool(model.supports_gradient_checkpointing),
        head_is_kept=not head.has_new_rows,
        head_note=head.description if head.order else "",
        plain_logits=not any(getattr(text, name, None) not in (None, 1, 1.0) for name in _AFTER_HEAD),
        pooling=(config.pooling, base.pooling_why) if base.pooling_why else None,
        has_experts=bool(expert_modules(model)),
        units=units,
        unit_sizes=counted,
        no_units=no_units,
        cached_values=_count_cached_values(config) if FACTS[base.task].writes else 0,
    )


def _count_cached_values(config: PretrainedConfig) -> int:
    """Return the keys and values per token in all layers, or in all decoder layers of an encoder-decoder."""
    text: Any = config.get_text_config(decoder=True)
    text.allow_global_per_layer_attribute_access = True  # layers of Gemma 4 differ
    heads: Any = getattr(text, "num_attention_heads", None) or 1
    hidden = getattr(text, "hidden_size", 0)
    size: Any = getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or hidden // heads
    groups: Any = getattr(text, "num_key_value_heads", None) or heads
    layers: Any = getattr(text, "num_decoder_layers", None) or getattr(text, "num_hidden_layers", 0)
    return int(2 * layers * groups * size)


_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "logits_soft_cap")
"""Config fields that change logits after the head (Gemma, Cohere, Granite, Falcon-H1, xLSTM)."""
_POSITIONS_AFTER_PADDING = {
    *("camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta"),
    *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}


def position_limit(config: PretrainedConfig) -> int | None:
    """Return the longest sequence in tokens that the model's positions allow, or None without a limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    # RoBERTa-like models count positions from after the padding index.
    if limit and config.model_type in _POSITIONS_AFTER_PADDING:
        limit -= (config.pad_token_id or 0) + 1
    return limit


def check_model(recipe: Recipe, base: Base) -> None:
    """Raise `SetupError` if the model is an adapter, unfit for the task, or has experts that cannot train."""
    if base.path is not None and (base.path / "adapter_config.json").exists():
        # Training would use the pretrained model instead.
        raise SetupError(
            f"model: {base.block.name}: the folder contains only trained parameters; merge them (LoRA, head) into the "
            f"pretrained model with 'fulltune export {base.path} --to hf -o MERGED', and set model: MERGED"
        )
    problem = why_unfit_for_task(base.config, FACTS[recipe.task]) or _why_experts_do_not_train(recipe, base)
    if problem is not None:
        raise SetupError(f"model: {recipe.model.name}: {problem}")


def _why_experts_do_not_train(recipe: Recipe, base: Base) -> str | None:
    import torch

    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if all(getattr(base.config.get_text_config(), name, None) in (None, 0, 1) for name in names):
        return None
    with torch.device("meta"):
        model = load_with_advice(base.block, "model", lambda: base.auto_model_class.from_config(base.copy_config({})))
    if expert_modules(model):
        by = recipe.train.zero_enabled_by
        return f"{by}: {why_no_deepspeed(recipe.train.num_processes)}" if by else None
    return f"{type(model).__name__} has no tensors that hold all experts of a layer" if routers(model) else None


def why_unfit_for_task(config: PretrainedConfig, facts: TaskFacts) -> str | None:
    """Return the reason why models of this type cannot do a task, or None if they can."""
    from transformers.models.auto import modeling_auto

    auto_class = getattr(modeling_auto, saved_as(facts.auto_class))
    can = config.model_type in auto_class._model_mapping._model_mapping
    can &= not (facts.reads_texts_apart and config.is_encoder_decoder)
    if facts.writes:  # these lists also name encoders and speech models
        can &= bool(config.is_encoder_decoder if facts.auto_class.endswith("Seq2SeqLM") else is_decoder(config))
    return (
        None if can and config.model_type not in facts.other_models else f"a '{config.model_type}' model {facts.models}"
    )
