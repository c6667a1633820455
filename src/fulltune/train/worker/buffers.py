"""A model's buffers as they were before a trial pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_PLAIN = (bool, int, float, str, torch.Tensor)


@contextlib.contextmanager
def put_back(model: Any) -> Iterator[None]:
    """Afterwards all buffers are as before, also those that `forward` replaced, made larger or added.

    A buffer that only changed its values is filled with the old ones; any other gets a copy of what it was, on the
    device where it is now. What a module with buffers notes about them is put back as well (plain numbers and tensors
    among its attributes): one that remembers for how many tokens its buffer was made would not make it again.
    """
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
