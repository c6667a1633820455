from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers.utils.import_utils import is_torch_bf16_gpu_available, is_torch_xla_available

from fulltune.text import did_you_mean


class FulltuneNotice(UserWarning):
    """Warns that fulltune changed an argument, call or step of the user's script."""


_NOT_THE_SCRIPT = ("fulltune", "transformers", "accelerate", "torch", "trl")


def issue_notice(text: str) -> None:
    """Issue a `FulltuneNotice` for the calling line of the user's script. Python shows each notice once per line."""
    level, frame = 1, sys._getframe()
    while frame.f_back and str(frame.f_globals.get("__name__")).split(".")[0] in _NOT_THE_SCRIPT:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, FulltuneNotice, stacklevel=level)


# Every field of the TrainingArguments of 3.5, 4.0, 4.18, 4.30, 4.46 and 4.57 that transformers 5.24 does not have.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "torchdynamo": "torch_compile_backend",
    "warmup_ratio": "warmup_steps",
    "xpu_backend": "ddp_backend",
}
SWITCHES: dict[str, tuple[str, str | list[str]]] = {
    "adafactor": ("optim", "adafactor"),
    "evaluate_during_training": ("eval_strategy", "steps"),
    "group_by_length": ("train_sampling_strategy", "group_by_length"),
    "include_inputs_for_metrics": ("include_for_metrics", ["inputs"]),
    "include_tokens_per_second": ("include_num_input_tokens_seen", "all"),
    "tpu_metrics_debug": ("debug", "tpu_metrics_debug"),
}
"""Maps each old flag to its new name and the value for True."""
INSIDE = {
    "dispatch_batches": "accelerator_config",
    "fsdp_min_num_params": "fsdp_config",
    "fsdp_transformer_layer_cls_to_wrap": "fsdp_config",
    "split_batches": "accelerator_config",
}
IGNORED = {
    "fp16_backend": "PyTorch's mixed precision is always used",
    "fp16_opt_level": "PyTorch's mixed precision is used instead of apex",
    "half_precision_backend": "PyTorch's mixed precision is always used",
    "jit_mode_eval": "evaluation no longer traces the model; use torch_compile=True to compile it",
    "logging_dir": "report_to='tensorboard' writes to the folder that TENSORBOARD_LOGGING_DIR names",
    "mp_parameters": "SageMaker's launcher sets this option",
    "overwrite_output_dir": "training always starts from the model and writes to output_dir; resume with "
    "trainer.train(resume_from_checkpoint=True)",
    "past_index": "the state of one batch is no longer passed to the next",
    "push_to_hub_organization": "write hub_model_id='ORGANIZATION/MODEL'",
    "ray_scope": "pass scope= to hyperparameter_search",
    "save_safetensors": "weights are always saved as safetensors",
    "sharded_ddp": "FairScale is no longer supported; use fsdp to shard a model",
    "tpu_num_cores": "the launcher sets the number of cores",
    "use_ipex": "Intel's extension is no longer used; PyTorch includes most of it",
    "use_legacy_prediction_loop": "there is only one prediction loop",
    "use_mps_device": "Apple's GPU is always used if available; set use_cpu=True to avoid it",
}
OLD_NAMES = (*RENAMED, *SWITCHES, *INSIDE, *IGNORED)


