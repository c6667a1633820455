from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from fulltune.recipe.model import NAME, Block, PlainSettings, raise_for_problems, validated_by

RESERVED_NAMES = ("footprint", "measured", "shapes", "survey")
"""Names that a method may not have, because other files in the run folder's `plan` use them."""


SEARCH: Literal["search"] = "search"


def _parse_rate(text: str) -> float:
    """Parse a learning rate between 0 and 1, or return 0 for `search`. Raise `ValueError` otherwise."""
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if text != SEARCH and not 0 < rate < 1:
        raise ValueError(f"expected a number above 0 and below 1, or {SEARCH}; found {text}")
    return rate


PROMPT_MODULE = "prompt_encoder"


class _MethodSettings(Block):
    """Base class of the method blocks."""

    name: str | None = Field(default=None, pattern=NAME)
    """Name of the method in tables and of its model folder. Default: the kind and the settings that are not defaults,
    such as `lora-r64`."""

    @model_validator(mode="after")
    def _raise_if_name_reserved(self) -> Self:
        if self.name is not None and self.name.lower() in RESERVED_NAMES:  # some file systems ignore case
            raise ValueError(f"name: '{self.name}' is reserved for a file of the run folder; choose another name")
        return self

    NAME_PARTS: ClassVar[Mapping[str, str]] = {}
    """Formats of settings in the method's name, such as `r{}` for the rank, unless they are defaults."""

    def name_parts(self) -> tuple[str, ...]:
        """Return non-default settings for the method's name, such as `r64`."""
        changed = self.model_dump(exclude_defaults=True)
        return tuple(form.format(changed[name]) for name, form in self.NAME_PARTS.items() if name in changed)

    @property
    def trains_all(self) -> bool:
        return False

    @property
    def label(self) -> str:
        return self.name or "-".join((str(getattr(self, "kind", "")), *self.name_parts()))


class _TrainedMethod(_MethodSettings):
    learning_rate: Annotated[float | Literal["search"], validated_by(_parse_rate)] | None = None
    """Peak learning rate, between 0 and 1. Default: depends on method, model family and size. `search` compares rates
    on the eval rows in short trials and whole runs, which takes 2 to 3.5 times as long as one run (more below 150
    steps)."""
    learning_rates: tuple[float, ...] | None = Field(default=None, min_length=1)
    """Learning rates to search. Default: three rates around the default learning rate."""
    head_learning_rate: float | None = Field(default=None, gt=0, lt=1)
    """Peak learning rate of the task's head and pooler. Default: `learning_rate`. This setting is refused for `kind:
    head` and for tasks without a new head."""
    head_init: Literal["probe", "random"] | None = None
    """Initial weights of a new head. `probe` (the default) takes a linear classifier fitted on the pretrained model's
    features. `random` draws random weights, whose first gradients distort the body. This setting is refused for
    tasks without a new head."""

    @model_validator(mode="after")
    def _rates_must_be_usable(self) -> _TrainedMethod:
        """Raise `ValueError` if the learning rates are out of range or contradict each other."""
        rates = self.learning_rates
        pairs = {
            "learning_rate and learning_rates are both set; remove one": (
                self.fixed_learning_rate is not None and rates is not None
            ),
            "learning_rates: a search needs at least two rates; write a single rate as learning_rate": (
                self.is_searched and rates is not None and len(rates) == 1
            ),
            "learning_rates: expected numbers above 0 and below 1": any(not 0 < rate < 1 for rate in rates or ()),
            "learning_rates: a rate is listed twice": len(set(rates or ())) != len(rates or ()),
        }
        raise_for_problems(pairs)
        return self

    @property
    def is_searched(self) -> bool:
        return self.learning_rate == SEARCH

    @property
    def fixed_learning_rate(self) -> float | None:
        """The recipe's learning rate, or None if the recipe sets none or searches for one."""
        return None if self.learning_rate == SEARCH else self.learning_rate


class FullMethod(_TrainedMethod):
    """Train every parameter that is not frozen."""

    kind: Literal["full"]
    """Every parameter is trained, except those that match `freeze`."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters to leave unchanged, such as `["embeddings", "encoder.layer.[0-3]"]`. A pattern matches if
    its parts, separated by dots, match successive parts of a parameter's name, where `*` is any text within a part.
    Tied weights are frozen together. Frozen parameters need no gradients or optimizer state. The whole model is
    saved."""
    layerwise_lr_decay: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of each layer relative to the layer above, where 1 means the same rate everywhere. 0.8 to 0.95 can
    help encoders with few rows and a random head, but did not help heads initialised from a linear probe."""
    train: PlainSettings = Field(default_factory=dict)
    """Changes to the `train` block for this method of a comparison, such as `{label_smoothing_factor: 0.1}`, to measure
    their effect. The first `full` without `freeze` is the reference."""

    @property
    def trains_all(self) -> bool:
        return not self.freeze

    def name_parts(self) -> tuple[str, ...]:
        """Return the frozen parts for the method's name, such as `freeze-embeddings`."""
        names = [re.sub("[^A-Za-z0-9]+", "_", pattern).strip("_") for pattern in self.freeze]
        return (f"freeze-{'-'.join(names)}"[:60].strip("-_"),) if names else ()


