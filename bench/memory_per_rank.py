"""Predicted and measured peak memory of each process of a training, by placement and number of processes, on the CPU.

    python bench/memory_per_rank.py [--only NAME ...] [--folder FOLDER] [--records FILE] [--show]

Each cell is a whole attempt through the command line: torchrun with gloo, weights read from safetensors, checks,
dry-run step, three optimizer steps, an evaluation, a checkpoint, the finished model. Models have 30 to 60 M parameters
of random weights, so that what the libraries take does not drown theirs. Predicted is the peak by the plan's
arithmetic, measured the growth of each process's resident memory from before the weights are read: that of the first
one to its end, with the finished model that it puts together, that of the others to the end of the training.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fulltune.records.plan import MemoryNeed, MemorySettings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

# The benches are no installed package: they are found by the path that was set above.
from bench.memory_prediction import TIED, Cell, _cell, _row, _save_model  # noqa: E402  # after what it needs

from fulltune.system.sharing import Sharing  # noqa: E402  # after what it needs

STEPS = 3
MODELS = (
    _cell("llama", "llama", (512, 8, 16000), (4, 128)),
    _cell("llama-tied-bf16", "llama", (512, 10, 32000), (2, 128), precision="bf16", config=TIED),
    _cell("llama-wide-recomputed", "llama", (1024, 3, 8000), (4, 128), checkpointing=True, accumulation=2),
    _cell("bert", "bert", (512, 10, 30000), (4, 128)),
    _cell("bert-bf16-accumulation", "bert", (768, 5, 20000), (4, 128), precision="bf16", accumulation=2),
    _cell("gpt2", "gpt2", (512, 9, 24000), (2, 128)),
)
NARROW = {"weights_dtype": "bf16", "precision": "bf16"}
OTHER_TYPES = (
    _cell("llama-8bit", "llama", (512, 10, 24000), (4, 128), optim="adamw_8bit"),
    _cell("bert-adamw-bf16", "bert", (512, 10, 30000), (4, 128), optim="adamw_bf16"),
    _cell("llama-bf16-weights", "llama", (768, 8, 24000), (4, 128), optim="adamw_bf16", **NARROW),
    _cell("bert-bf16-weights-8bit", "bert", (768, 8, 30000), (4, 128), optim="adamw_8bit", **NARROW),
)
"""Weights or moments of other types, which DeepSpeed does not have."""
GROUND = _cell("ground", "llama", (64, 2, 1000), (2, 16))
"""So small that what it takes is the libraries': no error is given for it."""
PLACES = (("single", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 4), ("zero2", 2), ("zero3", 2))


SHARED = {
    "fsdp2": Sharing(3, False, False, engine="fsdp2"),
    "zero2": Sharing(2, False, False),
    "zero3": Sharing(3, False, False),
}


