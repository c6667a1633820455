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
from fulltune.inference.store import FILE
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
    max_shard_size: str | None = None
    llama_cpp: Path | None = None
    """The user's checkout of llama.cpp, or None for the packaged converter."""

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
    """The whole model, with merged weights."""
    reference: PreTrainedModel
    """The model that was trained and scored: `model`, or the one before merging."""
    processor: Any
    scoring: Scoring
    dtype: str
    """Dtype of the weights to write, such as `bfloat16`."""
    notes: Mapping[str, Any]
    """The model folder's `fulltune.json`, without the method."""


@contextlib.contextmanager
def open_source(request: ExportRequest) -> Iterator[Source]:
    """Load the model to export. A method's weights are merged first, into a temporary folder beside the output."""
    plain = request.model_folder
    run = plain.resolve().parents[1]
    plans = [run / "plan" / f"{plain.name}.json", *sorted((run / "plan").glob(f"{plain.name}-seed*.json"))]
    saved = next((path for path in plans if path.exists()), plans[0])
    if missing := [str(path) for path in (run / "data" / "test" / FILE, saved) if not path.exists()]:
        raise SetupError(
            f"{plain}: is not a model of a run, or the test rows and plan with which its export is verified are gone; "
            f"missing: {', '.join(missing)}"
        )
    recipe = load_run_recipe(run)
    request.output.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if is_merged := folders.has_only_trained_parameters(plain):
            plain = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=request.output.parent))) / plain.name
            folders.merge_into_pretrained(request.model_folder, plain)
        base = Base.from_block(ModelBlock(name=str(plain.resolve())), recipe.task)
        model = reference = load_model(base, {}, head_is_new=False).float().eval()
        if is_merged:
            reference = folders.load_method_folder(request.model_folder, base.processor).model.float().eval()
        scoring = make_scoring(recipe, Plan.load(saved), DataSummary.of_run(run), run, base)
        dtype = request.dtype or str(base.config.dtype or "float32").removeprefix("torch.")
        notes = folders.notes_without_method(request.model_folder)
        yield Source(request, plain, model, reference, base.processor, scoring, dtype, notes)
