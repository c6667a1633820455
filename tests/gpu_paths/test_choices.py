"""What is chosen where there is a card: arguments of the Trainer and of loaders, a run that goes on, what is timed."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import PartialState

from fulltune import classic
from fulltune.classic.arguments import _use_cpu_for_bf16
from fulltune.classic.dry_run import dry_run
from fulltune.errors import SetupError
from fulltune.models import kernels
from fulltune.records.plan import Plan
from fulltune.system.hardware import Gpu, Machine
from fulltune.system.run_folder import load_plan_to_continue
from fulltune.train.loop.arguments import training_arguments
from fulltune.train.loop.trainer import FullTrainer
from fulltune.train.worker.dry_run import PassTimer
from tests import plans
from tests.gpu_paths.cards import Cards

on_cards = pytest.mark.stand_in("two H100s by a patched torch.cuda", card="-")


@on_cards
def test_trainer_takes_one_of_two_cards_and_pins_its_rows(two_h100s: Cards, tmp_path: Path) -> None:
    """Left alone it would split each micro batch over both, and scale the loss."""
    made = training_arguments(plans.recipe(), plans.plan(device="cuda", precision="bf16"), tmp_path)
    assert (made.device, made.n_gpu) == (torch.device("cuda", 0), 1)
    assert made.train_batch_size == made.per_device_train_batch_size
    assert (made.dataloader_pin_memory, made.bf16, made.fp16) == (True, True, False)
    assert made.accelerator_config.non_blocking is True
    assert PartialState().device.type == "cuda"


@on_cards
def test_trainer_in_fp16_is_told_so(two_h100s: Cards, tmp_path: Path) -> None:
    made = training_arguments(plans.recipe(), plans.plan(device="cuda", precision="fp16"), tmp_path)
    assert (made.bf16, made.fp16) == (False, True)


@pytest.mark.stand_in("no card", card="-")
def test_trainer_on_a_cpu_pins_nothing(tmp_path: Path) -> None:
    made = training_arguments(plans.recipe(), plans.plan(device="cpu", precision="fp32"), tmp_path)
    assert (made.device.type, made.n_gpu) == ("cpu", 0)
    assert (made.dataloader_pin_memory, made.bf16, made.fp16) == (False, False, False)
    assert made.accelerator_config.non_blocking is False


@pytest.mark.stand_in("the loader alone, with nothing to pin", card="that pinned rows reach the card beside its work")
@pytest.mark.parametrize("pins", [True, False])
def test_loader_pins_as_it_is_told(pins: bool) -> None:
    names = ("num_workers", "prefetch_factor", "persistent_workers", "multiprocessing_context", "in_order")
    usual = dict(zip(names, (0, None, False, None, True), strict=True))
    trainer: Any = SimpleNamespace(
        train_dataset=[1, 2],
        sampler=[[0], [1]],
        collated=list,
        args=SimpleNamespace(**{f"dataloader_{name}": value for name, value in (usual | {"pin_memory": pins}).items()}),
        accelerator=SimpleNamespace(prepare=lambda loader: loader),
    )
    assert FullTrainer.get_train_dataloader(trainer).pin_memory == pins


@on_cards
@pytest.mark.parametrize(("device", "waits"), [("cuda", 2), ("cpu", 0)])
def test_seconds_of_a_pass_are_taken_when_the_card_is_done(device: str, waits: int, two_h100s: Cards) -> None:
    passes: Any = PassTimer.__new__(PassTimer)
    vars(passes).update(
        inputs=SimpleNamespace(plan=SimpleNamespace(device=device)),
        trainer=SimpleNamespace(args=SimpleNamespace(world_size=1)),
    )
    assert passes._seconds_since(passes._synchronized_time()) >= 0
    assert two_h100s.waits == waits


@pytest.mark.stand_in("records of machines", card="-")
def test_run_that_was_planned_for_a_card_does_not_go_on_without_one(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "plan"
    folder.mkdir(parents=True)
    without = Machine(cpu="c", num_cores=2, memory_bytes=8, memory_available_bytes=8, cpu_bf16_speedup=1.0)
    card = Gpu(name="NVIDIA H100", memory_bytes=8, capability=(9, 0))
    for device in ("cuda", "cpu"):
        plans.plan(device=device).save(folder / f"{device}.json")
    with pytest.raises(SetupError, match="planned for a GPU, but this machine has none"):
        load_plan_to_continue(folder / "cuda.json", without)
    with_card = without.model_copy(update={"gpus": (card,)})
    assert load_plan_to_continue(folder / "cuda.json", with_card) == Plan.load(folder / "cuda.json")
    assert load_plan_to_continue(folder / "cpu.json", without).device == "cpu"


@pytest.mark.stand_in("packages that are said to be installed", card="that Triton compiles for it")
@pytest.mark.parametrize("installed", [True, False])
def test_compiler_is_triton_on_a_card_and_one_of_cpp_on_a_cpu(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if installed else None)
    monkeypatch.setattr(shutil, "which", lambda name: None if installed else name)
    assert (kernels.missing_compiler("cuda") is None, kernels.missing_compiler("cpu") is None) == (
        installed,
        not installed,
    )


# ---- scripts of the Trainer ------------------------------------------------------------------------------------------


@on_cards
def test_script_keeps_pinned_rows_and_bf16_where_there_is_a_card(two_h100s: Cards, tmp_path: Path) -> None:
    made = classic.TrainingArguments(str(tmp_path), bf16=True, report_to="none")
    assert (made.dataloader_pin_memory, made.use_cpu, made.device.type) == (True, False, "cuda")


@pytest.mark.stand_in("no card", card="-")
def test_script_in_bf16_without_a_card_goes_to_the_cpu_and_pins_nothing(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the CPU computes in bf16"):
        made = classic.TrainingArguments(str(tmp_path), bf16=True, report_to="none")
    assert (made.dataloader_pin_memory, made.use_cpu, made.device.type) == (False, True, "cpu")
    unasked = classic.TrainingArguments(str(tmp_path), report_to="none")  # transformers does it for use_cpu alone
    assert (unasked.dataloader_pin_memory, unasked.use_cpu) == (False, False)


@pytest.mark.stand_in("no card", card="-")
def test_script_in_fp16_without_a_card_is_told_what_it_gets(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    made = classic.TrainingArguments(str(tmp_path), fp16=True, use_cpu=True, report_to="none")
    assert made.dataloader_pin_memory is False, "torch would warn at each loader"
    assert ["computes in fp32" in str(one.message) for one in recwarn] == [True]
    recwarn.clear()
    classic.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    assert not recwarn


@pytest.mark.stand_in("torch.accelerator patched", card="-")
def test_script_in_bf16_is_left_alone_on_a_device_of_another_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"bf16": True}
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    _use_cpu_for_bf16(given)
    assert given == {"bf16": True}


@pytest.mark.stand_in("a Trainer's parts as objects", card="DataParallel itself")
@pytest.mark.parametrize("cards", [1, 2])
def test_dry_run_of_a_script_goes_through_what_splits_its_rows(cards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, split = torch.nn.Linear(1, 1), torch.nn.Sequential(torch.nn.Linear(1, 1))
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(n_gpu=cards), model=model, model_wrapped=split, train_dataset=[{"x": 1}],
        data_collator=None, _get_collator_with_removed_columns=lambda collator: lambda rows: {},
    )  # fmt: skip
    went = list[Any]()
    monkeypatch.setattr("fulltune.classic.dry_run._positions_for_dry_run", lambda trainer: [0])
    monkeypatch.setattr("fulltune.classic.dry_run._describe_length", lambda batch: "")
    monkeypatch.setattr("fulltune.classic.dry_run._step_at_rate_zero", lambda trainer: None)
    monkeypatch.setattr(
        "fulltune.classic.dry_run._forward_and_backward", lambda trainer, model, batch: went.append(model) or 1.0
    )
    assert dry_run(trainer) == 1.0
    assert went == [split if cards > 1 else model]
