"""Common claims about full fine-tuning and its rivals (docs/evidence.md), and what they come to on these data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fulltune.compare.verdict import in_words
from fulltune.records.comparison import ArmRow, Claim, Held
from fulltune.records.differences import Decision
from fulltune.records.plan import MemoryNeed, Plan
from fulltune.report.comparison import about_forgetting
from fulltune.report.comparison.numbers import Writer, fine_share
from fulltune.text import counted, format_bytes

TENTH = 0.15
"""Up to here one may say "a tenth"."""
_HALF = 0.45
"""From here on one may say "half"."""
_FORGETS_LESS = "LoRA forgets less"


def claims(
    rows: Sequence[ArmRow], decision: Decision, train_rows: int, held: Sequence[Held], plan: Plan | None = None
) -> tuple[Claim, ...]:
    """One sentence for each claim that the arms of a comparison, or full's plan, can tell something about."""
    first = {row.kind: row for row in reversed(rows)}
    full, lora, prompt = first["full"], first.get("lora"), first.get("prompt")
    found = [("full fine-tuning gives the best quality", *_best(decision, train_rows))]
    if lora is not None:
        found += _of_lora(first.get("base"), full, lora, decision)
        found += _forgets_less_held(rows, decision, held, lora) if held else _forgets_less(full, lora)
    if prompt is not None:
        found.append(("prompt tuning is weaker", *_prompt(prompt, decision)))
    if plan is not None and plan.memory is not None and plan.weights_dtype == "fp32":
        found.append(("fp16 saves half the memory", *_half_precision(plan.memory, plan.precision == "fp32")))
    return tuple(Claim(claim=claim, here=here, holds=holds) for claim, here, holds in found)


def _half_precision(memory: MemoryNeed, in_fp32: bool) -> tuple[str, bool]:
    """Of full's planned step: what mixed precision halves, and what it keeps."""
    computed = memory.kinds.get("activations", 0) + memory.kinds.get("logits", 0)
    total = sum(memory.kinds.values()) + (0 if in_fp32 else computed)
    computed = computed if in_fp32 else 2 * computed
    share = computed / 2 / max(1, total)
    halved = f"{format_bytes(computed)} of full's {format_bytes(total)} by the plan's arithmetic"
    here = f"weights, gradients and optimizer state stay in fp32; halved are activations and logits, {halved}"
    return f"{here}: at most {share:.0%} less; no card has measured it", share >= _HALF


def _holds(yes: bool, no: bool) -> bool | None:
    """None: these data do not tell."""
    return True if yes else False if no else None


def _best(decision: Decision, train_rows: int) -> tuple[str, bool | None]:
    rivals = [one for one in decision.differences if one.decides]
    better, worse = [one.arm for one in rivals if one.full_better], [one.arm for one in rivals if one.arm_better]
    what = "neither full nor another method is known to be better by the margin"
    if worse or better:
        what = f"full is {'beaten by' if worse else 'better than'} {', '.join(worse or better)} by the margin"
    here = f"with {counted(train_rows, 'train row')} {what} ({counted(len(rivals), 'method')} compared)"
    return here, _holds(not worse and len(better) == len(rivals), bool(worse))


def _prompt(prompt: ArmRow, decision: Decision) -> tuple[str, bool | None]:
    found = decision.difference(prompt.arm)
    share = "" if prompt.gain_share is None else f"; it reaches {prompt.gain_share:.0%} of full's gain"
    return in_words(found, Writer.of(decision)) + share, _holds(found.full_better, found.not_worse)


def _of_lora(
    base: ArmRow | None, full: ArmRow, lora: ArmRow, decision: Decision
) -> Iterator[tuple[str, str, bool | None]]:
    apart, sign = decision.difference(lora.arm), 1 if decision.greater_is_better else -1
    gain = 0.0 if base is None else sign * (full.metric.value - base.metric.value)
    if lora.gain_share is not None and gain > 0:
        low, high = 1 - apart.adjusted_high / gain, 1 - apart.adjusted_low / gain
        here = f"{lora.arm} reaches {lora.gain_share:.1%} of what full gains over the untouched model"
        holds = _holds(low >= 0.9, high < 0.9) if apart.seeds_known else None
        yield "LoRA reaches 90 to 95 % of full's gain, or more", f"{here} ({low:.0%} to {high:.0%})", holds
    time = lora.train_seconds / max(1e-9, full.train_seconds)
    memory = lora.memory_growth_bytes / max(1, full.memory_growth_bytes)
    work = lora.train_flops / full.train_flops if full.train_flops else 0.0
    operations = f"{fine_share(work)} of the operations, " if work else ""
    here = f"{lora.arm}: {operations}{fine_share(time)} of the time, {fine_share(memory)} of the memory"
    yield "LoRA costs a tenth of the compute", here, (work or time) <= TENTH
    saved = lora.saved_bytes / max(1, full.saved_bytes)
    here = (
        f"{lora.arm}: {format_bytes(lora.saved_bytes)}, {fine_share(saved)} of full's {format_bytes(full.saved_bytes)}"
    )
    yield "a LoRA checkpoint is a small fraction of a full one", here, saved <= TENTH


def _forgets_less_held(
    rows: Sequence[ArmRow], decision: Decision, held: Sequence[Held], lora: ArmRow
) -> Iterator[tuple[str, str, bool | None]]:
    """A budget set how far each one moved: they are compared at the same metric."""
    here = about_forgetting.answers(rows, decision, held)[lora.arm]
    yield _FORGETS_LESS, here, about_forgetting.forgets_less(rows, held, lora.arm)


def _forgets_less(full: ArmRow, lora: ArmRow) -> Iterator[tuple[str, str, bool | None]]:
    if full.drift is not None and lora.drift is not None:
        both = ((lora.drift, lora.arm), (full.drift, "full"))
        drifts = ", ".join(f"{one.value:.3g} [{one.low:.3g}, {one.high:.3g}] for {arm}" for one, arm in both)
        seeds = min(len(lora.seeds), len(full.seeds))
        here = f"drift on generic text {drifts} (over texts, {counted(seeds, 'seed')} of each)"
        holds = _holds(lora.drift.high < full.drift.low, lora.drift.low > full.drift.high)
        # What learned nothing has nothing to forget for.
        idle = [row.arm for row in (full, lora) if row.gain_share is None or row.gain_share <= 0]
        if seeds < 2:
            here, holds = f"{here}, which one seed does not show", None
        elif idle:
            here, holds = f"{here}, but {idle[0]} is not known to have learned anything", None
        yield _FORGETS_LESS, here, holds
