"""Conversations in which something is wrong, and those that only look like it."""

from __future__ import annotations

from typing import Any

import pytest

from fulltune.audit.rows import chat_faults
from fulltune.tasks import chat

WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
LONG = "I could not find your order. Could you please give me its number once more?"


def turn(role: str, content: str = "some words", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def calls(name: str = "weather", arguments: Any = None, **more: Any) -> dict[str, Any]:
    made = {"type": "function", "function": {"name": name, "arguments": arguments or {}}, **more}
    return turn("assistant", "", tool_calls=[made])


SYSTEM, USER, ASSISTANT, TOOL = (turn(role) for role in ("system", "user", "assistant", "tool"))


@pytest.mark.parametrize(
    ("turns", "tools", "reason"),
    [
        ([USER, turn("assistant", " ")], None, "turn 2 (assistant) is empty"),
        ([turn("user", ""), ASSISTANT], None, "turn 1 (user) is empty"),
        ([USER, USER, ASSISTANT], None, "turns 1 and 2 are both user turns"),
        ([USER, ASSISTANT, ASSISTANT], None, "turns 2 and 3 are both assistant turns"),
        ([USER, ASSISTANT, USER], None, "it ends with a user turn"),
        ([USER, calls(), TOOL], WEATHER, "it ends with a tool turn"),
        ([USER, SYSTEM, ASSISTANT], None, "turn 2 is a system turn that is not first"),
        ([SYSTEM, USER, ASSISTANT, SYSTEM, USER, ASSISTANT], None, "turn 4 is a system turn"),
        ([USER, calls(), TOOL, ASSISTANT], None, "turn 2 calls 'weather' (the row defines no tools)"),
        ([USER, calls("wether"), TOOL, ASSISTANT], WEATHER, "turn 2 calls 'wether' (the row does not define it)"),
        ([USER, calls(""), TOOL, ASSISTANT], WEATHER, "turn 2 calls a tool without a name"),
        ([USER, calls(arguments="{'city': 'Bonn'}"), TOOL, ASSISTANT], WEATHER, "arguments that are no JSON:"),
        ([USER, calls(arguments='{"city": "Bo'), TOOL, ASSISTANT], WEATHER, "arguments that are no JSON:"),
        ([USER, calls(arguments='["Bonn"]'), TOOL, ASSISTANT], WEATHER, "arguments that are no JSON object:"),
        ([USER, TOOL, ASSISTANT], WEATHER, "turn 2 is the result of a tool that was not called"),
        ([USER, ASSISTANT, TOOL, ASSISTANT], WEATHER, "turn 3 is the result of a tool that was not called"),
        (
            [USER, calls(id="one"), turn("tool", tool_call_id="two"), ASSISTANT],
            WEATHER,
            "turn 3 is the result of call 'two' that was not made",
        ),
        (
            [USER, turn("assistant", LONG), USER, turn("assistant", f" {LONG}")],
            None,
            "turns 2 and 4 of the assistant are identical",
        ),
    ],
)
def test_fault_is_found_and_named_by_its_turn(turns: list[dict[str, Any]], tools: Any, reason: str) -> None:
    [found] = chat_faults(chat.clean(turns), tools)
    assert reason in found


@pytest.mark.parametrize(
    ("turns", "tools"),
    [
        ([USER, ASSISTANT], None),
        ([SYSTEM, USER, ASSISTANT, USER, ASSISTANT], None),
        ([turn("system"), turn("developer"), USER, ASSISTANT], None),
        ([ASSISTANT, USER, ASSISTANT], None),  # the assistant may speak first
        ([SYSTEM, ASSISTANT], None),
        ([turn("system", ""), USER, ASSISTANT], None),  # keeps a template from writing its own
        ([turn("user", name="Ann"), turn("user", name="Bob"), ASSISTANT], None),
        ([USER, turn("assistant", "", reasoning_content="They want a joke."), USER, ASSISTANT], None),
        ([USER, turn("assistant", "Yes."), USER, turn("assistant", "Yes.")], None),
        ([turn("user", LONG), ASSISTANT, turn("user", LONG), turn("assistant", "other words")], None),
        # Tools.
        ([USER, calls()], WEATHER),
        ([USER, calls(), turn("tool", ""), ASSISTANT], WEATHER),
        ([USER, calls(), TOOL, TOOL, ASSISTANT], WEATHER),
        ([USER, calls(), TOOL, calls(), TOOL, ASSISTANT], WEATHER),
        ([USER, calls(arguments='{"city": "Bonn"}'), TOOL, ASSISTANT], WEATHER),
        ([USER, calls(arguments={"city": "Bonn"}), TOOL, ASSISTANT], [{"name": "weather"}]),
        ([USER, calls(id="one"), turn("tool", tool_call_id="one"), ASSISTANT], WEATHER),
        ([USER, calls(), turn("tool", tool_call_id="one"), ASSISTANT], WEATHER),
        ([USER, calls(), TOOL, ASSISTANT], {"name": "weather"}),
        # Definitions and calls in words.
        ([turn("system", "You may call weather(city)."), USER, calls(), TOOL, ASSISTANT], None),
        ([USER, turn("assistant", '<tool_call>{"name": "weather"}</tool_call>'), TOOL, ASSISTANT], None),
        (
            [
                {"from": "human", "value": "How warm is it?"},
                {"from": "function_call", "value": '{"name": "weather"}'},
                {"from": "observation", "value": "20"},
                {"from": "gpt", "value": "20 degrees."},
            ],
            None,
        ),
    ],
)
def test_conversation_that_only_looks_wrong_is_spared(turns: list[dict[str, Any]], tools: Any) -> None:
    assert chat_faults(chat.clean(turns), tools) == []


def test_all_faults_of_a_conversation_are_named() -> None:
    found = chat_faults([USER, turn("assistant", ""), SYSTEM, USER])
    assert len(found) == 3
