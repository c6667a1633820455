"""The classic script with one changed line: `from fulltune import Trainer, TrainingArguments`.

Scripts written for transformers 3 and 4 run on transformers 5: names that were dropped are understood, each with one
notice, and the guards of a fulltune run watch the training. The rest is Hugging Face's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import logging
import math
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow.compute
import torch
import transformers
from accelerate.utils import send_to_device
from safetensors import SafetensorError
from transformers.utils.import_utils import is_torch_bf16_gpu_available, is_torch_xla_available

from fulltune.errors import GuardStop
from fulltune.records import Moved
from fulltune.train.guards import nothing_learned
from fulltune.train.trainer import FiniteGuard
from fulltune.train.worker import InitialWeights

_log = logging.getLogger(__name__)


class FulltuneNotice(UserWarning):
    """Something in the script was read differently from how it was written; the text says how."""


def _notice(text: str) -> None:
    """Warn at the line of the user's script, so that Python shows it once for each line and text."""
    level, frame = 1, sys._getframe()
    while frame.f_back and str(frame.f_globals.get("__name__")).split(".")[0] in ("fulltune", "transformers"):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, FulltuneNotice, stacklevel=level)


# ---- Arguments ------------------------------------------------------------------------------------------------------


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
    "sharded_ddp": _Old(reason="FairScale is no longer supported; fsdp or deepspeed shard a model"),
    "tpu_num_cores": _Old(reason="the launcher sets it"),
    "use_ipex": _Old(reason="Intel's extension is no longer used; PyTorch has most of it"),
    "use_legacy_prediction_loop": _Old(reason="there is only one prediction loop"),
    "use_mps_device": _Old(reason="Apple's GPU is used whenever there is one; use_cpu=True avoids it"),
}
_ALIASES_OF_TODAY = ("gradient_checkpointing", "gradient_checkpointing_kwargs")


@dataclasses.dataclass(init=False, repr=False, eq=False)
class TrainingArguments(transformers.TrainingArguments):
    """`transformers.TrainingArguments` that understands the names of transformers 3 and 4.

    Args:
        output_dir: Where checkpoints go.
        **keywords: Names of today or of before (`OLD_NAMES`); each one of before gives a `FulltuneNotice`.

    Raises:
        TypeError: An unknown name.
        ValueError: An old and a new name with different values, or a value that transformers refuses.
    """

    logging_nan_inf_filter: bool = dataclasses.field(
        default=False,
        # Theirs is True, which logs a loss of 0.0 while every weight is NaN.
        metadata={"help": "Replace a loss that is not a number by an earlier one in the logs, which hides it."},
    )

    def __init__(self, output_dir: str | None = None, **keywords: Any) -> None:
        keywords = _names_of_today({"output_dir": output_dir, **keywords})
        _stay_trainable_without_gpu(keywords)
        keywords.setdefault("logging_nan_inf_filter", False)
        super().__init__(**keywords)
        if self.fp16 and self.device.type == "cpu":
            _notice("fp16=True: there is no GPU here, so training computes in fp32 (as transformers does, silently)")


def _names_of_today(given: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(transformers.TrainingArguments) if field.init}
    result = {name: value for name, value in given.items() if name in known and name not in OLD_NAMES}
    for name in given:
        if name not in known and name not in OLD_NAMES:
            near = difflib.get_close_matches(name, [*known, *OLD_NAMES], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"TrainingArguments: unknown argument {name!r}{hint}")
    old = {name: value for name, value in given.items() if name in OLD_NAMES and value is not None}
    _join_organization(old, given)
    _use_logging_dir(old, given)
    for name, value in old.items():
        _translate(name, value, result)
    if str(getattr(result.get("optim"), "value", result.get("optim"))) in ("adamw_hf", "adamw_apex_fused"):
        _notice(f"optim={result['optim']!r} is gone; 'adamw_torch' is used, PyTorch's own AdamW")
        result["optim"] = "adamw_torch"
    return result


def _translate(name: str, value: Any, result: dict[str, Any]) -> None:
    """Put the new name of an old one into `result`."""
    new, turn, reason = OLD_NAMES[name]
    if not new:
        _notice(f"{name} is ignored: {reason}")
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
    _notice(f"{before} is now {after}")


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
        _notice("logging_dir is now the environment variable TENSORBOARD_LOGGING_DIR, which was set")


def _stay_trainable_without_gpu(keywords: dict[str, Any]) -> None:
    """bf16 on a machine without a GPU: transformers refuses it unless `use_cpu` is set."""
    wanted = [name for name in ("bf16", "bf16_full_eval") if keywords.get(name)]
    has_gpu = torch.accelerator.is_available() or is_torch_bf16_gpu_available() or is_torch_xla_available()
    if wanted and not keywords.get("use_cpu") and not has_gpu:
        keywords["use_cpu"] = True
        _notice(f"{wanted[0]}=True: there is no GPU here; use_cpu=True was set, and the CPU computes in bf16")


