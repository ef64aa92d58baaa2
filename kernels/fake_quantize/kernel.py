"""The device code of `triton.py`, both directions."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.fake_quantize.reference import CLIPPED, DEAD, DEAD_CLIPPED, RESIDUAL_LEVELS
from kernels.launch import next_power_of_2

MAX_DOT = 32
"""Largest power-of-two factor applied as one dot; of 128, 32 is a dot and 4 are butterflies."""
MIN_DOT = 16
"""Smallest size that a dot takes; smaller powers of two are butterflies."""

_MEAN_MAD = tl.constexpr(0)
_MIN_MAX = tl.constexpr(1)
_ABSMAX = tl.constexpr(2)
_LEVELS = tl.constexpr(RESIDUAL_LEVELS)
_DEAD = tl.constexpr(DEAD)
_DEAD_CLIPPED = tl.constexpr(DEAD_CLIPPED)
_CLIPPED = tl.constexpr(CLIPPED)
_HUGE = tl.constexpr(3.0e38)
_TINY = tl.constexpr(1.2e-38)
_ROUNDING = tl.constexpr(12582912.0)


def dot_factor(outer: int) -> int:
    """The part of `outer` (a power of two) applied as a dot; 1 = butterflies alone."""
    return 1 if outer < MIN_DOT else min(outer, MAX_DOT)


def padded_inner(m: int) -> int:
    """Size of the inner axis in registers."""
    return max(MIN_DOT, next_power_of_2(m))


@triton.jit
def load_factor(pointer, order, PADDED: tl.constexpr):
    """A factor [order, order] from memory as [PADDED, PADDED], zeros around it."""
    i = tl.arange(0, PADDED)
    mask = (i[:, None] < order) & (i[None, :] < order)
    return tl.load(pointer + i[:, None] * order + i[None, :], mask=mask, other=0.0)


@triton.jit
def butterfly(x, LEADING: tl.constexpr, INNER: tl.constexpr):
    """One stage over the middle axis of [LEADING, 2, INNER]: (a, b) -> (a + b, a - b)."""
    a, b = tl.split(tl.permute(tl.reshape(x, (LEADING, 2, INNER)), (0, 2, 1)))
    return tl.permute(tl.join(a + b, a - b), (0, 2, 1))


@triton.jit
def _load_transposed(pointer, order, PADDED: tl.constexpr):
    i = tl.arange(0, PADDED)
    mask = (i[:, None] < order) & (i[None, :] < order)
    return tl.load(pointer + i[None, :] * order + i[:, None], mask=mask, other=0.0)


@triton.jit
def _row_sum(x):
    # One axis after the other: a flattened reduction of transformed tokens spills in Triton 3.6.
    return tl.sum(tl.sum(x, 2), 1)


@triton.jit
def _flat_row_sum(x):
    """Cheaper for tokens as they come from memory."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] * x.shape[2])), 1)


@triton.jit
def _product(x, factor, PRECISE: tl.constexpr):
    """x @ factor with fp32 accumulation; precise: x as the sum of two fp16 numbers."""
    high = x.to(factor.dtype)
    y = tl.dot(high, factor)
    if PRECISE:
        y = tl.dot((x - high.to(tl.float32)).to(factor.dtype), factor, y)
    return y