class OldNames:
    """Mixin that lets arguments of transformers or TRL accept the names of transformers 3 and 4.

    `logging_nan_inf_filter` is always off, because it would log a loss of 0.0 while all weights are NaN.

    Args:
        **keywords: New or old names (`OLD_NAMES`). Each old one causes a `FulltuneNotice`.

    Raises:
        TypeError: A name is unknown.
        ValueError: The values of an old and a new name conflict.
    """

    def __init__(self, *positional: Any, **keywords: Any) -> None:
        new_names = [field.name for field in dataclasses.fields(self) if field.init]  # type: ignore[arg-type]  # of subclasses
        for name in keywords:
            if name not in new_names and name not in OLD_NAMES:
                hint = did_you_mean(name, [*new_names, *OLD_NAMES])
                raise TypeError(f"TrainingArguments: unknown argument {name!r}" + (f"; {hint}" if hint else ""))
        arguments = {name: value for name, value in keywords.items() if name not in OLD_NAMES}
        for name, value in keywords.items():
            if name in OLD_NAMES and value is not None:
                _translate_old_name(name, value, arguments)
        optim = arguments.get("optim")
        if str(getattr(optim, "value", optim)) in ("adamw_hf", "adamw_apex_fused"):
            issue_notice(f"optim={optim!r} no longer exists; PyTorch's AdamW ('adamw_torch') is used instead")
            arguments["optim"] = "adamw_torch"
        _use_cpu_for_bf16(arguments)
        if not torch.accelerator.is_available():
            arguments["dataloader_pin_memory"] = False  # it has no effect, and torch warns at each loader
        super().__init__(*positional, **(arguments | {"logging_nan_inf_filter": False}))
        if self.fp16 and self.device.type == "cpu":  # type: ignore[attr-defined]  # of subclasses
            issue_notice("fp16=True: no GPU found, so training computes in fp32")


class TrainingArguments(OldNames, transformers.TrainingArguments):
    """`transformers.TrainingArguments` with `OldNames`."""


class Seq2SeqTrainingArguments(OldNames, transformers.Seq2SeqTrainingArguments):
    """`transformers.Seq2SeqTrainingArguments` with `OldNames`."""


def _translate_old_name(name: str, value: Any, arguments: dict[str, Any]) -> None:
    """Replace an old argument in `arguments` with the new one; raise `ValueError` if the two conflict."""
    if name in IGNORED:
        issue_notice(f"{name} is ignored: {IGNORED[name]}")
        return
    new, new_value = RENAMED.get(name, ""), value
    if name in SWITCHES:
        new, new_value = SWITCHES[name]
    elif name in INSIDE:
        new, new_value = INSIDE[name], {name.removeprefix("fsdp_"): value}
    if name not in RENAMED and not value and name != "dispatch_batches":
        return  # the old flag was off
    if name == "warmup_ratio":
        if not 0 <= value <= 1:
            raise ValueError(f"TrainingArguments: warmup_ratio: {value} is not between 0 and 1")
        # transformers reads a number below 1 as a share of all steps, and 1 as one step.
        new_value = min(float(value), math.nextafter(1.0, 0.0))
    present = arguments.get(new)
    if isinstance(present, Mapping) and all(present.get(key, v) == v for key, v in new_value.items()):
        new_value, present = {**present, **new_value}, None
    hidden = new == "hub_token"
    before, after = (name, new) if hidden else (f"{name}={value!r}", f"{new}={new_value!r}")
    # None, and warmup_steps=0 beside a ratio, mean "not set".
    is_set = present is not None and not (present == 0 and present is not False)
    if is_set and present != new_value:
        raise ValueError(
            f"TrainingArguments: {before} and {new}={'...' if hidden else repr(present)} contradict each other; "
            f"give only {new}"
        )
    arguments[new] = new_value
    issue_notice(f"{before} is now {after}")


def _use_cpu_for_bf16(keywords: dict[str, Any]) -> None:
    """Set `use_cpu` for bf16 without a GPU, because transformers would otherwise raise an error."""
    bf16_names = [name for name in ("bf16", "bf16_full_eval") if keywords.get(name)]
    has_gpu = torch.accelerator.is_available() or is_torch_bf16_gpu_available() or is_torch_xla_available()
    if bf16_names and not keywords.get("use_cpu") and not has_gpu:
        keywords["use_cpu"] = True
        issue_notice(f"{bf16_names[0]}=True: no GPU found, so use_cpu=True was set and the CPU computes in bf16")
