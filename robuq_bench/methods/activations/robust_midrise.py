"""RobuQ's quantizer on the grid for which its steps are optimal."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from robuq_bench.methods.activations._robust import RobustGrid
from robuq_bench.methods.activations._token_grid import GridMethod, TokenGrid


class MidriseGrid(RobustGrid):
    """Levels ±Δ/2, ±3Δ/2, ...: the grid for which the steps Δ_b are optimal."""

    name = "robust-midrise"

    def clip_range(self, bits: int) -> tuple[float, float]:
        return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1)

    def offset(self, mean: Tensor, scale: Tensor, bits: int) -> Tensor:
        return mean + scale / 2

    def encode(self, t: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
        return torch.floor(t, out=out).clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


class RobustMidrise(GridMethod):
    """Per token, mean and MAD scale; levels between the rounding points."""

    grid: ClassVar[TokenGrid] = MidriseGrid()
