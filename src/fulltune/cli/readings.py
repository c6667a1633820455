"""What the columns of a table hold, and which tasks they suit. Contents decide; names break ties."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from fulltune.data.readers.derived import inner_cells
from fulltune.data.readers.files import IMAGE_SUFFIXES
from fulltune.data.readers.text_files import is_number
from fulltune.errors import DataError
from fulltune.recipe.data import DataBlock
from fulltune.recipe.tasks import TaskName
from fulltune.tasks import Row, Target, task_named
from fulltune.tasks.columns import CHOICE_NAMES, USUAL_NAMES, USUAL_PAIRS, parse_cell
from fulltune.tasks.labels import is_empty, label_name
from fulltune.tasks.multiple_choice import choice_texts, index_of_right_choice

Kind = str
"""`words` are texts, `name` short texts that differ, `flag` 0 or 1 and `flags` several such columns, `none` one value;
further `category`, `number`, `id`, `date`, `image`, `list`, `tags`, `object` and `messages`."""
_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
_NAMES: Mapping[str, Sequence[str]] = _TABLE["names"]
_WORD = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|[^\W\d_]\S*")
_ID_NAME = re.compile(
    r"(?i)(?:^|[\W_]|[pqdu])(?:ids?|idx|ind|index|[gu]uid|asin|url|link|hash|file_?name)\d*$|[a-z]ID$"
)
_CLASS_NAME = re.compile(r"(?i)(?:label|labels|class|category|intent|topic|target)(?:_?id)?$")
_DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}\b|(?:[A-Z][a-z]{2,8},? ){1,2}\d{1,2},? [\d:]{4,}")
_BIO = re.compile(r"(?:O|[BI]-\S+)(?:\s+(?:O|[BI]-\S+))*")
_TEXT_ROLES = (
    "text",
    "text_pair",
    "query",
    "positive",
    "negative",
    "prompt",
    "input",
    "completion",
    "context",
    "source",
)
_TEXT_NAMES = {name for role in _TEXT_ROLES for name in USUAL_NAMES[role]} | {*_NAMES["target"], *_NAMES["titles"]}
LABEL_KINDS = ("category", "flag", "flags", "number")
_FEW, _LONG, _COMPARED, _UNNAMED, _UNKNOWN = 10, 40, 200, 100, 102
_MOST_TRIED = 6
_REPEATS, _REPEATS_OF_CLASSES = 2.5, 1.3
"""Rows per value from which short texts are categories (fewer if their name says so), and queries have candidates."""


@dataclass(frozen=True)
class Column:
    name: str
    kind: Kind
    cells: tuple[Any, ...]
    """The first rows' cells, None if empty. Texts with lists or objects are parsed."""
    distinct: int
    flags: tuple[str, ...] = ()
    """The columns of 0 and 1 that are read as one."""

    @property
    def lower(self) -> str:
        return self.name.lower().strip()

    @property
    def repeats(self) -> float:
        return sum(cell is not None for cell in self.cells) / max(1, self.distinct)

    @property
    def mean_length(self) -> float:
        return sum(len(cell) for cell in self.cells if isinstance(cell, str)) / max(1, len(self.cells))

    @property
    def is_text(self) -> bool:
        return self.kind == "words" or (self.kind == "name" and self.lower in _TEXT_NAMES)

    @property
    def has_words(self) -> bool:
        """True for texts, and for lists of texts."""
        parts = [" " in part.strip() for cell in self.parts for part in cell] if self.kind == "list" else []
        return self.is_text or 3 * sum(parts) > len(parts)

    @cached_property
    def letters(self) -> list[str]:
        return [re.sub(r"[\W\d_]", "", str(cell or "").lower()) for cell in self.cells[:_COMPARED]]

    @cached_property
    def parts(self) -> list[list[str]]:
        """The items of each cell's list, or the words of its text."""
        return [
            [*map(str, cell if isinstance(cell, (list, tuple)) else str(cell or "").split())] for cell in self.cells
        ]


