from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fulltune.errors import RecipeError
from fulltune.footprint.records import BYTES, Footprint
from fulltune.models.shapes import Shapes
from fulltune.plan import fsdp2, memory, stream
from fulltune.plan.gpus import Fleet
from fulltune.recipe.tasks import FACTS, TEXT_PAIRS
from fulltune.records import probe
from fulltune.records.data import DataSummary
from fulltune.records.plan import MemorySettings
from fulltune.system.hardware import TENSOR_CORES_FROM
from fulltune.system.parallel_layout import ParallelLayout

CPU_UTILISATION = {"bf16": 0.57, "fp32": 0.75}
GPU_UTILISATION = ((2048, 0.5), (1024, 0.3), (0, 0.15))
"""Minimum hidden sizes, each with the share of the data sheet's FLOP/s that is reached."""
GPU_FP32_SHARE = 1 / 8
"""Speed of fp32 without TF32 relative to 16-bit: 1/16 (A100), 1/8 (V100), 1/2 (RTX 4090)."""
LINK_SHARE = 0.8
NETWORK = "network between machines"
LAUNCH_SECONDS, LOOP_SECONDS = 0.002, 0.005
UPDATE_BYTES, HOST_UPDATE_BYTES = 36, 28
HOST_SHARE = 0.65
"""Share of the host's bandwidth that a CPU optimizer reaches: 39 of 60 GB/s."""
PADDING_GROUPED = 1.07
"""Padded tokens per real token when grouped by length (measured: 6.6 % more, 2026-11-24)."""
GENERIC_TOKENS = 48
"""Mean number of tokens of a bundled generic text, truncated at 64."""
PROBE_PARTS = 3.5
"""Peak memory of fitting a linear probe, relative to the size of its features."""
PROBE_SECONDS, PROBE_PASSES, PROBE_FLOPS = 2.0, 150, 2e10
"""Import time in seconds, passes over the data, and a core's FLOP/s: 9,003 rows of 77 classes took 8.5 s
(2026-11-26)."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations of an average train row."""

    footprint: Footprint
    tokens_per_row: float
    """Mean tokens per row, including padding; an image counts as one."""
    backward: float = 2.0
    """Cost of a backward pass relative to a forward pass."""

    def forward_flops(self, rows: float) -> float:
        return self.flops_of(rows * self.tokens_per_row, self.tokens_per_row)

    def flops_of(self, tokens: float, length: float) -> float:
        """Return the operations of a forward pass over `tokens` tokens in rows of `length` tokens."""
        return tokens * (self.footprint.flops_per_token + self.footprint.attention_flops_per_pair * length)

    def step_flops(self, rows: float, recomputed: bool) -> float:
        return (1 + self.backward + recomputed) * self.forward_flops(rows)


def backward_cost(method: str, shapes: Shapes) -> float:
    """Return the cost of a method's backward pass, relative to a forward pass."""
    if shapes.num_trainable is None:
        return 2.0
    share = shapes.num_trainable / (shapes.num_all_parameters or shapes.num_parameters)
    return 2 * share if method == "head" else 1 + share


def work_per_row(
    summary: DataSummary, footprint: Footprint, grouped_by_length: bool, prompt_tokens: int = 0, backward: float = 2.0
) -> Work:
    """Estimate the work of an average row. Prompt tuning adds `prompt_tokens`; a backward pass costs `backward` forward
    passes."""
    if FACTS[summary.task].reads == "image":  # the footprint counts an image, not its patches
        return Work(footprint, 1.0, backward)
    longest, mean = summary.max_length, summary.tokens_per_epoch / max(1, summary.rows_per_epoch)
    splits = [summary.splits["train"], *(source.counts for source in summary.mixed)]
    # Without grouping, rows are padded to the longest row of the batch.
    p95 = max(split.length_percentiles.get("p95", longest) for split in splits)
    tokens = mean if summary.packed else mean * PADDING_GROUPED if grouped_by_length else max(mean, p95)
    tokens = max(1.0, min(tokens, longest * max(1, footprint.sequences_per_row)))
    return Work(footprint, tokens + prompt_tokens, backward)


