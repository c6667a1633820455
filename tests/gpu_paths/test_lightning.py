"""A Lightning Trainer with fp16's scaler, and where rows are pinned."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import tiny
from tests.invariant.test_same_curve import label_rows
from tests.train import runs

L = pytest.importorskip("lightning", reason="needs lightning; pip install 'fulltune[lightning]'")

from lightning.pytorch.callbacks import Callback  # noqa: E402  # after the skip
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402  # after the skip

from fulltune.lightning import prepare  # noqa: E402  # after the skip
from fulltune.lightning.module import TrainBatches  # noqa: E402  # after the skip

SCALE = 2.0**10


class Overflows(Callback):
    """The gradients of the second step are infinite; sees the weights after each."""

    def __init__(self) -> None:
        self.weights = list[torch.Tensor]()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == 1:
            for parameter in pl_module.parameters():
                parameter.grad = torch.full_like(parameter, float("inf"))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append(torch.cat([one.detach().flatten() for one in pl_module.parameters()]).clone())


@pytest.mark.stand_in(
    'the CPU, with torch.amp.GradScaler("cpu")',
    card="which kernels overflow in fp16, the fused optimizer's own skipping",
)
def test_lightnings_step_that_overflows_is_left_to_the_scaler(tmp_path: Path) -> None:
    """It halves its scale and takes no step; the guard does not count it as skipped, and judges losses unscaled."""
    model = tiny.save_model(tmp_path / "model", "bert")
    train = {"max_steps": 3, "global_batch_size": 4, "warmup_steps": 0, "eval_strategy": "steps", "eval_steps": 3}
    rows = tiny.write_csv(tmp_path / "rows.csv", label_rows())
    with runs.without_tracing():
        recipe = tiny.write_recipe(tmp_path / "recipe.yaml", model, rows, train=train, method={"head_init": "random"})
        job = prepare(recipe)
    scaler, seen = torch.amp.GradScaler("cpu", init_scale=SCALE), Overflows()
    given = job.trainer_arguments() | {"precision": None, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    trainer = L.Trainer(
        **given,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        callbacks=[seen],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    job.module.plan = job.module.plan.model_copy(update={"precision": "fp16"})
    trainer.fit(job.module, datamodule=job.data)

    assert job.module.guard_history.skipped == ()
    assert scaler.get_scale() == SCALE / 2
    assert torch.equal(seen.weights[0], seen.weights[1])
    assert not torch.equal(seen.weights[1], seen.weights[2])
    assert max(job.module.guard_history.losses) < 5


@pytest.mark.stand_in("records of machines and models", card="whether the bytes are right")
def test_rows_for_lightning_are_pinned_where_there_is_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loader:
        def __init__(self, rows: Any, pin_memory: bool, **options: Any) -> None:
            pinned.append(pin_memory)

        def __iter__(self) -> Any:
            return iter(())

    pinned = list[bool]()
    monkeypatch.setattr("fulltune.lightning.module.DataLoader", Loader)
    for device in ("cuda", "cpu"):
        batches = {"global_batch_size": 4, "micro_batch_size": 4, "gradient_accumulation_steps": 1}
        plan = SimpleNamespace(device=device, loader_workers=0, seed=0, group_by_length=False, **batches)
        summary = SimpleNamespace(mixed=(), splits={"train": SimpleNamespace(rows=4)})
        recipe = SimpleNamespace(train=SimpleNamespace(sampling="uniform"))
        parts = {"summary": summary, "collate": None, "task": None, "recipe": recipe}
        objective, rows = SimpleNamespace(**parts), {"length": [1] * 4}
        module: Any = SimpleNamespace(plan=plan, objective=objective, head=None, rows=rows)
        trainer = SimpleNamespace(world_size=1, global_rank=0, current_epoch=0)
        assert list(TrainBatches(module, trainer)) == []
    assert pinned == [True, False]
