"""What a set of timings says: median, spread, and when one implementation may be called faster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

UNSTABLE_ABOVE = 0.10
"""IQR / median above which a timing is marked unstable."""

MAX_P_VALUE = 0.002
LEAST_GAIN = 0.05


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one implementation, one tuple per round.

    Attributes:
        rounds_s: samples of every round.
        method: how a sample was taken, e.g. "CUDA-graph replay".
    """

    rounds_s: tuple[tuple[float, ...], ...]
    method: str

    @property
    def samples_s(self) -> tuple[float, ...]:
        """Samples of all rounds."""
        return tuple(sample for samples in self.rounds_s for sample in samples)

    @property
    def median_s(self) -> float:
        return float(np.median(self.samples_s))

    @property
    def relative_iqr(self) -> float:
        """Interquartile range over median, all rounds together: drift between them counts."""
        low, middle, high = np.quantile(self.samples_s, [0.25, 0.5, 0.75])
        return float((high - low) / middle)

    @property
    def round_medians_s(self) -> tuple[float, ...]:
        """One median per round, which are independent where samples of a round are not."""
        return tuple(float(np.median(samples)) for samples in self.rounds_s)

    @property
    def is_stable(self) -> bool:
        return self.relative_iqr <= UNSTABLE_ABOVE

    def summary(self, unit: str = "us") -> dict[str, Any]:
        """Columns of a table: median, p20 and p80 in `unit` ("us" or "ms"), spread, method."""
        factor = {"us": 1e6, "ms": 1e3}[unit]
        p20, median, p80 = np.quantile(self.samples_s, [0.2, 0.5, 0.8]) * factor
        return {
            f"median_{unit}": float(median),
            f"p20_{unit}": float(p20),
            f"p80_{unit}": float(p80),
            "iqr_over_median": self.relative_iqr,
            "stability": "stable" if self.is_stable else "unstable",
            "samples": len(self.samples_s),
            "rounds": len(self.rounds_s),
            "method": self.method,
        }


@dataclass(frozen=True)
class Comparison:
    """A candidate beside a baseline.

    Attributes:
        speedup: median of the baseline over median of the candidate.
        p_value: two-sided Mann-Whitney U test of all samples.
        verdict: "faster" or "slower" where p < MAX_P_VALUE and the medians differ by LEAST_GAIN
            or more; "no difference shown" otherwise.
    """

    speedup: float
    p_value: float
    verdict: str


def compare(candidate: Sequence[float], baseline: Sequence[float]) -> Comparison:
    """Judge two samples of seconds. Either condition alone is not enough.

    With hundreds of samples a p-value finds differences of no consequence; with few, a gap of 5 %
    is chance.
    """
    speedup = float(np.median(baseline) / np.median(candidate))
    p_value = float(stats.mannwhitneyu(candidate, baseline, alternative="two-sided").pvalue)
    verdict = "no difference shown"
    if p_value < MAX_P_VALUE:
        if speedup >= 1 + LEAST_GAIN:
            verdict = "faster"
        elif speedup <= 1 / (1 + LEAST_GAIN):
            verdict = "slower"
    return Comparison(speedup, p_value, verdict)


def median_interval(timing: Timing, confidence: float = 0.95) -> tuple[float, float]:
    """Limits in seconds of the typical round's median: a t interval over rounds, of logarithms."""
    medians = np.log(timing.round_medians_s)
    return _t_interval(medians.mean(), medians.var(ddof=1) / len(medians), len(medians), confidence)


def speedup_interval(
    candidate: Timing, baseline: Timing, *, interleaved: bool, confidence: float = 0.95
) -> tuple[float, float]:
    """Limits of baseline over candidate: a t interval over rounds, of logarithms of their medians.

    Args:
        candidate, baseline: at least two rounds each; as many of both where they are interleaved.
        interleaved: whether rounds of both took turns; then what a round does to both cancels.
        confidence: of the interval, in (0, 1).
    """
    ours, theirs = (np.log(timing.round_medians_s) for timing in (candidate, baseline))
    if interleaved:
        variance = (theirs - ours).var(ddof=1) / len(ours)
    else:
        variance = ours.var(ddof=1) / len(ours) + theirs.var(ddof=1) / len(theirs)
    rounds = min(len(ours), len(theirs))
    return _t_interval(theirs.mean() - ours.mean(), variance, rounds, confidence)


def _t_interval(
    mean: float, variance: float, rounds: int, confidence: float
) -> tuple[float, float]:
    reach = float(stats.t.ppf((1 + confidence) / 2, rounds - 1)) * math.sqrt(variance)
    return math.exp(mean - reach), math.exp(mean + reach)
