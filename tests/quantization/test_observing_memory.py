"""What observing allocates, as PyTorch's profiler counts it, against the bound it states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from robuq_bench.quantization.observing import memory_bytes, observe

ALL = ("tokens", "absmax", "mean", "gram")


def peak_bytes(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes that `work` allocates at its peak, and at its end with its result alive."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    found = profiler.profiler.kineto_results.events()
    events = [(e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]"]
    assert result is not None
    assert events
    running = np.cumsum([size for _, size in sorted(events, key=lambda event: event[0])])
    return int(running.max()), int(running[-1])


@pytest.mark.parametrize("groups", [0, 3])
@pytest.mark.parametrize("needs", [("tokens",), ("absmax",), ("mean",), ("gram",), ALL])
def test_memory_stays_within_the_bound(needs: tuple[Any, ...], groups: int) -> None:
    """With 1,500 tokens a layer, of which 200 are kept, beside what any observer needs."""
    width, layers = 96, 16
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    batches = [torch.randn(250, width) for _ in range(6)]
    names = [str(index) for index in range(layers)]
    options: dict[str, Any] = {"groups": [i % groups for i in range(6)]} if groups else {}

    def run(needs: tuple[Any, ...]) -> Callable[[], object]:
        return lambda: observe(model, names, batches, needs, tokens_per_layer=200, **options)

    counting, _ = peak_bytes(run(()))
    peak, end = peak_bytes(run(needs))
    bound = memory_bytes([width] * layers, needs, 200, groups)
    one_input = batches[0].numel() * 4
    assert peak <= counting + bound + one_input
    assert end <= bound
    assert end > 0.5 * bound or needs != ALL  # nor is it far off
