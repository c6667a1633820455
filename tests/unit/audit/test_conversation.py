"""Conversations in which something is wrong, and those that only look like it."""

from __future__ import annotations

from typing import Any

import pytest

from fulltune.audit.rows import chat_faults
from fulltune.tasks import chat

LONG = "I could not find your order. Could you please give me its number once more?"


def turn(role: str, content: str = "some words", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def calls() -> dict[str, Any]:
    return turn("assistant", "", tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": {}}}])


SYSTEM, USER, ASSISTANT, TOOL = (turn(role) for role in ("system", "user", "assistant", "tool"))


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([USER, turn("assistant", " ")], "turn 2 (assistant) is empty"),
        ([turn("user", ""), ASSISTANT], "turn 1 (user) is empty"),
        ([USER, USER, ASSISTANT], "turns 1 and 2 are both user turns"),
        ([USER, ASSISTANT, ASSISTANT], "turns 2 and 3 are both assistant turns"),
        ([USER, ASSISTANT, USER], "the chat ends with a user turn"),
        ([USER, calls(), TOOL], "the chat ends with a tool turn"),
        ([USER, SYSTEM, ASSISTANT], "turn 2 is a system turn that is not first"),
        ([SYSTEM, USER, ASSISTANT, SYSTEM, USER, ASSISTANT], "turn 4 is a system turn"),
        ([USER, TOOL, ASSISTANT], "turn 2 is the result of a tool that was not called"),
        (
            [USER, turn("assistant", LONG), USER, turn("assistant", f" {LONG}")],
            "turns 2 and 4 of the assistant are identical",
        ),
    ],
)
def test_fault_is_found_and_named_by_its_turn(turns: list[dict[str, Any]], reason: str) -> None:
    [found] = chat_faults(chat.clean_messages(turns))
    assert reason in found


@pytest.mark.parametrize(
    "turns",
    [
        [SYSTEM, USER, ASSISTANT, USER, ASSISTANT],
        [turn("system"), turn("developer"), USER, ASSISTANT],
        [ASSISTANT, USER, ASSISTANT],  # the assistant may speak first
        [SYSTEM, ASSISTANT],
        [turn("system", ""), USER, ASSISTANT],  # keeps a template from writing its own
        [turn("user", name="Ann"), turn("user", name="Bob"), ASSISTANT],
        [USER, turn("assistant", "", reasoning_content="They want a joke."), USER, ASSISTANT],
        [USER, turn("assistant", "Yes."), USER, turn("assistant", "Yes.")],
        [turn("user", LONG), ASSISTANT, turn("user", LONG), turn("assistant", "other words")],
        [USER, calls()],
        [USER, calls(), turn("tool", ""), ASSISTANT],
        [USER, calls(), TOOL, TOOL, ASSISTANT],
        [USER, calls(), TOOL, calls(), TOOL, ASSISTANT],
        [USER, turn("assistant", '<tool_call>{"name": "weather"}</tool_call>'), TOOL, ASSISTANT],
        [
            {"from": "human", "value": "How warm is it?"},
            {"from": "function_call", "value": '{"name": "weather"}'},
            {"from": "observation", "value": "20"},
            {"from": "gpt", "value": "20 degrees."},
        ],
    ],
)
def test_conversation_that_only_looks_wrong_is_spared(turns: list[dict[str, Any]]) -> None:
    assert chat_faults(chat.clean_messages(turns)) == []


def test_all_faults_of_a_conversation_are_named() -> None:
    faults = chat_faults([USER, turn("assistant", ""), SYSTEM, USER])
    assert len(faults) == 3
