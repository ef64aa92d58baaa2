"""How far noise lets a correlation go: the reliability of a mean over seeds (Spearman-Brown)."""

from __future__ import annotations

import math


def correlation_cap(agreement: float, seeds: int) -> float:
    """Greatest correlation of anything free of noise with the mean of `seeds` measurements.

    Errors are supposed independent and of equal size. With r the reliability of one seed and k
    seeds, one correlates with the mean of the others to c, c² = r · (k-1)r / (1 + (k-2)r), which is
    solved for r; the mean of all correlates with what it estimates to sqrt(kr / (1 + (k-1)r)).

    Args:
        agreement: c, correlation of one seed with the mean of the others.
        seeds: k, how many there are.

    Returns:
        In (0, 1]; NaN where `agreement` is not above 0 or NaN, or there are fewer than two seeds.
    """
    if not agreement > 0 or seeds < 2:
        return math.nan
    c, k = agreement**2, seeds
    r = (c * (k - 2) + math.sqrt(c**2 * (k - 2) ** 2 + 4 * (k - 1) * c)) / (2 * (k - 1))
    return math.sqrt(k * r / (1 + (k - 1) * r))
