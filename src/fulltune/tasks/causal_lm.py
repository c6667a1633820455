from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from fulltune.errors import DataError, SetupError
from fulltune.models.packing import fill_blocks, join_texts
from fulltune.recipe import tasks as recipe_tasks
from fulltune.recipe.data import DataBlock
from fulltune.records.data import Preview, Segment
from fulltune.tasks import (
    Example,
    Refused,
    Row,
    RowExamples,
    RowFeatures,
    Target,
    Tensor,
    Tokenizer,
    chat,
    classes,
    written,
)
from fulltune.tasks.columns import (
    as_text,
    find_column,
    find_required_column,
    find_usual_column,
    is_blank,
    normalised,
    parse_cell,
    refuse_list,
    why_cell_blank,
)
from fulltune.tasks.columns import find_columns as columns_of_roles
from fulltune.tasks.labels import row_labels as labels_of_row
from fulltune.tasks.padding import IGNORED, pad_features, pad_right

FACTS = recipe_tasks.FACTS["causal-lm"]
BLOCK_LENGTH = 1024
"""Upper bound of the default `max_length` for packed raw text."""
PART_CHARACTERS = 1_000_000
row_labels, config_changes = labels_of_row, classes.config_changes
metrics, score_answers = written.metrics, written.score_answers
metrics_from_sums, full_row = written.metrics_from_sums, written.full_row

# ---- columns ---------------------------------------------------------------------------------------------------


def find_columns(columns: Sequence[str], sample: Sequence[Row], data: DataBlock, file: str) -> dict[str, str]:
    """Map roles to columns for chat (messages, tools), raw text (text), or pairs (prompt, input, completion); raise
    `DataError` if none fit."""
    forms = {
        "data.messages": data.messages,
        "data.prompt/completion": data.completion if data.prompt is None else data.prompt,
        "data.text": data.text,
    }
    named_forms = [name for name, column in forms.items() if column is not None]
    if len(named_forms) > 1:
        raise DataError(f"{file}: {' and '.join(named_forms)} are both set; keep one of them")
    form = named_forms[0] if named_forms else None
    if form in (None, "data.prompt/completion") and data.completion is None:
        raise_if_preference_data(columns, sample, file)
    messages = find_column("messages", data.messages, columns, file) if form in (None, "data.messages") else None
    if messages is not None:
        tools = find_column("tools", data.tools, columns, file)
        return {"messages": messages} | ({"tools": tools} if tools else {})
    # Raw text: a `text` column without columns that could be a prompt and its completion.
    prompt = find_column("prompt", None, columns, file) if form is None and "text" in columns else None
    rest = [column for column in columns if column != prompt]
    has_pairs = "text" not in columns or (
        prompt is not None and find_column("completion", None, rest, file) is not None
    )
    if form == "data.text" or (form is None and not has_pairs):
        return {"text": find_required_column("text", data.text or "text", columns, file)}
    pair = columns_of_roles(("prompt", "completion"), columns, sample, data, file)
    if data.input is not None or (data.prompt is None and pair["prompt"].lower().strip() == "instruction"):
        rest = [column for column in columns if column not in pair.values()]
        if (about := find_column("input", data.input, rest, file)) is not None:
            return {"prompt": pair["prompt"], "input": about, "completion": pair["completion"]}
    return pair


def raise_if_preference_data(columns: Sequence[str], sample: Sequence[Row], file: str) -> None:
    """Raise `DataError` for preference data (DPO, KTO), which this task cannot train on."""

    def column_named(name: str) -> str | None:
        return find_usual_column((name,), columns, file)

    chosen, rejected = column_named("chosen"), column_named("rejected")
    if chosen and rejected:
        role = "completion" if all(isinstance(row.get(chosen), str) for row in sample) else "messages"
        raise DataError(
            f"{file}: columns '{chosen}' and '{rejected}' hold preferences, which fulltune cannot train on yet "
            f"(TRL's DPOTrainer can; 'fulltune data' writes them for it with --convert). To train on the chosen "
            f"answers only, set data.{role}: {chosen} (init: --column {role}={chosen})"
        )
    good, judged = column_named("label"), column_named("completion")
    judgements = {str(row.get(good)).lower() for row in sample} if good else set[str]()
    if judged and column_named("prompt") and judgements and judgements <= {"true", "false"}:
        raise DataError(
            f"{file}: column '{good}' says which answers in '{judged}' are good, but fulltune cannot train on "
            f"judgements (TRL's KTOTrainer can). To train on the good answers only, keep the rows in which '{good}' is "
            f"true, and set data.completion: {judged} (init: --column completion={judged})"
        )


