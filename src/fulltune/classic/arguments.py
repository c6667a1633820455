"""Names of `TrainingArguments` from transformers 3 and 4, understood by transformers 5, each with one notice."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import transformers
from transformers.utils.import_utils import is_torch_bf16_gpu_available, is_torch_xla_available

from fulltune.text import did_you_mean


class FulltuneNotice(UserWarning):
    """Something in the script was read differently from how it was written; the text says how."""


_NOT_THE_SCRIPT = ("fulltune", "transformers", "accelerate", "torch", "trl")


def notice(text: str) -> None:
    """Warn at the line of the user's script, so that Python shows it once for each line and text."""
    level, frame = 1, sys._getframe()
    while frame.f_back and str(frame.f_globals.get("__name__")).split(".")[0] in _NOT_THE_SCRIPT:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, FulltuneNotice, stacklevel=level)


_Function = TypeVar("_Function", bound=Callable[..., Any])
_NOTHING = object()
"""What a transform returns when the old value asked for nothing, such as `group_by_length=False`."""


class _Old(NamedTuple):
    """A name of transformers 3 or 4."""

    new: str = ""
    """The name of today; empty when the old one is ignored."""
    turn: Callable[[Any], Any] = lambda value: value
    """Old value to new value."""
    reason: str = ""
    """Why it is ignored."""


def _if_true(value: Any) -> Callable[[Any], Any]:
    return lambda old: value if old else _NOTHING


def _key(name: str) -> Callable[[Any], Any]:
    return lambda old: {name: old} if old is not None and old != 0 else _NOTHING


def _ratio(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"TrainingArguments: warmup_ratio: {value} is not between 0 and 1")
    # Exactly 1 would be one step; just below it is the share of all steps that was meant.
    return min(float(value), math.nextafter(1.0, 0.0))


# Every field of the TrainingArguments of 3.5, 4.0, 4.18, 4.30, 4.46 and 4.57 that transformers 5.24 does not have, and
# the two that it has as deprecated aliases.
OLD_NAMES: dict[str, _Old] = {
    "adafactor": _Old("optim", _if_true("adafactor")),
    "dispatch_batches": _Old("accelerator_config", lambda value: {"dispatch_batches": value}),
    "evaluate_during_training": _Old("eval_strategy", _if_true("steps")),
    "evaluation_strategy": _Old("eval_strategy"),
    "fsdp_min_num_params": _Old("fsdp_config", _key("min_num_params")),
    "fsdp_transformer_layer_cls_to_wrap": _Old("fsdp_config", _key("transformer_layer_cls_to_wrap")),
    "gradient_checkpointing": _Old("activation_checkpointing"),
    "gradient_checkpointing_kwargs": _Old("activation_checkpointing_kwargs"),
    "group_by_length": _Old("train_sampling_strategy", _if_true("group_by_length")),
    "include_inputs_for_metrics": _Old("include_for_metrics", _if_true(["inputs"])),
    "include_tokens_per_second": _Old("include_num_input_tokens_seen", _if_true("all")),
    "no_cuda": _Old("use_cpu"),
    "per_gpu_eval_batch_size": _Old("per_device_eval_batch_size"),
    "per_gpu_train_batch_size": _Old("per_device_train_batch_size"),
    "push_to_hub_model_id": _Old("hub_model_id"),
    "push_to_hub_token": _Old("hub_token"),
    "split_batches": _Old("accelerator_config", lambda value: {"split_batches": value}),
    "torchdynamo": _Old("torch_compile_backend"),
    "tpu_metrics_debug": _Old("debug", _if_true("tpu_metrics_debug")),
    "warmup_ratio": _Old("warmup_steps", _ratio),
    "xpu_backend": _Old("ddp_backend"),
    "fp16_backend": _Old(reason="mixed precision is always PyTorch's own"),
    "fp16_opt_level": _Old(reason="mixed precision is always PyTorch's own, no longer apex's"),
    "half_precision_backend": _Old(reason="mixed precision is always PyTorch's own"),
    "jit_mode_eval": _Old(reason="evaluation no longer traces the model; torch_compile=True compiles it"),
    "logging_dir": _Old(
        reason="logs for TensorBoard are written only with report_to='tensorboard' (this script does not ask for them)"
    ),
    "mp_parameters": _Old(reason="SageMaker's launcher sets it itself"),
    "overwrite_output_dir": _Old(
        reason="training always starts anew and writes into output_dir; continue with "
        "trainer.train(resume_from_checkpoint=True)"
    ),
    "past_index": _Old(reason="the state of one batch is no longer handed to the next"),
    "push_to_hub_organization": _Old(reason="hub_model_id names it already"),
    "ray_scope": _Old(reason="give scope= to the search itself"),
    "save_safetensors": _Old(reason="weights are always saved as safetensors"),
    "sharded_ddp": _Old(reason="FairScale is no longer supported; fsdp shards a model"),
    "tpu_num_cores": _Old(reason="the launcher sets it"),
    "use_ipex": _Old(reason="Intel's extension is no longer used; PyTorch has most of it"),
    "use_legacy_prediction_loop": _Old(reason="there is only one prediction loop"),
    "use_mps_device": _Old(reason="Apple's GPU is used whenever there is one; use_cpu=True avoids it"),
}
_ALIASES_OF_TODAY = ("gradient_checkpointing", "gradient_checkpointing_kwargs")