# ---- Trainer --------------------------------------------------------------------------------------------------------


class Trainer(FiniteGuard, transformers.Trainer):
    """`transformers.Trainer` for scripts of transformers 3 and 4, with fulltune's guards.

    A loss or gradient that is not finite stops the run before the update. One step at the longest length runs before
    training, without changing its result, unless `dry_run` is set to False. After training it is counted how many
    values moved: see `moved`.

    Args:
        *positional: As for `transformers.Trainer`.
        tokenizer: The name of `processing_class` before 4.46.
        **keywords: As for `transformers.Trainer`.

    Raises:
        ValueError: `tokenizer` and `processing_class` are given and differ.
    """

    dry_run: bool = True
    moved: Moved | None = None

    _initial: InitialWeights | None = None
    _first_step: int = 0
    _loss_scaling_known: bool = False
    _loss_is_mean: bool = False

    def __init__(self, *positional: Any, tokenizer: Any = None, **keywords: Any) -> None:
        if tokenizer is not None:
            if keywords.get("processing_class", tokenizer) is not tokenizer:
                raise ValueError("Trainer: tokenizer and processing_class are two names of one thing; give one of them")
            keywords["processing_class"] = tokenizer
            _notice("Trainer(tokenizer=...) is now processing_class=...")
        super().__init__(*positional, **keywords)
        self._accept_old_overrides()
        _set_pad_token_id(self.model, self.processing_class)
        self.add_callback(_BeforeFirstStep(self))

    @property
    def tokenizer(self) -> Any:
        """The name of `processing_class` before 4.46."""
        return self.processing_class

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self.processing_class = value

    def call_model_init(self, trial: Any = None) -> Any:
        model = super().call_model_init(trial)
        _set_pad_token_id(model, getattr(self, "processing_class", None))
        return model

    def train(self, *positional: Any, **keywords: Any) -> Any:
        """Train as transformers does, then count what moved.

        Raises:
            GuardStop: The loss or a gradient is not finite, or nothing moved.
        """
        if "model_path" in keywords:
            keywords["resume_from_checkpoint"] = keywords.pop("model_path")
            _notice("train(model_path=...) is now resume_from_checkpoint=...")
        self.moved, self.tensors_with_gradient = None, frozenset()
        try:
            result = super().train(*positional, **keywords)
            self._count_moved()
        finally:
            if self._initial is not None:
                self._initial.delete()
                self._initial = None
        return result

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if num_items_in_batch is not None and not self._loss_scaling_known:
            self._find_loss_scaling(model, inputs, num_items_in_batch)
        return super().training_step(model, inputs, None if self._loss_is_mean else num_items_in_batch)

    def predict(self, *positional: Any, **keywords: Any) -> Any:
        """Predict in the order of the rows: `group_by_length` would sort them (transformers 4.46 to 5.24, not 4.30)."""
        strategy, self.args.train_sampling_strategy = self.args.train_sampling_strategy, "random"
        try:
            return super().predict(*positional, **keywords)
        finally:
            self.args.train_sampling_strategy = strategy

    def _accept_old_overrides(self) -> None:
        """Let subclasses keep the signatures of before 4.46, which lack an argument that is passed today."""
        for name, argument in (
            ("compute_loss", "num_items_in_batch"),
            ("training_step", "num_items_in_batch"),
            ("log", "start_time"),
        ):
            method = getattr(self, name)
            parameters = inspect.signature(method).parameters
            if argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                continue
            setattr(self, name, _without_argument(method, argument))
            _log.info("%s.%s has the signature of before transformers 4.46", type(self).__name__, name)

    def _treat_loss_as_mean(self) -> None:
        """The loss is the mean of a micro batch: divide it by the accumulation steps, do not scale it by devices."""
        self._loss_scaling_known = self._loss_is_mean = True
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False

    def _find_loss_scaling(self, model: Any, inputs: Any, num_items_in_batch: Any) -> None:
        """Find out whether the loss is divided by `num_items_in_batch`: twice as many items should halve it.

        transformers 5.24 believes so of every model whose `forward` takes `**kwargs`, and of every `compute_loss`. But
        BERT's, GPT-2's and most other models' sequence classification returns a plain mean. With gradient accumulation
        the gradient is then too large by the number of accumulation steps, with several processes by their number.
        Delete this when transformers finds out by itself.
        """
        self._loss_scaling_known = True
        accumulates = self.args.gradient_accumulation_steps > 1 or self.accelerator.num_processes > 1
        if not accumulates or self.loss_is_scaled_for_ga is not None or self.args.parallelism_config is not None:
            return
        inputs = send_to_device(inputs, self.args.device)
        model.eval()
        losses = []
        for factor in (1, 2):
            with _same_randomness(), torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, _copy(inputs), num_items_in_batch=num_items_in_batch * factor)
            losses.append(loss.detach().float().mean())  # type: ignore[union-attr]
        # Added up over processes, so that all decide the same.
        once, twice = self.accelerator.reduce(torch.stack(losses), reduction="sum").tolist()
        if once == 0:
            self._loss_scaling_known = False
        elif math.isclose(once, twice, rel_tol=1e-2):
            _log.info("the loss is a mean over each micro batch: it is divided by the gradient accumulation steps")
            self._treat_loss_as_mean()

    def _is_sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled or self.is_distributed_loading_by_transformers)

    def before_first_step(self) -> None:
        """Keep the weights on disk for the count of what moved, and run the dry-run step."""
        if self._is_sharded():
            _log.info("the model is sharded: no dry-run step, and what moved is not counted")
            return
        if self._initial is None:
            self._first_step = self.state.global_step
            self._keep_initial_weights()
        if self.dry_run:
            _dry_run(self)

    def _keep_initial_weights(self) -> None:
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # A name that starts with an underscore is left out when the folder is pushed to the Hub.
            handle, name = tempfile.mkstemp(prefix="_fulltune-initial-", suffix=".safetensors", dir=folder)
            os.close(handle)
        except OSError as error:
            _notice(f"what training moves will not be counted: {folder} cannot be written to ({error.strerror})")
            return
        try:
            self._initial = InitialWeights(_Trainable(self.model), Path(name))
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            Path(name).unlink(missing_ok=True)
            _notice(f"what training moves will not be counted: the weights could not be kept in {folder} ({error})")

    def _count_moved(self) -> None:
        if self._initial is None or self.state.global_step <= self._first_step:
            return
        # A wrapper (DDP, torch.compile) puts its own prefix before the names.
        names = {name.removeprefix("_orig_mod.").removeprefix("module.") for name in self.tensors_with_gradient}
        self.moved = self._initial.moved(_Trainable(self.model), self.optimizer, frozenset(names))
        verdict = nothing_learned(self.moved)
        if verdict.action == "stop":
            raise GuardStop(verdict.reason)
        share = f"{self.moved.share:.1%} of the {self.moved.num_values_with_gradient:,} values that got a gradient"
        _log.info("%s moved", share)
        if self.moved.share < 0.5:
            kinds = sorted(
                {
                    str(parameter.dtype).removeprefix("torch.")
                    for _, parameter in _Trainable(self.model).named_parameters()
                }
            )
            _notice(
                f"only {share} moved ({', '.join(kinds)} weights): the updates are too small for the weights' type; "
                "load the model with dtype=torch.float32 or raise learning_rate"
            )