@triton.jit
def _transform(
    x,
    inner,
    outer,
    norm,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
    DOT: tl.constexpr,
    INNER: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """x [ROWS, OUTER, INNER] fp32, zero past column m -> its transform times `norm`, fp32."""
    # The largest entry of a row comes to lie in [2^8, 2^9): sums of 64 stay below fp16's 65504.
    largest = tl.max(tl.max(tl.abs(x), 2), 1)
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 9), 254)
    up = ((262 - exponent) << 23).to(tl.float32, bitcast=True)
    down = ((exponent - 8) << 23).to(tl.float32, bitcast=True)
    y = tl.reshape(x * up[:, None, None], (ROWS * OUTER, INNER))
    y = _product(y, inner, PRECISE)
    if DOT > 1:
        y = tl.permute(tl.reshape(y, (ROWS * (OUTER // DOT), DOT, INNER)), (0, 2, 1))
        y = _product(tl.reshape(y, (ROWS * (OUTER // DOT) * INNER, DOT)), outer, PRECISE)
        y = tl.permute(tl.reshape(y, (ROWS * (OUTER // DOT), INNER, DOT)), (0, 2, 1))
    if OUTER // DOT >= 2:
        y = butterfly(y, ROWS, OUTER // 2 * INNER)
    if OUTER // DOT >= 4:
        y = butterfly(y, ROWS * 2, OUTER // 4 * INNER)
    if OUTER // DOT >= 8:
        y = butterfly(y, ROWS * 4, OUTER // 8 * INNER)
    return tl.reshape(y, (ROWS, OUTER, INNER)) * (down * norm)[:, None, None]


@triton.jit
def _grid(
    z, inside, factor, inverse_factor, low, epsilon, K: tl.constexpr, STATISTIC: tl.constexpr
):
    """Scale, its inverse, shift and whether they are infinite, each [ROWS]."""
    if STATISTIC == _MEAN_MAD:
        shift = _row_sum(z) / K
        # False for NaN too: such statistics count as 0, as in the reference.
        shift = tl.where(tl.abs(shift) < _HUGE, shift, 0.0)
        scale = factor * (_row_sum(tl.where(inside, tl.abs(z - shift[:, None, None]), 0.0)) / K)
    elif STATISTIC == _MIN_MAX:
        shift = tl.min(tl.min(tl.where(inside, z, _HUGE), 2), 1)
        scale = (tl.max(tl.max(tl.where(inside, z, -_HUGE), 2), 1) - shift) * factor
    elif STATISTIC == _ABSMAX:
        scale = tl.max(tl.max(tl.abs(z), 2), 1)
        shift = tl.zeros_like(scale)
    else:
        scale = _row_sum(tl.abs(z)) / K
        shift = tl.zeros_like(scale)
    dead = scale > _HUGE
    if STATISTIC == _MIN_MAX:  # inf - inf, of a token all infinite, is NaN
        dead = dead | (tl.abs(shift) > _HUGE)
    if (STATISTIC == _MEAN_MAD) | (STATISTIC == _MIN_MAX):
        scale = tl.where(scale <= _HUGE, scale, 1.0)
        inverse = tl.where(scale > _TINY, 1.0 / tl.where(scale > _TINY, scale, 1.0), 0.0)
        if STATISTIC == _MIN_MAX:
            shift = tl.where(dead, 0.0, shift - scale * low)
    else:
        scale = tl.where(dead, inverse_factor, scale)
        inverse = inverse_factor / (scale + epsilon)
        scale = scale * factor
    return scale, inverse, shift, dead


@triton.jit
def _state(t, level, dead, clip_low, clip_high):
    """The byte of `reference.py` that holds sign, clip and residual of every entry."""
    index = tl.floor((level - t + 0.5) * _LEVELS)
    index = tl.minimum(tl.maximum(index, 0.0), _LEVELS - 1.0)
    clipped = (t <= clip_low) | (t >= clip_high)
    index = tl.where(
        dead, tl.where(clipped, _DEAD_CLIPPED, _DEAD), tl.where(clipped, _CLIPPED, index)
    )
    index = tl.where(t == t, index, 0.0).to(tl.int32)
    return tl.where(t < 0, -1 - index, index)


@triton.jit
def forward_kernel(
    x_ptr,
    signs_ptr,
    inner_ptr,
    outer_ptr,
    values_ptr,
    rotated_ptr,
    state_ptr,
    rows,
    norm,
    factor,
    inverse_factor,
    low,
    high,
    clip_low,
    clip_high,
    epsilon,
    K: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    DOT: tl.constexpr,
    ITERATIONS: tl.constexpr,
    ROTATED: tl.constexpr,
    SIGNED: tl.constexpr,
    PRECISE: tl.constexpr,
    STATISTIC: tl.constexpr,
    FLOOR: tl.constexpr,
    WANT_ROTATED: tl.constexpr,
    SAVE: tl.constexpr,
):
    """ITERATIONS tiles of ROWS tokens [K]: values, and where wanted rotated tokens and state."""
    r = tl.arange(0, ROWS)[:, None, None]
    column = tl.arange(0, INNER)[None, None, :]
    offset = tl.arange(0, OUTER)[None, :, None] * M + column
    inside = column < M
    if ROTATED:
        inner = load_factor(inner_ptr, M, INNER)
        outer = inner
        if DOT > 1:
            outer = load_factor(outer_ptr, DOT, DOT)
    if SIGNED:
        signs = tl.load(signs_ptr + offset, mask=inside, other=0.0)
    for i in tl.range(0, ITERATIONS):
        row = (tl.program_id(0) + i * tl.num_programs(0)) * ROWS + r
        mask = (row < rows) & inside
        place = row.to(tl.int64) * K + offset
        z = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if SIGNED:
            z = z * signs
        if ROTATED:
            z = _transform(z, inner, outer, norm, ROWS, OUTER, DOT, INNER, PRECISE)
        if WANT_ROTATED:
            tl.store(rotated_ptr + place, z.to(rotated_ptr.dtype.element_ty), mask=mask)
        scale, inverse, shift, dead = _grid(
            z, inside, factor, inverse_factor, low, epsilon, K, STATISTIC
        )
        scale, inverse = scale[:, None, None], inverse[:, None, None]
        shift, dead = shift[:, None, None], dead[:, None, None]
        t = (z - shift) * inverse
        if FLOOR:
            level = tl.minimum(tl.maximum(tl.floor(t), low), high) + 0.5
        else:
            # Adding 1.5 * 2^23 leaves no room for a fraction: rounds half to even.
            level = (tl.minimum(tl.maximum(t, low), high) + _ROUNDING) - _ROUNDING
        values = level * scale + shift
        # Minimum and maximum swallow NaN, which has to reach the loss.
        values = tl.where(t == t, values, t)
        tl.store(values_ptr + place, values.to(values_ptr.dtype.element_ty), mask=mask)
        if SAVE:
            state = _state(t, level, dead, clip_low, clip_high)
            tl.store(state_ptr + place, state.to(tl.int8), mask=mask)


@triton.jit
def backward_kernel(
    grad_ptr,
    state_ptr,
    grad_rotated_ptr,
    signs_ptr,
    inner_ptr,
    outer_ptr,
    out_ptr,
    rows,
    grad_stride,
    grad_rotated_stride,
    norm,
    factor,
    low_level,
    high_level,
    K: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    DOT: tl.constexpr,
    ITERATIONS: tl.constexpr,
    ROTATED: tl.constexpr,
    SIGNED: tl.constexpr,
    PRECISE: tl.constexpr,
    STATE: tl.constexpr,
    ADD_ROTATED: tl.constexpr,
):
    """Gradient at the tokens from that at the values (and the rotated tokens) and the state."""
    r = tl.arange(0, ROWS)[:, None, None]
    column = tl.arange(0, INNER)[None, None, :]
    offset = tl.arange(0, OUTER)[None, :, None] * M + column
    inside = column < M
    if ROTATED:
        inner = _load_transposed(inner_ptr, M, INNER)
        outer = inner
        if DOT > 1:
            outer = load_factor(outer_ptr, DOT, DOT)
    if SIGNED:
        signs = tl.load(signs_ptr + offset, mask=inside, other=0.0)
    for i in tl.range(0, ITERATIONS):
        row = (tl.program_id(0) + i * tl.num_programs(0)) * ROWS + r
        mask = (row < rows) & inside
        row = row.to(tl.int64)
        grad = tl.load(grad_ptr + row * grad_stride + offset, mask=mask, other=0.0).to(tl.float32)
        if STATE:
            state = tl.load(state_ptr + row * K + offset, mask=mask, other=0).to(tl.int32)
            positive = state >= 0
            index = tl.where(positive, state, -1 - state)
            clipped = tl.where(index == _CLIPPED, grad, 0.0)
            residual = (index.to(tl.float32) + 0.5) / _LEVELS - 0.5
            residual = tl.where(index < _LEVELS, residual, 0.0)
            outermost = tl.where(positive, high_level, low_level)
            sign = tl.where(inside, tl.where(positive, 1.0, -1.0), 0.0)
            slope = _flat_row_sum(clipped * outermost + grad * residual) * (factor / K)
            constant = (_flat_row_sum(clipped) - slope * _flat_row_sum(sign)) / K
            grad = tl.where(index > _DEAD, 0.0, grad)
            grad += sign * slope[:, None, None] + constant[:, None, None]
        if ADD_ROTATED:
            grad += tl.load(
                grad_rotated_ptr + row * grad_rotated_stride + offset, mask=mask, other=0.0
            ).to(tl.float32)
        if ROTATED:
            grad = tl.where(inside, grad, 0.0)
            grad = _transform(grad, inner, outer, norm, ROWS, OUTER, DOT, INNER, PRECISE)
        if SIGNED:
            grad = grad * signs
        tl.store(out_ptr + row * K + offset, grad.to(out_ptr.dtype.element_ty), mask=mask)
