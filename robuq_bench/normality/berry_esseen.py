"""How far from normal the randomised Hadamard transform of a fixed token can be, and how far it is.

One coordinate of y = H D x / sqrt(d) is a Rademacher sum: y_i = sum_j s_j x_j / sqrt(d) with
independent signs s_j = +-1, whatever the token x. So the Berry-Esseen theorem holds per token with
no assumption about activations:

    sup_t |P(y_i <= t ||x||_2 / sqrt(d)) - Phi(t)| <= C0 * L3(x),   L3(x) = ||x||_3^3 / ||x||_2^3,

and the left side is computable, see `sign_sums`. Plain Hadamard has no randomness of its own;
`channel_lyapunov` is the matching ratio over tokens and means something only if channels are
independent.

Sources: Shevtsova, "An improvement of convergence rate estimates in the Lyapunov theorem" (2010);
Shevtsova, "On the absolute constants in the Berry-Esseen inequality" (2013); Esseen, "A moment
inequality with an application to the central limit theorem" (1956); Massart, "The tight constant in
the Dvoretzky-Kiefer-Wolfowitz inequality" (1990); Raic, "A multivariate Berry-Esseen theorem with
explicit constants" (2019).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from robuq_bench import seeds
from robuq_bench.errors import UsageError
from robuq_bench.hadamard.transform import hadamard_transform

SHEVTSOVA_2010 = 0.5600
"""C0 for summands that need not be identically distributed: the one that a token needs."""


class MonteCarloCheck(NamedTuple):
    """Empirical sup-distance and bound C0 L3 of each token, [T] float64, and their comparison.

    `violated` [T] bool: distance > bound + slack, with the `slack` of Dvoretzky-Kiefer-Wolfowitz.
    """

    distance: Tensor
    bound: Tensor
    slack: float
    violated: Tensor


class DecaySlope(NamedTuple):
    """Slope of log(distance) over log(width) with its confidence interval [low, high]."""

    slope: float
    low: float
    high: float

    def agrees_with(self, rate: float) -> bool:
        """Whether `rate`, such as -1/2 or -1, lies in the interval."""
        return self.low <= rate <= self.high


def lyapunov_coefficient(tokens: Tensor) -> Tensor:
    """L3 = ||x||_3^3 / ||x||_2^3 of every row: tokens [T, n] -> [T] float64.

    Lies in [n^(-1/2), 1]: a flat token has the least, a one-hot token the largest. Rows are scaled
    by their largest entry, so nothing over- or underflows. NaN for all-zero and non-finite rows.
    """
    x = tokens.detach().double().abs()
    x = x / x.amax(dim=-1, keepdim=True)
    squares = x.square()
    return (squares * x).sum(-1) / squares.sum(-1).pow(1.5)


def berry_esseen_bound(l3: Tensor, constant: float = SHEVTSOVA_2010) -> Tensor:
    """Bound C0 * L3 of the sup-distance, same shape as `l3`; not clipped, see `is_void`."""
    return constant * l3


def is_void(bound: Tensor | float) -> Tensor:
    """Whether a bound of a distance says nothing: it is 1 or more, or not a number. Bool."""
    return ~(torch.as_tensor(bound) < 1)


def monte_carlo_check(
    tokens: Tensor,
    draws: int = 10_000,
    alpha: float = 0.01,
    seed: int = 0,
    constant: float = SHEVTSOVA_2010,
) -> MonteCarloCheck:
    """Check the bound itself: redraw the signs, measure, compare with C0 L3 plus the DKW slack.

    The draws of one coordinate are independent, so its empirical distribution is within
    sqrt(ln(2/alpha) / (2 draws)) of the true one with probability 1 - alpha, for each token. All
    tokens share the sign draws, so their violations are dependent; more than a share alpha of
    tokens violating, in expectation over seeds, would refute the bound.

    Args:
        tokens: [T, n]; all-zero rows have distance NaN and are not counted as violated.
        draws: number of sign vectors.
        alpha: failure probability that the slack allows, in (0, 1).
        seed: of the signs.
        constant: C0.

    Raises:
        UsageError: tokens not [T, n], no draws, or alpha outside (0, 1).
    """
    if tokens.ndim != 2 or draws < 1 or not 0 < alpha < 1:
        raise UsageError(
            "the check needs tokens [T, n], at least one draw and 0 < alpha < 1; got shape "
            f"{tuple(tokens.shape)}, {draws} draws, alpha {alpha}"
        )
    x = tokens.detach().cpu().double()
    x = x / x.abs().amax(dim=-1, keepdim=True)
    x = x / x.norm(dim=-1, keepdim=True)
    generator = seeds.generator("normality/signs", seed)
    sums = torch.empty((len(x), draws), dtype=torch.float64)
    for start in range(0, draws, 2048):
        stop = min(start + 2048, draws)
        bits = torch.randint(2, (stop - start, x.shape[1]), generator=generator, dtype=torch.int8)
        sums[:, start:stop] = x @ (2 * bits - 1).double().T
    normal = torch.special.ndtr(sums.sort(dim=1).values)
    heights = torch.arange(draws + 1, dtype=torch.float64) / draws
    above = (heights[1:] - normal).amax(dim=1)
    below = (normal - heights[:-1]).amax(dim=1)
    distance = torch.maximum(above, below)
    bound = berry_esseen_bound(lyapunov_coefficient(tokens.detach().cpu()), constant)
    slack = math.sqrt(math.log(2 / alpha) / (2 * draws))
    return MonteCarloCheck(distance, bound, slack, distance > bound + slack)


def channel_lyapunov(tokens: Tensor) -> float:
    """Lyapunov ratio over tokens: sum_j E|x_j - mu_j|^3 / (sum_j sigma_j^2)^(3/2), tokens [T, n].

    For plain Hadamard, C0 times it bounds the distance of a coordinate, centred and scaled, only
    if the channels are independent. They are not: state the assumption beside the number. The
    expectation and sigma^2 are means over the T tokens. NaN if no channel varies.

    Raises:
        UsageError: tokens not [T, n] with T >= 2.
    """
    if tokens.ndim != 2 or len(tokens) < 2:
        raise UsageError(f"needs at least two tokens [T, n], got shape {tuple(tokens.shape)}")
    x = tokens.detach().double()
    x = x - x.mean(dim=0)
    x = x.abs() / x.abs().max()
    squares = x.square()
    return float((squares * x).mean(0).sum() / squares.mean(0).sum().pow(1.5))


def multivariate_bound(token: Tensor, k: int) -> float:
    """Bound of sup over convex A in R^k of |P(Y in A) - N(0, Sigma)(A)|, Y = coordinates 0 to k-1.

    (42 k^(1/4) + 16) sum_j E||Sigma^(-1/2) X_j||^3 with X_j = s_j x_j h_j / sqrt(n), h_j in
    {+-1}^k the signs that entry j has in those coordinates, and Sigma = sum_j x_j^2 h_j h_j^T / n
    exactly (Raic 2019). Signs make E superfluous. `is_void` where it is 1 or more.

    Args:
        token: [n], n a supported Hadamard order.
        k: number of coordinates, 1 to n.

    Returns:
        The bound; inf where Sigma is singular (fewer than k effective entries).

    Raises:
        UsageError: token not [n], all-zero or non-finite, or k outside 1 to n.
        UnsupportedHadamardOrder: n has no Hadamard matrix here.
    """
    n = token.shape[-1]
    if token.ndim != 1 or not 1 <= k <= n:
        raise UsageError(f"needs a token [n] and 1 <= k <= n, got {tuple(token.shape)} and k = {k}")
    x = token.detach().cpu().double().abs()
    if not (x.isfinite().all() and x.any()):
        raise UsageError("the multivariate bound needs a finite token that is not all zero")
    x = x / x.max()
    x = x / x.norm()
    # Row i of H^T is what coordinate i of y = x H sees.
    signs = hadamard_transform(torch.eye(k, n, dtype=torch.float64), inverse=True).sign()
    sigma = (signs * x.square()) @ signs.T
    factor, failed = torch.linalg.cholesky_ex(sigma)
    if failed or float(factor.diagonal().min()) < 1e-6:
        return math.inf
    whitened = torch.linalg.solve_triangular(factor, signs * x, upper=False)
    return _raic_factor(k) * float(whitened.norm(dim=0).pow(3).sum())


def _raic_factor(k: int) -> float:
    return 42 * k**0.25 + 16


def best_multivariate_bound(width: int, k: int) -> float:
    """Least value that `multivariate_bound` takes at this width: a flat token's.

    (42 k^(1/4) + 16) k^(3/2) / sqrt(width), since the mean of ||.||^2 is k / width.
    """
    return _raic_factor(k) * k**1.5 / math.sqrt(width)


def informative_coordinates(token: Tensor) -> int:
    """Largest k for which `multivariate_bound(token, k)` is below 1; 0 if there is none.

    The bound grows with k, and no token beats `best_multivariate_bound`, so the search is short:
    one coordinate needs a width above 3364, two need 34,791.
    """
    n = token.shape[-1]
    k = 0
    while k < n and best_multivariate_bound(n, k + 1) < 1 and multivariate_bound(token, k + 1) < 1:
        k += 1
    return k


def decay_slope(
    widths: Sequence[float], distances: Sequence[float], confidence: float = 0.95
) -> DecaySlope:
    """Least-squares slope of log(distance) over log(width), with its t interval.

    Compare with -1/2, the rate of the Berry-Esseen bound, and -1, the rate of a symmetric law whose
    third cumulant vanishes. One summary per width (such as a median over tokens) keeps the points
    independent, as the interval supposes.

    Args:
        widths, distances: equally long, positive; at least three distinct widths.
        confidence: of the interval.

    Raises:
        UsageError: otherwise.
    """
    x, y = np.asarray(widths, dtype=np.float64), np.asarray(distances, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or len(np.unique(x)) < 3 or not 0 < confidence < 1:
        raise UsageError(
            "a decay needs as many distances as widths, three distinct widths and a confidence "
            f"in (0, 1); got {x.shape} widths, {y.shape} distances, confidence {confidence}"
        )
    if not (np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)).all():
        raise UsageError("a decay needs finite positive widths and distances")
    from scipy.stats import linregress, t

    fit = linregress(np.log(x), np.log(y))
    half = float(t.ppf(0.5 + confidence / 2, len(x) - 2) * fit.stderr)
    return DecaySlope(float(fit.slope), float(fit.slope) - half, float(fit.slope) + half)
