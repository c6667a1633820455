"""A recipe for a PyTorch Lightning `Trainer` of one's own: module and rows (docs/lightning.md).

    import lightning as L
    from fulltune.lightning import prepare

    job = prepare("banking77.yaml")
    trainer = L.Trainer(**job.trainer_arguments())
    trainer.fit(job.module, datamodule=job.data)
    job.save("banking77-model")

Needs `pip install 'fulltune[lightning]'`.
"""

from fulltune.lightning.module import FineTuningData, FineTuningModule
from fulltune.lightning.prepare import FineTuning, prepare

__all__ = ["FineTuning", "FineTuningData", "FineTuningModule", "prepare"]
