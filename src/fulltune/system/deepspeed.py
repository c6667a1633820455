"""DeepSpeed's settings: made of a recipe's placement, or given in `train.extra.deepspeed`; checked, completed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fulltune.errors import RecipeError
from fulltune.recipe.fields import Recipe
from fulltune.recipe.training import NVME, NVME_FOLDER
from fulltune.records.plan import Plan

AUTO = "auto"
_DEVICES = ("none", "cpu", "nvme")
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


def wanted(recipe: Recipe) -> bool:
    """Whether the recipe trains with DeepSpeed."""
    return recipe.train.deepspeed_by is not None


def settings(recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's settings with all that follows from the recipe or that saving a whole model needs; or all problems at
    once."""
    found = _read(given) if (given := recipe.train.extra.get("deepspeed")) is not None else _of_placement(recipe)
    problems = _problems(found, recipe)
    if problems:
        raise RecipeError([f"{recipe.train.deepspeed_by}: {problem}" for problem in problems])
    # Left out, DeepSpeed would not clip at all.
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    found = dict.fromkeys(sizes, AUTO) | found
    for kind in ("bf16", "fp16"):
        found.setdefault(kind, {}).setdefault("enabled", AUTO)
    found.setdefault("steps_per_print", 10**9)  # progress is in metrics.jsonl
    if found["zero_optimization"]["stage"] == 3:
        found["zero_optimization"].setdefault("stage3_gather_16bit_weights_on_model_save", True)
    return found


def completed(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """The settings with the plan's numbers; what transformers takes from the model's sizes stays "auto", where a file
    says so."""
    sizes = plan.micro_batch_size, plan.gradient_accumulation_steps, plan.num_processes, plan.precision
    # Checked again: a file can have changed since the plan was made.
    if problems := disagreements(recipe, *sizes):
        raise RecipeError(problems)
    found = settings(recipe)
    for name, (value, _) in _planned(recipe, *sizes).items():
        block, field = _place(found, name)
        if block.get(field) == AUTO:
            block[field] = value
    if recipe.train.placement in STAGES:
        # DeepSpeed would take a bucket of its default size, 2 GB in fp32, for the smallest model.
        found["zero_optimization"]["reduce_bucket_size"] = min(plan.num_parameters, BUCKET_VALUES)
    return found


def nvme_path(recipe: Recipe) -> str | None:
    """The folder on a disk that the recipe's settings offload to; None: they do not, or it is left open."""
    return next((path for path in _nvme_paths(recipe).values() if path != NVME_FOLDER), None)


def of_run(recipe: Recipe, run_folder: Path, trial: str) -> Recipe:
    """The recipe with a folder of the trial's own on the disk that it offloads to: DeepSpeed writes the same files for
    every run, and deletes those that it finds."""
    if not recipe.train.offload.startswith(NVME):
        return recipe
    own = f"{recipe.train.offload}/{run_folder.name}-{trial}"
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"offload": own})})


def missing_folders(recipe: Recipe) -> list[str]:
    """Why nothing can be offloaded to the folders that the recipe names on this machine; empty when it can."""
    problems: list[str] = []
    for what, path in _nvme_paths(recipe).items():
        where = f"train.extra.deepspeed: zero_optimization.offload_{what}.nvme_path"
        if recipe.train.placement in STAGES:
            where = "train.offload"
        if path == NVME_FOLDER:
            problem = f"{where}: write the path of a folder on your NVMe disk in place of {NVME_FOLDER}"
        elif not Path(path).is_dir():
            problem = f"{where}: there is no folder '{path}'; make it, or name one on an NVMe disk"
        else:
            continue
        problems += [problem] if problem not in problems else []
    return problems


def _nvme_paths(recipe: Recipe) -> dict[str, str]:
    """By what is offloaded to a disk: `optimizer`, `param`."""
    if not wanted(recipe):
        return {}
    block = settings(recipe)["zero_optimization"]
    places = {what: block.get(f"offload_{what}") or {} for what in ("optimizer", "param")}
    return {what: str(one["nvme_path"]) for what, one in places.items() if one.get("device") == "nvme"}


