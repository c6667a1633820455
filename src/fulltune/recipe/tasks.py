"""Facts of each task, known without torch. The table is `tasks.toml`; a task's module has its row as `FACTS`."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, TypeAdapter

from fulltune.text import did_you_mean


def _known(name: str) -> str:
    if name not in FACTS:
        hint = did_you_mean(name, list(FACTS))
        raise ValueError(f"expected one of {', '.join(FACTS)}, found '{name}'{f'; {hint}' if hint else ''}")
    return name


TaskName = Annotated[str, AfterValidator(_known)]
ProblemType = str
"""Name of a form."""
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
"""Content that rows of a group share, by the role of its column; otherwise the text."""


@dataclass(frozen=True)
class Form:
    """Facts of all rows of one problem type. Code asks for a fact, not for the type."""

    name: ProblemType
    metrics: tuple[str, ...]
    """Metrics that can choose a checkpoint, the default first."""
    kind: str
    """The rows in words."""
    target: str = "label"
    """Word for what the model predicts."""
    label: str = "label"
    """Word for what is counted per label."""
    row: str = "row"
    """Word for what is counted: a long context becomes several windows."""
    longest: str = "longest row"
    """Word for what `max_length` limits."""
    worst: str = "Wrong test rows with the highest loss"
    """Title of the worst mistakes."""
    question: str = '"a text"'
    """Example question for `fulltune predict RUN`."""
    how_to_ask: str = ""
    """How to ask the language model, in a sentence."""
    majority: str = "majority class"
    """Name of the baseline that always predicts the most frequent target."""
    answer: tuple[tuple[str, str], ...] = (("answer", "string"),)
    """Columns of an answer in a file, with their types."""
    num_outputs: int | None = None
    """Logits per item; None for one per label."""
    is_number: bool = False
    """The target is a number, learned in units of its standard deviation."""
    is_calibrated: bool = False
    """A temperature can calibrate the probability of a row's only right label."""
    has_classes: bool = False
    """A linear probe can judge the labels."""
    one_label: bool = False
    several_labels: bool = False
    tags_words: bool = False
    """Each word has a label."""
    row_shares: tuple[str, ...] = ()
    """Metrics that are shares of about as many items as rows."""
    has_windows: bool = False
    """A long row becomes several examples with one answer."""
    reads_any_text: bool = False
    """A language model, whose loss on any text can be measured."""
    is_raw_text: bool = False
    """Texts without prompts; short ones may share a row."""
    writes_answers: bool = False
    """Only the answer to a prompt is trained."""

    @property
    def labels_rows(self) -> bool:
        """Whole rows have labels with probabilities."""
        return self.one_label or self.several_labels

    @property
    def words(self) -> str:
        return self.name.replace("_", " ")


_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
FORMS: Mapping[ProblemType, Form] = TypeAdapter(dict[ProblemType, Form]).validate_python(
    {name: {"name": name, **facts} for name, facts in _TABLE["forms"].items()}
)
FROM_FILE = FORMS["span"].question
"""How to ask a model whose rows have several parts."""


@dataclass(frozen=True)
class TaskFacts:
    """Facts of one task."""

    auto_class: str
    """Name of the model class in transformers."""
    models: str
    """What a model without that class lacks, after "a 'bert' model"."""
    hub: str
    """`pipeline_tag` on the Hub."""
    data: tuple[str, ...]
    """Settings of `data` that only some tasks read."""
    types: tuple[ProblemType, ...]
    """Problem types of its rows; a plan without rows assumes the first."""
    length_cap: int
    """Limit of the default `max_length`, in tokens."""
    scored_by: Literal["classifiers", "tagging", "spans", "language"]
    """Module of `fulltune.evaluate` that scores its models."""
    other_metrics: tuple[str, ...] = ()
    """Metrics that cannot choose a checkpoint."""
    reads: Literal["text", "image"] = "text"
    writes: bool = False
    """The model writes text; other models have a head."""
    has_classes: bool = False
    """The task has classes, which may have weights."""
    has_forms: bool = False
    """Rows of several problem types may be mixed."""
    other_models: tuple[str, ...] = ()
    """Model types that have the class but read or write differently."""
    peft: str | None = None
    """Task type in PEFT, if it has one."""

    @property
    def head_is_new(self) -> bool:
        """The head is missing in a pretrained checkpoint."""
        return not self.writes

    @property
    def metrics(self) -> tuple[str, ...]:
        return (*self.choosing, *self.other_metrics)

    @property
    def choosing(self) -> tuple[str, ...]:
        """Metrics that can choose a checkpoint."""
        return tuple(dict.fromkeys(name for form in self.types for name in FORMS[form].metrics))


FACTS: Mapping[str, TaskFacts] = TypeAdapter(dict[str, TaskFacts]).validate_python(_TABLE["tasks"])
READ_BY: Mapping[str, tuple[str, ...]] = {
    setting: tuple(task for task, facts in FACTS.items() if setting in facts.data)
    for setting in dict.fromkeys(setting for facts in FACTS.values() for setting in facts.data)
}
"""Tasks that read each setting of `data`; settings not listed are read by all."""


def greater_is_better(metric: str) -> bool:
    return metric not in ("loss", "perplexity", "rmse")


def shared_content(columns: Collection[str]) -> str:
    """Name what rows of a group share."""
    return next((word for role, word in _SHARED.items() if role in columns), "text")


ALSO_OCCURS = "also occurs in"
"""Words of each note on rows in two splits, by which comparisons find them."""


def leaked_content(columns: Collection[str], near: bool) -> str:
    """Describe a leaked test row, such as `text also occurs in train`."""
    return f"{shared_content(columns)} {ALSO_OCCURS} train{' (equal, or nearly so)' if near else ''}"
