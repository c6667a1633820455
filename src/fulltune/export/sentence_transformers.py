"""Write an encoder's body as a sentence-transformers folder that averages token embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fulltune.export.source import Source
from fulltune.export.texts import check_processor, sample_texts
from fulltune.export.verify import Exported
from fulltune.models.encoders import pool
from fulltune.models.sentence_files import prompts_by_role, write_sentence_files
from fulltune.records.export import ExportCheck

PACKAGES = ("sentence-transformers",)
QUANTIZATIONS: tuple[str, ...] = ()
DTYPES: tuple[str, ...] = ()


def why_impossible(source: Source) -> str | None:
    facts = source.scoring.task.FACTS
    if facts.writes or facts.reads != "text" or source.model.config.is_encoder_decoder:
        return f"needs a text encoder, but the model is for {source.scoring.recipe.task}"
    if facts.reads_texts_apart:
        return "the folder of a whole model of this task is one already; --to hf makes it of LoRA's"
    if facts.completes_rows:
        return f"CrossEncoder of sentence-transformers reads {source.request.model_folder} as it is"
    return None


def write(source: Source, folder: Path) -> None:
    body: Any = source.model.base_model
    body.save_pretrained(folder)
    source.processor.save_pretrained(folder)
    body.config.pooling = "mean"
    write_sentence_files(folder, body.config, source.notes["max_length"])


def load(source: Source, folder: Path) -> None:
    """Return None, because the export has no logits: `check` compares its embeddings."""


def check(source: Source, folder: Path, exported: Exported | None) -> list[ExportCheck]:
    """Check the tokenizer, and the embeddings of texts against the model's last hidden states, pooled."""
    import torch
    from sentence_transformers import SentenceTransformer

    encoder, texts = SentenceTransformer(str(folder), device="cpu"), [text for text in sample_texts(source) if text]
    embeddings = encoder.float().encode(texts, convert_to_tensor=True)
    model, tokenizer = (exported.model, exported.processor) if exported else (source.model, encoder.tokenizer)
    config, options = model.config, {"truncation": True, "max_length": source.notes["max_length"]}
    largest = 0.0
    for text, embedding in zip(texts, embeddings, strict=True):
        inputs = source.processor(prompts_by_role(config)[""] + text, return_tensors="pt", **options)
        with torch.no_grad():
            hidden = model.base_model(**inputs).last_hidden_state
        expected = pool(hidden, inputs["attention_mask"], getattr(config, "pooling", "mean"))[0]
        expected = expected / (expected.norm() if getattr(config, "normalize", False) else 1)
        largest = max(largest, float((embedding - expected).abs().max() / expected.abs().max()))
    same = ExportCheck(
        name=f"largest relative difference of {len(texts)} embeddings",
        result=f"{largest:.1e}",
        expected="at most 1e-04",
        passed=largest <= 1e-4,
    )
    return [*check_processor(source, tokenizer), same]


def usage(source: Source, folder: str) -> str:
    return f"""from sentence_transformers import SentenceTransformer

# The body of the model, without its head; embeddings are means over tokens.
embeddings = SentenceTransformer("{folder}").encode(["a text", "another text"])"""
