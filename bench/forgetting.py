"""Forgetting: does a budget hold on texts that nothing has read, what does it cost, and which of its means does it?

    FULLTUNE_BENCH_DATA=... python bench/forgetting.py run FOLDER [--kinds ...] [--arms free held] [--seeds 1 2 3]
    python bench/forgetting.py table FOLDER
    FULLTUNE_BENCH_DATA=... python bench/forgetting.py exhibit FOLDER --kinds smollm2-shakespeare

Each cell is whole runs of the command line with the same rows, steps and seed, in arms:

- `free`: as by default, nothing done against forgetting;
- `held`: `preserve.budget` and its replay;
- `line`: the budget without replay, so that only scaling back is left;
- `slow`: the same as `line` with a quarter of the learning rate;
- `pull-K`: the same as `line`, where after each update every weight goes back by K times the learning rate of the way
  to where it began (`pull.py`).

Generic text is Wikipedia sentences, shared out once: the probe that a run reads (also its replay), and 600 more that
no run reads, on which the finished models are compared with the untouched one. `tiny` is a Llama of a million
parameters that is pre-trained here on other Wikipedia sentences; MiniLM-L6 and SmolLM2-135M are real.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from clean_steps import CLASSES, PROMPTS, RAW, TAGS, shakespeare
from evidence import MINILM, SMOLLM, banking77, data, gsm8k, wnut17

from fulltune.forgetting.generic_text import measured
from fulltune.inference.run import GenericText
from fulltune.records.held import HeldRun
from fulltune.records.scores import Scores

UNSEEN = 600
GSM8K = (
    "task: causal-lm\n"
    "data: {train: train.jsonl, eval: eval.jsonl, test: test.jsonl, prompt: question, completion: answer, "
    "max_length: 160}\n"
)
ARMS: dict[str, list[str]] = {
    "free": [],
    "held": ["preserve.budget={budget}"],
    "line": ["preserve.budget={budget}", "preserve.replay=null"],
    "slow": ["preserve.budget={budget}", "preserve.replay=null", "method.learning_rate={slow}"],
    **{f"pull-{times}": ["preserve.budget={budget}", "preserve.replay=null"] for times in (3, 10, 30)},
}


@dataclass(frozen=True)
class Kind:
    """A model and its rows."""

    model: str
    """A line of a recipe; empty: the tiny model."""
    recipe: str
    write: Callable[[Path, int], None]
    rows: int
    rate: float
    steps: int
    batch: int
    budget: str
    reads: str = "writes"
    """How the generic texts are compared: `writes` or a problem type."""
    probe: int = 2500
    """Sentences."""


KINDS = {
    "tiny-banking77": Kind("", PROMPTS, banking77, 1000, 1e-3, 300, 16, "10%"),
    "tiny-gsm8k": Kind("", GSM8K, gsm8k, 1500, 1e-3, 300, 16, "5%"),
    "tiny-shakespeare": Kind("", RAW, shakespeare, 2000, 1e-3, 300, 8, "5%"),
    "minilm-banking77": Kind(MINILM, CLASSES, banking77, 1000, 2e-4, 320, 32, "1%", "single_label"),
    "minilm-wnut17": Kind(MINILM, TAGS, wnut17, 1000, 2e-4, 250, 32, "1%", "tags"),
    "smollm2-shakespeare": Kind(SMOLLM, RAW, shakespeare, 700, 2e-4, 40, 8, "5%", probe=1200),
}


# ---- texts and the tiny model ----------------------------------------------------------------------------------


def sentences() -> tuple[list[str], list[str], list[str]]:
    """Of Wikipedia: for pre-training, for the runs, and for nobody but this file."""
    found = (data() / "wiki_sentences" / "sentences.txt").read_text(encoding="utf-8").splitlines()
    found = [line for line in dict.fromkeys(found) if len(line.split()) > 5]
    random.Random(0).shuffle(found)
    return found[:5500], found[5500:8000], found[8000 : 8000 + UNSEEN]


def pretrained(folder: Path) -> Path:
    """A tiny language model that has learned some English, made once."""
    place = folder / "tiny"
    if (place / "model.safetensors").exists():
        return place
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    wiki, _, _ = sentences()
    others = (data() / "shakespeare" / "input.txt").read_text(encoding="utf-8").split("\n\n")[:3000]
    lines = (data() / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:1500]
    others += [f"{row['question']} {row['answer']}" for row in map(json.loads, lines)]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=["<end>"], initial_alphabet=alphabet)
    raw.train_from_iterator([*wiki, *others], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>")
    tokenizer.model_max_length = 256
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            eos_token_id=0,
            pad_token_id=0,
            bos_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    drawn, steps = random.Random(0), 900
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        batch = tokenizer(
            [f"{text}<end>" for text in drawn.sample(wiki, 24)],
            padding=True, truncation=True, max_length=64, return_tensors="pt", return_token_type_ids=False,
        )  # fmt: skip
        ends = batch["attention_mask"].sum(1, keepdim=True)
        labels = batch["input_ids"].masked_fill(torch.arange(batch["input_ids"].shape[1]) >= ends, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"pre-training: step {step}, loss {loss.item():.3f}", flush=True)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def prepared(folder: Path, name: str) -> Path:
    """The folder of a kind with its rows, its probe and its recipe."""
    kind, place = KINDS[name], folder / name
    if not (place / "recipe.yaml").exists():
        place.mkdir(parents=True, exist_ok=True)
        kind.write(place, kind.rows)
        (place / "probe.txt").write_text("\n".join(sentences()[1][: kind.probe]) + "\n", encoding="utf-8")
        model = kind.model or f"model: {pretrained(folder)}\n"
        (place / "recipe.yaml").write_text(model + kind.recipe, encoding="utf-8")
    return place


# ---- a run -----------------------------------------------------------------------------------------------------


def unseen(model_folder: str, kind: Kind) -> np.ndarray:
    """What a model makes of the texts that no run has read."""
    from transformers import AutoModel

    from fulltune.models.base import Base
    from fulltune.models.load import load
    from fulltune.recipe.model import ModelBlock

    writes = kind.reads == "writes"
    base = Base.of(ModelBlock(name=model_folder), "causal-lm" if writes else "text-classification")
    if writes:
        model: Any = load(base, {}, head_is_new=False)
    elif model_folder.startswith("package:"):
        model = load(base, {"num_labels": 2}, head_is_new=True)
    else:
        model = AutoModel.from_pretrained(model_folder)
    text = GenericText.of(sentences()[2], base.processor, writes, "fp32", 64)
    return text.read(model)


def do(folder: Path, name: str, arm: str, seed: int) -> dict[str, Any]:
    """One run, measured."""
    kind, place = KINDS[name], prepared(folder, name)
    run = place / f"{arm}-{seed}"
    settings = [
        *(f"method.learning_rate={kind.rate}", f"train.max_steps={kind.steps}", f"train.seed={seed}"),
        *(f"train.global_batch_size={kind.batch}", f"train.micro_batch_size={kind.batch}", "train.device=cpu"),
        *("train.precision=fp32", "train.eval_strategy=steps", f"train.eval_steps={kind.steps // 5}"),
        *("evaluate.generate_rows=0", "preserve.probe=probe.txt"),
        *(one.format(budget=kind.budget, slow=kind.rate / 4) for one in ARMS[arm]),
    ]
    pull = arm.removeprefix("pull-") if arm.startswith("pull-") else ""
    started = [str(Path(__file__).with_name("pull.py"))] if pull else ["-m", "fulltune.cli.app"]
    program = [sys.executable, *started, "evaluate", str(place / "recipe.yaml")]
    began = time.monotonic()
    with Path(f"{run}.log").open("w", encoding="utf-8") as log:
        command = [*program, "--run-folder", str(run), *(f"--set={one}" for one in settings)]
        ended = subprocess.run(command, check=False, stdout=log, stderr=log, env=os.environ | {"PULL": pull}, cwd=place)
    seconds = round(time.monotonic() - began, 1)
    line: dict[str, Any] = {"kind": name, "arm": arm, "seed": seed, "exit": ended.returncode, "seconds": seconds}
    if ended.returncode:
        return line
    outcomes = [json.loads(one.read_text(encoding="utf-8")) for one in run.glob("attempts/*/outcome.json")]
    line["training_seconds"] = sum(one["train_seconds"] for one in outcomes)
    for file in run.glob("scores/*.json"):
        scores = Scores.load(file)
        found = scores.metrics.get(scores.main_metric)
        line[f"test:{'trained' if scores.kind == 'trained' else scores.name}"] = found and found.value
        line["greater_is_better"] = scores.greater_is_better
    moved = measured(unseen(_base(place), kind), unseen(str(run / "models" / "full"), kind))
    line |= {"unseen": moved.drift, "unseen_error": moved.error}
    for record in run.glob("preserve/*.json"):
        line["preserved"] = json.loads(record.read_text(encoding="utf-8"))
    return line


def _base(place: Path) -> str:
    first = (place / "recipe.yaml").read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("model: ").strip()


# ---- the exhibit ------------------------------------------------------------------------------------------------

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Write one sentence that explains why the sky is blue.",
    "How do I boil an egg?",
)


def exhibit(folder: Path, name: str, seed: int) -> None:
    """What the untouched, the free and the held model make of other things than their task: sentences of Wikipedia,
    problems of GSM8K with their answers, and questions to a chat model."""
    import torch

    from fulltune.inference.run import Batching, generate
    from fulltune.models.base import Base
    from fulltune.models.load import load
    from fulltune.recipe.model import ModelBlock

    place = prepared(folder, name)
    lines = (data() / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    problems = [json.loads(line) for line in lines]
    asked = [*QUESTIONS, problems[0]["question"]]
    models = {"untouched": _base(place)} | {arm: str(place / f"{arm}-{seed}/models/full") for arm in ("free", "held")}
    before: dict[str, np.ndarray] = {}
    for which, model_folder in models.items():
        base = Base.of(ModelBlock(name=model_folder), "causal-lm")
        model = load(base, {}, head_is_new=False).float().eval()
        texts = {"Wikipedia": sentences()[2], "GSM8K": [f"{one['question']} {one['answer']}" for one in problems]}
        for about, them in texts.items():
            found = GenericText.of(them, base.processor, True, "fp32", 128).read(model)
            moved = measured(before.setdefault(about, found), found)
            print(f"{which}: {about}: loss {found.mean():.3f}, rise {moved.drift:.3f} ± {moved.error:.3f}", flush=True)
        chats = [
            base.processor.apply_chat_template(
                [{"role": "user", "content": one}], add_generation_prompt=True, return_dict=False
            )
            for one in asked
        ]
        torch.manual_seed(0)
        said = generate(model, base.processor, chats, 60, Batching(1))
        for question, answer in zip(asked, said, strict=True):
            print(f"{which}: {question!r}\n    {answer!r}", flush=True)


# ---- the table -------------------------------------------------------------------------------------------------


def read(folder: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    file = folder / "forgetting.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {(one["kind"], one["arm"], one["seed"]): one for one in map(json.loads, lines)}


@dataclass(frozen=True)
class Cell:
    """A run with a budget beside one without."""

    free: dict[str, Any]
    held: dict[str, Any]

    @property
    def preserved(self) -> HeldRun:
        return HeldRun.model_validate(self.held["preserved"])

    @property
    def is_within(self) -> bool:
        """On the texts that nothing has read."""
        return bool(self.held["unseen"] <= self.preserved.limit)

    @property
    def share(self) -> float:
        """Of the free run's gain on the eval rows: of the two trained models on test rows, of the untouched one there
        where it was scored."""
        start = self.held.get("test:untouched", self.free.get("test:linear probe of the untouched model"))
        start = self.preserved.start.metric if start is None else start
        return float((self.held["test:trained"] - start) / (self.free["test:trained"] - start))


def table(folder: Path) -> None:
    """Each cell of a budget beside its free run, then the bars."""
    found = read(folder)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    print("| model and rows | seed | arm | budget | free: unseen drift, test | held: unseen drift, test ", end="")
    print("| of the gain | certificate | point | time |")
    print("|---|---:|---|---:|---|---|---:|---|---|---:|")
    for (name, arm, seed), line in sorted(found.items()):
        free = found.get((name, "free", seed))
        if arm == "free" or free is None or line["exit"] or free["exit"]:
            continue
        cell = Cell(free, line)
        kept, passed = cell.preserved, cell.preserved.passed
        said = ("PASS" if passed else "FAIL") if kept.is_feasible else "infeasible"
        counts.update({(arm, "cells"): 1, (arm, said): 1, (arm, "within"): int(cell.is_within and kept.is_feasible)})
        counts[arm, "90 % of the gain"] += int(kept.is_feasible and cell.share >= 0.9)
        slower = line["training_seconds"] / free["training_seconds"]
        print(
            f"| {name} | {seed} | {arm} | {kept.limit:.4f} | {free['unseen']:.4f}, {free['test:trained']:.4f} | "
            f"{line['unseen']:.4f} ± {line['unseen_error']:.4f}, {line['test:trained']:.4f} | {cell.share:.0%} | "
            f"{said}, at most {kept.sealed.upper:.4f} | {kept.chosen.share:g} | {slower:.2f} |"
        )
    for key, count in sorted(counts.items()):
        print(*key, count)
    for line in found.values():
        if line["exit"]:
            print("FAILED", {key: line[key] for key in ("kind", "arm", "seed", "exit")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table", "exhibit"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--arms", nargs="+", default=["free", "held"], choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4])
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if given.what == "table":
        table(folder)
        return
    if given.what == "exhibit":
        for seed, name in itertools.product(given.seeds, given.kinds):
            exhibit(folder, name, seed)
        return
    for seed, name, arm in itertools.product(given.seeds, given.kinds, given.arms):
        if (name, arm, seed) in read(folder):
            continue
        line = do(folder, name, arm, seed)
        with (folder / "forgetting.jsonl").open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
        said = ("kind", "arm", "seed", "exit", "seconds", "unseen", "test:trained")
        print({key: line.get(key) for key in said}, flush=True)


if __name__ == "__main__":
    main()
