"""Cross entropy of a language model's head in chunks: logits [tokens, vocabulary] never exist as a whole.

torch's own `linear_cross_entropy` (2.13) is slower than whole logits on a CPU and rounds the loss to bf16, and Liger's
kernels need a GPU. Gradients are made in the forward pass, where a chunk's logits are at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

ROWS = {"cpu": 256}
"""Tokens in a piece. A number that does not depend on the vocabulary: what a piece costs beyond its products is adding
its share to the gradient of the weights, [vocabulary, hidden] for as many products as it has tokens."""
ROWS_ELSEWHERE = 1024
_BLOCK_NUMBERS = 2**21
"""In the copies of a product: its result where it is not float32, and its weights, which oneDNN packs anew."""


@dataclass(frozen=True)
class Pieces:
    """Logits of tokens that are computed piece by piece when a loss asks for them."""

    hidden: torch.Tensor
    """What the head was given, [tokens, hidden], in the type of the computations."""
    weight: torch.Tensor
    """The head's, [vocabulary, hidden], in its own type."""
    bias: torch.Tensor | None
    """[vocabulary]."""
    nothing: torch.Tensor
    """The head's logits of no token: DDP looks for parameters behind a model's outputs, and finds the head's here."""

    def loss(self, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Cross entropy at token ids `targets[tokens]`, summed: float32 scalar."""
        given = (self.hidden, self.weight, self.bias, targets, label_smoothing)
        return _Loss.apply(*given, torch.is_grad_enabled())

    @torch.no_grad()
    def scores(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy of each token, float32 [tokens], and whether its logit is the highest, bool [tokens]."""
        losses = torch.empty(len(targets), dtype=torch.float32, device=targets.device)
        right = torch.empty(len(targets), dtype=torch.bool, device=targets.device)
        with torch.autocast(self.hidden.device.type, enabled=False):
            for piece, logits in _pieces(self.hidden, self.weight.detach().to(self.hidden.dtype), self.bias):
                right[piece] = logits.argmax(dim=-1) == targets[piece]
                losses[piece] = logits.logsumexp(dim=-1) - logits.gather(1, targets[piece, None])[:, 0]
        return losses, right


def summed_loss(logits: torch.Tensor | Pieces, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Cross entropy of picked `logits[tokens, vocabulary]`, whole or in pieces, at `targets[tokens]`, summed: float32
    scalar."""
    if isinstance(logits, Pieces):
        return logits.loss(targets, label_smoothing)
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing, reduction="sum")


def token_scores(logits: torch.Tensor | Pieces, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of each token, float32 [tokens], and whether its logit is the highest, bool [tokens], of
    `logits[tokens, vocabulary]`, whole or in pieces; no gradients."""
    if isinstance(logits, Pieces):
        return logits.scores(targets)
    picked = logits.float()
    return F.cross_entropy(picked, targets, reduction="none"), picked.argmax(dim=-1) == targets


class _Loss(torch.autograd.Function):
    """Summed cross entropy whose gradients are made in the forward pass and only scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        label_smoothing: float,
        wants_gradients: bool,
    ) -> torch.Tensor:
        of_hidden, of_weight, of_bias = (wants_gradients and wanted for wanted in ctx.needs_input_grad[:3])
        # Sums over pieces are float32 whatever the weights are: in bf16 the later pieces would be lost.
        hidden_grad = torch.empty_like(hidden) if of_hidden else None
        weight_grad = weight.new_zeros(weight.shape, dtype=torch.float32) if of_weight else None
        bias_grad = weight.new_zeros(len(weight), dtype=torch.float32) if of_bias else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            cast = weight.detach().to(hidden.dtype)  # once for all pieces
            for piece, logits in _pieces(hidden, cast, bias):
                # From here on `logits` becomes their gradient, in place.
                loss += _sum_and_gradient(logits, targets[piece], label_smoothing)
                if bias_grad is not None:
                    bias_grad += logits.sum(dim=0)
                gradient = logits.to(hidden.dtype)
                if hidden_grad is not None:
                    _times_weight(gradient, cast, hidden_grad[piece])
                if weight_grad is not None:
                    _add_outer(weight_grad, gradient, hidden[piece])
                del gradient  # before the next piece makes its own
        ctx.types = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place: a second backward pass through the same graph is an error that autograd itself reports.
        scaled = (
            None if gradient is None else gradient.mul_(factor).to(kind)
            for gradient, kind in zip(ctx.saved_tensors, ctx.types, strict=True)
        )
        return (*scaled, None, None, None)


def _pieces(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Each piece's place and its logits in float32 [rows, vocabulary]; they may be overwritten, as the next ones do.
    Called without autocast: `hidden` has the type that it would give."""
    rows = min(ROWS.get(hidden.device.type, ROWS_ELSEWHERE), len(hidden))
    kept = hidden.new_empty((rows, len(weight)), dtype=torch.float32)
    for start in range(0, len(hidden), rows or 1):
        piece = slice(start, min(start + rows, len(hidden)))
        logits = kept[: piece.stop - start]
        if hidden.dtype == torch.float32:
            torch.mm(hidden[piece], weight.t(), out=logits)
        else:
            for block in _blocks(len(weight), weight.shape[1], weight):
                logits[:, block] = hidden[piece] @ weight[block].t()
        if bias is not None:
            logits += bias.detach()
        yield piece, logits


def _sum_and_gradient(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Summed cross entropy of float32 logits [rows, vocabulary], which become its gradient."""
    chosen = targets[:, None]
    logits -= logits.amax(dim=-1, keepdim=True)
    wanted = (1 - label_smoothing) * logits.gather(1, chosen)[:, 0]
    if label_smoothing:
        wanted = wanted + label_smoothing * logits.mean(dim=-1)
    total = logits.exp_().sum(dim=-1, keepdim=True)
    logits /= total
    if label_smoothing:
        logits -= label_smoothing / logits.shape[1]
    logits.scatter_add_(1, chosen, torch.full_like(chosen, label_smoothing - 1, dtype=logits.dtype))
    return (total[:, 0].log() - wanted).sum()


def _times_weight(gradient: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """`gradient[rows, vocabulary]` @ `weight[vocabulary, hidden]` into `out[rows, hidden]`, a few columns at a time:
    each number is one sum, rounded once."""
    if gradient.dtype == torch.float32:
        torch.mm(gradient, weight, out=out)
        return
    for columns in _blocks(weight.shape[1], len(weight), weight):
        out[:, columns] = gradient @ weight[:, columns]


def _add_outer(sums: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
    """Add `gradient`.t() @ `hidden` to float32 `sums` [vocabulary, hidden]."""
    if gradient.dtype == sums.dtype:
        sums.addmm_(gradient.t(), hidden)
        return
    for block in _blocks(len(sums), sums.shape[1], sums):
        sums[block] += gradient[:, block].t() @ hidden


def _blocks(length: int, width: int, like: torch.Tensor) -> Iterator[slice]:
    """Slices of an axis, each with so many numbers that a product's copies stay small. On a GPU one: there small
    products are a waste."""
    size = max(64, _BLOCK_NUMBERS // width) if like.device.type == "cpu" else length
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
