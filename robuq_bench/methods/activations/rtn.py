"""Dynamic round-to-nearest: one grid for every token, or for every group of a token's channels.

- `symmetric` (abs-b): Δ = c max|x| / (2^(b-1) - 1), codes ±(2^(b-1) - 1), x̂ = qΔ. With
  c < 1 the code -2^(b-1) is one too, as in QuaRot.
- otherwise (aff-b): Δ = c (max x - min x) / (2^b - 1), z = round(-c min x / Δ), codes 0 to 2^b - 1,
  x̂ = (q - z)Δ.

The clip c is 0.9 in QuaRot (abs) and DuQuant (aff), 1 in ViDiT-Q and ConvRot; groups of channels
are Q-DiT's (aff) and SVDQuant's (abs-4, 64).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from robuq_bench.errors import ConfigError
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


class RoundToNearest(ActivationMethod):
    """Round-to-nearest on the range of each token. Bits from 2.

    One bit is refused: abs-b has no step there, and the rounded zero point of aff-b may put both
    levels half a range off.

    Attributes:
        symmetric: abs-b, else aff-b.
        clip: c, the share of the range that the grid covers.
        group: channels that share a grid; 0 = all of a token.
    """

    min_bits: ClassVar[int] = 2

    symmetric: bool = True
    clip: float = Field(default=1.0, gt=0, le=1)
    group: int = Field(default=0, ge=0)

    def check(self, out_features: int, in_features: int) -> None:
        """Raise ConfigError unless `group` divides the width."""
        if self.group and in_features % self.group:
            raise ConfigError(
                f"activation method {self.method!r}: group = {self.group} does not divide the "
                f"width {in_features}; choose a divisor, or 0 for whole tokens"
            )

    def scales_per_token(self, in_features: int) -> float:
        """One scale a group, and with aff-b a zero point."""
        groups = in_features / (self.group or in_features)
        return groups if self.symmetric else 2 * groups

    def fit(self, weight: Tensor, site: Site) -> TokenQuantizer:
        """The quantizer; it keeps no state."""
        return TokenQuantizer(self)


class TokenQuantizer(ActivationModule):
    """x [..., in] to x̂, same shape and dtype; half precision is computed in float32.

    Gradient: identity, also for entries that c < 1 clips, but not for infinite ones; the range
    counts as a constant. Constant groups come back as the constant, times c. What infinities and
    NaN do is said in `_uniform`.
    """

    method: RoundToNearest

    def forward(self, x: Tensor, bits: int) -> Tensor:
        """Fake-quantize x; ConfigError at bits that the method does not take."""
        self.check_bits(bits)
        method = self.method
        tokens = working(x)
        if method.group:
            tokens = tokens.unflatten(-1, (-1, method.group))
        with torch.no_grad():
            if method.symmetric:
                peak = tokens.abs().amax(-1, keepdim=True)
                grid = symmetric_grid(peak * method.clip, bits, lowest=method.clip < 1)
            else:
                low, high = tokens.amin(-1, keepdim=True), tokens.amax(-1, keepdim=True)
                grid = affine_grid(low * method.clip, high * method.clip, bits)
        return fake_quantize(tokens, grid, clipped_gradient=False).reshape(x.shape).to(x.dtype)
