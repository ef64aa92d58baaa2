"""Rotate and quantize tokens in one pass: the kernel of `reference.hadamard_quantize`.

A program holds ROWS tokens as one tile [ROWS * OUTER, 64], which is both factors' matrix-product
shape, and takes ITERATIONS such tiles so that it loads the factors once. Numbers differ from the
reference in the fp16 operands of the products alone: about 1 % of 8-bit codes differ, by one.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.hadamard_quantize.reference import (
    OP,
    GatedResidual,
    Grid,
    Modulation,
    Quantized,
    Rotation,
    check_inputs,
)
from kernels.hadamard_tile import TILE, block_sylvester, fold, load_folded, transform_tokens
from kernels.launch import KernelInputError, next_power_of_2

MAX_OUTER = 128
"""Most rows of a tile that belong to one token."""
MAX_WIDTH = MAX_OUTER * TILE
MAX_RANK = 64
RANK_STEP = 2
"""Ranks of the low-rank branch reduced at a time."""
PROGRAMS = 2048
"""Programs that keep a large GPU busy; with more tiles than these, a program takes several."""
MAX_ITERATIONS = 8
NUM_STAGES = 1
"""Loads are not pipelined: Triton 3.6 then spills registers; other programs fill the waits."""

# Adding 1.5 * 2^23 rounds a float half to even and leaves the integer in its low bits, which saves
# the conversion instructions, a quarter as fast as additions.
_ROUNDER = tl.constexpr(12582912.0)
_ROUNDER_BITS = tl.constexpr(0x4B400000)


@triton.jit
def _token_sum(x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Sum of every token, [ROWS]. One flat reduction: half the shuffles of two nested ones."""
    return tl.sum(tl.reshape(x, (ROWS, SIZE)), 1)