def write_recipe(
    cell: Cell,
    placement: str,
    processes: int,
    folder: Path,
    save: Callable[[Cell, Path], Path] = _save_model,
    **train: Any,
) -> Path:
    """A model of random weights, rows and a recipe, in an empty folder.

    Args:
        cell: The model and how it is trained.
        placement: Where its state lies.
        processes: How many.
        folder: Made anew.
        save: Writes the model.
        train: Further settings, or others than the usual ones.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = save(cell, folder / "model")
    batch = cell.rows * cell.accumulation * processes
    for name, number in (("train", STEPS * batch), ("eval", 4), ("test", 4)):
        lines = [json.dumps(_row(cell, number_of)) for number_of in range(number)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    usual = {"device": "cpu", "max_steps": STEPS, "micro_batch_size": cell.rows, "global_batch_size": batch}
    usual |= {"num_processes": processes, "placement": placement, "oversubscribe": True, "precision": cell.precision}
    usual |= {"activation_checkpointing": cell.checkpointing, "chunked_loss": cell.chunked}
    usual |= {"optim": cell.optim} if cell.optim else {}
    recipe = {
        "model": {"name": str(model), "weights_dtype": cell.weights_dtype},
        "task": cell.task,
        "data": {name: f"{name}.jsonl" for name in ("train", "eval", "test")} | {"max_length": cell.length},
        "train": usual | train,
        "evaluate": {"bootstrap_samples": 100, "generate_rows": 0, "batch_size": cell.rows, "baselines": False},
        "output": ".",
    }
    if cell.task == "text-classification":
        recipe["method"] = {"head_init": "random"}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    return folder / "recipe.yaml"


def environment() -> dict[str, str]:
    """Variables of a process that is started: one thread, and the code beside this script."""
    paths = os.pathsep.join((str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def measure(cell: Cell, placement: str, processes: int, folder: Path) -> dict[str, Any]:
    """Train the cell; returns what its plan is made of, and the growth of each process, in bytes."""
    recipe, run = write_recipe(cell, placement, processes, folder), folder / "run"
    command = [sys.executable, "-m", "fulltune.cli.app", "train", str(recipe), "--run-folder", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    if done.returncode:
        logs = "".join(path.read_text(encoding="utf-8") for path in run.glob("attempts/*/log.txt"))
        return {"error": (done.stderr + logs)[-3000:]}
    outcome = json.loads(next(run.glob("attempts/*/outcome.json")).read_text(encoding="utf-8"))
    sizes = {name: json.loads((run / "plan" / f"{name}.json").read_text("utf-8")) for name in ("shapes", "footprint")}
    shutil.rmtree(folder)
    growths = outcome["memory_growth_per_process"] or [outcome["memory_growth_bytes"]]
    return {"growths": growths, "dry_run": outcome["dry_run_growth_bytes"], **sizes}


def predict(one: dict[str, Any]) -> MemoryNeed:
    """What a plan says of a recorded cell now."""
    from fulltune.footprint.records import Footprint
    from fulltune.models.shapes import Shapes
    from fulltune.plan import budget

    cell = Cell(**one["cell"])
    settings = MemorySettings(
        micro_batch_size=cell.rows,
        longest_tokens=cell.length,
        gradient_accumulation_steps=cell.accumulation,
        precision=cell.precision,
        weights_dtype=cell.weights_dtype,
        optim=cell.optim or "adamw_torch_fused",
        activation_checkpointing=cell.checkpointing,
        chunked_loss=cell.chunked,
        eval_batch_size=cell.rows,
        num_processes=one["processes"],
    )
    footprint = Footprint.model_validate(one["footprint"] | {"weights_dtype": cell.weights_dtype})
    return budget.need(Shapes.model_validate(one["shapes"]), footprint, settings, SHARED.get(one["placement"]))


def key_of(cell: Cell, placement: str, processes: int) -> str:
    return f"{cell.name} {placement} {processes}"


def show(records: dict[str, dict[str, Any]]) -> None:
    """A line for each cell, and the errors of each placement."""
    print(f"{'cell':<26}{'placement':<11}{'M':>5}{'plan, MB':>10}  measured, MB, in each process; error of the highest")
    errors: dict[str, list[float]] = {}
    for one in records.values():
        head = f"{one['cell']['name']:<26}{one['placement']:<6}x {one['processes']:<3}"
        if "error" in one:
            print(f"{head}  {one['error'][-300:]}")
            continue
        peak, growths = predict(one).peak, one["growths"]
        error = peak / max(growths) - 1
        if one["cell"]["name"] != GROUND.name:
            errors.setdefault(one["placement"], []).append(error)
        measured = " ".join(f"{growth / 1e6:,.0f}" for growth in growths)
        parameters = one["shapes"]["num_parameters"] / 1e6
        print(f"{head}{parameters:>5.0f}{peak / 1e6:>10,.0f}  {measured}  {error:+.1%}")
    for placement, found in errors.items():
        within, median = sum(abs(error) <= 0.1 for error in found), statistics.median(map(abs, found))
        spread = f"{min(found):+.1%} to {max(found):+.1%}"
        below = sum(error < 0 for error in found)
        print(f"{placement}: {within} of {len(found)} within 10 %, {below} below, median {median:.1%}, {spread}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=None, help="names of cells")
    parser.add_argument("--places", nargs="*", default=None, help="such as fsdp2:2")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "fulltune-memory-per-rank")
    parser.add_argument("--records", type=Path, default=None, help="measured before, or where to write: JSON lines")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    chosen = parser.parse_args()
    path = chosen.records or chosen.folder / "records.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, dict[str, Any]] = {}
    if path.exists():
        known = {one["key"]: one for one in map(json.loads, path.open(encoding="utf-8"))}
    for cell in (GROUND, *MODELS, *OTHER_TYPES):
        for placement, processes in PLACES:
            key = key_of(cell, placement, processes)
            left_out = chosen.only is not None and cell.name not in chosen.only
            left_out = left_out or (cell in OTHER_TYPES and placement in ("zero2", "zero3"))
            left_out = left_out or (chosen.places is not None and f"{placement}:{processes}" not in chosen.places)
            if key in known or chosen.show or left_out:
                continue
            found = measure(cell, placement, processes, chosen.folder / "cell")
            known[key] = {"key": key, "cell": asdict(cell), "placement": placement, "processes": processes, **found}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(known[key]) + "\n")
            print(key, [round(growth / 1e6) for growth in found.get("growths", ())], found.get("error", ""), flush=True)
    show(known)


if __name__ == "__main__":
    main()