def disagreements(
    recipe: Recipe, micro_batch_size: int, accumulation: int, num_processes: int, precision: str
) -> list[str]:
    """Each setting that is neither "auto" nor what the plan says; none without DeepSpeed."""
    if not wanted(recipe):
        return []
    found, lines = settings(recipe), []
    for name, (value, source) in _planned(recipe, micro_batch_size, accumulation, num_processes, precision).items():
        block, field = _place(found, name)
        given = block.get(field, AUTO)
        if given != AUTO and given != value:
            against = f"{name} is {json.dumps(given)}, but {source} gives {json.dumps(value)}"
            lines.append(f'{recipe.train.deepspeed_by}: {against}; write "auto"')
    return lines


def _planned(
    recipe: Recipe, micro_batch_size: int, accumulation: int, num_processes: int, precision: str
) -> dict[str, tuple[Any, str]]:
    """What the plan says of settings, by their dotted names, and where it has that from."""
    return {
        "train_micro_batch_size_per_gpu": (micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (accumulation, "train.global_batch_size / (micro batch x processes)"),
        "train_batch_size": (micro_batch_size * accumulation * num_processes, "train.global_batch_size"),
        "gradient_clipping": (recipe.train.max_grad_norm, "train.max_grad_norm"),
        "bf16.enabled": (precision == "bf16", "train.precision"),
        "fp16.enabled": (precision == "fp16", "train.precision"),
        "torch_autocast.enabled": (False, "train.precision"),
    }


def _place(found: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """The block that holds a setting, and the setting's name there; an empty block where there is none."""
    block, _, field = name.rpartition(".")
    return (found.get(block, {}), field) if block else (found, field)


def _read(given: Any) -> dict[str, Any]:
    """A copy of the settings, from the recipe itself or from the file that it names."""
    if isinstance(given, Mapping):
        return dict(json.loads(json.dumps(given)))
    path = Path(str(given))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"train.extra.deepspeed: {path}: cannot be read ({(error.strerror or str(error)).lower()})"
        ) from None
    except ValueError as error:
        raise RecipeError(f"train.extra.deepspeed: {path}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise RecipeError(f"train.extra.deepspeed: {path}: expected settings in {{ }}, found {type(found).__name__}")
    return found


def _of_placement(recipe: Recipe) -> dict[str, Any]:
    """The settings that `train.placement` and `train.offload` stand for."""
    block: dict[str, Any] = {"stage": STAGES[recipe.train.placement]}
    offload = recipe.train.offload
    place = {"device": "cpu"}
    if folder := offload.removeprefix(NVME) if offload.startswith(NVME) else "":
        place = {"device": "nvme", "nvme_path": folder}
    if offload != "none":
        block["offload_optimizer"] = place
    if offload not in ("none", "optimizer"):
        block["offload_param"] = place
    return {"zero_optimization": block}


def offload_device(block: Mapping[str, Any], what: str) -> str:
    """Where a block `zero_optimization` keeps `optimizer` or `param`: none, cpu or nvme."""
    return str((block.get(f"offload_{what}") or {}).get("device", "none"))


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
        offload = block.get(f"offload_{what}") or {}
        if not isinstance(offload, dict) or offload.get("device", "none") not in _DEVICES:
            expected = ", ".join(_DEVICES)
            problems.append(
                f"zero_optimization.offload_{what}: expected a device ({expected}), found {json.dumps(offload)}"
            )
        elif offload.get("device") == "nvme" and not str(offload.get("nvme_path") or ""):
            problems.append(f"zero_optimization.offload_{what}: device nvme needs nvme_path, a folder on an NVMe disk")
        elif offload_device(block, what) != "none" and block["stage"] < {"optimizer": 1, "param": 3}[what]:
            needed = {"optimizer": "1, 2 or 3", "param": "3"}[what]
            problems.append(f"zero_optimization.offload_{what}: needs stage {needed}, found stage {block['stage']}")
    if block["stage"] == 3 and block.get("stage3_gather_16bit_weights_on_model_save") is False:
        problems.append(
            "zero_optimization.stage3_gather_16bit_weights_on_model_save: false would save no whole model; remove it"
        )
    return problems
