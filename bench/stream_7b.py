"""examples/stream-7b-random.yaml under a ceiling of 3 GiB: its memory, its time against pure computing, its disk.

The example trains all 6.74 B parameters of Llama-2-7B's shape, with random weights, for three steps of about 1,740
tokens with accumulation and exact clipping. Every process that exceeds 3 GiB of resident memory (VmHWM) is killed. Pure
computing is what one block, the head and the optimizer take with their weights in memory (`bench/block_seconds.py`),
right after the run in a process of its own, in the same data type. `--layers N` is the same shape with fewer blocks;
`--quick` has 2. The whole one needs about 57 GB of a disk in FOLDER.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.limited import GIB, DiskUse, limited
from bench.results import ROOT, Figure
from bench.runs import SMOKE, Records, fresh, fulltune, run, script
from bench.stream_1b import losses, step_seconds

EXAMPLE = ROOT / "examples" / "stream-7b-random.yaml"
SHAPE = ROOT / "examples" / "llama-2-7b"
CEILING = 3 * GIB
PURE = ("forward", "backward", "head", "optimizer")
MICRO_BATCHES = 4
"""The example's `global_batch_size`, in rows of one each."""


def shaped(folder: Path, layers: int) -> Path:
    """Llama-2-7B's config and tokenizer with so many blocks."""
    shutil.copytree(SHAPE, folder, dirs_exist_ok=True)
    config = json.loads((SHAPE / "config.json").read_text(encoding="utf-8")) | {"num_hidden_layers": layers}
    if SMOKE:
        config |= {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def pure(model: Path, length: int) -> dict[str, float]:
    """Seconds of a step's parts with their weights in memory."""
    words = [sys.executable, "-m", "bench.block_seconds", str(model), str(MICRO_BATCHES), str(length)]
    seconds: dict[str, float] = json.loads(run(words).splitlines()[-1])
    return seconds


def streamed(model: Path, folder: Path) -> dict[str, Any]:
    """Run the example with this model; what it took, and the length of its rows."""
    run_folder, log = fresh(folder) / "run", folder / "log"
    disk = DiskUse(folder)
    command = fulltune("run", EXAMPLE, "--run-folder", run_folder, "--set", f"model.name={model}")
    ended = limited(command, CEILING, log, stop=disk)
    if not ended.over and (ended.code or not disk.has_state):
        text = log.read_text(encoding="utf-8")[-3000:]
        sys.exit(f"{log}: has a training state: {disk.has_state}; ended with {ended}:\n{text}")
    answer = {name: getattr(ended, name) for name in ("peak_bytes", "total_bytes", "written_bytes", "seconds", "over")}
    answer |= {"disk_bytes": disk.highest, "steps": len(losses(run_folder)), "step_seconds": step_seconds(run_folder)}
    if not ended.over:
        split = json.loads((run_folder / "data" / "summary.json").read_text(encoding="utf-8"))["splits"]["train"]
        answer["length"] = round(split["tokens"] / split["rows"])
    shutil.rmtree(run_folder)
    return answer


def ratio(step: float, parts: Mapping[str, float]) -> float:
    """A step's time over that of its pure parts."""
    return step / sum(parts[name] for name in PURE)


def described(took: Mapping[str, Any], parts: Mapping[str, float]) -> str:
    pure_parts = ", ".join(f"{name} {parts[name]:.1f} s" for name in PURE)
    return (
        f"{parts['parameters'] / 1e9:.2f} B parameters, {MICRO_BATCHES} rows of {took['length']} tokens a step\n"
        f"a step {took['step_seconds']:.1f} s; pure: {pure_parts}\n"
        f"all processes together {took['total_bytes'] / GIB:.2f} GiB; disk {took['disk_bytes'] / 1e9:.1f} GB, "
        f"{took['written_bytes'] / 1e9:.1f} GB written; from start to report {took['seconds'] / 60:.1f} min"
    )


def measure(folder: Path, quick: bool, layers: int | None = None) -> Iterator[Figure]:
    layers = layers or (2 if quick else 32)
    records = Records(folder / f"measured-{layers}.jsonl")
    model = shaped(folder / f"shape-{layers}", layers)
    took = records.get("streamed", streamed, model, folder / "streamed")
    size = f"{layers} blocks of Llama-2-7B's shape"
    yield Figure(f"peak memory of a process, {size} streamed", took["peak_bytes"] / GIB, "GiB", at_most=CEILING / GIB)
    yield Figure(f"optimizer steps done under that ceiling, {size}", took["steps"], "steps", at_least=3)
    if took["over"]:
        return
    parts = records.get("pure", pure, model, took["length"])
    print(described(took, parts), flush=True)
    name = f"time of a step over that of pure computing, {size}"
    yield Figure(name, ratio(took["step_seconds"], parts), "x", at_most=2 if quick else 1.15)
    yield Figure(f"disk, {size}", took["disk_bytes"] / 1e9, "GB", at_most=70)


if __name__ == "__main__":
    script(measure, __doc__, layers="blocks instead of 32 (--quick: 2)")
