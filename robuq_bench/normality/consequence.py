"""What non-normality costs: a token's quantization error over that of a normal token.

    ratio(x; Q, b) = mean (x - Q_b(x))^2 / var(x)  /  e_b,

with e_b the error of the same quantizer on N(0, 1). For min-max and absmax, whose error on N(0, 1)
depends on n, e_b is the optimal uniform mid-rise error (0.3634, 0.1188, 0.03744, 0.01154 at 1 to 4
bits), so their ratio also says how far they are from a Gaussian grid. 1 means "as good as normal".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm
from torch import Tensor

from robuq_bench.errors import UsageError
from robuq_bench.methods.activations._lloyd_max_levels import lloyd_max_codebook
from robuq_bench.methods.activations._robust import ONE_BIT_LEVEL, ROBUST_STEPS
from robuq_bench.methods.activations._token_grid import token_grid
from robuq_bench.quantization.attention import matmul_quantizer

BITS = (1, 2, 3, 4, 8)
QUANTIZERS = ("robust-midrise", "robust-midtread", "lloyd-max", "minmax", "absmax")
REFERENCE = "robust-midrise"
_BLOCK_ELEMENTS = 250_000


class Setting(NamedTuple):
    """A quantizer by its plan name (or "absmax", symmetric) and its bits."""

    quantizer: str
    bits: int


#: Every quantizer at every width; absmax, symmetric around a level at 0, has no 1-bit grid.
SETTINGS = tuple(Setting(q, b) for q in QUANTIZERS for b in BITS if (q, b) != ("absmax", 1))


@functools.cache
def gaussian_error(quantizer: str, bits: int) -> float:
    """Mean squared error of the quantizer's fixed grid on N(0, 1): its levels, nearest-level cells.

    Raises:
        UsageError: the quantizer has no fixed grid.
    """
    if quantizer == "lloyd-max":
        levels = lloyd_max_codebook(bits).levels
    else:
        step = 2 * ONE_BIT_LEVEL if bits == 1 else ROBUST_STEPS[bits - 2]
        codes = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
        if quantizer == "robust-midrise" or (quantizer == "robust-midtread" and bits == 1):
            levels = step * (codes + 0.5)
        elif quantizer == "robust-midtread":
            levels = step * codes
        else:
            raise UsageError(f"{quantizer!r} has no fixed grid for N(0, 1)")
    return _grid_error(levels)


def _grid_error(levels: NDArray[np.float64]) -> float:
    """Integral of (t - nearest level)^2 times the density of N(0, 1), in closed form."""
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    density = norm.pdf(edges)
    finite = np.where(np.isfinite(edges), edges, 0.0)
    mass = np.diff(norm.cdf(edges))
    first = -np.diff(density)
    second = mass - np.diff(finite * density)
    return float((second - 2 * levels * first + levels**2 * mass).sum())


def error_ratios(tokens: Tensor, settings: tuple[Setting, ...] = SETTINGS) -> NDArray[np.float64]:
    """Return the ratio of every token [T, n] (float32 or float64) at every setting: [T, settings].

    Runs the very quantizers that plans use. NaN for degenerate tokens (constant or not finite).
    """
    quantizers = [_fake_quantizer(setting) for setting in settings]
    references = [
        gaussian_error(REFERENCE if s.quantizer in ("minmax", "absmax") else s.quantizer, s.bits)
        for s in settings
    ]
    rows = max(1, _BLOCK_ELEMENTS // tokens.shape[-1])
    blocks = [_block_ratios(block, quantizers, references) for block in tokens.split(rows)]
    return np.concatenate(blocks) if blocks else np.empty((0, len(settings)))


def _block_ratios(
    x: Tensor, quantizers: list[Callable[[Tensor], Tensor]], references: list[float]
) -> NDArray[np.float64]:
    with torch.no_grad():
        variance = x.double().var(-1, correction=0)
        scale = x.abs().amax(-1).double()
        # A constant token's variance is rounding, not spread.
        dead = ~(variance > (torch.finfo(x.dtype).eps * scale) ** 2) | ~torch.isfinite(variance)
        columns = []
        for quantize, reference in zip(quantizers, references, strict=True):
            error = torch.sub(quantize(x), x).square_().mean(-1, dtype=torch.float64)
            columns.append((error / variance / reference).masked_fill_(dead, torch.nan))
        return torch.stack(columns, dim=1).cpu().numpy()


def _fake_quantizer(setting: Setting) -> Callable[[Tensor], Tensor]:
    if setting.quantizer == "absmax":
        return matmul_quantizer(setting.bits)
    quantizer = token_grid(setting.quantizer)
    return lambda x: quantizer.fake_quantize(x, setting.bits)
