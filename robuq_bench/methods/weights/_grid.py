"""Evenly spaced weight grids with a scale per tensor, row or group of inputs; shared by methods.

A grid of b bits has the integers low = −2^{b−1} … high = 2^{b−1}−1 and reads ŵ = (q − z)·Δ with
q = clamp(round(w/Δ) + z, low, high), halves to even. A *cell* is what shares one Δ and z: the
whole weight, a row (an output channel), or `group` neighbouring inputs of a row.

    symmetric (abs-b)   Δ = max|w| / high,             z = 0
    affine    (aff-b)   Δ = (max − min)/(2^b − 1),     z = round(low − min/Δ)

Affine codes are the usual 0 … 2^b−1 less 2^{b−1}, so that eight bits fit int8; q − z is the same.
Scales are rounded to float32 whatever the weight's dtype, and a zero point is an integer, so
that float64 products of them round to the float32 ones. A cell of zeros reads 0. A constant cell
reads itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from robuq_bench.errors import ConfigError
from robuq_bench.methods.base import SCALE_BITS, WeightMethod
from robuq_bench.methods.weights._codes import Codes, by_cell, place, working


def straight_through(weight: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` in the dtype of `weight`, with the gradient of `weight` itself."""
    result: Tensor = _StraightThrough.apply(weight, quantized)
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, quantized: Tensor) -> Tensor:
        return quantized.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def levels(
    weight: Tensor, scale: Tensor, zero: Tensor | None, group: int, low: int, high: int
) -> Tensor:
    """Codes of `weight` [out, in] as floats of its dtype; NaN stays NaN."""
    cells = (by_cell(weight, group) / scale[..., None]).round_()
    # Adding 0 turns -0 into 0, which is what an integer would be.
    cells.add_(0.0 if zero is None else zero[..., None])
    return cells.clamp_(low, high).flatten(1)


class UniformGrid(nn.Module):
    """A fixed grid: scales and zero points were fitted once and do not follow the weight.

    Gradient: identity in the weight, also where it is clamped; none in scale and zero point.

    Buffers: `scale` [out, groups] or [1, 1] float32; `zero` alike, or None on a symmetric grid.
    """

    scale: Tensor
    zero: Tensor | None

    def __init__(self, scale: Tensor, zero: Tensor | None, group: int, low: int, high: int) -> None:
        super().__init__()
        self.register_buffer("scale", scale.float())
        self.register_buffer("zero", None if zero is None else zero.float())
        self.group, self.low, self.high = group, low, high

    def _float_codes(self, weight: Tensor) -> Codes:
        weight = working(weight.detach())
        scale = working(self.scale).to(weight.dtype)
        zero = None if self.zero is None else working(self.zero).to(weight.dtype)
        codes = levels(weight, scale, zero, self.group, self.low, self.high)
        return Codes(codes, scale, zero, self.group)

    def forward(self, weight: Tensor) -> Tensor:
        """The nearest points of the grid, [out, in] in the dtype of `weight`."""
        return straight_through(weight, self._float_codes(weight).dequantize())

    def codes(self, weight: Tensor) -> Codes:
        """Codes that dequantize to `forward(weight)` bit for bit (before its cast to half)."""
        return self._float_codes(weight).as_int8()


