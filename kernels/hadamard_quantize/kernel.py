"""The device code of `triton.py`."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from kernels.hadamard_tile import apply_outer, load_folded

# Of the inner factor, so that its products of at most twice the width fit fp16.
_SHRINK = tl.constexpr(0.03125)
# More than a normalised token can hold; clamped to it, infinities and NaN of a token do not spoil
# the others of its tile.
_MOST = tl.constexpr(256.0)
# Adding 1.5 * 2^23 rounds a float half to even and leaves the integer in its low bits, which saves
# the conversion instructions, a quarter as fast as additions.
_ROUNDER = tl.constexpr(12582912.0)
_ROUNDER_BITS = tl.constexpr(0x4B400000)


@triton.jit
def _columns(FIRST: tl.constexpr, SIZE: tl.constexpr, M: tl.constexpr, OUTER: tl.constexpr):
    """Offsets in a token of [OUTER / LANES, 1, LANES, SIZE]: a warp's lanes stay in one token."""
    LANES: tl.constexpr = min(OUTER, 256 // SIZE) if SIZE > 16 else min(OUTER, 16)
    row = tl.arange(0, OUTER // LANES)[:, None, None, None] * LANES
    row += tl.arange(0, LANES)[None, None, :, None]
    return row * M + (FIRST + tl.arange(0, SIZE)[None, None, None, :])


@triton.jit
def _sum_loaded(main, rest, REST: tl.constexpr):
    """Sum of every token [TOKENS] of what was loaded."""
    TOKENS: tl.constexpr = main.shape[1]
    SIZE: tl.constexpr = main.numel // TOKENS
    total = tl.sum(tl.reshape(tl.permute(main, (1, 0, 2, 3)), (TOKENS, SIZE)), 1)
    if REST:
        REST_SIZE: tl.constexpr = rest.numel // TOKENS
        total += tl.sum(tl.reshape(tl.permute(rest, (1, 0, 2, 3)), (TOKENS, REST_SIZE)), 1)
    return total


@triton.jit
def _sum_tokens(main, rest, REST: tl.constexpr):
    """Sum of every token [TOKENS] of a transformed tile."""
    if REST:
        main = tl.reshape(main, (main.shape[0], main.shape[1], main.shape[2] // REST, REST))
        main = tl.sum(main, 2) + rest
    return tl.sum(tl.sum(main, 2), 1)


@triton.jit
def _max_tokens(main, rest, REST: tl.constexpr):
    largest = tl.max(main, 2)
    if REST:
        largest = tl.maximum(largest, tl.max(rest, 2))
    return tl.max(largest, 1)


@triton.jit
def _of_loaded(x):
    return x[None, :, None, None]


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
    WHOLE: tl.constexpr,
):
    """(1 + scale, shift) with the signs folded in; in fp16 where a product with fp16 follows."""
    shift = _load(shift_ptr, 0, at_shift, mask, WHOLE).to(tl.float32)
    gain = _load(scale_ptr, 0, at_scale, mask, WHOLE).to(tl.float32) + 1.0
    if SIGNED:
        shift *= signs
        gain *= signs
    if HALF:  # half the registers, and two elements per instruction
        shift = shift.to(tl.float16)
        gain = gain.to(tl.float16)
    return gain, shift


@triton.jit
def _load(pointer, at_row, columns, inside, WHOLE: tl.constexpr):
    if WHOLE:
        x = tl.load(pointer + at_row + columns)
    else:
        x = tl.load(pointer + at_row + columns, mask=inside, other=0.0)
    return x


@triton.jit
def _stack(x, GROUPS: tl.constexpr):
    """What was loaded as [HEIGHT, GROUPS * SIZE]: rows of a group's tokens below each other."""
    HIGH: tl.constexpr = x.shape[0]
    ROWS: tl.constexpr = x.shape[1] // GROUPS
    LANES: tl.constexpr = x.shape[2]
    SIZE: tl.constexpr = x.shape[3]
    y = tl.permute(tl.reshape(x, (HIGH, GROUPS, ROWS, LANES, SIZE)), (2, 0, 3, 1, 4))
    return tl.reshape(y, (ROWS * HIGH * LANES, GROUPS * SIZE))


@triton.jit
def _bits(z, inverse, shift, low, high, FLOOR: tl.constexpr):
    """Codes of z, in the low bits of a float."""
    if FLOOR:
        t = tl.floor(tl.clamp(z * inverse - shift, low, high)) + _ROUNDER
    else:
        t = tl.clamp(z * inverse - shift, 0.0, 1.0) * (high - low) + (low + _ROUNDER)
    return t.to(tl.int32, bitcast=True)


@triton.jit
def _load_down(pointer, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr, BATCH: tl.constexpr, OUTER: tl.constexpr, M: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr):
    PER: tl.constexpr = OUTER // BATCH
    b = tl.arange(0, BATCH)[:, None, None]
    r = tl.arange(0, BLOCK_RANK)[None, :, None]
    k = tl.arange(0, PER * SIZE)[None, None, :]
    at = r * (OUTER * M) + (b * PER + k // SIZE) * M + FIRST + k % SIZE
    return tl.load(pointer + at, mask=r < RANK, other=0.0).to(tl.float16)


@triton.jit
def _project(z, down, acc):
    TOKENS: tl.constexpr = z.shape[0]
    BATCH: tl.constexpr = down.shape[0]
    DEPTH: tl.constexpr = down.shape[2]
    tokens = tl.permute(tl.reshape(z, (TOKENS, BATCH, DEPTH)), (1, 2, 0))
    return tl.dot(down, tokens, acc)


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
    M: tl.constexpr,  # columns of a row that are used
    FACTOR_M: tl.constexpr,  # order of `inner` in memory
    OUTER: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,  # tokens of one product
    GROUPS: tl.constexpr,  # products of a tile
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
    BLOCK_RANK: tl.constexpr,
):
    """ITERATIONS tiles of ROWS * GROUPS tokens of one group; the flags say what comes first."""
    TOKENS: tl.constexpr = ROWS * GROUPS
    WHOLE: tl.constexpr = OUTER * (MAIN + REST) == K
    group = tl.program_id(1)
    first = tl.program_id(0) * (TOKENS * ITERATIONS)
    flat = tl.arange(0, TOKENS)

    columns = _columns(0, MAIN, M, OUTER)
    inside = tl.arange(0, MAIN)[None, None, None, :] < M if ROTATED else columns < K
    columns_r = columns
    if REST:
        columns_r = _columns(MAIN, REST, M, OUTER)
    signs = 1.0
    signs_r = 1.0
    if SIGNED:
        # fp16 holds ±1 in half the registers.
        signs = _load(signs_ptr, group * K, columns, inside, WHOLE).to(tl.float16)
        if REST:
            signs_r = tl.load(signs_ptr + group * K + columns_r).to(tl.float16)
    if ROTATED:
        HEIGHT: tl.constexpr = ROWS * OUTER
        PADDED: tl.constexpr = max(REST, 16)
        i = tl.arange(0, HEIGHT)
        outer = tl.load(outer_ptr + i[:, None] * HEIGHT + i[None, :]) * _SHRINK
        inner = load_folded(inner_ptr, FACTOR_M, M, 0, MAIN, 0, MAIN)
        if REST:
            below = load_folded(inner_ptr, FACTOR_M, M, MAIN, PADDED, 0, MAIN)
            beside = load_folded(inner_ptr, FACTOR_M, M, 0, MAIN, MAIN, REST)
            corner = load_folded(inner_ptr, FACTOR_M, M, MAIN, PADDED, MAIN, REST)
    if MODULATED and ONE_IMAGE:
        at_shift = first // tokens_per_image * shift_stride
        at_scale = first // tokens_per_image * scale_stride
        gain, shift = _modulation(
            shift_ptr, scale_ptr, at_shift + columns, at_scale + columns,
            inside, signs, SIGNED, ROTATED, WHOLE,
        )
        if REST:
            gain_r, shift_r = _modulation(
                shift_ptr, scale_ptr, at_shift + columns_r, at_scale + columns_r,
                inside, signs_r, SIGNED, ROTATED, True,
            )

    if RANK > 0:
        BATCH: tl.constexpr = GROUPS * ROWS * OUTER // 16
        down = _load_down(down_ptr + group * RANK * K, RANK, BLOCK_RANK, BATCH, OUTER, M, 0, MAIN)
        if REST:
            down_r = _load_down(down_ptr + group * RANK * K, RANK, BLOCK_RANK, BATCH, OUTER, M, MAIN, REST)

    for i in tl.range(ITERATIONS):
        row0 = first + i * TOKENS
        valid = flat < rows - row0
        # Rows past the end repeat the last one and are not stored: loads need no mask.
        token = tl.minimum(flat, rows - 1 - row0)[None, :, None, None]
        long_row0 = row0.to(tl.int64)

        at_x = long_row0 * x_stride + token * x_stride
        x = _load(x_ptr, at_x, columns, inside, WHOLE)
        y = x.to(tl.float32)
        y_r = y
        if REST:
            x_r = tl.load(x_ptr + at_x + columns_r)
            y_r = x_r.to(tl.float32)
        if MODULATED:
            mean = _sum_loaded(y, y_r, REST) * (1.0 / K)
            finite = tl.abs(mean) < float("inf")
            center = _of_loaded(tl.where(finite, mean, 0.0))
            y = y - center
            if not WHOLE:
                y = tl.where(inside, y, 0.0)
            if REST:
                y_r = y_r - center
            variance = _sum_loaded(y * y, y_r * y_r, REST) * (1.0 / K)
            dead = ~(finite & (variance < float("inf")))
            multiplier = _of_loaded(tl.where(dead, 1.0, tl.rsqrt(variance + norm_eps)))
            y = tl.clamp(y * multiplier, -_MOST, _MOST).to(tl.float16) * gain + shift
            if REST:
                y_r = tl.clamp(y_r * multiplier, -_MOST, _MOST).to(tl.float16) * gain_r + shift_r
            unit = tl.full((TOKENS,), 1.0, tl.float32)
        else:
            if SILU:
                y = y * tl.sigmoid(y)
                if REST:
                    y_r = y_r * tl.sigmoid(y_r)
            # A power of two near mean|y|, so that fp16 takes tokens of any magnitude.
            magnitude = _sum_loaded(tl.abs(y), tl.abs(y_r), REST) * (1.0 / K)
            dead = ~(magnitude < float("inf"))
            exponent = magnitude.to(tl.int32, bitcast=True) & 0x7F800000
            # Of a dead token the signs of infinities remain, and what is finite vanishes.
            exponent = tl.where(dead, (253 if ROTATED else 127) << 23, tl.maximum(exponent, 1 << 23))
            unit = exponent.to(tl.float32, bitcast=True)
            inverse_unit = _of_loaded(((254 << 23) - exponent).to(tl.float32, bitcast=True))
            y = y * inverse_unit
            y_r = y_r * inverse_unit
            if ROTATED:
                y = tl.clamp(y, -2.0 * K, 2.0 * K)
                y_r = tl.clamp(y_r, -2.0 * K, 2.0 * K)
        if ROTATED:
            y = y.to(tl.float16)
            if SIGNED and not MODULATED:
                y = y * signs
            y = apply_outer(_stack(y, GROUPS), outer, row0 < rows, GROUPS)
            z = tl.dot(y, inner)
            z_r = z
            if REST:
                y_r = y_r.to(tl.float16)
                if SIGNED and not MODULATED:
                    y_r = y_r * signs_r
                y_r = apply_outer(_stack(y_r, GROUPS), outer, row0 < rows, GROUPS)
                z = tl.dot(y_r, below, z)
                z_r = tl.dot(y_r, corner, tl.dot(y, beside))
            unit = unit * NORM
        z = tl.reshape(z, (TOKENS, OUTER, MAIN))
        if REST:
            z_r = tl.reshape(z_r, (TOKENS, OUTER, REST))
        if not WHOLE:
            inner_inside = tl.arange(0, MAIN)[None, None, :] < M
            z = tl.where(inner_inside, z, -0.0)
        if STATISTIC == "mean-mad":
            middle = _sum_tokens(z, z_r, REST) * (1.0 / K)
            center = middle[:, None, None]
            d = tl.abs(z - center)
            if not WHOLE:
                d = tl.where(inner_inside, d, -0.0)
            statistic = _sum_tokens(d, tl.abs(z_r - center), REST) * (1.0 / K)
        else:
            statistic = _max_tokens(tl.abs(z), tl.abs(z_r), REST)
            middle = tl.zeros((TOKENS,), tl.float32)
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
        inverse_rows = inverse[:, None, None]
        shift_rows = shift_codes[:, None, None]
        inverse_rows = inverse_rows / (high - low)
        shift_rows = (shift_rows + low) / (high - low)
        bits = _bits(z, inverse_rows, shift_rows, low, high, FLOOR)
        bits_r = bits
        if REST:
            bits_r = _bits(z_r, inverse_rows, shift_rows, low, high, FLOOR)
        if FLOOR:
            token_offset += 0.5 * scale
        counted = bits - _ROUNDER_BITS
        if not WHOLE:
            counted = tl.where(inner_inside, counted, 0)
        code_sum = _sum_tokens(counted, bits_r - _ROUNDER_BITS, REST)

        long_row = group.to(tl.int64) * rows + row0
        r = tl.arange(0, TOKENS)[:, None, None]
        stored = r < rows - row0
        at_codes = codes_ptr + long_row * K + r * K + tl.arange(0, OUTER)[None, :, None] * M
        c = tl.arange(0, MAIN)[None, None, :]
        tl.store(at_codes + c, bits.to(tl.int8), mask=stored if WHOLE else stored & (c < M))
        if REST:
            c = MAIN + tl.arange(0, REST)[None, None, :]
            tl.store(at_codes + c, bits_r.to(tl.int8), mask=stored)
        tl.store(token_scale_ptr + long_row + flat, scale, mask=valid)
        tl.store(token_offset_ptr + long_row + flat, token_offset, mask=valid)
        tl.store(code_sums_ptr + long_row + flat, code_sum, mask=valid)
        if RANK > 0:
            units = tl.where(dead, float("nan"), unit)
            tokens = z.to(tl.float16)
            tokens_r = z_r.to(tl.float16)
            parts = _project(tokens, down, tl.zeros((BATCH, BLOCK_RANK, TOKENS), tl.float32))
            if REST:
                parts = _project(tokens_r, down_r, parts)
            branch = tl.sum(parts, 0)
            rank = tl.arange(0, BLOCK_RANK)[:, None]
            at_branch = branch_ptr + long_row * RANK + flat[None, :] * RANK + rank
            tl.store(at_branch, branch * units[None, :], mask=(rank < RANK) & valid[None, :])
