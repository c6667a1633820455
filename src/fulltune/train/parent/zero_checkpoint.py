"""Whether a run can go on from a checkpoint in DeepSpeed's own form: only with as many processes, and the same stage.

Its other checkpoints have the form that every placement reads."""

from __future__ import annotations

from pathlib import Path

from fulltune.recipe.fields import Recipe
from fulltune.system import deepspeed, sharing

LATEST = "latest"
"""DeepSpeed's file with the name of the folder that holds the parts."""
_OF_WEIGHTS = "zero_pp_rank_*_model_states.pt"
"""Parts of the weights, which only stage 3 shares out."""
_OF_OPTIMIZER = "*_optim_states.pt"
"""Parts of the optimizer's state: one for each process."""
ON_DISK = "offloaded_tensors"
"""Beside the parts: the state of an optimizer that lies on a disk."""

_BACK = "set what it was written with, or start a new run (--fresh)"


def misfit(checkpoint: Path, recipe: Recipe) -> str | None:
    """Why the recipe cannot go on from a checkpoint, with what to do; None when it can."""
    shared = sharing.of(recipe)
    wants = deepspeed.keeps_own_files(recipe) if deepspeed.wanted(recipe) else ""
    latest = checkpoint / LATEST
    if not latest.exists():
        told = f"is not in DeepSpeed's own form, which {wants} needs to go on"
        return f"{checkpoint}: {told}; {_BACK}" if wants else None
    parts = checkpoint / latest.read_text(encoding="utf-8").strip()
    if (parts / ON_DISK).exists():
        # Its own reading gives AdamW moments of 0 and step 1 (0.19.8): it goes on without a word, and diverges.
        lost = "was saved with the optimizer on a disk, which DeepSpeed does not read back whole"
        return f"{checkpoint}: {lost}; start a new run (--fresh), which can be continued with offload: all"
    processes = len(list(parts.glob(_OF_OPTIMIZER)))
    stage = 3 if list(parts.glob(_OF_WEIGHTS)) else 2
    if shared is None or not wants:
        found, expected = f"train.placement: {recipe.train.placement}", "DeepSpeed's settings that wrote it"
    elif (stage == 3) != (shared.stage == 3):
        found, expected = str(recipe.train.deepspeed_by), f"ZeRO's stage {'3' if stage == 3 else '1 or 2'}, as written"
    elif processes not in (0, recipe.train.num_processes):  # stage 0 has no parts
        found, expected = f"train.num_processes: {recipe.train.num_processes}", f"{processes}, which wrote it"
    else:
        return None
    return f"{checkpoint}: goes on with {found}, expected {expected}; {_BACK}"
