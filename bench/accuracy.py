"""Test accuracy on Banking77 against the plain Trainer, on identical rows: with few rows and with all.

Few rows: 500 train rows, everything at its default. All rows: for each seed fulltune runs `examples/banking77.yaml`;
then the plain `transformers.Trainer` trains with the same settings on the rows that fulltune left for training, chooses
its epoch on the same eval rows, and is scored on the same test rows.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.public_data import MINILM, banking77
from bench.results import ROOT, Figure
from bench.runs import Records, fresh, fulltune, run, script
from bench.training_speed import classifier, rows_of

EXAMPLE = ROOT / "examples" / "banking77.yaml"
FEW_ROWS = f"""\
model: {MINILM}
task: text-classification
data: {{train: train.csv, eval: eval.csv, test: test.csv, text: text, label: category}}
train: {{device: cpu}}
output: .
"""


def accuracy(recipe: Path, run_folder: Path, **settings: Any) -> float:
    """Train and score; the share of right test rows."""
    words = [f"--set={name}={value}" for name, value in settings.items()]
    command = fulltune("evaluate", recipe, "--run-folder", run_folder, "--json", *words)
    score = json.loads(run(command))[-1]
    return score["metrics"]["accuracy"]["value"]


def trainer_accuracy(run_folder: Path, seed: int, epochs: float) -> float:
    """The plain Trainer's on the rows of a run of fulltune, with the same settings."""
    import numpy as np
    from datasets import Dataset
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

    def dataset(split: str) -> Any:
        rows = rows_of(run_folder, split)
        columns = {name: [row[name] for row in rows] for name in ("input_ids", "labels")}
        return Dataset.from_dict({**columns, "attention_mask": [[1] * len(ids) for ids in columns["input_ids"]]})

    set_seed(seed)
    model, tokenizer = classifier(run_folder, seed)
    arguments = TrainingArguments(
        output_dir=str(run_folder / "trainer"),
        num_train_epochs=epochs,
        learning_rate=2e-4,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        weight_decay=0.01,
        warmup_steps=0.1,
        bf16=True,
        use_cpu=True,
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        seed=seed,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset("train"),
        eval_dataset=dataset("eval"),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda scored: {"accuracy": float((np.argmax(scored[0], axis=-1) == scored[1]).mean())},
    )
    trainer.train()
    return trainer.evaluate(dataset("test"))["eval_accuracy"]


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    records = Records(folder / "accuracies.jsonl")
    recipe = folder / "few" / "recipe.yaml"
    if not recipe.exists():
        banking77(fresh(recipe.parent), 500, 1 / 3 if quick else 1.0)
        recipe.write_text(FEW_ROWS, encoding="utf-8")
    seeds = (1,) if quick else (1, 2, 3)
    few = []
    for seed in seeds:
        settings = {"train.seed": seed, "evaluate.baselines": False}
        few.append(records.get(f"few {seed}", accuracy, recipe, folder / f"few-{seed}", **settings))
    yield Figure("test accuracy of 500 rows of Banking77 at the defaults", statistics.mean(few), "share", at_least=0.74)
    if quick:
        return
    ours, theirs = [], []
    for seed in seeds:
        place, settings = folder / f"all-{seed}", {"train.seed": seed, "train.num_train_epochs": 4}
        ours.append(records.get(f"all {seed}", accuracy, EXAMPLE, place, **settings))
        command = [sys.executable, "-m", "bench.accuracy", "trainer", str(place), str(seed), "4"]
        theirs.append(records.get(f"Trainer {seed}", lambda command=command: float(run(command).splitlines()[-1])))
    gain = statistics.mean(ours) - statistics.mean(theirs)
    error = statistics.stdev(theirs) / math.sqrt(len(theirs))
    name = "test accuracy on all of Banking77 less the plain Trainer's, in standard errors of the latter"
    yield Figure(name, gain / error if error else math.copysign(math.inf, gain), "standard errors", at_least=-1)
    yield Figure("test accuracy on all of Banking77", statistics.mean(ours), "share", at_least=0.92)


if __name__ == "__main__":
    if sys.argv[1:2] == ["trainer"]:
        print(trainer_accuracy(Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
    else:
        script(measure, __doc__)
