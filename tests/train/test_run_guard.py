"""Going back as tables of numbers; then faults planted in whole runs: skipped, gone back, or stopped."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

import fulltune
from fulltune import pipeline
from fulltune.errors import Diverged, GuardStop, InterruptedRun
from fulltune.records.events import Event, Message, StepLogged, StepSkipped
from fulltune.records.plan import Plan
from fulltune.records.training import Outcome
from fulltune.system.run_folder import RunResult
from fulltune.train import checkpoints
from fulltune.train.loop.guarded_step import explain_non_finite
from fulltune.train.loop.step_guard import learning_rate_factor
from fulltune.train.parent import ranks, spawn
from fulltune.train.parent.next_attempt import plan_rollback
from tests import tiny
from tests.plans import outcome, plan
from tests.train import faults, runs

INF, NAN = math.inf, math.nan

# ---- going back ------------------------------------------------------------------------------------------------


def test_run_goes_back_so_often_and_from_the_second_time_on_at_half_the_rate() -> None:
    spiked = outcome("spiked", reason="step 412: the loss is nan", first_bad_step=410)
    first = plan_rollback(plan(), 3, spiked, 300)
    assert first is not None
    assert (first.plan.rollbacks, first.resume) == ((300,), True)
    assert first.reason == (
        "step 412: the loss is nan; returning to the checkpoint of step 300 and continuing at the same rate with the "
        "rows in another order (rollback 1 of at most 3)"
    )
    anew = plan_rollback(first.plan, 3, spiked, 0)
    assert anew is not None
    assert (anew.plan.rollbacks, anew.resume) == ((300, 0), False)
    assert "; starting over at 0.5 of the planned rate (0.0005) with" in anew.reason
    assert plan_rollback(plan(rollbacks=(1, 2, 3)), 3, spiked, 300) is None
    assert plan_rollback(plan(), 0, spiked, 300) is None
    assert plan_rollback(plan(), 3, outcome("diverged"), 300) is None
    assert plan_rollback(plan(), 3, outcome("spiked", first_bad_step=1), 0) is None, "nothing was ever well"


@pytest.mark.parametrize(
    ("rollbacks", "factor"),
    [((), 1.0), ((100,), 1.0), ((100, 80, 80), 0.25), ((0, 60), 0.25)],
)
def test_rate_is_halved_each_time_but_a_first_one_to_a_checkpoint(rollbacks: tuple[int, ...], factor: float) -> None:
    assert learning_rate_factor(rollbacks) == factor


# ---- faults in whole runs --------------------------------------------------------------------------------------

ROWS = tiny.topic_rows(240)
BLOCKS: dict[str, Any] = {
    "data": {"eval_fraction": 0.2, "test_fraction": 0.2},
    "train": {"num_train_epochs": 5, "logging_steps": 1, "save_steps": 20},
}
"""18 steps an epoch."""


def run(
    folder: Path,
    model: Path,
    fault: faults.Fault = faults.nan_gradient,
    steps: Container[int] | Callable[[int], bool] = (),
    listener: Any = lambda event: None,
    **blocks: Any,
) -> RunResult:
    """A run with this fault at these steps."""
    train = {**BLOCKS["train"], **blocks.pop("train", {})}
    job = runs.job(folder, model, ROWS, options={"listener": listener}, **{**BLOCKS, **blocks, "train": train})
    met = steps if callable(steps) else steps.__contains__
    with runs.in_this_process(), faults.planted(fault, met):
        return pipeline.run(job, "train")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"), "bert")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory, model: Path) -> RunResult:
    return run(tmp_path_factory.mktemp("clean"), model)


@pytest.mark.parametrize(
    ("fault", "micro"), [(faults.nan_gradient, 8), (faults.infinite_gradient, 2), (faults.infinite_logits, 8)]
)
def test_step_that_is_not_finite_is_left_out_and_the_run_goes_on(
    fault: faults.Fault, micro: int, model: Path, clean: RunResult, tmp_path: Path
) -> None:
    events: list[Event] = []
    result = run(tmp_path, model, fault, [30], events.append, train={"micro_batch_size": micro})
    assert result.outcome is not None
    assert clean.outcome is not None
    assert (result.outcome.status, result.outcome.steps) == ("done", clean.outcome.steps)
    [skipped] = [event for event in events if isinstance(event, StepSkipped)]
    assert skipped.step == 30
    assert "is nan" in skipped.reason or "is inf" in skipped.reason
    assert len(skipped.rows) == 8
    losses = {event.step: event.loss for event in events if isinstance(event, StepLogged)}
    assert sorted(losses) == list(range(1, clean.outcome.steps + 1))
    assert all(loss is not None and math.isfinite(loss) for loss in losses.values())
    assert runs.final_weights(tmp_path)
    journal = (tmp_path / "run/attempts/full-seed42-01/journal.jsonl").read_text(encoding="utf-8")
    assert f"step 30: {skipped.reason}; train rows " in journal


ANSWERED: dict[str, Any] = {
    "task": "causal-lm",
    "data": {"prompt": "prompt", "completion": "completion", "eval_fraction": 0.2, "test_fraction": 0.2},
    "method": {"kind": "full", "learning_rate": 6e-3},
    "train": {
        **{"max_steps": 130, "global_batch_size": 16, "logging_steps": 1, "save_steps": 20},
        **{"eval_strategy": "steps", "eval_steps": 130},
    },
}
"""Learns its answers: the loss falls from 6 to 0.5, as steadily as in real runs."""


def test_corrupted_rows_are_left_out_and_many_of_them_are_gone_back_from(tmp_path: Path) -> None:
    events: list[Event] = []
    model = tiny.save_model(tmp_path / "model", "llama")
    job = runs.job(tmp_path, model, tiny.pair_rows(300), options={"listener": events.append}, **ANSWERED)
    with runs.in_this_process(), faults.planted(faults.corrupted_labels, range(110, 115).__contains__):
        result = pipeline.run(job, "train")
    assert result.outcome is not None
    assert (result.outcome.status, result.outcome.steps) == ("done", 130)
    skipped = [event for event in events if isinstance(event, StepSkipped)]
    # The fifth is one too many.
    assert [event.step for event in skipped] == [110, 111, 112, 113]
    assert all("times the median, and the loss" in event.reason and len(event.rows) == 16 for event in skipped)
    assert Plan.load(tmp_path / "run" / "plan" / "full.json").rollbacks == (100,)


def test_skipped_step_changes_no_weight(model: Path, tmp_path: Path) -> None:
    """Of a run of one step that is skipped nothing moves, with weight decay on."""
    with pytest.raises(GuardStop, match="no parameter changed"):
        run(tmp_path, model, faults.nan_gradient, [1], train={"num_train_epochs": None, "max_steps": 1})


def test_trouble_that_stays_goes_back_to_a_healthy_checkpoint(model: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    result = run(tmp_path, model, faults.nan_gradient, range(40, 45), events.append)
    planned = Plan.load(tmp_path / "run" / "plan" / "full.json")
    assert planned.rollbacks == (36,), "the epoch's end, before the trouble"
    [failed] = [event for event in events if isinstance(event, Message) and event.level == "next attempt"]
    assert "returning to the checkpoint of step 36" in failed.text
    assert result.outcome is not None
    assert (result.outcome.status, result.outcome.attempt, result.outcome.steps) == ("done", 2, 90)
    first = Outcome.load(tmp_path / "run/attempts/full-seed42-01/outcome.json")
    assert (first.status, first.first_bad_step) == ("spiked", 40)
    rates = [(event.step, event.learning_rate) for event in events if isinstance(event, StepLogged)]
    usual = dict(rates[:40])
    later = dict(rates[rates.index((39, usual[39])) + 1 :])
    assert usual[39] is not None
    assert (later[37], later[39]) == (usual[37], usual[39]), "the first time the rate is kept"
    assert later[60] == pytest.approx(1e-3 * (90 - 59) / 81), "9 steps of warm-up"


@pytest.mark.long
def test_trouble_that_comes_again_ends_after_so_many_rollbacks_with_what_was_tried(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"step \d+, before the update: the loss is nan") as caught:
        run(tmp_path, model, faults.infinite_logits, lambda step: step > 30, train={"max_rollbacks": 1})
    assert caught.value.exit_code == 5
    assert Plan.load(tmp_path / "run" / "plan" / "full.json").rollbacks == (20,)


def test_without_rollbacks_the_run_stops(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="step 33"):
        run(tmp_path, model, faults.nan_gradient, range(31, 34), train={"max_rollbacks": 0})
    folder = tmp_path / "run/checkpoints/full-seed42"
    sound, _ = checkpoints.newest_undamaged_checkpoint(folder)
    assert sound is not None
    assert all(bool(one.isfinite().all()) for one in load_file(sound / "model.safetensors").values())


@pytest.mark.long
def test_resumed_run_remembers_what_the_guard_saw(model: Path, clean: RunResult, tmp_path: Path) -> None:
    def stop_at(step: int) -> Callable[[Event], None]:
        calls: list[int] = []

        def listener(event: Event) -> None:
            if isinstance(event, StepLogged) and event.step == step and not calls:
                calls.append(step)
                raise KeyboardInterrupt

        return listener

    with pytest.raises(InterruptedRun):
        run(tmp_path / "clean", model, listener=stop_at(50))
    remembered = checkpoints.load_guard_state(tmp_path / "clean/run/checkpoints/full-seed42/checkpoint-40")
    assert remembered is not None
    assert len(remembered["losses"]) == 40
    run(tmp_path / "clean", model)
    weights, other = runs.final_weights(tmp_path / "clean"), runs.final_weights(clean.folder.parent)
    assert all(torch.equal(weights[name], other[name]) for name in other)

    with pytest.raises(InterruptedRun):
        run(tmp_path / "spoilt", model, faults.nan_gradient, [39, 40], stop_at(41))
    # Its first step is 41: the third in a row that is not finite.
    run(tmp_path / "spoilt", model, faults.nan_gradient, [1])
    assert Plan.load(tmp_path / "spoilt/run/plan/full.json").rollbacks == (36,)


# ---- why it was not finite -------------------------------------------------------------------------------------


def spoilt(layer: Any) -> None:
    layer.register_forward_hook(lambda module, inputs, output: output * INF)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model, batch: None, "every module's output is finite in fp32"),
        (lambda model, batch: batch.update(labels=torch.full((2,), -100)), "all labels are masked"),
        (
            lambda model, batch: model.bert.encoder.layer[1].output.dense.bias.data.fill_(NAN),
            "the weights of bert.encoder.layer.1.output.dense.bias are not finite",
        ),
        (
            lambda model, batch: spoilt(model.bert.encoder.layer[1].output.dense),
            "bert.encoder.layer.1.output.dense (Linear) is the first module whose output is not finite in fp32",
        ),
        (lambda model, batch: batch.update(position_ids=torch.tensor([[10**6]])), "could not be determined ("),
    ],
)
def test_batch_is_looked_at_and_run_again(change: Callable[[Any, dict[str, Any]], None], words: str) -> None:
    model = BertForSequenceClassification(tiny.config("bert", tiny.encoder_tokenizer(), num_labels=2)).train()
    batch = {"input_ids": torch.tensor([[2, 11, 3], [2, 12, 3]]), "labels": torch.tensor([0, 1])}
    change(model, batch)
    before = torch.get_rng_state()
    assert words in explain_non_finite(model, [batch])
    if "masked" in words:  # of the whole step: a micro batch alone is no cause
        whole = {**batch, "labels": torch.tensor([0, 1])}
        assert "masked" not in explain_non_finite(model, [batch, whole])
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(one.grad is None for one in model.parameters())


# ---- with a Trainer of one's own -------------------------------------------------------------------------------


class Theirs(transformers.Trainer):
    """As libraries do it: a loss of its own, and what it does before a step."""

    spoilt: Container[int] = ()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = model(**inputs).loss
        return loss * NAN if self.state.global_step + 1 in self.spoilt else loss


class Mine(fulltune.Guarded, Theirs):
    """The guard stands first."""


@pytest.mark.parametrize(("spoilt", "stops"), [([3], False), ([3, 4, 5], True)])
def test_mixin_guards_a_trainer_of_ones_own(
    spoilt: list[int], stops: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny.config("bert", tiny.encoder_tokenizer(), num_labels=2))
    rows = [{"input_ids": [2, 10 + number, 3], "labels": number % 2} for number in range(32)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=8, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    trainer = Mine(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]  # of this type
    trainer.spoilt = spoilt
    moments: dict[int, float] = {}
    rates: list[float] = []

    class Looks(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
            rates.append(keywords["optimizer"].param_groups[0]["lr"])

        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            first = next(iter(optimizer.state.values()))
            moments[state.global_step] = float(first["exp_avg"].norm()) + float(first["step"])

    trainer.add_callback(Looks())
    with pytest.raises(Diverged, match="step 5, before the update") if stops else contextlib.nullcontext():
        trainer.train()
    assert "step 3 is skipped: the loss is nan" in caplog.text
    assert moments[3] == moments[2] != moments[1]
    assert rates == pytest.approx([5e-5 * (8 - step) / 8 for step in range(4 if stops else 8)]), "the schedule's"
    assert all(bool(one.isfinite().all()) for one in model.parameters())


SCRIPT = """
import json, sys
import torch, transformers
import fulltune
from transformers import BertConfig, BertForSequenceClassification

