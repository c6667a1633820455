"""AdamW with small states and weights follows torch's; small updates arrive; what would lose updates is refused."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Adafactor

from fulltune.errors import RecipeError, SetupError
from fulltune.recipe.fields import Recipe
from fulltune.train.loop import arguments
from fulltune.train.loop.arguments import check_trainable
from fulltune.train.optim import moments
from fulltune.train.optim.optimizers import AdamW
from fulltune.train.worker.weights import InitialWeights, second_moment
from tests import tiny
from tests.train import runs

FORMATS = ("fp32", "bf16", "8bit")
ROUNDINGS = ("stochastic", "kahan", "nearest")
SHAPES = ((70, 100), (33,), (384, 64), (129, 65))
"""Above and below the size from which 8 bits are used; in whole groups and not; in one slice."""


def tensors(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter((torch.randn(shape, generator=drawn) * 0.1).to(dtype)) for shape in shapes]


def train(parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps with gradients that depend on the step alone."""
    for step in steps:
        drawn = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = (torch.randn(parameter.shape, generator=drawn) * 0.01).to(parameter.dtype)
        optimizer.step()


def groups(parameters: Sequence[torch.Tensor]) -> list[dict[str, Any]]:
    return [
        {"params": list(parameters[:2]), "weight_decay": 0.1, "lr": 1e-3},
        {"params": list(parameters[2:]), "weight_decay": 0.0},
    ]


def make(parameters: Sequence[torch.Tensor], moments_format: str = "fp32", **options: Any) -> AdamW:
    return AdamW(groups(parameters), **{"lr": 2e-3, "moments_format": moments_format, "seed": 3, **options})


