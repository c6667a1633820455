"""Guards and the order of the rows as tables of numbers; then faults injected into whole runs."""

from __future__ import annotations

import contextlib
import errno
import math
from collections.abc import Callable
from pathlib import Path
from traceback import StackSummary
from typing import Any, Literal

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from fulltune import files, pipeline
from fulltune.errors import Diverged, DoesNotFitError, FulltuneError, GuardStop, RecipeError, SetupError
from fulltune.records.events import Event, Message, StepLogged
from fulltune.records.training import Outcome, ParameterChanges
from fulltune.stats.curves import GuardDecision, check_divergence, judge_final_loss, should_stop_early
from fulltune.system import hardware, run_folder
from fulltune.train.loop.sampler import GlobalBatchSampler
from fulltune.train.loop.step_guard import judge_parameter_changes
from fulltune.train.worker import evaluation
from fulltune.train.worker import main as worker
from tests import tiny
from tests.contract.command import fulltune
from tests.train import runs

INF, NAN = math.inf, math.nan

# ---- tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "action"),
    [
        ([4.0] * 10 + [1.5] * 20 + [4.5] * 20, "stop"),
        ([4.0] * 10 + [1.5] * 20 + [4.5] * 10, "go on"),  # too short to tell
        ([4.0] * 10 + [1.5] * 20 + [9.0] * 8 + [1.5] * 12, "go on"),  # a spike that passed
        ([4.0] * 10 + [1.5] * 20 + [3.9] * 20, "go on"),  # still better than at the beginning
        ([2.0] * 10 + [1.6] * 20 + [2.5] * 20, "go on"),  # it had not fallen much
        ([1.2, 0.4] * 5 + [0.8, 0.2] * 5 + [1.2, 0.6] * 10, "go on"),  # as batches of a regression differ by chance
        ([1.2, 0.8] * 5 + [0.2, 0.1] * 5 + [1.6, 0.9] * 10, "stop"),
        ([-1.0] * 60, "go on"),  # a loss of another kind
    ],
)
def test_diverged_stops_a_loss_that_fell_and_is_back_for_good(losses: list[float], action: str) -> None:
    decision = check_divergence(losses, 6.3e-3)

    assert decision.action == action
    if action == "stop" and losses[0] == 4:
        assert decision.reason == (
            "the loss diverged: it fell from 4 to 1.5, but the median of the last 20 values is 4.5. "
            "Usual cause: a learning rate that is too high (here 0.0063); try a third of it"
        )


def test_loss_that_is_back_where_a_linear_probe_began_is_no_divergence() -> None:
    """By chance 77 classes give 4.34; the losses are those of Banking77."""
    losses = [*[0.55, 0.5, 0.6] * 4, *[0.35, 0.3, 0.4] * 4, *[0.55, 0.5, 0.62] * 8]
    assert check_divergence(losses, 2e-4, untrained_loss=0.55).action == "stop"
    assert check_divergence(losses, 2e-4, untrained_loss=4.34).action == "go on"
    assert check_divergence([*losses, *[4.5, 4.3, 4.6] * 8], 2e-4, untrained_loss=4.34).action == "stop"


@pytest.mark.parametrize(
    ("losses", "untrained", "action"),
    [
        ([1.1, 1.1, 7.0] + [90.0, 40.0] * 10, None, "stop"),
        ([1.1, 1.1] + [90.0, 40.0] * 9, None, "go on"),  # 20 readings: too few
        ([1.1] + [1.0] * 30 + [60.0] * 20, None, "stop"),  # later
        ([1.1] * 30 + [60.0] * 15 + [0.9] * 5, None, "go on"),  # a spike that passed
        ([1.1] * 30 + [60.0] * 19, None, "go on"),  # it may still pass
        ([1.1] + [3.0] * 30, None, "go on"),  # bad, not far away
        ([0.01] + [0.05] * 60, None, "go on"),  # trained already
        ([0.01] + [1.1] * 30, None, "stop"),  # trained already, and ruined
        ([0.5] + [2.6] * 30, 2.4, "go on"),  # the first batch was easy by chance
        ([-1.0] + [30.0] * 30, None, "go on"),  # a loss of another kind
        ([], None, "go on"),
    ],
)
def test_diverged_stops_a_loss_that_is_far_above_its_beginning_for_good(
    losses: list[float], untrained: float | None, action: str
) -> None:
    assert check_divergence(losses, 0.9, untrained).action == action


