"""The order of the rows: the same for any micro batch, accumulation or number of processes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

POOL = 20
"""Global batches from which rows of similar length are put together; more would leave too little chance."""


class GlobalBatchSampler:
    """Yields micro batches; each run of `accumulation x processes` of them is one global batch.

    The global batches depend on the seed and the epoch only. transformers' own grouped sampler draws other batches when
    the micro batch changes, so halving it after running out of memory would change the result.

    Args:
        lengths: Tokens of each row.
        global_batch_size: Rows per optimizer step.
        micro_batch_size: Rows per yielded batch.
        seed: Of the order.
        group_by_length: Put rows of similar length into one batch.
    """

    def __init__(
        self, lengths: Sequence[int], global_batch_size: int, micro_batch_size: int, seed: int, group_by_length: bool
    ) -> None:
        self.lengths = lengths
        self.global_batch_size = global_batch_size
        self.batch_size = micro_batch_size  # the name that accelerate reads
        self.drop_last = False
        self.seed = seed
        self.group_by_length = group_by_length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.global_batches():
            for start in range(0, len(batch), self.batch_size):
                yield batch[start : start + self.batch_size]

    def global_batches(self) -> list[list[int]]:
        """The epoch's global batches; only the last may be smaller."""
        draw = random.Random(f"{self.seed}:{self.epoch}")
        order = list(range(len(self.lengths)))
        draw.shuffle(order)
        size = self.global_batch_size
        if not self.group_by_length:
            return [order[start : start + size] for start in range(0, len(order), size)]
        whole = len(order) // size * size
        batches = []
        for start in range(0, whole, POOL * size):
            pool = sorted(order[start : min(whole, start + POOL * size)], key=lambda i: -self.lengths[i])
            batches += [pool[at : at + size] for at in range(0, len(pool), size)]
        draw.shuffle(batches)
        rest = sorted(order[whole:], key=lambda i: -self.lengths[i])
        return batches + ([rest] if rest else [])
