"""Chat messages to tokens, with a mask of what the assistant said.

Two ways, chosen by the template. With `{% generation %}` marks the tokenizer tells the assistant's tokens itself. Without
them the conversation is rendered up to before and up to after each assistant turn, and the difference is that turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fulltune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
Masked = tuple[list[int], list[bool]]
"""Token ids and, for each, whether it is trained."""

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


def clean(messages: Any) -> list[dict[str, Any]]:
    """Messages in the form `{"role", "content", ...}`; ShareGPT's `from`/`value` is translated.

    Keys without a value are dropped: a parquet file gives every message the keys of all messages.

    Raises:
        DataError: When this is no list of messages.
    """
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, Mapping) for message in messages):
        raise DataError(f"expected a list of messages, found {type(messages).__name__}")
    cleaned = []
    for message in messages:
        kept = {key: value for key, value in message.items() if value is not None}
        if "from" in kept and "value" in kept:
            role = str(kept["from"])
            kept = {"role": _SHAREGPT_ROLES.get(role, role), "content": kept["value"]}
        if "role" not in kept:
            raise DataError("a message has no 'role'")
        if "content" not in kept and "tool_calls" not in kept:
            raise DataError(f"a message of '{kept['role']}' has neither 'content' nor 'tool_calls'")
        cleaned.append({"content": "", **kept})
    return cleaned


def encode(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Any = None) -> list[Masked]:
    """Tokens and mask of a conversation.

    Returns:
        One masked sequence. Several, one per assistant turn, when the template rewrites earlier turns (as those that
        drop old reasoning do): no single rendering then shows every turn as the model will see it.
    """
    if has_generation_marks(tokenizer):
        got = tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return [(list(got["input_ids"]), [bool(value) for value in got["assistant_masks"]])]
    whole = _render(tokenizer, messages, tools)
    turns = [position for position, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [_span(tokenizer, messages, turn, tools) for turn in turns]
    if all(whole.startswith(text) for _, text in spans):
        return [_mask(tokenizer, whole, [(start, len(text)) for start, text in spans])]
    return [_mask(tokenizer, text, [(start, len(text))]) for start, text in spans]


def has_generation_marks(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)))


def _span(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], turn: int, tools: Any) -> tuple[int, str]:
    """The text up to the end of an assistant turn, and where that turn starts in it."""
    after = _render(tokenizer, messages[: turn + 1], tools)
    before = _render(tokenizer, messages[:turn], tools, add_generation_prompt=True) if turn else ""
    if not after.startswith(before):
        # Some templates open the turn differently when they generate (a reasoning tag, say): what both share is read.
        without = _render(tokenizer, messages[:turn], tools)
        before = without if after.startswith(without) else _common_prefix(before, after)
    return len(before), after


def _common_prefix(one: str, other: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Any, **options: Any) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, **options))


def _mask(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]) -> Masked:
    """Tokenise a rendered conversation; a token is trained when it starts inside a span and before its last line end.

    The template writes the special tokens itself, so none are added. What follows the end token of a turn (a line
    end, as a rule) belongs to the next turn's opening: the model never has to produce it.
    """
    spans = [(start, start + len(text[start:end].rstrip())) for start, end in spans]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    trained = [
        any(start <= begin < end for start, end in spans) and begin < stop for begin, stop in encoded["offset_mapping"]
    ]
    return list(encoded["input_ids"]), trained
