"""The model of a recipe as a plan sees it: its sizes, and its memory however it is trained, without its weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers

from fulltune import methods
from fulltune.footprint.formulas import FAILURES, traced
from fulltune.footprint.records import BYTES, FOOTPRINT, SHAPES, Footprint, Moment, Variant
from fulltune.footprint.watch import Case, has_tokens, layered, of_tensors
from fulltune.models import dropout
from fulltune.models.base import Base
from fulltune.models.pixels import num_patches
from fulltune.models.shapes import Shapes, shapes_of
from fulltune.recipe.fields import Recipe
from fulltune.recipe.methods import Method
from fulltune.recipe.tasks import TaskName
from fulltune.records.data import DataSummary
from fulltune.tasks import Target, task_named

VALUES, VALUES_RECOMPUTED = 2 * 34, 2
"""Kept per token, layer and hidden unit (Korthikanti et al. 2022, arXiv 2205.05198, section 4.1), and as much again for
attention in windows or blocks, which models that cannot be traced mostly have."""
VALUES_PER_STATE = 12
"""More of them for each state of a state-space layer: six arrays of twice the hidden size."""
LOGITS_BYTES = 3 * 4
"""Logits, their probabilities and their gradient in fp32."""
USUAL_LAYERS = 12
PIXELS_OF_A_TOKEN = 32 * 32
"""Where convolutions end."""


def rough(case: Case, why: str) -> Footprint:
    """A footprint by arithmetic; `why` says that the model cannot be traced."""
    shapes = _shapes(case)
    num_trainable = case.num_parameters if case.all_trained else sum(map(math.prod, shapes))
    layers, hidden, vocab = _sizes(case)
    tokens = 1
    if case.pixels is not None:
        area = math.prod(case.pixels[1:])
        tokens = max(num_patches(layered(case, case.config)), math.ceil(area / PIXELS_OF_A_TOKEN))
    layer = hidden * tokens * (VALUES + VALUES_PER_STATE * (getattr(layered(case, case.config), "state_size", 0) or 0))
    weight = BYTES[case.weights_dtype]
    logits = LOGITS_BYTES * vocab if case.task.FACTS.writes else 0
    size = 4 if (case.precision, case.weights_dtype) == ("fp32", "fp32") else 2
    copies = 2 * case.num_parameters if size == 2 and weight == 4 else 0
    variants = []
    for recomputed in case.checkpointing:
        kept = layers * VALUES_RECOMPUTED * hidden * tokens + layer if recomputed else layers * layer
        variants.append(
            Variant(
                precision=case.precision,
                activation_checkpointing=recomputed,
                first=(
                    _moment(case, "backward head", 0, size * kept, logits, copies),
                    _moment(case, "backward 0:below", weight * num_trainable, size * layer, 0, copies),
                ),
                later=(_moment(case, "backward head", weight * num_trainable, size * kept, logits, copies),),
            )
        )
    return Footprint(
        **of_tensors(case, shapes),
        variants=tuple(variants),
        evaluation={case.precision: (_moment(case, "forward loss", 0, 2 * size * layer, logits, copies),)},
        flops_per_token=2.0 * case.num_parameters * tokens,
        attention_flops_per_pair=0.0,
        rough=why,
    )


def _moment(case: Case, place: str, gradients: int, activations: int, logits: int, buffers: int) -> Moment:
    """Activations and logits are those of a token, or of an image."""
    each = 2 if has_tokens(case) else 1  # of `records.terms`
    held = {"gradients": (0, gradients), "activations": (each, activations), "logits": (each, logits)}
    coefficients = {
        kind: [float(size * (term == own)) for term in range(6)]
        for kind, (own, size) in {**held, "buffers": (0, buffers)}.items()
    }
    return Moment.model_validate({"place": place, "coefficients": coefficients})


def _shapes(case: Case) -> list[tuple[int, ...]]:
    with torch.device("meta"):
        model = getattr(transformers, case.task.FACTS.auto_class).from_config(case.config)
        if not case.all_trained:
            case.prepare(model)
    return [tuple(one.shape) for one in model.parameters() if case.all_trained or one.requires_grad]


def _sizes(case: Case) -> tuple[int, int, int]:
    """Layers, hidden size and vocabulary; usual ones where the config does not name them."""
    config = layered(case, case.config)
    layers = sum(getattr(config, "depths", None) or ()) or getattr(config, "num_hidden_layers", None) or USUAL_LAYERS
    layers *= 2 if config.is_encoder_decoder else 1
    hidden = getattr(config, "hidden_size", None) or math.ceil(math.sqrt(case.num_parameters / 12 / layers))
    return layers, hidden, getattr(config, "vocab_size", None) or 0


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedModel:
    """A pretrained model with the head of a task and a method, as a recipe trains it on prepared rows."""

    recipe: Recipe
    base: Base
    summary: DataSummary

    @cached_property
    def changes(self) -> dict[str, Any]:
        """Of the model's config, by the task; none where a model is planned by its config alone."""
        if not self.base.has_processor:
            return {}
        return dict(task_named(self.recipe.task).config_changes(Target.of(self.summary), self.base.processor))

    @cached_property
    def shapes(self) -> Shapes:
        """The model's sizes, with what the recipe's method adds to it and trains of it."""
        apply = preparing(self.recipe, on_cpu=False) if self.recipe.method.kind != "full" else None
        return shapes_of(self.base, self.changes, apply)

    def footprint(self, recipe: Recipe, device: str, precision: str) -> Footprint:
        """The model's memory and work as functions of the micro batch; the recipe may have another type of weights or
        attention than the model's own."""
        pixels, assumed = self.base.image_shape
        attention = recipe.model.attn_implementation
        found = trace(
            Case(
                self.base.configured(self.changes, recipe.model.dropout),
                task_named(self.recipe.task),
                Target.of(self.summary),
                preparing(recipe, on_cpu=device == "cpu"),
                self.shapes.num_all_parameters or self.shapes.num_parameters,
                all_trained=self.shapes.num_trainable is None,
                precision=precision,
                # Both, whatever the recipe says: the other one can be a way out.
                checkpointing=(False, True) if self.shapes.can_recompute else (False,),
                weights_dtype=recipe.model.weights_dtype,
                # In the place of flash attention: the same tensors, and it needs no GPU and no package.
                attn_implementation="sdpa" if (attention or "").startswith("flash") else attention,
                packed=self.summary.packed,
                pixels=pixels,
            )
        )
        return found.model_copy(update={"assumed": assumed})

    def save(self, footprint: Footprint, folder: Path) -> None:
        """Keep sizes and memory beside a run's plan."""
        footprint.save(folder / "plan" / FOOTPRINT)
        self.shapes.save(folder / "plan" / SHAPES)


