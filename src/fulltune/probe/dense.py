"""What the dense layer before a head's last one may become: the identity, or the mean over all tokens.

A pooler reads one position, such as the first token. What that position says of the mean over all tokens is linear to
a large part, and found without labels: a classifier on it needs fewer rows (docs/quality.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fulltune.probe.linear import LEAST_SPREAD, Linear, standard

SPREAD = 0.4
"""Of the values that the layer gives, so that the activation after it is nearly linear."""
SHIFTS = (0.0, 3.0)
"""Where an activation is nearly linear: tanh around 0, ReLU and GELU above it."""
_RIDGE = tuple(10.0**power for power in range(-2, 6))


@dataclass(frozen=True)
class DenseLayer:
    """The layer as it is replaced."""

    has_bias: bool
    after: Callable[[np.ndarray], np.ndarray]
    """What the last layer reads when this one gives these values; both [items, hidden]."""

    def options(self, reads: np.ndarray, mean: np.ndarray | None) -> dict[str, Linear]:
        """What may take its place.

        Args:
            reads: What it reads, [items, hidden].
            mean: The mean over all tokens of each item, [items, hidden]; None: there is none.
        """
        shift = self._shift(reads.shape[1])
        found = {"scaled": _scaled(reads, self.has_bias, shift)}
        if mean is not None and mean.shape == reads.shape:
            found["mean"] = _towards(reads, mean, self.has_bias, shift)
        return found

    def _shift(self, width: int) -> float:
        """By which the values are moved so that what comes after the layer changes them least."""
        if not self.has_bias:
            return 0.0
        values = np.random.default_rng(0).normal(0.0, SPREAD, (64, width)).astype(np.float32)

        def linear(shift: float) -> float:
            return float(np.nan_to_num(np.corrcoef(self.after(values + shift).ravel(), values.ravel())[0, 1]))

        return max(SHIFTS, key=linear)


def _scaled(reads: np.ndarray, has_bias: bool, shift: float) -> Linear:
    centre, scale = standard(reads, has_bias)
    return _linear(np.diag(SPREAD * scale), shift - SPREAD * scale * centre)


def _towards(reads: np.ndarray, wanted: np.ndarray, has_bias: bool, shift: float) -> Linear:
    """The ridge regression of `wanted`, scaled to the layer's spread."""
    from sklearn.linear_model import RidgeCV

    centre, scale = standard(reads, has_bias)
    middle = wanted.mean(axis=0) if has_bias else np.zeros(wanted.shape[1])
    size = LEAST_SPREAD**2 * float((wanted**2).mean())
    spread = math.sqrt(max(float(((wanted - middle) ** 2).mean()), size, 1e-30))
    model = RidgeCV(alphas=_RIDGE, fit_intercept=False)
    model.fit((reads - centre) * scale, (wanted - middle) * (SPREAD / spread))
    weight = model.coef_ * scale
    return _linear(weight, shift - weight @ centre)


def _linear(weight: np.ndarray, bias: np.ndarray) -> Linear:
    return Linear(weight.astype(np.float32), np.asarray(bias, np.float32))
