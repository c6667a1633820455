"""Cards that are not there: functions of `torch.cuda` and `torch.accelerator` are replaced by ones that answer as if
there were cards, and keep books as a card's allocator does; a function that is not replaced fails when it is called.

It computes nothing and holds no tensor: a test takes memory by hand, and draws from a card's random numbers by hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers.utils import import_utils

GIB = 2**30


@dataclass
class Card:
    """One card, as torch's `get_device_properties` describes it, with what torch's allocator would hold on it."""

    name: str
    total_memory: int
    capability: tuple[int, int]
    taken_by_others: int = GIB
    allocated: int = 0
    """Bytes of tensors."""
    reserved: int = 0
    """What the allocator has from the driver; freed tensors stay in it."""
    peak_allocated: int = 0
    peak_reserved: int = 0
    share: float = 1.0
    """Of the card that this process may take."""
    random: torch.Generator = field(default_factory=torch.Generator)

    @property
    def major(self) -> int:
        return self.capability[0]

    @property
    def minor(self) -> int:
        return self.capability[1]

    def take(self, num_bytes: int) -> None:
        """A tensor of this size is made.

        Raises:
            torch.OutOfMemoryError: In the words of torch, when it does not fit.
        """
        if max(self.reserved, self.allocated + num_bytes) > self.share * self.total_memory:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {num_bytes / GIB:.2f} GiB.")
        self.allocated += num_bytes
        self.reserved = max(self.reserved, self.allocated)
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def free(self, num_bytes: int) -> None:
        """That tensor is gone; its memory stays reserved."""
        self.allocated -= num_bytes


def h100() -> Card:
    return Card("NVIDIA H100 80GB HBM3", 80 * GIB, (9, 0))


def a100() -> Card:
    return Card("NVIDIA A100-SXM4-40GB", 40 * GIB, (8, 0))


def t4() -> Card:
    return Card("Tesla T4", 16 * GIB, (7, 5))


@dataclass
class Cards:
    """What `torch.cuda` answers from."""

    cards: list[Card]
    current: int = 0
    waits: int = 0
    """How often the host waited for a card."""

    def __getitem__(self, index: int) -> Card:
        return self.cards[index]

    def of(self, device: Any = None) -> Card:
        """By number, by device, or the current one."""
        index = self._index(device)
        return self.cards[self.current if index is None else index]

    @staticmethod
    def _index(device: Any) -> int | None:
        return device if isinstance(device, int | None) else torch.device(device).index

    @contextlib.contextmanager
    def plugged_in(self) -> Iterator[Cards]:
        """Inside, torch sees these cards."""
        answers = ((torch.cuda, self._answers()), (torch.accelerator, self._answers_of_accelerator()))
        with contextlib.ExitStack() as patches:
            for module, of_module in answers:
                patches.enter_context(mock.patch.multiple(module, **(unanswered(module) | of_module)))
            forget_what_was_found()
            try:
                yield self
            finally:
                forget_what_was_found()

    def _answers(self) -> dict[str, Any]:
        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "is_current_stream_capturing": lambda: False,
            "is_bf16_supported": lambda *_, **__: self.of().major >= 8,
            "device_count": lambda: len(self.cards),
            "current_device": lambda: self.current,
            "set_device": self._go_to,
            "synchronize": self._wait,
            "get_device_properties": lambda device=None: self.of(device),
            "get_device_capability": lambda device=None: self.of(device).capability,
            "mem_get_info": lambda device=None: self._free(self.of(device)),
            "memory_allocated": lambda device=None: self.of(device).allocated,
            "max_memory_allocated": lambda device=None: self.of(device).peak_allocated,
            "memory_reserved": lambda device=None: self.of(device).reserved,
            "max_memory_reserved": lambda device=None: self.of(device).peak_reserved,
            "empty_cache": self._empty,
            "reset_peak_memory_stats": self._reset,
            "set_per_process_memory_fraction": lambda share, device=None: setattr(self.of(device), "share", share),
            "get_rng_state": lambda device=None: self.of(device).random.get_state(),
            "set_rng_state": lambda state, device=None: self.of(device).random.set_state(state),
            "manual_seed_all": lambda seed: [card.random.manual_seed(seed) for card in self.cards],
        }

    def _answers_of_accelerator(self) -> dict[str, Any]:
        """accelerate asks here since 1.16."""
        return {
            "is_available": lambda: True,
            "current_accelerator": lambda check_available=False: torch.device("cuda"),
            "device_count": lambda: len(self.cards),
            "current_device_index": lambda: self.current,
        }

    @staticmethod
    def _free(card: Card) -> tuple[int, int]:
        return card.total_memory - card.taken_by_others - card.reserved, card.total_memory

    def _go_to(self, device: Any) -> None:
        self.current = self._index(device) or 0

    def _wait(self, device: Any = None) -> None:
        self.waits += 1

    def _empty(self) -> None:
        for card in self.cards:
            card.reserved = card.allocated

    def _reset(self, device: Any = None) -> None:
        card = self.of(device)
        card.peak_allocated, card.peak_reserved = card.allocated, card.reserved


def forget_what_was_found() -> None:
    """accelerate and transformers ask for devices once, and remember the answer."""
    AcceleratorState._reset_state(reset_partial_state=True)
    for function in vars(import_utils).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def unanswered(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """Each public function of a module, as one that fails: what the cards answer stands in its place."""

    def refusing(name: str) -> Callable[..., Any]:
        def refuse(*_: Any, **__: Any) -> Any:
            pytest.fail(f"a library asks {module.__name__}.{name}, which the stand-in for cards does not answer")

        return refuse

    return {name: refusing(name) for name in module.__all__ if isinstance(getattr(module, name, None), FunctionType)}
