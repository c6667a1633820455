"""Texts that the untouched model writes by itself, to be trained along: what it could do, without a file that shows it
(Huang et al. 2024, arXiv 2403.01244, of answers; here of whole texts).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fulltune.errors import SetupError
from fulltune.inference.run import autocast

if TYPE_CHECKING:
    from fulltune.train.worker.context import AttemptContext

MOST = 256
"""Texts: each of its tokens takes a pass through the model."""
_AT_ONCE = 32


def samples(attempt: AttemptContext, tokenizer: Any, count: int, tokens: int) -> list[list[int]]:
    """Texts of at least two tokens and at most so many, drawn from the model's own probabilities: always the same ones
    of a seed, so that a run that goes on has those that it began with. No random number of the training is drawn.

    Args:
        attempt: Its model is the untouched one, on its device.
        tokenizer: The model's.
        count: At most so many, and `MOST`.
        tokens: Of each, at most.

    Raises:
        SetupError: When the tokenizer has no token that a text begins after, or the model writes nothing.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise SetupError(
            "preserve.replay: samples: the tokenizer has neither a token that begins a text nor one that ends it, so "
            "the model cannot begin one; name a text file, or leave replay out"
        )
    model: Any = attempt.trainer.model
    was_training, found = model.training, []
    model.eval()
    with torch.random.fork_rng(), torch.no_grad(), autocast(model.device.type, attempt.plan.precision):
        torch.manual_seed(attempt.plan.seed)
        for begin in range(0, min(count, MOST), _AT_ONCE):
            attempt.alive()
            rows = min(_AT_ONCE, min(count, MOST) - begin)
            made = model.generate(
                input_ids=torch.full((rows, 1), first, device=model.device),
                attention_mask=torch.ones((rows, 1), dtype=torch.long, device=model.device),
                max_new_tokens=tokens - 1,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                stopping_criteria=[_Alive(attempt.alive)],
                **_AS_IT_IS,
            )
            found += [_until_end(row.tolist(), tokenizer.eos_token_id) for row in made]
    model.train(was_training)
    texts = [row for row in found if len(row) > 1]
    if not texts:
        raise SetupError(
            f"preserve.replay: samples: the model ended each of {len(found)} texts at once; name a text file, or leave "
            "replay out"
        )
    return texts


_AS_IT_IS: dict[str, Any] = {
    "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "num_beams": 1,
}  # fmt: skip
"""Whatever the model's own settings make of its probabilities."""


def _until_end(row: list[int], end: int | None) -> list[int]:
    """With the first token that ends it, without the padding behind that."""
    return row[: row.index(end, 1) + 1] if end in row[1:] else row


class _Alive:
    """Says that the process is alive after each token; ends nothing."""

    def __init__(self, alive: Callable[[], None]) -> None:
        self.alive = alive

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.alive()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
