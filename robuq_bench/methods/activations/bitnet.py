"""BitNet's activation quantizers: absmax at 8 bits, absmean below."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from robuq_bench.methods.activations._token_grid import GridMethod, Normalised, TokenGrid

#: Added to the denominator by BitNet so that an all-zero token has codes 0.
BITNET_EPS = 1e-5


class BitNetGrid(TokenGrid):
    """BitNet b1.58 / v2: INT8 by absmax, fewer bits by absmean. Gradient: identity.

    8 bits: γ = max|x|, x̂ = γ/127 RoundClip(127 x/(γ + ε), -128, 127). 4 bits: β = mean|x|,
    x̂ = β/sqrt(7) RoundClip(sqrt(7) x/(β + ε), -8, 7). Other widths b generalise the 4-bit rule
    with sqrt(2^(b-1) - 1), which is 1 at 2 bits and leaves 1 bit undefined (ConfigError).
    Source: BitNet v2 (arXiv 2504.18415) equations 4 and 5; ε is 1e-5 as in transformers.
    """

    name = "bitnet"
    min_bits = 2

    def normalise(
        self,
        x: Tensor,
        bits: int,
        dim: int = -1,
        out: Tensor | None = None,
        scratch: Tensor | None = None,
    ) -> Normalised:
        magnitude = torch.abs(x, out=scratch)
        if bits == 8:
            statistic, divisor = magnitude.amax(dim, keepdim=True), 127.0
        else:
            statistic = magnitude.mean(dim, keepdim=True)
            divisor = math.sqrt(2 ** (bits - 1) - 1)
        dead = statistic == math.inf
        statistic = statistic.masked_fill_(dead, divisor)
        inverse = divisor / (statistic + BITNET_EPS)
        zero = torch.zeros_like(statistic)
        t = torch.mul(x, inverse, out=out)
        return Normalised(t, statistic / divisor, inverse, zero, zero, dead)


class BitNet(GridMethod):
    """Per token, symmetric; one scale."""

    grid: ClassVar[TokenGrid] = BitNetGrid()

    def scales_per_token(self, in_features: int) -> float:
        """A scale; the grid has no offset."""
        return 1
