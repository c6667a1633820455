"""Models of random weights in TinyLlama's shape with a tokenizer of their own, and real text in rows of tokens.

`python -m bench.stream_shapes FOLDER LAYERS HIDDEN` saves one (in a process of its own: it holds the whole model).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.public_data import source
from bench.runs import run

VOCABULARY = 32000
SEED = 0


def config(layers: int, hidden: int = 2048) -> dict[str, Any]:
    """TinyLlama-1.1B's config with so many blocks (22 are its own), all widths in proportion to `hidden`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(hidden // 512, 1),
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def parameters(values: dict[str, Any]) -> int:
    """Number of parameters of a Llama with this config and an untied head."""
    hidden, wide = values["hidden_size"], values["intermediate_size"]
    shared = values["num_key_value_heads"] / values["num_attention_heads"]
    block = hidden * hidden * (2 + 2 * shared) + 3 * hidden * wide + 2 * hidden
    return round(values["num_hidden_layers"] * block + 2 * values["vocab_size"] * hidden + hidden)


def saved(folder: Path, layers: int, hidden: int = 2048) -> Path:
    """The folder of such a model, which is saved once."""
    model = folder / f"model-{layers}-{hidden}"
    if not (model / "ready").exists():
        run([sys.executable, "-m", "bench.stream_shapes", str(model), str(layers), str(hidden)])
        (model / "ready").touch()
    return model


def save_tokenizer(folder: Path) -> Any:
    """A byte-level BPE of the plays of Shakespeare, with as many tokens as the text gives."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train([str(source("shakespeare/input.txt"))], trainer)
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=2048, **names)
    fast.save_pretrained(folder)
    return fast


def save(folder: Path, layers: int, hidden: int) -> None:
    """Write config, tokenizer and random fp32 weights, the same ones each time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder)
    torch.manual_seed(SEED)
    LlamaForCausalLM(LlamaConfig(**config(layers, hidden))).save_pretrained(folder)


def write_text(folder: Path, characters: int) -> None:
    """Write train.txt, the first so many characters of the plays, and from their end eval.txt and test.txt."""
    text = source("shakespeare/input.txt").read_text(encoding="utf-8")
    for name, part in (("train", text[:characters]), ("eval", text[-2000:-1000]), ("test", text[-1000:])):
        (folder / f"{name}.txt").write_text(part, encoding="utf-8")


def token_rows(model: Path, count: int, length: int) -> list[list[int]]:
    """The first rows of tokens of the plays, whole ones."""
    from tokenizers import Tokenizer

    text = source("shakespeare/input.txt").read_text(encoding="utf-8")[: 8 * count * length]
    tokens = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids
    return [tokens[begin : begin + length] for begin in range(0, count * length, length)]


def write_recipe(path: Path, model: Path, length: int, **train: Any) -> Path:
    """Write a recipe for the texts of `write_text` in fp32 on the CPU: nothing but steps, and no copy of weights."""
    usual = {"device": "cpu", "precision": "fp32", "logging_steps": 1, "eval_on_start": False}
    usual |= {"load_best_model_at_end": False, "optim": "adamw_torch_fused", "micro_batch_size": 1}
    data = {name: str(path.parent / f"{name}.txt") for name in ("train", "eval", "test")}
    recipe = {
        "model": str(model),
        "task": "causal-lm",
        "data": {**data, "text_rows": "paragraph", "max_length": length},
        "method": {"kind": "full", "learning_rate": 1e-4},
        "train": usual | train,
        "evaluate": {"baselines": False, "generate_rows": 0, "batch_size": 1},
        "preserve": {"drift": False},
        "output": str(path.parent),
    }
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


if __name__ == "__main__":
    save(Path(sys.argv[1]), *map(int, sys.argv[2:4]))
