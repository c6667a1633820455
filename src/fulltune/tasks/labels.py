from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from numbers import Real
from typing import Any

from fulltune.errors import DataError, RecipeError
from fulltune.recipe.data import DataBlock
from fulltune.recipe.fields import Recipe
from fulltune.recipe.rules import excluded_combinations
from fulltune.records.data import DataSummary
from fulltune.tasks import PLACE, Row, Target
from fulltune.tasks.columns import parse_list_or_object
from fulltune.text import counted, did_you_mean, first_few

_MOST_FLOAT32 = float.fromhex("0x1.fffffep127")
MOST_DISTINCT = 100_000
LabelCounts = list[tuple[Any, int, str]]
"""Each distinct value of a label column, with its number of rows and the first row's location."""


def _count_rows(counts: LabelCounts, wrong: Callable[[Any], bool]) -> int:
    return sum(count for value, count, _ in counts if wrong(value))


def _first_at(counts: LabelCounts, value: object) -> str:
    place = next(place for other, _, place in counts if other is value)
    return f", first: {place}" if place else ""


def count_label_values(rows: Iterable[Row], column: str, file: str) -> tuple[LabelCounts, int]:
    """Return the distinct labels with counts, and the number of labelled rows. Raise `DataError` if no row has a
    label."""
    distinct: dict[Any, list[Any]] = {}
    beyond = 0
    for row in rows:
        value = row.get(column)
        if is_empty(value) or is_infinite(value):
            continue
        key = (type(value), value) if isinstance(value, (str, int, float)) else json.dumps(value, default=str)
        if key in distinct:
            distinct[key][1] += 1
        elif len(distinct) < MOST_DISTINCT:
            distinct[key] = [value, 1, str(row.get(PLACE, ""))]
        elif parse_float32(value) is not None:
            beyond += 1
        else:
            raise DataError(
                f"{file}: column '{column}' has more than {MOST_DISTINCT:,} different labels; is it the right column?"
            )
    if not distinct:
        raise DataError(f"{file}: column '{column}' has no label in any row")
    values = [(value, count, place) for value, count, place in distinct.values()]
    return values, sum(count for _, count, _ in values) + beyond


def find_target(rows: Iterable[Row], columns: Mapping[str, str], data: DataBlock, file: str) -> Target:
    """Derive the problem type and the sorted class names from the train rows, or raise `DataError`."""
    column = columns["label"]
    counts, total = count_label_values(rows, column, file)
    strange = [value for value, *_ in counts if isinstance(value, (dict, date, time, timedelta))]
    if strange:
        kind = "objects" if isinstance(strange[0], dict) else "dates or times"
        raise DataError(
            f"{file}: column '{column}' holds {kind} ({str(strange[0])[:60]}{_first_at(counts, strange[0])}); "
            "expected a class name, a list of class names, or a number"
        )
    match data.problem_type if data.problem_type != "auto" else _guess_problem_type(counts, total):
        case "regression":
            return _regression_target(counts, columns, file)
        case "multi_label":
            return _multi_label_target(counts, columns, file)
        case _:
            return _single_label_target(counts, total, columns, file)


def _regression_target(counts: LabelCounts, columns: Mapping[str, str], file: str) -> Target:
    """Return a regression target, or raise `DataError` if labels are words or all the same number."""

    def is_word(value: object) -> bool:
        return parse_float32(value) is None and not exceeds_float32(value)

    wrong = [value for value, *_ in counts if is_word(value)]
    if wrong:
        raise DataError(
            f"{file}: column '{columns['label']}' must hold numbers for regression, but "
            f"{counted(_count_rows(counts, is_word), 'value')} cannot be read as one, such as {str(wrong[0])[:60]!r}"
            f"{_first_at(counts, wrong[0])}; repair or remove these rows"
        )
    # Numbers that are too large are dropped row by row.
    if len({number for value, *_ in counts if (number := parse_float32(value)) is not None}) == 1:
        raise DataError(f"{file}: every row has the same target {counts[0][0]!r}, so there is nothing to learn")
    return Target("regression", columns)


