"""Texts that are far longer than what a model reads: tokenising takes up to 170 times the memory of a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARACTERS = 50_000
_CHARACTERS_PER_TOKEN = 20


def beginning(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """What of a text can be read in `max_length` tokens and more; the text itself, if it is not much longer.

    Words are tokenised apart from each other, so that those before a space stay what they are. A text whose beginning
    gives few tokens, or that is cut at its left side, is left as it is.
    """
    most = max(_CHARACTERS, _CHARACTERS_PER_TOKEN * max_length)
    if len(text) <= most or getattr(tokenizer, "truncation_side", "right") != "right":
        return text
    begins = text[: text.rfind(" ", 0, most)] if " " in text[1:most] else text[:most]
    num_tokens = len(tokenizer(begins, return_attention_mask=False, verbose=False)["input_ids"])
    return begins if num_tokens > 2 * max_length else text
