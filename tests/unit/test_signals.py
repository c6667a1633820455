"""Signals that ask a command to stop."""

from __future__ import annotations

import signal

from fulltune.system import signals


def test_each_signal_is_heard_but_one_that_nohup_had_ignored() -> None:
    heard: list[int] = []
    before = {number: signal.getsignal(number) for number in signals.STOPPING}
    try:
        for ignored, expected in ((signal.SIG_DFL, list(signals.STOPPING)), (signal.SIG_IGN, [2, signal.SIGTERM])):
            signal.signal(signal.SIGHUP, ignored)
            heard.clear()
            answered = signals.set_handlers(lambda number, _: heard.append(number))
            for number in signals.STOPPING:
                signal.raise_signal(number)
            assert heard == expected
            signals.restore_handlers(answered)
            assert signal.getsignal(signal.SIGHUP) == ignored
            assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
    finally:
        signals.restore_handlers(before)
