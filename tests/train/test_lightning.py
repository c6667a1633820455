"""A recipe on a Lightning Trainer: the curve of a run, the guards, what Lightning keeps; one process, and two."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fulltune import api
from fulltune.errors import RecipeError, SetupError, Spiked
from fulltune.recipe.file import load_recipe
from fulltune.system.hardware import num_cores
from tests import tiny
from tests.invariant.test_same_curve import answer_rows, label_rows, number_rows
from tests.train import runs

L = pytest.importorskip("lightning", reason="needs lightning; pip install 'fulltune[lightning]'")

from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint  # noqa: E402  # after the skip

from fulltune.lightning import FineTuning, FineTuningModule, prepare  # noqa: E402  # after the skip
from fulltune.lightning.prepare import choose_package, unsupported_settings  # noqa: E402  # after the skip

PREPARING = sys.modules["fulltune.lightning.prepare"]  # its package has a function of this name
TRAIN: dict[str, Any] = {
    **{"max_steps": 20, "global_batch_size": 8, "micro_batch_size": 2, "logging_steps": 1, "warmup_steps": 2},
    **{"eval_strategy": "steps", "eval_steps": 10},
}
TWO = pytest.mark.skipif(num_cores() < 2, reason="needs a CPU core per process")


class Steps(Callback):
    """The loss of each step; acts before one."""

    def __init__(self, before: Callable[[int, Any], None] = lambda step, module: None) -> None:
        self.losses: list[float] = []
        self._before = before

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._before(trainer.global_step + 1, pl_module)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step > len(self.losses):
            self.losses.append(float(trainer.callback_metrics["train_loss"]))


def written(folder: Path, kind: str = "bert", rows: runs.Rows | None = None, **blocks: Any) -> Path:
    """A recipe, with its rows and model in the folder."""
    rows = label_rows() if rows is None else rows
    plain = all(isinstance(value, str) for value in rows[0].values())
    write, name = (tiny.write_csv, "rows.csv") if plain else (tiny.write_jsonl, "rows.jsonl")
    model = folder / "model"
    if not model.exists():
        tiny.save_model(model, kind)
    data = write(folder / name, rows)
    return tiny.write_recipe(
        folder / "recipe.yaml", model, data, **{**blocks, "train": {**TRAIN, **blocks.get("train", {})}}
    )


def trainer_of(job: FineTuning, *callbacks: Callback, **changes: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    arguments = {**job.trainer_arguments(), **quiet, "enable_model_summary": False, **changes}
    return L.Trainer(**arguments, callbacks=list(callbacks))


def fitted(
    folder: Path, *callbacks: Callback, fit: dict[str, Any] | None = None, **changes: Any
) -> tuple[Any, FineTuning]:
    job = prepare(folder / "recipe.yaml", run_folder=folder / "lightning")
    trainer = trainer_of(job, *callbacks, **changes)
    trainer.fit(job.module, datamodule=job.data, **(fit or {}))
    return trainer, job


def test_metrics_are_monitored_and_the_best_checkpoint_is_saved_as_a_plain_folder(tmp_path: Path) -> None:
    written(tmp_path, train={"max_steps": 4, "eval_steps": 2})
    job = prepare(tmp_path / "recipe.yaml", ["evaluate.metric=loss"], run_folder=tmp_path / "run")
    best = ModelCheckpoint(tmp_path / "checkpoints", **job.monitor())
    trainer = trainer_of(job, best, EarlyStopping(**job.monitor()), enable_checkpointing=True)
    trainer.fit(job.module, datamodule=job.data)

    assert trainer.global_step == 4
    assert job.monitor() == {"monitor": "eval_loss", "mode": "min"}
    job.save(tmp_path / "model", checkpoint=best.best_model_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    for name, values in loaded.state_dict().items():
        torch.testing.assert_close(values, job.module.model.state_dict()[name], rtol=0, atol=0)
    (answer,) = api.load_predictor(tmp_path / "model").predict([{"text": label_rows()[0]["text"]}])
    assert answer["label"] in job.module.objective.summary.labels


def test_what_cannot_be_had_with_lightning_is_refused_all_at_once(tmp_path: Path) -> None:
    train = {"optim": "lomo", "extra": {"deepspeed": {}}, "save_steps": 5, "report_to": ["tensorboard"]}
    recipe = written(tmp_path, method={"kind": "lora"}, train={**train, "max_rollbacks": 3})
    with pytest.raises(RecipeError) as refused:
        prepare(recipe)
    assert [problem.partition(":")[0] for problem in refused.value.problems] == [
        *("train.extra", "train.save_steps", "train.report_to", "method.kind", "train.optim"),
    ]
    assert "pass an engine's settings to Lightning's strategy" in str(refused.value)
    assert "pass ModelCheckpoint(every_n_train_steps=...) to the Trainer" in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_answers_are_generated_without_lightning_only(tmp_path: Path) -> None:
    block = {"metric": "exact_match", "choose_rows": 20, "generate_rows": 9}
    recipe = load_recipe(tiny.write_recipe(tmp_path / "a.yaml", "m", "r", task="causal-lm", evaluate=block))
    problems = [problem.partition(":")[0] for problem in unsupported_settings(recipe)]
    assert problems == ["evaluate.choose_rows", "evaluate.metric"]


def test_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the labels are numbers, which only 'fulltune run' supports"):
        prepare(written(tmp_path, rows=number_rows(), data={"label": "score"}))


class Strategy:
    """In place of Lightning's, whose own refuses a CPU."""

    handles_gradient_accumulation = True


