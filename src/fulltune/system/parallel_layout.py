from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fulltune.errors import RecipeError
from fulltune.recipe.fields import Recipe
from fulltune.recipe.training import ENGINE_SETTINGS
from fulltune.records.plan import MemoryKind, MemorySettings, Plan
from fulltune.text import counted

MemoryTier = Literal["device", "host"]


@dataclass(frozen=True)
class ParallelLayout:
    """How the training state is sharded, as a ZeRO stage, and what is offloaded."""

    stage: int
    """1 shards the optimizer state, 2 also the gradients, 3 also the weights."""
    offload_optimizer: bool
    offload_weights: bool
    engine: Literal["zero", "fsdp2"] = "zero"

    def tier_of(self, kind: MemoryKind) -> MemoryTier:
        """Return where tensors of this kind are stored between steps. Gradients are stored with the optimizer state."""
        offloaded = self.offload_weights if kind == "weights" else self.offload_optimizer
        return "host" if offloaded else "device"

    def bytes_on(self, tier: MemoryTier, state: dict[MemoryKind, int], num_processes: int) -> dict[MemoryKind, int]:
        """Return the bytes per `MemoryKind` that one process stores on the `tier` between steps."""
        parts = self.bytes_per_process(state, num_processes)
        return {kind: size if self.tier_of(kind) == tier else 0 for kind, size in parts.items()}

    def bytes_per_process(self, state: dict[MemoryKind, int], num_processes: int) -> dict[MemoryKind, int]:
        """Return one process's share of the whole `state`, in bytes per `MemoryKind`."""
        from_stage: dict[MemoryKind, int] = {"weights": 3, "gradients": 2, "optimizer": 1}
        return {
            name: -(-state[name] // num_processes) if self.stage >= stage else state[name]
            for name, stage in from_stage.items()
        }


def layout_of(recipe: Recipe) -> ParallelLayout | None:
    """Return how the recipe shards the training state, or None if each process holds all of it."""
    if recipe.train.placement == "fsdp2":
        return ParallelLayout(3, False, False, engine="fsdp2")
    if not recipe.train.zero_enabled_by:
        return None
    block = zero_settings(recipe)["zero_optimization"]
    optimizer, weights = (_offload_device(block, what) != "none" for what in ("optimizer", "param"))
    return ParallelLayout(block["stage"], optimizer, weights)


# ---- DeepSpeed's settings --------------------------------------------------------------------------------------------

PACKAGE = "deepspeed"
INSTALL = "pip install 'fulltune[deepspeed]'"
SETTINGS_FILE = ".deepspeed.json"
"""Suffix of the file with DeepSpeed's settings, beside the plan."""
AUTO = "auto"
_LEFT_TO_THE_RECIPE = {
    "optimizer": "set by train.optim, method.learning_rate and train.weight_decay, which excludes norms and biases",
    "scheduler": "set by train.lr_scheduler_type and train.warmup_steps",
    "tensor_parallel": "fulltune splits rows over processes, but not tensors",
    "autotuning": "the plan chooses the batch sizes",
    "data_efficiency": "fulltune orders the rows",
    "curriculum_learning": "fulltune orders the rows",
}
STAGES = {"zero2": 2, "zero3": 3}
BUCKET_VALUES = 5 * 10**8
"""DeepSpeed's default number of values per gradient bucket."""
LATEST = "latest"
_OF_WEIGHTS = "zero_pp_rank_*_model_states.pt"
_OF_OPTIMIZER = "*_optim_states.pt"
_BACK = "use the same settings as before, or start a new run (--fresh)"


def zero_settings(recipe: Recipe) -> dict[str, Any]:
    """Return DeepSpeed's settings, with "auto" where the plan decides; raise `RecipeError` that lists all problems."""
    if (block := recipe.train.engine_settings) is None:
        offloaded = {"none": (), "optimizer": ("optimizer",), "all": ("optimizer", "param")}[recipe.train.offload]
        devices = {f"offload_{what}": {"device": "cpu"} for what in offloaded}
        block = {"zero_optimization": {"stage": STAGES[recipe.train.placement], **devices}}
    read = _read_settings(block)
    problems = _problems_in_zero_settings(read, recipe)
    if problems:
        raise RecipeError([f"{recipe.train.zero_enabled_by}: {problem}" for problem in problems])
    # Without gradient_clipping DeepSpeed would not clip at all.
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    complete = dict.fromkeys(sizes, AUTO) | read
    for kind in ("bf16", "fp16"):
        complete.setdefault(kind, {}).setdefault("enabled", AUTO)
    complete.setdefault("steps_per_print", 10**9)  # progress is in metrics.jsonl
    return complete


def resolve_settings(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """Return DeepSpeed's settings with the plan's numbers; values that transformers fills in stay "auto"."""
    filled, problems = _fill_and_check(recipe, plan)
    if problems:  # the file may have changed since the plan was made
        raise RecipeError(problems)
    if recipe.train.placement in STAGES:
        # By default, DeepSpeed allocates a bucket of 2 GB in fp32 even for the smallest model.
        filled["zero_optimization"]["reduce_bucket_size"] = min(plan.num_parameters, BUCKET_VALUES)
    return filled


def plan_conflicts(recipe: Recipe, planned: MemorySettings) -> list[str]:
    """Return a problem for each DeepSpeed setting that contradicts the planned ones."""
    return _fill_and_check(recipe, planned)[1] if recipe.train.zero_enabled_by else []


def _fill_and_check(recipe: Recipe, settings: MemorySettings) -> tuple[dict[str, Any], list[str]]:
    """Return DeepSpeed's settings with "auto" replaced by the planned numbers, and a problem for each contradiction."""
    filled, problems = zero_settings(recipe), []
    micro_batch_size, accumulation = settings.micro_batch_size, settings.gradient_accumulation_steps
    planned: dict[str, tuple[Any, str]] = {
        "train_micro_batch_size_per_gpu": (micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (accumulation, "train.global_batch_size / (micro batch x processes)"),
        "train_batch_size": (micro_batch_size * accumulation * settings.num_processes, "train.global_batch_size"),
        "gradient_clipping": (recipe.train.max_grad_norm, "train.max_grad_norm"),
        "bf16.enabled": (settings.precision == "bf16", "train.precision"),
        "fp16.enabled": (settings.precision == "fp16", "train.precision"),
        "torch_autocast.enabled": (False, "train.precision"),
    }
    for name, (value, source) in planned.items():
        at, _, field = name.rpartition(".")
        block = filled.get(at, {}) if at else filled
        current = block.get(field, AUTO)
        if field in block and current == AUTO:
            block[field] = value
        elif current not in (AUTO, value):
            against = f"{name} is {json.dumps(current)}, but {source} gives {json.dumps(value)}"
            problems.append(f'{recipe.train.zero_enabled_by}: {against}; set {name} to "auto"')
    return filled, problems


def _read_settings(block: Any) -> dict[str, Any]:
    """Return `block` if it is a mapping of settings, or else read the JSON file that it names."""
    if isinstance(block, Mapping):
        return dict(json.loads(json.dumps(block)))
    path = Path(str(block))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"{ENGINE_SETTINGS}: {path}: cannot be read ({(error.strerror or str(error)).lower()})"
        ) from None
    except ValueError as error:
        raise RecipeError(f"{ENGINE_SETTINGS}: {path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{ENGINE_SETTINGS}: {path}: expected settings in {{ }}, found {type(content).__name__}")
    return content


def _offload_device(block: Mapping[str, Any], what: str) -> Any:
    offload = block.get(f"offload_{what}") or {}
    return offload.get("device", "none") if isinstance(offload, dict) else offload


def _problems_in_zero_settings(block_settings: Mapping[str, Any], recipe: Recipe) -> list[str]:
    problems = [
        f"{name}: remove it; {instead}" for name, instead in _LEFT_TO_THE_RECIPE.items() if name in block_settings
    ]
    problems += [
        f'{name}: expected a block such as {{"enabled": "auto"}}, found {json.dumps(block_settings[name])}'
        for name in ("bf16", "fp16", "torch_autocast")
        if not isinstance(block_settings.get(name, {}), dict)
    ]
    if recipe.model.weights_dtype == "bf16":
        problems.append("keeps weights in fp32 during training; remove model.weights_dtype: bf16")
    block = block_settings.get("zero_optimization")
    if not isinstance(block, dict) or block.get("stage") not in (0, 1, 2, 3) or isinstance(block.get("stage"), bool):
        stage = block.get("stage") if isinstance(block, dict) else None
        return [*problems, f"zero_optimization.stage: expected 0, 1, 2 or 3, found {json.dumps(stage)}"]
    for what in ("optimizer", "param"):
        if (device := _offload_device(block, what)) not in ("none", "cpu"):
            problems.append(f"zero_optimization.offload_{what}: expected the device cpu, found {json.dumps(device)}")
    return problems


def why_resume_impossible(checkpoint: Path, recipe: Recipe) -> str | None:
    """Return why DeepSpeed prevents the recipe from resuming from a checkpoint, or None if it can resume."""
    layout = layout_of(recipe)
    in_engine = layout is not None and layout.engine == "zero"
    latest = checkpoint / LATEST
    if not latest.exists():
        problem = f"was not written by DeepSpeed, which only reads its own checkpoints ({recipe.train.zero_enabled_by})"
        return f"{checkpoint}: {problem}; {_BACK}" if in_engine else None
    parts = checkpoint / latest.read_text(encoding="utf-8").strip()
    processes = len(list(parts.glob(_OF_OPTIMIZER))) or recipe.train.num_processes  # stage 0 writes no shards
    stage = 3 if list(parts.glob(_OF_WEIGHTS)) else 2
    same_stage = in_engine and layout is not None and (stage == 3) == (layout.stage == 3)
    if same_stage and processes == recipe.train.num_processes:
        return None
    train = recipe.train
    set_by = train.zero_enabled_by or f"train.placement: {train.placement}"
    now = f"{set_by} on {counted(train.num_processes, 'process', 'processes')}"
    before = f"ZeRO stage {'3' if stage == 3 else '1 or 2'} on {counted(processes, 'process', 'processes')}"
    return f"{checkpoint}: was written by {before}, but is resumed with {now}; {_BACK}"