@dataclass(frozen=True)
class Rule:
    """How scale and zero point follow from the values of a cell.

    Attributes:
        bits: of a code, 2 to 8.
        symmetric: abs-b, else aff-b.
        zero_in_range: widen an affine range until it holds 0, so that 0 is a point of the grid.
        shrink: candidates n of the clip search; 0 is none.
        shrink_power, shrink_step: its p and u, see `ratio`.
    """

    bits: int
    symmetric: bool = True
    zero_in_range: bool = True
    shrink: int = 0
    shrink_power: float = 2.4
    shrink_step: float = 0.01

    @property
    def low(self) -> int:
        """Smallest code, −2^{b−1}; a symmetric grid reaches it only where it clips."""
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """Largest code, 2^{b−1}−1."""
        return 2 ** (self.bits - 1) - 1

    def fit(self, cells: Tensor, ratio: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scale [cells, 1] and zero point (None if symmetric) of `cells` [cells, n].

        Both ends of the range are multiplied by `ratio` [cells, 1] first.
        """
        top = cells.amax(1, keepdim=True)
        bottom = cells.amin(1, keepdim=True)
        if self.symmetric:
            top = torch.maximum(top, -bottom)
        elif self.zero_in_range:
            top, bottom = top.clamp(min=0), bottom.clamp(max=0)
        if ratio is not None:
            top, bottom = top * ratio, bottom * ratio
        if self.symmetric:
            scale = (top / self.high).float()
            # "== 0" and not "<= 0" or "not > 0": a NaN has to stay one.
            return torch.where(scale == 0, 1.0, scale).to(cells.dtype), None
        scale = ((top - bottom) / (self.high - self.low)).float()
        scale = torch.where(scale == 0, bottom.abs().float(), scale)
        scale = torch.where(scale == 0, 1.0, scale).to(cells.dtype)
        return scale, (self.low - bottom / scale).round()

    def ratio(self, cells: Tensor) -> Tensor | None:
        """Clip search: float32 [cells, 1] in (0, 1], or None without one.

        shrink(p, n, u) of GPTQ's code: among 1 − i·u, i < n, the first with the least
        Σ|w − ŵ|^p over the cell. GPTQ and QuaRot use (2.4, 80, 0.01).
        """
        if not self.shrink:
            return None
        best = torch.ones(len(cells), 1, device=cells.device)
        least = torch.full((len(cells), 1), torch.inf, dtype=cells.dtype, device=cells.device)
        for index in range(self.shrink):
            candidate = torch.full_like(best, 1 - index * self.shrink_step)
            scale, zero = self.fit(cells, candidate)
            codes = levels(cells, scale, zero, 0, self.low, self.high)
            error = (cells - place(codes, scale, zero, 0)).abs_().pow_(self.shrink_power)
            total = error.sum(1, keepdim=True)
            best = torch.where(total < least, candidate, best)
            least = torch.minimum(least, total)
        return best


class UniformMethod(WeightMethod):
    """Fields that methods with an evenly spaced grid share, and the bits they store.

    Attributes:
        bits: of a code, 2 to 8.
        symmetric: abs-b; else aff-b, with a zero point.
        zero_in_range: the affine range is widened until it holds 0 (GPTQ, QuaRot, ViDiT-Q do
            it; Q-DiT's round-to-nearest and DuQuant do not). A symmetric one always holds it.
        group: inputs that share a scale; it must divide the width. 0 is a whole row.
        shrink: candidates of a clip search, 0 for none; see `Rule.ratio`.
        shrink_power, shrink_step: power of the error, and step between candidates.
    """

    bits: int = Field(default=4, ge=2, le=8)
    symmetric: bool = True
    zero_in_range: bool = True
    group: int = Field(default=0, ge=0)
    shrink: int = Field(default=0, ge=0, le=1000)
    shrink_power: float = Field(default=2.4, gt=0)
    shrink_step: float = Field(default=0.01, gt=0, lt=1)

    @model_validator(mode="after")
    def _fits_together(self) -> UniformMethod:
        if self.symmetric and not self.zero_in_range:
            raise ValueError(
                "zero_in_range = false needs symmetric = false: a symmetric grid always holds 0"
            )
        if self.shrink and (self.shrink - 1) * self.shrink_step >= 1:
            raise ValueError(
                f"shrink = {self.shrink} candidates, shrink_step = {self.shrink_step} apart, leave "
                "nothing of the range; keep (shrink - 1) * shrink_step below 1"
            )
        return self

    def check(self, out_features: int, in_features: int) -> None:
        """Raise ConfigError when `group` does not divide `in_features`."""
        if self.group and in_features % self.group:
            divisors = [g for g in range(2, in_features) if in_features % g == 0]
            near = sorted(divisors, key=lambda g: abs(g - self.group))[:3]
            raise ConfigError(
                f"weight method {self.method!r}: group = {self.group} does not divide the "
                f"{in_features} inputs of a layer; take a divisor "
                f"({', '.join(map(str, [*sorted(near), in_features]))}) or 0 for a whole row"
            )

    def cells(self, out_features: int, in_features: int) -> int:
        """How many scales a weight has."""
        return out_features * (in_features // self.group if self.group else 1)

    def nominal_bits(self) -> float:
        """`bits`."""
        return float(self.bits)

    def storage_bits(self, out_features: int, in_features: int) -> float:
        """`bits` a code, and 16 for each scale and, where there are any, zero point."""
        numbers = self.cells(out_features, in_features) * (1 if self.symmetric else 2)
        return float(self.bits * out_features * in_features + SCALE_BITS * numbers)

    def rule(self) -> Rule:
        """What the fields say about scale and zero point."""
        return Rule(
            self.bits,
            self.symmetric,
            self.zero_in_range,
            self.shrink,
            self.shrink_power,
            self.shrink_step,
        )
