"""Texts that are far longer than what a model reads: tokenising takes up to 170 times the memory of a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARACTERS = 50_000
_CHARACTERS_PER_TOKEN = 20
PART_CHARACTERS = 1_000_000


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


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a whole text, with special ones; of one with millions of characters part by part.

    Only where this tokenizer gives the same tokens to two words apart as it does together; else at once. In a word of a
    million letters, which no text has, a token may be another where it is cut.
    """
    seam = _seam(tokenizer) if len(text) > PART_CHARACTERS else None
    if seam is not None and (parts := _parts(text, seam)) is not None:
        ids, closing = _specials(tokenizer)
        for part in parts:
            ids += _plain(part, tokenizer)
        return ids + closing
    return list(tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"])


def _parts(text: str, seam: str) -> list[str] | None:
    """A text cut before single spaces, `seam` left out at each cut; None: there is none for long."""
    parts, start = list[str](), 0
    while len(text) - start > PART_CHARACTERS:
        end = start + PART_CHARACTERS
        space = text.rfind(" ", start + 1, end)
        # Several spaces could be one token.
        while space > 0 and (text[space - 1].isspace() or text[space + 1 : space + 2].isspace()):
            space = text.rfind(" ", start + 1, space)
        if space < 0 and seam:
            return None
        end = space if space > 0 else end
        parts.append(text[start:end])
        start = end + len(seam)
    return [*parts, text[start:]]


def _plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    wanted = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return list(tokenizer(text, **wanted)["input_ids"])


def _seam(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What is left out where a text is cut before a space: nothing, or the space; None: neither gives the same."""
    together = _plain("of the rain", tokenizer)
    for seam in ("", " "):
        if together == _plain("of", tokenizer) + _plain(" the rain"[len(seam) :], tokenizer):
            return seam
    return None


def _specials(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens before a text, and behind it."""
    whole, plain = list(tokenizer("of", verbose=False)["input_ids"]), _plain("of", tokenizer)
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:start], whole[start + len(plain) :]
