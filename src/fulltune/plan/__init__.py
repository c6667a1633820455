"""The plan stage: every number of a trial, each with its reason. Pure: no torch, no weights."""

from fulltune.plan.budget import Room
from fulltune.plan.budget import of as room
from fulltune.plan.changed import levers_of, on_disk
from fulltune.plan.defaults import learning_rate_of
from fulltune.plan.elsewhere.survey import with_time
from fulltune.plan.fit import fit
from fulltune.plan.gpus import here
from fulltune.plan.resolve import device_and_precision

__all__ = [
    "Room",
    "device_and_precision",
    "fit",
    "here",
    "learning_rate_of",
    "levers_of",
    "on_disk",
    "room",
    "with_time",
]
