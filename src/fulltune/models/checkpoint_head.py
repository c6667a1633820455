"""What becomes of a head that a checkpoint brings: kept by the names of its labels, or drawn anew."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fulltune.errors import SetupError
from fulltune.models import sharding

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

_GENERIC = re.compile(r"LABEL_\d+")
"""transformers' names for labels that nobody named."""


@dataclass(frozen=True)
class Head:
    """What happens to the rows of a checkpoint's head."""

    order: tuple[int, ...] | None
    """For each label of the task its row in the checkpoint's head; empty: the head has no rows for labels, and is kept
    as it is. None: a new one is drawn."""
    why: str
    drawn: tuple[str, ...] = ()
    """Parameters that the checkpoint did not have, or had in another shape, in the model's order."""

    @property
    def in_words(self) -> str:
        return f"new, drawn at random: {self.why}" if self.order is None else f"kept from the checkpoint{self.why}"


_MISSING = Head(None, "the checkpoint has none for this task")
_AS_IT_IS = Head((), "")


def expected_head(brought: PretrainedConfig, model_class: str, changes: Mapping[str, Any]) -> Head:
    """What the configs say; whether the checkpoint's weights hold a head is known when they are loaded."""
    if brought.architectures and model_class not in brought.architectures:
        return _MISSING
    if "id2label" not in changes:
        return _AS_IT_IS
    return by_name(_by_row(brought.id2label or {}), _by_row(changes["id2label"]))


def _by_row(id2label: Mapping[Any, str]) -> tuple[str, ...]:
    """Names in the order of the head's rows: a config's file may hold them in another one (0, 1, 10, 11, 2)."""
    return tuple(id2label[row] for row in sorted(id2label, key=int))


def by_name(theirs: tuple[str, ...], ours: tuple[str, ...]) -> Head:
    """Rows of a head for labels `theirs`, in the order of `ours`."""
    if len(theirs) == len(ours) == 1:
        return Head((0,), "")  # a number has one row, whatever it is called
    if len(set(theirs)) == len(theirs) and set(theirs) == set(ours):
        order = tuple(theirs.index(name) for name in ours)
        same = f": its {len(ours)} labels are the same"
        return Head(order, same if theirs == ours else f"{same}, put into this order by their names")
    if all(_GENERIC.fullmatch(name) for name in theirs):
        return Head(None, f"the checkpoint's {len(theirs)} labels have no names ({_some(theirs)})")
    return Head(None, f"the checkpoint's {len(theirs)} labels are not these ({_some(theirs)})")


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def put_in_order(model: PreTrainedModel, missing: Iterable[str], head: Head, has_labels: bool) -> Head:
    """Give a loaded model the head that the configs promise; returns what it has got."""
    import torch

    above = [name for name in missing if not name.startswith(f"{model.base_model_prefix}.")]
    if above:
        return head if head.order is None else _MISSING
    if not has_labels:
        return _AS_IT_IS
    if head.order is not None and head.order == tuple(range(len(head.order))):
        return head
    rows = _rows_of_labels(model)
    if not rows:
        raise SetupError(
            f"model: {model.name_or_path}: {type(model).__name__} does not show which values of its head belong to "
            "which label; take a checkpoint without a head"
        )
    parameters = {name: model.get_parameter(name) for name in rows}
    with torch.no_grad(), sharding.changed_for_all(list(parameters.values())):
        if head.order is None:
            _draw(model, parameters)
        else:
            for name, axis in rows.items():
                values = sharding.whole(parameters[name])
                values = values.index_select(axis, torch.tensor(head.order, device=values.device))
                parameters[name].copy_(sharding.like(values, parameters[name]))
    return head


def _rows_of_labels(model: PreTrainedModel) -> dict[str, int]:
    """Parameters that have a row for each label, and the axis of the rows: those that one label more makes larger."""
    import torch

    larger: Any = copy.deepcopy(model.config)
    larger.num_labels += 1
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        one, other = (type(model)(config) for config in (copy.deepcopy(model.config), larger))
    shapes = {name: parameter.shape for name, parameter in other.named_parameters()}
    return {
        name: next(
            axis for axis, (few, more) in enumerate(zip(parameter.shape, shapes[name], strict=True)) if few != more
        )
        for name, parameter in one.named_parameters()
        if parameter.shape != shapes[name]
    }


def _draw(model: PreTrainedModel, parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """New values, as transformers draws those that a checkpoint lacks: on an empty copy of the model, because of a part
    of a parameter other values would be drawn than of the whole."""
    import torch

    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        empty = type(model)(copy.deepcopy(model.config))
    above = set()
    for name, parameter in parameters.items():
        path, _, own = name.rpartition(".")
        room = torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
        setattr(empty.get_submodule(path), own, room)
        names = path.split(".")
        above |= {empty.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)}
    # Children come first, as transformers does it: in some models (ModernBERT) a parent draws for its children.
    empty.apply(lambda module: empty._init_weights(module) if module in above else None)
    for name, parameter in parameters.items():
        parameter.copy_(sharding.like(empty.get_parameter(name), parameter))


def draw(model: PreTrainedModel, head: Head) -> None:
    """Draw what the checkpoint lacks."""
    import torch

    sharding.free(model)
    parameters = {name: model.get_parameter(name) for name in head.drawn}
    with torch.no_grad(), sharding.changed_for_all(list(parameters.values())):
        _draw(model, parameters)


def draw_again(model: PreTrainedModel, head: Head, seed: int) -> None:
    """The same by this seed; the random state is left as it is."""
    import torch

    state = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        draw(model, head)
    finally:
        torch.set_rng_state(state)