class _BeforeFirstStep(transformers.TrainerCallback):
    """The event before step 1: the model is wrapped, a checkpoint loaded, the optimizer there."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._trainer.before_first_step()


class _Trainable:
    """The parameters of a model that training may change; frozen ones need no copy."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        return ((name, value) for name, value in self._model.named_parameters() if value.requires_grad)


def _set_pad_token_id(model: Any, tokenizer: Any) -> None:
    """A decoder classifies by its last token that is no padding, so it must know the padding token."""
    pad = getattr(getattr(tokenizer, "tokenizer", tokenizer), "pad_token_id", None)
    config = getattr(model, "config", None)
    if pad is None or config is None:
        return
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for part in (config, text):
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = pad
            _log.info("%s: pad_token_id set to %d, from the tokenizer", type(part).__name__, pad)


def _without_argument(method: Callable[..., Any], argument: str) -> Callable[..., Any]:
    """Call `method` without an argument that it does not know, wherever it stands."""
    parameters = inspect.signature(method).parameters.values()
    limit = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)

    @functools.wraps(method)
    def adapted(*positional: Any, **keywords: Any) -> Any:
        keywords.pop(argument, None)
        return method(*positional[:limit], **keywords)

    return adapted


# ---- Dry-run step ---------------------------------------------------------------------------------------------------


NUM_MEASURED_ROWS = 2000
"""Rows of a dataset without columns whose length is looked up; such a dataset may tokenise on the fly."""