def device_flops(fleet: Fleet, precision: str, hidden_size: int) -> float | None:
    """Return the FLOP/s that one device reaches in training, or None if its speed is unknown."""
    if fleet.machine.gpus:
        if fleet.gpu_model is None:
            return None
        share = next(share for least, share in GPU_UTILISATION if hidden_size >= least)
        slower = precision == "fp32" and fleet.gpu_model.capability >= TENSOR_CORES_FROM
        return fleet.gpu_model.tflops * 1e12 * share * (GPU_FP32_SHARE if slower else 1.0)
    if not fleet.machine.cpu_flops:
        return None
    speedup = fleet.machine.cpu_bf16_speedup if precision == "bf16" else 1.0
    return fleet.machine.cpu_flops * speedup * CPU_UTILISATION["bf16" if precision == "bf16" else "fp32"]


def step_seconds(
    fleet: Fleet, shapes: Shapes, work: Work, rows: int, settings: MemorySettings, layout: ParallelLayout | None
) -> dict[str, float]:
    """Estimate the seconds of each part of a step (`computing`, `host link`, `other devices`, `network between
    machines`, `optimizer`) with `rows` rows on all devices together. Return {} if the speed is unknown."""
    rate = device_flops(fleet, settings.precision, shapes.hidden_size)
    if rate is None:
        return {}
    devices, accumulation = settings.num_processes, settings.gradient_accumulation_steps
    # Processes on a CPU share its cores.
    rate *= devices if fleet.machine.gpus else settings.num_machines
    recomputed = settings.activation_checkpointing or settings.stream is not None
    computing = work.step_flops(rows, recomputed) / rate
    launching = LAUNCH_SECONDS * shapes.num_layers * accumulation if fleet.machine.gpus else 0.0
    trained = shapes.num_parameters if shapes.num_trainable is None else shapes.num_trainable
    parts = {
        "computing": max(computing, launching) + LOOP_SECONDS,
        "host link": 0.0,
        "other devices": 0.0,
        NETWORK: 0.0,
        "optimizer": _estimate_optimizer_seconds(trained, fleet, settings, layout),
    }
    if settings.stream is not None:
        return stream.add_disk_seconds(parts, trained, fleet, settings)
    each_pass, each_step = communication_bytes(shapes, settings, layout)
    sent, gpu = accumulation * each_pass + each_step, fleet.gpu_model
    if settings.num_machines > 1:
        parts[NETWORK] = sent / (fleet.network_gb_per_second * 1e9 * LINK_SHARE)
    if gpu is None:
        return parts
    link, peers = gpu.link_gb_per_second * 1e9 * LINK_SHARE, gpu.nvlink_gb_per_second * 1e9 * LINK_SHARE
    parts["other devices"] = sent / (peers or link) if devices > settings.num_machines else 0.0
    if layout is not None and layout.offload_optimizer:
        weights_in = 2 * 2 * accumulation if layout.offload_weights else 2
        parts["host link"] = (weights_in + 2 * accumulation) * trained / devices / link
    return parts


def _estimate_optimizer_seconds(
    num_trained: int, fleet: Fleet, settings: MemorySettings, layout: ParallelLayout | None
) -> float:
    host = fleet.host_memory_gb_per_second * 1e9
    if fleet.gpu_model is None:
        return UPDATE_BYTES * num_trained / host
    if layout is not None and layout.offload_optimizer:
        return HOST_UPDATE_BYTES * num_trained / settings.num_machines / (host * HOST_SHARE)
    updated = num_trained / settings.num_processes if layout is not None else num_trained
    return UPDATE_BYTES * updated / (fleet.gpu_model.memory_gb_per_second * 1e9)


