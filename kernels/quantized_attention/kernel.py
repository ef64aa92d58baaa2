"""Device code of attention in integers.

`keys_values_kernel` turns keys and values into integers once, so that no block of queries does it
again, and lays them out as the tensor core reads them: the channels of a key and the tokens of a
value one after the other. `attention_kernel` takes a block of queries of one head, whose scores,
softmax and integers stay in registers.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

# Adding 1.5 * 2^23 rounds a float half to even and leaves the integer in its low bits, and turns an
# integer below 2^22 into a float: conversion instructions are a quarter as fast as additions.
_ROUNDER = tl.constexpr(12582912.0)
_ROUNDER_BITS = tl.constexpr(0x4B400000)


@triton.jit
def _magnitude(x):
    """Bits of |x|, whose order as integers is that of the floats, with NaN above infinity."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scales(largest, LIMIT: tl.constexpr):
    """Scale, NaN unless finite, and its inverse, 0 for none, from bits of the largest magnitude."""
    absmax = largest.to(tl.float32, bitcast=True)
    scale = tl.where(absmax < float("inf"), absmax / LIMIT, float("nan"))
    inverse = 1.0 / tl.where(scale > 0.0, scale, 1.0)
    return scale, tl.where((scale > 0.0) & (inverse < float("inf")), inverse, 0.0)


