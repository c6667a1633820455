"""Memory of a streamed training as a function of depth: 8, 16, 32 and 64 blocks of the same width, three steps each.

TinyLlama's proportions in fp32 at a hidden size of 640 (a block has 4.3 M parameters), drawn at random; a step has two
rows of 64 tokens. Resident, the deepest model would need 5.0 GB. What is compared is the highest resident memory of any
process (VmHWM); most of it is Python and libraries, so what the training itself added to that of the shallowest is
compared as well.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.limited import GIB, DiskUse, limited
from bench.results import Figure
from bench.runs import SMOKE, Records, fresh, fulltune, script
from bench.stream_shapes import config, save_tokenizer, write_recipe, write_text

DEPTHS = (8, 16, 32, 64)
STEPS, ROWS, LENGTH = 3, 2, 64
HOST_MEMORY = "1400MiB"
"""As little as the saving of a model takes, so that no weights stay in memory, which would differ with depth."""
CEILING = 3 * GIB


def shape(folder: Path, layers: int, hidden: int) -> Path:
    """A folder with the config and a tokenizer, and without weights."""
    model = folder / f"shape-{layers}-{hidden}"
    save_tokenizer(model)
    (model / "config.json").write_text(json.dumps(config(layers, hidden)), encoding="utf-8")
    return model


def trained(folder: Path, model: Path) -> dict[str, int]:
    """Train a model of random weights; the peak of a process, and its growth while it trained."""
    folder, log = fresh(folder), folder / "log"
    write_text(folder, 6 * STEPS * ROWS * LENGTH)
    stream = {"placement": "stream", "stream": {"host_memory": HOST_MEMORY}}
    recipe = write_recipe(folder / "r.yaml", model, LENGTH, max_steps=STEPS, global_batch_size=ROWS, **stream)
    command = fulltune("train", recipe, "--run-folder", folder / "run", "--set", "model.random_weights=true")
    disk = DiskUse(folder)
    ended = limited(command, CEILING, log, stop=disk)
    if ended.code or not disk.has_state:
        text = log.read_text(encoding="utf-8")[-3000:]
        sys.exit(f"{log}: has a training state: {disk.has_state}; ended with {ended}:\n{text}")
    outcome = json.loads(next(folder.glob("run/attempts/*/outcome.json")).read_text(encoding="utf-8"))
    shutil.rmtree(folder / "run")
    return {"peak": ended.peak_bytes, "growth": outcome["memory_growth_bytes"]}


def spread(values: Sequence[float]) -> float:
    """How far the highest is above the lowest, as a share."""
    return max(values) / min(values) - 1


def table(measured: Mapping[int, Mapping[str, int]]) -> str:
    lines = [f"{'blocks':>8} {'peak':>10} {'growth':>10}"]
    lines += [f"{depth:>8} {m['peak'] / 1e6:>7,.0f} MB {m['growth'] / 1e6:>7,.0f} MB" for depth, m in measured.items()]
    return "\n".join(lines)


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    hidden, depths = (128, (1, 2)) if SMOKE else (256, (4, 16)) if quick else (640, DEPTHS)
    records, measured = Records(folder / f"measured-{hidden}.jsonl"), {}
    for depth in depths:
        model = shape(folder, depth, hidden)
        measured[depth] = records.get(f"{depth} blocks", trained, folder / "streamed", model)
    print(table(measured), flush=True)
    depths_named = f"{', '.join(map(str, depths))} blocks"
    peaks = spread([one["peak"] for one in measured.values()])
    yield Figure(f"difference of the peak memory of a process, {depths_named} streamed", peaks, "share", at_most=0.03)
    growth = measured[depths[-1]]["growth"] / measured[depths[0]]["growth"]
    name = f"growth of a training's memory with {depths[-1]} blocks over that with {depths[0]}"
    yield Figure(name, growth, "x", at_most=1.25)


if __name__ == "__main__":
    script(measure, __doc__)
