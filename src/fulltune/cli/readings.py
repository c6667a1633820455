"""What the columns of a table hold, and which tasks they suit. Contents decide; names break ties."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise, permutations
from typing import Any, Literal

from fulltune.data.readers.derived import inner_cells
from fulltune.data.readers.files import IMAGE_SUFFIXES
from fulltune.data.readers.text_files import is_number
from fulltune.errors import DataError
from fulltune.recipe.data import DataBlock
from fulltune.recipe.tasks import TaskName
from fulltune.tasks import Row, Target, task_named
from fulltune.tasks.columns import USUAL_NAMES, USUAL_PAIRS, find_usual_column, parse_cell
from fulltune.tasks.labels import is_empty, label_name
from fulltune.tasks.multiple_choice import choice_texts, index_of_right_choice
from fulltune.text import first_few

Kind = Literal[
    "words", "name", "category", "number", "flag", "id", "date", "image", "list", "tags", "object", "messages", "none"
]
"""`words` are texts, `name` short texts that differ; `none` means empty or the same value in every row."""
_WORD = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|[^\W\d_]+")
_ID_NAME = re.compile(
    r"(?:^|[\W_]|[pqdu])(?:id|ids|idx|ind|index|guid|uuid|uid|asin|url|link|hash|file_?name)\d*$|(?<=[a-z])I[dD]$"
)
_DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}\b|(?:[A-Z][a-z]{2,8},? ){1,2}\d{1,2},? [\d:]{4,}")
_BIO = re.compile(r"(?:O|[BI]-\S+)(?:\s+(?:O|[BI]-\S+))*")
LABEL_KINDS = ("category", "flag", "number")
_MOST_GRADES, _LONG = 10, 40
_REPEATS = 2.5
"""Rows per value from which short texts are categories, and queries have several candidates."""
_LABEL_NAMES = tuple(
    [
        "stars",
        "points",
        "star_rating",
        "emotion",
        "polarity",
        "verdict",
        "quality",
        "relevance",
        "grade",
        "gold",
        "answer",
        "clickbait",
        "toxic",
        "spam",
    ]
)
_NO_LABEL = frozenset(
    [
        "split",
        "lang",
        "language",
        "source",
        "subset",
        "dataset",
        "domain",
        "origin",
        "role",
        "user",
        "author",
        "country",
    ]
)
_TITLES = frozenset(("title", "headline", "subject", "summary", "heading"))
_GRADES = frozenset(("relevance", "relevant", "grade", "rel", "relevance_score", "rank", "judgment", "judgement"))
_TEXT_ROLES = ("text", "text_pair", "query", "positive", "negative", "prompt", "input", "completion", "context")
_TEXT_NAMES = frozenset(name for role in (*_TEXT_ROLES, "source", "target") for name in USUAL_NAMES[role])
_PROMPTS = (*USUAL_NAMES["prompt"], "inputs", "mr", "meaning_representation")
_COMPLETIONS = (*USUAL_NAMES["completion"], "outputs", "targets", "ref", "human_reference", "solution")


@dataclass(frozen=True)
class Column:
    name: str
    kind: Kind
    cells: tuple[Any, ...]
    """The first rows' cells, None if empty. Texts with lists or objects are parsed."""
    distinct: int
    mean_length: float
    """Mean number of characters of texts."""

    @property
    def lower(self) -> str:
        return self.name.lower().strip()

    @property
    def filled(self) -> list[Any]:
        return [cell for cell in self.cells if cell is not None]

    @property
    def repeats(self) -> float:
        return len(self.filled) / max(1, self.distinct)

    @property
    def is_text(self) -> bool:
        return self.kind == "words" or (self.kind == "name" and self.lower in _TEXT_NAMES)


