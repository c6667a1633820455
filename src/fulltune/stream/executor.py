"""Runs a model whose weights are read unit by unit.

A training step sends all its micro batches through one unit before the next, so weights are read twice a step: for the
forward pass, which keeps only each unit's inputs, and for the backward pass, which computes the unit again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, zip_longest
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fulltune.errors import SetupError
from fulltune.models.experts import expert_modules, with_routing
from fulltune.stream.randomness import derived_random_state, random_state, set_random_state
from fulltune.stream.threads import single_core_threads
from fulltune.stream.units import Unit, placeholder


class WeightSource(Protocol):
    """Weights of each unit by name, on the CPU, valid until they are released."""

    def prefetch(self, unit: int) -> None: ...
    def weights(self, unit: int) -> Mapping[str, Tensor]: ...
    def release(self, unit: int) -> None: ...


class GradientSink(Protocol):
    """Takes one unit's gradients at a time from uninitialised buffers that it provides."""

    def gradients(self, unit: int) -> Mapping[str, Tensor]: ...
    def park(self, unit: int, names: Sequence[str]) -> None: ...


T = TypeVar("T")
_NORM_VALUES = 2**20
Function = Callable[..., object]
_Run = tuple[list[Tensor], list[tuple[Tensor, Tensor]]]
"""A unit's inputs, and each of its outputs with its gradient."""


class _Suspended(BaseException):
    """Ends a micro batch's forward pass at a unit that has not run yet.

    Not an `Exception`, so that no model catches it.
    """

    def __init__(self, request: _Request) -> None:
        self.request = request


