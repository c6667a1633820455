"""Test accuracy on Banking77: fulltune against the plain Trainer, on identical rows, with the same settings.

    FULLTUNE_BENCH_DATA=... python bench/banking77.py [--seeds 3] [--epochs 4] [--folder DIR]

For each seed fulltune runs `examples/banking77.yaml`; then the plain `transformers.Trainer` trains on the rows that
fulltune left for training, chooses its epoch on the same eval rows and is scored on the same test rows. Prints
JSON lines.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = Path(__file__).parent.parent / "examples" / "banking77.yaml"


def fulltune(seed: int, epochs: float, run: Path) -> tuple[float, float]:
    """Accuracy on the test rows and seconds of the training process."""
    settings = [f"train.seed={seed}", f"train.num_train_epochs={epochs}"]
    options = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "fulltune.cli.app", "evaluate", str(RECIPE), "--run-folder", str(run), "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    outcome = json.loads((run / "attempts" / f"full-seed{seed}-01" / "outcome.json").read_text(encoding="utf-8"))
    return json.loads(done.stdout)[-1]["metrics"]["accuracy"]["value"], outcome["train_seconds"]


def plain(seed: int, epochs: float, run: Path, folder: Path) -> tuple[float, float]:
    """The same with nothing of fulltune but its rows."""
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    torch.set_num_threads(os.cpu_count() or 1)
    recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))["recipe"]
    from importlib.util import find_spec

    package, _, inner = recipe["model"]["name"].removeprefix("package:").partition("/")
    path = str(Path(find_spec(package).submodule_search_locations[0]) / inner)
    labels = json.loads((run / "data" / "summary.json").read_text(encoding="utf-8"))["labels"]
    tokenizer = AutoTokenizer.from_pretrained(path)

    def split(name: str) -> Dataset:
        rows = [json.loads(line) for line in (run / "data" / name / "words.jsonl").open(encoding="utf-8")]
        encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=512)
        return Dataset.from_dict({**encoded, "labels": [labels.index(row["category"]) for row in rows]})

    def accuracy(prediction: object) -> dict[str, float]:
        logits, true = prediction
        return {"accuracy": float((np.argmax(logits, axis=-1) == true).mean())}

    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(labels), dtype=torch.float32)
    arguments = TrainingArguments(
        output_dir=str(folder),
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
        train_dataset=split("train"),
        eval_dataset=split("eval"),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    return trainer.evaluate(split("test"))["eval_accuracy"], seconds


def main() -> None:
    if "FULLTUNE_BENCH_DATA" not in os.environ:
        sys.exit("FULLTUNE_BENCH_DATA is not set: the data of this benchmark are not part of the project")
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="banking77-"))
    ours, theirs = [], []
    for seed in range(1, options.seeds + 1):
        run = folder / f"seed{seed}"
        ours.append(fulltune(seed, options.epochs, run))
        theirs.append(plain(seed, options.epochs, run, folder / f"plain{seed}"))
        print(json.dumps({"seed": seed, "fulltune": ours[-1], "plain": theirs[-1]}), flush=True)
    mean, other = statistics.mean(a for a, _ in ours), statistics.mean(a for a, _ in theirs)
    error = statistics.stdev([a for a, _ in theirs]) / len(theirs) ** 0.5 if len(theirs) > 1 else 0.0
    print(json.dumps({"fulltune": mean, "plain": other, "standard_error": error, "reached": mean >= other - error}))


if __name__ == "__main__":
    main()
