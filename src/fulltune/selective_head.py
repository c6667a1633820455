"""Apply a model's output head only where a token is trained or scored: logits [tokens, vocabulary]. Layer 1.

The head of a language model is a large part of its work and its logits are most of the memory, yet a prompt's logits
are thrown away. A hook in front of the head picks the hidden states that are needed; what follows the head in some
models (a scale, a soft cap, a bias) works on each logit alone, so the kept ones are the same. `verified` proves that on
the real model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fulltune.tasks import Task

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SelectiveHead:
    """A head and where it is needed."""

    head: Any
    """The module that turns hidden states into logits."""
    places: Callable[[torch.Tensor], torch.Tensor]
    """From labels [batch, length] to bool [batch, length]: which logits the task uses."""

    @contextlib.contextmanager
    def only(self, labels: torch.Tensor) -> Iterator[None]:
        """Inside, the model's logits are those of the labels' places, row after row."""
        places = self.places(labels)

        def pick(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
            # Anything else than hidden states of these rows is left alone: logits keep their three axes, and tasks
            # pick from them.
            if not given or given[0].shape[:2] != places.shape:
                return None
            return (given[0][places], *given[1:])

        handle = self.head.register_forward_pre_hook(pick)
        try:
            yield
        finally:
            handle.remove()


def verified(model: Any, task: Task, batch: Mapping[str, torch.Tensor]) -> tuple[SelectiveHead | None, str]:
    """The selective head of a model, when it gives the same logits, and what was found.

    Args:
        model: Its mode is put back.
        task: One with `places` has logits for each token.
        batch: A real, collated batch on the model's device, with `labels`.
    """
    import torch

    places = getattr(task, "places", None)
    head = model.get_output_embeddings()
    if places is None or head is None:
        return None, "off: the task has no logits of tokens" if places is None else "off: the model names no head"
    selective = SelectiveHead(head, places)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    labels = batch["labels"]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            whole = model(**inputs).logits[places(labels)].float()
            with selective.only(labels):
                picked = model(**inputs).logits.float()
    finally:
        model.train(was_training)
    if picked.shape != whole.shape:
        return None, f"off: the logits became {list(picked.shape)} instead of {list(whole.shape)}"
    difference = float((picked - whole).abs().max()) if len(whole) else 0.0
    # What another order of sums changes is some ten roundings; another place gives other logits altogether.
    if not difference <= torch.finfo(model.dtype).eps ** 0.5 * float(whole.abs().max()):
        return None, f"off: its logits differ by {difference:.2g}"
    return selective, f"yes, largest difference of a logit {difference:.2g}"
