"""Rotate and quantize tokens, with what precedes it in a transformer: the definition, in PyTorch.

    x <- x + gate * value                     gated residual, rounded to the dtype of x, returned
    y = LayerNorm(x) (1 + scale) + shift      modulation; or y = SiLU(x); or y = x
    z = (y * signs) (Sylvester(outer) ⊗ inner) / sqrt(K)
    codes, scale, offset = grid(z);   branch = z @ down.T

Everything is computed in float32, or float64 for float64 tokens.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import KernelInputError, check_tensor

OP = "hadamard_quantize"

AT_ONCE = 2**18
"""Elements that a CPU computes at once, so that what a step leaves is in the cache for the next."""

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

Statistic = Literal["mean-mad", "min-max", "absmax", "absmean"]


@dataclass(frozen=True)
class Grid:
    """Uniform levels of a token: z is about scale * code + offset, one scale and offset per token.

    scale = factor * statistic and t = (z - shift) / (factor * (statistic + epsilon)).

    Attributes:
        statistic: "mean-mad": shift = mean(z), statistic = mean|z - shift|;
            "min-max": shift = min(z) - low * scale, statistic = max(z) - min(z);
            "absmax", "absmean": shift = 0, statistic = max|z| or mean|z|.
        factor: scale per unit of the statistic.
        low, high: codes are clamped to [low, high], within [-128, 127].
        floor: code = floor(t) and offset = shift + scale / 2, where otherwise code = t rounded
            half to even and offset = shift.
        epsilon: added to the statistic where tokens are divided by it (BitNet).
    """

    statistic: Statistic
    factor: float
    low: int
    high: int
    floor: bool = False
    epsilon: float = 0.0


class Quantized(NamedTuple):
    """Integer tokens. The grouped form has a leading G everywhere but in `residual`.

    codes: int8 [M, K]. scale, offset: float32 [M] (float64 for float64 tokens).
    code_sums: int32 [M], sum of a token's codes. branch: like scale, [M, r], or None.
    residual: [M, K] in the dtype of x, or None.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    code_sums: Tensor
    branch: Tensor | None
    residual: Tensor | None


@dataclass(frozen=True)
class Rotation:
    """Hadamard matrix Sylvester(outer) ⊗ inner of order K = outer * m.

    inner: ±1 [m, m], floating point. outer: power of two.
    """

    inner: Tensor
    outer: int


@dataclass(frozen=True)
class Modulation:
    """y = LayerNorm(x) (1 + scale) + shift, LayerNorm without parameters.

    shift, scale: [B, K], rows may be strided. tokens_per_image: token t reads row
    t // tokens_per_image. eps: added to the variance.
    """

    shift: Tensor
    scale: Tensor
    tokens_per_image: int
    eps: float = 1e-6


@dataclass(frozen=True)
class GatedResidual:
    """x <- x + gate * value. value: [M, K]; gate: [B, K], read as in `Modulation`."""

    value: Tensor
    gate: Tensor
    tokens_per_image: int


