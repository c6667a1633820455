"""A finished run: what is left in its folder, and what the same command does with it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

from fulltune.errors import SetupError
from tests import tiny
from tests.contract.command import Result, fulltune
from tests.train import runs

STEPS = {"max_steps": 2, "warmup_steps": 0, "report_to": ["tensorboard", "codecarbon"]}


class _Writer:
    """In place of TensorBoard's, which is not installed."""

    def __init__(self, log_dir: str) -> None:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        self.file = Path(log_dir) / "events.out.tfevents.1"

    def add_text(self, *_: Any) -> None: ...

    def add_scalar(self, name: str, value: float, step: int) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(f"{step} {name}\n")

    def flush(self) -> None: ...

    close = flush


class _Tracker:
    """In place of CodeCarbon's, which writes beside the checkpoints."""

    def __init__(self, output_dir: str) -> None:
        self.file = Path(output_dir) / "emissions.csv"

    def start(self) -> None: ...

    def stop(self) -> None:
        self.file.write_text("emissions\n", encoding="utf-8")


def trackers() -> Iterator[None]:
    tensorboard, codecarbon = ModuleType("torch.utils.tensorboard"), ModuleType("codecarbon")
    tensorboard.SummaryWriter = _Writer  # type: ignore[attr-defined]  # of this type
    codecarbon.EmissionsTracker = _Tracker  # type: ignore[attr-defined]  # of this type
    place = "transformers.integrations.integration_utils.is_{}_available"
    with (
        mock.patch.dict(sys.modules, {"torch.utils.tensorboard": tensorboard, "codecarbon": codecarbon}),
        mock.patch(place.format("tensorboard"), return_value=True),
        mock.patch(place.format("codecarbon"), return_value=True),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
        yield


@pytest.fixture(scope="module")
def finished(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Result]]:
    folder = tmp_path_factory.mktemp("finished")
    rows = tiny.write_csv(folder / "rows.csv", tiny.topic_rows())
    recipe = tiny.write_recipe(folder / "recipe.yaml", tiny_encoder, rows, train=STEPS)
    for _ in trackers():
        with runs.in_this_process():
            yield folder / "run", fulltune("run", recipe, "--run-folder", folder / "run")


def test_files_of_trackers_stay_in_the_run_folder(finished: tuple[Path, Result]) -> None:
    folder, result = finished
    assert result.code == 0, result.err
    written = (folder / "tensorboard" / "full-seed42" / "events.out.tfevents.1").read_text(encoding="utf-8")
    assert "2 train/loss\n" in written
    left = folder / "checkpoints" / "full-seed42"
    assert [path.name for path in left.iterdir()] == ["emissions.csv"]


def test_run_on_a_finished_folder_shows_its_results_and_does_nothing(finished: tuple[Path, Result]) -> None:
    folder, first = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = fulltune("run", folder)
    assert again.code == 0, again.err
    assert again.out == first.out
    said = again.err.splitlines()
    assert said[0].startswith("run folder ")
    assert said[1].startswith("already finished at 2")
    assert said[1].endswith("; results:")
    assert len(said) == 2, again.err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_run_on_a_finished_folder_without_its_weights_names_the_file(
    finished: tuple[Path, Result], tmp_path: Path
) -> None:
    copy = shutil.copytree(finished[0], tmp_path / "copy")
    weights = copy / "models" / "full" / "model.safetensors"
    weights.unlink()
    result = fulltune("run", copy)
    assert result.code == SetupError.exit_code
    assert result.out == ""
    assert f"{weights}: is missing, although this run finished at 2" in result.err
    assert "'fulltune run RECIPE --fresh'" in result.err