@triton.jit
def _token_max(x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    return tl.max(tl.reshape(x, (ROWS, SIZE)), 1)


@triton.jit
def _modulation(
    shift_ptr,
    scale_ptr,
    at_shift,
    at_scale,
    mask,
    signs,
    SIGNED: tl.constexpr,
    HALF: tl.constexpr,
):
    """(1 + scale, shift) with the signs folded in; in fp16 where a product with fp16 follows."""
    shift = tl.load(shift_ptr + at_shift, mask=mask, other=0.0).to(tl.float32)
    gain = tl.load(scale_ptr + at_scale, mask=mask, other=0.0).to(tl.float32) + 1.0
    if SIGNED:
        shift *= signs
        gain *= signs
    if HALF:  # half the registers, and two elements per instruction
        shift = shift.to(tl.float16)
        gain = gain.to(tl.float16)
    return gain, shift


@triton.jit
def hadamard_quantize_kernel(
    x_ptr,
    value_ptr,
    gate_ptr,
    residual_ptr,
    shift_ptr,
    scale_ptr,
    signs_ptr,
    inner_ptr,
    outer_ptr,
    down_ptr,
    codes_ptr,
    token_scale_ptr,
    token_offset_ptr,
    code_sums_ptr,
    branch_ptr,
    rows,
    tokens_per_image,
    x_stride,
    value_stride,
    gate_stride,
    shift_stride,
    scale_stride,
    factor,
    epsilon,
    low,
    high,
    norm_eps,
    K: tl.constexpr,
    M: tl.constexpr,  # columns of the tile that are used
    FACTOR_M: tl.constexpr,  # order of `inner` in memory
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    ITERATIONS: tl.constexpr,
    ROTATED: tl.constexpr,
    NORM: tl.constexpr,  # of the transform, with the power of two taken out of `inner`
    SIGNED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MODULATED: tl.constexpr,
    ONE_IMAGE: tl.constexpr,  # whether all tokens of a program belong to one image
    SILU: tl.constexpr,
    STATISTIC: tl.constexpr,
    FLOOR: tl.constexpr,
    RANK: tl.constexpr,
    RANK_STEP: tl.constexpr,
    RANK_STEPS: tl.constexpr,
):
    """ITERATIONS tiles of ROWS tokens of one group; the flags say what precedes the rotation."""
    SIZE: tl.constexpr = OUTER * INNER
    group = tl.program_id(1)
    first = tl.program_id(0) * (ROWS * ITERATIONS)
    r = tl.arange(0, ROWS)[:, None, None]
    flat = tl.arange(0, ROWS)
    b = tl.arange(0, INNER)[None, None, :]
    offset = tl.arange(0, OUTER)[None, :, None] * M + b
    # Kept as narrow as it can be: the compiler drops what it can prove to be padding.
    inside = b < M if ROTATED else offset < K
    used = inside.to(tl.float32)
    signs = 1.0
    if SIGNED:
        # fp16 holds ±1 in half the registers.
        signs = tl.load(signs_ptr + group * K + offset, mask=inside, other=0.0).to(tl.float16)
    if ROTATED:
        # An eighth keeps the product with up to 64 rows in the range of fp16.
        inner = load_folded(inner_ptr, FACTOR_M, M, INNER) * 0.125
        outer = inner
        if OUTER > 1:
            i = tl.arange(0, ROWS * OUTER)
            outer = tl.load(outer_ptr + i[:, None] * (ROWS * OUTER) + i[None, :])
    if MODULATED and ONE_IMAGE:
        at = first // tokens_per_image
        gain, shift = _modulation(
            shift_ptr,
            scale_ptr,
            at * shift_stride + offset,
            at * scale_stride + offset,
            inside,
            signs,
            SIGNED,
            ROTATED,
        )

    for i in tl.range(ITERATIONS):
        row0 = first + i * ROWS
        valid = flat < rows - row0
        mask = (r < rows - row0) & inside
        long_row0 = row0.to(tl.int64)
        tile = r * K + offset

        x = tl.load(x_ptr + long_row0 * x_stride + (r * x_stride + offset), mask=mask, other=0.0)
        y = x.to(tl.float32)
        if RESIDUAL:
            at_value = value_ptr + long_row0 * value_stride + (r * value_stride + offset)
            value = tl.load(at_value, mask=mask, other=0.0).to(tl.float32)
            if ONE_IMAGE:
                at_gate = row0 // tokens_per_image * gate_stride + offset
                gate = tl.load(gate_ptr + at_gate, mask=inside, other=0.0)
            else:
                at_gate = (row0 + r) // tokens_per_image * gate_stride + offset
                gate = tl.load(gate_ptr + at_gate, mask=mask, other=0.0)
            total = (y + gate.to(tl.float32) * value).to(x.dtype)
            tl.store(residual_ptr + long_row0 * K + tile, total, mask=mask)
            y = total.to(tl.float32)
        if MODULATED:
            if not ONE_IMAGE:
                at_image = (row0 + r) // tokens_per_image
                gain, shift = _modulation(
                    shift_ptr,
                    scale_ptr,
                    at_image * shift_stride + offset,
                    at_image * scale_stride + offset,
                    mask,
                    signs,
                    SIGNED,
                    ROTATED,
                )
            mean = _token_sum(y, ROWS, SIZE) * (1.0 / K)
            y = y - mean[:, None, None] * used
            variance = _token_sum(y * y, ROWS, SIZE) * (1.0 / K)
            dead = ~(variance < float("inf"))
            y = y * tl.rsqrt(variance + norm_eps)[:, None, None]
            if ROTATED:
                y = y.to(tl.float16)
            y = y * gain + shift
            unit = tl.full((ROWS,), 1.0, tl.float32)
        else:
            if SILU:
                y = y * tl.sigmoid(y)
            # A power of two near mean|y|, so that fp16 takes tokens of any magnitude.
            magnitude = _token_sum(tl.abs(y), ROWS, SIZE) * (1.0 / K)
            dead = ~(magnitude < float("inf"))
            exponent = magnitude.to(tl.int32, bitcast=True) & 0x7F800000
            exponent = tl.where(dead, 127 << 23, tl.maximum(exponent, 1 << 23))
            unit = exponent.to(tl.float32, bitcast=True)
            inverse_unit = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
            y = y * inverse_unit[:, None, None]
            if SIGNED and not ROTATED:
                y = y * signs

        if (ROTATED or MODULATED) and tl.max(dead.to(tl.int32), 0) > 0:
            # Infinities would spoil the other tokens of the tile: keep their signs, but not NaN.
            if MODULATED:
                y = tl.where(dead[:, None, None], tl.zeros_like(y), y)
            else:
                fixed = tl.clamp(y * 2.0**-120, -256.0, 256.0)
                y = tl.where(dead[:, None, None], fixed, y)
        if ROTATED:
            y = y.to(tl.float16)
            if SIGNED and not MODULATED:
                y = y * signs
            y = transform_tokens(y, inner, outer, ROWS, OUTER, INNER)
            unit = unit * NORM
        # In units of `unit`. The compiler drops additions of -0.0, and all work on padding.
        z = tl.where(inside, y, -0.0)
        if STATISTIC == "mean-mad":
            middle = _token_sum(z, ROWS, SIZE) * (1.0 / K)
            deviation = tl.abs(z - middle[:, None, None])
            statistic = _token_sum(tl.where(inside, deviation, -0.0), ROWS, SIZE) * (1.0 / K)
        elif STATISTIC == "min-max":
            smallest = -_token_max(tl.where(inside, -z, float("-inf")), ROWS, SIZE)
            statistic = _token_max(tl.where(inside, z, float("-inf")), ROWS, SIZE) - smallest
            middle = smallest - low * factor * statistic
        elif STATISTIC == "absmax":
            statistic = _token_max(tl.abs(z), ROWS, SIZE)
            middle = tl.zeros((ROWS,), tl.float32)
        else:
            statistic = _token_sum(tl.abs(z), ROWS, SIZE) * (1.0 / K)
            middle = tl.zeros((ROWS,), tl.float32)
        scale = factor * statistic * unit
        dead = dead | ~(scale < float("inf"))
        divisor = scale + factor * epsilon
        alive = (divisor > 0.0) & ~dead
        inverse = tl.where(alive, unit / tl.where(alive, divisor, 1.0), 0.0)
        shift_codes = middle * inverse
        # Of a dead token z holds the signs of infinities, and after LayerNorm nothing but NaN was.
        inverse = tl.where(dead, 2.0**60 if ROTATED else 1.0, inverse)
        shift_codes = tl.where(dead, 256.0 if MODULATED else 0.0, shift_codes)
        scale = tl.where(dead, 1.0, scale)
        token_offset = tl.where(dead, 0.0, middle * unit)
        t = z * inverse[:, None, None] - shift_codes[:, None, None]
        t = tl.clamp(t, low, high)
        if FLOOR:
            t = tl.floor(t)
            token_offset += 0.5 * scale
        bits = (t + _ROUNDER).to(tl.int32, bitcast=True)
        code_sum = _token_sum(tl.where(inside, bits - _ROUNDER_BITS, 0), ROWS, SIZE)

        long_row = group.to(tl.int64) * rows + row0
        tl.store(codes_ptr + long_row * K + tile, bits.to(tl.int8), mask=mask)
        tl.store(token_scale_ptr + long_row + flat, scale, mask=valid)
        tl.store(token_offset_ptr + long_row + flat, token_offset, mask=valid)
        tl.store(code_sums_ptr + long_row + flat, code_sum, mask=valid)
        if RANK > 0:
            # Multiplied and reduced, RANK_STEP ranks at a time: with one or two tokens a program,
            # a matrix product would be mostly padding and fetch no less.
            columns = tl.reshape(z, (1, ROWS, SIZE))
            units = tl.where(dead, float("nan"), unit)
            for step in tl.range(RANK_STEPS):
                rank = step * RANK_STEP + tl.arange(0, RANK_STEP)
                read = (rank[:, None, None] < RANK) & inside
                at_down = (group * RANK + rank[:, None, None]) * K + offset
                down = tl.load(down_ptr + at_down, mask=read, other=0.0).to(tl.float32)
                parts = tl.reshape(down, (RANK_STEP, 1, SIZE)) * columns
                branch = tl.sum(parts, 2) * units[None, :]
                at_branch = flat[None, :] * RANK + rank[:, None]
                written = (rank[:, None] < RANK) & valid[None, :]
                tl.store(branch_ptr + long_row * RANK + at_branch, branch, mask=written)


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
    """`reference.hadamard_quantize` in one kernel, for bfloat16, float16 and float32 tokens.

    K is at most 8192 and, when rotated, a power of two times a factor of order at most 64; r is at
    most 64. Scale, offset and branch are float32. A token whose statistics are infinite or NaN has
    branch NaN, and where several infinities meet in a coordinate its code is not specified.

    Raises:
        KernelInputError: a tensor of another shape, dtype, device or layout, or exclusive options.
    """
    check_inputs(x, grid, rotation, signs, modulation, gated_residual, silu, down, anywhere=False)
    rows, width = x.shape
    images = [p.tokens_per_image for p in (modulation, gated_residual) if p is not None]
    if len(set(images)) > 1:
        raise KernelInputError(f"{OP}: modulation and gated_residual differ in tokens_per_image")
    if gated_residual is not None and gated_residual.value.dtype == torch.float64:
        raise KernelInputError(f"{OP}: gated_residual.value must not be float64")
    rank = 0 if down is None else down.shape[-2]
    if rank > MAX_RANK or (down is not None and rank == 0):
        raise KernelInputError(f"{OP}: down has rank {rank}; 1 to {MAX_RANK} are supported")
    outer, m, source_m = _tile(width, rotation)
    rows_per_tile = max(1, TILE // outer)
    iterations = _iterations(rows, rows_per_tile)
    tokens_per_image = images[0] if images else 1

    groups = None if signs is None or signs.dim() == 1 else len(signs)
    lead = (rows,) if groups is None else (groups, rows)
    codes = torch.empty((*lead, width), dtype=torch.int8, device=x.device)
    scale = torch.empty(lead, dtype=torch.float32, device=x.device)
    offset = torch.empty(lead, dtype=torch.float32, device=x.device)
    code_sums = torch.empty(lead, dtype=torch.int32, device=x.device)
    branch = None if down is None else torch.empty((*lead, rank), device=x.device)
    residual = (
        None
        if gated_residual is None
        else torch.empty((rows, width), dtype=x.dtype, device=x.device)
    )
    result = Quantized(codes, scale, offset, code_sums, branch, residual)
    if codes.numel() == 0:
        return result
    grid_size = (triton.cdiv(rows, rows_per_tile * iterations), 1 if groups is None else groups)
    # What a specialisation does not read is x, so that every argument is a tensor.
    hadamard_quantize_kernel[grid_size](
        x,
        x if gated_residual is None else gated_residual.value,
        x if gated_residual is None else gated_residual.gate,
        x if residual is None else residual,
        x if modulation is None else modulation.shift,
        x if modulation is None else modulation.scale,
        x if signs is None else signs,
        x if rotation is None else rotation.inner,
        x if rotation is None else block_sylvester(rows_per_tile, outer, x.device),
        x if down is None else down,
        codes,
        scale,
        offset,
        code_sums,
        scale if branch is None else branch,
        rows,
        tokens_per_image,
        x.stride(0),
        0 if gated_residual is None else gated_residual.value.stride(0),
        0 if gated_residual is None else gated_residual.gate.stride(0),
        0 if modulation is None else modulation.shift.stride(0),
        0 if modulation is None else modulation.scale.stride(0),
        float(grid.factor),
        float(grid.epsilon),
        float(grid.low),
        float(grid.high),
        1e-6 if modulation is None else float(modulation.eps),
        **constants(width, outer, m, source_m, rotation is not None),
        ITERATIONS=iterations,
        SIGNED=signs is not None,
        RESIDUAL=gated_residual is not None,
        MODULATED=modulation is not None,
        ONE_IMAGE=tokens_per_image % (rows_per_tile * iterations) == 0,
        SILU=silu,
        STATISTIC=grid.statistic,
        FLOOR=grid.floor,
        RANK=rank,
        RANK_STEP=RANK_STEP,
        RANK_STEPS=triton.cdiv(rank, RANK_STEP),
        num_warps=num_warps_of(outer),
        num_stages=NUM_STAGES,
    )
    return result


def _tile(width: int, rotation: Rotation | None) -> tuple[int, int, int]:
    """(rows of the tile per token, columns used, order of the factor in memory)."""
    if rotation is None:
        if width > MAX_WIDTH:
            raise KernelInputError(f"{OP}: K = {width} is above the {MAX_WIDTH} supported")
        return next_power_of_2(triton.cdiv(width, TILE)), TILE, TILE
    source_m = len(rotation.inner)
    outer, m = fold(rotation.outer, source_m)
    if m > TILE or outer > MAX_OUTER:
        raise KernelInputError(
            f"{OP}: K = {width} = {rotation.outer} x {source_m} is not supported; K up to "
            f"{MAX_WIDTH} is, as a power of two times a factor of order up to {TILE}"
        )
    return outer, m, source_m


def _iterations(rows: int, rows_per_tile: int) -> int:
    """Tiles of a program: a power of two, few enough that all of the GPU has work."""
    tiles = triton.cdiv(rows, rows_per_tile)
    iterations = 1
    while iterations < MAX_ITERATIONS and tiles // (2 * iterations) >= PROGRAMS:
        iterations *= 2
    return iterations


def num_warps_of(outer: int) -> int:
    """Sixteen rows of a product per warp, and a whole warp group."""
    return 4 if outer <= TILE else 8


def constants(
    width: int, outer: int, m: int, source_m: int, rotated: bool
) -> dict[str, int | float | bool]:
    """Constants of a launch: token [OUTER, M] in registers, as `_tile` cuts it, and the norm."""
    return {
        "K": width,
        "M": m,
        "FACTOR_M": source_m,
        "OUTER": outer,
        "INNER": TILE,
        "ROWS": max(1, TILE // outer),
        "ROTATED": rotated,
        "NORM": 8 / math.sqrt(width),
    }
