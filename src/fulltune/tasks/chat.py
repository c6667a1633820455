from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fulltune.errors import DataError, SetupError
from fulltune.tasks import Tokenizer
from fulltune.tasks.columns import parse_cell

ChatMessage = Mapping[str, Any]
"""A message with `role`, `content` and optionally `tool_calls`, `weight` and `train`."""
MaskedIds = tuple[list[int], list[bool]]
"""Token ids with a mask of trained tokens."""
Tools = list[Any] | None

_ALL, _MANY_TURNS = 2**62, 20
_THINKING = ("reasoning_content", "thinking", "reasoning")
_THINKING_TEXT = re.compile(r"<think>(.*?)</think>", re.DOTALL)
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


def clean_messages(messages: Any, train_on: str = "all") -> list[dict[str, Any]]:
    """Convert chat or ShareGPT messages to dictionaries with `role` and `content`, or raise `DataError`. Untrained ones
    get the weight 0."""
    messages = parse_cell(messages)
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, Mapping) for message in messages):
        raise DataError(f"expected a list of messages {{role, content}}, found {str(messages)[:60]!r}")
    cleaned = []
    for message in messages:
        fields = {key: value for key, value in message.items() if value is not None}
        if "from" in fields and "value" in fields:
            role = str(fields["from"])
            fields = {"role": SHAREGPT_ROLES.get(role, role), "content": fields["value"]}
        if "role" not in fields:
            raise DataError("a message has no 'role'")
        if not isinstance(fields["role"], str):
            raise DataError(f"a message has the role {fields['role']!r}, but a role must be text")
        for name, expected in (("weight", "0 or 1"), ("train", "true or false")):
            if fields.get(name, 1) not in (0, 1):
                role = fields["role"]
                raise DataError(f"a message with role '{role}' has {name} {fields[name]!r}, expected {expected}")
        if not fields.get("train", True):
            fields["weight"] = 0
        if "content" not in fields and "tool_calls" not in fields:
            raise DataError(f"a message with role '{fields['role']}' has neither 'content' nor 'tool_calls'")
        cleaned.append({"content": "", **fields, **_normalised_content_and_calls(fields)})
    for message in [message for message in cleaned if is_trained(message)][:-1] if train_on == "last" else ():
        message["weight"] = 0
    return cleaned


def _normalised_content_and_calls(message: ChatMessage) -> dict[str, Any]:
    """Return a message's converted fields: `content` as text, `tool_calls` as a list. Raises `DataError` if
    impossible."""
    changed: dict[str, Any] = {}
    content = message.get("content", "")
    if isinstance(content, (list, tuple)):
        kinds = {str(part.get("type")) if isinstance(part, Mapping) else type(part).__name__ for part in content}
        if kinds - {"text"}:
            wrong = ", ".join(sorted(kinds - {"text"}))
            raise DataError(f"a message with role '{message['role']}' contains {wrong}, but only text is supported")
        changed["content"] = "".join(str(part.get("text") or "") for part in content)
    elif not isinstance(content, str):
        if isinstance(content, Mapping):
            raise DataError(f"a message with role '{message['role']}' has an object as content, expected text")
        changed["content"] = str(content)
    if "tool_calls" in message:
        calls = parse_cell(message["tool_calls"])
        calls = [calls] if isinstance(calls, Mapping) else calls
        if not isinstance(calls, (list, tuple)) or not all(isinstance(call, Mapping) for call in calls):
            raise DataError(f"'tool_calls' of a message with role '{message['role']}' must be a list of objects")
        changed["tool_calls"] = list(calls)
    return changed


def is_trained(message: ChatMessage) -> bool:
    """Return True for the assistant's messages, except those with OpenAI's `weight: 0`."""
    return message["role"] == "assistant" and message.get("weight") != 0


