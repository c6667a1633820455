"""Memory that runs out on a card is told from every other error wherever errors are caught: with each it goes its own
way. Whole runs, phase by phase, are in `tests/train/test_recovery.py`; one of two processes in
`tests/invariant/test_one_of_two.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch

from fulltune import export as exporting
from fulltune.audit.pretrained import RowReader
from fulltune.errors import DoesNotFitError, RecipeError, SetupError
from fulltune.methods.added import add_peft_modules
from fulltune.probe import _out_of_memory_as_no_probe
from fulltune.probe.linear import NoProbe
from fulltune.recipe.methods import LoraMethod
from fulltune.records.plan import GenericTexts
from fulltune.system.memory import explain_out_of_memory, run_with_smaller_batches
from fulltune.train.forgetting.generic import DriftMonitor
from fulltune.train.worker import main as worker

pytestmark = pytest.mark.stand_in(
    "torch.OutOfMemoryError raised by hand", card="that the driver raises it, and what its allocator had taken by then"
)
Raise = Callable[..., Any]


class CardIsFull(torch.OutOfMemoryError):
    """In no words that are known: its kind says it."""


CardIsFull.__name__ = "OutOfMemoryError"


class Fault(RuntimeError):
    """Any other."""


def raising(error: BaseException) -> Raise:
    def act(*given: Any, **named: Any) -> Any:
        raise error

    return act


def test_attempt_is_planned_anew_with_less(tmp_path: Path) -> None:
    assert worker.outcome_of_error(CardIsFull(), tmp_path)[0] == "out_of_memory"
    assert worker.outcome_of_error(Fault(), tmp_path)[0] == "error"


def test_export_that_runs_out_of_memory_is_no_fault_of_the_format(tmp_path: Path) -> None:
    request = SimpleNamespace(to="onnx", output=tmp_path, quantize=None, dtype=None)
    source: Any = SimpleNamespace(model=None, request=request)
    for error, expected in ((CardIsFull(), CardIsFull), (Fault(), SetupError)):
        form: Any = SimpleNamespace(PACKAGES=(), write=raising(error), load=raising(error))
        with pytest.raises(expected):
            exporting._write(form, source, tmp_path)
    [check] = exporting._verify(form, source, tmp_path).failed
    assert check.name == "loads and runs"
    with pytest.raises(CardIsFull):
        exporting._verify(SimpleNamespace(load=raising(CardIsFull())), source, tmp_path)  # type: ignore[arg-type]  # a stand-in


def test_batches_become_smaller_for_memory_alone() -> None:
    def run(error: BaseException) -> Raise:
        def smaller(rows: int) -> int:
            if rows > 1:
                raise error
            return rows

        return smaller

    assert run_with_smaller_batches("scoring", 4, run(CardIsFull())) == 1
    with pytest.raises(Fault):
        run_with_smaller_batches("scoring", 4, run(Fault()))


@pytest.mark.parametrize(("error", "found"), [(CardIsFull(), DoesNotFitError), (Fault(), Fault)])
def test_what_does_not_fit_says_what_to_do(error: BaseException, found: type[BaseException]) -> None:
    with pytest.raises(found), explain_out_of_memory("scoring test", "free memory"):
        raise error


@pytest.mark.parametrize(("error", "found"), [(CardIsFull(), NoProbe), (Fault(), Fault)])
def test_probe_that_does_not_fit_is_left_out(error: BaseException, found: type[BaseException]) -> None:
    with pytest.raises(found), _out_of_memory_as_no_probe(torch.nn.Linear(1, 1)):
        raise error


@pytest.mark.parametrize(("error", "found"), [(CardIsFull(), NoProbe), (Fault(), Fault)])
def test_rows_that_cannot_be_read_for_want_of_memory_are_not_judged(
    error: BaseException, found: type[BaseException], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    reader: Any = RowReader.__new__(RowReader)
    vars(reader).update(_read={}, folder=tmp_path, base=SimpleNamespace(processor=None))
    monkeypatch.setitem(RowReader.items.__globals__, "Rows", lambda folder: [])
    monkeypatch.setitem(RowReader.items.__globals__, "with_decoded_images", raising(error))
    with pytest.raises(found):
        reader.items("train")


@pytest.mark.parametrize(("error", "found"), [(CardIsFull(), torch.OutOfMemoryError), (Fault(), RecipeError)])
def test_method_that_finds_no_memory_is_no_fault_of_the_recipe(
    error: BaseException, found: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft, "get_peft_model", raising(error))
    with pytest.raises(found):
        add_peft_modules(torch.nn.Linear(1, 1), LoraMethod(kind="lora"), "text-classification", ())


@pytest.mark.parametrize(("error", "ends_it"), [(CardIsFull(), True), (Fault(), False)])
def test_generic_text_that_cannot_be_read_ends_a_run_for_memory_alone(error: BaseException, ends_it: bool) -> None:
    monitor: Any = DriftMonitor.__new__(DriftMonitor)
    warnings, plan = list[str](), SimpleNamespace(generic=GenericTexts())
    journal = SimpleNamespace(phase_within=lambda phase: contextlib.nullcontext())
    trainer = SimpleNamespace(
        state=SimpleNamespace(global_step=0),
        args=SimpleNamespace(world_size=1),
        forward_model=None,
        head=None,
        write_heartbeat=None,
    )
    monitor.trainer, monitor.start = trainer, None
    monitor.inputs = SimpleNamespace(plan=plan, journal=journal, warn=warnings.append)
    monitor.text = SimpleNamespace(measure=raising(error))
    if ends_it:
        with pytest.raises(torch.OutOfMemoryError):
            monitor.measure_drift()
    else:
        assert monitor.measure_drift() is None
        assert "drift on generic text cannot be measured: Fault" in warnings[0]