def find_target(rows: Iterable[Row], columns: Mapping[str, str], data: DataBlock, file: str) -> Target:
    """Return the target for chat, raw text or pairs. A line break joins prompt and completion unless white space
    already separates them."""
    glued = False
    for number, row in enumerate(rows):
        if "prompt" in columns and not glued and number < 200:
            prompt = prompt_text(row, Target("prompt_completion", columns))
            completion = as_text(row.get(columns["completion"]))
            glued = bool(prompt and completion) and not prompt[-1].isspace() and not completion[0].isspace()
    if "messages" in columns:
        return Target("chat", columns, train_on=data.train_on)
    if "text" in columns:
        return Target("text", columns)
    return Target("prompt_completion", columns, joint="\n" if glued else "")


def why_unusable(row: Row, target: Target) -> Refused | None:
    """Return the reason to drop a row without text or without a trained answer, else None."""
    if "messages" not in target.columns:
        refused = why_cell_blank(row, target, *(role for role in target.columns if role != "input"))
        return refused or (refuse_list(row, target, "input") if "input" in target.columns else None)
    try:
        messages = chat.clean_messages(row.get(target.columns["messages"]), target.train_on)
    except DataError as error:
        return Refused("no conversation", str(error))
    answers = [message for message in messages if chat.is_trained(message)]
    if not any(not is_blank(message["content"]) or message.get("tool_calls") for message in answers):
        return Refused("no answer", "every assistant message is empty, or has weight 0 or train: false")
    return None


def with_placeholder_answer(row: Row, target: Target) -> Row:
    if "messages" not in target.columns:
        return {**row, target.columns["completion"]: "?"} if "completion" in target.columns else row
    column, answer = target.columns["messages"], {"role": "assistant", "content": "?"}
    try:
        messages = chat.clean_messages(row.get(column))
    except DataError:
        return row  # refused later, with the reason
    return row if not messages or messages[-1]["role"] == "assistant" else {**row, column: [*messages, answer]}


def why_unanswerable(row: Row, target: Target) -> Refused | None:
    """Return the reason why the model cannot answer a row, such as a missing prompt, or None."""
    if "messages" not in target.columns:
        return why_unusable(row, target)
    try:
        asks = bool(prompt_text(row, target).strip())
    except DataError as error:
        return Refused("no conversation", str(error))
    return None if asks else Refused("no text", "no message before the answer has text")


def group_key(row: Row, target: Target) -> str:
    return normalised(prompt_text(row, target))


def prompt_text(row: Row, target: Target) -> str:
    """Return the prompt with its input, the raw text, or the text of all messages before the last answer."""
    if "messages" not in target.columns:
        prompt = as_text(row.get(target.columns["prompt" if "prompt" in target.columns else "text"]))
        more = as_text(row.get(target.columns["input"])) if "input" in target.columns else ""
        return prompt if is_blank(more) else f"{prompt}\n\n{more}"
    return "\n".join(as_text(message["content"]) for message in _messages_before_answer(row, target))


def answer_text(row: Row, target: Target) -> str:
    """Return the completion or, for chat, the last trained message's content or tool calls as text."""
    if "completion" in target.columns:
        return as_text(row.get(target.columns["completion"])).strip()
    messages = chat.clean_messages(row[target.columns["messages"]])
    last = [message for message in messages if chat.is_trained(message)][-1]
    return as_text(last.get("content") or last.get("tool_calls")).strip()


