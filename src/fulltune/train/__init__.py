"""The train stage: attempts in processes of their own, under guard. Stage: imports layers 0 and 1 only."""

from fulltune.train.attempts import Listener, train
from fulltune.train.hooks import Hooks

__all__ = ["Hooks", "Listener", "train"]
