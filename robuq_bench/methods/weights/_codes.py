"""`Codes`: what every weight method says of a quantized weight, ternary or evenly spaced."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Codes(NamedTuple):
    """Integer codes of a weight and what turns them back into numbers.

    Attributes:
        codes: [out, in] int8.
        scale: [out, groups] or [1, 1], float32, or float64 from float64 weights.
        zero: integers as floats, shaped like `scale`; None where they would all be 0.
        group: inputs that share a scale; 0 for all of a row.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    group: int = 0

    def dequantize(self) -> Tensor:
        """(codes − zero)·scale in the dtype of the scale, [out, in]."""
        return place(self.codes.to(self.scale.dtype), self.scale, self.zero, self.group)

    def as_int8(self) -> Codes:
        """The same with `codes` as int8, where a forward has left them as floats."""
        return self._replace(codes=self.codes.to(torch.int8))


def working(values: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def by_cell(values: Tensor, group: int) -> Tensor:
    """[out, in] as [out, groups, values of a group]."""
    return values.unflatten(1, (-1, group or values.shape[1]))


def place(levels: Tensor, scale: Tensor, zero: Tensor | None, group: int) -> Tensor:
    """(levels − zero)·scale [out, in] of levels [out, in] and what `Codes` says of the others."""
    cells = by_cell(levels, group)
    if zero is not None:
        cells = cells - zero[..., None]
    return (cells * scale[..., None]).flatten(1)
