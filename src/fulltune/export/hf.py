"""Write a Hugging Face folder in a chosen dtype and shard size."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fulltune.export.sentence_transformers import check as check_encode
from fulltune.export.source import DTYPES as DTYPES
from fulltune.export.source import Source
from fulltune.export.texts import check_equal, check_processor
from fulltune.export.verify import Exported
from fulltune.models.base import Base
from fulltune.models.load import load_model
from fulltune.models.sentence_files import write_sentence_files
from fulltune.recipe.model import ModelBlock
from fulltune.records.export import ExportCheck
from fulltune.report.run.model_card import build_loading_code
from fulltune.text import parse_bytes

PACKAGES = ("safetensors",)
QUANTIZATIONS: tuple[str, ...] = ()
_MAX_KL = 1e-2
"""Largest accepted mean KL divergence of 16-bit weights in nats."""


def why_impossible(source: Source) -> str | None:
    return None


def write(source: Source, folder: Path) -> None:
    import torch

    model: Any = source.model
    if source.dtype != "float32":
        model = type(model).from_pretrained(source.folder).to(getattr(torch, source.dtype))
    model.save_pretrained(folder, max_shard_size=parse_bytes(source.request.max_shard_size or "50GB"))
    source.processor.save_pretrained(folder)
    if source.scoring.task.FACTS.reads_texts_apart:
        write_sentence_files(folder, model.config, source.notes["max_length"])


def load(source: Source, folder: Path) -> Exported:
    base = Base.from_block(ModelBlock(name=str(folder)), source.scoring.recipe.task)
    model = load_model(base, {}, head_is_new=False).float().eval()
    return Exported(model, base.processor, _MAX_KL if source.request.is_lossy else None)


def check(source: Source, folder: Path, exported: Exported) -> list[ExportCheck]:
    """Check the processor, the labels, the end tokens and the dtype of the weights."""
    from safetensors import safe_open

    dtypes = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            dtypes |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118  # no dictionary
    expected = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[source.dtype]
    result = " ".join(sorted(dtypes - {"I64", "BOOL"}))
    embeds = source.scoring.task.FACTS.reads_texts_apart and find_spec("sentence_transformers")
    checks = [
        *(check_encode(source, folder, exported) if embeds else check_processor(source, exported.processor)),
        ExportCheck(name="dtype of the weights", result=result, expected=expected, passed=result == expected),
        check_equal("same labels", exported.model.config.id2label, source.model.config.id2label),
    ]
    if source.scoring.task.FACTS.writes:
        ends = [model.generation_config.eos_token_id for model in (exported.model, source.reference)]
        checks.append(check_equal("same end tokens", *ends))
    return checks


def usage(source: Source, folder: str) -> str:
    return build_loading_code(folder, source.scoring.recipe.task, None)
