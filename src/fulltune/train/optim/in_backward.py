"""An optimizer that updates each tensor in the backward pass, as soon as its gradient is there, and frees that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from fulltune.errors import SetupError, Spiked


class InBackward(torch.optim.Optimizer):
    """Stands before an optimizer that treats each tensor by itself, and steps it tensor by tensor.

    Groups, state and state dict are those of the optimizer behind, so a checkpoint can be continued with it or without.
    A tensor that is used twice, such as tied embeddings, is updated once: autograd sums its gradient before the hook.

    Args:
        optimizer: The optimizer behind.
        names: Name of each tensor, for messages.
        step: Gives the number of the present optimizer step.

    Attributes:
        updated: Names of the tensors that this step's backward pass has updated.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str], step: Callable[[], int]
    ) -> None:
        # The base class would keep groups and state of its own.
        self.behind = optimizer
        self.updated: list[str] = []
        self._names = names
        self._step = step
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._update, index))
            for index, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        ]

    def _update(self, index: int, parameter: torch.Tensor) -> None:
        """Step a tensor of any shape of group `index`, whose gradient has just become whole, and free that."""
        name, gradient = self._names[parameter], parameter.grad
        if gradient is None or not gradient.numel():
            return
        if name in self.updated:
            raise SetupError(
                f"train.optimizer_in_backward: the gradient of {name} comes in several parts, and it was updated after "
                "the first one; set optimizer_in_backward: false"
            )
        # NaN goes through both; the two numbers cost no copy of the gradient, as isfinite would.
        least, most = gradient.aminmax()
        if not bool((least.isfinite() & most.isfinite()).item()):
            raise Spiked(self._not_finite(name), self._step())
        groups = self.behind.param_groups
        self.behind.param_groups = [{**groups[index], "params": [parameter]}]
        try:
            self.behind.step()
        finally:
            self.behind.param_groups = groups
        parameter.grad = None
        self.updated.append(name)

    def _not_finite(self, name: str) -> str:
        """What a person reads; the tensors before this one have moved already."""
        moved = (
            f"{len(self.updated)} of {len(self._hooks)} tensors were updated before it in this step, so these weights "
            "are neither the old ones nor the new ones: the last checkpoint holds the good ones"
            if self.updated
            else "no tensor was updated in this step: the weights are still good"
        )
        return (
            f"the gradient of {name} is not finite at step {self._step()}, found before {name} was updated; {moved}. "
            "Usual causes: a learning rate that is too high, or a type with too small a range"
        )

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure: the updates are done
        """End the step: all updates have happened in the backward pass."""
        self.updated = []

    def remove(self) -> None:
        """Let later backward passes leave gradients."""
        for hook in self._hooks:
            hook.remove()

    # Attributes of the base class, which typing takes for variables: here they are those of the optimizer behind.
    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.behind.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.behind.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.behind.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.behind.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.behind.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.behind.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise NotImplementedError("its hooks are on the tensors that it was made for")
