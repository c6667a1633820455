"""Which method the field would take here: rules, whose sources stand in docs/evidence.md, never a law.

With the learning rate tuned for each method, full fine-tuning and its lighter relatives come out close on small and
medium sets, and apart on large ones and on what is far from pre-training. So a rule is where to start; a measurement on
one's own rows decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fulltune.records.survey import Advice

Goal = Literal["knowledge", "language", "style", "updates"]
GOALS: tuple[str, ...] = get_args(Goal)
FEW_ROWS, MANY_ROWS, MANY_TASKS = 10_000, 100_000, 5
SMALL_ENCODER = 500_000_000
LARGE = 10**10


@dataclass(frozen=True)
class Situation:
    """What the advice depends on; tasks, preserve and goal are things that data cannot tell."""

    train_rows: int
    num_parameters: int
    is_decoder: bool
    fits: bool
    """Full fine-tuning fits into the hardware."""
    lora_fits: bool | None = None
    """LoRA does; None: not asked."""
    own: str = "full"
    """Kind of the method that was planned: its ways out are shown where it does not fit."""
    tasks: int = 1
    """Models to be kept, one for each task or customer."""
    preserve: bool = False
    """What the model can do already must stay."""
    goal: Goal | None = None
    frozen_fits: bool = True
    """The model's weights alone fit in 16 bits."""


AdviceRule = tuple[Literal["take", "try", "leave"], str]
"""The verdict, and why."""


def advise(here: Situation) -> tuple[Advice, ...]:
    """One line for each method: take, try or leave, and the rule. Best first."""
    found = []
    methods: dict[Any, Callable[[Situation], Iterator[AdviceRule]]] = {
        "full fine-tuning": _full,
        "LoRA": _lora,
        "adapters": _adapters,
        "prompt tuning": _prompts,
    }
    for method, rules in methods.items():
        verdict, rule = next(rules(here))  # the first that applies
        found.append(Advice(method=method, verdict=verdict, rule=rule))
    return tuple(sorted(found, key=lambda one: ("take", "try", "leave").index(one.verdict)))


def _full(here: Situation) -> Iterator[AdviceRule]:
    if not here.fits:
        where = "see the ways out" if here.own == "full" else "for its ways out see its plan: --set method=full"
        yield "leave", f"it does not fit here; {where}"
    if here.tasks >= MANY_TASKS:
        size = 4 * here.num_parameters / 2**30
        yield "try", f"{here.tasks} tasks would be {here.tasks} whole models of {size:,.1f} GiB; one for all is one"
    if here.goal in ("knowledge", "language"):
        yield "take", f"new {here.goal} changes the weights in many directions"
    if here.goal == "updates":
        yield "take", "update after update, what low-rank updates add accumulates"
    if not here.is_decoder and here.num_parameters < SMALL_ENCODER:
        few = here.train_rows < FEW_ROWS
        with_seeds = ", but with few rows take several seeds" if few else ""
        yield "try" if few else "take", f"a small encoder: full is cheap{with_seeds}"
    if here.train_rows >= MANY_ROWS:
        yield "take", "100,000 rows or more, and it fits"
    if here.train_rows < FEW_ROWS:
        yield "try", "few rows: train longer than usual, at a low rate, with three seeds or more"
    yield "try", "between 10,000 and 100,000 rows full and LoRA come out close"


def _lora(here: Situation) -> Iterator[AdviceRule]:
    size, either = 2 * here.num_parameters / 2**30, "" if here.fits else " either"
    where = either or " on one device"
    if not here.frozen_fits:  # only full fine-tuning can be shared out
        yield "leave", f"its frozen weights alone are about {size:,.1f} GiB in 16 bits: they do not fit{where}"
    if here.lora_fits is False:
        yield "leave", f"it does not fit here{either}; see the ways out"
    if not here.fits:
        unsure = "" if here.lora_fits else ", if the activations fit as well"
        yield (
            "take",
            f"it trains where full does not fit{unsure}: its {size:,.1f} GiB of weights in 16 bits stay as they are",
        )
    if here.goal in ("knowledge", "language", "updates"):
        yield "try", f"only as the cheaper method: {here.goal} is where it falls behind"
    if here.goal == "style":
        yield "take", "style and format need little capacity"
    if here.preserve:
        yield (
            "try",
            "it forgot less at equal score on code and maths; a lower rate and old rows help full as well",
        )
    if here.is_decoder and here.train_rows < FEW_ROWS:
        yield "take", "few rows (below 10,000)"
    if here.train_rows >= MANY_ROWS:
        yield "try", "the cheaper method: all layers, rate tuned"
    yield "try", "two thirds of the operations, far less state"


def _adapters(here: Situation) -> Iterator[AdviceRule]:
    if here.tasks >= MANY_TASKS:
        yield "take", f"{here.tasks} tasks: one model and a small file for each"
    yield "leave", f"worth it with {MANY_TASKS} tasks or more"


def _prompts(here: Situation) -> Iterator[AdviceRule]:
    if here.num_parameters >= LARGE:
        yield "try", "on a par with full at about 11 B parameters, with prompts in every layer in smaller models too"
    yield (
        "leave",
        "far behind full below 1 B parameters, on a par at about 11 B; prompts in every layer come close",
    )
