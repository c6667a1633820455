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
SAVE_TIME = (
    "; to save time, lower evaluate.choose_rows or evaluate.max_new_tokens, or evaluate less often "
    "(train.eval_strategy, train.eval_steps)"
)
CACHE_PASSES = 3
"""Reads and writes of the cache per token: it is copied to append a token, and then read."""


def plan_answers(
    basis: Basis, used: MemorySettings, memory: MemoryNeed, summary: DataSummary, metric: str, reasons: Reasons
) -> tuple[AnswersPlan | None, MemoryNeed]:
    """Plan the answers that are generated at each evaluation, or None. Also return `memory` with what they need."""
    block, split, layout, shapes = basis.recipe.evaluate, summary.splits["eval"], basis.layout, basis.shapes
    wanted = ROWS if block.choose_rows is None and compares_answers(metric) else block.choose_rows or 0
    rows = min(wanted, split.rows) if summary.form.writes_answers else 0
    if not rows:
        return None, memory
    most = block.max_new_tokens if "max_new_tokens" in block.model_fields_set else MAX_NEW_TOKENS
    new_tokens = min(most, max(1, math.ceil(LONGER * split.trained_p95)))
    longest = split.length_percentiles["max"]
    value = BYTES["fp32" if used.precision == "fp32" else "bf16"]
    whole = value * shapes.num_parameters if layout is not None and layout.stage == 3 else 0
    is_full = basis.recipe.method.kind == "full"  # a gathered copy has no parameters that a method adds

    def peak(size: int, gathered: int = 0) -> int:
        """Return the peak with a batch's cache, and its logits for the last token."""
        passing = basis.memory_need(used.changed(eval_batch_size=size, longest_tokens=longest, chunked_loss=True))
        own = size * (value * shapes.cached_values * (longest + new_tokens) + 4 * shapes.vocab_size)
        return own + gathered + passing.phases.get("evaluation", passing.peak)

    size, limit = min(BATCH, rows), max(basis.available_bytes, memory.peak)
    while size > 1 and peak(size) > limit:
        size = -(-size // 2)
    gather_once = whole > 0 and is_full and peak(size, whole) <= limit
    evaluations = time.count_interval_steps(basis.steps.total, basis.steps.between_evaluations)
    evaluations += basis.recipe.train.eval_on_start
    often = counted(evaluations, "evaluation")
    words = f"up to {counted(new_tokens, 'token')} at each of {often}, in batches of {size}"
    seconds: float | None = None
    flops = time.device_flops(basis.fleet, used.precision, shapes.hidden_size)
    if flops is not None:
        batches = -(-rows // (size * (used.num_processes if basis.fleet.gpu_model else used.num_machines)))
        prompt = max(1.0, (split.tokens - split.trained_tokens) / split.rows)
        once = batches * generation_seconds(basis, used, size, prompt, new_tokens, flops)
        parts = basis.step_seconds(used)
        if whole:  # a step gathers and reduces: three times as much for each micro batch
            sending = max(parts[time.NETWORK], parts["other devices"]) / (3 * used.gradient_accumulation_steps)
            once += sending * (1 if gather_once else batches * (new_tokens + 1))
        seconds = round(evaluations * once, 3)
        share = seconds / (seconds + basis.steps.total * time.step_duration(parts))
        words += f": about {format_percent(share)} of the run" + (SAVE_TIME if share > MAX_SHARE else "")
    reasons.add("evaluate.choose_rows", block.choose_rows, rows, "the metric compares answers", f": {words}")
    needed = max(memory.phases.get("evaluation", 0), peak(size, whole * gather_once))
    answers = AnswersPlan(
        rows=rows, batch_size=size, max_new_tokens=new_tokens, gather_once=gather_once, seconds=seconds
    )
    return answers, memory.model_copy(update={"phases": memory.phases | {"evaluation": needed}})


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
