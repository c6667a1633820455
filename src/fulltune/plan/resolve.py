from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from fulltune.errors import RecipeError
from fulltune.footprint.records import Footprint
from fulltune.models.shapes import Shapes
from fulltune.plan import defaults, memory
from fulltune.plan.savings import plain_optim
from fulltune.plan.settings import Reasons
from fulltune.recipe.fields import Recipe
from fulltune.recipe.rules import wrong_metric
from fulltune.recipe.tasks import FACTS
from fulltune.records.data import DataSummary
from fulltune.records.plan import Setting
from fulltune.system.hardware import BF16_FROM, TENSOR_CORES_FROM, Gpu, Machine
from fulltune.tasks import written
from fulltune.text import counted, format_bytes

MIN_BF16_SPEEDUP = 1.2
"""Minimum speed-up on a CPU at which bf16 is worth its rounding errors."""
MAX_WORKERS = 8
MIN_SHARED_BYTES = 2**30
"""Minimum shared memory per GPU; each worker queues two batches there."""


def device_and_precision(recipe: Recipe, machine: Machine) -> tuple[str, str]:
    """Return the device and precision that the plan will choose."""
    reasons = Reasons()
    device_type = choose_device(recipe, machine, reasons)
    return device_type, str(choose_precision(recipe, machine, device_type, reasons))


def choose_device(recipe: Recipe, machine: Machine, reasons: Reasons) -> str:
    """Choose `cuda` or `cpu`; raise `RecipeError` if the machine lacks the device or has too few GPUs or cores."""
    wanted = recipe.train.device
    if wanted == "cuda" and not machine.gpus:
        raise RecipeError("train.device: 'cuda', but torch sees no GPU here; set 'auto' or 'cpu'")
    if wanted == "cpu" and machine.gpus and recipe.train.placement == "fsdp2":  # transformers would use the GPUs
        raise RecipeError(
            "train.placement: fsdp2 would use this machine's GPUs, but train.device is cpu; set device: "
            "cuda, or placement: ddp"
        )
    count, machines = len(machine.gpus), recipe.train.num_machines
    reason = f"{counted(count, 'GPU')} found" if count else "no GPU found"
    reason += f" on {'each' if count else 'any'} of {machines} machines" if machines > 1 else ""
    reason += f"; the machines differ in {machine.differs}, so the plan is for the weakest" if machine.differs else ""
    device = str(reasons.add("train.device", None if wanted == "auto" else wanted, "cuda" if count else "cpu", reason))
    _raise_if_too_many_processes(recipe, machine, device)
    return device


def _raise_if_too_many_processes(recipe: Recipe, machine: Machine, device: str) -> None:
    train = recipe.train
    room, unit = (len(machine.gpus), "GPU") if device == "cuda" else (machine.num_cores, "CPU core")
    if train.processes_per_machine <= room or (device == "cpu" and train.oversubscribe):
        return
    several = train.num_machines > 1
    each = f" ({train.processes_per_machine} on each of {train.num_machines} machines)" if several else ""
    unlike = f"; the machines differ in {machine.differs}" if machine.differs else ""
    forced = ", or train.oversubscribe: true to try anyway" if device == "cpu" else ""
    raise RecipeError(
        f"train.num_processes: {train.num_processes}{each}, but {'each' if several else 'this'} machine has "
        f"{counted(room, unit)} available{unlike}; set at most {room * train.num_machines}{forced}"
    )


def choose_precision(recipe: Recipe, machine: Machine, device: str, reasons: Reasons) -> Any:
    """Return `fp32`, `bf16` or `fp16`, with the reason in `reasons`; raise `RecipeError` for fp16 on a CPU."""
    wanted = recipe.train.precision
    if wanted == "fp16" and device == "cpu":
        raise RecipeError(
            "train.precision: fp16 is not possible on a CPU (training would silently use fp32); set 'auto', 'bf16' or "
            "'fp32'"
        )
    caveat = ""
    if device == "cpu":
        ratio = machine.cpu_bf16_speedup
        usual = "bf16" if ratio >= MIN_BF16_SPEEDUP else "fp32"
        reason = f"bf16 is about {ratio:.1f} times as fast as fp32 here (measured)"
        reason += "; weights stay fp32" if usual == "bf16" else f"; worthwhile from {MIN_BF16_SPEEDUP} times"
    else:
        oldest = oldest_gpu(recipe, machine)
        usual, reason = _precision_and_reason(oldest)
        if len({_precision_and_reason(gpu)[0] for gpu in machine.gpus[: recipe.train.processes_per_machine]}) > 1:
            reason += "; other GPUs support more, but all use the same precision"
        if wanted == "fp16" and oldest.capability < TENSOR_CORES_FROM:
            caveat = f"; {oldest.label} has no tensor cores, so fp16 is no faster than fp32 and less exact"
        elif "bf16" in (wanted, recipe.model.weights_dtype) and wanted in ("auto", "bf16") and not oldest.bf16:
            caveat = f"; {oldest.label} only emulates bf16, which is slow"
    if recipe.model.weights_dtype == "bf16" and wanted == "auto":
        usual, reason = "bf16", "the weights are bf16 (model.weights_dtype)"
    computed = usual if wanted == "auto" else wanted
    if computed != "fp32" and recipe.train.zero_enabled_by:
        caveat += f"; ZeRO computes with weights rounded to {computed}, so results differ from other placements"
    return reasons.add("train.precision", None if wanted == "auto" else wanted, usual, reason, caveat)


