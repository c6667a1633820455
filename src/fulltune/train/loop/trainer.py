"""Hugging Face's `Trainer` with our guard, our row order and our evaluation; everything else is theirs."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback

from fulltune.errors import Diverged
from fulltune.inference.selective_head import SelectiveHead
from fulltune.records.plan import Plan
from fulltune.tasks.causal_lm import IGNORED
from fulltune.train import checkpoints
from fulltune.train.loop.guards import WINDOW, Reading, not_finite
from fulltune.train.loop.sampler import GlobalBatchSampler
from fulltune.train.optim import optimizers
from fulltune.train.optim.in_backward import InBackward


class FiniteGuard:
    """Mixin for a `Trainer`: sees each loss and gradient norm and stops before a bad update.

    A callback could not do this: it sees the norm only after clipping and after the update. With several processes the
    loss is reduced over all of them once per optimizer step, so that all stop together; otherwise the healthy ones
    would wait for the broken one. DeepSpeed updates inside its backward pass: there each loss is judged before it, and
    a gradient norm that is not finite makes DeepSpeed itself leave the update out. With `InBackward` each loss is
    judged before it as well, and each gradient by its hook.
    """

    # What the `Trainer` beside this mixin has.
    accelerator: Any
    args: Any
    model: Any
    state: Any
    is_deepspeed_enabled: Any

    in_backward: InBackward | None = None
    """The optimizer, when it updates in the backward pass."""
    tokens_seen: torch.Tensor | int = 0
    tensors_with_gradient: frozenset[str] = frozenset()
    largest_grad_norm: float | None = None
    first_loss: float | None = None
    """Of the first step here, before its update."""
    last_losses: tuple[float, ...] = ()
    """Of the last `2 * WINDOW` steps."""

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        if "attention_mask" in inputs:
            self.tokens_seen = self.tokens_seen + inputs["attention_mask"].sum()
        elif "input_ids" in inputs:  # packed texts fill their rows
            self.tokens_seen = self.tokens_seen + inputs["input_ids"].numel()
        if "decoder_input_ids" in inputs:
            self.tokens_seen = self.tokens_seen + (inputs["labels"] != IGNORED).sum()
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]  # the Trainer's
        if self.is_deepspeed_enabled or self.in_backward is not None:
            return loss
        self._losses = getattr(self, "_losses", 0.0) + loss.detach().float()
        if self.accelerator.sync_gradients:
            losses, self._losses = self._losses, 0.0
            if self.accelerator.num_processes > 1:
                losses = self.accelerator.reduce(losses, reduction="sum")
            reading = Reading(self.state.global_step + 1, float(losses), None)
            self._judge(reading)
            seen = reading.loss / self.accelerator.num_processes  # as it is logged
            self.first_loss = seen if self.first_loss is None else self.first_loss
            self.last_losses = (*self.last_losses, seen)[-2 * WINDOW :]
        return loss

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **keywords: Any) -> Any:
        loss = super().compute_loss(model, inputs, *rest, **keywords)  # type: ignore[misc]  # the Trainer's
        if (self.is_deepspeed_enabled or self.in_backward is not None) and model.training:
            seen = self.accelerator.reduce(loss.detach().float(), reduction="sum")
            self._judge(Reading(self.state.global_step + 1, float(seen), None))
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self.in_backward is not None:
            # The gradients are gone; each was judged before its tensor was updated.
            self.tensors_with_gradient |= frozenset(self.in_backward.updated)
            return None
        # Runs at each optimizer step after clipping, with the norm before clipping (pinned by a contract test).
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]  # the Trainer's
        scaled = getattr(self.accelerator, "scaler", None) is not None
        if self.is_deepspeed_enabled:
            scaled = self.args.fp16
            if self.accelerator.optimizer_step_was_skipped:
                norm = float("nan")
            # It takes the gradients away after the update; the optimizer's second moments say which were there.
            self.tensors_with_gradient = frozenset(name for name, _ in self.model.named_parameters())
        if not self.tensors_with_gradient:
            self.tensors_with_gradient = frozenset(
                name
                # Not of `model`, which DDP wraps: its names would begin with `module.`.
                for name, parameter in self.model.named_parameters()
                if parameter.grad is not None
            )
        reading = Reading(self.state.global_step + 1, 0.0, None if norm is None else float(norm), scaled)
        self._judge(reading)
        if reading.grad_norm is not None and math.isfinite(reading.grad_norm):
            self.largest_grad_norm = max(self.largest_grad_norm or 0.0, reading.grad_norm)
        return norm

    def _judge(self, reading: Reading) -> None:
        verdict = not_finite(reading)
        if verdict.action == "stop":
            raise Diverged(verdict.reason)


class FullTrainer(FiniteGuard, Trainer):
    """The trainer of a run.

    Args:
        lengths: Tokens of each train row.
        global_batch_size: Rows per optimizer step.
        group_by_length: See `GlobalBatchSampler`.
        plan: Names the optimizer, how it rounds, and the factor of the learning rate from a layer to the one below.
        score: Gives the eval metrics of the current model, without a prefix.
        count_items: Items in the loss of a batch, from its labels: rows, or trained tokens.
        trained_only: Checkpoints hold what is trained; the rest stays as it was loaded.
        **keywords: As for `transformers.Trainer`.

    Attributes:
        head: Gives only the logits that the loss uses; None gives all.
    """

    head: SelectiveHead | None = None

    def __init__(
        self,
        *,
        lengths: Sequence[int],
        global_batch_size: int,
        group_by_length: bool,
        plan: Plan,
        score: Callable[[], Mapping[str, float]],
        count_items: Callable[[torch.Tensor], int],
        trained_only: bool = False,
        **keywords: Any,
    ) -> None:
        super().__init__(**keywords)
        self.sampler = GlobalBatchSampler(
            lengths,
            global_batch_size,
            self.args.per_device_train_batch_size,
            self.args.seed,
            group_by_length,
            self.args.world_size,
        )
        self._plan = plan
        self._score = score
        self.count_items = count_items
        self.trained_only = trained_only
        self.add_callback(_Epochs(self.sampler))

    def selecting(self, labels: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """Inside, the model gives only the logits that the loss uses, when it can: whole, or in pieces by the plan."""
        if self.head is None:
            return contextlib.nullcontext()
        return self.head.only(labels, in_pieces=self.head.in_pieces and self._plan.chunked_loss)

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **keywords: Any) -> Any:
        with self.selecting(inputs["labels"]):
            return super().compute_loss(model, inputs, *rest, **keywords)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # A figure for logs that we do not show; theirs walks through all modules at each micro batch.
        return 0

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.args.device.type != "cpu" or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super()._clip_grad_norm(model)
        # The same numbers as theirs, which multiplies all gradients by 1 when there is nothing to clip.
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if norm + 1e-6 > self.args.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        return norm

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader = DataLoader(
            cast("Dataset[Any]", self.train_dataset),
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            persistent_workers=self.args.dataloader_persistent_workers,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            in_order=self.args.dataloader_in_order,
        )
        return self.accelerator.prepare(loader)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        # Theirs counts every label that is not -100: each of a row's labels for multi_label, no number -100.0 for
        # regression.
        count = torch.tensor(sum(self.count_items(batch["labels"]) for batch in batch_samples), device=device)
        return self.accelerator.reduce(count, reduction="sum") if self.args.world_size > 1 else count

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            checkpoints.load_weights(self.model, Path(resume_from_checkpoint), self.trained_only)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.trained_only:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or ".")
            checkpoints.save_trained(self.model, folder)
            cast("Any", self.processing_class).save_pretrained(folder)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the eval rows; draws no random number that training would miss."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            metrics = {f"eval_{name}": value for name, value in self._score().items()}
        if self.args.world_size > 1:
            # The last digits can differ between processes, and with them the decision to stop early: rank 0 decides.
            metrics = broadcast_object_list([metrics])[0]
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self._make_optimizer(self.model if model is None else model)
            self.in_backward = self.optimizer if isinstance(self.optimizer, InBackward) else None
        return self.optimizer

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[torch.optim.Optimizer]:
        """The run's optimizer for one step that changes no weight: rate and decay are 0, everything else is as planned.

        Enter it before the forward pass, because with `optimizer_in_backward` the updates happen in `loss.backward()`,
        which then leaves no gradient and raises `Diverged` at one that is not finite: judge the loss before.

            with trainer.rehearsal() as optimizer:
                loss = ...
                loss.backward()
                optimizer.step()

        Leaving it frees gradients and state. Not for DeepSpeed.
        """
        present, self.optimizer = self.optimizer, None
        optimizer = self._make_optimizer(self.model)
        self.optimizer = present
        for group in optimizer.param_groups:
            group.update(lr=0.0, weight_decay=0.0)
        try:
            yield optimizer
        finally:
            if isinstance(optimizer, InBackward):
                optimizer.remove()
            self.model.zero_grad(set_to_none=True)

    def _make_optimizer(self, model: Any) -> torch.optim.Optimizer:
        plan = self._plan
        own = optimizers.settings(plan.optim, plan.bf16_rounding, plan.seed)
        if own is None and plan.layerwise_lr_decay == 1.0:
            made = super().create_optimizer(model)
        else:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            if own is not None:
                kind, options = optimizers.AdamW, {name: options[name] for name in ("lr", "betas", "eps")} | own
            made = kind(self._groups(model), **options)
        if not plan.optimizer_in_backward:
            return made
        names = {parameter: name for name, parameter in model.named_parameters()}
        return InBackward(made, names, lambda: self.state.global_step + 1)

    def _groups(self, model: Any) -> list[dict[str, Any]]:
        """Tensors by weight decay and, with `layerwise_lr_decay`, depth; in transformers' order, so that an optimizer
        can go on with another one's checkpoint."""
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        decayed, decay = set(self.get_decay_parameter_names(model)), self.args.weight_decay
        if self._plan.layerwise_lr_decay == 1.0:
            groups: list[dict[str, Any]] = [
                {"params": [name for name in names if name in decayed], "weight_decay": decay},
                {"params": [name for name in names if name not in decayed], "weight_decay": 0.0},
            ]
        else:
            factor = self._plan.layerwise_lr_decay
            groups = layerwise_groups(names, decayed, self.args.learning_rate, factor, decay)
        parameters = dict(model.named_parameters())
        return [{**group, "params": [parameters[name] for name in group["params"]]} for group in groups]


