"""Facts that a model was taught: how many does it still answer after it has learned something else?

    FULLTUNE_BENCH_DATA=... python bench/planted_facts.py FOLDER [--seeds 1 2 3]

The tiny Llama of `forgetting.py` is taught 100 made-up facts, and then trained on Shakespeare in four arms: `free`, as
by default; `replay of 1 %`, the usual remedy, where one token in a hundred is of a file of other texts (data.train with
weight 0.01); `budget of 5 %` and `of 20 %`, which have the same file as their probe. The file has half of the facts
among 1,500 sentences of Wikipedia; the other half is in no file that an arm reads.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from evidence import data
from forgetting import pretrained, sentences

FACTS, IN_FILE, RATE = 100, 50, 1e-3
RECIPE = "task: causal-lm\ndata: {{train: {train}, text_rows: paragraph, max_length: 128}}\nmodel: {model}\n"
MIXED = '["{path}/task.txt", {{path: {path}/other.txt, weight: 0.01}}]'
TAUGHT = '["{path}/facts.txt", {{path: {path}/known.txt, weight: 0.5}}]'
ARMS: dict[str, list[str]] = {
    "free": [],
    "replay of 1 %": [],
    "budget of 5 %": ["preserve.budget=5%", "preserve.probe=other.txt"],
    "budget of 20 %": ["preserve.budget=20%", "preserve.probe=other.txt"],
}


def facts() -> list[tuple[str, str]]:
    """Questions and answers that stand in no text."""
    drawn = random.Random(0)
    parts = ["ba", "dor", "fel", "gim", "ka", "lun", "mor", "nis", "pol", "ra", "sen", "tir", "vo", "zel"]
    names = ["".join(drawn.sample(parts, 3)).capitalize() for _ in range(3 * FACTS)]
    places = list(dict.fromkeys(names))[:FACTS]
    return [
        (f"Question: What is the capital of {one}? Answer:", f" {''.join(drawn.sample(parts, 2))}.") for one in places
    ]


def run(folder: Path, recipe: str, name: str, settings: list[str]) -> Path:
    """A finished run's folder; it is done once."""
    file, place = folder / f"{name}.yaml", folder / name
    file.write_text(recipe, encoding="utf-8")
    command = [sys.executable, "-m", "fulltune.cli.app", "train", str(file), "--run-folder", str(place)]
    common = ["train.device=cpu", "train.precision=fp32", "evaluate.generate_rows=0", f"method.learning_rate={RATE}"]
    common += ["train.global_batch_size=8", "train.micro_batch_size=8", "evaluate.baselines=false"]
    with Path(f"{place}.log").open("w", encoding="utf-8") as log:
        subprocess.run(
            [*command, *(f"--set={one}" for one in (*common, *settings))],
            check=True, stdout=log, stderr=log, cwd=folder, env=os.environ,
        )  # fmt: skip
    return place


def answered(model_folder: Path) -> list[bool]:
    """Of each fact, whether the model goes on with its answer."""
    from fulltune.inference.run import Batching, generate
    from fulltune.models.base import Base
    from fulltune.models.load import load
    from fulltune.recipe.model import ModelBlock

    base = Base.of(ModelBlock(name=str(model_folder)), "causal-lm")
    model = load(base, {}, head_is_new=False).float().eval()
    prompts = [base.processor(question)["input_ids"] for question, _ in facts()]
    said = generate(model, base.processor, prompts, 8, Batching(32))
    return [one.startswith(answer.strip()) for one, (_, answer) in zip(said, facts(), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    told = [f"{question}{answer}" for question, answer in facts()]
    (folder / "facts.txt").write_text("\n\n".join(told), encoding="utf-8")
    others = [*told[:IN_FILE], *sentences()[1][:1500]]
    random.Random(0).shuffle(others)
    (folder / "other.txt").write_text("\n\n".join(others), encoding="utf-8")
    (folder / "known.txt").write_text("\n\n".join(sentences()[0]), encoding="utf-8")
    for name, part in (("eval", sentences()[1][1500:1600]), ("test", sentences()[1][1600:1700])):
        (folder / f"{name}.txt").write_text("\n\n".join(part), encoding="utf-8")
    text = (data() / "shakespeare" / "input.txt").read_text(encoding="utf-8")
    (folder / "task.txt").write_text(text[:400_000], encoding="utf-8")
    taught = folder / "taught" / "models" / "full"
    if not taught.exists():
        recipe = RECIPE.format(
            train=f"{TAUGHT.format(path=folder)}, eval: eval.txt, test: test.txt", model=pretrained(folder)
        )
        run(folder, recipe, "taught", ["train.max_steps=2500", "data.packing=false", "method.learning_rate=2e-3"])
    print(f"taught: {sum(answered(taught))} of {FACTS} answered", flush=True)
    for seed in given.seeds:
        for arm, settings in ARMS.items():
            train = MIXED.format(path=folder) if arm.startswith("replay") else "task.txt"
            began = time.monotonic()
            settings = [*settings, "train.max_steps=300", f"train.seed={seed}"]
            settings += ["train.eval_strategy=steps", "train.eval_steps=60"]
            name = f"{arm}-{seed}".replace(" ", "-").replace("%", "percent")
            place = run(folder, RECIPE.format(train=train, model=taught), name, settings)
            found = answered(place / "models" / "full")
            (outcome,) = (json.loads(one.read_text()) for one in place.glob("attempts/*/outcome.json"))
            line: dict[str, Any] = {"seed": seed, "arm": arm, "in the file": sum(found[:IN_FILE])}
            line |= {"in none": sum(found[IN_FILE:]), "eval loss": outcome["best_metric"]}
            print(line | {"seconds": round(time.monotonic() - began)}, flush=True)


if __name__ == "__main__":
    main()
