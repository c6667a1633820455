"""The method advice as a table."""

from __future__ import annotations

from typing import Any

import pytest

from fulltune.plan.elsewhere.advise import GOALS, Situation, advise

DECODER = {"num_parameters": 7 * 10**9, "is_decoder": True, "fits": True}
ENCODER = {"num_parameters": 110 * 10**6, "is_decoder": False, "fits": True}


def verdicts(**changes: Any) -> dict[str, str]:
    here = Situation(**{"train_rows": 50_000, **DECODER, **changes})
    return {one.method: one.verdict for one in advise(here)}


@pytest.mark.parametrize(
    ("changes", "full", "lora", "adapters"),
    [
        ({"train_rows": 500}, "try", "take", "leave"),
        ({"train_rows": 50_000}, "try", "try", "leave"),
        ({"train_rows": 100_000}, "take", "try", "leave"),
        ({"train_rows": 100_000, "fits": False}, "leave", "take", "leave"),
        ({"train_rows": 500, "fits": False, "lora_fits": True}, "leave", "take", "leave"),
        ({"train_rows": 500, "fits": False, "lora_fits": False}, "leave", "leave", "leave"),
        # Full fine-tuning is shared out there, LoRA's weights are not.
        ({"train_rows": 500, "frozen_fits": False}, "try", "leave", "leave"),
        ({"train_rows": 500, "lora_fits": False}, "try", "leave", "leave"),
        ({"train_rows": 500, **ENCODER}, "try", "try", "leave"),
        ({"train_rows": 100_000, "fits": False, "frozen_fits": False}, "leave", "leave", "leave"),
        ({"train_rows": 50_000, **ENCODER}, "take", "try", "leave"),
        ({"tasks": 20}, "try", "try", "take"),
        ({"tasks": 4}, "try", "try", "leave"),
        ({"train_rows": 500, "goal": "knowledge"}, "take", "try", "leave"),
        ({"train_rows": 500, "goal": "language"}, "take", "try", "leave"),
        ({"train_rows": 500, "goal": "updates"}, "take", "try", "leave"),
        ({"goal": "style"}, "try", "take", "leave"),
        ({"preserve": True}, "try", "try", "leave"),
        ({"goal": "knowledge", "fits": False}, "leave", "take", "leave"),
    ],
)
def test_advice_follows_from_the_situation(changes: dict[str, Any], full: str, lora: str, adapters: str) -> None:
    assert verdicts(**changes) == {
        "full fine-tuning": full,
        "LoRA": lora,
        "adapters": adapters,
        "prompt tuning": "leave",
    }


@pytest.mark.parametrize("goal", [None, *GOALS])
@pytest.mark.parametrize("rows", [100, 20_000, 10**6])
@pytest.mark.parametrize("shape", [DECODER, ENCODER])
def test_every_line_has_a_rule_and_the_best_is_first(goal: Any, rows: int, shape: dict[str, Any]) -> None:
    found = advise(Situation(train_rows=rows, **shape, goal=goal, tasks=7, preserve=True))
    assert len(found) == 4
    assert all(one.rule for one in found)
    order = ["take", "try", "leave"]
    assert [one.verdict for one in found] == sorted((one.verdict for one in found), key=order.index)


def test_few_rows_of_a_decoder_ask_for_several_seeds() -> None:
    found = {one.method: one for one in advise(Situation(train_rows=500, **DECODER))}
    assert "three seeds" in found["full fine-tuning"].rule
    assert "few rows" in found["LoRA"].rule


@pytest.mark.parametrize(("parameters", "verdict"), [(110 * 10**6, "leave"), (7 * 10**9, "leave"), (13 * 10**9, "try")])
def test_prompts_are_level_only_in_large_models(parameters: int, verdict: str) -> None:
    found = {one.method: one for one in advise(Situation(50_000, parameters, is_decoder=True, fits=True))}
    prompts = found["prompt tuning"]
    assert prompts.verdict == verdict
    assert "at about 11 B" in prompts.rule


def test_size_of_frozen_weights_that_do_not_fit_is_said() -> None:
    found = advise(Situation(50_000, 7 * 10**9, is_decoder=True, fits=False, frozen_fits=False))
    rules = {one.method: one.rule for one in found}
    assert rules["LoRA"] == "its frozen weights alone are about 13.0 GiB in 16 bits: they do not fit either"
