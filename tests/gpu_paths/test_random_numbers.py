"""Random numbers of the cards: a trial pass, an evaluation or a repeated step leaves them as they were."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fulltune.selfcheck import make_llama
from fulltune.stream.randomness import derived_random_state, random_state, set_random_state
from fulltune.train.loop.trainer import FullTrainer
from fulltune.train.worker import checks, dry_run
from fulltune.train.worker.dry_run import restored_random_state
from tests.gpu_paths.cards import Cards

pytestmark = pytest.mark.stand_in(
    "two H100s by a patched torch.cuda, a generator each", card="that dropout's kernels draw from these generators"
)


def states(cards: Cards) -> list[list[int]]:
    return [card.random.get_state().tolist() for card in cards.cards]


def draw(cards: Cards) -> list[float]:
    """A number of each card."""
    return [float(torch.rand(1, generator=card.random)) for card in cards.cards]


def test_trial_pass_puts_both_cards_back(two_h100s: Cards) -> None:
    before = states(two_h100s)
    with restored_random_state():
        draw(two_h100s)
    assert states(two_h100s) == before


def test_trial_pass_on_the_cpu_does_not_touch_the_cards(two_h100s: Cards) -> None:
    before = states(two_h100s)
    with restored_random_state(on_gpu=False):
        draw(two_h100s)
    assert states(two_h100s) != before, "they were set up for nothing"


def test_self_check_leaves_both_cards_alone(two_h100s: Cards) -> None:
    before = states(two_h100s)
    make_llama("cpu")
    assert states(two_h100s) == before


def test_evaluation_draws_no_number_that_training_would_miss(two_h100s: Cards) -> None:
    trainer: Any = FullTrainer.__new__(FullTrainer)
    trainer.args, trainer.state, trainer.control = SimpleNamespace(world_size=1), None, None
    trainer.log = lambda metrics: None
    trainer.callback_handler = SimpleNamespace(on_evaluate=lambda *given: None)
    trainer.parts = [SimpleNamespace(scores=lambda: {"loss": draw(two_h100s)[0]})]
    before = states(two_h100s)

    assert trainer.evaluate()["eval_loss"] >= 0

    assert states(two_h100s) == before


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_dry_run_puts_the_cards_back_where_the_plan_uses_them(device: str, two_h100s: Cards) -> None:
    trainer: Any = SimpleNamespace(
        model=torch.nn.Linear(1, 1),
        accelerator=SimpleNamespace(prepare_model=lambda model, **named: model, free_memory=lambda: None),
        zero_rate_optimizer=lambda: contextlib.nullcontext(),
    )
    plan: Any = SimpleNamespace(device=device, activation_checkpointing=False)
    before = states(two_h100s)
    with dry_run._temporary_training_state(trainer, plan):
        draw(two_h100s)
    assert (states(two_h100s) == before) == (device == "cuda")


def test_dry_run_in_deepspeeds_engine_leaves_both_cards_alone(two_h100s: Cards) -> None:
    class Engine:
        def train(self) -> None: ...

        def __call__(self, **batch: Any) -> Any:
            return draw(two_h100s)

        def set_gradient_accumulation_boundary(self, value: bool) -> None: ...

        def backward(self, loss: torch.Tensor, **named: Any) -> None: ...

    trainer = SimpleNamespace(
        model_wrapped=Engine(),
        args=SimpleNamespace(device="cpu"),
        data_collator=lambda rows: {"input_ids": torch.ones(2, 3), "labels": torch.ones(2)},
        compute_loss_func=lambda outputs, labels, num_items_in_batch: torch.tensor(1.0),
        count_items=len,
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda one, reduction: one),
    )
    before = states(two_h100s)
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2]}]
    plan = SimpleNamespace(micro_batch_size=2, packing=False)
    assert checks.dry_run_in_engine(trainer, rows, plan).passed  # type: ignore[arg-type]  # a stand-in
    assert states(two_h100s) == before


def test_streamed_unit_puts_its_own_card_back(two_h100s: Cards) -> None:
    device, before = torch.device("cuda", 1), states(two_h100s)
    saved = random_state(device)
    draw(two_h100s)
    on_cpu = torch.rand(1)

    set_random_state(saved, device)

    now = states(two_h100s)
    assert now[1] == before[1]
    assert now[0] != before[0], "another card's numbers are not this unit's"
    assert torch.rand(1) == on_cpu


def test_streamed_unit_on_the_cpu_does_not_touch_the_cards(two_h100s: Cards) -> None:
    device = torch.device("cpu")
    saved = random_state(device)
    draw(two_h100s)
    drawn, on_cards = torch.rand(1), states(two_h100s)

    set_random_state(saved, device)

    assert torch.rand(1) == drawn
    assert states(two_h100s) == on_cards


def test_each_micro_batch_of_a_streamed_step_draws_its_own_numbers_on_the_card(two_h100s: Cards) -> None:
    device = torch.device("cuda", 1)
    start = random_state(device)

    derived = [derived_random_state(start, number, device) for number in (1, 2, 1)]

    assert all(torch.equal(*both) for both in zip(random_state(device), start, strict=True)), "it drew from them"
    drawn = []
    for state in (start, *derived):
        set_random_state(state, device)
        drawn.append((draw(two_h100s)[1], float(torch.rand(1))))
    assert drawn[1] == drawn[3]
    assert len({on_card for on_card, _ in drawn}) == len({on_cpu for _, on_cpu in drawn}) == 3
    set_random_state(start, device)
    draw(two_h100s)
    later = derived_random_state(random_state(device), 1, device)
    assert not torch.equal(later[0], derived[0][0]), "what the card alone draws changes them too"