class Mine(fulltune.Guarded, transformers.Trainer):
    def training_step(self, model, inputs, *rest):
        # Of the second process alone.
        if self.state.global_step + 1 == 3 and self.args.process_index == 1:
            inputs["labels"] = inputs["labels"].float() * float("nan")
        return super().training_step(model, inputs, *rest)

    def compute_loss(self, model, inputs, *rest, **more):
        labels = inputs.pop("labels")
        return torch.nn.functional.mse_loss(model(**inputs).logits[:, 0], labels.float())

torch.manual_seed(0)
sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64)
model = BertForSequenceClassification(BertConfig(**sizes, num_labels=1))
rows = [{"input_ids": [2, 10 + number, 3], "labels": number % 2} for number in range(32)]
arguments = transformers.TrainingArguments(
    sys.argv[1], max_steps=6, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
    per_device_train_batch_size=2,
)
trainer = Mine(model=model, args=arguments, train_dataset=rows)
trainer.train()
sizes = [float(one.detach().double().sum()) for one in model.parameters()]
with open(f"{sys.argv[1]}/rank{arguments.process_index}.json", "w") as file:
    json.dump({"skipped": trainer.guard_history.skipped, "sizes": sizes}, file)
"""


@pytest.mark.long
def test_two_processes_skip_together_when_one_is_not_finite(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, "-m", spawn.LAUNCHER, *ranks.ONE_MACHINE, "--nproc-per-node=2"]
    subprocess.run([*command, str(tmp_path / "script.py"), str(tmp_path)], check=True, timeout=300)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    assert first == second, "the same steps, and the same weights"
    assert first["skipped"] == [3]
    assert all(math.isfinite(size) for size in first["sizes"])
