"""Intervals and rejection rates for tokens that are not independent of each other.

Tokens of one image share their content, so an interval over tokens would be too narrow: images are
resampled whole (cluster bootstrap; Davison and Hinkley, "Bootstrap Methods and their Application",
1997, section 3.8). Rejection rates are given raw and at a controlled false discovery rate
(Benjamini and Hochberg, 1995).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robuq_bench.errors import UsageError
from robuq_bench.normality.names import MIN_IMAGES

MIN_CLUSTERS = MIN_IMAGES
"""Fewer images than this give a percentile interval that is clearly too narrow."""


class MeanInterval(NamedTuple):
    """Mean and interval [low, high], each of shape values.shape[1:]; numpy floats for 1-D values.

    `mean, low, high = cluster_bootstrap_mean(...)`.
    """

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


class RejectedShare(NamedTuple):
    """Share of tokens rejected by p <= alpha: `raw`, and `adjusted` by Benjamini-Hochberg."""

    raw: float
    adjusted: float


def cluster_bootstrap_mean(
    values: ArrayLike,
    clusters: ArrayLike,
    draws: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
    min_clusters: int = MIN_CLUSTERS,
) -> MeanInterval:
    """Mean over tokens with a percentile interval from resampling whole clusters.

    A draw takes as many clusters as there are, with replacement, and averages all their tokens:
    only the sums and sizes of the clusters are needed, weighted by multinomial counts. All columns
    share the draws.

    Args:
        values: [T] or [T, m], finite; the caller decides about degenerate tokens.
        clusters: [T] integers, the image of each token.
        draws: bootstrap samples.
        seed: of the draws.
        confidence: of the interval, in (0, 1).
        min_clusters: least number of clusters; lower it only where the text says so.

    Raises:
        UsageError: values not finite or not of these shapes, fewer than `min_clusters` clusters,
            no draws, or a confidence outside (0, 1).
    """
    table, labels = np.asarray(values, dtype=np.float64), np.asarray(clusters)
    if table.ndim not in (1, 2) or labels.shape != table.shape[:1] or len(labels) == 0:
        raise UsageError(
            "the bootstrap needs values [T] or [T, m] and one cluster for each of the T; got "
            f"{table.shape} and {labels.shape}"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(f"clusters are integers such as image indices, got {labels.dtype}")
    if not np.isfinite(table).all():
        bad = int((~np.isfinite(table)).sum())
        raise UsageError(f"{bad} of {table.size} values are not finite; count and leave them out")
    if draws < 1 or not 0 < confidence < 1:
        raise UsageError(f"needs draws >= 1 and 0 < confidence < 1, got {draws} and {confidence}")
    names, index = np.unique(labels, return_inverse=True)
    count = len(names)
    if count < min_clusters:
        raise UsageError(
            f"{count} images are too few for an interval: take at least {min_clusters}, or pass "
            "min_clusters and say so beside the number"
        )
    columns = table.reshape(len(labels), -1)
    # Centred first, so that a large common offset costs no digits.
    centre = columns.mean(axis=0)
    sums = np.zeros((count, columns.shape[1]))
    np.add.at(sums, index, columns - centre)
    sizes = np.bincount(index, minlength=count)
    drawn = _resamples(count, draws, seed)
    means = centre + (drawn @ sums) / (drawn @ sizes)[:, None]
    edges = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(means, edges, axis=0)
    shape = table.shape[1:]
    # [()] turns the zero-dimensional result of 1-D values into a float.
    return MeanInterval(centre.reshape(shape)[()], low.reshape(shape)[()], high.reshape(shape)[()])


def cluster_ratios(
    numerators: NDArray[np.float64],
    denominators: NDArray[np.float64],
    draws: int = 2000,
    seed: int = 0,
    min_clusters: int = MIN_CLUSTERS,
) -> NDArray[np.float64]:
    """Ratios of sums over clusters, of the clusters as they are and of resamples of them.

    Args:
        numerators: [..., C], a sum over the tokens of each of C clusters.
        denominators: [..., C], its shape may be broadcast to that of `numerators`.
        draws: bootstrap samples; all ratios share them, and calls of equal C, draws and seed.
        seed: of the draws.
        min_clusters: least number of clusters.

    Returns:
        [1 + draws, ...]: first the estimate. Not finite where a denominator is 0.

    Raises:
        UsageError: fewer than `min_clusters` clusters.
    """
    count = numerators.shape[-1]
    if count < min_clusters:
        raise UsageError(
            f"{count} images are too few for an interval: take at least {min_clusters}"
        )
    weights = np.concatenate([np.ones((1, count)), _resamples(count, draws, seed)])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (numerators @ weights.T) / (denominators @ weights.T)
    return np.asarray(np.moveaxis(ratios, -1, 0))


def interval_of(drawn: NDArray[np.float64], confidence: float = 0.95) -> MeanInterval:
    """Estimate and percentile interval of what `cluster_ratios` returned, or a function of it."""
    edges = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(drawn[1:], edges, axis=0)
    return MeanInterval(drawn[0], low, high)


def with_draws(estimate: MeanInterval, by_draw: NDArray[np.float64]) -> MeanInterval:
    """The interval of a mean over draws, [...], widened for their spread; by_draw [draws, ...].

    Its half-widths and the 95 % half-width of Student's t between draws join in quadrature.
    """
    from scipy.stats import t

    count = len(by_draw)
    between = t.ppf(0.975, count - 1) * by_draw.std(0, ddof=1) / np.sqrt(count)
    mean, low, high = estimate
    return MeanInterval(
        mean, mean - np.hypot(mean - low, between), mean + np.hypot(high - mean, between)
    )


@functools.lru_cache(maxsize=8)
def _resamples(count: int, draws: int, seed: int) -> NDArray[np.int64]:
    """How often each of `count` clusters is drawn: [draws, count], shared and so not writable."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=draws)
    drawn.flags.writeable = False
    return drawn


def rejected_share(p: ArrayLike, alpha: float) -> RejectedShare:
    """Share of p-values [T] at most alpha, before and after Benjamini-Hochberg over the T.

    Raises:
        UsageError: no p-values, one outside [0, 1] or NaN, or alpha outside (0, 1).
    """
    values = np.asarray(p, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not ((values >= 0) & (values <= 1)).all():
        raise UsageError(
            f"needs p-values [T] in [0, 1], none of them NaN; got shape {values.shape}"
        )
    if not 0 < alpha < 1:
        raise UsageError(f"alpha lies in (0, 1), got {alpha}")
    from scipy.stats import false_discovery_control

    adjusted = false_discovery_control(values, method="bh")
    return RejectedShare(float((values <= alpha).mean()), float((adjusted <= alpha).mean()))
