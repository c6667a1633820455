"""Run a model on tensors without values and note what is alive after each allocation."""

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
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fulltune.footprint.records import KINDS
from fulltune.inference.run import autocast, logits_of
from fulltune.inference.selective_head import SelectiveHead
from fulltune.models.load import torch_dtype
from fulltune.models.pixels import PIXELS
from fulltune.tasks import Target, Task, seq2seq

_aten: Any = torch.ops.aten
_DEVICE: Any = torch.ops.prim.device.default
_INDEXING = (
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
)

# ---- a model as a case to trace: copies with few layers, and batches as its task makes them ----------------------


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    config: Any
    """With the task's changes and the wanted dropout; it is not changed."""
    task: Task
    """Makes batches and the loss."""
    target: Target
    prepare: Callable[[Any], Any]
    """What training does to a model before it starts. Two that do the same have the same `repr`."""
    num_parameters: int
    """Of the whole model with what the method adds, each shared tensor once."""
    all_trained: bool = True
    """All of them are; else those that `prepare` leaves with `requires_grad`."""
    precision: str = "fp32"
    """Type of the computations."""
    checkpointing: tuple[bool, ...] = (False, True)
    """Whether activations are kept, recomputed, or both ways."""
    weights_dtype: str = "fp32"
    attn_implementation: str | None = None
    packed: bool = False
    """Several texts share a row."""
    pixels: tuple[int, int, int] | None = None
    """Channels, height and width of the images; None for texts."""


def build(case: Case, config: Any) -> Any:
    """The model with random weights, as the trainer has it."""
    given: dict[str, Any] = {"dtype": torch_dtype(case.weights_dtype)}
    if case.attn_implementation:
        given["attn_implementation"] = case.attn_implementation
    model = getattr(transformers, case.task.FACTS.auto_class).from_config(config, **given)
    case.prepare(model)
    return model


_DEPTHS = (("encoder_layers", "decoder_layers"), ("num_layers", "num_decoder_layers"), ("num_hidden_layers",))


def layered(case: Case, config: Any) -> Any:
    """The part of the config that says how many layers there are."""
    if not has_tokens(case):
        return getattr(config, "vision_config", config)
    return config if config.is_encoder_decoder else config.get_text_config()


def depths_of(case: Case) -> dict[str, int]:
    """Attribute of the config to its number of layers; empty where it names none."""
    config = layered(case, case.config)
    known = _DEPTHS[:-1] if config.is_encoder_decoder else _DEPTHS[-1:]
    names = next((one for one in known if all(isinstance(getattr(config, name, None), int) for name in one)), ())
    return {name: getattr(config, name) for name in names}


def layer_kinds(case: Case) -> tuple[str, ...]:
    """What each layer is, in a model of several kinds of layers; empty in a plain one."""
    config = layered(case, case.config)
    kinds = tuple(getattr(config, "layer_types", None) or ())
    known = not config.is_encoder_decoder and len(kinds) == getattr(config, "num_hidden_layers", None)
    return kinds if known and len(set(kinds)) > 1 else ()


def cut(case: Case, depths: Mapping[str, int], kinds: Sequence[str] = ()) -> Any:
    """A copy of the config with so many layers, of these kinds if any are given."""
    config = copy.deepcopy(case.config)
    config.use_cache = False
    part = layered(case, config)
    if depths == depths_of(case) and not kinds:
        return config
    for name, depth in depths.items():
        setattr(part, name, depth)
    every = getattr(part, "layer_types", None)
    if every and depths:
        part.layer_types = list(kinds or every[: max(depths.values())])
    return config


def batch_of(case: Case, rows: int, length: int) -> dict[str, torch.Tensor]:
    """A real batch of full rows, collated by the task."""
    row = dict(case.task.full_row(case.target, length))
    if case.packed:
        row["position_ids"] = np.arange(length)
    if case.pixels is not None:
        row[PIXELS] = np.zeros(case.pixels, np.float32)
    return case.task.collate([row] * rows, 0)


def has_tokens(case: Case) -> bool:
    """Whether the model reads texts, not images."""
    return case.task.FACTS.reads == "text"


