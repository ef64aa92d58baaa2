"""P-values of the composite normality tests (mean and variance estimated), vectorised over tokens.

All functions take the sample size n and [T] float64 statistics without NaN.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MAX_SHAPIRO_N = 5000
"""Royston's fit ends here; beyond it the p-values err toward "normal"."""

# Beasley and Springer's two rational approximations, highest power first.
_CENTRE_NUMERATOR = (-25.44106049637, 41.39119773534, -18.61500062529, 2.50662823884)
_CENTRE_DENOMINATOR = (3.13082909833, -21.06224101826, 23.08336743743, -8.4735109309, 1.0)
_TAIL_NUMERATOR = (2.32121276858, 4.85014127135, -2.29796479134, -2.78718931138)
_TAIL_DENOMINATOR = (1.63706781897, 3.54388924762, 1.0)

# Royston's polynomials, highest power first: in 1/sqrt(n) for the two largest weights, in n up to
# n = 11 and in ln(n) above it for the mean and log standard deviation of the transformed W.
_LARGEST_WEIGHT = (-2.706056, 4.434685, -2.07119, -0.147981, 0.221157, 0.0)
_SECOND_WEIGHT = (-3.582633, 5.682633, -1.752461, -0.293762, 0.042981, 0.0)
_SMALL_N_BOUND = (0.459, -2.273)
_SMALL_N_MEAN = (-0.0006714, 0.025054, -0.39978, 0.544)
_SMALL_N_LOG_STD = (-0.0020322, 0.062767, -0.77857, 1.3822)
_LARGE_N_MEAN = (0.0038915, -0.083751, -0.31082, -1.5861)
_LARGE_N_LOG_STD = (0.0030302, -0.082676, -0.4803)

# Where statsmodels tabulates Lilliefors' D; between two levels its p is linear in D.
_LILLIEFORS_LEVELS = (
    *(0.99, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1),
    *(0.075, 0.05, 0.025, 0.01, 0.005, 0.003, 0.001),
)


def _lower_quantile(p: Floats) -> Floats:
    """Normal quantile for p < 1/2 by AS 111 (Beasley and Springer 1977), good to about 1e-7.

    Royston's weights are defined through it: an exact quantile would move W by some 1e-9.
    """
    q = p - 0.5
    centre = q * np.polyval(_CENTRE_NUMERATOR, q * q) / np.polyval(_CENTRE_DENOMINATOR, q * q)
    r = np.sqrt(-np.log(p))
    tail = -np.polyval(_TAIL_NUMERATOR, r) / np.polyval(_TAIL_DENOMINATOR, r)
    return np.where(np.abs(q) <= 0.42, centre, tail)


@functools.cache
def shapiro_weights(n: int) -> Floats:
    """Weights a of W = (sum a_i x_(i))^2 / sum (x_i - mean)^2: [n] float64, antisymmetric, |a| = 1.

    n >= 6. Royston, "Remark AS R94", Applied Statistics 44 (1995), 547-551: Blom scores, with the
    two outermost weights from polynomials in 1/sqrt(n). Read-only, as it is cached.
    """
    half = n // 2
    scores = _lower_quantile((np.arange(1, half + 1, dtype=np.float64) - 0.375) / (n + 0.25))
    square_sum = 2.0 * float(scores @ scores)
    outer = -scores[:2] / math.sqrt(square_sum)
    outer[0] += np.polyval(_LARGEST_WEIGHT, 1 / math.sqrt(n))
    outer[1] += np.polyval(_SECOND_WEIGHT, 1 / math.sqrt(n))
    left = square_sum - 2.0 * float(scores[:2] @ scores[:2])
    upper = -scores / math.sqrt(left / (1.0 - 2.0 * float(outer @ outer)))
    upper[:2] = outer
    weights = np.zeros(n)
    weights[:half] = -upper
    weights[n - half :] = upper[::-1]
    weights.flags.writeable = False
    return weights


def shapiro_p(w: Floats, n: int) -> Floats:
    """P-value of Shapiro-Wilk's W: ln(1 - W) is near normal under H0 (Royston 1995). n >= 4.

    NaN for n > 5000: no p-value is better than one that errs toward "normal".
    """
    from scipy.special import ndtr

    if n > MAX_SHAPIRO_N:
        return np.full_like(w, np.nan)
    # W = 1 is reached by rounding only; the floor keeps its logarithm finite.
    y = np.log(np.maximum(1.0 - w, np.finfo(np.float64).tiny))
    if n > 11:
        mean, log_std = (np.polyval(c, math.log(n)) for c in (_LARGE_N_MEAN, _LARGE_N_LOG_STD))
        return np.asarray(ndtr((mean - y) / np.exp(log_std)))
    bound = np.polyval(_SMALL_N_BOUND, n)
    possible = y < bound
    y = -np.log(np.where(possible, bound - y, 1.0))
    mean, log_std = np.polyval(_SMALL_N_MEAN, n), np.polyval(_SMALL_N_LOG_STD, n)
    return np.where(possible, ndtr((mean - y) / np.exp(log_std)), 0.0)


