"""What holds for every recipe of a task, known without torch: what it reads and writes, its settings, metrics, classes.

One place for recipe rules, plan and report, with its table in `tasks.toml`; the task's module has the same as `FACTS`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, TypeAdapter

from fulltune.text import did_you_mean


def _known(name: str) -> str:
    """The name of a task, if it has facts."""
    if name not in FACTS:
        hint = did_you_mean(name, list(FACTS))
        raise ValueError(f"expected one of {', '.join(FACTS)}, found '{name}'{f'; {hint}' if hint else ''}")
    return name


TaskName = Annotated[str, AfterValidator(_known)]
ProblemType = str
"""The name of a form."""
_SHARED = {
    "context": "passage",
    "prompt": "prompt",
    "messages": "question",
    "source": "source text",
    "choices": "question",
    "choice0": "question",
    "tokens": "sentence",
    "image": "image",
}
"""Role of a column to what rows of one group have in common; without any of them it is the text."""


@dataclass(frozen=True)
class Form:
    """What holds for all rows of one problem type; whoever would ask for the type asks for one of these instead."""

    name: ProblemType
    metrics: tuple[str, ...]
    """That can choose a checkpoint; the first is the default."""
    kind: str
    """The rows in words, for a report."""
    target: str = "label"
    """What the model shall give, in a word."""
    label: str = "label"
    """What is counted of each label: the tags of words mark entities."""
    row: str = "row"
    """What is counted: a context that is longer than the limit becomes several windows."""
    longest: str = "longest row"
    """What the longest number of tokens belongs to."""
    worst: str = "Wrong test rows with the highest loss"
    """The caption over the worst mistakes."""
    question: str = '"a text"'
    """What a model can be asked, as it stands behind `fulltune predict RUN`."""
    how_to_ask: str = ""
    """How a language model is asked, in a sentence."""
    majority: str = "majority class"
    """What always answering the most frequent target of the train rows is called."""
    answer: tuple[tuple[str, str], ...] = (("answer", "string"),)
    """The columns that an answer becomes in a file, and their types."""
    num_outputs: int | None = None
    """Logits of an item; None: one for each label."""
    is_number: bool = False
    """The target is a number; the head learns it in units of the train rows' spread."""
    is_calibrated: bool = False
    """Each row has one right class or choice, whose probability a temperature can correct."""
    has_classes: bool = False
    """Rows have labels that a linear probe can judge."""
    one_label: bool = False
    """A row has exactly one of the labels."""
    several_labels: bool = False
    """A row has any number of labels."""
    tags_words: bool = False
    """Each word of a row has a label."""
    row_shares: tuple[str, ...] = ()
    """Metrics that are shares of about as many things as there are rows."""
    has_windows: bool = False
    """A long row becomes several examples, whose answers are one."""
    reads_any_text: bool = False
    """A language model: its loss on any text can be measured."""
    is_raw_text: bool = False
    """Texts without a question: short ones may share a row, and none has an answer."""
    writes_answers: bool = False
    """A question and its answer, of which only the latter is trained."""

    @property
    def labels_rows(self) -> bool:
        """Whole rows have labels, each with a probability."""
        return self.one_label or self.several_labels

    @property
    def words(self) -> str:
        """The name as it is written in a sentence."""
        return self.name.replace("_", " ")


_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
FORMS: Mapping[ProblemType, Form] = TypeAdapter(dict[ProblemType, Form]).validate_python(
    {name: {"name": name, **given} for name, given in _TABLE["forms"].items()}
)
FROM_FILE = FORMS["span"].question
"""How a model is asked whose rows have several parts."""


@dataclass(frozen=True)
class TaskFacts:
    """Of one task."""

    auto_class: str
    """The model class, by its name in transformers."""
    models: str
    """What a model that has no such class lacks, and which ones to take: behind "a 'bert' model"."""
    hub: str
    """The task's name on the Hub: a model card's `pipeline_tag`."""
    data: tuple[str, ...]
    """The settings of `data` that not all tasks read, and that this one reads."""
    types: tuple[ProblemType, ...]
    """What its rows can be; the first one is what a plan without rows takes for granted."""
    length_cap: int
    """Upper bound of the default `max_length`, in tokens."""
    scored_by: Literal["classifiers", "tagging", "spans", "language"]
    """The module of `fulltune.evaluate` that scores its models and baselines."""
    other_metrics: tuple[str, ...] = ()
    """Metrics that choose nothing."""
    reads: Literal["text", "image"] = "text"
    writes: bool = False
    """The model writes text, token by token; every other model puts a head on what it has read."""
    has_classes: bool = False
    """Classes can have weights."""
    has_forms: bool = False
    """Rows of several problem types are trained alike, so that files of one run may differ in it."""
    other_models: tuple[str, ...] = ()
    """Types of models that have such a class and read or write otherwise, so that they are refused."""
    peft: str | None = None
    """What PEFT calls the task; None: it has no name, and wraps the model as any other."""

    @property
    def head_is_new(self) -> bool:
        """The head is missing in a pretrained checkpoint and starts at random."""
        return not self.writes

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics of the task."""
        return (*self.choosing, *self.other_metrics)

    @property
    def choosing(self) -> tuple[str, ...]:
        """Metrics that can choose a checkpoint, of rows of any type."""
        return tuple(dict.fromkeys(name for form in self.types for name in FORMS[form].metrics))


FACTS: Mapping[str, TaskFacts] = TypeAdapter(dict[str, TaskFacts]).validate_python(_TABLE["tasks"])
READ_BY: Mapping[str, tuple[str, ...]] = {
    setting: tuple(task for task, facts in FACTS.items() if setting in facts.data)
    for setting in dict.fromkeys(setting for facts in FACTS.values() for setting in facts.data)
}
"""Setting of `data` to the tasks that read it; every task reads all others."""


def greater_is_better(metric: str) -> bool:
    """Whether more of a metric is better."""
    return metric not in ("loss", "perplexity", "rmse")


def shared_by(columns: Collection[str]) -> str:
    """What rows of one group have in common, in a word, by the roles of their columns."""
    return next((word for role, word in _SHARED.items() if role in columns), "text")


def stands_in_train(columns: Collection[str], near: bool) -> str:
    """What is the matter with a test row that leaks: `text also stands in train`."""
    return f"{shared_by(columns)} also stands in train{' (equal, or nearly so)' if near else ''}"
