"""What bootstrap resamples say of a null value."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def bootstrap_p_value(drawn: NDArray[np.float64], null: float) -> float:
    """Two-sided p-value of `null` by an effect's resamples [N], at least 2 / (N + 1).

    Twice the smaller share on one side of it, with the null itself counted among the resamples.
    """
    tail = min(int((drawn <= null).sum()), int((drawn >= null).sum()))
    return min(1.0, 2 * (tail + 1) / (drawn.size + 1))
