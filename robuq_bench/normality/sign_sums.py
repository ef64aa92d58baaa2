"""The exact distance of a Rademacher sum to the normal: sup_t |P(S <= t) - Phi(t)|.

S = sum_j s_j x_j / ||x||_2 with independent signs s_j = +-1, which is what one coordinate of the
randomised Hadamard transform of a token x is. Source of the inversion: Davies, "Numerical inversion
of a characteristic function" (1973).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from torch import Tensor

from robuq_bench.errors import UsageError

MAX_ENUMERATED = 20
"""Entries whose signs are enumerated: 2^20 values take a tenth of a second."""

MAX_LATTICE_POINTS = 2**20
"""Largest lattice whose point probabilities are computed one by one."""

FREQUENCIES = 2**17
"""Length of the frequency grid on which a characteristic function must have decayed."""

PERIOD = 18.0
"""Period of the inversion: |t| <= 9 is alias-free, for P(|S| > 9) < 2 exp(-40.5) (Hoeffding)."""

TAIL = 1e-9
"""A characteristic function has decayed where what is left of the inversion sum is below this."""

WAVE_POINTS = 32
"""Points in the shortest wave on which the maximum is looked for, before a parabola refines it."""

_CHUNK = 64
_EXACT = 4096  # frequencies whose characteristic function is float64 in any case


class ExactDistance(NamedTuple):
    """A sup-distance to the normal, a bound of its `error`, and the `method` that found it."""

    value: float
    error: float
    method: str


def exact_distance(token: Tensor, tolerance: float = 1e-6) -> float:
    """Return sup_t |P(y_1 <= t ||x||_2 / sqrt(n)) - Phi(t)| over random signs, for a token x [n].

    NaN for an all-zero or non-finite token, and where the error bound of `distance_of_signs` is
    above both `tolerance` and 1 % of the value: a small number of large entries (21 to about 30, or
    fewer with a remainder of 1e-6 to 1e-4 of the norm) beside which the rest is too weak to smooth.
    """
    found = distance_of_signs(token)
    return found.value if found.error <= max(tolerance, 0.01 * found.value) else math.nan


def distance_of_signs(token: Tensor) -> ExactDistance:
    """Sup-distance of a Rademacher sum to the normal, by the first method that applies.

    1. `enumeration`: at most 16 non-zero entries; all 2^m values, error 1e-12.
    2. `lattice`: every entry is an integer multiple of one number, and few points can be reached
       (flat tokens, where it is the binomial, one-hot and small-integer tokens); error 1e-11.
    3. `inversion`: the characteristic function has decayed below `TAIL` on the last three quarters
       of the grid of `FREQUENCIES` points, u <= 45,000; Gil-Pelaez integral by Davies' sum. Error
       1e-7 from locating the maximum, plus half an atom where the entries share a lattice too fine
       for 2 (its step, which floats always have, is found exactly; 1e-8 for float16 activations).
       Not covered: a return beyond the grid of nearly all but not all entries, 3e-5 at most.
    4. `largest entries`: the 20 largest enumerated, the rest of norm r left out; P(|rest| > 8r) <
       3e-14 makes the error at most 8r / sqrt(2 pi).

    Args:
        token: [n], any real dtype; computed in float64.

    Returns:
        value, error and method; value NaN and error inf for an all-zero or non-finite token.

    Raises:
        UsageError: the token is not one-dimensional.
    """
    if token.ndim != 1:
        raise UsageError(f"one token [n] at a time, got shape {tuple(token.shape)}")
    x = token.detach().cpu().double().abs().numpy()
    x = np.sort(x[x != 0])[::-1]
    if len(x) == 0 or not np.isfinite(x).all():
        return ExactDistance(math.nan, math.inf, "undefined")
    weights = x / x[0]
    weights /= np.linalg.norm(weights)
    if len(x) <= 16:
        return ExactDistance(_enumerated_distance(weights), 1e-12, "enumeration")
    steps, unit = _lattice(x, float(weights[0]))
    if steps is not None:
        return ExactDistance(_lattice_distance(steps, unit), 1e-11, "lattice")
    value = _inverted_distance(weights)
    if value is not None:
        return ExactDistance(value, 1e-7 + unit / math.sqrt(2 * math.pi), "inversion")
    large, rest = weights[:MAX_ENUMERATED], weights[MAX_ENUMERATED:]
    error = 8 * float(np.linalg.norm(rest)) / math.sqrt(2 * math.pi) + 1e-12
    return ExactDistance(_enumerated_distance(large), error, "largest entries")


def _enumerated_distance(weights: NDArray[np.float64]) -> float:
    """Distance of the sum of +-weights, all signs enumerated. At most MAX_ENUMERATED of them."""
    values = np.zeros(1)
    for weight in weights:
        values = np.concatenate([values - weight, values + weight])
    values.sort()
    # A tie split by rounding adds a height between those before and after it: no new maximum.
    # The law is symmetric: what F exceeds Phi by on one side it lacks on the other.
    return float((np.arange(1, len(values) + 1) / len(values) - ndtr(values)).max())


def _lattice(x: NDArray[np.float64], first: float) -> tuple[NDArray[np.int64] | None, float]:
    """Integers k with x = g k for the largest g, and g over the norm of x; first = x[0] / norm.

    The integers are None where their sum needs too many points.
    """
    # Floats are dyadic rationals, so the greatest common divisor is exact.
    ratios = [float(value).as_integer_ratio() for value in x]
    common = max(denominator for _, denominator in ratios)
    integers = [numerator * (common // denominator) for numerator, denominator in ratios]
    divisor = math.gcd(*integers)
    steps = [value // divisor for value in integers]
    if sum(steps) >= MAX_LATTICE_POINTS:
        # Past the exponent range of a float it is 0 for every purpose here.
        return None, 0.0 if steps[0].bit_length() > 1000 else first / steps[0]
    return np.array(steps, dtype=np.int64), first / steps[0]


def _lattice_distance(steps: NDArray[np.int64], unit: float) -> float:
    """Distance of unit * sum(+-steps), from its probabilities at -total, -total + 2, ..., total."""
    total = int(steps.sum())
    points = total + 1
    # The discrete Fourier transform of sum(b_j k_j), b_j = 0 or 1, is a product of
    # (1 + exp(-2 pi i m k_j / points)) / 2 = exp(-pi i m k_j / points) cos(pi m k_j / points).
    m = np.arange(points // 2 + 1)
    phase = np.exp(-1j * np.pi * (m * total % (2 * points)) / points)
    # Angles reduced as integers: exact, however large m k.
    product = _cosine_product(
        steps, m, lambda angle: np.cos(np.pi * (angle % (2 * points)) / points)
    )
    heights = np.cumsum(np.fft.irfft(phase * product, points))
    return float((heights - ndtr(unit * (2.0 * np.arange(points) - total))).max())


def _cosine_product(
    weights: NDArray[Any], u: NDArray[Any], cosine: Callable[[NDArray[Any]], NDArray[Any]]
) -> NDArray[Any]:
    """prod_j cosine(w_j u) for descending weights, in the dtype of u; 0 where below 1e-18."""
    distinct, counts = np.unique(weights, return_counts=True)
    distinct, counts = distinct[::-1], counts[::-1]
    values: NDArray[Any] = np.ones(len(u), np.float32 if u.dtype == np.float32 else np.float64)
    alive = np.arange(len(u))
    for start in range(0, len(distinct), _CHUNK):
        partial, at = values[alive], u[alive]
        for j in range(start, min(start + _CHUNK, len(distinct))):
            partial *= cosine(distinct[j] * at) ** int(counts[j])
        values[alive] = partial
        # The product can only shrink: after a chunk it is dead nearly everywhere.
        small = np.abs(partial) < 1e-18
        values[alive[small]] = 0.0
        alive = alive[~small]
        if len(alive) == 0:
            break
    return values


def _inverted_distance(weights: NDArray[np.float64]) -> float | None:
    """sup_t |F(t) - Phi(t)| by inversion; None if the characteristic function has not decayed.

    F(t) - Phi(t) = (1/pi) int_0^inf (phi(u) - exp(-u^2/2)) sin(ut)/u du, for a symmetric law. The
    midpoint sum with step 2 pi / PERIOD has no error but aliasing, which PERIOD makes 1e-17.
    """
    step = 2 * math.pi / PERIOD
    k = np.arange(FREQUENCIES) + 0.5
    # A coarse look first: it turns away most tokens that are left to enumeration.
    some = k[FREQUENCIES // 4 :: _CHUNK]
    if (
        float((np.abs(_cosine_product(weights, some * step, np.cos)) / (math.pi * some)).sum())
        > TAIL
    ):
        return None
    phi = _cosine_product(weights, k[:_EXACT] * step, np.cos)
    # Past the usual decay only the size matters, and float32 gives it several times faster.
    single = (k[_EXACT:] * step).astype(np.float32)
    rest = _cosine_product(weights.astype(np.float32), single, np.cos)
    left = np.cumsum((np.abs(np.concatenate([phi, rest])) / (math.pi * k))[::-1])[::-1]
    # A lattice token returns at odd multiples of its first return: a quarter catches them all.
    if left[FREQUENCIES // 4] > TAIL:
        return None
    used = max(64, int(np.argmax(left <= TAIL)))
    if used > _EXACT:
        phi = _cosine_product(weights, k[:used] * step, np.cos)
    terms = (phi[:used] - np.exp(-0.5 * (k[:used] * step) ** 2)) / (math.pi * k[:used])
    points = max(2**15, 2 ** math.ceil(math.log2(WAVE_POINTS * used)))
    shift = np.exp(1j * np.pi * np.arange(points // 2 + 1) / points)
    # sum_k c_k sin((k + 1/2) step t) at t = m PERIOD / points, m <= points / 2, i.e. t <= 9.
    difference = np.abs((np.fft.ifft(terms, points)[: points // 2 + 1] * points * shift).imag)
    peak = int(np.clip(difference.argmax(), 1, points // 2 - 1))
    before, top, after = difference[peak - 1 : peak + 2]
    curvature = before - 2 * top + after
    lift = -((after - before) ** 2) / (8 * curvature) if curvature < 0 else 0.0
    return float(max(top + lift, difference.max()))
