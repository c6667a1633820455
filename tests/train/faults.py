"""Faults that are planted in a run of this process: each at given optimizer steps, counted as they are taken.

    with in_this_process(), planted(corrupted_labels, range(60, 66).__contains__):
        pipeline.run(job)

A step that is taken again, after going back to a checkpoint, is another one: a fault comes once.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from fulltune.system.memory import status_bytes
from fulltune.tasks.padding import IGNORED
from fulltune.train.loop.trainer import FullTrainer

Fault = Callable[[Any, dict[str, Any]], Callable[[], None]]
"""Is given the trainer and a micro batch, which it may change; what it returns is called when the gradients are there,
before they are clipped."""


@contextlib.contextmanager
def planted(fault: Fault, steps: Callable[[int], bool]) -> Iterator[list[int]]:
    """Plant a fault at these steps, from 1."""
    number, met = 0, []
    now: tuple[Any, int] = (None, -1)
    after: list[Callable[[], None]] = []
    real = FullTrainer.training_step

    def training_step(trainer: Any, model: Any, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
        nonlocal number, now
        if now[0] is not trainer or now[1] != trainer.state.global_step:
            number, now = number + 1, (trainer, trainer.state.global_step)
        if steps(number):
            after.append(fault(trainer, inputs))
            met.append(number)
        loss = real(trainer, model, inputs, *rest)
        if trainer.accelerator.sync_gradients:  # of the last micro batch: all gradients are there
            for act in after:
                act()
            after.clear()
        return loss

    with mock.patch.object(FullTrainer, "training_step", training_step):
        yield met


def nan_gradient(trainer: Any, inputs: dict[str, Any]) -> Callable[[], None]:
    return lambda: _first_gradient(trainer).mul_(torch.nan)


def infinite_gradient(trainer: Any, inputs: dict[str, Any]) -> Callable[[], None]:
    return lambda: _first_gradient(trainer).add_(torch.inf)


def large_gradient(trainer: Any, inputs: dict[str, Any]) -> Callable[[], None]:
    def act() -> None:
        for parameter in trainer.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(10)

    return act


def high_rate(trainer: Any, inputs: dict[str, Any]) -> Callable[[], None]:
    def act() -> None:
        for group, usual in zip(trainer.optimizer.param_groups, trainer.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = 30 * usual  # until the schedule sets it anew

    return act


def corrupted_labels(trainer: Any, inputs: dict[str, Any]) -> Callable[[], None]:
    """Each label is the next class, each token another one, each number another's with its sign changed."""
    labels = inputs["labels"]
    if labels.is_floating_point():
        inputs["labels"] = -labels.roll(1, 0) * 3
    else:
        config = trainer.model.config
        count = config.num_labels if int(labels.max()) < config.num_labels else config.vocab_size
        away = 1 + count // 2 if count > 2 else 1
        inputs["labels"] = torch.where(labels == IGNORED, labels, (labels + away) % count)
    return lambda: None


def shuffled_inputs(trainer: Any, inputs: dict[str, Any]) -> Callable[[], None]:
    """Each row's tokens are another row's, backwards."""
    inputs["input_ids"] = inputs["input_ids"].roll(1, 0).flip(1)
    return lambda: None


def infinite_logits(trainer: Any, inputs: dict[str, Any]) -> Callable[[], None]:
    """The weights are as before when the gradients are there."""
    weight = next(one for name, one in reversed(list(trainer.model.named_parameters())) if one.dim() > 1)
    before = weight.detach().clone()
    weight.data.fill_(torch.inf)
    return lambda: weight.data.copy_(before)


def update_left_out(trainer: Any, inputs: dict[str, Any]) -> Callable[[], None]:
    """No fault: the smallest change that does no harm."""
    return lambda: trainer.model.zero_grad(set_to_none=True)


def no_memory(trainer: Any, inputs: dict[str, Any]) -> Callable[[], None]:
    """The process may take 16 MiB more than it holds, and torch asks for 64: its own error of a real limit."""
    held, hard = status_bytes("VmData"), resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (held + 2**24, hard))
    torch.zeros(2**24)
    raise AssertionError("there was memory")


def _first_gradient(trainer: Any) -> torch.Tensor:
    return next(one.grad for one in trainer.model.parameters() if one.grad is not None)