@dataclass(frozen=True)
class Reading:
    """A task that columns suit, with their roles."""

    task: TaskName
    roles: Mapping[str, str | tuple[str, ...]]
    """Role to column; for one label in each of several columns, to all of them."""
    reason: str
    is_sure: bool = True
    """True if nothing speaks for another task or for other roles."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of `data`."""
    num_tags: int = 0
    """Number of tags that are numbers without names."""

    def block_settings(self, columns: Sequence[str]) -> dict[str, Any]:
        """Return the settings of `data` for this reading."""
        settings = {**self.roles, **self.settings}
        if not isinstance(flags := settings.get("label"), tuple):
            return settings
        return {**settings, "label": "labels" if "labels" not in columns else "all_labels", "label_columns": flags}

    def command(self, data: str, options: Sequence[str]) -> str:
        """Return the command that writes a recipe for this reading."""
        named = [(role, name) for role, name in self.roles.items() if role in USUAL_NAMES]
        each = [(role, one) for role, name in named for one in (name if isinstance(name, tuple) else (name,))]
        words = ["fulltune", "init", data, "--task", self.task]
        words += [word for role, name in each for word in ("--column", f"{role}={name}")]
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
    names = dict.fromkeys([*names, *(name for row in rows for name in row)])
    return [_describe_column(name, [row.get(name) for row in rows]) for name in names]


def _describe_column(name: str, values: Sequence[Any]) -> Column:
    cells = tuple(None if is_empty(value) else parse_cell(value) for value in values)
    filled = [cell for cell in cells if cell is not None]
    texts = [cell for cell in filled if isinstance(cell, str)]
    distinct = len(set(map(str, filled)))
    return Column(name, _kind_of(name, filled, distinct), cells, distinct, sum(map(len, texts)) / max(1, len(texts)))


def _kind_of(name: str, filled: Sequence[Any], distinct: int) -> Kind:
    first = filled[0] if filled else None
    if isinstance(first, (list, tuple)):
        parts = [part for cell in filled if isinstance(cell, (list, tuple)) for part in cell]
        if parts and all(isinstance(part, Mapping) for part in parts):
            return "messages" if any({"role", "from"} & part.keys() for part in parts) else "object"
        return "list" if parts and all(isinstance(part, (str, int, float)) for part in parts) else "object"
    if isinstance(first, Mapping):
        return "image" if "bytes" in first else "object"
    if isinstance(first, bytes):
        return "image"
    texts = [label_name(cell) for cell in filled]
    if {text.lower() for text in texts} in ({"0", "1"}, {"true", "false"}):
        return "flag"
    if distinct < 2:
        return "none"
    if texts and all(map(is_number, texts)):
        return _kind_of_numbers(name, texts, distinct)
    return _kind_of_texts(name, texts, distinct)


def _kind_of_numbers(name: str, texts: Sequence[str], distinct: int) -> Kind:
    numbers = [float(text) for text in texts]
    is_whole = all(number == round(number) for number in numbers)
    if is_whole and distinct > 2 and (min(numbers) >= 1e8 or all(1800 <= number <= 2100 for number in numbers)):
        return "date"
    is_counter = is_whole and len(numbers) > 2 and all(one < other for one, other in pairwise(numbers))
    if is_counter or (distinct > _MOST_GRADES and _ID_NAME.search(name.lower())):
        return "id"
    return "category" if is_whole and distinct <= _MOST_GRADES else "number"