@dataclass(frozen=True)
class Reading:
    """A task that columns suit, with their roles."""

    task: TaskName
    roles: Mapping[str, str | tuple[str, ...]]
    """Role to column; for one label in each of several columns, to all of them."""
    reason: str = "as the columns are called"
    is_sure: bool = False
    """True if no other roles of the columns suit the task as well."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Further settings of `data`."""
    num_tags: int = 0
    """Number of tags that are numbers without names."""

    def block_settings(self, columns: Sequence[str]) -> dict[str, object]:
        """Return the settings of `data`, in a table with these columns."""
        settings: dict[str, object] = {**self.roles, **self.settings}
        settings |= {"tag_names": tuple(likely_tag_names(self.num_tags))} if self.num_tags else {}
        if not isinstance(flags := settings.get("label"), tuple):
            return settings
        return {**settings, "label": "labels" if "labels" not in columns else "all_labels", "label_columns": flags}

    def command(self, data: str, options: Sequence[str]) -> str:
        """Return the command that writes a recipe for this reading."""
        roles = {role: name if isinstance(name, tuple) else (name,) for role, name in self.roles.items()}
        words = ["fulltune", "init", data, "--task", self.task]
        words += [word for role, names in roles.items() for name in names for word in ("--column", f"{role}={name}")]
        words += ["--tag-names", ",".join(likely_tag_names(self.num_tags))] * bool(self.num_tags)
        return shlex.join([*words, *options])


def likely_tag_names(count: int) -> list[str]:
    """Return names for tags that are numbers: those of CoNLL 2003, if their number fits, or else placeholders."""
    kinds = ("PER", "ORG", "LOC", "MISC") if count == 9 else range(1, count)
    return ["O", *(f"{start}-{kind}" for kind in kinds for start in "BI")][:count]


# ---- what a column holds -----------------------------------------------------------------------------------------


def describe_columns(names: Sequence[str], rows: Sequence[Row]) -> list[Column]:
    """Describe each column, and the parts of objects as columns such as `translation.en`."""
    rows = [{**row, **dict(inner_cells(row))} for row in rows]
    columns = list[Column]()
    for name in dict.fromkeys([*names, *(name for row in rows for name in row)]):
        cells = tuple(None if is_empty(cell := row.get(name)) else parse_cell(cell) for row in rows)
        filled = [cell for cell in cells if cell is not None]
        distinct = len(set(map(str, filled)))
        columns.append(Column(name, _kind_of(name, filled, distinct), cells, distinct))
    if any(column.is_text for column in columns):
        return columns
    return [replace(column, kind="words" if column.kind == "name" else column.kind) for column in columns]


def _kind_of(name: str, filled: Sequence[object], distinct: int) -> Kind:
    first = filled[0] if filled else None
    if isinstance(first, (list, tuple)):
        parts = [part for cell in filled if isinstance(cell, (list, tuple)) for part in cell]
        if any(isinstance(part, Mapping) and {"role", "from"} & part.keys() for part in parts):
            return "messages"
        return "list" if parts and all(isinstance(part, (str, int, float)) for part in parts) else "object"
    if isinstance(first, (Mapping, bytes)):
        return "object" if isinstance(first, Mapping) and "bytes" not in first else "image"
    texts = [label_name(cell) for cell in filled]
    if {text.lower() for text in texts} in ({"0", "1"}, {"true", "false"}):
        return "flag"
    is_id = distinct > _FEW and _ID_NAME.search(name)
    if _CLASS_NAME.search(name) and distinct > 1 and len(texts) >= _REPEATS_OF_CLASSES * distinct:
        is_class = all(
            len(_WORD.findall(text)) < 4 and (not is_number(text) or float(text).is_integer()) for text in texts
        )
        if is_class:
            return "category"
    if distinct > 1 and all(map(is_number, texts)):
        numbers = [float(text) for text in texts]
        is_whole, is_counter = all(map(float.is_integer, numbers)), all(one < two for one, two in pairwise(numbers))
        if is_whole and distinct > 2 and (min(numbers) >= 1e8 or (min(numbers) >= 1800 and max(numbers) <= 2100)):
            return "date"
        if is_id or (is_whole and is_counter and distinct > 2):
            return "id"
        return "category" if is_whole and distinct <= _FEW else "number"
    return _kind_of_texts(texts, distinct, bool(is_id)) if distinct > 1 else "none"


