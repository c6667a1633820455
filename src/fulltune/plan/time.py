"""How long a run takes and what it costs, by arithmetic.

A step's work is counted in operations: 2 for each weight of a matrix and token in the forward pass, twice that in the
backward pass, and once more the forward pass with recomputed activations: 6 and 8 x parameters x tokens (Kaplan et al.
2020, arXiv 2001.08361, section 2.1), with attention on top. Half of the backward pass is for the gradients of weights,
which frozen ones do without: LoRA takes 0.7 of full fine-tuning's operations (0.70 and 0.71 measured, docs/log.md), and
a head alone no backward pass through the model. A device does a share of what its matrix products alone would allow:

- CPU, 0.57 of the measured rate in bf16: from our runs on two cores that do 640 GFLOP/s (docs/log.md: MiniLM-L6 on
  Banking77 at 280 examples/s is 0.58 of it, SmolLM2-135M on GSM8K at 394 tokens/s 0.57). 0.75 in fp32, where products
  take three times as long and everything else as long as before.
- GPU, half of the data sheet for models 2,048 wide and more, less for narrow ones. Not measured by us; torchtune's 8B
  on an RTX 4090 reached 0.64 of it, recomputation counted.

Seconds of a step: the longest of four that overlap, and two that follow:

- computing: operations / (devices x rate), on a GPU at least 2 ms for each layer and pass, which launching its kernels
  takes, and 5 ms a step for the loop around it (usual figures, not measured by us);
- the link to the host: bf16 weights in, once forward and once backward for each micro batch, gradients out: each
  device moves its share;
- the other devices: what each of them sends, see `traffic`;
- the network between machines: as many bytes from each of them, see `traffic`; 100 Gb/s where nothing is said;
- then the optimizer, which reads and writes its state once and is bound by memory: 36 bytes a parameter for AdamW in
  fp32 (weight, gradient and both moments read, three of them written, and two passes of clipping over the gradients),
  or on the host 28 (fp32 moments and weights, bf16 gradients and weights) at the bandwidth of its memory; a fixed 5.8 s
  a step was measured for 8.03 B parameters on a desktop, 28 x 8.03 GB / 5.8 s = 39 GB/s;
- and the disk: 12 bytes a parameter read at 5 GB/s and written at 3.5 GB/s.

Links are taken at 0.8 of the data sheet (25 of 32 GB/s were measured on PCIe 4, 53 of 64 on PCIe 5).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fulltune.errors import RecipeError
from fulltune.footprint.records import Footprint
from fulltune.forgetting.budget import MOST_REPLAYED, MOST_ROWS, NUM_POINTS, TOKENS_READ
from fulltune.models.shapes import Shapes
from fulltune.plan import traffic
from fulltune.plan.gpus import Fleet
from fulltune.plan.memory import MemorySettings
from fulltune.recipe.tasks import FACTS
from fulltune.records.data import DataSummary, SplitSummary
from fulltune.records.plan import Plan, TimeNeed
from fulltune.system import sharing
from fulltune.system.hardware import TENSOR_CORES_FROM

CPU_UTILISATION = {"bf16": 0.57, "fp32": 0.75}
GPU_UTILISATION = ((2048, 0.5), (1024, 0.3), (0, 0.15))
"""Least hidden size, share of the data sheet's rate."""
GPU_FP32_SHARE = 1 / 8
"""fp32 on a GPU without TF32, against 16-bit: 1/16 on an A100, 1/8 on a V100, 1/2 on an RTX 4090. Without tensor cores
both are the same."""
LINK_SHARE = 0.8
NETWORK = "network between machines"
LAUNCH_SECONDS, LOOP_SECONDS = 0.002, 0.005
UPDATE_BYTES, HOST_UPDATE_BYTES = 36, 28
HOST_SHARE = 0.65
"""Of the host's bandwidth that a CPU optimizer reaches: 39 of 60 GB/s."""
DISK_READ, DISK_WRITE = 5e9, 3.5e9
"""Bytes a second of one NVMe disk."""
PADDING_GROUPED = 1.07
"""Measured with rows of similar length together: 6.6 % (docs/log.md)."""
DISK_BYTES_PER_SECOND = 10**9
GENERIC_TOKENS = 48
"""Of a generic text that is read at an evaluation, on average of the bundled ones, cut at 64."""