def _kind_of_texts(name: str, texts: Sequence[str], distinct: int) -> Kind:
    def is_most(matching: Sequence[object]) -> bool:
        return sum(map(bool, matching)) >= 0.9 * len(texts)

    words, length = (sum(map(count, texts)) / len(texts) for count in (lambda text: len(_WORD.findall(text)), len))
    if is_most([text.lower().endswith(tuple(IMAGE_SUFFIXES)) for text in texts]):
        return "image"
    if is_most([_BIO.fullmatch(text) for text in texts]) and any(" " in text for text in texts):
        return "tags"
    if is_most([_DATE.match(text) for text in texts]):
        return "date"
    repeats, is_short = len(texts) / distinct, length <= _LONG and words < 4
    is_code = is_most([" " not in text.strip() and re.search(r"[\d/@_#-]", text) for text in texts])
    if repeats < 2 and (
        (is_code and not is_most([len(_WORD.findall(text)) > 3 for text in texts]))
        or (is_short and distinct > _MOST_GRADES and _ID_NAME.search(name))
    ):
        return "id"
    if is_short:
        return "category" if repeats >= _REPEATS else "name"
    return "category" if distinct <= 2 * _MOST_GRADES <= repeats and words <= 8 else "words"


# ---- which tasks columns suit ------------------------------------------------------------------------------------


def list_readings(columns: Sequence[Column]) -> list[Reading]:
    """List the tasks that columns suit, the likeliest first."""
    readings = list[Reading]()
    rows = [
        dict(zip((column.name for column in columns), cells, strict=True))
        for cells in zip(*(column.cells for column in columns), strict=True)
    ]
    texts = [column for column in columns if column.is_text]
    readings += _conversations(columns)
    readings += _tagged_words(columns)
    readings += _answers_in_contexts(columns, texts)
    readings += _choices(columns, rows)
    readings += _images(columns)
    readings += _matching_texts(columns, rows)
    readings += _ranked_candidates(columns, texts)
    classified, written = [*_classified(columns, texts)], [*_written(columns, texts)]
    names = {column.lower for column in columns}
    asks_to_write = written and written[0].is_sure and not ({"label", "labels"} & names)
    readings += [*written, *classified] if asks_to_write else [*classified, *written]
    if not classified and len(texts) == 1:
        readings.append(Reading("causal-lm", {"text": texts[0].name}, "the texts have no labels"))
    return readings


def leftover_texts(columns: Sequence[Column], used: Sequence[str]) -> list[str]:
    """Return the texts that a reading does not use, unless the columns that it uses contain them."""
    read = [column for column in columns if column.name in used]

    def is_contained(column: Column) -> bool:
        pairs = [(cell, [other.cells[place] for other in read]) for place, cell in enumerate(column.cells) if cell]
        return sum(_letters(cell) in _letters(others) for cell, others in pairs) >= 0.9 * len(pairs)

    return [one.name for one in columns if one.is_text and one.name not in used and not is_contained(one)]


def _letters(value: object) -> str:
    return "".join(_WORD.findall(str(value).lower()))


def _conversations(columns: Sequence[Column]) -> Iterator[Reading]:
    several = [column for column in columns if column.kind == "messages"]
    several.sort(key=lambda column: column.lower not in USUAL_NAMES["messages"])
    for column in several:
        yield Reading("causal-lm", {"messages": column.name}, f"'{column.name}' holds conversations")


def _tagged_words(columns: Sequence[Column]) -> Iterator[Reading]:
    """Yield pairs of columns whose cells are as long: words, and BIO tags or numbers."""
    tags = [one for one in columns if one.kind in ("list", "tags")]
    for of_tags in sorted(tags, key=lambda one: one.lower not in USUAL_NAMES["tags"]):
        sizes = [len(_parts(cell)) for cell in of_tags.cells]
        kinds = {str(part) for cell in of_tags.filled for part in _parts(cell)}
        are_numbers = all(kind.isdigit() for kind in kinds)
        if max(sizes, default=0) < 2 or not (are_numbers or all(_BIO.fullmatch(kind) for kind in kinds)):
            continue
        for words in columns:
            is_alike = words.kind in ("list", "words") and words is not of_tags
            if is_alike and [len(_parts(cell)) for cell in words.cells] == sizes and _WORD.search(str(words.filled)):
                if not all(str(part).isdigit() for cell in words.filled for part in _parts(cell)):
                    count = max(map(int, kinds)) + 1 if are_numbers else 0
                    reason = f"each word of '{words.name}' has a tag in '{of_tags.name}'" + (
                        ", a number: write the names of the tags, in the order of the numbers" if count else ""
                    )
                    roles = {"tokens": words.name, "tags": of_tags.name}
                    yield Reading("token-classification", roles, reason, not count, num_tags=count)


