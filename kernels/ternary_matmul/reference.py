"""Ternary weight times int8 codes with its epilogues: the definition, in plain PyTorch.

Sums of integers are exact: a product of integer-valued float32 matrices is, while no partial sum
reaches 2^24. The epilogue is float32, rounded once to the output's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import KernelInputError
from kernels.ternary_matmul.layout import unpack_planes
from kernels.ternary_matmul.operands import MAX_CODE, Operands, check_operands

EXACT_WIDTH = 2**24 // (2 * MAX_CODE)
"""First width K at which a float32 sum of (w + 1) * code may no longer be exact."""


def integer_product(codes: Tensor, planes: Tensor) -> Tensor:
    """Exact sum_k (w_nk + 1) c_mk.

    Args:
        codes: int8 [..., M, K].
        planes: uint8 [..., N, ceil(K / 128) * 32], of `layout.pack_planes`.

    Returns:
        int32 [..., M, N].

    Raises:
        KernelInputError: K is so large that float32 sums need not be exact.
    """
    width = codes.shape[-1]
    if width >= EXACT_WIDTH:
        raise KernelInputError(
            f"ternary_matmul reference: K = {width} is not exact in float32; K < {EXACT_WIDTH} is"
        )
    stored = unpack_planes(planes, width).float() + 1
    return (codes.float() @ stored.mT).to(torch.int32)


def ternary_matmul(
    codes: Tensor,
    planes: Tensor,
    *,
    token_scale: Tensor,
    token_offset: Tensor,
    code_sums: Tensor,
    channel_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor | None = None,
    branch: Tensor | None = None,
    up: Tensor | None = None,
    gelu: bool = False,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    tokens_per_image: int = 1,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Linear layer with packed ternary weight and quantized tokens.

    y[m, n] = channel_scale_n (token_scale_m sum_k w_nk c_mk + token_offset_m weight_sums_n)
              + sum_r up_nr branch_mr + bias_n,
    then GELU (tanh), then gate[m // tokens_per_image, n] * y + residual[m, n].

    Args:
        codes: int8 [M, K], contiguous.
        planes: uint8 [N, ceil(K / 128) * 32], of `layout.pack_planes`.
        token_scale, token_offset: float32 [M].
        code_sums: int32 [M], sum_k c_mk; it undoes the + 1 of the packed weights.
        channel_scale: float32 [N].
        weight_sums: int32 [N], sum_k w_nk.
        bias: [N].
        branch, up: [M, r] and [N, r], given together; branch is rounded to the dtype of `up`.
        gelu: whether to apply GELU in its tanh form.
        gate: [M / tokens_per_image, N].
        residual: [M, N].
        tokens_per_image: rows that share one row of `gate`.
        out_dtype: of the result. Floating tensors are float32, bfloat16 or float16.

    Returns:
        [M, N] in `out_dtype`.

    Raises:
        KernelInputError: a tensor of another shape, dtype, device or layout.
    """
    checked = check_operands(
        "ternary_matmul",
        codes,
        planes,
        token_scale=token_scale,
        token_offset=token_offset,
        code_sums=code_sums,
        channel_scale=channel_scale,
        weight_sums=weight_sums,
        bias=bias,
        branch=branch,
        up=up,
        gelu=gelu,
        gate=gate,
        residual=residual,
        tokens_per_image=tokens_per_image,
        out_dtype=out_dtype,
        grouped=False,
        anywhere=True,
    )
    return _product(checked)


def grouped_ternary_matmul(
    codes: Tensor,
    planes: Tensor,
    *,
    token_scale: Tensor,
    token_offset: Tensor,
    code_sums: Tensor,
    channel_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor | None = None,
    branch: Tensor | None = None,
    up: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The same for G layers of one shape: every tensor of `ternary_matmul` with a leading G.

    Returns:
        [G, M, N] in `out_dtype`.

    Raises:
        KernelInputError: a tensor of another shape, dtype, device or layout.
    """
    checked = check_operands(
        "grouped_ternary_matmul",
        codes,
        planes,
        token_scale=token_scale,
        token_offset=token_offset,
        code_sums=code_sums,
        channel_scale=channel_scale,
        weight_sums=weight_sums,
        bias=bias,
        branch=branch,
        up=up,
        out_dtype=out_dtype,
        grouped=True,
        anywhere=True,
    )
    return _product(checked)


def _product(x: Operands) -> Tensor:
    sums = integer_product(x.codes, x.planes) - x.code_sums[..., :, None]
    y = x.token_scale[..., :, None] * sums.float()
    y = y + x.token_offset[..., :, None] * x.weight_sums[..., None, :].float()
    y = y * x.channel_scale[..., None, :]
    if x.branch is not None and x.up is not None:
        y = y + x.branch.to(x.up.dtype).float() @ x.up.float().mT
    if x.bias is not None:
        y = y + x.bias.float()[..., None, :]
    if x.gelu:
        y = F.gelu(y, approximate="tanh")
    if x.gate is not None:
        y = y * x.gate.float().repeat_interleave(x.tokens_per_image, dim=0)
    if x.residual is not None:
        y = y + x.residual.float()
    return y.to(x.out_dtype)
