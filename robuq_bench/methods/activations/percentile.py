"""Static quantization on a range that calibration fixed: quantiles of the inputs seen.

low and high are the (1 - q) and q quantiles of all entries of the calibration tokens, linearly
interpolated between order statistics; Δ and z follow from them and the bits as aff-b:
Δ = (high - low) / (2^b - 1), z = round(-low/Δ), x̂ = (clamp(round(x/Δ) + z, 0, 2^b - 1) - z)Δ; or,
`symmetric`, as abs-b of max(|low|, |high|). One (Δ, z) per tensor, as PTQ4DiT, which tries
q = .999, .9999 and .99999.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from robuq_bench.methods._observed import finite
from robuq_bench.methods.activations._uniform import (
    ActivationModule,
    affine_grid,
    fake_quantize,
    symmetric_grid,
    working,
)
from robuq_bench.methods.base import ActivationMethod

if TYPE_CHECKING:
    from robuq_bench.methods.site import Site


class Percentile(ActivationMethod):
    """Static range between two quantiles of the calibration tokens. Any bits from 2, no refit.

    Attributes:
        q: upper quantile; the lower one is 1 - q. 1 is the whole range
            of the sample.
        symmetric: abs-b of the larger of the two, else aff-b.
    """

    needs = frozenset({"tokens"})
    min_bits: ClassVar[int] = 2

    q: float = Field(default=0.999, gt=0.5, le=1)
    symmetric: bool = False

    def scales_per_token(self, in_features: int) -> float:
        """None: the grid is the layer's."""
        return 0.0

    def fit(self, weight: Tensor, site: Site) -> StaticQuantizer:
        """The quantizer with the quantiles of `site.tokens`.

        Raises:
            UsageError: no tokens, or some that are not finite.
        """
        tokens = finite(site, "tokens")
        low, high = quantile(tokens, 1 - self.q), quantile(tokens, self.q)
        if self.symmetric:
            high = max(abs(low), abs(high))
            low = -high
        return StaticQuantizer(self, *weight.new_tensor([low, high]))


def quantile(values: Tensor, q: float) -> float:
    """Quantile of all entries, interpolated linearly between the two nearest order statistics.

    Selects instead of sorting, and has no limit of size, where `torch.quantile` takes 2^24 values.
    """
    flat = values.flatten()
    position = q * (flat.numel() - 1)
    below = math.floor(position)
    first = float(flat.kthvalue(below + 1).values)
    if position == below:
        return first
    return first + (position - below) * (float(flat.kthvalue(below + 2).values) - first)


class StaticQuantizer(ActivationModule):
    """x [..., in] to x̂, same shape and dtype; half precision is computed in float32.

    Buffers `low`, `high` []: the range. Gradient: identity inside, 0 where the code was clamped; a
    code is clamped more than half a step outside of the range. An infinite entry saturates, NaN
    stays NaN, and neither touches another entry. A range of one number keeps that number (aff-b).
    """

    low: Tensor
    high: Tensor
    method: Percentile

    def __init__(self, method: Percentile, low: Tensor, high: Tensor) -> None:
        super().__init__(method)
        self.register_buffer("low", low.clone())
        self.register_buffer("high", high.clone())

    def forward(self, x: Tensor, bits: int) -> Tensor:
        """Fake-quantize x; ConfigError at bits that the method does not take."""
        self.check_bits(bits)
        tokens = working(x)
        with torch.no_grad():
            low, high = self.low.to(tokens.dtype), self.high.to(tokens.dtype)
            if self.method.symmetric:
                grid = symmetric_grid(high, bits)
            else:
                grid = affine_grid(low, high, bits)
        return fake_quantize(tokens, grid, clipped_gradient=True).to(x.dtype)
