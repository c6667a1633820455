"""Liger's Triton kernels in the place of a model's norms, feed-forward parts and rotary positions.

Not its loss: ours is computed in pieces already (`chunked_loss.py`), at trained positions alone, and Liger's would take
the place of the model's own forward pass, on which the selective head rests.
"""

from __future__ import annotations

from typing import Any

from fulltune.errors import SetupError

OURS = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""Parts of Liger's that are left out."""


def put_kernels(model: Any) -> None:
    """Replace what Liger has kernels for, in place; the names of the weights stay.

    Raises:
        SetupError: When it has none for this type of model.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:  # transformers would say it in a log alone
        raise SetupError(f"train.use_liger_kernel: Liger has no kernels for models of type '{kind}'; remove it")
    apply_liger_kernel(model, OURS)
