"""Skinny kernel: few tokens, so that reading the packed weight is the work.

K may be split over programs. Partial sums are integers, so their sum does not depend on order; a
second kernel adds them and applies the epilogue. Groups of layers share one launch.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from kernels.ternary_matmul.blocks import accumulate, finish


@triton.jit
def skinny_kernel(
    out_ptr,
    partial_ptr,
    codes_ptr,
    planes_ptr,
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
    SPLITS: tl.constexpr,
    STEPS: tl.constexpr,
    STEP_BYTES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """One block over one part of K; grid [tiles of N and M, SPLITS, G].

    With one split the epilogue follows; otherwise int32 sums go to partial [G, SPLITS, M, N].
    """
    ROW_BYTES: tl.constexpr = (K + 127) // 128 * 32
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    split = tl.program_id(1)
    group = tl.program_id(2).to(tl.int64)
    n = (tile % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = (tile // TILES_N).to(tl.int64) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    acc = accumulate(
        codes_ptr + (group * rows + first) * K,
        planes_ptr + group * N * ROW_BYTES,
        tl.minimum(m, rows - 1 - first).to(tl.int32),
        tl.minimum(n, N - 1) if N % BLOCK_N else n,
        split * STEPS,
        K,
        STEPS,
        STEP_BYTES,
        BLOCK_N,
        BLOCK_M,
        PLAIN,
    )
    if SPLITS > 1:
        to = partial_ptr + ((group * SPLITS + split) * rows + first) * N
        mask = (n < N)[:, None] & (m < rows - first)[None, :]
        tl.store(to + m[None, :] * N + n[:, None], acc, mask=mask)
    else:
        finish(
            acc,
            n,
            group * rows + first,
            group * N,
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


@triton.jit
def combine_kernel(
    out_ptr,
    partial_ptr,
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
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    GELU: tl.constexpr,
    TOKENS_PER_IMAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Add the splits of partial [G, SPLITS, M, N] and apply the epilogue; grid [tiles, 1, G]."""
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    group = tl.program_id(2).to(tl.int64)
    n = (tile % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = (tile // TILES_N).to(tl.int64) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    mask = (n < N)[:, None] & (m < rows - first)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for split in tl.static_range(SPLITS):
        part = partial_ptr + ((group * SPLITS + split) * rows + first) * N
        acc += tl.load(part + m[None, :] * N + n[:, None], mask=mask, other=0)
    finish(
        acc,
        n,
        group * rows + first,
        group * N,
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
