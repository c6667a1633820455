from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fulltune.stream.store import page_align

WEIGHTS, GRADIENT = "weights", "gradient"
SLICE = 2**20
"""Values of a parameter that are updated together. Slices of all its sections begin at whole pages."""


@dataclass(frozen=True)
class SectionLayout:
    """An array of a parameter: `per` values share an element, and the values are padded to a `multiple`."""

    dtype: torch.dtype
    per: int = 1
    multiple: int = 1


@dataclass(frozen=True)
class TensorLayout:
    """A parameter and its sections: weights, and what the optimizer keeps of it."""

    name: str
    shape: tuple[int, ...]
    sections: Mapping[str, SectionLayout]


@dataclass(frozen=True)
class Span:
    """Elements at byte `offset` of a unit, and at byte `place` of a buffer."""

    offset: int
    place: int
    length: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return page_align(self.length * self.dtype.itemsize)

    def pages(self, buffer: Tensor) -> Tensor:
        return buffer[self.place : self.place + self.num_bytes]

    def tensor(self, buffer: Tensor) -> Tensor:
        return self.pages(buffer)[: self.length * self.dtype.itemsize].view(self.dtype)


class UnitLayout:
    """Where a unit's arrays lie: in its record all weights, then the other sections; apart from it the gradients."""

    def __init__(self, tensors: Sequence[TensorLayout], gradients: torch.dtype) -> None:
        own = {GRADIENT: SectionLayout(gradients)}
        self.tensors = {one.name: replace(one, sections={**one.sections, **own}) for one in tensors}
        self.spans: dict[tuple[str, str], Span] = {}
        others = {section: None for one in tensors for section in one.sections if section != WEIGHTS}
        self.weights_bytes = self._place([WEIGHTS], 0)
        self.num_bytes = self._place([*others], self.weights_bytes)
        self.gradient_bytes = self._place([GRADIENT], 0)

    def _place(self, sections: Sequence[str], offset: int) -> int:
        """Place sections of all parameters one behind the other; return where they end."""
        for name, section in ((name, section) for section in sections for name in self.tensors):
            if layout := self.tensors[name].sections.get(section):
                values = -(-math.prod(self.tensors[name].shape) // layout.multiple) * layout.multiple
                span = self.spans[name, section] = Span(offset, offset, -(-values // layout.per), layout.dtype)
                offset += span.num_bytes
        return offset

    def views(self, section: str, buffer: Tensor) -> dict[str, Tensor]:
        """Return each parameter's weights or gradient in a buffer that holds those of the unit."""
        return {name: self.spans[name, section].tensor(buffer).view(one.shape) for name, one in self.tensors.items()}

    def slices(self) -> Iterator[tuple[str, int, dict[str, Span]]]:
        """Yield a parameter, a position in it and the slices of its sections there, side by side in a buffer."""
        for name, tensor in self.tensors.items():
            for begin in range(0, math.prod(tensor.shape), SLICE):
                place, spans = 0, {}
                for section, layout in tensor.sections.items():
                    whole, first = self.spans[name, section], begin // layout.per
                    length = min(SLICE // layout.per, whole.length - first)
                    spans[section] = Span(whole.offset + first * layout.dtype.itemsize, place, length, layout.dtype)
                    place += spans[section].num_bytes
                yield name, begin, spans
