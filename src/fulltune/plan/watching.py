"""How many generic texts are read at each evaluation, to see how far training moves the model away."""

from __future__ import annotations

from fulltune.plan.reasons import FROM_RECIPE, Reasons
from fulltune.plan.resolve import Steps
from fulltune.plan.time import GENERIC_TOKENS, occasions
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.records.data import DataSummary
from fulltune.records.plan import Setting
from fulltune.system import deepspeed
from fulltune.text import format_percent

SHARE = 0.01
"""Of the training's passes."""
FEWEST, MOST = 8, 64
"""Texts."""
MOST_TOKENS = 64
"""Where a text is cut."""


def drift_texts(recipe: Recipe, summary: DataSummary, global_batch_size: int, steps: Steps, reasons: Reasons) -> int:
    """As many as cost `SHARE` of the training, where that is not too few to tell anything; 0: nothing is watched."""
    name = "preserve.drift"
    if not recipe.preserve.drift:
        reasons.add(name, False)
        return 0
    if why := _unwatched(recipe):
        reasons.add(name, None, False, why)
        return 0
    train = summary.splits["train"]
    passes = 3 * steps.total * global_batch_size * train.tokens / max(1, train.rows)  # forward, and twice backward
    times = occasions(steps.total, steps.between_evaluations) + 1
    count = round(SHARE * passes / (times * GENERIC_TOKENS))
    count = min(max(count, FEWEST), MOST)
    share = count * GENERIC_TOKENS * times / max(1, passes)
    why = f"{count} generic texts at each evaluation, about {format_percent(share)} of the training"
    given = FROM_RECIPE + ": " if "drift" in recipe.preserve.model_fields_set else ""
    reasons.settings.append(Setting(name=name, value=True, reason=given + why, chosen=not given))
    return count


def _unwatched(recipe: Recipe) -> str:
    if FACTS[recipe.task].reads != "text":
        return "images have no generic text"
    if recipe.method.kind == "head":
        return "nothing but the head moves"
    if deepspeed.zero_of(recipe) is not None:
        return "not measured with DeepSpeed"
    return ""
