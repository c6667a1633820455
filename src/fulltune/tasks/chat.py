"""Chat messages to tokens, with a mask of what the assistant said.

Two ways, chosen by the template. With `{% generation %}` marks the tokenizer tells the assistant's tokens itself.
Without them the conversation is rendered up to before and up to after each assistant turn: the difference is the turn.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fulltune.errors import DataError, SetupError
from fulltune.tasks import Tokenizer
from fulltune.tasks.columns import parsed

Message = Mapping[str, Any]


Masked = tuple[list[int], list[bool]]
"""Token ids and, for each, whether it is trained."""

_ALL, _MANY_TURNS = 2**62, 20
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


def clean(messages: Any) -> list[dict[str, Any]]:
    """Messages in the form `{"role", "content", ...}`; ShareGPT's `from`/`value` is translated. Raises `DataError` when
    this is not a list of messages.

    Keys without a value are dropped: a parquet file gives every message the keys of all messages.
    """
    messages = parsed(messages)
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, Mapping) for message in messages):
        raise DataError(f"expected a list of messages {{role, content}}, found {str(messages)[:60]!r}")
    cleaned = []
    for message in messages:
        kept = {key: value for key, value in message.items() if value is not None}
        if "from" in kept and "value" in kept:
            role = str(kept["from"])
            kept = {"role": _SHAREGPT_ROLES.get(role, role), "content": kept["value"]}
        if "role" not in kept:
            raise DataError("a message has no 'role'")
        if not isinstance(kept["role"], str):
            raise DataError(f"a message has the role {kept['role']!r}, expected a word")
        if kept.get("weight", 1) not in (0, 1):
            raise DataError(f"a message of '{kept['role']}' has weight {kept['weight']!r}, expected 0 or 1")
        if "content" not in kept and "tool_calls" not in kept:
            raise DataError(f"a message of '{kept['role']}' has neither 'content' nor 'tool_calls'")
        cleaned.append({"content": "", **kept, **_words_and_calls(kept)})
    return cleaned


def _words_and_calls(message: Message) -> dict[str, Any]:
    """`content` as text and `tool_calls` as a list, where the message has them in another form."""
    changed: dict[str, Any] = {}
    content = message.get("content", "")
    if isinstance(content, (list, tuple)):
        kinds = {str(part.get("type")) if isinstance(part, Mapping) else type(part).__name__ for part in content}
        if kinds - {"text"}:
            raise DataError(f"a message of '{message['role']}' holds {', '.join(sorted(kinds - {'text'}))}, not text")
        changed["content"] = "".join(str(part.get("text") or "") for part in content)
    elif not isinstance(content, str):
        if isinstance(content, Mapping):
            raise DataError(f"a message of '{message['role']}' holds an object, not text")
        changed["content"] = str(content)
    if "tool_calls" in message:
        calls = parsed(message["tool_calls"])
        calls = [calls] if isinstance(calls, Mapping) else calls
        if not isinstance(calls, (list, tuple)) or not all(isinstance(call, Mapping) for call in calls):
            raise DataError(f"'tool_calls' of '{message['role']}' must be a list of objects")
        changed["tool_calls"] = list(calls)
    return changed


def is_trained(message: Message) -> bool:
    """The assistant says it, and not with weight 0, by which OpenAI's format leaves a message out."""
    return message["role"] == "assistant" and message.get("weight") != 0


def encode(tokenizer: Tokenizer, messages: Sequence[Message], tools: Any = None, most: int = _ALL) -> list[Masked]:
    """Tokens and mask of a conversation, or of each of its turns where a template rewrites earlier ones; turns that lie
    beyond `most` tokens may be left untrained."""
    has_marks = re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template))
    if has_marks and all(message.get("weight") != 0 for message in messages):
        got = _applied(tokenizer, messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return [(list(got["input_ids"]), [bool(value) for value in got["assistant_masks"]])]
    whole = render(tokenizer, messages, tools)
    turns = [position for position, message in enumerate(messages) if is_trained(message)]
    starts = [start for start, _ in _tokens(tokenizer, whole)[1]] if len(turns) > _MANY_TURNS else []
    seen = starts[most] if most < len(starts) else len(whole)
    spans: list[tuple[int, str]] = []
    for turn in turns:
        # Each turn costs a rendering of all before it.
        if spans and len(spans[-1][1]) > seen and all(whole.startswith(text) for _, text in spans):
            break
        spans.append(_span(tokenizer, messages, turn, tools))
    if all(whole.startswith(text) for _, text in spans):
        return [_mask(tokenizer, whole, [(start, len(text)) for start, text in spans])]
    return [_mask(tokenizer, text, [(start, len(text))]) for start, text in spans]


def _span(tokenizer: Tokenizer, messages: Sequence[Message], turn: int, tools: Any) -> tuple[int, str]:
    """The text up to the end of an assistant turn, and where that turn starts in it."""
    after = render(tokenizer, messages[: turn + 1], tools)
    if turn == 0:
        start = _first_opening(tokenizer, after)
        return start, after
    before = render(tokenizer, messages[:turn], tools, add_generation_prompt=True)
    if not after.startswith(before):
        # Some templates open the turn differently when they generate (a reasoning tag, say): what both share is read.
        without = render(tokenizer, messages[:turn], tools)
        before = without if after.startswith(without) else os.path.commonprefix((before, after))  # noqa: RUF071  # sign by sign
    return len(before), after


def _first_opening(tokenizer: Tokenizer, text: str) -> int:
    """Where the words of an assistant that speaks first begin: templates cannot render the nothing before them."""
    question = [{"role": "user", "content": "?"}]
    asked = render(tokenizer, question, None)
    opening = render(tokenizer, question, None, add_generation_prompt=True).removeprefix(asked)
    return text.find(opening) + len(opening) if opening and opening in text else 0


def render(tokenizer: Tokenizer, messages: Sequence[Message], tools: Any, **options: Any) -> str:
    """A conversation as text."""
    return str(_applied(tokenizer, messages, tools, tokenize=False, **options))


def _applied(tokenizer: Tokenizer, messages: Sequence[Message], tools: Any, **options: Any) -> Any:
    """Apply the template."""
    import jinja2

    try:
        return tokenizer.apply_chat_template([dict(message) for message in messages], tools=tools, **options)
    except jinja2.TemplateSyntaxError as error:
        raise SetupError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from None
    except NotImplementedError:
        raise SetupError("the tokenizer does not say where its tokens stand in the text; take a fast one") from None
    except (jinja2.TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(" ".join(str(error).split())[:200]) from None


def _mask(tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]]) -> Masked:
    """Tokenise a rendered conversation; a token is trained when it starts inside a span and before its last line end.

    The template writes the special tokens itself, so none are added. What follows the end token of a turn (a line
    end, as a rule) belongs to the next turn's opening: the model never has to produce it.
    """
    spans = [(start, start + len(text[start:end].rstrip())) for start, end in spans]
    ids, places = _tokens(tokenizer, text)
    is_said = [False] * len(text)
    for start, end in spans:
        is_said[start:end] = [True] * (end - start)
    return ids, [begin < stop and is_said[begin] for begin, stop in places]


def _tokens(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens, and where each begins and ends."""
    got = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(got["input_ids"]), got["offset_mapping"]