def _parts(cell: object) -> Sequence[Any]:
    return cell if isinstance(cell, (list, tuple)) else str(cell or "").split()


def _answers_in_contexts(columns: Sequence[Column], texts: Sequence[Column]) -> Iterator[Reading]:
    """Yield questions with texts that contain their answers."""
    for answers in columns:
        has_starts = answers.kind == "object" and "answer_start" in str(answers.filled[:1])
        if not has_starts and answers.kind not in ("name", "words", "category", "list"):
            continue
        for context in texts:
            others = [one for one in texts if one not in (context, answers) and one.lower not in _TITLES]
            named = [one for one in others if one.lower in USUAL_NAMES["question"]] or others
            is_longer = (
                answers.mean_length * 3 < context.mean_length > max((one.mean_length for one in named), default=0)
            )
            if len(named) == 1 and is_longer and (has_starts or _contains(context, answers)):
                roles = {"question": named[0].name, "context": context.name, "answers": answers.name}
                reason = f"the answers in '{answers.name}' occur in '{context.name}'"
                yield Reading("question-answering", roles, reason)


def _contains(context: Column, answers: Column) -> bool:
    pairs = [pair for pair in zip(context.cells, answers.cells, strict=True) if pair[1] not in (None, [])]
    inside = sum(
        all(str(part) in str(text) for part in (cell if isinstance(cell, (list, tuple)) else [cell]))
        for text, cell in pairs
    )
    return 2 * len(pairs) >= len(context.cells) and inside >= 0.8 * len(pairs)


def _choices(columns: Sequence[Column], rows: Sequence[Row]) -> Iterator[Reading]:
    """Yield lists of choices, or columns such as `ending0`, of which a label names one in each row."""
    names, task = [column.name for column in columns], task_named("multiple-choice")
    lists = [one for one in columns if one.kind in ("list", "object") and "." not in one.name]
    labels = [one for one in columns if one.kind in ("category", "flag", "number", "name", "words")]
    ways: list[dict[str, str]] = [{}]
    ways += [{"choices": one.name, "label": label.name} for one in lists for label in labels]
    for way in ways:
        try:
            roles = task.find_columns(names, rows[:100], DataBlock.model_validate({"train": "t", **way}), "")
        except DataError:
            continue
        target = Target("choice", roles)
        right = [index_of_right_choice(row, roles, choice_texts(row, target)) for row in rows]
        texts = [text for row in rows for text in choice_texts(row, target)]
        have_words = sum(len(_WORD.findall(text)) > 1 for text in texts) > len(texts) / 3
        is_usual = way == {} or not str(rows[0].get(roles["label"])).isdigit()
        if sum(one is not None for one in right) >= 0.9 * len(rows) and len(texts) >= 2 * len(rows):
            if have_words or is_usual:
                named = {role: name for role, name in roles.items() if role in DataBlock.model_fields}
                yield Reading("multiple-choice", named, f"'{roles['label']}' names the right choice")
                return


def _images(columns: Sequence[Column]) -> Iterator[Reading]:
    for image in columns:
        for label in _labels(columns)[:1] if image.kind == "image" else ():
            roles = {"image": image.name, "label": label.name}
            yield Reading("image-classification", roles, f"'{image.name}' holds images with labels in '{label.name}'")


