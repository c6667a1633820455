"""Settings one by one: the recipe's value, or the value that follows from model, data and machine, with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fulltune.errors import RecipeError
from fulltune.footprint.records import Footprint
from fulltune.models.shapes import Shapes
from fulltune.plan import defaults, memory
from fulltune.plan.levers import plain_optim
from fulltune.plan.settings import FROM_RECIPE, Reasons
from fulltune.recipe.fields import Recipe
from fulltune.recipe.rules import wrong_metric
from fulltune.recipe.tasks import FACTS
from fulltune.records.data import DataSummary
from fulltune.records.plan import Setting
from fulltune.system.hardware import BF16_FROM, TENSOR_CORES_FROM, Gpu, Machine
from fulltune.text import counted, format_bytes

LEAST_BF16_SPEEDUP = 1.2
"""Below it bf16's rounding buys too little."""
MOST_WORKERS = 8
"""Processes that decode images for one GPU."""
LEAST_SHARED_BYTES = 2**30
"""For one GPU: 32 images of 224 x 224 pixels are 19 MB, and two such batches of each process wait."""


def device_and_precision(recipe: Recipe, machine: Machine) -> tuple[str, str]:
    """What the plan will say, for what has to be known before it."""
    reasons = Reasons()
    found = device(recipe, machine, reasons)
    return found, str(precision(recipe, machine, found, reasons))


def device(recipe: Recipe, machine: Machine, reasons: Reasons) -> str:
    wanted = recipe.train.device
    if wanted == "cuda" and not machine.gpus:
        raise RecipeError("train.device: 'cuda' but torch sees no GPU here; set 'auto' or 'cpu'")
    if wanted == "cpu" and machine.gpus and recipe.train.placement == "fsdp2":  # transformers would take those
        raise RecipeError(
            "train.placement: fsdp2 takes the GPUs of a machine that has some, but train.device is cpu; set device: "
            "cuda, or placement: ddp"
        )
    count, machines = len(machine.gpus), recipe.train.num_machines
    reason = f"{counted(count, 'GPU')} found" if count else "no GPU found"
    reason += f" on {'each' if count else 'any'} of {machines} machines" if machines > 1 else ""
    reason += f"; they are not alike ({machine.differs}): planned for the least" if machine.differs else ""
    device = str(reasons.add("train.device", None if wanted == "auto" else wanted, "cuda" if count else "cpu", reason))
    _refuse_too_many(recipe, machine, device)
    return device


def _refuse_too_many(recipe: Recipe, machine: Machine, device: str) -> None:
    """Refuse more processes than a machine has GPUs, or cores."""
    train = recipe.train
    room, what = (len(machine.gpus), "GPU(s)") if device == "cuda" else (machine.num_cores, "CPU core(s)")
    if train.processes_per_machine <= room or (device == "cpu" and train.oversubscribe):
        return
    several = train.num_machines > 1
    each = f", which are {train.processes_per_machine} on each of {train.num_machines} machines" if several else ""
    unlike = f"; the machines are not alike: {machine.differs}" if machine.differs else ""
    forced = ", or train.oversubscribe: true to try it all the same" if device == "cpu" else ""
    raise RecipeError(
        f"train.num_processes: {train.num_processes}{each}, but {'each' if several else 'this'} machine lets us use "
        f"{room} {what}{unlike}; set at most {room * train.num_machines}{forced}"
    )