@torch.no_grad()
def hadamard_quantize(
    x: Tensor,
    grid: Grid,
    *,
    rotation: Rotation | None,
    signs: Tensor | None = None,
    modulation: Modulation | None = None,
    gated_residual: GatedResidual | None = None,
    silu: bool = False,
    down: Tensor | None = None,
) -> Quantized:
    """Codes of the rotated tokens; nothing has a gradient.

    Scale 0 (a constant token) has codes 0. A token whose statistic is infinite or NaN has scale 1
    and offset 0, so an infinite coordinate saturates; a NaN coordinate has code `low`.

    Args:
        x: [M, K] bfloat16, float16, float32 or float64; rows may be strided.
        grid: statistic and levels.
        rotation: None = tokens are not rotated.
        signs: ±1 [K] in any floating dtype, multiplied first; None = all 1. Signs [G, K] quantize
            the same tokens for G layers at once and give results a leading G.
        modulation: LayerNorm and modulation before the rotation.
        gated_residual: added to x before anything else; not in the grouped form.
        silu: whether y = SiLU(x); not together with `modulation`.
        down: [r, K], grouped [G, r, K]: projection of the rotated, unquantized tokens.

    Returns:
        Codes, what maps them back, their sums, the low-rank branch and the gated sum.

    Raises:
        KernelInputError: a tensor of another shape, dtype, device or layout, or exclusive options.
    """
    check_inputs(x, grid, rotation, signs, modulation, gated_residual, silu, down, anywhere=True)
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    residual = None
    if gated_residual is not None:
        gate = _rows_of_images(gated_residual.gate, gated_residual.tokens_per_image)
        x = (x.to(work) + gate.to(work) * gated_residual.value.to(work)).to(x.dtype)
        residual = x
    rows = len(x)
    at_once = max(1, AT_ONCE // x.shape[1] if x.device.type == "cpu" else rows)
    quantized, branches = [], []
    for first in range(0, max(rows, 1), at_once):
        y = x[first : first + at_once].to(work)
        if modulation is not None:
            y = _modulate(y, modulation, first)
        if silu:
            y = F.silu(y)
        if signs is not None:
            y = y * signs.to(work).unsqueeze(-2)  # [M, K], or [G, M, K] for grouped signs
        z = y if rotation is None else _rotate(y, rotation)
        quantized.append(_quantize(z, grid))
        if down is not None:
            branches.append(z @ down.to(work).mT)
    axis = 1 if signs is not None and signs.dim() == 2 else 0  # after the groups
    codes, scale, offset = (torch.cat(parts, axis) for parts in zip(*quantized, strict=True))
    branch = torch.cat(branches, axis) if branches else None
    return Quantized(codes, scale, offset, codes.sum(-1, dtype=torch.int32), branch, residual)


def _modulate(y: Tensor, modulation: Modulation, first: int) -> Tensor:
    """LayerNorm and modulation of tokens y [m, K], which are those from `first` on."""
    y = F.layer_norm(y, y.shape[-1:], eps=modulation.eps)
    image = torch.arange(first, first + len(y), device=y.device) // modulation.tokens_per_image
    scale, shift = modulation.scale[image].to(y.dtype), modulation.shift[image].to(y.dtype)
    return y.mul_(1 + scale).add_(shift)


def _rows_of_images(values: Tensor, tokens_per_image: int) -> Tensor:
    return values.repeat_interleave(tokens_per_image, 0)


def _rotate(y: Tensor, rotation: Rotation) -> Tensor:
    """y (Sylvester(outer) ⊗ inner) / sqrt(K); y [..., K]."""
    stride, outer = len(rotation.inner), rotation.outer
    z = y.reshape(-1, stride) @ (rotation.inner.to(y.dtype) / math.sqrt(y.shape[-1]))
    while outer > 1:
        order = outer if outer <= 32 else 16  # large factors cost arithmetic, many cost passes
        z = _sylvester(order).to(y) @ z.view(-1, order, stride)
        stride, outer = stride * order, outer // order
    return z.view(y.shape)


@functools.cache
def _sylvester(order: int) -> Tensor:
    """Sylvester's Hadamard matrix, ±1 [order, order], of an order that is a power of two."""
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1)
        while len(matrix) < order:
            matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


