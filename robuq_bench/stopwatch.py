"""What work costs: wall-clock seconds, and CPU seconds of this process over all of its threads."""

from __future__ import annotations

import time


class Stopwatch:
    """Seconds since the last lap; a lap that began in an earlier session starts at its sums."""

    def __init__(self, seconds: float = 0.0, cpu_seconds: float = 0.0) -> None:
        self.seconds, self.cpu_seconds = seconds, cpu_seconds
        self._start()

    def _start(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def pause(self) -> dict[str, float]:
        """Add what passed since the last call; return both sums without ending the lap."""
        self.seconds += time.perf_counter() - self._wall
        self.cpu_seconds += time.process_time() - self._cpu
        self._start()
        return {"seconds": round(self.seconds, 3), "cpu_seconds": round(self.cpu_seconds, 3)}

    def lap(self) -> dict[str, float]:
        """End the lap: `seconds` and `cpu_seconds` since the one before."""
        found = self.pause()
        self.seconds = self.cpu_seconds = 0.0
        return found
