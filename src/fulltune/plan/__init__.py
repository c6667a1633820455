from fulltune.plan.budget import usable_memory
from fulltune.plan.changed import (
    has_same_placement,
    memory_need_of_plan,
    plan_to_continue,
    recipe_for_resuming,
    with_disk_need,
    with_new_placement,
)
from fulltune.plan.defaults import default_learning_rate
from fulltune.plan.fit import make_plan
from fulltune.plan.gpus import local_hardware
from fulltune.plan.resolve import device_and_precision
from fulltune.plan.workload import Workload

__all__ = [
    "Workload",
    "default_learning_rate",
    "device_and_precision",
    "has_same_placement",
    "local_hardware",
    "make_plan",
    "memory_need_of_plan",
    "plan_to_continue",
    "recipe_for_resuming",
    "usable_memory",
    "with_disk_need",
    "with_new_placement",
]
