"""Lightning's `DeepSpeedStrategy` on a CPU, where Lightning 2.6.6 refuses it.

    python -m tests.train.lightning_on_cpu FOLDER PACKAGE [offload]

The strategy below differs only in what asks for a GPU; optimizer, engine, accumulation and hooks are Lightning's and
DeepSpeed's. Trains the recipe of the folder and leaves `deepspeed.pt` and the model in `deepspeed`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from fulltune.lightning import prepare

L: Any = import_module(sys.argv[2])  # after fulltune, as import sorters write it
DeepSpeedStrategy: Any = import_module(f"{L.Trainer.__module__.partition('.trainer')[0]}.strategies").DeepSpeedStrategy


class OnCpu(DeepSpeedStrategy):
    """Without the refusal; the device has a number, which DeepSpeed asks for."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu:0")

    def setup_environment(self) -> None:
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class Steps(L.Callback):
    """Loss and norm of each step."""

    def __init__(self) -> None:
        self.losses, self.norms = list[float](), list[float]()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step > len(self.losses):
            self.losses.append(float(trainer.callback_metrics["train_loss"]))
            self.norms.append(float(trainer.strategy.model.get_global_grad_norm()))


def main(folder: Path, offload: bool) -> None:
    job, steps = prepare(folder / "recipe.yaml", run_folder=folder / "lightning"), Steps()
    trainer = L.Trainer(
        **job.trainer_arguments(),
        strategy=OnCpu(stage=3, offload_optimizer=offload, offload_parameters=offload, process_group_backend="gloo"),
        callbacks=[steps],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(job.module, datamodule=job.data)
    torch.save({"losses": steps.losses, "norms": steps.norms}, folder / "deepspeed.pt")
    job.save(folder / "deepspeed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "offload" in sys.argv[3:])
