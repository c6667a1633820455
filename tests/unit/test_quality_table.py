"""The table of `bench/quality.py`: metrics as means over rows, paired differences and their standard errors."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import r2_score


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    path = Path(__file__).parents[2] / "bench" / "quality_table.py"
    spec = importlib.util.spec_from_file_location("quality_table", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["quality_table"] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def line(tables: ModuleType, outcomes: np.ndarray, **fields: Any) -> dict[str, Any]:
    usual = {"set": "s", "rows": 5, "contestant": "c", "seed": 1, "rate": None, "search": False, "metric": "accuracy"}
    values = {"value": 0.5, "eval_value": 0.5, "seconds": 1.0, "settings": "a", "data": "d"}
    made = usual | values | fields
    return made | {"outcomes": tables.packed(made["metric"], outcomes)}


def entry(tables: ModuleType, outcomes: np.ndarray, seeds: tuple[int, ...]) -> Any:
    """Of accuracy, with `outcomes[seeds, rows]`."""
    lines = [line(tables, row, seed=seed) for seed, row in zip(seeds, outcomes, strict=True)]
    return tables.entry(lines, "s", 5, "c")


@pytest.mark.parametrize(
    ("metric", "outcomes"),
    [
        ("accuracy", np.array([0, 1, 1, 0, 1])),
        ("f1", np.array([[1, 2, 1], [0, 0, 0], [0, 1, 3]])),
        ("r2", np.array([[1.25, -0.5], [-3.001, 2.0]])),
    ],
)
def test_outcomes_come_back(tables: ModuleType, metric: str, outcomes: np.ndarray) -> None:
    assert np.allclose(tables.unpacked(metric, tables.packed(metric, outcomes)), outcomes)


def test_row_values_have_the_metric_as_their_mean(tables: ModuleType) -> None:
    draw = np.random.default_rng(0)
    found = draw.integers(0, 4, (50, 3))
    found[:, 0] = np.minimum(found[:, 1], found[:, 2])
    right, predicted, expected = found.sum(axis=0)
    assert tables.row_values("f1", found).mean() == pytest.approx(2 * right / (predicted + expected))
    numbers = draw.normal(size=(50, 2))
    assert tables.row_values("r2", numbers).mean() == pytest.approx(r2_score(numbers[:, 1], numbers[:, 0]))


def test_first_order_error_of_f1_is_that_of_a_bootstrap(tables: ModuleType) -> None:
    draw = np.random.default_rng(1)
    expected = draw.integers(0, 3, 800)
    found = np.maximum(0, expected + draw.integers(-1, 2, 800))
    outcomes = np.stack([np.minimum(expected, found) * draw.integers(0, 2, 800), found, expected], axis=1)
    values = tables.row_values("f1", outcomes)
    sums = np.stack([outcomes[draw.integers(0, 800, 800)].sum(axis=0) for _ in range(1000)])
    resampled = 2 * sums[:, 0] / (sums[:, 1] + sums[:, 2])
    assert values.std() / 800**0.5 == pytest.approx(resampled.std(), rel=0.15)


def test_standard_error_covers_rows_and_seeds(tables: ModuleType) -> None:
    draw = np.random.default_rng(2)

    def method(easy: np.ndarray, shift: np.ndarray) -> np.ndarray:
        return (draw.random((4, 600)) < np.clip(easy + shift[:, None], 0, 1)).astype(np.uint8)

    found, errors = [], []
    for _ in range(120):
        easy = draw.uniform(0.2, 0.8, 600)
        better = method(easy + draw.normal(0.05, 0.1, 600), draw.normal(0, 0.03, 4))
        one, other = entry(tables, better, (1, 2, 3, 4)), entry(tables, method(easy, np.zeros(4)), (1, 2, 3, 4))
        gap = tables.difference(one, other)
        found.append(gap.value)
        errors.append(gap.error)
    assert np.mean(found) == pytest.approx(0.05, abs=0.01)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(found), rel=0.25)


def test_same_outcomes_differ_by_nothing(tables: ModuleType) -> None:
    outcomes = np.random.default_rng(3).integers(0, 2, (3, 40)).astype(np.uint8)
    one = entry(tables, outcomes, (1, 2, 3))
    gap = tables.difference(one, one)
    assert (gap.value, gap.error) == (0.0, 0.0)


def test_only_common_seeds_are_pairs(tables: ModuleType) -> None:
    outcomes = np.array([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], np.uint8)
    one, other = entry(tables, outcomes[:2], (1, 2)), entry(tables, outcomes[1:], (2, 3))
    gap = tables.difference(one, other)
    assert gap.value == 0.0  # seed 2 has the same outcomes in both
    assert not gap.over_seeds


def test_a_frozen_model_is_compared_with_every_seed(tables: ModuleType) -> None:
    trained = entry(tables, np.array([[1, 1, 0, 0], [1, 1, 1, 1]], np.uint8), (1, 2))
    frozen = entry(tables, np.array([[1, 0, 0, 0]], np.uint8), (0,))
    gap = tables.difference(trained, frozen)
    assert gap.value == pytest.approx(0.5)
    assert gap.over_seeds


def test_other_rows_are_not_compared(tables: ModuleType) -> None:
    outcomes = np.array([1, 0, 1, 0], np.uint8)
    one, other = (tables.entry([line(tables, outcomes, data=data)], "s", 5, "c") for data in "ab")
    assert tables.difference(one, other) is None


def test_rate_is_taken_by_eval_rows_and_further_seeds_have_it(tables: ModuleType) -> None:
    good, bad = np.ones(4, np.uint8), np.zeros(4, np.uint8)
    lines = [
        line(tables, good, search=True, rate=1e-4, eval_value=0.6),
        line(tables, bad, search=True, rate=2e-4, eval_value=0.7),
        {**line(tables, bad, search=True, rate=4e-4), "value": None, "eval_value": None},
        line(tables, good, seed=2, rate=1e-4),
        line(tables, good, seed=2, rate=2e-4),
    ]
    found = tables.entry(lines, "s", 5, "c")
    assert found.rate == 2e-4
    assert found.seeds == (1, 2)
    assert found.values.mean(axis=1).tolist() == [0.0, 1.0]
    assert found.failed == ()
    assert not found.at_the_edge


def test_newest_settings_count(tables: ModuleType) -> None:
    old, new = np.ones(4, np.uint8), np.zeros(4, np.uint8)
    found = tables.entry([line(tables, old, seed=2), line(tables, new, settings="b")], "s", 5, "c")
    assert found.seeds == (1,)
    assert found.mean == 0.0


def test_bars_say_what_is_missing_and_what_falls_short(tables: ModuleType) -> None:
    outcomes = np.array([1] * 75 + [0] * 25, np.uint8)
    lines = [
        line(tables, outcomes, set="banking77", rows=500, contestant="fulltune", seed=seed, settings="x")
        for seed in (1, 2)
    ]
    bar = "| banking77 500: fulltune at least 76.0 | 75.00 |"
    text = tables.bars(lines, [("banking77", 500, 2)])
    assert f"{bar} FAIL |" in text
    assert text.count("not measured") == 2
    assert f"{bar} not measured: FAIL with 2 of 5 seeds |" in tables.bars(lines, [("banking77", 500, 5)])
    lost = {**lines[1], "value": None}
    assert f"{bar} FAIL: no model with seed 2 |" in tables.bars([*lines, lost], [("banking77", 500, 2)])


def test_what_costs_no_training_has_one_run(tables: ModuleType) -> None:
    good, bad = np.array([1] * 75 + [0] * 25, np.uint8), np.array([1] * 70 + [0] * 30, np.uint8)
    ours = [line(tables, good, set="s", rows=5, contestant="fulltune", seed=seed) for seed in (1, 2, 3)]
    free = [
        line(tables, outcomes, set="s", rows=5, contestant=name, seed=0)
        for name, outcomes in (("frozen-logreg", bad), ("frozen-centroid", bad[::-1] * 0))
    ]
    text = tables.bars([*ours, *free], [("s", 5, 3)])
    assert "fulltune minus frozen-logreg, at least 0 | +5.00 ± " in text
    assert text.count("PASS") == 1