@dataclass(frozen=True)
class Work:
    """What a row costs, on average over the train rows."""

    tokens_per_row: float
    """Padding included; an image is one."""
    longest: int
    """Tokens of the longest row."""
    flops_per_token: float
    """Forward pass, in matrices of weights."""
    attention_flops_per_pair: float
    backward: float = 2.0
    """Of a backward pass, in forward passes."""
    task_tokens_per_row: float | None = None
    """Of the task's rows alone, where others are mixed into the train rows."""

    @property
    def of_task(self) -> Work:
        """That of a row to score on."""
        return replace(self, tokens_per_row=self.task_tokens_per_row or self.tokens_per_row)

    def forward_flops(self, rows: float) -> float:
        """Of so many rows in one forward pass."""
        tokens = rows * self.tokens_per_row
        return tokens * (self.flops_per_token + self.attention_flops_per_pair * self.tokens_per_row)

    def step_flops(self, rows: float, recomputed: bool) -> float:
        """Of so many rows forward and backward."""
        return (1 + self.backward + recomputed) * self.forward_flops(rows)


def backward_of(method: str, shapes: Shapes) -> float:
    """Of a method's backward pass, in forward passes: 1 for the gradients of what flows, 1 for those of all weights."""
    if shapes.num_trained is None:
        return 2.0
    share = shapes.num_trained / (shapes.num_held or shapes.num_parameters)
    return 2 * share if method == "head" else 1 + share


def work_of(summary: DataSummary, footprint: Footprint, grouped: bool, virtual: int = 0, backward: float = 2.0) -> Work:
    """The work per row of prepared data.

    Args:
        summary: The data stage's summary.
        footprint: Has the model's operations per token.
        grouped: Rows of similar length share a batch.
        virtual: Tokens that a prompt puts before each text.
        backward: See `backward_of`.
    """
    if FACTS[summary.task].reads == "image":  # the footprint counts an image, not its patches
        return Work(1.0, summary.max_length, footprint.flops_per_token, 0.0, backward)
    task, longest = summary.splits["train"], summary.max_length

    def padded(mean: float, *splits: SplitSummary) -> float:
        # Without grouping, a batch is about as long as a long row of it.
        p95 = max(split.length_percentiles.get("p95", longest) for split in splits)
        tokens = mean if summary.packed else mean * PADDING_GROUPED if grouped else max(mean, p95)
        return max(1.0, min(tokens, longest * max(1, footprint.sequences_per_row))) + virtual

    mixed = [source.counts for source in summary.mixed]
    return Work(
        tokens_per_row=padded(summary.tokens_per_epoch / max(1, summary.rows_per_epoch), task, *mixed),
        longest=longest,
        flops_per_token=footprint.flops_per_token,
        attention_flops_per_pair=footprint.attention_flops_per_pair,
        backward=backward,
        task_tokens_per_row=padded(task.tokens / max(1, task.rows), task) if mixed else None,
    )


def device_flops(fleet: Fleet, precision: str, hidden_size: int) -> float | None:
    """Operations a second of one device in training; None when nothing is known of it."""
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
    fleet: Fleet, shapes: Shapes, work: Work, rows: int, settings: MemorySettings, shared: sharing.Sharing | None
) -> dict[str, float]:
    """Seconds of each part of an optimizer step; empty when the hardware's speed is not known.

    Args:
        fleet: The hardware.
        shapes: The model's sizes.
        work: What a row costs.
        rows: Of a global batch.
        settings: Micro batch, precision and the like.
        shared: What DeepSpeed or FSDP2 share out; None: each device holds everything.
    """
    rate = device_flops(fleet, settings.precision, shapes.hidden_size)
    if rate is None:
        return {}
    devices, accumulation = settings.num_processes, settings.gradient_accumulation_steps
    # Processes on a CPU share its cores.
    rate *= devices if fleet.machine.gpus else settings.num_machines
    computing = work.step_flops(rows, settings.activation_checkpointing) / rate
    launching = LAUNCH_SECONDS * shapes.num_layers * accumulation if fleet.machine.gpus else 0.0
    trained = shapes.num_parameters if shapes.num_trained is None else shapes.num_trained
    parts = {
        "computing": max(computing, launching) + LOOP_SECONDS,
        "host link": 0.0,
        "other devices": 0.0,
        NETWORK: 0.0,
        "optimizer": _optimizer_seconds(trained, fleet, settings, shared),
        "disk": 0.0,
    }
    sent, gpu = traffic.of(shapes, settings, shared).of_step(accumulation), fleet.gpu_model
    if settings.num_machines > 1:
        parts[NETWORK] = sent / (fleet.network_gb_per_second * 1e9 * LINK_SHARE)
    if gpu is None:
        return parts
    peers, link = (rate * 1e9 * LINK_SHARE for rate in (gpu.peer_gb_per_second, gpu.link_gb_per_second))
    parts["other devices"] = sent / peers if devices > settings.num_machines else 0.0
    if settings.activation_offloading:  # out and in again, 16 bits each, on the stream that computes
        tokens = rows / devices * work.tokens_per_row
        parts["computing"] += 2 * 2 * shapes.num_layers * tokens * shapes.hidden_size / link
    if shared is not None and shared.offload_optimizer:
        weights_in = 2 * 2 * accumulation if shared.offload_weights else 2
        parts["host link"] = (weights_in + 2 * accumulation) * trained / devices / link
    if shared is not None and shared.optimizer_on_disk:
        parts["disk"] = 12 * trained * (1 / DISK_READ + 1 / DISK_WRITE)
    return parts


