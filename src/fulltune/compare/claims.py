"""What one often reads about full fine-tuning and its rivals, and what it comes to on these data: pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from fulltune.compare.verdict import shown
from fulltune.records.comparison import ArmRow, Claim
from fulltune.records.differences import Decision, Difference
from fulltune.text import in_words

TENTH = 0.15
"""Up to here one may say "a tenth"."""


def claims(rows: Sequence[ArmRow], decision: Decision, train_rows: int) -> tuple[Claim, ...]:
    """One sentence for each claim that these arms can tell something about.

    Args:
        rows: The arms of the comparison.
        decision: The verdict's differences.
        train_rows: How many rows were learned from.
    """
    full = next(row for row in rows if row.kind == "full")
    lora = next((row for row in rows if row.kind == "lora"), None)
    prompt = next((row for row in rows if row.kind == "prompt"), None)
    rivals = [one for one in decision.differences if one.decides]
    said: list[Claim | None] = [_best(rivals, train_rows)]
    if lora is not None:
        base = next((row for row in rows if row.kind == "base"), None)
        said += [_gain(base, full, lora, decision), _compute(full, lora), _saved(full, lora)]
        if full.drift is not None and lora.drift is not None:
            said.append(_forgets(full, lora))
    if prompt is not None:
        weaker = decision.difference(prompt.arm)
        holds = True if weaker.full_better else False if weaker.not_worse else None
        share = "" if prompt.gain_share is None else f"; it reaches {prompt.gain_share:.0%} of full's gain"
        gap, low, high = (
            shown(value, decision.metric) for value in (weaker.estimate, weaker.adjusted_low, weaker.adjusted_high)
        )
        here = f"full minus {prompt.arm}: {gap} of {decision.metric} ({low} to {high}){share}"
        said.append(Claim(claim="prompt tuning is weaker", here=here, holds=holds))
    return tuple(one for one in said if one is not None)


def _best(rivals: Sequence[Difference], train_rows: int) -> Claim:
    better = [one.arm for one in rivals if one.full_better]
    worse = [one.arm for one in rivals if one.arm_better]
    holds = False if worse else True if len(better) == len(rivals) else None
    if worse or better:
        what = f"full is {'beaten by' if worse else 'better than'} {', '.join(worse or better)} by the margin"
    else:
        what = "neither full nor another method is known to be better by the margin"
    compared = f"{len(rivals)} method{'s' if len(rivals) > 1 else ''} compared"
    here = f"with {train_rows:,} train rows {what} ({compared})"
    return Claim(claim="full fine-tuning gives the best quality", here=here, holds=holds)


def _gain(base: ArmRow | None, full: ArmRow, lora: ArmRow, decision: Decision) -> Claim | None:
    if base is None or lora.gain_share is None:
        return None
    sign = 1 if decision.greater_is_better else -1
    gain = sign * (full.metric.value - base.metric.value)
    if gain <= 0:
        return None
    apart = decision.difference(lora.arm)
    low, high = 1 - apart.adjusted_high / gain, 1 - apart.adjusted_low / gain
    return Claim(
        claim="LoRA reaches 90 to 95 % of full's gain, or more",
        here=f"{lora.arm} reaches {lora.gain_share:.1%} of what full gains over the untouched model "
        f"({low:.0%} to {high:.0%})",
        holds=None if not apart.seeds_known else True if low >= 0.9 else False if high < 0.9 else None,
    )


def _compute(full: ArmRow, lora: ArmRow) -> Claim:
    parts = [f"{lora.train_seconds / max(1e-9, full.train_seconds):.2f} of the time"]
    if full.train_flops and lora.train_flops:
        parts.insert(0, f"{lora.train_flops / full.train_flops:.2f} of the operations")
    parts.append(f"{lora.memory_growth_bytes / max(1, full.memory_growth_bytes):.2f} of the memory")
    share = lora.train_flops / full.train_flops if full.train_flops else lora.train_seconds / full.train_seconds
    return Claim(
        claim="LoRA costs a tenth of the compute", here=f"{lora.arm}: {', '.join(parts)}", holds=share <= TENTH
    )


def _saved(full: ArmRow, lora: ArmRow) -> Claim:
    share = lora.saved_bytes / max(1, full.saved_bytes)
    return Claim(
        claim="a LoRA checkpoint is a small fraction of a full one",
        here=f"{lora.arm}: {in_words(lora.saved_bytes)}, {share:.1%} of full's {in_words(full.saved_bytes)}",
        holds=share <= TENTH,
    )


def _forgets(full: ArmRow, lora: ArmRow) -> Claim:
    assert full.drift is not None
    assert lora.drift is not None
    less = lora.drift.high < full.drift.low
    more = lora.drift.low > full.drift.high
    # What learned nothing has nothing to forget for.
    idle = [row.arm for row in (full, lora) if row.gain_share is None or row.gain_share <= 0]
    here = f"drift on generic text {lora.drift.value:.3g} for {lora.arm}, {full.drift.value:.3g} for full"
    return Claim(
        claim="LoRA forgets less",
        here=f"{here}, but {idle[0]} is not known to have learned anything" if idle else here,
        holds=None if idle else True if less else False if more else None,
    )
