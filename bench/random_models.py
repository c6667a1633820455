"""Models of random weights in many sizes, with rows and a recipe for a few steps: what memory is measured on."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS = 3
TIED = {"tie_word_embeddings": True}


@dataclass(frozen=True)
class Cell:
    """A model and how it is trained."""

    name: str
    kind: str
    """Kind of `tests.tiny.config`, or a model's name as in a recipe."""
    config: dict[str, Any] = field(default_factory=dict)
    task: str = "text-classification"
    rows: int = 8
    length: int = 128
    accumulation: int = 1
    precision: str = "fp32"
    weights_dtype: str = "fp32"
    optim: str | None = None
    checkpointing: bool = False
    chunked: bool = False
    packed: bool = False


def _config(kind: str, hidden: int, layers: int, vocabulary: int, heads: int = 0, **more: Any) -> dict[str, Any]:
    """The config of a model of this size, by the names that its kind has for it."""
    heads = heads or hidden // 64
    match kind:
        case "gpt2":
            names = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": 1024}
        case "distilbert":
            names = {"dim": hidden, "n_layers": layers, "n_heads": heads, "hidden_dim": 4 * hidden}
            names["max_position_embeddings"] = 1024
        case "t5":
            names = {"d_model": hidden, "num_layers": layers, "num_heads": heads, "d_ff": 4 * hidden, "d_kv": 64}
        case "bart":
            sides = [f"{side}_{name}" for side in ("encoder", "decoder") for name in ("layers", "attention_heads")]
            names = dict(zip(sides, (layers, heads, layers, heads), strict=True))
            names |= {"encoder_ffn_dim": 4 * hidden, "decoder_ffn_dim": 4 * hidden, "d_model": hidden}
            names["max_position_embeddings"] = 1024
        case _:
            wide = 4 * hidden if kind in ("bert", "roberta") else 8 * hidden // 3
            names = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
            names |= {"intermediate_size": wide, "max_position_embeddings": 1026}
            if kind in ("llama", "qwen2", "mistral"):
                names["num_key_value_heads"] = heads // 2 if heads % 2 == 0 else heads
            if kind == "mistral":
                names["head_dim"] = hidden // heads
    return {**names, "vocab_size": vocabulary, **more}


TASKS = {"bert": "text-classification", "distilbert": "text-classification", "roberta": "text-classification"}
TASKS |= dict.fromkeys(("gpt2", "llama", "qwen2", "mistral"), "causal-lm") | dict.fromkeys(("t5", "bart"), "seq2seq")


def sized(name: str, kind: str, size: tuple[int, int, int], batch: tuple[int, int], **more: Any) -> Cell:
    """A cell of random weights; `size`: hidden size, layers, vocabulary; `batch`: rows, tokens."""
    config = _config(kind, *size, heads=more.pop("heads", 0), **more.pop("config", {}))
    return Cell(name, kind, config, TASKS[kind], batch[0], batch[1], **more)


def model_parts(cell: Cell) -> tuple[Any, Any, Any]:
    """A cell's tokenizer, config, and the auto class of its model."""
    import transformers
    from tests import tiny

    long = 4096
    encoder = cell.kind in tiny.ENCODERS
    writer = cell.kind in tiny.WRITERS
    if encoder:
        tokenizer = tiny.encoder_tokenizer(long, token_types=cell.kind == "bert")
    else:
        tokenizer = tiny.writer_tokenizer(cell.kind, long) if writer else tiny.decoder_tokenizer(model_max_length=long)
    name = "AutoModel" if encoder else "AutoModelForSeq2SeqLM" if writer else "AutoModelForCausalLM"
    return tokenizer, tiny.config(cell.kind, tokenizer, **cell.config), getattr(transformers, name)


def save_model(cell: Cell, folder: Path) -> Path:
    import torch

    tokenizer, config, kind = model_parts(cell)
    torch.manual_seed(0)
    kind.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _row(cell: Cell, number: int) -> dict[str, str]:
    """A row that fills the length: a token is a byte, or with a real tokenizer about a word."""
    drawn = random.Random(number)
    long = " ".join(drawn.choice(("sun", "rain", "snow", "wind", "fog", "hail")) for _ in range(cell.length))
    match cell.task:
        case "text-classification":
            return {"text": long, "label": ("one", "two", "three")[number % 3]}
        case "seq2seq":
            return {"source": long, "target": long}
        case _:
            return {"text": long} if cell.packed else {"prompt": f"{number % 10}:", "completion": long}


def write_recipe(
    cell: Cell,
    placement: str,
    processes: int,
    folder: Path,
    save: Callable[[Cell, Path], Path] = save_model,
    **train: Any,
) -> Path:
    """Write model, rows and recipe of a cell.

    Args:
        cell: The cell.
        placement: Setting of the recipe, such as `fsdp2`.
        processes: Number of training processes.
        folder: Made anew.
        save: Writes the model, unless the cell names one.
        train: Further settings of `train`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = str(save(cell, folder / "model")) if cell.kind in TASKS else cell.kind
    batch = cell.rows * cell.accumulation * processes
    for name, number in (("train", STEPS * batch), ("eval", 4), ("test", 4)):
        lines = [json.dumps(_row(cell, number_of)) for number_of in range(number)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    usual = {"device": "cpu", "max_steps": STEPS, "micro_batch_size": cell.rows, "global_batch_size": batch}
    usual |= {"num_processes": processes, "placement": placement, "oversubscribe": True, "precision": cell.precision}
    usual |= {"activation_checkpointing": cell.checkpointing, "chunked_loss": cell.chunked}
    usual |= {"optim": cell.optim} if cell.optim else {}
    recipe = {
        "model": {"name": model, "weights_dtype": cell.weights_dtype},
        "task": cell.task,
        "data": {name: f"{name}.jsonl" for name in ("train", "eval", "test")} | {"max_length": cell.length},
        "train": usual | train,
        "evaluate": {"bootstrap_samples": 100, "generate_rows": 0, "batch_size": cell.rows, "baselines": False},
        "output": ".",
    }
    if cell.task == "text-classification":
        recipe["method"] = {"head_init": "random"}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    return folder / "recipe.yaml"
