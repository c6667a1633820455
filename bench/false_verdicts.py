"""How often a comparison's verdict is wrong: a method against itself (A/A), and planted differences.

A/A: the same method with other seeds on each side; FULL or PEFT is wrong. Planted: one side is worse by twice the
difference that 80 of 100 of these comparisons would have called (at least the margin); right is the verdict that names
the better one. Each also with the sequential rule, which looks at development rows after each seed, and with three
rivals of full instead of one.

The trials are simulated: rows differ in difficulty (right with a probability drawn from a beta distribution: 90 %
right on average, two seeds disagree on 10 %), and seeds differ by a normal number in their share of right rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from bench.results import Figure
from bench.runs import SMOKE, Records, script

from fulltune.compare.sequential import WAITING_SHARE, plan_next_seeds
from fulltune.compare.verdict import MethodOutputs, Terms, decide_verdict
from fulltune.recipe.methods import MethodKind
from fulltune.records.comparison import Decision, Difference
from fulltune.stats import bootstrap
from fulltune.stats.bootstrap import ResamplableMetric, find_metric
from fulltune.tasks import Target

ACCURACY, DISCORDANCE = 0.9, 0.1
SAMPLES = 1000
MARGIN = 0.01
Trials = tuple[np.ndarray, ...]
"""Right rows of each method, full first: [seeds, rows] each."""
Source = Callable[[np.random.Generator, int, Sequence[float]], tuple[Trials, Trials]]
"""From a generator, seeds, and how much worse each method is made, to development and test rows."""


@dataclass(frozen=True)
class Rates:
    """Shares of a number of comparisons."""

    wrong: float
    """That end with FULL or PEFT."""
    right: float
    """That name the better side."""
    seeds: float
    """Seeds of each method, on average."""
    detectable: float
    """A difference that 80 % of them would have called."""


def difficulty(chance: np.random.Generator, rows: int) -> np.ndarray:
    """Each row's probability of being right: two seeds disagree on `DISCORDANCE` of the rows on average."""
    ratio = DISCORDANCE / 2 / (ACCURACY * (1 - ACCURACY))
    total = ratio / (1 - ratio)
    return chance.beta(ACCURACY * total, (1 - ACCURACY) * total, rows)


def shifted(chance: np.random.Generator, right: np.ndarray, shift: float) -> np.ndarray:
    """More or fewer right rows, `shift` of all rows on average."""
    if shift > 0:
        return right | (chance.random(len(right)) < min(1.0, shift / (1 - ACCURACY)))
    return right & (chance.random(len(right)) >= min(1.0, -shift / ACCURACY))


def simulated(rows: int, seed_sd: float) -> Source:
    def source(chance: np.random.Generator, seeds: int, worse: Sequence[float]) -> tuple[Trials, Trials]:
        # A seed makes a model better or worse on development and test rows alike.
        effects = chance.normal(0, seed_sd, (len(worse), seeds)) - np.array(worse)[:, None]

        def split() -> Trials:
            easy = difficulty(chance, rows)
            return tuple(
                np.stack([shifted(chance, chance.random(rows) < easy, float(effect)) for effect in method])
                for method in effects
            )

        return split(), split()

    return source


def outputs(trials: Sequence[np.ndarray]) -> list[MethodOutputs]:
    names = ["full", *(f"rival{number}" for number in range(1, len(trials)))]
    rivals: list[MethodKind] = ["lora"] * (len(trials) - 1)
    kinds: list[MethodKind] = ["full", *rivals]
    methods = []
    for name, kind, right, cost in zip(names, kinds, trials, [2.0, *([1.0] * (len(trials) - 1))], strict=True):
        items = [
            {"labels": np.ones(len(row), np.int64), "logits": np.stack([~row, row], axis=1).astype(float)}
            for row in right
        ]
        share = WAITING_SHARE if len(right) < len(trials[0]) else 1.0
        methods.append(MethodOutputs(name, kind, items, cost, alpha_share=share))
    return methods


def compare_once(trials: Sequence[np.ndarray], measure: ResamplableMetric, alpha: float) -> Decision:
    compared = outputs(trials)
    drawn = bootstrap.resample_trials(measure, [method.trials for method in compared], None, SAMPLES)
    return decide_verdict(compared, drawn, Terms(measure, MARGIN, alpha=alpha))


