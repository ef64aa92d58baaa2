"""Scratch variant: unpack the weight once into int8 memory, then a dense int8 product.

The scratch of a layer (5.3 MB for 4608 x 1152) stays in L2; it counts as workspace in peak memory.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from kernels.ternary_matmul.blocks import finish


@triton.jit
def unpack_kernel(planes_ptr, weight_ptr, size, BLOCK: tl.constexpr):
    """uint8 planes [size] to int8 w + 1 [4 size], columns in order; rows need no telling apart."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    packed = tl.load(planes_ptr + at, mask=mask, other=0)
    to = weight_ptr + at // 32 * 128 + at % 32
    tl.store(to, (packed & 3).to(tl.int8), mask=mask)
    tl.store(to + 32, ((packed >> 2) & 3).to(tl.int8), mask=mask)
    tl.store(to + 64, ((packed >> 4) & 3).to(tl.int8), mask=mask)
    tl.store(to + 96, (packed >> 6).to(tl.int8), mask=mask)


@triton.jit
def dense_kernel(
    out_ptr,
    codes_ptr,
    weight_ptr,
    token_scale_ptr,
    token_offset_ptr,
    code_sums_ptr,
    channel_scale_ptr,
    weight_sums_ptr,
    bias_ptr,
    branch_ptr,
    up_ptr,
    gate_ptr,
    residual_ptr,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    GELU: tl.constexpr,
    TOKENS_PER_IMAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """One [BLOCK_N, BLOCK_M] block of unpacked weight [N, K padded to 128] times codes."""
    PITCH: tl.constexpr = (K + 127) // 128 * 128
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    n = (program % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = (program // TILES_N).to(tl.int64) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, 128)
    row_n = tl.minimum(n, N - 1) if N % BLOCK_N else n
    row_m = tl.minimum(m, rows - 1 - first).to(tl.int32)
    weight = weight_ptr + row_n[:, None] * PITCH + k[None, :]
    codes = codes_ptr + first * K + row_m[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for step in range(PITCH // 128):
        left = tl.load(weight)
        if K % 128 == 0:
            right = tl.load(codes)
        else:
            right = tl.load(codes, mask=(k + step * 128 < K)[:, None], other=0)
        acc = tl.dot(left, right, acc, out_dtype=tl.int32)
        weight += 128
        codes += 128
    finish(
        acc,
        n,
        first,
        0,
        rows - first,
        out_ptr,
        token_scale_ptr,
        token_offset_ptr,
        code_sums_ptr,
        channel_scale_ptr,
        weight_sums_ptr,
        bias_ptr,
        branch_ptr,
        up_ptr,
        gate_ptr,
        residual_ptr,
        N,
        RANK,
        BLOCK_RANK,
        GELU,
        TOKENS_PER_IMAGE,
        BLOCK_N,
        BLOCK_M,
        PLAIN,
    )
