"""Claims that one often reads, against made-up comparisons."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fulltune.compare.claims import claims
from fulltune.records.comparison import Claim
from fulltune.records.plan import MemoryNeed
from fulltune.report.comparison.numbers import fine_share
from tests import comparisons


def test_claims_are_judged_from_the_rows() -> None:
    one = comparisons.comparison()
    found = {claim.claim: claim for claim in one.claims}
    lora = next(row for row in one.rows if row.kind == "lora")
    full = next(row for row in one.rows if row.kind == "full")
    compute = found["LoRA costs a tenth of the compute"]
    assert f"{fine_share(lora.train_flops / full.train_flops)} of the operations" in compute.here
    assert compute.holds is (lora.train_flops / full.train_flops <= 0.15)
    base = next(row for row in one.rows if row.kind == "base")
    apart, gain = one.decision.difference("lora"), full.metric.value - base.metric.value
    low, high = 1 - apart.adjusted_high / gain, 1 - apart.adjusted_low / gain
    reached = found["LoRA reaches 90 to 95 % of full's gain, or more"]
    assert reached.here.endswith(f"({low:.0%} to {high:.0%})")
    assert reached.holds is (True if low >= 0.9 else False if high < 0.9 else None)
    weaker = found["prompt tuning is weaker"]
    assert "points of accuracy" in weaker.here
    assert weaker.holds is one.decision.difference("prompt").full_better


def test_forgetting_less_is_no_merit_of_what_learned_nothing() -> None:
    one = comparisons.comparison()
    said = "LoRA forgets less"

    def found(**gains: float | None) -> Claim:
        rows = tuple(row.model_copy(update={"gain_share": gains.get(row.arm, row.gain_share)}) for row in one.rows)
        return next(claim for claim in claims(rows, one.decision, one.train_rows, ()) if claim.claim == said)

    assert found().holds is True
    assert found(full=None).holds is None
    assert found(lora=0.0).here.endswith("but lora is not known to have learned anything")


def test_forgetting_less_is_not_shown_by_one_seed_however_narrow_its_interval() -> None:
    one = comparisons.comparison()
    rows = tuple(row.model_copy(update={"seeds": row.seeds[:1]}) for row in one.rows)
    several, alone = (
        next(claim for claim in claims(given, one.decision, 100, ()) if claim.claim == "LoRA forgets less")
        for given in (one.rows, rows)
    )
    drifts = [row.drift for row in one.rows if row.kind in ("full", "lora")]
    for claim, seeds in ((several, "3 seeds of each"), (alone, "1 seed of each), which one seed does not show")):
        assert seeds in claim.here
        assert all(f"[{drift.low:.3g}, {drift.high:.3g}]" in claim.here for drift in drifts if drift)
    assert (several.holds, alone.holds) == (True, None)


def test_best_quality_is_not_decided_by_an_undecided_comparison() -> None:
    one = comparisons.undecided()
    best = one.claims[0]
    assert best.holds is None


@pytest.mark.parametrize(
    ("precision", "activations", "share", "holds"),
    [("fp32", 400, "20%", False), ("bf16", 200, "20%", False), ("fp16", 0, "0%", False), ("fp32", 18_000, "48%", True)],
)
def test_half_precision_halves_what_is_computed_and_not_what_is_kept(
    precision: str, activations: int, share: str, holds: bool
) -> None:
    one = comparisons.comparison()
    kinds = {"weights": 150, "gradients": 150, "optimizer": 300, "activations": activations, "logits": 0}
    plan: Any = SimpleNamespace(memory=MemoryNeed(kinds=kinds, phases={}), weights_dtype="fp32", precision=precision)
    (said,) = [found for found in claims(one.rows, one.decision, 1, (), plan) if "fp16" in found.claim]
    assert f"at most {share} less" in said.here
    assert "no card has measured it" in said.here
    assert said.holds is holds
    plan.weights_dtype = "bf16"  # half of everything indeed
    assert claims(one.rows, one.decision, 1, (), plan) == claims(one.rows, one.decision, 1, ())
