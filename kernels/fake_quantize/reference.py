"""What the fake quantization of training computes, in plain PyTorch.

Forward: a token x [K] is rotated, z = (x * signs) @ H / sqrt(K), and put on its grid,
x̂ = scale * level + offset. Backward, for a grid by mean and mean absolute deviation, with
t = (z - shift) / scale, its level q and m = 1 inside the clip:
d x̂ = (1 - m) d shift + m dz + (q - m t) d scale, exactly as
`robuq_bench.methods.activations._robust`; other grids pass the gradient through.

That gradient reads of every entry the sign of t, whether and on which side it was clipped, and
where not the residual q - t. The forward pass packs them into one signed byte, so that the state
of a token takes K bytes, half of bfloat16, and neither t nor its scale is kept:

    index 0..124: inside the clip, q - t in [-1/2, 1/2] rounded to (index + 1/2) / 125 - 1/2
    index 125, 126: a token whose statistics are infinite and constant; passed, clipped
    index 127: clipped
    byte = index for t >= 0, -1 - index for t < 0

Clip and sign are exact. Rounding the residual moves only the share of the gradient that passes
through the scale: by 0.0023 factor / sqrt(K) of the whole, 3e-5 at K = 1152 and 4 bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.hadamard_quantize.reference import Grid, Rotation

RESIDUAL_LEVELS = 125
DEAD, DEAD_CLIPPED, CLIPPED = 125, 126, 127


class FakeQuantized(NamedTuple):
    """`values` [M, K]; `rotated` [M, K] unquantized or None; `state` int8 [M, K] or None."""

    values: Tensor
    rotated: Tensor | None
    state: Tensor | None


def needs_state(grid: Grid) -> bool:
    """Whether the gradient reads what the forward pass saw; it is the identity otherwise."""
    return grid.statistic == "mean-mad"


def level_shift(grid: Grid) -> float:
    """Level minus code: half a step where codes are rounded down."""
    return 0.5 if grid.floor else 0.0


def clip_range(grid: Grid) -> tuple[float, float]:
    """Range of t inside which the gradient passes: half a step around the outermost levels."""
    below = 0.5 - level_shift(grid)
    return grid.low - below, grid.high + 1 - below


def fake_quantize(
    x: Tensor,
    grid: Grid,
    *,
    rotation: Rotation | None,
    signs: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    want_rotated: bool = False,
    save: bool = True,
) -> FakeQuantized:
    """Rotated and fake-quantized tokens x [M, K], statistics in float32 (float64 for float64).

    Args:
        x: [M, K] floating point.
        grid: of the codes.
        rotation: None leaves x as it is.
        signs: [K] of ±1 before the rotation, or None.
        out_dtype: of `values` and `rotated`; default that of x.
        want_rotated: return z too.
        save: return the state that `fake_quantize_backward` needs, if the grid has one.
    """
    out_dtype = out_dtype or x.dtype
    z = x if x.dtype == torch.float64 else x.float()
    if signs is not None:
        z = z * signs.to(z.dtype)
    if rotation is not None:
        z = _transform(z, rotation.inner.to(z.dtype), rotation.outer)
    scale, inverse, shift, dead = _statistics(z, grid)
    t = (z - shift) * inverse
    codes = (t.floor() if grid.floor else t.clamp(grid.low, grid.high).round()).clamp(
        grid.low, grid.high
    )
    values = scale * (codes + level_shift(grid)) + shift
    state = _pack(t, codes, dead, grid) if save and needs_state(grid) else None
    rotated = z.to(out_dtype) if want_rotated else None
    return FakeQuantized(values.to(out_dtype), rotated, state)


def fake_quantize_backward(
    grad: Tensor,
    state: Tensor | None,
    grid: Grid,
    *,
    rotation: Rotation | None,
    signs: Tensor | None = None,
    grad_rotated: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Gradient at x [M, K] from those at `values` and, where there is one, at `rotated`.

    Args:
        grad: [M, K] at the fake-quantized values.
        state: int8 [M, K] of the forward pass; None where `needs_state(grid)` is false.
        grid, rotation, signs: as in the forward pass.
        grad_rotated: [M, K] at the rotated tokens, or None.
        out_dtype: default that of grad.
    """
    out_dtype = out_dtype or grad.dtype
    g = grad if grad.dtype == torch.float64 else grad.float()
    if state is not None:
        g = _through_statistics(g, state, grid)
    if grad_rotated is not None:
        g = g + grad_rotated.to(g.dtype)
    if rotation is not None:
        g = _transform(g, rotation.inner.to(g.dtype).T, rotation.outer)
    if signs is not None:
        g = g * signs.to(g.dtype)
    return g.to(out_dtype)


