from __future__ import annotations

from collections.abc import Callable
from functools import partial
from textwrap import shorten

from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import get_reporting_integration_callbacks


class GuardedTracker:
    """Passes events to an experiment tracker until it fails, which becomes a warning."""

    def __init__(self, tracker: TrainerCallback, warn: Callable[[str], None]) -> None:
        self.tracker, self.warn, self.has_failed = tracker, warn, False

    def __getattr__(self, event: str) -> Callable[..., None]:
        if not hasattr(TrainerCallback, event):
            raise AttributeError(event)
        return partial(self.send, event)

    def on_train_end(self, *_: object, **__: object) -> None:
        """Leave the tracker open for the final score."""

    def send(self, event: str, *arguments: object, **named: object) -> None:
        try:
            if not self.has_failed:
                getattr(self.tracker, event)(*arguments, **named)
        except Exception as error:
            self.has_failed = True
            name = type(self.tracker).__name__.removesuffix("Callback")
            reason = shorten(str(error), 250, placeholder=" ...")
            self.warn(f"train.report_to: {name} failed ({type(error).__name__}: {reason}); training goes on without it")


def guard_trackers(trainer: Trainer, warn: Callable[[str], None]) -> None:
    kinds, handler = tuple(get_reporting_integration_callbacks(trainer.args.report_to)), trainer.callback_handler
    handler.callbacks = [GuardedTracker(one, warn) if isinstance(one, kinds) else one for one in handler.callbacks]


def close_trackers(trainer: Trainer) -> None:
    for tracker in trainer.callback_handler.callbacks:
        if isinstance(tracker, GuardedTracker):
            tracker.send("on_train_end", trainer.args, trainer.state, trainer.control, model=trainer.model)
