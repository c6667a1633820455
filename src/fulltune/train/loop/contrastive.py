from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from fulltune.inference.run import extract_logits
from fulltune.stream.randomness import random_state, set_random_state

ANCHORS_AT_ONCE = 1024


class ContrastiveLoss:
    """A Trainer's `compute_loss_func` that compares all rows of a global batch, with exact gradients at any micro batch
    size (GradCache, Gao et al. 2021, arXiv 2101.06983).

    A step first embeds all micro batches without a graph, and computes the loss and its gradient with respect to their
    vectors. Each then runs with a graph, the same random numbers and its share of that gradient and of the loss.
    """

    def __init__(self, row_losses: Callable[[Tensor, Tensor, slice], Tensor], accelerator: Accelerator) -> None:
        self.row_losses, self.accelerator = row_losses, accelerator
        self._random: list[Sequence[Tensor]] = []
        self._shares: list[tuple[Tensor, Tensor]] = []

    def begin_step(self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Embed a step's micro batches. A single one needs it not, because its vectors are compared after its pass."""
        self._random, vectors = [], list[Tensor]()
        model.train()
        with torch.no_grad():
            for batch in batches:
                inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
                self._random.append(random_state(self.accelerator.device))
                vectors.append(model(**inputs).logits)
        self._shares = self._share_out(vectors, [batch["labels"] for batch in batches])

    def restore_random_state(self) -> None:
        """Restore the random numbers of the next micro batch as they were when it was embedded."""
        if self._random:
            set_random_state(self._random.pop(0), self.accelerator.device)

    def __call__(self, outputs: ModelOutput, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        vectors = extract_logits(outputs)
        if not self._shares:
            self._shares = self._share_out([vectors.detach()], [labels])
        value, gradient = self._shares.pop(0)
        surrogate = (vectors * gradient).sum()
        return (surrogate + (value - surrogate).detach()) / (1 if num_items_in_batch is None else num_items_in_batch)

    def _share_out(self, vectors: Sequence[Tensor], labels: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return each micro batch's summed loss, and the gradient of all ranks' loss with respect to its vectors."""
        sizes = [len(part) for part in vectors]
        (everything, start), (all_labels, _) = (self._gather(torch.cat(list(parts))) for parts in (vectors, labels))
        everything = everything.detach().float().requires_grad_()
        losses = []
        for first in range(0, len(everything), ANCHORS_AT_ONCE):
            losses.append(self.row_losses(everything, all_labels, slice(first, first + ANCHORS_AT_ONCE)))
            losses[-1].sum().backward()
        assert everything.grad is not None
        here = slice(start, start + sum(sizes))
        parts = zip(torch.cat(losses).detach()[here].split(sizes), everything.grad[here].split(sizes), strict=True)
        return [(value.sum(), gradient) for value, gradient in parts]

    def _gather(self, local: Tensor) -> tuple[Tensor, int]:
        """Join the rows of all ranks, which may differ in number, and return the number of this rank's first row."""
        if self.accelerator.num_processes == 1:
            return local, 0
        counts = self.accelerator.gather(torch.tensor([len(local)], device=local.device)).tolist()
        padded = self.accelerator.gather(self.accelerator.pad_across_processes(local)).split(max(counts))
        parts = [part[:count] for part, count in zip(padded, counts, strict=True)]
        return torch.cat(parts), sum(counts[: self.accelerator.process_index])
