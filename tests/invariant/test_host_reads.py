"""How often a training step has the host wait for the device: each read of a tensor is one, seen here on a CPU.

On a GPU the host runs ahead of the device until it asks for a value. A mode of torch sees each call that asks, in
whatever library, between the begin of a step and its end; tensors that lie on the host on a GPU too are left out by the
place that reads them.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from fulltune.train.loop.trainer import FullTrainer
from tests.invariant import placed
from tests.invariant.test_same_curve import CASES
from tests.train import runs

STEPS = 6
ASKING = {
    *(torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__bool__),
    *(torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__),
}
SIZED_BY_VALUES = ("nonzero", "masked_select", "_unique2", "equal", "bincount", "repeat_interleave")
"""Operators that wait for the values of their input, be it for the size of what they give."""
KNOWN = {
    "guarded_step.py: _sum_over_ranks": "the guard judges loss and norm before the update: once a step",
    "trainer.py: _clip_grad_norm": "on a CPU alone",
    "callbacks.py: compare_samples": "whether updates arrive: once in a measured step",
    "optimizers.py: _update_slice": "the count of steps, which lies on the host",
    "data_loader.py: __iter__": "the seed of an epoch, which lies on the host",
    "masking_utils.py: _ignore_bidirectional_mask_sdpa": "transformers asks whether anything is padded",
    "masking_utils.py: _ignore_causal_mask_sdpa": "likewise",
    "encoders.py: forward": "on a CPU alone: how long queries and documents are",
}
"""Who may ask, and why."""


@dataclass
class Reads:
    """Who asked, in so many steps."""

    steps: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    on_host: bool = False
    """Batches are collated there, before the device has them."""

    def note(self) -> None:
        if self.on_host:
            return
        frames = [frame for frame in traceback.extract_stack() if not _is_between(frame)]
        self.counts[f"{Path(frames[-1].filename).name}: {frames[-1].name}"] += 1


def _is_between(frame: traceback.FrameSummary) -> bool:
    return "/torch/" in frame.filename or frame.name in ("note", "__torch_function__", "__torch_dispatch__")


class _Functions(TorchFunctionMode):
    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ASKING:
            self._reads.note()
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        masks = name.startswith("index") and any(
            isinstance(one, torch.Tensor) and one.dtype == torch.bool
            for one in (args[1] if len(args) > 1 else ()) or ()
        )
        if name in SIZED_BY_VALUES or masks:
            self._reads.note()
        return func(*args, **(kwargs or {}))


class _Last(TrainerCallback):
    def __init__(self, open_modes: contextlib.ExitStack) -> None:
        self._modes = open_modes

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._modes.close()


@contextlib.contextmanager
def seen() -> Iterator[Reads]:
    """Inside, trainings in this process are watched from the first batch of each step to its last callback."""
    reads, theirs, modes = Reads(), FullTrainer, contextlib.ExitStack()
    train, get_batch_samples, collated = theirs.train, theirs.get_batch_samples, theirs.collated

    def watched(trainer: FullTrainer, *given: Any, **named: Any) -> Any:
        trainer.callback_handler.callbacks.append(_Last(modes))
        return train(trainer, *given, **named)

    def begun(trainer: FullTrainer, *given: Any, **named: Any) -> Any:
        reads.steps += 1
        modes.enter_context(_Functions(reads))
        modes.enter_context(_Operators(reads))
        return get_batch_samples(trainer, *given, **named)

    def on_host(trainer: FullTrainer, rows: Any) -> Any:
        reads.on_host = True
        batch = collated(trainer, rows)
        reads.on_host = False
        return batch

    changes = {"train": watched, "get_batch_samples": begun, "collated": on_host}
    with mock.patch.multiple(FullTrainer, **changes), modes:
        yield reads


def reads_of(folder: Path, family: placed.Family, **changes: Any) -> Reads:
    with seen() as reads, runs.in_this_process():
        placed.train(folder, family, placed.Place("single"), max_steps=STEPS, eval_steps=STEPS, **changes)
    assert reads.steps == STEPS
    return reads


def assert_known(reads: Reads) -> None:
    counts = dict(reads.counts)
    assert {who: count for who, count in counts.items() if who not in KNOWN} == {}
    assert counts["guarded_step.py: _sum_over_ranks"] == STEPS


def _tags(_: Path) -> placed.Rows:
    words = ["we", "cook", "soup", "in", "the", "garden"]
    tags = ["O", "B-X", "I-X", "O", "O", "B-Y"]
    return [{"tokens": [*words[number % 2 :], str(number)], "tags": [*tags[number % 2 :], "O"]} for number in range(34)]


def _answers(_: Path) -> placed.Rows:
    answers = {"text": ["soup"], "answer_start": [8]}
    contexts = (f"we cook soup {number}" for number in range(34))
    return [{"question": "what do we cook?", "context": context, "answers": answers} for context in contexts]


TASKS = {
    **{
        name: placed.Family(kind, lambda _, rows=rows: rows(), blocks)
        for name, (kind, _, rows, blocks) in CASES.items()
    },
    "written": placed.FAMILIES["encoder-decoder"],
    "tags": placed.Family("bert", _tags, {"task": "token-classification"}),
    "spans": placed.Family("bert", _answers, {"task": "question-answering"}),
    "images": placed.MODELS["vit"],
}
PLAIN = {"method": {"kind": "full", "learning_rate": 1e-3}}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({"method": {"kind": "lora"}}, {}),
    "8-bit": (PLAIN, {"optim": "adamw_8bit"}),
    "bf16": ({**PLAIN, "model": {"weights_dtype": "bf16"}}, {"optim": "adamw_bf16", "precision": "bf16"}),
    "recomputed": (PLAIN, {"activation_checkpointing": True, "precision": "bf16"}),
    "smoothed": (PLAIN, {"label_smoothing_factor": 0.1, "class_weights": "balanced"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_step_of_a_task_waits_once(name: str, tmp_path: Path) -> None:
    assert_known(reads_of(tmp_path / "run", TASKS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_step_of_a_method_waits_once(name: str, tmp_path: Path) -> None:
    blocks, train = METHODS[name]
    family = placed.Family("bert", placed.FAMILIES["encoder"].rows, blocks)
    assert_known(reads_of(tmp_path / "run", family, **train))


def test_read_that_nobody_knows_is_seen(tmp_path: Path) -> None:
    """A loss that a callback reads, and a mask that picks rows."""
    theirs = FullTrainer.compute_loss

    def compute_loss(trainer: FullTrainer, *given: Any, **named: Any) -> Any:
        loss = theirs(trainer, *given, **named)
        return loss + 0 * loss[None][loss[None] > float(loss) - 1].sum()

    with mock.patch.object(FullTrainer, "compute_loss", compute_loss):
        reads = reads_of(tmp_path / "run", placed.FAMILIES["encoder"], micro_batch_size=8)
    assert reads.counts["test_host_reads.py: compute_loss"] == 2 * STEPS