class HeadMethod(_TrainedMethod):
    """Train the task's head on a frozen body."""

    kind: Literal["head"]
    """Only the task's head is trained."""


class LoraMethod(_TrainedMethod):
    """Train low-rank updates of frozen matrices (Hu et al. 2021) and the task's head."""

    kind: Literal["lora"]
    """Two low-rank matrices are trained alongside each frozen matrix."""
    rank: int = Field(default=16, ge=1)
    """Rank of the updates."""
    alpha: float | None = Field(default=None, gt=0)
    """Updates are scaled by alpha / rank. Default: twice the rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability on the input of the updates."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), so that high ranks do not learn more slowly (Kalajdzievski 2023)."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Matrices to update, given by the ends of their names, such as `[q_proj, v_proj]`. `all-linear` means all matrices
    except the head's. Updating only the attention is known to be worse."""
    NAME_PARTS: ClassVar = {"rank": "r{}", "alpha": "a{:g}", "dropout": "d{:g}", "rslora": "rs"}

    def name_parts(self) -> tuple[str, ...]:
        """Return non-default settings for the method's name, such as `r64`."""
        names = () if self.target_modules == "all-linear" else self.target_modules
        parts = [part for part in super().name_parts() if part != f"a{2 * self.rank}"]  # the default of alpha
        return (*parts, *(name.replace(".", "_") for name in names))

    @model_validator(mode="after")
    def _raise_if_no_target_modules(self) -> LoraMethod:
        if not self.target_modules or not all(self.target_modules):
            raise ValueError("target_modules: no matrix is listed; write all-linear, or names such as [q_proj, v_proj]")
        return self


class AdapterMethod(_TrainedMethod):
    """Train bottleneck layers inside the frozen body (Houlsby et al. 2019), the body's layer norms and the task's
    head."""

    kind: Literal["adapter"]
    """A bottleneck is trained after the attention and the feed-forward part of each layer."""
    reduction_factor: int = Field(default=16, ge=1)
    """Hidden size divided by the size of the bottleneck."""
    non_linearity: Literal["relu", "gelu"] = "gelu"
    """Activation function of the bottleneck."""
    NAME_PARTS: ClassVar = {"reduction_factor": "f{}", "non_linearity": "{}"}


class PromptMethod(_TrainedMethod):
    """Train virtual tokens before each text (Lester et al. 2021) and the task's head."""

    kind: Literal["prompt"]
    """Trained vectors are placed before each text, which leaves less of `data.max_length` for the text."""
    num_virtual_tokens: int = Field(default=20, ge=1)
    """Number of virtual tokens."""
    init: Literal["vocabulary", "random"] = "vocabulary"
    """Initial values of the virtual tokens. `vocabulary` copies the vectors of random tokens, and `random` draws
    numbers of similar size."""
    NAME_PARTS: ClassVar = {"num_virtual_tokens": "{}", "init": "{}"}


class PeftMethod(_TrainedMethod):
    """Train the task's head and the parameters that another PEFT method adds to the layers."""

    kind: Literal["peft"]
    """A method of the PEFT library is trained."""
    type: str = Field(min_length=1)
    """Name of the method in PEFT, such as `IA3`, `LOHA`, `OFT` or `VERA`."""
    config: PlainSettings = Field(default_factory=dict)
    """Fields of the method's PEFT config."""

    def name_parts(self) -> tuple[str, ...]:
        return (self.type.lower(),)


class BaseMethod(_MethodSettings):
    """Score the pretrained model without training it, for comparison."""

    kind: Literal["base"]
    """For language models, the pretrained model is scored; for classifiers, a baseline that always predicts the most
    frequent class."""


Method = Annotated[
    FullMethod | HeadMethod | LoraMethod | AdapterMethod | PromptMethod | PeftMethod, Field(discriminator="kind")
]
ComparedMethod = Annotated[
    FullMethod | HeadMethod | LoraMethod | AdapterMethod | PromptMethod | PeftMethod | BaseMethod,
    Field(discriminator="kind"),
]


def usual_methods(own: Method, has_new_head: bool) -> tuple[ComparedMethod, ...]:
    """Return the methods to compare by default: full, a new head, LoRA, and a recipe's `own`."""
    own = own.model_copy(update={"learning_rate": own.fixed_learning_rate})  # a comparison always searches
    head: tuple[ComparedMethod, ...] = (HeadMethod(kind="head"),) * has_new_head
    usual = (FullMethod(kind="full"), *head, LoraMethod(kind="lora"))
    if own.trains_all or own.kind in ("head", "lora"):
        return tuple(own if method.kind == own.kind else method for method in usual)
    return (*usual, own)


MethodKind = Literal["base", "head", "full", "variant", "lora", "adapter", "prompt", "peft"]
"""Kinds of compared methods. A `variant` is any `full` with frozen parameters, or after the first one."""
VARIANT: MethodKind = "variant"
RIVALS = ("lora", "adapter", "prompt", "peft", VARIANT)
