"""What is wrong with the order and the calls of a conversation that can be read and trained on nevertheless."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from fulltune.audit.texts.flaw import quoted

Turn = Mapping[str, Any]

_SYSTEM = ("system", "developer")
_TOOL = ("tool", "function", "ipython", "observation")
_LEAST_IDENTICAL = 40
"""Characters from which two equal answers are no mere 'Yes.' or 'You are welcome.'."""


def chat_faults(turns: Sequence[Turn], tools: Any = None) -> list[str]:
    """What is wrong with a conversation, in words; turns count from 1. Without `tools` the row defines none."""
    numbered = list(enumerate(turns, start=1))
    return [*_order(numbered), *_emptiness(numbered), *_calls(numbered, _defined(tools)), *_results(numbered)]


def _order(turns: Sequence[tuple[int, Turn]]) -> Iterator[str]:
    for (_, before), (number, turn) in pairwise(turns):
        role = turn["role"]
        if role in _SYSTEM and before["role"] not in _SYSTEM:
            yield f"turn {number} is a {role} turn that is not first"
        # Tools answer side by side, and people who have names may talk among themselves.
        elif role == before["role"] and role not in _TOOL and turn.get("name") == before.get("name"):
            yield f"turns {number - 1} and {number} are both {role} turns"
    if turns and turns[-1][1]["role"] != "assistant":
        yield f"it ends with a {turns[-1][1]['role']} turn that nothing answers"


def _emptiness(turns: Sequence[tuple[int, Turn]]) -> Iterator[str]:
    seen: dict[str, int] = {}
    for number, turn in turns:
        text, role = turn["content"].strip(), turn["role"]
        # A tool may have nothing to say, and an empty system turn keeps a template from writing its own.
        if not text and role not in (*_SYSTEM, *_TOOL) and not _says_otherwise(turn):
            yield f"turn {number} ({role}) is empty"
        if role == "assistant" and len(text) >= _LEAST_IDENTICAL and not turn.get("tool_calls"):
            if text in seen:
                yield f"turns {seen[text]} and {number} of the assistant are identical"
            seen.setdefault(text, number)


def _says_otherwise(turn: Turn) -> bool:
    """A call, or words of its own beside the content, such as a reasoning."""
    known = ("role", "content", "name", "from", "value", "id")
    return any(value for key, value in turn.items() if key not in known)


def _calls(turns: Sequence[tuple[int, Turn]], defined: set[str] | None) -> Iterator[str]:
    # Definitions may also stand in words before the first turn.
    told = " ".join(turn["content"] for _, turn in turns if turn["role"] in _SYSTEM)
    for number, turn in turns:
        for call in turn.get("tool_calls") or ():
            function = _function(call)
            name, arguments = str(function.get("name") or ""), function.get("arguments")
            if not name:
                yield f"turn {number} calls a tool without a name"
            elif name not in (defined or ()) and name not in told:
                without = "the row defines no tools" if defined is None else "the row does not define it"
                yield f"turn {number} calls {quoted(name)} ({without})"
            if isinstance(arguments, str) and (wrong := _no_object(arguments)):
                yield f"turn {number} calls {quoted(name)} with arguments that are {wrong}: {quoted(arguments)}"


def _function(definition: Any) -> Mapping[str, Any]:
    """Name and arguments of a call or a definition, with `function` around them or without."""
    inner = definition.get("function") if isinstance(definition, Mapping) else None
    found = inner if isinstance(inner, Mapping) else definition
    return found if isinstance(found, Mapping) else {}


def _defined(tools: Any) -> set[str] | None:
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, (list, tuple)) or not tools:
        return None
    return {str(_function(one).get("name")) for one in tools}


def _no_object(arguments: str) -> str | None:
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return "no JSON"
    return None if isinstance(found, dict) else "no JSON object"


def _results(turns: Sequence[tuple[int, Turn]]) -> Iterator[str]:
    asked: Turn | None = None
    for number, turn in turns:
        if turn["role"] not in _TOOL:
            asked = turn
            continue
        calls = asked.get("tool_calls") if asked is not None and asked["role"] == "assistant" else None
        if not calls:
            # Where calls are written as text, they have brackets of some kind.
            is_text = asked is not None and asked["role"] == "assistant" and set(asked["content"]) & set("{<[(")
            if not is_text:
                yield f"turn {number} is the result of a tool that was not called"
            continue
        known = {str(call["id"]) for call in calls if call.get("id")}
        if known and (answered := turn.get("tool_call_id")) and str(answered) not in known:
            yield f"turn {number} is the result of call {quoted(str(answered))} that was not made"