def _multi_label_target(counts: LabelCounts, columns: Mapping[str, str], file: str) -> Target:
    """Return a multi-label target, or raise `DataError` if labels are missing, one-hot, or the same in all rows."""
    column, values = columns["label"], [value for value, *_ in counts if not is_broken_list(value)]
    labels = sorted({label for value in values for label in parse_label_list(value)})
    if not labels:
        first = counts[0][0]
        raise DataError(
            f"{file}: no row has a label in column '{column}': {str(first)[:60]!r}{_first_at(counts, first)}. "
            'Write names such as ["food", "travel"], without nested lists'
        )
    of_each = [parse_label_list(value) for value in values]
    soft = [value for value in values if any(isinstance(part, float) and part % 1 > 0 for part in _list_items(value))]
    if soft or (set(labels) <= {"0", "1"} and len(set(map(len, of_each))) == 1):
        first = (soft or values)[0]
        raise DataError(
            f"{file}: column '{column}' holds a number for each label (soft or one-hot: {str(first)[:60]}"
            f"{_first_at(counts, first)}); expected the names of the row's labels, such as [a, c] for [1, 0, 1]"
        )
    if len({tuple(sorted(names)) for names in of_each}) == 1:
        raise DataError(f"{file}: every row has the same labels {values[0]!r}, so there is nothing to learn")
    if len(labels) == 1:
        raise DataError(f"{file}: column '{column}' has only the label '{labels[0]}', expected at least two")
    return Target("multi_label", columns, tuple(labels))


