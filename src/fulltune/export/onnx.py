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
from fulltune.export.texts import check_equal, check_processor
from fulltune.export.verify import Exported
from fulltune.inference.run import model_batch, positions_by_length
from fulltune.models.base import Base, with_decoded_images
from fulltune.recipe.model import ModelBlock
from fulltune.records.export import ExportCheck

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
QUANTIZATIONS = ("int8",)
DTYPES: tuple[str, ...] = ()
_MAX_KL = 0.1
"""Largest accepted mean KL divergence of int8 weights in nats."""


def why_impossible(source: Source) -> str | None:
    if source.scoring.task.FACTS.writes:
        return "an ONNX graph does not generate text; choose --to gguf (not for encoder-decoders) or --to hf"
    if source.scoring.task.FACTS.completes_rows:
        loader = "SentenceTransformer" if source.scoring.task.FACTS.contrasts else "CrossEncoder"
        return f"sentence-transformers writes such models as ONNX: {loader}(FOLDER, backend='onnx')"
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


def load(source: Source, folder: Path) -> Exported:
    from transformers.exporters.base import ExportedModel

    with _silenced():
        model: Any = ExportedModel.from_pretrained(folder, device="cpu")
    processor = Base.from_block(ModelBlock(name=str(folder)), source.scoring.recipe.task).processor
    return Exported(model, processor, _MAX_KL if source.request.is_lossy else None)


def check(source: Source, folder: Path, exported: Exported) -> list[ExportCheck]:
    """Check the processor and the order of the labels."""
    labels = check_equal("same labels", exported.model.config.id2label, source.model.config.id2label)
    return [*check_processor(source, exported.processor), labels]


def usage(source: Source, folder: str) -> str:
    first, processor, call = "", "AutoTokenizer", '["a text", "another text"], padding=True, '
    if source.scoring.task.FACTS.reads == "image":
        first, processor, call = "from PIL import Image\n", "AutoImageProcessor", 'Image.open("a.png"), '
    row = "[None]" if source.scoring.task.FACTS.reads_texts_apart else ""  # one row of two texts
    return f"""import onnxruntime
{first}from transformers import {processor}

processor = {processor}.from_pretrained("{folder}")
session = onnxruntime.InferenceSession("{folder}/model.onnx")
inputs = processor({call}return_tensors="np")
outputs = session.run(None, {{one.name: inputs[one.name]{row} for one in session.get_inputs()}})"""