class DeepSpeedStrategy(Strategy):
    pass


class FSDPStrategy(Strategy):
    pass


@pytest.mark.parametrize(
    ("rows", "strategy", "world_size", "problem"),
    [
        (64, DeepSpeedStrategy, 2, ""),
        (64 + 24, DeepSpeedStrategy, 2, "an epoch's last step has fewer micro batches than 4"),
        (64 + 24, FSDPStrategy, 2, ""),
        (64 + 25, DeepSpeedStrategy, 2, ""),
        (64, FSDPStrategy, 1, r"overrides=\['train.num_processes=1'\]"),
    ],
)
def test_trainer_must_train_the_planned_global_batches(
    rows: int, strategy: type[Strategy], world_size: int, problem: str
) -> None:
    plan: Any = SimpleNamespace(
        num_processes=2, gradient_accumulation_steps=4, global_batch_size=32, micro_batch_size=4
    )
    summary: Any = SimpleNamespace(splits={"train": SimpleNamespace(rows=rows)}, mixed=())
    module: Any = object.__new__(FineTuningModule)
    module.plan, module.objective = plan, SimpleNamespace(summary=summary)
    module.trainer = SimpleNamespace(strategy=strategy(), world_size=world_size, accumulate_grad_batches=4)
    if problem:
        with pytest.raises(SetupError, match=problem):
            module.on_fit_start()
        return
    module.on_fit_start()
    assert module.sharded_by == strategy.__name__


def test_missing_lightning_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PREPARING, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match="needs the package lightning; pip install"):
        choose_package("lightning")


@pytest.mark.slow
def test_pytorch_lightning_trains_as_lightning_does(tmp_path: Path) -> None:
    recipe = written(tmp_path, train={"max_steps": 2, "eval_steps": 2, "warmup_steps": 0})
    losses = []
    for package in (L, pytest.importorskip("pytorch_lightning", reason="lightning brings it")):
        job = prepare(recipe, run_folder=tmp_path / "run", package=package.__name__)
        assert isinstance(job.module, FineTuningModule)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        steps = Steps()
        trainer = package.Trainer(**job.trainer_arguments(), **quiet, callbacks=[steps])
        trainer.fit(job.module, datamodule=job.data)
        losses.append([*steps.losses, float(trainer.callback_metrics[job.monitor()["monitor"]])])
        assert job.module.guard_history.most_rows == 8
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]


def packed_texts() -> list[dict[str, str]]:
    return [{"text": " ".join(tiny.FOOD[: 1 + number % 5]) + f" {number}"} for number in range(200)]


