"""Whole weights before, during and after training; of a model that is shared out all processes call these functions."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fulltune import methods
from fulltune.files import write_json
from fulltune.methods.folder import save, share
from fulltune.models import sharding
from fulltune.recipe.fields import Recipe
from fulltune.records.data import DataSummary
from fulltune.records.training import ParameterChanges
from fulltune.tasks import Target, causal_lm
from fulltune.train.optim import fsdp2, zero
from fulltune.train.optim.optimizers import AdamW
from fulltune.train.worker import distributed


def held(parameter: Any) -> torch.Tensor:
    """A parameter's values on the CPU, with FSDP2 this process's part; of half precision ZeRO's fp32 copy."""
    if zero.is_in_engine(parameter) or hasattr(parameter, "ds_id"):
        return zero.whole(parameter).cpu()
    return sharding.local(parameter.detach()).cpu()


def second_moment(parameter: Any, optimizer: Any) -> torch.Tensor | None:
    """AdamW's running mean of squared gradients on the CPU, in the shape of `held` and positive where a value has
    received a gradient; None with optimizers that have none."""
    while not hasattr(optimizer, "state") or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer  # accelerate's and an engine's wrappers
    if zero.is_in_engine(parameter):
        if not any("exp_avg_sq" in state for state in optimizer.state.values()):
            return None
        return zero.second_moment(parameter).cpu()
    own = isinstance(optimizer, AdamW)
    second = optimizer.second_moment(parameter) if own else optimizer.state.get(parameter, {}).get("exp_avg_sq")
    return None if second is None else sharding.local(second).cpu()


