"""Runs whose memory is limited from outside, so that the plan does not know and the first attempt cannot fit.

    python bench/recovery.py [--runs 20] [--folder DIR]
    python bench/recovery.py --eight-bit [--seeds 3]

Each run trains a small random model twice: as it likes, and with RLIMIT_DATA of its worker between what the state and
what the whole run needs (`prlimit`; Linux). Family, width, depth, batch and length are drawn by the number of the run;
dropout is 0 and computations are fp32, so that all fallbacks but 8-bit states keep the mathematics. Prints one line per
run: the fallbacks taken and how far the last loss is from that of the unlimited run. Exits 1 when a run does
not finish, when its first attempt fits, or when a loss differs by more than 1e-4 although only such were taken.

With `--eight-bit` nothing but the optimizer's states can be made smaller (`micro_batch_size: 1`, no checkpointing): the
eval losses of all seeds are compared with those of fp32 states, by their mean and its standard error (the larger one of
fp32's mean and of the mean difference).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")
sys.path.insert(0, str(Path(__file__).parent.parent))

from tests import tiny

from fulltune import api, pipeline
from fulltune.errors import FulltuneError
from fulltune.records.training import Outcome
from fulltune.train.parent import spawn
from fulltune.train.request import Request

MOST_DIFFERENT = 1e-4
MOST_TOKENS = 512
TOKENS_PER_WORD = 4
"""About, of the tokenizer that the models share."""
MIB = 2**20
LOADED_LATER = 90 * MIB
"""Libraries that a worker loads while it works, and kernels that it makes: no fallback frees them."""
HELD = """
import torch
from fulltune.system.memory import status_bytes
from fulltune.train.worker import attempt
torch.mm(torch.ones(512, 512), torch.ones(512, 512))
print(status_bytes("VmData"))
"""


def held_by_libraries() -> int:
    """What a worker has reserved before it loads a model."""
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True)
    return int(done.stdout)


@contextmanager
def limited(num_bytes: int) -> Iterator[None]:
    """Inside, workers may reserve so much."""
    real = spawn.command

    def command(request: Request, file: Path) -> list[str]:
        return ["prlimit", f"--data={num_bytes}", *real(request, file)]

    with mock.patch.object(spawn, "command", command):
        yield


def job(folder: Path, name: str, recipe: Path) -> pipeline.Run:
    return api.job(recipe, run_folder=folder / name, listener=lambda event: None)


def drawn(number: int, folder: Path) -> tuple[Path, str]:
    """A recipe with its model and rows, and both in words."""
    draw = random.Random(number)
    kind = draw.choice(["bert", "roberta", "llama", "gpt2", "t5"])
    width, depth = draw.choice([64, 96, 128]), draw.choice([2, 3])
    batch, length = draw.choice([24, 32, 48]), draw.choice([256, 320, 384])
    sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": 4 * width}
    if kind == "gpt2":
        sizes = {"n_embd": width, "n_layer": depth, "n_inner": 4 * width}
    elif kind == "t5":
        sizes = {"d_model": width, "num_layers": depth, "num_decoder_layers": depth, "d_ff": 4 * width}
    if kind == "gpt2":
        sizes["n_positions"] = MOST_TOKENS
    elif kind != "t5":
        sizes["max_position_embeddings"] = MOST_TOKENS + 8
    model = tiny.save_model(folder / "model", kind, tokenizer=_tokenizer(kind), seed=number, **sizes)
    task, rows = _rows(kind, draw, length)
    data = tiny.write_jsonl(folder / "rows.jsonl", rows)
    recipe = tiny.write_recipe(
        folder / "recipe.yaml",
        model,
        data,
        task=task,
        model={"dropout": 0.0, "attn_implementation": "eager"},
        method={"learning_rate": 1e-3},
        train={
            **{"max_steps": 3, "warmup_steps": 1, "global_batch_size": batch, "micro_batch_size": batch},
            **{"logging_steps": 1, "save_steps": 1, "seed": number},
        },
    )
    return recipe, f"{kind} {width} x {depth}, {batch} rows of about {length} tokens"


def _tokenizer(kind: str) -> Any:
    """One that cuts nothing off."""
    match kind:
        case "bert" | "roberta":
            return tiny.encoder_tokenizer(MOST_TOKENS, token_types=kind == "bert")
        case "t5":
            return tiny.writer_tokenizer(kind, MOST_TOKENS)
        case _:
            return tiny.decoder_tokenizer(model_max_length=MOST_TOKENS)


def _rows(kind: str, draw: random.Random, length: int) -> tuple[str, list[dict[str, str]]]:
    words = [*tiny.WEATHER, *tiny.FOOD, *tiny.PLACES]

    def text(share: float) -> str:
        return " ".join(draw.choices(words, k=max(2, int(share * length / TOKENS_PER_WORD * draw.uniform(0.4, 1)))))

    if kind in ("bert", "roberta"):
        return "text-classification", [{"text": text(1), "label": draw.choice("ab")} for _ in range(72)]
    if kind == "t5":
        return "seq2seq", [{"source": text(0.7), "target": text(0.3)} for _ in range(72)]
    return "causal-lm", [{"prompt": text(0.5), "completion": " " + text(0.5)} for _ in range(72)]


def outcomes(run: Path) -> list[Outcome]:
    return [Outcome.load(path) for path in sorted(run.glob("attempts/*/outcome.json"))]


def fallbacks(run: Path) -> list[str]:
    """What was changed, in short."""
    plans = [Request.load(path).plan for path in sorted(run.glob("attempts/*/request.json"))]
    found = []
    for before, after in itertools.pairwise(plans):
        if after.micro_batch_size != before.micro_batch_size:
            found.append(f"micro {after.micro_batch_size}")
        elif after.eval_batch_size != before.eval_batch_size:
            found.append(f"eval {after.eval_batch_size}")
        elif after.activation_checkpointing != before.activation_checkpointing:
            found.append("checkpointing")
        elif after.chunked_loss != before.chunked_loss:
            found.append("chunked loss")
        elif after.optim != before.optim:
            found.append("8-bit")
        else:
            found.append("again")
    return found


def last_loss(run: Path, kind: str) -> float:
    """The last one that was logged, of a step or of an evaluation."""
    found = []
    for path in sorted(run.glob("attempts/*/metrics.jsonl")):
        found += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    last = [event for event in found if event["kind"] == kind][-1]
    return float(last["loss"] if kind == "train" else last["metrics"]["loss"])


def tight(outcome: Outcome, run: Path, held: int, share: float) -> int:
    """A limit between the state with a margin (share 0) and what the unlimited run took (share 1)."""
    state = sum(Request.load(next(run.glob("attempts/*/request.json"))).plan.state.values())
    least = min(1.3 * state + LOADED_LATER, outcome.memory_growth_bytes)
    return held + int(least + share * (outcome.memory_growth_bytes - least))


def one_run(number: int, folder: Path, held: int) -> bool:
    began = time.monotonic()
    recipe, words = drawn(number, folder)
    pipeline.run(job(folder, "unlimited", recipe), "train")
    whole = folder / "unlimited"
    growth = outcomes(whole)[-1].memory_growth_bytes
    limit = tight(outcomes(whole)[-1], whole, held, random.Random(number).uniform(0.15, 0.7))
    line = f"{number:3}  {words}: {growth // MIB} MiB, limited to {(limit - held) // MIB}: "
    try:
        with limited(limit):
            pipeline.run(job(folder, "limited", recipe), "train")
    except FulltuneError as error:
        print(line + f"FAILED: {error}", flush=True)
        return False
    short = folder / "limited"
    taken, difference = fallbacks(short), abs(last_loss(short, "train") - last_loss(whole, "train"))
    good = outcomes(short)[0].status == "out_of_memory" and (difference <= MOST_DIFFERENT or "8-bit" in taken)
    seconds = time.monotonic() - began
    print(line + f"{', '.join(taken) or 'FITS'}; loss off by {difference:.1e}; {seconds:.0f} s", flush=True)
    return good


def eight_bit(seeds: int, folder: Path, held: int) -> bool:
    """Eval losses with 8-bit states, reached through the fallbacks, against those with fp32 states."""
    size = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = tiny.save_model(folder / "model", "bert", **size, **dropout)
    data = tiny.write_jsonl(folder / "rows.jsonl", tiny.topic_rows(160))
    losses: dict[str, list[float]] = {"unlimited": [], "limited": []}
    for seed in range(seeds):
        here = folder / str(seed)
        recipe = tiny.write_recipe(
            here / "recipe.yaml",
            model,
            data,
            method={"learning_rate": 1e-4},
            train={
                **{"num_train_epochs": 2, "global_batch_size": 8, "micro_batch_size": 1, "seed": seed},
                "activation_checkpointing": False,
            },
            evaluate={"batch_size": 1},
        )
        pipeline.run(job(here, "unlimited", recipe), "train")
        first = outcomes(here / "unlimited")[-1]
        plan = Request.load(next((here / "unlimited").glob("attempts/*/request.json"))).plan
        # A third of what 8-bit states save.
        limit = held + first.memory_growth_bytes - plan.num_parameters * 6 // 3
        with limited(limit):
            pipeline.run(job(here, "limited", recipe), "train")
        for name, found in losses.items():
            found.append(last_loss(here / name, "eval"))
        print(seed, fallbacks(here / "limited"), {name: found[-1] for name, found in losses.items()}, flush=True)
        assert fallbacks(here / "limited")[-1:] == ["8-bit"], "another fallback was enough"
    off = [one - other for one, other in zip(losses["limited"], losses["unlimited"], strict=True)]
    root = seeds**0.5
    error = max(statistics.stdev(losses["unlimited"]) / root, statistics.stdev(off) / root)
    mean = statistics.mean(off)
    print(f"eval loss with 8-bit states: {mean:+.5f} of fp32's, one standard error is {error:.5f}")
    return mean <= error


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--eight-bit", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="fulltune-recovery-"))
    held = held_by_libraries()
    print(f"libraries have reserved {held // MIB} MiB; runs in {folder}", flush=True)
    if given.eight_bit:
        return 0 if eight_bit(given.seeds, folder / "eight-bit", held) else 1
    numbers = range(given.first, given.first + given.runs)
    good = sum(one_run(number, folder / f"run{number:02}", held) for number in numbers)
    print(f"{good} of {given.runs} finished with the result of an unlimited run")
    return 0 if good == given.runs else 1


if __name__ == "__main__":
    sys.exit(main())
