"""Copies, compares and saves weights; for a sharded model all ranks must call these functions."""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fulltune import methods
from fulltune.files import write_json
from fulltune.methods.folder import copy_permissions_from_config, save_method_folder
from fulltune.models import sharding
from fulltune.models.experts import expert_modules
from fulltune.models.save import save_in_parts
from fulltune.models.sentence_files import write_sentence_files
from fulltune.recipe.fields import Recipe
from fulltune.recipe.tasks import FACTS
from fulltune.records.data import DataSummary
from fulltune.records.training import ParameterChanges
from fulltune.stream.training import streamed_of
from fulltune.tasks import Target, causal_lm
from fulltune.train.loop.trainer import FullTrainer
from fulltune.train.optim import fsdp2, zero
from fulltune.train.optim.optimizers import AdamW
from fulltune.train.worker import distributed


def copy_to_cpu(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Copy a parameter to the CPU: with FSDP2 this rank's shard, with ZeRO the fp32 master copy."""
    if zero.is_in_engine(parameter) or hasattr(parameter, "ds_id"):
        return zero.gather_tensor(parameter).cpu()
    return sharding.local_tensor(parameter.detach()).cpu()


def second_moment(parameter: torch.nn.Parameter, optimizer: Any) -> torch.Tensor | None:
    """Return AdamW's running mean of squared gradients, shaped like `copy_to_cpu`'s result, or None for other
    optimizers."""
    while not hasattr(optimizer, "state") or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer  # wrappers of accelerate and DeepSpeed
    if zero.is_in_engine(parameter):
        if not any("exp_avg_sq" in state for state in optimizer.state.values()):
            return None
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, "exp_avg_sq").cpu()
    own = isinstance(optimizer, AdamW)
    second = optimizer.second_moment(parameter) if own else optimizer.state.get(parameter, {}).get("exp_avg_sq")
    return None if second is None else sharding.local_tensor(second).cpu()


class InitialWeights:
    """Trainable weights before step 1, on disk. If they are sharded, each rank writes and compares its shard."""

    def __init__(self, model: PreTrainedModel, path: Path, is_sharded: bool = False) -> None:
        """Save the trainable weights to `path`."""
        sharding.free_gathered_weights(model)
        self.path, self._is_sharded = path, is_sharded
        tensors = {}
        for number, (name, parameter) in enumerate(methods.trainable_parameters(model).items()):
            values = copy_to_cpu(parameter)
            if self._is_counted_here(number, parameter) or sharding.is_fsdp2_sharded(model):
                tensors[name] = values.contiguous()
        save_file(tensors, path)

    def count_changes(self, model: PreTrainedModel, optimizer: Any, with_gradient: frozenset[str]) -> ParameterChanges:
        """Count, over all ranks, the values that received a gradient (excluding unused tokens' embeddings) and those
        that changed. Without AdamW, `with_gradient` names the tensors that received one."""
        sharding.free_gathered_weights(model)
        inner = optimizer
        while inner is not None:
            zero.link_moments(inner)
            inner = getattr(inner, "optimizer", None)
        counts: dict[str, tuple[int, int]] = {}  # values that received a gradient, and how many of them moved
        for number, (name, parameter) in enumerate(methods.trainable_parameters(model).items()):
            second = second_moment(parameter, optimizer)
            if second is None and name not in with_gradient:
                continue
            now = copy_to_cpu(parameter)
            if not self._is_counted_here(number, parameter):
                continue
            changed = now != self._initial_values(name).to(now.dtype)
            touched = changed.new_ones(changed.shape) if second is None else second > 0
            # `sum` would need eight bytes per value.
            if received := int(touched.count_nonzero()):
                counts[name] = received, int((changed & touched).count_nonzero())
        if self._is_sharded:
            counts = distributed.sum_counts(counts)
        return ParameterChanges.from_counts(counts)

    def restore(self, model: PreTrainedModel) -> None:
        """Set the trainable weights to those before step 1."""
        sharding.free_gathered_weights(model)
        for name, parameter in methods.trainable_parameters(model).items():
            sharding.local_tensor(parameter.detach()).copy_(self._initial_values(name))

    def _is_counted_here(self, number: int, parameter: torch.nn.Parameter) -> bool:
        """Return whether this rank stores and counts a parameter. Replicated parameters are assigned to ranks by
        `number`."""
        if not self._is_sharded or hasattr(parameter, "placements"):
            return True
        return number % torch.distributed.get_world_size() == torch.distributed.get_rank()

    def _initial_values(self, name: str) -> torch.Tensor:
        # Opened for each tensor, or the whole file would stay in memory.
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name)


def initial_weights_file(folder: Path, prefix: str) -> Path:
    """Return this process's file for `InitialWeights`, and delete the files of killed processes."""
    for left in folder.glob(f"{prefix}*.safetensors"):
        process = left.stem.removeprefix(prefix)
        if process.isdigit() and not psutil.pid_exists(int(process)):
            left.unlink(missing_ok=True)
    return folder / f"{prefix}{os.getpid()}.safetensors"