@triton.jit
def _round(x):
    """Nearest int8 of a float in its range."""
    return (x + _ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _row_codes(
    rows, exists, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, LIMIT: tl.constexpr
):
    """int8 of rows of D channels, the first MAIN and the others in REST (if any), and the scales.

    Channels that are not there are 0. Two powers of two pad less than one: 72 is 64 and 32.
    """
    d = tl.arange(0, MAIN)
    main = tl.load(rows + d[None, :], mask=exists[:, None] & (d < D)[None, :], other=0.0)
    rest = main
    largest = tl.max(_magnitude(main), 1)
    if REST > 0:
        d = MAIN + tl.arange(0, REST)
        rest = tl.load(rows + d[None, :], mask=exists[:, None] & (d < D)[None, :], other=0.0)
        largest = tl.maximum(largest, tl.max(_magnitude(rest), 1))
    scale, inverse = _scales(largest, LIMIT)
    main = _round(main.to(tl.float32) * inverse[:, None])
    rest = _round(rest.to(tl.float32) * inverse[:, None]) if REST > 0 else main
    return main, rest, scale


@triton.jit
def _place_of_key(token):
    """Where a key stands among its 16.

    The tensor core leaves columns 2t, 2t + 1, 2t + 8 and 2t + 9 of the scores in the thread that
    feeds it columns 4t to 4t + 3 of the probabilities: with keys in this order nothing moves.
    """
    return token // 16 * 16 + (token >> 1 & 1) * 8 + (token >> 2 & 3) * 2 + (token & 1)


@triton.jit
def _token_at(place):
    """The inverse of `_place_of_key`."""
    return place // 16 * 16 + (place >> 1 & 3) * 4 + (place >> 3 & 1) * 2 + (place & 1)


@triton.jit
def _in_token_order(p, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns of [BLOCK_Q, BLOCK_K] from the order of places to that of tokens."""
    p = tl.reshape(p, (BLOCK_Q, BLOCK_K // 16, 2, 4, 2))
    return tl.reshape(tl.permute(p, (0, 1, 3, 2, 4)), (BLOCK_Q, BLOCK_K))


@triton.jit
def _write_keys(
    source,
    keys_ptr,
    key_scale_ptr,
    t,
    T: tl.constexpr,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Integers and scales of the keys of tokens t, in their places."""
    main, rest, scale = _row_codes(source + t[:, None] * STRIDE, t < T, D, MAIN, REST, LIMIT)
    place = _place_of_key(t)
    tl.store(key_scale_ptr + place, scale)
    to = keys_ptr + place[:, None] * (MAIN + REST)
    tl.store(to + tl.arange(0, MAIN)[None, :], main)
    if REST > 0:
        tl.store(to + MAIN + tl.arange(0, REST)[None, :], rest)


@triton.jit
def _write_values(
    source,
    values_ptr,
    value_scale_ptr,
    c,
    T: tl.constexpr,
    PADDED: tl.constexpr,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Integers and scales of channels c of the values, read once where one block holds them."""
    t = tl.arange(0, BLOCK_T)
    exists = (c < D)[None, :]
    source += t[:, None] * STRIDE + c[None, :]
    x = tl.load(source, mask=(t < T)[:, None] & exists, other=0.0)
    largest = tl.max(_magnitude(x), 0)
    for first in range(BLOCK_T, PADDED, BLOCK_T):
        inside = (t < T - first)[:, None] & exists
        later = tl.load(source + first * STRIDE, mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.max(_magnitude(later), 0))
    scale, inverse = _scales(largest, LIMIT)
    tl.store(value_scale_ptr + c, scale, mask=c < D)
    to = values_ptr + c[:, None] * PADDED + t[None, :]
    codes = _round(x.to(tl.float32) * inverse[None, :])
    tl.store(to, tl.trans(codes), mask=(c < D)[:, None])
    for first in range(BLOCK_T, PADDED, BLOCK_T):
        inside = (t < T - first)[:, None] & exists
        later = tl.load(source + first * STRIDE, mask=inside, other=0.0)
        codes = _round(later.to(tl.float32) * inverse[None, :])
        tl.store(to + first, tl.trans(codes), mask=(c < D)[:, None])


@triton.jit
def keys_values_kernel(
    qkv_ptr,
    keys_ptr,
    key_scale_ptr,
    values_ptr,
    value_scale_ptr,
    T: tl.constexpr,
    PADDED: tl.constexpr,  # T rounded up to whole blocks of keys
    HEADS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    LIMIT: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Keys int8 [B, H, PADDED, MAIN + REST], in places, and values int8 [B, H, D, PADDED].

    Programs of a head: KEY_BLOCKS for its keys, then one for every BLOCK_C channels of its values.
    """
    STRIDE: tl.constexpr = 3 * HEADS * D
    part = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    keys = qkv_ptr + head // HEADS * T * STRIDE + head % HEADS * D + HEADS * D
    if part < KEY_BLOCKS:
        keys_ptr += head * PADDED * (MAIN + REST)
        key_scale_ptr += head * PADDED
        t = part * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
        _write_keys(keys, keys_ptr, key_scale_ptr, t, T, STRIDE, D, MAIN, REST, LIMIT)
    else:
        values = keys + HEADS * D
        values_ptr += head * D * PADDED
        value_scale_ptr += head * D
        c = (part - KEY_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
        _write_values(values, values_ptr, value_scale_ptr, c, T, PADDED, STRIDE, D, LIMIT, BLOCK_T)


@triton.jit
def _scores(
    main,
    rest,
    keys_ptr,
    key_scale_ptr,
    first,
    PITCH: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """q . k times the key's scale, [queries, BLOCK_K] for the places from `first` on."""
    j = tl.arange(0, BLOCK_K)
    keys = keys_ptr + first * PITCH + j[None, :] * PITCH
    sums = tl.dot(main, tl.load(keys + tl.arange(0, MAIN)[:, None]), out_dtype=tl.int32)
    if REST > 0:
        keys += MAIN
        sums = tl.dot(rest, tl.load(keys + tl.arange(0, REST)[:, None]), sums, out_dtype=tl.int32)
    sums = (sums + _ROUNDER_BITS).to(tl.float32, bitcast=True) - _ROUNDER
    return sums * tl.load(key_scale_ptr + first + j)[None, :]


@triton.jit
def _largest(scores, first, T: tl.constexpr, PADDED: tl.constexpr, BLOCK_K: tl.constexpr):
    """The largest score of every query, of keys that exist."""
    if T < PADDED:
        exists = _token_at(first + tl.arange(0, BLOCK_K)) < T
        scores = tl.where(exists[None, :], scores, float("-inf"))
    return tl.max(scores, 1)


@triton.jit
def _store_part(
    out_ptr,
    sums,
    share,
    value_scale_ptr,
    i,
    channel,
    T: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
):
    """Dequantize int32 sums [queries, channels] and store them in out [T, WIDTH]."""
    scale = tl.load(value_scale_ptr + channel, mask=channel < D, other=0.0)
    y = sums.to(tl.float32) * share[:, None] * scale[None, :]
    to = out_ptr + i[:, None] * WIDTH + channel[None, :]
    mask = (i < T)[:, None] & (channel < D)[None, :]
    tl.store(to, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def attention_kernel(
    out_ptr,
    qkv_ptr,
    keys_ptr,
    key_scale_ptr,
    values_ptr,
    value_scale_ptr,
    T: tl.constexpr,
    PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    LIMIT: tl.constexpr,
    EXPONENT: tl.constexpr,  # log2 e / sqrt(D)
    LOG2_LIMIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_Q queries of one head against all its keys.

    With one block of keys their scores are computed once; else a first pass finds their maximum.
    """
    PITCH: tl.constexpr = MAIN + REST
    STRIDE: tl.constexpr = 3 * HEADS * D
    BLOCKS: tl.constexpr = (T + BLOCK_Q - 1) // BLOCK_Q
    head = tl.program_id(0) // BLOCKS
    i = tl.program_id(0) % BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    image = (head // HEADS).to(tl.int64)
    long_head = head.to(tl.int64)
    keys_ptr += long_head * PADDED * PITCH
    key_scale_ptr += long_head * PADDED
    values_ptr += long_head * D * PADDED

    queries = qkv_ptr + image * T * STRIDE + head % HEADS * D + i[:, None] * STRIDE
    main, rest, query_scale = _row_codes(queries, i < T, D, MAIN, REST, LIMIT)

    scores = _scores(main, rest, keys_ptr, key_scale_ptr, 0, PITCH, MAIN, REST, BLOCK_K)
    largest_score = _largest(scores, 0, T, PADDED, BLOCK_K)
    for first in range(BLOCK_K, PADDED, BLOCK_K):
        scores = _scores(main, rest, keys_ptr, key_scale_ptr, first, PITCH, MAIN, REST, BLOCK_K)
        largest_score = tl.maximum(largest_score, _largest(scores, first, T, PADDED, BLOCK_K))

    # 2^(factor score - shift) is LIMIT e^(s - max): its integers, and as a sum their scale.
    factor = query_scale * EXPONENT
    shift = largest_score * factor - LOG2_LIMIT
    total = tl.zeros((BLOCK_Q,), tl.float32)
    sums = tl.zeros((BLOCK_Q, MAIN), tl.int32)
    rest_sums = tl.zeros((BLOCK_Q, REST if REST > 0 else 16), tl.int32)
    j = tl.arange(0, BLOCK_K)
    d = tl.arange(0, MAIN)
    e = MAIN + tl.arange(0, REST) if REST > 0 else d
    for first in range(0, PADDED, BLOCK_K):
        if PADDED > BLOCK_K:
            scores = _scores(main, rest, keys_ptr, key_scale_ptr, first, PITCH, MAIN, REST, BLOCK_K)
        weights = tl.exp2(scores * factor[:, None] - shift[:, None])
        if T < PADDED:
            weights = tl.where((_token_at(first + j) < T)[None, :], weights, 0.0)
        total += tl.sum(weights, 1)
        p = _in_token_order(_round(weights), BLOCK_Q, BLOCK_K)
        values = values_ptr + first + j[:, None]
        # Columns past the last channel repeat it, and are not stored.
        right = tl.load(values + tl.minimum(d, D - 1)[None, :] * PADDED)
        sums = tl.dot(p, right, sums, out_dtype=tl.int32)
        if REST > 0:
            right = tl.load(values + tl.minimum(e, D - 1)[None, :] * PADDED)
            rest_sums = tl.dot(p, right, rest_sums, out_dtype=tl.int32)

    out_ptr += image * T * (HEADS * D) + head % HEADS * D
    value_scale_ptr += long_head * D
    share = 1.0 / total
    _store_part(out_ptr, sums, share, value_scale_ptr, i, d, T, HEADS * D, D)
    if REST > 0:
        _store_part(out_ptr, rest_sums, share, value_scale_ptr, i, e, T, HEADS * D, D)