CURVES = {
    0.001: (
        "1.1 1.1 1.04 0.79 0.42 0.17 0.06 0.03 0.02 0.01 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0.17 0 0 0 0",
        "0 0 0",
    ),
    0.01: (
        "1.1 1.1 1.18 1.56 2.2 1.38 1.76 1.75 1.75 2.45 1.61 2.22 1.23 1.87 1.71 "
        "1.94 0.74 2.47 3.14 2.97 2.71 1.17 1.48 1.15 1.13 1.05 1.46 1.6 1.26 1.94",
        "1.86 2.18 1.46",
    ),
    0.9: (
        "1.1 1.1 7.35 88.9 150.24 144.02 59.67 89.84 65.18 274.61 210.93 268.13 61.13 114.25 110.36 "
        "129.57 28.87 135.26 107.38 87.51 6.68 60.29 56.25 31.67 20.27 65.66 38.97 52.21 30.61 30.42",
        "236.79 75.23 18.78",
    ),
}
"""MiniLM-L6, 240 rows with 3 labels, 30 steps of 16: rate to the loss of each step and of three evaluations."""


@pytest.mark.parametrize(
    ("rate", "action"),
    [(1e-3, "go on"), (0.01, "warn"), (0.9, "stop")],
)
@pytest.mark.parametrize("every", [1, 5])
def test_ended_high_tells_real_curves_apart(rate: float, action: str, every: int) -> None:
    losses, eval_losses = ([float(loss) for loss in part.split()] for part in CURVES[rate])
    logged = [losses[0]] + [sum(losses[at : at + every]) / every for at in range(0, len(losses), every)]

    decision = judge_final_loss(logged if every > 1 else losses, eval_losses, rate, 1.12)

    assert decision.action == action
    if action != "go on":
        assert decision.reason.endswith(
            f"Usual cause: a learning rate that is too high (here {rate:g}); try a tenth of it"
        )
    if action == "go on":  # nor does it stop in the middle
        assert all(check_divergence(losses[:count], rate).action == "go on" for count in range(len(losses)))


@pytest.mark.parametrize(
    ("losses", "eval_losses", "action"),
    [
        ([1.1, 60.0, 43.0, 13.0], [], "warn"),  # few batches, and nothing was evaluated
        ([1.1, 60.0, 43.0, 13.0], [20.0], "stop"),
        ([1.1, *[60.0] * 20], [], "stop"),
        ([1.1, 60.0, 43.0, 13.0], [0.8, 20.0], "warn"),  # the first evaluation's weights may be kept
        ([1.1, 0.4, 1.5, 1.6], [0.5], "go on"),
        ([1.1, 1.4, 1.5, 1.6], [1.2], "warn"),
        ([1.1, 1.4, 1.5, 1.6], [], "go on"),  # the first batch may have been easy
        ([1.1, 2.4, 2.5, 2.6], [], "warn"),
        ([1.1, 1.1, 1.2, 1.2], [1.2], "go on"),  # it learned nothing, but did not get worse
        ([0.01, 0.04, 0.05, 0.05], [0.3], "go on"),  # trained already
        ([], [], "go on"),
    ],
)
def test_ended_high_needs_a_loss_that_nothing_was_better_than(
    losses: list[float], eval_losses: list[float], action: str
) -> None:
    assert judge_final_loss(losses, eval_losses, 0.9).action == action


@pytest.mark.parametrize(
    ("tensors", "values_moved", "reached", "largest", "said"),
    [
        (0, 0, False, None, "no parameter received a gradient"),
        (0, 0, True, 0.0, "every gradient was 0"),
        (3, 0, True, 0.0, "every gradient was 0"),  # an optimizer without second moments
        (3, 0, True, None, "no parameter changed"),
        (3, 1, True, 1.0, ""),
    ],
)
def test_nothing_learned_stops_when_nothing_moved(
    tensors: int, values_moved: int, reached: bool, largest: float | None, said: str
) -> None:
    moved = ParameterChanges(
        num_tensors_with_gradient=tensors,
        num_tensors_changed=min(tensors, values_moved),
        num_values_with_gradient=tensors * 10,
        num_values_changed=values_moved,
    )

    decision = judge_parameter_changes(moved, reached, largest)

    assert said in decision.reason
    assert decision.action == ("stop" if said else "go on")


