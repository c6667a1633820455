from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Each chunk adds once to the weight gradient, at the cost of one token's products, whatever the vocabulary.
TOKENS_PER_CHUNK = {"cpu": 256}
"""Tokens per chunk, by device type."""
TOKENS_PER_CHUNK_ELSEWHERE = 1024
_BLOCK_NUMBERS = 2**21


@dataclass(frozen=True)
class ChunkedLogits:
    """Logits of tokens, computed chunk by chunk when a loss needs them."""

    hidden: torch.Tensor
    """Input of the head in the compute dtype, [tokens, hidden]."""
    weight: torch.Tensor
    """Weight of the head in its own dtype, [vocabulary, hidden]."""
    bias: torch.Tensor | None
    empty: torch.Tensor
    """Head output for zero tokens, through which DDP finds the head's parameters in the graph."""
    head: torch.nn.Module | None = None
    """Module whose weights may be streamed from disk."""

    def _with_weights(self, compute: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        call = getattr(self.head, "call_with_weights", None)
        return call(compute, self.hidden) if call else compute(self.hidden)

    def loss(self, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Return the sum of all tokens' cross entropies, a float32 scalar; `targets[tokens]` are token ids."""

        def compute(hidden: torch.Tensor) -> tuple[torch.Tensor]:
            inputs = (hidden, self.weight, self.bias, targets, label_smoothing, torch.is_grad_enabled())
            return (_ChunkedCrossEntropy.apply(*inputs, hasattr(self.head, "call_with_weights")),)

        vars(compute)["same_without_graph"] = True
        return self._with_weights(compute)[0]

    @torch.no_grad()
    def scores(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each token's cross entropy (float32), and whether its target has the highest logit (bool)."""

        def compute(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
            losses = torch.empty(len(targets), dtype=torch.float32, device=targets.device)
            right = torch.empty(len(targets), dtype=torch.bool, device=targets.device)
            with torch.autocast(hidden.device.type, enabled=False):
                for chunk, logits in _logit_chunks(hidden, self.weight.detach().to(hidden.dtype), self.bias):
                    right[chunk] = logits.argmax(dim=-1) == targets[chunk]
                    losses[chunk] = logits.logsumexp(dim=-1) - logits.gather(1, targets[chunk, None])[:, 0]
            return losses, right

        losses, right = self._with_weights(compute)
        return losses, right


def token_scores(logits: torch.Tensor | ChunkedLogits, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's cross entropy (float32), and whether its target has the highest logit (bool)."""
    if isinstance(logits, ChunkedLogits):
        return logits.scores(targets)
    picked = logits.float()
    return F.cross_entropy(picked, targets, reduction="none"), picked.argmax(dim=-1) == targets


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross entropy whose forward pass also computes the gradients, which the backward pass scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        label_smoothing: float,
        wants_gradients: bool,
        is_streamed: bool,
    ) -> torch.Tensor:
        """Return the summed loss; if `wants_gradients`, save the gradients of hidden states, weight and bias."""
        of_hidden, of_weight, of_bias = (wants_gradients and needed for needed in ctx.needs_input_grad[:3])
        # If weights are streamed: few tokens' gradients of logits take less memory than the weight's float32 gradient.
        is_small = is_streamed and weight.dtype != torch.float32 and len(hidden) < 2 * hidden.shape[1]
        of_logits = hidden.new_empty((len(hidden), len(weight))) if of_weight and is_small else None
        # Sums over chunks are float32: in bf16 the later chunks would be rounded away.
        hidden_grad = torch.empty_like(hidden) if of_hidden else None
        sums = weight.new_zeros(weight.shape, dtype=torch.float32) if of_weight and of_logits is None else None
        bias_grad = weight.new_zeros(len(weight), dtype=torch.float32) if of_bias else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            cast = weight.detach().to(hidden.dtype)  # once for all chunks
            for chunk, logits in _logit_chunks(hidden, cast, bias):
                # From here on `logits` becomes their gradient, in place.
                loss += _loss_and_gradient(logits, targets[chunk], label_smoothing)
                if bias_grad is not None:
                    bias_grad += logits.sum(dim=0)
                gradient = logits.to(hidden.dtype)
                if hidden_grad is not None:
                    _multiply_by_weight(gradient, cast, hidden_grad[chunk])
                if of_logits is not None:
                    of_logits[chunk] = gradient
                if sums is not None:
                    _add_weight_gradient(sums, gradient, hidden[chunk])
                del gradient  # before the next chunk makes its own
        ctx.types = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(hidden_grad, sums, bias_grad, of_logits, None if of_logits is None else hidden)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the saved gradients times `factor`, the gradient of the loss."""
        *saved, of_logits, hidden = ctx.saved_tensors
        # In place: a second backward pass through the same graph is an error that autograd itself reports.
        of_hidden, of_weight, of_bias = (
            None if gradient is None else gradient.mul_(factor).to(kind)
            for gradient, kind in zip(saved, ctx.types, strict=True)
        )
        if of_logits is not None:
            of_weight = _weight_gradient(of_logits, hidden, factor, ctx.types[1])
        return of_hidden, of_weight, of_bias, None, None, None, None


def _weight_gradient(
    gradient: torch.Tensor, hidden: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return `gradient.t() @ hidden * factor`, summed as in `_add_weight_gradient` but for one block of rows after the
    other; `gradient` is [tokens, vocabulary]."""
    weight_grad = hidden.new_empty((gradient.shape[1], hidden.shape[1]), dtype=dtype)
    rows = TOKENS_PER_CHUNK.get(hidden.device.type, TOKENS_PER_CHUNK_ELSEWHERE)
    for block in _axis_slices(len(weight_grad), hidden.shape[1], hidden.device):
        parts = zip(gradient[:, block].split(rows), hidden.split(rows), strict=True)
        sums = torch.zeros(weight_grad[block].shape, dtype=torch.float32, device=hidden.device)
        for part, tokens in parts:
            sums += part.t() @ tokens
        weight_grad[block] = sums.mul_(factor)
    return weight_grad


def _logit_chunks(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield each chunk's slice of tokens and its float32 logits, in a buffer that the next chunk overwrites."""
    # Autocast must be off: `hidden` already has the compute dtype.
    rows = min(TOKENS_PER_CHUNK.get(hidden.device.type, TOKENS_PER_CHUNK_ELSEWHERE), len(hidden))
    buffer = hidden.new_empty((rows, len(weight)), dtype=torch.float32)
    for start in range(0, len(hidden), rows or 1):
        chunk = slice(start, min(start + rows, len(hidden)))
        logits = buffer[: chunk.stop - start]
        if hidden.dtype == torch.float32:
            torch.mm(hidden[chunk], weight.t(), out=logits)
        else:
            for block in _axis_slices(len(weight), weight.shape[1], weight.device):
                logits[:, block] = hidden[chunk] @ weight[block].t()
        if bias is not None:
            logits += bias.detach()
        yield chunk, logits


def _loss_and_gradient(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Return the summed cross entropy of float32 logits [tokens, vocabulary]; overwrite these with the gradient."""
    index = targets[:, None]
    logits -= logits.amax(dim=-1, keepdim=True)
    target_logits = (1 - label_smoothing) * logits.gather(1, index)[:, 0]
    if label_smoothing:
        target_logits = target_logits + label_smoothing * logits.mean(dim=-1)
    total = logits.exp_().sum(dim=-1, keepdim=True)
    logits /= total
    if label_smoothing:
        logits -= label_smoothing / logits.shape[1]
    logits.scatter_add_(1, index, torch.full_like(index, label_smoothing - 1, dtype=logits.dtype))
    return (total[:, 0].log() - target_logits).sum()


def _multiply_by_weight(gradient: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Write `gradient[tokens, vocabulary] @ weight[vocabulary, hidden]` to `out`, in blocks of columns so that each
    number is rounded once."""
    if gradient.dtype == torch.float32:
        torch.mm(gradient, weight, out=out)
        return
    for columns in _axis_slices(weight.shape[1], len(weight), weight.device):
        out[:, columns] = gradient @ weight[:, columns]


def _add_weight_gradient(sums: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
    """Add `gradient.t() @ hidden` to float32 `sums[vocabulary, hidden]`."""
    if gradient.dtype == sums.dtype:
        sums.addmm_(gradient.t(), hidden)
        return
    for block in _axis_slices(len(sums), sums.shape[1], sums.device):
        sums[block] += gradient[:, block].t() @ hidden


def _axis_slices(length: int, other_length: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of an axis of `length`, short on a CPU so that blocks with `other_length` stay small."""
    size = max(64, _BLOCK_NUMBERS // other_length) if device.type == "cpu" else length
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
