"""How long a checkpoint takes to write, from a small trial at the place where checkpoints will lie."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fulltune.train import checkpoints

SAMPLE_BYTES = 2**25
"""Written to measure the rate."""


def save_seconds(trainer: Any, optimizer: Any, folder: Path) -> float:
    """Seconds of one checkpoint with its checksums: the small files as they are, and a sample of the tensors.

    Args:
        trainer: Its model and tokenizer are what is saved.
        optimizer: With its state.
        folder: An existing folder on the same disk; nothing is left in it.
    """
    weights = list(trainer.model.parameters())
    if trainer.trained_only:
        weights = [parameter for parameter in weights if parameter.requires_grad]
    whole = sum(tensor.nbytes for tensor in weights) + state_bytes(optimizer.state_dict())
    trial = folder / "write-trial"
    try:
        began = time.perf_counter()
        trainer.processing_class.save_pretrained(trial)
        checkpoints.seal(trial)
        small = time.perf_counter() - began
        sample = _sample(weights)
        began = time.perf_counter()
        save_file(sample, trial / "sample.safetensors")
        checkpoints.seal(trial)
        seconds = time.perf_counter() - began
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return small + seconds * max(1.0, whole / sum(tensor.nbytes for tensor in sample.values()))


def state_bytes(state: Any) -> int:
    """Bytes of all tensors in an optimizer's state dict."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    if isinstance(state, Mapping):
        return sum(map(state_bytes, state.values()))
    return sum(map(state_bytes, state)) if isinstance(state, (list, tuple)) else 0


def _sample(weights: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The beginning of the weights, at most `SAMPLE_BYTES`, at least one value."""
    sample: dict[str, torch.Tensor] = {}
    left = SAMPLE_BYTES
    for number, tensor in enumerate(weights):
        values = tensor.detach().flatten()[: left // tensor.element_size()].cpu().clone()
        sample[str(number)] = values
        left -= values.nbytes
        if left < 4:
            break
    return sample