@pytest.mark.parametrize(
    ("values", "greater", "patience", "threshold", "stopped"),
    [
        ([0.5], True, 1, 0.0, False),
        ([0.5, 0.5], True, 1, 0.0, True),
        ([0.5, 0.6], True, 1, 0.0, False),
        ([0.5, 0.6], False, 1, 0.0, True),
        ([0.5, 0.4, 0.6], True, 2, 0.0, False),
        # Better than the one before is not better than the best.
        ([0.5, 0.3, 0.4], True, 2, 0.0, True),
        ([0.5, 0.51], True, 1, 0.1, True),
        # Small steps add up: they are measured against the last value that counted.
        ([0.5, 0.56, 0.62], True, 2, 0.1, False),
        ([0.5, NAN, NAN], True, 2, 0.0, True),
    ],
)
def test_stopped_improving_counts_from_the_best(
    values: list[float], greater: bool, patience: int, threshold: float, stopped: bool
) -> None:
    assert should_stop_early(values, greater, patience, threshold) == stopped


# ---- the order of the rows -------------------------------------------------------------------------------------

LENGTHS = [(number * 37) % 50 + 1 for number in range(83)]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("count", [1, 9, 200])
def test_each_row_comes_once_in_an_epoch_and_epochs_differ(count: int, grouped: bool) -> None:
    sampler = GlobalBatchSampler([(number * 7) % 30 + 1 for number in range(count)], 8, 4, 1, grouped)
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        epochs.append([row for batch in sampler for row in batch])
        assert sorted(epochs[-1]) == list(range(count))
        assert len(list(sampler)) == len(sampler)
    # Grouped by length, a single global batch is always in the same order.
    assert epochs[0] != epochs[1] or count <= 8
    sampler.set_epoch(0)
    assert [row for batch in sampler for row in batch] == epochs[0]
    other = GlobalBatchSampler(sampler.lengths, 8, 4, 2, grouped)
    assert [row for batch in other for row in batch] != epochs[0] or count <= 8


def test_group_by_length_halves_the_padding() -> None:
    lengths = [(number * 7919) % 200 + 1 for number in range(640)]

    def padding(grouped: bool) -> int:
        sampler = GlobalBatchSampler(lengths, 16, 8, 1, grouped)
        return sum(max(lengths[i] for i in batch) - lengths[row] for batch in sampler for row in batch)

    assert padding(True) < padding(False) / 2


# ---- faults in whole runs --------------------------------------------------------------------------------------

ROWS = tiny.topic_rows(64)
TRAIN = {"num_train_epochs": 1, "logging_steps": 1, "save_steps": 2}
ATTEMPT = Path("run", "attempts", "full-seed42-01")