def step_duration(seconds: Mapping[str, float]) -> float:
    """Return the seconds of a step: the longest of the overlapping parts, plus the optimizer."""
    return max(seconds[name] for name in seconds if name != "optimizer") + seconds["optimizer"]


def communication_bytes(shapes: Shapes, settings: MemorySettings, layout: ParallelLayout | None) -> tuple[int, int]:
    """Return the bytes that a process sends per micro batch, and the additional bytes per step (docs/guides/scale.md,
    "Traffic")."""
    processes, trained = settings.num_processes, memory.num_trainable(shapes.num_parameters, settings)
    narrow = 4 if settings.precision == "fp32" else 2
    each_pass, each_step = 0, 0
    if layout is None:
        each_step = 2 * BYTES[memory.trained_dtype(settings)] * trained
    elif layout.engine == "fsdp2":
        units = fsdp2.fsdp_units(shapes)
        each_pass = BYTES[settings.weights_dtype] * (units.gathered + units.reduced)
    elif layout.stage == 3:
        each_pass = narrow * (2 * shapes.num_parameters + trained)
    else:  # stage 1 sums gradients like stage 2, but once a step
        gradients = narrow * trained
        each_pass, each_step = (gradients, gradients) if layout.stage == 2 else (0, 2 * gradients)
    return each_pass * (processes - 1) // processes, each_step * (processes - 1) // processes


def dry_run_extra_seconds(training: float) -> float:
    return min(20.0, max(0.5, 0.05 * training))


def probe_passes(summary: DataSummary) -> int:
    """Return the maximum number of times that a probe runs each row through the model."""
    return 2 if "text_pair" in summary.columns and summary.task != TEXT_PAIRS else 1


def linear_probe_cost(summary: DataSummary, hidden_size: int) -> tuple[int, int, float]:
    """Estimate a linear probe's cost: rows passed through the model, host memory in bytes, and seconds of fitting."""
    form, train, passes = summary.form, summary.splits["train"], probe_passes(summary)
    words = max(1.0, train.trained_tokens / max(1, train.rows))
    per_row = probe.items_per_row(form.probed_as, words, summary.num_choices)
    width = hidden_size * (probe.APART if "text_pair" in summary.columns else 1)
    features = round(hidden_size * probe.PAIRS) if passes == 2 else width
    rows = min(train.rows, probe.max_probe_rows(form.probed_as, per_row, features))
    items = round(rows * per_row)
    outputs = form.num_outputs or len(summary.labels)
    held_out = summary.splits["eval"].rows
    rows += min(held_out, probe.MOST_HELD_OUT) if held_out >= probe.LEAST_HELD_OUT else 0
    num_bytes = round(PROBE_PARTS * 4 * (2 if form.tags_words else 3) * features * items)
    solver = probe.solver_bytes(form.probed_as, items, outputs, width)
    if solver > probe.MOST_SOLVER_BYTES:  # nothing is fitted
        return passes * rows, num_bytes, PROBE_SECONDS
    seconds = PROBE_SECONDS + 4 * PROBE_PASSES * items * outputs * width / PROBE_FLOPS
    return passes * rows, num_bytes + solver, seconds


def count_interval_steps(total_steps: int, *intervals: int, after: int = -1) -> int:
    """Count the steps later than `after` that are multiples of an interval or the last step."""
    at = {step for every in intervals if every for step in range(every, total_steps + 1, every)}
    return sum(step > after for step in at | {total_steps})


DevicePrice = tuple[float, str]


def parse_price(text: str) -> DevicePrice:
    """Parse an hourly price such as `2.5 USD` into amount and currency; raise `RecipeError` if the text is not a
    price."""
    match = re.fullmatch(r"\s*([^\d\s.+-]{0,3})\s*(\d+(?:\.\d+)?)\s*([^\d\s.+-]*)\s*", text)
    if match is None:
        raise RecipeError(f"--price: '{text}' is not a price; write the cost of one device per hour, such as 2.5")
    return float(match[2]), match[1] or match[3]
