"""What cannot be with ZeRO: one line that says where, what and what to do, before anything is trained."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fulltune import files
from fulltune.errors import SetupError
from fulltune.recipe.fields import Recipe
from fulltune.system import parallel_layout
from tests import tiny
from tests.contract.command import Result, fulltune
from tests.train import runs

RECIPE, SETUP = 2, 2
ZERO2 = {"zero_optimization": {"stage": 2}}


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks as if DeepSpeed were installed."""
    _found(monkeypatch, there=True)


def _found(monkeypatch: pytest.MonkeyPatch, *, there: bool) -> None:
    real = importlib.util.find_spec

    def find(name: str, *given: Any) -> Any:
        if name != "deepspeed":
            return real(name, *given)
        return real("json") if there else None

    monkeypatch.setattr(importlib.util, "find_spec", find)


def planned(folder: Path, model: Path, *options: object, verb: str = "plan", **train: Any) -> Result:
    """`fulltune plan` with this block `train`."""
    tiny.write_csv(folder / "rows.csv", tiny.topic_rows(40))
    recipe = tiny.write_recipe(folder / "recipe.yaml", model, "rows.csv", train={"device": "cpu", **train})
    with runs.without_tracing():
        return fulltune(verb, recipe, "--run-folder", folder / "run", *options)


