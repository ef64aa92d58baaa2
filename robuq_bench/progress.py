"""How far a long job is: a bar with ETA on a terminal, else a log line every few seconds.

Everything goes to stderr, so that stdout stays clean for results. Safe to call once per step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

T = TypeVar("T")

DEFAULT_INTERVAL_S = 10.0


class Task:
    """One job of known length: `advance()` counts items, `reach(done)` says how many are done."""

    def __init__(self, owner: Progress, label: str, total: int, completed: int) -> None:
        self.label, self.total, self.completed, self.text = label, total, completed, ""
        self._owner, self._first, self._start_s = owner, completed, owner.clock()
        self._last_line_s = self._start_s
        self._bar_id: TaskID | None = None

    def advance(self) -> None:
        """Say that one more item is done."""
        self.reach(self.completed + 1)

    def reach(self, completed: int, total: int | None = None) -> None:
        """Say that `completed` of `total` items are done."""
        self.completed = completed
        if total is not None:
            self.total = total
        self._owner._refresh(self)

    def update(self, text: str) -> None:
        """Show `text` (a metric, say) beside the count."""
        self.text = text
        self._owner._refresh(self)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the task began."""
        return self._owner.clock() - self._start_s

    def line(self) -> str:
        """The state as one log line: label, count, share, rate, ETA, text."""
        done, total = self.completed, self.total
        rate = (done - self._first) / self.elapsed_s if self.elapsed_s > 0 else 0.0
        parts = [f"{self.label}: {done}/{total}" + (f" ({done / total:.0%})" if total else "")]
        if done < total and rate > 0:
            parts.append(f"{rate:.3g}/s, ETA {format_seconds((total - done) / rate)}")
        elif done >= total:
            parts.append(f"done in {format_seconds(self.elapsed_s)}")
        return ", ".join([*parts, *([self.text] if self.text else [])])


class Progress:
    """Reports tasks to a terminal or a log.

    Args:
        quiet: report nothing.
        interval_s: least time between two log lines of one task, off a terminal.
        stream: where to write; stderr by default.
        is_terminal: draw bars; by default when `stream` is a terminal.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        interval_s: float = DEFAULT_INTERVAL_S,
        stream: TextIO | None = None,
        is_terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.quiet, self.interval_s, self.clock = quiet, interval_s, clock
        self.is_terminal = self.stream.isatty() if is_terminal is None else is_terminal
        self._tasks: list[Task] = []
        self._bar: Bar | None = None

    def track(
        self,
        items: Iterable[T],
        label: str,
        *,
        total: int | None = None,
        completed: int | None = None,
    ) -> Iterator[T]:
        """Yield `items`, reporting each one that is finished.

        `total` counts the whole job; when it exceeds the number of items, the difference was done
        earlier (a resumed run), unless `completed` says otherwise.
        """
        length = len(items) if isinstance(items, Sized) else None
        if total is None:
            total = length or 0
        if completed is None:
            completed = max(0, total - length) if length is not None else 0
        with self.task(label, total, completed) as task:
            for item in items:
                yield item
                task.advance()

    @contextmanager
    def task(self, label: str, total: int, completed: int = 0) -> Iterator[Task]:
        """Report one job for the length of a `with` block; jobs may be nested."""
        task = Task(self, label, total, completed)
        self._tasks.append(task)
        self._open(task)
        try:
            yield task
            self._close(task, finished=True)
        except BaseException:
            self._close(task, finished=False)
            raise

    def update(self, text: str) -> None:
        """Show `text` beside the innermost job; without one, nothing."""
        if self._tasks:
            self._tasks[-1].update(text)

    def log(self, message: str) -> None:
        """Write one line, above the bars if there are any."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            print(message, file=self.stream, flush=True)

    def _open(self, task: Task) -> None:
        if self.quiet or not self.is_terminal:
            return
        if self._bar is None:
            self._bar = _new_bar(self.stream)
            self._bar.start()
        task._bar_id = self._bar.add_task(
            task.label, total=task.total or None, completed=task.completed, text=""
        )

    def _refresh(self, task: Task) -> None:
        if self.quiet:
            return
        if self._bar is not None and task._bar_id is not None:
            self._bar.update(
                task._bar_id, completed=task.completed, total=task.total or None, text=task.text
            )
        elif not self.is_terminal and self.clock() - task._last_line_s >= self.interval_s:
            task._last_line_s = self.clock()
            self.log(task.line())

    def _close(self, task: Task, *, finished: bool) -> None:
        self._tasks.remove(task)
        if self._bar is not None and task._bar_id is not None:
            self._bar.remove_task(task._bar_id)
            if not self._tasks:
                self._bar.stop()
                self._bar = None
        # Off a terminal, short jobs stay silent: only those that showed a line get a last one.
        worth_a_line = self.is_terminal or task.elapsed_s >= self.interval_s
        if finished and worth_a_line:
            self.log(task.line())


def format_seconds(seconds: float) -> str:
    """'7 s', '3:05' (minutes) or '1:02:03' (hours)."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _new_bar(stream: TextIO) -> Bar:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        console=Console(file=stream),
        transient=True,
        redirect_stdout=False,
    )
