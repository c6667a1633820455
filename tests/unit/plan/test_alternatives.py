"""Alternatives when memory or disk is too small: what is freed, what is enough, the least harm first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fulltune.plan import alternatives, budget, gpus, placements
from fulltune.plan.workload import make_basis
from fulltune.recipe.fields import Recipe
from fulltune.records.plan import Alternative, DiskNeed, MemoryNeed, MemorySettings
from tests import plans
from tests.unit.plan import sizes

GIB = 2**30
SETTINGS = MemorySettings(micro_batch_size=8, longest_tokens=1024, precision="bf16", weights_dtype="fp32")


def need(settings: MemorySettings) -> MemoryNeed:
    """16 GiB of state with AdamW in fp32; 1 GiB a row of 1,024 tokens, an eighth when recomputed; 4 of logits."""
    size = 4 if settings.weights_dtype == "fp32" else 2
    moments = {"adamw_torch_fused": 8, "adamw_bf16": 4, "adamw_8bit": 2}[settings.optim]
    row = settings.longest_tokens / 1024 * (0.125 if settings.activation_checkpointing else 1)
    kinds: dict[Any, int] = {
        "weights": size * GIB,
        "gradients": size * GIB,
        "optimizer": moments * GIB,
        "activations": round(settings.micro_batch_size * row * GIB),
        "logits": (0 if settings.chunked_loss else 4) * GIB,
        "buffers": 0,
    }
    return MemoryNeed(kinds=kinds, phases={"step": sum(kinds.values())})


def ways(budget_gib: float, settings: MemorySettings = SETTINGS, **train: Any) -> list[tuple[str, float, bool]]:
    basis: Any = SimpleNamespace(
        recipe=plans.recipe("causal-lm", train=train), memory_need=need, available_bytes=round(budget_gib * GIB)
    )
    proposed = alternatives.propose_for_memory(basis, settings)
    return [(way.change, way.frees_bytes / GIB, way.enough) for way in proposed]


@pytest.mark.parametrize(("budget", "is_told"), [(1, False), (6.001, True)])
def test_what_frees_next_to_nothing_of_what_is_short_is_left_out(budget: float, is_told: bool) -> None:
    """6 GiB of state and eight rows of a thousandth: a batch of one row helps only where a thousandth is short."""
    small = {"longest_tokens": 1, "weights_dtype": "bf16", "optim": "adamw_8bit", "chunked_loss": True}
    proposed = ways(budget, SETTINGS.changed(**small))
    assert ("train.micro_batch_size: 1" in [change for change, _, _ in proposed]) is is_told


@pytest.mark.parametrize(
    ("budget", "settings", "train", "expected"),
    [
        (
            23,
            SETTINGS,
            {},
            [
                ("train.micro_batch_size: 1", 7, True),
                ("train.activation_checkpointing: true", 7, True),
                ("train.optim: adamw_8bit", 6, True),
            ],
        ),
        (
            20,
            SETTINGS,
            {"chunked_loss": False},
            [
                ("model.weights_dtype: bf16", 8, True),
                ("model.weights_dtype: bf16 with train.optim: adamw_8bit", 10, True),
                ("a model with at most about 767 M parameters", 8, True),
            ],
        ),
        (
            24,
            SETTINGS.changed(micro_batch_size=1, activation_checkpointing=True),
            {"chunked_loss": False},
            [],
        ),
    ],
)
def test_ways_that_are_enough_come_first_by_harm(
    budget: float, settings: MemorySettings, train: dict[str, Any], expected: list[tuple[str, float, bool]]
) -> None:
    proposed = ways(budget, settings, **train)
    assert proposed[: len(expected)] == [
        (words, pytest.approx(freed, abs=0.01), enough) for words, freed, enough in expected
    ]


def test_ways_that_are_not_enough_alone_are_put_together() -> None:
    proposed = ways(10, SETTINGS.changed(chunked_loss=True))
    assert proposed[0][0] == (
        "train.micro_batch_size: 1 with train.activation_checkpointing: true, train.optim: adamw_8bit and "
        "model.weights_dtype: bf16"
    )
    assert proposed[0][2]
    assert proposed[1][0].startswith("a model with at most about")


def test_nothing_that_frees_nothing_is_named() -> None:
    least = SETTINGS.changed(
        micro_batch_size=1, activation_checkpointing=True, weights_dtype="bf16", optim="adamw_8bit"
    )
    names = [words for words, _, _ in ways(1, least.changed(chunked_loss=True, longest_tokens=64))]
    assert names == ["a model with at most about 179 M parameters"]


def test_other_placements_that_fit_are_alternatives() -> None:
    basis = make_basis(sizes.llama(), gpus.parse_hardware("1x RTX 4090, 256GB host"))
    smallest = basis.start.changed(gradient_accumulation_steps=64, activation_checkpointing=True, optim="adamw_8bit")
    proposed = alternatives.propose_for_memory(basis, smallest, placements.placement_table(basis))
    assert proposed[0].enough
    assert "on host" in proposed[0].change
    assert proposed[0].settings == {"train.placement": "zero2", "train.offload": "optimizer"}
    assert "--set train.placement=zero2 --set train.offload=optimizer" in alternatives.format_alternatives(proposed)[0]
    assert len(proposed) <= alternatives.MAX_ALTERNATIVES


@pytest.mark.parametrize(
    ("kept", "free", "expected"),
    [
        (
            2,
            50,
            [
                ("train.save_total_limit: 1", 12, True),
                ("train.optim: adamw_8bit", 24, True),
                ("free 6 GiB on the disk of runs, or choose another folder", 6, True),
            ],
        ),
        (
            1,
            20,
            [
                ("free 36 GiB on the disk of runs, or choose another folder", 36, True),
                ("train.optim: adamw_8bit", 24, False),
            ],
        ),
    ],
)
def test_alternatives_of_a_full_disk(
    kept: int, free: int, expected: list[tuple[str, int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    proposed = of_disk(monkeypatch, free * GIB, kept)
    assert [(way.change, way.frees_bytes / GIB, way.enough) for way in proposed] == expected


def of_disk(monkeypatch: pytest.MonkeyPatch, free: int, kept: int) -> tuple[Alternative, ...]:
    """Alternatives for four checkpoints of 12 GiB (6 with 8-bit moments) and 8 GiB of models."""

    def need(recipe: Recipe, num_parameters: int, settings: MemorySettings) -> DiskNeed:
        one = 6 if settings.optim == "adamw_8bit" else 12
        return DiskNeed(checkpoint_bytes=one * GIB, num_checkpoints=4, model=8 * GIB)

    monkeypatch.setattr(budget, "disk_need", need)
    return alternatives.propose_for_disk(plans.recipe(train={"save_total_limit": kept}), 1, SETTINGS, free)


def test_lines_say_what_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = alternatives.format_alternatives(of_disk(monkeypatch, 20 * GIB, 1))
    assert lines == [
        "enough: free 36 GiB on the disk of runs, or choose another folder",
        "not enough alone: train.optim: adamw_8bit: frees 24 GiB (8-bit moments)",
    ]


@pytest.mark.parametrize(
    "train", [{"placement": "zero2"}, {"extra": {"deepspeed": {"zero_optimization": {"stage": 2}}}}]
)
def test_deepspeed_is_offered_nothing_that_it_cannot_have(train: dict[str, Any]) -> None:
    proposed = ways(10, **train)
    assert proposed
    assert not any(word in change for change, _, _ in proposed for word in ("adamw_8bit", "bf16", "a model"))
