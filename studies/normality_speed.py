"""What the normality statistics of a token cost beside scipy's Shapiro-Wilk test.

Normal float32 tokens on the CPU, in one process: all statistics of `token_statistics`, the loop
`for row in X: scipy.stats.shapiro(row)` and `scipy.stats.shapiro(X, axis=1)`. The three are
interleaved, so that a drift of the machine's speed hits all alike; figures are medians over the
rounds. No time is reported before every statistic tested here has been compared with scipy's or
statsmodels' on the timed tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import stats
from statsmodels.stats.diagnostic import lilliefors, normal_ad

from robuq_bench.config import Config
from robuq_bench.context import Context
from robuq_bench.errors import CheckError
from robuq_bench.normality.statistics import computed_by, token_statistics
from robuq_bench.runs.run import Run

VERSION = "2"
SUMMARY = "Cost of all normality statistics of a token beside scipy's Shapiro-Wilk test."
USES_DATA = False
WIDTHS = (384, 1152, 4608)
TOKENS = 512
WARMUP_ROUNDS = 1
TIMED_ROUNDS = 9
CHECKED_TOKENS = 64  # of the references that take one token at a time
ALLOWED = 1e-9
"""Largest deviation from a reference, which carries a rounding error of its own."""


def measure(config: Config, run: Run, context: Context) -> list[dict[str, Any]]:
    """Check, then time, one row per token width."""
    rows = []
    with context.progress.task("normality-speed", len(WIDTHS)) as task:
        for n in WIDTHS:
            generator = torch.Generator().manual_seed(config.seed)
            tokens = torch.randn(TOKENS, n, generator=generator)
            deviations = compare_statistics(tokens)
            rows.append(row(tokens, time_ways(tokens), deviations, context))
            task.advance()
    for item in rows:
        run.append(f"normality-speed/{item['n']}", kind="normality-speed", **item)
    run.write_table("normality_speed", rows)
    return rows


def compare_statistics(tokens: torch.Tensor) -> dict[str, float]:
    """Return the largest absolute deviation of each statistic from its reference.

    References see the same values in float64: scipy centres in the dtype it is given.

    Raises:
        CheckError: a deviation is above `ALLOWED`.
    """
    ours = token_statistics(tokens)
    X = tokens.double().numpy()
    w, p = stats.shapiro(X, axis=1)
    few = X[:CHECKED_TOKENS]
    reference = {
        "shapiro_w": w,
        "shapiro_p": p,
        "anderson_a2": np.array([normal_ad(x)[0] for x in few]),
        "ks_distance": np.array([lilliefors(x)[0] for x in few]),
        "dagostino_k2": stats.normaltest(few, axis=1).statistic,
    }
    deviations = {}
    for name, expected in reference.items():
        found = getattr(ours, name)[: len(expected)]
        deviations[name] = float(np.abs(found - expected).max())
        # Written this way round, a NaN fails too.
        if not deviations[name] <= ALLOWED:
            raise CheckError(
                f"{name} at n = {ours.n} is off by {deviations[name]:.1e} from its reference, "
                f"allowed {ALLOWED:.0e}: no timing is reported"
            )
    return deviations


def time_ways(tokens: torch.Tensor) -> dict[str, float]:
    """Median microseconds per token of each way, interleaved over the rounds."""
    X = tokens.numpy()
    ways: dict[str, Callable[[], object]] = {
        "all": lambda: token_statistics(tokens),
        "scipy_loop": lambda: [stats.shapiro(x) for x in X],
        "scipy_axis": lambda: stats.shapiro(X, axis=1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(WARMUP_ROUNDS + TIMED_ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if repetition >= WARMUP_ROUNDS:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) / len(X) * 1e6 for name, s in seconds.items()}


def row(
    tokens: torch.Tensor, cost: dict[str, float], deviations: dict[str, float], context: Context
) -> dict[str, Any]:
    """Microseconds per token, how many times faster than scipy, and the deviations."""
    return {
        "n": tokens.shape[1],
        "tokens": tokens.shape[0],
        "threads": context.threads,
        "computed_by": computed_by(),
        "all_us": cost["all"],
        "scipy_loop_us": cost["scipy_loop"],
        "scipy_axis_us": cost["scipy_axis"],
        "scipy_loop_over_all": cost["scipy_loop"] / cost["all"],
        "scipy_axis_over_all": cost["scipy_axis"] / cost["all"],
        **{f"max_deviation_{name}": value for name, value in deviations.items()},
    }