def _messages_before_answer(row: Row, target: Target) -> list[dict[str, Any]]:
    """Return the messages before the last trained one, or all messages if none is trained."""
    messages = chat.clean_messages(row[target.columns["messages"]])
    last = max((i for i, message in enumerate(messages) if chat.is_trained(message)), default=len(messages))
    return messages[:last]


# ---- tokens ----------------------------------------------------------------------------------------------------


def encode(rows: Sequence[Row], target: Target, tokenizer: Tokenizer, max_length: int) -> RowExamples:
    """Return a list of tokenised examples for each row. In conversations and pairs, only the answers are trained."""
    if "messages" in target.columns and not tokenizer.chat_template:
        raise SetupError(
            "the tokenizer has no chat template; use an instruct model, or set data.chat_template to a Jinja file"
        )
    if target.form.is_raw_text:
        return _encode_texts([as_text(row[target.columns["text"]]) for row in rows], tokenizer, max_length)
    encoded = []
    for row in rows:
        thinking = None
        if "messages" in target.columns:
            try:
                messages = chat.clean_messages(row[target.columns["messages"]], target.train_on)
                masked = chat.tokenise_conversation(tokenizer, messages, _tools(row, target), max_length)
                thinking = chat.describe_thinking(tokenizer, messages, masked)
            except DataError as error:
                refused = Refused("refused by the chat template", str(error))
                encoded.append([Example({"input_ids": [], "labels": []}, 0, refused=refused)])
                continue
        else:
            # Prompt and answer are tokenised separately, as in generation; the end token is trained.
            prompt = prompt_ids(prompt_text(row, target) + target.joint, tokenizer)
            completion = as_text(row.get(target.columns["completion"]))
            answer = list(tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"])
            if tokenizer.eos_token_id is not None and answer[-1:] != [tokenizer.eos_token_id]:
                answer.append(tokenizer.eos_token_id)
            masked = [(prompt + answer, [False] * len(prompt) + [True] * len(answer))]
        encoded.append([_masked_example(ids, trained, max_length, thinking) for ids, trained in masked])
    return encoded


def _encode_texts(texts: list[str], tokenizer: Tokenizer, max_length: int) -> list[list[Example]]:
    """Tokenise raw texts with end tokens, and split each into examples of at most `max_length` tokens."""
    end = tokenizer.eos_token_id
    encoded = []
    is_long = any(len(text) > PART_CHARACTERS for text in texts)
    at_once = [] if is_long else tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    for ids in (_tokenise_in_parts(text, tokenizer) for text in texts) if is_long else at_once:
        if end is not None and ids[-1:] != [end]:
            ids = [*ids, end]
        pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
        if len(pieces) > 1 and len(pieces[-1]) == 1:  # a single token has nothing to be predicted from
            pieces.pop()
        encoded.append([_masked_example(piece, [True] * len(piece), max_length) for piece in pieces])
    return encoded


def _tokenise_in_parts(text: str, tokenizer: Tokenizer) -> list[int]:
    """Tokenise a long text in parts, which need less memory. The tokens at the cuts, before spaces, may differ."""
    pattern = rf"(?s).{{1,{PART_CHARACTERS}}}(?= |\Z)|.{{{PART_CHARACTERS}}}"
    first, *others = re.findall(pattern, text)
    further = (tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in others)
    return [*prompt_ids(first, tokenizer), *chain.from_iterable(further)]


def _tools(row: Row, target: Target) -> chat.Tools:
    return (parse_cell(row.get(target.columns["tools"])) or None) if "tools" in target.columns else None


def prompt_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Tokenise a prompt with special tokens before it, but none after it."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    while ids and ids[-1] in {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}:
        ids.pop()
    return ids


def with_prompt_template(tokenizer: Tokenizer, target: Target) -> Tokenizer:
    """Return the tokenizer to save with the model. After training on pairs, its chat template formats prompts as in
    training."""
    if "completion" not in target.columns:  # a chat model trained on raw text stays one
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = _make_prompt_template(target, tokenizer)
    return tokenizer


def _make_prompt_template(target: Target, tokenizer: Tokenizer) -> str | None:
    """Return a chat template that formats prompts as in training, or None if the tokens would differ."""
    opening = tokenizer.bos_token if prompt_ids("a", tokenizer)[:1] == [tokenizer.bos_token_id] else ""
    turn = "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}"
    each = f"{turn}{{{{ {json.dumps(target.joint)} }}}}{{% endif %}}"
    template = f"{'{{ bos_token }}' if opening else ''}{{% for message in messages %}}{each}{{% endfor %}}"
    for text in _PROBES:
        prompt = text + target.joint
        rendered = tokenizer(f"{opening}{prompt}", add_special_tokens=False, verbose=False)["input_ids"]
        if list(rendered) != prompt_ids(prompt, tokenizer):
            return None
    return template


_PROBES = ("What is 6 x 7?", "Two lines\nof a prompt:", "name[Zizzi], food[French]")


def generation_ids(row: Row, target: Target, tokenizer: Tokenizer, max_length: int | None = None) -> list[int]:
    """Return all token ids of the prompt, because `generate` truncates long prompts on the left."""
    if "messages" not in target.columns:
        return prompt_ids(prompt_text(row, target) + target.joint, tokenizer)
    text = chat.render(tokenizer, _messages_before_answer(row, target), _tools(row, target), add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _masked_example(ids: list[int], trained: list[bool], max_length: int, thinking: str | None = None) -> Example:
    """Make an example of at most `max_length` tokens, in which untrained tokens have label -100."""
    labels = [token if is_trained else IGNORED for token, is_trained in zip(ids, trained, strict=True)]
    # The first token is never predicted: its label would not enter the loss.
    labels[:1] = [IGNORED] * len(labels[:1])
    cut = labels[:max_length]
    features = {"input_ids": ids[:max_length], "labels": cut}
    count = sum(label != IGNORED for label in cut)
    return Example(features, trained_tokens=count, truncated=len(ids) > max_length, thinking=thinking)


def end_token(features: RowFeatures) -> int | None:
    return next((label for label in reversed(features["labels"]) if label != IGNORED), None)


def preview(features: RowFeatures, target: Target, tokenizer: Tokenizer) -> Preview:
    """Decode an example into alternating trained and untrained segments."""
    segments: list[Segment] = []
    ids, labels = features["input_ids"], features["labels"]
    start = 0
    for position in range(1, len(ids) + 1):
        if position == len(ids) or (labels[position] == IGNORED) != (labels[start] == IGNORED):
            text = str(tokenizer.decode(ids[start:position]))
            segments.append(Segment(text=text, trained=labels[start] != IGNORED))
            start = position
    return Preview(segments=tuple(segments))


# ---- model -----------------------------------------------------------------------------------------------------


def collate(features: Sequence[RowFeatures], pad_token_id: int) -> dict[str, Tensor]:
    """Pad examples to a batch. Packed examples get `position_ids` instead of an attention mask."""
    batch = pad_features(features, pad_token_id, ("position_ids",), label_per_token=True)
    if "position_ids" not in features[0]:
        return batch
    # Without a mask, models separate packed texts where positions restart; the padding is one more, untrained text.
    width = batch["attention_mask"].shape[1]
    positions = [np.concatenate((row["position_ids"], np.arange(width - len(row["input_ids"])))) for row in features]
    return {"input_ids": batch["input_ids"], "labels": batch["labels"], "position_ids": pad_right(positions, 0)}


def collate_packed(features: Sequence[RowFeatures], pad_token_id: int) -> dict[str, Tensor]:
    """Collate rows into blocks with little padding, without attention between rows."""
    blocks = fill_blocks([len(row["input_ids"]) for row in features])
    return collate([join_texts([features[row] for row in block]) for block in blocks], pad_token_id)


def target_ids(labels: Tensor) -> Tensor:
    """Return each position's next token, the labels [batch, tokens] shifted left by one."""
    import torch.nn.functional as F

    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


loss, reduce_logits = partial(written.loss, target_ids), partial(written.reduce_logits, target_ids)
count_items = partial(written.count_items, target_ids)