def anderson_p(a2: Floats, n: int) -> Floats:
    """P-value of Anderson-Darling's A^2 with both parameters fitted; 0 above 13 (below 5e-31).

    D'Agostino and Stephens, "Goodness-of-Fit Techniques" (1986), table 4.9: a formula in A^2, as in
    `statsmodels.stats.diagnostic.normal_ad`, which takes samples only; with an outlier beyond
    z = 8.3 its A^2 is infinite, and its p among several samples NaN.
    """
    a = np.minimum(a2 * (1 + 0.75 / n + 2.25 / n**2), 14.0)
    pieces = [
        -np.expm1(-13.436 + 101.14 * a - 223.73 * a**2),
        -np.expm1(-8.318 + 42.796 * a - 59.938 * a**2),
        np.exp(0.9177 - 4.279 * a - 1.38 * a**2),
        np.exp(1.2937 - 5.709 * a + 0.0186 * a**2),
    ]
    return np.select([a < 0.2, a < 0.34, a < 0.6, a <= 13], pieces, 0.0)


@functools.cache
def _lilliefors_critical(n: int) -> Floats:
    """D of samples of size n at `_LILLIEFORS_LEVELS`, increasing, found through `lilliefors` alone.

    statsmodels gives p to a sample, not to a D. Normal scores that turn into a single outlier run
    through every D, so a root search over them finds the D at which p meets a level.
    """
    from scipy.optimize import brentq
    from scipy.special import ndtri
    from statsmodels.stats.diagnostic import lilliefors

    scores = ndtri((np.arange(n) + 0.5) / n)
    outlier = np.zeros(n)
    outlier[-1] = math.sqrt(n)

    def probe(share: float) -> tuple[float, float]:
        return lilliefors((1 - share) * scores + share * outlier)

    critical, share = [], 0.0
    for level in np.clip(_LILLIEFORS_LEVELS, 0.001 + 1e-12, 0.99 - 1e-12):  # p is flat beyond
        share = brentq(lambda x, level=level: probe(x)[1] - level, share, 1.0, xtol=1e-12)
        critical.append(probe(share)[0])
    return np.asarray(critical)


def lilliefors_p(distance: Floats, n: int) -> Floats:
    """P-value of Lilliefors' D as `statsmodels.stats.diagnostic.lilliefors` gives it. n >= 8.

    It interpolates a simulated table that ends at 0.001 and 0.99: values beyond are reported as
    these bounds. Its cost of 0.3 ms a token would be more than that of all other statistics.
    """
    return np.interp(distance, _lilliefors_critical(n), _LILLIEFORS_LEVELS)


def dagostino_k2(skewness: Floats, kurtosis: Floats, n: int) -> tuple[Floats, Floats]:
    """D'Agostino-Pearson K^2 = Z(skewness)^2 + Z(kurtosis)^2 and its chi^2(2) p-value. n >= 8.

    `skewness` and `kurtosis` (excess) are the population moment ratios. Z(skewness): D'Agostino
    (1970), a Johnson S_U transform; Z(kurtosis): Anscombe and Glynn (1983), a cube root. At a
    skewness of exactly 0, Z is 0 (scipy 1.17 has another value at this one point).
    """
    y = skewness * math.sqrt((n + 1) * (n + 3) / (6.0 * (n - 2)))
    beta = 3.0 * (n**2 + 27 * n - 70) * (n + 1) * (n + 3)
    beta /= (n - 2.0) * (n + 5) * (n + 7) * (n + 9)
    w2 = math.sqrt(2 * (beta - 1)) - 1
    z_skewness = np.arcsinh(y / math.sqrt(2 / (w2 - 1))) / math.sqrt(0.5 * math.log(w2))

    variance = 24.0 * n * (n - 2) * (n - 3) / ((n + 1) ** 2 * (n + 3) * (n + 5))
    x = (kurtosis + 6.0 / (n + 1)) / math.sqrt(variance)
    root_beta = 6.0 * (n * n - 5 * n + 2) / ((n + 7) * (n + 9))
    root_beta *= math.sqrt(6.0 * (n + 3) * (n + 5) / (n * (n - 2.0) * (n - 3)))
    a = 6 + 8 / root_beta * (2 / root_beta + math.sqrt(1 + 4 / root_beta**2))
    ratio = 1 + x * math.sqrt(2 / (a - 4))
    # A ratio of 0 is a pole; the cap leaves a huge statistic and p = 0 instead of a NaN.
    capped = np.where(np.abs(ratio) < 1e-30, 1e-30, ratio)
    z_kurtosis = (1 - 2 / (9 * a) - np.cbrt((1 - 2 / a) / capped)) / math.sqrt(2 / (9 * a))
    k2 = z_skewness**2 + z_kurtosis**2
    return k2, np.exp(-k2 / 2)
