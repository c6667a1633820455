from fulltune.plan.budget import available
from fulltune.plan.changed import as_begun, is_placed_as, need_of, on_disk, placed_anew
from fulltune.plan.defaults import learning_rate_of
from fulltune.plan.fit import fit
from fulltune.plan.gpus import here
from fulltune.plan.resolve import device_and_precision
from fulltune.plan.workload import Workload

__all__ = [
    "Workload",
    "as_begun",
    "available",
    "device_and_precision",
    "fit",
    "here",
    "is_placed_as",
    "learning_rate_of",
    "need_of",
    "on_disk",
    "placed_anew",
]
