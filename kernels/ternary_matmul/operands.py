"""Operands of a ternary matrix multiplication: what is supported, checked once for all variants."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.launch import KernelInputError, check_tensor
from kernels.ternary_matmul.layout import packed_width

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

MAX_CODE = 128
"""Largest magnitude of an int8 code."""


@dataclass(frozen=True)
class Operands:
    """Checked operands. A single product has G = 1 and the tensors keep no group dimension.

    `groups`, `rows`, `outputs` and `width` are G, M, N and K; `rank` is 0 without a branch.
    """

    groups: int
    rows: int
    outputs: int
    width: int
    rank: int
    codes: Tensor
    planes: Tensor
    token_scale: Tensor
    token_offset: Tensor
    code_sums: Tensor
    channel_scale: Tensor
    weight_sums: Tensor
    bias: Tensor | None
    branch: Tensor | None
    up: Tensor | None
    gelu: bool
    gate: Tensor | None
    residual: Tensor | None
    tokens_per_image: int
    out_dtype: torch.dtype


def check_operands(
    op: str,
    codes: Tensor,
    planes: Tensor,
    *,
    token_scale: Tensor,
    token_offset: Tensor,
    code_sums: Tensor,
    channel_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor | None,
    branch: Tensor | None,
    up: Tensor | None,
    gelu: bool = False,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    tokens_per_image: int = 1,
    out_dtype: torch.dtype,
    grouped: bool,
    anywhere: bool = False,
    unpacked: bool = False,
) -> Operands:
    """Check every tensor; KernelInputError says what is supported.

    Args:
        grouped: whether tensors carry a leading group dimension.
        anywhere: whether any device will do, as for the reference.
        unpacked: whether `planes` are not packed: int8 [N, K].
    """
    g: tuple[int | None, ...] = (None,) if grouped else ()
    like = codes if anywhere else None
    check_tensor(op, "codes", codes, shape=(*g, None, None), dtypes=(torch.int8,), like=like)
    group = (codes.shape[0],) if grouped else ()
    m, k = codes.shape[-2], codes.shape[-1]
    if k == 0:
        raise KernelInputError(f"{op}: codes must have at least one column")
    if k * 2 * MAX_CODE >= 2**31:
        raise KernelInputError(f"{op}: K = {k} overflows int32 sums; K < {2**30 // MAX_CODE} works")

    def check(name: str, tensor: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
        check_tensor(op, name, tensor, shape=(*group, *shape), dtypes=dtypes, like=codes)

    check_tensor(
        op,
        "planes",
        planes,
        shape=(*group, None, k if unpacked else packed_width(k)),
        dtypes=(torch.int8 if unpacked else torch.uint8,),
        like=codes,
    )
    n = planes.shape[-2]
    check("token_scale", token_scale, (m,), torch.float32)
    check("token_offset", token_offset, (m,), torch.float32)
    check("code_sums", code_sums, (m,), torch.int32)
    check("channel_scale", channel_scale, (n,), torch.float32)
    check("weight_sums", weight_sums, (n,), torch.int32)
    if bias is not None:
        check("bias", bias, (n,), *FLOATS)
    rank = 0
    if branch is not None and up is not None:
        rank = up.shape[-1]
        if rank == 0:
            raise KernelInputError(f"{op}: up has rank 0; pass branch=None and up=None instead")
        check("branch", branch, (m, rank), *FLOATS)
        check("up", up, (n, rank), *FLOATS)
    elif branch is not None or up is not None:
        raise KernelInputError(f"{op}: branch and up must be given together")
    if residual is not None:
        check("residual", residual, (m, n), *FLOATS)
    if gate is not None:
        if tokens_per_image < 1 or m % tokens_per_image:
            raise KernelInputError(
                f"{op}: {m} rows are no multiple of tokens_per_image = {tokens_per_image}"
            )
        check("gate", gate, (m // tokens_per_image, n), *FLOATS)
    if out_dtype not in FLOATS:
        raise KernelInputError(f"{op}: out_dtype must be float32, bfloat16 or float16")
    return Operands(
        groups=codes.shape[0] if grouped else 1,
        rows=m,
        outputs=n,
        width=k,
        rank=rank,
        codes=codes,
        planes=planes,
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
        tokens_per_image=tokens_per_image if gate is not None else 1,
        out_dtype=out_dtype,
    )
