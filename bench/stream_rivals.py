"""What other ways need to train the same 1.1 B parameters, or how they fail, beside a streamed run in 2 GiB.

The same model (TinyLlama's shape, random weights), rows of tokens, fp32, AdamW, clipping and accumulation for all,
three steps, on the CPU: transformers' Trainer; FSDP2 with CPU offload; plain PyTorch whose tensors are mapped files;
DeepSpeed's ZeRO-3 offloaded to a disk and to the host (`bench/stream_contestants.py`). Each is a process of its own
that is killed above 20 GiB of resident memory. Pages of mapped files count there, although the system may drop them, so
the memory without them is shown too. For 7 B stands what the resident ones hold at least: 16 bytes a parameter.

DeepSpeed needs a Python that has it, which `make .venv/zero/ready` makes, and to offload to a disk libaio-dev, or
CFLAGS, LDFLAGS and LD_LIBRARY_PATH that name one. Needs FULLTUNE_BENCH_DATA, and about 45 GB of a disk in FOLDER.
`--quick` has two narrow blocks, where Python and libraries are most of the memory.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.limited import GIB, DiskUse, Ended, limited
from bench.results import ROOT, Figure
from bench.runs import SMOKE, Records, fresh, fulltune, script
from bench.stream_1b import losses, step_seconds
from bench.stream_contestants import ROWS_PER_STEP
from bench.stream_shapes import config, parameters, saved, token_rows, write_recipe, write_text

NAMES = {
    "fulltune": "fulltune, placement stream",
    "trainer": "transformers' Trainer",
    "fsdp2": "FSDP2, CPUOffloadPolicy",
    "mapped": "PyTorch, tensors are mapped files",
    "deepspeed_nvme": "DeepSpeed ZeRO-3, offload to disk",
    "deepspeed_cpu": "DeepSpeed ZeRO-3, offload to host",
}
CEILING, STREAMED_CEILING = 20 * GIB, 2 * GIB
STEPS, LENGTH = 3, 64
SEVEN_B = 16 * 6.74e9
"""Bytes of the weights, gradients and two moments of Llama-2-7B in fp32."""
RESIDENT = ("trainer", "fsdp2", "deepspeed_cpu")
SECONDS = 1800
ZERO = ROOT / ".venv" / "zero" / "bin"


def contestant(name: str, model: Path, rows: Path, folder: Path) -> dict[str, Any]:
    """Train with a rival; its memory and time, or how it ended."""
    folder, log = fresh(folder), folder / "log"
    scratch = fresh(folder / "scratch")
    python, path = Path(sys.executable), os.environ["PATH"]
    if name.startswith("deepspeed") and (ZERO / "python").exists():
        python, path = ZERO / "python", f"{ZERO}{os.pathsep}{path}"
    words = [str(python), "-m", "bench.stream_contestants", name, *map(str, (model, rows, scratch))]
    ended = limited(words, CEILING, log, seconds=SECONDS, PATH=path, DS_ACCELERATOR="cpu")
    shutil.rmtree(scratch)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    answers = [json.loads(line) for line in lines if line.startswith('{"losses"')]
    return outcome(ended, answers[-1] if answers and not ended.code else None, lines)


def streamed(model: Path, folder: Path) -> dict[str, Any]:
    """Train streamed, with fulltune's own rows of the same text, in as many tokens."""
    folder, log = fresh(folder), folder / "log"
    write_text(folder, 6 * STEPS * ROWS_PER_STEP * LENGTH)
    stream = {"placement": "stream", "stream": {"host_memory": "1900MiB"}}
    usual = {"max_steps": STEPS, "global_batch_size": ROWS_PER_STEP}
    recipe = write_recipe(folder / "recipe.yaml", model, LENGTH, **usual, **stream)
    run_folder = folder / "run"
    disk = DiskUse(folder)
    ended = limited(fulltune("train", recipe, "--run-folder", run_folder), STREAMED_CEILING, log, stop=disk)
    if not ended.code and not disk.has_state:
        sys.exit(f"{log}: trained without a training state on the disk, so it was not streamed")
    answer = {"losses": list(losses(run_folder).values()), "seconds": step_seconds(run_folder)}
    shutil.rmtree(run_folder, ignore_errors=True)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return outcome(ended, None if ended.code else answer, lines)


def outcome(ended: Ended, answer: Mapping[str, Any] | None, lines: list[str]) -> dict[str, Any]:
    """What a contestant needed; `problem` says how it ended if it did not finish."""
    memory = {"peak": ended.peak_bytes, "anonymous": ended.anonymous_bytes}
    if ended.over:
        return {**memory, "problem": f"killed above its ceiling after {ended.seconds:.0f} s"}
    if answer is None:
        errors = [line for line in lines if "Error" in line] or lines[-1:] or ["it wrote nothing"]
        return {**memory, "problem": f"code {ended.code}: {errors[-1].strip()}"}
    return {**memory, **answer}


def table(outcomes: Mapping[str, Mapping[str, Any]]) -> str:
    """Memory, time and end of each contestant, and what a resident one holds of 7 B."""
    lines = [f"{'contestant':<35} {'peak':>9} {'no files':>9} {'7 B':>8} {'a step':>8}  end"]
    for name, one in outcomes.items():
        seven = f"{SEVEN_B / 1e9:,.0f} GB" if name in RESIDENT else ""
        seconds = f"{one['seconds']:.1f} s" if "seconds" in one else ""
        last = one.get("problem") or f"loss {one['losses'][-1]:.3f}"
        memory = f"{one['peak'] / 1e9:>6.2f} GB {one['anonymous'] / 1e9:>6.2f} GB"
        lines.append(f"{NAMES[name]:<35} {memory} {seven:>8} {seconds:>8}  {last}")
    return "\n".join(lines)


def measure(folder: Path, quick: bool) -> Iterator[Figure]:
    layers, hidden = (1, 128) if SMOKE else (2, 256) if quick else (22, 2048)
    records = Records(folder / f"measured-{layers}-{hidden}.jsonl")
    model, rows = saved(folder, layers, hidden), folder / "rows.json"
    rows.write_text(json.dumps(token_rows(model, STEPS * ROWS_PER_STEP, LENGTH)), encoding="utf-8")
    outcomes = {"fulltune": records.get("fulltune", streamed, model, folder / "fulltune")}
    for name in list(NAMES)[1:]:
        outcomes[name] = records.get(name, contestant, name, model, rows, folder / name)
    size = parameters(config(layers, hidden))
    text = table(outcomes)
    print(text, flush=True)
    (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
    trained = [one["peak"] for name, one in outcomes.items() if name != "fulltune" and "problem" not in one]
    finished = "problem" not in outcomes["fulltune"]
    name = f"least memory of {len(trained)} other ways to train {size / 1e9:.2g} B parameters over fulltune's, streamed"
    share = min(trained, default=float("inf")) / outcomes["fulltune"]["peak"]
    yield Figure(name, share if finished else float("nan"), "x", at_least=0.5 if quick else 2)


if __name__ == "__main__":
    script(measure, __doc__)
