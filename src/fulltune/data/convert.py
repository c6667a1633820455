from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import Any

from fulltune.data.sources import SourceRows, columns_for_roles
from fulltune.errors import DataError
from fulltune.inference.store import to_json_value
from fulltune.recipe.fields import Recipe
from fulltune.tasks import Row, Target, causal_lm
from fulltune.tasks.chat import SHAREGPT_ROLES, clean_messages
from fulltune.tasks.columns import USUAL_NAMES, as_text, find_column, parse_cell, why_unreadable

Messages = list[dict[str, Any]]
_KNOWN = ("system", "developer", "user", "assistant", "tool")
_ROLES = {**SHAREGPT_ROLES, "function": "tool", "bot": "assistant", "model": "assistant", "prompter": "user"}
_KEYS = {"from": "role", "value": "content"}
_COPIED = ("group", "time", "slice_by")
_SPEAKERS = {"messages": "", "prompt": "user"} | dict.fromkeys(("completion", "chosen", "rejected"), "assistant")


def find_roles(recipe: Recipe, files: SourceRows) -> dict[str, str]:
    """Map roles to columns for conversations, pairs or preferences, and for splits. Raises `DataError` if none fit."""
    block, sample = recipe.data, [row for _, row in islice(files.rows([]), 1000)]
    every, usual = tuple(dict.fromkeys(chain.from_iterable(sample))), ("system", "tools", "history")
    columns, copied = columns_for_roles(block, every), (block.group, block.time, recipe.evaluate.slice_by)
    wanted = {role: USUAL_NAMES.get(role, (role,)) for role in (*usual, "prompt", "chosen", "rejected")}
    named = {role: find_column(role, getattr(block, role, None), columns, files.where, wanted[role]) for role in wanted}
    if not (named["chosen"] and named["rejected"] and block.messages is block.completion is block.text is None):
        named = {role: named[role] for role in usual}
        named |= causal_lm.find_columns(columns, sample[:100], block, files.where)
    if "text" in named:
        raise DataError(f"{files.where}: '{named['text']}' holds text without roles; set data.messages or data.prompt")
    for role, name in zip(_COPIED, copied, strict=True):
        named[role] = name and find_column(role, name, every, files.where)
    return {role: name for role, name in named.items() if name}


def convert_row(row: Row, roles: Mapping[str, str]) -> dict[str, Any]:
    """Return `messages`, or `prompt`, `chosen` and `rejected`. Raises `DataError` if they would be read differently."""
    if reason := why_unreadable(row, roles):
        raise DataError(reason)
    turns = {role: _read_turns(row, roles, role) for role in roles if role in _SPEAKERS}
    if "prompt" in turns:
        turns["prompt"][:0] = _read_history(row, roles)
    parts = _split_preference(**turns) if "chosen" in turns else {"messages": [*chain(*turns.values())]}
    start, system = next(iter(parts.values())), as_text(row.get(roles.get("system", "")))
    if system.strip() and start[:1] != (opening := [{"role": "system", "content": system}]):
        if any(message["role"] == "system" for message in start):
            raise DataError(f"column '{roles['system']}' and the messages hold different system messages")
        start[:0] = opening
    for whole in [start + parts[name] for name in ("chosen", "rejected") if name in parts] or [start]:
        if refused := causal_lm.why_unusable({"messages": whole}, Target("chat", {"messages": "messages"})):
            raise DataError(refused.reason)
        if clean_messages(json.loads(json.dumps(whole, default=to_json_value))) != whole:
            raise DataError("a message holds a value that JSON cannot represent")
    tools = parse_cell(row.get(roles.get("tools", "")))
    copied = {roles[role]: row.get(roles[role]) for role in _COPIED if role in roles}
    return copied | parts | ({"tools": tools} if tools else {})


def _read_turns(row: Row, roles: Mapping[str, str], role: str) -> Messages:
    """Return a cell's messages. A text is one message."""
    cell = parse_cell(row.get(roles[role]))
    is_list = isinstance(cell, (list, tuple)) and all(isinstance(one, Mapping) for one in cell)
    if role != "messages" and not (is_list and any({"role", "from"} & one.keys() for one in cell)):
        target = Target("prompt_completion", {name: roles[name] for name in (role, "input") if name in roles})
        if refused := causal_lm.why_unusable(row, target):
            raise DataError(refused.reason)
        text = causal_lm.prompt_text(row, target) if role == "prompt" else as_text(row[roles[role]])
        return [{"role": _SPEAKERS[role], "content": text}]
    turns = Messages()
    for message in cell if is_list else clean_messages(cell):
        spelled = {_KEYS.get(name, name): value for name, value in message.items() if value is not None}
        speaker = _ROLES.get(name := str(spelled.get("role")).lower(), name)
        if speaker not in _KNOWN or not isinstance(spelled.get("content", ""), (str, list, tuple)):
            raise DataError(f"found {str(message)[:60]}, expected text with a role of {', '.join(_KNOWN)}")
        turns += clean_messages([{**spelled, "role": speaker}])
    return [{"role": turn["role"], **turn} for turn in turns]


def _read_history(row: Row, roles: Mapping[str, str]) -> Messages:
    """Return the turns before an Alpaca row's instruction: pairs of a question and its answer."""
    cell, turns = parse_cell(row.get(roles.get("history", ""))) or (), Messages()
    for pair in cell if isinstance(cell, (list, tuple)) else [cell]:
        match pair:
            case [str(question), str(answer)]:
                turns += {"role": "user", "content": question}, {"role": "assistant", "content": answer}
            case _:
                raise DataError(f"'{roles['history']}' holds {str(pair)[:60]}, expected pairs of question and answer")
    return turns


def _split_preference(chosen: Messages, rejected: Messages, prompt: Sequence[Any] = ()) -> dict[str, Messages]:
    """Return prompt and answers. Whole conversations are split after their common messages, as TRL does."""
    asked = list(prompt)
    if not prompt or any(answer[0]["role"] != "assistant" for answer in (chosen, rejected) if answer):
        pairs = enumerate(zip(chosen, rejected, strict=False))
        end = next((number for number, (one, other) in pairs if one != other), 0)
        asked, chosen, rejected = chosen[:end], chosen[end:], rejected[end:]
    if not (asked and chosen and rejected) or chosen == rejected or any(message not in asked for message in prompt):
        raise DataError("chosen and rejected must follow the same prompt and differ")
    return {"prompt": asked, "chosen": chosen, "rejected": rejected}
