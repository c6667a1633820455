"""Embeddings of MiniLM: how well they retrieve after training, and the same steps as sentence-transformers'.

    FULLTUNE_BENCH_DATA=data python -m bench.embedding [--quick] [--folder F]

Banking77: a question's positives are the other questions of its intent. Docstrings: the first line of a function's
docstring should find the function's code among those of other functions, in packages installed here; no module is
in two splits. NDCG@10 on the test rows is compared with the untouched encoder's and BM25's, in pairs of the same
queries. Then both programs train on the same global batches without dropout, sentence-transformers by its
CachedMultipleNegativesRankingLoss with AdamW, each in a process of its own: their losses, seconds and memory.
"""

from __future__ import annotations

import ast
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from bench.public_data import MINILM, banking77, is_installed, shuffled
from bench.results import Figure
from bench.runs import SMOKE, Records, fresh, fulltune, interleaved, median_ratio, run, script, seconds_and_peak
from tests import tiny

PACKAGES = ["sklearn", "scipy", "numpy", "transformers", "accelerate", "pydantic", "torch", "peft"]
GLOBAL, MICRO, RATE = (8, 4, 5e-5) if SMOKE else (64, 16, 5e-5)
Row = dict[str, str]


def docstrings() -> Iterator[Row]:
    """Yield the first lines of docstrings with the code below them, of the packages' files in a fixed order."""
    specs = [spec for name in (PACKAGES[-1:] if SMOKE else PACKAGES) if (spec := find_spec(name))]
    folders = [Path(folder) for spec in specs for folder in spec.submodule_search_locations or ()]
    for file in shuffled(sorted(file for folder in folders for file in folder.rglob("*.py"))):
        try:
            text = file.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and len(node.body) > 2 and (words := ast.get_docstring(node)):
                code = "\n".join(text.splitlines()[node.body[1].lineno - 1 : node.end_lineno])
                summary = words.splitlines()[0].strip()
                if len(summary.split()) >= 4 and code.count("\n") >= 2:
                    yield {"query": summary, "positive": code[:1000], "module": str(file)}


def write_docstrings(folder: Path, count: int) -> None:
    """Write so many rows, one of each summary and of each body."""
    rows, known = list[Row](), set[str]()
    for row in docstrings():
        texts = {row["query"].lower(), row["positive"]}
        if len(rows) < count and not texts & known:
            rows.append(row)
            known |= texts
        if len(rows) == count:
            break
    tiny.write_jsonl(folder / "rows.jsonl", shuffled(rows))


def trained(folder: Path, name: str, quick: bool) -> dict[str, Any]:
    """Train on one of the sets and score."""
    fresh(folder)
    data: dict[str, Any] = {"train": "rows.jsonl", "group": "module", "max_length": 96}
    if name == "Banking77":
        banking77(folder, 40 if SMOKE else 800 if quick else 0, 0.5 if SMOKE else 0.1 if quick else 1.0)
        data = {part: f"{part}.csv" for part in ("train", "eval", "test")} | {"text": "text", "label": "category"}
    else:
        write_docstrings(folder, 40 if SMOKE else 640 if quick else 12_000)
    train = {"global_batch_size": GLOBAL, "micro_batch_size": MICRO, "device": "cpu", "num_train_epochs": 1}
    blocks = {"model": MINILM, "task": "embedding", "data": data, "train": train, "preserve": {"drift": False}}
    return scored(folder, blocks)


