"""The order of the rows with others mixed in: their share, each once before any comes again, and the same order for any
micro batch and number of processes. Tests of the order without them stand in `tests/train/test_guards.py`."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest

from fulltune.recipe.data import rows_per_epoch
from fulltune.train.loop.sampler import GlobalBatchSampler, MixedSource

TASK_ROWS = 500


def sampler(
    sizes: tuple[int, ...],
    weights: tuple[float, ...],
    *,
    task_rows: int = TASK_ROWS,
    micro: int = 8,
    processes: int = 1,
    grouped: bool = True,
    rollbacks: tuple[int, ...] = (),
) -> GlobalBatchSampler:
    """Of task rows, and of sources of these sizes and weights behind them."""
    mixed, start = [], task_rows
    for size, number in zip(sizes, rows_per_epoch(task_rows, weights), strict=True):
        mixed.append(MixedSource(range(start, start + size), number))
        start += size
    lengths = [(number * 7919) % 60 + 1 for number in range(start)]
    return GlobalBatchSampler(lengths, 8, micro, 42, grouped, processes, rollbacks, tuple(mixed))


def epochs(of: GlobalBatchSampler, count: int) -> list[list[int]]:
    """The rows of the first epochs, in their order."""
    found = []
    for epoch in range(count):
        of.set_epoch(epoch)
        found.append(list(chain.from_iterable(of.batches_of_epoch())))
    return found


@pytest.mark.parametrize(
    ("grouped", "rollbacks", "epoch", "expected"),
    [
        (True, (), 0, [[6, 10, 14, 1, 18, 5, 9, 13], [17, 4, 16, 7, 11, 15, 2, 19], [8, 12, 3, 0]]),
        (True, (), 1, [[19, 6, 10, 1, 5, 9, 13, 0], [17, 8, 12, 3, 7, 11, 15, 2], [4, 16, 14, 18]]),
        (True, (1,), 0, [[6, 10, 14, 1, 18, 5, 9, 13], [17, 8, 12, 16, 3, 11, 2, 19], [4, 7, 15, 0]]),
        (False, (), 0, [[17, 16, 18, 13, 19, 2, 10, 5], [11, 15, 1, 7, 9, 4, 6, 14], [8, 0, 12, 3]]),
        (False, (), 1, [[7, 17, 6, 13, 12, 11, 19, 15], [2, 0, 1, 3, 10, 5, 9, 8], [16, 14, 18, 4]]),
    ],
)
def test_order_without_mixed_rows_is_that_of_earlier_versions(
    grouped: bool, rollbacks: tuple[int, ...], epoch: int, expected: list[list[int]]
) -> None:
    """A run that was begun before goes on with the rows it would have had."""
    lengths = [(number * 7) % 30 + 1 for number in range(20)]
    plain = GlobalBatchSampler(lengths, 8, 4, 42, grouped, rollbacks=rollbacks)
    plain.set_epoch(epoch)
    assert plain.batches_of_epoch() == expected


def test_first_epoch_is_the_first_for_every_caller() -> None:
    with pytest.raises(TypeError, match="positional arguments"):
        GlobalBatchSampler(range(1, 21), 8, 4, 42, True, 1, (), (), None, True)  # type: ignore[call-arg,misc]  # one too many


def test_rows_that_are_drawn_stay_the_same() -> None:
    """A run that goes on with a later version draws what it would have drawn."""
    drawn = [MixedSource(range(20, 27), 5).rows_of_epoch(42, epoch) for epoch in range(3)]
    assert drawn == [[26, 23, 20, 21, 22], [25, 24, 26, 24, 23], [25, 20, 21, 22, 20]]


@pytest.mark.parametrize(
    ("sizes", "weights"),
    [((1000,), (0.05,)), ((40,), (0.3,)), ((1000, 40, 7), (0.05, 0.2, 0.5)), ((3, 2000), (0.01, 0.9))],
)
def test_share_of_the_rows_is_the_weight(sizes: tuple[int, ...], weights: tuple[float, ...]) -> None:
    made = sampler(sizes, weights)
    rows = list(chain.from_iterable(epochs(made, 4)))
    for source, weight in zip(made.mixed, weights, strict=True):
        assert sum(row in source.rows for row in rows) / len(rows) == pytest.approx(weight, abs=0.01 * weight + 2e-3)
    counts = Counter(row for row in rows if row < TASK_ROWS)
    assert set(counts.values()) == {4}
    assert len(counts) == TASK_ROWS


@pytest.mark.parametrize("size", [7, 40, 1000])
def test_each_mixed_row_comes_once_before_any_comes_again(size: int) -> None:
    """Over epochs, and however many rounds an epoch takes."""
    made = sampler((size,), (0.3,))
    (source,) = made.mixed
    drawn = list(chain.from_iterable(source.rows_of_epoch(42, epoch) for epoch in range(6)))
    rounds = [drawn[start : start + size] for start in range(0, len(drawn), size)]
    assert all(len(set(one)) == len(one) for one in rounds)
    assert all(set(one) == set(source.rows) for one in rounds[:-1])
    assert len(rounds) < 2 or rounds[0] != rounds[1][: len(rounds[0])]
    assert [sorted(row for row in rows if row >= TASK_ROWS) for rows in epochs(made, 6)] == [
        sorted(source.rows_of_epoch(42, epoch)) for epoch in range(6)
    ]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(("micro", "processes"), [(8, 1), (4, 1), (1, 1), (4, 2), (2, 2)])
def test_global_batches_with_mixed_rows_are_the_same_for_any_micro_batch_and_number_of_processes(
    micro: int, processes: int, grouped: bool
) -> None:
    from accelerate.data_loader import BatchSamplerShard

    sizes, weights = (100, 9), (0.1, 0.2)
    expected = sampler(sizes, weights, grouped=grouped)
    made = sampler(sizes, weights, micro=micro, processes=processes, grouped=grouped)
    expected.set_epoch(1)
    made.set_epoch(1)
    shards = [list(BatchSamplerShard(made, processes, rank)) for rank in range(processes)]
    each = 8 // (micro * processes)
    assert len({len(shard) for shard in shards}) == 1
    assert all(0 < len(batch) <= micro for shard in shards for batch in shard)  # the last global batch has 2 rows
    found = [
        sorted(row for shard in shards for batch in shard[start : start + each] for row in batch)
        for start in range(0, len(shards[0]), each)
    ]
    assert found == [sorted(batch) for batch in expected.batches_of_epoch()]
    assert len(made) == sum(map(len, shards))


def test_steps_and_passes_of_a_run_with_mixed_rows() -> None:
    made = sampler((100,), (0.25,), task_rows=60, micro=4)
    assert made.rows_per_epoch == 80
    assert made.steps_per_epoch == 10
    by_step = list(made.batches_of_steps(0, 30))
    made.set_epoch(2)
    assert by_step[20:] == made.batches_of_epoch()
    assert list(made.batches_of_steps(9, 12)) == by_step[9:12]
    # As a run that goes on in the middle of the second epoch reads them.
    passes = [[row for part in parts for row in part] for parts in made.forward_passes(13, 30)]
    assert passes == by_step[13:]


@pytest.mark.parametrize("counts", [(90, 10), (60, 30, 7, 3)])
def test_balanced_epochs_have_equally_many_rows_of_each_class(counts: tuple[int, ...]) -> None:
    """As many rows as before; no row of a class comes again before all have been used, over epochs and rollbacks."""
    classes = [kind for kind, count in enumerate(counts) for _ in range(count)]
    made = GlobalBatchSampler(range(1, 101), 8, 4, 42, True, rollbacks=(5, 20), classes=classes)
    drawn = epochs(made, 7)
    for rows in drawn:
        by_class = Counter(classes[row] for row in rows)
        assert len(rows) == 100
        assert max(by_class.values()) - min(by_class.values()) <= 1
    every = Counter(row for rows in drawn for row in rows)
    for kind, count in enumerate(counts):
        times = [every[row] for row in range(100) if classes[row] == kind]
        assert max(times) - min(times) <= 1
        assert sum(times) == pytest.approx(700 / len(counts), abs=1)
        assert len(times) == count
    assert list(made.batches_of_steps(17, 40)) == list(made.batches_of_steps(0, 40))[17:]
    again = GlobalBatchSampler(range(1, 101), 8, 2, 42, True, 2, (5, 20), classes=classes)
    assert [sorted(rows) for rows in epochs(again, 7)] == [sorted(rows) for rows in drawn]
    assert drawn[0] != epochs(GlobalBatchSampler(range(1, 101), 8, 4, 43, True, classes=classes), 1)[0]


@pytest.mark.parametrize("steps", [0, 1, 50, 89, 90, 200])
def test_tokens_by_source_are_those_of_the_rows_of_all_steps(steps: int) -> None:
    made = sampler((100, 9), (0.1, 0.2))
    expected = [0, 0, 0]
    for rows in made.batches_of_steps(0, steps):
        for row in rows:
            expected[(row >= TASK_ROWS) + (row >= TASK_ROWS + 100)] += int(made.lengths[row])
    assert made.tokens_by_source(steps) == tuple(expected)
