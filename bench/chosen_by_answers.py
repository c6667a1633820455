"""Checkpoints chosen by loss and by generated answers: the same training twice, so that only the choice differs.

`planted` is an invented language: an answer is a number behind words drawn by lot. The loss rises again once these
words are learned by heart, while the numbers are still being learned. GSM8K and the chat example train SmolLM2-135M.
Both choices are scored on the same test rows; differences are paired, with 95 % intervals from resampled rows. The last
table compares the answers' planned and forecast seconds with those that they took. `--folder F` resumes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from bench.public_data import SMOLLM2, gsm8k
from bench.results import ROOT, Figure
from bench.runs import SMOKE, Records, events, fresh, fulltune, run, script
from tests import tiny

from fulltune.tasks import written

METRICS = ("number_match", "exact_match", "chrf")
PAIRS = {"prompt": "question", "completion": "answer"}
CHAT = {"train": str(ROOT / "examples/data/library.jsonl"), "messages": "messages", "eval_fraction": 0.25}
OFTEN = {"eval_strategy": "steps", "global_batch_size": 16}
STEPS = {"max_steps": 2, "eval_steps": 1} if SMOKE else {"max_steps": 240, "eval_steps": 20}
CASES: dict[str, tuple[str, float, dict[str, Any], dict[str, Any]]] = {
    "planted": ("number_match", 3e-3, PAIRS, {**OFTEN, **STEPS, "precision": "fp32"}),
    "gsm8k": ("number_match", 5e-5, PAIRS, {**OFTEN, "num_train_epochs": 3, "eval_steps": 60}),
    "chat": ("chrf", 5e-5, CHAT, {"num_train_epochs": 5, "global_batch_size": 8}),
}
"""Metric of answers that chooses, learning rate, and settings of data and training."""


def planted(folder: Path, test_rows: int) -> None:
    """20 questions in random words; an answer is the question's number behind random words."""
    draw = random.Random(0)
    numbers = {cue: number for number, cue in enumerate(draw.sample("abcdefghijklmnopqrst", 20))}

    def row() -> dict[str, str]:
        cue, salt, filler = draw.choice(list(numbers)), draw.choices("uvwxyz", k=5), draw.choices("ABCDEFGH", k=12)
        return {"question": " ".join([*salt, cue]), "answer": " ".join([*filler, str(numbers[cue])])}

    for name, count in (("train", 100), ("eval", 150), ("test", test_rows)):
        tiny.write_jsonl(folder / f"{name}.jsonl", [row() for _ in range(count)])
    tiny.save_model(folder / "model", "llama", hidden_size=128, intermediate_size=256)


def trained(folder: Path, name: str, metric: str, quick: bool) -> dict[str, Any]:
    """A run that chooses by this metric: its step, its answers to test rows, and the seconds of the others."""
    _, rate, data, train = CASES[name]
    fresh(folder)
    if name == "planted":
        planted(folder, 8 if SMOKE else 200 if quick else 500)
    elif name == "gsm8k":
        gsm8k(folder, 160 if quick else 2000)
    sample: dict[str, Any] = {"baselines": False, "generate_rows": 1000, "max_new_tokens": 4 if SMOKE else 256}
    if quick and name == "gsm8k":
        train = {**train, "num_train_epochs": 2, "eval_steps": 5}
        sample = {**sample, "generate_rows": 64, "max_new_tokens": 160} | (
            {} if metric == "loss" else {"choose_rows": 32}
        )
    files = {} if "train" in data else {part: str(folder / f"{part}.jsonl") for part in ("train", "eval", "test")}
    blocks = {
        "model": str(folder / "model") if name == "planted" else SMOLLM2,
        "task": "causal-lm",
        "data": {**files, **data},
        "method": {"kind": "full", "learning_rate": rate},
        "train": train,
        "preserve": {"drift": False},
        "evaluate": {"metric": metric, **sample},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(blocks), encoding="utf-8")
    run(fulltune("run", folder / "recipe.yaml", "--run-folder", folder / "run"))
    plan, outcome, scores = (
        json.loads(sorted((folder / "run").glob(pattern))[-1].read_text(encoding="utf-8"))
        for pattern in ("plan/full.json", "attempts/*/outcome.json", "scores/full-*.json")
    )
    lines = events(folder / "run")
    return {
        "step": outcome["best_step"],
        "answers": [[answer["predicted"], answer["expected"]] for answer in scores["answers"]],
        "planned": (plan["answers"] or {}).get("seconds"),
        "forecast": next(event["time"] for event in lines if event["kind"] == "forecast")["answers_seconds"],
        "took": [event["took"] for event in lines if event["kind"] == "answers"],
        "unfinished": [event["unfinished"] / event["rows"] for event in lines if event["kind"] == "answers"],
    }


def scored(answers: Sequence[Sequence[str]], metric: str) -> np.ndarray:
    predicted, expected = zip(*answers, strict=True)
    return written.score_answers(predicted, expected, metric)[metric]


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean with a 95 % interval from 10,000 resamples of the rows."""
    draws = np.random.default_rng(0).integers(0, len(values), (10_000, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    records, seconds = Records(folder / "runs.jsonl"), list[str]()
    print("| training | metric | chosen by loss | chosen by answers | difference |\n|---|---|---|---|---|", flush=True)
    for name, (chosen_by, *_) in list(CASES.items())[: 1 if SMOKE else None]:
        one, other = (
            records.get(f"{name} by {metric}", trained, folder / name / metric, name, metric, quick)
            for metric in ("loss", chosen_by)
        )
        for metric in METRICS:
            before, after = (scored(found["answers"], metric) for found in (one, other))
            cells = [f"{mean:.3g} [{low:.3g}, {high:.3g}]" for mean, low, high in map(interval, (before, after))]
            cells = [f"{cell} at step {found['step']}" for cell, found in zip(cells, (one, other), strict=True)]
            gain, low, high = interval(after - before)
            print(f"| {name} | {metric} | {' | '.join(cells)} | {gain:+.3g} [{low:.3g}, {high:.3g}] |", flush=True)
            if (name, metric) == ("planted", chosen_by):
                claim = "planted answers gained by choosing by answers instead of loss (lower end)"
                yield Figure(claim, low, "", at_least=1e-9)
        took, share = sum(other["took"]), np.mean(other["unfinished"])
        cells = [f"{value:.1f} ({value / took:.2f})" for value in (other["planned"], other["forecast"])]
        seconds.append(f"| {name} | {' | '.join(cells)} | {took:.1f} | {share:.0%} |")
    print("\n| training | planned s (ratio) | forecast s (ratio) | took s | without end |\n|---|---|---|---|---|")
    print("\n".join(seconds), flush=True)


if __name__ == "__main__":
    script(measure, __doc__)
