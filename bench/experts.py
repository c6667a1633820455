"""A mixture of experts made of a dense model, whose MLP is copied into four experts, two of which a token goes through.

As Mixtral, whose weights of the chosen experts add up to 1, it computes what SmolLM2-135M computes, until training
parts the experts. Fifty steps on GSM8K (fp32 on a CPU, micro batches of 2 of 8 rows) are repeated by a run that is
killed and goes on, and by two processes with FSDP2. `--quick` takes a tiny random Llama and made-up rows.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from bench import process_faults
from bench.public_data import SMOLLM2, gsm8k
from bench.results import Figure
from bench.runs import SMOKE, Records, environment, events, fresh, fulltune, run, script
from tests import tiny
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from fulltune.models.base import Base
from fulltune.models.load import load_model
from fulltune.recipe.model import ModelBlock

EXPERTS, EACH, STEPS, EQUAL = 4, 2, 8 if SMOKE else 50, 20
LIKE_THE_DENSE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)
RECIPE = f"""\
model: {{name: MODEL}}
task: causal-lm
data: {{train: train.jsonl, prompt: question, completion: answer, max_length: 128}}
method: {{kind: full, learning_rate: 2e-4}}
evaluate: {{generate_rows: 0}}
train: {{max_steps: {STEPS}, global_batch_size: 8, micro_batch_size: 2, precision: fp32, device: cpu,
        logging_steps: 1, save_steps: 7, eval_strategy: steps, eval_steps: 25}}
output: .
"""
WAYS = {"one": (), "killed": (), "two processes": ("train.placement=fsdp2", "train.num_processes=2")}
QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def upcycled(dense: Any) -> MixtralForCausalLM:
    """The dense model with its MLP in each expert, and routers drawn at random."""
    values = {name: getattr(dense.config, name) for name in LIKE_THE_DENSE}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**values, num_local_experts=EXPERTS, num_experts_per_tok=EACH))
    tensors = dense.state_dict()
    with torch.no_grad():
        for name, own in model.state_dict().items():
            block, _, part = name.rpartition("experts.")
            if part == "gate_up_proj":
                own.copy_(torch.cat([tensors[f"{block}{half}_proj.weight"] for half in ("gate", "up")]).expand_as(own))
            elif part == "down_proj":
                own.copy_(tensors[f"{block}down_proj.weight"].expand_as(own))
            elif name in tensors:
                own.copy_(tensors[name])
    return model


def prepare(folder: Path, quick: bool) -> dict[str, float]:
    """Write the mixture and the rows; the loss of both models on 16 rows."""
    if quick:
        block = ModelBlock(name=str(tiny.save_model(folder / "dense", "llama", tie_word_embeddings=True)))
        pairs = [{"question": row["prompt"], "answer": row["completion"]} for row in tiny.pair_rows(200)]
        tiny.write_jsonl(folder / "train.jsonl", pairs)
    else:
        block = ModelBlock(name=SMOLLM2)
        gsm8k(folder, 400)
    base = Base.from_block(block, "causal-lm")
    dense: Any = load_model(base, {}, head_is_new=False)
    mixture = upcycled(dense)
    mixture.save_pretrained(folder / "mixture")
    base.processor.save_pretrained(folder / "mixture")
    (folder / "recipe.yaml").write_text(RECIPE.replace("MODEL", str(folder / "mixture")), encoding="utf-8")
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()[:16]
    rows = [base.processor(row["question"] + row["answer"], return_tensors="pt") for row in map(json.loads, lines)]
    again = AutoModelForCausalLM.from_pretrained(folder / "mixture")
    with torch.no_grad():
        return {
            name: sum(float(model(**row, labels=row["input_ids"]).loss) for row in rows) / len(rows)
            for name, model in {"dense": dense, "mixture": again}.items()
        }


def trained(folder: Path, way: str) -> dict[str, Any]:
    """Fifty steps; the losses, the router losses, the tokens of each expert, and a hash of the weights."""
    place = fresh(folder / way.replace(" ", "-")) / "run"
    overrides = [word for change in WAYS[way] for word in ("--set", change)]
    command = fulltune("train", folder / "recipe.yaml", "--run-folder", place, *overrides)
    if way == "killed":
        process = psutil.Popen(command, env=environment(), **QUIET)
        while process.poll() is None and not any(line.get("step", 0) > STEPS // 2 for line in events(place)):
            time.sleep(0.05)
        process_faults.kill_all(process, place)
        process.wait()
        if (place / "models").exists():
            sys.exit(f"{place}: the run ended before it was killed")
    run(command)
    steps = {line["step"]: (line["loss"], line["router_loss"]) for line in events(place) if line["kind"] == "train"}
    outcome = json.loads(sorted(place.glob("attempts/*/outcome.json"))[-1].read_text(encoding="utf-8"))
    digest = hashlib.sha256()
    for file in sorted((place / "models" / "full").glob("*.safetensors")):
        digest.update(file.read_bytes())
    return {"steps": sorted(steps.items()), "experts": outcome["expert_tokens"], "weights": digest.hexdigest()}


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    records = Records(folder / f"records{'-quick' * quick}.jsonl")
    work = folder / ("quick" if quick else "whole")
    work.mkdir(exist_ok=True)
    losses = records.get("losses", prepare, work, quick)
    difference = abs(losses["mixture"] - losses["dense"])
    yield Figure("mixture of experts made of a dense model: difference of its loss", difference, "nats", at_most=1e-5)
    found = {way: records.get(way, trained, work, way) for way in WAYS}
    one, killed, two = (found[way] for way in WAYS)
    (first, *_, last) = (loss for _, (loss, _) in one["steps"])
    yield Figure("mixture of experts: fall of the loss in 50 steps", first - last, "nats", at_least=0.05)
    same = [one["steps"] == killed["steps"], one["experts"] == killed["experts"], one["weights"] == killed["weights"]]
    name = (
        "mixture of experts: losses, tokens and weights of a killed run that are those of an unbroken one, bit by bit"
    )
    yield Figure(name, sum(same), "of 3", at_least=3)
    pairs = zip(one["steps"], two["steps"], strict=True)
    apart = [max(abs(mine - other) for mine, other in zip(a, b, strict=True)) for (_, a), (_, b) in pairs]
    # Rounding differs between one process and two, and probably sends a few tokens to another expert later on.
    name = "mixture of experts: largest difference of a step's losses with two processes"
    yield Figure(f"{name}, first {EQUAL} steps", max(apart[:EQUAL]), "nats", at_most=1e-5)
    yield Figure(f"{name}, all {STEPS}", max(apart), "nats", at_most=1e-3)


if __name__ == "__main__":
    script(measure, __doc__)
