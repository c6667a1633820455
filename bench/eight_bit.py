"""AdamW with 8-bit moments against fp32: bytes of state, time of a step, accuracy on Banking77.

    FULLTUNE_BENCH_DATA=... python bench/eight_bit.py [--seeds 3] [--epochs 4] [--only fp32 8bit] [--folder DIR]
    python bench/eight_bit.py --seeds 0        # bytes and time only; needs no data

Bytes and time are those of the tensors of MiniLM-L6 (22.7 M parameters), on one thread, the contestants in turn; the
time is the median of the steps, relative to torch's fused AdamW. torchao's and bitsandbytes' optimizers take part when
they are installed. For the accuracy each row of the table runs `examples/banking77.yaml` with every seed. Prints JSON
lines. `reached`: its mean is not below that of fp32 by more than one standard error, the larger one of fp32's mean and
of the mean difference over the seeds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parent.parent / "examples" / "banking77.yaml"
BF16 = ("model.weights_dtype=bf16", "train.precision=bf16")
ROWS: dict[str, tuple[str, ...]] = {
    "fp32": ("train.optim=adamw_torch_fused",),
    "8bit": ("train.optim=adamw_8bit",),
    "bf16 moments": ("train.optim=adamw_bf16",),
    "bf16 stochastic": (*BF16, "train.optim=adamw_bf16", "train.bf16_rounding=stochastic"),
    "bf16 kahan": (*BF16, "train.optim=adamw_bf16", "train.bf16_rounding=kahan"),
    "bf16 nearest": (*BF16, "train.optim=adamw_torch_fused", "train.bf16_rounding=nearest"),
    "bf16 stochastic, 8bit": (*BF16, "train.optim=adamw_8bit", "train.bf16_rounding=stochastic"),
}
"""Name of a contestant to the settings that it changes."""


# ---- bytes and time --------------------------------------------------------------------------------------------


def contestants() -> dict[str, tuple[Callable[[Any], Any], bool]]:
    """Name to how it is made and whether its weights are bf16."""
    import torch

    from fulltune.train.optim.optimizers import AdamW

    found: dict[str, tuple[Callable[[Any], Any], bool]] = {
        "torch fused": (lambda tensors: torch.optim.AdamW(tensors, fused=True), False),
        "adamw_8bit": (lambda tensors: AdamW(tensors, moments_format="8bit"), False),
        "adamw_bf16": (lambda tensors: AdamW(tensors, moments_format="bf16"), False),
        "adamw_8bit, bf16 stochastic": (lambda tensors: AdamW(tensors, moments_format="8bit"), True),
        "adamw_8bit, bf16 kahan": (lambda tensors: AdamW(tensors, moments_format="8bit", rounding="kahan"), True),
        "adamw_bf16, bf16 stochastic": (lambda tensors: AdamW(tensors, moments_format="bf16"), True),
    }
    if importlib.util.find_spec("torchao"):
        from torchao.optim import AdamW8bit

        found["torchao AdamW8bit"] = (AdamW8bit, False)
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes

        found["bitsandbytes AdamW8bit"] = (bitsandbytes.optim.AdamW8bit, False)
    return found


def shapes() -> list[Any]:
    """The tensors of MiniLM-L6, which is a BERT."""
    import torch
    from transformers import AutoModel, BertConfig

    config = BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)
    with torch.device("meta"):
        return [parameter.shape for parameter in AutoModel.from_config(config).parameters()]


def bytes_of(value: Any) -> int:
    """Of a state: its tensors, also those inside tensor subclasses."""
    if hasattr(value, "__tensor_flatten__"):
        return sum(bytes_of(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return int(value.nbytes) if hasattr(value, "nbytes") else 0


def steps(repeats: int) -> None:
    """Print bytes of state per parameter and seconds of a step, each contestant in turn."""
    import torch

    torch.set_num_threads(1)
    made: dict[str, tuple[list[Any], Any]] = {}
    for name, (make, is_bf16) in contestants().items():
        kind = torch.bfloat16 if is_bf16 else torch.float32
        drawn = torch.Generator().manual_seed(0)
        tensors = [torch.nn.Parameter((torch.randn(shape, generator=drawn) * 0.02).to(kind)) for shape in shapes()]
        for tensor in tensors:
            tensor.grad = (torch.randn(tensor.shape, generator=drawn) * 1e-3).to(kind)
        made[name] = tensors, make(tensors)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(repeats + 2):
        for name, (_, optimizer) in made.items():
            began = time.perf_counter()
            optimizer.step()
            if turn >= 2:  # the first makes the state, the second is warm
                seconds[name].append(time.perf_counter() - began)
    ground = statistics.median(seconds["torch fused"])
    for name, (tensors, optimizer) in made.items():
        values = sum(tensor.numel() for tensor in tensors)
        state = sum(bytes_of(kept) for tensor in tensors for kept in optimizer.state[tensor].values())
        median = statistics.median(seconds[name])
        line = {
            "optimizer": name,
            "state_bytes_per_parameter": round(state / values, 3),
            "step_milliseconds": round(1000 * median, 1),
            "times_fused_fp32": round(median / ground, 2),
        }
        print(json.dumps(line), flush=True)


# ---- accuracy --------------------------------------------------------------------------------------------------


def accuracy(name: str, seed: int, options: argparse.Namespace, folder: Path) -> float:
    """Accuracy on the test rows of one run, baselines left out."""
    settings = [*ROWS[name], f"train.seed={seed}", "evaluate.baselines=false"]
    settings.append(f"train.max_steps={options.steps}" if options.steps else f"train.num_train_epochs={options.epochs}")
    changes = [part for setting in settings for part in ("--set", setting)]
    if options.steps:
        changes += ["--set", "train.num_train_epochs=null"]
    run = folder / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    command = [sys.executable, "-m", "fulltune.cli.app", "evaluate", str(RECIPE), "--run-folder", str(run), "--json"]
    done = subprocess.run([*command, *changes], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return float(json.loads(done.stdout)[-1]["metrics"]["accuracy"]["value"])


def learned(options: argparse.Namespace) -> None:
    """Print each run's accuracy, then per row the mean, its standard error, and the distance to fp32."""
    if "FULLTUNE_BENCH_DATA" not in os.environ:
        sys.exit("FULLTUNE_BENCH_DATA is not set: the data of this benchmark are not part of the project")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="eight-bit-"))
    names = options.only or list(ROWS)
    found: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(1, options.seeds + 1):
        for name in names:
            found[name].append(accuracy(name, seed, options, folder))
            print(json.dumps({"row": name, "seed": seed, "accuracy": found[name][-1]}), flush=True)
    for name, values in found.items():
        line: dict[str, Any] = {"row": name, "mean": statistics.mean(values), "standard_error": error_of(values)}
        if "fp32" in found and name != "fp32":
            # The seeds are the same: runs are compared in pairs.
            differences = [value - other for value, other in zip(values, found["fp32"], strict=True)]
            line["difference"] = statistics.mean(differences)
            line["error_of_difference"] = error_of(differences)
            line["reached"] = line["difference"] >= -max(line["error_of_difference"], error_of(found["fp32"]))
        print(json.dumps(line), flush=True)


def error_of(values: list[float]) -> float:
    """Standard error of the mean; 0 of one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs per row; 0: bytes and time only")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps instead of epochs, to try it out")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each optimizer")
    parser.add_argument("--only", nargs="*", default=None, choices=list(ROWS), help="rows of the table of accuracies")
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    steps(options.repeats)
    if options.seeds:
        learned(options)


if __name__ == "__main__":
    main()
