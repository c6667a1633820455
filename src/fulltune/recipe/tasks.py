"""What holds for every recipe of a task, known without torch: what it reads and writes, its settings, metrics, classes.

One place for recipe rules, plan and report; the task's module in `fulltune.tasks` has the same as its `FACTS`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

TaskName = Literal[
    "text-classification",
    "token-classification",
    "question-answering",
    "multiple-choice",
    "image-classification",
    "causal-lm",
    "seq2seq",
]
ProblemType = Literal[
    "single_label",
    "multi_label",
    "regression",
    "tags",
    "span",
    "choice",
    "text",
    "prompt_completion",
    "chat",
    "source_target",
]
LANGUAGE_MODELS: tuple[ProblemType, ...] = ("text", "prompt_completion", "chat")
"""What has a loss on any text."""
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
_CHOICES_OF_CLASSES = ("accuracy", "f1_macro", "mcc", "loss")
_OF_TOKENS = ("loss", "perplexity", "token_accuracy")
_OF_ANSWERS = ("exact_match", "rougeL", "chrf")


@dataclass(frozen=True)
class TaskFacts:
    """Of one task."""

    auto_class: str
    """The model class, by its name in transformers."""
    hub: str
    """The task's name on the Hub: a model card's `pipeline_tag`."""
    data: tuple[str, ...]
    """The settings of `data` that not all tasks read, and that this one reads."""
    choosing: Mapping[str, tuple[str, ...]]
    """Problem type to the metrics that can choose a checkpoint; the first is the default."""
    usual_type: ProblemType
    """The problem type that a plan without rows takes for granted."""
    length_cap: int
    """Upper bound of the default `max_length`, in tokens."""
    other_metrics: tuple[str, ...] = ()
    """Metrics that choose nothing."""
    reads: Literal["text", "image"] = "text"
    writes: bool = False
    """The model writes text, token by token; every other model puts a head on what it has read."""
    has_classes: bool = False
    """Classes can have weights."""
    has_forms: bool = False
    """Rows of several problem types are trained alike, so that files of one run may differ in it."""
    peft: str | None = None
    """What PEFT calls the task; None: it has no name, and wraps the model as any other."""

    @property
    def head_is_new(self) -> bool:
        """The head is missing in a pretrained checkpoint and starts at random."""
        return not self.writes

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics of the task."""
        return tuple(dict.fromkeys(name for names in (*self.choosing.values(), self.other_metrics) for name in names))


FACTS: Mapping[str, TaskFacts] = {
    "text-classification": TaskFacts(
        auto_class="AutoModelForSequenceClassification",
        hub="text-classification",
        data=("text", "text_pair", "label", "problem_type"),
        choosing={
            "single_label": _CHOICES_OF_CLASSES,
            "multi_label": ("f1_micro", "f1_macro", "accuracy", "loss"),
            "regression": ("spearman", "kendall", "r2", "rmse", "loss"),
        },
        usual_type="single_label",
        length_cap=512,
        has_classes=True,
        peft="SEQ_CLS",
    ),
    "token-classification": TaskFacts(
        auto_class="AutoModelForTokenClassification",
        hub="token-classification",
        data=("tokens", "tags"),
        choosing={"tags": ("f1", "precision", "recall", "accuracy", "loss")},
        other_metrics=("f1_macro",),
        usual_type="tags",
        length_cap=512,
        has_classes=True,
        peft="TOKEN_CLS",
    ),
    "question-answering": TaskFacts(
        auto_class="AutoModelForQuestionAnswering",
        hub="question-answering",
        data=("question", "context", "answers", "stride"),
        choosing={"span": ("f1", "exact_match", "loss")},
        usual_type="span",
        length_cap=384,
        peft="QUESTION_ANS",
    ),
    "multiple-choice": TaskFacts(
        auto_class="AutoModelForMultipleChoice",
        hub="multiple-choice",
        # Choices have one problem type, like images, and refuse the others in their own words.
        data=("label", "question", "context", "choices", "problem_type"),
        choosing={"choice": ("accuracy", "loss")},
        usual_type="choice",
        length_cap=512,
    ),
    "image-classification": TaskFacts(
        auto_class="AutoModelForImageClassification",
        hub="image-classification",
        data=("label", "image", "problem_type", "undecodable_images"),
        choosing={"single_label": _CHOICES_OF_CLASSES},
        usual_type="single_label",
        length_cap=2**20,  # images are never cut
        reads="image",
        has_classes=True,
    ),
    "causal-lm": TaskFacts(
        auto_class="AutoModelForCausalLM",
        hub="text-generation",
        data=("text", "prompt", "input", "completion", "messages", "tools", "chat_template"),
        choosing=dict.fromkeys(("text", "prompt_completion", "chat"), _OF_TOKENS),
        other_metrics=_OF_ANSWERS,
        usual_type="prompt_completion",
        length_cap=2048,
        writes=True,
        has_forms=True,
        peft="CAUSAL_LM",
    ),
    "seq2seq": TaskFacts(
        auto_class="AutoModelForSeq2SeqLM",
        hub="text2text-generation",
        data=("source", "target", "source_prefix"),
        choosing={"source_target": _OF_TOKENS},
        other_metrics=(*_OF_ANSWERS, "bleu"),
        usual_type="source_target",
        length_cap=1024,
        writes=True,
        peft="SEQ_2_SEQ_LM",
    ),
}
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
    """What is the matter with a test row that leaks: `text also stands in train`.

    Args:
        columns: The roles of the rows' columns.
        near: Texts that are nearly equal count.
    """
    return f"{shared_by(columns)} also stands in train{' (equal, or nearly so)' if near else ''}"
