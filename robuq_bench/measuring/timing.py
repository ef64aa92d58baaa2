"""Interleaved timing: every implementation in every round, so that a drift hits all alike.

A stopwatch knows how to run its work `calls` times and how long that took. Rounds, their length
and their order are decided here without knowing what is timed, so a test can use a clock of its
own. On CUDA the work is captured in a graph and replayed: launch overhead would otherwise be most
of the time of a short kernel, and a different share for each implementation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from robuq_bench.measuring.statistics import Timing

MIN_SAMPLES = 5
MAX_SAMPLES = 2000
SAMPLE_S = 1e-3  # of one graph replay, beside which its launch is noise
MAX_CALLS = 2000


class Stopwatch(Protocol):
    """`calls` pieces of work; calling it does them and returns the seconds they took."""

    calls: int
    method: str

    def __call__(self) -> float: ...


def time_interleaved(
    watches: Mapping[str, Stopwatch],
    *,
    rounds: int = 3,
    round_s: float = 0.1,
    min_samples: int = MIN_SAMPLES,
) -> dict[str, Timing]:
    """Time every stopwatch in each of `rounds` rounds; the starting one moves on by one a round.

    In a round a stopwatch runs once unrecorded, then until `round_s` seconds and `min_samples`
    samples are recorded (at most MAX_SAMPLES).

    Returns:
        Seconds per call, by name.
    """
    names = list(watches)
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    for index in range(rounds):
        start = index % max(len(names), 1)
        for name in [*names[start:], *names[:start]]:
            watch = watches[name]
            watch()
            samples: list[float] = []
            total_s = 0.0
            while len(samples) < MAX_SAMPLES and (total_s < round_s or len(samples) < min_samples):
                elapsed_s = watch()
                total_s += elapsed_s
                samples.append(elapsed_s / watch.calls)
            found[name].append(tuple(samples))
    return {name: Timing(tuple(found[name]), watches[name].method) for name in names}


class EagerCalls:
    """Calls one after the other between two CUDA events; launch overhead is part of the time."""

    method = "CUDA events around eager calls"

    def __init__(self, work: Sequence[Callable[[], object]], warmup: int = 3) -> None:
        self.work, self.calls = list(work), len(work)
        for _ in range(warmup):
            for call in self.work:
                call()
        torch.cuda.synchronize()

    def __call__(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for call in self.work:
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def capture(work: Sequence[Callable[[], object]], repeats: int = 1) -> torch.cuda.CUDAGraph:
    """One CUDA graph of all calls; run them before, so that nothing is compiled in the capture."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in work:
                call()
    return graph


class GraphReplay:
    """Replays of one CUDA graph that holds all calls, repeated until a replay takes SAMPLE_S.

    Pass one call per copy of the weights: consecutive calls then read different memory, as the
    layers of a network do, and the L2 cache does not hide the traffic.
    """

    method = "CUDA-graph replay"

    def __init__(self, work: Sequence[Callable[[], object]], warmup: int = 3) -> None:
        work = list(work)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # autotuning and allocation happen outside the capture
            for _ in range(warmup):
                for call in work:
                    call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.calls = len(work)
        self.graph = capture(work)
        self()
        repeats = min(math.ceil(SAMPLE_S / self()), max(1, MAX_CALLS // len(work)))
        if repeats > 1:
            del self.graph
            self.graph = capture(work, repeats)
            self.calls = repeats * len(work)

    def __call__(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def copies_beyond_cache(bytes_per_copy: int, cache_bytes: int, most: int = 64) -> int:
    """How many copies are twice the cache: reading them in turn finds none of them in it."""
    return max(1, min(most, math.ceil(2 * cache_bytes / max(bytes_per_copy, 1))))


def cache_bytes(device: torch.device | str) -> int:
    """Size of the L2 cache of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)
