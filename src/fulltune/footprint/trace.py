from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from fulltune import methods
from fulltune.footprint.allocations import TraceCase, has_tokens, layer_config, tensor_fields
from fulltune.footprint.formulas import FAILURES, trace_footprint
from fulltune.footprint.records import BYTES, FOOTPRINT, SHAPES, Footprint, LiveMemory, Variant
from fulltune.models import dropout
from fulltune.models.base import Base
from fulltune.models.encoders import model_class
from fulltune.models.pixels import num_patches
from fulltune.models.shapes import Shapes, measure_shapes
from fulltune.recipe.fields import Recipe
from fulltune.recipe.methods import Method
from fulltune.recipe.tasks import TaskName
from fulltune.records.data import DataSummary
from fulltune.stream.units import unit_sizes
from fulltune.tasks import Target, task_named

VALUES, VALUES_RECOMPUTED = 2 * 34, 2
"""Values saved per token, layer and hidden unit, without and with checkpointing (Korthikanti et al. 2022, arXiv
2205.05198; doubled for windowed attention)."""
VALUES_PER_STATE = 12
"""Additional values per state of a state-space layer: six arrays of twice the hidden size."""
LOGITS_BYTES = 3 * 4
"""Bytes of a logit, its probability and its gradient in fp32."""
USUAL_LAYERS = 12
PIXELS_OF_A_TOKEN = 32 * 32


def estimate_footprint(case: TraceCase, why: str) -> Footprint:
    """Estimate a footprint by a rule of thumb. `why` is the reason for not tracing the model."""
    with torch.device("meta"):
        model = model_class(case.task.FACTS.auto_class).from_config(case.config)
        if case.num_trainable is not None:
            case.prepare(model)
    shapes = [tuple(one.shape) for one in model.parameters() if case.num_trainable is None or one.requires_grad]
    num_trainable = case.num_trainable or case.num_parameters
    config, tokens = layer_config(case, case.config), 1
    layers = sum(getattr(config, "depths", None) or ()) or getattr(config, "num_hidden_layers", None) or USUAL_LAYERS
    layers *= 2 if config.is_encoder_decoder else 1
    hidden = getattr(config, "hidden_size", None) or math.ceil(math.sqrt(case.num_parameters / 12 / layers))
    vocab = getattr(config, "vocab_size", None) or 0
    if case.pixels is not None:
        tokens = max(num_patches(config), math.ceil(math.prod(case.pixels[1:]) / PIXELS_OF_A_TOKEN))
    states = getattr(config, "state_size", 0) or 0
    layer = hidden * tokens * (VALUES + VALUES_PER_STATE * states)
    weight = BYTES[case.weights_dtype]
    logits = LOGITS_BYTES * vocab if case.task.FACTS.writes else 0
    size = 4 if (case.precision, case.weights_dtype) == ("fp32", "fp32") else 2
    copies = 2 * case.num_parameters if size == 2 and weight == 4 else 0
    variants = []
    for recomputed in case.checkpointing:
        values = layers * VALUES_RECOMPUTED * hidden * tokens + layer if recomputed else layers * layer
        variants.append(
            Variant(
                precision=case.precision,
                activation_checkpointing=recomputed,
                first=(
                    _rough_memory(case, "backward head", 0, size * values, logits, copies),
                    _rough_memory(case, "backward 0:below", weight * num_trainable, size * layer, 0, copies),
                ),
                later=(_rough_memory(case, "backward head", weight * num_trainable, size * values, logits, copies),),
            )
        )
    return Footprint(
        **tensor_fields(case, shapes),
        variants=tuple(variants),
        evaluation={case.precision: (_rough_memory(case, "forward loss", 0, 2 * size * layer, logits, copies),)},
        flops_per_token=2.0 * case.num_parameters * tokens,
        attention_flops_per_pair=0.0,
        rough=why,
    )


