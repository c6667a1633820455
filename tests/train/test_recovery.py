"""Memory runs out somewhere in a run: it finishes, with the weights of a run that was left in peace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fulltune import pipeline
from fulltune.errors import DoesNotFitError, InterruptedRun
from fulltune.evaluate import scoring
from fulltune.inference.run import run_rows
from fulltune.records.events import Listener
from fulltune.records.plan import Plan
from fulltune.records.training import Outcome
from fulltune.train import checkpoints
from fulltune.train.loop.trainer import FullTrainer
from fulltune.train.request import Request, number_in
from fulltune.train.worker import evaluation, loading, weights
from tests import tiny
from tests.contract.command import fulltune
from tests.forked_ranks import Forks
from tests.plans import outcome
from tests.train import runs

ROWS = tiny.topic_rows(64)
TRAIN = {"num_train_epochs": 1, "logging_steps": 1, "save_steps": 2, "global_batch_size": 8, "micro_batch_size": 8}
BLOCKS: dict[str, Any] = {"train": TRAIN, "evaluate": {"batch_size": 16}, "method": {"head_init": "random"}}
"""Results of different micro batches are compared: a head that starts from a probe makes rounding larger."""


NARROW = {"initializer_range": 0.02}


def no_memory() -> None:
    """In a card's words; a CPU's are said by the real limit below."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without dropout, whose masks are drawn for each micro batch."""
    folder = tmp_path_factory.mktemp("recovery") / "model"
    return tiny.save_model(folder, "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **NARROW)


@pytest.fixture(scope="module")
def unlimited(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unlimited")
    runs.run(folder, model, ROWS, **BLOCKS)
    return folder


class Shortage:
    """Stands for a function that finds no memory in the first `times` calls for which `when` is true."""

    def __init__(self, real: Callable[..., Any], times: int, when: Callable[..., bool] = lambda *_, **__: True) -> None:
        self.real = real
        self.left = times
        self.when = when

    def __call__(self, *given: Any, **named: Any) -> Any:
        if self.left and self.when(*given, **named):
            self.left -= 1
            no_memory()
        return self.real(*given, **named)

    def __get__(self, instance: Any, owner: Any) -> Callable[..., Any]:
        return lambda *given, **named: self(instance, *given, **named)


def at_step(step: int, times: int) -> Shortage:
    return Shortage(FullTrainer.training_step, times, lambda trainer, *_: trainer.state.global_step == step - 1)


def saving(step: int, times: int) -> Shortage:
    from transformers import Trainer

    real = Trainer._save_optimizer_and_scheduler
    return Shortage(real, times, lambda trainer, *_: trainer.state.global_step == step)


def put(where: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let memory run out there so many times."""
    match where:
        case "load":
            monkeypatch.setattr(loading, "load_for_training", Shortage(loading.load_for_training, times))
        case "first step":
            monkeypatch.setattr(FullTrainer, "training_step", at_step(1, times))
        case "later step":
            monkeypatch.setattr(FullTrainer, "training_step", at_step(4, times))
        case "evaluation":
            large = Shortage(run_rows, 99, lambda *given: given[-1].batch_size > 16 // 2**times)
            monkeypatch.setattr(evaluation, "run_rows", large)
        case "save":
            monkeypatch.setattr(FullTrainer, "_save_optimizer_and_scheduler", saving(4, times))
        case "last save":
            monkeypatch.setattr(weights, "save_model", Shortage(weights.save_model, times))


def requests_of(folder: Path) -> list[Request]:
    return [Request.load(path) for path in sorted((folder / "run").glob("attempts/*/request.json"))]


def journal(folder: Path) -> list[tuple[str, str]]:
    """Attempt and what was changed after it."""
    found = []
    for path in sorted((folder / "run").glob("attempts/*/journal.jsonl")):
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        found += [(path.parent.name, line["detail"]) for line in lines if line["event"] == "next attempt"]
    return found


def last_losses(folder: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in runs.events(folder, "train")}


def assert_same_result(one: Path, other: Path, *, exactly: bool) -> None:
    tolerance = {"rtol": 0.0, "atol": 0.0} if exactly else {"rtol": 1e-4, "atol": 1e-5}
    left, right = runs.final_weights(one), runs.final_weights(other)
    for name in left:
        torch.testing.assert_close(left[name], right[name], **tolerance)
    losses = last_losses(other)
    assert last_losses(one) == (losses if exactly else pytest.approx(losses, rel=1e-4))


@pytest.mark.parametrize(
    ("where", "times", "phase", "micro", "eval_batch", "from_step"),
    [
        ("load", 1, "loading", [8, 8], [16, 16], [0, 0]),
        ("first step", 2, "step", [8, 4, 2], [16, 8, 4], [0, 0, 0]),
        ("later step", 1, "step", [8, 4], [16, 8], [0, 2]),
        ("evaluation", 2, "evaluation", [8, 8, 8], [16, 8, 4], [0, 0, 0]),
        ("save", 1, "saving", [8, 8], [16, 16], [0, 2]),
        ("last save", 1, "saving", [8, 8], [16, 16], [0, 7]),
    ],
)
def test_run_that_ran_out_of_memory_finishes_with_the_same_result(
    where: str,
    times: int,
    phase: str,
    micro: list[int],
    eval_batch: list[int],
    from_step: list[int],
    model: Path,
    unlimited: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put(where, times, monkeypatch)

    reached = runs.run(tmp_path, model, ROWS, **BLOCKS)

    asked = requests_of(tmp_path)
    assert [request.plan.micro_batch_size for request in asked] == micro
    assert [request.plan.eval_batch_size for request in asked] == eval_batch
    assert {request.plan.global_batch_size for request in asked} == {8}
    steps = [number_in(Path(request.checkpoint)) if request.checkpoint else 0 for request in asked]
    assert steps == from_step
    failed = [Outcome.load(request.folder / "outcome.json") for request in asked[:-1]]
    assert {(one.status, one.phase) for one in failed} == {("out_of_memory", phase)}
    assert [name for name, _ in journal(tmp_path)] == [request.folder.name for request in asked[:-1]]
    assert reached.outcome is not None
    assert reached.outcome.status == "done"
    assert_same_result(tmp_path, unlimited, exactly=len(set(micro)) == 1)


def test_run_that_ran_out_of_memory_while_resuming_goes_on_from_the_same_checkpoint(
    model: Path, unlimited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = runs.at_step(5, runs.fail)
    with pytest.raises(Exception, match="injected"):
        runs.run(tmp_path, model, ROWS, options={"listener": stop}, **BLOCKS)
    monkeypatch.setattr(checkpoints, "load_weights", Shortage(checkpoints.load_weights, 1))

    runs.run(tmp_path, model, ROWS, **BLOCKS)

    assert [Path(request.checkpoint or "none").name for request in requests_of(tmp_path)] == [
        "none",
        "checkpoint-4",
        "checkpoint-4",
    ]
    assert Outcome.load(requests_of(tmp_path)[1].folder / "outcome.json").phase == "resuming"
    assert_same_result(tmp_path, unlimited, exactly=True)


# ---- what is said and kept -------------------------------------------------------------------------------------


def test_changed_plan_is_kept_by_a_later_command(
    model: Path, unlimited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("first step", 1, monkeypatch)
    import signal

    ask = runs.at_step(5, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(InterruptedRun):
        runs.run(tmp_path, model, ROWS, options={"listener": ask}, **BLOCKS)

    runs.run(tmp_path, model, ROWS, **BLOCKS)

    assert [request.plan.micro_batch_size for request in requests_of(tmp_path)] == [8, 4, 4]
    kept = Plan.load(tmp_path / "run" / "plan" / "full.json")
    assert kept == requests_of(tmp_path)[-1].plan
    assert_same_result(tmp_path, unlimited, exactly=False)


def test_limit_that_no_fallback_can_meet_ends_with_exit_code_3_and_all_of_them(model: Path, tmp_path: Path) -> None:
    data = tiny.write_csv(tmp_path / "rows.csv", ROWS)
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", model, data, **BLOCKS)
    seen: list[tuple[int, bool, str]] = []

    def attempt(request: Request, listener: Listener) -> Outcome:
        plan = request.plan
        seen.append((plan.micro_batch_size, plan.activation_checkpointing, plan.optim))
        return outcome("out_of_memory", request.attempt, phase="step", reason="no memory here")

    with runs.in_this_process(attempt):
        result = fulltune("run", recipe, "--run-folder", tmp_path / "run")

    plain = "adamw_torch_fused"
    sizes = [(size, False, plain) for size in (8, 4, 2, 1)]
    assert seen == [*sizes, (1, True, plain), (1, True, "adamw_8bit")]
    assert result.code == 3
    assert "Traceback" not in result.err
    words = " ".join(result.err.split())
    assert "no memory here" in words
    assert "micro batch 4 instead of 8, with the same global batch of 8" in words
    assert "not possible: activation checkpointing: already on" in words
    assert "not possible: chunked loss: text-classification has no logits per token" in words
    assert "not possible: 8-bit AdamW states: already on" in words
    assert "not possible: offload: without a GPU, everything is already in host memory" in words
    assert "what may help: " in words


def test_own_loss_has_no_second_attempt_and_says_so(model: Path, tmp_path: Path) -> None:
    def loss(outputs: Any, labels: Any, num_items_in_batch: Any) -> Any:
        no_memory()

    with pytest.raises(DoesNotFitError, match="not tried: smaller micro batch: with your own compute_loss") as caught:
        pipeline.run(runs.job(tmp_path, model, ROWS, options={"compute_loss": loss}, **BLOCKS), "train")

    assert caught.value.exit_code == 3
    assert len(requests_of(tmp_path)) == 1


# ---- evaluation in the parent ----------------------------------------------------------------------------------


def test_evaluation_goes_on_with_smaller_batches_and_the_same_scores(
    model: Path, unlimited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = runs.run(unlimited, model, ROWS, until="evaluate", **BLOCKS).scores
    large = Shortage(run_rows, 99, lambda *given: given[-1].batch_size > 4)
    monkeypatch.setattr(scoring, "run_rows", large)

    short = runs.run(tmp_path, model, ROWS, until="evaluate", **BLOCKS).scores

    assert large.left < 99
    for one, other in zip(short, whole, strict=True):
        # The probe is fitted in each run, here on states from smaller batches. Its solver stops when it is near enough,
        # so rounding moves where that is: with the plainest kernels its loss by a ten-thousandth of itself.
        within = {"rel": 1e-3} if "probe" in one.name else {"abs": 1e-5}
        for name, estimate in other.metrics.items():
            assert one.metrics[name].value == pytest.approx(estimate.value, **within)


def test_evaluation_that_does_not_fit_at_all_keeps_the_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "run_rows", Shortage(run_rows, 99))

    with pytest.raises(DoesNotFitError) as caught:
        runs.run(tmp_path, model, ROWS, until="evaluate", **BLOCKS)

    assert str(caught.value) == (
        "scoring baseline-probe: memory ran out: CUDA out of memory. Tried to allocate 2.00 GiB.; even the smallest "
        "batch failed; free memory and run the same command again. The trained model is saved"
    )
    monkeypatch.undo()
    assert len(runs.run(tmp_path, model, ROWS, until="evaluate", **BLOCKS).scores) == 4
    assert len(requests_of(tmp_path)) == 1


# ---- a real limit ----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_real_limit_on_a_real_process_is_met_by_smaller_micro_batches(forks: Forks, tmp_path: Path) -> None:
    """The plan is made to believe in 32 rows at once, whose attention scores alone take 0.7 GiB."""
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    longer = {"tokenizer": tiny.encoder_tokenizer(512), "max_position_embeddings": 512}
    model = tiny.save_model(tmp_path / "model", "bert", **longer, **size, **dropout)
    rows = [{**row, "text": row["text"] + " the town" * 220} for row in tiny.topic_rows(44)]
    train = {"max_steps": 1, "warmup_steps": 0, "global_batch_size": 32, "memory_limit": "1GiB"}
    job = runs.job(tmp_path, model, rows, train=train, model={"attn_implementation": "eager"})
    pipeline.run(job, "plan")
    path = tmp_path / "run" / "plan" / "full.json"
    hopeful = {"micro_batch_size": 32, "gradient_accumulation_steps": 1}
    Plan.load(path).model_copy(update=hopeful).save(path)

    with forks.instead_of_torchrun():
        reached = pipeline.run(job, "train")

    first, *_, last = requests_of(tmp_path)
    failed = Outcome.load(first.folder / "outcome.json")
    assert (failed.status, failed.phase) == ("out_of_memory", "step")
    assert "allocate memory" in failed.reason
    assert last.plan.micro_batch_size < 32
    assert last.plan.global_batch_size == 32
    assert reached.outcome is not None
    assert reached.outcome.status == "done"
    assert reached.outcome.peak_memory_bytes <= 2**30
