from __future__ import annotations

import math

from fulltune.footprint.records import BYTES
from fulltune.plan import time
from fulltune.plan.settings import Reasons
from fulltune.plan.workload import Basis
from fulltune.recipe.tasks import compares_answers
from fulltune.records.data import DataSummary
from fulltune.records.plan import AnswersPlan, MemoryNeed, MemorySettings
from fulltune.text import counted, format_percent

ROWS, BATCH, MAX_NEW_TOKENS = 100, 32, 256
LONGER = 1.5
"""Longest answer relative to the 95th percentile of the expected answers."""
MAX_SHARE = 0.1
"""Share of a run above which the plan names the settings that lower it."""
CACHE_PASSES = 3
"""Reads and writes of the cache per token: it is copied to append a token, and then read."""


def plan_answers(
    basis: Basis, used: MemorySettings, memory: MemoryNeed, summary: DataSummary, metric: str, reasons: Reasons
) -> tuple[AnswersPlan | None, MemoryNeed]:
    """Plan the answers that are generated at each evaluation, or None. Also return `memory` with what they need."""
    block, split, layout = basis.recipe.evaluate, summary.splits["eval"], basis.layout
    wanted = ROWS if block.choose_rows is None and compares_answers(metric) else block.choose_rows or 0
    rows = min(wanted, split.rows) if summary.form.writes_answers else 0
    if not rows:
        return None, memory
    trained = split.trained_tokens / max(1, split.rows)
    most = block.max_new_tokens if "max_new_tokens" in block.model_fields_set else MAX_NEW_TOKENS
    new_tokens = min(most, max(1, math.ceil(LONGER * (split.trained_p95 or trained))))
    longest = split.length_percentiles.get("max", summary.max_length)
    value = BYTES["fp32" if used.precision == "fp32" else "bf16"]
    whole = value * basis.shapes.num_parameters if layout is not None and layout.stage == 3 else 0
    cached = value * (basis.shapes.cached_values or 2 * basis.shapes.num_layers * basis.shapes.hidden_size)

    def batch_bytes(size: int) -> int:
        """Return the bytes of a batch's cache, and of its logits for the last token."""
        return size * (cached * (longest + new_tokens) + 4 * basis.shapes.vocab_size)

    def peak(size: int, gathered: int = 0) -> int:
        passing = basis.memory_need(used.changed(eval_batch_size=size, longest_tokens=longest, chunked_loss=True))
        return batch_bytes(size) + gathered + passing.phases.get("evaluation", passing.peak)

    size, limit = min(BATCH, rows), max(basis.available_bytes, memory.peak)
    while size > 1 and peak(size) > limit:
        size = -(-size // 2)
    evaluations = time.count_interval_steps(basis.steps.total, basis.steps.between_evaluations)
    answers = AnswersPlan(
        rows=rows,
        batch_size=size,
        max_new_tokens=new_tokens,
        gather_once=whole > 0 and peak(size, whole) <= limit,
        evaluations=evaluations + basis.recipe.train.eval_on_start,
        memory_bytes=batch_bytes(size),
    )
    prompt = max(1.0, split.tokens / max(1, split.rows) - trained)
    flops = time.device_flops(basis.fleet, used.precision, basis.shapes.hidden_size)
    if flops is not None:
        devices = used.num_processes if basis.fleet.gpu_model else used.num_machines
        batches = -(-rows // (size * devices))
        gathering = time.sending_seconds(basis.fleet, whole * (used.num_processes - 1) // used.num_processes, used)
        gathering *= 1 if answers.gather_once else batches * (new_tokens + 1)
        once = gathering + batches * generation_seconds(basis, used, size, prompt, new_tokens, flops)
        answers = answers.model_copy(update={"seconds": round(answers.evaluations * once, 3)})
    words = _describe(basis, used, answers)
    reasons.add("evaluate.choose_rows", block.choose_rows, rows, "the metric compares answers", f": {words}")
    needed = max(memory.phases.get("evaluation", 0), peak(size, whole * answers.gather_once))
    return answers, memory.model_copy(update={"phases": memory.phases | {"evaluation": needed}})


def _describe(basis: Basis, used: MemorySettings, answers: AnswersPlan) -> str:
    """Return how many answers are generated, how often, and their share of the run."""
    words = f"up to {counted(answers.max_new_tokens, 'token')} at each of "
    words += f"{counted(answers.evaluations, 'evaluation')}, in batches of {answers.batch_size}"
    parts = basis.step_seconds(used)
    if answers.seconds is None or not parts:
        return words
    share = answers.seconds / (answers.seconds + basis.steps.total * time.step_duration(parts))
    words += f": about {format_percent(share)} of the run"
    if share > MAX_SHARE:
        words += (
            "; to save time, lower evaluate.choose_rows or evaluate.max_new_tokens, or evaluate less often "
            "(train.eval_strategy, train.eval_steps)"
        )
    return words


def generation_seconds(
    basis: Basis, used: MemorySettings, rows: int, prompt: float, new_tokens: int, flops: float
) -> float:
    """Estimate a device's seconds for a batch of answers to prompts of `prompt` tokens. `flops` is its FLOP/s.

    Each new token is a pass that reads all weights and the cache.
    """
    fleet, shapes, gpu = basis.fleet, basis.shapes, basis.fleet.gpu_model
    value, length = BYTES["fp32" if used.precision == "fp32" else "bf16"], prompt + new_tokens / 2
    read = value * (shapes.num_parameters + CACHE_PASSES * rows * shapes.cached_values * length)
    read /= 1e9 * (gpu.memory_gb_per_second if gpu else fleet.host_memory_gb_per_second)
    calls = time.LAUNCH_SECONDS / 3 * shapes.num_layers
    each = max(read, basis.work.flops_of(rows, length) / flops) + calls
    return basis.work.flops_of(rows * prompt, prompt) / flops + calls + new_tokens * each
