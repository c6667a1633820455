"""The time of a run from timed passes and the order of the rows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from fulltune.plan.time import count_interval_steps
from fulltune.records.plan import AnswersPlan, TimeNeed
from fulltune.train.loop.sampler import GlobalBatchSampler
from fulltune.train.worker import dry_run
from fulltune.train.worker.dry_run import (
    PassTime,
    PassTimer,
    fit_pass_time,
    forecast_from_passes,
    pass_work,
    restored_buffers,
    worst_micro_batch,
)
from tests import plans


@pytest.mark.parametrize(
    ("longest", "typical", "expected"),
    [
        ((100, 11.0), (50, 6.0), (1.0, 0.1)),
        ((100, 11.0), None, (0.0, 0.11)),
        # The longest one was faster, or a line through both would begin below 0: what was measured at the mean counts.
        ((100, 5.0), (50, 6.0), (0.0, 0.12)),
        ((100, 20.0), (50, 5.0), (0.0, 0.1)),
        ((50, 5.0), (50, 6.0), (0.0, 0.12)),
    ],
)
def test_speed_is_a_line_through_both_passes_or_through_the_origin(
    longest: tuple[float, float], typical: tuple[float, float] | None, expected: tuple[float, float]
) -> None:
    found = fit_pass_time(longest, typical)
    assert (found.fixed, found.per_work) == pytest.approx(expected)
    assert PassTime(1.0, 0.1).seconds(3, 50) == 8.0


def test_work_grows_with_the_square_of_the_length_by_what_attention_adds() -> None:
    shape = np.array([[4, 10]])
    assert pass_work(shape, 0.0) == [40]
    assert pass_work(shape, 0.1) == [80]


@pytest.mark.parametrize(
    ("first", "last", "eval_steps", "save_steps", "evaluations", "saves"),
    [
        (0, 10, 5, 5, 2, 2),
        (0, 10, 4, 4, 3, 3),  # 4, 8 and the last
        (0, 10, 5, 3, 2, 5),  # 3, 5, 6, 9, 10
        (5, 10, 5, 5, 1, 1),  # resumed
        (10, 10, 5, 5, 0, 0),  # nothing is left
        (0, 10, 0, 0, 1, 1),
        (0, 3, 100, 100, 1, 1),
    ],
)
def test_evaluations_and_saves_are_counted_as_the_trainer_does_them(
    first: int, last: int, eval_steps: int, save_steps: int, evaluations: int, saves: int
) -> None:
    assert count_interval_steps(last, eval_steps, after=first) == evaluations
    assert count_interval_steps(last, eval_steps, save_steps, after=first) == saves


# ---- the sampler knows every pass ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("grouped", [True, False])
def test_passes_are_those_that_training_will_take(num_processes: int, grouped: bool) -> None:
    lengths = [5 + 7 * i % 23 for i in range(43)]
    sampler = GlobalBatchSampler(lengths, 8, 2, 3, grouped, num_processes)
    taken = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        taken += list(sampler)
    sampler.set_epoch(1)

    found = [part for step in sampler.forward_passes(0, 18) for part in step]

    together = range(0, len(taken), num_processes)
    longest = [max(lengths[i] for part in taken[at : at + num_processes] for i in part) for at in together]
    assert [max(lengths[i] for i in part) for part in found] == longest
    assert sampler.epoch == 1
    # Steps 5 to 8 go over the end of the first epoch of 6 steps.
    assert list(sampler.forward_passes(4, 8)) == list(sampler.forward_passes(0, 18))[4:8]


@pytest.mark.parametrize(
    ("lengths", "packed", "expected"),
    [
        ([9, 5, 9, 9, 7], True, [0, 2, 4]),
        ([9, 5, 9, 9, 7], False, [0, 2, 3]),
        ([9, 5, 8, 7, 7], True, [0, 2, 3]),
        ([9, 9, 9], True, [0, 1, 2]),
    ],
)
def test_longest_packed_rows_are_unequal_as_only_then_they_get_a_mask(
    lengths: list[int], packed: bool, expected: list[int]
) -> None:
    plan: Any = SimpleNamespace(micro_batch_size=3, packing=packed)
    rows = [{"input_ids": [0] * length} for length in lengths]
    assert worst_micro_batch(rows, plan) == expected


# ---- a dry run whose first passes were cold: a script of seconds in place of a machine ----------------------------


LENGTHS = np.array([10 + row // 8 for row in range(320)])
"""Forty global batches of eight rows, each of another length."""
TRAIN, FORWARD = 0.7, 0.25
"""Seconds of a warm pass, whatever its rows."""


class Machine:
    """Passes that take their time."""

    def __init__(self, cold_train: dict[int, float], cold_eval: dict[int, float]) -> None:
        self.cold = {"train": cold_train, "eval": cold_eval}
        self.passes = {"train": 0, "eval": 0}

    def take(self, kind: str, seconds: float) -> float:
        number = self.passes[kind]
        self.passes[kind] += 1
        return self.cold[kind].get(number, seconds)


class Scripted(PassTimer):
    """Passes whose seconds are a machine's."""

    def run_pass(self, positions: Any, *, keep_gradients: bool = False) -> tuple[float, float]:
        return 1.0, self.model.take("train", TRAIN)

    def time_scoring(self, positions: Any) -> float:
        return self.model.take("eval", FORWARD)


