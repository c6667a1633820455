"""Each planted defect is found, and none in a clean design."""

from __future__ import annotations

from typing import Any

import pytest

from fulltune.compare.lint import lint
from fulltune.records.differences import ArmDesign, ComparisonDesign

CLEAN_FULL: dict[str, Any] = {
    "name": "full",
    "kind": "full",
    "rates_searched": (1e-5, 3e-5, 1e-4),
    "learning_rate": 3e-5,
    "seeds": (1, 2, 3),
    "train_tokens": 1_000_000,
}
CLEAN_LORA: dict[str, Any] = {
    **CLEAN_FULL,
    "name": "lora",
    "kind": "lora",
    "settings": {"rank": 16, "target_modules": "all-linear"},
    "rates_searched": (1e-4, 3e-4, 1e-3),
    "learning_rate": 3e-4,
}


def design(full: dict[str, Any] | None = None, lora: dict[str, Any] | None = None, **more: Any) -> ComparisonDesign:
    return ComparisonDesign(
        arms=(
            ArmDesign(name="base", kind="base"),
            ArmDesign(**{**CLEAN_FULL, "name": "head", "kind": "head"}),
            ArmDesign(**{**CLEAN_FULL, **(full or {})}),
            ArmDesign(**{**CLEAN_LORA, **(lora or {})}),
        ),
        test_openings=1,
        **more,
    )


def test_lint_of_clean_design_is_silent() -> None:
    assert lint(design()) == ()
    assert lint(design(full={"weights_dtype": "bf16", "bf16_rounding": "stochastic"})) == ()
    assert lint(design(lora={"seeds": (1,), "waited": True})) == ()
    assert lint(design(lora={"train_tokens": 990_000})) == ()
    assert lint(design(full={"whole_runs": 2})) == ()  # methods that waited, where the verdict is not FULL
    assert lint(design(full={"whole_runs": 2}, lora={"whole_runs": 2}, full_wins=True)) == ()


@pytest.mark.parametrize(
    ("planted", "rule", "level", "said"),
    [
        ({"lora": {"seeds": (1,), "time_was_up": True}}, "few-seeds", "worth knowing", "one seed: the budget ends"),
        ({"lora": {"seeds": (1, 2), "time_was_up": True}}, "few-seeds", "worth knowing", "2 seeds: the budget ends"),
        (
            {"lora": {"rates_searched": (), "no_time_to_search": True}},
            "rate-not-searched",
            "unfair",
            "the budget leaves no time to search",
        ),
        ({"left_out": ("prompt",)}, "left-out", "worth knowing", "the budget leaves no time for it"),
    ],
)
def test_what_the_budget_caused_is_called_so(planted: dict[str, Any], rule: str, level: str, said: str) -> None:
    (found,) = lint(design(**planted))
    assert (found.rule, found.level) == (rule, level)
    assert found.what.startswith(said) or said in found.what
    assert "--budget" in found.to_do


def test_test_rows_opened_again_for_more_time_are_no_unfairness() -> None:
    found = lint(design().model_copy(update={"test_openings": 2}))
    assert [(one.rule, one.level) for one in found] == [("test-opened-again", "worth knowing")]


