"""The kinds of `method`: each a block with the settings of its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from fulltune.recipe.model import NAME, Block, read_by, refuse

TAKEN = ("footprint", "measured", "shapes", "survey")
"""What a method must not be called: its plan would lie where the run folder's `plan` has another file."""


SEARCH: Literal["search"] = "search"
"""A learning rate that is to be found."""


def _parse_rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if text != SEARCH and not 0 < rate < 1:
        raise ValueError(f"expected a number above 0 and below 1, or {SEARCH}; found {text}")
    return rate


PROMPT_MODULE = "prompt_encoder"
"""Name of the module with a model's virtual tokens."""


class _Named(Block):
    """What every method has."""

    name: str | None = Field(default=None, pattern=NAME)
    """Name of the model's folder and of the method in tables. Left out: the kind and what differs from its usual
    settings, such as `lora-r64`."""

    @model_validator(mode="after")
    def _name_must_be_free(self) -> Self:
        if self.name is not None and self.name.lower() in TAKEN:  # some file systems do not tell capitals
            raise ValueError(f"name: '{self.name}' is the name of another file of the run folder; take another name")
        return self

    def differences(self) -> tuple[str, ...]:
        """What tells this method apart from one of the same kind with its usual settings."""
        return ()

    @property
    def label(self) -> str:
        """The name of the method: of its folder, its trials and its row in tables."""
        return self.name or "-".join((str(getattr(self, "kind", "")), *self.differences()))


class _Trained(_Named):
    """What every method that trains has."""

    learning_rate: Annotated[float | Literal["search"], read_by(_parse_rate)] | None = None
    """Peak learning rate, above 0 and below 1. Left out, chosen by method, model family and size. search: found by
    short trials and whole runs on the eval rows, in two to three and a half times the time of a run, or more where
    it has fewer than 150 steps."""
    learning_rates: tuple[float, ...] | None = Field(default=None, min_length=1)
    """Grid of a rate search. Left out: three rates around the usual one."""
    head_learning_rate: float | None = Field(default=None, gt=0, lt=1)
    """Peak learning rate of the task's head and its pooler; everything else keeps `learning_rate`, also in a rate
    search. Left out: the same. Not for `head`, which trains nothing else, nor for tasks without a new head."""
    head_init: Literal["probe", "random"] | None = None
    """Where a new head starts. probe: at the linear classifier that scikit-learn finds on the untouched model; random:
    at random numbers, which drag the body away in the first steps. Left out: probe. Not for tasks without a new
    head."""

    @model_validator(mode="after")
    def _rates_must_be_usable(self) -> _Trained:
        rates = self.learning_rates
        pairs = {
            "learning_rate and learning_rates are both given; remove one": (
                self.fixed_learning_rate is not None and rates is not None
            ),
            "learning_rates: a search needs two or more; write the one as learning_rate": (
                self.is_searched and rates is not None and len(rates) == 1
            ),
            "learning_rates: expected numbers above 0 and below 1": any(not 0 < rate < 1 for rate in rates or ()),
            "learning_rates: names a rate twice": len(set(rates or ())) != len(rates or ()),
        }
        refuse(pairs)
        return self

    @property
    def is_searched(self) -> bool:
        """The rate is to be found by a search."""
        return self.learning_rate == SEARCH

    @property
    def fixed_learning_rate(self) -> float | None:
        """The rate that the recipe gives; None: it is chosen, or searched."""
        return None if self.learning_rate == SEARCH else self.learning_rate


class FullMethod(_Trained):
    """Train every parameter."""

    kind: Literal["full"]
    """full: every parameter is trained."""
    layerwise_lr_decay: float = Field(default=1.0, gt=0, le=1)
    """Each layer below the head learns this much slower than the one above it. 0.8 to 0.95 can help encoders with few
    rows whose head starts at random; from a linear probe 0.8 and 0.9 gained nothing (docs/quality.md). 1: the same rate
    everywhere."""
    train: dict[str, Any] = Field(default_factory=dict)
    """In a comparison, settings that differ from the recipe's block `train`, such as
    `{label_smoothing_factor: 0.1}`: does it help here? The first `full` is what the others are compared with."""


class HeadMethod(_Trained):
    """Train the task's head on a frozen body."""

    kind: Literal["head"]
    """head: the task's head is trained, and nothing below it."""


