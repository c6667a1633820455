from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fulltune.models import evaluation_mode
from fulltune.tasks import Task, Tensor, padding

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from fulltune.models.chunked_loss import ChunkedLogits


@dataclass(frozen=True)
class SelectiveHead:
    """A model's head that computes only the logits that a task uses."""

    head: Any
    target_ids: Callable[[Tensor], Tensor]
    """Returns the token that each logit should predict, or -100, from labels [batch, length]."""
    model: nn.Module
    can_chunk: bool = False
    chunking_note: str = ""

    @contextlib.contextmanager
    def computing_only(self, labels: Tensor, trained: Tensor | None = None, *, chunked: bool = False) -> Iterator[None]:
        """Inside the context, make the model return only the logits that `labels[batch, length]` need: [tokens,
        vocabulary], or `ChunkedLogits` if `chunked`.

        `trained` is the result of `padding.trained_positions`, if already computed.
        """
        at = padding.trained_positions(self.target_ids(labels)) if trained is None else trained
        states: list[Tensor] = []

        def select_hidden(_: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            """Pre-hook: select the needed tokens' hidden states, or return None to keep the input."""
            # Inputs that are not these rows' hidden states pass unchanged: logits stay 3-dimensional, and tasks select.
            if not args or args[0].shape[:2] != labels.shape:
                return None
            picked = args[0].flatten(0, 1).index_select(0, at)
            if not chunked:
                return (picked, *args[1:])
            states.append(_cast_for_autocast(picked))
            return (picked[:0], *args[1:])

        def replace_logits(_: object, __: object, outputs: Any) -> None:
            if states:
                outputs.logits = _chunked_logits(self.model, self.head, states.pop(), outputs.logits)

        with contextlib.ExitStack() as hooks:
            hooks.enter_context(self.head.register_forward_pre_hook(select_hidden))
            if chunked:
                hooks.enter_context(self.model.register_forward_hook(replace_logits))
            yield


def _cast_for_autocast(hidden: Tensor) -> Tensor:
    """Cast hidden states to the dtype of the active autocast, if any."""
    import torch

    kind = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden


def _chunked_logits(model: nn.Module, head: nn.Linear, hidden: Tensor, empty: Tensor) -> ChunkedLogits:
    """Return the chunked logits of `hidden[tokens, hidden]`. `empty` is the head's output for zero tokens."""
    from fulltune.models.chunked_loss import ChunkedLogits

    biases = [bias for bias in (head.bias, _bias_after_head(model)) if bias is not None]
    # Adding makes a new tensor through which a trained bias still gets its gradient.
    return ChunkedLogits(hidden, head.weight, sum(biases[1:], start=biases[0]) if biases else None, empty, head)


def _bias_after_head(model: nn.Module) -> Tensor | None:
    """Return the untrained bias [vocabulary] that BART and Marian add to the logits, or None."""
    bias = getattr(model, "final_logits_bias", None)
    return None if bias is None else bias[0]


TOKENS_BEFORE_TRAINED, NUM_TOKENS_TRIED = 4, 16


def _cut_to_few_tokens(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut a batch's tensors to 16 tokens that begin shortly before the first trained token."""
    first = (batch["labels"] != padding.IGNORED).int().argmax(dim=1)
    start, length = max(0, int(first.min()) - TOKENS_BEFORE_TRAINED), batch["labels"].shape[1]

    def piece(tensor: Tensor) -> Tensor:
        begin = start if tensor.shape[1] == length else 0  # an encoder's tokens have a length of their own
        return tensor[:, begin : begin + NUM_TOKENS_TRIED]

    return {name: piece(tensor) for name, tensor in batch.items()}


def verify_selective_head(
    model: PreTrainedModel, task: Task, batch: Mapping[str, Tensor]
) -> tuple[SelectiveHead | None, str]:
    """Return a selective head and a note, or None and the reason if its logits differ from the whole model's on a few
    tokens.

    `batch` is collated and on the model's device.
    """
    import torch

    target_ids = getattr(task, "target_ids", None)
    head = model.get_output_embeddings()
    if target_ids is None or head is None:
        return (
            None,
            "off: the task has no token logits" if target_ids is None else "off: the model has no output embeddings",
        )
    selective = SelectiveHead(head, target_ids, model)
    batch = _cut_to_few_tokens(batch)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    labels = batch["labels"]
    with evaluation_mode(model), attention_precision(model, model.device.type), torch.no_grad():
        whole = model(**inputs).logits[target_ids(labels) != padding.IGNORED].float()
        with selective.computing_only(labels):
            picked = model(**inputs).logits.float()
        if picked.shape != whole.shape:
            return None, f"off: the logits have the shape {list(picked.shape)} instead of {list(whole.shape)}"
        difference = float((picked - whole).abs().max()) if len(whole) else 0.0
        # Another order of summation changes about ten roundings; a wrong position changes everything.
        if not difference <= _rounding_tolerance(model) * float(whole.abs().max()):
            return None, f"off: the logits differ by {difference:.2g}"
        obstacle = _why_not_chunked(selective, inputs, labels)
    same = f"the same logits up to {difference:.2g}" if difference else "exactly the same logits"
    chunking_note = f"off: {obstacle}" if obstacle else "yes; on real rows the model returns its head's logits"
    selective = replace(selective, can_chunk=obstacle is None, chunking_note=chunking_note)
    return selective, f"yes; on real rows the head gives {same}"


def attention_precision(model: nn.Module, device_type: str) -> torch.autocast:
    """Return the context in which to compare logits: fp32 or, for flash attention, bf16 autocast."""
    import torch

    if "flash" not in (getattr(getattr(model, "config", None), "_attn_implementation", None) or ""):
        return torch.autocast(device_type, enabled=False)
    return torch.autocast(device_type, dtype=torch.bfloat16)  # every GPU with flash attention has bf16


def _rounding_tolerance(model: PreTrainedModel) -> float:
    """Return the relative difference that rounding may cause: the square root of the compute dtype's epsilon."""
    import torch

    kind = model.device.type
    computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    return float(torch.finfo(computed).eps) ** 0.5


def _why_not_chunked(selective: SelectiveHead, inputs: Mapping[str, Tensor], labels: Tensor) -> str | None:
    """Return why logits cannot be chunked, or None if the head is a linear layer and nothing changes its logits
    afterwards."""
    import torch

    head = selective.head
    if not isinstance(head, torch.nn.Linear) or type(head).forward is not torch.nn.Linear.forward:
        return f"the model's head is a {type(head).__name__}, not a linear layer"
    probes: list[Tensor] = []

    def spread(_: object, __: object, logits: Tensor) -> Tensor:
        probes.append(torch.linspace(-100, 100, logits.numel()).to(logits).view(logits.shape))
        return probes[-1]

    with head.register_forward_hook(spread), torch.no_grad(), selective.computing_only(labels):
        logits = selective.model(**inputs).logits
    bias = _bias_after_head(selective.model)
    if len(probes) != 1:
        return f"the model calls its head {len(probes)} times"
    expected = probes[0] if bias is None else probes[0] + bias
    if logits.shape != expected.shape:
        return "the model's logits differ in shape from its head's"
    difference = float((logits.float() - expected.float()).abs().max()) if logits.numel() else 0.0
    return None if difference == 0 else f"the model changes logits after its head, by up to {difference:.2g}"
