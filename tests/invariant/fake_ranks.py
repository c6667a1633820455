"""What one of N processes holds in training steps, of which only one exists: its tensors have shapes and no values.

`python -m tests.invariant.fake_ranks '[{"kind": "llama", ...}, ...]'` runs cells in a process of its own: its group is
torch's `fake` one, which sends nothing, the model is shared out by the code that a run has (`models.sharding`,
transformers), and torch's own trackers count each block of memory.

Two steps as a run makes them on a GPU: loss (whole or in pieces), backward pass, clipping, fused AdamW. What is left
out is that of a GPU alone: its context, its allocator's gaps, what NCCL and the kernels keep.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import _sharding_prop
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.distributed.utils import TransformersDeviceMesh

from fulltune.footprint import allocations
from fulltune.footprint.allocations import TraceCase, build_model, make_batch
from fulltune.footprint.formulas import trace_footprint
from fulltune.footprint.records import Footprint
from fulltune.footprint.trace import apply_method_and_dropout
from fulltune.inference.run import autocast, extract_logits
from fulltune.inference.selective_head import SelectiveHead
from fulltune.models import chunked_loss, sharding
from fulltune.models.base import Base
from fulltune.models.shapes import Shapes, measure_shapes
from fulltune.plan import budget, memory
from fulltune.recipe.methods import FullMethod
from fulltune.recipe.model import ModelBlock
from fulltune.recipe.tasks import TaskName
from fulltune.records.plan import MemoryNeed, MemorySettings
from fulltune.system.parallel_layout import ParallelLayout
from fulltune.tasks import Target, Task, seq2seq, task_named
from fulltune.tasks.padding import TRAINED, trained_positions

STEPS = 2
TARGETS = {
    "causal-lm": Target("text", {}),
    "seq2seq": Target("source_target", {}),
    "text-classification": Target("single_label", {}, labels=("a", "b", "c")),
}


@dataclass(frozen=True)
class Cell:
    """A model and how it is trained."""

    kind: str
    """Model type of transformers."""
    config: dict[str, Any] = field(default_factory=dict)
    task: TaskName = "causal-lm"
    ranks: int = 1
    shared: bool = True
    """By FSDP2; else one process holds everything."""
    rows: int = 1
    length: int = 512
    accumulation: int = 1
    precision: str = "bf16"
    weights_dtype: str = "fp32"
    recomputed: bool = False
    chunked: bool = True
    """The loss, where the task writes."""

    @property
    def model(self) -> str:
        """Equal for cells that are traced alike."""
        return json.dumps([self.kind, self.config, self.task, self.precision, self.weights_dtype])

    @property
    def case(self) -> TraceCase:
        """As the plan traces it for a GPU."""
        config = transformers.AutoConfig.for_model(self.kind, **self.config)
        task = task_named(self.task)
        prepared = partial(apply_method_and_dropout, FullMethod(kind="full"), self.task, False)
        types = {"precision": self.precision, "weights_dtype": self.weights_dtype}
        return TraceCase(config, task, TARGETS[self.task], prepared, count_of(config, task), **types)


def count_of(config: Any, task: Task) -> int:
    """Parameters of a model."""
    with torch.device("meta"):
        model = getattr(transformers, task.FACTS.auto_class).from_config(config)
    return sum(one.numel() for one in model.parameters())


# ---- as planned --------------------------------------------------------------------------------------------------


def sizes_of(cells: Sequence[Cell]) -> dict[str, Any]:
    """What a plan knows of the model of these cells: its shapes and its footprint, as they are kept beside a plan."""
    cell = cells[0]
    case = replace(cell.case, checkpointing=tuple({one.recomputed for one in cells}))
    base = Base(ModelBlock(name="model"), cell.task, None, case.config)
    return {"shapes": measure_shapes(base, {}).model_dump(), "footprint": trace_footprint(case).model_dump()}


def planned(cell: Cell, sizes: dict[str, Any]) -> MemoryNeed:
    """What a plan for GPUs says of a cell, without what a GPU takes beyond tensors."""
    settings = MemorySettings(
        micro_batch_size=cell.rows,
        longest_tokens=cell.length,
        gradient_accumulation_steps=cell.accumulation,
        precision=cell.precision,
        weights_dtype=cell.weights_dtype,
        activation_checkpointing=cell.recomputed,
        chunked_loss=cell.chunked and cell.task != "text-classification",
        num_processes=cell.ranks,
        device="cuda",
    )
    shapes, footprint = Shapes.model_validate(sizes["shapes"]), Footprint.model_validate(sizes["footprint"])
    need = budget.memory_need(
        shapes, footprint, settings, ParallelLayout(3, False, False, engine="fsdp2") if cell.shared else None
    )
    kinds = {**need.kinds, "buffers": need.kinds["buffers"] - memory.CUDA_CONTEXT_BYTES}
    return MemoryNeed(kinds=kinds, phases={"step": sum(kinds.values())})


# ---- as tracked --------------------------------------------------------------------------------------------------


def tracked(cell: Cell) -> dict[str, int]:
    """Bytes by the tracker's kinds at the highest moment of the steps, `Total` among them."""
    dist.init_process_group("fake", rank=0, world_size=cell.ranks, store=FakeStore())
    case = cell.case
    share_out = _sharing(cell, case) if cell.shared else lambda model: model
    with torch.device("meta"):  # as the plan does it: numbers that a class computes for itself have values
        model = build_model(case, case.config)
    batch = _collated(case, model, cell)
    with FakeTensorMode() as mode:
        allocations.move_to_fake_cpu(model)
        model = share_out(model)
        if cell.recomputed:
            model.activation_checkpointing_enable()
        model.config.use_cache = False  # as the Trainer has it
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        unvalued = {name: mode.from_tensor(tensor) for name, tensor in batch.items()}
        tracker: Any = FSDPMemTracker(model, optimizer) if cell.shared else MemTracker()
        if cell.shared:
            tracker.track_inputs((unvalued,))
        else:
            tracker.track_external(model, optimizer, *unvalued.values())
        # A chunked loss of a GPU's size: the tensors say that they are on a CPU.
        on_gpu = mock.patch.multiple(chunked_loss, TOKENS_PER_CHUNK={"cpu": 1024}, _BLOCK_NUMBERS=2**62)
        # DTensor tries each operation on whole tensors in a mode that the tracker leaves out, unless it finds ours:
        # then AdamW alone "holds" four whole models.
        apart = mock.patch.object(_sharding_prop, "detect_fake_mode", return_value=None)
        with tracker, on_gpu, apart:
            for _ in range(STEPS):
                for _ in range(cell.accumulation):
                    _micro_batch(cell, case, model, unvalued)
                    tracker.reset_mod_stats()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                model.zero_grad()
        (found,) = tracker.get_tracker_snapshot("peak").values()
    return {str(getattr(kind, "value", kind)): size for kind, size in found.items() if size}