def precision(recipe: Recipe, machine: Machine, device: str, reasons: Reasons) -> Any:
    wanted = recipe.train.precision
    if wanted == "fp16" and device == "cpu":
        raise RecipeError(
            "train.precision: fp16 is not possible on a CPU (it would silently train in fp32); set 'auto', 'bf16' or "
            "'fp32'"
        )
    doubt = ""
    if device == "cpu":
        ratio = machine.cpu_bf16_speedup
        chosen = "bf16" if ratio >= LEAST_BF16_SPEEDUP else "fp32"
        reason = f"bf16 is about {ratio:.1f} times as fast as fp32 here (measured)"
        reason += "; weights stay fp32" if chosen == "bf16" else f"; it needs {LEAST_BF16_SPEEDUP} to be taken"
    else:
        oldest = oldest_gpu(recipe, machine)
        chosen, reason = _precision_of(oldest)
        if len({_precision_of(gpu)[0] for gpu in machine.gpus[: recipe.train.processes_per_machine]}) > 1:
            reason += "; the other GPUs could do more, but all compute alike"
        if wanted == "fp16" and oldest.capability < TENSOR_CORES_FROM:
            doubt = f"; {oldest.label} has no tensor cores: no faster than fp32, and rounds more"
        elif "bf16" in (wanted, recipe.model.weights_dtype) and wanted in ("auto", "bf16") and not oldest.bf16:
            doubt = f"; {oldest.label} emulates it, slowly"
    if recipe.model.weights_dtype == "bf16" and wanted == "auto":
        chosen, reason = "bf16", "the weights are bf16 (model.weights_dtype)"
    computed = chosen if wanted == "auto" else wanted
    if computed != "fp32" and recipe.train.engine_by:
        doubt += f"; ZeRO rounds the weights of all passes to {computed}, so the result is not that of other placements"
    return reasons.add("train.precision", None if wanted == "auto" else wanted, chosen, reason, doubt)


VOLTA = ("7.0 or newer (Volta)", TENSOR_CORES_FROM, (99, 0))
KERNELS = {
    "train.torch_compile": VOLTA,
    "train.use_liger_kernel": VOLTA,
    "model.attn_implementation: flash_attention_2": ("8.0 or newer (Ampere)", (8, 0), (99, 0)),
    # As transformers 5.24 has it; made for Hopper, whose instructions later cards lack.
    "model.attn_implementation: flash_attention_3": ("8.0 to 9.x (Ampere to Hopper)", (8, 0), (9, 9)),
}
"""Setting to the compute capability that its kernels need, in words and in numbers."""


def refuse_kernels(recipe: Recipe, machine: Machine, device: str, precision: str) -> None:
    """Refuse kernels that the processor or the type of the computations does not allow.

    Raises:
        RecipeError: Naming the setting, what it needs, and what there is.
    """
    asked = [f"train.{name}" for name in ("torch_compile", "use_liger_kernel") if getattr(recipe.train, name)]
    for setting in (*asked, f"model.attn_implementation: {recipe.model.attn_implementation}"):
        needed, least, most = KERNELS.get(setting, ("", (0, 0), (99, 0)))
        if device == "cpu":
            problem = "runs on GPUs alone" if needed and setting != "train.torch_compile" else ""
        elif not least <= (oldest := oldest_gpu(recipe, machine)).capability <= most:
            problem = f"needs a GPU of compute capability {needed}, and this is {oldest.label}"
        else:
            in_16_bits = "computes in 16 bits alone (train.precision: bf16 or fp16), which fp32 is not"
            problem = in_16_bits if precision == "fp32" and needed not in ("", VOLTA[0]) else ""
        if problem:
            raise RecipeError(f"{setting} {problem}; leave it out")


def oldest_gpu(recipe: Recipe, machine: Machine) -> Gpu:
    """Of those that the recipe's processes take, the one with the least compute capability."""
    return min(machine.gpus[: recipe.train.processes_per_machine], key=lambda gpu: gpu.capability)


def _precision_of(gpu: Gpu) -> tuple[str, str]:
    """What a GPU is fast at, and why."""
    if gpu.bf16:
        return "bf16", f"{gpu.label} computes bf16; weights stay fp32"
    if gpu.capability >= TENSOR_CORES_FROM:
        needs = "{}.{}".format(*BF16_FROM)
        return "fp16", f"{gpu.label} has no bf16, which needs {needs}: fp16 with a scaled loss; weights stay fp32"
    return "fp32", f"{gpu.label} has no tensor cores: fp16 would be no faster, and rounds more"