CASES: dict[str, tuple[str, Callable[[], runs.Rows], dict[str, Any]]] = {
    "single_label": ("bert", label_rows, {}),
    "answers": ("llama", answer_rows, {"task": "causal-lm"}),
    "packed answers": ("llama", answer_rows, {"task": "causal-lm", "data": {"packing": True}}),
    "packed text": ("llama", packed_texts, {"task": "causal-lm", "data": {"max_length": 64}}),
    "own optimizer": ("bert", label_rows, {"train": {"optim": "adamw_8bit"}, "method": {"head_learning_rate": 2e-3}}),
    "bf16": ("bert", label_rows, {"train": {"precision": "bf16", "activation_checkpointing": True}}),
}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_curve_is_that_of_a_run(case: str, tmp_path: Path) -> None:
    """Dropout, accumulation, a part of a global batch at each epoch's end, a head from a probe, evaluations between."""
    kind, rows, blocks = CASES[case]
    written(tmp_path, kind, rows(), **blocks)
    train = {**TRAIN, **blocks.get("train", {})}
    runs.run(tmp_path, tmp_path / "model", rows(), **{**blocks, "train": train})
    steps = Steps()
    trainer, job = fitted(tmp_path, steps)

    expected = [event["loss"] for event in runs.events(tmp_path, "train")]
    near = 0.1 if case == "bf16" else 1e-4
    assert len(expected) == 20
    assert steps.losses[0] == pytest.approx(expected[0], abs=1e-4)
    assert steps.losses == pytest.approx(expected, abs=near)
    scores = runs.events(tmp_path, "eval")[-1]["metrics"]
    (validated,) = trainer.validate(job.module, datamodule=job.data, verbose=False)
    metrics = {name.removeprefix("eval_"): value for name, value in validated.items()}
    names = [name for name in scores if name in metrics]
    assert job.module.plan.metric in names
    assert [metrics[name] for name in names] == pytest.approx([scores[name] for name in names], abs=20 * near)


class Planted(Callback):
    """Changes the gradients of steps, when they are there."""

    def __init__(self, at: Callable[[int, int], bool], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._at, self._change = at, change

    def on_after_backward(self, trainer: Any, pl_module: FineTuningModule) -> None:
        if self._at(trainer.global_step + 1, trainer.global_rank):
            for parameter in pl_module.parameters():
                parameter.grad = self._change(parameter.grad)


def _nan(gradient: torch.Tensor) -> torch.Tensor:
    return torch.full_like(gradient, math.nan)


class Weights(Callback):
    """Remembers a weight after each step."""

    def __init__(self) -> None:
        self.after: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: FineTuningModule, *_: Any) -> None:
        if trainer.global_step > len(self.after):
            self.after.append(next(pl_module.parameters()).detach().clone())


@pytest.mark.long
def test_step_that_is_not_finite_is_skipped_and_three_in_a_row_stop(tmp_path: Path) -> None:
    written(tmp_path, train={"max_steps": 8})
    weights = Weights()
    with pytest.warns(UserWarning, match="step 4 is skipped: the gradient norm is nan"):
        trainer, job = fitted(tmp_path, Planted(lambda step, _: step == 4, _nan), weights)
    moved = [not torch.equal(one, other) for one, other in zip(weights.after, weights.after[1:], strict=False)]
    assert moved == [True, True, False, True, True, True, True]  # the fourth step moved nothing
    assert job.module.guard_history.skipped == (4,)
    assert trainer.lr_scheduler_configs[0].scheduler.get_last_lr() == [0.0, 0.0]  # the schedule went on as planned

    weights = Weights()
    with pytest.raises(Spiked, match="step 5, before the update: the gradient norm is nan") as stopped:
        fitted(tmp_path, Planted(lambda step, _: step >= 3, _nan), weights)
    assert stopped.value.since == 3
    assert bool(weights.after[-1].isfinite().all())


@pytest.mark.long
def test_training_goes_on_inside_an_epoch_from_lightnings_checkpoint(tmp_path: Path) -> None:
    """Without dropout the curve is that of one that was not stopped."""
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tiny.save_model(tmp_path / "model", "bert", **plain)
    written(tmp_path)
    whole = Steps()
    fitted(tmp_path, whole)
    saved = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=7, save_top_k=-1, filename="{step}")
    fitted(tmp_path, saved, enable_checkpointing=True, max_steps=9)

    rest = Steps()
    rest.losses = [0.0] * 7
    checkpoint = tmp_path / "checkpoints" / "step=7.ckpt"
    trainer, job = fitted(tmp_path, rest, fit={"ckpt_path": str(checkpoint)})
    assert len(job.module.guard_history.losses) == 20
    assert trainer.global_step == 20
    assert rest.losses[7:] == pytest.approx(whole.losses[7:], abs=1e-5)


