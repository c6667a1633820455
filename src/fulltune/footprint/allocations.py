from __future__ import annotations

import contextlib
import copy
import math
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import PretrainedConfig, PreTrainedModel

from fulltune.footprint.records import KINDS
from fulltune.inference.run import autocast, extract_logits
from fulltune.inference.selective_head import SelectiveHead
from fulltune.models.encoders import model_class
from fulltune.models.experts import expert_modules
from fulltune.models.load import torch_dtype
from fulltune.models.pixels import PIXELS
from fulltune.tasks import Target, Task, seq2seq
from fulltune.tasks.padding import texts_per_row

_aten: Any = torch.ops.aten
_DEVICE: Any = torch.ops.prim.device.default
_INDEXING = (
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
)

# ---- the model to trace: copies with few layers, and batches of its task -----------------------------------------


@dataclass(frozen=True)
class TraceCase:
    """A model to trace, and how it is trained."""

    config: PretrainedConfig
    """Config with the task's changes and the dropout."""
    task: Task
    target: Target
    prepare: Callable[[PreTrainedModel], object]
    """Function that applies the method and dropout to a model; its `repr` identifies it in the footprint cache."""
    num_parameters: int
    """Number of parameters of the model and its method, counting tied ones once."""
    num_trainable: int | None = None
    """Number of parameters with `requires_grad` after `prepare` if only these are trained, or None for all."""
    precision: str = "fp32"
    checkpointing: tuple[bool, ...] = (False, True)
    weights_dtype: str = "fp32"
    attn_implementation: str | None = None
    packed: bool = False
    pixels: tuple[int, int, int] | None = None
    """Channels, height and width of an image."""


def build_model(case: TraceCase, config: PretrainedConfig) -> PreTrainedModel:
    """Build the model with random weights, and apply the training method and dropout."""
    options: dict[str, Any] = {"dtype": torch_dtype(case.weights_dtype)}
    if case.attn_implementation:
        options["attn_implementation"] = case.attn_implementation
    model: PreTrainedModel = model_class(case.task.FACTS.auto_class).from_config(config, **options)
    case.prepare(model)
    return model


_DEPTHS = (("encoder_layers", "decoder_layers"), ("num_layers", "num_decoder_layers"), ("num_hidden_layers",))


