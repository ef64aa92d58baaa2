"""Lloyd-Max: the least squared error that any grid has on Gaussian tokens."""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
from torch import Tensor

from robuq_bench.methods.activations._lloyd_max_levels import lloyd_max_codebook
from robuq_bench.methods.activations._robust import RobustGrid
from robuq_bench.methods.activations._token_grid import GridMethod, TokenGrid


class LloydMaxGrid(RobustGrid):
    """Minimum-MSE non-uniform levels of N(0, 1), normalised as RobuQ's quantizer.

    Gradient passes up to as far beyond the outermost level as its threshold lies inside it, which
    is the half step of the uniform mid-rise grid.
    """

    name = "lloyd-max"

    def step(self, bits: int) -> float:
        return 1.0

    def clip_range(self, bits: int) -> tuple[float, float]:
        levels, thresholds = lloyd_max_codebook(bits)
        reach = float(2 * levels[-1] - thresholds[-1])
        return -reach, reach

    def encode(self, t: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
        _, thresholds = _codebook(bits, t.dtype, t.device)
        # right=True counts thresholds <= t. NaN sorts last, so it is added back.
        index = torch.bucketize(t.contiguous(), thresholds, out_int32=True, right=True)
        nan = torch.where(t.isnan(), t, -(2.0 ** (bits - 1)))
        return torch.add(index, nan, out=out)

    def levels_(self, codes: Tensor, bits: int) -> Tensor:
        levels, _ = _codebook(bits, codes.dtype, codes.device)
        index = codes.nan_to_num(nan=0.0).to(torch.int32) + 2 ** (bits - 1)
        return codes.copy_(torch.where(codes.isnan(), codes, levels[index]))


@functools.cache
def _codebook(bits: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    codebook = lloyd_max_codebook(bits)
    with torch.inference_mode(False):
        levels, thresholds = (torch.from_numpy(a).to(device, dtype) for a in codebook)
    return levels, thresholds


class LloydMax(GridMethod):
    """Per token, mean and MAD scale; levels that are not evenly spaced."""

    grid: ClassVar[TokenGrid] = LloydMaxGrid()
