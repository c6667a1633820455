"""What training relies on: activation checkpointing, the planned bytes, and a run that continues."""

from __future__ import annotations

import gc
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fulltune.errors import InterruptedRun
from fulltune.plan import memory
from fulltune.records.events import Event, StepLogged
from fulltune.selfcheck import tiny
from fulltune.selfcheck.devices import Device, NotHere, Result
from fulltune.selfcheck.precision import relative_error
from fulltune.text import format_bytes


def checkpointing(device: Device) -> Result:
    """Loss and gradients of a model with dropout: the recomputed pass must draw the same numbers again."""
    ids = tiny.tokens(device.type, vocabulary=64)
    labels = torch.arange(len(ids), device=device.type) % 2
    model = tiny.bert().to(device.type).train()
    with tiny.seeded(7):
        plain, plain_gradients = tiny.backward(model, input_ids=ids, labels=labels)
    model.config.use_cache = False
    model.activation_checkpointing_enable()
    with tiny.seeded(7):
        found, gradients = tiny.backward(model, input_ids=ids, labels=labels)
    errors = relative_error(found.loss, plain.loss), relative_error(gradients, plain_gradients)
    return Result(max(errors) <= 1e-5, f"loss off by {errors[0]:.0e}, gradients by {errors[1]:.0e}; bound 1e-05")


def planned_bytes(device: Device) -> Result:
    """Weights, gradients and AdamW's moments after a step: counted by the plan, and measured."""
    # The first product on a GPU also takes work space that stays.
    tiny.decoder(device.type)(input_ids=tiny.tokens(device.type)).logits.sum().backward()
    gc.collect()
    before = _allocated(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = tiny.decoder(device.type, layers=4, width=256, vocabulary=4096)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = tiny.tokens(device.type, vocabulary=4096)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    planned = memory.state_bytes(sum(parameter.numel() for parameter in model.parameters()), "fp32").total
    if device.type == "cpu":
        tensors = [tensor for parameter in model.parameters() for tensor in (parameter, parameter.grad)]
        tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        measured = sum(tensor.nbytes for tensor in tensors)
    else:
        measured = _allocated(device) - before
    error = measured / planned - 1
    text = f"planned {format_bytes(planned)}, measured {format_bytes(measured)} ({error:+.1%})"
    if device.type == "cuda":
        text += f", {format_bytes(torch.cuda.max_memory_allocated() - before)} with activations"
    return Result(abs(error) <= 0.05, f"{text}; bound 5%")


def _allocated(device: Device) -> int:
    match device.type:
        case "cuda":
            torch.cuda.synchronize()
            return int(torch.cuda.memory_allocated())
        case "mps":
            torch.mps.synchronize()
            return int(torch.mps.current_allocated_memory())
        case _:
            return 0


LAST_STEP, STOP_AFTER, SAVE_EVERY = 12, 8, 3


def _loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs.logits.float(), labels, reduction="sum") / num_items_in_batch


def resume(device: Device) -> Result:
    """A run that stops between two checkpoints and goes on, against one that was never stopped.

    Weights must be the same bit by bit on a CPU. A GPU may add in another order each time, which AdamW blows up where
    a gradient is nearly 0: there the losses after the stop are compared.
    """
    if device.type == "mps":
        raise NotHere("a recipe trains on a CPU or a GPU of NVIDIA or AMD so far")
    with TemporaryDirectory(prefix="fulltune-selfcheck-") as name:
        folder = Path(name)
        tiny.save_bert(folder / "model")
        tiny.write_rows(folder / "rows.csv")
        whole, losses = _train(folder, "whole", device)
        _, before = _train(folder, "broken", device, stop=True)
        again, after = _train(folder, "broken", device)
    first = STOP_AFTER // SAVE_EVERY * SAVE_EVERY + 1
    if list(before) != list(range(1, STOP_AFTER + 1)) or list(after) != list(range(first, LAST_STEP + 1)):
        return Result(False, f"took steps {list(before)}, then {list(after)}: it did not go on at step {first}")
    where = f"stopped after step {STOP_AFTER} of {LAST_STEP}"
    same = whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)
    if same:
        return Result(True, f"{where}: same weights, bit by bit")
    error = max(abs(after[step] - losses[step]) for step in after)
    if device.type == "cpu":
        return Result(False, f"{where}: other weights, losses off by up to {error:.0e}")
    return Result(error <= 1e-3, f"{where}: losses off by up to {error:.0e}, bound 1e-03")


def _train(
    folder: Path, name: str, device: Device, stop: bool = False
) -> tuple[dict[str, torch.Tensor], dict[int, float]]:
    """Train in `folder/name`, or go on there; the final weights (none when stopped) and each step's loss."""
    # Imported here: the processes that this package starts need none of it.
    from safetensors.torch import load_file

    from fulltune.pipeline import run
    from fulltune.recipe.fields import Recipe
    from fulltune.run_context import Run
    from fulltune.system.run_folder import find_or_make
    from fulltune.train.hooks import Hooks

    losses: dict[int, float] = {}

    def listener(event: Event) -> None:
        if isinstance(event, StepLogged) and event.loss is not None:
            losses[event.step] = event.loss
            if stop and event.step == STOP_AFTER:
                raise InterruptedRun("stopped by the self-check")

    values = {
        "model": {"name": str(folder / "model")},
        "task": "text-classification",
        "data": {"train": str(folder / "rows.csv")},
        "method": {"kind": "full", "learning_rate": 1e-3},
        "train": {
            "device": device.type,
            "precision": "fp32",
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "max_steps": LAST_STEP,
            "save_steps": SAVE_EVERY,
            "logging_steps": 1,
            # The last weights are compared: the best ones may be older than the stop.
            "load_best_model_at_end": False,
        },
    }
    # With a loss from Python training runs in this process, which spares the seconds of starting three more.
    recipe, hooks = Recipe.model_validate(values), Hooks(compute_loss=_loss)
    find_or_make(recipe, "", name, folder / name, fresh=False, marks=hooks.marks())
    try:
        run(Run(recipe, folder / name, hooks, listener), "train")
    except InterruptedRun:
        if not stop or STOP_AFTER not in losses:
            raise  # it was the user
        return {}, losses
    return load_file(folder / name / "models" / "full" / "model.safetensors"), losses