@dataclass(frozen=True)
class _Request:
    """One micro batch's call of a unit."""

    unit: int
    function: Function
    leaves: list[object]
    structure: TreeSpec
    random: list[Tensor]
    """Random state before the call."""
    autocast: tuple[bool, torch.dtype]

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def run(self, tensors: Sequence[Tensor]) -> tuple[list[object], TreeSpec]:
        """Call the function with these tensors; return the leaves of what it returns, and their structure."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        arguments, keywords = tree_unflatten(leaves, self.structure)
        return tree_flatten(self.function(*arguments, **keywords))


@dataclass(eq=False)
class _Call:
    """A unit's call for all micro batches of a step."""

    executor: Executor
    requests: list[_Request]
    results: list[tuple[list[object], TreeSpec, list[Tensor]]] = field(default_factory=list)
    """Each micro batch's returned leaves, their structure, and the random state afterwards, until these are used."""
    num_outputs: list[int] = field(default_factory=list)
    """Tensors among the leaves of each micro batch."""
    constant: list[bool] = field(default_factory=list)
    """Whether each output tensor depends on no weights and no input with a gradient."""
    inputs: tuple[Tensor, ...] = ()
    gradients: list[list[Tensor | None]] = field(default_factory=list)
    """Of each micro batch's outputs, kept until the gradients of shared weights are computed."""

    @property
    def unit(self) -> int:
        return self.requests[0].unit

    def forward(self, tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
        """Run each micro batch and return all output tensors."""
        device = self.executor.device
        with self.executor.weights_of({self.unit}), self.casting():
            for request, own, needed in zip(self.requests, self._split(tensors), self._split(needs), strict=True):
                set_random_state(request.random, device)
                # With a graph, which is dropped: without one, attention may use a kernel that rounds differently.
                has_graph = not getattr(request.function, "same_without_graph", False)
                with torch.set_grad_enabled(has_graph):
                    leaves, structure = request.run(_detached(own, needed))
                self.constant += [not leaf.requires_grad and has_graph for leaf in leaves if isinstance(leaf, Tensor)]
                leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                self.results.append((leaves, structure, random_state(device)))
                self.num_outputs.append(sum(isinstance(leaf, Tensor) for leaf in leaves))
        return [leaf for leaves, *_ in self.results for leaf in leaves if isinstance(leaf, Tensor)]

    def casting(self) -> torch.autocast:
        enabled, dtype = self.requests[0].autocast
        # The cache would keep a copy of every unit's weights.
        return torch.autocast(self.executor.device.type, dtype, enabled, cache_enabled=False)

    def _split(self, values: Sequence[T]) -> list[Sequence[T]]:
        """Split one value for each input tensor into those of each micro batch."""
        sizes = [len(request.tensors) for request in self.requests]
        return [values[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]

    def backward(
        self, tensors: tuple[Tensor, ...], needs: Sequence[bool], grads: Sequence[Tensor | None]
    ) -> list[object]:
        """Compute the gradients of the inputs, and of all weights whose last call this is."""
        given = iter(grads)  # of the outputs, then of the inputs that later units use too
        self.inputs = tensors
        self.gradients = [[next(given) for _ in range(count)] for count in self.num_outputs]
        later = [next(given) if needed else None for needed in needs]
        completed = self.executor.complete(self)
        # Usually the unit's own weights, whose gradients come with those of the inputs.
        own = next((record for record, calls in completed if calls == [self]), None)
        of_inputs: list[object] = []
        with self.executor.weights_of({self.unit}, backward=True), self.executor.collecting(own) as parameters:
            for micro, (needed, added) in enumerate(zip(self._split(needs), self._split(later), strict=True)):
                run = self.outputs(micro, needed, added)
                _add_gradients([run], parameters)
                of_inputs += [leaf.grad if leaf.requires_grad else None for leaf in run[0]]
        for record, calls in completed:
            if record != own:
                self.executor.add_shared_gradients(record, calls)
        return of_inputs

    def outputs(self, micro: int, needs: Sequence[bool] = (), later: Sequence[Tensor | None] = ()) -> _Run:
        """Run a micro batch again with a graph; return its inputs, and each output with its gradient.

        Gradients of the inputs from `later` units come first, as in a model in memory: sums are rounded in order.
        """
        leaves = _detached(self._split(self.inputs)[micro], needs)
        with torch.enable_grad():
            given = [leaf if grad is None else leaf.view_as(leaf) for leaf, grad in zip_longest(leaves, later)]
        before = random_state(self.executor.device)
        set_random_state(self.requests[micro].random, self.executor.device)
        with torch.enable_grad(), self.casting():
            returned, _ = self.requests[micro].run(given)
        set_random_state(before, self.executor.device)
        outputs = [leaf for leaf in returned if isinstance(leaf, Tensor)]
        pairs = [*zip(given, later, strict=False), *zip(outputs, self.gradients[micro], strict=True)]
        return leaves, [(output, grad) for output, grad in pairs if grad is not None and output.requires_grad]


def _detached(tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """Return the tensors without their graph; those with a True in `needs` require a gradient."""
    leaves = [tensor.detach() for tensor in tensors]
    for leaf, needed in zip(leaves, needs, strict=False):
        leaf.requires_grad_(needed)
    return leaves


def _add_gradients(runs: Sequence[_Run], parameters: Sequence[nn.Parameter]) -> None:
    """Go back through one or more graphs, adding gradients to their inputs and to `parameters`."""
    pairs = [pair for _, outputs in runs for pair in outputs]
    targets = [*(leaf for leaves, _ in runs for leaf in leaves if leaf.requires_grad), *parameters]
    if pairs and targets:
        torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs], inputs=targets)


class _UnitFunction(torch.autograd.Function):
    """A unit's pass for all micro batches of a step."""

    @staticmethod
    def forward(ctx: Any, call: _Call, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the unit and keep only its inputs. `anchor` only makes the outputs require gradients."""
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.save_for_backward(*tensors)
        outputs = call.forward(tensors, ctx.needs_input_grad[2:])
        pairs = zip(outputs, call.constant, strict=True)
        ctx.mark_non_differentiable(*(output for output, is_constant in pairs if is_constant))
        needs = zip(tensors, ctx.needs_input_grad[2:], strict=True)
        return *outputs, *(tensor for tensor, is_needed in needs if is_needed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[object, ...]:
        """Run the unit again, and return the gradients of its inputs."""
        call, ctx.call = ctx.call, None
        return (None, None, *call.backward(ctx.saved_tensors, ctx.needs_input_grad[2:], grads))


class Executor:
    """Runs a model with the weights of a source; `install` makes the model use it."""

    def __init__(
        self, model: nn.Module, units: Sequence[Unit], source: WeightSource, sink: GradientSink | None = None
    ) -> None:
        """Take a model whose parameters are placeholders."""
        self.units, self._source, self._sink = units, source, sink
        self._threads = single_core_threads()
        self.device = next(model.parameters()).device
        self._parameters = dict(model.named_parameters())
        owner = {name: number for number, unit in enumerate(units) for name in unit.names}
        self._records = [sorted({owner[name] for name in unit.names + unit.tied}) for unit in units]
        self._after: dict[tuple[bool, int], int] = {}
        """Unit that was needed after another one, in forward and backward passes."""
        self._last: tuple[bool, int] | None = None
        self._step: _Step | None = None
        self._uses: dict[int, list[_Call]] = {}
        self._left: dict[int, int] = {}
        self.on_unit: Callable[[int, bool], object] = lambda unit, backward: None
        """Called when a unit's weights are in memory, for a forward or a backward pass."""
        self.norms: dict[str, Tensor] = {}
        """L2 norm of each parameter's gradient in the last step: fp32 scalars."""

    def call(self, unit: int, function: Function, *arguments: object, **keywords: object) -> object:
        """Call a function that uses the unit's weights."""
        if self._step is None or not torch.is_grad_enabled():
            with torch.no_grad(), self.weights_of({unit}):
                return function(*arguments, **keywords)
        return self._step.call(unit, function, arguments, keywords)

    def losses(self, forwards: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """Run the micro batches' forward passes together, and return their losses."""
        self._uses, self.norms = {}, {}
        self._step = _Step(self, len(forwards))
        try:
            losses = self._step.run(forwards)
        finally:
            self._step = None
        self._left = {record: len(calls) for record, calls in self._uses.items()}
        return losses

    def backward(self, losses: Sequence[Tensor]) -> None:
        """Compute the gradients of the losses, all of which go to the sink."""
        torch.autograd.backward(losses)
        for record, calls in self._uses.items():  # units of which some output is not part of a loss
            if reached := [call for call in calls if call.gradients]:
                self.add_shared_gradients(record, reached)
        self._uses = {}

    def add_shared_gradients(self, record: int, calls: Sequence[_Call]) -> None:
        """Compute the gradients of weights that several calls use, in the order in which autograd would add them."""
        users = {call.unit for call in calls}
        with self.weights_of(users, backward=True), self.collecting(record) as parameters:
            for micro in range(len(calls[0].requests)):
                _add_gradients([call.outputs(micro) for call in calls], parameters)

    def record_use(self, call: _Call, tensors: Sequence[Tensor]) -> None:
        if not tensors or any(tensor.numel() for tensor in tensors):  # a call for zero tokens gives no gradient
            for record in self._records[call.unit]:
                self._uses.setdefault(record, []).append(call)

    def complete(self, call: _Call) -> list[tuple[int, list[_Call]]]:
        """Return the units whose weights no call before this one uses, each with all calls that do."""
        done = []
        for record in self._records[call.unit]:
            if call not in self._uses.get(record, ()):
                continue
            self._left[record] -= 1
            if not self._left[record]:
                done.append((record, self._uses.pop(record)))
        return done

    @contextlib.contextmanager
    def weights_of(self, units: set[int], backward: bool = False) -> Iterator[None]:
        """Give the units' parameters their values inside the context."""
        records = sorted({record for unit in units for record in self._records[unit]})
        with contextlib.ExitStack() as acquired:
            for record in records:
                weights = self._source.weights(record)
                acquired.callback(self._release, record)
                for name, values in weights.items():
                    self._parameters[name].data = values.to(self.device)
            for record in records:
                self._prefetch_next(backward, record)
                self.on_unit(record, backward)
            yield

    def _release(self, record: int) -> None:
        for name in self.units[record].names:
            parameter = self._parameters[name]
            parameter.data = placeholder(parameter.shape, parameter.dtype, self.device)
        self._source.release(record)

    def _prefetch_next(self, backward: bool, record: int) -> None:
        if self._last is not None and self._last != (backward, record):
            self._after[self._last] = record
        self._last = (backward, record)
        following = self._after.get(self._last, record - 1 if backward else record + 1)
        if 0 <= following < len(self.units) and self.units[following].names:
            self._source.prefetch(following)

    @contextlib.contextmanager
    def collecting(self, record: int | None) -> Iterator[list[nn.Parameter]]:
        """Yield a unit's trained parameters, whose gradients then go to the sink; without a unit, yield none."""
        if record is None or self._sink is None:
            yield []
            return
        sink, buffers, received = self._sink, dict[str, Tensor](), set[str]()

        def add(name: str, parameter: Tensor) -> None:
            """Add a parameter's gradient to its buffer, replacing what an earlier unit left there, and free it."""
            if not buffers:  # only now: the last unit's may still have been written
                buffers.update(sink.gradients(record))
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            if name in received:
                buffers[name].add_(gradient.to(buffers[name].device))
            else:
                buffers[name].copy_(gradient)
            received.add(name)

        names = [name for name in self.units[record].names if self._parameters[name].requires_grad]
        with contextlib.ExitStack() as hooks:
            for name in names:
                hooks.enter_context(self._parameters[name].register_post_accumulate_grad_hook(partial(add, name)))
            yield [self._parameters[name] for name in names]
        if received:
            reached = sorted(received)
            self.norms |= zip(reached, self._threads.map(_norm, [buffers[name] for name in reached]), strict=True)
            sink.park(record, reached)


def _norm(gradient: Tensor) -> Tensor:
    if gradient.dtype == torch.float32:
        return torch.linalg.vector_norm(gradient)
    # In parts, each converted: torch's own conversion within the norm is many times slower on a CPU.
    parts = gradient.reshape(-1).split(_NORM_VALUES)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part.float()) for part in parts]))


