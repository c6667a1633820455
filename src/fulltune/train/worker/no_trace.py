"""Trial passes that leave no trace: random numbers and a model's buffers are as before afterwards."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from fulltune.models import sharding

_PLAIN = (bool, int, float, str, torch.Tensor)


@contextlib.contextmanager
def same_randomness(*, on_gpu: bool = True) -> Iterator[None]:
    """Put back the state of all random generators; asking for GPUs' makes torch set them up."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_gpu else ()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


@contextlib.contextmanager
def same_buffers(model: Any) -> Iterator[None]:
    """Afterwards all buffers are as before, also those that `forward` replaced, enlarged or added, and so are the plain
    numbers and tensors that their modules note about them."""
    before = [
        (
            module,
            {name: (buffer, None if buffer is None else buffer.clone()) for name, buffer in module._buffers.items()},
            {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN) and module._buffers},
        )
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, buffers, noted in before:
            for name in module._buffers.keys() - buffers.keys():
                delattr(module, name)
            for name, (buffer, values) in buffers.items():
                now = module._buffers.get(name)
                if values is not None and now is buffer and now.shape == values.shape:
                    now.copy_(values)
                else:
                    module._buffers[name] = values if now is None or values is None else values.to(now.device)
            vars(module).update(noted)


def gradients_are_finite(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether all gradients that there are, or this process's parts, are finite; `aminmax` copies no gradient."""
    gradients = [sharding.local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    return all(bool(torch.stack(one.aminmax()).isfinite().all()) for one in gradients if one.numel())
