"""Apply a model's output head only where a token is trained or scored: logits [tokens, vocabulary].

The head of a language model is a large part of its work and its logits are most of the memory, yet a prompt's logits
are thrown away. A hook in front of the head picks the hidden states that are needed; what follows the head in some
models (a scale, a soft cap, a bias) works on each logit alone, so the kept ones are the same. Where nothing but a bias
follows the head, the loss can be computed in chunks (`chunked_loss.py`). `verified` tries both on the real model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fulltune.models import evaluating
from fulltune.tasks import Task, Tensor, padding


@dataclass(frozen=True)
class SelectiveHead:
    """A head and where it is needed."""

    head: Any
    """The module that turns hidden states into logits."""
    wanted: Callable[[Tensor], Tensor]
    """From labels [batch, length] to the token that each logit should give, [batch, length]; -100: none is used."""
    model: Any = None
    """Whose head it is."""
    in_pieces: bool = False
    """Whether loss and scores can be computed in pieces."""
    about_pieces: str = ""
    """What was found about that."""

    @contextlib.contextmanager
    def only(self, labels: Tensor, trained: Tensor | None = None, *, in_pieces: bool = False) -> Iterator[None]:
        """Inside, the model's logits are those that `labels[batch, length]` need (at `trained`, if that is known), row
        after row; in pieces, they are `chunked_loss.Pieces`."""
        at = padding.trained_places(self.wanted(labels)) if trained is None else trained
        kept: list[Tensor] = []

        def pick(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
            # Anything else than hidden states of these rows is left alone: logits keep their three axes, and tasks
            # pick from them.
            if not given or given[0].shape[:2] != labels.shape:
                return None
            picked = given[0].flatten(0, 1).index_select(0, at)
            if not in_pieces:
                return (picked, *given[1:])
            kept.append(_as_computed(picked))
            return (picked[:0], *given[1:])

        def put_pieces(_: Any, __: Any, outputs: Any) -> None:
            if kept:
                outputs.logits = _pieces(self.model, self.head, kept.pop(), outputs.logits)

        with contextlib.ExitStack() as hooks:
            hooks.callback(self.head.register_forward_pre_hook(pick).remove)
            if in_pieces:
                hooks.callback(self.model.register_forward_hook(put_pieces).remove)
            yield


def _as_computed(hidden: Tensor) -> Tensor:
    """`hidden[tokens, hidden]` in the type that autocast would give the head's product: where the loss is computed it
    is no longer known."""
    import torch

    kind = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden


def _pieces(model: Any, head: Any, hidden: Tensor, nothing: Tensor) -> Any:
    """Logits of `hidden[tokens, hidden]` in pieces; `nothing[0, vocabulary]` are the head's of no token."""
    from fulltune.models.chunked_loss import Pieces

    biases = [bias for bias in (head.bias, _later_bias(model)) if bias is not None]
    # Adding makes a new tensor through which a trained bias still gets its gradient.
    return Pieces(hidden, head.weight, sum(biases[1:], start=biases[0]) if biases else None, nothing)


def _later_bias(model: Any) -> Any:
    """BART and Marian add one to the logits, [1, vocabulary]; it is not trained."""
    bias = getattr(model, "final_logits_bias", None)
    return None if bias is None else bias[0]


BEFORE, TRIED = 4, 16
"""Tokens before the first trained one, and of the whole piece of a row that is tried: whole logits of more would need
more memory than a step with a loss in pieces."""


def _shortened(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A few tokens of each row, trained ones among them."""
    first = (batch["labels"] != padding.IGNORED).int().argmax(dim=1)
    start, length = max(0, int(first.min()) - BEFORE), batch["labels"].shape[1]

    def piece(tensor: Tensor) -> Tensor:
        begin = start if tensor.shape[1] == length else 0  # an encoder's tokens have a length of their own
        return tensor[:, begin : begin + TRIED]

    return {name: piece(tensor) for name, tensor in batch.items()}


def verified(model: Any, task: Task, batch: Mapping[str, Tensor]) -> tuple[SelectiveHead | None, str]:
    """The selective head of a model, when it gives the same logits for a few tokens of each row of a real, collated
    batch on the model's device, tensors [rows, length] with `labels`; and what was found."""
    import torch

    wanted = getattr(task, "wanted", None)
    head = model.get_output_embeddings()
    if wanted is None or head is None:
        return None, "off: the task has no logits of tokens" if wanted is None else "off: the model names no head"
    selective = SelectiveHead(head, wanted, model)
    batch = _shortened(batch)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    labels = batch["labels"]
    with evaluating(model), as_its_attention_can(model, model.device.type), torch.no_grad():
        whole = model(**inputs).logits[wanted(labels) != padding.IGNORED].float()
        with selective.only(labels):
            picked = model(**inputs).logits.float()
        if picked.shape != whole.shape:
            return None, f"off: the logits became {list(picked.shape)} instead of {list(whole.shape)}"
        difference = float((picked - whole).abs().max()) if len(whole) else 0.0
        # What another order of sums changes is some ten roundings; another place gives other logits altogether.
        if not difference <= _few_roundings(model) * float(whole.abs().max()):
            return None, f"off: its logits differ by {difference:.2g}"
        obstacle = _obstacle_to_pieces(selective, inputs, labels)
    same = f"the same up to {difference:.2g}" if difference else "exactly the same"
    found = f"yes; tried on real rows: {same} as with all logits"
    about_pieces = f"off: {obstacle}" if obstacle else "yes; tried on real rows: the model gives its head's logits"
    return replace(selective, in_pieces=not obstacle, about_pieces=about_pieces), found


def as_its_attention_can(model: Any, kind: str) -> contextlib.AbstractContextManager[Any]:
    """Flash attention knows 16-bit types alone; the others compute in the weights' own type, which tells more."""
    import torch

    if "flash" not in (getattr(getattr(model, "config", None), "_attn_implementation", None) or ""):
        return torch.autocast(kind, enabled=False)
    return torch.autocast(kind, dtype=torch.bfloat16)  # each card with flash attention has it


def _few_roundings(model: Any) -> float:
    """Largest difference, relative to the largest number, that another order of sums makes."""
    import torch

    kind = model.device.type
    computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    return float(torch.finfo(computed).eps) ** 0.5


def _obstacle_to_pieces(selective: SelectiveHead, inputs: Mapping[str, Tensor], labels: Tensor) -> str:
    """Why the loss cannot be computed in pieces, or empty: the head is no plain product, or the model changes logits
    after it, found by giving it some far from zero, where a soft cap shows."""
    import torch

    head = selective.head
    if not isinstance(head, torch.nn.Linear) or type(head).forward is not torch.nn.Linear.forward:
        return f"the model's head is a {type(head).__name__}, not a linear layer"
    given: list[Tensor] = []

    def spread(_: Any, __: Any, logits: Tensor) -> Tensor:
        given.append(torch.linspace(-100, 100, logits.numel()).to(logits).view(logits.shape))
        return given[-1]

    handle = head.register_forward_hook(spread)
    try:
        with torch.no_grad(), selective.only(labels):
            seen = selective.model(**inputs).logits
    finally:
        handle.remove()
    bias = _later_bias(selective.model)
    if len(given) != 1:
        return f"the model calls its head {len(given)} times"
    expected = given[0] if bias is None else given[0] + bias
    if seen.shape != expected.shape:
        return "the model gives other logits than its head's"
    difference = float((seen.float() - expected.float()).abs().max()) if seen.numel() else 0.0
    return "" if difference == 0 else f"the model changes logits after its head, by up to {difference:.2g}"