def layer_config(case: TraceCase, config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of the config that holds the number of layers, such as the text model's config."""
    if not has_tokens(case):
        return getattr(config, "vision_config", config)
    return config if config.is_encoder_decoder else config.get_text_config()


def layer_counts(case: TraceCase) -> dict[str, int]:
    """Return the numbers of layers by config attribute, such as `{"num_hidden_layers": 12}`."""
    config = layer_config(case, case.config)
    usual = _DEPTHS[:-1] if config.is_encoder_decoder else _DEPTHS[-1:]
    names = next((some for some in usual if all(isinstance(getattr(config, name, None), int) for name in some)), ())
    return {name: getattr(config, name) for name in names}


def layer_types(case: TraceCase) -> tuple[str, ...]:
    """Return the type of each layer, or an empty tuple if all layers are of one type."""
    config = layer_config(case, case.config)
    kinds = tuple(getattr(config, "layer_types", None) or ())
    is_complete = not config.is_encoder_decoder and len(kinds) == getattr(config, "num_hidden_layers", None)
    return kinds if is_complete and len(set(kinds)) > 1 else ()


def config_with_layers(case: TraceCase, depths: Mapping[str, int], kinds: Sequence[str] = ()) -> PretrainedConfig:
    """Return a copy of the config with `depths` (numbers of layers by config attribute) and layer types `kinds`."""
    config = copy.deepcopy(case.config)
    config.use_cache = False
    part = layer_config(case, config)
    if depths == layer_counts(case) and not kinds:
        return config
    for name, depth in depths.items():
        setattr(part, name, depth)
    every = getattr(part, "layer_types", None)
    if every and depths:
        part.layer_types = list(kinds or every[: max(depths.values())])
    return config


def make_batch(case: TraceCase, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Return a batch of `rows` rows with `length` tokens each, collated by the task."""
    row = dict(case.task.full_row(case.target, length))
    if case.packed:
        row["position_ids"] = np.arange(length)
    if case.pixels is not None:
        row[PIXELS] = np.zeros(case.pixels, np.float32)
    return case.task.collate([row] * rows, 0)


def has_tokens(case: TraceCase) -> bool:
    return case.task.FACTS.reads == "text"


def tensor_fields(case: TraceCase, shapes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """Return the fields of `Footprint` that depend only on the case and the trained tensors' shapes."""
    return {
        "weights_dtype": case.weights_dtype,
        "largest_tensor": max(map(math.prod, shapes)),
        "sequences_per_row": texts_per_row(case.task, case.target),
        "tensors": dict(Counter(map(math.prod, shapes))),
    }


# ---- allocations while it runs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelTrace:
    """Bytes in use and FLOPs of a model at (rows, length) points; `alive` has shape [points, allocations, kinds]."""

    keys: tuple[tuple[str, int], ...]
    """Each allocation's position in the step, and its number at this position."""
    alive: np.ndarray
    flops: np.ndarray
    shapes: tuple[tuple[int, ...], ...]
    trained: tuple[tuple[int, ...], ...]


class AllocationLog(TorchDispatchMode):
    """Logs allocated and freed storages by position in the step. A last axis of `vocab_size` means logits."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def __exit__(self, *failure: object) -> None:
        self._open = False  # later releases are those of the model itself
        super().__exit__(*failure)

    def begin(self, parameters: list[torch.Tensor], num_targets: int) -> None:
        """Start a new log in which the parameters are already allocated. The loss uses `num_targets` labels."""
        self.num_targets, self.place, self.flops = num_targets, "", 0.0
        self._changes: list[tuple[str, int, int]] = []  # place, block, bytes (negative when freed)
        self._kinds: dict[int, str] = {}  # by block; the others are activations
        self._blocks: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._parameters = {tuple(parameter.shape) for parameter in parameters}
        self._trained = {tuple(parameter.shape) for parameter in parameters if parameter.requires_grad}
        self._count, self._open = 0, True
        for parameter in parameters:
            self._log_storage(parameter, None)
        self._changes.clear()

    def timeline(self) -> dict[tuple[str, int], np.ndarray]:
        """Return the bytes by `KINDS` after each allocation (not in middle layers): {(place, number there): bytes}."""
        alive, counts, after = np.zeros(len(KINDS)), Counter[str](), {}
        for place, block, size in self._changes:
            alive[KINDS.index(self._kinds.get(block, "activations"))] += size
            if size > 0 and not place.endswith(":middle"):
                after[place, counts[place]] = alive.copy()
                counts[place] += 1
        return after

    def label_gradients(self, parameters: list[torch.Tensor]) -> None:
        """Log the `.grad` storages of these parameters as gradients, not activations."""
        for parameter in parameters:
            if parameter.grad is not None:
                self._kinds[self._blocks[parameter.grad.untyped_storage()._cdata][0]] = "gradients"

    def _log_storage(self, tensor: torch.Tensor, func: Any) -> None:
        """Log a tensor's storage, if new, when allocated and when freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._blocks:
            return
        self._count += 1
        block, size = self._count, storage.nbytes()

        def log_release(_: object) -> None:
            if self._open:
                del self._blocks[key]
                self._changes.append((self.place, block, -size))

        self._blocks[key] = (block, weakref.ref(storage, log_release))
        self._changes.append((self.place, block, size))
        if func is _aten._to_copy.default and tuple(tensor.shape) in self._parameters:
            self._kinds[block] = "buffers"
        elif tensor.dim() > 1 and tuple(tensor.shape) in self._trained:
            if self.place.startswith("backward"):  # before it is summed or cast to the weights' type
                self._kinds[block] = "gradients"
        elif tensor.dim() > 1 and tensor.shape[-1] == self.vocab_size:
            self._kinds[block] = "logits"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and log its new storages and floating-point operations."""
        if func is _DEVICE:  # two of three calls; allocates nothing
            return args[0].fake_device
        kwargs = kwargs or {}
        if func in _INDEXING:
            args = (args[0], _replace_boolean_masks(args[1], self.num_targets), *args[2:])
        if func is _aten.nonzero.default:
            out = args[0].new_empty((self.num_targets, args[0].dim()), dtype=torch.int64)
        elif func is _aten._grouped_mm.default:  # torch 2.13's own shape function takes only bf16
            of_weight = args[2].shape if args[1].dim() == 2 else ()  # a gradient has a matrix per expert
            out = args[0].new_empty((*of_weight, len(args[0]), args[1].shape[-1]))
            self.flops += 2.0 * args[0].numel() * args[1].shape[-1]
        elif func is _aten.rand.default and not args[0]:
            out = torch.tensor(1.0)  # LayerDrop, the only random draw whose value is read: keep the layer
        else:
            out = func(*args, **kwargs)
        if func is _aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.flops += 4.0 * args[0].numel() * args[1].shape[-2]  # of query and key
        elif (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._log_storage(leaf, func)
        return out


def _replace_boolean_masks(indices: Any, num_true: int) -> Any:
    """Replace each boolean mask in an index with integer indices for `num_true` positions."""
    return [
        place
        for index in indices
        for place in (
            [index.new_empty((num_true,), dtype=torch.int64) for _ in range(index.dim())]
            if index is not None and index.dtype is torch.bool
            else [index]
        )
    ]


def track_layers(log: AllocationLog, stacks: list[nn.ModuleList]) -> None:
    """Install hooks that set the log's `place` as layers run: `backward 1:last`, `backward 0:below` ..."""

    def set_position(hidden: object, forward: str, backward: str) -> None:
        """Set the log's position to `forward`, and to `backward` when the gradient of `hidden` is computed."""
        if log.place.startswith("backward"):
            return  # recomputed

        def back(_: torch.Tensor) -> None:
            log.place = backward

        if backward and isinstance(hidden, torch.Tensor) and hidden.requires_grad:
            hidden.register_hook(back)
        log.place = forward

    def enter(name: str, _: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        below = f"backward {name.replace('first', 'below')}" if name.endswith("first") else ""
        set_position(args[0] if args else kwargs.get("hidden_states"), f"forward {name}", below)

    def leave(name: str, _: nn.Module, __: object, out: Any) -> None:
        set_position(out if isinstance(out, torch.Tensor) else out[0], f"forward after {name}", f"backward {name}")

    for stack, layers in enumerate(stacks):
        for layer, module in enumerate(layers):
            name = f"{stack}:" + ("first" if layer == 0 else "last" if layer == len(layers) - 1 else "middle")
            module.register_forward_pre_hook(partial(enter, name), with_kwargs=True)
            module.register_forward_hook(partial(leave, name))


def find_layer_lists(model: PreTrainedModel, depths: set[int]) -> list[nn.ModuleList]:
    """Return the model's outermost lists of layers; `depths` are the possible lengths."""
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        is_stack = isinstance(module, nn.ModuleList) and len(module) in depths
        if is_stack and not any(name.startswith(f"{outer}.") for outer in stacks):
            stacks[name] = module
    return list(stacks.values())


# ---- a whole step ----------------------------------------------------------------------------------------------


def trace_copy(
    case: TraceCase,
    depths: Mapping[str, int],
    points: Sequence[tuple[int, int]],
    *,
    recomputed: bool,
    training: bool,
    kinds: Sequence[str] = (),
) -> ModelTrace:
    """Trace the forward pass, and in training the backward pass, of a copy with `depths` layers of these `kinds`.

    The pass is repeated at each (rows, length) point; `recomputed` turns on activation checkpointing.
    """
    config = config_with_layers(case, depths, kinds)
    batches = [make_batch(case, *point) for point in points]
    counts = [case.task.count_items(batch["labels"]) for batch in batches]
    timelines, flops = [], []
    with torch.device("meta"):  # outside the fake mode, so that the class's constants have values
        model = build_model(case, config)
    with FakeTensorMode() as mode:
        move_to_fake_cpu(model)
        if recomputed:
            model.activation_checkpointing_enable()
        model.train(training)
        log = AllocationLog(getattr(config.get_text_config(), "vocab_size", 0) or 0)
        track_layers(log, find_layer_lists(model, set(depths.values())))
        for batch, count in zip(batches, counts, strict=True):
            fake: dict[str, torch.Tensor] = {name: mode.from_tensor(tensor) for name, tensor in batch.items()}
            log.begin(list(model.parameters()), count)
            with log, torch.set_grad_enabled(training):
                _trace_micro_batch(case, model, fake, log, training)
            model.zero_grad(set_to_none=True)
            timelines.append(log.timeline())
            flops.append(log.flops)
        trained, frozen = (
            tuple(tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad is wanted)
            for wanted in (True, False)
        )
    keys = tuple(timelines[0])
    if any(tuple(timeline) != keys for timeline in timelines):
        raise ValueError("the operations depend on the number of rows or tokens")
    alive = np.array([[timeline[key] for key in keys] for timeline in timelines])
    return ModelTrace(keys, alive, np.array(flops), trained + frozen, trained)


def move_to_fake_cpu(model: nn.Module) -> None:
    """Move all tensors of a model from `meta` to a fake CPU; tied tensors stay tied."""
    copies: dict[int, torch.Tensor] = {}

    def to_fake_cpu(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in copies:
            like = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            copies[id(tensor)] = nn.Parameter(like, tensor.requires_grad) if is_parameter else like
        return copies[id(tensor)]

    for module in model.modules():
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for tensors in holders:
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor):
                    tensors[name] = to_fake_cpu(tensor)


def _trace_micro_batch(
    case: TraceCase, model: PreTrainedModel, batch: dict[str, torch.Tensor], log: AllocationLog, training: bool
) -> None:
    """Run a micro batch's forward pass, and in training its backward pass, while updating the log's position."""
    head = _selective_head(case.task, model)
    log.place = "forward before layers"
    labels = batch.pop("labels")
    inputs = {name: tensor.clone() for name, tensor in batch.items()}
    if case.task.FACTS is seq2seq.FACTS:
        inputs["decoder_input_ids"] = seq2seq.decoder_input_ids(model, labels)
    selecting = contextlib.nullcontext() if head is None else head.computing_only(labels)
    with autocast(model, "fp32" if case.weights_dtype == "bf16" else case.precision), selecting:
        logits = extract_logits(model(**inputs)).float()
    log.place = "forward loss"
    loss = case.task.loss(logits, labels, case.target)
    del logits
    if training:
        # The router loss keeps two probabilities per token and expert.
        experts = sum(len(next(module.parameters())) for module in expert_modules(model))
        of_router = [labels.new_empty((labels.numel(), 2 * experts), dtype=torch.float32)] if experts else []
        log.place = "backward head"
        loss.backward()
        of_router.clear()
        log.label_gradients(list(model.parameters()))


def _selective_head(task: Task, model: PreTrainedModel) -> SelectiveHead | None:
    wanted, head = getattr(task, "target_ids", None), model.get_output_embeddings()
    return None if wanted is None or head is None else SelectiveHead(head, wanted, model)