def _kind_of_texts(texts: Sequence[str], distinct: int, is_id: bool) -> Kind:
    def are(matches: Callable[[str], object]) -> bool:
        return sum(map(bool, map(matches, texts))) >= 0.9 * len(texts)

    if are(lambda text: text.lower().endswith(tuple(IMAGE_SUFFIXES))):
        return "image"
    if are(_BIO.fullmatch) and any(" " in text for text in texts):
        return "tags"
    if are(_DATE.match):
        return "date"
    words, repeats = sum(len(_WORD.findall(text)) for text in texts) / len(texts), len(texts) / distinct
    is_long = words >= 4 or (words >= 2 and sum(map(len, texts)) > _LONG * len(texts))
    if is_long or (words >= 3 and repeats < 2 and are(re.compile(r"\s[a-z]").search)):  # names have capitals
        return "category" if distinct <= 2 * _FEW <= repeats and words <= 8 else "words"
    if repeats < 2 and (is_id or are(lambda text: re.fullmatch(r"\S*[\d/@_#-]\S*", text.strip()))):
        return "id"
    return "category" if repeats >= _REPEATS else "name"


def _labels(columns: Sequence[Column]) -> list[Column]:
    """Return the columns that may be labels, the likeliest first. Several of 0 and 1 are one, unless another is called
    a label."""
    lists = [column for column in columns if column.kind == "list" and _is_of_few(column)]
    usable = [one for one in columns if one.kind in LABEL_KINDS and one.lower not in _NAMES["not_labels"]]
    usable = [one for one in usable if 2 * one.repeats * one.distinct > len(one.cells)]
    flags = [one for one in usable if one.kind == "flag"]
    is_named = any(_rank_of_label(one)[0] < _UNNAMED for one in usable)
    if not is_named and len(flags) > 1 + any(one.kind == "category" for one in usable):
        zeros = [one for one in columns if one.kind == "none" and {*map(label_name, one.cells)} == {"0"}]
        names = tuple(one.name for one in columns if one in flags or one in zeros)
        return [*lists, Column(f"{names[0]} ...", "flags", flags[0].cells, 2, names)]
    return sorted([*lists, *usable], key=_rank_of_label)


def _rank_of_label(column: Column) -> tuple[int, bool]:
    """Return how little a name and the contents speak for a label."""
    names, parts = (*USUAL_NAMES["label"], *_NAMES["labels"]), re.split(r"[\W_]+", column.lower)
    if column.lower in names:
        return names.index(column.lower), False
    are_numbers = column.kind != "flag" and all(map(is_number, map(str, filter(None, column.cells))))
    is_of_lists = column.kind in ("list", "flags")
    named = _UNNAMED if parts[-1] in names or is_of_lists else 101 if set(parts) & set(names) else _UNKNOWN
    return named, are_numbers and not is_of_lists


def _is_of_few(column: Column) -> bool:
    parts = [part for cell in column.parts for part in cell]
    return len(set(parts)) > 1 and len(parts) >= _REPEATS * len(set(parts))


# ---- which tasks columns suit ------------------------------------------------------------------------------------

ByRole = Mapping[str, Column]


@dataclass(frozen=True)
class _Form:
    task: TaskName
    roles: str
    """Roles with the kinds of their columns, such as `text:text label:label`. A `text` may be short if its name is
    usual."""
    reason: str
    fits: str = "always"
    """Condition on contents and names, in `_FITS`."""


def list_readings(columns: Sequence[Column]) -> list[Reading]:
    """List the tasks that columns suit, the likeliest first."""
    return [reading for form in _FORMS for reading in _readings_of(form, columns)]