def _matching_texts(columns: Sequence[Column], rows: Sequence[Row]) -> Iterator[Reading]:
    """Yield queries with texts that a name calls positive or negative."""
    names = [column.name for column in columns]
    if find_usual_column(("positive", "pos"), names, "") is None or find_usual_column(("label",), names, ""):
        return
    block = DataBlock(train="t")
    try:
        roles = task_named("embedding").find_columns(names, rows[:100], block, "")
    except DataError:
        return
    for task, what in (("embedding", "vectors of texts"), ("reranking", "scores of texts for a query")):
        yield Reading(task, roles, f"{what}: '{roles['positive']}' matches '{roles['query']}'")


def _ranked_candidates(columns: Sequence[Column], texts: Sequence[Column]) -> Iterator[Reading]:
    """Yield queries that occur again and again, with a text and 0 or 1 each, or with lists of both."""
    lists = [one for one in columns if one.kind == "list"]
    for candidates, label in permutations(lists, 2):
        is_graded = all(str(part).lower() in "01234truefalse" for cell in label.filled for part in _parts(cell))
        if is_graded and [len(_parts(one)) for one in candidates.cells] == [len(_parts(one)) for one in label.cells]:
            if len(texts) == 1 and _WORD.search(str(candidates.filled[:9])):
                yield _ranking(texts[0], candidates, label)
    if len(texts) != 2:
        return
    for label in _labels(columns):
        is_grade = label.kind == "flag" or label.lower in _GRADES
        for query, text in (texts, texts[::-1]):
            if is_grade and query.repeats >= _REPEATS and text.repeats < query.repeats / 2:
                yield _ranking(query, text, label)


def _ranking(query: Column, text: Column, label: Column) -> Reading:
    roles = {"query": query.name, "text": text.name, "label": label.name}
    reason = f"each '{query.name}' has several texts in '{text.name}', and '{label.name}' says which are right"
    return Reading("reranking", roles, reason)


def _labels(columns: Sequence[Column]) -> list[Column]:
    """Return the columns that may be labels, the likeliest first."""
    usable = [
        one
        for one in columns
        if one.kind in LABEL_KINDS and 2 * len(one.filled) > len(one.cells) and one.lower not in _NO_LABEL
    ]
    return sorted(usable, key=_label_rank)


def _label_rank(column: Column) -> tuple[int, bool]:
    """Return how much a name and the contents speak for a label; lower is likelier."""
    names = (*USUAL_NAMES["label"], *_LABEL_NAMES)
    parts = re.split(r"[\W_]+", column.lower)
    if column.lower in names:
        return names.index(column.lower), False
    return 100 if parts[-1] in names else 101 if set(parts) & set(names) else 102, column.kind == "number"


def _classified(columns: Sequence[Column], texts: Sequence[Column]) -> Iterator[Reading]:
    """Yield one text, or two, with each possible label; likeliest first."""
    labels = _labels(columns)
    flags = [one for one in labels if one.kind == "flag"]
    empty = [one for one in columns if one.kind == "none" and {label_name(cell) for cell in one.filled} == {"0"}]
    lists = [one for one in columns if one.kind == "list" and one.repeats >= 1 and _is_of_few(one)]
    label_sets: list[tuple[str | tuple[str, ...], str, bool, dict[str, Any]]] = []
    if lists and _WORD.search(str(texts and texts[0].filled[:1])):
        label_sets.append(
            (lists[0].name, f"lists of labels in '{lists[0].name}'", True, {"problem_type": "multi_label"})
        )
    is_named = bool(labels) and _label_rank(labels[0])[0] < 100
    if len(flags) > 1 and not is_named:
        every = tuple(one.name for one in columns if one in flags or one in empty)
        label_sets.append((every, f"0 or 1 for each of {len(every)} labels ({first_few(every, 2)})", True, {}))
    alike = [one for one in labels if _label_rank(one) == _label_rank(labels[0])]
    for label in labels:
        is_regression = label.kind == "number"
        what = f"{'the number' if is_regression else 'the label'} in '{label.name}'"
        is_unsure = len(alike) > 1 or (is_regression and _label_rank(label)[0] == 102 and len(texts) == 1)
        label_sets.append((label.name, what, not is_unsure, {"problem_type": "regression"} if is_regression else {}))
    for names, what, is_sure, settings in label_sets:
        for pair in _texts_to_read(texts):
            roles = dict(zip(("text", "text_pair"), (one.name for one in pair), strict=False))
            of = " and ".join(f"'{name}'" for name in roles.values())
            yield Reading("text-classification", {**roles, "label": names}, f"{what} of {of}", is_sure, settings)


