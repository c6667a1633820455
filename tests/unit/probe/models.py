"""Tiny models with a head, made from configs, and prepared rows for them: 32 features, 90 tokens, three labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fulltune.probe.features import FeatureExtractor
from fulltune.recipe.tasks import ProblemType, TaskName
from fulltune.tasks import Target

PAD, END, CHOICES = 1, 3, 4
LABELS = ("a", "b", "c")
_SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT = {"vocab_size": 100, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": END, "max_position_embeddings": 64}
_USUAL = _TEXT | _SIZE
_PAIR = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Albert": _USUAL | {"embedding_size": 16, "num_hidden_groups": 1},
    "Bart": _TEXT | _PAIR | {"d_model": 32, "decoder_start_token_id": END},
    "Bert": _USUAL,
    "DebertaV2": _USUAL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "DistilBert": _TEXT | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "Electra": _USUAL | {"embedding_size": 16},
    "GPT2": _TEXT | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "Llama": _USUAL | {"num_key_value_heads": 2},
    "ModernBert": _USUAL,
    "MPNet": _USUAL,
    "Roberta": _USUAL,
    "T5": {**_TEXT, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1},
    "ViT": _SIZE | {"image_size": 16, "patch_size": 8},
    "ResNet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
}
_HEADS: dict[TaskName, str] = {
    "text-classification": "ForSequenceClassification",
    "image-classification": "ForImageClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "multiple-choice": "ForMultipleChoice",
}


def model_of(name: str, task: TaskName, num_labels: int | None = 3) -> Any:
    """A random model of one architecture in evaluation mode, the same at each call."""
    import torch
    import transformers

    labels = {} if task in ("question-answering", "multiple-choice") else {"num_labels": num_labels}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**CONFIGS[name], **labels)
        return getattr(transformers, name + _HEADS[task])(config).eval()


def target_of(kind: ProblemType) -> Target:
    labelled = kind in ("single_label", "multi_label", "tags")
    return Target(kind, {}, LABELS if labelled else (), num_choices=CHOICES if kind == "choice" else 0)


def extractor_of(model: Any, task: TaskName, kind: ProblemType, **others: Any) -> FeatureExtractor:
    return FeatureExtractor(model, task, target_of(kind), PAD, others.pop("batch_size", 16), "fp32", **others)


def rows_of(kind: ProblemType, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of different lengths with labels drawn at random."""
    random = np.random.default_rng(seed)
    return [_row(kind, number, random) for number in range(count)]


def _row(kind: ProblemType, number: int, random: np.random.Generator) -> dict[str, Any]:
    length = int(random.integers(5, 12))
    ids = [*random.integers(5, 90, length - 1).tolist(), END]
    match kind:
        case "multi_label":
            return {"input_ids": ids, "labels": random.integers(0, 2, 3).astype(np.float32)}
        case "regression":
            return {"input_ids": ids, "labels": float(random.normal(50, 20))}
        case "tags":
            # The first token belongs to no word, and the last two to one.
            words = [-1, *range(length - 2), length - 3]
            tags = random.integers(0, 3, length - 2).tolist()
            return {"input_ids": ids, "labels": [-100, *tags, -100], "tags": tags, "word_ids": words}
        case "choice":
            several = [[*random.integers(5, 90, length - 1).tolist(), END] for _ in range(CHOICES)]
            both = {"input_ids": [token for one in several for token in one], "text_lengths": [length] * CHOICES}
            return both | {"labels": number % CHOICES}
        case "span":
            start, end = np.sort(random.integers(2, length - 1, 2)).tolist()
            ends = {"starts": [0] * length, "ends": [1] * length}
            return {"input_ids": ids, "labels": [start, end, 2, length - 2, length], **ends}
    return {"input_ids": ids, "labels": number % 3}


def image_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    return [
        {"pixel_values": random.normal(size=(3, 16, 16)).astype(np.float32), "labels": number % 3, "length": 4}
        for number in range(count)
    ]


def logits_alone(extractor: FeatureExtractor, rows: Sequence[Any]) -> list[np.ndarray]:
    """What the plain model gives for each row, without padding: [items, outputs]."""
    import torch

    logits = []
    for row in rows:
        batch = extractor.task.collate([row], PAD)
        labels = batch.pop("labels")
        with torch.no_grad():
            outputs = extractor.model(**batch)
        match extractor.kind:
            case "tags":
                logits.append(outputs.logits[labels != -100].numpy())
            case "choice":
                logits.append(outputs.logits.reshape(-1, 1).numpy())
            case "span":
                logits.append(torch.stack((outputs.start_logits[0], outputs.end_logits[0]), dim=-1).numpy())
            case _:
                logits.append(outputs.logits.numpy())
    return logits
