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


class Errors(NamedTuple):
    """Of every token [T]: `ratios` [T, settings], NaN for degenerate tokens (constant or not
    finite); `outputs` [T, bits], ||W (Q(x) - x)||^2 at every setting of `REFERENCE`, where W is
    known.
    """

    ratios: NDArray[np.float64]
    outputs: NDArray[np.float64] | None


def error_ratios(tokens: Tensor, settings: tuple[Setting, ...] = SETTINGS) -> NDArray[np.float64]:
    """Ratios of tokens [T, n], [T, settings]; see `quantization_errors`."""
    return quantization_errors(tokens, settings).ratios


def quantization_errors(
    tokens: Tensor, settings: tuple[Setting, ...] = SETTINGS, weight: Tensor | None = None
) -> Errors:
    """Errors of tokens [T, n] (float32 or float64) at every setting, by the quantizers of plans.

    `weight` [out, n], in the dtype of the tokens and their basis, is what they are multiplied by.
    """
    quantizers = [_fake_quantizer(setting) for setting in settings]
    references = [
        gaussian_error(REFERENCE if s.quantizer in ("minmax", "absmax") else s.quantizer, s.bits)
        for s in settings
    ]
    seen = [weight is not None and s.quantizer == REFERENCE for s in settings]
    rows = max(1, _BLOCK_ELEMENTS // tokens.shape[-1])
    ratios, outputs = [np.empty((0, len(settings)))], [np.empty((0, sum(seen)))]
    for x in tokens.split(rows) if len(tokens) else ():
        with torch.no_grad():
            variance = x.double().var(-1, correction=0)
            scale = x.abs().amax(-1).double()
            # A constant token's variance is rounding, not spread.
            dead = ~(variance > (torch.finfo(x.dtype).eps * scale) ** 2)
            dead |= ~torch.isfinite(variance)
            columns, products = [], []
            for quantize, reference, is_seen in zip(quantizers, references, seen, strict=True):
                error = torch.sub(quantize(x), x)
                if weight is not None and is_seen:
                    products.append(squared_norms(error @ weight.T))
                mean = error.square_().mean(-1, dtype=torch.float64)
                columns.append((mean / variance / reference).masked_fill_(dead, torch.nan))
            ratios.append(torch.stack(columns, dim=1).cpu().numpy())
            if products:
                outputs.append(torch.stack(products, dim=1).cpu().numpy())
    return Errors(np.concatenate(ratios), np.concatenate(outputs) if any(seen) else None)


def squared_norms(rows: Tensor) -> Tensor:
    """Sums of squares of rows [T, n] in float64, [T]; overwrites them."""
    return rows.square_().sum(-1, dtype=torch.float64)


def _fake_quantizer(setting: Setting) -> Callable[[Tensor], Tensor]:
    if setting.quantizer == "absmax":
        return matmul_quantizer(setting.bits)
    quantizer = token_grid(setting.quantizer)
    return lambda x: quantizer.fake_quantize(x, setting.bits)