def copy_gathered(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a sharded model with whole weights, which a rank can run alone."""
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        plain: Any = type(model)(config)
    plain.to_empty(device=model.device)
    plain.tie_weights()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in [*plain.named_parameters(), *plain.named_buffers()]:
        tensor.data = _gathered(tensors[name])
    plain.generation_config = model.generation_config
    return cast("PreTrainedModel", plain.eval())


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    if not hasattr(tensor, "ds_id"):
        return sharding.full_tensor(tensor.detach())
    with sharding.gathered_to_modify([tensor]):
        return tensor.detach().clone()


def load_finished_checkpoint(trainer: FullTrainer, checkpoint: Path, total_steps: int) -> torch.optim.Optimizer:
    """Load the weights from a checkpoint saved after the last step; return an optimizer with the saved state."""
    # Only optimizers without second moments need this; an earlier attempt saw the gradients.
    trainer.tensors_with_gradient = frozenset(methods.trainable_parameters(trainer.model))
    if trainer.is_deepspeed_enabled:
        # Only the engine can read it; transformers has no public way to create one without training.
        trainer._prepare_for_training(total_steps, trainer.get_train_dataloader(), str(checkpoint))
        return cast("torch.optim.Optimizer", trainer.optimizer)
    if streamed_of(trainer.model) is not None:
        trainer._load_from_checkpoint(str(checkpoint))  # only compares its step with the state's
        return trainer.create_optimizer()
    trainer.load_weights(checkpoint)
    optimizer = trainer.create_optimizer()
    fsdp2.load_optimizer(trainer.model, optimizer, checkpoint)
    return optimizer


def save_model(
    applied: methods.AppliedMethod,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    recipe: Recipe,
    summary: DataSummary,
    is_main: bool = True,
) -> None:
    """Write a Hugging Face model folder, or only the weights that a method such as LoRA trains, replacing older files.
    All ranks must call this, but only `is_main` writes."""
    part = folder.with_name(folder.name + ".part")
    if is_main:
        shutil.rmtree(part, ignore_errors=True)
    if recipe.method.kind == "full":
        _save_full(applied.model, part, is_main)
    else:
        sharding.free_gathered_weights(applied.model)
        for module in applied.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if zero.is_in_engine(parameter):
                    setattr(module, name, torch.nn.Parameter(zero.gather_tensor(parameter)))
                elif parameter.requires_grad and hasattr(parameter, "placements"):
                    setattr(module, name, torch.nn.Parameter(sharding.full_tensor(parameter.detach())))
        if is_main:
            save_method_folder(applied, part, recipe.task, applied.model.name_or_path)
    if not is_main:
        return
    target = replace(Target.of(summary), stride=recipe.data.stride)
    notes = {
        "task": summary.task,
        **target.as_notes(),
        # For tables without a header line.
        "table_columns": recipe.data.columns,
        # The limit if there is one: other texts may be longer than the longest train row.
        "max_length": summary.limit or summary.max_length,
    }
    if recipe.method.kind != "full":
        notes["method"] = recipe.method.model_dump(mode="json")
        notes["base_model"] = recipe.model.model_dump(mode="json")
    saved = causal_lm.with_prompt_template(tokenizer, target)
    if FACTS[recipe.task].reads_texts_apart or recipe.task == "reranking":
        saved.model_max_length = notes["max_length"]  # for code that takes a tokenizer's limit
        saved.chat_template = None  # in which sentence-transformers would write the texts
    saved.save_pretrained(part)
    if recipe.method.kind == "full" and FACTS[recipe.task].reads_texts_apart:
        write_sentence_files(part, applied.model.config, notes["max_length"])
    write_json(part / "fulltune.json", notes)
    copy_permissions_from_config(part)
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)


def _save_full(model: PreTrainedModel, folder: Path, is_main: bool) -> None:
    """Save the model as `save_pretrained` does, but sharded and streamed weights are written file by file."""
    if (streamed := streamed_of(model)) is not None:
        save_in_parts(model, folder, streamed.weights)
        return
    in_engine, parameters = zero.is_in_use(model), dict(model.named_parameters())
    # With this entry `save_pretrained` would gather the shards itself.
    vars(model.config).pop("distributed_config", None)
    # `save_pretrained` would copy all experts at once to save them apart.
    if in_engine or sharding.is_fsdp2_sharded(model) or expert_modules(model):
        gather = zero.gather_tensor if in_engine else sharding.full_tensor
        save_in_parts(model, folder, lambda name: gather(parameters[name]), is_writer=is_main, in_fp32=in_engine)
    elif is_main:
        model.save_pretrained(folder)
    if is_main and in_engine:
        # transformers writes the dtype that the engine computes in.
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        write_json(folder / "config.json", values | {"dtype": "float32"})
