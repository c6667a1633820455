"""Memory of two processes that load a model of 1.1 B parameters in parts, and save it, on the CPU.

    python bench/load_in_parts.py [--only fsdp2 | zero3] [--folder FOLDER]

A Llama of TinyLlama's shape with random weights lies in safetensors, in fp32 or in bf16, and two processes load it as a
training does (`models/load.py`), FSDP2 or DeepSpeed's stage 3 (where it is installed) sharing it out. Each writes its
values once, as an update does: where the file has the weights' own type they lie in the mapped file until then. Then
they are saved as a checkpoint (FSDP2) and as the finished model, whose tensors are compared with those in the file.

Measured is each process's proportional set size (Pss of /proc/PID/smaps_rollup, read every 20 ms), at its highest in
each phase, less what it was just before the weights are read, when everything is imported; over the bytes of the whole
model as it is loaded. Pages of a mapped file count while they are mapped, for each process its share of those that both
have; they are the kernel's cache, which it takes back where memory is short, so they are shown apart. Files in the
cache that no process maps are not counted. The bar is 0.75 in each process; where one misses it, the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The benches are no installed package: they are found by the path that was set above.
from bench.memory_per_rank import environment  # noqa: E402  # after what it needs

from fulltune.train.parent import ranks, spawn  # noqa: E402  # after what it needs

BAR = 0.75
PROCESSES = 2
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
"""TinyLlama's."""
KINDS = (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"))
"""Type in the file, and as loaded; the bar is for those that are loaded as they are in the file."""
READY = "ready"
WAIT_SECONDS, POLL_SECONDS = 0.4, 0.02
Sample = tuple[int, int]
"""Proportional set size, and what of it is files, in bytes."""


# ---- in the processes ------------------------------------------------------------------------------------------------


def make(folder: Path, dtype: str) -> None:
    """Write the model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(getattr(torch, dtype)).save_pretrained(folder)


def work(engine: str, dtype: str, folder: Path) -> None:
    """One of the processes: load, write, and say what it is doing."""
    import torch.distributed
    from transformers import TrainingArguments

    from fulltune.models import sharding
    from fulltune.models.base import Base
    from fulltune.models.load import load
    from fulltune.recipe.model import ModelBlock
    from fulltune.train.optim import fsdp2, zero
    from fulltune.train.optim.zero import connect

    here = folder / f"process-{os.environ['RANK']}"

    def say(phase: str) -> None:
        """And stay in it until it was seen."""
        torch.distributed.barrier()
        here.with_suffix(".new").write_text(f"{os.getpid()} {phase}", encoding="ascii")
        here.with_suffix(".new").replace(here)
        time.sleep(WAIT_SECONDS)
        torch.distributed.barrier()

    settings: dict[str, Any] = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    if engine == "zero3":  # what is loaded is asked for in fp32, and DeepSpeed computes in bf16
        settings["bf16"] = {"enabled": dtype == "bf16"}
        dtype = "fp32"
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), use_cpu=True, deepspeed=settings if engine == "zero3" else None
    )
    if engine == "zero3":
        connect(arguments)
    assert arguments.device.type == "cpu"  # asking for it connects the processes

    def before_weights() -> None:
        say(READY)
        say("loading")

    block = ModelBlock(name=str(folder / "model"), weights_dtype=dtype)  # type: ignore[arg-type]  # one of its types
    base = Base.of(block, "causal-lm")
    shared_by = PROCESSES if engine == "fsdp2" else 1
    model: Any = load(base, {}, head_is_new=False, before_weights=before_weights, shared_by=shared_by)
    parameters = dict(model.named_parameters())
    say("each value written")
    for one in parameters.values():
        (one.ds_tensor if engine == "zero3" else sharding.local(one)).detach().add_(0)
    for name in ("checkpoint", "finished"):
        (folder / name).mkdir(exist_ok=True)
    if engine == "fsdp2":
        say("a checkpoint")
        fsdp2.save(model, {}, folder / "checkpoint")
        say("the finished model")
        fsdp2.write_whole(model, folder / "finished")
    else:
        say("the finished model")
        zero.write_whole(model, folder / "finished")
    say("done")


# ---- watching them ---------------------------------------------------------------------------------------------------


def held(pid: str) -> Sample | None:
    """What a process holds; None: it has gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    except (FileNotFoundError, ProcessLookupError):
        return None
    sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
    return sizes["Pss"], sizes["Pss_File"]


def watch(command: list[str], folder: Path) -> dict[str, dict[str, tuple[Sample, Sample]]]:
    """Run the processes; returns for each phase and process what it held before all, and at the highest."""
    before: dict[str, Sample] = {}
    highest: dict[str, dict[str, Sample]] = defaultdict(dict)
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment())
        while child.poll() is None:
            for file in sorted(folder.glob("process-?")):
                pid, phase = file.read_text(encoding="ascii").split(" ", maxsplit=1)
                if (now := held(pid)) is None:
                    continue
                if phase == READY:
                    before[file.name] = now
                highest[phase][file.name] = max(now, highest[phase].get(file.name, (0, 0)))
            time.sleep(POLL_SECONDS)
    if child.returncode:
        sys.exit((folder / "log.txt").read_text(encoding="utf-8")[-3000:])
    return {
        phase: {name: (before[name], sample) for name, sample in sorted(found.items())}
        for phase, found in highest.items()
        if phase not in (READY, "done")
    }