VOLTA = ("7.0 or newer (Volta)", TENSOR_CORES_FROM, (99, 0))
KERNELS = {
    "train.torch_compile": VOLTA,
    "train.use_liger_kernel": VOLTA,
    "model.attn_implementation: flash_attention_2": ("8.0 or newer (Ampere)", (8, 0), (99, 0)),
    # As in transformers 5.24; uses Hopper's instructions, which later cards lack.
    "model.attn_implementation: flash_attention_3": ("8.0 to 9.x (Ampere to Hopper)", (8, 0), (9, 9)),
}
"""Compute capability that each kernel needs: description, lowest, highest."""


def check_kernels(recipe: Recipe, machine: Machine, device: str, precision: str) -> None:
    """Raise `RecipeError` if the device or precision does not support a kernel that the recipe sets."""
    names = [f"train.{name}" for name in ("torch_compile", "use_liger_kernel") if getattr(recipe.train, name)]
    for setting in (*names, f"model.attn_implementation: {recipe.model.attn_implementation}"):
        needed, lowest, highest = KERNELS.get(setting, ("", (0, 0), (99, 0)))
        problem = None
        if device == "cpu":
            problem = "only runs on a GPU; remove it" if needed and setting != "train.torch_compile" else None
        elif not lowest <= (oldest := oldest_gpu(recipe, machine)).capability <= highest:
            problem = f"needs a GPU of compute capability {needed}, but this is {oldest.label}; remove it"
        elif precision == "fp32" and needed not in ("", VOLTA[0]):
            problem = "only computes in 16 bits, but train.precision is fp32; set bf16 or fp16, or remove it"
        if problem:
            raise RecipeError(f"{setting} {problem}")


def oldest_gpu(recipe: Recipe, machine: Machine) -> Gpu:
    return min(machine.gpus[: recipe.train.processes_per_machine], key=lambda gpu: gpu.capability)


def _precision_and_reason(gpu: Gpu) -> tuple[str, str]:
    if gpu.bf16:
        return "bf16", f"{gpu.label} computes in bf16; weights stay fp32"
    if gpu.capability >= TENSOR_CORES_FROM:
        needs = "{}.{}".format(*BF16_FROM)
        return (
            "fp16",
            f"{gpu.label} has no bf16 (which needs {needs}), so fp16 with loss scaling is used; weights stay fp32",
        )
    return "fp32", f"{gpu.label} has no tensor cores, so fp16 would be no faster and less exact"


def choose_optimizer(recipe: Recipe, reasons: Reasons) -> tuple[str, Any]:
    """Choose the optimizer, and how bf16 weights are rounded (None for fp32 weights)."""
    train, dtype = recipe.train, recipe.model.weights_dtype
    rounding, why = None, "AdamW in fp32 with a fused kernel"
    if dtype != "fp32":
        why = "with rounding to nearest, bf16 weights lose small updates"
        rounding = reasons.add("train.bf16_rounding", train.bf16_rounding, "stochastic", why)
        why = "the weights are bf16"
    usual, caveat = plain_optim(dtype, rounding), "; its state has an unknown size, so the plan assumes AdamW's"
    caveat = "" if (train.optim or usual) in memory.KNOWN_OPTIMIZERS else caveat
    return str(reasons.add("train.optim", train.optim, usual, why, caveat)), rounding