def sequentially(dev: Trials, test: Trials, measure: ResamplableMetric, most: int) -> tuple[Decision, float]:
    """The decision, and the seeds that it took of each method on average."""
    counts, before, rows = [1] * len(dev), 0, test[0].shape[1]
    while True:
        looked_at = outputs([method[:count] for method, count in zip(dev, counts, strict=True)])
        drawn = bootstrap.resample_trials(measure, [method.trials for method in looked_at], None, SAMPLES)
        step = plan_next_seeds(looked_at, drawn, Terms(measure, MARGIN), most, rows, again=before == counts[0])
        if not step.wanted_seeds:
            break
        before = counts[0]
        counts = [step.wanted_seeds.get(method.name, count) for method, count in zip(looked_at, counts, strict=True)]
    final = [method[:count] for method, count in zip(test, counts, strict=True)]
    return compare_once(final, measure, step.spent), float(np.mean(counts))


def rates(
    cell: tuple[float, int, int, int], comparisons: int, effect: float, sequential: bool, start: int
) -> dict[str, float]:
    """The `Rates` of a number of comparisons; in every other one the first rival is better than full, not full.

    Args:
        cell: Standard deviation between seeds, rows, most seeds of each method, rivals of full.
        comparisons: How many.
        effect: Difference between the better side and the others.
        sequential: Whether the sequential rule decides on the number of seeds.
        start: Where the random numbers begin.
    """
    seed_sd, rows, seeds, rivals = cell
    source = simulated(rows, seed_sd)
    measure = find_metric("text-classification", Target("single_label", {}, ("no", "yes")), "accuracy")
    decisions, used, right = [], [], 0
    for number in range(comparisons):
        chance = np.random.default_rng([start, number])
        full_better = number % 2 == 0
        worse = [0.0, *([effect] * rivals)] if full_better else [effect, 0.0, *([effect] * (rivals - 1))]
        dev, test = source(chance, seeds, worse)
        if sequential:
            decision, count = sequentially(dev, test, measure, seeds)
        else:
            decision, count = compare_once(test, measure, 0.05), float(seeds)
        decisions.append(decision)
        used.append(count)
        right += decision.verdict == ("FULL" if full_better else "PEFT")
    wrong = sum(decision.verdict in ("FULL", "PEFT") for decision in decisions)
    called = detectable([decision.differences[0] for decision in decisions])
    return asdict(Rates(wrong / comparisons, right / comparisons, float(np.mean(used)), called))


def detectable(differences: list[Difference]) -> float:
    """A true difference that 80 % of the comparisons would have called, had it been there."""
    bounds = [max(MARGIN, gap.estimate - gap.adjusted_low) - gap.estimate for gap in differences]
    return float(np.quantile(bounds, 0.8))


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    records, comparisons = Records(folder / "rates.jsonl"), 2 if SMOKE else 200
    cells = itertools.product((0.0, 0.005, 0.013, 0.026), (1000, 3000), (2, 3, 5), (1, 3))
    counted: dict[str, list[dict[str, float]]] = {}
    for number, cell in enumerate([(0.013, 1000, 3, 1)] if quick else cells):
        effect = 0.0
        for place, name in enumerate(("A/A", "planted", "A/A, sequential rule", "planted, sequential rule")):
            planted = effect if name.startswith("planted") else 0.0
            settings = cell, comparisons, planted, name.endswith("rule"), 1000 * place + number
            cell_rates = records.get(f"{cell} {name}", rates, *settings)
            counted.setdefault(name, []).append(cell_rates)
            effect = effect or 2 * cell_rates["detectable"]
    for name, cells_of in counted.items():
        is_same = name.startswith("A/A")
        share = float(np.mean([cell["wrong" if is_same else "right"] for cell in cells_of]))
        what = "false verdicts, a method against itself" if is_same else "right verdicts, a planted difference"
        rule = ", sequential rule" * name.endswith("rule")
        error = math.sqrt(0.05 * 0.95 / (comparisons * len(cells_of)))
        bar = {"at_most": 0.05 + 2 * error} if is_same else {"at_least": 0.9}
        yield Figure(what + rule, share, "share", **bar)


if __name__ == "__main__":
    script(measure, __doc__)
