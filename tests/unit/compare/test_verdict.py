"""The four verdicts, from planted rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fulltune.compare.verdict import MethodOutputs
from fulltune.recipe.methods import MethodKind
from fulltune.records.comparison import Decision
from fulltune.stats.bootstrap import find_metric
from fulltune.tasks import Target
from tests.unit.compare.methods import decided, drawn_right, method

ROWS = 4000
KINDS: dict[str, tuple[MethodKind, float]] = {
    "full": ("full", 100),
    "lora": ("lora", 10),
    "adapter": ("adapter", 5),
    "prompt": ("prompt", 1),
    "smoothed": ("variant", 100),
    "longer": ("variant", 100),
    "head": ("head", 0.5),
}


def decision(accuracies: dict[str, float], rows: int = ROWS, seeds: int = 3, margin: float = 0.01) -> Decision:
    right = drawn_right(np.random.default_rng(0), rows, list(accuracies.values()), 0.001, seeds)
    methods = [method(name, KINDS[name][0], one, KINDS[name][1]) for name, one in zip(accuracies, right, strict=True)]
    return decided(methods, margin=margin)


@pytest.mark.parametrize(
    ("accuracies", "verdict", "recommended"),
    [
        ({"full": 0.93, "lora": 0.89}, "FULL", "full"),
        ({"full": 0.93, "lora": 0.89, "prompt": 0.7}, "FULL", "full"),
        ({"full": 0.89, "lora": 0.93}, "PEFT", "lora"),
        ({"full": 0.89, "lora": 0.93, "adapter": 0.96, "prompt": 0.7}, "PEFT", "adapter"),
        ({"full": 0.95, "lora": 0.9505}, "EQUIVALENT", "lora"),
        ({"full": 0.95, "lora": 0.9505, "adapter": 0.9503, "prompt": 0.7}, "EQUIVALENT", "adapter"),
        # One method is beaten, the other is not: full is not worth it.
        ({"full": 0.95, "lora": 0.85, "adapter": 0.9505}, "EQUIVALENT", "adapter"),
        # PEFT goes before EQUIVALENT.
        ({"full": 0.91, "lora": 0.95, "adapter": 0.9105}, "PEFT", "lora"),
        # Full fine-tuning with other settings costs the same: it is taken only where it is better.
        ({"full": 0.89, "smoothed": 0.93}, "VARIANT", "smoothed"),
        ({"full": 0.89, "smoothed": 0.93, "lora": 0.96}, "PEFT", "lora"),
        ({"full": 0.95, "smoothed": 0.9505}, "EQUIVALENT", "full"),
        ({"full": 0.95, "smoothed": 0.9505, "longer": 0.85}, "EQUIVALENT", "full"),
        ({"full": 0.95, "smoothed": 0.9505, "lora": 0.9503}, "EQUIVALENT", "lora"),
        ({"full": 0.93, "smoothed": 0.89}, "FULL", "full"),
        # What only serves for orientation decides nothing.
        ({"full": 0.93, "lora": 0.89, "head": 0.9305}, "FULL", "full"),
    ],
    ids=lambda value: str(value),
)
def test_verdict_of_planted_accuracies(accuracies: dict[str, float], verdict: str, recommended: str) -> None:
    result = decision(accuracies)
    assert (result.verdict, result.recommended) == (verdict, recommended)
    assert result.headline
    assert len(result.because) == len([name for name in accuracies if name not in ("full", "head")])
    assert result.would_decide == ()


def test_verdict_few_rows_is_undecided_and_says_what_would_decide() -> None:
    result = decision({"full": 0.93, "lora": 0.89}, rows=300)
    assert (result.verdict, result.recommended) == ("UNDECIDED", "")
    (difference,) = result.differences
    assert difference.seeds_needed is not None
    assert difference.seeds_needed > 3
    assert f"{difference.seeds_needed} seeds per method" in result.would_decide[0]
    assert difference.detectable > 0.03


def test_verdict_one_seed_is_never_decided() -> None:
    result = decision({"full": 0.95, "lora": 0.75}, seeds=1)
    assert result.verdict == "UNDECIDED"
    assert not result.differences[0].seeds_known
    assert "one seed" in result.because[0]
    assert "train three or more seeds of full and of lora" in result.would_decide[0]


def test_verdict_method_that_may_be_better_is_recommended_though_undecided() -> None:
    result = decision({"full": 0.93, "lora": 0.94}, rows=2500)
    assert (result.verdict, result.recommended) == ("UNDECIDED", "lora")
    assert result.differences[0].not_worse


def test_verdict_method_with_one_seed_borrows_the_spread_and_is_noted() -> None:
    right = drawn_right(np.random.default_rng(0), ROWS, [0.93, 0.80, 0.89], 0.001)
    methods = [
        method("full", "full", right[0], 9.0),
        method("prompt", "prompt", right[1][:1]),
        method("lora", "lora", right[2]),
    ]
    result = decided(methods)
    assert result.verdict == "FULL"
    assert any(note.startswith("prompt: only one seed") for note in result.notes)
    assert result.difference("prompt").num_seeds == 1


def test_verdict_of_a_loss_is_oriented() -> None:
    loss = find_metric("causal-lm", Target("text", {}), "loss")
    chance = np.random.default_rng(0)
    count = chance.integers(5, 50, 500).astype(float)
    ease = chance.random(500)

    def trials(level: float) -> list[dict[str, np.ndarray]]:
        return [{"nll": count * (level + ease + chance.normal(0, 0.05, 500)), "tokens": count} for _ in range(3)]

    methods = [
        MethodOutputs("base", "base", trials(3.0)[:1], 0.0),
        MethodOutputs("full", "full", trials(1.0), 9.0),
        MethodOutputs("lora", "lora", trials(1.2), 1.0),
    ]
    result = decided(methods, loss, margin=0.02)
    assert result.verdict == "FULL"
    assert result.difference("lora").estimate == pytest.approx(0.2, abs=0.02)
    assert result.difference("base").estimate == pytest.approx(2.0, abs=0.02)
    assert not result.difference("base").decides
    assert "base" not in result.seed_sds


def test_verdict_is_the_same_from_its_json() -> None:
    result = decision({"full": 0.93, "lora": 0.89, "prompt": 0.7})
    assert Decision.model_validate_json(result.model_dump_json()) == result
    assert result == decision({"full": 0.93, "lora": 0.89, "prompt": 0.7})


def test_verdict_at_spent_alpha_is_stricter() -> None:
    right = drawn_right(np.random.default_rng(0), 1000, [0.93, 0.90], 0.001)
    methods = [method("full", "full", right[0], 9.0), method("lora", "lora", right[1])]
    usual, strict = (decided(methods, alpha=alpha) for alpha in (0.05, 0.002))
    assert strict.differences[0].adjusted_low < usual.differences[0].adjusted_low


def test_intervals_of_shares_stay_within_what_shares_can_be() -> None:
    """Two seeds that differ much allow anything; nothing is right more than always."""
    right = drawn_right(np.random.default_rng(3), 60, [0.9, 0.6], 0.2, 2)
    result = decided([method("full", "full", right[0], 2), method("lora", "lora", right[1], 1)])
    for score in result.scores.values():
        assert 0 <= score.low <= score.value <= score.high <= 1
    (apart,) = result.differences
    assert -1 <= apart.adjusted_low <= apart.estimate <= apart.adjusted_high <= 1
    assert result.scores["full"].high == 1


def test_method_that_waited_is_tested_at_its_part_of_alpha() -> None:
    right = drawn_right(np.random.default_rng(0), ROWS, [0.93, 0.90], 0.004, 3)
    full, lora = method("full", "full", right[0], 2), method("lora", "lora", right[1], 1)
    whole, part = decided([full, lora]), decided([full, replace(lora, alpha_share=0.25)])
    quarter = decided([full, lora], alpha=0.0125)
    assert part.differences[0].adjusted_low < whole.differences[0].adjusted_low
    assert part.differences[0].adjusted_low == pytest.approx(quarter.differences[0].adjusted_low)
