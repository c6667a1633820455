"""A recipe for a PyTorch Lightning `Trainer` of one's own: module, data and guards (docs/lightning.md).

    import lightning as L
    from fulltune.lightning import prepare

    job = prepare("banking77.yaml")
    trainer = L.Trainer(**job.trainer_arguments(), callbacks=job.guards())
    trainer.fit(job.module, datamodule=job.data)
    job.save("banking77-model")

Needs `pip install 'fulltune[lightning]'`.
"""

from fulltune.lightning.available import OLDEST  # first: it refuses a Lightning that is missing or too old
from fulltune.lightning.data import FineTuningData
from fulltune.lightning.guards import DivergenceGuard, MovedGuard, StepGuard
from fulltune.lightning.module import FineTuningModule
from fulltune.lightning.prepare import FineTuning, prepare

__all__ = [
    "OLDEST",
    "DivergenceGuard",
    "FineTuning",
    "FineTuningData",
    "FineTuningModule",
    "MovedGuard",
    "StepGuard",
    "prepare",
]
