"""Being asked to stop: Ctrl-C, a scheduler's SIGTERM, a terminal that closes (SIGHUP).

The first signal ends what is under way by an exception that drops the unfinished item; stored files
are whole at any instant. Training cannot be dropped as cheaply: inside `at_step_boundary` a signal
waits until the loop has saved its checkpoint. Signals within `GRACE_S` of the first are taken for
copies of it (wrappers forward to the whole process group, terminals send HUP and TERM); a later one
ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
_OURS = (signal.SIG_DFL, signal.default_int_handler)  # what may be replaced; others set theirs

GRACE_S = 2.0

_waiting_loops = 0
_pending: int | None = None  # the signal that waits for a loop
_first_at: float | None = None  # when this command was first asked to end


class Terminated(BaseException):
    """The process was asked to end by a signal other than Ctrl-C; like KeyboardInterrupt."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def handled(*, until_exit: bool = False) -> Iterator[None]:
    """Take the signals for the length of a command; a signal that is ignored (nohup) stays so.

    With `until_exit`, a command that was asked to end keeps them: copies of the signal that come
    while the interpreter shuts down must not change the exit code.
    """
    global _pending, _first_at
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, and only it gets signals
        return
    before: dict[int, Any] = {n: signal.getsignal(n) for n in _SIGNALS}
    before = {number: handler for number, handler in before.items() if handler in _OURS}
    _pending = _first_at = None
    for number in before:
        signal.signal(number, _on_signal)
    try:
        yield
    finally:
        if not (until_exit and _was_asked()):
            _first_at = time.monotonic()  # the command is over: nothing is left to be ended
            for number, handler in before.items():
                signal.signal(number, handler)


def _was_asked() -> bool:
    return _first_at is not None


def _on_signal(number: int, frame: FrameType | None) -> None:
    # The handler stays: Python complains aloud about a pending signal whose handler went away.
    global _pending, _first_at
    now = time.monotonic()
    if _first_at is not None:
        if now - _first_at > GRACE_S:
            os._exit(128 + number)
        return
    _first_at = now
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
