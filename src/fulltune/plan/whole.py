"""What the whole command takes besides the training itself: starting, the dry run, the scores on the test rows.

Each part is known work, forward passes over known rows, or a rule of thumb that says so. What no part covers is named
where the sum is shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fulltune.plan.time import Work
from fulltune.recipe import Recipe
from fulltune.records import (
    BASELINES,
    DRY_RUN,
    MOST_EMBEDDED,
    STARTING,
    TRAINED,
    DataSummary,
    Plan,
    TimePart,
)

START_SECONDS = 20.0
"""Two processes that import torch and transformers: 12 to 25 s on two cores."""
LOADS, LOAD_BYTES_PER_SECOND = 3, 10**9
"""The model is read for the training, for the baselines and to score what was trained."""
FIXED_SECONDS = 6.0
"""Of the checks and of each scoring, whatever the rows: further imports, the model put in place, intervals of the
metrics; 6 to 12 s on two busy cores (docs/log.md)."""
LONGEST_PASSES, EXTRA_SHARE, LEAST_EXTRA, MOST_EXTRA = 2, 0.05, 0.5, 20.0
"""Of a dry run: passes of the longest micro batch; further timed passes as a share of the training, within bounds."""
WRITES = ("prompt_completion", "chat", "source_target")
EMBEDS = ("single_label", "multi_label", "regression", "tags")
"""Problems whose baseline is the untouched model's embeddings; choices and spans have baselines without a model."""


@dataclass(frozen=True)
class Rates:
    """How fast this hardware is."""

    flops: float
    """Operations a second of one device, on which the scoring runs; the processes of a CPU share it."""
    bytes_per_second: float
    """From the memory that the weights lie in."""


def around(recipe: Recipe, plan: Plan, summary: DataSummary, work: Work, rates: Rates) -> tuple[TimePart, ...]:
    """The parts of `fulltune run` before and after the training, in order."""
    start = START_SECONDS + LOADS * plan.state.weights / LOAD_BYTES_PER_SECOND
    found = [
        TimePart(name=STARTING, seconds=start, basis="rule of thumb"),
        TimePart(name=DRY_RUN, seconds=FIXED_SECONDS + _dry_run_seconds(plan, work, rates), basis="arithmetic"),
    ]
    answers = _answer_seconds(recipe, plan, summary, work, rates)
    if recipe.evaluate.baselines:
        rows = sum(_baseline_rows(summary))
        seconds = FIXED_SECONDS + work.forward_flops(rows) / rates.flops + answers
        found.append(TimePart(name=BASELINES, seconds=seconds, basis="arithmetic"))
    seconds = FIXED_SECONDS + work.forward_flops(sum(_scored_rows(summary))) / rates.flops + answers
    found.append(TimePart(name=TRAINED, seconds=seconds, basis="arithmetic"))
    return tuple(found)


def _dry_run_seconds(plan: Plan, work: Work, rates: Rates) -> float:
    """Passes of the longest micro batch, and some more as far as they are a small part of the training."""
    tokens = plan.micro_batch_size * (plan.num_processes if plan.device == "cpu" else 1) * work.longest
    passes = 4 if plan.activation_checkpointing else 3
    longest = passes * tokens * (work.flops_per_token + work.attention_flops_per_pair * work.longest) / rates.flops
    training = plan.time.train_seconds if plan.time else 0.0
    return LONGEST_PASSES * longest + min(MOST_EXTRA, max(LEAST_EXTRA, EXTRA_SHARE * training))


def _rows(summary: DataSummary, split: str) -> int:
    return next((one.rows for name, one in summary.splits.items() if name == split), 0)


def _baseline_rows(summary: DataSummary) -> Iterator[int]:
    """Rows that go through the untouched model."""
    if summary.problem_type in EMBEDS:
        train = _rows(summary, "train")
        yield train if summary.problem_type == "tags" else min(train, MOST_EMBEDDED)
        yield _rows(summary, "test")
    elif summary.task in ("causal-lm", "seq2seq"):
        yield _rows(summary, "test")


def _scored_rows(summary: DataSummary) -> Iterator[int]:
    """Rows that go through the trained one; a classifier's temperature is fitted on the eval rows."""
    yield _rows(summary, "test")
    if summary.problem_type in ("single_label", "choice"):
        yield _rows(summary, "eval")


def _answer_seconds(recipe: Recipe, plan: Plan, summary: DataSummary, work: Work, rates: Rates) -> float:
    """Of answers of full length; those that end earlier take less. Each token of a batch reads all weights once."""
    asked = min(recipe.evaluate.generate_rows, _rows(summary, "test")) if summary.problem_type in WRITES else 0
    if not asked:
        return 0.0
    tokens = recipe.evaluate.max_new_tokens
    computing = asked * tokens * (work.flops_per_token + work.attention_flops_per_pair * work.longest) / rates.flops
    batches = -(-asked // plan.eval_batch_size)
    size = 4 if plan.weights_dtype == "fp32" else 2
    reading = batches * tokens * size * plan.num_parameters / rates.bytes_per_second
    return max(computing, reading)
