"""RobuQ's quantizer as its public deployment fork rounds."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from robuq_bench.methods.activations._token_grid import GridMethod, TokenGrid
from robuq_bench.methods.activations.robust_midrise import MidriseGrid


class MidtreadGrid(MidriseGrid):
    """Levels 0, ±Δ, ... with one extra negative level, as the deployment fork rounds.

    One bit has no level at 0: μ ± sqrt(2/pi) σ̂, the same as mid-rise.
    """

    name = "robust-midtread"

    def clip_range(self, bits: int) -> tuple[float, float]:
        low, high = super().clip_range(bits)
        return (low, high) if bits == 1 else (low - 0.5, high - 0.5)

    def offset(self, mean: Tensor, scale: Tensor, bits: int) -> Tensor:
        return super().offset(mean, scale, bits) if bits == 1 else mean

    def encode(self, t: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
        if bits == 1:
            return super().encode(t, bits, out)
        return TokenGrid.encode(self, t, bits, out)


class RobustMidtread(GridMethod):
    """Per token, mean and MAD scale; a level at the mean, and one more below than above."""

    grid: ClassVar[TokenGrid] = MidtreadGrid()
