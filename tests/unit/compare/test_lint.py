"""Each planted defect is found, and none in a clean design."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from fulltune.compare import lint
from fulltune.compare.rates import MetricScale
from fulltune.records.comparison import Finding, MethodRow, Search
from fulltune.records.scores import Estimate
from tests import comparisons


def searched(*tried: float, chosen: float, **more: Any) -> Search:
    return Search(method="", tried=dict.fromkeys(tried, 0.9), chosen=chosen, **more)


HIGH: dict[str, Any] = {"tried": (1e-4, 3e-4, 1e-3), "chosen": 3e-4}
LOW: dict[str, Any] = {"tried": (1e-5, 3e-5, 1e-4), "chosen": 3e-5}


def found_by(tried: tuple[float, ...] = (), **more: Any) -> dict[str, Any]:
    return {"search": searched(*tried, **more)}


CLEAN_FULL: dict[str, Any] = {
    "method": "full",
    "kind": "full",
    **found_by(**LOW),
    "seeds": (1, 2, 3),
    "train_tokens": 1_000_000,
    "metric": Estimate(value=0.7, low=0.7, high=0.7),
}
CLEAN_LORA: dict[str, Any] = {
    **CLEAN_FULL,
    **found_by(**HIGH),
    "method": "lora",
    "kind": "lora",
    "settings": {"rank": 16, "target_modules": "all-linear"},
}
WHOLE = {"whole": {1e-5: 0.9, 3e-5: 0.9}}


def rules(full: dict[str, Any] | None = None, lora: dict[str, Any] | None = None, **more: Any) -> tuple[Finding, ...]:
    """What is found in a clean comparison with these changes."""
    head, *rows = (
        {**CLEAN_FULL, "method": "head", "kind": "head"},
        {**CLEAN_FULL, **(full or {})},
        CLEAN_LORA | (lora or {}),
    )
    return rules_of(
        [MethodRow(method="base", kind="base"), MethodRow(**head), *(MethodRow(**row) for row in rows)], **more
    )


def rules_of(
    rows: Sequence[MethodRow],
    verdict: str = "EQUIVALENT",
    eval_rows: int = 10**6,
    **more: Any,
) -> tuple[Finding, ...]:
    compared = comparisons.comparison(rows=tuple(rows), decision={"verdict": verdict})
    line = mock.MagicMock(folder=Path("none"), metric_scale=MetricScale(True, eval_rows, True))
    line.recipe.compare.margin = 0.01
    line.summary = SimpleNamespace(
        **{"test_share_in_eval": more.pop("test_share_in_eval", 0.0), "notes": more.pop("notes", ())}
    )
    seed_runs: Any = SimpleNamespace(**{"context": line, "time_was_up": False, "dropped_methods": (), **more})
    return lint.lint_comparison(seed_runs, compared)


def test_lint_of_clean_design_is_silent() -> None:
    assert rules() == ()
    assert rules(full={"weights_dtype": "bf16", "bf16_rounding": "stochastic"}) == ()
    assert rules(lora={"seeds": (1,), "waited": True}) == ()
    assert rules(lora={"train_tokens": 990_000}) == ()
    full = found_by(**LOW, **WHOLE)
    assert rules(full=full) == ()  # methods that waited, where the verdict is not FULL
    assert rules(full=full, lora=found_by(**HIGH, whole={3e-4: 0.9}), verdict="FULL") == ()


@pytest.mark.parametrize(
    ("planted", "rule", "level", "words"),
    [
        ({"lora": {"seeds": (1,)}, "time_was_up": True}, "no-time-for-seeds", "worth knowing", "only 1 seed, because"),
        (
            {"lora": {"seeds": (1, 2)}, "time_was_up": True},
            "no-time-for-seeds",
            "worth knowing",
            "only 2 seeds, because",
        ),
        (
            {"lora": found_by(chosen=3e-4, time_was_up=True)},
            "rate-not-searched",
            "unfair",
            "its learning rate was not searched",
        ),
        ({"dropped_methods": ("prompt",)}, "left-out", "worth knowing", "the budget is too short"),
    ],
)
def test_what_the_budget_caused_is_called_so(planted: dict[str, Any], rule: str, level: str, words: str) -> None:
    (finding,) = rules(**planted)
    assert (finding.rule, finding.level) == (rule, level)
    assert finding.what.startswith(words) or words in finding.what
    assert "--budget" in finding.to_do


@pytest.mark.parametrize(
    ("rule", "where", "level", "planted"),
    [
        ("rate-not-searched", "lora", "unfair", {"lora": found_by(chosen=3e-4)}),
        ("rate-not-searched", "lora", "unfair", {"lora": found_by((3e-4,), chosen=3e-4)}),
        ("edge-of-grid", "lora", "unfair", {"lora": found_by((1e-4, 3e-4, 1e-3), chosen=1e-3, on_edge=True)}),
        ("edge-of-grid", "full", "unfair", {"full": found_by((1e-5, 3e-5, 1e-4), chosen=1e-5, on_edge=True)}),
        ("low-peft-rates", "lora", "unfair", {"lora": found_by((1e-5, 3e-5, 1e-4), chosen=math.nan)}),
        ("unequal-search", "lora", "unfair", {"full": found_by(**LOW, **WHOLE), "verdict": "FULL"}),
        ("one-seed", "full", "unfair", {"full": {"seeds": (1,)}}),
        ("few-seeds", "lora", "worth knowing", {"lora": {"seeds": (1, 2)}}),
        ("eval-is-test", "rows", "unfair", {"test_share_in_eval": 0.3}),
        ("few-eval-rows", "eval rows", "worth knowing", {"eval_rows": 28}),
        (
            "test-in-train",
            "test rows",
            "worth knowing",
            {"notes": ["3 of 28 test rows have a text that also occurs in train"]},
        ),
        ("unequal-tokens", "full, lora", "unfair", {"lora": {"train_tokens": 700_000}}),
        ("unequal-heads", "methods", "unfair", {"full": {"settings": {"head_init": "random"}}}),
        ("attention-only-lora", "lora", "unfair", {"lora": {"settings": {"target_modules": ["q_proj", "v_proj"]}}}),
        ("attention-only-lora", "lora", "unfair", {"lora": {"settings": {"target_modules": ["attention.self.query"]}}}),
        (
            "attention-only-lora",
            "lora",
            "unfair",
            {"lora": {"kind": "peft", "settings": {"type": "LOHA", "config": {"target_modules": ["query", "value"]}}}},
        ),
        ("bf16-full", "full", "unfair", {"full": {"weights_dtype": "bf16", "bf16_rounding": "nearest"}}),
        ("bf16-full", "full", "unfair", {"full": {"weights_dtype": "bf16"}}),
    ],
)
def test_lint_planted_defect_is_the_only_finding(rule: str, where: str, level: str, planted: dict[str, Any]) -> None:
    (finding,) = rules(**planted)
    assert (finding.rule, finding.where, finding.level) == (rule, where, level)
    assert finding.what
    assert finding.to_do


def test_lint_rates_of_full_that_whole_runs_led_up_to_do_not_make_those_of_lora_low() -> None:
    climbed = found_by((3e-5, 1e-4, 3e-4, 1e-3), chosen=3e-4)
    assert rules(full=climbed) == ()
    unknown = found_by(HIGH["tried"], chosen=math.nan)
    assert [one.rule for one in rules(full=climbed, lora=unknown)] == ["low-peft-rates"]


def test_lint_edge_that_is_no_better_than_its_neighbour_is_fine() -> None:
    assert rules(lora=found_by(HIGH["tried"], chosen=1e-3)) == ()


def test_lint_targets_beside_attention_are_fine() -> None:
    for names in (["q_proj", "v_proj", "up_proj"], ["query", "dense"], ["fc1"]):
        assert rules(lora={"settings": {"target_modules": names}}) == ()


def test_lint_flags_hugging_faces_peft_benchmark() -> None:
    """Full method of its `method_comparison`: bf16 weights without a master copy, one rate, one seed; LoRA on q, v."""
    lora = {"rank": 32, "target_modules": ["q_proj", "v_proj"]}
    findings = rules_of(
        [
            MethodRow(method="full", kind="full", **found_by(chosen=1e-5), seeds=(0,), weights_dtype="bf16"),
            MethodRow(method="lora", kind="lora", **found_by(chosen=1e-4), seeds=(0,), settings=lora),
        ]
    )
    assert {(finding.rule, finding.where) for finding in findings} == {
        ("bf16-full", "full"),
        ("rate-not-searched", "full"),
        ("rate-not-searched", "lora"),
        ("one-seed", "full"),
        ("one-seed", "lora"),
        ("attention-only-lora", "lora"),
    }
    assert all(finding.level == "unfair" for finding in findings)
