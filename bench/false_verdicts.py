"""How often a comparison's verdict is wrong: the same method against itself, and planted differences.

    python bench/false_verdicts.py [--comparisons 200]           # noise from a model of rows and seeds
    python bench/false_verdicts.py --predictions FOLDER [--margin 0.01]    # noise of real trials of one method

A/A: two arms that are the same method with other seeds; FULL or PEFT is wrong, at most 5 % may be. Planted: one arm is
worse by twice the difference that 80 of 100 of these comparisons would have called (at least the margin); right is the
verdict that names the better one, at least 90 % must be. Each also with the sequential rule, which looks at development
rows of its own after each seed.

With `--rivals 3` full has three rivals: equal ones in A/A; planted, full is better than all or one is better than full.

The model: rows differ in difficulty (right with a chance drawn from a beta distribution: 90 % right on average, two
seeds disagree on 10 %), seeds differ by a normal number in the share of right rows. FOLDER is what
`bench/same_method.py` leaves: a folder for each draw of train rows, in it one npz file for each seed, with `right` of
the test rows and `right_eval` of the eval rows; a comparison takes one draw, disjoint seeds for the two arms, and rows
with replacement.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fulltune.compare.sequential import WAITING_SHARE, look
from fulltune.compare.verdict import MethodOutputs, Terms, decide
from fulltune.recipe.methods import MethodKind
from fulltune.records.comparison import Decision, Difference
from fulltune.stats import bootstrap
from fulltune.stats.bootstrap import Measure, measure_of
from fulltune.tasks import Target

ACCURACY, DISCORDANCE = 0.9, 0.1
SAMPLES = 1000
Arms = tuple[np.ndarray, ...]
"""Right rows of each arm, full first: [seeds, rows] each."""
Source = Callable[[np.random.Generator, int, Sequence[float]], tuple[Arms, Arms]]
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
    def source(chance: np.random.Generator, seeds: int, worse: Sequence[float]) -> tuple[Arms, Arms]:
        # A seed makes a model better or worse on development and test rows alike.
        effects = chance.normal(0, seed_sd, (len(worse), seeds)) - np.array(worse)[:, None]
        made = []
        for _ in ("development", "test"):
            easy = difficulty(chance, rows)
            made.append(
                tuple(
                    np.stack([shifted(chance, chance.random(rows) < easy, float(effect)) for effect in arm])
                    for arm in effects
                )
            )
        return made[0], made[1]

    return source


def recorded(folder: Path) -> tuple[Source, int, int]:
    """Real trials of one method; also the number of test rows and of seeds."""
    pools = []
    for draw in sorted(path for path in folder.iterdir() if any(path.glob("seed-*.npz"))):
        files = [np.load(path) for path in sorted(draw.glob("seed-*.npz"))]
        pools.append([np.stack([one[name].astype(bool) for one in files]) for name in ("right_eval", "right")])
    fewest = min(len(dev) for dev, _ in pools)

    def source(chance: np.random.Generator, seeds: int, worse: Sequence[float]) -> tuple[Arms, Arms]:
        pool = pools[chance.integers(len(pools))]
        order = chance.permutation(fewest)
        made = []
        for trials in pool:
            rows = chance.integers(0, trials.shape[1], trials.shape[1])
            arms = [trials[order[place * seeds : (place + 1) * seeds]][:, rows] for place in range(len(worse))]
            made.append(
                tuple(
                    np.stack([shifted(chance, right, -less) if less else right for right in arm])
                    for arm, less in zip(arms, worse, strict=True)
                )
            )
        return made[0], made[1]

    return source, pools[0][1].shape[1], fewest


def items(arms: Sequence[np.ndarray]) -> list[MethodOutputs]:
    names = ["full", *(f"rival{number}" for number in range(1, len(arms)))]
    kinds: list[MethodKind] = ["full", *(["lora"] * (len(arms) - 1))]
    made = []
    for name, kind, right, cost in zip(names, kinds, arms, [2.0, *([1.0] * (len(arms) - 1))], strict=True):
        kept = [{"labels": np.ones(len(row), np.int64), "logits": _logits(row)} for row in right]
        share = WAITING_SHARE if len(right) < len(arms[0]) else 1.0
        made.append(MethodOutputs(name, kind, kept, cost, alpha_share=share))
    return made


def _logits(right: np.ndarray) -> np.ndarray:
    return np.stack([~right, right], axis=1).astype(float)


def compare_once(arms: Sequence[np.ndarray], measure: Measure, margin: float, alpha: float) -> Decision:
    compared = items(arms)
    drawn = bootstrap.draw(measure, [one.trials for one in compared], None, SAMPLES)
    return decide(compared, drawn, Terms(measure, margin, alpha=alpha))


def sequentially(dev: Arms, test: Arms, measure: Measure, margin: float, most: int) -> tuple[Decision, float]:
    """The decision, and how many seeds it took of each arm on average."""
    counts, before, rows = [1] * len(dev), 0, test[0].shape[1]
    while True:
        seen = items([arm[:count] for arm, count in zip(dev, counts, strict=True)])
        again = before == counts[0]
        drawn = bootstrap.draw(measure, [one.trials for one in seen], None, SAMPLES)
        step = look(seen, drawn, Terms(measure, margin), most, rows, again=again)
        if not step.asked:
            break
        before = counts[0]
        counts = [step.asked.get(one.name, count) for one, count in zip(seen, counts, strict=True)]
    final = [arm[:count] for arm, count in zip(test, counts, strict=True)]
    return compare_once(final, measure, margin, step.spent), float(np.mean(counts))


def cell(
    source: Source,
    seeds: int,
    margin: float,
    comparisons: int,
    effect: float,
    *,
    sequential: bool,
    start: int,
    rivals: int = 1,
) -> Rates:
    """One cell: so many comparisons, the better arm changing sides."""
    measure = measure_of("text-classification", Target("single_label", {}, ("no", "yes")), "accuracy")
    decisions, used, right = [], [], 0
    for number in range(comparisons):
        chance = np.random.default_rng([start, number])
        full_better = number % 2 == 0
        # Full better than all, or the first rival better than full and the others.
        worse = [0.0, *([effect] * rivals)] if full_better else [effect, 0.0, *([effect] * (rivals - 1))]
        dev, test = source(chance, seeds, worse)
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
    cells: Iterator[tuple[str, Source, int]], margin: float, comparisons: int, rivals: int
) -> Iterator[tuple[str, float]]:
    for number, (name, source, seeds) in enumerate(cells):
        began = time.monotonic()
        count = functools.partial(cell, source, seeds, margin, comparisons, rivals=rivals)
        same = count(0.0, sequential=False, start=number)
        detectable = size_called([decision.differences[0] for decision in same.decisions], margin)
        said = float(np.median([decision.differences[0].detectable for decision in same.decisions]))
        equal = np.mean([decision.verdict == "EQUIVALENT" for decision in same.decisions])
        planted = count(2 * detectable, sequential=False, start=1000 + number)
        looked = count(0.0, sequential=True, start=2000 + number)
        found = count(2 * detectable, sequential=True, start=3000 + number)
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
    parser.add_argument("--rivals", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.predictions:
        source, rows, trials = recorded(arguments.predictions)
        cells = (
            (f"{arguments.predictions.name} | {rows} | {seeds}", source, seeds)
            for seeds in arguments.seeds
            if (arguments.rivals + 1) * seeds <= trials
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
    for line, wrong in rows_of_table(cells, arguments.margin, arguments.comparisons, arguments.rivals):
        print(line, flush=True)
        worst = max(worst, wrong)
    print(f"\n{arguments.comparisons} comparisons a cell; most wrong verdicts in a cell: {worst:.1%}")


if __name__ == "__main__":
    main()