def preparing(recipe: Recipe, on_cpu: bool) -> Callable[[Any], None]:
    """What training does to a model before it starts, whatever the method's rates: equal ones are traced once."""
    same = dict.fromkeys(("name", "learning_rate", "learning_rates", "head_learning_rate", "head_init"))
    if recipe.method.kind == "full":
        same["train"] = {}
    return partial(prepare, recipe.method.model_copy(update=same), recipe.task, on_cpu)


def prepare(method: Method, task: TaskName, on_cpu: bool, built: Any) -> None:
    """Change a model as training does before it starts."""
    if method.kind != "full":
        methods.apply(built, method, task)
    if on_cpu:
        dropout.install(built)


_FOUND: dict[str, Footprint] = {}
"""What this process has traced: a plan asks for the same model again and again."""


def trace(case: Case) -> Footprint:
    """Find a model's footprint; a rough one, which says so, for a model that cannot be traced."""
    config = {name: value for name, value in case.config.to_dict().items() if name != "_name_or_path"}
    key = repr((type(case.config).__name__, config, replace(case, config=None)))
    if key not in _FOUND:
        try:
            _FOUND[key] = traced(case)
        except FAILURES as error:
            # No reason to stop a run: the class works with values, and the dry-run step measures what this cannot.
            _log.debug("%s cannot be traced", type(case.config).__name__, exc_info=True)
            _FOUND[key] = rough(case, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
    return _FOUND[key]
