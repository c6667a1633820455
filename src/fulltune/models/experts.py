from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Routing:
    """By layer, a router's logits [tokens, experts] and the chosen experts' numbers [tokens, experts per token]."""

    logits: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)


_active: list[Routing] = []


@contextlib.contextmanager
def recording() -> Iterator[Routing]:
    """Record the routing of passes inside the context; blocks that are recomputed afterwards add nothing."""
    _active.append(Routing())
    try:
        yield _active[-1]
    finally:
        _active.pop()


def expert_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that hold all experts of a layer in one tensor per weight."""
    return [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]


def why_no_deepspeed(num_processes: int) -> str:
    instead = "fsdp2" if num_processes > 1 else "stream"
    return f"DeepSpeed has not been tried with mixtures of experts; set train.placement: {instead}"


def routers(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose outputs transformers records as router logits."""
    records = [getattr(module, "_can_record_outputs", None) or {} for module in model.modules()]
    specs = [record["router_logits"] for record in records if "router_logits" in record]
    kinds = tuple(one.target_class for of in specs for one in (of if isinstance(of, list) else [of]))
    return [module for module in model.modules() if isinstance(module, kinds)]


def watch(model: nn.Module) -> None:
    """Let a mixture of experts report to `recording`."""

    def report_logits(_: nn.Module, __: object, output: tuple[Tensor, ...]) -> None:
        if _active:
            _active[-1].logits.append(output[0])  # in all classes that `expert_modules` knows

    def report_chosen(_: nn.Module, args: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        if _active:
            _active[-1].chosen.append([*args, *keywords.values()][1].detach())

    for module in expert_modules(model):
        module.register_forward_pre_hook(report_chosen, with_kwargs=True)
    for router in routers(model):
        router.register_forward_hook(report_logits)


def with_routing(forward: Callable[..., object], call: Callable[..., Any]) -> Callable[..., object]:
    """Return a function that lets `call` run a block whose graph ends at its outputs, among which its routing is."""

    def run(*args: object, **keywords: object) -> tuple[object, list[list[Tensor]]]:
        with recording() as routing:
            return forward(*args, **keywords), [routing.logits, routing.chosen]

    def outer(*args: object, **keywords: object) -> object:
        output, (logits, chosen) = call(run, *args, **keywords)
        if _active:
            _active[-1].logits.extend(logits)
            _active[-1].chosen.extend(chosen)
        return output

    return outer


def find_router_loss(model: PreTrainedModel) -> Callable[[Routing, Tensor | None], Tensor] | None:
    """Return the load balancing loss of the model's class times its config's coefficient, for a pass and its tokens'
    mask [rows, tokens]; None if the class has no such loss."""
    modules = [sys.modules[kind.__module__] for kind in type(model).__mro__]  # FSDP2 puts a class of its own in front
    balance = next(filter(None, (getattr(module, "load_balancing_loss_func", None) for module in modules)), None)
    coefficient = getattr(model.config.get_text_config(), "router_aux_loss_coef", None)
    if not (balance and coefficient and routers(model)):
        return None

    def loss(routing: Routing, mask: Tensor | None) -> Tensor:
        logits = tuple(one.float() for one in routing.logits)
        return coefficient * balance(logits, logits[0].shape[-1], routing.chosen[0].shape[-1], mask)

    return loss
