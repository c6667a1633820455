"""Bytes that each process sends in an optimizer step, by arithmetic.

A ring sends (N - 1) / N of the bytes of a tensor for each all-gather and each reduce-scatter of N processes, and twice
that for an all-reduce, which is one after the other (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms
for clusters of workstations"). P trained parameters, A micro batches of a step; fp32 takes 4 bytes:

| placement | sent by each process in a step, times (N - 1) / N |
|---|---|
| ddp | 2 x 4 P, whatever A: gradients are summed at the last micro batch |
| fsdp2 | A x 4 (3 P - W): gathered for the forward and again for the backward pass but for W, which stays whole between
  them; gradients are reduced and scattered; of bf16 weights half |
| zero2 | A x 2 P gradients + 2 P weights once, in 16 bits |
| zero3 | A x 3 x 2 P: weights forward and backward, gradients |

ZeRO's volumes are those of Rajbhandari et al. 2020 (arXiv 1910.02054, section 7), with gradients of each micro batch
sent at once, as DeepSpeed does it from stage 2 on; in fp32, as on a CPU, its numbers take 4 bytes. FSDP2's are read
from torch 2.13 and counted by `bench/traffic.py`, as are ddp's.

Over several machines the ring is laid so that it enters and leaves each of them once (NCCL orders its rings by machine;
of several rings each carries a part). Of a machine's processes all but one send to a neighbour inside it, so over each
machine's network go, in each direction, as many bytes as each process sends. More machines hardly add to it, and a step
waits for the slower of the two links.
"""

from __future__ import annotations

from fulltune.models.shapes import Shapes
from fulltune.plan import fsdp2, memory
from fulltune.plan.memory import MemorySettings
from fulltune.records.plan import Traffic
from fulltune.system.sharing import Sharing


def of(shapes: Shapes, settings: MemorySettings, shared: Sharing | None) -> Traffic:
    """What each process sends.

    Args:
        shapes: The model's sizes.
        settings: How many processes, and in which types they compute.
        shared: What they share out; None: each holds everything.
    """
    processes = settings.num_processes
    trained = memory.num_trained(shapes.num_parameters, settings)
    narrow = 4 if settings.precision == "fp32" else 2
    each_pass, each_step = 0, 0
    if shared is None:
        each_step = 2 * memory.BYTES[memory.trained_dtype(settings)] * trained
    elif shared.engine == "fsdp2":
        units = fsdp2.units_of(shapes)
        each_pass = memory.BYTES[settings.weights_dtype] * (units.gathered + units.reduced)
    elif shared.stage == 3:
        each_pass = narrow * (2 * shapes.num_parameters + trained)
    else:  # stage 1 sums gradients like stage 2, but once a step
        gradients = narrow * trained
        each_pass, each_step = (gradients, gradients) if shared.stage == 2 else (0, 2 * gradients)
    return Traffic(
        each_pass=each_pass * (processes - 1) // processes, each_step=each_step * (processes - 1) // processes
    )
