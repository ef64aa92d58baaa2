"""Round-to-nearest on an evenly spaced grid that follows the weight."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from robuq_bench.methods.site import Site
from robuq_bench.methods.weights._codes import Codes, working
from robuq_bench.methods.weights._grid import Rule, UniformMethod, levels, straight_through


class Rtn(UniformMethod):
    """w → (q − z)·Δ with Δ, z from the extremes of each cell (formulas: `_grid`).

    The floor of every comparison; the weight grid of Q-DiT, ViDiT-Q, ConvRot (per row) and SVDQuant
    (symmetric, group 64). With the clip search `shrink` as an option.

    Shapes: weight [out, in]; scales [out, in/group], [out, 1], or [1, 1] per tensor.

    The grid is *dynamic*: scale and zero point are found anew from the weight at each forward, in
    float32 (float64 for float64 weights), so that it keeps up with training; on a weight that
    stays, as after PTQ, it is the grid fitted once. Only the clip ratios of a shrink search are
    kept from `fit`, as a search at each step would cost `shrink` forwards.

    Gradient: identity, also where a clip ratio clamps. Ranges count as constants.

    Attributes:
        per: what shares a scale where `group` is 0.
    """

    per: Literal["tensor", "row"] = "row"

    @model_validator(mode="after")
    def _one_cell_shape(self) -> Rtn:
        if self.per == "tensor" and self.group:
            raise ValueError('per = "tensor" and a group exclude each other; drop one')
        return self

    def cells(self, out_features: int, in_features: int) -> int:
        """How many scales a weight has."""
        return 1 if self.per == "tensor" else super().cells(out_features, in_features)

    def fit(self, weight: Tensor, site: Site) -> nn.Module:
        """A `DynamicGrid`; nothing of `site` is read.

        Raises:
            ConfigError: `group` does not divide the width.
        """
        self.check(*weight.shape)
        grid = DynamicGrid(self.rule(), self.group, self.per == "tensor")
        cells = grid.cells(weight.detach())
        if site.is_blank and self.shrink:  # loaded afterwards, so only the shape counts
            ratio: Tensor | None = cells.new_ones(len(cells), dtype=torch.float32)
        else:
            ratio = grid.rule.ratio(cells)
        if ratio is not None:
            grid.ratio = ratio.reshape(1 if grid.per_tensor else len(weight), -1)
        return grid


class DynamicGrid(nn.Module):
    """The grid of `Rtn`. Buffer `ratio` (None without a search): float32, shaped like scales."""

    ratio: Tensor | None

    def __init__(self, rule: Rule, group: int, per_tensor: bool) -> None:
        super().__init__()
        self.rule, self.group, self.per_tensor = rule, group, per_tensor
        self.register_buffer("ratio", None)

    def cells(self, weight: Tensor) -> Tensor:
        """`weight` [out, in] as [cells, values that share a scale]."""
        if self.per_tensor:
            return weight.reshape(1, -1)
        return weight.reshape(-1, self.group or weight.shape[1])

    def _grid(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        ratio = None if self.ratio is None else self.ratio.reshape(-1, 1).to(weight.dtype)
        scale, zero = self.rule.fit(self.cells(weight), ratio)
        rows = 1 if self.per_tensor else len(weight)
        return scale.reshape(rows, -1), None if zero is None else zero.reshape(rows, -1)

    def _float_codes(self, weight: Tensor) -> Codes:
        weight = working(weight.detach())
        scale, zero = self._grid(weight)
        codes = levels(weight, scale, zero, self.group, self.rule.low, self.rule.high)
        return Codes(codes, scale, zero, self.group)

    def forward(self, weight: Tensor) -> Tensor:
        """The nearest points of the grid, [out, in] in the dtype of `weight`."""
        return straight_through(weight, self._float_codes(weight).dequantize())

    def codes(self, weight: Tensor) -> Codes:
        """Codes that dequantize to `forward(weight)` bit for bit (before its cast to half)."""
        return self._float_codes(weight).as_int8()