def _is_of_few(column: Column) -> bool:
    parts = [str(part) for cell in column.filled for part in _parts(cell)]
    return len(set(parts)) > 1 and len(parts) >= _REPEATS * len(set(parts))


def _texts_to_read(texts: Sequence[Column]) -> list[tuple[Column, ...]]:
    """Return the one or two texts that a classifier reads. A title comes second; questions and premises, first."""
    if len(texts) < 2:
        return [tuple(texts)] * len(texts)
    usual = {pair: place for place, pair in enumerate(map(tuple, USUAL_PAIRS))}
    by_usual = sorted(permutations(texts, 2), key=lambda pair: usual.get((pair[0].lower, pair[1].lower), 99))
    if (by_usual[0][0].lower, by_usual[0][1].lower) in usual:
        return [by_usual[0]]
    pairs = [pair[:: -1 if is_title(pair[0].name) else 1] for pair in combinations(texts, 2)]
    return sorted(pairs, key=lambda pair: -sum(one.mean_length for one in pair))


def is_title(name: str) -> bool:
    return name.lower().strip() in _TITLES


def _written(columns: Sequence[Column], texts: Sequence[Column]) -> Iterator[Reading]:
    """Yield texts that a model may write from others."""
    languages = [one for one in texts if re.fullmatch(r".+\.[a-z]{2,3}([-_].*)?", one.name)]
    if len(languages) == 2 == len(texts):
        for one, other in (languages, languages[::-1]):
            reason = f"translates '{one.name}' to '{other.name}'"
            yield Reading("causal-lm", {"prompt": one.name, "completion": other.name}, reason, False)
        return
    by_lower = {one.lower: one for one in columns if one.kind in ("words", "name", "category", "none")}

    def named(names: Sequence[str], *others: Column | None) -> Column | None:
        return next((by_lower[name] for name in names if name in by_lower and by_lower[name] not in others), None)

    source = named(USUAL_NAMES["source"])
    target = named(USUAL_NAMES["target"][:3], source)
    prompt = named(("instruction", *_PROMPTS))
    completion = named(_COMPLETIONS, prompt)
    if source and target and {source, target} <= {*texts}:
        reason = f"writes '{target.name}' from '{source.name}'"
        yield Reading("seq2seq", {"source": source.name, "target": target.name}, reason)
        prompt, completion = source, target
    if prompt and completion and completion.is_text:
        more = named(USUAL_NAMES["input"], prompt, completion)
        roles = {"prompt": prompt.name, **({"input": more.name} if more else {}), "completion": completion.name}
        reason = f"writes '{completion.name}' from '{prompt.name}'"
        judged = [one for one in _labels(columns) if one not in (prompt, completion)]
        is_told = prompt.lower == "instruction" or prompt.lower in _PROMPTS[-3:] or not judged
        yield Reading("causal-lm", roles, reason, is_told)
    if len(texts) != 2:
        return
    if not (prompt and completion):
        for one, other in (texts, texts[::-1]):
            reason = f"writes '{other.name}' from '{one.name}'"
            yield Reading("causal-lm", {"prompt": one.name, "completion": other.name}, reason, False)
    first, second = (prompt, completion) if prompt in texts and completion in texts else texts
    assert first is not None
    assert second is not None
    reason = f"finds '{second.name}' for '{first.name}'"
    yield Reading("embedding", {"query": first.name, "positive": second.name}, reason, False)
