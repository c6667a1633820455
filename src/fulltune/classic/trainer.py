from __future__ import annotations

import functools
import inspect
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate.utils import send_to_device
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.data.data_collator import DataCollator
from transformers.trainer_utils import PredictionOutput, TrainOutput

from fulltune import methods
from fulltune.classic.arguments import issue_notice
from fulltune.classic.dry_run import dry_run, shallow_copy
from fulltune.classic.padding import with_padding
from fulltune.errors import GuardStop
from fulltune.records.training import ParameterChanges
from fulltune.stats.curves import check_divergence, judge_final_loss
from fulltune.system.hardware import busy_warning, machine_load
from fulltune.train.loop.callbacks import logged
from fulltune.train.loop.guarded_step import Guarded
from fulltune.train.loop.step_guard import StepVerdict, judge_parameter_changes
from fulltune.train.worker.dry_run import restored_random_state
from fulltune.train.worker.weights import InitialWeights, initial_weights_file

_log = logging.getLogger(__name__)


class Trainer(Guarded, transformers.Trainer):
    """`transformers.Trainer` for scripts of transformers 3 and 4, with fulltune's guards.

    A step with a non-finite loss or gradient is skipped with a `FulltuneNotice`; three in a row stop the run. A
    diverging loss causes a notice, unless the script computes its own loss. Before training, one step at the longest
    length runs unless `dry_run` is False. After training, `moved` counts the changed parameter values.
    """

    dry_run: bool = True
    skips = False
    moved: ParameterChanges | None = None

    _initial: InitialWeights | None = None
    _first_step: int = 0
    _ignores_divergence: bool = False
    _untrained_loss: float | None = None
    _loss_scaling_known: bool = False
    _loss_is_mean: bool = False

    def __init__(self, *positional: Any, tokenizer: PreTrainedTokenizerBase | None = None, **keywords: Any) -> None:
        """Create the trainer; `tokenizer` is the old name of `processing_class`."""
        if tokenizer is not None:
            if keywords.get("processing_class", tokenizer) is not tokenizer:
                raise ValueError("Trainer: tokenizer and processing_class are the same argument; give only one")
            keywords["processing_class"] = tokenizer
            issue_notice("Trainer(tokenizer=...) is now processing_class=...")
        super().__init__(*positional, **keywords)
        self._accept_old_overrides()
        self.data_collator = with_padding(self.model, self.processing_class, self.data_collator)
        self.add_callback(_GuardCallback(self))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self.processing_class  # type: ignore[return-value]  # for other processors it has the wrong name

    @tokenizer.setter
    def tokenizer(self, value: PreTrainedTokenizerBase | None) -> None:
        self.processing_class = value

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Create a model with the script's `model_init`, and set a padding token if it has none."""
        model = super().call_model_init(trial)
        collate = cast("DataCollator", getattr(self, "data_collator", None))
        with_padding(model, getattr(self, "processing_class", None), collate)
        return model

    def train(self, *positional: object, **keywords: object) -> TrainOutput:
        """Train, warn if the final loss is high, and count the changed parameter values in `moved`.

        Raises:
            GuardStop: Several steps were non-finite, or no parameter value changed.
        """
        if "model_path" in keywords:
            keywords["resume_from_checkpoint"] = keywords.pop("model_path")
            issue_notice("train(model_path=...) is now resume_from_checkpoint=...")
        self.moved, self.tensors_with_gradient, self.largest_grad_norm = None, frozenset(), None
        self._untrained_loss = None
        if self.args.device.type == "cpu" and torch.get_num_threads() > 1 and (busy := busy_warning(*machine_load())):
            issue_notice(busy)
        # A script's own loss may rise for good reason.
        self._ignores_divergence = (
            self.compute_loss_func is not None or type(self).compute_loss is not Trainer.compute_loss
        )
        try:
            result = super().train(*positional, **keywords)
            self._warn_if_final_loss_high()
            self._check_changed_values()
        finally:
            if self._initial is not None:
                self._initial.path.unlink(missing_ok=True)
                self._initial = None
        return result

    def on_skip(self, step: int, verdict: StepVerdict) -> None:
        issue_notice(f"the update of step {step} is skipped: {verdict.reason}")

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Compute a micro batch's gradients, with the right scale for models whose loss is a mean."""
        if num_items_in_batch is not None and not self._loss_scaling_known:
            self._detect_mean_loss(model, inputs, num_items_in_batch)
        return super().training_step(model, inputs, None if self._loss_is_mean else num_items_in_batch)

    def predict(self, *positional: Any, **keywords: Any) -> PredictionOutput:
        """Predict in row order, which `group_by_length` would otherwise change (transformers 4.46 to 5.24)."""
        strategy, self.args.train_sampling_strategy = self.args.train_sampling_strategy, "random"
        try:
            return super().predict(*positional, **keywords)
        finally:
            self.args.train_sampling_strategy = strategy

    def _accept_old_overrides(self) -> None:
        """Let a script override methods with signatures from before transformers 4.46, which lack an argument."""
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
            _log.info("%s.%s has a signature from before transformers 4.46", type(self).__name__, name)

    def _detect_mean_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int
    ) -> None:
        """Set `_loss_is_mean` if doubling `num_items_in_batch` does not halve the loss.

        transformers 5.24 makes such models' gradients too large by the number of accumulation steps and processes.
        Delete this method once transformers has fixed that.
        """
        self._loss_scaling_known = True
        accumulates = self.args.gradient_accumulation_steps > 1 or self.accelerator.num_processes > 1
        if not accumulates or self.loss_is_scaled_for_ga is not None or self.args.parallelism_config is not None:
            return
        inputs = send_to_device(inputs, self.args.device)
        model.eval()
        losses = []
        for factor in (1, 2):
            with restored_random_state(), torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, shallow_copy(inputs), num_items_in_batch=num_items_in_batch * factor)
            losses.append(loss.detach().float().mean())  # a tensor, as no outputs are requested
        # Summed over processes, so that all make the same decision.
        once, twice = self.accelerator.reduce(torch.stack(losses), reduction="sum").tolist()
        if once == 0:
            self._loss_scaling_known = False
        elif math.isclose(once, twice, rel_tol=1e-2):
            _log.info("the loss is a mean over each micro batch, so it is divided by the gradient accumulation steps")
            self._loss_is_mean = True
            self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = False

    def before_first_step(self) -> None:
        """Save the initial weights and run the dry-run step, unless the model is sharded."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.is_distributed_loading_by_transformers:
            _log.info("the model is sharded, so there is no dry-run step and changed values are not counted")
            return
        if self._initial is None:
            self._first_step = self.state.global_step
            self._save_initial_weights()
        if self.dry_run:
            loss = dry_run(self)
            self._untrained_loss = loss if self._first_step == 0 else None

    def warn_if_diverged(self) -> None:
        """Warn once if the logged loss has diverged."""
        if self._ignores_divergence:
            return
        losses = logged(self.state, "loss")
        if self._first_step == 0 and self.first_loss is not None:
            losses.insert(0, self.first_loss)
        decision = check_divergence(losses, self.args.learning_rate, self._untrained_loss)
        if decision.action == "stop":
            self._ignores_divergence = True
            issue_notice(decision.reason)

    def _warn_if_final_loss_high(self) -> None:
        # The last steps are used because a script may log none of them. After resuming, nothing is judged.
        if self._ignores_divergence or self.first_loss is None or self._first_step > 0:
            return
        losses = (self.first_loss, *self.last_losses[-(self.state.global_step - 1) :])
        eval_losses = logged(self.state, "eval_loss")
        decision = judge_final_loss(losses, eval_losses, self.args.learning_rate, self._untrained_loss)
        if decision.action != "go on":
            issue_notice(decision.reason)

    def _save_initial_weights(self) -> None:
        """Save the weights on rank 0 to count changed values later, or warn if saving fails."""
        if not self.is_world_process_zero():
            return
        folder, path = Path(str(self.args.output_dir)), None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # The Hub's upload ignores names that start with an underscore.
            path = initial_weights_file(folder, "_fulltune-initial-")
            self._initial = InitialWeights(self.model, path)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            if path is not None:
                path.unlink(missing_ok=True)
            issue_notice(f"changed values will not be counted: the weights could not be saved in {folder} ({error})")

    def _check_changed_values(self) -> None:
        """Count the values that training changed; raise `GuardStop` if none changed, and warn if few did."""
        if self._initial is None or self.state.global_step <= self._first_step:
            return
        # DDP and torch.compile put prefixes before the names.
        names = {name.removeprefix("_orig_mod.").removeprefix("module.") for name in self.tensors_with_gradient}
        self.moved = self._initial.count_changes(self.model, self.optimizer, frozenset(names))
        if self.state.global_step == self._first_step + 1 and self.args.learning_rate > 0:
            return  # the schedule's rate may be 0 in a single step
        decision = judge_parameter_changes(self.moved, bool(names), self.largest_grad_norm)
        if decision.action == "stop" and self._first_step > 0:
            issue_notice(f"since the checkpoint at step {self._first_step}: {decision.reason}")
            return
        if decision.action == "stop":
            raise GuardStop(decision.reason)
        share = f"{self.moved.share:.1%} of the {self.moved.num_values_with_gradient:,} values that received a gradient"
        _log.info("%s changed", share)
        if self.moved.share < 0.5:
            dtypes = sorted(
                {str(p.dtype).removeprefix("torch.") for p in methods.trainable_parameters(self.model).values()}
            )
            issue_notice(
                f"only {share} changed ({', '.join(dtypes)} weights), because the updates are too small for "
                "this dtype; load the model with dtype=torch.float32 or raise learning_rate"
            )


class Seq2SeqTrainer(Trainer, transformers.Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with fulltune's guards: see `Trainer`."""


class _GuardCallback(transformers.TrainerCallback):
    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: object, **__: object) -> None:
        # The model is wrapped, a checkpoint is loaded, and the optimizer exists.
        self._trainer.before_first_step()

    def on_log(self, *_: object, **__: object) -> None:
        self._trainer.warn_if_diverged()


def _without_argument(method: Callable[..., Any], argument: str) -> Callable[..., Any]:
    """Return a function that calls `method` without this argument, which callers may pass by name or last."""
    parameters = inspect.signature(method).parameters.values()
    limit = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)

    @functools.wraps(method)
    def adapted(*positional: object, **keywords: object) -> Any:
        keywords.pop(argument, None)
        return method(*positional[:limit], **keywords)

    return adapted
