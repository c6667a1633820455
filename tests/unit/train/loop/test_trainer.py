"""Settings of `train.extra` for reading rows reach torch's loader; those that would do nothing are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import DataLoader, Dataset

from fulltune.errors import RecipeError
from fulltune.recipe.fields import Recipe
from fulltune.train.loop.arguments import check_trainable, training_arguments
from fulltune.train.loop.trainer import FullTrainer
from tests.plans import plan, recipe


class Grouped(Dataset[int]):
    """Each row is the process group of the process that reads it."""

    def __getitem__(self, number: int) -> int:
        return os.getpgrp()


def loader_of(**options: Any) -> DataLoader[Any]:
    """The loader of a trainer with these settings."""
    trainer: Any = SimpleNamespace(
        train_dataset=Grouped(),
        sampler=[[0, 1], [2]],
        collated=list,
        args=SimpleNamespace(**{f"dataloader_{name}": value for name, value in options.items()}),
        accelerator=SimpleNamespace(prepare=lambda loader: loader),
    )
    return FullTrainer.get_train_dataloader(trainer)


def test_settings_of_the_loader_are_passed_on_and_its_processes_not_told_to_stop_with_the_group() -> None:
    given = {"num_workers": 1, "prefetch_factor": 5, "persistent_workers": True, "in_order": False}
    loader = loader_of(**given, pin_memory=False, multiprocessing_context="fork")
    assert {name: getattr(loader, name) for name in given} == given
    assert loader.multiprocessing_context.get_start_method() == "fork"
    [group] = {group for rows in loader for group in rows}
    assert group != os.getpgrp()


@pytest.mark.parametrize(("device", "given"), [("cuda", {}), ("cuda", {"non_blocking": False}), ("cpu", {})])
def test_batches_are_copied_to_a_gpu_beside_its_work(device: str, given: dict[str, bool], tmp_path: Path) -> None:
    train = {"extra": {"accelerator_config": given}} if given else {}
    recipe = Recipe.model_validate({"model": "m", "task": "causal-lm", "data": {"train": "t"}, "train": train})
    arguments = training_arguments(recipe, plan(precision="fp32", device=device), tmp_path)
    trainer = transformers.Trainer(
        model=torch.nn.Linear(1, 1), args=arguments, train_dataset=Grouped(), eval_dataset=Grouped()
    )
    on = device == "cuda" and not given
    assert arguments.dataloader_pin_memory == (device == "cuda")
    assert trainer.accelerator.dataloader_config.non_blocking == on
    loader: Any = trainer.accelerator.prepare(DataLoader([1, 2]))
    assert loader._non_blocking == on


def test_processes_of_the_plan_read_rows_ahead(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"model": "m", "task": "image-classification", "data": {"train": "t"}})
    made = training_arguments(recipe, plan(precision="fp32", device="cuda", loader_workers=3), tmp_path)
    assert (made.dataloader_num_workers, made.dataloader_multiprocessing_context) == (3, "fork")


def test_settings_that_need_workers_are_refused_without() -> None:
    def recipe(**extra: Any) -> Recipe:
        data = {"train": "t.csv"}
        return Recipe.model_validate(
            {"model": "m", "task": "text-classification", "data": data, "train": {"extra": extra}}
        )

    check_trainable(recipe(dataloader_persistent_workers=True, dataloader_prefetch_factor=4, dataloader_num_workers=1))
    with pytest.raises(RecipeError) as caught:
        check_trainable(recipe(dataloader_persistent_workers=True, dataloader_prefetch_factor=4))
    assert len(caught.value.problems) == 2
    assert all("dataloader_num_workers above 0" in problem for problem in caught.value.problems)


def test_process_with_loaders_that_stay_ends() -> None:
    """It asks them to end with a signal, which is one that a stop of the group sends, too."""
    code = (
        "import sys; from torch.utils.data import DataLoader;"
        "from fulltune.train.loop.trainer import _leave_process_group;"
        "loader = DataLoader(range(4), num_workers=1, persistent_workers=True, multiprocessing_context='fork',"
        "worker_init_fn=_leave_process_group); print(len(list(loader))); sys.kept = iter(loader)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr


def test_extra_values_reach_transformers_as_it_takes_them(tmp_path: Path) -> None:
    extra = {"dataloader_num_workers": None, "ddp_timeout": 1800.0, "run_name": 2024}
    data, train = {"train": "t.csv"}, {"extra": extra}
    recipe = Recipe.model_validate({"model": "m", "task": "causal-lm", "data": data, "train": train})
    made = training_arguments(recipe, plan(precision="fp32", device="cpu"), tmp_path)
    assert (made.dataloader_num_workers, made.ddp_timeout, made.run_name) == (0, 1800, "2024")


@pytest.mark.parametrize(
    ("task", "evaluate", "chooser"),
    [
        ("text-classification", {}, ("accuracy", True)),
        ("text-pairs", {}, ("loss", False)),
        ("text-pairs", {"metric": "accuracy"}, ("accuracy", True)),
    ],
)
def test_the_loss_chooses_the_checkpoint_of_pairs_read_apart_unless_a_metric_is_set(
    task: str, evaluate: dict[str, str], chooser: tuple[str, bool], tmp_path: Path
) -> None:
    made = training_arguments(recipe(task, evaluate=evaluate), plan(precision="fp32", device="cpu"), tmp_path)
    assert (made.metric_for_best_model, made.greater_is_better) == chooser
