from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

ENDING = (signal.SIGTERM, signal.SIGHUP)
STOPPING = (signal.SIGINT, *ENDING)
Handler = Callable[[int, FrameType | None], object]
Handlers = Mapping[int, Any]
_TERMINALS = [number for number in (1, 2) if os.isatty(number)]


def set_handlers(handler: Handler, numbers: Sequence[int] = STOPPING) -> Handlers:
    """Make these signals call `handler`, except a SIGHUP that `nohup` ignores; return the previous handlers."""

    def silence_closed_terminals(number: int, frame: FrameType | None) -> None:
        for terminal in _TERMINALS:
            if not os.isatty(terminal):  # closed, so writing would fail
                os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)
        handler(number, frame)

    heard = [number for number in numbers if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    return {
        number: signal.signal(number, silence_closed_terminals if number == signal.SIGHUP else handler)
        for number in heard
    }


def restore_handlers(handlers: Handlers) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def temporary_handlers(handler: Handler, numbers: Sequence[int] = STOPPING) -> Iterator[Handlers]:
    """Make these signals call `handler` during the block; yield the previous handlers (main thread only)."""
    try:
        before: Handlers = set_handlers(handler, numbers)
    except ValueError:
        before = {}
    try:
        yield before
    finally:
        restore_handlers(before)
