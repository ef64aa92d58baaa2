"""Tile kernel: the packed weight is unpacked in registers on its way into the tensor core."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from kernels.ternary_matmul.blocks import accumulate, finish


@triton.jit
def tile_kernel(
    out_ptr,
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
    STEPS: tl.constexpr,
    STEP_BYTES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """One [BLOCK_N, BLOCK_M] block over all of K, with its epilogue.

    Neighbouring programs share their tokens: the packed weight of a layer stays in L2 whole
    (1.3 MB for 4608 x 1152), so codes are read from memory once.
    """
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    n = (program % TILES_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = (program // TILES_N).to(tl.int64) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    # Rows past the end repeat the last one and are not stored: loads need no mask.
    acc = accumulate(
        codes_ptr + first * K,
        planes_ptr,
        tl.minimum(m, rows - 1 - first).to(tl.int32),
        tl.minimum(n, N - 1) if N % BLOCK_N else n,
        0,
        K,
        STEPS,
        STEP_BYTES,
        BLOCK_N,
        BLOCK_M,
        PLAIN,
    )
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
