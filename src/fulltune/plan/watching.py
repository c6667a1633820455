from __future__ import annotations

import math

from fulltune.forgetting.budget import MAX_REPLAYED, MAX_ROWS, NUM_POINTS, SELECTION_TOKENS
from fulltune.forgetting.generic_text import load_budget_texts
from fulltune.plan.resolve import Steps
from fulltune.plan.settings import FROM_RECIPE, Reasons
from fulltune.plan.time import GENERIC_TOKENS, count_interval_steps
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.records.data import DataSummary
from fulltune.records.plan import GenericTexts, Setting
from fulltune.text import format_percent

SHARE, SHARE_STEERED = 0.01, 0.05
"""Shares of the training time to spend on generic texts, without and with a drift budget."""
MIN_TEXTS, MAX_TEXTS = 8, 64
STEERED = 20
"""Number of times that a run adjusts the replay weight."""
REPLAYED, MIN_REPLAYED = 0.125, 4
"""Replayed share of a step's tokens, and the minimum number of texts (with fewer, the gradient is noisy)."""


def plan_generic_texts(
    recipe: Recipe, summary: DataSummary, global_batch_size: int, steps: Steps, reasons: Reasons
) -> GenericTexts:
    """Plan how many generic texts a run reads and replays; add the reasons to `reasons`."""
    watched = _texts_per_evaluation(recipe, summary, global_batch_size, steps, reasons)
    block, total_steps = recipe.preserve, steps.total
    if block.limit is None:
        return GenericTexts(texts_per_evaluation=watched)
    train = summary.splits["train"]
    tokens = global_batch_size * train.tokens / max(1, train.rows)
    rows = max(MIN_REPLAYED, round(REPLAYED * tokens / GENERIC_TOKENS)) if block.replay else 0
    every = math.ceil(total_steps / STEERED)
    share = format_percent(rows * GENERIC_TOKENS / tokens)
    texts = load_budget_texts(block)
    shared = f"{len(texts.selection):,} texts for selection, {len(texts.held_out):,} for the final measurement"
    shared += f", {len(texts.replayed):,} for replay" if texts.replayed else ""
    reasons.add("preserve.budget", block.budget, caveat=f": {shared}")
    if rows:
        often = f"every {every} steps" if every > 1 else "at every step"
        why = (
            f"{rows} generic texts are replayed in each step ({share} of its tokens); the replay weight is set {often}"
        )
        reasons.add("preserve.replay", None, block.replay, why)
    # Selection texts are read at each point, held-out ones twice.
    at_end = (NUM_POINTS + 2) * (SELECTION_TOKENS // GENERIC_TOKENS)
    return GenericTexts(
        texts_per_evaluation=watched,
        budget=block.limit,
        replay_rows=rows,
        steer_steps=every,
        texts_read_once=at_end + min(MAX_REPLAYED, total_steps * rows),
        scored_rows=NUM_POINTS * min(summary.splits["eval"].rows, MAX_ROWS),
    )


def _texts_per_evaluation(
    recipe: Recipe, summary: DataSummary, global_batch_size: int, steps: Steps, reasons: Reasons
) -> int:
    """Return how many generic texts each evaluation reads, to take about 1 % (with a budget, 5 %) of the training time;
    0 if drift is off."""
    name, against = "preserve.drift", "only the head is trained" if recipe.method.kind == "head" else ""
    if FACTS[recipe.task].reads != "text":
        against = "drift is measured on text, but this task reads images"
    if not recipe.preserve.drift or against:
        reasons.add(name, None if recipe.preserve.drift else False, False, against)
        return 0
    train = summary.splits["train"]
    # A backward pass costs two forward passes.
    passes = 3 * steps.total * global_batch_size * train.tokens / max(1, train.rows)
    times, part = count_interval_steps(steps.total, steps.between_evaluations) + 1, SHARE
    if recipe.preserve.budget is not None:
        times, part = times + STEERED, SHARE_STEERED
    count = round(part * passes / (times * GENERIC_TOKENS))
    count = min(max(count, MIN_TEXTS), MAX_TEXTS)
    share = count * GENERIC_TOKENS * times / max(1, passes)
    least = " (the minimum)" if count == MIN_TEXTS else ""
    why = f"{count} generic texts{least} at each evaluation, about {format_percent(share)} of the training time"
    source = FROM_RECIPE + ": " if "drift" in recipe.preserve.model_fields_set else ""
    reasons.settings.append(Setting(name=name, value=True, reason=source + why, is_automatic=not source))
    return count
