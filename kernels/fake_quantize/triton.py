"""Rotation and fake quantization of training as one kernel each way; see `reference.py`.

A token is read once, transformed in registers, and written once. The ±1 factors of the transform
are exact in fp16; tokens are scaled by a power of two first, as gradients would underflow there.
With float32 results every operand is split into two halves of fp16, which keeps 22 bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.fake_quantize.kernel import (
    backward_kernel,
    dot_factor,
    forward_kernel,
    padded_inner,
)
from kernels.fake_quantize.reference import (
    FakeQuantized,
    clip_range,
    level_shift,
    needs_state,
)
from kernels.hadamard_quantize.reference import Grid, Rotation
from kernels.hadamard_tile import sylvester
from kernels.launch import KernelInputError, check_tensor, next_power_of_2

OP = "fake_quantize"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILE_ELEMENTS = 4096
"""Elements of one program's tile: more rows for narrow tokens, one row for wide ones."""
MAX_TILE_ELEMENTS = 8192
"""Widest padded token that fits in registers."""
MAX_OUTER = 256
"""Largest power of two of a rotation: a dot of 32 and three butterflies."""
LONG_TILES = 8192
"""From this many tiles on a program takes LONG_ITERATIONS of them, and loads the factors once."""
LONG_ITERATIONS = 8

STATISTICS = {"mean-mad": 0, "min-max": 1, "absmax": 2, "absmean": 3}


