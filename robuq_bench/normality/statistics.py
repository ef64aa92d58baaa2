"""Normality statistics of every token of a batch, from one sort.

A p-value says little without n: near-normal tokens of 5000 entries are rejected where those of 200
pass. The effect sizes beside them (W, A^2, distances, negentropy) do not have this defect.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.cpu_library import is_usable
from robuq_bench.errors import UsageError
from robuq_bench.normality.p_values import (
    Floats,
    anderson_p,
    dagostino_k2,
    lilliefors_p,
    shapiro_p,
)
from robuq_bench.normality.token_sums import (
    Block,
    Sums,
    Workspace,
    block_sums,
    centre_sorted,
    compiled_sums,
    tensor_sums,
)

MIN_N = 8
"""Fewest entries of a token: below it D'Agostino's transforms are undefined."""

# Elements sorted at once: smaller blocks pay for calls, larger ones for the cache.
_COMPILED_BLOCK, _NUMPY_BLOCK = 2**18, 2**16
_CUDA_BLOCK = 2**25  # elements: about 2 GB of float64 temporaries


class TokenStatistics(NamedTuple):
    """Statistics of T tokens of n entries: each array [T], float64 but for `degenerate`.

    A degenerate token (constant, non-finite, or of a spread that underflows) has NaN in every
    array; it is to be counted, not dropped. "Fitted normal" has the token's mean and `std`.
    """

    n: int
    mean: Floats
    std: Floats
    """Sample standard deviation (n - 1)."""
    shapiro_w: Floats
    """Shapiro-Wilk W with Royston's weights."""
    shapiro_p: Floats
    """NaN for n > 5000: refused, as Royston's fit errs toward "normal" there."""
    anderson_a2: Floats
    """Anderson-Darling A^2 to the fitted normal."""
    anderson_p: Floats
    ks_distance: Floats
    """sup |F_n - Phi| to the fitted normal: Lilliefors' D."""
    lilliefors_p: Floats
    """Between 0.001 and 0.99, the ends of the table."""
    dagostino_k2: Floats
    dagostino_p: Floats
    skewness: Floats
    """Population moment ratio m_3 / m_2^1.5."""
    excess_kurtosis: Floats
    """Population moment ratio m_4 / m_2^2 - 3."""
    wasserstein: Floats
    """Exact 1-Wasserstein distance to the fitted normal, over `std`: integral of |F_n - Phi|."""
    negentropy: Floats
    """ln(2 pi e std^2)/2 minus the Vasicek (1976) spacing estimate of the entropy, in nats.

    The estimate is biased: compare with normal tokens of the same n and dtype. Infinite where more
    entries coincide than the window spans (see `window_length`).
    """
    l3: Floats
    """Lyapunov ratio ||x||_3^3 / ||x||_2^3 of the token as it is (not centred)."""
    degenerate: NDArray[np.bool_]


def token_statistics(tokens: Tensor) -> TokenStatistics:
    """Every statistic of every token; see `TokenStatistics`.

    Computed in float64 on the CPU, by the compiled kernels where they are built (see
    `computed_by`). CUDA tokens stay there, and float32 ones are off by up to about 2e-5 in A^2
    (n = 4608), 4e-8 in the KS distance and 6e-7 in the Wasserstein distance.

    Args:
        tokens: [T, n] float32 or float64 (half types are converted to float32), any device.

    Raises:
        UsageError: not a floating-point matrix, or n < 8.
    """
    tokens = _checked(tokens)
    n = tokens.shape[1]
    sums = _sums(tokens)
    k2, k2_p = dagostino_k2(sums.skewness, sums.kurtosis, n)
    results: list[Floats] = [
        sums.mean,
        sums.std,
        sums.shapiro_w,
        shapiro_p(sums.shapiro_w, n),
        sums.anderson_a2,
        anderson_p(sums.anderson_a2, n),
        sums.ks_distance,
        lilliefors_p(sums.ks_distance, n),
        k2,
        k2_p,
        sums.skewness,
        sums.kurtosis,
        sums.wasserstein,
        0.5 * math.log(2 * math.pi * math.e) - sums.entropy,
        sums.l3,
    ]
    arrays = [np.where(sums.valid, r, np.nan) for r in results]
    return TokenStatistics._make([n, *arrays, ~sums.valid])


