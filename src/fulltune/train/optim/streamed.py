from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fulltune.stream.layout import GRADIENT, WEIGHTS, SectionLayout, TensorLayout
from fulltune.stream.state import DiskState
from fulltune.stream.units import Unit
from fulltune.train.optim import moments, optimizers
from fulltune.train.optim.groups import Group
from fulltune.train.optim.moments import Format

_FORMATS: dict[str, Format] = {"adamw_8bit": "8bit", "adamw_bf16": "bf16"}


def unit_layouts(model: nn.Module, units: Sequence[Unit], optim: str) -> list[list[TensorLayout]]:
    """Return how each unit's weights and moments lie on the disk."""
    parameters = dict(model.named_parameters())
    return [[_layout(name, parameters[name], optim) for name in unit.names] for unit in units]


def _layout(name: str, parameter: Tensor, optim: str) -> TensorLayout:
    sections = {WEIGHTS: SectionLayout(parameter.dtype)}
    for section, values in _first_moments(parameter, optim).items():
        codes = values.dtype == torch.int8
        per = moments.GROUP if section.endswith("_scale") else 1
        sections[section] = SectionLayout(values.dtype, per=per, multiple=moments.GROUP if codes else 1)
    return TensorLayout(name, tuple(parameter.shape), sections)


def _first_moments(parameter: Tensor, optim: str) -> dict[str, Tensor]:
    """Return the first values of the moments before step 1."""
    if not parameter.requires_grad:
        return {}
    few = min(parameter.numel(), moments.SMALL)
    return moments.create_moments(few, _FORMATS.get(optim, "fp32"), torch.device("cpu"))


def initial_sections(parameter: Tensor, weights: Tensor, optim: str) -> dict[str, Tensor | float]:
    """Return the weights and the value that each array of moments is filled with."""
    return {WEIGHTS: weights} | {name: float(values[0]) for name, values in _first_moments(parameter, optim).items()}


class StreamedAdamW(torch.optim.Optimizer):
    """AdamW over weights and moments on a disk; its parameters are placeholders.

    A step is noted before it changes the state, so a step that was interrupted is completed when the state is opened.
    """

    def __init__(
        self, model: nn.Module, state: DiskState, kind: type[torch.optim.Optimizer], groups: list[Group], options: Group
    ) -> None:
        """Take the class, groups and options of the optimizer in memory; complete an interrupted step."""
        names = ("lr", "betas", "eps", "weight_decay")
        super().__init__(groups, {"weight_decay": 0.0} | {name: options[name] for name in names if name in options})
        self._state = state
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        own = kind is optimizers.AdamW
        self._own = optimizers.AdamW([{**group} for group in groups], **options) if own else None
        self.clip_factor: Tensor | None = None
        """Factor of the next step's gradients."""
        self.notes: Group = {}
        """What to note with the next step."""
        self.is_replaying = False
        """True if the next step has been made already, before the process was killed."""
        if (record := state.journal.pending) is not None:
            self._update(record)
            state.finish()

    @property
    def finished(self) -> Group:
        """The last step whose update has ended, the number of updates so far, those that a parameter missed, and the
        notes."""
        return self._state.journal.finished or {"step": 0, "updates": 0, "missed": {}}

    @torch.no_grad()
    def step(self, closure: Callable[[], object] | None = None) -> None:  # type: ignore[override]  # no closure
        """Update all parameters with a gradient; without gradients, only note that the step was skipped."""
        if self.is_replaying:
            self.is_replaying = False
            return
        self._state.finish()
        updates = any(parameter.grad is not None for parameter in self._names)
        missed = self.finished["missed"]
        if updates:
            without = [name for one, name in self._names.items() if one.requires_grad and one.grad is None]
            missed = missed | {name: missed.get(name, 0) + 1 for name in without}
        else:
            self._state.discard()
        record = {
            "step": self.finished["step"] + 1,
            "updates": self.finished["updates"] + updates,
            "missed": missed,
            "skipped": not updates,
            "clip_factor": None if self.clip_factor is None else float(self.clip_factor),
            "groups": [{name: value for name, value in one.items() if name != "params"} for one in self.param_groups],
            **self.notes,
        }
        self.clip_factor = None
        self._state.begin(record)
        self._update(record)

    def _update(self, record: Group) -> None:
        """Let the units that have not been updated yet be updated when they are needed; none if the step is skipped."""
        parameters = {
            self._names[parameter]: (parameter, settings)
            for group, settings in zip(self.param_groups, record["groups"], strict=True)
            for parameter in group["params"]
        }
        factor = record["clip_factor"]

        def change(name: str, begin: int, state: dict[str, Tensor]) -> None:
            (parameter, group), step = parameters[name], record["updates"] - record["missed"].get(name, 0)
            weights, gradient = state.pop(WEIGHTS), state.pop(GRADIENT)
            if factor is not None:
                gradient = gradient.float().mul_(factor)
            if self._own is not None:
                state["step"] = torch.tensor(float(step))
                self._own.update_values(parameter, weights, gradient, state, group, begin)
            else:
                adamw(
                    *([weights], [gradient.float()], [state["exp_avg"]], [state["exp_avg_sq"]], []),
                    [torch.tensor(step - 1.0)],
                    fused=True,
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    **{name: group[name] for name in ("lr", "weight_decay", "eps")},
                    maximize=False,
                )

        self._state.update(change)
