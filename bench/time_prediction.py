"""The time of training that the dry run forecasts, against what it takes: ten short runs.

Models from a tiny random one to SmolLM2-135M; different batch, length, precision, accumulation, activation
checkpointing, loss, optimizer and number of evaluations. Each run is `fulltune train` in a process of its own. What
counts is the time from the first step to the last, evaluations and checkpoints included; the forecast was written
before it began.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.public_data import MINILM, SMOLLM2, banking77, gsm8k, is_installed, shakespeare, wnut17
from bench.results import Figure
from bench.runs import SMOKE, Records, events, fresh, fulltune, run, script

Settings = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A run."""

    name: str
    model: str
    rows: Callable[[Path], tuple[str, Settings]]
    """Writes the rows; returns the task and the recipe's `data`."""
    train: Settings
    max_length: int = 512


def questions(folder: Path) -> tuple[str, Settings]:
    banking77(folder, 4000)
    return "text-classification", {"train": "train.csv", "text": "text", "label": "category"}


def docstrings(folder: Path) -> tuple[str, Settings]:
    from fulltune.quickstart import write_docstring_topics

    train, test = write_docstring_topics(folder)
    return "text-classification", {"train": str(train), "test": str(test), "text": "text", "label": "label"}


def names(folder: Path) -> tuple[str, Settings]:
    wnut17(folder, 0)
    return "token-classification", {"train": "train.conll"}


def worked_answers(folder: Path) -> tuple[str, Settings]:
    gsm8k(folder, 80)
    return "causal-lm", {"train": "train.jsonl", "prompt": "question", "completion": "answer"}


def conversations(folder: Path) -> tuple[str, Settings]:
    from fulltune.quickstart import write_docstring_chat

    train, test = write_docstring_chat(folder)
    rows = train.read_text("utf-8").splitlines()[:100]
    train.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return "causal-lm", {"train": str(train), "test": str(test), "messages": "messages"}


def plays(folder: Path) -> tuple[str, Settings]:
    shakespeare(folder, 400)
    return "causal-lm", {"train": "input.txt"}


def settings(steps: int, batch: int, **more: Any) -> Settings:
    return {"max_steps": steps, "global_batch_size": batch, **more}


BF16 = {"precision": "bf16"}
CASES = (
    Case("tiny-fp32", "tiny", questions, settings(20 if SMOKE else 200, 32, precision="fp32")),
    Case("minilm-bf16", MINILM, questions, settings(120, 32, **BF16)),
    Case("minilm-fp32-accumulation", MINILM, questions, settings(50, 32, micro_batch_size=8, precision="fp32")),
    Case("minilm-checkpointing", MINILM, docstrings, settings(30, 64, activation_checkpointing=True, **BF16), 128),
    Case("minilm-evaluations", MINILM, docstrings, settings(60, 16, eval_strategy="steps", eval_steps=10, **BF16)),
    Case("minilm-tags", MINILM, names, settings(60, 16, precision="fp32")),
    Case("minilm-random-order-8bit", MINILM, questions, settings(60, 16, group_by_length=False, optim="adamw_8bit")),
    Case("smollm2-bf16", SMOLLM2, worked_answers, settings(12, 4, micro_batch_size=4, **BF16)),
    Case(
        "smollm2-checkpointing",
        SMOLLM2,
        conversations,
        settings(8, 8, micro_batch_size=4, activation_checkpointing=True, **BF16),
        128,
    ),
    Case("smollm2-text", SMOLLM2, plays, settings(8, 4, micro_batch_size=2, **BF16), 256),
)
QUICK = ("tiny-fp32",) if SMOKE else ("tiny-fp32", "minilm-bf16")


def tiny(folder: Path) -> str:
    """A random BERT of 2 layers with MiniLM's tokenizer."""
    from transformers import BertConfig, BertModel

    from fulltune.models.base import Base
    from fulltune.recipe.model import ModelBlock

    tokenizer = Base.from_block(ModelBlock(name=MINILM)).processor
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
    )
    BertModel(config).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    return str(folder / "tiny")


def seconds(case: Case, folder: Path) -> tuple[float, float]:
    """Forecast and actual seconds of a run's training."""
    task, data = case.rows(fresh(folder))
    recipe = {
        "model": tiny(folder) if case.model == "tiny" else case.model,
        "task": task,
        "data": {**data, "max_length": case.max_length},
        "method": {"kind": "full", "learning_rate": 1e-5} | ({} if task == "causal-lm" else {"head_init": "random"}),
        "train": {"device": "cpu", **case.train},
        "output": ".",
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    run(fulltune("train", folder / "recipe.yaml", "--run-folder", folder / "run"))
    journal = events(folder / "run")
    phases = {event["name"]: event["seconds"] for event in journal if event["kind"] == "phase"}
    need = next(event for event in journal if event["kind"] == "forecast")["time"]
    forecast = need["train_seconds"] + need["eval_seconds"] + need["save_seconds"]
    return forecast, phases["saving the model"] - phases["training"]


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    records, errors = Records(folder / "seconds.jsonl"), []
    for case in CASES:
        if not is_installed(case.model) or (quick and case.name not in QUICK):
            continue
        forecast, actual = records.get(case.name, seconds, case, folder / "run")
        errors.append(forecast / actual - 1)
        print(f"  {case.name}: {forecast:.1f} s forecast, {actual:.1f} s, {errors[-1]:+.1%}", flush=True)
    name = f"error of the dry run's forecast of the training's time, {len(errors)} runs"
    yield Figure(f"{name}, median", statistics.median(map(abs, errors)), "share", at_most=0.3 if quick else 0.1)
    if not quick:
        within = sum(abs(error) <= 0.15 for error in errors) / len(errors)
        yield Figure(f"{name}, share within 15 %", within, "share", at_least=0.8)


if __name__ == "__main__":
    script(measure, __doc__)