def shapiro_wilk(tokens: Tensor) -> tuple[Floats, Floats]:
    """Shapiro-Wilk's W and its p-value of every token, without the rest: each [T] float64.

    Arguments, NaN and errors are those of `token_statistics`; computed on the CPU.
    """
    array = _checked(tokens).cpu().numpy()
    rows, n = array.shape
    w = np.empty(rows)
    deviations = np.empty((min(rows, max(1, _NUMPY_BLOCK // n)), n))
    for x, start, stop in _sorted_blocks(array, _NUMPY_BLOCK):
        valid, raw = centre_sorted(x, deviations[: stop - start])
        w[start:stop] = np.where(valid, raw.w, np.nan)
    valid = ~np.isnan(w)
    p = np.full(rows, np.nan)
    p[valid] = shapiro_p(w[valid], n)
    return w, p


def computed_by() -> str:
    """What computes the sums of tokens on the CPU: "compiled" kernels or, without them, "numpy".

    The sums of both agree to 1e-10, those of all instruction sets of the kernels to the last bit.

    Raises:
        MissingKernels: the environment names a library that cannot be used.
    """
    return "compiled" if is_usable() else "numpy"


def _checked(tokens: Tensor) -> Tensor:
    if tokens.ndim != 2:
        raise UsageError(f"tokens must be a matrix [T, n], got shape {list(tokens.shape)}")
    if not tokens.is_floating_point():
        raise UsageError(f"tokens must be floating point, got {tokens.dtype}; convert them first")
    if tokens.shape[1] < MIN_N:
        raise UsageError(f"tokens need at least {MIN_N} entries for a test, got {tokens.shape[1]}")
    tokens = tokens.detach()
    return tokens if tokens.dtype in (torch.float32, torch.float64) else tokens.float()


def _blocks(rows: int, n: int, elements: int) -> list[tuple[int, int]]:
    size = max(1, elements // n)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def _sums(tokens: Tensor) -> Sums:
    rows, n = tokens.shape
    if tokens.is_cuda:
        blocks = [
            tensor_sums(tokens[start:stop].sort(dim=1).values)
            for start, stop in _blocks(rows, n, _CUDA_BLOCK)
        ]
    else:
        blocks = list(_cpu_sums(tokens.numpy()))
    if not blocks:
        return Sums(np.empty(0, dtype=np.bool_), *(np.empty(0) for _ in Sums._fields[1:]))
    return Sums(*(np.concatenate(column) for column in zip(*blocks, strict=True)))


def _cpu_sums(tokens: Block) -> Iterator[Sums]:
    rows, n = tokens.shape
    compiled = is_usable()
    elements = _COMPILED_BLOCK if compiled else _NUMPY_BLOCK
    workspace = None if compiled else Workspace(min(rows, max(1, elements // n)), n)
    for x, _, _ in _sorted_blocks(tokens, elements):
        yield compiled_sums(x) if workspace is None else block_sums(x, workspace)


def _sorted_blocks(tokens: Block, elements: int) -> Iterator[tuple[Block, int, int]]:
    """Blocks of about so many elements, rows sorted, in one buffer; with their first, end row."""
    rows, n = tokens.shape
    ordered = np.empty((min(rows, max(1, elements // n)), n), dtype=tokens.dtype)
    for start, stop in _blocks(rows, n, elements):
        x = ordered[: stop - start]
        np.copyto(x, tokens[start:stop])
        x.sort(axis=1)  # numpy's sort is vectorised, torch's is not
        yield x, start, stop
