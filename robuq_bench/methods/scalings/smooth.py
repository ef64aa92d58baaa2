"""SmoothQuant: channels of the input divided, and of the weight multiplied, by

    s_j = max|X_j|^α / max|W_j|^(1 - α)

so that a part of the inputs' outliers is carried by the weight. Source: Xiao et al., "SmoothQuant"
(ICML 2023). max|X_j| is over all calibration inputs, max|W_j| over the outputs of this layer. At
α = 0.5 both sides get the same largest magnitude in every channel, sqrt(max|X_j| max|W_j|).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from robuq_bench.errors import UsageError
from robuq_bench.methods._observed import finite
from robuq_bench.methods.base import ScalingMethod

if TYPE_CHECKING:
    from robuq_bench.methods.site import Site


FLOOR = 1e-5


class Smooth(ScalingMethod):
    """SmoothQuant's scaling. α: 0 leaves the inputs' range to them, 1 evens it out."""

    needs = frozenset({"absmax"})

    alpha: float = Field(default=0.5, ge=0, le=1)

    def fit(self, weight: Tensor, site: Site) -> ChannelScale:
        """The scaling; s_j and max|W_j| are at least `FLOOR`, and s_j = 1 for a channel that is
        zero in all inputs, or in all rows of the weight.

        Raises:
            UsageError: no inputs were observed; they or the weight are not finite.
        """
        inputs = finite(site, "absmax").to(weight)
        rows = weight.abs().amax(0)
        silent = (inputs == 0) | (rows == 0)
        if not bool(rows.isfinite().all()):
            raise UsageError(f"layer {site.name!r}: its weight is not finite")
        # The floors are SmoothQuant's: a channel nearly silent in calibration may speak later.
        scale = inputs**self.alpha / rows.clamp(min=FLOOR) ** (1 - self.alpha)
        return ChannelScale(torch.where(silent, torch.ones_like(scale), scale.clamp(min=FLOOR)))


class ChannelScale(nn.Module):
    """x / s and W s for the buffer `scale` [in]; both differentiable, in the dtype of the input.

    Infinities and NaN stay where they are.
    """

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """x / s, [..., in]."""
        return x / self.scale.to(x.dtype)

    def weight(self, w: Tensor) -> Tensor:
        """W s, [out, in]."""
        return w * self.scale.to(w.dtype)
