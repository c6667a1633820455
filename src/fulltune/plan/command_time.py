"""What the whole command takes besides the training itself: starting, the dry run, the scores on the test rows.

Each part is known work, forward passes over known rows, or a rule of thumb that says so. What no part covers is named
where the sum is shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fulltune.plan import probing
from fulltune.plan.time import Work
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.records.data import DataSummary
from fulltune.records.plan import BASELINES, DRY_RUN, PROBE, STARTING, TRAINED, Plan, TimePart

START_SECONDS = 20.0
"""Two processes that import torch and transformers, where nothing was measured: 12 to 25 s on two cores."""
SECOND_SHARE, SECOND_SECONDS = 0.25, 5.0
"""Of what the command took up to its plan, the process that trains takes so much to import the same again, from files
that are in memory by then; at most so long, however many rows were tokenised before."""
LOADS, LOAD_BYTES_PER_SECOND = 3, 10**9
"""The model is read for the training, for the baselines and to score what was trained."""
CHECKS_SECONDS, SCORING_SECONDS = 0.5, 0.4
"""Of the checks, and of each line of the scores, whatever the rows: further imports, the model put in place, intervals
of the metrics. On one free core; more on busy ones."""
BASELINE_LINES = 3
"""One without a model and two with it; or one with it, or two without."""
LONGEST_PASSES, EXTRA_SHARE, LEAST_EXTRA, MOST_EXTRA = 2, 0.05, 0.5, 20.0
"""Of a dry run: passes of the longest micro batch; further timed passes as a share of the training, within bounds."""


@dataclass(frozen=True)
class Speeds:
    """How fast this hardware is."""

    flops: float
    """Operations a second of one device, on which the scoring runs; the processes of a CPU share it."""
    bytes_per_second: float
    """From the memory that the weights lie in."""
    pass_seconds: float = 0.0
    """Of a forward pass, however few tokens: to call the layers, on a GPU to launch their kernels. 0.5 to 0.7 ms a
    layer on one core (docs/log.md)."""
    started_seconds: float | None = None
    """What the command has taken up to its plan; None: it does not run here."""


def around(
    recipe: Recipe, plan: Plan, summary: DataSummary, work: Work, speeds: Speeds, hidden_size: int
) -> tuple[TimePart, ...]:
    """The parts of `fulltune run` before and after the training, in order."""
    checks = CHECKS_SECONDS + _dry_run_seconds(plan, work, speeds)
    found = [_starting(plan, speeds)]
    if plan.head_init == "probe":
        passing = _forward_seconds(plan, probing.rows(summary, hidden_size), work, speeds)
        seconds = passing + probing.seconds(summary, hidden_size)
        found.append(TimePart(name=PROBE, seconds=seconds, basis="arithmetic"))
    found.append(TimePart(name=DRY_RUN, seconds=checks, basis="arithmetic"))
    if not _rows(summary, "test"):
        return tuple(found)
    answers = _answer_seconds(recipe, plan, summary, work, speeds)

    def scoring(name: str, lines: int, rows: int) -> TimePart:
        # What reads no row with a model writes no answers either.
        passing = _forward_seconds(plan, rows, work, speeds) + answers if rows else 0.0
        return TimePart(name=name, seconds=lines * SCORING_SECONDS + passing, basis="arithmetic")

    if recipe.evaluate.baselines:
        found.append(scoring(BASELINES, BASELINE_LINES, sum(_baseline_rows(plan, summary, hidden_size))))
    found.append(scoring(TRAINED, 1, sum(_scored_rows(summary))))
    return tuple(found)


def _starting(plan: Plan, speeds: Speeds) -> TimePart:
    reading, spent = LOADS * plan.state.weights / LOAD_BYTES_PER_SECOND, speeds.started_seconds
    if spent is None:
        return TimePart(name=STARTING, seconds=START_SECONDS + reading, basis="rule of thumb")
    second = min(SECOND_SECONDS, SECOND_SHARE * spent)
    return TimePart(name=STARTING, seconds=spent + second + reading, basis="measured")


def _forward_seconds(plan: Plan, rows: int, work: Work, speeds: Speeds) -> float:
    """Of so many rows in batches of the evaluation."""
    batches = -(-rows // plan.eval_batch_size)
    return max(work.of_task.forward_flops(rows) / speeds.flops, batches * speeds.pass_seconds)


def _dry_run_seconds(plan: Plan, work: Work, speeds: Speeds) -> float:
    """Passes of the longest micro batch, and some more as far as they are a small part of the training."""
    tokens = plan.micro_batch_size * (plan.processes_per_machine if plan.device == "cpu" else 1) * work.longest
    passes = 1 + work.backward + plan.activation_checkpointing
    longest = passes * tokens * (work.flops_per_token + work.attention_flops_per_pair * work.longest) / speeds.flops
    training = plan.time.train_seconds if plan.time else 0.0
    return LONGEST_PASSES * longest + min(MOST_EXTRA, max(LEAST_EXTRA, EXTRA_SHARE * training))


def _rows(summary: DataSummary, split: str) -> int:
    return next((one.rows for name, one in summary.splits.items() if name == split), 0)


def _baseline_rows(plan: Plan, summary: DataSummary, hidden_size: int) -> Iterator[int]:
    """Rows that go through the untouched model."""
    if FACTS[summary.task].writes:
        yield _rows(summary, "test")
        return
    if plan.head_init != "probe":
        yield probing.rows(summary, hidden_size)
    if not summary.form.has_windows:
        yield probing.passes(summary) * _rows(summary, "test")  # for the classifier on embeddings
    if plan.head_init is not None:
        yield from _scored_rows(summary)  # with the probe as its head


def _scored_rows(summary: DataSummary) -> Iterator[int]:
    """Rows that go through the trained one; a classifier's temperature is fitted on the eval rows."""
    yield _rows(summary, "test")
    if summary.form.is_calibrated:
        yield _rows(summary, "eval")


def _answer_seconds(recipe: Recipe, plan: Plan, summary: DataSummary, work: Work, speeds: Speeds) -> float:
    """Of answers of full length; those that end earlier take less. Each token of a batch is a pass and reads all
    weights once."""
    asked = min(recipe.evaluate.generate_rows, _rows(summary, "test")) if summary.form.writes_answers else 0
    if not asked:
        return 0.0
    tokens = recipe.evaluate.max_new_tokens
    computing = asked * tokens * (work.flops_per_token + work.attention_flops_per_pair * work.longest) / speeds.flops
    batches = -(-asked // plan.eval_batch_size)
    size = 4 if plan.weights_dtype == "fp32" else 2
    reading = batches * tokens * size * plan.num_parameters / speeds.bytes_per_second
    return max(computing, reading) + batches * tokens * speeds.pass_seconds