def loss_broken_after(step: int, broken: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """Options with a `compute_loss` that goes wrong once this step is done; after step 0 is the dry run."""
    done = [0]

    def compute_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch
        return broken(loss) if done[0] == step else loss

    def listener(event: Event) -> None:
        if isinstance(event, StepLogged):
            done[0] = event.step

    return {"compute_loss": compute_loss, "listener": listener}


def test_loss_that_diverged_stops_the_run_as_diverged(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def at_the_fifth(losses: list[float], learning_rate: float, untrained: float | None) -> GuardDecision:
        seen.append(len(losses))
        return GuardDecision("stop", f"diverged at {learning_rate:g}") if len(losses) == 5 else GuardDecision("go on")

    monkeypatch.setattr(evaluation, "check_divergence", at_the_fifth)
    with pytest.raises(Diverged, match=r"diverged at 0\.001"):
        runs.run(tmp_path, tiny_encoder, ROWS, train={"max_steps": 8, "logging_steps": 1})
    assert seen == [1, 2, 3, 4, 5]
    assert Outcome.load(tmp_path / ATTEMPT / "outcome.json").status == "spiked"


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_loss_that_ended_high_is_said_or_stops_the_run(
    action: Literal["warn", "stop"], tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, float | None]] = []

    def high(losses: list[float], eval_losses: list[float], rate: float, untrained: float | None) -> GuardDecision:
        seen.append((len(losses), len(eval_losses), untrained))
        return GuardDecision(action, f"ended high at {rate:g}")

    monkeypatch.setattr(evaluation, "judge_final_loss", high)
    said: list[str] = []
    train = {"max_steps": 4, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    options = {"listener": lambda event: said.append(event.text) if isinstance(event, Message) else None}
    with contextlib.nullcontext() if action == "warn" else pytest.raises(Diverged, match=r"ended high at 0\.001"):
        runs.run(tmp_path, tiny_encoder, ROWS, train=train, options=options)
    (found,) = seen
    assert found[:2] == (4, 2)
    assert found[2] is not None
    assert found[2] > 0
    assert Outcome.load(tmp_path / ATTEMPT / "outcome.json").status == ("done" if action == "warn" else "diverged")
    assert said == (["ended high at 0.001"] if action == "warn" else [])
    assert '"ended high at 0.001"' in (tmp_path / ATTEMPT / "journal.jsonl").read_text(encoding="utf-8")


def test_loss_that_is_not_finite_in_the_dry_run_stops_before_step_1(tiny_encoder: Path, tmp_path: Path) -> None:
    job = runs.job(tmp_path, tiny_encoder, ROWS, options=loss_broken_after(0, lambda loss: loss * NAN))

    with pytest.raises(SetupError, match="your loss returned nan for the longest rows"):
        pipeline.run(job, "train")

    assert runs.events(tmp_path, "train") == []


def test_guard_stop_leaves_the_command_line_with_exit_code_5(tiny_encoder: Path, tmp_path: Path) -> None:
    data = tiny.write_csv(tmp_path / "rows.csv", ROWS)
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", tiny_encoder, data, method={"learning_rate": 1e-60})

    with runs.in_this_process():
        result = fulltune("run", recipe, "--run-folder", tmp_path / "run", "--set", "train.max_steps=1")

    assert result.code == 5
    assert "no parameter changed" in result.err
    assert "Traceback" not in result.err
    assert (tmp_path / "run" / "report.html").exists()
    assert Outcome.load(tmp_path / ATTEMPT / "outcome.json").status == "stopped_by_guard"
    assert not (tmp_path / "run" / "models").exists()
    assert not list((tmp_path / "run").rglob("initial.safetensors"))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/1"), "disk_full"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 102848 vs 102736"), "disk_full"),
        (CheckpointException("load", {1: (MemoryError(), StackSummary())}), "out_of_memory"),
        (GuardStop("the loss is nan"), "stopped_by_guard"),
        (KeyboardInterrupt(), "interrupted"),
        (RecipeError("no"), "refused"),
        (ValueError("no"), "error"),
    ],
)
def test_classify_tells_what_an_exception_means(error: BaseException, status: str, tmp_path: Path) -> None:
    assert worker.outcome_of_error(error, tmp_path)[0] == status


@pytest.mark.parametrize(
    ("error", "reason"),
    [(KeyboardInterrupt(), "interrupted before the first checkpoint"), (FulltuneError([]), "FulltuneError")],
)
def test_only_an_interruption_is_described_as_one(error: BaseException, reason: str, tmp_path: Path) -> None:
    assert worker.outcome_of_error(error, tmp_path)[1] == reason


@pytest.mark.parametrize(("free", "status"), [(4096, "disk_full"), (2**30, "error")])
@pytest.mark.parametrize(
    "error",
    [RuntimeError("basic_ios::clear: iostream error"), OSError("100000 requested and 12272 written")],
)
def test_words_that_may_mean_a_full_disk_do_so_where_it_is_full(
    error: Exception, free: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "disk_free_bytes", lambda path: free)
    assert worker.outcome_of_error(error, tmp_path)[0] == status
    with (
        pytest.raises(DoesNotFitError if status == "disk_full" else type(error)),
        run_folder.explain_os_errors(tmp_path),
    ):
        raise error


def test_disk_full_while_saving_does_not_fit_and_leaves_earlier_checkpoints_sound(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    original = Trainer._save_optimizer_and_scheduler

    def save(self: Any, output_dir: str) -> None:
        if self.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", save)
    with pytest.raises(DoesNotFitError, match="the disk is full") as caught:
        runs.run(tmp_path, tiny_encoder, ROWS, train=TRAIN)

    assert caught.value.exit_code == 3
    folder = tmp_path / "run" / "checkpoints" / "full-seed42"
    # What was half written is gone, so that there is room for the outcome.
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    assert files.find_damage(folder / "checkpoint-2") is None

    monkeypatch.undo()
    assert runs.run(tmp_path, tiny_encoder, ROWS, train=TRAIN).outcome is not None
