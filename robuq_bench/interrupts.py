"""Being asked to stop: Ctrl-C, a scheduler's SIGTERM, a terminal that closes (SIGHUP).

The first signal ends what is under way by an exception that drops the unfinished item; stored files
are whole at any instant. Training cannot be dropped as cheaply: inside `at_step_boundary` a signal
waits until the loop has saved its checkpoint. A second signal ends the process at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
_OURS = (signal.SIG_DFL, signal.default_int_handler)  # what may be replaced; others set theirs

_waiting_loops = 0
_pending: int | None = None


class Terminated(BaseException):
    """The process was asked to end by a signal other than Ctrl-C; like KeyboardInterrupt."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def handled() -> Iterator[None]:
    """Take the signals for the length of a command; a signal that is ignored (nohup) stays so."""
    global _pending
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, and only it gets signals
        return
    before: dict[int, Any] = {n: signal.getsignal(n) for n in _SIGNALS}
    before = {number: handler for number, handler in before.items() if handler in _OURS}
    _pending = None
    for number in before:
        signal.signal(number, _on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _pending
    for known in _SIGNALS:
        if signal.getsignal(known) is _on_signal:
            signal.signal(known, signal.SIG_DFL)  # a second one ends the process at once
    if _waiting_loops:
        _pending = number
    else:
        _raise(number)


def _raise(number: int) -> None:
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)


@contextmanager
def at_step_boundary() -> Iterator[Callable[[], bool]]:
    """Let a signal wait; the loop asks the yielded function after every step, and leaves when true.

    Leaving the block delivers the signal.
    """
    global _waiting_loops
    _waiting_loops += 1
    try:
        yield lambda: _pending is not None
    finally:
        _waiting_loops -= 1
        if _pending is not None and not _waiting_loops:
            _raise(_pending)
