"""What the kernel does to the parts of its tokens.

A token [OUTER, M] is held as two parts of its rows, `x` of MAIN columns and `x_r` of REST columns
(see `kernels.hadamard_tile`); without a second part `x_r` is `x` and unused. As they come from
memory the parts are [OUTER / LANES, TOKENS, LANES, columns], so that a warp holds whole tokens
where these are short; transformed they are [TOKENS, OUTER, columns].
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

# Beyond what an entry can be after LayerNorm. Clamping infinities and NaN keeps them out of the
# products, where they would spoil the other tokens of the tile.
_MOST = tl.constexpr(256.0)
# Adding 1.5 * 2^23 rounds a float half to even and leaves the integer in its low bits, which saves
# the conversion instructions, a quarter as fast as additions.
ROUNDER = tl.constexpr(12582912.0)
ROUNDER_BITS = tl.constexpr(0x4B400000)


@triton.jit
def part_columns(FIRST: tl.constexpr, SIZE: tl.constexpr, M: tl.constexpr, OUTER: tl.constexpr):
    """Offsets in a token [OUTER / LANES, 1, LANES, SIZE]."""
    LANES: tl.constexpr = min(OUTER, max(256 // SIZE, 1) if SIZE > 16 else 16)
    row = tl.arange(0, OUTER // LANES)[:, None, None, None] * LANES
    row += tl.arange(0, LANES)[None, None, :, None]
    return row * M + (FIRST + tl.arange(0, SIZE)[None, None, None, :])


@triton.jit
def load_part(pointer, at, inside, WHOLE: tl.constexpr):
    """Elements at offsets `at`, zero where not `inside`; WHOLE says that all are."""
    if WHOLE:
        inside = None
    return tl.load(pointer + at, mask=inside, other=None if WHOLE else 0.0)


@triton.jit
def token_first(x):
    """[HIGH, TOKENS, LANES, SIZE] -> [TOKENS, HIGH * LANES, SIZE]."""
    y = tl.permute(x, (1, 0, 2, 3))
    return tl.reshape(y, (x.shape[1], x.shape[0] * x.shape[2], x.shape[3]))


@triton.jit
def sum_loaded(x, x_r, REST: tl.constexpr):
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
def sum_tokens(z, z_r, REST: tl.constexpr):
    """As `sum_loaded`, of transformed parts."""
    if REST:
        z = tl.reshape(z, (z.shape[0], z.shape[1], z.shape[2] // REST, REST))
        z = tl.sum(z, 2) + z_r
    return tl.sum(z) if z.shape[0] == 1 else tl.sum(tl.sum(z, 2), 1)


@triton.jit
def max_tokens(z, z_r, REST: tl.constexpr):
    """Largest element of every token, as `sum_tokens` sums them."""
    if REST:
        z = tl.reshape(z, (z.shape[0], z.shape[1], z.shape[2] // REST, REST))
        z = tl.maximum(tl.max(z, 2), z_r)
    return tl.max(z) if z.shape[0] == 1 else tl.max(tl.max(z, 2), 1)


@triton.jit
def of_loaded(x, TOKENS: tl.constexpr):
    """A value per token [TOKENS], or a scalar of one, against parts as they were loaded."""
    if TOKENS > 1:
        x = x[None, :, None, None]
    return x


@triton.jit
def of_tokens(x, TOKENS: tl.constexpr):
    """A value per token [TOKENS], or a scalar of one, against parts of `token_first`."""
    if TOKENS > 1:
        x = x[:, None, None]
    return x


@triton.jit
def read_part(
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
    x = load_part(x_ptr, at_x + columns, inside, WHOLE)
    y = x.to(tl.float32)
    if RESIDUAL:
        value = load_part(value_ptr, at_value + columns, inside, WHOLE).to(tl.float32)
        gate = load_part(gate_ptr, at_gate + columns, inside, WHOLE).to(tl.float32)
        total = (y + gate * value).to(x.dtype)
        tl.store(residual_ptr + at_residual + columns, total, mask=valid & inside)
        y = total.to(tl.float32)
    return y


@triton.jit
def load_modulation(
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
    shift = load_part(shift_ptr, at_shift + columns, inside, WHOLE).to(tl.float32)
    gain = load_part(scale_ptr, at_scale + columns, inside, WHOLE).to(tl.float32) + 1.0
    if SIGNED:
        shift *= signs
        gain *= signs
    if HALF:  # half the registers, and two elements per instruction
        shift = shift.to(tl.float16)
        gain = gain.to(tl.float16)
    return gain, shift


@triton.jit
def modulate(y, multiplier, gain, shift, HALF: tl.constexpr):
    """clamp(y multiplier) gain + shift; HALF: in fp16, which the clamp keeps finite."""
    y = tl.clamp(y * multiplier, -_MOST, _MOST)
    if HALF:
        y = y.to(tl.float16)
    return y * gain + shift


@triton.jit
def stack_rows(y, signs, GROUPS: tl.constexpr, SIGNED: tl.constexpr):
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
def code_bits(z, inverse, shift, low, high, FLOOR: tl.constexpr):
    """Codes of z, in the low bits of an int32."""
    if FLOOR:
        t = tl.floor(tl.clamp(z * inverse - shift, low, high)) + ROUNDER
    else:
        # Clamped to [0, 1] by the multiplication itself, then stretched and rounded by another.
        t = tl.clamp(z * inverse - shift, 0.0, 1.0) * (high - low) + (low + ROUNDER)
    return t.to(tl.int32, bitcast=True)


@triton.jit
def load_down(
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
def project(z, down, branch):
    """branch + down @ z of every token, in BATCH parts [BATCH, BLOCK_RANK, TOKENS]."""
    BATCH: tl.constexpr = down.shape[0]
    z = tl.reshape(z.to(tl.float16), (z.shape[0], BATCH, down.shape[2]))
    return tl.dot(down, tl.permute(z, (1, 2, 0)), branch)


@triton.jit
def load_down_main(
    pointer,
    first_rank,
    K: tl.constexpr,
    M: tl.constexpr,
    MAIN: tl.constexpr,
    OUTER: tl.constexpr,
    BATCH: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """Of the main part, in halves: registers hold one half of the operands at a time."""
    HALF: tl.constexpr = MAIN // 2
    left = load_down(pointer, first_rank, K, M, 0, HALF, OUTER, BATCH, RANK, BLOCK_RANK)
    right = load_down(pointer, first_rank, K, M, HALF, HALF, OUTER, BATCH, RANK, BLOCK_RANK)
    return left, right


@triton.jit
def project_main(z, left, right, branch):
    """`branch` plus z @ down.T of the main columns, in two halves that registers hold."""
    halves = tl.reshape(z, (z.shape[0], z.shape[1], 2, z.shape[2] // 2))
    z_left, z_right = tl.split(tl.permute(halves, (0, 1, 3, 2)))
    return project(z_right, right, project(z_left, left, branch))
