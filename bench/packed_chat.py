"""Rows with answers packed within a micro batch: the same loss and gradients, and the speed beside two others.

Five families of tiny models compare a packed micro batch with single rows, in fp32 without dropout. SmolLM2-135M then
trains on GSM8K in steps of one micro batch of 8 rows, with logits of trained tokens only; packed rows, random order
and grouped lengths take turns. Speeds count the rows' own tokens per second of CPU time, without padding.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.public_data import SMOLLM2, gsm8k
from bench.results import Figure
from bench.runs import SMOKE, Records, fresh, fulltune, median_ratio, run, script
from tests import tiny
from tests.unit.test_packing import KINDS, answered_rows, loss_and_gradients, make_model

from fulltune.inference.selective_head import SelectiveHead
from fulltune.inference.store import Rows
from fulltune.models.base import Base
from fulltune.models.load import load_model
from fulltune.recipe.file import load_recipe
from fulltune.tasks import Target, causal_lm
from fulltune.tasks.padding import trained_positions
from fulltune.train.loop.sampler import GlobalBatchSampler

RECIPE = f"model: {SMOLLM2}\ntask: causal-lm\ndata: {{train: train.jsonl, prompt: question, completion: answer}}\n"
COLLATE = {"packed": causal_lm.collate_packed, "random order": causal_lm.collate, "grouped lengths": causal_lm.collate}


def differences(kind: str) -> list[float]:
    """Of a packed micro batch to single rows: relative loss, trained tokens, largest relative gradient."""
    rows, model = answered_rows(), make_model(kind, tiny.decoder_tokenizer())
    batches = [collate(rows, 0) for collate in (causal_lm.collate_packed, causal_lm.collate)]
    packed, single = (loss_and_gradients(model, batch) for batch in batches)
    tokens = [causal_lm.count_items(batch["labels"]) for batch in batches]
    gradients = [float((packed[1][name] - other).abs().max() / other.abs().max()) for name, other in single[1].items()]
    return [abs(packed[0] / single[0] - 1), abs(tokens[0] - tokens[1]), max(gradients)]


def speeds(folder: Path, steps: int) -> dict[str, list[float]]:
    """Tokens per second of each step and order; the first step of each is left out."""
    gsm8k(fresh(folder / "data"), 400)
    (path := folder / "data" / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    run(fulltune("data", path, "--run-folder", folder / "data" / "run"))
    rows, recipe = Rows(folder / "data" / "run" / "data" / "train"), load_recipe(path)
    base = Base.from_block(recipe.model, recipe.task)
    model: Any = load_model(base, {"use_cache": False}, head_is_new=False).train()
    head = SelectiveHead(model.get_output_embeddings(), causal_lm.target_ids, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    found: dict[str, list[float]] = {order: [] for order in COLLATE}
    lengths = np.asarray(rows["length"])
    batches = {order: cycle(GlobalBatchSampler(lengths, 8, 8, 0, order == "grouped lengths")) for order in COLLATE}
    for step in range(steps + 1):
        for order in list(COLLATE)[step % 3 :] + list(COLLATE)[: step % 3]:
            began, numbers = time.process_time(), next(batches[order])
            batch = COLLATE[order]([rows[number] for number in numbers], base.processor.pad_token_id)
            labels = batch.pop("labels")
            trained = trained_positions(wanted := causal_lm.target_ids(labels))
            with torch.autocast("cpu", torch.bfloat16), head.computing_only(labels, trained):
                logits = model(**batch).logits
            loss = causal_lm.loss(logits, wanted.flatten()[trained], Target("prompt_completion", {}))
            (loss / len(trained)).backward()
            optimizer.step()
            optimizer.zero_grad()
            found[order] += [int(lengths[numbers].sum()) / (time.process_time() - began)] * (step > 0)
    return found


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    records = Records(folder / "records.jsonl")
    for kind in KINDS:
        loss, tokens, gradient = records.get(kind, differences, kind)
        yield Figure(f"packed rows, {kind}: relative difference of the loss", loss, "", at_most=1e-6)
        yield Figure(f"packed rows, {kind}: difference of trained tokens", tokens, "tokens", at_most=0)
        yield Figure(f"packed rows, {kind}: largest relative difference of a gradient", gradient, "", at_most=1e-5)
    found = records.get("speeds", speeds, folder, 1 if SMOKE else 2 if quick else 8)
    for other, least in (("random order", 1.0), ("grouped lengths", 0.7)):
        ratio = median_ratio(found["packed"], found[other])
        yield Figure(f"packed GSM8K rows: tokens per second against {other}", ratio, "times", at_least=least)


if __name__ == "__main__":
    script(measure, __doc__)