def tokenise_conversation(
    tokenizer: Tokenizer, messages: Sequence[ChatMessage], tools: Tools = None, max_tokens: int = _ALL
) -> list[MaskedIds]:
    """Return a conversation's token ids with a mask of trained tokens: one sequence, or one per answer if the template
    rewrites earlier turns.

    Answers beyond `max_tokens` may stay untrained.
    """
    marked: list[bool] | None = None
    if re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)):
        tokens = _apply_chat_template(
            tokenizer, messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        marked = [bool(value) for value in tokens["assistant_masks"]]
        if all(message.get("weight") != 0 for message in messages):
            return [(list(tokens["input_ids"]), marked)]
    whole = render(tokenizer, messages, tools)
    turns = [position for position, message in enumerate(messages) if is_trained(message)]
    starts = [start for start, _ in _ids_and_offsets(tokenizer, whole)[1]] if len(turns) > _MANY_TURNS else []
    end = starts[max_tokens] if max_tokens < len(starts) else len(whole)
    spans: list[tuple[int, str]] = []
    for turn in turns:
        # Each turn renders all messages before it again.
        if spans and len(spans[-1][1]) > end and all(whole.startswith(text) for _, text in spans):
            break
        spans.append(_turn_span(tokenizer, messages, turn, tools))
    if all(whole.startswith(text) for _, text in spans):
        ids, in_spans = _tokenise_with_mask(tokenizer, whole, [(start, len(text)) for start, text in spans])
        return [(ids, [one and other for one, other in zip(in_spans, marked or in_spans, strict=True)])]
    return [_tokenise_with_mask(tokenizer, text, [(start, len(text))]) for start, text in spans]


def describe_thinking(tokenizer: Tokenizer, messages: Sequence[ChatMessage], tokens: Sequence[MaskedIds]) -> str | None:
    """Say what becomes of the thinking parts of trained messages in a conversation's tokens, or return None without
    thinking."""
    answers = [message for message in messages if is_trained(message)]
    parts = [str(message.get(name, "")) for message in answers for name in _THINKING]
    parts += [part for message in answers for part in _THINKING_TEXT.findall(message["content"])]
    if not (parts := [part for part in parts if part.strip()]):
        return None

    def text_of(ids: Sequence[int]) -> str:
        return "".join(str(tokenizer.decode(list(ids))).split())

    wanted = [text_of(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]) for part in parts]
    trained = "\n".join(text_of([one for one, in_loss in zip(*masked, strict=True) if in_loss]) for masked in tokens)
    num_trained = sum(part in trained for part in wanted)
    if num_trained:
        return "trained" if num_trained == len(wanted) else "trained in part"
    read = "\n".join(text_of(ids) for ids, _ in tokens)
    return "read but not trained" if any(part in read for part in wanted) else "dropped by the chat template"


def _turn_span(tokenizer: Tokenizer, messages: Sequence[ChatMessage], turn: int, tools: Tools) -> tuple[int, str]:
    """Return the character at which `messages[turn]` starts in the rendered text, and the text up to its end."""
    after = render(tokenizer, messages[: turn + 1], tools)
    if turn == 0:
        question = [{"role": "user", "content": "?"}]
        prompt = render(tokenizer, question, None)
        opening = render(tokenizer, question, None, add_generation_prompt=True).removeprefix(prompt)
        return after.find(opening) + len(opening) if opening and opening in after else 0, after
    before = render(tokenizer, messages[:turn], tools, add_generation_prompt=True)
    if not after.startswith(before):
        # Some templates open the turn differently for generation, for example with a reasoning tag.
        without = render(tokenizer, messages[:turn], tools)
        before = without if after.startswith(without) else os.path.commonprefix((before, after))  # noqa: RUF071  # sign by sign
    return len(before), after


def render(tokenizer: Tokenizer, messages: Sequence[ChatMessage], tools: Tools, **options: Any) -> str:
    return str(_apply_chat_template(tokenizer, messages, tools, tokenize=False, **options))


def _apply_chat_template(tokenizer: Tokenizer, messages: Sequence[ChatMessage], tools: Tools, **options: Any) -> Any:
    """Return the output of `apply_chat_template`. Raises `SetupError` if the template is broken, and `DataError` if it
    refuses the messages."""
    import jinja2

    try:
        return tokenizer.apply_chat_template([dict(message) for message in messages], tools=tools, **options)
    except jinja2.TemplateSyntaxError as error:
        raise SetupError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from None
    except NotImplementedError:
        raise SetupError(
            "chat needs the positions of tokens in the text, which only a fast tokenizer returns"
        ) from None
    except (jinja2.TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(" ".join(str(error).split())[:200]) from None


def _tokenise_with_mask(tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]]) -> MaskedIds:
    """Tokenise a rendered conversation. Tokens that start inside the character `spans` are trained, except trailing
    white space."""
    # White space after a turn's end token belongs to the next turn: the model never has to produce it.
    spans = [(start, start + len(text[start:end].rstrip())) for start, end in spans]
    ids, places = _ids_and_offsets(tokenizer, text)
    in_span = [False] * len(text)
    for start, end in spans:
        in_span[start:end] = [True] * (end - start)
    return ids, [begin < stop and in_span[begin] for begin, stop in places]


def _ids_and_offsets(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(tokens["input_ids"]), tokens["offset_mapping"]
