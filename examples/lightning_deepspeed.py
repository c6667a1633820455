"""Full fine-tuning by PyTorch Lightning, with DeepSpeed's ZeRO-3 and weights, gradients and optimizer on the host.

    pip install 'fulltune[lightning,deepspeed,quickstart]'
    python examples/lightning_deepspeed.py examples/zero3-offload.yaml train.num_processes=1

The recipe's `train.placement: zero3` and `train.offload: all` are for the plan, which counts the memory; the strategy
does it. Needs a GPU: Lightning 2.6.6 refuses DeepSpeed without one. More in docs/guides/training.md.
"""

from __future__ import annotations

import sys

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy

from fulltune.lightning import prepare


def main(recipe: str, *overrides: str) -> None:
    job = prepare(recipe, overrides)
    trainer = L.Trainer(
        **job.trainer_arguments(),
        strategy=DeepSpeedStrategy(stage=3, offload_optimizer=True, offload_parameters=True),
        callbacks=[ModelCheckpoint(**job.monitor())],
    )
    trainer.fit(job.module, datamodule=job.data)
    job.save("lightning-model")


if __name__ == "__main__":
    main(*sys.argv[1:])