def optimizer(recipe: Recipe, reasons: Reasons) -> tuple[str, Any]:
    """The optimizer, and how bf16 weights are rounded."""
    train, dtype = recipe.train, recipe.model.weights_dtype
    rounding, why = None, "AdamW in fp32, one kernel"
    if dtype != "fp32":
        why = "bf16 weights: rounded to nearest, updates vanish"
        rounding = reasons.add("train.bf16_rounding", train.bf16_rounding, "stochastic", why)
        why = "the weights are bf16"
    chosen, doubt = plain_optim(dtype, rounding), "; the size of its state is not known here: planned as AdamW's"
    doubt = "" if memory.known(train.optim or chosen) else doubt
    return str(reasons.add("train.optim", train.optim, chosen, why, doubt)), rounding


def loader_workers(recipe: Recipe, machine: Machine, device: str, reasons: Reasons) -> int:
    """Processes that read rows ahead for each training process, where the recipe does not say how many.

    Collating texts takes 5 % of a step at most, decoding a batch of images five times as long as a ViT-base's step on
    an A100 (measured). On a CPU the training needs the cores itself.
    """
    name = "dataloader_num_workers"
    if device == "cpu" or FACTS[recipe.task].reads != "image" or recipe.train.extra.get(name) is not None:
        return 0
    chosen = max(0, min(MOST_WORKERS, machine.num_cores // recipe.train.processes_per_machine - 1))
    reason, shared = "images are decoded beside the GPU's steps", machine.shared_memory_bytes
    least = LEAST_SHARED_BYTES * recipe.train.processes_per_machine
    if shared is not None and shared < least:
        chosen, needed = 0, format_bytes(least)
        reason = f"shared memory (/dev/shm) has {format_bytes(shared)}; give a container {needed} (--shm-size)"
    return int(reasons.add(f"train.extra.{name}", None, chosen, reason))


def metric(recipe: Recipe, summary: DataSummary, reasons: Reasons) -> str:
    possible = summary.form.metrics
    wanted = recipe.evaluate.metric
    if wanted is not None and wanted not in possible:
        raise RecipeError(wrong_metric(wanted, summary.form.words, possible))
    return str(reasons.add("evaluate.metric", wanted, possible[0], f"usual for {summary.form.words}"))


def global_batch(recipe: Recipe, summary: DataSummary, reasons: Reasons) -> int:
    train = recipe.train
    per_pass = (train.micro_batch_size or 1) * train.num_processes
    usual = 16 if FACTS[recipe.task].writes else 32
    # Small data: at least eight steps an epoch, or hardly any update happens.
    while usual > 4 and summary.rows_per_epoch < 8 * usual:
        usual //= 2
    chosen = math.ceil(usual / per_pass) * per_pass
    why = f"usual for {recipe.task} with this many rows"
    why = why if chosen == usual else f"{usual} is {why}; a multiple of {counted(per_pass, 'row')} of all processes"
    return int(reasons.add("train.global_batch_size", train.global_batch_size, chosen, why))


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of a run, and between what comes now and then."""

    epochs: float
    total: int
    between_evaluations: int
    between_saves: int


def steps(recipe: Recipe, summary: DataSummary, global_batch: int, reasons: Reasons) -> Steps:
    """How long the training is, and when it evaluates and saves; the usual number of epochs depends on the task's own
    rows alone, each epoch has the mixed ones besides."""
    train, per_epoch = recipe.train, math.ceil(summary.rows_per_epoch / global_batch)
    if train.max_steps is not None:
        reasons.add("train.max_steps", train.max_steps)
        epochs, total = train.max_steps / per_epoch, train.max_steps
    else:
        usual, why = defaults.num_train_epochs(recipe.task, summary.splits["train"].rows)
        epochs = float(reasons.add("train.num_train_epochs", train.num_train_epochs, usual, why))
        total = math.ceil(epochs * per_epoch)
    between = min(total, train.eval_steps or per_epoch)
    return Steps(epochs, total, between, train.save_steps or between)


def rate(recipe: Recipe, shapes: Shapes, reasons: Reasons) -> float:
    """The learning rate; that of the task's head is noted, where there is one beside other trained values."""
    method = recipe.method
    rate, why = defaults.learning_rate_of(method, shapes.num_parameters, shapes.is_decoder)
    why = f"the search's middle one: {why}" if method.is_searched else why
    rate = reasons.add("method.learning_rate", method.fixed_learning_rate, rate, why)
    if FACTS[recipe.task].head_is_new and method.kind != "head":
        reasons.add("method.head_learning_rate", method.head_learning_rate, rate, "the same as method.learning_rate")
    return rate


def head_init(recipe: Recipe, shapes: Shapes, reasons: Reasons) -> Any:
    """Where the task's head starts: `probe` or `random`; None where it is not new.

    Raises:
        RecipeError: When the recipe says what cannot be.
    """
    given, name = recipe.method.head_init, "method.head_init"
    if not FACTS[recipe.task].head_is_new:
        return None
    if not shapes.head_is_kept:
        why = "a new head that starts at random drags the body away (Kumar et al. 2022)"
        return reasons.add(name, given, "probe", why)
    if given is not None:
        raise RecipeError(
            f"{name}: {given}, but the checkpoint brings a head for these labels, which goes on; leave {name} out"
        )
    return None


def warmup(recipe: Recipe, shapes: Shapes, total_steps: int, reasons: Reasons) -> int:
    train = recipe.train
    if train.warmup_steps is not None and train.warmup_steps >= total_steps:
        raise RecipeError(
            f"train.warmup_steps: {train.warmup_steps}, but the run has {total_steps} steps; the rate would never fall"
        )
    if train.warmup_steps is not None:
        return int(reasons.add("train.warmup_steps", train.warmup_steps))
    ratio, why = defaults.warmup_ratio(recipe.task, shapes.head_is_kept)
    ratio = reasons.add("train.warmup_ratio", train.warmup_ratio, ratio, why)
    # Rounded down: a warm-up over the whole of a very short run would never leave rate 0.
    return int(ratio * total_steps)


def caveats(footprint: Footprint, compiled: bool = False) -> list[Setting]:
    """What the plan's memory rests on, where it is no trace of the model at the data's sizes."""
    rough = (
        f"this model cannot be traced ({footprint.rough}): by a rule of thumb; the dry-run step will tell"
        if footprint.rough
        else ""
    )
    uncounted = (
        "the plan's memory and time are those of blocks that are not compiled, and the compiler itself takes host "
        "memory; the dry run measures what there is"
        if compiled
        else ""
    )
    rows = (
        ("memory", "rough", rough),
        ("memory.inputs", "assumed", footprint.assumed),
        ("memory.torch_compile", "not counted", uncounted),
    )
    return [Setting(name=name, value=value, reason=why, is_automatic=True) for name, value, why in rows if why]


_NOT_SHOWN = ("data.train", "data.eval", "data.test", "method.train")
"""The files stand in the data's own record; `method.train` is part of the block `train` of a comparison's trial."""


def everything_else(recipe: Recipe, reasons: Reasons) -> None:
    """Fields with a fixed default: recorded so that the report lists every setting."""
    named = {setting.name for setting in reasons.settings}
    for block in ("model", "data", "method", "train", "preserve", "evaluate"):
        values = getattr(recipe, block)
        for field in type(values).model_fields:
            name = f"{block}.{field}"
            value = getattr(values, field)
            if name in named or value is None or name in _NOT_SHOWN:
                continue
            given = field in values.model_fields_set
            reasons.settings.append(
                Setting(name=name, value=value, reason=FROM_RECIPE if given else "default", is_automatic=not given)
            )
