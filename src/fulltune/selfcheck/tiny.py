"""Models with random weights and rows that a program can make: nothing is read from a network."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

WORDS = {"weather": ("sun", "rain", "snow", "storm", "wind", "fog"), "food": ("soup", "bread", "rice", "cake", "egg")}
FILLERS = ("the", "in", "town", "garden", "house", "field", "street", "and", "near", "old", "small")


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Same random numbers each time on the CPU and every GPU, without a trace outside."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def decoder(device: str, *, layers: int = 2, width: int = 64, vocabulary: int = 128, **options: Any) -> Any:
    """A Llama with heads of 32, a size that every attention kernel takes; the same weights each time."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=64,
    )
    with seeded():
        return AutoModelForCausalLM.from_config(config, **options).to(device)


def tokens(device: str, rows: int = 4, length: int = 24, vocabulary: int = 128) -> torch.Tensor:
    """Token ids, the same each time."""
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1)).to(device)


def backward(model: Any, **inputs: Any) -> tuple[Any, torch.Tensor]:
    """A forward and a backward pass: the model's outputs, and all gradients in one vector."""
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    found = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return outputs, torch.cat(found)


def bert(**changes: Any) -> Any:
    """A BERT for two classes, with dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    size: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    with seeded():
        return BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=64, **size, **changes))


def save_bert(folder: Path) -> Path:
    """Write that BERT with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, logging

    logging.disable_progress_bar()  # it would run through the page
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    known = (*special, *FILLERS, *(word for words in WORDS.values() for word in words))
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name.strip('[]').lower()}_token": name for name in special}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names).save_pretrained(folder)
    bert(pad_token_id=0).save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int = 60) -> Path:
    """Texts of two classes as csv, no two the same."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        for number in range(count):
            label = ("weather", "food")[number % 2]
            word = WORDS[label][number // 2 % len(WORDS[label])]
            first, second = FILLERS[number // 10 % len(FILLERS)], FILLERS[number % len(FILLERS)]
            writer.writerow((f"the {word} {first} {second}" + " and" * (number % 5), label))
    return path