def _quantize(z: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 like z [..., K], scale and offset [...]."""
    t = torch.empty_like(z)
    if grid.statistic == "mean-mad":
        shift = z.mean(-1, keepdim=True)
        statistic = torch.sub(z, shift, out=t).abs_().mean(-1, keepdim=True)
    elif grid.statistic == "min-max":
        shift = z.amin(-1, keepdim=True)
        statistic = z.amax(-1, keepdim=True) - shift
    else:
        magnitude = torch.abs(z, out=t)
        absmax = grid.statistic == "absmax"
        statistic = magnitude.amax(-1, keepdim=True) if absmax else magnitude.mean(-1, keepdim=True)
        shift = torch.zeros_like(statistic)
    scale = grid.factor * statistic
    if grid.statistic == "min-max":
        shift = shift - grid.low * scale
    inverse = 1 / (grid.factor * (statistic + grid.epsilon))
    dead = ~(scale < math.inf)  # also NaN
    inverse = inverse.masked_fill(dead, 1.0).nan_to_num(posinf=0.0)
    scale, shift = scale.masked_fill(dead, 1.0), shift.masked_fill(dead, 0.0)
    torch.sub(z, shift, out=t).mul_(inverse)
    t = t.floor_() if grid.floor else t.round_()  # in place: a CPU waits for memory here
    codes = t.clamp_(grid.low, grid.high).nan_to_num_(nan=grid.low).to(torch.int8)
    offset = shift + scale / 2 if grid.floor else shift
    return codes, scale.squeeze(-1), offset.squeeze(-1)


def check_inputs(
    x: Tensor,
    grid: Grid,
    rotation: Rotation | None,
    signs: Tensor | None,
    modulation: Modulation | None,
    gated_residual: GatedResidual | None,
    silu: bool,
    down: Tensor | None,
    *,
    anywhere: bool,
) -> None:
    """Raise KernelInputError for what neither the reference nor the kernel takes.

    Args:
        anywhere: whether x may be on any device and be float64, as for the reference.
    """

    def check(name: str, tensor: Tensor, *shape: int | None, rows: bool = False) -> None:
        check_tensor(OP, name, tensor, shape=shape, dtypes=FLOATS, like=x, contiguous=not rows)
        if rows and tensor.numel() and tensor.stride(-1) != 1:
            raise KernelInputError(
                f"{OP}: the last dimension of {name} must be contiguous, its strides are "
                f"{list(tensor.stride())}; call .contiguous() on it"
            )

    dtypes = FLOATS if anywhere else FLOATS[:3]
    like = x if anywhere else None
    check_tensor(OP, "x", x, shape=(None, None), dtypes=dtypes, like=like, contiguous=False)
    check("x", x, None, None, rows=True)
    rows, width = x.shape
    if width == 0:
        raise KernelInputError(f"{OP}: x must have at least one column")
    if grid.statistic not in ("mean-mad", "min-max", "absmax", "absmean"):
        raise KernelInputError(f"{OP}: unknown grid.statistic {grid.statistic!r}")
    if not -128 <= grid.low <= 0 <= grid.high <= 127:
        raise KernelInputError(
            f"{OP}: codes must lie within [-128, 127] and include 0, not [{grid.low}, {grid.high}]"
        )
    if not 0 < grid.factor < math.inf:
        raise KernelInputError(f"{OP}: grid.factor must be positive, got {grid.factor}")
    if rotation is not None:
        check("rotation.inner", rotation.inner, None, None)
        m = len(rotation.inner)
        power_of_two = rotation.outer > 0 and rotation.outer & (rotation.outer - 1) == 0
        if tuple(rotation.inner.shape) != (m, m) or not power_of_two or rotation.outer * m != width:
            raise KernelInputError(
                f"{OP}: rotation must be a power of two times a square matrix of order "
                f"K = {width}, got {rotation.outer} times {list(rotation.inner.shape)}"
            )
    group: tuple[int, ...] = ()
    if signs is not None:
        group = tuple(signs.shape[:1]) if signs.dim() == 2 else ()
        check("signs", signs, *group, width)
    if down is not None:
        check("down", down, *group, None, width)
    if modulation is not None and silu:
        raise KernelInputError(f"{OP}: choose either modulation or silu")
    if gated_residual is not None and group:
        raise KernelInputError(f"{OP}: grouped signs [G, K] take no gated_residual")
    of_images: list[tuple[str, Tensor, int]] = []
    if modulation is not None:
        of_images.append(("modulation.shift", modulation.shift, modulation.tokens_per_image))
        of_images.append(("modulation.scale", modulation.scale, modulation.tokens_per_image))
    if gated_residual is not None:
        check("gated_residual.value", gated_residual.value, rows, width, rows=True)
        of_images.append(
            ("gated_residual.gate", gated_residual.gate, gated_residual.tokens_per_image)
        )
    for name, tensor, tokens_per_image in of_images:
        if tokens_per_image < 1 or rows % tokens_per_image:
            raise KernelInputError(
                f"{OP}: {rows} rows of x are no multiple of tokens_per_image = {tokens_per_image}"
            )
        check(name, tensor, rows // tokens_per_image, width, rows=True)
