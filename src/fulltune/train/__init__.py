"""The train stage: attempts in processes of their own, under guard. Stage: imports layers 0 and 1 only."""

from fulltune.train.hooks import Hooks
from fulltune.train.parent.next_attempt import CHANGED
from fulltune.train.parent.retry import Listener, train
from fulltune.train.parent.spawn import Starter, in_new_process, nursery
from fulltune.train.run_time import run_seconds

__all__ = ["CHANGED", "Hooks", "Listener", "Starter", "in_new_process", "nursery", "run_seconds", "train"]