def _single_label_target(counts: LabelCounts, total: int, columns: Mapping[str, str], file: str) -> Target:
    """Return a single-label target. Raise `DataError` for lists, words mixed with numbers, one class, or too many
    classes."""
    column, values = columns["label"], [value for value, *_ in counts]
    several = [value for value in values if isinstance(value, (list, tuple)) and len(value) != 1]
    if several:
        raise DataError(
            f"{file}: column '{column}' holds several labels in a row ({str(several[0])[:60]}"
            f"{_first_at(counts, several[0])}); expected one, or set data.problem_type: multi_label"
        )
    _raise_if_words_and_numbers(counts, column, file)
    names = {label_name(value) for value in values}
    if len(names) == 1:
        raise DataError(
            f"{file}: every row has the label '{next(iter(names))}', but a classifier needs at least two classes"
        )
    if len(names) > max(50, total // 2):
        raise DataError(
            f"{file}: column '{column}' has {len(names)} different labels in {total} rows; "
            "is it the right column? To predict numbers, set data.problem_type: regression"
        )
    numbers = {name: parse_float32(name) for name in names}
    ordered = sorted(names, key=lambda name: (numbers[name] is None, numbers[name] or 0.0, name))
    return Target("single_label", columns, tuple(ordered))


def _guess_problem_type(counts: LabelCounts, total: int) -> str:
    """Return `multi_label` for lists, `regression` for numbers with decimals, else `single_label`."""
    values = [value for value, *_ in counts]
    # A few broken lists do not turn the others into class names: broken ones are dropped row by row, and listed.
    if any(isinstance(value, (list, tuple)) for value in values) or _count_rows(counts, _is_list_text) > total / 2:
        return "multi_label"
    numbers = [parse_float32(value) for value in values if not exceeds_float32(value)]
    if all(number is not None for number in numbers) and any(number != round(number) for number in numbers if number):
        return "regression"
    return "single_label"


def _raise_if_words_and_numbers(counts: LabelCounts, column: str, file: str) -> None:
    """Raise `DataError` for labels such as `1`, `2`, `positive`, as in broken exports."""
    words: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for value, count, _ in counts:
        (words if parse_float32(value) is None else numbers)[str(value)] += count
    if words and numbers:
        rarer = min((words, numbers), key=Counter.total)
        first = _first_at(counts, next(value for value, *_ in counts if str(value) in rarer))
        raise DataError(
            f"{file}: column '{column}' has both words ({_two_most(words)}) and numbers ({_two_most(numbers)}) as "
            f"labels{first}. Expected only one of the two: rename the labels, or remove the wrong rows"
        )


def _two_most(counts: Counter[str]) -> str:
    shown = ", ".join(f"'{name}' in {counted(count, 'row')}" for name, count in counts.most_common(2))
    return shown + (f", {len(counts) - 2} more" if len(counts) > 2 else "")


def is_empty(value: object) -> bool:
    """Return True for a missing cell, white space, or pandas' NaN."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and value != value)


def parse_float32(value: object) -> float | None:
    """Return a cell's number if float32 can hold it, else None."""
    number = _float_or_none(value)
    return number if number is not None and abs(number) <= _MOST_FLOAT32 else None


def exceeds_float32(value: object) -> bool:
    """Return True for numbers that float32 cannot hold: `1e39`, `inf`, the word `nan`."""
    number = _float_or_none(value)
    return number is not None and not abs(number) <= _MOST_FLOAT32


def _float_or_none(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (str, Real, Decimal)):
        return None
    if isinstance(value, str) and "_" in value:  # Python reads 1_1 as 11; in a label it is a name
        return None
    try:
        return float(value)
    except ValueError:
        return None
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf


def _is_list_text(value: object) -> bool:
    return isinstance(value, str) and value.startswith("[") and value.endswith("]") and parse_list(value) is not None


def is_infinite(value: object) -> bool:
    return isinstance(value, float) and math.isinf(value)


def is_broken_list(value: object) -> bool:
    """Return True for a nested or truncated list (`["a", "b`), but not for a name such as `a [b]`."""
    if not isinstance(value, str) or not (value.startswith("[") or (value.endswith("]") and "[" not in value)):
        return any(isinstance(part, (list, tuple, dict)) or is_infinite(part) for part in _list_items(value))
    parsed = parse_list(value)
    return parsed is None or is_broken_list(parsed)


def _list_items(value: object) -> Sequence[Any]:
    parsed = parse_list(value) if isinstance(value, str) else value
    return parsed if isinstance(parsed, (list, tuple)) else ()


def parse_list(value: str) -> list[Any] | None:
    parsed = parse_list_or_object(value)
    return parsed if isinstance(parsed, list) else None


def parse_label_list(value: object) -> list[str]:
    """Return the label names in a list, a list written as text, or text separated by `;` or `|`."""
    if isinstance(value, str):
        parsed = parse_list(value)
        # `a;b` and `a|b` are the usual forms of several labels in a csv cell.
        value = parsed if parsed is not None else [part for part in value.replace("|", ";").split(";") if part.strip()]
    if not isinstance(value, (list, tuple)):
        value = [] if is_empty(value) else [value]
    return [label_name(part) for part in value if not is_empty(part)]


def row_labels(row: Row, target: Target) -> list[str]:
    """Return the row's sorted class names, or an empty list for tasks without classes."""
    if not target.form.labels_rows:
        return []
    value = row.get(target.columns["label"])
    return sorted(set(parse_label_list(value))) if target.form.several_labels else [label_name(value)]


def label_name(value: object) -> str:
    """Return a label's class name. `1`, `1.0` and `[1]` have the same name."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    name = str(value).strip()
    # Tables with empty cells store integers as floats: `1.0` and `1` are the same class.
    return name.partition(".")[0] if re.fullmatch(r"-?\d+\.0", name) else name


# ---- settings that depend on the labels -------------------------------------------------------------------------


def check_label_settings(recipe: Recipe, summary: DataSummary) -> None:
    """Raise `RecipeError` if settings such as class weights do not suit the labels."""
    if problems := excluded_combinations(recipe, summary.form):
        raise RecipeError(problems)
    class_weights(recipe, summary)
    if (label := summary.positive_label) is None:
        return
    for name, split in summary.splits.items():
        if (of_class := split.label_counts.get(label, 0)) in (0, split.rows):
            hint = "lower data.folds" if recipe.data.folds else f"give data.{name} rows with and without it"
            if label not in summary.labels:
                hint = did_you_mean(label, summary.labels) or f"the classes are {first_few(summary.labels, 5)}"
            share = f"{of_class:,} of {split.rows:,} {name} rows"
            raise RecipeError(f"evaluate.positive_label: {share} have the class '{label}'; {hint}")


def class_weights(recipe: Recipe, summary: DataSummary) -> list[float] | None:
    """Return `train.class_weights` in the order of the labels, or None if unset. `balanced` gives every class the same
    total weight."""
    setting, labels, name = recipe.train.class_weights, summary.labels, "train.class_weights"
    if setting is None:
        return None
    if not labels:
        raise RecipeError(f"{name}: the data have no classes ({summary.form.words}); remove the setting")
    if isinstance(setting, str):
        if summary.form.tags_words:
            raise RecipeError(
                f"{name}: 'balanced' counts rows per class, but tags belong to words; give a weight for each tag: "
                f"{', '.join(labels[:3])} ..."
            )
        counts = summary.splits["train"].label_counts
        # All train rows of a class may have been dropped.
        return [sum(counts.values()) / (len(labels) * counts[label]) if label in counts else 0.0 for label in labels]
    if isinstance(setting, dict):
        by_label = {str(label): weight for label, weight in setting.items()}
        missing = [label for label in labels if label not in by_label]
        unknown = [label for label in by_label if label not in labels]
        if missing or unknown:
            wrong = f"no weight for {', '.join(missing[:5])}" if missing else f"no such label: {unknown[0]}"
            raise RecipeError(f"{name}: {wrong}; the labels are {', '.join(labels[:5])}{' ...' if labels[5:] else ''}")
        return [float(by_label[label]) for label in labels]
    if len(setting) != len(labels):
        raise RecipeError(f"{name}: {len(setting)} weights for {len(labels)} labels; give one for each label")
    return [float(weight) for weight in setting]