def _transform(x: Tensor, inner: Tensor, outer: int) -> Tensor:
    """x @ (Sylvester(outer) (x) inner) / sqrt(K), the Sylvester factor as butterflies."""
    rows, width = x.shape
    y = x.reshape(rows, outer, -1) @ inner
    half = outer // 2
    while half:
        a, b = y.reshape(rows, outer // (2 * half), 2, -1).unbind(2)
        y = torch.stack([a + b, a - b], 2)
        half //= 2
    return y.reshape(rows, width) / math.sqrt(width)


def _statistics(z: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale, its inverse (0 for scale 0), shift and whether they are infinite, each [M, 1]."""
    if grid.statistic in ("absmax", "absmean"):
        size = z.abs()
        value = (
            size.amax(-1, keepdim=True)
            if grid.statistic == "absmax"
            else size.mean(-1, keepdim=True)
        )
        dead = value == math.inf
        value = value.masked_fill(dead, 1 / grid.factor)
        inverse = (1 / grid.factor) / (value + grid.epsilon)
        return value * grid.factor, inverse, torch.zeros_like(value), dead
    if grid.statistic == "mean-mad":
        shift = z.mean(-1, keepdim=True).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        scale = (z - shift).abs().mean(-1, keepdim=True) * grid.factor
    else:
        low, high = z.amin(-1, keepdim=True), z.amax(-1, keepdim=True)
        scale = (high - low) * grid.factor
        shift = low
    dead = scale == math.inf
    if grid.statistic == "min-max":  # inf - inf, of a token all infinite, is NaN
        dead = dead | (low.isinf() & (low == high))
    scale = scale.nan_to_num(nan=1.0, posinf=1.0)
    if grid.statistic == "min-max":
        shift = (shift - scale * grid.low).masked_fill(dead, 0.0)
    return scale, scale.reciprocal().nan_to_num(posinf=0.0), shift, dead


def _pack(t: Tensor, codes: Tensor, dead: Tensor, grid: Grid) -> Tensor:
    low, high = clip_range(grid)
    clipped = (t <= low) | (t >= high)
    residual = codes + level_shift(grid) - t
    index = ((residual + 0.5) * RESIDUAL_LEVELS).floor().nan_to_num(nan=0.0)
    index = index.clamp(0, RESIDUAL_LEVELS - 1)
    index = index.masked_fill(dead, DEAD).masked_fill(clipped, CLIPPED)
    index = index.masked_fill(clipped & dead, DEAD_CLIPPED)
    return torch.where(t < 0, -1 - index, index).to(torch.int8)


def _through_statistics(grad: Tensor, state: Tensor, grid: Grid) -> Tensor:
    """Gradient at z of a grid by mean and mean absolute deviation."""
    code = state.to(grad.dtype)
    positive = code >= 0
    index = torch.where(positive, code, -1 - code)
    clipped = grad.masked_fill(index != CLIPPED, 0.0)
    residual = (index + 0.5) / RESIDUAL_LEVELS - 0.5
    residual = residual.masked_fill(index >= RESIDUAL_LEVELS, 0.0)
    outermost = torch.where(positive, grid.high, grid.low) + level_shift(grid)
    width = grad.shape[-1]
    # d scale / d z_j = factor / K (sign_j - mean sign), d shift / d z_j = 1 / K.
    slope = (clipped * outermost + grad * residual).sum(-1, keepdim=True) * (grid.factor / width)
    sign = torch.where(positive, 1.0, -1.0).to(grad.dtype)
    constant = (clipped.sum(-1, keepdim=True) - slope * sign.sum(-1, keepdim=True)) / width
    return grad.masked_fill(index > DEAD, 0.0) + slope * sign + constant
