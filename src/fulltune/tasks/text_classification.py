from __future__ import annotations

from collections.abc import Mapping, Sequence

from fulltune.errors import DataError
from fulltune.recipe import tasks as recipe_tasks
from fulltune.recipe.data import DataBlock
from fulltune.records.data import Preview
from fulltune.tasks import Example, Refused, Row, RowExamples, RowFeatures, Target, Tokenizer, classes, labels
from fulltune.tasks.columns import (
    USUAL_PAIRS,
    as_text,
    find_column,
    find_required_column,
    normalised,
    refuse_list,
    why_cell_blank,
)
from fulltune.tasks.padding import cut_long_text, pad_features, tokenise_and_cut

FACTS = recipe_tasks.FACTS["text-classification"]
find_target, row_labels = labels.find_target, labels.row_labels
loss, count_items, reduce_logits = classes.loss, classes.count_items, classes.reduce_logits
metrics, answers = classes.metrics, classes.answers
metrics_from_sums, chance_loss = classes.metrics_from_sums, classes.chance_loss
full_row, config_changes = classes.full_row, classes.config_changes
with_placeholder_answer, collate = classes.with_placeholder_label, pad_features


def display_text(row: Row, target: Target) -> str:
    return " / ".join(text_and_pair(row, target))


def find_columns(columns: Sequence[str], sample: Sequence[Row], data: DataBlock, file: str) -> dict[str, str]:
    """Map `label`, `text` and, if there is one, `text_pair` to columns, or raise `DataError`."""
    label = find_required_column("label", data.label, columns, file)
    rest = [column for column in columns if column != label]
    texts = [column for column in (data.text, data.text_pair) if column is not None]
    if twice := next((column for column in texts if [*texts, label].count(column) > 1), None):
        raise DataError(
            f"{file}: column '{twice}' has two of the roles text, text_pair and label; name a column for each"
        )
    if data.text is None and data.text_pair is None:
        by_lower = {column.lower().strip(): column for column in rest} | {column: column for column in rest}
        for text, pair in USUAL_PAIRS:
            if text in by_lower and pair in by_lower:
                return {"text": by_lower[text], "text_pair": by_lower[pair], "label": label}
    text_column = data.text
    if text_column is None and find_column("text", None, rest, file) is None:
        sizes = {name: sum(len(row[name]) for row in sample if isinstance(row.get(name), str)) for name in rest}
        longest = max(rest, key=sizes.__getitem__, default="")
        text_column = longest if sizes.get(longest, 0) >= 10 * max(1, len(sample)) else None
    by_role = {"text": find_required_column("text", text_column, rest, file), "label": label}
    if data.text_pair is not None:
        by_role["text_pair"] = find_required_column("text_pair", data.text_pair, rest, file)
    return by_role


def why_unusable(row: Row, target: Target) -> Refused | None:
    """Return the reason to drop a row with an unusable text, pair or label, else None."""
    if refused := why_cell_blank(row, target, "text"):
        return refused
    if (pair := target.columns.get("text_pair")) is not None:
        if row.get(pair) is None:  # an empty text is a text
            return Refused("no text", f"column '{pair}' is missing")
        if refused := refuse_list(row, target, "text_pair"):
            return Refused("no text", refused.reason)
    column = target.columns["label"]
    value = row.get(column)
    is_list = target.form.several_labels  # an empty list means no label
    if value is None or (labels.is_empty(value) and not is_list):
        return Refused("no label", f"column '{column}' is empty")
    content = f"column '{column}' holds {str(value)[:60]!r}"
    if target.form.one_label and labels.is_infinite(value):
        return Refused("no label", f"{content}, expected a class name")
    if target.form.is_number and labels.parse_float32(value) is None:
        expected = "a number of at most 32 bits (up to 3.4e38)" if labels.exceeds_float32(value) else "a number"
        return Refused("no number", f"{content}, expected {expected}")
    if is_list and labels.is_broken_list(value):
        return Refused("no list", f"{content}, expected a complete list of names")
    return None


why_unanswerable = why_unusable


def group_key(row: Row, target: Target) -> str:
    return normalised(" \0 ".join(text_and_pair(row, target)))


def text_and_pair(row: Row, target: Target) -> list[str]:
    return [as_text(row.get(target.columns[role])) for role in ("text", "text_pair") if role in target.columns]


def encode(rows: Sequence[Row], target: Target, tokenizer: Tokenizer, max_length: int) -> RowExamples:
    """Tokenise texts or pairs. Labels become a class id, a 0/1 vector [labels] or a float."""
    texts = [[cut_long_text(text, tokenizer, max_length) for text in text_and_pair(row, target)] for row in rows]
    tokens, names, is_cut = tokenise_and_cut(tokenizer, [*map(list, zip(*texts, strict=True))], max_length)
    # Token types of single texts are all 0, the default of models.
    is_pair = "text_pair" in target.columns
    names = [name for name in names if is_pair or any(map(any, tokens[name]))]
    ids = {name: position for position, name in enumerate(target.labels)}
    encoded = []
    for position, row in enumerate(rows):
        features = {name: tokens[name][position] for name in names} | {"labels": label_value(row, target, ids)}
        encoded.append([Example(features, trained_tokens=1, truncated=is_cut[position])])
    return encoded


def label_value(row: Row, target: Target, ids: Mapping[str, int]) -> int | float | list[float] | None:
    """Return a row's class id, 0/1 vector [labels] or number, or None if the number is unreadable."""
    if target.form.is_number:
        return labels.parse_float32(row[target.columns["label"]])
    names = row_labels(row, target)
    return ids[names[0]] if target.form.one_label else [float(name in names) for name in ids]


def preview(features: RowFeatures, target: Target, tokenizer: Tokenizer) -> Preview:
    text = str(tokenizer.decode(features["input_ids"]))
    return Preview.labelled(text, classes.label_as_text(features["labels"], target))
