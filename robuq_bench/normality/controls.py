"""Control tokens with known distributions: the null that must pass and what must not.

`gaussian` is the null: the same width and the same rounding as the tokens under test, so whatever a
statistic shows on it is the statistic's doing. The others are positive controls: heavy tails, skew,
outlier channels and the worst case of the Berry-Esseen bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robuq_bench import seeds
from robuq_bench.errors import UsageError, suggest

OUTLIER_SHARE = 0.01
OUTLIER_SCALE = 30.0

_Draw = Callable[[np.random.Generator, int, int], NDArray[np.float64]]


def _gaussian(rng: np.random.Generator, count: int, n: int) -> NDArray[np.float64]:
    return rng.standard_normal((count, n))


def _laplace(rng: np.random.Generator, count: int, n: int) -> NDArray[np.float64]:
    return rng.laplace(scale=math.sqrt(0.5), size=(count, n))


def _student_t3(rng: np.random.Generator, count: int, n: int) -> NDArray[np.float64]:
    return rng.standard_t(3, size=(count, n)) / math.sqrt(3)


def _lognormal(rng: np.random.Generator, count: int, n: int) -> NDArray[np.float64]:
    return rng.lognormal(size=(count, n))


def _few_outlier_channels(rng: np.random.Generator, count: int, n: int) -> NDArray[np.float64]:
    channels = rng.choice(n, size=max(1, round(OUTLIER_SHARE * n)), replace=False)
    tokens = rng.standard_normal((count, n))
    tokens[:, channels] *= OUTLIER_SCALE
    return tokens


def _one_hot(rng: np.random.Generator, count: int, n: int) -> NDArray[np.float64]:
    tokens = np.zeros((count, n))
    tokens[np.arange(count), rng.integers(n, size=count)] = 1.0
    return tokens


_DRAWS: dict[str, _Draw] = {
    "gaussian": _gaussian,
    "laplace": _laplace,
    "student-t3": _student_t3,
    "lognormal": _lognormal,
    "few-outlier-channels": _few_outlier_channels,
    "one-hot": _one_hot,
}

CONTROL_NAMES = tuple(_DRAWS)
"""Every control, the null first."""


def control_tokens(
    name: str, count: int, n: int, seed: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw control tokens [count, n] in float64 and round them to `dtype`.

    `gaussian`: N(0, 1). `laplace`: variance 1. `student-t3`: three degrees of freedom, scaled to
    variance 1 (its fourth moment is infinite). `lognormal`: exp of N(0, 1), mean 1.65: not centred,
    so plain Hadamard gets an outlier coordinate from it. `few-outlier-channels`: N(0, 1) with the
    same 1 % of channels (at least one) 30 times as large in every token. `one-hot`: a single 1 at a
    random place, all else 0.

    Args:
        name: one of `CONTROL_NAMES`.
        count: number of tokens.
        n: width.
        seed: with name and n it decides the draw (NumPy's PCG64).
        dtype: floating point; the rounding belongs to the null.

    Raises:
        UsageError: unknown name, count or n below 1, or an integer dtype.
    """
    if name not in _DRAWS:
        raise UsageError(f"no control {name!r}{suggest(name, _DRAWS)}")
    if count < 1 or n < 1 or not dtype.is_floating_point:
        raise UsageError(
            f"controls need count, n >= 1 and a floating dtype; got {count}, {n}, {dtype}"
        )
    rng = np.random.default_rng(seeds.seeded("normality/control", name, n, seed))
    return torch.from_numpy(_DRAWS[name](rng, count, n)).to(dtype)