# ---- arithmetic ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2**16, 2**11])
def test_fp32_follows_torch_adamw(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fulltune.train.optim.optimizers.CPU_SLICE", size)
    expected, found = tensors(), tensors()

    train(expected, torch.optim.AdamW(groups(expected), lr=2e-3), range(40))
    train(found, make(found), range(40))

    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_noncontiguous_weights_and_gradients_are_updated_in_place() -> None:
    expected = torch.nn.Parameter(torch.linspace(-1, 1, 6000).view(60, 100))
    found = torch.nn.Parameter(expected.detach().clone().t().contiguous().t())
    assert not found.is_contiguous()
    for parameter in (expected, found):
        optimizer = AdamW([parameter], lr=0.1, moments_format="8bit", seed=1)
        parameter.grad = torch.arange(100.0).expand(60, 100) - 50
        optimizer.step()

    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(found.detach(), torch.linspace(-1, 1, 6000).view(60, 100))


# ---- what rounding loses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounding", "least", "most"), [("nearest", 0, 0.05), ("stochastic", 0.95, 1.05), ("kahan", 0.95, 1.05)]
)
def test_small_updates_of_bf16_weights_arrive_except_by_rounding_to_nearest(
    rounding: Any, least: float, most: float
) -> None:
    start = torch.rand(8192, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    weights = torch.nn.Parameter(start.bfloat16())
    before = weights.detach().float().mean()
    optimizer = AdamW([weights], lr=1e-5, weight_decay=0.0, moments_format="bf16", rounding=rounding, seed=1)
    for _ in range(300):
        weights.grad = torch.full_like(weights, 0.01)
        optimizer.step()

    after = weights.detach().float()
    if rounding == "kahan":  # what will arrive when it is more than half of the spacing
        after += optimizer.state[weights]["compensation"]
        assert not torch.equal(weights.detach(), start.bfloat16())
    # With a constant gradient each step is the learning rate.
    assert least <= float(before - after.mean()) / (300 * 1e-5) <= most


@pytest.mark.parametrize("moments_format", FORMATS)
def test_second_moment_fades_as_fast_as_it_should(moments_format: Any) -> None:
    """By 0.1 % a step: rounded to nearest, in bf16 or in codes, it would stay as it is for ever."""
    weights = torch.nn.Parameter(torch.zeros(8192))
    optimizer = AdamW([weights], lr=0.0, moments_format=moments_format, seed=1)
    weights.grad = torch.rand(8192, generator=torch.Generator().manual_seed(0)) + 0.1
    optimizer.step()
    before = optimizer.second_moment(weights)
    weights.grad = torch.zeros_like(weights)
    for _ in range(500):
        optimizer.step()
    after = optimizer.second_moment(weights)

    assert before is not None
    assert after is not None
    assert float(after.mean() / before.mean()) == pytest.approx(0.999**500, rel=0.02)


@pytest.mark.parametrize("moments_format", FORMATS)
@pytest.mark.parametrize("shape", [(100, 100), (50,)])
def test_second_moment_is_positive_exactly_where_a_gradient_was_seen(
    moments_format: Any, shape: tuple[int, ...]
) -> None:
    weights = torch.nn.Parameter(torch.zeros(shape))
    optimizer = AdamW([weights], moments_format=moments_format)
    assert second_moment(weights, optimizer) is None
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    size = 10.0 ** (-12 * torch.rand(shape, generator=torch.Generator().manual_seed(1)))
    for step in range(20):
        weights.grad = seen * size if step < 2 else torch.zeros(shape)
        optimizer.step()

    found = second_moment(weights, optimizer)
    assert found.shape == weights.shape
    assert torch.equal(found > 0, seen)
    assert bool((weights.detach().abs() < 1).all()), "no update divides by epsilon alone"


# ---- going on --------------------------------------------------------------------------------------------------


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("moments_format", FORMATS)
@pytest.mark.parametrize("rounding", [None, *ROUNDINGS])
def test_resumed_is_the_same_to_the_bit(moments_format: str, rounding: str | None) -> None:
    dtype = torch.float32 if rounding is None else torch.bfloat16
    whole, half = tensors(dtype), tensors(dtype)
    train(whole, make(whole, moments_format, rounding=rounding), range(8))
    first = make(half, moments_format, rounding=rounding)
    train(half, first, range(4))
    second = make(half, moments_format, rounding=rounding)
    second.load_state_dict(through_a_file(first.state_dict()))
    train(half, second, range(4, 8))

    assert all(torch.equal(one, other) for one, other in zip(whole, half, strict=True))
    other_seed = tensors(dtype)
    train(other_seed, make(other_seed, moments_format, rounding=rounding, seed=4), range(8))
    drawn = rounding in ("stochastic", "kahan") or moments_format != "fp32"
    assert all(torch.equal(one, other) for one, other in zip(whole, other_seed, strict=True)) is not drawn


def test_training_s_own_random_numbers_are_left_alone() -> None:
    parameters = tensors(torch.bfloat16)
    before = torch.get_rng_state()
    train(parameters, make(parameters, "8bit"), range(2))

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("moments_format", ["bf16", "8bit"])
@pytest.mark.parametrize("fused", [True, False])
def test_checkpoint_of_torch_adamw_is_converted(moments_format: str, fused: bool) -> None:
    expected, found = tensors(), tensors()
    theirs = torch.optim.AdamW(groups(expected), lr=2e-3, fused=fused)
    train(expected, theirs, range(20))
    ours = make(found, moments_format, lr=0.7)
    with torch.no_grad():
        for one, other in zip(found, expected, strict=True):
            one.copy_(other)
    ours.load_state_dict(through_a_file(theirs.state_dict()))

    assert [group["lr"] for group in ours.param_groups] == [1e-3, 2e-3]
    assert set(ours.param_groups[0]) == {"params", "lr", "betas", "eps", "weight_decay"}
    for one, other in zip(found, expected, strict=True):
        state, kept = ours.state[one], ours.second_moment(one)
        large = one.numel() >= moments.SMALL
        assert (
            state["exp_avg"].dtype
            == {"bf16": torch.bfloat16, "8bit": torch.int8 if large else torch.float32}[moments_format]
        )
        assert float(state["step"]) == 20
        assert kept is not None
        torch.testing.assert_close(kept, theirs.state[other]["exp_avg_sq"], rtol=0.05, atol=2e-6)
    start = [parameter.detach().clone() for parameter in found]
    train(expected, theirs, range(20, 25))
    train(found, ours, range(20, 25))
    for before, one, other in zip(start, found, expected, strict=True):
        assert float((one - other).detach().norm()) < 0.06 * float((other - before).detach().norm())


def test_checkpoint_of_another_optimizer_is_refused() -> None:
    parameters = tensors()
    other = torch.optim.SGD(groups(parameters), lr=0.1, momentum=0.9)
    train(parameters, other, range(1))

    with pytest.raises(SetupError, match=r"no exp_avg, exp_avg_sq, step \(found momentum_buffer\).*start a new run"):
        make(parameters, "8bit").load_state_dict(other.state_dict())


# ---- in runs ---------------------------------------------------------------------------------------------------

STEPS = {"max_steps": 3, "weight_decay": 0.0, "warmup_steps": 0, "lr_scheduler_type": "constant", "logging_steps": 1}
BF16 = {"weights_dtype": "bf16"}


@pytest.mark.parametrize(
    ("model_block", "train_block", "kind"),
    [
        ({}, {"optim": "adamw_8bit"}, AdamW),
        ({}, {"optim": "adafactor"}, Adafactor),
        (BF16, {"precision": "bf16", "optim": "adamw_8bit", "bf16_rounding": "kahan"}, AdamW),
        (BF16, {"precision": "bf16", "optim": "adafactor", "bf16_rounding": "nearest"}, Adafactor),
    ],
)
def test_moved_equals_requires_grad_with_each_optimizer(
    model_block: dict[str, Any], train_block: dict[str, Any], kind: type, tiny_encoder: Path, tmp_path: Path
) -> None:
    seen: list[Any] = []
    original = InitialWeights.count_changes

    def moved(self: InitialWeights, model: Any, optimizer: Any, with_gradient: frozenset[str]) -> Any:
        seen.extend([len(list(model.parameters())), optimizer, with_gradient])
        return original(self, model, optimizer, with_gradient)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InitialWeights, "count_changes", moved)
        outcome = runs.run(
            tmp_path,
            tiny_encoder,
            tiny.topic_rows(),
            model=model_block,
            method={"learning_rate": 0.02},
            train={**STEPS, **train_block},
        ).outcome

    num_tensors, optimizer, with_gradient = seen
    assert type(optimizer.optimizer) is kind
    assert outcome is not None
    assert outcome.parameter_changes is not None
    assert (
        outcome.parameter_changes.num_tensors_changed
        == outcome.parameter_changes.num_tensors_with_gradient
        == num_tensors
    )
    assert len(with_gradient) == num_tensors
    assert outcome.parameter_changes.unchanged_tensors == ()
    logged = runs.events(tmp_path, "train")
    assert len(logged) == 3
    assert all(line["grad_norm"] is not None for line in logged)