def _readings_of(form: _Form, columns: Sequence[Column]) -> Iterator[Reading]:
    """Yield the ways to give a form's roles to columns: those that leave the fewest texts, and then by names."""
    kinds = dict(part.split(":") for part in form.roles.split())
    fitting = list[tuple[tuple[int, int], dict[str, Column]]]()
    for assigned in product(*(_columns_of(columns, kind.split("|")) for kind in kinds.values())):
        by_role, used = dict(zip(kinds, assigned, strict=True)), [column.name for column in assigned]
        if len(set(used)) == len(used) and _FITS[form.fits](by_role, columns):
            rank = sum(_rank(role, column) for role, column in by_role.items())
            fitting.append(((len(leftover_texts(columns, used)), rank), by_role))
    fitting.sort(key=lambda fit: fit[0])
    for place, (score, by_role) in enumerate(fitting):
        yield _reading(form, by_role, is_sure=place == 0 and (len(fitting) == 1 or score < fitting[1][0]))


def _columns_of(columns: Sequence[Column], kinds: Sequence[str]) -> list[Column]:
    suitable = [one for one in columns if one.kind in kinds or ("text" in kinds and one.is_text)]
    return (_labels(columns) if kinds == ["label"] else suitable)[:_MOST_TRIED]


def _reading(form: _Form, by_role: ByRole, is_sure: bool) -> Reading:
    label, tags = by_role.get("label"), by_role.get("tags")
    settings, num_tags = dict[str, object](), 0
    if form.task == "text-classification" and label and label.kind in ("number", "list"):
        settings["problem_type"] = "regression" if label.kind == "number" else "multi_label"
    if label and "text_pair" not in by_role and _rank_of_label(label) == (_UNKNOWN, True):
        is_sure = False  # a number of unknown meaning beside a text is more often a count
    if tags and (numbers := [int(part) for cell in tags.parts for part in cell if part.isdigit()]):
        num_tags = max(numbers) + 1
    roles = {role: column.flags or column.name for role, column in by_role.items()}
    reason = form.reason.format(**{role: f"'{column.name}'" for role, column in by_role.items()})
    return Reading(form.task, roles, reason, is_sure, settings, num_tags)


def _rank(role: str, column: Column) -> int:
    if role == "label":
        return sum(_rank_of_label(column))
    of_pairs = [pair[role == "text_pair"] for pair in USUAL_PAIRS] if role in ("text", "text_pair") else []
    names = (*_NAMES.get(role, ()), *USUAL_NAMES[role], *CHOICE_NAMES.get(role, ()), *of_pairs)
    return names.index(column.lower) if column.lower in names else _UNNAMED


def leftover_texts(columns: Sequence[Column], used: Sequence[str]) -> list[str]:
    """Return the texts that a reading does not use, unless the columns that it uses contain them."""
    read = [column for column in columns if column.name in used]
    return [one.name for one in columns if one.has_words and one not in read and not _is_inside(one, read)]


def _is_inside(column: Column, others: Sequence[Column]) -> bool:
    inside = [any(text in other.letters[row] for other in others) for row, text in enumerate(column.letters)]
    return sum(inside) >= 0.9 * len(inside)


def _count_texts(columns: Sequence[Column]) -> int:
    return sum(column.is_text for column in columns)


def is_title(name: str) -> bool:
    return name.lower().strip() in _NAMES["titles"]


def _tags_each_word(by_role: ByRole, columns: Sequence[Column]) -> bool:
    cells, cells_of_tags = by_role["tokens"].parts, by_role["tags"].parts
    words, tags = ({part for cell in parts for part in cell} for parts in (cells, cells_of_tags))
    are_words = not any(" " in word or not word for word in words) and not all(map(str.isdigit, words))
    are_tags = all(map(str.isdigit, tags)) or all(map(_BIO.fullmatch, tags))
    return are_words and are_tags and [*map(len, cells)] == [*map(len, cells_of_tags)] and max(map(len, cells)) > 1


