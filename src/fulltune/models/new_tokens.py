from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from fulltune.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Pieces = Mapping[int, Sequence[int]]
"""For each new token's id, the ids into which the pretrained tokenizer splits its text."""


def add_to_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> Pieces:
    """Add tokens and return their pieces, or raise `RecipeError` if a token is blank, listed twice or not new."""
    vocabulary, unknown = tokenizer.get_vocab(), tokenizer.unk_token_id
    pieces = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens]
    problems = []
    for number, (token, ids) in enumerate(zip(tokens, pieces, strict=True)):
        if not token.strip() or not ids:
            problems.append(f"token {number + 1} is blank: {token!r}; remove it")
        elif token in tokens[:number]:
            problems.append(f"{token!r} is listed twice; remove one of them")
        elif token in vocabulary or (len(ids) == 1 and ids[0] != unknown):
            problems.append(f"{token!r} is already a single token of this model; remove it")
    if problems:
        raise RecipeError([f"model.new_tokens: {problem}" for problem in problems])
    tokenizer.add_tokens(list(tokens))
    numbers = tokenizer.get_vocab()
    return {numbers[token]: ids for token, ids in zip(tokens, pieces, strict=True)}


def add_to_model(model: PreTrainedModel, pieces: Pieces) -> None:
    """Give the embeddings and the language model's head a row for each new token: the mean of its pieces' rows."""
    import torch

    size, embeddings = max(pieces) + 1, cast("torch.nn.Embedding", model.get_input_embeddings())
    if size > embeddings.num_embeddings:  # many models have unused rows
        embeddings = model.resize_token_embeddings(size, mean_resizing=False)
    head = model.get_output_embeddings()
    of_head = () if head is None else (head.weight, getattr(head, "bias", None))
    with torch.no_grad():
        for tensor in (embeddings.weight, *of_head):
            for token, ids in pieces.items() if tensor is not None else ():
                tensor[token] = tensor[list(ids)].float().mean(0).to(tensor.dtype)