def of_tensors(case: Case, shapes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """What a footprint says of the trained tensors, from their shapes."""
    return {
        "weights_dtype": case.weights_dtype,
        "largest_tensor": max(map(math.prod, shapes)),
        "sequences_per_row": case.target.num_choices or 1,
        "tensors": dict(Counter(map(math.prod, shapes))),
    }


# ---- what happens while it runs ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """What was traced of a model at several points: arrays [points, moments, kinds] and [points]."""

    keys: tuple[tuple[str, int], ...]
    """Of each moment the place, and the number of the allocation there."""
    alive: np.ndarray
    """Bytes after it."""
    flops: np.ndarray
    shapes: tuple[tuple[int, ...], ...]
    """Of the model's parameters."""
    trained: tuple[tuple[int, ...], ...]
    """Of those that are trained."""


class Watch(TorchDispatchMode):
    """Notes storages that come and go, each with the place set then; a last axis of `vocab_size` means logits."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def __exit__(self, *failure: Any) -> None:
        self._open = False  # what dies from now on is the model itself
        super().__exit__(*failure)

    def begin(self, parameters: list[torch.Tensor], num_trainable: int) -> None:
        """Forget what was seen before; the parameters are there already."""
        self.num_trainable, self.place, self.flops = num_trainable, "", 0.0
        self._changes: list[tuple[str, int, int]] = []  # where, which block, its bytes: negative where it went
        self._kinds: dict[int, str] = {}  # of a block; the others are activations
        self._blocks: dict[int, tuple[int, Any]] = {}
        self._parameters = {tuple(parameter.shape) for parameter in parameters}
        self._trained = {tuple(parameter.shape) for parameter in parameters if parameter.requires_grad}
        self._count, self._open = 0, True
        for parameter in parameters:
            self._add(parameter, None)
        self._changes.clear()

    def timeline(self) -> dict[tuple[str, int], np.ndarray]:
        """What is alive after each allocation, by kind; of layers between the first and the last nothing is kept."""
        alive, counts, made = np.zeros(len(KINDS)), Counter[str](), {}
        for place, block, size in self._changes:
            alive[KINDS.index(self._kinds.get(block, "activations"))] += size
            if size > 0 and not place.endswith(":middle"):
                made[place, counts[place]] = alive.copy()
                counts[place] += 1
        return made

    def call_gradients(self, parameters: list[torch.Tensor]) -> None:
        """Name the blocks that the parameters' gradients lie in."""
        for parameter in parameters:
            if parameter.grad is not None:
                self._kinds[self._blocks[parameter.grad.untyped_storage()._cdata][0]] = "gradients"

    def _add(self, tensor: torch.Tensor, func: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._blocks:
            return
        self._count += 1
        block, size = self._count, storage.nbytes()

        def gone(_: Any) -> None:
            if self._open:
                del self._blocks[key]
                self._changes.append((self.place, block, -size))

        self._blocks[key] = (block, weakref.ref(storage, gone))
        self._changes.append((self.place, block, size))
        if func is _aten._to_copy.default and tuple(tensor.shape) in self._parameters:
            self._kinds[block] = "buffers"
        elif tensor.dim() > 1 and tuple(tensor.shape) in self._trained:
            if self.place.startswith("backward"):  # before it is summed, or given the weights' type
                self._kinds[block] = "gradients"
        elif tensor.dim() > 1 and tensor.shape[-1] == self.vocab_size:
            self._kinds[block] = "logits"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # two of three calls, which make nothing
            return args[0].fake_device
        kwargs = kwargs or {}
        if func in _INDEXING:
            args = (args[0], _numbered(args[1], self.num_trainable), *args[2:])
        if func is _aten.nonzero.default:
            out = args[0].new_empty((self.num_trainable, args[0].dim()), dtype=torch.int64)
        elif func is _aten.rand.default and not args[0]:
            out = torch.tensor(1.0)  # whether to leave out a layer (LayerDrop): the only draw whose value is asked for
        else:
            out = func(*args, **kwargs)
        if func is _aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.flops += 4.0 * args[0].numel() * args[1].shape[-2]  # of query and key
        elif (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf, func)
        return out


def _numbered(indices: Any, count: int) -> Any:
    """Masks as lists of places, as indexing makes of them."""
    return [
        place
        for index in indices
        for place in (
            [index.new_empty((count,), dtype=torch.int64) for _ in range(index.dim())]
            if index is not None and index.dtype is torch.bool
            else [index]
        )
    ]


def watch_layers(watch: Watch, stacks: list[Any]) -> None:
    """Have the watch's place follow the layers: `forward 0:first`, `backward 1:last`, `backward 0:below` ..."""

    def pass_by(hidden: Any, forward: str, backward: str) -> None:
        if watch.place.startswith("backward"):
            return  # recomputed

        def back(_: Any) -> None:
            watch.place = backward

        if backward and isinstance(hidden, torch.Tensor) and hidden.requires_grad:
            hidden.register_hook(back)
        watch.place = forward

    def enter(name: str, _: Any, args: Any, kwargs: Any) -> None:
        below = f"backward {name.replace('first', 'below')}" if name.endswith("first") else ""
        pass_by(args[0] if args else kwargs.get("hidden_states"), f"forward {name}", below)

    def leave(name: str, _: Any, __: Any, out: Any) -> None:
        pass_by(out if isinstance(out, torch.Tensor) else out[0], f"forward after {name}", f"backward {name}")

    for stack, layers in enumerate(stacks):
        for layer, module in enumerate(layers):
            name = f"{stack}:" + ("first" if layer == 0 else "last" if layer == len(layers) - 1 else "middle")
            module.register_forward_pre_hook(partial(enter, name), with_kwargs=True)
            module.register_forward_hook(partial(leave, name))


def stacks_of(model: Any, depths: set[int]) -> list[Any]:
    """The lists of layers, outermost only."""
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        is_stack = isinstance(module, torch.nn.ModuleList) and len(module) in depths
        if is_stack and not any(name.startswith(f"{outer}.") for outer, _ in found):
            found.append((name, module))
    return [module for _, module in found]


# ---- a whole step ----------------------------------------------------------------------------------------------


def run(
    case: Case,
    depths: Mapping[str, int],
    points: Sequence[tuple[int, int]],
    *,
    recomputed: bool,
    training: bool,
    kinds: Sequence[str] = (),
) -> Whole:
    """Micro batches of so many rows and tokens each, forward and in training backward, by a copy with these layers."""
    config = cut(case, depths, kinds)
    batches = [batch_of(case, *point) for point in points]
    counts = [case.task.count_items(batch["labels"]) for batch in batches]
    timelines, flops = [], []
    with torch.device("meta"):  # outside of the mode: numbers that a class computes for itself have values here
        model = build(case, config)
    with FakeTensorMode() as mode:
        onto_cpu(model)
        if recomputed:
            model.activation_checkpointing_enable()
        model.train(training)
        watch = Watch(getattr(config.get_text_config(), "vocab_size", 0) or 0)
        watch_layers(watch, stacks_of(model, set(depths.values())))
        for batch, count in zip(batches, counts, strict=True):
            unvalued = {name: mode.from_tensor(tensor) for name, tensor in batch.items()}
            watch.begin(list(model.parameters()), count)
            with watch, torch.set_grad_enabled(training):
                _micro_batch(case, model, unvalued, watch, training)
            model.zero_grad(set_to_none=True)
            timelines.append(watch.timeline())
            flops.append(watch.flops)
        trained, frozen = (
            tuple(tuple(one.shape) for one in model.parameters() if one.requires_grad is wanted)
            for wanted in (True, False)
        )
    keys = tuple(timelines[0])
    if any(tuple(timeline) != keys for timeline in timelines):
        raise ValueError("what it does depends on the number of rows or tokens")
    alive = np.array([[timeline[key] for key in keys] for timeline in timelines])
    return Whole(keys, alive, np.array(flops), trained + frozen, trained)


def onto_cpu(model: Any) -> None:
    """Have all tensors of a model on `meta` say that they are on the CPU; shared ones stay shared."""
    made: dict[int, torch.Tensor] = {}

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            like = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            made[id(tensor)] = torch.nn.Parameter(like, tensor.requires_grad) if is_parameter else like
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers, vars(module)):
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor):
                    tensors[name] = moved(tensor)


def _micro_batch(case: Case, model: Any, batch: dict[str, Any], watch: Watch, training: bool) -> None:
    """As `FullTrainer` does it, the loss included."""
    head = _head(case.task, model)
    watch.place = "forward before layers"
    labels = batch.pop("labels")
    inputs = {name: tensor.clone() for name, tensor in batch.items()}
    if case.task.FACTS is seq2seq.FACTS:
        inputs["decoder_input_ids"] = seq2seq.decoder_input_ids(model, labels)
    selecting = contextlib.nullcontext() if head is None else head.only(labels)
    with autocast(model, "fp32" if case.weights_dtype == "bf16" else case.precision), selecting:
        logits = logits_of(model(**inputs)).float()
    watch.place = "forward loss"
    loss = case.task.loss(logits, labels, case.target)
    del logits
    if training:
        watch.place = "backward head"
        loss.backward()
        watch.call_gradients(list(model.parameters()))


def _head(task: Task, model: Any) -> SelectiveHead | None:
    wanted, head = getattr(task, "target_ids", None), model.get_output_embeddings()
    return None if wanted is None or head is None else SelectiveHead(head, wanted, model)
