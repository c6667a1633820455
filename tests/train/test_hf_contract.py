"""The behaviours of transformers that training relies on. When one fails after an upgrade, read what leans on it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from tests import tiny


def rows(count: int = 22) -> Dataset:
    """Rows of 4 to 9 tokens of a class."""
    ids = [[2, *[10 + (number * step) % 200 for step in range(1, 3 + number % 6)], 3] for number in range(count)]
    return Dataset.from_dict(
        {
            "input_ids": ids,
            "attention_mask": [[1] * len(row) for row in ids],
            "labels": [number % 2 for number in range(count)],
        }
    )


def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    from fulltune.tasks import text_classification

    return text_classification.collate(features, 0)


def trainer_in(folder: Path, kind: type[Trainer] = Trainer, **options: Any) -> Trainer:
    tokenizer = tiny.encoder_tokenizer()
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny.config("bert", tokenizer, num_labels=2))
    keywords = {
        name: options.pop(name) for name in ("callbacks", "compute_loss_func", "eval_dataset") if name in options
    }
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "remove_unused_columns": False,
    }
    return kind(
        model=model,
        args=TrainingArguments(**{**values, **options}),
        train_dataset=rows(),
        data_collator=collate,
        **keywords,
    )


class Watching(Trainer):
    """Writes down what happens in an optimizer step."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.calls: list[str] = []

    def _clip_grad_norm(self, model: Any) -> Any:
        self.calls.append("clip")
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.calls.append("norm")
        self.seen = (float(norm), self.state.global_step)
        self.clipped = math.sqrt(sum(float(p.grad.norm()) ** 2 for p in model.parameters() if p.grad is not None))
        return norm

    def create_optimizer(self, model: Any = None) -> Any:
        optimizer = super().create_optimizer(model)
        optimizer.register_step_pre_hook(lambda *_: self.calls.append("step"))
        return optimizer


def test_get_grad_norm_is_called_once_per_step_after_clipping_and_before_the_update(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, Watching, max_grad_norm=0.01)

    trainer.train()

    assert isinstance(trainer, Watching)
    assert trainer.calls == ["clip", "norm", "step"] * 6  # 22 rows: 6 micro batches, 3 steps an epoch
    norm, step = trainer.seen
    assert step == 5  # counted up only after the update: our guard says `global_step + 1`
    assert norm > 0.011
    assert trainer.clipped == pytest.approx(0.01, rel=1e-2)


def test_compute_loss_func_gets_the_items_of_the_whole_accumulated_batch(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def compute_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        seen.append((len(labels), int(num_items_in_batch)))
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    trainer = trainer_in(tmp_path, num_train_epochs=1, compute_loss_func=compute_loss)
    trainer.train()

    assert seen == [(4, 8), (4, 8), (4, 8), (4, 8), (4, 6), (2, 6)]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(0.5 < loss < 1.0 for loss in losses), "the loss is divided a second time by the accumulation steps"


def test_get_num_items_in_batch_counts_labels_and_not_rows(tmp_path: Path) -> None:
    """Why `FullTrainer` counts by itself: with 3 labels a row counts three times."""
    trainer = trainer_in(tmp_path, compute_loss_func=lambda *_, **__: None)
    several = [{"labels": torch.ones(4, 3)}]

    assert int(trainer._get_num_items_in_batch(several, torch.device("cpu"))) == 12  # type: ignore[arg-type]  # None is for rows without labels


@pytest.mark.parametrize("filtered", [True, False])
def test_logging_nan_inf_filter_hides_a_loss_that_is_not_a_number(filtered: bool, tmp_path: Path) -> None:
    def compute_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return outputs.logits.sum() * math.nan

    trainer = trainer_in(tmp_path, logging_nan_inf_filter=filtered, max_steps=1, compute_loss_func=compute_loss)
    trainer.train()

    loss = trainer.state.log_history[0]["loss"]
    assert loss == 0.0 if filtered else math.isnan(loss)


class Order(TrainerCallback):
    """Asks for a checkpoint at step 2, as `Checkpoints` does at each evaluation."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The default flow has spoken before us.
        assert control.should_evaluate == (state.global_step in (2, 3))
        control.should_save = control.should_save or control.should_evaluate

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert [entry for entry in state.log_history if "eval_loss" in entry], "the history ends with this evaluation"
        self.calls.append(("evaluate", state.global_step))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.calls.append(("save", state.global_step))


def test_should_save_in_step_end_leads_to_a_checkpoint_after_the_evaluation(tmp_path: Path) -> None:
    order = Order()
    trainer = trainer_in(
        tmp_path,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=100,
        metric_for_best_model="loss",
        eval_dataset=rows(4),
        callbacks=[order],
    )
    trainer.train()

    # The last step is always evaluated.
    assert order.calls == [("evaluate", 2), ("save", 2), ("evaluate", 3), ("save", 3)]
    assert (tmp_path / "checkpoint-2" / "rng_state.pth").exists()
    assert trainer.state.best_global_step in (2, 3)
