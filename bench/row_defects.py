"""Defects of conversations, and edits that make near duplicates, for well-formed rows."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from typing import Any

from fulltune.tasks.columns import normalised

Draw = random.Random
Turns = list[dict[str, Any]]
Row = dict[str, str]


def conversation(draw: Draw, questions: list[str], answers: list[str], calls: bool) -> Turns:
    """Draw a conversation of two to four exchanges, perhaps with a system turn; with `calls` the second uses a tool."""
    turns: Turns = [{"role": "system", "content": "You answer briefly."}] if draw.random() < 0.5 else []
    for number in range(draw.randint(2, 4)):
        turns.append({"role": "user", "content": draw.choice(questions)})
        if calls and number == 1:
            called = {"name": "look_up", "arguments": json.dumps({"about": draw.choice(questions)})}
            turns += [
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": "c1", "type": "function", "function": called}],
                },
                {"role": "tool", "tool_call_id": "c1", "content": draw.choice(answers)},
            ]
        turns.append({"role": "assistant", "content": draw.choice(answers)})
    return turns


def _places(turns: Turns, role: str) -> list[int]:
    return [place for place, turn in enumerate(turns) if turn["role"] == role and not turn.get("tool_calls")]


def _emptied(role: str, blank: str) -> Callable[[Turns, Draw], Turns]:
    def plant(turns: Turns, draw: Draw) -> Turns:
        turns[draw.choice(_places(turns, role))]["content"] = blank
        return turns

    return plant


def _without(role: str) -> Callable[[Turns, Draw], Turns]:
    """Delete a turn that is not the last one."""

    def plant(turns: Turns, draw: Draw) -> Turns:
        del turns[draw.choice([place for place in _places(turns, role) if place < len(turns) - 1])]
        return turns

    return plant


def _twice(role: str) -> Callable[[Turns, Draw], Turns]:
    def plant(turns: Turns, draw: Draw) -> Turns:
        place = draw.choice(_places(turns, role))
        return [*turns[: place + 1], copy.deepcopy(turns[place]), *turns[place + 1 :]]

    return plant


def _late_system(turns: Turns, draw: Draw) -> Turns:
    place = draw.choice(_places(turns, "assistant"))
    return [*turns[: place + 1], {"role": "system", "content": "Be polite."}, *turns[place + 1 :]]


def _same_answer(turns: Turns, draw: Draw) -> Turns:
    first, second = draw.sample(_places(turns, "assistant"), 2)
    turns[first]["content"] = turns[second]["content"]
    return turns


def _no_calls(turns: Turns, draw: Draw) -> Turns:
    """Delete the tool call, and keep its result."""
    return [turn for turn in turns if not turn.get("tool_calls")]


def _no_result(turns: Turns, draw: Draw) -> Turns:
    return [turn for turn in turns if turn["role"] != "tool"]


def _ends_with_result(turns: Turns, draw: Draw) -> Turns:
    return turns[: next(place for place, turn in enumerate(turns) if turn["role"] == "tool") + 1]


def _other_answers(turns: Turns, draw: Draw) -> Turns:
    """Swap two answers."""
    first, second = draw.sample(_places(turns, "assistant"), 2)
    turns[first]["content"], turns[second]["content"] = turns[second]["content"], turns[first]["content"]
    return turns


def _changed_roles(turns: Turns, draw: Draw) -> Turns:
    other = {"user": "assistant", "assistant": "user"}
    return [{**turn, "role": other.get(turn["role"], turn["role"])} for turn in turns]


OF_CONVERSATIONS: dict[str, tuple[bool, Callable[[Turns, Draw], Turns]]] = {
    "empty answer": (False, _emptied("assistant", "")),
    "empty question": (False, _emptied("user", "")),
    "blank answer": (False, _emptied("assistant", " \n")),
    "an answer is lost": (False, _without("assistant")),
    "a question is lost": (False, _without("user")),
    "a question twice": (False, _twice("user")),
    "an answer twice in a row": (False, _twice("assistant")),
    "a system turn in the middle": (False, _late_system),
    "ends with a question": (False, lambda turns, draw: turns[:-1]),
    "the same answer to two questions": (False, _same_answer),
    "roles changed": (False, _changed_roles),
    "answers to other questions": (False, _other_answers),
    "a result, its call lost": (True, _no_calls),
    "a call, its result lost": (True, _no_result),
    "ends with a result": (True, _ends_with_result),
}

# ---- near duplicates ----------------------------------------------------------------------------------------------


def _edited_letters(text: str, draw: Draw, count: int) -> str:
    """Delete, double or change letters, as typing slips do."""
    for _ in range(count):
        place = draw.randrange(len(text))
        text = text[:place] + draw.choice(["", text[place] * 2, draw.choice("etaoins")]) + text[place + 1 :]
    return text


def _edited_words(text: str, draw: Draw, count: int) -> str:
    """Delete, insert or change words."""
    words = text.split(" ")
    for _ in range(count):
        place = draw.randrange(len(words))
        words[place : place + 1] = draw.choice([[], [words[place], "really"], [draw.choice(["some", "quickly", "it"])]])
        words = words or ["it"]
    return " ".join(words)


EDITS: dict[str, Callable[[str, Draw], str]] = {
    "as it stands": lambda text, draw: text,
    "in capitals": lambda text, draw: text.upper(),
    "other white space": lambda text, draw: f" {text.replace(' ', '  ')}\n",
    "without its last sign": lambda text, draw: text.rstrip()[:-1],
    "one letter": lambda text, draw: _edited_letters(text, draw, 1),
    "two letters": lambda text, draw: _edited_letters(text, draw, 2),
    "three letters": lambda text, draw: _edited_letters(text, draw, 3),
    "one word": lambda text, draw: _edited_words(text, draw, 1),
    "two words": lambda text, draw: _edited_words(text, draw, 2),
    "three words": lambda text, draw: _edited_words(text, draw, 3),
    "a sentence more": lambda text, draw: text + " Please tell me soon.",
    "without punctuation": lambda text, draw: re.sub(r"[^\w\s]", "", text),
}


def jaccard(one: str, other: str) -> float:
    """Return the Jaccard similarity of the character 5-grams of two texts."""
    grams = [{text[at : at + 5] for at in range(max(1, len(text) - 4))} for text in map(normalised, (one, other))]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])
