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

The optimizer's update reads and writes its state once and is bound by memory: 36 bytes a parameter for AdamW in fp32
(weight, gradient and both moments read, three of them written, and two passes of clipping over the gradients).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from fulltune.errors import RecipeError
from fulltune.footprint.records import Footprint
from fulltune.models.shapes import Shapes
from fulltune.plan.gpus import Fleet
from fulltune.recipe.tasks import FACTS
from fulltune.records.data import DataSummary
from fulltune.records.plan import Plan, TimeNeed

CPU_UTILISATION = {"bf16": 0.57, "fp32": 0.75}
GPU_UTILISATION = ((2048, 0.5), (1024, 0.3), (0, 0.15))
"""Least hidden size, share of the data sheet's rate."""
GPU_FP32_SHARE = 1 / 8
"""fp32 on a GPU without TF32, against 16-bit: 1/16 on an A100, 1/8 on a V100, 1/2 on an RTX 4090."""
UPDATE_BYTES = 36
PADDING_GROUPED = 1.07
"""Measured with rows of similar length together: 6.6 % (docs/log.md)."""
DISK_BYTES_PER_SECOND = 10**9


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
    split = summary.splits["train"]
    mean = split.tokens / max(1, split.rows)
    longest = summary.max_length
    p95 = split.length_percentiles.get("p95", longest)
    # Without grouping, a batch is about as long as a long row of it.
    padded = mean if summary.packed else mean * PADDING_GROUPED if grouped else max(mean, p95)
    return Work(
        tokens_per_row=max(1.0, min(padded, longest * max(1, footprint.sequences_per_row))) + virtual,
        longest=longest,
        flops_per_token=footprint.flops_per_token,
        attention_flops_per_pair=footprint.attention_flops_per_pair,
        backward=backward,
    )


def device_flops(fleet: Fleet, precision: str, hidden_size: int) -> float | None:
    """Operations a second of one device in training; None when nothing is known of it."""
    if fleet.machine.gpus:
        if fleet.card is None:
            return None
        share = next(share for least, share in GPU_UTILISATION if hidden_size >= least)
        return fleet.card.tflops * 1e12 * share * (GPU_FP32_SHARE if precision == "fp32" else 1.0)
    if not fleet.machine.cpu_flops:
        return None
    speedup = fleet.machine.cpu_bf16_speedup if precision == "bf16" else 1.0
    return fleet.machine.cpu_flops * speedup * CPU_UTILISATION["bf16" if precision == "bf16" else "fp32"]


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
    evaluations = occasions(plan.total_steps, plan.eval_steps)
    rows = summary.splits["eval"].rows if "eval" in summary.splits else 0
    saves = occasions(plan.total_steps, plan.eval_steps, plan.save_steps)
    one = plan.disk.one_checkpoint if plan.disk else plan.state.weights + plan.state.optimizer
    return TimeNeed(
        train_seconds=plan.total_steps * seconds_per_step,
        eval_seconds=evaluations * work.forward_flops(rows) / forward_flops,
        save_seconds=saves * one / DISK_BYTES_PER_SECOND,
        tokens=tokens,
        tokens_per_second=plan.global_batch_size * work.tokens_per_row / seconds_per_step,
        source="arithmetic",
    )


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
