"""A trial pass leaves no trace in a model's buffers, nor in what a module notes about them."""

from __future__ import annotations

import torch

from fulltune.train.worker.dry_run import same_buffers


class _Table(torch.nn.Module):
    """Makes its table longer when a longer row comes, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.made_for = 0
        self.register_buffer("table", torch.zeros(0))

    def forward(self, length: int) -> torch.Tensor:
        if length > self.made_for:
            self.made_for, self.table = length, torch.arange(float(length))
        return self.table[:length]


def test_module_that_remembers_the_size_of_its_buffer_makes_it_again() -> None:
    model = torch.nn.Sequential(_Table())
    with same_buffers(model):
        assert model(8).shape == (8,)
    assert (model[0].made_for, model[0].table.shape) == (0, (0,))
    assert model(4).shape == (4,)