def _dry_run(trainer: Any) -> None:
    """One step at the longest length, with a learning rate of 0: what does not fit fails now, not in an hour.

    Random numbers, buffers and the optimizer are put back. A collator or dataset with a random generator of its own
    does draw from it.

    Raises:
        GuardStop: The loss is not finite.
    """
    rows = _rows_for_dry_run(trainer)
    if not rows:
        return
    model = trainer.model_wrapped if trainer.args.n_gpu > 1 else trainer.model
    buffers = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    was_training, size = model.training, f"{len(rows)} rows"
    try:
        with _same_randomness():
            collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
            batch = collate([trainer.train_dataset[i] for i in rows])
            size += _length_of(batch)
            loss = _forward_and_backward(trainer, model, batch)
            _step_without_rate(trainer)
    except (RuntimeError, MemoryError) as error:
        error.add_note(f"fulltune: this was the dry-run step before training, on the longest batch ({size})")
        raise
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        for name, buffer in trainer.model.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
    if not math.isfinite(loss):
        raise GuardStop(f"dry-run step: the loss is {loss} on the longest batch ({size}), before any update")
    _log.info("dry-run step passed: %s, loss %.4g", size, loss)


def _rows_for_dry_run(trainer: Any) -> list[int]:
    """The longest rows of a micro batch; none, with a notice, when that cannot be known."""
    dataset = trainer.train_dataset
    if type(trainer).get_train_dataloader is not transformers.Trainer.get_train_dataloader:
        _notice("no dry-run step before training: the script makes the batches itself (get_train_dataloader)")
        return []
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        _notice("no dry-run step before training: the length of the train dataset is not known")
        return []
    names = getattr(trainer.processing_class, "model_input_names", None) or ["input_ids"]
    with _same_randomness():
        return _longest(dataset, trainer._train_batch_size, names[0], trainer.args.length_column_name)


def _longest(dataset: Any, how_many: int, name: str, length_name: str) -> list[int]:
    """Positions of the longest rows; the first ones when rows have no length.

    Args:
        dataset: Rows by number.
        how_many: Rows wanted.
        name: The column whose length counts.
        length_name: The column that holds lengths, if there is one.
    """
    columns = getattr(dataset, "column_names", None) or ()
    positions: Sequence[int] = range(len(dataset))
    if length_name in columns:
        lengths = list(dataset[length_name])
    elif (counted := _column_lengths(dataset, name)) is not None:
        lengths = counted
    else:
        positions = _spread(len(dataset), NUM_MEASURED_ROWS)
        if positions and _row_length(dataset[positions[0]], name) is None:
            return list(range(min(how_many, len(dataset))))
        lengths = [_row_length(dataset[i], name) or 0 for i in positions]
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")[:how_many]
    return [int(positions[i]) for i in order]


def _column_lengths(dataset: Any, name: str) -> list[int] | None:
    """Lengths of a column of lists in a `datasets.Dataset`, without reading values; None for other data."""
    if not isinstance(dataset, datasets.Dataset) or name not in dataset.column_names:
        return None
    if dataset.format["type"] == "custom" or not hasattr(dataset.features[name], "feature"):
        return None
    tables = dataset.select_columns([name]).with_format("arrow").iter(10_000)
    return [length or 0 for table in tables for length in pyarrow.compute.list_value_length(table[name]).to_pylist()]


def _spread(total: int, limit: int) -> list[int]:
    """At most `limit` numbers below `total`, evenly spaced."""
    if total <= limit:
        return list(range(total))
    return [index * total // limit for index in range(limit)]


def _row_length(row: Any, name: str) -> int | None:
    value = row.get(name) if isinstance(row, Mapping) else None
    try:
        return None if value is None else len(value)
    except TypeError:
        return None


def _length_of(batch: Any) -> str:
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return f" of {tokens.shape[1]} tokens" if torch.is_tensor(tokens) and tokens.ndim > 1 else ""


def _forward_and_backward(trainer: Any, model: Any, batch: Any) -> float:
    _, num_items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    inputs = send_to_device(_copy(batch), trainer.args.device)
    model.train()
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=num_items).mean()
    loss.backward()
    return float(loss.detach())


def _step_without_rate(trainer: Any) -> None:
    """Let the optimizer allocate its state, with a rate of 0, and forget it again.

    Only for optimizers that do nothing at a rate of 0, and not when a checkpoint has filled their state already.
    """
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD) or optimizer.state:
        return
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        return  # 0 times infinity is not a number; the guard stops it at step 1
    kept = [(group["lr"], group.get("weight_decay")) for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            group.update(lr=0.0, weight_decay=0.0)
        # Not `optimizer.step`: on the object it is patched by scheduler and scaler, which count the calls.
        type(optimizer).step(optimizer)
    finally:
        for group, (rate, decay) in zip(optimizer.param_groups, kept, strict=True):
            group.update(lr=rate, weight_decay=decay)
        optimizer.state.clear()


def _copy(inputs: Any) -> Any:
    """A shallow copy: `compute_loss` may take the labels out."""
    return dict(inputs) if isinstance(inputs, Mapping) else inputs


@contextlib.contextmanager
def _same_randomness() -> Iterator[None]:
    """Put back the state of all random generators, as if nothing had been drawn."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