@pytest.mark.parametrize(
    ("rule", "where", "level", "planted"),
    [
        ("rate-not-searched", "lora", "unfair", {"lora": {"rates_searched": ()}}),
        ("rate-not-searched", "lora", "unfair", {"lora": {"rates_searched": (3e-4,)}}),
        ("edge-of-grid", "lora", "unfair", {"lora": {"learning_rate": 1e-3}}),
        ("edge-of-grid", "full", "unfair", {"full": {"learning_rate": 1e-5}}),
        ("low-peft-rates", "lora", "unfair", {"lora": {"rates_searched": (1e-5, 3e-5, 1e-4), "learning_rate": 3e-5}}),
        ("unequal-search", "lora", "unfair", {"full": {"whole_runs": 2}, "full_wins": True}),
        ("few-seeds", "full", "unfair", {"full": {"seeds": (1,)}}),
        ("few-seeds", "lora", "worth knowing", {"lora": {"seeds": (1, 2)}}),
        ("eval-is-test", "rows", "unfair", {"test_in_eval": 0.3}),
        ("few-eval-rows", "eval rows", "worth knowing", {"eval_rows": 28, "rates_told": 0.065, "margin": 0.01}),
        ("test-in-train", "test rows", "worth knowing", {"test_in_train": "3 of 28 test rows have a text ..."}),
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
        ("quantised-source", "model", "unfair", {"weights_source": "4bit"}),
        ("test-opened-again", "test rows", "worth knowing", {"opened_by_others": ("banking77-1",)}),
        ("quantised-source", "model", "unfair", {"weights_source": "gguf"}),
    ],
)
def test_lint_planted_defect_is_the_only_finding(rule: str, where: str, level: str, planted: dict[str, Any]) -> None:
    (found,) = lint(design(**planted))
    assert (found.rule, found.where, found.level) == (rule, where, level)
    assert found.what
    assert found.to_do


def test_lint_few_eval_rows_says_how_many_and_what_they_tell_and_blames_no_method() -> None:
    (found,) = lint(design(eval_rows=28, rates_told=0.0651, margin=0.01))
    assert (
        "28 rows choose the learning rates, too few to tell rates apart that differ by less than about 6.5 points"
        in (found.what)
    )
    assert lint(design(eval_rows=2000, rates_told=0.0067, margin=0.01)) == ()
    assert lint(design(eval_rows=28, rates_told=None, margin=0.01)) == ()  # the metric is no share
    fixed = {"rates_searched": (1e-4,)}
    made = design(eval_rows=28, rates_told=0.065, margin=0.01)
    arms = tuple(one.model_copy(update=fixed) for one in made.arms)
    assert "few-eval-rows" not in [one.rule for one in lint(made.model_copy(update={"arms": arms}))]  # none chosen


def test_lint_rates_of_full_that_whole_runs_led_up_to_do_not_make_those_of_lora_low() -> None:
    climbed = {"rates_searched": (3e-5, 1e-4, 3e-4, 1e-3), "learning_rate": 3e-4, "on_edge": False}
    assert lint(design(full=climbed, lora={"on_edge": False})) == ()
    assert [one.rule for one in lint(design(full=climbed))] == ["low-peft-rates"]


def test_lint_edge_that_is_no_better_than_its_neighbour_is_fine() -> None:
    assert lint(design(lora={"learning_rate": 1e-3, "on_edge": False})) == ()


def test_lint_one_rate_for_all_methods() -> None:
    same = {"rates_searched": (1e-4,), "learning_rate": 1e-4}
    arms = [ArmDesign(**{**one, **same}) for one in (CLEAN_FULL, CLEAN_LORA)]
    rules = {finding.rule for finding in lint(ComparisonDesign(arms=tuple(arms)))}
    assert {"one-rate-for-all", "rate-not-searched"} <= rules


def test_lint_targets_beside_attention_are_fine() -> None:
    for names in (["q_proj", "v_proj", "up_proj"], ["query", "dense"], ["fc1"]):
        assert lint(design(lora={"settings": {"target_modules": names}})) == ()


def test_lint_flags_hugging_faces_peft_benchmark() -> None:
    """Full arm of its `method_comparison`: bf16 weights without a master copy, one rate, one seed; LoRA on q and v."""
    found = lint(
        ComparisonDesign(
            arms=(
                ArmDesign(name="full", kind="full", learning_rate=1e-5, seeds=(0,), weights_dtype="bf16"),
                ArmDesign(
                    name="lora",
                    kind="lora",
                    learning_rate=1e-4,
                    seeds=(0,),
                    settings={"rank": 32, "target_modules": ["q_proj", "v_proj"]},
                ),
            ),
        )
    )
    assert {(finding.rule, finding.where) for finding in found} == {
        ("bf16-full", "full"),
        ("rate-not-searched", "full"),
        ("rate-not-searched", "lora"),
        ("few-seeds", "full"),
        ("few-seeds", "lora"),
        ("attention-only-lora", "lora"),
    }
    assert all(finding.level == "unfair" for finding in found)
