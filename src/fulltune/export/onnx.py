"""Write a model with a head as ONNX with transformers' exporter, and run it on ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fulltune.export.source import Source
from fulltune.export.texts import check_equal, check_tokenizer
from fulltune.inference.run import model_batch, positions_by_length
from fulltune.models.base import Base, with_decoded_images
from fulltune.recipe.model import ModelBlock
from fulltune.records.export import ExportCheck
from fulltune.tasks import Tensor

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
QUANTIZATIONS = ("int8",)
DTYPES: tuple[str, ...] = ()


class OnnxModel:
    """An ONNX graph on ONNX Runtime."""

    max_kl = None

    def __init__(self, folder: Path, source: Source) -> None:
        from transformers.exporters.base import ExportedModel

        self.model: Any = ExportedModel.from_pretrained(folder, device="cpu")
        self.processor = Base.from_block(ModelBlock(name=str(folder)), source.scoring.recipe.task).processor

    def __call__(self, **batch: Tensor) -> Any:
        return self.model(**batch)


def why_impossible(source: Source) -> str | None:
    if source.scoring.task.FACTS.writes:
        return "an ONNX graph does not generate text; choose --to gguf (not for encoder-decoders) or --to hf"
    return None


def write(source: Source, folder: Path) -> None:
    """Trace the model with two test rows, and write the graph, the config and the processor."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter
    from transformers.exporters.quantizers.quantizer_onnxruntime import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    rows = with_decoded_images(source.scoring.rows("test"), source.processor)
    order = positions_by_length(rows)
    # A batch of one row would fix the batch size.
    sample = [rows[order[0]], rows[order[len(order) // 2]]]
    inputs: dict[str, Any] = model_batch(source.model, source.scoring.task, sample, source.processor.pad_token_id)
    del inputs["labels"]
    quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True)) if source.request.quantize else None
    with _silenced():
        exported = OnnxExporter().export(source.model, inputs, OnnxConfig(dynamic=True, quantizer=quantizer))
        exported.save_pretrained(folder)
    source.processor.save_pretrained(folder)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Hide the progress lines and warnings that torch's exporter prints."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        hidden = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with warnings.catch_warnings(), hidden[0], hidden[1]:
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def load(source: Source, folder: Path) -> OnnxModel:
    with _silenced():
        return OnnxModel(folder, source)


def check(source: Source, folder: Path, exported: OnnxModel) -> list[ExportCheck]:
    """Check the tokenizer and the order of the labels."""
    labels = check_equal("same labels", exported.model.config.id2label, source.model.config.id2label)
    return [*check_tokenizer(source, exported.processor), labels]


def usage(source: Source, folder: str) -> str:
    return f"""import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
session = onnxruntime.InferenceSession("{folder}/model.onnx")
inputs = tokenizer(["a text", "another text"], padding=True, return_tensors="np")
logits = session.run(None, {{one.name: inputs[one.name] for one in session.get_inputs()}})[0]"""
