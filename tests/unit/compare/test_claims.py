"""Claims that one often reads, against made-up comparisons."""

from __future__ import annotations

from fulltune.compare.claims import claims
from tests import comparisons


def test_claims_are_judged_from_the_rows() -> None:
    one = comparisons.comparison()
    found = {claim.claim: claim for claim in claims(one.rows, one.decision, one.train_rows, 1.0)}
    lora = next(row for row in one.rows if row.kind == "lora")
    full = next(row for row in one.rows if row.kind == "full")
    compute = found["LoRA costs a tenth of the compute"]
    assert f"{lora.train_flops / full.train_flops:.2f} of the operations" in compute.here
    assert compute.holds is (lora.train_flops / full.train_flops <= 0.15)
    assert found["LoRA reaches 90 to 95 % of full's gain"].holds is (
        lora.gain_share is not None and lora.gain_share >= 0.9
    )
    weaker = found["prompt tuning is weaker"]
    assert "points of accuracy" in weaker.here
    assert weaker.holds is one.decision.difference("prompt").full_better


def test_best_quality_is_not_decided_by_an_undecided_comparison() -> None:
    one = comparisons.undecided()
    best = claims(one.rows, one.decision, one.train_rows, 1.0)[0]
    assert best.holds is None
