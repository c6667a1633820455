"""A model as a case to trace: copies with few layers, and batches as its task makes them."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from fulltune.models.load import torch_dtype
from fulltune.models.pixels import PIXELS
from fulltune.tasks import Target, Task

BYTES = {"fp32": 4, "bf16": 2}
"""Of a weight."""


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    config: Any
    """With the task's changes and the wanted dropout; it is not changed."""
    task: Task
    """Makes batches and the loss."""
    target: Target
    prepare: Callable[[Any], Any]
    """What training does to a model before it starts. Two that do the same have the same `repr`."""
    num_parameters: int
    """Of the whole model with what the method adds, each shared tensor once."""
    all_trained: bool = True
    """All of them are; else those that `prepare` leaves with `requires_grad`."""
    precision: str = "fp32"
    """Type of the computations."""
    checkpointing: tuple[bool, ...] = (False, True)
    """Whether activations are kept, recomputed, or both ways."""
    weights_dtype: str = "fp32"
    attn_implementation: str | None = None
    packed: bool = False
    """Several texts share a row."""
    pixels: tuple[int, int, int] | None = None
    """Channels, height and width of the images; None for texts."""


def build(case: Case, config: Any) -> Any:
    """The model with random weights, as the trainer has it."""
    given: dict[str, Any] = {"dtype": torch_dtype(case.weights_dtype)}
    if case.attn_implementation:
        given["attn_implementation"] = case.attn_implementation
    model = getattr(transformers, case.task.FACTS.auto_class).from_config(config, **given)
    case.prepare(model)
    return model


_PAIRS = (("encoder_layers", "decoder_layers"), ("num_layers", "num_decoder_layers"))


def layered(case: Case, config: Any) -> Any:
    """The part of the config that says how many layers there are."""
    if not has_tokens(case):
        return getattr(config, "vision_config", config)
    return config if config.is_encoder_decoder else config.get_text_config()


def depths_of(case: Case) -> dict[str, int]:
    """Attribute of the config to its number of layers; empty where it names none."""
    config = layered(case, case.config)
    if config.is_encoder_decoder:
        pair = next((pair for pair in _PAIRS if all(hasattr(config, name) for name in pair)), ())
        return {name: int(getattr(config, name)) for name in pair}
    depth = getattr(config, "num_hidden_layers", None)
    return {"num_hidden_layers": depth} if isinstance(depth, int) else {}


def layer_kinds(case: Case) -> tuple[str, ...]:
    """What each layer is, in a model of several kinds of layers; empty in a plain one."""
    config = layered(case, case.config)
    kinds = tuple(getattr(config, "layer_types", None) or ())
    known = not config.is_encoder_decoder and len(kinds) == getattr(config, "num_hidden_layers", None)
    return kinds if known and len(set(kinds)) > 1 else ()


def cut(case: Case, depths: Mapping[str, int], kinds: Sequence[str] = ()) -> Any:
    """A copy of the config with so many layers, of these kinds if any are given."""
    config = copy.deepcopy(case.config)
    config.use_cache = False
    part = layered(case, config)
    if depths == depths_of(case) and not kinds:
        return config
    for name, depth in depths.items():
        setattr(part, name, depth)
    every = getattr(part, "layer_types", None)
    if every and depths:
        part.layer_types = list(kinds or every[: max(depths.values())])
    return config


def batch_of(case: Case, rows: int, length: int) -> dict[str, torch.Tensor]:
    """A real batch of full rows, collated by the task."""
    row = dict(case.task.full_row(case.target, length))
    if case.packed:
        row["position_ids"] = np.arange(length)
    if case.pixels is not None:
        row[PIXELS] = np.zeros(case.pixels, np.float32)
    return case.task.collate([row] * rows, 0)


def has_tokens(case: Case) -> bool:
    """Whether the model reads texts, not images."""
    return case.task.FACTS.reads == "text"


def of_tensors(case: Case, shapes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """What a footprint says of the trained tensors, from their shapes."""
    return {
        "largest_tensor": max(map(math.prod, shapes)),
        "factored_values": sum(map(_factored, shapes)),
        "sequences_per_row": case.target.num_choices or 1,
        "tensors": dict(Counter(map(math.prod, shapes))),
    }


def _factored(shape: tuple[int, ...]) -> int:
    """Values that Adafactor keeps of a parameter."""
    if len(shape) < 2:
        return math.prod(shape)
    return math.prod(shape[:-2]) * (shape[-1] + shape[-2])
