"""How often a comparison's verdict is wrong: the same method against itself, and planted differences.

    python bench/false_verdicts.py [--comparisons 200] [--quick]           # noise from a model of rows and seeds
    python bench/false_verdicts.py --predictions FOLDER [--margin 0.01]    # noise of real trials of one method

A/A: two arms that are the same method with other seeds; FULL or PEFT is wrong, at most 5 % may be. Planted: one arm is
worse by twice the difference that 80 of 100 of these comparisons would have called (at least the margin); right is the
verdict that names the better one, at least 90 % must be. Each also with the sequential rule, which looks at development
rows of its own after each seed.

The model: rows differ in difficulty (right with a chance drawn from a beta distribution: 90 % right on average, two
seeds disagree on 10 %), seeds differ by a normal number in the share of right rows. FOLDER holds one npz file for each
seed, with `right` [rows] of 0 and 1 (further files of the same method; at least 4); a comparison draws disjoint seeds
for the two arms, and rows with replacement.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fulltune.compare import draws
from fulltune.compare.items import Measure, measure_of
from fulltune.compare.sequential import look, spent
from fulltune.compare.verdict import ArmItems, decide
from fulltune.compare_records import ArmKind, Decision, Difference
from fulltune.tasks import Target

ACCURACY, DISCORDANCE = 0.9, 0.1
SAMPLES = 1000
Arms = tuple[np.ndarray, np.ndarray]
"""Right rows of two arms: [seeds, rows] each."""
Source = Callable[[np.random.Generator, int, float, float], tuple[Arms, Arms]]
"""From a generator, seeds, and how much worse each arm is made, to development and test rows."""


@dataclass(frozen=True)
class Rates:
    """What a cell of the table counts."""

    wrong: float
    """FULL or PEFT."""
    right: float
    seeds: float
    """Used on average."""
    decisions: tuple[Decision, ...]


draws.weights = functools.lru_cache(4)(draws.weights)  # the same draws of the rows serve every comparison


def difficulty(chance: np.random.Generator, rows: int) -> np.ndarray:
    """Chance of being right, of each row: two seeds disagree on `DISCORDANCE` of them on average."""
    within = DISCORDANCE / 2
    ratio = within / (ACCURACY * (1 - ACCURACY))
    total = ratio / (1 - ratio)
    return chance.beta(ACCURACY * total, (1 - ACCURACY) * total, rows)


def shifted(chance: np.random.Generator, right: np.ndarray, shift: float) -> np.ndarray:
    """More or fewer right rows, `shift` of all on average."""
    if shift > 0:
        return right | (chance.random(len(right)) < min(1.0, shift / (1 - ACCURACY)))
    return right & (chance.random(len(right)) >= min(1.0, -shift / ACCURACY))


def modelled(rows: int, seed_sd: float) -> Source:
    def source(chance: np.random.Generator, seeds: int, worse_one: float, worse_two: float) -> tuple[Arms, Arms]:
        # A seed makes a model better or worse on development and test rows alike.
        effects = chance.normal(0, seed_sd, (2, seeds)) - np.array([[worse_one], [worse_two]])
        made = []
        for _ in ("development", "test"):
            easy = difficulty(chance, rows)
            one, two = (
                np.stack([shifted(chance, chance.random(rows) < easy, float(effect)) for effect in arm])
                for arm in effects
            )
            made.append((one, two))
        return made[0], made[1]

    return source


def recorded(folder: Path) -> tuple[Source, int, int]:
    """Real trials of one method; also the number of rows and of seeds."""
    trials = np.stack([np.load(path)["right"].astype(bool) for path in sorted(folder.glob("*.npz"))])
    half = trials.shape[1] // 2

    def source(chance: np.random.Generator, seeds: int, worse_one: float, worse_two: float) -> tuple[Arms, Arms]:
        order = chance.permutation(len(trials))
        arms = trials[order[:seeds]], trials[order[seeds : 2 * seeds]]
        rows = chance.permutation(trials.shape[1])
        made = []
        for part in (rows[:half], rows[half:]):
            drawn = chance.choice(part, len(part))
            one, two = (
                np.stack([shifted(chance, right, -worse) if worse else right for right in arm[:, drawn]])
                for arm, worse in zip(arms, (worse_one, worse_two), strict=True)
            )
            made.append((one, two))
        return made[0], made[1]

    return source, half, len(trials)


def items(arms: Arms) -> list[ArmItems]:
    names: tuple[tuple[str, ArmKind, float], ...] = (("full", "full", 2.0), ("lora", "lora", 1.0))
    return [
        ArmItems(name, kind, [{"labels": np.ones(len(row), np.int64), "logits": _logits(row)} for row in right], cost)
        for (name, kind, cost), right in zip(names, arms, strict=True)
    ]


def _logits(right: np.ndarray) -> np.ndarray:
    return np.stack([~right, right], axis=1).astype(float)


def compare_once(arms: Arms, measure: Measure, margin: float, alpha: float) -> Decision:
    return decide(items(arms), measure, margin=margin, alpha=alpha, samples=SAMPLES)


def sequentially(dev: Arms, test: Arms, measure: Measure, margin: float, most: int) -> tuple[Decision, float]:
    """The decision, and how many seeds it took of each arm on average."""
    full = lora = 1
    while True:
        seen = (dev[0][:full], dev[1][:lora])
        step = look(items(seen), measure, margin=margin, max_seeds=most, samples=SAMPLES, test_rows=test[0].shape[1])
        if step.enough:
            break
        lora += step.step("lora").decision == "more"
        full += 1
    final = (test[0][:full], test[1][:lora])
    return compare_once(final, measure, margin, spent(full, most, 0.05)), (full + lora) / 2


def cell(
    source: Source, seeds: int, margin: float, comparisons: int, effect: float, *, sequential: bool, start: int
) -> Rates:
    """One cell: so many comparisons, the better arm changing sides."""
    measure = measure_of("text-classification", Target("single_label", {}, ("no", "yes")), "accuracy")
    decisions, used, right = [], [], 0
    for number in range(comparisons):
        chance = np.random.default_rng([start, number])
        full_better = number % 2 == 0
        dev, test = source(chance, seeds, 0.0 if full_better else effect, effect if full_better else 0.0)
        if sequential:
            decision, count = sequentially(dev, test, measure, margin, seeds)
        else:
            decision, count = compare_once(test, measure, margin, 0.05), float(seeds)
        decisions.append(decision)
        used.append(count)
        right += decision.verdict == ("FULL" if full_better else "PEFT")
    wrong = sum(decision.verdict in ("FULL", "PEFT") for decision in decisions)
    return Rates(wrong / comparisons, right / comparisons, float(np.mean(used)), tuple(decisions))


def size_called(differences: list[Difference], margin: float) -> float:
    """A true difference that 80 % of the comparisons would have called, had it been there."""
    bounds = [max(margin, one.estimate - one.adjusted_low) - one.estimate for one in differences]
    return float(np.quantile(bounds, 0.8))


def rows_of_table(
    cells: Iterator[tuple[str, Source, int]], margin: float, comparisons: int
) -> Iterator[tuple[str, float]]:
    for number, (name, source, seeds) in enumerate(cells):
        began = time.monotonic()
        same = cell(source, seeds, margin, comparisons, 0.0, sequential=False, start=number)
        detectable = size_called([decision.differences[0] for decision in same.decisions], margin)
        said = float(np.median([decision.differences[0].detectable for decision in same.decisions]))
        equal = np.mean([decision.verdict == "EQUIVALENT" for decision in same.decisions])
        planted = cell(source, seeds, margin, comparisons, 2 * detectable, sequential=False, start=1000 + number)
        looked = cell(source, seeds, margin, comparisons, 0.0, sequential=True, start=2000 + number)
        found = cell(source, seeds, margin, comparisons, 2 * detectable, sequential=True, start=3000 + number)
        yield (
            f"| {name} | {same.wrong:.1%} | {equal:.0%} | {100 * detectable:.1f} ({100 * said:.1f}) "
            f"| {planted.right:.1%} | {looked.wrong:.1%} ({looked.seeds:.1f}) | {found.right:.1%} ({found.seeds:.1f}) "
            f"| {time.monotonic() - began:.0f} s |",
            max(same.wrong, looked.wrong),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=Path)
    parser.add_argument("--comparisons", type=int, default=200)
    parser.add_argument("--margin", type=float, default=0.01)
    parser.add_argument("--seed-sds", type=float, nargs="+", default=[0.0, 0.005, 0.013, 0.026])
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 3000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 5])
    arguments = parser.parse_args()
    if arguments.predictions:
        source, rows, trials = recorded(arguments.predictions)
        cells = (
            (f"{arguments.predictions.name} | {rows} | {seeds}", source, seeds)
            for seeds in arguments.seeds
            if 2 * seeds <= trials
        )
    else:
        cells = (
            (f"{100 * sd:.1f} | {rows} | {seeds}", modelled(rows, sd), seeds)
            for sd, rows, seeds in itertools.product(arguments.seed_sds, arguments.rows, arguments.seeds)
        )
    print(
        "| seed SD (points) | rows | seeds | A/A FULL or PEFT | A/A EQUIVALENT | detectable, measured (said) "
        "| planted, right | A/A sequential (seeds) | planted, sequential (seeds) | took |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    worst = 0.0
    for line, wrong in rows_of_table(cells, arguments.margin, arguments.comparisons):
        print(line, flush=True)
        worst = max(worst, wrong)
    print(f"\n{arguments.comparisons} comparisons a cell; most wrong verdicts in a cell: {worst:.1%}")


if __name__ == "__main__":
    main()