@dataclass(frozen=True)
class Tile:
    """Constants of a launch that follow from the width of a token."""

    width: int
    inner: int
    outer: int
    padded: int
    rows: int

    @property
    def constants(self) -> dict[str, int]:
        dot = dot_factor(self.outer)
        return {
            "K": self.width,
            "M": self.inner,
            "ROWS": self.rows,
            "OUTER": self.outer,
            "INNER": self.padded,
            "DOT": dot,
        }

    @property
    def num_warps(self) -> int:
        return max(4, min(16, self.rows * self.outer * self.padded // 512))


def unsupported(width: int, order: int | None, outer: int) -> str | None:
    """Why tokens of this width do not fit the kernels, None if they do.

    Args:
        width: K.
        order, outer: of the rotation's inner factor and its power of two; None, 1 without one.
    """
    padded = next_power_of_2(width) if order is None else padded_inner(order)
    if outer > MAX_OUTER or outer & (outer - 1):
        return f"the power of two of the rotation is {outer}; kernels take up to {MAX_OUTER}"
    if order is not None and order > 64:
        return f"the rotation's inner factor has order {order}; kernels take up to 64"
    if padded * outer > MAX_TILE_ELEMENTS:
        return (
            f"width {width} takes {padded * outer} values in registers; kernels take up to "
            f"{MAX_TILE_ELEMENTS}"
        )
    return None


def _tile(width: int, rotation: Rotation | None) -> Tile:
    order = None if rotation is None else rotation.inner.shape[0]
    outer = 1 if rotation is None else rotation.outer
    if order is not None and order * outer != width:
        raise KernelInputError(
            f"{OP}: the rotation is of order {order * outer}, the tokens have {width} entries"
        )
    reason = unsupported(width, order, outer)
    if reason is not None:
        raise KernelInputError(f"{OP}: {reason}")
    inner = width if order is None else order
    padded = next_power_of_2(width) if order is None else padded_inner(order)
    return Tile(width, inner, outer, padded, max(1, TILE_ELEMENTS // (outer * padded)))


@functools.cache
def _sylvester(order: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return sylvester(order, torch.float16, device)


def schedule(rows: int, tile: Tile) -> tuple[int, int]:
    """Programs and iterations of each."""
    tiles = triton.cdiv(rows, tile.rows)
    iterations = LONG_ITERATIONS if tiles >= LONG_TILES else 1
    return triton.cdiv(tiles, iterations), iterations


def _factors(
    rotation: Rotation | None, signs: Tensor | None, tile: Tile, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Signs and both factors; `like` stands in for what the kernel does not read."""
    if signs is not None:
        check_tensor(OP, "signs", signs, shape=[tile.width], dtypes=[torch.float32], like=like)
    if rotation is None:
        return like if signs is None else signs, like, like
    order = tile.inner
    check_tensor(
        OP,
        "rotation.inner",
        rotation.inner,
        shape=[order, order],
        dtypes=[torch.float16],
        like=like,
    )
    dot = dot_factor(tile.outer)
    outer = _sylvester(dot, like.device) if dot > 1 else rotation.inner
    return like if signs is None else signs, rotation.inner, outer


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
    """`reference.fake_quantize` for x [M, K] bfloat16, float16 or float32, contiguous; M may be 0.

    `signs` is float32; `rotation.inner` float16 of order up to 64, its power of two up to 256.

    Raises:
        KernelInputError: anything else; the message says what is supported.
    """
    check_tensor(OP, "x", x, shape=[None, None], dtypes=DTYPES)
    rows, width = x.shape
    out_dtype = out_dtype or x.dtype
    if out_dtype not in DTYPES:
        raise KernelInputError(f"{OP}: out_dtype {out_dtype}; supported: {DTYPES}")
    tile = _tile(width, rotation)
    signs_, inner, outer = _factors(rotation, signs, tile, x)
    values = torch.empty(rows, width, dtype=out_dtype, device=x.device)
    rotated = torch.empty_like(values) if want_rotated else None
    save = save and needs_state(grid)
    state = torch.empty(rows, width, dtype=torch.int8, device=x.device) if save else None
    if rows == 0:
        return FakeQuantized(values, rotated, state)
    programs, iterations = schedule(rows, tile)
    clip_low, clip_high = clip_range(grid)
    forward_kernel[(programs,)](
        x,
        signs_,
        inner,
        outer,
        values,
        values if rotated is None else rotated,
        values if state is None else state,
        rows,
        float(width**-0.5),
        float(grid.factor),
        float(1 / grid.factor),
        float(grid.low),
        float(grid.high),
        float(clip_low),
        float(clip_high),
        float(grid.epsilon),
        **tile.constants,
        ITERATIONS=iterations,
        ROTATED=rotation is not None,
        SIGNED=signs is not None,
        PRECISE=out_dtype == torch.float32,
        STATISTIC=STATISTICS[grid.statistic],
        FLOOR=grid.floor,
        WANT_ROTATED=want_rotated,
        SAVE=save,
        num_warps=tile.num_warps,
    )
    return FakeQuantized(values, rotated, state)


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
    """`reference.fake_quantize_backward` for gradients of the dtypes that `fake_quantize` takes.

    Rows of `grad` and `grad_rotated` may be strided, as those of a concatenated tensor are.

    Raises:
        KernelInputError: other dtypes, shapes or devices, or a missing state.
    """
    check_tensor(OP, "grad", grad, shape=[None, None], dtypes=DTYPES, contiguous=False)
    rows, width = grad.shape
    out_dtype = out_dtype or grad.dtype
    if out_dtype not in DTYPES:
        raise KernelInputError(f"{OP}: out_dtype {out_dtype}; supported: {DTYPES}")
    tile = _tile(width, rotation)
    signs_, inner, outer = _factors(rotation, signs, tile, grad)
    if state is not None:
        check_tensor(OP, "state", state, shape=[rows, width], dtypes=[torch.int8], like=grad)
    if needs_state(grid) != (state is not None):
        raise KernelInputError(f"{OP}: only grids by mean and deviation have a state, and need it")
    if grad_rotated is not None:
        check_tensor(
            OP,
            "grad_rotated",
            grad_rotated,
            shape=[rows, width],
            dtypes=DTYPES,
            like=grad,
            contiguous=False,
        )
    out = torch.empty(rows, width, dtype=out_dtype, device=grad.device)
    if rows == 0:
        return out
    grad = _with_dense_rows(grad)
    added = grad if grad_rotated is None else _with_dense_rows(grad_rotated)
    programs, iterations = schedule(rows, tile)
    backward_kernel[(programs,)](
        grad,
        out if state is None else state,
        added,
        signs_,
        inner,
        outer,
        out,
        rows,
        grad.stride(0),
        added.stride(0),
        float(width**-0.5),
        float(grid.factor),
        float(grid.low + level_shift(grid)),
        float(grid.high + level_shift(grid)),
        **tile.constants,
        ITERATIONS=iterations,
        ROTATED=rotation is not None,
        SIGNED=signs is not None,
        PRECISE=out_dtype == torch.float32 and grad.dtype == torch.float32,
        STATE=state is not None,
        ADD_ROTATED=grad_rotated is not None,
        num_warps=tile.num_warps,
    )
    return out


def _with_dense_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied unless the entries of a row follow each other (a broadcast one is)."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
