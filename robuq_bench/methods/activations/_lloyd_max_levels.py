"""Lloyd-Max scalar quantizers of the standard normal distribution, computed, not copied.

Source: S. P. Lloyd, "Least squares quantization in PCM" (1957/1982); J. Max, "Quantizing for
minimum distortion" (1960). Every level is the centroid of its cell and every threshold the
midpoint of its two levels.
"""

from __future__ import annotations

import functools
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_NORMAL = NormalDist()


class Codebook(NamedTuple):
    """Ascending `levels` [2^bits] and the `thresholds` between them [2^bits - 1], float64, in σ."""

    levels: NDArray[np.float64]
    thresholds: NDArray[np.float64]


def _cell_moments(edges: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Density at the edges and probability of each cell of a partition of [0, inf)."""
    density = np.array([_NORMAL.pdf(edge) for edge in edges])
    # Upper tails, so that the outermost cells keep their relative precision.
    tail = np.array([_NORMAL.cdf(-edge) for edge in edges])
    return density, tail[:-1] - tail[1:]


@functools.cache
def lloyd_max_codebook(bits: int) -> Codebook:
    """Minimum-MSE codebook of N(0, 1) with 2^bits levels (bits 1 to 8).

    Newton's method on "level = centroid of its cell" for the positive half, which decides the
    rest by symmetry; stops at a residual of 1e-11.
    """
    half = 2 ** (bits - 1)
    # Panter-Dite: the optimal point density is proportional to pdf^(1/3), i.e. N(0, sqrt 3).
    quantiles = 0.5 + (np.arange(half) + 0.5) / (2 * half)
    levels = np.sqrt(3.0) * np.array([_NORMAL.inv_cdf(q) for q in quantiles])
    for _ in range(100):
        edges = np.concatenate([[0.0], (levels[:-1] + levels[1:]) / 2, [np.inf]])
        density, mass = _cell_moments(edges)
        centroid = (density[:-1] - density[1:]) / mass
        residual = levels - centroid
        if np.abs(residual).max() < 1e-11:
            break
        # d centroid_i / d edge: lower edge (c - a) pdf(a) / mass, upper edge (b - c) pdf(b) / mass.
        lower = (centroid - edges[:-1]) * density[:-1] / mass
        upper = np.append((edges[1:-1] - centroid[:-1]) * density[1:-1] / mass[:-1], 0.0)
        lower[0] = 0.0
        jacobian = np.diag(1 - (lower + upper) / 2)
        jacobian -= np.diag(lower[1:] / 2, -1) + np.diag(upper[:-1] / 2, 1)
        levels = levels - np.linalg.solve(jacobian, residual)
    else:
        raise AssertionError(f"Lloyd-Max did not converge at {bits} bits")
    full = np.concatenate([-levels[::-1], levels])
    return Codebook(full, (full[:-1] + full[1:]) / 2)
