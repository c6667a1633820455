"""Bottleneck adapters after Houlsby et al. 2019 (arXiv 1902.00751), as modules of the projections they follow.

PEFT has none. One stands after the projection back to the hidden size of each attention and of each feed-forward part,
before the residual sum; layer norms are trained as well, as in the paper.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fulltune.errors import RecipeError
from fulltune.recipe.methods import AdapterMethod

PROJECTIONS = (
    *("attention.output.dense", "output.dense", "attention.dense", "ffn_output"),  # BERT, RoBERTa, ELECTRA, ALBERT
    *("attention.out_lin", "ffn.lin2", "out_lin", "lin2"),  # DistilBERT, XLM
    *("attn.o", "attention.o_proj", "mlp.fc2"),  # MPNet, ViT
    *("attn.Wo", "mlp.Wo"),  # ModernBERT
    *("attn.c_proj", "mlp.c_proj"),  # GPT-2
    *("self_attn.o_proj", "mlp.down_proj"),  # Llama and most of today's decoders
    *("self_attn.out_proj", "encoder_attn.out_proj", "fc2", "self_attn.dense"),  # OPT, BART, Marian, Phi
    *("self_attention.dense", "mlp.dense_4h_to_h", "attention.dense"),  # Bloom, Falcon, GPT-NeoX
    *("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"),  # T5
)
"""Ends of the names of projections back to the hidden size, in layers."""
_IN_LAYER = re.compile(r"\.\d+\.")
STANDARD_DEVIATION = 1e-2
"""Of the first weights, cut off at twice that: an adapter begins next to doing nothing (section 3.6 of the paper)."""


class Bottleneck(nn.Module):
    """Down, a non-linearity, up, and the input itself."""

    def __init__(self, size: int, bottleneck: int, non_linearity: str) -> None:
        super().__init__()
        self.down = nn.Linear(size, bottleneck)
        self.up = nn.Linear(bottleneck, size)
        self.non_linearity = nn.ReLU() if non_linearity == "relu" else nn.GELU()
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(
                linear.weight, std=STANDARD_DEVIATION, a=-2 * STANDARD_DEVIATION, b=2 * STANDARD_DEVIATION
            )
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden[..., size]` to [..., size]."""
        # In its own type: weights in bf16 beside it are frozen, its own would lose small updates.
        added = self.up(self.non_linearity(self.down(hidden.to(self.down.weight.dtype))))
        return hidden + added.to(hidden.dtype)


def put_into(model: Any, method: AdapterMethod, heads: tuple[str, ...]) -> None:
    """Add the adapters and make them and the body's layer norms trainable.

    Raises:
        RecipeError: When the layers' projections are not known by their names.
    """
    found = [(name, module) for name, module in model.named_modules() if _is_projection(name, module, heads)]
    if not found:
        raise RecipeError(
            f"method {method.arm}: the projections of {type(model).__name__}'s layers are not known; take lora or full"
        )
    for _, module in found:
        weight = module.weight
        size = module.out_features if isinstance(module, nn.Linear) else module.nf  # GPT-2's Conv1D
        added = Bottleneck(size, max(1, size // method.reduction_factor), method.non_linearity)
        module.add_module("adapter", added.to(weight.device))
        module.register_forward_hook(_adapted)
    for name, module in model.named_modules():
        if "Norm" in type(module).__name__ and not isinstance(module, _BatchNorm) and not _is_inside(name, heads):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)


def _adapted(module: Any, _: Any, hidden: torch.Tensor) -> torch.Tensor:
    adapted: torch.Tensor = module.adapter(hidden)
    return adapted


def _is_projection(name: str, module: Any, heads: tuple[str, ...]) -> bool:
    from transformers.pytorch_utils import Conv1D

    ends = any(name.endswith(f".{end}") for end in PROJECTIONS)
    in_layer = _IN_LAYER.search(name) is not None and not _is_inside(name, heads)
    return isinstance(module, (nn.Linear, Conv1D)) and ends and in_layer


def _is_inside(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)
