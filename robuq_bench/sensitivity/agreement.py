"""How well a sensitivity metric orders layers as the ground truth does.

Ties count as in SciPy: average ranks in Spearman's ρ, Kendall's τ in its b form. Intervals come
from the percentile bootstrap over layers (Efron 1979): layers are drawn with replacement, each with
all its bit widths, because the bit widths of a layer are not independent observations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from robuq_bench.errors import RobuqError, UsageError, suggest
from robuq_bench.statistics.bootstrap import bootstrap_p_value

Array = npt.NDArray[np.float64]
#: (x [n], y [n], counts [R, n]) -> [R].
Statistic = Callable[[Array, Array, Array], Array]
#: {layer: {bits: value}}, of a metric or of the truth.
Values = Mapping[str, Mapping[int, float]]

#: Resamples in one matrix product; bounds its memory.
CHUNK = 250


@dataclass(frozen=True)
class Estimate:
    """A rank correlation and its bootstrap interval; None where it is undefined (all tied).

    `p_values` are two-sided, one for every null value that was asked for: twice the smaller share
    of resamples on one side of it, at least 2 / (resamples + 1).
    """

    value: float | None
    low: float | None
    high: float | None
    p_values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Agreement:
    """Agreement of two orders of `items` (layers, or pairs of layer and bits).

    Attributes:
        bits: the bit width compared, None for all pairs together.
        items: number of items ranked.
        spearman, kendall: ρ and τ_b with intervals.
        overlap: {k: share of the k largest items that both orders have in common}.
    """

    bits: int | None
    items: int
    spearman: Estimate
    kendall: Estimate
    overlap: dict[int, float]


def rank_agreement(
    metric: Values,
    truth: Values,
    *,
    bits: int | None = None,
    top: Sequence[int] = (3, 5),
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Compare a metric with the truth, at one bit width or over all (layer, bits) pairs.

    Args:
        metric: values of the metric; order of layers and bits does not matter.
        truth: values it should order alike; same layers, and at least the compared bit widths.
        bits: a bit width, or None for every width the two tables share.
        top: sizes k of the top-k overlap; those above the number of items are left out.
        resamples: bootstrap resamples.
        confidence: of the intervals.
        seed: of the resamples.

    Raises:
        UsageError: tables with different layers, fewer than three layers, no common bit width, or
            impossible settings.
        RobuqError: a value that is not finite, naming layer and bits.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise UsageError(f"impossible bootstrap: {resamples} resamples, confidence {confidence}")
    x, y = _matrices(metric, truth, bits)
    layers, widths = x.shape
    weights = np.repeat(_draw(layers, resamples, seed), widths, axis=1).astype(np.float64)
    x, y = x.reshape(-1), y.reshape(-1)
    ones = np.ones((1, x.size))
    return Agreement(
        bits=bits,
        items=x.size,
        spearman=_estimate(spearman(x, y, ones), _in_chunks(spearman, x, y, weights), confidence),
        kendall=_estimate(kendall(x, y, ones), _in_chunks(kendall, x, y, weights), confidence),
        overlap={k: _overlap(x, y, k) for k in top if 1 <= k <= x.size},
    )


def agreement_gain(
    better: Values,
    worse: Values,
    truth: Values,
    *,
    bits: int | None = None,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    nulls: Sequence[float] = (),
) -> Estimate:
    """Spearman's ρ of `better` with the truth minus that of `worse`, on the same resamples.

    `nulls` are gains that p-values are given of; other arguments and errors as of
    `rank_agreement`.
    """
    x, y = _matrices(better, truth, bits)
    z, _ = _matrices(worse, truth, bits)
    counts = _draw(len(truth), resamples, seed)
    weights = np.repeat(counts, x.shape[1], axis=1).astype(np.float64)
    x, y, z = x.reshape(-1), y.reshape(-1), z.reshape(-1)
    ones = np.ones((1, x.size))
    point = spearman(x, y, ones) - spearman(z, y, ones)
    resampled = _in_chunks(spearman, x, y, weights) - _in_chunks(spearman, z, y, weights)
    return _estimate(point, resampled, confidence, nulls)


def seed_agreement(
    by_seed: Mapping[str, Mapping[int, Sequence[float]]], *, bits: int | None = None
) -> list[tuple[float | None, float | None]]:
    """ρ and τ_b of each seed's values with the mean of the other seeds; none of one seed alone.

    Args:
        by_seed: {layer: {bits: [a value per seed]}}; a seed that some cell lacks is not compared.
        bits: as of `rank_agreement`, as are errors.
    """
    seeds = min(len(values) for by_bits in by_seed.values() for values in by_bits.values())
    found = []
    for seed in range(seeds if seeds > 1 else 0):
        one, others = {}, {}
        for layer, by_bits in by_seed.items():
            one[layer] = {b: float(values[seed]) for b, values in by_bits.items()}
            rest = {b: np.delete(values, seed) for b, values in by_bits.items()}
            others[layer] = {b: float(np.mean(values)) for b, values in rest.items()}
        agreement = rank_agreement(one, others, bits=bits, resamples=1)
        found.append((agreement.spearman.value, agreement.kendall.value))
    return found


def _draw(layers: int, resamples: int, seed: int) -> npt.NDArray[np.int64]:
    """How often each layer is drawn in each resample, [resamples, layers]."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, layers, size=(resamples, layers))
    return np.stack([np.bincount(row, minlength=layers) for row in drawn])


