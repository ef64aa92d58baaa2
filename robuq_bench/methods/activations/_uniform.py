"""What the uniform activation quantizers share: grids, rounding and its gradient.

x̂ = (clamp(round(x/Δ) + z, low, high) - z) Δ with whole z; `round` goes to even at ties. A scale
of zero never divides: see `affine_grid` for constants. Where the range is infinite, because an
entry is or because max - min overflows, Δ is 1 and the grid lies around 0, so an infinite entry
saturates at the outermost level. NaN in a range makes all that shares the range NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from robuq_bench.methods.base import ActivationMethod


class Grid(NamedTuple):
    """Step `scale` and whole `zero`, which broadcast against x, and the range of codes."""

    scale: Tensor
    zero: Tensor
    low: int
    high: int


class ActivationModule(nn.Module):
    """Base of the fitted quantizers: `forward(x, bits)`, and the bits that its method takes."""

    def __init__(self, method: ActivationMethod) -> None:
        super().__init__()
        self.method = method

    def check_bits(self, bits: int) -> None:
        """Raise ConfigError unless the module is defined at `bits`."""
        self.method.check_bits(bits)


def working(x: Tensor) -> Tensor:
    """Half-precision tokens are quantized in float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def symmetric_grid(bound: Tensor, bits: int, *, lowest: bool = False) -> Grid:
    """abs-b: Δ = bound / (2^(b-1) - 1), codes ±(2^(b-1) - 1), z = 0. Bits from 2.

    `lowest` adds the code -2^(b-1), which a bound below the largest magnitude can reach.
    """
    top = 2 ** (bits - 1) - 1
    scale = bound / top
    scale = torch.where((scale == 0) | scale.isinf(), torch.ones_like(scale), scale)
    return Grid(scale, torch.zeros_like(scale), -top - lowest, top)


def affine_grid(low: Tensor, high: Tensor, bits: int) -> Grid:
    """aff-b: Δ = (high - low) / (2^b - 1), z = round(-low/Δ), codes 0 to 2^b - 1.

    z is neither clamped nor is 0 forced into the range. Where high = low, Δ = |low| and z = ±1, so
    that code 0 is the constant exactly; Δ = 1 if that is zero too.
    """
    top = 2**bits - 1
    scale = (high - low) / top
    one = torch.ones_like(scale)
    scale = torch.where(scale == 0, low.abs(), scale)
    scale = torch.where(scale == 0, one, scale)
    endless = scale.isinf() | low.isinf() | high.isinf()
    scale = torch.where(endless, one, scale)
    zero = torch.where(endless, one * 2 ** (bits - 1), (-low / scale).round())
    return Grid(scale, zero, 0, top)


def fake_quantize(x: Tensor, grid: Grid, *, clipped_gradient: bool) -> Tensor:
    """x̂ of x (float32 or float64), same shape.

    Gradient: identity at finite entries; with `clipped_gradient`, 0 where the code was clamped.
    Scale and zero point get none.
    """
    with torch.no_grad():
        codes = (x / grid.scale).round() + grid.zero
        values = (codes.clamp(grid.low, grid.high) - grid.zero) * grid.scale
    if not (x.requires_grad and torch.is_grad_enabled()):
        return values
    passes = x.isfinite()
    if clipped_gradient:
        passes &= (codes >= grid.low) & (codes <= grid.high)
    # 0 in value, so that the values are those of the codes to the bit; inf - inf is chosen away.
    return values + torch.where(passes, x - x.detach(), torch.zeros_like(x))
