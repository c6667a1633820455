"""Whether a model keeps texts that share a row apart, tried on a one-layer copy with random weights. Layer 1.

transformers builds a block-wise attention mask from position ids that begin again, when there is no attention mask; yet
not every model uses it (OPT and BLOOM do not), and not every attention kernel.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_TOLERANCE = 1e-4
_TOKENS = 12


def obstacle(config: PretrainedConfig, attn_implementation: str | None = None) -> str | None:
    """Why texts in one row would see each other, or None.

    Args:
        config: Of the model; the copy has its architecture with one layer and few tokens.
        attn_implementation: As the recipe gives it; None is transformers' choice.
    """
    import torch
    import transformers

    small = copy.deepcopy(config)
    text = small.get_text_config()
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if hasattr(text, name):
            setattr(text, name, 1)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    keywords = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = transformers.AutoModelForCausalLM.from_config(small, dtype=torch.float32, **keywords)
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            return (
                f"a one-layer copy of the '{config.model_type}' model cannot be made ({' '.join(str(error).split())})"
            )
    return leak(model, config.model_type)


def leak(model: PreTrainedModel, name: str) -> str | None:
    """Whether the second of two texts in one row sees the first one: what is wrong, or None."""
    import torch

    vocabulary = min(model.config.get_text_config().vocab_size, 1000)
    ids = torch.arange(3, 3 + 2 * _TOKENS, device=model.device).remainder(vocabulary).unsqueeze(0)
    positions = torch.arange(_TOKENS, device=model.device).repeat(2).unsqueeze(0)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            together = _logits(model, ids, positions)[:, _TOKENS:]
            alone = _logits(model, ids[:, _TOKENS:], positions[:, _TOKENS:])
    except (ValueError, TypeError) as error:
        return f"a '{name}' model takes no position ids ({' '.join(str(error).split())})"
    finally:
        model.train(was_training)
    difference = float((together - alone).abs().max())
    scale = max(1.0, float(alone.abs().max()))
    if difference > _TOLERANCE * scale:
        return f"a '{name}' model does not keep texts in one row apart (its logits differ by {difference:.2g})"
    return None


def _logits(model: Any, ids: Any, positions: Any) -> Any:
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
