"""Device functions that the kernels of this operation share.

A block of results is held as [outputs, tokens]: Hopper's tensor core takes its left operand from
registers, where packed weights are unpacked, and its right one from shared memory, where row-major
codes already lie as it wants them.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

PACK_BLOCK = tl.constexpr(128)
PLANE = tl.constexpr(32)

# Four weights of one plane per 32-bit shift and mask; plane 0 needs no shift.
UNPACK_PTX = tl.constexpr(
    """{
    .reg .b32 a, b, c;
    and.b32 $0, $4, 0x03030303;
    shr.u32 a, $4, 2;
    and.b32 $1, a, 0x03030303;
    shr.u32 b, $4, 4;
    and.b32 $2, b, 0x03030303;
    shr.u32 c, $4, 6;
    and.b32 $3, c, 0x03030303;
    }"""
)


# 1 / (1 + 2^x) in three instructions; both approximations are good to two units in the last place.
LOGISTIC_PTX = tl.constexpr(
    """{
    .reg .f32 a;
    ex2.approx.ftz.f32 a, $1;
    add.f32 a, a, 0f3F800000;
    rcp.approx.ftz.f32 $0, a;
    }"""
)


@triton.jit
def unpack(packed, STEP_BYTES: tl.constexpr, BLOCK_N: tl.constexpr, PLAIN: tl.constexpr):
    """int8 w + 1 [BLOCK_N, 4 STEP_BYTES] of uint8 [BLOCK_N, STEP_BYTES].

    PLAIN is the interpreter's way. Join and reshape move nothing: in the layout of the tensor
    core's left operand a thread already holds the same bytes of every plane.
    """
    if PLAIN:
        first = (packed & 3).to(tl.int8)
        second = ((packed >> 2) & 3).to(tl.int8)
        third = ((packed >> 4) & 3).to(tl.int8)
        fourth = (packed >> 6).to(tl.int8)
    else:
        first, second, third, fourth = tl.inline_asm_elementwise(
            UNPACK_PTX,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    planes = tl.join(tl.join(first, third), tl.join(second, fourth))
    planes = tl.reshape(planes, (BLOCK_N, STEP_BYTES // PLANE, PLANE, 2, 2))
    return tl.reshape(tl.permute(planes, (0, 1, 3, 4, 2)), (BLOCK_N, 4 * STEP_BYTES))


@triton.jit
def accumulate(
    codes_ptr,
    planes_ptr,
    m,
    n,
    first_step,
    K: tl.constexpr,
    STEPS: tl.constexpr,
    STEP_BYTES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """sum_k (w + 1) c over STEPS steps of STEP_BYTES packed bytes: int32 [BLOCK_N, BLOCK_M].

    m and n are row numbers, already inside the operands. Steps past the end add nothing.
    """
    ROW_BYTES: tl.constexpr = (K + PACK_BLOCK - 1) // PACK_BLOCK * PLANE
    EVEN: tl.constexpr = K % (4 * STEP_BYTES) == 0 and (K // (4 * STEP_BYTES)) % STEPS == 0
    byte = first_step * STEP_BYTES + tl.arange(0, STEP_BYTES)
    column = first_step * STEP_BYTES * 4 + tl.arange(0, 4 * STEP_BYTES)
    planes = planes_ptr + n[:, None] * ROW_BYTES + byte[None, :]
    codes = codes_ptr + m[None, :] * K + column[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for step in range(STEPS):
        if EVEN:
            packed = tl.load(planes)
            right = tl.load(codes)
        else:
            inside = byte + step * STEP_BYTES < ROW_BYTES
            packed = tl.load(planes, mask=inside[None, :], other=0)
            inside = column + step * STEP_BYTES * 4 < K
            right = tl.load(codes, mask=inside[:, None], other=0)
        left = unpack(packed, STEP_BYTES, BLOCK_N, PLAIN)
        acc = tl.dot(left, right, acc, out_dtype=tl.int32)
        planes += STEP_BYTES
        codes += STEP_BYTES * 4
    return acc


@triton.jit
def finish_part(
    acc,
    n,
    first_row,
    first_channel,
    rows_left,
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
    N: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    GELU: tl.constexpr,
    TOKENS_PER_IMAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Dequantize int32 [outputs n, tokens m], add what there is, store; None is left out.

    Token m is row `first_row` + m in memory, output n is channel `first_channel` + n; `rows_left`
    tokens exist. These scalars are int64, so that offsets within the block fit int32.
    """
    m = tl.arange(0, BLOCK_M)
    mask_m = m < rows_left
    mask_n = n < N
    mask = mask_n[:, None] & mask_m[None, :]
    scale = tl.load(token_scale_ptr + first_row + m, mask=mask_m, other=0.0)
    offset = tl.load(token_offset_ptr + first_row + m, mask=mask_m, other=0.0)
    code_sums = tl.load(code_sums_ptr + first_row + m, mask=mask_m, other=0)
    channel_scale = tl.load(channel_scale_ptr + first_channel + n, mask=mask_n, other=0.0)
    weight_sums = tl.load(weight_sums_ptr + first_channel + n, mask=mask_n, other=0).to(tl.float32)
    y = (acc - code_sums[None, :]).to(tl.float32) * scale[None, :]
    y = (y + offset[None, :] * weight_sums[:, None]) * channel_scale[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + first_channel + n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    if up_ptr is not None:
        r = tl.arange(0, BLOCK_RANK)
        up = tl.load(
            up_ptr + first_channel * RANK + n[:, None] * RANK + r[None, :],
            mask=mask_n[:, None] & (r < RANK)[None, :],
            other=0.0,
        )
        branch = tl.load(
            branch_ptr + first_row * RANK + m[None, :] * RANK + r[:, None],
            mask=mask_m[None, :] & (r < RANK)[:, None],
            other=0.0,
        ).to(up.dtype)
        if PLAIN:
            # The interpreter multiplies the bit patterns of bfloat16.
            y = tl.dot(up.to(tl.float32), branch.to(tl.float32), y, input_precision="ieee")
        else:
            y = tl.dot(up, branch, y, input_precision="ieee")
    if GELU:
        # 0.5 y (1 + tanh(sqrt(2 / pi) (y + 0.044715 y^3))) = y / (1 + 2^x)
        x = y * (-2.302208198 - 0.1029432397 * y * y)
        if PLAIN:
            # NumPy warns of the overflow that makes the result 0.
            y = y / (1.0 + tl.exp2(tl.minimum(x, 127.0)))
        else:
            y *= tl.inline_asm_elementwise(
                LOGISTIC_PTX, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
            )
    if gate_ptr is not None:
        if TOKENS_PER_IMAGE % BLOCK_M == 0:
            # All tokens of the block belong to one image; past the last row there is none.
            exists = mask_n & (tl.zeros_like(n) < rows_left)
            gate = tl.load(gate_ptr + first_row // TOKENS_PER_IMAGE * N + n, mask=exists, other=0.0)
            y *= gate.to(tl.float32)[:, None]
        else:
            image = (first_row + m) // TOKENS_PER_IMAGE
            gate = tl.load(gate_ptr + image[None, :] * N + n[:, None], mask=mask, other=0.0)
            y *= gate.to(tl.float32)
    where = m[None, :] * N + n[:, None]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + first_row * N + where, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + first_row * N + where, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish(
    acc,
    n,
    first_row,
    first_channel,
    rows_left,
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
    N: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    GELU: tl.constexpr,
    TOKENS_PER_IMAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """`finish_part` of the block, by at most 64 tokens at a time: more would spill registers.

    The split moves nothing, since a thread holds several tokens of each of its outputs.
    """
    if BLOCK_M > 64:
        HALF: tl.constexpr = BLOCK_M // 2
        halves = tl.permute(tl.reshape(acc, (BLOCK_N, 2, HALF)), (0, 2, 1))
        low, high = tl.split(halves)
        finish(
            low,
            n,
            first_row,
            first_channel,
            rows_left,
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
            HALF,
            PLAIN,
        )
        finish(
            high,
            n,
            first_row + HALF,
            first_channel,
            rows_left - HALF,
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
            HALF,
            PLAIN,
        )
    else:
        finish_part(
            acc,
            n,
            first_row,
            first_channel,
            rows_left,
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
            BLOCK_M,
            PLAIN,
        )
