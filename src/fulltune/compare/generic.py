"""How far the compared models move generic text, measured on each once it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fulltune import methods
from fulltune.evaluate import outputs
from fulltune.forgetting.generic_text import drift, generic_texts
from fulltune.inference.generic import MOST_TOKENS
from fulltune.recipe.fields import Recipe
from fulltune.records.comparison import TrialResult
from fulltune.records.scores import Estimate
from fulltune.stats.bootstrap import resample

FOLDER = "predictions/generic"
NOT_IN_TRAINING = {"drift": False}
"""Settings of the block `preserve` for each trial, because it is measured once, here."""
_SAMPLES = 2000
"""Resamples of texts."""


def texts(recipe: Recipe) -> tuple[list[str], str]:
    """Those on which finished models are compared, and where they come from."""
    return generic_texts(recipe.preserve.probe)


def most_tokens(recipe: Recipe, position_limit: int | None) -> int:
    """Of a text, for all arms alike."""
    return min(MOST_TOKENS, (position_limit or MOST_TOKENS) - methods.virtual_tokens(recipe))


def moved(folder: Path, results: Sequence[TrialResult], base: str, confidence: float) -> Estimate | None:
    """Mean drift over the seeds of an arm, with a bootstrap interval over the texts."""
    place = folder / FOLDER
    if not (place / f"{base}.npz").exists():
        return None
    before = outputs.load(place / f"{base}.npz")["generic"]
    drifts = [drift(before, outputs.load(place / f"{one.trial.name}.npz")["generic"]) for one in results]
    of_text = {"drift": np.mean(drifts, axis=0)}
    mean = resample(of_text, lambda texts: {"drift": float(texts["drift"].mean())}, samples=_SAMPLES)["drift"]
    return mean.estimate(confidence)
