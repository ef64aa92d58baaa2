"""Scratch variant: unpack the weight once into int8 memory, then a dense int8 product.

The scratch of a layer (5.3 MB for 4608 x 1152) stays in L2; it counts in the peak memory of a step.
Both operands come by Hopper's tensor copies (TMA), which take rows of a multiple of 16 bytes.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from kernels.ternary_matmul.blocks import finish

STEP = tl.constexpr(128)
"""Columns that are copied and multiplied at a time."""


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
    codes_blocks,
    weight_blocks,
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
    PROGRAMS: tl.constexpr,
    TURNS: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """[BLOCK_N, BLOCK_M] blocks of unpacked weight times codes, TURNS of them per program.

    Programs stay: the copies of a block run during the epilogue of the one before. Past the last
    block a program repeats it, while others still work. Copies read 0 outside of the operands.
    """
    STEPS: tl.constexpr = (K + STEP - 1) // STEP
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    last = TILES_N * ((rows + BLOCK_M - 1) // BLOCK_M) - 1
    for turn in tl.range(TURNS, flatten=True):
        block = tl.minimum(tl.program_id(0) + turn * PROGRAMS, last)
        first_n = block % TILES_N * BLOCK_N
        first_m = block // TILES_N * BLOCK_M
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
        for step in range(STEPS):
            left = weight_blocks.load([first_n, step * STEP])
            right = codes_blocks.load([first_m, step * STEP])
            acc = tl.dot(left, right.T, acc, out_dtype=tl.int32)
        first = first_m.to(tl.int64)
        finish(
            acc,
            first_n + tl.arange(0, BLOCK_N),
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
