"""Mixup of images (Zhang et al. 2018, arXiv 1710.09412): each is blended with another one of its batch, with its label.

Drawn from the batch itself and the run's seed, so that a resumed run blends the same images alike.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
import torch.nn.functional as F

from fulltune.models.pixels import PIXELS


def mixed(batch: dict[str, torch.Tensor], alpha: float, classes: int, seed: int) -> dict[str, torch.Tensor]:
    """The same batch blended: `share * one + (1 - share) * another`, of pixels and of labels alike.

    Args:
        batch: `pixel_values[rows, ...]` and `labels[rows]`, classes.
        alpha: Of the Beta distribution that the batch's share is drawn from; small ones leave most images nearly alone.
        classes: How many there are.
        seed: Of the run.

    Returns:
        A batch whose labels are probabilities, `labels[rows, classes]`.

    Example:
        >>> batch = {"pixel_values": torch.eye(2), "labels": torch.tensor([0, 1])}
        >>> bool((mixed(batch, 1.0, 2, seed=0)["labels"].sum(-1) == 1).all())
        True
    """
    pixels, labels = batch[PIXELS], batch["labels"]
    draw = np.random.default_rng([seed, zlib.crc32(pixels.contiguous().numpy().tobytes())])
    share, order = float(draw.beta(alpha, alpha)), torch.from_numpy(draw.permutation(len(labels)))
    soft = F.one_hot(labels, classes).float()
    return {
        **batch,
        PIXELS: share * pixels + (1 - share) * pixels[order],
        "labels": share * soft + (1 - share) * soft[order],
    }
