"""The plan stage: every number of a trial, each with its reason. Pure: no torch, no weights."""

from fulltune.plan.changed import need_of, on_disk, room_of
from fulltune.plan.defaults import learning_rate_of
from fulltune.plan.elsewhere.survey import with_time
from fulltune.plan.fit import fit
from fulltune.plan.gpus import here
from fulltune.plan.resolve import device_and_precision

__all__ = [
    "device_and_precision",
    "fit",
    "here",
    "learning_rate_of",
    "need_of",
    "on_disk",
    "room_of",
    "with_time",
]
