"""The device code of `triton.py`.

A token [OUTER, M] is held as two parts of its rows, `x` of MAIN columns and `x_r` of REST columns
(see `kernels.hadamard_tile`); without a second part `x_r` is `x` and unused. As they come from
memory the parts are [OUTER / LANES, TOKENS, LANES, columns], so that a warp holds whole tokens
where these are short; transformed they are [TOKENS, OUTER, columns].
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from kernels.hadamard_tile import apply_outer, load_folded

# Of the outer factor: sums over a token, at most twice its width in its own unit, then fit fp16.
_SHRINK = tl.constexpr(1 / 32)
# Beyond what an entry can be after LayerNorm. Clamping infinities and NaN keeps them out of the
# products, where they would spoil the other tokens of the tile.
_MOST = tl.constexpr(256.0)
# Adding 1.5 * 2^23 rounds a float half to even and leaves the integer in its low bits, which saves
# the conversion instructions, a quarter as fast as additions.
_ROUNDER = tl.constexpr(12582912.0)
_ROUNDER_BITS = tl.constexpr(0x4B400000)


@triton.jit
def _columns(FIRST: tl.constexpr, SIZE: tl.constexpr, M: tl.constexpr, OUTER: tl.constexpr):
    """Offsets in a token [OUTER / LANES, 1, LANES, SIZE]."""
    LANES: tl.constexpr = min(OUTER, max(256 // SIZE, 1) if SIZE > 16 else 16)
    row = tl.arange(0, OUTER // LANES)[:, None, None, None] * LANES
    row += tl.arange(0, LANES)[None, None, :, None]
    return row * M + (FIRST + tl.arange(0, SIZE)[None, None, None, :])


@triton.jit
def _load(pointer, at, inside, WHOLE: tl.constexpr):
    if WHOLE:
        x = tl.load(pointer + at)
    else:
        x = tl.load(pointer + at, mask=inside, other=0.0)
    return x


@triton.jit
def _token_first(x):
    """[HIGH, TOKENS, LANES, SIZE] -> [TOKENS, HIGH * LANES, SIZE]."""
    y = tl.permute(x, (1, 0, 2, 3))
    return tl.reshape(y, (x.shape[1], x.shape[0] * x.shape[2], x.shape[3]))


@triton.jit
def _sum_loaded(x, x_r, REST: tl.constexpr):
    """Sum of every token, [TOKENS]; of one token a scalar, which needs no layout."""
    TOKENS: tl.constexpr = x.shape[1]
    if TOKENS == 1:
        total = tl.sum(x)
        if REST:
            total += tl.sum(x_r)
    else:
        SIZE: tl.constexpr = x.numel // TOKENS
        total = tl.sum(tl.reshape(tl.permute(x, (1, 0, 2, 3)), (TOKENS, SIZE)), 1)
        if REST:
            SIZE_R: tl.constexpr = x_r.numel // TOKENS
            total += tl.sum(tl.reshape(tl.permute(x_r, (1, 0, 2, 3)), (TOKENS, SIZE_R)), 1)
    return total


@triton.jit
def _sum_tokens(z, z_r, REST: tl.constexpr):
    """As `_sum_loaded`, of transformed parts."""
    if REST:
        z = tl.reshape(z, (z.shape[0], z.shape[1], z.shape[2] // REST, REST))
        z = tl.sum(z, 2) + z_r
    if z.shape[0] == 1:
        total = tl.sum(z)
    else:
        total = tl.sum(tl.sum(z, 2), 1)
    return total


@triton.jit
def _max_tokens(z, z_r, REST: tl.constexpr):
    if REST:
        z = tl.reshape(z, (z.shape[0], z.shape[1], z.shape[2] // REST, REST))
        z = tl.maximum(tl.max(z, 2), z_r)
    if z.shape[0] == 1:
        largest = tl.max(z)
    else:
        largest = tl.max(tl.max(z, 2), 1)
    return largest


@triton.jit
def _of_loaded(x, TOKENS: tl.constexpr):
    if TOKENS > 1:
        x = x[None, :, None, None]
    return x


@triton.jit
def _of_tokens(x, TOKENS: tl.constexpr):
    if TOKENS > 1:
        x = x[:, None, None]
    return x


@triton.jit
def _read(
    x_ptr,
    value_ptr,
    gate_ptr,
    residual_ptr,
    at_x,
    at_value,
    at_gate,
    at_residual,
    columns,
    inside,
    valid,
    WHOLE: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """A part in fp32, the gated residual added, rounded and written."""
    x = _load(x_ptr, at_x + columns, inside, WHOLE)
    y = x.to(tl.float32)
    if RESIDUAL:
        value = _load(value_ptr, at_value + columns, inside, WHOLE).to(tl.float32)
        gate = _load(gate_ptr, at_gate + columns, inside, WHOLE).to(tl.float32)
        total = (y + gate * value).to(x.dtype)
        tl.store(residual_ptr + at_residual + columns, total, mask=valid & inside)
        y = total.to(tl.float32)
    return y


@triton.jit
def _modulation(
    shift_ptr,
    scale_ptr,
    at_shift,
    at_scale,
    columns,
    inside,
    signs,
    WHOLE: tl.constexpr,
    SIGNED: tl.constexpr,
    HALF: tl.constexpr,
):
    """(1 + scale, shift) with the signs folded in; in fp16 where a product with fp16 follows."""
    shift = _load(shift_ptr, at_shift + columns, inside, WHOLE).to(tl.float32)
    gain = _load(scale_ptr, at_scale + columns, inside, WHOLE).to(tl.float32) + 1.0
    if SIGNED:
        shift *= signs
        gain *= signs
    if HALF:  # half the registers, and two elements per instruction
        shift = shift.to(tl.float16)
        gain = gain.to(tl.float16)
    return gain, shift


@triton.jit
def _modulate(y, multiplier, gain, shift, HALF: tl.constexpr):
    y = tl.clamp(y * multiplier, -_MOST, _MOST)
    if HALF:
        y = y.to(tl.float16)
    return y * gain + shift


@triton.jit
def _stack(y, signs, GROUPS: tl.constexpr, SIGNED: tl.constexpr):
    """fp16 [HEIGHT, GROUPS * SIZE]: rows of a group's tokens below each other, signs applied."""
    HIGH: tl.constexpr = y.shape[0]
    ROWS: tl.constexpr = y.shape[1] // GROUPS
    LANES: tl.constexpr = y.shape[2]
    SIZE: tl.constexpr = y.shape[3]
    y = y.to(tl.float16)
    if SIGNED:
        y = y * signs
    y = tl.permute(tl.reshape(y, (HIGH, GROUPS, ROWS, LANES, SIZE)), (2, 0, 3, 1, 4))
    return tl.reshape(y, (ROWS * HIGH * LANES, GROUPS * SIZE))