class LoraMethod(_Trained):
    """Train low-rank updates of frozen matrices (Hu et al. 2021), and the task's head."""

    kind: Literal["lora"]
    """lora: two thin matrices beside each chosen one."""
    rank: int = Field(default=16, ge=1)
    """Rank of the updates."""
    alpha: float | None = Field(default=None, gt=0)
    """The update is scaled by alpha / rank. Left out: twice the rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the thin matrices."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), so that high ranks do not learn slower (Kalajdzievski 2023)."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Matrices that get an update, by the ends of their names, such as `[q_proj, v_proj]`. all-linear: all but the
    head; attention alone is known to lose."""

    def differences(self) -> tuple[str, ...]:
        names = () if self.target_modules == "all-linear" else self.target_modules
        return (
            *((f"r{self.rank}",) if self.rank != 16 else ()),
            *((f"a{self.alpha:g}",) if self.alpha not in (None, 2 * self.rank) else ()),
            *((f"d{self.dropout:g}",) if self.dropout else ()),
            *(("rs",) if self.rslora else ()),
            *(name.replace(".", "_") for name in names),
        )

    @model_validator(mode="after")
    def _must_have_targets(self) -> LoraMethod:
        if not self.target_modules or not all(self.target_modules):
            raise ValueError("target_modules: names no matrix; write all-linear, or names such as [q_proj, v_proj]")
        return self


class AdapterMethod(_Trained):
    """Train small bottlenecks inside a frozen body (Houlsby et al. 2019), its layer norms and the task's head."""

    kind: Literal["adapter"]
    """adapter: a bottleneck after attention and one after the feed-forward part of each layer."""
    reduction_factor: int = Field(default=16, ge=1)
    """The bottleneck is the hidden size divided by it."""
    non_linearity: Literal["relu", "gelu"] = "gelu"
    """Between its two matrices."""

    def differences(self) -> tuple[str, ...]:
        return (
            *((f"f{self.reduction_factor}",) if self.reduction_factor != 16 else ()),
            *((self.non_linearity,) if self.non_linearity != "gelu" else ()),
        )


class PromptMethod(_Trained):
    """Train virtual tokens before each text (Lester et al. 2021), and the task's head."""

    kind: Literal["prompt"]
    """prompt: vectors in front of the text's own, which are taken off `data.max_length`."""
    num_virtual_tokens: int = Field(default=20, ge=1)
    """How many of them."""
    init: Literal["vocabulary", "random"] = "vocabulary"
    """What they start as: the vectors of tokens drawn from the vocabulary, or random numbers of their size."""

    def differences(self) -> tuple[str, ...]:
        return (
            *((str(self.num_virtual_tokens),) if self.num_virtual_tokens != 20 else ()),
            *((self.init,) if self.init != "vocabulary" else ()),
        )


class PeftMethod(_Trained):
    """Train whatever another method of PEFT puts into the model's layers, and the task's head."""

    kind: Literal["peft"]
    """peft: any method of the library PEFT that changes layers."""
    type: str = Field(min_length=1)
    """Its name in PEFT, such as `IA3`, `LOHA`, `OFT` or `VERA`."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of its config in PEFT."""

    def differences(self) -> tuple[str, ...]:
        return (self.type.lower(),)


class BaseMethod(_Named):
    """Train nothing: the model as it is, scored like the others."""

    kind: Literal["base"]
    """base: untouched; language models are asked as they are, classifiers answer with the most frequent class."""


Method = Annotated[
    FullMethod | HeadMethod | LoraMethod | AdapterMethod | PromptMethod | PeftMethod, Field(discriminator="kind")
]
"""How the parameters of a run are trained."""
ComparedMethod = Annotated[
    FullMethod | HeadMethod | LoraMethod | AdapterMethod | PromptMethod | PeftMethod | BaseMethod,
    Field(discriminator="kind"),
]
"""What a comparison compares."""
MethodKind = Literal["base", "head", "full", "variant", "lora", "adapter", "prompt", "peft"]
"""What a comparison takes a method for. `variant`: full fine-tuning with other settings than its first `full` has."""
VARIANT: MethodKind = "variant"
RIVALS = ("lora", "adapter", "prompt", "peft", VARIANT)
"""Kinds that full fine-tuning is compared with. `base` and `head` decide nothing: nobody doubts that training more than
a head helps, but how much is worth seeing."""