class InitialWeights:
    """The trained weights before step 1, on disk; with `together` each process writes and compares its part."""

    def __init__(self, model: Any, path: Path, together: bool = False) -> None:
        sharding.free(model)
        self.path, self._together = path, together
        tensors = {}
        for number, (name, parameter) in enumerate(methods.trained(model).items()):
            values = held(parameter)
            if self._counts(number, parameter) or sharding.is_shared(model):
                tensors[name] = values.contiguous()
        save_file(tensors, path)

    def moved(self, model: Any, optimizer: Any, with_gradient: frozenset[str]) -> ParameterChanges:
        """Count the values that received a gradient (a positive second moment, so that rows of unused tokens are left
        out) and those that moved; over all processes together."""
        sharding.free(model)
        inner = optimizer
        while inner is not None:
            zero.link(inner)
            inner = getattr(inner, "optimizer", None)
        counts: dict[str, tuple[int, int]] = {}  # values that received a gradient, and how many of them moved
        for number, (name, parameter) in enumerate(methods.trained(model).items()):
            second = second_moment(parameter, optimizer)
            if second is None and name not in with_gradient:
                continue
            now = held(parameter)
            if not self._counts(number, parameter):
                continue
            changed = now != self._before(name).to(now.dtype)
            touched = changed.new_ones(changed.shape) if second is None else second > 0
            # Not `sum`, which makes eight bytes of each truth value.
            if received := int(touched.count_nonzero()):
                counts[name] = received, int((changed & touched).count_nonzero())
        if self._together:
            counts = distributed.sum_counts(counts)
        unmoved = [name for name, (_, moved) in counts.items() if not moved]
        return ParameterChanges(
            num_tensors_with_gradient=len(counts),
            num_tensors_changed=len(counts) - len(unmoved),
            num_values_with_gradient=sum(received for received, _ in counts.values()),
            num_values_changed=sum(moved for _, moved in counts.values()),
            unchanged_tensors=tuple(unmoved[:20]),
        )

    def _counts(self, number: int, parameter: Any) -> bool:
        """Whether this process counts a parameter: whole ones are counted in turn, so that none keeps them all."""
        if not self._together or hasattr(parameter, "placements"):
            return True
        return number % torch.distributed.get_world_size() == torch.distributed.get_rank()

    def _before(self, name: str) -> torch.Tensor:
        """A tensor as it was. The file is opened anew for each, or all of it would stay in memory."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name)


def own_file(folder: Path, prefix: str) -> Path:
    """Where this process may keep its `InitialWeights`; what killed ones left there is removed."""
    for left in folder.glob(f"{prefix}*.safetensors"):
        process = left.stem.removeprefix(prefix)
        if process.isdigit() and not _exists(int(process)):
            left.unlink(missing_ok=True)
    return folder / f"{prefix}{os.getpid()}.safetensors"


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def load_finished(trainer: Any, checkpoint: Path, total_steps: int) -> Any:
    """Put the weights of a checkpoint after which nothing is left to train into the model; returns its optimizer."""
    # Which tensors received a gradient was seen by the attempt before; only optimizers without second moments ask.
    trainer.tensors_with_gradient = frozenset(methods.trained(trainer.model))
    if trainer.is_deepspeed_enabled:
        # Only its engine holds what is read; transformers has no public way to make one without training.
        trainer._prepare_for_training(total_steps, trainer.get_train_dataloader(), str(checkpoint))
        return trainer.optimizer
    trainer.load_weights(checkpoint)
    optimizer = trainer.create_optimizer()
    fsdp2.load_optimizer(trainer.model, optimizer, checkpoint)
    return optimizer


def save_model(
    applied: methods.Applied, tokenizer: Any, folder: Path, recipe: Recipe, summary: DataSummary, is_first: bool = True
) -> None:
    """Write a plain Hugging Face folder, or of a small method only what it trains, in place of an older one when it is
    whole; sharded models by all processes."""
    part = folder.with_name(folder.name + ".part")
    if is_first:
        shutil.rmtree(part, ignore_errors=True)
    if recipe.method.kind == "full":
        _save_whole(applied.model, part, is_first)
    else:
        _hold_whole(applied.model)
        if is_first:
            save(applied, part, recipe.task, applied.model.name_or_path)
    if not is_first:
        return
    target = replace(Target.of(summary), stride=recipe.data.stride)
    causal_lm.with_trained_template(tokenizer, target).save_pretrained(part)
    notes = {
        "task": summary.task,
        **target.as_notes(),
        # Of tables without a header line; null: they have one.
        "table_columns": recipe.data.columns,
        # Not that of the longest train row: another text may be longer.
        "max_length": summary.limit or summary.max_length,
    }
    if recipe.method.kind != "full":
        notes["method"] = recipe.method.model_dump(mode="json")
        notes["base_model"] = recipe.model.model_dump(mode="json")
    write_json(part / "fulltune.json", notes)
    share(part)
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)


def _hold_whole(model: Any) -> None:
    """Have each process hold the trained parameters whole, few as they are; the model is not trained any more."""
    sharding.free(model)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if zero.is_in_engine(parameter):
                setattr(module, name, torch.nn.Parameter(zero.whole(parameter)))
            elif parameter.requires_grad and hasattr(parameter, "placements"):
                setattr(module, name, torch.nn.Parameter(sharding.whole(parameter.detach())))


def _save_whole(model: Any, folder: Path, is_first: bool) -> None:
    """As `save_pretrained` does, file by file where the weights are shared out: no process ever holds all of them."""
    in_engine = zero.holds(model)
    is_shared = in_engine or sharding.is_shared(model)
    # `save_pretrained` knows the names that tensors have in files, where those are others.
    in_one = is_shared and getattr(model, "_weight_conversions", None)
    state = fsdp2.whole_state(model, zero.whole if in_engine else sharding.whole) if in_one else {}
    # With it `save_pretrained` would ask the other processes for their parts, one by one.
    vars(model.config).pop("distributed_config", None)
    if is_first:
        model.save_pretrained(folder, state_dict=state if is_shared else None)
    if is_shared and not in_one:
        (zero if in_engine else fsdp2).write_whole(model, folder)
    if is_first and in_engine:
        # transformers notes the type that the engine computes in.
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        write_json(folder / "config.json", values | {"dtype": "float32"})
