"""Seconds and CPU seconds of work, against clocks that stand still."""

from __future__ import annotations

import pytest

from robuq_bench import stopwatch
from robuq_bench.stopwatch import Stopwatch


def test_laps_add_up_over_pauses_and_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"perf_counter": 10.0, "process_time": 1.0}
    for name in now:
        monkeypatch.setattr(stopwatch.time, name, lambda name=name: now[name])

    def pass_by(wall: float, cpu: float) -> None:
        now["perf_counter"] += wall
        now["process_time"] += cpu

    watch = Stopwatch()
    pass_by(2.0, 3.0)
    assert watch.pause() == {"seconds": 2.0, "cpu_seconds": 3.0}
    pass_by(1.0, 0.5)
    told = watch.pause()
    again = Stopwatch(**told)  # in the next session
    pass_by(4.0, 8.0)
    assert again.lap() == {"seconds": 7.0, "cpu_seconds": 11.5}
    pass_by(0.25, 0.125)
    assert again.lap() == {"seconds": 0.25, "cpu_seconds": 0.125}
