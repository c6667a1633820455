from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, TypeAdapter

from fulltune.text import did_you_mean


def _raise_if_unknown_task(name: str) -> str:
    if name not in FACTS:
        hint = did_you_mean(name, list(FACTS))
        raise ValueError(f"expected one of {', '.join(FACTS)}, found '{name}'{f'; {hint}' if hint else ''}")
    return name


TEXT_CLASSIFICATION, TEXT_PAIRS = "text-classification", "text-pairs"
TaskName = Annotated[str, AfterValidator(_raise_if_unknown_task)]
ProblemType = str
"""Name of a `Form`, such as `single_label`."""
_SHARED_CONTENT = {
    "context": "passage",
    "prompt": "prompt",
    "messages": "question",
    "source": "source text",
    "choices": "question",
    "choice0": "question",
    "tokens": "sentence",
    "image": "image",
    "query": "query",
}
"""Noun for the content that the rows of a group share, by column role. The default is `text`."""


@dataclass(frozen=True)
class Form:
    """Facts about the rows of one problem type. Code should check these facts instead of comparing types."""

    name: ProblemType
    metrics: tuple[str, ...]
    """Metrics that can select a checkpoint, starting with the default."""
    kind: str
    of_one_class: tuple[str, ...] = ()
    """Further metrics that can do so, of the class `evaluate.positive_label` against the rest."""
    target: str = "label"
    label: str = "label"
    row: str = "row"
    longest: str = "longest row"
    worst: str = "Wrong test rows with the highest loss"
    """Title of the table of wrongly predicted rows."""
    question: str = '"a text"'
    how_to_ask: str = ""
    """Sentence that explains how to prompt the language model."""
    majority: str = "majority class"
    answer: tuple[tuple[str, str], ...] = (("answer", "string"),)
    """Column names and types of an answer file."""
    num_outputs: int | None = None
    """Number of logits per item, or None for one logit per label."""
    is_number: bool = False
    """True if the target is a number, which the model learns in units of its standard deviation."""
    is_calibrated: bool = False
    """True if each row has one right label, so that a temperature can calibrate its probability."""
    one_label: bool = False
    several_labels: bool = False
    like: str = ""
    """Name of the form whose linear probe also fits these rows."""
    tags_words: bool = False
    row_shares: tuple[str, ...] = ()
    """Metrics that are proportions of the rows or of a similar number of items."""
    has_windows: bool = False
    """True if a long row becomes several examples (windows) but gets one answer."""
    ranks_rows: bool = False
    """True if the rows of a query, whose labels are grades, are ranked among each other."""
    reads_any_text: bool = False
    """True if the model is a language model, whose loss can be measured on any text."""
    is_raw_text: bool = False
    """True if texts have no prompts. Short texts may then share a sequence."""
    writes_answers: bool = False
    """True if the loss covers only the answer to a prompt."""

    @property
    def labels_rows(self) -> bool:
        """True if whole rows (not words) have labels with probabilities."""
        return self.one_label or self.several_labels

    @property
    def probed_as(self) -> ProblemType:
        return self.like or self.name

    @property
    def words(self) -> str:
        return self.name.replace("_", " ")


_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
OF_ANSWERS: tuple[str, ...] = tuple(_TABLE["answer_metrics"])
"""Metrics that compare generated answers with the expected ones."""
FORMS: Mapping[ProblemType, Form] = TypeAdapter(dict[ProblemType, Form]).validate_python(
    {
        name: {"name": name, **facts, "metrics": facts["metrics"] + list(OF_ANSWERS) * facts.get("writes_answers", 0)}
        for name, facts in _TABLE["forms"].items()
    }
)
FROM_FILE = FORMS["span"].question


@dataclass(frozen=True)
class TaskFacts:
    auto_class: str
    models: str
    """Text that follows "a 'bert' model" in the error message for a model without `auto_class`."""
    hub: str
    data: tuple[str, ...]
    """Settings of `data` that this task reads but some others do not."""
    types: tuple[ProblemType, ...]
    """Problem types that the rows may have. If rows are unknown, plans assume the first."""
    length_cap: int
    scored_by: Literal["classifiers", "tagging", "spans", "language", "retrieval", "reranking"]
    """Module of `fulltune.evaluate` that scores this task's models."""
    other_metrics: tuple[str, ...] = ()
    reads: Literal["text", "image"] = "text"
    writes: bool = False
    """True if the model generates text instead of having a head."""
    reads_texts_apart: bool = False
    """True if the model turns each text of a row into a vector by itself."""
    contrasts: bool = False
    """True if a row's loss depends on the other rows of the global batch, and the model has no head."""
    completes_rows: bool = False
    """True if rows are completed with texts of other rows, as positives or negatives."""
    has_classes: bool = False
    has_forms: bool = False
    """True if one data set may mix rows of several problem types."""
    other_models: tuple[str, ...] = ()
    """Model types that have `auto_class` but need different inputs or outputs."""
    peft: str | None = None

    @property
    def head_is_new(self) -> bool:
        return not (self.writes or self.contrasts)

    @property
    def metrics(self) -> tuple[str, ...]:
        return (*self.choosing, *self.other_metrics)

    @property
    def choosing(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for one in self.types for name in FORMS[one].metrics + FORMS[one].of_one_class))


FACTS: Mapping[str, TaskFacts] = TypeAdapter(dict[str, TaskFacts]).validate_python(_TABLE["tasks"])
READ_BY: Mapping[str, tuple[str, ...]] = {
    setting: tuple(task for task, facts in FACTS.items() if setting in facts.data)
    for setting in dict.fromkeys(setting for facts in FACTS.values() for setting in facts.data)
}
"""Map settings of `data` to the tasks that read them. All tasks read settings that are not listed."""


def greater_is_better(metric: str, from_recipe: bool | None = None) -> bool:
    """Return a metric's direction. Only recipes with an own metric set it."""
    return metric not in ("loss", "perplexity", "rmse") if from_recipe is None else from_recipe


def compares_answers(metric: str) -> bool:
    """Return whether a language model's metric, perhaps the user's `module:function`, needs generated answers."""
    return metric in OF_ANSWERS or ":" in metric


def shared_content(columns: Collection[str]) -> str:
    return next((word for role, word in _SHARED_CONTENT.items() if role in columns), "text")


ALSO_OCCURS = "also occurs in"
"""Phrase that marks notes on rows in two splits, so that comparisons can find these notes."""


def leaked_content(columns: Collection[str], near: bool) -> str:
    return f"{shared_content(columns)} {ALSO_OCCURS} train{' (equal, or nearly so)' if near else ''}"
