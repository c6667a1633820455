"""How far the compared models move generic text, and what a budget for forgetting changes in a comparison."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fulltune import methods
from fulltune.compare.trial_folder import changed
from fulltune.evaluate import outputs
from fulltune.forgetting.budget import MOST_ROWS
from fulltune.forgetting.generic_text import NUM_TEXTS, drift, generic_texts, parts
from fulltune.inference.generic import MOST_TOKENS
from fulltune.recipe.fields import Recipe
from fulltune.recipe.model import AUTO
from fulltune.recipe.rules import SCALABLE
from fulltune.records.comparison import Decision, TrialResult
from fulltune.records.held import HeldRun
from fulltune.records.scores import Estimate
from fulltune.stats.bootstrap import resample
from fulltune.text import listed

_SAMPLES = 2000
"""Resamples of generic texts."""
Runs = Mapping[str, Mapping[int, HeldRun]]
"""Arm by arm and seed by seed."""


def texts(recipe: Recipe) -> tuple[list[str], str]:
    """Generic texts on which finished models are compared, and where they come from; sealed ones are none of them."""
    if recipe.preserve.budget is None:
        return generic_texts(recipe.preserve.probe)
    found = parts(recipe.preserve)
    return found.choosing[:NUM_TEXTS], f"{found.source}, selection texts of the budget"


def most_tokens(recipe: Recipe, position_limit: int | None) -> int:
    """Of a generic text, for all arms alike."""
    return min(MOST_TOKENS, (position_limit or MOST_TOKENS) - methods.virtual_tokens(recipe))


def most_rows(recipe: Recipe) -> int:
    """Eval rows that a whole run is measured on at most."""
    return sys.maxsize if recipe.preserve.budget is None else MOST_ROWS


def recipe_of(recipe: Recipe, method: Any, *, searches: bool = False) -> Recipe:
    """A method's recipe: held to the budget for forgetting if it can be, else its forgetting is measured once."""
    one = recipe.with_method(method)
    if recipe.preserve.budget is not None and method.kind in SCALABLE and not searches:
        return one
    return changed(one, {"preserve": {"drift": False, "budget": None, "replay": AUTO}})


def of_trial(folder: Path, trial: str) -> HeldRun | None:
    """How a trial kept its budget for forgetting; None: it had none."""
    path = folder / "preserve" / f"{trial}.json"
    return HeldRun.load(path) if path.exists() else None


def trained_metric(folder: Path, result: TrialResult) -> float:
    """Of the weights as they were trained: a budget that scales them back says nothing about their rate."""
    found = None if result.problems else of_trial(folder, result.trial.name)
    return result.metric if found is None else found.end.metric


def of_arms(folder: Path, results: Mapping[str, Sequence[TrialResult]]) -> Runs:
    """The whole runs that a budget for forgetting held."""
    found = {
        arm: {one.trial.seed: known for one in runs if (known := of_trial(folder, one.trial.name)) is not None}
        for arm, runs in results.items()
    }
    return {arm: runs for arm, runs in found.items() if runs}


def moved(folder: Path, results: Sequence[TrialResult], base: str, confidence: float) -> Estimate | None:
    """Mean drift on generic text over the seeds of an arm, with a bootstrap interval over the texts."""
    place = folder / "predictions" / "generic"
    if not (place / f"{base}.npz").exists():
        return None
    before = outputs.load(place / f"{base}.npz")["generic"]
    drifts = [drift(before, outputs.load(place / f"{one.trial.name}.npz")["generic"]) for one in results]
    of_text = {"drift": np.mean(drifts, axis=0)}
    mean = resample(of_text, lambda texts: {"drift": float(texts["drift"].mean())}, samples=_SAMPLES)["drift"]
    return mean.estimate(confidence)


def of_learned(decision: Decision, held: Runs) -> Decision:
    """The verdict where a budget for forgetting left some methods nothing but the untouched model."""
    found = {arm: [seed for seed, one in runs.items() if not one.is_feasible] for arm, runs in held.items()}
    untouched = {arm: seeds for arm, seeds in found.items() if seeds}
    notes = tuple(
        f"{arm} (seed{'s' if len(seeds) > 1 else ''} {listed([str(seed) for seed in seeds])}): nothing within the "
        "budget for forgetting was better than the untouched model, which stands in its place"
        for arm, seeds in untouched.items()
    )
    changes: dict[str, object] = {"notes": (*decision.notes, *notes)}
    taken = decision.recommended
    if taken in untouched and len(decision.values[taken]) == len(untouched[taken]):
        changes |= {
            "verdict": "UNDECIDED",
            "recommended": "",
            "headline": f"Within the budget for forgetting {taken} is the untouched model: nothing is learned to take.",
            "would_decide": (
                "give a larger preserve.budget, more texts (preserve.probe, preserve.replay) or more train rows",
            ),
        }
    return decision.model_copy(update=changes)
