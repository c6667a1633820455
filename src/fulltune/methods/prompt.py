"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): trained vectors before those of each text.

PEFT's own breaks on token heads, finds the wrong last token in decoders that classify, and ignores position ids. Here
hooks on the plain model do the same: the body reads so many tokens more, whose embeddings are replaced by the trained
ones; for heads that look at each token, and in decoders, the virtual positions are cut off behind the body, so that
everything above sees the text alone. An encoder that classifies reads its first position, which is a virtual one, as
in PEFT. An encoder-decoder has them before its source.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from fulltune.errors import RecipeError
from fulltune.methods import PROMPT_MODULE
from fulltune.models.checkpoint_head import put_together
from fulltune.models.sharding import whole
from fulltune.recipe.methods import PromptMethod
from fulltune.recipe.tasks import TaskName

_TOKEN_TASKS = ("token-classification", "question-answering", "causal-lm")


class Prompt(nn.Module):
    """The trained vectors, float32 `weight[tokens, size]`."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.size = len(weight)
        self.weight = nn.Parameter(weight)
        self.waiting = False
        """The next call of the embeddings has virtual tokens in front."""
        self.in_front = False
        """This pass has them; one that goes on from a cache has not."""

    def forward(self, found: torch.Tensor) -> torch.Tensor:
        """Embeddings `found[rows, tokens, size]` with the vectors in place of the first ones. DeepSpeed puts weights
        together for the module that is called with them."""
        ahead = self.weight.to(found.dtype).expand(len(found), -1, -1)
        return torch.cat((ahead, found[:, self.size :]), dim=1)


def put_before(model: Any, method: PromptMethod, task: TaskName) -> None:
    """Add the virtual tokens and have the model read them.

    Raises:
        RecipeError: When the model has no embeddings of tokens, or hides its body.
    """
    from fulltune.models.shapes import is_decoder

    if model.config.is_encoder_decoder:
        body, embeddings = model.get_encoder(), _embeddings(model.get_encoder())
    else:
        body, embeddings = model.base_model, _embeddings(model)
    if embeddings is None or body is model:
        lacks = "no embeddings of tokens" if embeddings is None else "no body of its own"
        raise RecipeError(f"method {method.arm}: {type(model).__name__} has {lacks}; take lora or adapter")
    prompt = Prompt(_first(embeddings, method))
    model.add_module(PROMPT_MODULE, prompt)
    size = method.num_virtual_tokens
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    filler = 1 if pad == 0 else 0  # RoBERTa counts positions by what is not padding
    signature = inspect.signature(body.forward)

    def before_body(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = {**signature.bind_partial(*args).arguments, **kwargs}
        return (), _with_virtual(given, size, filler, prompt)

    def after_embeddings(_: Any, __: Any, found: torch.Tensor) -> torch.Tensor:
        if not prompt.waiting:
            return found
        prompt.waiting = False
        changed: torch.Tensor = prompt(found)
        return changed

    body.register_forward_pre_hook(before_body, with_kwargs=True)
    embeddings.register_forward_hook(after_embeddings)
    if model.config.is_encoder_decoder:
        model.get_decoder().register_forward_pre_hook(_see_all(size), with_kwargs=True)
    elif task in _TOKEN_TASKS or is_decoder(model.config):
        body.register_forward_hook(_cut(size, prompt))


def _see_all(size: int) -> Any:
    """Have a decoder attend to the virtual positions of its encoder's states."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = kwargs.get("encoder_attention_mask")
        if mask is None:
            return args, kwargs
        return args, {**kwargs, "encoder_attention_mask": torch.cat((mask.new_ones((len(mask), size)), mask), dim=1)}

    return hook


def _cut(size: int, prompt: Prompt) -> Any:
    """Take the virtual positions off the body's states."""

    def hook(_: Any, __: Any, outputs: Any) -> Any:
        if not prompt.in_front:
            return outputs
        if isinstance(outputs, tuple):
            return (outputs[0][:, size:], *outputs[1:])
        outputs.last_hidden_state = outputs.last_hidden_state[:, size:]
        return outputs

    return hook


def _embeddings(module: Any) -> Any:
    try:
        found = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # transformers' answer for a model that reads no tokens
        return None
    return found if isinstance(found, nn.Embedding) else None


def _first(embeddings: nn.Embedding, method: PromptMethod) -> torch.Tensor:
    """Vectors of tokens drawn from the vocabulary, or random numbers of their spread: float32 [tokens, size]."""
    with put_together([embeddings.weight]):
        weight, size = whole(embeddings.weight.detach()), method.num_virtual_tokens
        if method.init == "vocabulary":
            return weight[torch.randint(0, len(weight), (size,), device=weight.device)].float()
        spread = weight.float().std()
        return torch.randn(size, weight.shape[1], device=weight.device) * spread


def _with_virtual(given: dict[str, Any], size: int, filler: int, prompt: Prompt) -> dict[str, Any]:
    """The body's inputs with so many tokens more in front, or, when it goes on from a cache, behind them.

    Args:
        given: `input_ids[batch, tokens]`, `attention_mask[batch, tokens]`, `position_ids` ... by name.
        size: Number of virtual tokens.
        filler: Their id, whose embedding is replaced.
        prompt: Told that they stand in front.
    """
    cache = given.get("past_key_values")
    begins = cache is None or not cache.get_seq_length()
    changed = dict(given)

    def ahead(tensor: torch.Tensor, value: int) -> torch.Tensor:
        return torch.cat((tensor.new_full((*tensor.shape[:-1], size), value), tensor), dim=-1)

    if given.get("attention_mask") is not None:
        changed["attention_mask"] = ahead(given["attention_mask"], 1)
    for name in ("position_ids", "cache_position"):
        if given.get(name) is None:
            continue
        moved = given[name] + size
        if begins:
            first = torch.arange(size, device=moved.device, dtype=moved.dtype).expand(*moved.shape[:-1], size)
            moved = torch.cat((first, moved), dim=-1)
        changed[name] = moved
    prompt.in_front = prompt.waiting = begins
    if begins:
        changed["input_ids"] = ahead(given["input_ids"], filler)
        if given.get("token_type_ids") is not None:
            changed["token_type_ids"] = ahead(given["token_type_ids"], 0)
    return changed