def _sharing(cell: Cell, case: TraceCase) -> Callable[[Any], Any]:
    """By the class and the plan that a run loads with; also over one process, which a run does not do."""
    # Outside of the mode: a mesh looks at the values of its ranks.
    mesh = init_device_mesh("cpu", (1, 1, cell.ranks, 1), mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"))
    auto_class = getattr(transformers, case.task.FACTS.auto_class)
    shared, given = sharding.sharded_model_class(auto_class, case.config, max(2, cell.ranks))
    return lambda model: shared.maybe_distribute_model(model, given, TransformersDeviceMesh(mesh, mesh))


def _collated(case: TraceCase, model: Any, cell: Cell) -> dict[str, Any]:
    """A batch on the host, with the places of trained tokens and their labels, as `FullTrainer` finds them."""
    batch = make_batch(case, cell.rows, cell.length)
    if case.task.FACTS is seq2seq.FACTS:
        batch["decoder_input_ids"] = seq2seq.decoder_input_ids(model, batch["labels"])
    if hasattr(case.task, "target_ids"):
        wanted = case.task.target_ids(batch["labels"])
        batch[TRAINED] = trained_positions(wanted)
        batch["wanted"] = wanted.flatten().index_select(0, batch[TRAINED])
    return batch


def _micro_batch(cell: Cell, case: TraceCase, model: Any, batch: dict[str, Any]) -> None:
    """As `FullTrainer` does it."""
    inputs = dict(batch)
    labels, trained, selecting = inputs.pop("labels"), inputs.pop(TRAINED, None), contextlib.nullcontext()
    wanted = inputs.pop("wanted", labels)
    if trained is not None:
        head = SelectiveHead(model.get_output_embeddings(), case.task.target_ids, model)
        selecting = head.computing_only(labels, trained, chunked=cell.chunked)
    with autocast(model, "fp32" if cell.weights_dtype == "bf16" else cell.precision), selecting:
        outputs = model(**inputs)
    logits = extract_logits(outputs)
    del outputs
    if isinstance(logits, torch.Tensor):  # accelerate hands outputs on in float32
        logits = logits.float()
    loss = case.task.loss(logits, wanted, case.target)
    del logits
    (loss / cell.accumulation).backward()


def main() -> None:
    """Print what is tracked of the cells that the argument gives."""
    found = []
    for one in json.loads(sys.argv[1]):
        found.append(tracked(Cell(**one)))
        dist.destroy_process_group()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