@triton.jit
def _code_bits(z, inverse, shift, low, high, FLOOR: tl.constexpr):
    """Codes of z, in the low bits of an int32."""
    if FLOOR:
        t = tl.floor(tl.clamp(z * inverse - shift, low, high)) + _ROUNDER
    else:
        # Clamped to [0, 1] by the multiplication itself, then stretched and rounded by another.
        t = tl.clamp(z * inverse - shift, 0.0, 1.0) * (high - low) + (low + _ROUNDER)
    return t.to(tl.int32, bitcast=True)


@triton.jit
def _load_down(
    pointer,
    first_rank,
    K: tl.constexpr,
    M: tl.constexpr,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    OUTER: tl.constexpr,
    BATCH: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """fp16 [BATCH, BLOCK_RANK, OUTER / BATCH * SIZE] of ranks from `first_rank` on."""
    rank = first_rank + tl.arange(0, BLOCK_RANK)[None, :, None]
    k = tl.arange(0, OUTER // BATCH * SIZE)[None, None, :]
    row = tl.arange(0, BATCH)[:, None, None] * (OUTER // BATCH) + k // SIZE
    column = FIRST + k % SIZE
    inside = (rank < RANK) & (column < M) & (row * M + column < K)
    return tl.load(pointer + rank * K + row * M + column, mask=inside, other=0.0).to(tl.float16)


@triton.jit
def _project(z, down, branch):
    """branch + down @ z of every token, in BATCH parts [BATCH, BLOCK_RANK, TOKENS]."""
    BATCH: tl.constexpr = down.shape[0]
    z = tl.reshape(z.to(tl.float16), (z.shape[0], BATCH, down.shape[2]))
    return tl.dot(down, tl.permute(z, (1, 2, 0)), branch)


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
    M: tl.constexpr,
    FACTOR_M: tl.constexpr,  # order of `inner` in memory
    OUTER: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,  # tokens of one product
    GROUPS: tl.constexpr,  # products side by side, one per warp group
    ITERATIONS: tl.constexpr,
    ROTATED: tl.constexpr,
    SIGNED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MODULATED: tl.constexpr,
    ONE_IMAGE: tl.constexpr,  # whether all tokens of a program belong to one image
    SILU: tl.constexpr,
    STATISTIC: tl.constexpr,
    FLOOR: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,  # ranks of one product
    BATCH: tl.constexpr,  # parts of a token that are projected side by side
):
    """ITERATIONS tiles of ROWS * GROUPS tokens of one group; the flags say what comes first."""
    TOKENS: tl.constexpr = ROWS * GROUPS
    WHOLE: tl.constexpr = OUTER * (MAIN + REST) == K
    RESIDENT: tl.constexpr = RANK > 0 and RANK <= BLOCK_RANK
    group = tl.program_id(1)
    first = tl.program_id(0) * (TOKENS * ITERATIONS)
    flat = tl.arange(0, TOKENS) if TOKENS > 1 else 0

    columns = _columns(0, MAIN, M, OUTER)
    # Kept as narrow as it can be: the compiler drops what it can prove to be padding.
    inside = tl.arange(0, MAIN)[None, None, None, :] < M if ROTATED else columns < K
    columns_r = columns
    if REST:
        columns_r = _columns(MAIN, REST, M, OUTER)
    signs = 1.0
    signs_r = 1.0
    if SIGNED:
        # fp16 holds ±1 in half the registers.
        signs = _load(signs_ptr, group * K + columns, inside, WHOLE).to(tl.float16)
        if REST:
            signs_r = tl.load(signs_ptr + group * K + columns_r).to(tl.float16)
    if ROTATED:
        DEPTH: tl.constexpr = max(REST, 16)
        i = tl.arange(0, ROWS * OUTER)
        outer = tl.load(outer_ptr + i[:, None] * (ROWS * OUTER) + i[None, :]) * _SHRINK
        inner = load_folded(inner_ptr, FACTOR_M, M, 0, MAIN, 0, MAIN)
        if REST:
            inner_below = load_folded(inner_ptr, FACTOR_M, M, MAIN, DEPTH, 0, MAIN)
            inner_beside = load_folded(inner_ptr, FACTOR_M, M, 0, MAIN, MAIN, REST)
            inner_corner = load_folded(inner_ptr, FACTOR_M, M, MAIN, DEPTH, MAIN, REST)
    if MODULATED and ONE_IMAGE:
        at_shift = first // tokens_per_image * shift_stride
        at_scale = first // tokens_per_image * scale_stride
        gain, shift = _modulation(
            shift_ptr, scale_ptr, at_shift, at_scale, columns, inside, signs, WHOLE, SIGNED, ROTATED
        )
        if REST:
            gain_r, shift_r = _modulation(
                shift_ptr, scale_ptr, at_shift, at_scale, columns_r, True, signs_r,
                True, SIGNED, ROTATED,
            )  # fmt: skip
    group_down = down_ptr + group * RANK * K
    if RESIDENT:
        down = _load_down(group_down, 0, K, M, 0, MAIN, OUTER, BATCH, RANK, BLOCK_RANK)
        if REST:
            down_r = _load_down(group_down, 0, K, M, MAIN, REST, OUTER, BATCH, RANK, BLOCK_RANK)

    for i in tl.range(ITERATIONS):
        row0 = first + i * TOKENS
        long_row0 = row0.to(tl.int64)
        valid = flat < rows - row0
        valid_loaded = _of_loaded(valid, TOKENS)
        # Rows past the end repeat the last one and are not stored: loads need no mask.
        token = _of_loaded(tl.minimum(flat, rows - 1 - row0), TOKENS)
        if MODULATED or RESIDUAL:
            image = (row0 if ONE_IMAGE else row0 + token) // tokens_per_image

        at_x = long_row0 * x_stride + token * x_stride
        at_value = long_row0 * value_stride + token * value_stride
        at_gate = image * gate_stride if RESIDUAL else 0
        at_residual = long_row0 * K + token * K
        y = _read(
            x_ptr, value_ptr, gate_ptr, residual_ptr, at_x, at_value, at_gate, at_residual,
            columns, inside, valid_loaded, WHOLE, RESIDUAL,
        )  # fmt: skip
        y_r = y
        if REST:
            y_r = _read(
                x_ptr, value_ptr, gate_ptr, residual_ptr, at_x, at_value, at_gate, at_residual,
                columns_r, True, valid_loaded, True, RESIDUAL,
            )  # fmt: skip
        if MODULATED:
            if not ONE_IMAGE:
                at_shift = image * shift_stride
                at_scale = image * scale_stride
                gain, shift = _modulation(
                    shift_ptr, scale_ptr, at_shift, at_scale, columns, inside, signs,
                    WHOLE, SIGNED, ROTATED,
                )  # fmt: skip
                if REST:
                    gain_r, shift_r = _modulation(
                        shift_ptr, scale_ptr, at_shift, at_scale, columns_r, True, signs_r,
                        True, SIGNED, ROTATED,
                    )  # fmt: skip
            # Two passes: the sum of squares alone would cancel where the mean is large.
            mean = _sum_loaded(y, y_r, REST) * (1.0 / K)
            finite = tl.abs(mean) < float("inf")
            center = _of_loaded(tl.where(finite, mean, 0.0), TOKENS)
            y = y - center
            if not WHOLE:
                y = tl.where(inside, y, 0.0)
            if REST:
                y_r = y_r - center
            variance = _sum_loaded(y * y, y_r * y_r, REST) * (1.0 / K)
            dead = ~(finite & (variance < float("inf")))
            deviation = tl.where(dead, 1.0, tl.rsqrt(variance + norm_eps))
            multiplier = _of_loaded(deviation, TOKENS)
            y = _modulate(y, multiplier, gain, shift, ROTATED)
            if REST:
                y_r = _modulate(y_r, multiplier, gain_r, shift_r, ROTATED)
            unit = tl.where(dead, 1.0, 1.0)
        else:
            if SILU:
                y = y * tl.sigmoid(y)
                if REST:
                    y_r = y_r * tl.sigmoid(y_r)
            # A power of two near mean|y|, so that fp16 takes tokens of any magnitude. Of a dead
            # token the signs of infinities remain, and what is finite nearly vanishes.
            magnitude = _sum_loaded(tl.abs(y), tl.abs(y_r), REST) * (1.0 / K)
            dead = ~(magnitude < float("inf"))
            exponent = tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, 1 << 23)
            exponent = tl.where(dead, (253 if ROTATED else 127) << 23, exponent)
            unit = exponent.to(tl.float32, bitcast=True)
            inverse_unit = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
            y = y * _of_loaded(inverse_unit, TOKENS)
            if REST:
                y_r = y_r * _of_loaded(inverse_unit, TOKENS)
            if ROTATED:
                y = tl.clamp(y, -2.0 * K, 2.0 * K)
                if REST:
                    y_r = tl.clamp(y_r, -2.0 * K, 2.0 * K)
            elif SIGNED:
                y = y * signs
                if REST:
                    y_r = y_r * signs_r

        if ROTATED:
            APPLY: tl.constexpr = SIGNED and not MODULATED
            y = apply_outer(_stack(y, signs, GROUPS, APPLY), outer, row0 < rows, GROUPS)
            z = tl.dot(y, inner)
            if REST:
                y_r = apply_outer(_stack(y_r, signs_r, GROUPS, APPLY), outer, row0 < rows, GROUPS)
                z = tl.dot(y_r, inner_below, z)
                z_r = tl.dot(y_r, inner_corner, tl.dot(y, inner_beside))
                z_r = tl.reshape(z_r, (TOKENS, OUTER, REST))
            z = tl.reshape(z, (TOKENS, OUTER, MAIN))
            NORM: tl.constexpr = 1 / (K**0.5 * _SHRINK)
            unit = unit * NORM
        else:
            z = _token_first(y)
            if REST:
                z_r = _token_first(y_r)
        # From here on in units of `unit`.
        if not REST:
            z_r = z
        row = tl.arange(0, OUTER)[None, :, None]
        column = tl.arange(0, MAIN)[None, None, :]
        within = column < M if ROTATED else row * M + column < K
        if not WHOLE:
            z = tl.where(within, z, -0.0)  # the compiler drops additions of -0.0
        if RESIDENT:
            branch = tl.zeros((BATCH, BLOCK_RANK, TOKENS), tl.float32)
            branch = _project(z, down, branch)
            if REST:
                branch = _project(z_r, down_r, branch)

        if STATISTIC == "mean-mad":
            middle = _sum_tokens(z, z_r, REST) * (1.0 / K)
            center = _of_tokens(middle, TOKENS)
            distance = tl.abs(z - center)
            if not WHOLE:
                distance = tl.where(within, distance, -0.0)
            statistic = _sum_tokens(distance, tl.abs(z_r - center), REST) * (1.0 / K)
        elif STATISTIC == "min-max":
            below = -z
            above = z
            if not WHOLE:
                below = tl.where(within, below, float("-inf"))
                above = tl.where(within, above, float("-inf"))
            smallest = -_max_tokens(below, -z_r, REST)
            statistic = _max_tokens(above, z_r, REST) - smallest
            middle = smallest - low * factor * statistic
        elif STATISTIC == "absmax":
            statistic = _max_tokens(tl.abs(z), tl.abs(z_r), REST)
            middle = statistic * 0.0
        else:
            statistic = _sum_tokens(tl.abs(z), tl.abs(z_r), REST) * (1.0 / K)
            middle = statistic * 0.0
        scale = factor * statistic * unit
        dead = dead | ~(scale < float("inf"))
        divisor = scale + factor * epsilon
        alive = (divisor > 0.0) & ~dead
        inverse = tl.where(alive, unit / tl.where(alive, divisor, 1.0), 0.0)
        code_shift = middle * inverse
        # Of a dead token z holds the signs of infinities, and after LayerNorm nothing but NaN was.
        inverse = tl.where(dead, 2.0**60 if ROTATED else 1.0, inverse)
        code_shift = tl.where(dead, 512.0 * 2.0**60 if MODULATED else 0.0, code_shift)
        token_offset = tl.where(dead, 0.0, middle * unit)
        scale = tl.where(dead, 1.0, scale)
        if FLOOR:
            token_offset += 0.5 * scale
        else:
            span = 1.0 / tl.maximum(high - low, 1.0)
            inverse = inverse * span
            code_shift = (code_shift + low) * span
        inverse = _of_tokens(inverse, TOKENS)
        code_shift = _of_tokens(code_shift, TOKENS)
        bits = _code_bits(z, inverse, code_shift, low, high, FLOOR)
        counted = bits - _ROUNDER_BITS
        if not WHOLE:
            counted = tl.where(within, counted, 0)
        counted_r = counted
        if REST:
            bits_r = _code_bits(z_r, inverse, code_shift, low, high, FLOOR)
            counted_r = bits_r - _ROUNDER_BITS
        code_sum = _sum_tokens(counted, counted_r, REST)

        long_row = group.to(tl.int64) * rows + row0
        stored = _of_tokens(valid, TOKENS)
        at_codes = long_row * K + (_of_tokens(flat, TOKENS) * K + row * M)
        tl.store(codes_ptr + at_codes + column, bits.to(tl.int8), mask=stored & within)
        if REST:
            column = MAIN + tl.arange(0, REST)[None, None, :]
            tl.store(codes_ptr + at_codes + column, bits_r.to(tl.int8), mask=stored)
        tl.store(token_scale_ptr + long_row + flat, scale, mask=valid)
        tl.store(token_offset_ptr + long_row + flat, token_offset, mask=valid)
        tl.store(code_sums_ptr + long_row + flat, code_sum, mask=valid)
        if RANK > 0:
            units = tl.where(dead, float("nan"), unit)
            if TOKENS > 1:
                units = units[None, :]
                at_token = flat[None, :]
                present = valid[None, :]
            else:
                at_token = flat
                present = valid
            for first_rank in tl.static_range(0, RANK, BLOCK_RANK):
                if not RESIDENT:
                    part = _load_down(
                        group_down, first_rank, K, M, 0, MAIN, OUTER, BATCH, RANK, BLOCK_RANK
                    )
                    branch = tl.zeros((BATCH, BLOCK_RANK, TOKENS), tl.float32)
                    branch = _project(z, part, branch)
                    if REST:
                        part = _load_down(
                            group_down, first_rank, K, M, MAIN, REST, OUTER, BATCH, RANK, BLOCK_RANK
                        )
                        branch = _project(z_r, part, branch)
                rank = first_rank + tl.arange(0, BLOCK_RANK)[:, None]
                tl.store(
                    branch_ptr + long_row * RANK + at_token * RANK + rank,
                    tl.sum(branch, 0) * units,
                    mask=(rank < RANK) & present,
                )