@TWO
@pytest.mark.long
def test_two_processes_are_one_run_and_skip_together(tmp_path: Path) -> None:
    """A gradient that is not finite in one process is one in both: DDP sums before the guard looks."""
    from lightning.pytorch.strategies import DDPStrategy

    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.02}
    tiny.save_model(tmp_path / "model", "bert", **plain)
    written(tmp_path, train={"num_processes": 2}, method={"head_init": "random"})
    job = prepare(tmp_path / "recipe.yaml", run_folder=tmp_path / "lightning")

    class Written(Steps):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            curve = {"losses": self.losses, "skipped": pl_module.guard_history.skipped}
            torch.save(curve, tmp_path / f"of-{trainer.global_rank}")

    def train(*callbacks: Callback) -> list[dict[str, Any]]:
        strategy = DDPStrategy(process_group_backend="gloo", start_method="fork")
        trainer = trainer_of(job, Written(), *callbacks, strategy=strategy)
        trainer.fit(job.module, datamodule=job.data)
        return [torch.load(tmp_path / f"of-{rank}") for rank in range(2)]

    of_both = train()
    runs.run(tmp_path, tmp_path / "model", label_rows(), train=TRAIN, method={"head_init": "random"})
    expected = [event["loss"] for event in runs.events(tmp_path, "train")]
    assert len(expected) == 20
    assert of_both[0]["losses"] == pytest.approx(expected, abs=1e-4)
    assert of_both[0] == of_both[1]
    of_both = train(Planted(lambda step, rank: (step, rank) == (4, 1), _nan))
    assert [one["skipped"] for one in of_both] == [(4,), (4,)]


DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed: make test-zero")


@DEEPSPEED
@pytest.mark.long
@pytest.mark.zero
@pytest.mark.parametrize("options", ["lightning", "pytorch_lightning offload"])
def test_behind_that_refusal_the_curve_is_the_same(tmp_path: Path, options: str) -> None:
    """With a strategy of the test's that leaves the refusal out; in a process of its own, which DeepSpeed keeps."""
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.02}
    tiny.save_model(tmp_path / "model", "bert", **plain)
    changes: dict[str, Any] = {"global_batch_size": 4, "eval_strategy": "epoch", "eval_steps": None, "max_steps": 8}
    written(tmp_path, rows=label_rows()[:28], train=changes, method={"head_init": "random"})
    steps = Steps()
    trainer, job = fitted(tmp_path, steps)
    assert job.module.objective.summary.splits["train"].rows % 4 == 0
    here = [sys.executable, "-m", "tests.train.lightning_on_cpu", str(tmp_path), *options.split()]
    done = subprocess.run(here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    curve = torch.load(tmp_path / "deepspeed.pt")
    assert curve["losses"] == pytest.approx(steps.losses, abs=1e-5)
    largest = math.exp(max(job.module.guard_history.log_norms))
    assert max(curve["norms"]) == pytest.approx(largest, rel=1e-3)  # no divisor is missed
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "deepspeed").state_dict()
    for name, values in job.module.model.state_dict().items():
        torch.testing.assert_close(saved[name], values, rtol=1e-3, atol=1e-5)
    assert trainer.global_step == 8


def test_training_that_ends_in_its_first_epoch_is_scored_at_its_end(tmp_path: Path) -> None:
    recipe = written(tmp_path, train={"max_steps": 2, "warmup_steps": 0, "eval_strategy": "epoch", "eval_steps": None})
    job = prepare(recipe, "train.logging_steps=1", run_folder=tmp_path / "lightning")
    trainer = trainer_of(job, EarlyStopping(**job.monitor()))
    trainer.fit(job.module, datamodule=job.data)
    assert trainer.global_step == 2
    assert job.monitor()["monitor"] in trainer.callback_metrics
