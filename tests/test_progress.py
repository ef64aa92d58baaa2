"""Progress off and on a terminal."""

from __future__ import annotations

import io
import itertools

import pytest

from robuq_bench.progress import Progress, format_seconds


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def log_of(clock: Clock, **settings: bool) -> tuple[Progress, io.StringIO]:
    stream = io.StringIO()
    return Progress(stream=stream, interval_s=10, clock=clock, **settings), stream


def test_a_log_line_every_interval_with_rate_and_eta(clock: Clock) -> None:
    progress, stream = log_of(clock)
    for step in progress.track(range(600), "QAT"):
        clock.now += 0.25
        if step == 39:
            progress.update("loss 0.5")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "QAT: 39/600 (6%), 3.9/s, ETA 2:24, loss 0.5"
    assert lines[1].startswith("QAT: 80/600 (13%), 4/s, ETA 2:10")
    assert lines[-1] == "QAT: 600/600 (100%), done in 2:30, loss 0.5"
    assert len(lines) == 16


def test_short_jobs_are_silent_in_a_log(clock: Clock) -> None:
    progress, stream = log_of(clock)
    assert list(progress.track(range(5), "short")) == [0, 1, 2, 3, 4]
    assert stream.getvalue() == ""


def test_quiet_says_nothing(clock: Clock) -> None:
    progress, stream = log_of(clock, quiet=True)
    for _ in progress.track(range(3), "QAT"):
        clock.now += 60
        progress.update("loss")
    progress.log("message")
    assert stream.getvalue() == ""


def test_a_resumed_job_counts_what_was_done_before(clock: Clock) -> None:
    progress, stream = log_of(clock)
    for _ in progress.track(range(500, 600), "QAT", total=600):
        clock.now += 1
    # the rate is that of this session: 10 in 10 s, not 510 in 10 s
    assert stream.getvalue().splitlines()[0] == "QAT: 510/600 (85%), 1/s, ETA 1:30"


def test_tasks_take_what_is_done_and_may_nest(clock: Clock) -> None:
    progress, stream = log_of(clock)
    with progress.task("outer", 2) as outer:
        with progress.task("inner", 0) as inner:
            clock.now += 10
            inner.reach(50, 200)
            progress.update("deep")
        outer.advance()
    assert (inner.completed, inner.total, inner.text, outer.text) == (50, 200, "deep", "")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "inner: 50/200 (25%), 5/s, ETA 30 s"
    assert "outer: 1/2 (50%), 0.1/s, ETA 10 s" in lines


def test_iterators_without_a_length_are_counted(clock: Clock) -> None:
    progress, stream = log_of(clock)
    for _ in progress.track(itertools.islice(itertools.count(), 3), "stream", total=3):
        clock.now += 10
    assert stream.getvalue().splitlines()[-1] == "stream: 3/3 (100%), done in 30 s"


def test_a_failed_job_does_not_claim_to_be_done(clock: Clock) -> None:
    progress, stream = log_of(clock)

    def fail() -> None:
        with progress.task("QAT", 10) as task:
            clock.now += 15
            task.reach(3)
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        fail()
    assert stream.getvalue() == "QAT: 3/10 (30%), 0.2/s, ETA 35 s\n"
    progress.update("nothing is running")


def test_a_terminal_gets_a_bar_and_one_last_line(clock: Clock) -> None:
    progress, stream = log_of(clock, is_terminal=True)
    for step in progress.track(range(4), "QAT"):
        clock.now += 1
        progress.update(f"loss {step}")
        if step == 1:
            progress.log("[not markup]")
    text = stream.getvalue()
    assert "[not markup]" in text
    assert text.rstrip().endswith("QAT: 4/4 (100%), done in 4 s, loss 3")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (60, "1:00"),
        (185, "3:05"),
        (3600, "1:00:00"),
        (3723, "1:02:03"),
    ],
)
def test_seconds_are_readable(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