def refused(result: Result, *problems: str, code: int = RECIPE) -> None:
    assert "Traceback" not in result.err
    assert result.problems == list(problems)
    assert result.code == code


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_deepspeed_that_is_missing_is_named_with_its_extra(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    _found(monkeypatch, there=False)
    result = planned(tmp_path, tiny_encoder, verb=verb, placement="zero3", offload="all")
    refused(result, "train.placement: zero3: needs DeepSpeed; pip install 'fulltune[deepspeed]'", code=SETUP)
    assert not (tmp_path / "run" / "attempts").exists()


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize(
    ("train", "problem"),
    [
        (
            {"placement": "zero2", "extra": {"deepspeed": ZERO2}},
            "train.placement and train.extra.deepspeed both set the layout; remove one of them",
        ),
        (
            {"offload": "optimizer", "extra": {"deepspeed": ZERO2}},
            "train.offload and train.extra.deepspeed both set the layout; remove one of them",
        ),
        ({"placement": "zero2", "offload": "all"}, "train.offload: 'all' needs placement: zero3, found zero2"),
        (
            {"extra": {"deepspeed": {**ZERO2, "gradient_clipping": 0.5}}},
            "train.extra.deepspeed: gradient_clipping is 0.5, but train.max_grad_norm gives 1.0; set "
            'gradient_clipping to "auto"',
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(
    tmp_path: Path, tiny_encoder: Path, train: dict[str, Any], problem: str
) -> None:
    result = planned(tmp_path, tiny_encoder, **train)
    said = [line.split("recipe.yaml:", 1)[-1].lstrip("0123456789 ") for line in result.problems]
    assert said == [problem]
    assert result.code == RECIPE


@pytest.mark.usefixtures("deepspeed")
def test_settings_of_deepspeed_are_kept_with_the_plans_numbers(tmp_path: Path, tiny_encoder: Path) -> None:
    train = {"global_batch_size": 8, "micro_batch_size": 2, "max_grad_norm": 0.5, "precision": "bf16"}
    result = planned(tmp_path, tiny_encoder, "--json", placement="zero3", offload="optimizer", **train)
    assert result.code == 0, result.err
    kept = json.loads((tmp_path / "run" / "plan" / "full.deepspeed.json").read_text(encoding="utf-8"))
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert [kept[name] for name in sizes] == [8, 2, 4, 0.5]
    assert (kept["bf16"], kept["fp16"]) == ({"enabled": True}, {"enabled": False})
    block = kept["zero_optimization"]
    assert (block["stage"], block["offload_optimizer"]) == (3, {"device": "cpu"})
    assert block["reduce_bucket_size"] == json.loads(result.out)["num_parameters"]
    assert "auto" not in json.dumps(kept)


# ---- checkpoints -----------------------------------------------------------------------------------------------


def recipe(**train: Any) -> Recipe:
    blocks: dict[str, Any] = {"model": "m", "task": "text-classification", "data": {"train": "a.csv"}}
    return Recipe.model_validate({**blocks, "train": {"global_batch_size": 8, **train}})


def written(folder: Path, stage: int, processes: int) -> Path:
    """A checkpoint with the files that DeepSpeed writes."""
    parts = folder / "checkpoint-6" / "global_step6"
    parts.mkdir(parents=True)
    (parts.parent / parallel_layout.LATEST).write_text("global_step6\n", encoding="utf-8")
    for rank in range(processes):
        (parts / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
        if stage == 3:
            (parts / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").touch()
    if stage < 3:
        (parts / "mp_rank_00_model_states.pt").touch()
    return parts.parent


WROTE = "was written by ZeRO stage {} on 2 processes, but is resumed with "
ZERO3 = {"placement": "zero3", "num_processes": 2}


@pytest.mark.parametrize(
    ("stage", "train", "problem"),
    [
        (3, ZERO3, None),
        (2, {"placement": "zero2", "num_processes": 2, "optim": "adagrad"}, None),
        (2, {"extra": {"deepspeed": {"zero_optimization": {"stage": 0}}}, "num_processes": 2}, None),
        (3, {**ZERO3, "offload": "all"}, None),
        (2, {"num_processes": 2}, WROTE.format("1 or 2") + "train.placement: auto on 2 processes"),
        (2, ZERO3, WROTE.format("1 or 2") + "train.placement: zero3 on 2 processes"),
        (3, {**ZERO3, "num_processes": 1}, WROTE.format("3") + "train.placement: zero3 on 1 process"),
    ],
)
def test_checkpoint_of_deepspeed_needs_the_same_stage_and_processes(
    tmp_path: Path, stage: int, train: dict[str, Any], problem: str | None
) -> None:
    checkpoint = written(tmp_path, stage, 2)
    back = "use the same settings as before, or start a new run (--fresh)"
    expected = None if problem is None else f"{checkpoint}: {problem}; {back}"
    assert parallel_layout.why_resume_impossible(checkpoint, recipe(**train)) == expected


@pytest.mark.parametrize(("placement", "goes_on"), [("auto", True), ("fsdp2", True), ("zero2", False)])
def test_other_checkpoint_goes_on_outside_of_deepspeed(tmp_path: Path, placement: str, goes_on: bool) -> None:
    (tmp_path / "checkpoint-6").mkdir()
    problem = parallel_layout.why_resume_impossible(
        tmp_path / "checkpoint-6", recipe(placement=placement, num_processes=2)
    )
    assert (problem is None) == goes_on
    assert "was not written by DeepSpeed" in (problem or "was not written by DeepSpeed")


def test_run_goes_on_only_where_deepspeed_is(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as there:
        _found(there, there=True)
        assert planned(tmp_path, tiny_encoder, placement="zero2").code == 0
    written(tmp_path / "run" / "checkpoints" / "full-seed42", 2, 1)
    _found(monkeypatch, there=False)
    result = fulltune("run", tmp_path / "run")
    refused(result, "train.placement: zero2: needs DeepSpeed; pip install 'fulltune[deepspeed]'", code=SETUP)
    assert not (tmp_path / "run" / "attempts").exists()


def test_checkpoint_of_another_placement_is_refused_before_an_attempt(tmp_path: Path, tiny_encoder: Path) -> None:
    first = runs.job(tmp_path, tiny_encoder, tiny.topic_rows(40), train={"max_steps": 2})
    with runs.in_this_process(), runs.without_tracing():
        from fulltune import pipeline

        summary = pipeline.prepare(first)
        plan = pipeline.make_plan(first, summary)
    checkpoint = written(first.folder / "checkpoints" / plan.trial, 3, 2)
    files.write_checksums(checkpoint)
    with pytest.raises(SetupError, match="but is resumed with"):
        pipeline.train_trial(first, plan, summary)
    assert not (first.folder / "attempts").exists()
    shutil.rmtree(first.folder)
