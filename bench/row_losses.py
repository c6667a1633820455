"""Loss a row of a trained model: how many of the rows of highest loss have a label that was made wrong on purpose.

    FULLTUNE_BENCH_DATA=... python bench/row_losses.py FOLDER [--seeds 1 2 3] [--epochs 3] [--rate 0.1]

2,000 rows of Banking77, some with any other label (`bench/label_noise.py`); all parameters of MiniLM-L6 are trained,
then `fulltune data RUN --losses` reads train and eval rows. Beside it what the label-error check lists of the same
rows: its label errors, and the first ones of these and the doubtful labels together.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from evidence import MINILM, data, write_csv
from label_noise import noisy

from fulltune.inference.store import row_id

TOP = 200


def fulltune(folder: Path, *arguments: str) -> None:
    with (folder / "log").open("a", encoding="utf-8") as log:
        command = [sys.executable, "-m", "fulltune.cli.app", *arguments]
        subprocess.run(command, check=True, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def measured(folder: Path, rate: float, epochs: int, seed: int) -> str:
    """A line of the table."""
    them, place = noisy(folder, rate, "uniform", seed), folder / f"{rate}-{epochs}-{seed}"
    place.mkdir(parents=True, exist_ok=True)
    pairs = zip(them.rows, them.given, strict=True)
    rows = [{"text": row["text"], "category": them.names[label]} for row, label in pairs]
    write_csv(place / "train.csv", rows)
    recipe = f"{MINILM}task: text-classification\ndata: {{train: train.csv, test: {data()}/banking77/test.csv}}\n"
    (place / "recipe.yaml").write_text(recipe, encoding="utf-8")
    run = place / "run"
    settings = [f"train.seed={seed}", f"data.split_seed={seed}", "train.device=cpu", "train.precision=fp32"]
    settings += [f"train.num_train_epochs={epochs}", "preserve.drift=false"]
    if not (run / "data" / "losses.jsonl").exists():
        told = [f"--set={one}" for one in settings]
        fulltune(place, "train", str(place / "recipe.yaml"), "--run-folder", str(run), *told)
        fulltune(place, "data", str(run), "--losses")
    wrong = {row_id(row) for row, is_wrong in zip(rows, them.wrong, strict=True) if is_wrong}

    def planted(found: list[dict[str, object]]) -> int:
        return sum(one["row"] in wrong for one in found)

    told = []
    losses = lines(run / "data" / "losses.jsonl")
    issues = lines(run / "data" / "issues.jsonl")
    judged = [one for check in ("label error", "doubtful label") for one in issues if one["check"] == check]
    for split in ("train", "eval"):
        read = sorted((one for one in losses if one["split"] == split), key=lambda one: -float(str(one["loss"])))
        top = TOP if split == "train" else TOP * len(read) // len(rows)
        told += [f"{planted(read)} of {len(read):,}", f"{planted(read[:top])} of {top}"]
    errors = [one for one in judged if one["check"] == "label error"]
    told += [f"{planted(errors)} of {len(errors)}", f"{planted(judged[:TOP])} of {len(judged[:TOP])}"]
    return f"| {seed} | {epochs} | {' | '.join(told)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--epochs", nargs="+", type=int, default=[3])
    parser.add_argument("--rate", type=float, default=0.1)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    print("| seed | epochs | wrong in train | of the highest losses | wrong in eval | of the highest losses ", end="")
    print(f"| label errors | with doubtful labels, at most {TOP} |\n|---|---|---|---|---|---|---|---|")
    for epochs in given.epochs:
        for seed in given.seeds:
            print(measured(given.folder.absolute(), given.rate, epochs, seed), flush=True)


if __name__ == "__main__":
    main()
