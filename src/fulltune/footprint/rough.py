"""A model's memory by a rule of thumb, for one that cannot be traced.

A layer of a transformer keeps about 34 values for each token and hidden unit (Korthikanti et al. 2022, arXiv
2205.05198, section 4.1). Attention's weights come on top: models that cannot be traced mostly have it in windows or
blocks, whose weights are about as much again, and do not grow with the square of the length. The estimate is meant to
be rather too high; the dry-run step tells.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers

from fulltune.footprint.case import BYTES, Case, has_tokens, layered, of_tensors
from fulltune.footprint.records import Coefficients, Footprint, Kind, Moment, Variant
from fulltune.models.pixels import num_patches

VALUES, VALUES_RECOMPUTED = 2 * 34, 2
"""Kept per token, layer and hidden unit."""
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
    num_trained = case.num_parameters if case.all_trained else sum(map(math.prod, shapes))
    layers, hidden, vocab = _sizes(case)
    tokens = 1 if case.pixels is None else _tokens_of_image(case, case.pixels)
    layer = hidden * tokens * (VALUES + VALUES_PER_STATE * (getattr(layered(case, case.config), "state_size", 0) or 0))
    weight = BYTES[case.weights_dtype]
    has_logits = case.task.FACTS.writes
    logits = LOGITS_BYTES * vocab if has_logits else 0
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
                    _moment(case, "backward 0:below", weight * num_trained, size * layer, 0, copies),
                ),
                later=(_moment(case, "backward head", weight * num_trained, size * kept, logits, copies),),
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

    def each(size: int) -> Coefficients:
        return (0.0, 0.0, float(size), 0.0, 0.0, 0.0) if has_tokens(case) else (0.0, float(size), 0.0, 0.0, 0.0, 0.0)

    def fixed(size: int) -> Coefficients:
        return (float(size), 0.0, 0.0, 0.0, 0.0, 0.0)

    held: dict[Kind, Coefficients] = {
        "gradients": fixed(gradients),
        "activations": each(activations),
        "logits": each(logits),
        "buffers": fixed(buffers),
    }
    return Moment(place=place, coefficients=held)


def _shapes(case: Case) -> list[tuple[int, ...]]:
    with torch.device("meta"):
        model = getattr(transformers, case.task.FACTS.auto_class).from_config(case.config)
        if not case.all_trained:
            case.prepare(model)
    return [tuple(one.shape) for one in model.parameters() if case.all_trained or one.requires_grad]


def _sizes(case: Case) -> tuple[int, int, int]:
    """Layers, hidden size and vocabulary, from whatever names the config has for them."""
    config = layered(case, case.config)

    def number(*names: str) -> int:
        found: list[Any] = [getattr(config, name, None) for name in names]
        return next((one for one in found if isinstance(one, int) and one > 0), 0)

    stages = getattr(config, "depths", None) or getattr(config, "block_sizes", None) or ()
    layers = number("encoder_layers", "num_hidden_layers", "num_layers", "n_layer") or sum(stages) or USUAL_LAYERS
    if config.is_encoder_decoder:
        layers += number("decoder_layers", "num_decoder_layers") or layers
    widths = getattr(config, "hidden_sizes", None) or (0,)
    hidden = number("hidden_size", "d_model", "n_embd") or widths[-1]
    return layers, hidden or math.ceil(math.sqrt(case.num_parameters / 12 / layers)), number("vocab_size")


def _tokens_of_image(case: Case, pixels: tuple[int, int, int]) -> int:
    _, height, width = pixels
    patches = num_patches(layered(case, case.config))
    return max(patches, math.ceil(height * width / PIXELS_OF_A_TOKEN))
