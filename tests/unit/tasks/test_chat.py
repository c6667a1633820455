"""What of a conversation is trained, for each kind of template: exactly what the assistant said, with its end token."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import pytest

from fulltune.errors import DataError
from fulltune.tasks import Target, causal_lm, chat
from tests import tiny

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hello 😀"},
    {"role": "assistant", "content": "<think>hm</think>hi é"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "it is 42"},
]
CALLED = '<call>[{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]</call><|im_end|>'
PLAIN = [message for message in TALK if message["role"] != "tool" and "tool_calls" not in message]


def trained(
    template: str, messages: list[dict[str, Any]], tools: Any = None, train_on: Literal["all", "last"] = "all"
) -> list[list[str]]:
    """For each sequence the runs of trained tokens, decoded."""
    tokenizer = tiny.decoder_tokenizer(template)
    target = Target("chat", {"messages": "messages", "tools": "tools"}, train_on=train_on)
    found = []
    for example in causal_lm.encode([{"messages": messages, "tools": tools}], target, tokenizer, 10**6)[0]:
        segments = causal_lm.preview(example.features, target, tokenizer).segments
        found.append([segment.text for segment in segments if segment.trained])
    return found


@pytest.mark.parametrize("template", [tiny.CHATML, tiny.MARKED], ids=["rendered prefixes", "generation marks"])
def test_trained_text_is_what_the_assistant_said(template: str) -> None:
    assert trained(template, TALK) == [["<think>hm</think>hi é<|im_end|>", CALLED, "it is 42<|im_end|>"]]


@pytest.mark.parametrize("template", [tiny.CHATML, tiny.MARKED], ids=["rendered prefixes", "generation marks"])
def test_trained_text_holds_no_tool_definitions(template: str) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert trained(template, TALK, tools) == trained(template, TALK)


def test_template_that_rewrites_turns_gives_one_sequence_per_turn() -> None:
    assert trained(tiny.REWRITING, PLAIN) == [
        ["<think>hm</think>hi é<|im_end|>"],
        ["it is 42<|im_end|>"],
    ]


def test_template_that_rewrites_shows_each_turn_as_it_will_be_seen() -> None:
    tokenizer = tiny.decoder_tokenizer(tiny.REWRITING)
    first, second = (tokenizer.decode(ids) for ids, _ in chat.tokenise_conversation(tokenizer, PLAIN))
    assert first.endswith("<think>hm</think>hi é<|im_end|>\n")
    assert "<think>" not in second


def test_template_with_system_message_of_its_own_masks_it() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert trained(tiny.DEFAULT_SYSTEM, messages) == [["yes<|im_end|>"]]


@pytest.mark.parametrize("template", [tiny.CHATML, tiny.MARKED, tiny.DEFAULT_SYSTEM])
def test_assistant_that_speaks_first_has_its_opening_masked(template: str) -> None:
    messages = [{"role": "assistant", "content": "welcome"}, {"role": "user", "content": "hi"}]
    assert trained(template, messages) == [["welcome<|im_end|>"]]


def test_answer_with_white_space_at_its_ends_keeps_its_end_token() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "  yes \n"}]
    assert trained(tiny.CHATML, messages) == [["  yes \n<|im_end|>"]]


def test_generation_prompt_ends_where_training_begins() -> None:
    tokenizer = tiny.decoder_tokenizer()
    target = Target("chat", {"messages": "m"})
    ids, mask = chat.tokenise_conversation(tokenizer, TALK)[0]
    asked = causal_lm.generation_ids({"m": TALK}, target, tokenizer)
    start = len(mask) - 1 - mask[::-1].index(True)
    while mask[start - 1]:
        start -= 1
    assert ids[:start] == asked


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("hello", "expected a list of messages {role, content}, found 'hello'"),
        ([1], "expected a list of messages {role, content}, found '[1]'"),
        ([{"role": 1, "content": "x"}], "a message has the role 1, but a role must be text"),
        (
            [{"role": "user", "content": "x", "weight": 0.5}],
            "a message with role 'user' has weight 0.5, expected 0 or 1",
        ),
        (
            [{"role": "assistant", "content": "x", "train": "no"}],
            "a message with role 'assistant' has train 'no', expected true or false",
        ),
        ([{"content": "x"}], "a message has no 'role'"),
        ([{"role": "user"}], "a message with role 'user' has neither 'content' nor 'tool_calls'"),
        ([{"role": "user", "content": {"a": 1}}], "a message with role 'user' has an object as content, expected text"),
        (
            [{"role": "assistant", "tool_calls": "f()"}],
            "'tool_calls' of a message with role 'assistant' must be a list of objects",
        ),
    ],
)
def test_messages_that_are_none_are_refused(messages: Any, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        chat.clean_messages(messages)
    assert str(caught.value) == problem


@pytest.mark.parametrize("template", [tiny.CHATML, tiny.MARKED], ids=["rendered prefixes", "generation marks"])
def test_answers_of_weight_0_are_read_and_not_trained(template: str) -> None:
    told = [{**message, "weight": int(message["content"] == "it is 42")} for message in TALK]
    assert trained(template, told) == [["it is 42<|im_end|>"]]
    row, target = {"m": [{**TALK[1]}, {**TALK[2], "weight": 0}]}, Target("chat", {"messages": "m"})
    assert (refused := causal_lm.why_unusable(row, target)) is not None
    assert (refused.check, "has weight 0" in refused.reason) == ("no answer", True)


@pytest.mark.parametrize("template", [tiny.CHATML, tiny.MARKED, tiny.REWRITING])
def test_only_the_last_answer_is_trained(template: str) -> None:
    """One that is not to be trained does not count, and generation asks as before."""
    assert trained(template, PLAIN, train_on="last") == [["it is 42<|im_end|>"]]
    marked = [*PLAIN[:-1], {**PLAIN[-1], "train": False}]
    assert trained(template, marked) == trained(template, marked, train_on="last")
    assert trained(template, marked) == [["<think>hm</think>hi é<|im_end|>"]]
    told = [{**message, "train": True} for message in PLAIN]
    assert trained(template, told) == trained(template, PLAIN)
    tokenizer = tiny.decoder_tokenizer(template)
    every, last = (Target("chat", {"messages": "m"}, train_on=on) for on in ("all", "last"))
    for of in (causal_lm.answer_text, causal_lm.prompt_text, partial(causal_lm.generation_ids, tokenizer=tokenizer)):
        assert of({"m": PLAIN}, every) == of({"m": PLAIN}, last)
    assert Target.from_notes(last.as_notes()) == last


MARKS_WITHOUT_THINKING = tiny.MARKED.replace("{% generation %}", "{{ m.reasoning_content }}{% generation %}")


@pytest.mark.parametrize(
    ("template", "answer", "state"),
    [
        (tiny.CHATML, {"content": "<think>\nlet us\nsee</think>yes"}, "trained"),
        (tiny.CHATML, {"content": "yes", "reasoning_content": "let us see"}, "dropped by the chat template"),
        (tiny.CHATML, {"content": "<think>let us</think>yes", "thinking": "and see"}, "trained in part"),
        (MARKS_WITHOUT_THINKING, {"content": "yes", "reasoning_content": "let us see"}, "read but not trained"),
        (tiny.CHATML, {"content": "<think>\n\n</think>yes"}, None),
        (tiny.CHATML, {"content": "yes"}, None),
    ],
)
def test_thinking_part_is_trained_or_not(template: str, answer: dict[str, str], state: str | None) -> None:
    talk = [{"role": "user", "content": "so?"}, {"role": "assistant", **answer}]
    unasked = [*talk[:1], {**talk[1], "thinking": "never mind", "weight": 0}, *talk]
    tokenizer, target = tiny.decoder_tokenizer(template), Target("chat", {"messages": "m"})
    for [example] in causal_lm.encode([{"m": talk}, {"m": unasked}], target, tokenizer, 10**6):
        assert example.thinking == state


def test_answer_without_width_is_none() -> None:
    row = {"m": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "\u200b "}]}
    refused = causal_lm.why_unusable(row, Target("chat", {"messages": "m"}))
    assert refused is not None
    assert refused.check == "no answer"


def test_messages_of_sharegpt_are_translated() -> None:
    said = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "observation", "value": "c"}]
    assert chat.clean_messages(said) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "tool", "content": "c"},
    ]


@pytest.mark.parametrize("last", [{"role": "user", "content": "and?"}, {"role": "tool", "content": "42"}])
def test_conversation_that_ends_with_a_question_is_continued_from_its_end(last: dict[str, str]) -> None:
    target, tokenizer = Target("chat", {"messages": "messages"}), tiny.decoder_tokenizer(tiny.CHATML)
    row = causal_lm.with_placeholder_answer({"messages": [*TALK[1:3], last]}, target)
    prompt = tokenizer.decode(causal_lm.generation_ids(row, target, tokenizer))
    assert prompt.endswith(f"{last['content']}<|im_end|>\n<|im_start|>assistant\n")
    answered = {"messages": TALK[1:3]}
    assert causal_lm.with_placeholder_answer(answered, target) == answered
