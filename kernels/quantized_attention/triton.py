"""Attention in integers on the GPU: `reference.quantized_attention` in two kernels.

The integers of keys and values, two bytes a channel and token, are in memory between the two; they
count as workspace in peak memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.launch import KernelInputError, next_power_of_2
from kernels.quantized_attention.kernel import attention_kernel, keys_values_kernel
from kernels.quantized_attention.reference import OP, check_inputs

MAX_HEAD_DIM = 256
"""Sums of products of 8-bit integers stay below 2^22, which the kernel needs."""
WHOLE_ROW = 256
"""Most tokens whose scores a program holds at once."""
SMALLEST = 32
"""Least number of integers that the tensor core sums."""
KEY_BLOCK = 64
VALUE_BLOCK = 16
"""Keys, and channels of the values, of one program of the first kernel."""
FEW_BLOCKS = 2 * 132
"""With fewer blocks of queries than these, an H100 has idle processors and takes smaller ones."""


def quantized_attention(
    qkv: Tensor, *, heads: int, limit: int, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """`reference.quantized_attention` as kernels, for heads of at most 256 channels.

    Integers differ from the reference's only where rounding to them is a tie within float32's own
    rounding. It neither reads values on the host nor waits, so it runs under CUDA graph capture.

    Raises:
        KernelInputError: as the reference; a head that is too wide; more than 65535 heads at once.
    """
    head_dim = check_inputs(qkv, heads, limit, out_dtype, anywhere=False)
    batch, tokens, width = qkv.shape
    if head_dim > MAX_HEAD_DIM:
        raise KernelInputError(f"{OP}: heads of {head_dim} channels; {MAX_HEAD_DIM} work at most")
    if batch * heads > 65535:
        raise KernelInputError(
            f"{OP}: {batch} images of {heads} heads are more than 65535; split the batch"
        )
    out = torch.empty((batch, tokens, width // 3), dtype=out_dtype, device=qkv.device)
    if out.numel() == 0:
        return out
    first, second = constants(tokens, heads, head_dim, limit, batch)
    padded, pitch = first["PADDED"], first["MAIN"] + first["REST"]
    lead = (batch, heads)
    keys = torch.empty((*lead, padded, pitch), dtype=torch.int8, device=qkv.device)
    key_scale = torch.empty((*lead, padded), dtype=torch.float32, device=qkv.device)
    values = torch.empty((*lead, head_dim, padded), dtype=torch.int8, device=qkv.device)
    value_scale = torch.empty((*lead, head_dim), dtype=torch.float32, device=qkv.device)
    parts = first["KEY_BLOCKS"] + -(-head_dim // VALUE_BLOCK)
    grid = (parts, batch * heads)
    keys_values_kernel[grid](qkv, keys, key_scale, values, value_scale, **first)
    blocks = -(-tokens // second["BLOCK_Q"])
    attention_kernel[(blocks * batch * heads,)](
        out, qkv, keys, key_scale, values, value_scale, **second
    )
    return out


def constants(
    tokens: int, heads: int, head_dim: int, limit: int, batch: int
) -> tuple[dict[str, int], dict[str, int | float]]:
    """Constants of a launch of both kernels."""
    main = max(SMALLEST, next_power_of_2(head_dim + 1) // 2)
    rest = 0 if head_dim <= main else max(SMALLEST, next_power_of_2(head_dim - main))
    block_k = min(WHOLE_ROW // 2, max(SMALLEST, next_power_of_2(tokens)))
    if block_k < tokens <= WHOLE_ROW:
        block_k = WHOLE_ROW
    padded = -(-tokens // block_k) * block_k
    many = batch * heads * -(-tokens // 128) >= FEW_BLOCKS
    shared = {"T": tokens, "PADDED": padded, "HEADS": heads, "LIMIT": limit}
    shared |= {"D": head_dim, "MAIN": main, "REST": rest}
    key_block = min(KEY_BLOCK, padded)
    first = {
        **shared,
        "KEY_BLOCK": key_block,
        "KEY_BLOCKS": padded // key_block,
        "BLOCK_T": block_k,
        "BLOCK_C": VALUE_BLOCK,
        "num_warps": 4,
    }
    block_q = 128 if many and tokens > 64 else 64
    second: dict[str, int | float] = {
        **shared,
        "EXPONENT": math.log2(math.e) / math.sqrt(head_dim),
        "LOG2_LIMIT": math.log2(limit),
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "num_warps": block_q // 16,
    }
    return first, second
