"""What of a training's state its processes share out, and where it lies between steps: by the recipe's placement, or by
DeepSpeed's settings, which follow from it or are given in `train.extra.deepspeed`."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fulltune.errors import RecipeError
from fulltune.recipe.fields import Recipe
from fulltune.recipe.training import ENGINE_SETTINGS
from fulltune.records.plan import MemoryKind, Plan

Place = Literal["device", "host"]


@dataclass(frozen=True)
class Sharing:
    """What is shared out, by ZeRO's stages, and what does not lie on the device."""

    stage: int
    """1: the optimizer's state; 2: also the gradients; 3: also the weights."""
    offload_optimizer: bool
    offload_weights: bool
    engine: Literal["zero", "fsdp2"] = "zero"

    def place(self, kind: MemoryKind) -> Place:
        """Where a kind of tensors lies between steps; gradients lie with the optimizer."""
        offloaded = self.offload_weights if kind == "weights" else self.offload_optimizer
        return "host" if offloaded else "device"

    def parts_at(self, place: Place, state: dict[MemoryKind, int], num_processes: int) -> dict[MemoryKind, int]:
        """Bytes of each kind that one process keeps there between steps; 0 for what lies elsewhere."""
        parts = self.parts(state, num_processes)
        return {kind: size if self.place(kind) == place else 0 for kind, size in parts.items()}

    def parts(self, state: dict[MemoryKind, int], num_processes: int) -> dict[MemoryKind, int]:
        """Bytes of each kind that belong to one process, wherever they lie."""
        from_stage: dict[MemoryKind, int] = {"weights": 3, "gradients": 2, "optimizer": 1}
        return {
            name: -(-state[name] // num_processes) if self.stage >= stage else state[name]
            for name, stage in from_stage.items()
        }


def of(recipe: Recipe) -> Sharing | None:
    """What the recipe shards; None: each process holds everything."""
    if recipe.train.placement == "fsdp2":
        return Sharing(3, False, False, engine="fsdp2")
    if not recipe.train.engine_by:
        return None
    block = settings(recipe)["zero_optimization"]
    optimizer, weights = (_device_of(block, what) != "none" for what in ("optimizer", "param"))
    return Sharing(block["stage"], optimizer, weights)


# ---- DeepSpeed's settings --------------------------------------------------------------------------------------------

PACKAGE = "deepspeed"
INSTALL = "pip install 'fulltune[deepspeed]'"
SETTINGS_FILE = ".deepspeed.json"
"""End of the file of its settings, beside the plan that they come from."""
AUTO = "auto"
_LEFT_TO_THE_RECIPE = {
    "optimizer": "train.optim, method.learning_rate and train.weight_decay; DeepSpeed's would decay norms and biases",
    "scheduler": "train.lr_scheduler_type and train.warmup_steps",
    "tensor_parallel": "nothing: rows are shared over processes, tensors are not",
    "autotuning": "nothing: the plan fixes the batch sizes",
    "data_efficiency": "nothing: the order of the rows is fulltune's",
    "curriculum_learning": "nothing: the order of the rows is fulltune's",
}
STAGES = {"zero2": 2, "zero3": 3}
"""By placement."""
BUCKET_VALUES = 5 * 10**8
"""DeepSpeed's default: values in a bucket of gradients."""
LATEST = "latest"
"""DeepSpeed's file with the name of the folder that holds the parts."""
_OF_WEIGHTS = "zero_pp_rank_*_model_states.pt"
"""Parts of the weights, which only stage 3 shares out."""
_OF_OPTIMIZER = "*_optim_states.pt"
"""Parts of the optimizer's state: one for each process."""
_BACK = "set what it was written with, or start a new run (--fresh)"


def settings(recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's settings with all that follows from the recipe or that saving a whole model needs; or all problems at
    once."""
    found = _read(given) if (given := recipe.train.engine_settings) is not None else _of_placement(recipe)
    problems = _problems(found, recipe)
    if problems:
        raise RecipeError([f"{recipe.train.engine_by}: {problem}" for problem in problems])
    # Left out, DeepSpeed would not clip at all.
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    found = dict.fromkeys(sizes, AUTO) | found
    for kind in ("bf16", "fp16"):
        found.setdefault(kind, {}).setdefault("enabled", AUTO)
    found.setdefault("steps_per_print", 10**9)  # progress is in metrics.jsonl
    return found


def missing_package(recipe: Recipe) -> list[str]:
    """That the engine's package is not installed; empty where it is, or is not needed."""
    if not recipe.train.engine_by or importlib.util.find_spec(PACKAGE) is not None:
        return []
    return [f"{recipe.train.engine_by}: needs DeepSpeed; {INSTALL}"]


def completed(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """The settings with the plan's numbers; what transformers takes from the model's sizes stays "auto", where a file
    says so."""
    sizes = plan.micro_batch_size, plan.gradient_accumulation_steps, plan.num_processes, plan.precision
    found, problems = _filled(recipe, *sizes)
    if problems:  # a file can have changed since the plan was made
        raise RecipeError(problems)
    if recipe.train.placement in STAGES:
        # DeepSpeed would take a bucket of its default size, 2 GB in fp32, for the smallest model.
        found["zero_optimization"]["reduce_bucket_size"] = min(plan.num_parameters, BUCKET_VALUES)
    return found


def disagreements(
    recipe: Recipe, micro_batch_size: int, accumulation: int, num_processes: int, precision: str
) -> list[str]:
    """Each setting that is neither "auto" nor what the plan says; none where nothing runs in an engine."""
    if not recipe.train.engine_by:
        return []
    return _filled(recipe, micro_batch_size, accumulation, num_processes, precision)[1]


def _filled(
    recipe: Recipe, micro_batch_size: int, accumulation: int, num_processes: int, precision: str
) -> tuple[dict[str, Any], list[str]]:
    """The settings with the plan's numbers in place of "auto", and each that says otherwise."""
    found, problems = settings(recipe), []
    planned: dict[str, tuple[Any, str]] = {
        "train_micro_batch_size_per_gpu": (micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (accumulation, "train.global_batch_size / (micro batch x processes)"),
        "train_batch_size": (micro_batch_size * accumulation * num_processes, "train.global_batch_size"),
        "gradient_clipping": (recipe.train.max_grad_norm, "train.max_grad_norm"),
        "bf16.enabled": (precision == "bf16", "train.precision"),
        "fp16.enabled": (precision == "fp16", "train.precision"),
        "torch_autocast.enabled": (False, "train.precision"),
    }
    for name, (value, source) in planned.items():
        at, _, field = name.rpartition(".")
        block = found.get(at, {}) if at else found
        given = block.get(field, AUTO)
        if field in block and given == AUTO:
            block[field] = value
        elif given not in (AUTO, value):
            against = f"{name} is {json.dumps(given)}, but {source} gives {json.dumps(value)}"
            problems.append(f'{recipe.train.engine_by}: {against}; write "auto"')
    return found, problems


def _read(given: Any) -> dict[str, Any]:
    """A copy of the settings, from the recipe itself or from the file that it names."""
    if isinstance(given, Mapping):
        return dict(json.loads(json.dumps(given)))
    path = Path(str(given))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"{ENGINE_SETTINGS}: {path}: cannot be read ({(error.strerror or str(error)).lower()})"
        ) from None
    except ValueError as error:
        raise RecipeError(f"{ENGINE_SETTINGS}: {path}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise RecipeError(f"{ENGINE_SETTINGS}: {path}: expected settings in {{ }}, found {type(found).__name__}")
    return found


def _of_placement(recipe: Recipe) -> dict[str, Any]:
    """The settings that `train.placement` and `train.offload` stand for."""
    offloaded = {"none": (), "optimizer": ("optimizer",), "all": ("optimizer", "param")}[recipe.train.offload]
    devices = {f"offload_{what}": {"device": "cpu"} for what in offloaded}
    return {"zero_optimization": {"stage": STAGES[recipe.train.placement], **devices}}


def _device_of(block: Mapping[str, Any], what: str) -> Any:
    """Where a block `zero_optimization` keeps `optimizer` or `param`."""
    offload = block.get(f"offload_{what}") or {}
    return offload.get("device", "none") if isinstance(offload, dict) else offload


def _problems(found: Mapping[str, Any], recipe: Recipe) -> list[str]:
    problems = [
        f"{name}: remove it; set by {instead}" if not instead.startswith("nothing") else f"{name}: remove it; {instead}"
        for name, instead in _LEFT_TO_THE_RECIPE.items()
        if name in found
    ]
    problems += [
        f'{name}: expected a block such as {{"enabled": "auto"}}, found {json.dumps(found[name])}'
        for name in ("bf16", "fp16", "torch_autocast")
        if not isinstance(found.get(name, {}), dict)
    ]
    if recipe.model.weights_dtype == "bf16":
        problems.append("keeps weights in fp32 while it trains; remove model.weights_dtype: bf16")
    block = found.get("zero_optimization")
    if not isinstance(block, dict) or block.get("stage") not in (0, 1, 2, 3) or isinstance(block.get("stage"), bool):
        stage = block.get("stage") if isinstance(block, dict) else None
        return [*problems, f"zero_optimization.stage: expected 0, 1, 2 or 3, found {json.dumps(stage)}"]
    for what in ("optimizer", "param"):
        if (device := _device_of(block, what)) not in ("none", "cpu"):
            problems.append(f"zero_optimization.offload_{what}: expected the device cpu, found {json.dumps(device)}")
    return problems


def misfit(checkpoint: Path, recipe: Recipe) -> str | None:
    """Why the recipe cannot resume from a checkpoint that DeepSpeed wrote, or that it would have to read; None: it
    can."""
    shared = of(recipe)
    in_engine = shared is not None and shared.engine == "zero"
    latest = checkpoint / LATEST
    if not latest.exists():
        told = f"was not written by DeepSpeed, which reads its own alone ({recipe.train.engine_by})"
        return f"{checkpoint}: {told}; {_BACK}" if in_engine else None
    parts = checkpoint / latest.read_text(encoding="utf-8").strip()
    processes = len(list(parts.glob(_OF_OPTIMIZER))) or recipe.train.num_processes  # stage 0 has no parts
    stage = 3 if list(parts.glob(_OF_WEIGHTS)) else 2
    same_stage = in_engine and shared is not None and (stage == 3) == (shared.stage == 3)
    if same_stage and processes == recipe.train.num_processes:
        return None
    found = f"{recipe.train.engine_by or f'train.placement: {recipe.train.placement}'} on {recipe.train.num_processes}"
    expected = f"ZeRO's stage {'3' if stage == 3 else '1 or 2'} on {processes}, which wrote it"
    return f"{checkpoint}: goes on with {found} processes, expected {expected}; {_BACK}"