def spearman(x: Array, y: Array, counts: Array) -> Array:
    """Spearman's ρ [R] of items x, y [n] repeated counts [R, n] times; NaN if all are tied."""
    ranks_x, ranks_y = _ranks(x, counts), _ranks(y, counts)
    total = counts.sum(1, keepdims=True)
    dx = ranks_x - (counts * ranks_x).sum(1, keepdims=True) / total
    dy = ranks_y - (counts * ranks_y).sum(1, keepdims=True) / total
    return _quotient(
        (counts * dx * dy).sum(1), (counts * dx * dx).sum(1), (counts * dy * dy).sum(1)
    )


def _ranks(x: Array, counts: Array) -> Array:
    """Average rank of every item among the repeated ones: those below, and half of the equals."""
    order = np.sign(x[None, :] - x[:, None])  # [j, i]: whether item i exceeds item j
    return counts @ (0.5 * (order + 1)) + 0.5


def kendall(x: Array, y: Array, counts: Array) -> Array:
    """Kendall's τ_b [R] of items x, y [n] repeated counts [R, n] times; NaN if all are tied."""
    sign_x, sign_y = (np.sign(v[None, :] - v[:, None]) for v in (x, y))

    def pairs(matrix: Array) -> Array:
        return ((counts @ matrix) * counts).sum(1)

    return _quotient(pairs(sign_x * sign_y), pairs(sign_x**2), pairs(sign_y**2))


def _quotient(product: Array, square_x: Array, square_y: Array) -> Array:
    # Ranks are multiples of 1/2: below this a sum of squares is rounding alone.
    defined = np.minimum(square_x, square_y) > 1e-6
    scale = np.sqrt(np.where(defined, square_x * square_y, 1.0))
    return np.where(defined, np.clip(product / scale, -1.0, 1.0), np.nan)


def _in_chunks(statistic: Statistic, x: Array, y: Array, weights: Array) -> Array:
    parts = (weights[i : i + CHUNK] for i in range(0, len(weights), CHUNK))
    return np.concatenate([statistic(x, y, part) for part in parts])


def _estimate(
    point: Array, resampled: Array, confidence: float, nulls: Sequence[float] = ()
) -> Estimate:
    """Percentile interval over the resamples in which the statistic is defined."""
    defined = resampled[np.isfinite(resampled)]
    if not np.isfinite(point[0]) or defined.size == 0:
        return Estimate(None, None, None)
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    p_values = tuple(bootstrap_p_value(defined, null) for null in nulls)
    return Estimate(float(point[0]), float(low), float(high), p_values)


def _largest(values: Array, k: int) -> list[int]:
    """Indices of the k largest values, largest first; of equal ones, the earlier."""
    return [int(i) for i in np.argsort(-values, kind="stable")[:k]]


def _overlap(x: Array, y: Array, k: int) -> float:
    return len({*_largest(x, k)} & {*_largest(y, k)}) / k


def recovered_layers(ptq: Values, truth: Values, k: int, *, bits: int) -> list[str]:
    """Layers among the k worst by `ptq` but not by `truth` at `bits`, worst by PTQ first.

    Equal values count in the order of the truth's layers.

    Raises:
        UsageError, RobuqError: as of `rank_agreement`, or k outside 1..number of layers.
    """
    x, y = _matrices(ptq, truth, bits)
    names = list(truth)
    if not 1 <= k <= len(names):
        raise UsageError(f"k must be 1 to {len(names)}, the number of layers, got {k}")
    worst = _largest(y[:, 0], k)
    return [names[i] for i in _largest(x[:, 0], k) if i not in worst]


def _matrices(metric: Values, truth: Values, bits: int | None) -> tuple[Array, Array]:
    """Both tables as [layers, widths], in the truth's order of layers and rising bits."""
    for name in metric:
        if name not in truth:
            raise UsageError(f"the truth lacks layer {name!r} of the metric{suggest(name, truth)}")
    missing = [name for name in truth if name not in metric]
    if missing:
        raise UsageError(f"the metric lacks {len(missing)} layers: {', '.join(missing[:5])}")
    if len(truth) < 3:
        raise UsageError(f"rank agreement needs at least three layers, got {len(truth)}")
    tables = [*metric.values(), *truth.values()]
    common = sorted(set(tables[0]).intersection(*tables[1:]))
    if bits is not None:
        if bits not in common:
            raise UsageError(f"not every layer has {bits} bits; all have {common}")
        common = [bits]
    if not common:
        raise UsageError("metric and truth have no bit width in common")
    for title, table in (("metric", metric), ("truth", truth)):
        for name, values in table.items():
            for width in common:
                if not math.isfinite(values[width]):
                    raise RobuqError(
                        f"the {title} of layer {name!r} at {width} bits is {values[width]}; "
                        "measure it again"
                    )
    x, y = (
        np.array([[table[name][width] for width in common] for name in truth], dtype=np.float64)
        for table in (metric, truth)
    )
    return x, y