class _Epochs(TrainerCallback):
    """Tells the sampler which epoch begins; at the start of an epoch `state.epoch` is whole, in a resumed one not."""

    def __init__(self, sampler: GlobalBatchSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


_LAYER = re.compile(r"\.(?:layers?|h|blocks?|block)\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed|wte|wpe|word_embeddings|shared)")


def layer_depth(name: str, num_layers: int) -> int:
    """0 for embeddings, 1 to `num_layers` for layers from the bottom, `num_layers` + 1 for what stands above them."""
    found = _LAYER.search(name)
    if found:
        return int(found.group(1)) + 1
    return 0 if _EMBEDDING.search(name) else num_layers + 1


def layerwise_groups(
    names: Sequence[str], decayed: set[str], learning_rate: float, factor: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups with a rate per depth, the top first (its rate is the one that is logged)."""
    num_layers = max((int(found.group(1)) + 1 for name in names if (found := _LAYER.search(name))), default=0)
    groups: dict[tuple[int, bool], list[str]] = {}
    for name in names:
        groups.setdefault((-layer_depth(name, num_layers), name not in decayed), []).append(name)
    return [
        {
            "params": members,
            "lr": learning_rate * factor ** (num_layers + 1 + negative_depth),
            "weight_decay": 0.0 if plain else weight_decay,
        }
        for (negative_depth, plain), members in sorted(groups.items())
    ]
