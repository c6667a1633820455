"""Clean steps that the guard would skip, or roll back: whole runs of many kinds with nothing planted.

Each kind trains with the guard off and logs each step's loss and gradient norm; today's guard is then asked about all
of them. Tiny models are random ones of two layers; MiniLM-L6 is real.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.public_data import MINILM, answer_lengths, banking77, shakespeare, wnut17
from bench.results import Figure
from bench.runs import SMOKE, Records, events, fresh, fulltune, run, script
from tests import tiny

from fulltune.train.loop import step_guard

CLASSES = "task: text-classification\ndata: {train: train.csv, eval: eval.csv, test: test.csv, label: category}\n"
TAGS = "task: token-classification\ndata: {train: train.conll, eval: eval.conll, test: test.conll}\n"
NUMBERS = (
    "task: text-classification\n"
    "data: {train: train.csv, eval: eval.csv, test: test.csv, text: text, label: log_words}\n"
)
ANSWERS = "task: {task}\ndata: {{train: train.csv, {columns}, max_length: 128, truncation_strategy: drop}}\n"
PROMPTS = ANSWERS.format(task="causal-lm", columns="prompt: text, completion: category")
WRITTEN = ANSWERS.format(task="seq2seq", columns="source: text, target: category")
RAW = "task: causal-lm\ndata: {train: input.txt, text_rows: section, max_length: 128}\n"


@dataclass(frozen=True)
class Kind:
    """A kind of training."""

    model: str
    """A tiny model's kind, or `minilm`."""
    recipe: str
    write: Callable[[Path, int], None]
    rows: int
    rates: tuple[float, ...]
    steps: int = 1000
    method: str = "full"
    batch: int = 32


TINY_RATES = (1e-3, 3e-3)
KINDS = {
    "classes-bert": Kind("bert", CLASSES, banking77, 2000, TINY_RATES),
    "classes-roberta-few": Kind("roberta", CLASSES, banking77, 200, (1e-3,)),
    "classes-minilm": Kind("minilm", CLASSES, banking77, 2000, (5e-5, 2e-4, 8e-4), 315),
    "classes-minilm-few": Kind("minilm", CLASSES, banking77, 200, (2e-4,), 300, batch=16),
    "classes-minilm-lora": Kind("minilm", CLASSES, banking77, 2000, (8e-4,), 315, "lora"),
    "tags-distilbert": Kind("distilbert", TAGS, wnut17, 1000, TINY_RATES),
    "tags-minilm": Kind("minilm", TAGS, wnut17, 1000, (2e-4,), 320),
    "numbers-bert": Kind("bert", NUMBERS, answer_lengths, 1500, TINY_RATES),
    "prompts-llama": Kind("llama", PROMPTS, banking77, 1000, TINY_RATES, batch=16),
    "prompts-qwen2-few": Kind("qwen2", PROMPTS, banking77, 100, (3e-3,), batch=8),
    "raw-gpt2": Kind("gpt2", RAW, shakespeare, 1500, TINY_RATES, batch=8),
    "raw-opt": Kind("opt", RAW, shakespeare, 1500, (1e-3,), batch=8),
    "written-t5": Kind("t5", WRITTEN, banking77, 1000, TINY_RATES, batch=16),
    "written-bart": Kind("bart", WRITTEN, banking77, 1000, (1e-3,), batch=16),
    "prompts-mistral-8": Kind("mistral", PROMPTS, banking77, 2000, (1e-3,), batch=4),
}
QUICK = {"classes-bert": 10, "prompts-llama": 10} if SMOKE else {"classes-bert": 250, "prompts-llama": 250}
"""Steps of each kind."""


def prepared(folder: Path, name: str, kind: Kind) -> Path:
    """The folder of a kind with its rows, model and recipe."""
    place = folder / name
    if not (place / "recipe.yaml").exists():
        kind.write(fresh(place), kind.rows)
        model = MINILM if kind.model == "minilm" else tiny.save_model(place / "model", kind.model)
        (place / "recipe.yaml").write_text(f"model: {model}\n{kind.recipe}", encoding="utf-8")
    return place


def unguarded_steps(folder: Path, name: str, rate: float, seed: int, steps: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of a run without guards."""
    kind, place = KINDS[name], prepared(folder, name, KINDS[name])
    run_folder = fresh(place / f"{rate:g}-{seed}")
    settings = {
        "method.kind": kind.method,
        "method.learning_rate": rate,
        "train.device": "cpu",
        "train.max_steps": steps,
        "train.global_batch_size": kind.batch,
        "train.logging_steps": 1,
        "train.eval_strategy": "steps",
        "train.eval_steps": steps,
        "train.seed": seed,
        "train.skip_suspect_steps": False,
        "train.max_rollbacks": 0,
    }
    words = [f"--set={key}={value}" for key, value in settings.items()]
    run(fulltune("train", place / "recipe.yaml", "--run-folder", run_folder, *words))
    return [(event["loss"], event["grad_norm"]) for event in events(run_folder) if event["kind"] == "train"]


def alarms(steps: list[tuple[float, float]]) -> int:
    """How often the guard would skip a step or roll back."""
    history, count = step_guard.StepHistory(), 0
    for number, (loss, norm) in enumerate(steps, start=1):
        verdict = step_guard.judge_step(history, number, loss, norm)
        history = step_guard.StepHistory() if verdict.action == "stop" else verdict.history
        count += verdict.action != "go on"
        if verdict.reason:
            print(f"    step {number}: {verdict.reason}", flush=True)
    return count


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    records, total, runs, false = Records(folder / "steps.jsonl"), 0, 0, 0
    for seed, name in itertools.product((1,) if quick else (1, 2, 3), QUICK if quick else KINDS):
        length = QUICK[name] if quick else KINDS[name].steps
        for rate in KINDS[name].rates[: 1 if quick else None]:
            steps = records.get(f"{name} {rate:g} {seed}", unguarded_steps, folder, name, rate, seed, length)
            total, runs, false = total + len(steps), runs + 1, false + alarms(steps)
    yield Figure(f"false alarms of the guard in {runs} clean runs", false, "steps", at_most=0)
    yield Figure(f"clean steps judged in {runs} clean runs", total, "steps", at_least=400 if quick else 40_000)


if __name__ == "__main__":
    script(measure, __doc__)