class _Step:
    """The forward passes of a step's micro batches.

    A micro batch stops at each unit until all have arrived there. Its forward pass then begins anew, and units that
    have run return what they returned before: models need no change, and what a model does between its units is cheap.
    """

    def __init__(self, executor: Executor, num_micro_batches: int) -> None:
        self._executor = executor
        self._anchor = torch.zeros((), device=executor.device, requires_grad=True)
        self._logs: list[list[tuple[list[object], TreeSpec, list[Tensor], list[int]]]] = [
            [] for _ in range(num_micro_batches)
        ]
        self._passed: dict[int, tuple[Tensor, Tensor]] = {}
        """By identity, tensors that units have read, and what the next unit reads instead, so that gradients meet in
        order."""
        self._micro, self._position = 0, 0

    def run(self, forwards: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        device = self._executor.device
        starts = [random_state(device)]
        if len(forwards) > 1:
            starts += [derived_random_state(starts[0], micro, device) for micro in range(1, len(forwards))]
        while True:
            losses, requests = list[Tensor](), list[_Request]()
            for self._micro, forward in enumerate(forwards):
                self._position = 0
                set_random_state(starts[self._micro], device)
                try:
                    losses.append(forward())
                except _Suspended as suspended:
                    requests.append(suspended.request)
                if self._micro == 0:
                    end = random_state(device)
            if not requests:
                set_random_state(end, device)  # as after a step of one micro batch
                return losses
            self._execute(requests, alike=not losses)

    def call(self, unit: int, function: Function, arguments: tuple[object, ...], keywords: dict[str, object]) -> object:
        """Return what the unit returned for this micro batch, running it if all micro batches have arrived."""
        log = self._logs[self._micro]
        if self._position == len(log):
            leaves, structure = tree_flatten((arguments, keywords))
            kind = self._executor.device.type
            casting = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            request = _Request(unit, function, leaves, structure, random_state(self._executor.device), casting)
            if len(self._logs) > 1:
                raise _Suspended(request)
            self._execute([request], alike=True)
        leaves, structure, random, versions = log[self._position]
        self._position += 1
        if [leaf._version for leaf in leaves if isinstance(leaf, Tensor)] != versions:
            raise SetupError(
                f"train.placement: stream: the model changes the output of {self._executor.units[unit].path} in place, "
                "which accumulation cannot repeat; set train.micro_batch_size to the global batch size"
            )
        set_random_state(random, self._executor.device)
        return tree_unflatten(leaves, structure)

    def _execute(self, requests: list[_Request], alike: bool) -> None:
        """Run a unit for all micro batches."""
        if not alike or len({request.unit for request in requests}) > 1:
            raise SetupError(
                "train.placement: stream: the micro batches of a step call the model's blocks in different orders; set "
                "train.micro_batch_size to the global batch size"
            )
        call = _Call(self._executor, requests)
        tensors = [tensor for request in requests for tensor in request.tensors]
        self._executor.record_use(call, tensors)
        newest = [self._passed.get(id(tensor), (tensor, tensor))[1] for tensor in tensors]
        outputs = iter(_UnitFunction.apply(call, self._anchor, *newest))
        for log, (returned, structure, random) in zip(self._logs, call.results, strict=True):
            leaves = [next(outputs) if isinstance(leaf, Tensor) else leaf for leaf in returned]
            log.append((leaves, structure, random, [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]))
        self._passed |= {id(tensor): (tensor, next(outputs)) for tensor in tensors if tensor.requires_grad}
        call.results.clear()


def install(model: nn.Module, executor: Executor) -> None:
    """Let the model's units run through the executor."""
    for number, unit in enumerate(executor.units):
        module = model.get_submodule(unit.path)
        call = partial(executor.call, number)
        forward = with_routing(module.forward, call) if expert_modules(module) else partial(call, module.forward)
        vars(module).update(forward=forward, call_with_weights=call)