def _optimizer_seconds(trained: int, fleet: Fleet, settings: MemorySettings, shared: sharing.Sharing | None) -> float:
    host = fleet.host_memory_gb_per_second * 1e9
    if fleet.gpu_model is None:
        return UPDATE_BYTES * trained / host
    if shared is not None and shared.offload_optimizer:
        return HOST_UPDATE_BYTES * trained / settings.num_machines / (host * HOST_SHARE)
    held = trained / settings.num_processes if shared is not None else trained
    return UPDATE_BYTES * held / (fleet.gpu_model.memory_gb_per_second * 1e9)


def together(seconds: Mapping[str, float]) -> float:
    """Of a whole step: the longest of the parts that overlap, and those that follow."""
    overlapped = max(seconds[name] for name in ("computing", "host link", "other devices", NETWORK))
    return overlapped + seconds["optimizer"] + seconds["disk"]


def foresee(plan: Plan, summary: DataSummary, work: Work, seconds_per_step: float, forward_flops: float) -> TimeNeed:
    """The whole training with its evaluations and checkpoints; scoring the result on the test rows comes on top.

    Args:
        plan: The settled numbers.
        summary: The data stage's summary.
        work: What a row costs.
        seconds_per_step: Of one optimizer step over all devices.
        forward_flops: Operations a second of all devices together.
    """
    tokens = round(plan.total_steps * plan.global_batch_size * work.tokens_per_row)
    evaluations = occasions(plan.total_steps, plan.eval_steps) + plan.eval_on_start
    rows = summary.splits["eval"].rows if "eval" in summary.splits else 0
    generic = texts_read(plan, evaluations) * GENERIC_TOKENS / work.of_task.tokens_per_row
    scored = evaluations * rows + rows_of_points(plan, rows) + generic
    replayed = 0 if plan.preserving is None else plan.preserving.replay_rows
    step_rows = plan.global_batch_size + replayed * GENERIC_TOKENS / work.tokens_per_row
    saves = occasions(plan.total_steps, plan.eval_steps, plan.save_steps)
    one = plan.disk.one_checkpoint if plan.disk else plan.state.weights + plan.state.optimizer
    return TimeNeed(
        train_seconds=plan.total_steps * seconds_per_step * step_rows / plan.global_batch_size,
        eval_seconds=work.of_task.forward_flops(scored) / forward_flops,
        save_seconds=saves * one / DISK_BYTES_PER_SECOND,
        tokens=tokens,
        tokens_per_second=plan.global_batch_size * work.tokens_per_row / seconds_per_step,
        source="arithmetic",
    )


def texts_read(plan: Plan, evaluations: int) -> int:
    """Generic texts that are read without being trained on, each time counted."""
    kept = plan.preserving
    if kept is None:
        return plan.drift_texts * evaluations
    # Selection texts, at each point, and twice the sealed ones.
    at_end = (NUM_POINTS + 2) * (TOKENS_READ // GENERIC_TOKENS)
    remembered = min(MOST_REPLAYED, plan.total_steps * kept.replay_rows)
    return plan.drift_texts * (evaluations + plan.total_steps // kept.steer_steps) + at_end + remembered


def rows_of_points(plan: Plan, rows: int) -> int:
    """Eval rows that are scored to choose among the points of a budget."""
    return 0 if plan.preserving is None else NUM_POINTS * min(rows, MOST_ROWS)


def occasions(total_steps: int, *intervals: int) -> int:
    """How often something comes that comes at each interval and after the last step: an evaluation, a checkpoint."""
    return len({step for every in intervals if every for step in range(every, total_steps + 1, every)} | {total_steps})


@dataclass(frozen=True)
class Price:
    """What an hour of one device costs."""

    per_device_hour: float
    currency: str = ""

    def of(self, num_devices: int, seconds: float) -> float:
        return self.per_device_hour * num_devices * seconds / 3600


def parse_price(text: str) -> Price:
    """`2.5` or `2.5 USD`, of one device for an hour.

    Raises:
        RecipeError: When it is no number, or below 0.
    """
    found = re.fullmatch(r"\s*([^\d\s.+-]{0,3})\s*([+-]?\d+(?:\.\d+)?)\s*([^\d\s.+-]*)\s*", text)
    if found is None or not math.isfinite(float(found[2])):
        raise RecipeError(f"--price: '{text}' is no price; write what one device costs in an hour, such as 2.5")
    if float(found[2]) < 0:
        raise RecipeError(f"--price: {found[2]} is below 0; write what one device costs in an hour, such as 2.5")
    return Price(float(found[2]), found[1] or found[3])
