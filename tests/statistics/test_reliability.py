"""The cap of a correlation against simulated seeds, whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from robuq_bench.statistics.reliability import correlation_cap


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_the_cap_is_what_simulated_seeds_reach(seeds: int) -> None:
    draw = np.random.default_rng(seeds)
    truth = draw.normal(size=40_000)
    measured = truth[:, None] + 1.3 * draw.normal(size=(truth.size, seeds))
    rest = measured[:, 1:].mean(axis=1)
    agreement = float(np.corrcoef(measured[:, 0], rest)[0, 1])
    reached = np.corrcoef(measured.mean(axis=1), truth)[0, 1]
    assert correlation_cap(agreement, seeds) == pytest.approx(reached, abs=0.02)


def test_no_cap_without_agreement() -> None:
    assert correlation_cap(1.0, 3) == pytest.approx(1.0)
    assert all(
        math.isnan(correlation_cap(c, k)) for c, k in ((0.0, 3), (-0.2, 3), (math.nan, 3), (0.9, 1))
    )