def scored(folder: Path, blocks: dict[str, Any]) -> dict[str, Any]:
    """Run a recipe, and return NDCG@10 by model and what training is ahead of each, with intervals."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(blocks), encoding="utf-8")
    run(fulltune("evaluate", folder / "recipe.yaml", "--run-folder", folder / "run"))
    scores = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / "run" / "scores").glob("*.json")]
    [mine] = [score for score in scores if score["kind"] == "trained"]
    ahead = {other: [gap[part] for part in ("value", "low", "high")] for other, gap in mine["differences"].items()}
    return {"ndcg": {score["name"]: score["metrics"]["ndcg@10"]["value"] for score in scores}, "ahead": ahead}


# ---- the same steps by both ---------------------------------------------------------------------------------------


def global_batches(folder: Path, steps: int) -> list[list[Row]]:
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()[: steps * GLOBAL]
    rows = [json.loads(line) for line in lines]
    return [rows[start : start + GLOBAL] for start in range(0, len(rows), GLOBAL)]


def steps_of_ours(batches: Sequence[Sequence[Row]]) -> list[float]:
    import torch
    from accelerate import Accelerator

    from fulltune.models.base import Base
    from fulltune.models.load import load_model
    from fulltune.recipe.model import ModelBlock
    from fulltune.tasks import Target, embedding
    from fulltune.train.loop.contrastive import ContrastiveLoss

    base = Base.from_block(ModelBlock(name=MINILM, dropout=0.0), "embedding")
    model = load_model(base, {}, head_is_new=False)
    target = Target("query_and_positive", {"query": "query", "positive": "positive"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    contrast, losses = ContrastiveLoss(embedding.row_losses, Accelerator(cpu=True)), []
    for rows in batches:
        examples = [example.features for [example] in embedding.encode(rows, target, base.processor, 96)]
        parts = [examples[start : start + MICRO] for start in range(0, GLOBAL, MICRO)]
        micro = [embedding.collate(part, base.processor.pad_token_id) for part in parts]
        contrast.begin_step(model, micro)
        total = 0.0
        for batch in micro:
            contrast.restore_random_state()
            labels = batch.pop("labels")
            loss = contrast(model(**batch), labels, GLOBAL)
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def steps_of_theirs(batches: Sequence[Sequence[Row]]) -> list[float]:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

    from fulltune.models.base import find_model_path
    from fulltune.recipe.model import ModelBlock

    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    model = SentenceTransformer(
        str(find_model_path(ModelBlock(name=MINILM))), device="cpu", config_kwargs=dropout
    ).train()
    model.max_seq_length = 96
    loss, losses = CachedMultipleNegativesRankingLoss(model, mini_batch_size=MICRO), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    for rows in batches:
        value = loss([model.preprocess([row[role] for row in rows]) for role in ("query", "positive")], None)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
    return losses


def timed(folder: Path, side: str, steps: int) -> dict[str, Any]:
    """Run one side in a process of its own: losses, seconds of the steps and the process's peak memory."""
    seconds, peak = seconds_and_peak([sys.executable, "-m", "bench.embedding", side, str(folder), str(steps)])
    reached = json.loads((folder / f"{side}.json").read_text(encoding="utf-8"))
    return {**reached, "process": seconds, "peak": peak}


def measure(folder: Path, quick: bool = False) -> Iterator[Figure]:
    if not is_installed(MINILM):
        sys.exit(f"{MINILM} is not installed")
    records = Records(folder / "records.jsonl")
    for name in ("Banking77", "docstrings"):
        found = records.get(name, trained, folder / name, name, quick)
        print(f"  {name}: NDCG@10 {found['ndcg']}", flush=True)
        for other, (value, low, high) in found["ahead"].items():
            print(f"  ahead of {other}: {value:+.3f} [{low:+.3f}, {high:+.3f}]", flush=True)
        low = found["ahead"]["before training"][1]
        yield Figure(f"NDCG@10 on {name} ahead of the untouched encoder, low end", low, "", at_least=0.0)
    steps = 3 if quick else 12
    (folder / "steps").mkdir(exist_ok=True)
    if not (folder / "steps" / "rows.jsonl").exists():
        write_docstrings(folder / "steps", steps * GLOBAL)
    sides = {side: (lambda side=side: timed(folder / "steps", side, steps)) for side in ("ours", "theirs")}
    both = interleaved(sides, 1 if SMOKE else 2 if quick else 3, records)
    pairs = zip(both["ours"][0]["losses"], both["theirs"][0]["losses"], strict=True)
    yield Figure("loss, largest difference", max(abs(one - other) for one, other in pairs), "", at_most=1e-5)
    seconds, peaks = ([[one[name] for one in side] for side in both.values()] for name in ("seconds", "peak"))
    print(
        f"  seconds a step {[round(statistics.median(one) / steps, 2) for one in seconds]}, peaks {peaks}", flush=True
    )
    yield Figure("seconds of a step, ours by theirs", median_ratio(*seconds), "times", at_most=1.5)
    yield Figure("peak memory, ours by theirs", median_ratio(*peaks), "times", at_most=1.5)


def main() -> None:
    if sys.argv[1:2] not in (["ours"], ["theirs"]):
        script(measure, __doc__)
        return
    side, folder, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    batches = global_batches(folder, steps)
    call = steps_of_ours if side == "ours" else steps_of_theirs
    call(batches[:1])  # imports, first allocations
    began = time.monotonic()
    losses = call(batches)
    values = {"losses": losses, "seconds": time.monotonic() - began}
    (folder / f"{side}.json").write_text(json.dumps(values), encoding="utf-8")


if __name__ == "__main__":
    main()
