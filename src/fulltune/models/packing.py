from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from fulltune.models import evaluation_mode

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

_ROUNDINGS = 4
_BREAKS = (12, 8)
_TOKENS = 24
_VOCABULARY = 1000


def why_not_packable(config: PretrainedConfig, attn_implementation: str | None = None) -> str | None:
    """Return the reason why texts cannot be packed for this model, or None if they can."""
    import torch
    import transformers

    if attn_implementation is not None and attn_implementation.startswith("flash"):
        # transformers 5.24 gives flash attention the ends of the texts only in a batch of one row.
        return f"{attn_implementation} separates packed texts only in batches of one row; use sdpa"
    small = copy.deepcopy(config)
    text = small.get_text_config()
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if hasattr(text, name):
            setattr(text, name, 1)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    text.vocab_size = min(text.vocab_size, _VOCABULARY)
    for part in (small, text):
        part.pad_token_id = None
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    keywords = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = transformers.AutoModelForCausalLM.from_config(small, dtype=torch.float32, **keywords)
        except (ValueError, TypeError, RuntimeError, IndexError, ImportError) as error:
            why = " ".join(str(error).split())
            return f"a one-layer copy of the '{config.model_type}' model cannot be created ({why})"
    return find_packing_leak(model, config.model_type)


def find_packing_leak(model: PreTrainedModel, model_type: str) -> str | None:
    """Return an error message if the second of two packed texts attends to the first, else None."""
    import torch

    vocabulary = min(model.config.get_text_config().vocab_size, _VOCABULARY)
    ids = torch.arange(3, 3 + 2 * _TOKENS, device=model.device).remainder(vocabulary).view(2, _TOKENS)
    positions = torch.stack([torch.cat((torch.arange(at), torch.arange(_TOKENS - at))) for at in _BREAKS])
    positions = positions.to(model.device)
    difference, largest = 0.0, 0.0
    try:
        with evaluation_mode(model), torch.no_grad():
            together = _logits(model, ids, positions)
            for row, at in enumerate(_BREAKS):
                alone = _logits(model, ids[row : row + 1, at:], positions[row : row + 1, at:])
                difference = max(difference, float((together[row, at:] - alone[0]).abs().max()))
                largest = max(largest, float(alone.abs().max()))
    except (ValueError, TypeError, RuntimeError) as error:
        return f"a '{model_type}' model fails with position ids ({' '.join(str(error).split())})"
    if difference > max(1e-4, _ROUNDINGS * torch.finfo(model.dtype).eps) * max(1.0, largest):
        return f"a '{model_type}' model does not keep packed texts separate (its logits differ by {difference:.2g})"
    return None


def _logits(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