def _names_a_choice(by_role: ByRole, columns: Sequence[Column]) -> bool:
    """Return whether a label names one of a row's choices, as the task reads them."""
    task, rows = task_named("multiple-choice"), [dict[str, object]() for _ in columns[0].cells[:_COMPARED]]
    for column in columns:
        for row, cell in zip(rows, column.cells, strict=False):
            row[column.name] = cell
    block = DataBlock.model_validate({"train": "-", **{role: one.name for role, one in by_role.items()}})
    try:
        roles = task.find_columns([column.name for column in columns], rows, block, "")
    except DataError:
        return False
    about = [by_role[role] for role in ("context", "question") if role in by_role]
    is_twice = len(about) == 2 and (_is_inside(about[0], about[1:]) or _is_inside(about[1], about[:1]))
    if is_twice or {role for role in roles if role in USUAL_NAMES} != by_role.keys():
        return False
    texts = [choice_texts(row, Target("choice", roles)) for row in rows]
    right = [index_of_right_choice(row, roles, of_row) is not None for row, of_row in zip(rows, texts, strict=True)]
    words = [len(_WORD.findall(text)) > 1 for of_row in texts for text in of_row]
    return sum(right) >= 0.9 * len(rows) and min(map(len, texts)) > 1 and 3 * sum(words) > len(words)


def _answers_inside(by_role: ByRole, columns: Sequence[Column]) -> bool:
    """Return whether the context, the longest text, contains the answers."""
    question, context, answers = by_role["question"], by_role["context"], by_role["answers"]
    if question.mean_length > context.mean_length or is_title(question.name):
        return False
    if answers.kind == "object":
        return "answer_start" in str(answers.cells[:9])
    cells = [cell if isinstance(cell, (list, tuple)) else [cell] for cell in answers.cells]
    inside = [
        all(str(part) in str(text) for part in cell) for text, cell in zip(context.cells, cells, strict=True) if cell
    ]
    return answers.mean_length * 3 < context.mean_length and sum(inside) > 0.7 * len(cells)


def _is_called_positive(by_role: ByRole, columns: Sequence[Column]) -> bool:
    return by_role["positive"].lower in _NAMES["positive"] and not {"label", "score"} & {one.lower for one in columns}


def _has_candidates(by_role: ByRole, columns: Sequence[Column]) -> bool:
    """Return whether a query occurs again and again, with another text and 0 or 1, or a grade, each time."""
    query, text, label = by_role["query"], by_role["text"], by_role["label"]
    is_grade = label.kind == "flag" or label.lower in _NAMES["grades"]
    return is_grade and query.repeats >= _REPEATS > 2 * text.repeats and _count_texts(columns) == 2


def _grades_each(by_role: ByRole, columns: Sequence[Column]) -> bool:
    texts, grades = by_role["text"].parts, by_role["label"].parts
    are_grades = all(part.lower() in ("true", "false", *"01234") for cell in grades for part in cell)
    return are_grades and [*map(len, texts)] == [*map(len, grades)] and bool(_WORD.search(str(texts[:9])))


def _is_written(by_role: ByRole, columns: Sequence[Column]) -> bool:
    """Return whether names say what is written from what, and no column seems to be a label of it."""
    first, *_, last = by_role.values()
    are_named = all(_rank(role, column) < _UNNAMED for role, column in by_role.items())
    is_told = first.lower in _NAMES["told"] or not [one for one in _labels(columns) if one not in (first, last)]
    return are_named and is_told and (last.is_text or last.lower in _NAMES["written"])


def _are_in_order(by_role: ByRole, columns: Sequence[Column]) -> bool:
    """Return whether a text and its pair are in the usual order, a title last, or else in the table's."""
    first, second = by_role["text"], by_role["text_pair"]
    pair = (first.lower, second.lower)
    if pair in USUAL_PAIRS or pair[::-1] in USUAL_PAIRS or is_title(first.name) != is_title(second.name):
        return pair in USUAL_PAIRS or is_title(second.name)
    return columns.index(first) < columns.index(second)


_FITS: Mapping[str, Callable[[ByRole, Sequence[Column]], bool]] = {
    "always": lambda by_role, columns: True,
    "one text": lambda by_role, columns: _count_texts(columns) == 1,
    "two texts": lambda by_role, columns: _count_texts(columns) == 2,
    "tags each word": _tags_each_word,
    "label names a choice": _names_a_choice,
    "answers are in the context": _answers_inside,
    "called positive": _is_called_positive,
    "queries have candidates": _has_candidates,
    "grades for each text": _grades_each,
    "named and without labels": _is_written,
    "in order": _are_in_order,
}
_FORMS = tuple(_Form(**form) for form in _TABLE["forms"])