# ---- what is refused -------------------------------------------------------------------------------------------


def problems_of(**blocks: Any) -> list[str]:
    values = {"model": "m", "task": "text-classification", "data": {"train": "t.csv"}}
    try:
        check_trainable(Recipe.model_validate({**values, **blocks}))
    except RecipeError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor"])
def test_optimizers_that_round_bf16_weights_to_nearest_are_refused_unless_forced(optim: str) -> None:
    model = {"name": "m", "weights_dtype": "bf16"}

    found = problems_of(model=model, train={"optim": optim})

    assert found == [
        f"train.optim: '{optim}' rounds bf16 weights (model.weights_dtype) to nearest, which loses most updates at "
        "usual learning rates; set optim: adamw_bf16 or adamw_8bit, or weights_dtype: fp32, or bf16_rounding: nearest "
        "to accept it"
    ]
    assert problems_of(model=model, train={"optim": optim, "bf16_rounding": "kahan"}) == found
    assert problems_of(model=model, train={"optim": optim, "bf16_rounding": "nearest"}) == []
    assert problems_of(model=model) == []
    assert problems_of(model=model, train={"optim": "adamw_8bit", "bf16_rounding": "kahan"}) == []


def test_arguments_that_no_optimizer_reads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "package_for_optimizer", lambda optim: ("", ""))  # whether it is installed or not
    extra = {"optim_args": "a=1"}

    assert problems_of(train={"optim": "adamw_8bit", "extra": extra}) == [
        "train.extra.optim_args: has no effect, because 'adamw_8bit' takes no arguments; remove it"
    ]
    assert problems_of(train={"extra": extra}) == [
        "train.extra.optim_args: has no effect without train.optim; remove it"
    ]
    assert problems_of(train={"optim": "galore_adamw", "extra": extra}) == []


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_bf16"])
def test_our_optimizers_are_refused_under_deepspeed(optim: str) -> None:
    deepspeed = {"zero_optimization": {"stage": 1}}

    assert problems_of(train={"optim": optim, "extra": {"deepspeed": deepspeed}}) == [
        f"train.optim: '{optim}' cannot run inside DeepSpeed, which keeps fp32 weights and shards the optimizer "
        "state itself; remove optim, or train.extra.deepspeed"
    ]
