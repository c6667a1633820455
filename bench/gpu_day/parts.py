"""The parts of the day, and pure functions that decide which of them run on a machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bench.gpu_day.here import Card, Here, in_gib, no_bf16, why_no_card

GIB = 2**30
How = Literal["card", "stand-in", "skip"]


@dataclass(frozen=True)
class Part:
    """A part of the day."""

    name: str
    title: str
    what: str
    """What the part shows, as a sentence for the page."""
    minutes: float
    """Minutes after which the part is stopped."""
    least_bytes: int
    """Card memory in bytes that the part needs at least."""
    alone: bool = False
    """Whether nothing else may use the card meanwhile."""
    cards: int = 1


PARTS = (
    Part("tests", "tests/gpu", "The tests that need a card.", 2.5, 2 * GIB),
    Part("selfcheck", "fulltune selfcheck", "Precision, attention kernels, memory, processes.", 2, GIB),
    Part("quickstart", "The quickstart", "The first command of the README.", 2, 3 * GIB),
    Part(
        "precision",
        "bf16 and fp16 against fp32",
        "The same training of a tiny model in each type: the largest difference of a step's loss as a share of the "
        "highest loss (25 % at most), and the accuracy at the end (90 % at least).",
        1.5,
        GIB,
    ),
    Part(
        "speed",
        "Speed against transformers and TRL",
        "All in turn on the same rows, in the same type, and the ratios within each repetition, above 1 where fulltune "
        "is faster. tuned: rows of similar length together.",
        3.5,
        8 * GIB,
        alone=True,
    ),
    Part(
        "memory",
        "Memory planned and measured",
        "Two whole steps of random weights. allocated and reserved are torch's peaks, outside is CUDA's context and "
        "what else the driver keeps. The plan's error is against reserved and outside together (-2 to +10 %); that of "
        "tensors leaves the planned context out, and is against allocated.",
        4,
        4 * GIB,
        alone=True,
    ),
    Part(
        "ladder",
        "Memory that runs out",
        "A plan that promises too much, under a limit that is enforced: the run must end well with fewer rows at once.",
        1.5,
        6 * GIB,
        alone=True,
    ),
    Part(
        "large",
        "1 B to 8 B parameters",
        "Random weights, a row of 512 tokens, recomputed activations. In 24 GB: by the plan, on an RTX 4090; those are "
        "held to 23.5 GiB while they are measured. host is the most that the process held there.",
        5.5,
        12 * GIB,
        alone=True,
    ),
    Part(
        "processes",
        "Two cards",
        "What NCCL adds up, and three steps in each placement: losses against one process, and the highest process's "
        "memory against the plan.",
        2,
        4 * GIB,
        alone=True,
        cards=2,
    ),
)
MINUTES = 25.0
STAND_IN_MINUTES = 5.0
"""Minutes for each part on a machine without a card."""
assert sum(part.minutes for part in PARTS) <= MINUTES


@dataclass(frozen=True)
class Decision:
    """Whether and how a part runs here."""

    part: Part
    how: How
    reason: str = ""
    """Why the part does not run on a card."""


def decide(here: Here) -> list[Decision]:
    """Decide how each part runs: on the card, on the CPU as a stand-in, or not at all, with the reason."""
    return [_decided(part, here) for part in PARTS]


def _decided(part: Part, here: Here) -> Decision:
    if not here.cards:
        return Decision(part, "stand-in", why_no_card(here))
    used = here.cards[: part.cards]
    reason = _too_few(part, here) or next((why for card in used if (why := _obstacle(part, card))), "")
    return Decision(part, "skip", reason) if reason else Decision(part, "card")


def _too_few(part: Part, here: Here) -> str:
    if len(here.cards) < part.cards:
        return f"needs {part.cards} cards, there is 1"
    kinds = list(dict.fromkeys(card.name for card in here.cards[: part.cards]))
    if len(kinds) > 1:
        return f"the cards are of different kinds ({', '.join(kinds)}): each step would wait for the slower one"
    return ""


def _obstacle(part: Part, card: Card) -> str:
    if part.least_bytes > card.memory_bytes:
        return f"needs {in_gib(part.least_bytes)} of memory, {card.name} has {in_gib(card.memory_bytes)}"
    if part.alone and card.is_shared:
        return f"another process holds {in_gib(card.used_bytes)} of {card.name}, which would blur what is measured"
    if part.least_bytes > card.free_bytes:
        return f"needs {in_gib(part.least_bytes)} of memory, {in_gib(card.free_bytes)} of {card.name} are free"
    return ""


def refused_precision(precision: str, here: Here) -> str:
    """Return why this precision is not used here; empty if it is."""
    if precision == "fp16" and not here.cards:
        return "fulltune refuses fp16 on a CPU, which would train in fp32 without a word"
    if precision == "bf16" and here.cards and not here.cards[0].bf16:
        return no_bf16(here.cards[0])
    return ""


def half_precision(here: Here) -> str:
    """Return the 16-bit precision of the first card, or bf16 on a CPU."""
    return "fp16" if refused_precision("bf16", here) else "bf16"


@dataclass(frozen=True)
class Wanted:
    """What a single measurement needs in addition to its part."""

    precision: str = "fp32"
    device_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0
    packages: tuple[str, ...] = ()


def obstacle(wanted: Wanted, here: Here) -> str:
    """Return why a single measurement is skipped on this card; empty if it is not."""
    if reason := refused_precision(wanted.precision, here):
        return reason
    missing = [name for name in wanted.packages if name not in here.packages]
    if missing:
        return f"{', '.join(missing)} not installed"
    card = here.cards[0]
    sizes = (
        (wanted.device_bytes, card.free_bytes, f"of {card.name}"),
        (wanted.host_bytes, here.host_bytes, "of the host's memory"),
        (wanted.disk_bytes, here.disk_bytes, "of the disk"),
    )
    short = [f"needs {in_gib(need)} {where}, {in_gib(free)} are free" for need, free, where in sizes if need > free]
    return "; ".join(short)