def signed(signature: inspect.Signature) -> Callable[[_Function], _Function]:
    """Show this signature to `inspect` and to editors: the function itself takes more than transformers' does."""

    def sign(function: _Function) -> _Function:
        function.__signature__ = signature  # type: ignore[attr-defined]  # what inspect looks for (PEP 362)
        return function

    return sign


_THEIRS = inspect.signature(transformers.TrainingArguments.__init__)
_FILTER = _THEIRS.parameters["logging_nan_inf_filter"].replace(default=False)


def _named(positional: Sequence[Any], keywords: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """All arguments by name; the first ones may be given without theirs, as transformers allows it."""
    if len(positional) > len(names):
        raise TypeError(f"TrainingArguments: {len(positional)} arguments without a name, expected at most {len(names)}")
    given = dict(zip(names, positional, strict=False))
    for name in given.keys() & keywords.keys():
        raise TypeError(f"TrainingArguments: {name} is given twice, by its place and by its name")
    return {"output_dir": None, **given, **keywords}


@dataclasses.dataclass(init=False, repr=False, eq=False)
class OldNames:
    """Mixin before arguments of transformers or TRL: they understand the names of transformers 3 and 4.

    Args:
        *positional: As for the class beside it.
        **keywords: Names of today or of before (`OLD_NAMES`); each one of before gives a `FulltuneNotice`.

    Raises:
        TypeError: An unknown name, one that is given twice, or too many without a name.
        ValueError: An old and a new name with different values, or a value that transformers refuses.
    """

    logging_nan_inf_filter: bool = dataclasses.field(
        default=False,
        # Theirs is True, which logs a loss of 0.0 while every weight is NaN.
        metadata={"help": "Replace a loss that is not a number by an earlier one in the logs, which hides it."},
    )

    @signed(_THEIRS.replace(parameters=[*{**_THEIRS.parameters, _FILTER.name: _FILTER}.values()]))
    def __init__(self, *positional: Any, **keywords: Any) -> None:
        known = [field.name for field in dataclasses.fields(self) if field.init]
        keywords = _names_of_today(_named(positional, keywords, known), known)
        if keywords.get("logging_nan_inf_filter"):
            notice(
                "logging_nan_inf_filter=True has no effect with fulltune's Trainer: a loss that is not finite stops "
                "the run before the update, so there is none to leave out of the logs"
            )
        _stay_trainable_without_gpu(keywords)
        if not torch.accelerator.is_available():
            keywords["dataloader_pin_memory"] = False  # it has no effect, and torch warns at each loader
        keywords.setdefault("logging_nan_inf_filter", False)
        super().__init__(**keywords)  # type: ignore[call-arg]  # those of the class beside
        if self.fp16 and self.device.type == "cpu":  # type: ignore[attr-defined]  # of the class beside
            notice("fp16=True: there is no GPU here, so training computes in fp32 (as transformers does, silently)")


@dataclasses.dataclass(init=False, repr=False, eq=False)
class TrainingArguments(OldNames, transformers.TrainingArguments):
    """`transformers.TrainingArguments` with `OldNames`."""


@dataclasses.dataclass(init=False, repr=False, eq=False)
class Seq2SeqTrainingArguments(OldNames, transformers.Seq2SeqTrainingArguments):
    """`transformers.Seq2SeqTrainingArguments` with `OldNames`."""


def _names_of_today(given: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    result = {name: value for name, value in given.items() if name in known and name not in OLD_NAMES}
    for name in given:
        if name not in known and name not in OLD_NAMES:
            hint = did_you_mean(name, [*known, *OLD_NAMES])
            raise TypeError(f"TrainingArguments: unknown argument {name!r}" + (f"; {hint}" if hint else ""))
    old = {name: value for name, value in given.items() if name in OLD_NAMES and value is not None}
    _join_organization(old, given)
    _use_logging_dir(old, given)
    for name, value in old.items():
        _translate(name, value, result)
    if str(getattr(result.get("optim"), "value", result.get("optim"))) in ("adamw_hf", "adamw_apex_fused"):
        notice(f"optim={result['optim']!r} is gone; 'adamw_torch' is used, PyTorch's own AdamW")
        result["optim"] = "adamw_torch"
    return result


def _translate(name: str, value: Any, result: dict[str, Any]) -> None:
    """Put the new name of an old one into `result`."""
    new, turn, reason = OLD_NAMES[name]
    if not new:
        notice(f"{name} is ignored: {reason}")
        return
    present = result.get(new)
    # A copy of the arguments (`dataclasses.replace`) gives both; there the new name wins, as in transformers.
    if name in _ALIASES_OF_TODAY and present is not None:
        return
    turned = turn(value)
    if turned is _NOTHING:
        return
    if isinstance(present, Mapping) and all(present.get(key, v) == v for key, v in turned.items()):
        turned, present = {**present, **turned}, None
    hidden = new == "hub_token"
    before, after = (name, new) if hidden else (f"{name}={value!r}", f"{new}={turned!r}")
    # None, and warmup_steps=0 beside a ratio, mean "not set".
    is_set = present is not None and not (present == 0 and present is not False)
    if is_set and present != turned:
        raise ValueError(
            f"TrainingArguments: {before} and {new}={'...' if hidden else repr(present)} contradict each other; "
            f"give {new} only"
        )
    result[new] = turned
    notice(f"{before} is now {after}")


def _join_organization(old: dict[str, Any], given: Mapping[str, Any]) -> None:
    """`push_to_hub_organization` was the first half of what is now one name."""
    name = old.get("push_to_hub_model_id") or Path(str(given.get("output_dir"))).name
    if "push_to_hub_organization" in old and "hub_model_id" not in given:
        old["push_to_hub_model_id"] = f"{old.pop('push_to_hub_organization')}/{name}"


def _use_logging_dir(old: dict[str, Any], given: Mapping[str, Any]) -> None:
    """TensorBoard's folder is now set by an environment variable."""
    targets = given.get("report_to")
    targets = [targets] if isinstance(targets, str) else targets or []
    if "logging_dir" in old and {"tensorboard", "all"} & set(targets):
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(old.pop("logging_dir"))
        notice("logging_dir is now the environment variable TENSORBOARD_LOGGING_DIR, which was set")


def _stay_trainable_without_gpu(keywords: dict[str, Any]) -> None:
    """bf16 on a machine without a GPU: transformers refuses it unless `use_cpu` is set."""
    wanted = [name for name in ("bf16", "bf16_full_eval") if keywords.get(name)]
    has_gpu = torch.accelerator.is_available() or is_torch_bf16_gpu_available() or is_torch_xla_available()
    if wanted and not keywords.get("use_cpu") and not has_gpu:
        keywords["use_cpu"] = True
        notice(f"{wanted[0]}=True: there is no GPU here; use_cpu=True was set, and the CPU computes in bf16")
