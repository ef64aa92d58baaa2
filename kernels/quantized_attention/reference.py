"""Attention with both products in integers: the definition, in PyTorch.

    s_ij = (q_i . k_j) / sqrt(D)          q and k as integers with a scale per token
    p_ij = softmax_j(s_ij)                float32, then integers with a scale per query
    y_i  = sum_j p_ij v_j                 v as integers with a scale per channel

A row x becomes round(x / scale), half to even, of scale = max|x| / limit. The largest probability
of a query is exp(0) / sum, so with e_ij = exp(s_ij - max_j s_ij) the integers of its row are
round(limit e_ij) and their scale is 1 / (limit sum_j e_ij): both follow from maximum and sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.launch import KernelInputError, check_tensor

OP = "quantized_attention"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_LIMIT = 127
EXACT_FLOAT32 = 2**24
"""Float32 adds integers exactly while no sum is larger."""


@torch.no_grad()
def quantized_attention(
    qkv: Tensor, *, heads: int, limit: int, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Multi-head self-attention between its two linear layers; nothing has a gradient.

    A row of zeros stays zeros. A NaN or infinite value makes all results that it enters NaN.

    Args:
        qkv: [B, T, 3 C], contiguous: queries, keys and values, each [heads, D] with D = C / heads.
            float32, bfloat16 or float16.
        heads: number of heads.
        limit: largest magnitude of an integer, 2^(bits - 1) - 1; at most 127.
        out_dtype: of the result, one of the same.

    Returns:
        [B, T, C] in `out_dtype`.

    Raises:
        KernelInputError: a tensor of another shape, dtype or layout, or a limit out of range.
    """
    head_dim = check_inputs(qkv, heads, limit, out_dtype, anywhere=True)
    batch, tokens, _ = qkv.shape
    q, k, v = qkv.float().view(batch, tokens, 3, heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    q_codes, q_scale = _codes(q, limit)
    k_codes, k_scale = _codes(k, limit)
    v_codes, v_scale = _codes(v.mT, limit)  # a row is a channel, over the tokens
    scores = _product(q_codes, k_codes, limit) * (q_scale * head_dim**-0.5) * k_scale.mT
    weights = (scores - scores.amax(-1, keepdim=True)).exp_()
    total = weights.sum(-1, keepdim=True)
    p_codes = weights.mul_(limit).round_().nan_to_num_(nan=0.0)
    out = _product(p_codes, v_codes, limit) * (1 / (limit * total)) * v_scale.mT
    return out.transpose(1, 2).reshape(batch, tokens, -1).to(out_dtype)


def _codes(x: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Integers, held as float32, and the scale of every row of x [..., n]."""
    scale = x.abs().amax(-1, keepdim=True) / limit
    scale = scale.masked_fill(~(scale < math.inf), math.nan)
    inverse = scale.reciprocal().nan_to_num_(nan=0.0, posinf=0.0)
    return (x * inverse).round_().nan_to_num_(nan=0.0), scale


def _product(a: Tensor, b: Tensor, limit: int) -> Tensor:
    """a @ b.mT of integers in float32 [..., n] of at most `limit`, exact before its rounding."""
    dtype = torch.float32 if a.shape[-1] * limit**2 <= EXACT_FLOAT32 else torch.float64
    return (a.to(dtype) @ b.to(dtype).mT).float()


def check_inputs(
    qkv: Tensor, heads: int, limit: int, out_dtype: torch.dtype, *, anywhere: bool
) -> int:
    """The width D of a head; KernelInputError for what is not supported.

    Args:
        anywhere: whether qkv may be on any device, as for the reference.
    """
    like = qkv if anywhere else None
    check_tensor(OP, "qkv", qkv, shape=(None, None, None), dtypes=FLOATS, like=like)
    _, tokens, width = qkv.shape
    if heads < 1 or width == 0 or width % (3 * heads):
        raise KernelInputError(
            f"{OP}: qkv must be [B, T, 3 C] with C a multiple of heads = {heads}, got "
            f"{list(qkv.shape)}"
        )
    if not 1 <= limit <= MAX_LIMIT:
        raise KernelInputError(f"{OP}: limit must be 1 to {MAX_LIMIT}, got {limit}")
    if not 1 <= tokens < 2**31 // limit**2:
        raise KernelInputError(
            f"{OP}: {tokens} tokens are not supported: 1 to {2**31 // limit**2 - 1} are, whose "
            "sums int32 holds"
        )
    if out_dtype not in FLOATS:
        raise KernelInputError(f"{OP}: out_dtype must be float32, bfloat16 or float16")
    return width // (3 * heads)
