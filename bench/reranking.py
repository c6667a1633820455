"""A reranker made of MiniLM: how well it orders the documents that BM25 finds, against BM25's own order.

    FULLTUNE_BENCH_DATA=data python -m bench.reranking [--quick] [--folder F]

Docstrings as in `bench.embedding`: the first line of a function's docstring, and its code among 16 candidates, 15 of
them what BM25 finds most similar; no module is in two splits. NDCG@10 on the test rows, in pairs of the same queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.embedding import scored, write_docstrings
from bench.public_data import MINILM
from bench.results import Figure
from bench.runs import SMOKE, Records, fresh, script


def trained(folder: Path, count: int) -> dict[str, Any]:
    write_docstrings(fresh(folder), count)
    data = {"train": "rows.jsonl", "group": "module", "max_length": 128, "candidates": 16}
    train = {"global_batch_size": 16, "device": "cpu", "num_train_epochs": 1}
    blocks = {"model": MINILM, "task": "reranking", "data": data, "train": train, "preserve": {"drift": False}}
    return scored(folder, blocks)


def measure(folder: Path, quick: bool = False) -> Iterator[Figure]:
    reached = Records(folder / "records.jsonl").get(
        "docstrings", trained, folder / "docstrings", 40 if SMOKE else 1_200 if quick else 6_000
    )
    print(f"  NDCG@10 {reached['ndcg']}", flush=True)
    for other, (value, low, high) in reached["ahead"].items():
        print(f"  ahead of {other}: {value:+.3f} [{low:+.3f}, {high:+.3f}]", flush=True)
    yield Figure("NDCG@10 on docstrings ahead of BM25's order, low end", reached["ahead"]["BM25"][1], "", at_least=0.0)


if __name__ == "__main__":
    script(measure, __doc__)