def _rough_memory(
    case: TraceCase, place: str, gradients: int, activations: int, logits: int, buffers: int
) -> LiveMemory:
    """Return memory with constant `gradients` and `buffers`, the others per token or image, all in bytes."""
    each = 2 if has_tokens(case) else 1  # position in `records.terms`
    sizes = {"gradients": (0, gradients), "activations": (each, activations), "logits": (each, logits)}
    coefficients = {
        kind: [float(size * (term == own)) for term in range(6)]
        for kind, (own, size) in {**sizes, "buffers": (0, buffers)}.items()
    }
    return LiveMemory.model_validate({"place": place, "coefficients": coefficients})


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedModel:
    """A pretrained model with a task's head and a recipe's method."""

    recipe: Recipe
    base: Base
    summary: DataSummary

    @cached_property
    def config_changes(self) -> dict[str, Any]:
        """Config values that the task sets; empty if only the model's config is available."""
        if not self.base.has_processor:
            return {}
        return dict(task_named(self.recipe.task).config_changes(Target.of(self.summary), self.base.processor))

    @cached_property
    def shapes(self) -> Shapes:
        """The model's dimensions, including the parameters of the recipe's method."""
        apply = None if self.recipe.method.trains_all else make_preparation(self.recipe, on_cpu=False)
        return measure_shapes(self.base, self.config_changes, apply, unit_sizes)

    def footprint(self, recipe: Recipe, device: str, precision: str) -> Footprint:
        """Return the model's footprint with a recipe's weight type, attention and dropout."""
        attention = recipe.model.attn_implementation
        return trace_or_estimate(
            TraceCase(
                self.base.copy_config(self.config_changes, recipe.model.dropout),
                task_named(self.recipe.task),
                Target.of(self.summary),
                make_preparation(recipe, on_cpu=device == "cpu"),
                self.shapes.num_all_parameters or self.shapes.num_parameters,
                num_trainable=self.shapes.num_trainable,
                precision=precision,
                # Both, because the value that the recipe does not set can be proposed.
                checkpointing=(False, True) if self.shapes.can_recompute else (False,),
                weights_dtype=recipe.model.weights_dtype,
                # Allocates the same tensors as flash attention, but needs no GPU or package.
                attn_implementation="sdpa" if (attention or "").startswith("flash") else attention,
                packed=self.summary.packed,
                pixels=self.base.image_shape,
            )
        )

    def save(self, footprint: Footprint, folder: Path) -> None:
        footprint.save(folder / "plan" / FOOTPRINT)
        self.shapes.save(folder / "plan" / SHAPES)


def make_preparation(recipe: Recipe, on_cpu: bool) -> Callable[[PreTrainedModel], None]:
    """Return a function that applies the recipe's method and, if `on_cpu`, replaces dropout layers."""
    same = dict.fromkeys(("name", "learning_rate", "learning_rates", "head_learning_rate", "head_init"))
    if recipe.method.kind == "full":
        same["train"] = {}
    return partial(apply_method_and_dropout, recipe.method.model_copy(update=same), recipe.task, on_cpu)


def apply_method_and_dropout(method: Method, task: TaskName, on_cpu: bool, model: PreTrainedModel) -> None:
    """Apply the method to a model and, if `on_cpu`, replace its dropout layers with `SixteenBitDropout`."""
    if not method.trains_all:
        methods.apply_method(model, method, task)
    if on_cpu:
        dropout.replace_dropout(model)


_TRACED: dict[str, Footprint] = {}


def trace_or_estimate(case: TraceCase) -> Footprint:
    """Return a model's footprint, which is estimated by a rule of thumb if the model cannot be traced."""
    config = {name: value for name, value in case.config.to_dict().items() if name != "_name_or_path"}
    key = repr((type(case.config).__name__, config, replace(case, config=PretrainedConfig())))
    if key not in _TRACED:
        try:
            _TRACED[key] = trace_footprint(case)
        except FAILURES as error:
            # The run continues, because the class works with real values and the dry run measures its memory.
            _log.debug("%s cannot be traced", type(case.config).__name__, exc_info=True)
            _TRACED[key] = estimate_footprint(case, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
    return _TRACED[key]
