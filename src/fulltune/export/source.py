"""The model that is exported, with the test rows on which the export is verified."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulltune.errors import SetupError
from fulltune.evaluate import make_scoring
from fulltune.evaluate.scoring import Scoring
from fulltune.methods import folder as folders
from fulltune.models.base import Base
from fulltune.models.load import load_model
from fulltune.recipe.model import ModelBlock
from fulltune.records.data import DataSummary
from fulltune.records.plan import Plan
from fulltune.system.run_folder import load_run_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ExportRequest:
    """The options of `fulltune export`."""

    model_folder: Path
    """Folder `models/NAME` of a run."""
    to: str
    output: Path
    quantize: str | None = None
    dtype: str | None = None
    """Dtype of the weights to write, or None for that of the model's files."""
    max_shard_size: str = "50GB"
    llama_cpp: Path | None = None
    """The user's checkout of llama.cpp, or None for the packaged converter."""

    @property
    def run(self) -> Path:
        return self.model_folder.resolve().parents[1]

    @property
    def is_lossy(self) -> bool:
        return self.quantize is not None or self.dtype in DTYPES[1:]


@dataclass(frozen=True)
class Source:
    """The model to export, in float32 on the CPU, with its test rows."""

    request: ExportRequest
    folder: Path
    """Plain Hugging Face folder: the model folder, or a temporary folder with merged weights."""
    model: PreTrainedModel
    processor: Any
    scoring: Scoring
    stored_dtype: str
    """Dtype of the model's files, such as `bfloat16`."""
    notes: Mapping[str, Any]
    """The model folder's `fulltune.json`, without the method."""

    @property
    def dtype(self) -> str:
        """Dtype of the weights to write."""
        return self.request.dtype or self.stored_dtype

    @property
    def reads_text(self) -> bool:
        return self.scoring.task.FACTS.reads == "text"


@contextlib.contextmanager
def open_source(request: ExportRequest) -> Iterator[Source]:
    """Load the model to export. A method's weights are merged first, into a temporary folder."""
    run, plain = request.run, request.model_folder
    recipe, data = load_run_recipe(run), run / "data"
    plans = [run / "plan" / f"{plain.name}.json", *sorted((run / "plan").glob(f"{plain.name}-seed*.json"))]
    saved = next((path for path in plans if path.exists()), plans[0])
    if missing := [str(path) for path in (data / "test", saved) if not path.exists()]:
        raise SetupError(
            f"{run}: an export is verified with the run's test rows and plan; missing: {', '.join(missing)}"
        )
    with tempfile.TemporaryDirectory(dir=run) as scratch:  # where a model of this size was stored before
        if folders.has_only_trained_parameters(plain):
            plain = Path(scratch) / plain.name
            folders.merge_into_pretrained(request.model_folder, plain)
        base = Base.from_block(ModelBlock(name=str(plain.resolve())), recipe.task)
        model = load_model(base, {}, head_is_new=False).float().eval()
        plan = Plan.load(saved)
        scoring = make_scoring(recipe, plan, DataSummary.of_run(run), run, base)
        stored = str(base.config.dtype or "float32").removeprefix("torch.")
        notes = folders.notes_without_method(request.model_folder)
        yield Source(request, plain, model, base.processor, scoring, stored, notes)
