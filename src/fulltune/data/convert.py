from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from fulltune.data.readers.read import DataFiles
from fulltune.data.sources import columns_for_roles
from fulltune.errors import DataError
from fulltune.inference.store import to_json_value
from fulltune.recipe.data import DataBlock
from fulltune.recipe.fields import Recipe
from fulltune.tasks import Row, Target, causal_lm
from fulltune.tasks.chat import SHAREGPT_ROLES, clean_messages
from fulltune.tasks.columns import USUAL_NAMES, as_text, find_column, parse_cell, why_cell_blank, why_unreadable

Messages = list[dict[str, Any]]
_KNOWN = ("system", "developer", "user", "assistant", "tool")
_ROLES = {**SHAREGPT_ROLES, "function": "tool", "bot": "assistant", "model": "assistant", "prompter": "user"}
_KEYS = {"from": "role", "value": "content"}


def convert_rows(files: DataFiles, recipe: Recipe) -> Iterator[tuple[str, Row, Row | str]]:
    """Yield each row's location, the row, and its conversations or why it has none."""
    head = [row for _, row in islice(files.rows([]), 1000)]
    roles = find_roles(recipe.data, tuple(dict.fromkeys(chain.from_iterable(head))), head[:100], files.where)
    copied = [name for name in (recipe.data.group, recipe.data.time, recipe.evaluate.slice_by) if name]
    for place, row in files.rows():
        try:
            yield place, row, {name: row.get(name) for name in copied} | convert_row(row, roles)
        except DataError as error:
            yield place, row, str(error)


def find_roles(block: DataBlock, columns: Sequence[str], sample: Sequence[Row], file: str) -> dict[str, str]:
    """Map roles to columns for conversations, pairs or preferences; raise `DataError` if none fit."""
    columns, roles = columns_for_roles(block, columns), ("system", "tools", "prompt", "chosen", "rejected")
    names = [find_column(one, getattr(block, one, None), columns, file, USUAL_NAMES.get(one, (one,))) for one in roles]
    named = {role: name for role, name in zip(roles, names, strict=True) if name}
    if "chosen" in named and "rejected" in named and block.messages is block.completion is block.text is None:
        return named
    usual = causal_lm.find_columns(columns, sample, block, file)
    if "text" in usual:
        raise DataError(f"{file}: '{usual['text']}' holds text without roles; set data.messages or data.prompt")
    return {role: named[role] for role in ("system", "tools") if role in named} | usual


def convert_row(row: Row, roles: Mapping[str, str]) -> dict[str, Any]:
    """Return `messages`, or `prompt`, `chosen` and `rejected`. Raises `DataError` if they would be read differently."""
    if reason := why_unreadable(row, roles):
        raise DataError(reason)
    turns = {role: _read_turns(row, roles, role) for role in roles if role not in ("system", "tools", "input")}
    parts = _split_preference(**turns) if "chosen" in turns else {"messages": [*chain(*turns.values())]}
    start, system = next(iter(parts.values())), as_text(row.get(roles.get("system", "")))
    if system.strip() and start[:1] != (opening := [{"role": "system", "content": system}]):
        start[:0] = opening
    for whole in [start + parts[name] for name in ("chosen", "rejected") if name in parts] or [start]:
        if refused := causal_lm.why_unusable({"messages": whole}, Target("chat", {"messages": "messages"})):
            raise DataError(refused.reason)
        if clean_messages(json.loads(json.dumps(whole, default=to_json_value))) != whole:
            raise DataError("a message holds a value that JSON cannot represent")
    tools = parse_cell(row.get(roles.get("tools", "")))
    return parts | ({"tools": tools} if tools else {})


def _read_turns(row: Row, roles: Mapping[str, str], role: str) -> Messages:
    """Return a cell's messages. A text is one message."""
    cell = parse_cell(row.get(roles[role]))
    is_list = isinstance(cell, (list, tuple)) and all(isinstance(one, Mapping) for one in cell)
    if role != "messages" and not (is_list and any({"role", "from"} & one.keys() for one in cell)):
        if refused := why_cell_blank(row, target := Target("prompt_completion", roles), role):
            raise DataError(refused.reason)
        if role == "prompt":
            return [{"role": "user", "content": causal_lm.prompt_text(row, target)}]
        return [{"role": "assistant", "content": as_text(row[roles[role]])}]
    turns = Messages()
    for message in cell if is_list else clean_messages(cell):
        spelled = {_KEYS.get(name, name): value for name, value in message.items() if value is not None}
        speaker = _ROLES.get(name := str(spelled.get("role")).lower(), name)
        if speaker not in _KNOWN or not isinstance(spelled.get("content", ""), (str, list, tuple)):
            raise DataError(f"found {str(message)[:60]}, expected text with a role of {', '.join(_KNOWN)}")
        turns += clean_messages([{**spelled, "role": speaker}])
    return [{"role": turn["role"], **turn} for turn in turns]


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