def foreseen(machine: Machine, first_seconds: float = 9.0, total_steps: int = 40) -> TimeNeed:
    """The forecast of a run of 40 steps, each of one pass, with two evaluations of one batch."""
    batches = [list(range(8 * step, 8 * step + 8)) for step in range(40)]
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace())),
        sampler=SimpleNamespace(
            forward_passes=lambda first, last: [[batch] for batch in batches[first:last]], lengths=LENGTHS
        ),
        eval_dataset={"length": LENGTHS[::20]},
    )
    inputs: Any = SimpleNamespace(
        plan=plans.plan(total_steps=total_steps, eval_steps=total_steps // 2, save_steps=total_steps // 2),
        request=SimpleNamespace(first_step=0),
        summary=SimpleNamespace(splits=dict.fromkeys(("test", "eval"), SimpleNamespace(tokens=0))),
        is_main=False,
    )
    passes = Scripted(inputs, trainer, machine, mock.Mock(), lambda rows: None)
    return forecast_from_passes(passes, batches[-1], (first_seconds, TRAIN), 0.1)


def test_forecast_after_cold_passes_is_that_of_warm_ones() -> None:
    warm = foreseen(Machine({}, {}), first_seconds=TRAIN)

    found = foreseen(Machine({}, {0: 9.0}))

    assert warm.total_seconds == pytest.approx(40 * (TRAIN + 0.1) + 2 * FORWARD, rel=0.05)
    assert found.total_seconds == pytest.approx(warm.total_seconds, rel=0.02)


def test_what_each_shape_costs_the_first_time_is_counted_at_most_once_more() -> None:
    found = foreseen(Machine({0: 1.0}, {}))
    assert found.train_seconds == pytest.approx(40 * (TRAIN + 0.1) + 40 * 0.3, rel=0.02)
    cold = foreseen(Machine({0: 9.0}, {}))
    assert cold.train_seconds == pytest.approx(40 * (2 * TRAIN + 0.1), rel=0.02)


def test_small_files_of_a_checkpoint_are_counted_once_and_its_tensors_by_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted clock: 5 s for the tokenizer, 1 s for each file that is sealed, 2 s for the sample of a tenth."""
    now = 0.0

    def passing(seconds: float) -> None:
        nonlocal now
        now += seconds

    def save_pretrained(folder: Path) -> None:
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{}")
        passing(5.0)

    def save_file(tensors: Any, file: Path) -> None:
        file.touch()
        passing(2.0)

    monkeypatch.setattr(dry_run.time, "perf_counter", lambda: now)
    monkeypatch.setattr(dry_run, "save_file", save_file)
    monkeypatch.setattr(dry_run.files, "write_checksums", lambda folder: passing(float(len(list(folder.rglob("*.*"))))))
    monkeypatch.setattr(dry_run, "DISK_SAMPLE_BYTES", 4000)
    weights = torch.nn.Parameter(torch.zeros(2500))
    trainer = SimpleNamespace(
        model=SimpleNamespace(parameters=lambda: [weights]),
        trained_only=False,
        processing_class=SimpleNamespace(save_pretrained=save_pretrained),
    )
    optimizer = SimpleNamespace(state={0: {"exp_avg": torch.zeros(7500), "step": 1}})
    inputs = SimpleNamespace(request=SimpleNamespace(checkpoints=tmp_path))
    passes: Any = SimpleNamespace(trainer=trainer, optimizer=optimizer, inputs=inputs)

    assert dry_run._estimate_save_seconds(passes) == (5 + 1) + (2 + 1) * 10
    assert not list(tmp_path.iterdir())


# ---- no trace is left ---------------------------------------------------------------------------------------------


class _Table(torch.nn.Module):
    """Makes its table longer when a longer row comes, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.made_for = 0
        self.register_buffer("table", torch.zeros(0))

    def forward(self, length: int) -> torch.Tensor:
        if length > self.made_for:
            self.made_for, self.table = length, torch.arange(float(length))
        return self.table[:length]


def test_module_that_remembers_the_size_of_its_buffer_makes_it_again() -> None:
    model = torch.nn.Sequential(_Table())
    with restored_buffers(model):
        assert model(8).shape == (8,)
    assert (model[0].made_for, model[0].table.shape) == (0, (0,))
    assert model(4).shape == (4,)


def test_answers_are_forecast_from_the_first_and_the_later_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch reads prompts for 2 s, half of it real ones, and writes a token each 0.5 s; the first call is slow."""
    now, asked = 0.0, list[int]()

    def answer(new_tokens: int) -> tuple[int, float]:
        nonlocal now
        now += (2.0 if asked else 5.0) + 0.5 * (new_tokens - 1)
        asked.append(new_tokens)
        return new_tokens, 0.5

    monkeypatch.setattr(dry_run, "time", SimpleNamespace(perf_counter=lambda: now))
    trainer: Any = SimpleNamespace(args=SimpleNamespace(world_size=1))
    inputs: Any = SimpleNamespace(plan=plans.plan())
    passes = PassTimer(inputs, trainer, torch.nn.Linear(1, 1), mock.Mock(), mock.Mock(), answer)
    sample = AnswersPlan(rows=100, batch_size=32, max_new_tokens=21)
    assert passes.time_answers(sample) == pytest.approx(4 * (1.0 + 20 * 0.5))
    assert asked == [1, 1, 8]
    short = sample.model_copy(update={"max_new_tokens": 1})
    assert passes.time_answers(short) == pytest.approx(4 * 1.0)
