"""The kernel that `triton.py` launches; `parts.py` says how it holds its tokens."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from kernels.hadamard_quantize.parts import (
    ROUNDER_BITS,
    code_bits,
    load_down,
    load_down_main,
    load_modulation,
    load_part,
    max_tokens,
    modulate,
    of_loaded,
    of_tokens,
    part_columns,
    project,
    project_main,
    read_part,
    stack_rows,
    sum_loaded,
    sum_tokens,
    token_first,
)
from kernels.hadamard_tile import apply_outer, load_folded

# Of the outer factor: sums over a token, at most twice its width in its own unit, then fit fp16.
SHRINK = tl.constexpr(1 / 32)


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
    EXACT: tl.constexpr = OUTER * M == K  # padding, if any, is in columns
    RESIDENT: tl.constexpr = RANK > 0 and RANK <= BLOCK_RANK
    group = tl.program_id(1)
    first = tl.program_id(0) * (TOKENS * ITERATIONS)
    flat = tl.arange(0, TOKENS)

    columns = part_columns(0, MAIN, M, OUTER)
    # Kept as narrow as it can be: the compiler drops what it can prove to be padding.
    inside = tl.arange(0, MAIN)[None, None, None, :] < M if EXACT else columns < K
    columns_r = columns
    if REST:
        columns_r = part_columns(MAIN, REST, M, OUTER)
    signs = 1.0
    signs_r = 1.0
    if SIGNED:
        # fp16 holds ±1 in half the registers.
        signs = load_part(signs_ptr, group * K + columns, inside, WHOLE).to(tl.float16)
        if REST:
            signs_r = tl.load(signs_ptr + group * K + columns_r).to(tl.float16)
    if ROTATED:
        DEPTH: tl.constexpr = max(REST, 16)
        i = tl.arange(0, ROWS * OUTER)
        outer = tl.load(outer_ptr + i[:, None] * (ROWS * OUTER) + i[None, :]) * SHRINK
        inner = load_folded(inner_ptr, FACTOR_M, M, 0, MAIN, 0, MAIN)
        if REST:
            inner_below = load_folded(inner_ptr, FACTOR_M, M, MAIN, DEPTH, 0, MAIN)
            inner_beside = load_folded(inner_ptr, FACTOR_M, M, 0, MAIN, MAIN, REST)
            inner_corner = load_folded(inner_ptr, FACTOR_M, M, MAIN, DEPTH, MAIN, REST)
    if MODULATED and ONE_IMAGE:
        at_shift = first // tokens_per_image * shift_stride
        at_scale = first // tokens_per_image * scale_stride
        gain, shift = load_modulation(
            shift_ptr, scale_ptr, at_shift, at_scale, columns, inside, signs, WHOLE, SIGNED, ROTATED
        )
        if REST:
            gain_r, shift_r = load_modulation(
                shift_ptr, scale_ptr, at_shift, at_scale, columns_r, True, signs_r,
                True, SIGNED, ROTATED,
            )  # fmt: skip
    group_down = down_ptr + group * RANK * K
    if RESIDENT:
        down, down_2 = load_down_main(group_down, 0, K, M, MAIN, OUTER, BATCH, RANK, BLOCK_RANK)
        if REST:
            down_r = load_down(group_down, 0, K, M, MAIN, REST, OUTER, BATCH, RANK, BLOCK_RANK)

    for i in tl.range(ITERATIONS):
        row0 = first + i * TOKENS
        long_row0 = row0.to(tl.int64)
        valid = flat < rows - row0
        valid_loaded = valid[None, :, None, None]
        # Rows past the end repeat the last one and are not stored: loads need no mask.
        token = tl.minimum(flat, rows - 1 - row0)[None, :, None, None]
        if MODULATED or RESIDUAL:
            image = (row0 if ONE_IMAGE else row0 + token) // tokens_per_image

        at_x = long_row0 * x_stride + token * x_stride
        at_value = long_row0 * value_stride + token * value_stride
        at_gate = image * gate_stride if RESIDUAL else 0
        at_residual = long_row0 * K + token * K
        y = read_part(
            x_ptr, value_ptr, gate_ptr, residual_ptr, at_x, at_value, at_gate, at_residual,
            columns, inside, valid_loaded, WHOLE, RESIDUAL,
        )  # fmt: skip
        y_r = y
        if REST:
            y_r = read_part(
                x_ptr, value_ptr, gate_ptr, residual_ptr, at_x, at_value, at_gate, at_residual,
                columns_r, True, valid_loaded, True, RESIDUAL,
            )  # fmt: skip
        if MODULATED:
            if not ONE_IMAGE:
                at_shift = image * shift_stride
                at_scale = image * scale_stride
                gain, shift = load_modulation(
                    shift_ptr, scale_ptr, at_shift, at_scale, columns, inside, signs,
                    WHOLE, SIGNED, ROTATED,
                )  # fmt: skip
                if REST:
                    gain_r, shift_r = load_modulation(
                        shift_ptr, scale_ptr, at_shift, at_scale, columns_r, True, signs_r,
                        True, SIGNED, ROTATED,
                    )  # fmt: skip
            # Two passes: the sum of squares alone would cancel where the mean is large.
            mean = sum_loaded(y, y_r, REST) * (1.0 / K)
            finite = tl.abs(mean) < float("inf")
            center = of_loaded(tl.where(finite, mean, 0.0), TOKENS)
            y = y - center
            if not WHOLE:
                y = tl.where(inside, y, 0.0)
            if REST:
                y_r = y_r - center
            variance = sum_loaded(y * y, y_r * y_r, REST) * (1.0 / K)
            dead = ~(finite & (variance < float("inf")))
            deviation = tl.where(dead, 1.0, tl.rsqrt(variance + norm_eps))
            multiplier = of_loaded(deviation, TOKENS)
            y = modulate(y, multiplier, gain, shift, ROTATED)
            if REST:
                y_r = modulate(y_r, multiplier, gain_r, shift_r, ROTATED)
            unit = tl.where(dead, 1.0, 1.0)
        else:
            if SILU:
                y = y * tl.sigmoid(y)
                if REST:
                    y_r = y_r * tl.sigmoid(y_r)
            # A power of two near mean|y|, so that fp16 takes tokens of any magnitude. Of a dead
            # token the signs of infinities remain, and what is finite nearly vanishes.
            magnitude = sum_loaded(tl.abs(y), tl.abs(y_r), REST) * (1.0 / K)
            dead = ~(magnitude < float("inf"))
            exponent = tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, 1 << 23)
            exponent = tl.where(dead, (253 if ROTATED else 127) << 23, exponent)
            unit = exponent.to(tl.float32, bitcast=True)
            inverse_unit = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
            y = y * of_loaded(inverse_unit, TOKENS)
            if REST:
                y_r = y_r * of_loaded(inverse_unit, TOKENS)
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
            y = apply_outer(stack_rows(y, signs, GROUPS, APPLY), outer, row0 < rows, GROUPS)
            z = tl.dot(y, inner)
            if REST:
                y_r = apply_outer(
                    stack_rows(y_r, signs_r, GROUPS, APPLY), outer, row0 < rows, GROUPS
                )
                z = tl.dot(y_r, inner_below, z)
                z_r = tl.dot(y_r, inner_corner, tl.dot(y, inner_beside))
                z_r = tl.reshape(z_r, (TOKENS, OUTER, REST))
            z = tl.reshape(z, (TOKENS, OUTER, MAIN))
            if TOKENS > 1 and not MODULATED:
                # By way of memory into the layout of z: Triton 3.6 would rather sum what was loaded
                # again, in each layout that its sum is wanted in.
                at_unit = token_offset_ptr + group.to(tl.int64) * rows + row0 + flat
                tl.store(at_unit, tl.where(dead, float("inf"), unit), mask=valid)
                tl.debug_barrier()
                unit = tl.load(at_unit, mask=valid, other=1.0)
                dead = ~(unit < float("inf"))
            NORM: tl.constexpr = 1 / (K**0.5 * SHRINK)
            unit = unit * NORM
        else:
            z = token_first(y)
            if REST:
                z_r = token_first(y_r)
        # From here on in units of `unit`.
        if not REST:
            z_r = z
        row = tl.arange(0, OUTER)[None, :, None]
        column = tl.arange(0, MAIN)[None, None, :]
        within = column < M if EXACT else row * M + column < K
        if not WHOLE:
            z = tl.where(within, z, -0.0)  # the compiler drops additions of -0.0
        if RESIDENT:
            branch = tl.zeros((BATCH, BLOCK_RANK, TOKENS), tl.float32)
            branch = project_main(z, down, down_2, branch)
            if REST:
                branch = project(z_r, down_r, branch)

        if STATISTIC == "mean-mad":
            middle = sum_tokens(z, z_r, REST) * (1.0 / K)
            center = of_tokens(middle, TOKENS)
            distance = tl.abs(z - center)
            if not WHOLE:
                distance = tl.where(within, distance, -0.0)
            statistic = sum_tokens(distance, tl.abs(z_r - center), REST) * (1.0 / K)
        elif STATISTIC == "min-max":
            below = -z
            above = z
            if not WHOLE:
                below = tl.where(within, below, float("-inf"))
                above = tl.where(within, above, float("-inf"))
            smallest = -max_tokens(below, -z_r, REST)
            statistic = max_tokens(above, z_r, REST) - smallest
            middle = smallest - low * factor * statistic
        elif STATISTIC == "absmax":
            statistic = max_tokens(tl.abs(z), tl.abs(z_r), REST)
            middle = statistic * 0.0
        else:
            statistic = sum_tokens(tl.abs(z), tl.abs(z_r), REST) * (1.0 / K)
            middle = statistic * 0.0
        scale = factor * statistic * unit
        dead = dead | ~(scale < float("inf"))
        divisor = scale + factor * epsilon
        alive = (divisor > 0.0) & ~dead
        inverse = tl.where(alive, unit / tl.where(alive, divisor, 1.0), 0.0)
        code_shift = middle * inverse
        # Of a dead token z holds the signs of infinities, and after LayerNorm nothing but NaN was.
        inverse = tl.where(dead, 2.0**60 if ROTATED else 1.0, inverse)
        code_shift = tl.where(dead, 1e30 if MODULATED else 0.0, code_shift)
        token_offset = tl.where(dead, 0.0, middle * unit)
        scale = tl.where(dead, 1.0, scale)
        if FLOOR:
            token_offset += 0.5 * scale
        else:
            span = 1.0 / tl.maximum(high - low, 1.0)
            inverse = inverse * span
            code_shift = (code_shift + low) * span
        inverse = of_tokens(inverse, TOKENS)
        code_shift = of_tokens(code_shift, TOKENS)
        bits = code_bits(z, inverse, code_shift, low, high, FLOOR)
        counted = bits - ROUNDER_BITS
        if not WHOLE:
            counted = tl.where(within, counted, 0)
        counted_r = counted
        if REST:
            bits_r = code_bits(z_r, inverse, code_shift, low, high, FLOOR)
            counted_r = bits_r - ROUNDER_BITS
        code_sum = sum_tokens(counted, counted_r, REST)

        long_row = group.to(tl.int64) * rows + row0
        stored = valid[:, None, None]
        at_codes = long_row * K + (flat[:, None, None] * K + row * M)
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
            for first_rank in tl.static_range(0, RANK, BLOCK_RANK):
                if not RESIDENT:
                    part, part_2 = load_down_main(
                        group_down, first_rank, K, M, MAIN, OUTER, BATCH, RANK, BLOCK_RANK
                    )
                    branch = tl.zeros((BATCH, BLOCK_RANK, TOKENS), tl.float32)
                    branch = project_main(z, part, part_2, branch)
                    if REST:
                        part = load_down(
                            group_down, first_rank, K, M, MAIN, REST, OUTER, BATCH, RANK, BLOCK_RANK
                        )
                        branch = project(z_r, part, branch)
                rank = first_rank + tl.arange(0, BLOCK_RANK)[:, None]
                tl.store(
                    branch_ptr + long_row * RANK + flat[None, :] * RANK + rank,
                    tl.sum(branch, 0) * units,
                    mask=(rank < RANK) & valid[None, :],
                )