def choose_loader_workers(recipe: Recipe, machine: Machine, device: str, reasons: Reasons) -> int:
    """Choose the number of data-loader workers per process, which is 0 except for images on a GPU.

    Collating texts takes at most 5 % of a step, but decoding images takes five times as long as a ViT-base step on an
    A100.
    """
    name = "dataloader_num_workers"
    if device == "cpu" or FACTS[recipe.task].reads != "image" or recipe.train.extra.get(name) is not None:
        return 0
    workers = max(0, min(MAX_WORKERS, machine.num_cores // recipe.train.processes_per_machine - 1))
    reason, available = "images are decoded while the GPU computes", machine.shared_memory_bytes
    needed = MIN_SHARED_BYTES * recipe.train.processes_per_machine
    if available is not None and available < needed:
        workers, size = 0, format_bytes(available)
        reason = f"shared memory (/dev/shm) has only {size}; give the container {format_bytes(needed)} (--shm-size)"
    return int(reasons.add(f"train.extra.{name}", None, workers, reason))


def choose_metric(recipe: Recipe, summary: DataSummary, reasons: Reasons) -> str:
    """Choose the metric; raise `RecipeError` if the task has no such metric."""
    form, wanted = summary.form, recipe.evaluate.metric
    if problem := wrong_metric(recipe, form):
        raise RecipeError(problem)
    if not written.can_score(wanted or ""):
        raise RecipeError(f"evaluate.metric: '{wanted}' needs a package; install it: {written.INSTALL}")
    return str(reasons.add("evaluate.metric", wanted, form.metrics[0], f"usual for {form.words}"))


def choose_global_batch_size(recipe: Recipe, summary: DataSummary, reasons: Reasons) -> int:
    """Choose the number of rows per step; small data sets get fewer."""
    train = recipe.train
    per_pass = (train.micro_batch_size or 1) * train.num_processes
    usual = 16 if FACTS[recipe.task].writes else 64 if FACTS[recipe.task].contrasts else 32
    # Small data needs at least eight steps per epoch to get enough updates.
    while usual > 4 and summary.rows_per_epoch < 8 * usual:
        usual //= 2
    rounded = math.ceil(usual / per_pass) * per_pass
    why = f"usual for {recipe.task} with this many rows"
    why += ": the other rows are a query's negatives, whatever the micro batch" if FACTS[recipe.task].contrasts else ""
    why = why if rounded == usual else f"{usual} is {why}; rounded up to a multiple of {counted(per_pass, 'row')}"
    return int(reasons.add("train.global_batch_size", train.global_batch_size, rounded, why))


def choose_packing(recipe: Recipe, summary: DataSummary, reasons: Reasons, own_loss: bool = False) -> bool:
    """Choose whether a micro batch's chats or pairs share blocks; raise `RecipeError` with the user's own loss."""
    if recipe.task != "causal-lm" or summary.form.is_raw_text:
        return False
    if recipe.data.packing and own_loss:
        raise RecipeError("data.packing: your own loss would get several rows as one; remove the setting")
    why = "one sequence per row; fulltune plan --measure tries packing"
    return bool(reasons.add("data.packing", recipe.data.packing, False, why))


@dataclass(frozen=True)
class Steps:
    epochs: float
    total: int
    between_evaluations: int
    between_saves: int


def choose_steps(recipe: Recipe, summary: DataSummary, global_batch: int, reasons: Reasons) -> Steps:
    """Choose how long to train, and how often to evaluate and save."""
    train, per_epoch = recipe.train, math.ceil(summary.rows_per_epoch / global_batch)
    if train.max_steps is not None:
        reasons.add("train.max_steps", train.max_steps)
        epochs, total = train.max_steps / per_epoch, train.max_steps
    else:
        usual, why = defaults.default_num_epochs(recipe.task, summary.splits["train"].rows)
        epochs = float(reasons.add("train.num_train_epochs", train.num_train_epochs, usual, why))
        total = math.ceil(epochs * per_epoch)
    between = min(total, train.eval_steps or per_epoch)
    return Steps(epochs, total, between, train.save_steps or between)


def choose_learning_rate(recipe: Recipe, shapes: Shapes, reasons: Reasons) -> float:
    """Choose the learning rate; also record a new head's own rate."""
    method = recipe.method
    rate, why = defaults.default_learning_rate(method, shapes, recipe.task)
    why = f"middle of the searched rates: {why}" if method.is_searched else why
    rate = reasons.add("method.learning_rate", method.fixed_learning_rate, rate, why)
    if FACTS[recipe.task].head_is_new and method.kind != "head":
        reasons.add("method.head_learning_rate", method.head_learning_rate, rate, "the same as method.learning_rate")
    return rate


def choose_head_init(recipe: Recipe, shapes: Shapes, reasons: Reasons) -> Literal["probe", "random"] | None:
    """Choose how to initialise a new head; return None if the head is not new."""
    wanted, name = recipe.method.head_init, "method.head_init"
    if not FACTS[recipe.task].head_is_new:
        return None
    if shapes.head_note:
        reasons.add("head", None, "kept", shapes.head_note)
    if not shapes.head_is_kept:
        usual, why = "probe", "a random head distorts the pretrained features (Kumar et al. 2022)"
        if recipe.train.placement == "stream" or recipe.model.random_weights:
            usual, why = "random", "a linear probe needs pretrained weights that are all in memory"
        start: Literal["probe", "random"] = reasons.add(name, wanted, usual, why)
        return start
    if wanted is not None:
        raise RecipeError(f"{name}: {wanted}, but the checkpoint's own head for these labels is used; remove {name}")
    return None


def choose_warmup_steps(recipe: Recipe, shapes: Shapes, total_steps: int, reasons: Reasons) -> int:
    """Choose the number of warm-up steps; raise `RecipeError` if the recipe's number is not below `total_steps`."""
    train = recipe.train
    if train.warmup_steps is not None and train.warmup_steps >= total_steps:
        raise RecipeError(
            f"train.warmup_steps: {train.warmup_steps}, but the run has only {total_steps} steps, so the rate would "
            f"never fall; set fewer than {total_steps}"
        )
    if train.warmup_steps is not None:
        return int(reasons.add("train.warmup_steps", train.warmup_steps))
    ratio, why = defaults.default_warmup(recipe.task, shapes.head_is_kept)
    ratio = reasons.add("train.warmup_ratio", train.warmup_ratio, ratio, why)
    # Rounded down, because a warm-up over all of a very short run would keep the rate at 0.
    return int(ratio * total_steps)


def memory_caveats(footprint: Footprint, compiled: bool = False) -> list[Setting]:
    """Return plan entries that explain why the memory estimate may be inexact."""
    rows = []
    if footprint.rough:
        why = f"this model cannot be traced ({footprint.rough}), so the plan uses a rule of thumb until the dry run"
        rows.append(("memory", "rough", why))
    if compiled:
        why = "the plan ignores compiled blocks and the compiler's host memory; the dry run measures both"
        rows.append(("memory.torch_compile", "not counted", why))
    return [Setting(name=name, value=value, reason=why, is_automatic=True) for name, value, why in rows]


def record_parts(recipe: Recipe, shapes: Shapes, summary: DataSummary, reasons: Reasons) -> None:
    """Add to `reasons` how texts are pooled, how many tokens are new, how many parameters are frozen, and how often
    rare rows repeat."""
    if shapes.pooling:
        reasons.add("model.pooling", recipe.model.pooling, *shapes.pooling)
    if shapes.hidden_size < (largest := max(recipe.train.matryoshka, default=0)):
        raise RecipeError(f"train.matryoshka: {largest}, but vectors have {shapes.hidden_size} values; remove it")
    if count := len(recipe.model.new_tokens):
        reasons.add("model.new_tokens", None, count, "rows of new tokens start as the mean of the rows of their pieces")
    if recipe.method.kind == "full" and recipe.method.freeze and shapes.num_trainable is not None:
        frozen = f"{shapes.num_parameters - shapes.num_trainable:,} of {shapes.num_parameters:,} parameters are frozen"
        why = f"; {frozen}: they need no gradients and no optimizer state; tied weights are frozen together"
        reasons.add("method.freeze", list(recipe.method.freeze), caveat=why)
    if recipe.train.sampling == "balanced" and (counts := summary.splits["train"].label_counts):
        rarest = min(counts, key=counts.__getitem__)
        often = f"{sum(counts.values()) / len(counts) / counts[rarest]:.3g} times"
        reasons.add("train.sampling", "balanced", caveat=f"; a row of '{rarest}', the rarest class, is used {often}")


_NOT_SHOWN = ("train.stream", "data.train", "data.eval", "data.test", "method.train")


def record_other_settings(recipe: Recipe, reasons: Reasons) -> None:
    """Add the recipe's remaining settings to `reasons`, for the report."""
    named = {setting.name for setting in reasons.settings}
    for block in ("model", "data", "method", "train", "preserve", "evaluate"):
        values = getattr(recipe, block)
        for field in type(values).model_fields:
            name, value = f"{block}.{field}", getattr(values, field)
            if name not in named and value is not None and name not in _NOT_SHOWN:
                reasons.add(name, value if field in values.model_fields_set else None, value, "default")
