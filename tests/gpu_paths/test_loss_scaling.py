"""fp16's loss scale and what is beside it: the guard, its repeated steps, replayed text."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import BertForSequenceClassification

import fulltune
from fulltune.inference.run import GenericText
from fulltune.records.plan import GenericTexts
from fulltune.train.forgetting.generic import Replay
from fulltune.train.loop.step_guard import StepHistory
from tests import plans, tiny

SCALE = 2.0**10
scaled = pytest.mark.stand_in(
    'the CPU, with torch.amp.GradScaler("cpu")',
    card="which kernels overflow in fp16, the fused optimizer's own skipping",
)
of_deepspeed = pytest.mark.stand_in("DeepSpeed's loss scaler as an object of numbers", card="DeepSpeed in fp16")


class Overflows(fulltune.Guarded, transformers.Trainer):
    """The gradients of its second step are infinite."""

    calls = 0

    def compute_loss(self, *given: Any, **named: Any) -> Any:
        self.calls += 1
        loss = super().compute_loss(*given, **named)
        assert isinstance(loss, torch.Tensor)
        if self.state.global_step == 1:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss


def trainer_of(folder: Path) -> Overflows:
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny.config("bert", tiny.encoder_tokenizer(), num_labels=2))
    rows = [{"input_ids": [2, 10 + number, 3], "labels": number % 2} for number in range(32)]
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=3, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    trainer = Overflows(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]  # a list will do
    return trainer


def weights_by_step(trainer: Overflows) -> list[torch.Tensor]:
    seen = list[torch.Tensor]()

    class Looks(transformers.TrainerCallback):
        def on_step_end(self, *given: Any, model: Any = None, **named: Any) -> None:
            seen.append(torch.cat([one.detach().flatten() for one in model.parameters()]).clone())

    trainer.add_callback(Looks())
    trainer.train()
    return seen


@scaled
def test_step_that_overflows_is_left_to_the_scaler(tmp_path: Path) -> None:
    """It halves its scale and takes no step; the guard does not skip it, and goes on."""
    trainer = trainer_of(tmp_path)
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    first, second, third = weights_by_step(trainer)
    assert trainer.calls == 3
    assert trainer.guard_history.skipped == ()
    assert scaler.get_scale() == SCALE / 2
    assert torch.equal(first, second)
    assert not torch.equal(second, third)


@pytest.mark.stand_in("the CPU, without a scaler", card="-")
def test_same_step_without_a_scaler_is_skipped(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    first, second, _ = weights_by_step(trainer)
    assert trainer.calls == 3
    assert trainer.guard_history.skipped == (2,)
    assert torch.equal(first, second)


@of_deepspeed
@pytest.mark.parametrize(("fp16", "action"), [(True, "go on"), (False, "stop")])
def test_norm_that_deepspeed_could_not_take_is_let_pass_in_fp16_alone(fp16: bool, action: str) -> None:
    trainer: Any = Overflows.__new__(Overflows)
    trainer.args = SimpleNamespace(device="cpu", fp16=fp16)
    trainer.accelerator = SimpleNamespace(num_processes=1)
    trainer.state, trainer.is_deepspeed_enabled = transformers.TrainerState(global_step=7), True
    trainer.guard_history = StepHistory(skipped=(5, 6, 7))
    judged, _, _ = trainer._judge_step(torch.tensor(1.0), torch.tensor(-1.0))
    assert judged.action == action


@scaled
def test_replayed_texts_count_as_much_as_the_rows_whose_loss_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = torch.nn.Linear(1, 1)
    model.device = torch.device("cpu")

    def distance(replay: Replay, positions: Any) -> torch.Tensor:
        assert torch.is_autocast_enabled("cpu")
        return model.weight.sum() * len(positions)

    monkeypatch.setattr(Replay, "_distance_from_pretrained", distance)

    def gradient(scaler: Any) -> float:
        trainer: Any = SimpleNamespace(
            model=model,
            args=SimpleNamespace(process_index=0, world_size=1),
            accelerator=SimpleNamespace(scaler=scaler),
            state=SimpleNamespace(global_step=0),
            is_shared=False,
        )
        model.zero_grad()
        inputs: Any = SimpleNamespace(plan=plans.plan(generic=GenericTexts(replay_rows=4)))
        monitor: Any = SimpleNamespace(trainer=trainer)
        Replay(inputs, monitor, GenericText(((1, 2),) * 4, 0, False, "bf16"), 4, 0.01).add_gradient()
        assert model.weight.grad is not None
        return float(model.weight.grad)

    assert gradient(torch.amp.GradScaler("cpu", init_scale=SCALE)) == SCALE * gradient(None) != 0
