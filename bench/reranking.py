"""A reranker made of MiniLM: how well it orders the documents that BM25 finds, against BM25's own order.

    FULLTUNE_BENCH_DATA=data python -m bench.reranking [--quick] [--folder F]

Docstrings as in `bench.embedding`: the first line of a function's docstring, and its code among 16 candidates, 15 of
them what BM25 finds most similar; no module is in two splits. NDCG@10 on the test rows, in pairs of the same queries.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from bench.embedding import write_docstrings
from bench.public_data import MINILM
from bench.results import Figure
from bench.runs import Records, fresh, fulltune, run, script


def trained(folder: Path, count: int) -> dict[str, Any]:
    """Train and score: NDCG@10 by model, and what training is ahead of each, with intervals."""
    write_docstrings(fresh(folder), count)
    data = {"train": "rows.jsonl", "group": "module", "max_length": 128, "candidates": 16}
    train = {"global_batch_size": 16, "device": "cpu", "num_train_epochs": 1}
    blocks = {"model": MINILM, "task": "reranking", "data": data, "train": train, "preserve": {"drift": False}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(blocks), encoding="utf-8")
    run(fulltune("evaluate", folder / "recipe.yaml", "--run-folder", folder / "run"))
    scores = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / "run" / "scores").glob("*.json")]
    [mine] = [score for score in scores if score["kind"] == "trained"]
    ahead = {other: [gap[part] for part in ("value", "low", "high")] for other, gap in mine["differences"].items()}
    return {"ndcg": {score["name"]: score["metrics"]["ndcg@10"]["value"] for score in scores}, "ahead": ahead}


def measure(folder: Path, quick: bool = False) -> Iterator[Figure]:
    scored = Records(folder / "records.jsonl").get(
        "docstrings", trained, folder / "docstrings", 1_200 if quick else 6_000
    )
    print(f"  NDCG@10 {scored['ndcg']}", flush=True)
    for other, (value, low, high) in scored["ahead"].items():
        print(f"  ahead of {other}: {value:+.3f} [{low:+.3f}, {high:+.3f}]", flush=True)
    yield Figure("NDCG@10 on docstrings ahead of BM25's order, low end", scored["ahead"]["BM25"][1], "", at_least=0.0)


if __name__ == "__main__":
    script(measure, __doc__)