def is_same(folder: Path) -> bool:
    """Whether the finished model has the tensors that were loaded, in the type that they were loaded in."""
    import torch
    from safetensors import safe_open

    first = safe_open(folder / "model" / "model.safetensors", framework="pt")
    names = set(first.keys())
    for file in (folder / "finished").glob("*.safetensors"):
        with safe_open(file, framework="pt") as found:
            for name in found.keys():  # noqa: SIM118 - it is no mapping
                names.remove(name)
                one = found.get_tensor(name)
                if not torch.equal(one, first.get_tensor(name).to(one.dtype)):
                    return False
    return not names


def measure(engine: str, in_file: str, dtype: str, folder: Path) -> bool:
    """A line for each phase; returns whether the bar was met."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "model").mkdir(parents=True)
    long = {"fp32": "float32", "bf16": "bfloat16"}
    subprocess.run([sys.executable, __file__, "--make", long[in_file], "--folder", str(folder / "model")], check=True)
    size = (folder / "model" / "model.safetensors").stat().st_size
    whole = size * {"bf16": 2, "fp32": 4}[dtype] // {"bf16": 2, "fp32": 4}[in_file]
    launch = [sys.executable, "-m", spawn.LAUNCHER, *ranks.ONE_MACHINE, f"--nproc-per-node={PROCESSES}"]
    command = [*launch, __file__, "--work", engine, dtype, "--folder", str(folder)]
    good = True
    for phase, found in watch(command, folder).items():
        grown = [(peak - base) / whole for (base, _), (peak, _) in found.values()]
        files = [(peak - base) / whole for (_, base), (_, peak) in found.values()]
        shares, mapped = (", ".join(f"{one:.2f}" for one in ones) for ones in (grown, files))
        good = good and (max(grown) < BAR or in_file != dtype)
        print(f"| {engine} | {in_file} | {dtype} | {whole / 1e9:.2f} | {phase} | {shares} | {mapped} |", flush=True)
    if not is_same(folder):
        sys.exit(f"{engine}, {in_file} as {dtype}: the finished model is not what was loaded")
    shutil.rmtree(folder)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("fsdp2", "zero3"), default=None)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "fulltune-load-in-parts")
    parser.add_argument("--make", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--work", nargs=2, default=None, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.make is not None:
        return make(chosen.folder, chosen.make)
    if chosen.work is not None:
        return work(*chosen.work, chosen.folder)
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    engines = (chosen.only,) if chosen.only else ("fsdp2", "zero3") if has_deepspeed else ("fsdp2",)
    print("| engine | file | loaded as | whole, GB | phase | highest in each process | of it mapped files |")
    print("|---|---|---|---:|---|---|---|", flush=True)
    good = [measure(engine, *kind, chosen.folder) for engine in engines for kind in KINDS]
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
